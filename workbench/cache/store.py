"""A layer's store: a list of segments, and the operations strategies perform on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from workbench.cache.channels import ChannelSegment
from workbench.cache.inputs import InputSegment
from workbench.cache.ragged import RaggedSegment
from workbench.cache.segments import DenseSegment, Query, Segment, UniformSegment, take
from workbench.errors import WorkbenchError
from workbench_kernels import merge_partials

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def sink_share(lse: Tensor, sinks: Tensor) -> Tensor:
    """What attention sinks [Hq] leave of the mass of logits with ``lse`` [B, Hq, Tq]: exp(lse) / (exp(lse) + exp(s))."""
    return torch.sigmoid(lse - sinks.float().view(1, -1, 1))


def is_dense(segment: Segment) -> bool:
    """Whether every entry is held in the model's own precision, on its own."""
    if isinstance(segment, RaggedSegment):
        return all(map(is_dense, segment.rows))
    return type(segment) is DenseSegment


class Codec(Protocol):
    """How entries are held: makes the segment that takes over a run of entries."""

    def encode(self, k: Tensor, v: Tensor, positions: Tensor | None, start: int) -> Segment:
        """Hold k, v [B, H, n, D]; ``positions`` int32 [B, H, n], or None when they are start, start + 1, …"""
        ...

    def row(self, b: int, h: int) -> Codec:
        """The codec for one row alone, where rows hold different numbers of entries."""
        ...


