"""Tiered segment: entries of one layer at several precisions, chosen head by head (mixed precision, protected sinks).

Axes: B batch, H KV heads, n entries, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from workbench.cache.coded import CodedSegment, distinct, with_shared
from workbench.cache.positions import Chosen
from workbench.cache.segments import Partial, Query, UniformSegment, take
from workbench_kernels import merge_partials


class TieredSegment(UniformSegment):
    """Several segments that together hold the entries of every row; new ones join the last.

    Each tier says where its entries stand. Attention reads the tiers one after the other and merges, since it does not
    depend on the order of entries; whoever asks for entries gets them in the order of their positions.

    Args:
        tiers: segments with equally many entries in every row.
    """

    def __init__(self, tiers: Sequence[UniformSegment]) -> None:
        super().__init__(tiers[0].batch, tiers[0].heads)
        self.tiers = list(tiers)

    @property
    def length(self) -> int:
        return sum(tier.length for tier in self.tiers)

    @property
    def device(self) -> torch.device:
        return self.tiers[0].device

    def append(self, k: Tensor, v: Tensor, start: int, at: Tensor | None = None) -> None:
        self.tiers[-1].append(k, v, start, at)

    def settle(self) -> None:
        for tier in self.tiers:
            tier.settle()

    @property
    def paths(self) -> set[str]:
        return set().union(*(tier.paths for tier in self.tiers))

    @property
    def filled(self) -> list[UniformSegment]:
        """Tiers that hold entries; the first one where none does."""
        return [tier for tier in self.tiers if tier.length] or self.tiers[:1]

    def attend(self, query: Query, need_lse: bool = True) -> Partial:
        last = self.tiers[-1]
        return merge_partials(
            [tier.attend(query if tier is last else replace(query, own=False)) for tier in self.filled]
        )

    def _places(self) -> tuple[Tensor, Tensor]:
        """Positions int32 [B, H, n], ascending, and which of the tiers' entries stands there."""
        return torch.cat([tier.positions().expand(self.batch, self.heads, -1) for tier in self.filled], 2).sort(-1)

    def positions(self) -> Tensor:
        return self._places()[0]

    def positions_of(self, row: int) -> Tensor:
        b, h = divmod(row, self.heads)
        return self.positions()[b, h]

    def keys(self) -> Tensor:
        return take(torch.cat([tier.keys() for tier in self.filled], 2), self._places()[1])

    def values(self) -> Tensor:
        return take(torch.cat([tier.values() for tier in self.filled], 2), self._places()[1])

    def entries(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        sides = zip(*(tier.entries(row) for tier in self.filled), strict=True)
        k, v, at = (torch.cat(side) for side in sides)
        order = at.argsort()
        return k[order], v[order], at[order]

    def drop_before(self, position: int) -> None:
        for tier in self.tiers[:-1]:
            passed = int((tier.positions() < position).sum(-1).min())
            if isinstance(tier, CodedSegment) and tier.takeable:
                if passed:  # its entries may stand in any order
                    rest = tier.positions().argsort(-1)[..., passed:].sort(-1).values
                    self._replace(tier, [tier.take(rest)])
            elif passed == tier.length:
                self._replace(tier, [])
        self.tiers[-1].drop_before(position)

    def _replace(self, tier: UniformSegment, by: list[UniformSegment]) -> None:
        place = next(index for index, known in enumerate(self.tiers) if known is tier)
        self.tiers[place : place + 1] = by

    def nbytes(self) -> dict[str, int]:
        held: dict[str, int] = {}
        shared: list[tuple[str, Tensor]] = []  # by several tiers, maybe
        for tier in self.tiers:
            shared += tier.shared()
            shared += tier.at.choice.held() if isinstance(tier.at, Chosen) else []
            for kind, size in tier.own_bytes().items():
                held[kind] = held.get(kind, 0) + size
        return with_shared(held, distinct(shared))

    def reserved_bytes(self) -> int:
        return sum(tier.reserved_bytes() for tier in self.tiers)

    def clone(self) -> TieredSegment:
        return TieredSegment([tier.clone() for tier in self.tiers])  # type: ignore[misc]

    def packed(self, row: int) -> int:
        return sum(tier.packed(row) for tier in self.tiers)
