"""Attention that counts what it reads: every count equals that of the full matrix on short prompts."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import fields
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench_kernels import attention_reference, counting
from workbench_kernels.codes import decode_weights, encode_weights
from workbench_kernels.counting import AttentionCounts, attend_counting
from workbench_kernels.counting_triton import count_attention

NO_TRITON = importlib.util.find_spec("triton") is None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def exact(q: Tensor, k: Tensor, window: int | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """The whole matrix of weights [Hq, T, T], float64; with sinks, one more column."""
    group = q.shape[1] // k.shape[1]
    logits = q[0].double() @ k[0].double().repeat_interleave(group, 0).transpose(1, 2) * 0.3
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    tokens = q.shape[2]
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    logits = logits.masked_fill((distance < 0) | (distance >= (window if window is not None else tokens)), -math.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.double().view(-1, 1, 1).expand(-1, tokens, 1)], -1)
    return logits.softmax(-1)


def pooled(weights: Tensor, visible: Tensor, cell: int, reduce: str) -> Tensor:
    """The exact map, cell by cell."""
    heads, tokens, _ = weights.shape
    side = -(-tokens // cell)
    out = torch.zeros(heads, side, side, dtype=torch.float64)
    for a in range(side):
        for b in range(side):
            rows, columns = slice(a * cell, (a + 1) * cell), slice(b * cell, (b + 1) * cell)
            part, seen = weights[:, rows, columns], visible[rows, columns]
            if seen.any():
                out[:, a, b] = part.amax((1, 2)) if reduce == "max" else part.sum((1, 2)) / seen.sum()
    return out


def check(
    q: Tensor, k: Tensor, v: Tensor, cells: int, chunks: list[int], window: int | None, softcap: float | None,
    sinks: Tensor | None,
) -> None:  # fmt: skip
    heads, tokens = q.shape[1], q.shape[2]
    counts = AttentionCounts.empty(heads, tokens, cells, sinks=3)
    outs, done = [], 0
    for chunk in chunks:
        stop = min(tokens, done + chunk * counts.cell)
        if stop > done:
            outs.append(
                attend_counting(
                    q[:, :, done:stop], k[:, :, :stop], v[:, :, :stop], 0.3, counts,
                    window=window, softcap=softcap, sinks=sinks,
                )
            )  # fmt: skip
        done = stop
    if done < tokens:
        outs.append(attend_counting(q[:, :, done:], k, v, 0.3, counts, window=window, softcap=softcap, sinks=sinks))
    everything = exact(q, k, window, softcap, sinks)
    weights = everything[..., :tokens]
    group = heads // k.shape[1]
    close = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(
        torch.cat(outs, 2)[0].double(), weights @ v[0].double().repeat_interleave(group, 0), **close
    )
    torch.testing.assert_close(counts.columns.double(), weights.sum(1), **close)
    rows = torch.arange(tokens) // counts.cell
    side = counts.entropy.shape[1]

    def by_row(x: Tensor) -> Tensor:
        return torch.zeros(heads, side, dtype=torch.float64).index_add_(1, rows, x)

    torch.testing.assert_close(
        counts.entropy.double(), by_row(torch.special.entr(everything).sum(-1)), atol=1e-3, rtol=1e-4
    )
    torch.testing.assert_close(counts.sink.double(), by_row(weights[..., :3].sum(-1)), **close)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    for b in range(counts.distance.shape[1]):
        inside = (distance >= (1 << b >> 1)) & (distance < 1 << b)
        torch.testing.assert_close(counts.distance[:, b].double(), (weights * inside).sum((1, 2)), **close)
    visible = (distance >= 0) & (distance < (window if window is not None else tokens))
    for codes, reduce in ((counts.largest, "max"), (counts.mean, "mean")):
        wanted = pooled(weights, visible, counts.cell, reduce)
        shown = pooled(visible.double().expand(1, -1, -1), visible, counts.cell, "max")[0] > 0
        assert torch.equal(codes == 0, ~shown.expand_as(codes))
        # Half a step of the code, and what float32 adds.
        torch.testing.assert_close(
            decode_weights(codes).double(), wanted.clamp_min(1e-6) * shown, atol=1e-6, rtol=0.0285
        )


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 90),
    cells=st.integers(1, 24),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    chunks=st.lists(st.integers(1, 9), max_size=3),
    window=st.none() | st.integers(1, 40),
    softcap=st.none() | st.just(2.0),
    with_sinks=st.booleans(),
    rows=st.sampled_from([1, 4, 16, 128]),
    seed=st.integers(0, 999),
)
def test_every_count_equals_that_of_the_full_matrix(
    tokens: int, cells: int, kv_heads: int, group: int, chunks: list[int], window: int | None,
    softcap: float | None, with_sinks: bool, rows: int, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    heads = kv_heads * group
    q = 3 * torch.randn(1, heads, tokens, 8, generator=generator)
    k, v = (torch.randn(1, kv_heads, tokens, 8, generator=generator) for _ in range(2))
    sinks = torch.randn(heads, generator=generator) if with_sinks else None
    with patch.object(counting, "ROWS", rows):
        check(q, k, v, cells, chunks, window, softcap, sinks)


@pytest.mark.skipif(NO_TRITON, reason="triton is not installed here")
@pytest.mark.parametrize(
    "tokens, cells, chunk, dim, window, softcap, with_sinks",
    [
        (1, 4, 1, 16, None, None, False),
        (70, 2, 1, 24, None, None, False),  # a cell, and a chunk, that ends within a tile; an odd head_dim
        (90, 5, 9, 16, 37, None, False),
        (24, 8, 8, 16, None, 2.0, True),  # cells narrower than a tile
        (75, 1, 1, 16, 20, 2.0, True),  # wider than one
    ],
)
def test_the_kernel_counts_what_the_twin_counts(
    tokens: int, cells: int, chunk: int, dim: int, window: int | None, softcap: float | None, with_sinks: bool
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    q = 3 * torch.randn(1, 4, tokens, dim, generator=generator).to(DEVICE)
    k = torch.randn(1, 2, tokens, dim, generator=generator).to(DEVICE)
    how = {
        "window": window,
        "softcap": softcap,
        "sinks": torch.randn(4, generator=generator).to(DEVICE) if with_sinks else None,
    }
    twin, kernel = (AttentionCounts.empty(4, tokens, cells, 3, DEVICE) for _ in range(2))
    for start in range(0, tokens, chunk * twin.cell):
        stop = min(tokens, start + chunk * twin.cell)
        attend_counting(q[:, :, start:stop], k[:, :, :stop], k[:, :, :stop], 0.3, twin, **how)
        count_attention(q[:, :, start:stop], k[:, :, :stop], 0.3, kernel, **how)
    for name in ("columns", "sink", "distance", "entropy"):
        torch.testing.assert_close(getattr(kernel, name), getattr(twin, name), atol=2e-4, rtol=1e-4, msg=name)
    for name in ("largest", "mean"):
        a, b = (getattr(x, name).int() for x in (kernel, twin))
        assert torch.equal(a == 0, b == 0) and int((a - b).abs().max()) <= 1  # rounding may fall on either side


def test_a_needle_stays_visible_in_the_largest_and_vanishes_in_the_mean() -> None:
    q, k = torch.zeros(1, 1, 1024, 4), torch.zeros(1, 1, 1024, 4)
    q[..., 1000, 0], k[..., 77, 0] = 60.0, 1.0
    counts = AttentionCounts.empty(1, 1024, 16)
    attend_counting(q, k, torch.zeros_like(k), 1.0, counts)
    a, b = 1000 // 64, 77 // 64
    assert decode_weights(counts.largest)[0, a, b] == pytest.approx(1.0)
    assert decode_weights(counts.mean)[0, a, b] < 2e-3
    assert counts.columns[0].argmax() in (0, 77)


def test_half_precision_is_counted_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 70, 16, generator=generator).bfloat16() for _ in range(3))
    counts = AttentionCounts.empty(2, 70)
    out = attend_counting(q, k, v, 0.25, counts)
    wanted, _ = attention_reference(q, k, v, 0.25, torch.ones(70, 70, dtype=torch.bool).tril())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, wanted, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(counts.columns.sum(1), torch.full((2,), 70.0), atol=1e-3, rtol=0)


def test_memory_is_linear_in_the_prompt_and_below_a_mebibyte_per_head() -> None:
    counts = AttentionCounts.empty(4, 1 << 17)
    assert counts.nbytes() == sum(
        x.numel() * x.element_size() for f in fields(counts) if isinstance(x := getattr(counts, f.name), Tensor)
    )
    assert counts.nbytes() / 4 < 700 << 10 and counts.largest.shape == (4, 256, 256)


def test_codes_by_hand() -> None:
    weights = torch.tensor([1.0, 1e-6, 1e-9, 1e-3, 0.0, 0.5])
    codes = encode_weights(weights, torch.tensor([True] * 5 + [False]))
    assert codes.tolist() == [255, 1, 1, 128, 1, 0]
    torch.testing.assert_close(decode_weights(codes), torch.tensor([1, 1e-6, 1e-6, 1e-3, 1e-6, 0.0]))
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(encode_weights(decode_weights(every), every > 0), every)


def test_queries_that_cut_a_map_row_are_refused() -> None:
    q = torch.zeros(1, 1, 3, 4)
    counts = AttentionCounts.empty(1, 9, 3)
    with pytest.raises(ValueError, match="cut a map row of 3"):
        attend_counting(q[:, :, :2], q[:, :, :2], q[:, :, :2], 1.0, counts)
    with pytest.raises(ValueError, match="a batch of 2"):
        attend_counting(q.expand(2, -1, -1, -1), q, q, 1.0, counts)
