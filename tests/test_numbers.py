"""What a lane's numbers are off by, and the bits they take: by hand, by brute force, and to the byte."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import workbench as wb
from tests.builders import build, prompt
from workbench.cache.coded import CodedSegment
from workbench.inspection.numbers import CODED, GONE, PLAIN, RESIDUAL, pooled, steps
from workbench.runs.control import Control
from workbench.runs.prompt import Cancelled, take_snapshot
from workbench.runs.replay import finish, numbers, scored

NAN = math.nan
T = 100
QUANTIZED = [
    "kivi(bits=2, group_size=16, residual_length=32)",
    "rtn(bits=4)",
    'rtn(axis="channel", group_size=16)',
    "gear(bits=4, group_size=16, residual_length=16)",
    "zipcache(bits=4, low_bits=2)",
    "mikv(bits=2, high_bits=8)",
    "mikv(importance=0.5)",
    "bfp()",
    "mustafar()",
    'rotatekv(bits=4, reorder="none")',
    "xquant(bits=4)",
]
RECIPES = [
    *QUANTIZED,
    "full",
    "snapkv(budget=0.4, window=8)",
    "adakv(budget=0.4, window=8)",
    "think(ratio=0.5, recent=16)",
]
COUNTED = (
    "codes",
    "scales",
    "window",
    "keys",
    "values",
    "outliers",
    "factors",
    "bitmaps",
)  # bytes that belong to a token


def held(recipe: str, name: str = "qwen3") -> tuple[Any, Any, Any]:
    model, ids = build(name), prompt(T)
    snapshot = finish(take_snapshot(model, ids, 2048, Control()))
    found = finish(numbers(model, snapshot.cache, ids, recipe, snapshot=snapshot))
    return found, finish(scored(model, ids, recipe))[1], snapshot.cache


def test_pooled_by_hand() -> None:
    grid = torch.full((1, 256, 128), NAN)
    grid[0, 0, 0], grid[0, 1, 1], grid[0, 255, 127] = -1.0, -3.0, 2.0
    assert steps(256, 128) == (2, 2) and steps(129, 65) == (2, 2) and steps(1, 1) == (1, 1)
    cells = pooled(grid)
    assert cells.shape == (1, 128, 64)
    assert float(cells[0, 0, 0]) == -1.0 and float(cells[0, -1, -1]) == 2.0
    assert int(cells.isnan().sum()) == cells.numel() - 2
    assert pooled(torch.ones(1, 129, 3)).shape == (1, 65, 3)  # the last cell has one token


@pytest.mark.parametrize("recipe", RECIPES)
def test_maps_are_the_differences_of_what_both_hold(recipe: str) -> None:
    found, cache, reference = held(recipe)
    for layer, sides in enumerate(found.layers):
        for head in range(2):
            ours = cache.layers[layer].store.entries(head)
            theirs = reference.layers[layer].store.entries(head)
            at = ours[2].long()
            for side, data in enumerate((sides.keys, sides.values)):
                assert data.step == (1, 1)
                torch.testing.assert_close(data.size[head], theirs[side].abs())
                wrong = (ours[side] - theirs[side][at]).abs()
                torch.testing.assert_close(data.error[head, at], wrong, atol=1e-5, rtol=1e-5)
                gone = torch.ones(T, dtype=torch.bool)
                gone[at] = False
                assert bool(data.error[head, gone].isnan().all()) and bool(data.bits[head, gone].isnan().all())
                torch.testing.assert_close(data.state[head] == GONE, gone)
                expected = wrong.norm() / theirs[side][at].norm()
                torch.testing.assert_close(data.relative[head], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_bits_are_the_measured_bytes(recipe: str) -> None:
    found, cache, _ = held(recipe)
    for layer, sides in zip(cache.layers, found.layers, strict=True):
        bits = sum(float(side.bits.float().nansum()) for side in (sides.keys, sides.values))
        size = sum(n for kind, n in layer.store.nbytes().items() if kind in COUNTED)
        segments = [s for held_by in layer.store.segments for s in getattr(held_by, "tiers", [held_by])]
        shared = {id(x): x for s in segments if isinstance(s, CodedSegment) for _, x in s.shared()}  # of no token
        size -= sum(x.nbytes for x in shared.values())
        assert bits * 32 / 8 == pytest.approx(size, rel=1e-3)  # bits are rounded to float16


def test_full_is_held_as_it_is() -> None:
    found, _, _ = held("full")
    for sides in found.layers:
        for side in (sides.keys, sides.values):
            assert bool((side.state == PLAIN).all()) and bool((side.bits == 32).all())
            assert float(side.error.max()) == 0 and float(side.relative.max()) == 0
    assert found.saliency == [None] * 3 and found.nbytes > 0


def test_keys_and_values_leave_the_residual_at_their_own_times() -> None:
    found, _, _ = held("kivi(bits=2, group_size=16, residual_length=32)")
    keys, values = found.layers[0].keys, found.layers[0].values
    assert (keys.state[0] == CODED).tolist() == [True] * 96 + [False] * 4  # whole groups of the residual's length
    assert (values.state[0] == CODED).tolist() == [True] * 68 + [False] * 32  # the newest 32 stay
    assert int((keys.state == RESIDUAL).sum()) == 8 and int((values.state == RESIDUAL).sum()) == 64  # of two heads
    assert float(keys.error[0, 96:].max()) == 0 < float(keys.error[0, :96].max())
    assert float(keys.bits[0, 0]) == 2 + 32 / 16  # two float16 numbers for a group of 16


@pytest.mark.parametrize("recipe, recent", [("zipcache(bits=4, low_bits=2)", 0), ("mikv(bits=2, high_bits=8)", 10)])
def test_precision_follows_saliency(recipe: str, recent: int) -> None:
    """But for the newest tokens, half of the fifth that MiKV holds well."""
    found, _, _ = held(recipe)
    older = slice(0, T - recent)
    for sides, saliency in zip(found.layers, found.saliency, strict=True):
        assert saliency is not None and saliency.shape == (2, T)
        for head in range(2):
            bits = sides.values.bits[head, older]
            assert float(bits.min()) < float(bits.max())
            many, few = (saliency[head, older][bits == level] for level in (bits.max(), bits.min()))
            assert float(many.min()) >= float(few.max())


def test_a_rotation_changes_neither_length_nor_error_of_a_token() -> None:
    found, _, _ = held('rotatekv(bits=4, reorder="none")')
    for side in (found.layers[0].keys, found.layers[0].values):
        assert side.rotated is not None and side.rotated[0].shape == (1, T, 64)  # two heads of 32 channels together
        coded = (side.state == CODED).all(0)
        assert bool(coded.any()) and bool(side.rotated[1][0, ~coded].isnan().all())
        for plain, turned in zip((side.size, side.error), side.rotated, strict=True):
            lengths = plain.square().sum((0, 2)).sqrt()
            torch.testing.assert_close(turned[0].norm(dim=-1)[coded], lengths[coded], rtol=1e-3, atol=1e-4)
    assert held("kivi(group_size=16)")[0].layers[0].keys.rotated is None


def test_more_bits_are_nearer() -> None:
    off = [held(f"rtn(bits={bits})")[0].layers[1].keys.relative for bits in (4, 8)]
    assert bool((off[1] < off[0] / 8).all())


def test_a_comparison_knows_its_numbers_while_the_reference_is_held() -> None:
    cmp = wb.compare(build("qwen3"), prompt(T), ["full", "rtn(bits=8)"], max_new_tokens=2)
    assert 0 < float(cmp.numbers(1).layers[0].keys.relative.max()) < 0.02
    cmp._trace = None
    with pytest.raises(wb.WorkbenchError, match="did not finish"):
        cmp.numbers(1)


def test_measuring_can_be_cancelled() -> None:
    model, ids, control = build(), prompt(T), Control()
    snapshot = finish(take_snapshot(model, ids, 2048, Control()))
    steps_ = numbers(model, snapshot.cache, ids, "full", control=control, snapshot=snapshot)
    next(steps_)
    control.cancel()
    with pytest.raises(Cancelled):
        finish(steps_)


@pytest.mark.parametrize(
    "recipe, paths",
    [
        ("full", []),
        ("kivi(bits=2, group_size=16, residual_length=16)", ["fused"]),
        ("adakv(budget=0.8, window=8) | kivi(bits=2, group_size=16, residual_length=16)", ["fused"]),
        ("gear(bits=4, group_size=16, residual_length=16)", ["dequantize"]),
        ("xquant(bits=4)", ["rebuild"]),
    ],
)
def test_a_lane_names_how_its_codes_were_read(recipe: str, paths: list[str]) -> None:
    cmp = wb.compare(build("qwen3"), prompt(T), ["full", recipe], max_new_tokens=4)
    assert cmp[1].decode_paths == paths
