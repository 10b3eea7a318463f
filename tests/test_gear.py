"""GEAR: the card's worked example, its byte formula, and what outliers and rank must do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import workbench as wb
from workbench.cache.coded import CodedSegment
from workbench.cache.schemes.base import Scheme
from workbench.cache.schemes.recovered import Recovered, low_rank
from workbench.cache.schemes.rtn import PerChannel, PerToken
from workbench.cache.schemes.spans import AcrossHeads, ChannelsOfRun
from workbench.strategies.quantization.gear import GEAR

# -- the card, section 7 -------------------------------------------------------------------------------------------------

X = torch.tensor([[0.0, 1, 2, 4, 10, -8, 2, -2], [1, 1.5, 0, 2, -2, 3, 9, 1], [2, 0, 1, -1, 0.5, 1, -7, 4]])
WITH_OUTLIERS = torch.tensor([[0.0, 2, 2, 4, 10, -8, 2, -2], [1, 2, 0, 2, -2, 3, 9, 1], [2, 0, 1, -1, 1, 1, -7, 4]])
TWICE = X.repeat(1, 2)[None, None]  # 16 channels fill a word; the second eight are the first again


def decoded(scheme: Scheme, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return scheme.decode(scheme.encode(x, None), (0, x.shape[2]), dtype, None)


def error(scheme: Scheme) -> float:
    """Frobenius norm over the card's eight channels."""
    return float((decoded(scheme, TWICE) - TWICE).norm()) / math.sqrt(2)


def values(outliers: float, rank: int, iterations: int = 40) -> Recovered:
    return Recovered(PerToken(2, 16), outliers, rank, iterations, per_channel=False)


def test_card_outliers_and_means() -> None:
    found = decoded(values(0.25, 0), TWICE)[0, 0]
    assert torch.equal(found[:, :8], WITH_OUTLIERS) and torch.equal(found[:, 8:], WITH_OUTLIERS)
    torch.testing.assert_close(X.mean(1), torch.tensor([1.125, 1.9375, 0.0625]))


def test_card_errors() -> None:
    assert error(PerToken(2, 16)) == pytest.approx(5.671566, abs=2e-3)  # scales are float16 here
    assert error(values(0.25, 0)) == pytest.approx(1.224745, abs=1e-6)
    assert error(values(0.25, 1)) == pytest.approx(0.5, abs=1e-3)
    assert error(values(0.25, 2)) == pytest.approx(0.0, abs=2e-3)
    assert error(values(0.25, 1, iterations=3)) <= 0.51


def test_card_singular_values() -> None:
    assert torch.linalg.svdvals(X - WITH_OUTLIERS).tolist() == pytest.approx([1.118034, 0.5, 0], abs=1e-6)


# -- laws ----------------------------------------------------------------------------------------------------------------


def numbers(n: int, heads: int = 2, dim: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(1, heads, n, dim, generator=torch.Generator().manual_seed(seed))


BACKBONES = [(PerChannel(2, 16), True), (ChannelsOfRun(2), True), (PerToken(2, 16), False), (AcrossHeads(2), False)]


@pytest.mark.parametrize("backbone, per_channel", BACKBONES)
def test_without_outliers_and_rank_it_is_the_backbone_to_the_bit(backbone: Scheme, per_channel: bool) -> None:
    x = numbers(48)
    assert torch.equal(decoded(Recovered(backbone, 0.0, 0, 3, per_channel), x), decoded(backbone, x))


@pytest.mark.parametrize("backbone, per_channel", BACKBONES)
def test_every_part_lessens_the_error(backbone: Scheme, per_channel: bool) -> None:
    x = numbers(48)
    x[..., 5] *= 20  # an outlier channel
    errors = [
        (decoded(Recovered(backbone, outliers, rank, 20, per_channel), x) - x).norm().item()
        for outliers, rank in ((0.0, 0), (0.1, 0), (0.1, 1), (0.1, 4), (0.1, 16), (0.1, 32))
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01 * errors[0]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**16), st.integers(1, 12))
def test_a_product_of_full_rank_is_exact_and_none_is_worse_than_nothing(n: int, d: int, seed: int, rank: int) -> None:
    x = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed))
    left, right = low_rank(x, min(rank, n, d), 3)
    off = (x - left @ right.mT).norm()
    assert off <= x.norm() * (1 + 1e-5)
    if rank >= min(n, d):
        assert off <= 1e-3 * x.norm()


@pytest.mark.parametrize("backbone, per_channel", BACKBONES)
def test_constant_and_zero_runs_are_exact(backbone: Scheme, per_channel: bool) -> None:
    scheme = Recovered(backbone, 0.1, 2, 3, per_channel)
    for value in (0.0, -3.5):
        assert torch.equal(decoded(scheme, torch.full((1, 2, 32, 32), value)), torch.full((1, 2, 32, 32), value))


