"""The queries of a prompt that was read: some are held, the others are computed again from the cache when asked for.

A query of layer l follows from its token and from the keys and values of the layers below, which the cache holds. So any
rows can be had without the prompt being read again: they alone pass through the layers below. Axes: L layers, Hq query
heads, R rows, D head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench_kernels.rows import row_weights

if TYPE_CHECKING:
    from workbench.cache.cache import WorkbenchCache
    from workbench.cache.layer import WorkbenchLayer
    from workbench.cache.segments import Query
    from workbench.models.load import Model

HELD_BYTES = 1 << 18  # of queries per layer and query head
LAST = 64  # rows at the end of the prompt that are always among them
BLOCK_CELLS = 1 << 22  # weights computed at a time: 16 MiB


class _Reached(Exception):
    """The layer that was asked for has its queries; no layer above needs to run."""


def stratified(borders: Tensor, seed: int = 0) -> Tensor:
    """One row from each stratum between neighbouring borders int64 [..., n + 1]: int64 [..., n], the same every time."""
    spread = borders.diff()
    draw = torch.rand(spread.shape, generator=torch.Generator().manual_seed(seed))
    return borders[..., :-1] + torch.minimum((draw * spread).long(), (spread - 1).clamp_min(0))


def rows_to_hold(tokens: int, row_bytes: int) -> Tensor:
    """Positions of the queries worth holding: all of a short prompt, else a stratified sample and the last ones."""
    room = max(2 * LAST, HELD_BYTES // row_bytes)
    if tokens <= room:
        return torch.arange(tokens)
    strata = torch.arange(room - LAST + 1) * (tokens - LAST) // (room - LAST)
    return torch.cat([stratified(strata), torch.arange(tokens - LAST, tokens)])


class Rows:
    """Queries of one layer at ascending positions: ``at`` int64 [R], ``q`` [Hq, R, D]."""

    def __init__(self, at: Tensor, q: Tensor) -> None:
        self.at, self.q = at, q

    def joined(self, other: Rows) -> Rows:
        """Both, of which no position is in the other."""
        at, order = torch.cat([self.at, other.at]).sort()
        return Rows(at, torch.cat([self.q, other.q], 1)[:, order.to(self.q.device)])

    def of(self, at: Tensor) -> Tensor:
        """Those at positions that are all here."""
        return self.q[:, torch.searchsorted(self.at, at).to(self.q.device)]

    def nbytes(self) -> int:
        return self.q.numel() * self.q.element_size() + self.at.numel() * self.at.element_size()


class Queries:
    """Queries by layer and position.

    Args:
        cache: that read the prompt, of which nothing was dropped; its layers' queries come by :meth:`hold` while it reads.
        at: int64, ascending positions whose queries are held.
        most_bytes: of queries computed again that are kept for the next time.
    """

    def __init__(
        self, model: Model, cache: WorkbenchCache, prompt: list[int], at: Tensor, most_bytes: int = 64 << 20
    ) -> None:
        self.model, self.cache, self.prompt, self.at = model, cache, prompt, at
        self.most_bytes = most_bytes
        self._held: dict[int, Rows] = {}
        self._again: dict[int, Rows] = {}

    def hold(self, layer: int, query: Query) -> None:
        """Keep a copy of those of a chunk's queries that are to be held."""
        first, stop = torch.searchsorted(self.at, torch.tensor([query.start, query.stop]))
        at = self.at[first:stop]
        self.hold_rows(layer, Rows(at, query.q[0][:, (at - query.start).to(query.q.device)]))

    def hold_rows(self, layer: int, rows: Rows) -> None:
        """Keep these queries from now on; none of their positions is held yet."""
        self._held[layer] = self._held[layer].joined(rows) if layer in self._held else rows

    def of(self, layer: int, at: Tensor) -> Tensor:
        """Queries [Hq, R, D] of a layer at the ascending positions ``at`` int64 [R], computed again where not held."""
        missing = at[~self.held(layer, at)]
        if len(missing):
            self._compute_again(layer, missing)
        known = [rows[layer] for rows in (self._held, self._again) if layer in rows]
        return (known[0] if len(known) == 1 else known[0].joined(known[1])).of(at)

    def held(self, layer: int, at: Tensor) -> Tensor:
        """Which of the positions need no computing: bool [R]."""
        found = torch.zeros_like(at, dtype=torch.bool)
        for rows in (self._held, self._again):
            if layer in rows:
                found |= torch.isin(at, rows[layer].at)
        return found

    def cost(self, layer: int) -> int:
        """Multiply-adds it takes to compute one row of this layer again: attention in the layers below it."""
        g = self.model.geometry
        return layer * g.num_heads * 2 * g.head_dim * len(self.prompt)

    def nbytes(self) -> dict[str, int]:
        """Bytes of queries held since the prompt was read, and of those computed again."""
        held, again = (sum(rows.nbytes() for rows in known.values()) for known in (self._held, self._again))
        return {"queries": held, "queries_again": again}

    def _compute_again(self, layer: int, at: Tensor) -> None:
        computed = _replay(self.model, self.cache, self.prompt, at, layer)
        fresh = {}
        for number, q in enumerate(computed):
            new = ~self.held(number, at)  # the layers below may hold other rows
            fresh[number] = Rows(at[new], q[:, new.to(q.device)])
        if self.nbytes()["queries_again"] + sum(rows.nbytes() for rows in fresh.values()) > self.most_bytes:
            self._again = {}
        for number, rows in fresh.items():
            self._again[number] = self._again[number].joined(rows) if number in self._again else rows


class _RowReader:
    """Attends for rows at any positions, as they did when the prompt was read; notes their queries, layer by layer."""

    def __init__(self, at: Tensor, last: int) -> None:
        self.at, self.last = at, last
        self.queries: list[Tensor] = []

    def attend(self, layer: WorkbenchLayer, query: Query) -> Tensor:
        self.queries.append(query.q[0])
        if layer.index == self.last:
            raise _Reached
        store, group = layer.store, query.q.shape[1] // layer.store.heads
        out = torch.empty_like(query.q)
        step = max(1, BLOCK_CELLS // (group * layer.seen))
        for row in range(store.heads):
            k, v, _ = store.entries(row)
            heads = slice(row * group, (row + 1) * group)
            sinks = None if query.sinks is None else query.sinks[heads]
            for r0 in range(0, len(self.at), step):
                at = self.at[r0 : r0 + step]
                n = int(at[-1]) + 1  # the rows ascend
                weights = row_weights(
                    query.q[0, heads, r0 : r0 + step], k[:n], query.scale, at,
                    window=query.window, softcap=query.softcap, sinks=sinks,
                )  # fmt: skip
                out[0, heads, r0 : r0 + step] = (weights @ v[:n].float()).to(out.dtype)
        return out


def _replay(model: Model, cache: WorkbenchCache, prompt: list[int], at: Tensor, layer: int) -> list[Tensor]:
    """Queries [Hq, R, D] of the rows ``at``, of every layer up to ``layer``."""
    at = at.to(model.device)
    reader = _RowReader(at, layer)
    tokens = torch.tensor([[prompt[i] for i in at.tolist()]], device=model.device)
    cache.reader = reader
    try:
        with torch.inference_mode(), cache.replay():
            model.network(input_ids=tokens, position_ids=at[None], past_key_values=cache, use_cache=True)
    except _Reached:
        return reader.queries
    finally:
        cache.reader = None
    raise AssertionError(f"the model has no layer {layer} that attends through its cache")