class Store:
    """The cached entries of one layer; every tensor it holds is counted by :meth:`nbytes`."""

    def __init__(self, batch: int, heads: int) -> None:
        self.batch, self.heads = batch, heads
        self.segments: list[Segment] = [DenseSegment(batch, heads)]
        self.codec: Codec | None = None
        self._changed = False

    @property
    def changed(self) -> bool:
        """Whether a strategy dropped entries or channels, or holds some entries as codes."""
        return self._changed or any(self.packed(row) for row in range(self.rows))

    @property
    def rows(self) -> int:
        return self.batch * self.heads

    @property
    def lengths(self) -> list[int]:
        """Entries held by each row (batch * KV heads numbers)."""
        return [sum(counts) for counts in zip(*(s.lengths for s in self.segments), strict=True)]

    @property
    def uniform(self) -> bool:
        """Whether every row holds the same number of entries."""
        return len(set(self.lengths)) == 1

    def reserve(self, like: Tensor, rows: int) -> None:
        """Make room for ``rows`` entries before the first append, so that a long prefill does not reallocate."""
        last = self.segments[-1]
        if isinstance(last, DenseSegment):
            last.reserve(like, rows)

    def append(self, k: Tensor, v: Tensor, start: int, at: Tensor | None = None) -> None:
        """Add entries k, v [B, H, T, D] at positions start, start + 1, … or, where tokens are left out, ``at`` [T]."""
        self.segments[-1].append(k, v, start, at)

    @property
    def takes_inputs(self) -> bool:
        """Whether new entries are held as what their keys and values are made of."""
        return isinstance(self.segments[-1], InputSegment)

    def append_inputs(self, x: Tensor, start: int) -> None:
        """Add the entries that are made of the layer's inputs x [B, T, d] at positions start, start + 1, …"""
        last = self.segments[-1]
        assert isinstance(last, InputSegment)
        last.append_inputs(x, start)

    def rest_on(self, below: Store) -> None:
        """The layer before holds its entries in ``below``."""
        for segment, under in zip(self.segments, below.segments, strict=False):
            segment.rest_on(under)

    def attend(self, query: Query) -> Tensor:
        """Attention [B, Hq, Tq, D] over all segments."""
        if len(self.segments) == 1 and query.sinks is None:
            return self.segments[0].attend(query, need_lse=False)[0]
        parts = []
        for index, segment in enumerate(self.segments):
            final = index == len(self.segments) - 1
            asked = query if final else replace(query, own=False)
            parts.append(segment.attend(asked))
        out, lse = merge_partials(parts)
        if query.sinks is not None:
            out = (out.float() * sink_share(lse, query.sinks)[..., None]).to(out.dtype)
        return out

    def settle(self) -> None:
        for segment in self.segments:
            segment.settle()

    def entries(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Decoded keys [n, D], values [n, D] and positions int32 [n] of one row."""
        if len(self.segments) == 1:
            return self.segments[0].entries(row)
        parts = [segment.entries(row) for segment in self.segments]
        return tuple(torch.cat(side) for side in zip(*parts, strict=True))  # type: ignore[return-value]

    def _every_row(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """:meth:`entries` of all rows; heads that are coded together are decoded once."""
        only = self.segments[0]
        if len(self.segments) == 1 and isinstance(only, UniformSegment):
            sides = (only.keys().flatten(0, 1), only.values().flatten(0, 1), self.all_positions().flatten(0, 1))
            return list(zip(*sides, strict=True))
        return [self.entries(row) for row in range(self.rows)]

    def positions(self, row: int) -> Tensor:
        """Positions of one row's entries, int32 [n]."""
        parts = [segment.positions_of(row) for segment in self.segments]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def all_positions(self) -> Tensor:
        """Positions of every row's entries, int32 [B, H, n]. Needs rows of equal length."""
        only = self.segments[0]
        if len(self.segments) == 1 and isinstance(only, UniformSegment):
            return only.positions().expand(self.batch, self.heads, -1)
        return torch.stack([self.positions(row) for row in range(self.rows)]).unflatten(0, (self.batch, self.heads))

    def keys(self) -> Tensor:
        """Decoded keys [B, H, n, D]; a view where they are dense. Needs rows of equal length."""
        return self._side(0)

    def values(self) -> Tensor:
        """Decoded values [B, H, n, D]; a view where they are dense. Needs rows of equal length."""
        return self._side(1)

    def _side(self, side: int) -> Tensor:
        whole = [segment for segment in self.segments if isinstance(segment, UniformSegment)]
        if len(whole) == len(self.segments):
            parts = [segment.values() if side else segment.keys() for segment in whole]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        stacked = torch.stack([self.entries(row)[side] for row in range(self.rows)])
        return stacked.unflatten(0, (self.batch, self.heads))

    def keep(self, index: Tensor | Sequence[Tensor], keys: Tensor | None = None) -> None:
        """Keep only the entries named, and free the others.

        Args:
            index: int64 [B, H, m] of entry numbers in ascending order, or one such vector per row where rows keep
                different numbers.
            keys: [B, H, m, D] to hold instead of the keys that the entries have; needs rows that keep equal numbers.
        """
        per_row: Iterable[Tensor] = index.flatten(0, 1) if isinstance(index, Tensor) else index
        rows = list(per_row)
        if all(len(kept) == held for kept, held in zip(rows, self.lengths, strict=True)):
            return  # everything stays: the store is left exactly as it is
        self._changed = True
        only = self.segments[0]
        if isinstance(index, Tensor) and len(self.segments) == 1 and isinstance(only, DenseSegment):
            at = self.all_positions().gather(2, index)
            k = take(only.keys(), index) if keys is None else keys
            self.segments = [self._hold(k, take(only.values(), index), at)]
            return
        gathered = [
            tuple(side[kept] for side in entries) for entries, kept in zip(self._every_row(), rows, strict=True)
        ]
        if len({len(kept) for kept in rows}) == 1:
            k, v, at = (
                torch.stack(side).unflatten(0, (self.batch, self.heads)) for side in zip(*gathered, strict=True)
            )
            self.segments = [self._hold(k if keys is None else keys, v, at)]
        else:
            parts = [
                self._hold(k[None, None], v[None, None], at[None, None], row) for row, (k, v, at) in enumerate(gathered)
            ]
            self.segments = [RaggedSegment(parts, self.heads)]

    def narrow_keys(self, channels: Tensor, recent: int) -> None:
        """Hold only some channels of the keys, and free the others, but for the newest entries and those to come.

        Args:
            channels: int64 [B, H, m], ascending.
            recent: newest entries that keep all channels.
        """
        (dense,) = self.segments
        if not isinstance(dense, DenseSegment):
            raise WorkbenchError(
                "Channels can only be taken from keys in the model's own precision, equally many a head."
            )
        cut = max(dense.length - recent, 0)
        self._changed = True
        self.segments = [ChannelSegment.narrowed(dense, cut, channels), dense.after(cut)]

    def recode(self, codec: Codec) -> None:
        """Hold the entries, and those still to come, by ``codec``."""
        self.codec = codec
        self.segments = [self._recoded(segment, codec) for segment in self.segments]

    def decode(self) -> None:
        """Hold everything in the model's own precision from now on; what is held so already stays as it is."""
        self.codec = None
        if all(is_dense(segment) for segment in self.segments):
            return
        rows = self._every_row()
        if len({len(at) for *_, at in rows}) == 1:
            k, v, at = (torch.stack(side).unflatten(0, (self.batch, self.heads)) for side in zip(*rows, strict=True))
            self.segments = [DenseSegment.of(k, v, at)]
        else:
            parts = [DenseSegment.of(*(side[None, None] for side in row)) for row in rows]
            self.segments = [RaggedSegment(parts, self.heads)]
        self._changed = True

    def _recoded(self, segment: Segment, codec: Codec) -> Segment:
        if isinstance(segment, RaggedSegment):
            rows = enumerate(segment.rows)
            return RaggedSegment(
                [self._recoded(s, codec.row(*divmod(row, segment.heads))) for row, s in rows], segment.heads
            )
        assert isinstance(segment, UniformSegment)
        if isinstance(segment, DenseSegment):
            positions = None if segment.at is None else segment.positions()
            return codec.encode(segment.keys(), segment.values(), positions, segment.start)
        at = segment.positions().expand(segment.batch, segment.heads, -1)
        return codec.encode(segment.keys(), segment.values(), at, 0)

    def _hold(self, k: Tensor, v: Tensor, at: Tensor, row: int | None = None) -> Segment:
        """A segment of these entries, of all rows or of one."""
        if self.codec is None:
            return DenseSegment.of(k, v, at)
        codec = self.codec if row is None else self.codec.row(*divmod(row, self.heads))
        return codec.encode(k, v, at, 0)

    def pieces(self, query: Query) -> Iterator[tuple[UniformSegment, Query]]:
        """The segments that hold all rows alike, each with the query; or one for each row, with that row's part of it."""
        group = query.q.shape[1] // self.heads
        for segment in self.segments:
            if isinstance(segment, RaggedSegment):
                for row, part in enumerate(segment.rows):
                    b, h = divmod(row, self.heads)
                    assert isinstance(part, UniformSegment)
                    yield part, query.narrow(b, h * group, (h + 1) * group)
            else:
                assert isinstance(segment, UniformSegment)
                yield segment, query

    def drop_before(self, position: int) -> None:
        """Free entries before ``position``, which a sliding window has passed."""
        for segment in self.segments:
            segment.drop_before(position)

    def packed(self, row: int) -> int:
        """How many entries of a row are held as codes."""
        return sum(segment.packed(row) for segment in self.segments)

    def nbytes(self) -> dict[str, int]:
        """Bytes in use by kind."""
        held: dict[str, int] = {}
        for segment in self.segments:
            for kind, size in segment.nbytes().items():
                held[kind] = held.get(kind, 0) + size
        return held

    def nbytes_by_row(self) -> list[int]:
        return [sum(sizes) for sizes in zip(*(s.nbytes_by_row() for s in self.segments), strict=True)]

    def reserved_bytes(self) -> int:
        return sum(segment.reserved_bytes() for segment in self.segments)

    def clone(self) -> Store:
        """A store that shares all storage held now and goes its own way from here."""
        twin = Store(self.batch, self.heads)
        twin.segments = [segment.clone() for segment in self.segments]
        twin.codec, twin._changed = self.codec, self._changed
        return twin
