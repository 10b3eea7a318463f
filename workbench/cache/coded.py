"""Coded segment: keys and values, each held by a scheme of its own, their newest entries in full precision.

The two sides may leave that residual at different times, so keys and values have different coded lengths.
Axes: B batch, H KV heads, n entries, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.cache.fused import attend_held
from workbench.cache.growable import Growable
from workbench.cache.schemes.base import Scheme
from workbench.cache.segments import Partial, Query, UniformSegment, entry_mask
from workbench.cache.sides import AT_ONCE, Flush, Side
from workbench_kernels import attend, merge_partials

BLOCK = 1024  # entries decoded at a time while attending; no dense copy of more than this exists


@dataclass(frozen=True)
class PairCodec:
    """A scheme and a flush rule for keys and for values.

    ``first_…`` are those of the prompt's entries, which are coded at once, where they differ from the ones of what is
    generated later.
    """

    keys: Scheme
    values: Scheme
    key_flush: Flush = AT_ONCE
    value_flush: Flush = AT_ONCE
    first_keys: Scheme | None = None
    first_values: Scheme | None = None
    first_flush: Flush | None = None

    def encode(self, k: Tensor, v: Tensor, positions: Tensor | None, start: int) -> CodedSegment:
        """Hold k, v [B, H, n, D]; ``positions`` int32 [B, H, n], or None when they are start, start + 1, …"""
        keys = Side(self.keys, self.key_flush, self.first_keys, self.first_flush)
        values = Side(self.values, self.value_flush, self.first_values, self.first_flush)
        segment = CodedSegment(k.shape[0], k.shape[1], keys, values, start)
        segment.load(k, v, positions)
        return segment

    def row(self, b: int, h: int) -> PairCodec:
        """The codec of one row alone, where rows hold different numbers of entries."""
        first_keys = None if self.first_keys is None else self.first_keys.row(b, h)
        first_values = None if self.first_values is None else self.first_values.row(b, h)
        schemes = self.keys.row(b, h), self.values.row(b, h)
        return PairCodec(*schemes, self.key_flush, self.value_flush, first_keys, first_values, self.first_flush)


class CodedSegment(UniformSegment):
    """Entries of equal number per row, held as codes plus a full-precision residual on each side."""

    def __init__(self, batch: int, heads: int, keys: Side, values: Side, start: int = 0) -> None:
        super().__init__(batch, heads, start)
        self.key_side, self.value_side = keys, values
        self._paths: set[str] = set()

    @property
    def paths(self) -> set[str]:
        return self._paths

    @property
    def length(self) -> int:
        return self.key_side.length

    @property
    def device(self) -> torch.device:
        return self.key_side.residual.view().device

    def load(self, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        """Take over k, v [B, H, n, D] and code all that lies before the residuals (the state after a prompt)."""
        if positions is not None:
            self.at = Growable.of(positions)
        at = positions
        if at is None and (self.key_side.positional or self.value_side.positional):
            at = torch.arange(self.start, self.start + k.shape[2], dtype=torch.int32, device=k.device)[None, None]
        self.key_side.load(k, at if self.key_side.positional else None)
        self.value_side.load(v, at if self.value_side.positional else None)

    def append(self, k: Tensor, v: Tensor, start: int, at: Tensor | None = None) -> None:
        self._note_positions(start, k.shape[2], at)
        self.key_side.append(k)
        self.value_side.append(v)

    def join(self, k: Tensor, v: Tensor, at: Tensor) -> None:
        """Add entries k, v [B, H, T, D] that stand at ``at`` int32 [B, H, T], and code what is due."""
        assert self.at is not None
        self.at.append(at)
        self.key_side.append(k)
        self.value_side.append(v)
        self.settle()

    def settle(self) -> None:
        """Code what is due to leave the residuals."""
        for side in (self.key_side, self.value_side):
            at = None
            if side.positional and side.leaving():
                at = self.positions()[:, :, side.coded : side.coded + side.leaving()]
            side.settle(at)

    def keys(self, start: int = 0, stop: int | None = None, row: tuple[int, int] | None = None) -> Tensor:
        """Decoded keys [B, H, stop - start, D]; [1, 1, stop - start, D] of one row (b, h)."""
        return self._read(self.key_side, start, stop, row)

    def values(self, start: int = 0, stop: int | None = None, row: tuple[int, int] | None = None) -> Tensor:
        """Decoded values [B, H, stop - start, D]; [1, 1, stop - start, D] of one row (b, h)."""
        return self._read(self.value_side, start, stop, row)

    def _read(self, side: Side, start: int, stop: int | None, row: tuple[int, int] | None) -> Tensor:
        at = self.positions() if side.positional else None
        return side.read(start, self.length if stop is None else stop, at, row)

    def attend(self, query: Query, need_lse: bool = True) -> Partial:
        if self.key_side.coded == self.value_side.coded == 0 and self._banded(query):
            return self._attend_run(self.keys(), self.values(), query, need_lse)
        masked = query.window is not None or query.padding is not None
        parts: list[Partial] = []
        done = 0
        if query.q.shape[2] == 1 and not masked:  # more queries are worth decoding for
            parts, done = attend_held(query, self.key_side, self.value_side)
        if query.q.shape[2] == 1:
            both = min(self.key_side.coded, self.value_side.coded)
            self._paths = {"fused"} if done and done == both else {"fused", "dequantize"} if done else {"dequantize"}
        # The queries' own entries were appended last and must all be in the final block.
        last = self.length - (query.q.shape[2] if query.own else 0)
        edges = [*range(done, max(last, done + 1), BLOCK), self.length] if done < self.length else []
        positions = self.positions() if masked else None
        for a, b in zip(edges, edges[1:], strict=False):
            mask = None if positions is None else entry_mask(query, positions[:, :, a:b])
            own = query.own and b == self.length
            k, v = self.keys(a, b), self.values(a, b)
            parts.append(attend(query.q, k, v, query.scale, causal=own, mask=mask, softcap=query.softcap))  # type: ignore[arg-type]
        return merge_partials(parts)

    def entries(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        of = divmod(row, self.heads)
        return self.keys(row=of)[0, 0], self.values(row=of)[0, 0], self.positions_of(row)

    def drop_before(self, position: int) -> None:
        # What both sides can part with: whole groups, whole blocks; an entry leaves with its key and its value.
        cut, before = self._passed(position), -1
        while cut != before:
            before, cut = cut, self.value_side.droppable(self.key_side.droppable(cut))
        if cut:
            self._forget(cut)
            self.key_side.drop(cut)
            self.value_side.drop(cut)

    @property
    def takeable(self) -> bool:
        """Whether every entry is coded, on its own, at a position that is held."""
        return self.at is not None and self.key_side.takeable and self.value_side.takeable

    def take(self, index: Tensor) -> CodedSegment:
        """The entries ``index`` [B, H, m] alone: a copy. The segment must be :attr:`takeable`."""
        rest = CodedSegment(self.batch, self.heads, self.key_side.take(index), self.value_side.take(index))
        rest.at = Growable.of(self.positions().gather(2, index))
        return rest

    def shared(self) -> list[tuple[str, Tensor]]:
        """(kind, tensor) that the schemes hold; other segments may hold the same."""
        return distinct([*self.key_side.shared(), *self.value_side.shared()])

    def own_bytes(self) -> dict[str, int]:
        """Bytes by kind but for what schemes hold, which other segments may share."""
        held = self.key_side.nbytes()
        for kind, size in self.value_side.nbytes().items():
            held[kind] = held.get(kind, 0) + size
        if self.at is not None:
            held["positions"] = self.at.nbytes()
        return held

    def nbytes(self) -> dict[str, int]:
        return with_shared(self.own_bytes(), self.shared())

    def reserved_bytes(self) -> int:
        positions = 0 if self.at is None else self.at.reserved_bytes()
        return self.key_side.reserved_bytes() + self.value_side.reserved_bytes() + positions

    def clone(self) -> CodedSegment:
        twin = CodedSegment(self.batch, self.heads, self.key_side.clone(), self.value_side.clone(), self.start)
        twin.at = None if self.at is None else self.at.clone()
        return twin

    def packed(self, row: int) -> int:
        return min(self.key_side.coded, self.value_side.coded)


def distinct(tensors: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Each tensor once."""
    return list({id(tensor): (kind, tensor) for kind, tensor in tensors}.values())


def with_shared(held: dict[str, int], tensors: list[tuple[str, Tensor]]) -> dict[str, int]:
    """Bytes by kind, with those of the tensors."""
    for kind, tensor in tensors:
        held[kind] = held.get(kind, 0) + tensor.numel() * tensor.element_size()
    return held
