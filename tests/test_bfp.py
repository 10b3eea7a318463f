"""Block floating point: the card's worked examples, its bits, and what sorting channels does and leaves alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from tests.builders import build, cache_for, feed, prompt
from workbench.cache.schemes.blockfloat import LEAST, BlockFloat, smallest_index
from workbench.strategies.quantization.bfp import BFP
from workbench_kernels import unpack


def coded(x: Tensor, scheme: BlockFloat) -> tuple[Tensor, Tensor, Tensor]:
    """Mantissas, exponents and values of x [n, D], a multiple of 8 wide."""
    parts = scheme.encode(x[None, None], None)
    codes = unpack(parts["codes"], scheme.bits)[0, 0].int()
    mantissa = codes - (codes >> (scheme.bits - 1) << scheme.bits)
    return mantissa, parts["exponent"][0, 0], scheme.decode(parts, (0, len(x)), torch.float32, None)[0, 0]


# -- the card, section 7 -------------------------------------------------------------------------------------------------


def test_card_format() -> None:
    """Blocks of one: what d-Matrix's published unit test has."""
    x = torch.tensor([[1.0, 1.125, 1.25, 1.375, -1.0, -1.125, -1.25, -1.375]])
    assert coded(x, BlockFloat(4, 1))[2].tolist() == [[1, 1, 1.25, 1.5, -1, -1, -1.25, -1.5]]


X = torch.tensor([[8.0, 1, 7, 0.5, 0.9, 6, 0.6, 1.2]])


def test_card_plain_blocks() -> None:
    mantissa, exponent, values = coded(X, BlockFloat(4, 4))
    assert exponent.tolist() == [[3, 2]] and mantissa.tolist() == [[4, 0, 4, 0, 1, 6, 1, 1]]
    assert values.tolist() == [[8, 0, 8, 0, 1, 6, 1, 1]]
    assert float((values - X).square().sum()) == pytest.approx(2.46, abs=1e-5)


def test_card_sorted_blocks() -> None:
    order = torch.tensor([0, 2, 5, 7, 1, 4, 6, 3])
    assert X[0].argsort(descending=True, stable=True).tolist() == order.tolist()
    mantissa, exponent, values = coded(X, BlockFloat(4, 4, smallest_index(order)[None, None]))
    assert exponent.tolist() == [[3, 0]] and mantissa.tolist() == [[4, 4, 3, 1, 4, 4, 2, 2]]
    assert values.tolist() == [[8, 1, 8, 0.5, 1, 6, 0.5, 2]]
    assert float((values - X).square().sum()) == pytest.approx(1.66, abs=1e-5)


def test_card_clamp() -> None:
    x = torch.tensor([[7.9, 3, -7.6, 0.1, 0, 0, 0, 0]])
    mantissa, exponent, _ = coded(x, BlockFloat(4, 4))
    assert mantissa.tolist() == [[7, 3, -7, 0, 0, 0, 0, 0]] and exponent.tolist() == [[2, LEAST]]


# -- laws ----------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(
    arrays(np.float32, (3, 32), elements=st.floats(-(2.0**120), 2.0**120, width=32)),
    st.sampled_from([4, 8]),
    st.sampled_from([8, 16, 32]),
)
def test_the_error_is_half_a_step_or_what_the_clamp_takes(x: np.ndarray, bits: int, block: int) -> None:
    given = torch.from_numpy(x)
    _, exponent, values = coded(given, BlockFloat(bits, block))
    assert torch.isfinite(values).all()
    step = torch.ldexp(torch.ones(exponent.shape), exponent.int() - (bits - 2)).repeat_interleave(block, -1)
    clamped = given.abs() > ((1 << (bits - 1)) - 1.5) * step
    error = (values - given).abs()
    assert (error <= torch.where(clamped, step, step / 2)).all()
    assert ((values == 0) | (values.sign() == given.sign())).all()
    assert (values.abs() <= 2 * given.abs().amax(-1, keepdim=True)).all()


