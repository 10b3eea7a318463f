"""Segments: runs of cached entries of one layer that are held the same way.

Axes: B batch, H KV heads, n entries, D head_dim. A *row* is one (batch, KV head) pair, numbered b * H + h.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from workbench.cache.growable import Growable
from workbench_kernels import attend, merge_partials
from workbench_kernels.attention import MaskFn

Partial = tuple[Tensor, Tensor]


class Positions(Protocol):
    """Explicit positions int32 [B, H, n]: a :class:`Growable`, or something that needs fewer bytes."""

    def read(self, start: int, stop: int) -> Tensor: ...
    def append(self, x: Tensor) -> None: ...
    def after(self, start: int) -> Positions: ...
    def nbytes(self) -> int: ...
    def reserved_bytes(self) -> int: ...
    def clone(self) -> Positions: ...


@dataclass(frozen=True)
class Query:
    """What a layer asks of its entries.

    Attributes:
        q: [B, Hq, Tq, D] after RoPE.
        start: position of the first query; they are consecutive unless ``at`` says otherwise.
        own: the queries' own entries are the last Tq of the store (causal among themselves); False when they were
            not appended.
        scale: factor on the logits.
        window: entries a sliding-window layer sees, counting the query's own; None for full attention.
        softcap: Gemma 2's soft-capping of the logits, or None.
        padding: bool [B, seen], False where a left-padded batch has no token; None without padding.
        sinks: [Hq] learnt logits that take a share of the mass and give nothing (GPT-OSS), or None.
        at: int64 [Tq], ascending: the queries' positions where tokens between them stayed behind in an earlier layer.
    """

    q: Tensor
    start: int
    own: bool
    scale: float
    window: int | None = None
    softcap: float | None = None
    padding: Tensor | None = None
    sinks: Tensor | None = None
    at: Tensor | None = None

    @property
    def stop(self) -> int:
        """The position after the last query."""
        return self.start + self.q.shape[2] if self.at is None else int(self.at[-1]) + 1

    def asked(self) -> Tensor:
        """Positions of the queries: int64 [Tq]."""
        return torch.arange(self.start, self.stop, device=self.q.device) if self.at is None else self.at

    def narrow(self, row_batch: int, first_head: int, last_head: int) -> Query:
        """The same question for the query heads of one row: q becomes [1, G, Tq, D]."""
        padding = None if self.padding is None else self.padding[row_batch : row_batch + 1]
        q = self.q[row_batch : row_batch + 1, first_head:last_head]
        sinks = None if self.sinks is None else self.sinks[first_head:last_head]
        return replace(self, q=q, padding=padding, sinks=sinks)

    def last(self, window: int, earlier: Query | None = None) -> Query:
        """The last ``window`` queries on their own (a copy), continuing ``earlier`` ones where a chunk is short."""
        q, at = self.q, self.at
        if earlier is not None and q.shape[2] < window and earlier._continued_by(self):
            gaps = at is not None or earlier.at is not None
            q, at = torch.cat([earlier.q, q], 2), torch.cat([earlier.asked(), self.asked()]) if gaps else None
        q, at = q[:, :, -window:].clone(), None if at is None else at[-window:]
        return replace(self, q=q, start=self.stop - q.shape[2] if at is None else int(at[0]), at=at)

    def _continued_by(self, later: Query) -> bool:
        """Whether ``later`` asks for the tokens that come next; those that stayed behind are not missing."""
        return self.stop == later.start or (later.at is not None and self.stop < later.start)


def entry_mask(query: Query, positions: Tensor) -> MaskFn | None:
    """Additive mask for entries at ``positions`` [B, H, n] (or [1, 1, n] when all rows share them); None = all seen."""
    if query.window is None and query.padding is None:
        return None
    group = query.q.shape[1] // positions.shape[1] if positions.shape[1] > 1 else 1

    def mask(q0: int, q1: int, n0: int, n1: int) -> Tensor:
        at = positions[:, :, None, n0:n1]  # [B, H, 1, n]
        hidden = torch.zeros_like(at, dtype=torch.bool)
        if query.window is not None:
            hidden = hidden | (at <= query.asked()[q0:q1, None] - query.window)
        if query.padding is not None:
            batch = torch.arange(query.padding.shape[0], device=at.device).view(-1, 1, 1, 1)
            hidden = hidden | ~query.padding[batch, at.long()]
        additive = torch.zeros(hidden.shape, device=at.device).masked_fill_(hidden, float("-inf"))
        return additive.repeat_interleave(group, 1)

    return mask


def seen_by(query: Query, positions: Tensor) -> Tensor:
    """Which entries at ``positions`` [B, H, n] each query sees, by causality and window: bool [B, H, Tq, n]."""
    asked, at = query.asked()[:, None], positions[:, :, None]
    visible = at <= asked
    return visible if query.window is None else visible & (at > asked - query.window)


def causal_mask(query: Query, positions: Tensor) -> MaskFn:
    """Additive mask by :func:`seen_by`, for queries and entries in any order."""
    group = query.q.shape[1] // positions.shape[1] if positions.shape[1] > 1 else 1

    def mask(q0: int, q1: int, n0: int, n1: int) -> Tensor:
        hidden = ~seen_by(query, positions[:, :, n0:n1])[:, :, q0:q1]
        additive = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))
        return additive.repeat_interleave(group, 1)

    return mask


def take(x: Tensor, index: Tensor) -> Tensor:
    """Entries ``index`` [B, H, m] of keys or values x [B, H, n, D]: a copy [B, H, m, D]."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))


