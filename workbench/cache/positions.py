"""Where the entries of one tier stand, without an int32 for each of them.

Both classes read like a :class:`Growable` of positions [B, H, n]. Axes: B batch, H KV heads, n entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.cache.channels import pack_bits, unpack_bits
from workbench.cache.growable import Growable


class Choice:
    """Which of a run of entries were chosen, one bit each: the positions of the chosen ones and of the others.

    Args:
        chosen: bool [B, H, n], equally many in every row.
        base: int32 positions [B, H, n] of the run, or where it starts when they are consecutive.
    """

    def __init__(self, chosen: Tensor, base: Tensor | int) -> None:
        self.count, self.base = chosen.shape[-1], base
        self.bits = pack_bits(chosen)

    def positions(self, chosen: bool) -> Tensor:
        """int32 [B, H, m], ascending in every row."""
        mask = unpack_bits(self.bits, self.count) == chosen
        if isinstance(self.base, Tensor):
            return self.base[mask].view(*mask.shape[:2], -1)
        at = torch.arange(self.base, self.base + self.count, dtype=torch.int32, device=mask.device)
        return at.expand(mask.shape)[mask].view(*mask.shape[:2], -1)

    def held(self) -> list[tuple[str, Tensor]]:
        mask = [("mask", self.bits)]
        return [*mask, ("positions", self.base)] if isinstance(self.base, Tensor) else mask


class Chosen:
    """Positions of the chosen entries of a :class:`Choice`, or of the others; the choice is counted apart, since both
    tiers share it."""

    def __init__(self, choice: Choice, chosen: bool) -> None:
        self.choice, self.chosen = choice, chosen

    def read(self, start: int, stop: int) -> Tensor:
        return self.choice.positions(self.chosen)[:, :, start:stop]

    def append(self, x: Tensor) -> None:
        raise ValueError("a choice among a run of entries is made once")

    def after(self, start: int) -> Growable:
        rest = self.choice.positions(self.chosen)[:, :, start:]
        return Growable.of(rest)

    def nbytes(self) -> int:
        return 0

    def reserved_bytes(self) -> int:
        return 0

    def clone(self) -> Chosen:
        return self  # it never changes


class Gaps:
    """Consecutive positions but for a few that stand elsewhere.

    Args:
        start: the first position; length: entries; holes: int32 [B, m] of the positions left out, ascending.
    """

    def __init__(self, start: int, length: int, holes: Tensor, heads: int, skip: int = 0) -> None:
        self.start, self.length, self.holes, self.heads = start, length, holes, heads
        self.skip = skip  # entries that have left

    def read(self, start: int, stop: int) -> Tensor:
        # The k-th position that is left lies behind as many holes as come before it.
        first, device = self.start + self.skip, self.holes.device
        at = torch.arange(first + start, first + stop, dtype=torch.int32, device=device)
        shifts = self.holes - torch.arange(self.holes.shape[1], dtype=torch.int32, device=device)
        passed = torch.searchsorted(shifts, at.expand(len(self.holes), -1).contiguous(), right=True)
        return (at + passed.to(torch.int32))[:, None].expand(-1, self.heads, -1)

    def append(self, positions: Tensor) -> None:
        self.length += positions.shape[2]

    def after(self, count: int) -> Gaps:
        return Gaps(self.start, self.length - count, self.holes, self.heads, self.skip + count)

    def nbytes(self) -> int:
        return 0  # the holes are the positions of the entries that fill them, and counted there

    def reserved_bytes(self) -> int:
        return 0

    def clone(self) -> Gaps:
        return Gaps(self.start, self.length, self.holes, self.heads, self.skip)
