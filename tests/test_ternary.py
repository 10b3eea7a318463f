"""Sherry's 3:4 ternary weights: the card's example, the bit layout to the bit, and every code there is."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.models.ternary import codes_of, dequantize, pack, ternarize, unpack

W = torch.tensor([[0.5, -2.0, 3.0, 1.0, -0.1, 0.4, -0.6, 0.2]])  # the card, section 7


def test_card_example() -> None:
    ternary, scale = ternarize(W)
    assert ternary.tolist() == [[0, -1, 1, 1, 0, 1, -1, 1]]
    assert scale.tolist() == [[pytest.approx(1.2)]]  # over what is kept; with the zeros it would be 0.9
    packed = pack(ternary.repeat(1, 4))
    assert codes_of(packed).tolist() == [[1, 2] * 4]
    torch.testing.assert_close(dequantize(packed, scale)[:, :8], 1.2 * ternary.float())


def test_the_bits_are_where_the_layout_says() -> None:
    codes = [0b00001, 0b00010, 0b11111, 0b10100, 0b00000, 0b01010, 0b11000, 0b00111]
    fours = {code: four for four, code in every_code()}
    row = torch.tensor([[w for code in codes for w in fours[code]]])
    number = sum(
        code << 5 * j for j, code in enumerate(codes)
    )  # code j in bits 5 j to 5 j + 4, least significant first
    assert bytes(pack(row)[0].tolist()) == number.to_bytes(5, "little")


def every_code() -> list[tuple[list[int], int]]:
    """All 32 fours with their codes, written out: the zero's place, and a bit for every negative one of the rest."""
    out = []
    for place, signs in itertools.product(range(4), itertools.product([1, -1], repeat=3)):
        four = [*signs[:place], 0, *signs[place:]]
        out.append((four, 8 * place + sum((s < 0) << n for n, s in enumerate(signs))))
    return out


def test_all_32_codes_are_distinct_and_come_back() -> None:
    fours, codes = zip(*every_code())
    assert sorted(codes) == list(range(32))
    packed = pack(torch.tensor([[w for four in fours for w in four]]))
    assert codes_of(packed)[0].tolist() == list(codes)
    assert unpack(packed)[0].tolist() == [w for four in fours for w in four]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from([None, 4, 16, 32]), st.integers(0, 2**16))
def test_packing_is_exact_and_as_small_as_it_says(rows: int, blocks: int, group: int | None, seed: int) -> None:
    weight = torch.randn(rows, 32 * blocks, generator=torch.Generator().manual_seed(seed)).half()
    ternary, scale = ternarize(weight, group)
    packed = pack(ternary)
    assert torch.equal(unpack(packed), ternary)
    assert 8 * packed.numel() == 1.25 * weight.numel()
    bits = 8 * (packed.numel() + 2 * scale.numel()) / weight.numel()
    assert bits == 1.25 + 16 / (group or 32 * blocks)
    fours, kept = weight.unflatten(-1, (-1, 4)), ternary.unflatten(-1, (-1, 4)) != 0
    assert (kept.sum(-1) == 3).all()
    assert (fours.abs().masked_fill(~kept, torch.inf).amin(-1) >= fours.abs().masked_fill(kept, 0).amax(-1)).all()


def test_ties_and_zeros_have_a_code() -> None:
    ternary, scale = ternarize(torch.tensor([[1.0, -1, 1, 1, 0, 0, 0, 2]]))
    assert ternary.tolist() == [
        [1, -1, 1, 0, 1, 1, 0, 1]
    ]  # of equals the last is dropped; a zero that is kept is positive
    assert scale.item() == pytest.approx(5 / 6)


@pytest.mark.parametrize("bad", [[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 2, 1]])
def test_other_numbers_are_refused(bad: list[int]) -> None:
    with pytest.raises(wb.WorkbenchError, match="not 3:4 ternary.*ternarize first"):
        pack(torch.tensor([bad * 8]))


def test_rows_that_do_not_fill_bytes_or_groups_are_refused() -> None:
    with pytest.raises(wb.WorkbenchError, match="pad them to a multiple of 32"):
        pack(torch.tensor([[0, 1, 1, 1]]))
    for group in (0, 6, 64):
        with pytest.raises(wb.WorkbenchError, match="use a group that divides 32"):
            ternarize(torch.zeros(1, 32), group)