class Segment(ABC):
    """Entries of one layer held in one way. Subclasses say how; the store only knows this interface."""

    batch: int
    heads: int

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """Entries of each row (B * H numbers)."""

    @abstractmethod
    def append(self, k: Tensor, v: Tensor, start: int, at: Tensor | None = None) -> None:
        """Add entries k, v [B, H, T, D] to every row, at positions start, start + 1, … or, where given, ``at`` [T].

        Positions ascend and come after those already held: a chunk is causal by the order of its entries.
        """

    @abstractmethod
    def attend(self, query: Query, need_lse: bool = True) -> Partial:
        """Attention over these entries: output [B, Hq, Tq, D] and log-sum-exp [B, Hq, Tq]."""

    @abstractmethod
    def entries(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Decoded keys [n, D], values [n, D] and positions int32 [n] of one row."""

    @abstractmethod
    def positions_of(self, row: int) -> Tensor:
        """Positions of one row's entries, int32 [n]; decodes nothing."""

    @abstractmethod
    def drop_before(self, position: int) -> None:
        """Free oldest entries before ``position``, which a sliding window has passed; some may stay."""

    @abstractmethod
    def nbytes(self) -> dict[str, int]:
        """Bytes in use by kind (keys, values, codes, scales, positions, window, …); every tensor held is in one kind."""

    @abstractmethod
    def nbytes_by_row(self) -> list[int]:
        """The same bytes by row."""

    @abstractmethod
    def reserved_bytes(self) -> int:
        """Bytes allocated for entries to come."""

    @abstractmethod
    def clone(self) -> Segment:
        """A segment that shares this one's storage and can be appended to on its own."""

    @property
    def paths(self) -> set[str]:
        """How attention of one query last read the entries held as codes: "fused", as they are held; "dequantize", decoded
        first; "rebuild", of the layer's inputs. Empty where none are, or none was asked yet."""
        return set()

    def rest_on(self, below: Segment) -> None:
        """Where entries are held as differences to those of the layer before: the segment that holds these."""

    def factors(self) -> list[Tensor]:
        """Matrices made of the model's weights that reading takes besides them; they belong to the model, not to a cache."""
        return []

    def settle(self) -> None:
        """Called after the layer attended: a codec may now pack what has left its residual window."""

    def packed(self, row: int) -> int:
        """How many of a row's first entries have both key and value held as codes."""
        return 0


class UniformSegment(Segment):
    """Every row holds the same number of entries.

    Positions are implied (``start``, ``start + 1``, …) until entries are dropped, or arrive with gaps between them; from
    then on they are stored, int32 per row and entry, and counted.
    """

    def __init__(self, batch: int, heads: int, start: int = 0) -> None:
        self.batch, self.heads, self.start = batch, heads, start
        self.at: Positions | None = None  # explicit positions [B, H, n]

    @property
    @abstractmethod
    def length(self) -> int:
        """Entries of every row."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def keys(self) -> Tensor:
        """Decoded keys [B, H, n, D]; a view where they are dense."""

    @abstractmethod
    def values(self) -> Tensor:
        """Decoded values [B, H, n, D]; a view where they are dense."""

    @property
    def lengths(self) -> list[int]:
        return [self.length] * (self.batch * self.heads)

    def positions(self) -> Tensor:
        """int32 [B, H, n], or [1, 1, n] while they are implied."""
        if self.at is not None:
            return self.at.read(0, self.length)
        return torch.arange(self.start, self.start + self.length, dtype=torch.int32, device=self.device)[None, None]

    def positions_of(self, row: int) -> Tensor:
        b, h = divmod(row, self.heads)
        return self.positions()[(b, h) if self.at is not None else (0, 0)]

    def nbytes_by_row(self) -> list[int]:
        rows = self.batch * self.heads
        each, over = divmod(sum(self.nbytes().values()), rows)  # what heads share is split among them
        return [each + (row < over) for row in range(rows)]

    def shared(self) -> list[tuple[str, Tensor]]:
        """(kind, tensor) held that other segments may hold as well."""
        return []

    def own_bytes(self) -> dict[str, int]:
        """Bytes by kind without what is :meth:`shared`."""
        return self.nbytes()

    def _banded(self, query: Query) -> bool:
        """Whether no mask is needed: over consecutive entries a window is a band that ends with the query's own."""
        ends_here = query.own or query.stop == self.start + self.length  # the second: replayed
        return query.padding is None and (query.window is None or (self.at is None and ends_here))

    def _attend_run(self, k: Tensor, v: Tensor, query: Query, need_lse: bool) -> Partial:
        """Attention over all entries k, v of a segment for which the query is banded."""
        own, window = query.own or query.window is not None, query.window
        return attend(  # type: ignore[return-value]
            query.q, k, v, query.scale, causal=own, window=window, softcap=query.softcap, need_lse=need_lse
        )

    def _note_positions(self, start: int, count: int, at: Tensor | None) -> None:
        """Positions start, start + 1, … (or ``at`` [count]) join; called before the entries are appended."""
        if self.at is None:
            if self.length == 0:
                self.start = start
            if at is None:
                return
            implied = self.positions() if self.length else None
            self.at = Growable()
            if implied is not None:
                self.at.append(implied.expand(self.batch, self.heads, -1))
        if at is None:
            at = torch.arange(start, start + count, device=self.device)
        self.at.append(at.to(torch.int32).expand(self.batch, self.heads, -1))

    def _passed(self, position: int) -> int:
        """Oldest entries that lie before ``position`` in every row."""
        if self.at is None:
            return min(max(0, position - self.start), self.length)
        return int((self.positions() < position).sum(-1).min())

    def _forget(self, count: int) -> None:
        """The positions of the ``count`` oldest entries leave."""
        self.start += count
        if self.at is not None:
            self.at = self.at.after(count)


class DenseSegment(UniformSegment):
    """Entries in the model's dtype."""

    def __init__(self, batch: int, heads: int, start: int = 0) -> None:
        super().__init__(batch, heads, start)
        self.k, self.v = Growable(), Growable()

    @classmethod
    def of(cls, k: Tensor, v: Tensor, positions: Tensor) -> DenseSegment:
        """Hold k, v [B, H, n, D] at ``positions`` int32 [B, H, n]."""
        self = cls(k.shape[0], k.shape[1])
        self.k, self.v, self.at = Growable.of(k), Growable.of(v), Growable.of(positions.to(torch.int32))
        return self

    @property
    def length(self) -> int:
        return self.k.length

    @property
    def device(self) -> torch.device:
        return self.k.blocks()[0].device

    def reserve(self, like: Tensor, rows: int) -> None:
        self.k.reserve(like, rows)
        self.v.reserve(like, rows)

    def append(self, k: Tensor, v: Tensor, start: int, at: Tensor | None = None) -> None:
        self._note_positions(start, k.shape[2], at)
        self.k.append(k)
        self.v.append(v)

    def attend(self, query: Query, need_lse: bool = True) -> Partial:
        blocks = list(zip(self.k.blocks(), self.v.blocks(), strict=True))
        if len(blocks) == 1 and self._banded(query):
            return self._attend_run(*blocks[0], query, need_lse)
        positions = self.positions()
        parts, offset = [], 0
        for k, v in blocks:
            mask = entry_mask(query, positions[:, :, offset : offset + k.shape[2]])
            offset += k.shape[2]
            own = query.own and offset == self.length  # appended in one go, so all in the last block
            parts.append(attend(query.q, k, v, query.scale, causal=own, mask=mask, softcap=query.softcap))
        return merge_partials(parts)  # type: ignore[arg-type]

    def entries(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        b, h = divmod(row, self.heads)
        return self.keys()[b, h], self.values()[b, h], self.positions_of(row)

    def keys(self) -> Tensor:
        """[B, H, n, D]; a view while there is one block."""
        return self.k.read(0, self.length)

    def values(self) -> Tensor:
        return self.v.read(0, self.length)

    def drop_before(self, position: int) -> None:
        cut = self._passed(position)
        if cut:
            self._drop_oldest(cut)

    def after(self, count: int) -> DenseSegment:
        """The entries after the ``count`` oldest, on their own: a copy."""
        rest = self.clone()
        rest._drop_oldest(count)
        return rest

    def _drop_oldest(self, count: int) -> None:
        self._forget(count)
        self.k, self.v = self.k.after(count), self.v.after(count)

    def nbytes(self) -> dict[str, int]:
        held = {"keys": self.k.nbytes(), "values": self.v.nbytes()}
        if self.at is not None:
            held["positions"] = self.at.nbytes()
        return held

    def reserved_bytes(self) -> int:
        return sum(g.reserved_bytes() for g in (self.k, self.v, self.at) if g is not None)

    def clone(self) -> DenseSegment:
        twin = DenseSegment(self.batch, self.heads, self.start)
        twin.k, twin.v = self.k.clone(), self.v.clone()
        twin.at = None if self.at is None else self.at.clone()
        return twin
