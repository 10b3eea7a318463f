"""Round to nearest in groups: equal to optimum-quanto to the bit, fp8, and what every grouping must do."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import workbench as wb
from tests.builders import build, cache_for, feed, prompt
from workbench.cache.coded import PairCodec
from workbench.cache.schemes.base import Scheme, Verbatim
from workbench.cache.schemes.rtn import FP8_MAX, Float8, PerChannel, PerToken
from workbench.cache.schemes.spans import AcrossHeads, ChannelsOfRun
from workbench.cache.sides import Flush
from workbench.strategies.quantization.rtn import RTN

QUANTO = np.load(Path(__file__).parent / "oracle" / "fixtures" / "quanto.npz")
CASES = sorted(name.removesuffix("/x") for name in QUANTO.files if name.endswith("/x"))


def decoded(scheme: Scheme, x: Tensor) -> Tensor:
    return scheme.decode(scheme.encode(x, None), (0, x.shape[2]), torch.float32, None)


@pytest.mark.parametrize("case", CASES)
def test_equal_to_quanto_to_the_bit(case: str) -> None:
    """quanto's axis -1 is KIVI's key scheme, groups of tokens of a channel; axis 0 its value scheme."""
    _, bits, group, axis = (int(part) for part in case.split("/"))
    x = torch.from_numpy(QUANTO[f"{case}/x"]).float()
    scheme = (PerChannel if axis == -1 else PerToken)(bits, group)
    assert torch.equal(decoded(scheme, x), torch.from_numpy(QUANTO[f"{case}/decoded"]))


def test_every_case_of_quanto_is_there() -> None:
    assert len(CASES) == 14 and str(QUANTO["versions"]).startswith("torch 2.13.0")


# -- fp8 -----------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**16), st.floats(1e-3, 1e4), st.booleans())
def test_fp8_is_within_a_sixteenth_and_never_beyond_its_range(seed: int, size: float, per_channel: bool) -> None:
    x = torch.randn(1, 2, 32, 32, generator=torch.Generator().manual_seed(seed)) * size
    scheme = Float8(16, per_channel)
    found = decoded(scheme, x)
    step = scheme.encode(x, None)["scale"].float().amax()
    # Three bits of mantissa, and 2^-9 of a step below the smallest normal number; the scale's own rounding is within both.
    assert ((found - x).abs() <= x.abs() * (2**-4 + 2**-10) + step * 2**-9).all()
    assert found.abs().max() <= step * FP8_MAX


def test_fp8_by_hand() -> None:
    x = torch.tensor([448.0, 1, -2.5, 0] + [17.0] * 12)[None, None, None]
    assert decoded(Float8(16, False), x)[0, 0, 0, :5].tolist() == [448, 1, -2.5, 0, 16]  # 17 lies between 16 and 18
    assert not decoded(Float8(16, False), torch.zeros(1, 1, 2, 16)).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
def test_fp8_refuses_what_it_cannot_scale(bad: float) -> None:
    x = torch.zeros(1, 1, 2, 16)
    x[0, 0, 1, 2] = bad
    with pytest.raises(wb.WorkbenchError, match="cannot be quantized"):
        Float8(16, False).encode(x, None)


# -- every scheme on its own ---------------------------------------------------------------------------------------------

SCHEMES = [PerChannel(4, 16), PerToken(4, 16), Float8(16, True), Float8(16, False), ChannelsOfRun(4), AcrossHeads(4)]


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, len(SCHEMES) - 1),
    st.integers(0, 70),
    st.integers(1, 20),
    st.integers(0, 40),
    st.lists(st.sampled_from([1, 1, 1, 7, 33]), max_size=6),
)
def test_however_entries_arrive_the_same_ones_are_coded_and_the_rest_is_exact(
    which: int, prompted: int, units: int, keep: int, chunks: list[int]
) -> None:
    """Odd residual lengths, no token at all, one token: lengths add up, what was not flushed is untouched, and cuts of a
    range are the range cut."""
    scheme = SCHEMES[which]
    flush = Flush(every=units * scheme.unit, keep=keep)
    generator = torch.Generator().manual_seed(prompted)
    k = torch.randn(1, 2, prompted + sum(chunks), 32, generator=generator)
    segment = PairCodec(scheme, Verbatim("values"), flush, Flush(keep=keep)).encode(
        k[:, :, :prompted], k[:, :, :prompted], None, 0
    )
    seen = prompted
    for count in chunks:
        new = k[:, :, seen : seen + count]
        segment.append(new, new, seen)
        segment.settle()
        seen += count
    assert segment.length == seen and torch.equal(segment.values(), k)
    coded = segment.key_side.coded
    assert coded % (units * scheme.unit) == 0 and seen - coded >= min(keep, seen)
    assert (
        seen - coded < keep + units * scheme.unit
        or not chunks
        or coded == 0
        or seen - coded <= keep + units * scheme.unit
    )
    assert torch.equal(segment.keys()[:, :, coded:], k[:, :, coded:])
    whole = segment.keys()
    assert torch.isfinite(whole).all()
    for start, stop in ((0, seen), (seen // 3, seen // 2), (max(seen - 1, 0), seen)):
        assert torch.equal(segment.keys(start, stop), whole[:, :, start:stop])
        assert torch.equal(segment.keys(start, stop, (0, 1)), whole[:, 1:, start:stop])
    twin = segment.clone()
    assert torch.equal(twin.keys(), whole) and twin.nbytes() == segment.nbytes()


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: type(s).__name__)
def test_one_entry_and_constant_entries_are_exact(scheme: Scheme) -> None:
    for value in (0.0, 3.5, -0.25):
        x = torch.full((1, 2, 16, 32), value)
        torch.testing.assert_close(decoded(scheme, x), x, atol=0.0, rtol=1e-3)


@pytest.mark.parametrize("bits, expected", [(8, 8 + 1), (4, 4 + 1), (2, 2 + 1), ("fp8", 8.5)])
@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("residual", [0, 5])
def test_bytes_are_bits_and_metadata_and_the_residual(
    bits: int | str, expected: float, axis: str, residual: int
) -> None:
    k = torch.randn(1, 2, 100, 64, generator=torch.Generator().manual_seed(0)).half()
    segment = RTN(bits=bits, axis=axis, residual_length=residual).codec().encode(k, k, None, 0)
    rest = 100 - (100 - residual) // 32 * 32 if axis == "channel" else residual
    assert sum(segment.nbytes().values()) == 2 * 2 * 64 * ((100 - rest) * expected / 8 + rest * 2)


def test_codes_of_a_prompt_read_in_chunks_are_those_of_a_prompt_read_at_once() -> None:
    stores = []
    for chunk in (None, 17):
        cache = cache_for(build(), "rtn(bits=4, group_size=16)", 60)
        feed(build(), cache, prompt(60), chunk)
        stores.append(cache.layers[0].store)
    torch.testing.assert_close(stores[0].keys(), stores[1].keys(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "recipe, said",
    [("rtn(group_size=64)", "group_size=16"), ("gear(group_size=64, residual_length=64)", "group_size=16")],
)
def test_heads_that_groups_do_not_divide_are_refused(recipe: str, said: str) -> None:
    with pytest.raises(wb.RecipeError, match="head_dim 16 of this model is not a multiple of group_size 64") as caught:
        wb.cache(recipe, build())
    assert said in str(caught.value)
