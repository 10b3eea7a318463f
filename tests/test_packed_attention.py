"""Decode attention over codes: the card's arithmetic by hand, and the CPU's path and the kernel against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernel_paths import ALL_PATHS, COMPILED, TWIN, Path
from workbench_kernels import Packed, merge_partials, pack, packed_attention, packed_attention_reference

CPU = Path("cpu", False)


def packed(
    heads: int,
    entries: int,
    width: int,
    group: int,
    bits: int,
    per: str,
    seed: int = 0,
    batch: int = 1,
    path: Path = CPU,
) -> Packed:
    """Random codes; scales of a size that keeps the numbers near one."""
    made = torch.Generator().manual_seed(seed)
    shape = (batch, heads, -(-entries // group), width) if per == "channel" else (batch, heads, entries, width // group)
    codes = torch.randint(0, 1 << bits, (*shape, group), dtype=torch.uint8, generator=made)
    scale = (torch.rand(shape, generator=made) * 4 / (1 << bits)).half()
    low = torch.randn(shape, generator=made).half()
    return Packed(pack(codes, bits).to(path.device), scale.to(path.device), low.to(path.device), bits, per)  # type: ignore[arg-type]


def queries(heads: int, width: int, seed: int = 1, batch: int = 1, count: int = 1, path: Path = CPU) -> Tensor:
    return torch.randn(batch, heads, count, width, generator=torch.Generator().manual_seed(seed)).to(path.device)


def assert_same(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], atol: float = 1e-5, rtol: float = 1e-5
) -> None:
    torch.testing.assert_close(found[0], expected[0], atol=atol, rtol=rtol)
    torch.testing.assert_close(found[1], expected[1], atol=atol, rtol=rtol)


@pytest.mark.parametrize("path", ALL_PATHS)
def test_the_cards_folding_by_hand(path: Path) -> None:
    """Card 7.4: q = [1, 2], codes [[0, 3], [3, 1]] (tokens x channels), s = [2, 6], m = [0, -8]: logits 20 and 2."""
    codes = (
        torch.tensor([[0, 3], [3, 1]], dtype=torch.uint8).repeat(8, 1).T
    )  # 16 tokens fill a word: [channels, tokens]
    scale, low = torch.tensor([2.0, 6.0]).half(), torch.tensor([0.0, -8.0]).half()
    # 16 channels, of which the last 14 are zero
    wide = torch.zeros(1, 1, 1, 16, 16, dtype=torch.uint8)
    wide[..., :2, :] = codes
    scales, lows = torch.zeros(2, 1, 1, 1, 16).half()
    scales[..., :2], lows[..., :2] = scale, low
    keys = Packed(pack(wide, 2).to(path.device), scales.to(path.device), lows.to(path.device), 2, "channel")
    # values: the even tokens hold 3 in every channel, the odd ones 0
    codes = torch.tensor([3, 0], dtype=torch.uint8).repeat(8).view(1, 1, 16, 1, 1).expand(-1, -1, -1, -1, 16)
    ones = torch.ones(1, 1, 16, 1).half().to(path.device)
    values = Packed(pack(codes.contiguous(), 2).to(path.device), ones, 0 * ones, 2, "token")
    q = torch.zeros(1, 1, 1, 16, device=path.device)
    q[..., :2] = torch.tensor([1.0, 2.0])
    out, lse = packed_attention(q, keys, values, 0.125, kernel=path.kernel)
    even, odd = math.exp(20 / 8), math.exp(2 / 8)
    assert lse.item() == pytest.approx(math.log(8 * even + 8 * odd), abs=1e-6)
    torch.testing.assert_close(out.flatten().cpu(), torch.full((16,), 3 * even / (even + odd)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("keys_per, values_per", [("channel", "token"), ("token", "token"), ("channel", "channel")])
@pytest.mark.parametrize(
    "heads, group, entries, width, size",
    [(1, 1, 1, 32, 32), (2, 4, 75, 64, 32), (1, 8, 300, 32, 16), (2, 2, 131, 96, 32), (1, 3, 260, 128, 128)],
)
def test_both_paths_equal_the_definition(
    heads: int, group: int, entries: int, width: int, size: int, keys_per: str, values_per: str, bits: int, path: Path
) -> None:
    if values_per == "channel":
        entries = -(-entries // size) * size  # a group of values is whole or not there
    keys = packed(heads, entries, width, size, bits, keys_per, 2, path=path)
    values = packed(heads, entries, width, size, bits, values_per, 3, path=path)
    q = queries(heads * group, width, path=path)
    expected = packed_attention_reference(q, keys, values, width**-0.5)
    assert_same(packed_attention(q, keys, values, width**-0.5, kernel=path.kernel), expected)


@pytest.mark.parametrize("path", ALL_PATHS)
def test_different_bits_several_queries_and_a_batch(path: Path) -> None:
    keys, values = (
        packed(2, 192, 64, 32, 4, "channel", 4, 3, path=path),
        packed(2, 192, 64, 64, 2, "token", 5, 3, path=path),
    )
    q = queries(6, 64, batch=3, count=2, path=path)
    expected = packed_attention_reference(q, keys, values, 0.2)
    assert_same(packed_attention(q, keys, values, 0.2, kernel=path.kernel), expected)


@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_splitting_changes_nothing(splits: int, path: Path) -> None:
    keys, values = packed(2, 333, 32, 32, 2, "channel", path=path), packed(2, 333, 32, 32, 2, "token", path=path)
    q = queries(4, 32, path=path)
    expected = packed_attention_reference(q, keys, values, 0.2)
    assert_same(packed_attention(q, keys, values, 0.2, splits=splits, kernel=path.kernel), expected)


@pytest.mark.parametrize("path", ALL_PATHS)
def test_rows_of_different_lengths_and_hidden_entries(path: Path) -> None:
    keys, values = (
        packed(3, 200, 32, 32, 4, "channel", batch=2, path=path),
        packed(3, 200, 32, 32, 4, "token", batch=2, path=path),
    )
    lengths = torch.tensor([[200, 1, 0], [64, 65, 63]], device=path.device)
    q = queries(6, 32, batch=2, path=path)
    out, lse = packed_attention(q, keys, values, 0.3, lengths=lengths, splits=3, kernel=path.kernel)
    assert_same((out, lse), packed_attention_reference(q, keys, values, 0.3, lengths))
    assert (out[0, 4:] == 0).all() and (lse[0, 4:] == -math.inf).all()  # a row without entries
    for b, h in ((0, 1), (1, 0), (1, 2)):  # a row is what it would be alone
        n = int(lengths[b, h])
        alone = [side._replace(**{x: getattr(side, x)[b : b + 1, h : h + 1] for x in ("codes", "scale", "low")})
                 for side in (keys, values)]  # fmt: skip
        alone[1] = alone[1]._replace(**{x: getattr(alone[1], x)[:, :, :n] for x in ("codes", "scale", "low")})
        mine = slice(2 * h, 2 * h + 2)
        expected = packed_attention_reference(q[b : b + 1, mine], *alone, 0.3)
        assert_same((out[b : b + 1, mine], lse[b : b + 1, mine]), expected)
    visible = torch.rand(2, 3, 200, generator=torch.Generator().manual_seed(0)).to(path.device) < 0.3
    visible[1, 2] = False
    for mask in (visible, visible[:1, :1]):
        expected = packed_attention_reference(q, keys, values, 0.3, lengths, mask)
        found = packed_attention(q, keys, values, 0.3, lengths=lengths, visible=mask, kernel=path.kernel)
        assert_same(found, expected)


@pytest.mark.parametrize("path", ALL_PATHS)
def test_soft_capped_logits(path: Path) -> None:
    keys, values = packed(1, 96, 64, 32, 4, "channel", path=path), packed(1, 96, 64, 32, 4, "token", path=path)
    q = 20 * queries(2, 64, path=path)
    expected = packed_attention_reference(q, keys, values, 1.0, softcap=30.0)
    assert_same(packed_attention(q, keys, values, 1.0, softcap=30.0, kernel=path.kernel), expected, 1e-4)


@pytest.mark.parametrize(
    "path, dtype, tolerance",  # Triton's interpreter cannot multiply bfloat16
    [
        *(pytest.param(*path.values, torch.float16, 2e-3, marks=path.marks) for path in ALL_PATHS),
        *(pytest.param(*path.values, torch.bfloat16, 1e-2, marks=path.marks) for path in (TWIN, COMPILED)),
    ],
)
@pytest.mark.parametrize("bits", [2, 8])
def test_half_precision_queries(dtype: torch.dtype, tolerance: float, bits: int, path: Path) -> None:
    keys, values = packed(2, 200, 64, 32, bits, "channel", path=path), packed(2, 200, 64, 32, bits, "token", path=path)
    q = queries(8, 64, path=path).to(dtype)
    out, lse = packed_attention(q, keys, values, 0.125, kernel=path.kernel)
    expected = packed_attention_reference(q, keys, values, 0.125)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_same((out, lse), expected, tolerance, tolerance)


@pytest.mark.parametrize("path", ALL_PATHS)
def test_views_with_room_to_grow_are_read_in_place(path: Path) -> None:
    keys, values = packed(2, 128, 32, 32, 2, "channel", path=path), packed(2, 128, 32, 32, 2, "token", path=path)
    roomy = []
    for side in (keys, values):
        grown = {}
        for name in ("codes", "scale", "low"):
            x = getattr(side, name)
            room = torch.full(
                (x.shape[0], x.shape[1], x.shape[2] + 3, *x.shape[3:]), 7, dtype=x.dtype, device=path.device
            )
            room[:, :, 1:-2] = x
            grown[name] = room[:, :, 1:-2]
        roomy.append(side._replace(**grown))
    q = queries(4, 32, path=path)
    assert_same(
        packed_attention(q, *roomy, 0.2, kernel=path.kernel),
        packed_attention(q, keys, values, 0.2, kernel=path.kernel),
        0,
        0,
    )


@pytest.mark.parametrize("path", ALL_PATHS)
def test_no_entries(path: Path) -> None:
    q = queries(2, 32, path=path)
    out, lse = packed_attention(
        q,
        packed(1, 0, 32, 32, 2, "channel", path=path),
        packed(1, 0, 32, 32, 2, "token", path=path),
        1.0,
        kernel=path.kernel,
    )
    assert out.shape == q.shape and (out == 0).all() and (lse == -math.inf).all()


def test_two_runs_merge_to_one() -> None:
    keys, values = packed(2, 160, 32, 32, 2, "channel"), packed(2, 160, 32, 32, 2, "token")
    q = queries(4, 32)
    names = ("codes", "scale", "low")
    first, rest = (
        [
            keys._replace(**{x: getattr(keys, x)[:, :, of] for x in names}),
            values._replace(**{x: getattr(values, x)[:, :, tokens] for x in names}),
        ]
        for of, tokens in ((slice(0, 2), slice(0, 64)), (slice(2, 5), slice(64, 160)))
    )
    parts = [packed_attention(q, *run, 0.2) for run in (first, rest)]
    assert_same(merge_partials(parts), packed_attention_reference(q, keys, values, 0.2))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([2, 4, 8]),
    st.sampled_from([16, 32, 64, 128]),
    st.integers(1, 400),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from([("channel", "token"), ("token", "token")]),
    st.integers(0, 99),
)
def test_blocks_of_any_size_equal_the_definition(
    bits: int, size: int, entries: int, heads: int, group: int, per: tuple[str, str], seed: int
) -> None:
    keys, values = (
        packed(heads, entries, 128, size, bits, per[0], seed),
        packed(heads, entries, 128, size, bits, per[1]),
    )
    q = queries(heads * group, 128, seed)
    assert_same(packed_attention(q, keys, values, 0.1), packed_attention_reference(q, keys, values, 0.1))


def test_what_does_not_belong_together_is_refused() -> None:
    keys, values = packed(2, 64, 32, 32, 2, "channel"), packed(2, 64, 32, 32, 2, "token")
    q = queries(4, 32)
    with pytest.raises(ValueError, match="bits must be one of"):
        packed_attention(q, keys._replace(bits=3), values, 1.0)
    with pytest.raises(ValueError, match="per 'channel' or 'token'"):
        packed_attention(q, keys, values._replace(per="head"), 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected int32 codes"):
        packed_attention(q, keys._replace(codes=keys.codes.long()), values, 1.0)
    with pytest.raises(ValueError, match="do not belong to queries"):
        packed_attention(queries(3, 32), keys, values, 1.0)
    with pytest.raises(ValueError, match="do not belong to queries"):
        packed_attention(queries(4, 64), keys, values, 1.0)
    with pytest.raises(ValueError, match="32 keys do not cover 64 values"):
        packed_attention(q, packed(2, 32, 32, 32, 2, "channel"), values, 1.0)
    with pytest.raises(ValueError, match="power of two"):
        packed_attention(queries(4, 48), packed(2, 64, 48, 48, 2, "token"), packed(2, 64, 48, 48, 2, "token"), 1.0)
