"""One side of a coded segment, keys or values: coded runs, and behind them the newest entries in full precision.

Axes: B batch, H KV heads, n entries, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.cache.growable import MIN_SPARE, Growable, Residual
from workbench.cache.schemes.base import Parts, Scheme
from workbench.cache.segments import take
from workbench_kernels import Packed, Sparse


@dataclass(frozen=True)
class Flush:
    """When entries leave the residual: ``every`` so many at a time, the oldest first, while the newest ``keep`` stay."""

    every: int = 1
    keep: int = 0

    def leaving(self, held: int) -> int:
        return max(held - self.keep, 0) // self.every * self.every


AT_ONCE = Flush()


class Run:
    """Consecutive entries coded by one scheme."""

    def __init__(self, scheme: Scheme, spare: int = MIN_SPARE) -> None:
        self.scheme, self.spare = scheme, spare
        self.growing: dict[str, Growable] = {}
        self.whole: Parts = {}
        self.length = 0

    @property
    def open(self) -> bool:
        """Whether later entries can join."""
        return not self.scheme.whole

    def append(self, x: Tensor, at: Tensor | None) -> None:
        for name, part in self.scheme.encode(x, at).items():
            if name in self.scheme.whole:
                self.whole[name] = part
            elif self.open:
                self.growing.setdefault(name, Growable(spare=self.spare)).append(part)
            else:
                self.growing[name] = Growable.of(part.contiguous())
        self.length += x.shape[2]

    def read(self, start: int, stop: int, dtype: torch.dtype, at: Tensor | None, row: tuple[int, int] | None) -> Tensor:
        """Decoded entries [B, H, stop - start, D]; of one row [1, 1, stop - start, D]."""
        unit, scheme = self.scheme.unit, self.scheme
        first, last = start // unit, -(-stop // unit)
        parts = {name: part.read(first, last) for name, part in self.growing.items()} | self.whole
        if row is not None and scheme.separable:
            b, h = row
            scheme = scheme.row(b, h)
            parts = {name: part[b : b + 1, h : h + 1] for name, part in parts.items()}
            at = at if at is None or at.shape[1] == 1 else at[b : b + 1, h : h + 1]
        dense = scheme.decode(parts, (first * unit, last * unit), dtype, at)
        if row is not None and not scheme.separable:
            b, h = row
            dense = dense[b : b + 1, h : h + 1]
        return dense[:, :, start - first * unit : stop - first * unit]

    def held(self) -> Packed | Sparse | None:
        """All entries as the kernels read them, without a copy; None where no kernel does."""
        return self.scheme.held({name: part.read(0, part.length) for name, part in self.growing.items()} | self.whole)

    def after(self, count: int) -> Run:
        """The entries after the ``count`` oldest, a multiple of the scheme's unit: a copy."""
        rest = Run(self.scheme, self.spare)
        rest.growing = {name: part.after(count // self.scheme.unit) for name, part in self.growing.items()}
        rest.length = self.length - count
        return rest

    def take(self, index: Tensor) -> Run:
        """The entries ``index`` [B, H, m] alone: a copy. Needs a scheme that codes every entry on its own."""
        rest = Run(self.scheme, self.spare)
        for name, part in self.growing.items():
            held = part.read(0, part.length)
            rest.growing[name] = Growable.of(take(held.flatten(3), index).view(*index.shape, *held.shape[3:]))
        rest.length = index.shape[-1]
        return rest

    def clone(self) -> Run:
        twin = Run(self.scheme, self.spare)
        twin.growing = {name: part.clone() for name, part in self.growing.items()}
        twin.whole, twin.length = self.whole, self.length
        return twin


class Side:
    """Keys or values of a segment.

    Args:
        scheme: of the entries that leave the residual while generating.
        flush: when they do.
        first: of what is coded at once after the prompt, where that differs.
        first_flush: how much that is, where that differs.
    """

    def __init__(
        self, scheme: Scheme, flush: Flush, first: Scheme | None = None, first_flush: Flush | None = None
    ) -> None:
        self.scheme, self.flush, self.first, self.first_flush = scheme, flush, first, first_flush
        self.runs: list[Run] = []
        self.residual = Residual(flush.keep + flush.every)

    @property
    def coded(self) -> int:
        """Entries held as codes; they come before the others."""
        return sum(run.length for run in self.runs)

    @property
    def length(self) -> int:
        return self.coded + self.residual.length

    @property
    def positional(self) -> bool:
        return self.scheme.positional

    def load(self, x: Tensor, at: Tensor | None) -> None:
        """Take over x [B, H, n, D] and code what lies before the residual (the state after a prompt)."""
        cut = (self.first_flush or self.flush).leaving(x.shape[2])
        if cut:
            self._code(x[:, :, :cut], None if at is None else at[:, :, :cut], self.first or self.scheme)
        self.residual.append(x[:, :, cut:])

    def append(self, x: Tensor) -> None:
        self.residual.append(x)

    def leaving(self) -> int:
        """How many entries are due to be coded."""
        return self.flush.leaving(self.residual.length)

    def settle(self, at: Tensor | None) -> None:
        """Code what is due, which stands at positions ``at`` where the scheme asks for them."""
        count = self.leaving()
        if not count:
            return
        x = self.residual.pop_front(count)
        step = count if not self.scheme.whole else self.flush.every
        for start in range(0, count, step):
            part = slice(start, start + step)
            self._code(x[:, :, part], None if at is None else at[:, :, part], self.scheme)

    def _code(self, x: Tensor, at: Tensor | None, scheme: Scheme) -> None:
        if not self.runs or not self.runs[-1].open or self.runs[-1].scheme is not scheme:
            spare = MIN_SPARE if scheme.unit == 1 else max(1, self.flush.every // scheme.unit)
            self.runs.append(Run(scheme, spare))
        self.runs[-1].append(x, at)

    def read(self, start: int, stop: int, at: Tensor | None, row: tuple[int, int] | None = None) -> Tensor:
        """Decoded entries [B, H, stop - start, D], or [1, 1, …] of one row; ``at`` covers whole units around them.

        Args:
            at: positions of all entries [B or 1, H or 1, n], where the scheme asks for them.
        """
        newest = self.residual.view()
        parts, offset = [], 0
        for run in self.runs:
            a, b = max(start - offset, 0), min(stop - offset, run.length)
            if a < b:
                here = None if at is None else at[:, :, offset + a : offset + b]
                parts.append(run.read(a, b, newest.dtype, here, row))
            offset += run.length
        if stop > offset or not parts:
            if row is not None:
                newest = newest[row[0] : row[0] + 1, row[1] : row[1] + 1]
            parts.append(newest[:, :, max(start - offset, 0) : max(stop - offset, 0)])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def droppable(self, count: int) -> int:
        """The largest number of oldest entries, up to ``count``, that can leave: whole units, or whole closed runs."""
        free = 0
        for run in self.runs:
            if run.length <= count - free:
                free += run.length
                continue
            return free + ((count - free) // run.scheme.unit * run.scheme.unit if run.open else 0)
        return free

    def drop(self, count: int) -> None:
        """The ``count`` oldest entries leave; it must be :meth:`droppable`."""
        while self.runs and self.runs[0].length <= count:
            count -= self.runs.pop(0).length
        if count:
            self.runs[0] = self.runs[0].after(count)

    @property
    def takeable(self) -> bool:
        """Whether every entry is coded, each on its own and in one run."""
        return not self.residual.length and len(self.runs) == 1 and self.runs[0].open and self.scheme.unit == 1

    def take(self, index: Tensor) -> Side:
        """The coded entries ``index`` [B, H, m] alone, nothing in the residual: a copy."""
        rest = Side(self.scheme, self.flush, self.first, self.first_flush)
        rest.runs = [run.take(index) for run in self.runs]
        rest.residual.append(self.residual.view()[:, :, :0])
        return rest

    def nbytes(self) -> dict[str, int]:
        held = {"window": self.residual.nbytes()}
        for run in self.runs:
            kinds = run.scheme.kinds
            for name, part in run.growing.items():
                held[kinds[name]] = held.get(kinds[name], 0) + part.nbytes()
            for name, tensor in run.whole.items():
                held[kinds[name]] = held.get(kinds[name], 0) + tensor.numel() * tensor.element_size()
        return held

    def shared(self) -> list[tuple[str, Tensor]]:
        """(kind, tensor) that the schemes themselves hold, not in :meth:`nbytes`."""
        schemes = {id(scheme): scheme for scheme in (self.scheme, *(run.scheme for run in self.runs))}
        return [pair for scheme in schemes.values() for pair in scheme.shared()]

    def reserved_bytes(self) -> int:
        return self.residual.reserved_bytes() + sum(
            part.reserved_bytes() for run in self.runs for part in run.growing.values()
        )

    def clone(self) -> Side:
        twin = Side(self.scheme, self.flush, self.first, self.first_flush)
        twin.runs, twin.residual = [run.clone() for run in self.runs], self.residual.clone()
        return twin
