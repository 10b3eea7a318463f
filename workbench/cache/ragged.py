"""Ragged segment: every row (batch, KV head) keeps its own number of entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.cache.segments import Partial, Query, Segment


class RaggedSegment(Segment):
    """Every row keeps its own number of entries: one single-row segment per (batch, KV head)."""

    def __init__(self, rows: Sequence[Segment], heads: int) -> None:
        self.rows = list(rows)
        self.heads, self.batch = heads, len(self.rows) // heads

    @property
    def lengths(self) -> list[int]:
        return [row.lengths[0] for row in self.rows]

    @property
    def paths(self) -> set[str]:
        return set().union(*(row.paths for row in self.rows))

    def append(self, k: Tensor, v: Tensor, start: int, at: Tensor | None = None) -> None:
        for index, row in enumerate(self.rows):
            b, h = divmod(index, self.heads)
            row.append(k[b : b + 1, h : h + 1], v[b : b + 1, h : h + 1], start, at)

    def attend(self, query: Query, need_lse: bool = True) -> Partial:
        batch, query_heads, queries, _ = query.q.shape
        group = query_heads // self.heads
        out = torch.empty_like(query.q)
        lse = torch.empty(batch, query_heads, queries, dtype=torch.float32, device=query.q.device)
        for index, row in enumerate(self.rows):
            b, h = divmod(index, self.heads)
            heads = slice(h * group, (h + 1) * group)
            out[b, heads], lse[b, heads] = (x[0] for x in row.attend(query.narrow(b, heads.start, heads.stop)))
        return out, lse

    def entries(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows[row].entries(0)

    def positions_of(self, row: int) -> Tensor:
        return self.rows[row].positions_of(0)

    def drop_before(self, position: int) -> None:
        for row in self.rows:
            row.drop_before(position)

    def nbytes(self) -> dict[str, int]:
        held: dict[str, int] = {}
        for row in self.rows:
            for kind, size in row.nbytes().items():
                held[kind] = held.get(kind, 0) + size
        return held

    def nbytes_by_row(self) -> list[int]:
        return [row.nbytes_by_row()[0] for row in self.rows]

    def reserved_bytes(self) -> int:
        return sum(row.reserved_bytes() for row in self.rows)

    def clone(self) -> RaggedSegment:
        return RaggedSegment([row.clone() for row in self.rows], self.heads)

    def settle(self) -> None:
        for row in self.rows:
            row.settle()

    def packed(self, row: int) -> int:
        return self.rows[row].packed(0)
