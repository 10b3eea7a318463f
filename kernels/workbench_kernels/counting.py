"""Attention that counts what it reads, in O(T) memory per query head and without a T x T matrix.

Counted per query head: the mass each entry receives, the entropy of each query's weights, the mass on the first entries,
the mass by distance, and two maps of at most C x C cells (the largest and the mean weight of a cell). The weights of a
block of queries exist once, for the output and for every count.

Axes: Hq query heads, H KV heads, G group, T tokens of the prompt, C cells on either axis of a map, B distance bins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from workbench_kernels.codes import encode_weights

ROWS = 64  # queries in a block: enough for the matrix product to be near its best, few enough for the weights to stay cached
CELLS = 1 << 22  # logits of one head in a block at most: 16 MiB
BATCH_CELLS = 1 << 20  # logits of a block up to which several heads go together
TELLING = 1e-30  # a weight from which the logarithm of the sum can be told; float32 ends at 1e-38
HIDDEN_LOGIT = -1e30  # not -inf: zero weight times it is zero


@dataclass
class AttentionCounts:
    """What one layer's attention was counted to read so far; sums over queries, not yet divided.

    Attributes:
        tokens, cell, sinks: T; the tokens of a map cell on either axis; how many first entries count as sinks.
        columns: float32 [Hq, T], mass that each entry received.
        largest, mean: uint8 [Hq, C, C], codes of a cell's largest weight and of the mean over what its queries could see.
        entropy: float32 [Hq, C], nats, summed over the queries of a map row. What a learnt sink logit takes is one of the
            outcomes.
        sink: float32 [Hq, C], mass on the first ``sinks`` entries, summed over the queries of a map row.
        distance: float32 [Hq, B], mass at distance 0, 1, 2-3, 4-7, …: bin b > 0 holds 2^(b-1) up to 2^b - 1.
    """

    tokens: int
    cell: int
    sinks: int
    columns: Tensor
    largest: Tensor
    mean: Tensor
    entropy: Tensor
    sink: Tensor
    distance: Tensor

    @classmethod
    def empty(
        cls, heads: int, tokens: int, cells: int = 256, sinks: int = 4, device: torch.device | str = "cpu"
    ) -> AttentionCounts:
        """Nothing counted yet, for a prompt of ``tokens`` tokens and maps of at most ``cells`` x ``cells``."""
        cell = -(-tokens // cells)
        side = -(-tokens // cell)
        bins = (tokens - 1).bit_length() + 1
        row, codes = (heads, side), (heads, side, side)
        return cls(
            tokens,
            cell,
            sinks,
            torch.zeros(heads, tokens, device=device),
            torch.zeros(codes, dtype=torch.uint8, device=device),
            torch.zeros(codes, dtype=torch.uint8, device=device),
            torch.zeros(row, device=device),
            torch.zeros(row, device=device),
            torch.zeros(heads, bins, device=device),
        )

    def of_heads(self, heads: slice) -> AttentionCounts:
        """Those of some heads: views, so that adding to them adds here."""
        parts: dict[str, Any] = {name: x[heads] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **parts)

    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in vars(self).values() if isinstance(x, Tensor))


def visible_pairs(rows: Tensor, columns: Tensor, window: int | None = None) -> Tensor:
    """How many (query, entry) pairs of each map cell are visible: int64 [map rows, map columns].

    Args:
        rows: int64 [map rows + 1], positions where the map rows begin, and where the last ends; columns alike.
        window: entries a query sees up to its own; None for all.
    """
    ends, left = rows[:, None], columns[None]

    def before(queries: Tensor) -> Tensor:
        """Pairs left of each border if the first so many queries see 1, 2, 3, … entries."""
        both = torch.minimum(queries, left)
        return both * (both + 1) // 2 + (queries - both) * left

    pairs = before(ends)
    if window is not None:
        pairs = pairs - before((ends - window).clamp_min(0))
    return pairs.diff(dim=0).diff(dim=1)


def check_queries(q: Tensor, k: Tensor, counts: AttentionCounts) -> None:
    """ValueError for queries that :func:`attend_counting` does not take."""
    entries, start = k.shape[2], k.shape[2] - q.shape[2]
    if q.shape[0] != 1:
        raise ValueError(f"attention is counted for one row at a time, got a batch of {q.shape[0]}")
    if start % counts.cell or (entries % counts.cell and entries != counts.tokens):
        raise ValueError(
            f"queries {start} to {entries - 1} cut a map row of {counts.cell}; feed the prompt in multiples of it"
        )


def attend_counting(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    counts: AttentionCounts,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last Tq of N entries, counted into ``counts``.

    Args:
        q: [1, Hq, Tq, D]; k, v: [1, H, N, D] at positions 0 to N - 1; the queries are at N - Tq to N - 1. N - Tq and N
            lie on borders of map cells, or N is the prompt's end.
        window, softcap, sinks: as in :func:`workbench_kernels.attention.attention_sums`.

    Returns:
        The output [1, Hq, Tq, D].

    Raises:
        ValueError: more than one row, or queries that cut a map row.
    """
    check_queries(q, k, counts)
    entries, queries = k.shape[2], q.shape[2]
    start = entries - queries
    heads, kv_heads = q.shape[1], k.shape[1]
    group = heads // kv_heads
    out = q.new_empty(1, heads, queries, v.shape[-1])
    rows = max(1, min(ROWS, max(16, entries // 16), CELLS // entries))
    together = BATCH_CELLS // (rows * entries)  # query heads
    width = group if together >= group else 1
    height = max(1, min(kv_heads, together // group))
    first, side = start // counts.cell, counts.largest.shape[2]
    borders = torch.arange(side + 1, device=q.device).mul_(counts.cell)
    pairs = visible_pairs(borders[first:].clamp_max(entries), borders, window)
    scratch = torch.empty(2, height * width * rows * (entries + 1), device=q.device)
    for h0 in range(0, heads, height * width):
        own = slice(h0, min(heads, h0 + height * width))
        read = slice(h0 // group, (own.stop - 1) // group + 1)
        own_sinks = None if sinks is None else sinks[own].float().view(-1, 1, 1)
        block = _HeadBlock(
            q[0, own], k[0, read], v[0, read], out[0, own], scale, window, softcap, own_sinks, rows, scratch, pairs
        )
        block.count(counts.of_heads(own))
    return out


@dataclass
class _HeadBlock:
    """Some KV heads k, v [h, N, D] and g query heads of each, q [h * g, Tq, D], the last of the N, with their output.

    Either whole groups, or one query head alone.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None  # [h * g, 1, 1]
    rows: int  # queries whose weights are held at a time
    scratch: Tensor  # float32 [2, logits of the largest block]
    pairs: Tensor  # int64 [map rows, C] from the first query's map row on: visible pairs of each cell

    def __post_init__(self) -> None:
        self.stop = self.k.shape[1]
        self.start = self.stop - self.q.shape[1]
        self.profile = torch.zeros(self.q.shape[0], self.stop, device=self.q.device)  # mass by exact distance

    def count(self, counts: AttentionCounts) -> None:
        """Attend with all queries and add to ``counts``, which are those of these heads."""
        for q0, q1 in _bands(self.start, self.stop, counts.cell, self.rows):
            self._count_band(q0, q1, counts)
        counts.distance += _binned(self.profile, counts.distance.shape[1])

    def _first(self, query: int) -> int:
        """The first entry that the query at this position sees."""
        return 0 if self.window is None else max(0, query - self.window + 1)

    def _count_band(self, q0: int, q1: int, counts: AttentionCounts) -> None:
        """The queries from q0 to q1: whole map rows, more than one only where one block holds them all."""
        lines = max(1, (q1 - q0) // counts.cell)
        step = q1 - q0 if lines > 1 else self.rows
        first = self._first(q0)
        sums = self.profile.new_zeros(self.q.shape[0], lines, q1 - first)
        most, entropy = torch.zeros_like(sums), sums.new_zeros(*sums.shape[:2])
        for r0 in range(q0, q1, step):
            r1 = min(q1, r0 + step)
            weights, logits = self._weights(r0, r1)
            seen, at = r1 - self._first(r0), slice(self._first(r0) - first, r1 - first)
            used = weights[..., :seen]
            by_line = used.unflatten(1, (lines, -1))  # [h * g, lines, queries of a line, m]
            sums[..., at] += _sum_rows(by_line.flatten(0, 1)).view(*sums.shape[:2], -1)
            torch.maximum(most[..., at], by_line.amax(2), out=most[..., at])
            _add_distances(self.profile, weights, seen)
            grouped = used.reshape(self.v.shape[0], -1, seen)  # [h, g * R, m]
            read = torch.bmm(grouped, self.v[:, self._first(r0) : r1].float())
            self.out[:, r0 - self.start : r1 - self.start] = read.view(*used.shape[:2], -1)
            lse = _log_sum_exp(logits, weights, seen)
            entropy += (lse - logits.mul_(weights).sum(-1)).unflatten(1, (lines, -1)).sum(2)  # -sum p ln p
        row = slice(q0 // counts.cell, q0 // counts.cell + lines)
        counts.columns[:, first:q1] += sums.sum(1)
        counts.entropy[:, row] += entropy
        if first < counts.sinks:
            counts.sink[:, row] += sums[..., : counts.sinks - first].sum(-1)
        pairs = self.pairs[row.start - self.start // counts.cell :][:lines]
        total, peak = _pooled(sums, most, first, counts.cell, pairs.shape[1])
        shown = (pairs > 0).expand_as(peak)
        counts.largest[:, row] = encode_weights(peak, shown)
        counts.mean[:, row] = encode_weights(total / pairs.clamp_min(1), shown)

    def _weights(self, r0: int, r1: int) -> tuple[Tensor, Tensor]:
        """Weights and logits [h * g, R, m] of the queries r0 to r1 over what the first of them sees, up to the last.

        Where there are learnt sinks, both have one more column: the sink.
        """
        first, rows = self._first(r0), r1 - r0
        seen = r1 - first
        shape = (self.q.shape[0], rows, seen + (self.sinks is not None))
        logits, weights = (x[: shape[0] * shape[1] * shape[2]].view(shape) for x in self.scratch)
        q = self.q[:, r0 - self.start : r1 - self.start].float() * self.scale
        grouped = q.reshape(self.k.shape[0], -1, q.shape[-1])  # [h, g * R, D]
        keys = self.k[:, first:r1].float().transpose(1, 2)
        if self.sinks is None:
            torch.bmm(grouped, keys, out=logits.view(*grouped.shape[:2], seen))
        else:
            logits[..., :seen] = torch.bmm(grouped, keys).view(shape[0], rows, seen)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        own = torch.arange(seen - rows, seen, device=q.device)[:, None]
        if self.window is None or r1 <= self.window:  # only among the queries' own entries is anything hidden
            logits[..., seen - rows : seen].masked_fill_(own < own.T, HIDDEN_LOGIT)
        else:
            entry = torch.arange(seen, device=q.device)
            logits[..., :seen].masked_fill_((entry > own) | (entry <= own - self.window), HIDDEN_LOGIT)
        if self.sinks is not None:
            logits[..., seen:] = self.sinks
        torch.softmax(logits, -1, out=weights)
        return weights, logits


def _bands(start: int, stop: int, cell: int, rows: int) -> Iterator[tuple[int, int]]:
    """Queries that are counted together: as many whole map rows as a block holds, or one, and the short last one alone."""
    step = max(1, rows // cell) * cell
    whole = start + (stop - start) // cell * cell
    for q0 in range(start, whole, step):
        yield q0, min(whole, q0 + step)
    if whole < stop:
        yield whole, stop


def _pooled(sums: Tensor, most: Tensor, first: int, cell: int, side: int) -> tuple[Tensor, Tensor]:
    """Sums and maxima [h, lines, m] of entries from ``first`` on, per map column: two of [h, lines, side]."""
    ends = (first, side * cell - first - sums.shape[-1])
    total, peak = (torch.nn.functional.pad(x, ends).unflatten(-1, (side, cell)) for x in (sums, most))
    return total.sum(-1), peak.amax(-1)


def _sum_rows(x: Tensor) -> Tensor:
    """[b, R, m] -> [b, m]; a product with ones reads memory faster than a sum over rows does."""
    return torch.bmm(x.new_ones(x.shape[0], 1, x.shape[1]), x)[:, 0]


def _log_sum_exp(logits: Tensor, weights: Tensor, seen: int) -> Tensor:
    """[h, R] of logits and their softmax [h, R, >= m], whose own entries are the last R of m.

    Any entry gives it away, z - ln p, as long as its weight is not too small to be told from nothing: the own one, mostly.
    """
    rows = weights.shape[1]
    own, logit = (x[..., seen - rows : seen].diagonal(dim1=1, dim2=2) for x in (weights, logits))
    if bool((own < TELLING).any()):
        own, logit = weights.amax(-1), logits.amax(-1)
    return logit - own.log()


def _add_distances(profile: Tensor, weights: Tensor, seen: int) -> None:
    """Add weights [h, R, >= m] of the last R of m entries to ``profile`` [h, >= m] by distance 0 to m - 1."""
    heads, rows, width = weights.shape
    # A diagonal is a distance: the same memory read with rows one entry longer has the diagonals as its columns.
    full = weights.as_strided((heads, rows, seen - rows + 1), (rows * width, width + 1, 1), weights.storage_offset())
    profile[:, : seen - rows + 1] += _sum_rows(full).flip(-1)
    if rows > 1:  # the diagonals that begin below the first row
        corner = weights.new_zeros(heads, rows, 2 * rows)
        corner[..., rows:] = weights[..., :rows].tril(-1)
        slanted = corner.as_strided((heads, rows, rows), (2 * rows * rows, 2 * rows + 1, 1))
        profile[:, seen - rows + 1 : seen] += slanted.sum(1)[:, 1:].flip(-1)


def _binned(profile: Tensor, bins: int) -> Tensor:
    """Mass by distance [h, N] -> [h, bins]: distance 0, 1, 2-3, 4-7, …"""
    ends = torch.tensor([1 << b for b in range(bins)], device=profile.device).clamp_max_(profile.shape[1])
    upto = profile.double().cumsum(-1)[:, ends - 1]
    return upto.diff(dim=-1, prepend=torch.zeros_like(upto[:, :1])).float()