@given(st.floats(2.0**-110, 2.0**100, width=32))
def test_a_block_of_one_is_within_an_eighth(value: float) -> None:
    found = coded(torch.full((1, 8), value), BlockFloat(4, 1))[2]
    assert (found - value).abs().max() <= 0.125 * value


@pytest.mark.parametrize("power", [-10, 0, 1, 20])
def test_exponents_are_exact_around_powers_of_two(power: int) -> None:
    at = 2.0**power
    below = float(np.nextafter(np.float32(at), np.float32(0)))
    for value, expected in ((at, power), (below, power - 1)):
        assert coded(torch.full((1, 8), value), BlockFloat(8, 8))[1].tolist() == [[expected]]


def test_zeros_stay_zeros_and_infinity_is_refused() -> None:
    assert not coded(torch.zeros(2, 16), BlockFloat(4, 16))[2].any()
    for bad in (math.nan, math.inf):
        with pytest.raises(Exception, match="cannot be quantized"):
            BlockFloat(4, 16).encode(torch.full((1, 1, 1, 16), bad), None)


def test_sorting_both_sides_leaves_logits_alone_and_one_block_is_not_changed_by_it() -> None:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 2, 20, 32, generator=generator)
    order = smallest_index(torch.rand(1, 2, 32, generator=generator).argsort(-1))
    scheme, plain = BlockFloat(4, 32, order), BlockFloat(4, 32)
    ours, theirs = (s.decode(s.encode(k, None), (0, 20), torch.float32, None) for s in (scheme, plain))
    assert torch.equal(ours, theirs)
    q = torch.randn(1, 2, 3, 32, generator=generator)
    sorted_k, sorted_q = (x.gather(-1, order.long()[:, :, None].expand(x.shape)) for x in (k, q))
    torch.testing.assert_close(sorted_q @ sorted_k.mT, q @ k.mT, atol=1e-5, rtol=1e-5)


def test_sorting_lessens_the_error_where_channels_stand_out() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.ones(1, 1, 1, 128)
    sizes[..., [5, 40, 77, 100]] = 30.0  # one outlier in every block
    k = torch.randn(1, 1, 50, 128, generator=generator) * sizes
    order = smallest_index(sizes[:, :, 0].argsort(dim=-1, descending=True))
    errors = [
        float((s.decode(s.encode(k, None), (0, 50), torch.float32, None) - k).square().sum())
        for s in (BlockFloat(4, 32, order), BlockFloat(4, 32))
    ]
    assert errors[0] < 0.75 * errors[1]


@pytest.mark.parametrize("bits, block, expected", [(4, 32, 4.25), (4, 64, 4.125), (4, 128, 4.0625), (8, 32, 8.25)])
def test_bits_per_number_are_the_cards(bits: int, block: int, expected: float) -> None:
    k = torch.randn(1, 2, 40, 128, generator=torch.Generator().manual_seed(0)).half()
    segment = BFP(bits=bits, group_size=block, sort=False).codec(None).encode(k, k, None, 0)  # type: ignore[arg-type]
    held = segment.nbytes()
    assert held["codes"] + held["scales"] == 2 * 40 * 128 * expected / 8 and held["values"] == 2 * 40 * 128 * 2


def test_the_order_is_that_of_the_key_projections_rows() -> None:
    cache = cache_for(build("qwen3"), "bfp(group_size=16)", 30)  # heads of 32
    feed(build("qwen3"), cache, prompt(30))
    for layer, block in zip(cache.layers, build("qwen3").network.model.layers):
        scheme = layer.store.codec.keys
        norms = block.self_attn.k_proj.weight.unflatten(0, (2, 32)).norm(dim=-1)
        assert torch.equal(scheme.order[0].long(), norms.argsort(dim=-1, descending=True, stable=True))
        assert layer.store.nbytes()["order"] == 2 * 32