def test_multiplying_in_order_gives_the_logits_of_the_product() -> None:
    """(q P) Q^T = q (Q P^T)^T: what a kernel that never forms the product computes."""
    scheme = Recovered(PerChannel(2, 16), 0.0, 4, 3, True)
    x, q = numbers(48), numbers(3, seed=1)
    parts = scheme.encode(x, None)
    left, right = parts["left"].float().flatten(2, 3), parts["right"].float()
    folded = q @ decoded(PerChannel(2, 16), x).mT + (q @ right) @ left.mT
    torch.testing.assert_close(folded, q @ decoded(scheme, x).mT, atol=1e-4, rtol=1e-4)


# -- blocks and bytes ----------------------------------------------------------------------------------------------------


def fill(codec: GEAR, tokens: int, later: int, dim: int, heads: int = 2) -> CodedSegment:
    k, v = numbers(tokens, heads, dim), numbers(tokens, heads, dim, 1)
    segment = codec.codec().encode(k.half(), v.half(), None, 0)
    assert isinstance(segment, CodedSegment)
    for step in range(later):
        new = numbers(1, heads, dim, step).half()
        segment.append(new, new, tokens + step)
        segment.settle()
    return segment


def test_the_prompt_is_a_block_and_so_is_every_full_buffer() -> None:
    segment = fill(GEAR(), 300, 64 * 2 + 10, 32)
    runs = [[run.length for run in side.runs] for side in (segment.key_side, segment.value_side)]
    assert runs == [[288, 64, 64]] * 2 and segment.key_side.residual.length == 12 + 10
    chunk = fill(GEAR(), 300, 0, 32)
    new = numbers(138).half()
    chunk.append(new, new, 300)
    chunk.settle()
    assert [run.length for run in chunk.key_side.runs] == [288, 64, 64]
    assert [run.length for run in fill(GEAR(backbone="kcvt"), 300, 0, 32).key_side.runs] == [300]
    assert fill(GEAR(), 20, 0, 32).key_side.runs == []


@pytest.mark.parametrize("backbone", ["kivi", "kcvt"])
@pytest.mark.parametrize("tokens, later", [(64, 0), (256, 0), (300, 100)])
@pytest.mark.parametrize("bits, outliers, rank", [(2, 0.02, 4), (4, 0.1, 0), (2, 0.0, 4)])
def test_bytes_are_those_of_the_cards_formula(
    backbone: str, tokens: int, later: int, bits: int, outliers: float, rank: int
) -> None:
    heads, d, g = 2, 64, 32
    codec = GEAR(backbone=backbone, bits=bits, outliers=outliers, rank=rank, later_rank=min(rank, 2), group_size=g)
    segment = fill(codec, tokens, later, d, heads)
    first = tokens // g * g if backbone == "kivi" else tokens
    blocks = [(first, rank)] + [(64, min(rank, 2))] * ((tokens - first + later) // 64)
    expected = 2 * 2 * heads * d * (tokens + later - sum(n for n, _ in blocks))  # the buffer, in half precision
    for n, r in blocks:
        expected += 2 * heads * n * d * bits // 8
        if backbone == "kivi":
            expected += 2 * heads * n * d // g * 4
        else:
            expected += heads * d * 4 + n * 4
        expected += 2 * heads * (n + d) * r * 2
        k_keys, k_values = int(n * outliers / 2), int(heads * d * outliers / 2)
        expected += (2 * k_keys * heads * d + 2 * k_values * n) * (2 + 2)  # a value and an int16 place
    assert sum(segment.nbytes().values()) == expected
    kinds = {"codes", "scales", "window", *(["factors"] if rank else []), *(["outliers"] if outliers else [])}
    assert set(segment.nbytes()) == kinds


@pytest.mark.parametrize("outliers, share", [(0.02, 0.228), (0.0, 0.188)])
def test_card_share_of_half_precision(outliers: float, share: float) -> None:
    """2 bits in groups of 64, rank 4, at 4096 tokens of one head: with int16 places."""
    segment = fill(GEAR(outliers=outliers, group_size=64), 4096, 0, 128, heads=1)
    held = sum(segment.nbytes().values()) / (2 * 4096 * 128 * 2)
    assert held == pytest.approx(share, abs=5e-3)  # 2 % of 128 channels is 1 a side and rounded down


def test_beyond_32767_entries_places_take_four_bytes() -> None:
    x = torch.randn(1, 1, 32800, 2, generator=torch.Generator().manual_seed(0))
    scheme = Recovered(PerChannel(2, 32), 0.001, 0, 3, per_channel=True)
    parts = scheme.encode(x, None)
    assert parts["places"].dtype == torch.int32
    cut = scheme.decode(
        {**parts, **{n: parts[n][:, :, 1000:1025] for n in ("codes", "scale", "low")}},
        (32000, 32800),
        torch.float32,
        None,
    )
    torch.testing.assert_close(cut, decoded(scheme, x)[:, :, 32000:])


def test_a_residual_that_is_no_multiple_of_the_group_is_refused() -> None:
    with pytest.raises(wb.RecipeError, match="multiple of group_size"):
        GEAR(group_size=64, residual_length=100)
