"""Sherry's 3:4 ternary weights (arXiv 2601.07892), packed: 4 weights in 5 bits. Of every 4, one is 0 and three are ±scale.

A weight format, not a cache: it explains how many tokens of cache a small model's weights are worth. Axes: O outputs, I
inputs of a linear layer, g inputs that share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import WorkbenchError

CODE_BITS = 5  # where the zero is (2 bits), and three signs: 4 * 2**3 = 32 states, none of them unused
PER_CODE = 4  # weights of a code
BLOCK = 32  # weights of 8 codes: 40 bits, 5 whole bytes


def ternarize(weight: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """The closed-form rule: of every 4 inputs the smallest magnitude becomes 0, the others their sign.

    Sherry trains with this rule; applied to a finished model it costs far more accuracy.

    Args:
        weight: [O, I] any float dtype.
        group: inputs that share a scale; None for all of a row.

    Returns:
        int8 [O, I] of -1, 0, 1, and scales [O, I / g] in the weight's dtype: the mean magnitude of what is kept. Of equal
        magnitudes the last becomes 0; a weight that is 0 and kept counts as positive.

    Raises:
        WorkbenchError: 4 does not divide the group, or the group does not divide I.
    """
    inputs = weight.shape[-1]
    group = inputs if group is None else group
    if group < 1 or group % PER_CODE or inputs % group:
        raise WorkbenchError(
            f"Rows of {inputs} weights do not fall into groups of {group} that are multiples of {PER_CODE}; use a group "
            f"that divides {inputs}."
        )
    fours = weight.unflatten(-1, (-1, PER_CODE))  # [O, I / 4, 4]
    smallest = fours.abs().sort(dim=-1, descending=True, stable=True).indices[..., -1:]
    kept = torch.ones_like(fours, dtype=torch.bool).scatter(-1, smallest, False)
    signs = torch.where(fours < 0, -1, 1) * kept
    magnitude = (fours.abs() * kept).flatten(-2).unflatten(-1, (-1, group)).sum(-1)
    return signs.to(torch.int8).flatten(-2), magnitude / (group * 3 // 4)


def pack(ternary: Tensor) -> Tensor:
    """Codes of 5 bits, 8 of them in 5 bytes: uint8 [O, I / 32 * 5].

    A code is 8 * (place of the zero, 0 to 3) + s0 + 2 * s1 + 4 * s2, where s0, s1, s2 are 1 for a negative one of the
    other three, in order. Code j of a block of 8 takes bits 5 j to 5 j + 4 of its 40, bit n being bit n % 8 of byte n // 8.

    Args:
        ternary: [O, I] integers; every run of 4 has one 0 and three of ±1; I a multiple of 32.

    Raises:
        WorkbenchError: other numbers, or rows that do not fill whole bytes.
    """
    if ternary.shape[-1] % BLOCK:
        raise WorkbenchError(
            f"Rows of {ternary.shape[-1]} weights do not fill whole bytes; pad them to a multiple of {BLOCK}."
        )
    fours = ternary.unflatten(-1, (-1, PER_CODE))
    zero = fours == 0
    if not bool((zero.sum(-1) == 1).all() & (fours.abs() <= 1).all()):
        raise WorkbenchError(
            "These weights are not 3:4 ternary: every 4 in a row must be one 0 and three of -1 or 1; use ternarize first."
        )
    place = zero.int().argmax(-1)
    negative = fours[~zero].unflatten(0, (*place.shape, 3)) < 0
    codes = 8 * place + (negative.int() << torch.arange(3, device=ternary.device)).sum(-1)  # [O, I / 4]
    bits = codes[..., None] >> torch.arange(CODE_BITS, device=ternary.device) & 1
    octets = bits.flatten(-2).unflatten(-1, (-1, 8))  # lowest bit first
    return (octets << torch.arange(8, device=ternary.device)).sum(-1).to(torch.uint8)


def codes_of(packed: Tensor) -> Tensor:
    """The codes, 0 to 31, of :func:`pack`'s bytes: uint8 [O, I / 4]."""
    bits = packed.int()[..., None] >> torch.arange(8, device=packed.device) & 1
    fives = bits.flatten(-2).unflatten(-1, (-1, CODE_BITS))
    return (fives << torch.arange(CODE_BITS, device=packed.device)).sum(-1).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """Invert :func:`pack`: int8 [O, I] of -1, 0, 1."""
    return _table(packed.device)[codes_of(packed).long()].flatten(-2)


def dequantize(packed: Tensor, scale: Tensor) -> Tensor:
    """Weights [O, I] in the dtype of ``scale`` [O, I / g]."""
    signs = unpack(packed).to(scale.dtype)
    return (signs.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


def _table(device: torch.device) -> Tensor:
    """The four weights of each code: int8 [32, 4]."""
    code = torch.arange(1 << CODE_BITS, device=device)[:, None]
    place = torch.arange(PER_CODE, device=device)
    order = place - (place > code >> 3).long()  # which of the three a place is, were it not the zero
    signs = 1 - 2 * (code >> order & 1)
    return (signs * (place != code >> 3)).to(torch.int8)
