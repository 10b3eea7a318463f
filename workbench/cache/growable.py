"""A tensor that grows along one axis: amortised appends, and clones that share what is already there."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_SPARE = 64  # entries of spare capacity a new block gets, so that decoding rarely reallocates


class Growable:
    """Rows appended along ``axis``, held in blocks; only the last block has spare capacity.

    One block is the normal case. A clone keeps the blocks of its parent as they are and writes to a block of its
    own, so a fork costs no copy; :meth:`blocks` therefore may return several views.
    """

    def __init__(self, axis: int = 2, spare: int = MIN_SPARE) -> None:
        self.axis, self.spare = axis, spare
        self.length = 0
        self._frozen: list[Tensor] = []
        self._open: Tensor | None = None  # with spare capacity along axis
        self._used = 0  # rows used in the open block

    @classmethod
    def of(cls, x: Tensor, axis: int = 2) -> Growable:
        """Hold ``x`` itself, without a copy and without spare capacity."""
        self = cls(axis)
        self._open, self._used, self.length = x, x.shape[axis], x.shape[axis]
        return self

    def reserve(self, like: Tensor, rows: int) -> None:
        """Make room for ``rows`` rows in all, when nothing is held yet."""
        if self._open is None:
            self._open = self._empty(like, rows)

    def append(self, x: Tensor) -> None:
        rows = x.shape[self.axis]
        if rows == 0:
            return
        if self._open is None:
            self._open = self._empty(x, rows + self.spare)
        elif self._used + rows > self._open.shape[self.axis]:
            grown = self._empty(x, self._used + rows + max(self.spare, self._used // 16))
            grown.narrow(self.axis, 0, self._used).copy_(self._open.narrow(self.axis, 0, self._used))
            self._open = grown
        self._open.narrow(self.axis, self._used, rows).copy_(x)
        self._used += rows
        self.length += rows

    def blocks(self) -> list[Tensor]:
        """Views of all rows, in order; usually one."""
        if self._open is None or (self._used == 0 and self._frozen):
            return list(self._frozen)
        return [*self._frozen, self._open.narrow(self.axis, 0, self._used)]

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop): a view where they lie in one block, else a copy."""
        blocks, offset = self.blocks(), 0
        parts: list[Tensor] = []
        for block in blocks:
            size = block.shape[self.axis]
            lo, hi = max(start - offset, 0), min(stop - offset, size)
            if lo < hi:
                parts.append(block.narrow(self.axis, lo, hi - lo))
            offset += size
        if not parts:
            return blocks[0].narrow(self.axis, 0, 0)
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.axis)

    def after(self, start: int) -> Growable:
        """A copy of the rows from ``start`` on, so that those before can be freed."""
        rest = Growable(self.axis, self.spare)
        kept = self.read(start, self.length)
        rest.reserve(kept, kept.shape[self.axis] + self.spare)
        rest.append(kept)
        return rest

    def clone(self) -> Growable:
        """Share every row held now; later appends of either side do not reach the other."""
        twin = Growable(self.axis, self.spare)
        twin._frozen, twin.length = self.blocks(), self.length
        return twin

    def nbytes(self) -> int:
        """Bytes of the rows in use; asked at every step, so no views are made."""
        for block in (self._open, *self._frozen):
            if block is not None and block.shape[self.axis]:
                return self.length * (block.numel() // block.shape[self.axis]) * block.element_size()
        return 0

    def reserved_bytes(self) -> int:
        """Bytes allocated but not in use yet."""
        if self._open is None:
            return 0
        spare = self._open.shape[self.axis] - self._used
        return self._open.narrow(self.axis, 0, 1).numel() * self._open.element_size() * spare if spare else 0

    def _empty(self, like: Tensor, rows: int) -> Tensor:
        shape = list(like.shape)
        shape[self.axis] = rows
        return torch.empty(shape, dtype=like.dtype, device=like.device)


class Residual:
    """The newest rows of a cache, in full precision: appended at the end, taken from the front."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._buffer: Tensor | None = None  # [B, H, room, D]
        self._start = self._stop = 0

    @property
    def length(self) -> int:
        return self._stop - self._start

    def append(self, x: Tensor) -> None:
        rows = x.shape[2]
        if self._buffer is None and rows == 0:
            self._buffer = x.new_empty(x.shape)  # tells shape and dtype; room is made when something comes
        elif self._buffer is None or self._stop + rows > self._buffer.shape[2]:
            held = self.view() if self.length else x[:, :, :0]
            room = max(self.capacity, self.length + rows) + MIN_SPARE
            fresh = torch.empty(*x.shape[:2], room, x.shape[3], dtype=x.dtype, device=x.device)
            fresh[:, :, : held.shape[2]] = held
            self._buffer, self._start, self._stop = fresh, 0, held.shape[2]
        assert self._buffer is not None
        self._buffer[:, :, self._stop : self._stop + rows] = x
        self._stop += rows

    def pop_front(self, rows: int) -> Tensor:
        """Take the oldest rows [B, H, rows, D]; the result is valid until the next append."""
        if self._buffer is None:
            raise ValueError("nothing was appended yet")
        taken = self._buffer[:, :, self._start : self._start + rows]
        self._start += rows
        return taken

    def view(self) -> Tensor:
        """[B, H, n, D] without a copy."""
        if self._buffer is None:
            raise ValueError("nothing was appended yet")
        return self._buffer[:, :, self._start : self._stop]

    def clone(self) -> Residual:
        """A copy: a residual is small and changes in place."""
        twin = Residual(self.capacity)
        if self._buffer is not None:
            twin.append(self.view())
        return twin

    def nbytes(self) -> int:
        return 0 if self._buffer is None else self.view().numel() * self._buffer.element_size()

    def reserved_bytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.numel() * self._buffer.element_size() - self.nbytes()
