"""Mustafar: the method card's worked examples, exact bytes, and the laws of pruning by magnitude."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

import workbench as wb
from tests.builders import build, cache_for, feed, prompt
from workbench.cache.coded import CodedSegment
from workbench.cache.schemes.bitmap import prune
from workbench.cache.segments import Query
from workbench.strategies.quantization.mustafar import Mustafar
from workbench_kernels import attention_reference
from workbench_kernels.sparse import bits_of

X = torch.tensor([0.1, -3, 0.5, 2, -0.2, 0, 1, -0.7])


@pytest.mark.parametrize(
    "sparsity, kept",
    [(0.5, [0, -3, 0.5, 2, 0, 0, 1, -0.7]), (0.7, [0, -3, 0, 2, 0, 0, 1, -0.7]), (0.0, X.tolist())],
)
def test_the_cards_token(sparsity: float, kept: list[float]) -> None:
    assert torch.equal(prune(X, sparsity), torch.tensor(kept))


@pytest.mark.parametrize("sparsity, left", [(0.5, 65), (0.7, 40), (0.0, 128), (1.0, 1)])
def test_how_many_of_128_stay(sparsity: float, left: int) -> None:
    x = torch.randn(20, 128, generator=torch.Generator().manual_seed(0))
    assert ((prune(x, sparsity) != 0).sum(-1) == left).all()


def test_ties_stay() -> None:
    assert prune(torch.tensor([2.0, -2.0, 2.0, 1.0]), 0.75).tolist() == [2, -2, 2, 0]
    assert prune(torch.tensor([1.0, 1.0, 1.0, 1.0]), 0.9).tolist() == [1, 1, 1, 1]


@settings(deadline=None, max_examples=60)
@given(arrays(np.float32, (3, 16), elements=st.floats(-(2.0**100), 2.0**100, width=32)), st.floats(0, 1))
def test_what_stays_is_unchanged_and_no_smaller_than_what_goes(x: np.ndarray, sparsity: float) -> None:
    x = torch.from_numpy(x)
    pruned = prune(x, sparsity)
    gone = pruned != x
    assert (pruned[gone] == 0).all() and gone.sum(-1).max() <= max(1, int(sparsity * 16 + 1e-9)) - 1
    for row, dropped, held in zip(x.abs(), gone, pruned != 0, strict=True):
        if dropped.any():
            assert row[dropped].max() < row[held].min()


def fill(
    tokens: int, codec: Mustafar, dim: int = 64, dtype: torch.dtype = torch.float32, batch: int = 1
) -> CodedSegment:
    k, v = torch.randn(2, batch, 2, tokens, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    view: Any = SimpleNamespace(chunk=k)
    return codec.codec(view).encode(k, v, None, 0)


def step(segment: CodedSegment, count: int, seed: int = 1) -> None:
    newest = segment.key_side.residual.view()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        k = torch.randn(*newest.shape[:2], 1, newest.shape[3], generator=generator).to(newest.dtype)
        segment.append(k, k, segment.length)
        segment.settle()


def split(segment: CodedSegment) -> tuple[int, int]:
    return segment.key_side.coded, segment.key_side.residual.length


def test_the_cards_split_of_compressed_and_whole_tokens() -> None:
    expected = {32: (0, 32), 287: (0, 287), 288: (256, 32), 300: (256, 44), 544: (512, 32), 4096: (3840, 256)}
    assert {tokens: split(fill(tokens, Mustafar())) for tokens in expected} == expected
    segment = fill(300, Mustafar())
    step(segment, 243)
    assert split(segment) == (256, 287)
    step(segment, 1)
    assert split(segment) == (512, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
@pytest.mark.parametrize("tokens, later", [(100, 0), (400, 300)])
def test_bytes_are_those_of_the_cards_formula(tokens: int, later: int, dim: int, dtype: torch.dtype) -> None:
    segment = fill(tokens, Mustafar(key_sparsity=0.7), dim, dtype)
    step(segment, later)
    coded, whole = split(segment)
    tiles = coded // 64 * 2 * (dim + (dim if 64 % dim == 0 else -(-dim // 64) * 64))  # of keys and of values, two heads
    padded = 0
    for side in (segment.key_side, segment.value_side):
        for run in side.runs:
            counts = bits_of(run.growing["bitmaps"].read(0, run.length // 64)).sum(-1)
            padded += int((-(-counts // 8) * 8).sum())
    assert sum(segment.nbytes().values()) == 12 * tiles + padded * dtype.itemsize + 2 * 2 * whole * dim * dtype.itemsize


def test_the_cards_share_of_half_precision_without_the_whole_tokens() -> None:
    for sparsity, share in ((0.5, 0.6565), (0.7, 0.462)):
        codec = Mustafar(key_sparsity=sparsity, value_sparsity=sparsity, residual_length=0)
        segment = fill(4096, codec, 128, torch.float16)
        assert split(segment) == (4096, 0)
        assert sum(segment.nbytes().values()) / (2 * 2 * 4096 * 128 * 2) == pytest.approx(share, abs=0.002)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 96])
def test_what_is_read_back_is_the_pruned_entry_bit_for_bit(dim: int, dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 1, 2, 700, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    segment = fill(700, Mustafar(key_sparsity=0.3, value_sparsity=0.7), dim, dtype)
    for row in range(2):
        keys, values, positions = segment.entries(row)
        assert torch.equal(keys[:512], prune(k[0, row, :512], 0.3)) and torch.equal(keys[512:], k[0, row, 512:])
        assert torch.equal(values[:512], prune(v[0, row, :512], 0.7)) and torch.equal(values[512:], v[0, row, 512:])
        assert positions.tolist() == list(range(700))
    assert torch.equal(segment.keys(100, 300)[0, 1], prune(k[0, 1, 100:300], 0.3))  # across blocks, not whole ones


@pytest.mark.parametrize("batch", [1, 2])
def test_attention_is_that_of_the_pruned_entries(batch: int) -> None:
    segment = fill(300, Mustafar(), batch=batch)
    step(segment, 300)  # a second run of compressed tokens
    assert split(segment) == (512, 88) and len(segment.key_side.runs) == 2
    q = torch.randn(batch, 8, 1, 64, generator=torch.Generator().manual_seed(3))
    for own in (True, False):
        out, lse = segment.attend(Query(q, segment.length - 1, own, 0.3))
        expected = attention_reference(q, segment.keys(), segment.values(), 0.3)
        torch.testing.assert_close(out, expected[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(lse, expected[1], atol=1e-5, rtol=1e-4)


def test_nothing_pruned_changes_no_logit() -> None:
    model, ids, later = build(), prompt(200), prompt(20, seed=1)
    logits: dict[str, Tensor] = {}
    for recipe in ("full", "mustafar(key_sparsity=0.0, value_sparsity=0.0, residual_length=0, flush_length=64)"):
        cache = cache_for(model, recipe)
        feed(model, cache, ids)
        logits[recipe] = feed(model, cache, later, 1)
        assert recipe == "full" or cache.layers[0].store.packed(0) == 192
    full, kept = logits.values()
    torch.testing.assert_close(kept, full, atol=1e-4, rtol=1e-4)


def test_more_sparsity_is_fewer_bytes_and_a_larger_error() -> None:
    model, ids, later = build(), prompt(200), prompt(10, seed=1)

    def run(recipe: str) -> tuple[int, Tensor]:
        cache = cache_for(model, recipe)
        feed(model, cache, ids)
        return cache.memory().used_bytes, feed(model, cache, later, 1)

    _, exact = run("full")
    found = [
        run(f"mustafar(key_sparsity={s}, value_sparsity={s}, residual_length=8, flush_length=64)")
        for s in (0.3, 0.5, 0.8)
    ]
    assert found[0][0] > found[1][0] > found[2][0]
    errors = [float((logits - exact).abs().mean()) for _, logits in found]
    assert 0 < errors[0] < errors[1] < errors[2]


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(wb.RecipeError, match="flush_length must be a multiple of 64, got 100"):
        Mustafar(flush_length=100)
    with pytest.raises(wb.RecipeError, match="key_sparsity must be a number between 0.0 and 1.0, got 1.5"):
        Mustafar(key_sparsity=1.5)
