"""RotateKV: the card's worked examples, rotation and RoPE, sinks, the calibrated order, bytes."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

import workbench as wb
from tests.builders import ARCHITECTURES, build, cache_for, feed, network, prompt
from workbench.cache.cache import WorkbenchCache
from workbench.cache.hidden import decoder_layers
from workbench.cache.positions import Gaps
from workbench.cache.schemes.rotated import Rotated, integers, rotated_together
from workbench.cache.tiers import TieredSegment
from workbench.models.rope import Rope
from workbench.strategies.quantization.rotatekv import RotateKV, divisor, sinks_of, statistics
from workbench_kernels import hadamard


def values_of(x: Tensor, bits: int, clip: float) -> tuple[list, Tensor]:
    codes, scale, zero = integers(x, bits, clip)
    return codes.tolist(), (codes.float() - zero.float()[..., None]) * scale.float()[..., None]


# -- the card, section 7 -------------------------------------------------------------------------------------------------

K = torch.tensor([[8.0, 1, -1, 0], [6, 0, 2, -1]])


def test_card_rotation_lessens_the_error() -> None:
    turned = hadamard(K)
    assert turned.tolist() == [[4, 3, 5, 4], [3.5, 4.5, 2.5, 1.5]] and torch.equal(hadamard(turned), K)
    codes, plain = values_of(K, 2, 1.0)
    assert codes == [[3, 0, 0, 0], [3, 0, 1, 0]]
    torch.testing.assert_close(plain, torch.tensor([[9, 0, 0, 0], [7, 0, 2.333333, 0]]), atol=2e-3, rtol=0)
    assert float((plain - K).square().mean()) == pytest.approx(0.638889, abs=2e-3)


def test_card_rotated_codes() -> None:
    """One and a half times the card's numbers, whose scales float16 holds: the codes are the same."""
    codes, found = values_of(hadamard(1.5 * K), 2, 1.0)
    assert codes == [[2, 0, 3, 2], [2, 2, 0, 0]]
    back = hadamard(found) / 1.5
    expected = torch.tensor([[7.666667, 1, -1, 0.333333], [6, 0, 2, 0]])
    torch.testing.assert_close(back, expected, atol=1e-5, rtol=0)
    assert float((back - K).square().mean()) == pytest.approx(0.152778, abs=1e-5)


@pytest.mark.parametrize("clip, zero, expected", [(1.0, 0, [0.0, 0, 2, 4]), (0.8, 1, [-1.6, 0, 1.6, 3.2])])
def test_card_integer_zero_and_clip(clip: float, zero: int, expected: list[float]) -> None:
    x = torch.tensor([[-1, 0.4, 2, 5]])
    *_, found = integers(x, 2, clip)
    assert found.tolist() == [zero]
    torch.testing.assert_close(values_of(x, 2, clip)[1][0], torch.tensor(expected), atol=2e-3, rtol=0)


def test_card_sinks() -> None:
    hidden = torch.tensor([[0.0, 0, 50, -40], [1, 2, 1, 1], [0, 30, 0, 0]])
    tokens = hidden.abs().flatten().topk(3).indices // 4
    assert sorted(tokens.tolist()) == [0, 0, 2] and sinks_of(tokens[None]).tolist() == [[0, 2]]


# -- the quantizer -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(arrays(np.float32, (3, 32), elements=st.floats(-1000, 1000, width=32)), st.sampled_from([2, 4, 8]))
def test_the_error_is_at_most_a_step_where_the_zero_is_near(x: np.ndarray, bits: int) -> None:
    given = torch.from_numpy(x)
    codes, scale, zero = integers(given, bits, 1.0)
    decoded = (codes.float() - zero.float()[..., None]) * scale.float()[..., None]
    assert torch.isfinite(decoded).all()
    spread = given.amax(-1) - given.amin(-1)
    step = spread / ((1 << bits) - 1)
    # An integer zero point shifts both ends by up to half a step; float16 scales cost 2^-11 of the number.
    bound = torch.where(codes.amax(-1) == 0, spread / 2, 1.01 * step) + given.abs().amax(-1) * 2**-10 + 1e-6
    assert ((decoded - given).abs().amax(-1) <= bound).all()


@settings(deadline=None, max_examples=50)
@given(st.floats(-60000, 60000, width=16), st.sampled_from([2, 4, 8]))
def test_constant_groups_are_exact(value: float, bits: int) -> None:
    assert values_of(torch.full((2, 16), value), bits, 1.0)[1].unique().tolist() == [value]


