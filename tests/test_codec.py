"""Quantization, packed storage and KIVI's schedule: laws, the method card's worked examples, exact bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

import workbench as wb
from tests.builders import build, cache_for, feed, prompt
from workbench.cache.affine import dequantize, quantize
from workbench.cache.coded import CodedSegment
from workbench.cache.segments import Query
from workbench.strategies.quantization.kivi import KIVI
from workbench_kernels import attention_reference, unpack

GROUPS = arrays(np.float32, (3, 32), elements=st.floats(-60000, 60000, width=32))


def round_trip(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    words, scale, low = quantize(x, bits)
    return dequantize(words, scale, low, bits, torch.float32), scale, low


def half_step(x: Tensor, scale: Tensor, low: Tensor, bits: int) -> Tensor:
    """The largest error allowed: half a step, and what rounding the scale and the minimum to float16 costs."""
    levels = (1 << bits) - 1
    exact = (x.amax(-1) - low.float()) / levels
    rounding = (x.amin(-1) - low.float()).abs() + levels * (exact - scale.float()).abs()
    return scale.float().abs() / 2 + rounding


@settings(deadline=None, max_examples=100)
@given(GROUPS, st.sampled_from([2, 4, 8]))
def test_the_error_is_at_most_half_a_step(x: np.ndarray, bits: int) -> None:
    x = torch.from_numpy(x)
    decoded, scale, low = round_trip(x, bits)
    assert torch.isfinite(decoded).all()
    assert ((decoded - x).abs().amax(-1) <= half_step(x, scale, low, bits) * 1.001 + 1e-6).all()


@settings(deadline=None, max_examples=50)
@given(arrays(np.float16, (3, 32), elements=st.floats(-1000, 1000, width=16)), st.sampled_from([2, 4, 8]))
def test_the_minimum_of_float16_numbers_is_exact_and_the_maximum_to_the_scales_rounding(
    x: np.ndarray, bits: int
) -> None:
    x = torch.from_numpy(x).float()
    decoded, scale, low = round_trip(x, bits)
    assert torch.equal(decoded.gather(-1, x.argmin(-1, keepdim=True)), x.amin(-1, keepdim=True))
    levels = (1 << bits) - 1
    at_most = levels * ((x.amax(-1) - low.float()) / levels - scale.float()).abs() + 1e-4
    assert ((decoded.gather(-1, x.argmax(-1, keepdim=True))[:, 0] - x.amax(-1)).abs() <= at_most).all()


@settings(deadline=None, max_examples=50)
@given(st.floats(-60000, 60000, width=16), st.sampled_from([2, 4, 8]))
def test_constant_groups_are_exact(value: float, bits: int) -> None:
    x = torch.full((2, 16), value)
    assert torch.equal(round_trip(x, bits)[0], x)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantizing_what_was_decoded_changes_nothing_more(bits: int) -> None:
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    once, scale, _ = round_trip(x, bits)
    twice, _, _ = round_trip(once, bits)
    assert ((twice - once).abs().amax(-1) <= 0.01 * scale).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -70000.0, 1e30])
def test_numbers_that_no_scale_holds_are_an_error_in_words(bad: float) -> None:
    x = torch.zeros(2, 16)
    x[1, 3] = bad
    with pytest.raises(wb.WorkbenchError, match="without quantization"):
        quantize(x, 2)


# -- the card, section 7 -------------------------------------------------------------------------------------------------

K = torch.tensor([[0.0, -8.0], [1.0, 10.0], [2.5, 4.0], [6.0, -2.0]])
K_DECODED = torch.tensor([[0.0, -8.0], [0.0, 10.0], [2.0, 4.0], [6.0, -2.0]])
V = torch.tensor([[0.0, 1.0, 2.5, 6.0], [-8.0, 10.0, 4.0, -2.0], [1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 3.0, 0.0]])
V_DECODED = torch.tensor([[0.0, 0.0, 2.0, 6.0], [-8.0, 10.0, 4.0, -2.0], [1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 3.0, 0.0]])


def four_times(x: Tensor) -> Tensor:
    """Groups of 4 become groups of 16 with the same minimum and maximum, which fill whole words."""
    return x.repeat(1, 4)


def test_card_keys_per_channel() -> None:
    words, scale, low = quantize(four_times(K.T), 2)
    assert (scale.tolist(), low.tolist()) == ([2.0, 6.0], [0.0, -8.0])
    assert unpack(words, 2)[:, :4].tolist() == [[0, 0, 1, 3], [0, 3, 2, 1]]  # 1.0 / 2 rounds to 0: half to even
    assert torch.equal(dequantize(words, scale, low, 2, torch.float32)[:, :4].T, K_DECODED)


def test_card_values_per_token() -> None:
    assert torch.equal(round_trip(four_times(V), 2)[0][:, :4], V_DECODED)


def test_card_attention_before_and_after() -> None:
    q = torch.tensor([[[[0.5, 0.25]]]])
    for k, v, p, out in (
        (K, V, [0.012563, 0.431082, 0.253653, 0.302701], [-2.286902, 4.577040, 2.917494, -0.533133]),
        (K_DECODED, V_DECODED, [0.015127, 0.364472, 0.255928, 0.364472], [-1.566434, 3.900652, 2.837489, -0.382255]),
    ):
        identity, _ = attention_reference(q, k[None, None], torch.eye(4)[None, None], 2**-0.5)
        torch.testing.assert_close(identity.flatten(), torch.tensor(p), atol=1e-6, rtol=0)
        ours, _ = attention_reference(q, k[None, None], v[None, None], 2**-0.5)
        torch.testing.assert_close(ours.flatten(), torch.tensor(out), atol=2e-6, rtol=0)


def lengths(segment: CodedSegment) -> tuple[int, int, int, int]:
    keys, values = segment.key_side, segment.value_side
    return keys.coded, keys.residual.length, values.coded, values.residual.length


def fill(tokens: int, codec: KIVI, dim: int = 32, dtype: torch.dtype = torch.float32) -> CodedSegment:
    k, v = torch.randn(2, 1, 2, tokens, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    return codec.codec().encode(k, v, None, 0)


def step(segment: CodedSegment, count: int = 1) -> None:
    for _ in range(count):
        newest = segment.key_side.residual.view()
        k = torch.randn(1, 2, 1, newest.shape[3]).to(newest.dtype)
        segment.append(k, k, segment.length)
        segment.settle()


def test_card_lengths_after_the_prompt_and_while_generating() -> None:
    codec = KIVI()
    expected = {100: (0, 100, 0, 100), 128: (128, 0, 0, 128), 300: (256, 44, 172, 128)}
    assert {tokens: lengths(fill(tokens, codec)) for tokens in expected} == expected
    segment = fill(300, codec)
    step(segment, 83)
    assert lengths(segment) == (256, 127, 255, 128)
    step(segment)
    assert lengths(segment) == (384, 0, 256, 128)
    step(segment)
    assert lengths(segment) == (384, 1, 257, 128)


def test_generated_tokens_and_a_chunk_leave_the_same_lengths() -> None:
    one_by_one, at_once = fill(300, KIVI()), fill(300, KIVI())
    step(one_by_one, 500)
    k = torch.randn(1, 2, 500, 32)
    at_once.append(k, k, 300)
    at_once.settle()
    assert lengths(at_once) == lengths(one_by_one)


@pytest.mark.parametrize("tokens", [1, 100, 128, 129, 300, 1024])
@pytest.mark.parametrize("bits, group", [(2, 32), (2, 128), (4, 32), (8, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_cards_formula(tokens: int, bits: int, group: int, dtype: torch.dtype) -> None:
    segment = fill(tokens, KIVI(bits=bits, group_size=group), dim=128, dtype=dtype)
    step(segment, 5)
    packed_k, rest_k, packed_v, rest_v = lengths(segment)
    width, d = dtype.itemsize, 128
    k = packed_k * d * bits // 8 + packed_k // group * d * 4 + rest_k * d * width
    v = packed_v * d * bits // 8 + packed_v * (d // group) * 4 + rest_v * d * width
    assert sum(segment.nbytes().values()) == 2 * (k + v)  # two KV heads


@pytest.mark.parametrize(
    "bits, group, tokens, share",
    [(2, 32, 4096, 0.2002), (2, 128, 4096, 0.1541), (4, 32, 4096, 0.3232), (2, 32, 1024, 0.2383)],
)
def test_card_fractions_of_half_precision(bits: int, group: int, tokens: int, share: float) -> None:
    segment = fill(tokens, KIVI(bits=bits, group_size=group), dim=128, dtype=torch.float16)
    assert sum(segment.nbytes().values()) / (2 * 2 * tokens * 128 * 2) == pytest.approx(share, abs=5e-5)


def test_keys_are_grouped_along_tokens_and_values_along_channels() -> None:
    """An outlier channel spoils no other channel's keys; an outlier token spoils no other token's values."""
    k, v = torch.rand(2, 1, 1, 64, 32, generator=torch.Generator().manual_seed(0))
    k[..., 5] *= 1000
    v[..., 7, :] *= 1000
    segment = KIVI(bits=4, group_size=32, residual_length=32).codec().encode(k, v, None, 0)
    keys, values, _ = segment.entries(0)
    others = [c for c in range(32) if c != 5]
    assert (keys - k[0, 0])[:, others].abs().max() < 0.04
    tokens = [t for t in range(64) if t != 7]
    assert (values - v[0, 0])[tokens].abs().max() < 0.04


def test_attention_crosses_many_blocks_of_packed_entries() -> None:
    segment = fill(2600, KIVI(group_size=32))  # blocks of 1024, and edges where each side stops being packed
    step(segment, 3)
    k, v = (torch.stack(side)[None] for side in list(zip(*(segment.entries(row) for row in range(2))))[:2])
    q = torch.randn(1, 4, 1, 32)
    out, _ = segment.attend(Query(q, 2602, True, 0.2))
    torch.testing.assert_close(out, attention_reference(q, k, v, 0.2)[0], atol=1e-5, rtol=1e-4)


def test_a_models_key_values_in_few_bits_are_near_the_full_ones_and_nearer_with_more() -> None:
    model, ids, later = build(), prompt(100), prompt(10, seed=1)

    def logits(recipe: str) -> Tensor:
        cache = cache_for(model, recipe)
        feed(model, cache, ids)
        return feed(model, cache, later, 1)

    full = logits("full")
    error = {
        b: (logits(f"kivi(bits={b}, group_size=16, residual_length=16)") - full).abs().mean().item() for b in (2, 4, 8)
    }
    assert error[2] > 2 * error[4] > 8 * error[8] > 0