def test_a_narrow_group_far_from_zero_is_its_middle() -> None:
    found = values_of(torch.linspace(30000, 30001, 16)[None], 2, 1.0)[1]
    assert (found - 30000.5).abs().max() <= 16  # float16's own spacing there


# -- rotation and RoPE ---------------------------------------------------------------------------------------------------

ROPE = Rope(10000.0 ** -(torch.arange(8) / 8))


def keys(n: int, heads: int = 4, dim: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(1, heads, n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("span", [1, 2, 4])
@pytest.mark.parametrize("ordered", [True, False])
def test_without_rounding_keys_come_back(span: int, ordered: bool) -> None:
    k, at = keys(30), torch.arange(100, 130)[None, None]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).to(torch.int16) if ordered else None
    scheme = Rotated(4, 8, 64, 1.0, span, order, ROPE)
    torch.testing.assert_close(scheme.undo(scheme.rotate(k, at), at), k, atol=1e-4, rtol=1e-4)
    decoded = scheme.decode(scheme.encode(k, at), (0, 30), torch.float32, at)
    assert (decoded - k).abs().max() < 0.05


def test_lengths_stay_and_heads_mix_as_far_as_they_are_together() -> None:
    k = keys(5)
    torch.testing.assert_close(rotated_together(k, 4).norm(dim=-1), k.transpose(1, 2).flatten(2).norm(dim=-1))
    alone = torch.zeros(1, 4, 1, 16)
    alone[0, 2, 0, 3] = 1.0
    for span, touched in ((1, 16), (2, 32), (4, 64)):
        assert int((rotated_together(alone, span) != 0).sum()) == touched


def test_rotating_after_rope_is_something_else() -> None:
    k, at = keys(3), torch.arange(50, 53)
    before = rotated_together(ROPE.unrotate(k, at), 1)
    turned = ROPE.rotate(before.unflatten(-1, (4, 16)).transpose(1, 2), at)
    assert (turned.transpose(1, 2).flatten(2) - rotated_together(k, 1)).abs().max() > 0.5


def test_channels_of_like_level_in_one_group_lessen_the_error() -> None:
    """An outlier channel of every head becomes a level of many rotated channels; in order, groups have one level each."""
    at = torch.arange(200)[None, None]
    k = keys(200)
    k[..., 5] += 25.0
    order = rotated_together(k, 4).mean((0, 1)).argsort().to(torch.int16)
    k, errors = ROPE.rotate(k, at), []
    for scheme in (Rotated(4, 2, 16, 1.0, 4, order, ROPE), Rotated(4, 2, 16, 1.0, 4, None, ROPE)):
        found = scheme.decode(scheme.encode(k, at), (0, 200), torch.float32, at)
        errors.append(float((found - k).square().mean()))
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("heads, wanted, expected", [(8, 4, 4), (2, 4, 2), (6, 4, 2), (3, 8, 1), (8, 1, 1)])
def test_as_many_heads_as_divide(heads: int, wanted: int, expected: int) -> None:
    assert divisor(heads, wanted) == expected


@pytest.mark.parametrize("skip", [0, 3, 11])
def test_gaps_are_the_numbers_without_the_holes(skip: int) -> None:
    holes = torch.tensor([[5, 6, 9], [7, 12, 20]], dtype=torch.int32)
    gaps = Gaps(5, 17, holes, 2)
    expected = [[p for p in range(5, 40) if p not in row][:17] for row in holes.tolist()]
    assert gaps.read(0, 17)[:, 1].tolist() == expected
    gaps.append(torch.zeros(2, 2, 3))
    expected = [[p for p in range(5, 40) if p not in row][:20] for row in holes.tolist()]
    later = gaps.after(skip) if skip else gaps
    assert later.read(0, 20 - skip)[:, 0].tolist() == [row[skip:] for row in expected]
    assert later.read(4, 7)[:, 0].tolist() == [row[skip:][4:7] for row in expected]


# -- in a model ----------------------------------------------------------------------------------------------------------


def run(recipe: str, later: int = 0, name: str = "llama", chunk: int | None = None) -> WorkbenchCache:
    cache = cache_for(build(name), recipe, 60)
    feed(build(name), cache, prompt(60), chunk)
    if later:
        feed(build(name), cache, prompt(later, seed=1), 1)
    return cache


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != "gpt2"])
@pytest.mark.parametrize("chunk", [None, 17])
def test_sinks_are_the_tokens_of_the_largest_hidden_numbers(name: str, chunk: int | None) -> None:
    cache = run("rotatekv(pivots=6, group_size=16)", name=name, chunk=chunk)
    with torch.inference_mode():
        hidden = network(name, "eager")(torch.tensor([prompt(60)]), output_hidden_states=True).hidden_states
    for layer, entering in zip(cache.layers, hidden):
        tokens = set((entering[0].abs().flatten().topk(6).indices // entering.shape[-1]).tolist())
        segment = layer.store.segments[0]
        held = set(segment.tiers[0].positions_of(0).tolist()) if isinstance(segment, TieredSegment) else set()
        window = layer.sliding_window
        assert held == {t for t in tokens if window is None or t >= 60 - window}


def test_hooks_are_gone_after_the_prompt_with_a_fork_and_with_the_cache() -> None:
    gc.collect()  # a cache and its layers know each other
    layers = decoder_layers(build().geometry)

    def hooks() -> int:
        return sum(len(layer._forward_pre_hooks) for layer in layers)

    before = hooks()
    cache = cache_for(build(), "rotatekv(group_size=16)", 60)
    assert hooks() == before + 3
    feed(build(), cache, prompt(30))
    twin = cache.clone()  # in the middle of the prompt
    assert hooks() == before + 6
    for each in (cache, twin):
        feed(build(), each, prompt(30, seed=2))
    assert hooks() == before
    assert [cache.kept(0, 0), cache.layers[0].hidden] == [twin.kept(0, 0), None]
    cache.clone()
    unread = cache_for(build(), "rotatekv(group_size=16)", 60)
    del unread
    gc.collect()
    assert hooks() == before


def test_another_cache_of_the_same_model_hears_nothing() -> None:
    ours, theirs = cache_for(build(), "rotatekv(group_size=16)", 60), cache_for(build(), "full", 60)
    feed(build(), theirs, prompt(60))
    assert ours.layers[0].hidden is None and theirs.layers[0].hidden is None


def test_channels_share_scales_in_the_calibrated_order() -> None:
    for reorder in ("signed", "magnitude"):
        cache = run(f'rotatekv(reorder="{reorder}", group_size=16)')
        statistic = build().artifacts.get(RotateKV.artifact_kind).tensors[reorder][1]  # of two heads together
        for layer in cache.layers:
            order = layer.store.codec.pair.keys.order
            assert (statistic[layer.index][order.long()].diff() >= 0).all()
    assert run('rotatekv(reorder="none", group_size=16)').layers[0].store.codec.pair.keys.order is None


def test_statistics_are_means_of_rotated_keys() -> None:
    k = keys(20)
    found = statistics(k)
    assert found["signed"].shape == (4, 64)
    for number, span in enumerate((1, 2, 4, 4)):
        turned = rotated_together(k, span)[0].double()
        torch.testing.assert_close(found["signed"][number], turned.sum(0))
        torch.testing.assert_close(found["magnitude"][number], turned.abs().sum(0))


def test_without_a_calibration_a_sentence_says_how_to_make_one_and_none_is_needed_without_an_order() -> None:
    from workbench.models.load import Model

    bare = Model("test/bare", network("llama", "workbench"), None)
    with pytest.raises(wb.WorkbenchError, match="kvw calibrate rotatekv"):
        wb.cache("rotatekv(group_size=16)", bare)
    wb.cache('rotatekv(reorder="none", group_size=16)', bare)


@pytest.mark.parametrize("bits, group", [(2, 32), (4, 32), (4, 16)])
def test_bytes_are_those_of_the_cards_formula(bits: int, group: int) -> None:
    cache = run(f"rotatekv(bits={bits}, group_size={group})", later=7)
    width = 2 * 16
    for layer in cache.layers:
        segment = layer.store.segments[0]
        assert isinstance(segment, TieredSegment)
        sinks = segment.tiers[0].length
        rest = 67 - sinks
        coded = 2 * rest * width * bits // 8 + 2 * rest * width // group * 4
        beside = width * 2 + sinks * 2 * (2 * width // 2 * 4 + 4)  # the order, sinks in float32 and their positions
        assert sum(layer.nbytes().values()) == coded + beside


def test_heads_with_different_tokens_are_rotated_each_by_itself() -> None:
    cache = run("adakv(budget=0.5, window=8) | rotatekv(bits=8, group_size=16)", later=5)
    exact = run("adakv(budget=0.5, window=8)", later=5)
    for ours, theirs in zip(cache.layers[:1], exact.layers[:1]):
        for row in range(2):
            assert (ours.store.entries(row)[0] - theirs.store.entries(row)[0]).abs().max() < 0.1


def test_a_model_without_rope_is_refused() -> None:
    with pytest.raises(wb.RecipeError, match="rotary position embeddings"):
        run("rotatekv(group_size=16)", name="gpt2")
