"""Input segment: a layer's input instead of its keys and values, which are rebuilt a block at a time (XQuant).

Axes: B batch, H KV heads, n entries, D head_dim, d hidden_size. A row of an input belongs to all heads of a layer, so
these tensors have one head: [B, 1, n, …].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.cache.growable import Growable, Residual
from workbench.cache.schemes.base import Scheme
from workbench.cache.segments import Partial, Query, Segment, UniformSegment, entry_mask
from workbench.cache.sides import Run
from workbench.errors import WorkbenchError
from workbench.models.rebuild import Rebuild
from workbench_kernels import attend, merge_partials

BLOCK = (
    1024  # entries whose keys and values are rebuilt at a time while attending; no dense copy of more than this exists
)
NO_INPUT = (
    "A layer's input did not reach this cache, because its hooks were taken out of the model or the model was copied "
    "since; make a new one with wb.cache(recipe, model)."
)


class Form(ABC):
    """What is held of a layer's input: rows [B, 1, n, w], in one part or two that are coded apart. Constant."""

    def __init__(self, rebuild: Rebuild, schemes: Sequence[Scheme]) -> None:
        self.rebuild, self.schemes = rebuild, tuple(schemes)

    @abstractmethod
    def rows(self, x: Tensor) -> Tensor:
        """What is held of inputs [B, n, d]."""

    @abstractmethod
    def keys_values(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, n, D] of rows at ``positions`` [B or 1, 1, n]."""

    def factors(self) -> list[Tensor]:
        """Matrices made of the model's weights that this takes besides them."""
        return self.rebuild.copies


class WholeInput(Form):
    """The input itself."""

    def rows(self, x: Tensor) -> Tensor:
        return x[:, None]

    def keys_values(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.rebuild.of_input(rows[:, 0], positions)


class LatentPair(Form):
    """The input along the left singular vectors of the keys' projection, and of the values': coded apart."""

    def rows(self, x: Tensor) -> Tensor:
        return self.rebuild.to_latents(x)[:, None]

    def keys_values(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.rebuild.of_latents(rows[:, 0], positions)

    def factors(self) -> list[Tensor]:
        pairs = self.rebuild.key_latents, self.rebuild.value_latents
        return [*super().factors(), *(matrix for pair in pairs for matrix in (pair.down, pair.up))]


class JointLatent(WholeInput):
    """The input itself, but differences to the layer below are coded along the left singular vectors of both projections."""

    def factors(self) -> list[Tensor]:
        return [*super().factors(), self.rebuild.joint]


class RunningSum:
    """The inputs that the layer which read last gave back, in blocks: where the next layer's sum starts from."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int, Tensor]] = {}  # first entry -> layers above the base, rows [B, 1, n, d]

    def of(self, depth: int, start: int, stop: int) -> Tensor | None:
        held, rows = self.blocks.get(start, (-1, None))
        return rows if rows is not None and held == depth and rows.shape[2] == stop - start else None

    def note(self, depth: int, start: int, rows: Tensor) -> None:
        if start % BLOCK == 0:  # what is read when a few entries are coded need not be held
            self.blocks[start] = depth, rows

    def nbytes(self) -> int:
        return sum(rows.numel() * rows.element_size() for _, rows in self.blocks.values())


class InputSegment(UniformSegment):
    """Entries as rows of a layer's input: codes, and behind them the newest rows in full precision.

    Args:
        form: what is held of the input.
        every: rows that leave full precision together.
        running: to be held for layers above that are coded as differences.
    """

    depth = 0  # layers between this one and the one that differences are added to

    def __init__(
        self, batch: int, heads: int, form: Form, every: int, start: int = 0, running: RunningSum | None = None
    ) -> None:
        super().__init__(batch, heads, start)
        self.form, self.every, self.running = form, every, running
        self.runs = [Run(scheme) for scheme in form.schemes]
        self.residual = Residual(every)

    @property
    def coded(self) -> int:
        """Entries held as codes; they come before the others."""
        return self.runs[0].length

    @property
    def paths(self) -> set[str]:
        return {"rebuild"}

    @property
    def length(self) -> int:
        return self.coded + self.residual.length

    @property
    def device(self) -> torch.device:
        return self.residual.view().device

    def load(self, rows: Tensor, positions: Tensor | None) -> None:
        """Take over rows [B, 1, n, w] (the state after a prompt); ``positions`` [B, 1, n] where they are not implied."""
        if positions is not None:
            self.at = Growable.of(positions.contiguous())
        cut = rows.shape[2] // self.every * self.every
        if cut:
            self._code(rows[:, :, :cut])
        self.residual.append(rows[:, :, cut:])

    def append(self, k: Tensor, v: Tensor, start: int, at: Tensor | None = None) -> None:
        raise WorkbenchError(NO_INPUT)

    def append_inputs(self, x: Tensor, start: int) -> None:
        """Inputs [B, T, d] of the tokens at positions start, start + 1, … join."""
        if self.at is not None:  # one position for all heads
            steps = torch.arange(start, start + x.shape[1], dtype=torch.int32, device=self.device)
            self.at.append(steps.expand(self.batch, 1, -1))
        self.residual.append(self.form.rows(x))

    def positions_of(self, row: int) -> Tensor:
        return self.positions()[row // self.heads if self.at is not None else 0, 0]

    def settle(self) -> None:
        count = self.residual.length // self.every * self.every
        if count:
            self._code(self.residual.pop_front(count))

    def _code(self, rows: Tensor) -> None:
        for run, part in zip(self.runs, rows.chunk(len(self.runs), -1), strict=True):
            run.append(part, None)

    def rows(self, start: int, stop: int) -> Tensor:
        """Decoded rows [B, 1, stop - start, w]."""
        newest, cut = self.residual.view(), self.coded
        parts = [self._decoded(start, min(stop, cut), newest.dtype)] if start < cut else []
        if stop > cut or not parts:
            parts.append(newest[:, :, max(start - cut, 0) : max(stop - cut, 0)])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _decoded(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        parts = [run.read(start, stop, dtype, None, None) for run in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def keys_values(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rebuilt keys and values [B, H, stop - start, D]."""
        return self.form.keys_values(self.rows(start, stop), self.positions()[:, :, start:stop])

    def keys(self) -> Tensor:
        return self.keys_values(0, self.length)[0]

    def values(self) -> Tensor:
        return self.keys_values(0, self.length)[1]

    def entries(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        b, h = divmod(row, self.heads)
        k, v = self.keys_values(0, self.length)
        return k[b, h], v[b, h], self.positions_of(row)

    def attend(self, query: Query, need_lse: bool = True) -> Partial:
        # The queries' own entries were appended last and must all be in the final block.
        last = self.length - (query.q.shape[2] if query.own else 0)
        edges = [*range(0, max(last, 1), BLOCK), self.length]
        masked = query.window is not None or query.padding is not None
        positions = self.positions() if masked else None
        parts: list[Partial] = []
        for a, b in zip(edges, edges[1:], strict=False):
            mask = None if positions is None else entry_mask(query, positions[:, :, a:b])
            k, v = self.keys_values(a, b)
            own = query.own and b == self.length
            parts.append(attend(query.q, k, v, query.scale, causal=own, mask=mask, softcap=query.softcap))  # type: ignore[arg-type]
        return merge_partials(parts)

    def drop_before(self, position: int) -> None:
        cut = min(self._passed(position), self.coded) // self.every * self.every
        if cut:
            self._forget(cut)
            self.runs = [run.after(cut) for run in self.runs]

    def factors(self) -> list[Tensor]:
        return self.form.factors()

    def nbytes(self) -> dict[str, int]:
        held = {"window": self.residual.nbytes()}
        for run in self.runs:
            for name, part in run.growing.items():
                kind = run.scheme.kinds[name]
                held[kind] = held.get(kind, 0) + part.nbytes()
        if self.at is not None:
            held["positions"] = self.at.nbytes()
        if self.running is not None and self.depth == 0:  # all layers': counted once
            held["accumulator"] = self.running.nbytes()
        return held

    def reserved_bytes(self) -> int:
        positions = 0 if self.at is None else self.at.reserved_bytes()
        coded = sum(part.reserved_bytes() for run in self.runs for part in run.growing.values())
        return self.residual.reserved_bytes() + coded + positions

    def clone(self) -> InputSegment:
        running = None if self.running is None else RunningSum()
        return self._cloned_into(InputSegment(self.batch, self.heads, self.form, self.every, self.start, running))

    def _cloned_into(self, twin: InputSegment) -> InputSegment:
        twin.runs, twin.residual = [run.clone() for run in self.runs], self.residual.clone()
        twin.at = None if self.at is None else self.at.clone()
        return twin

    def packed(self, row: int) -> int:
        return self.coded


class DeltaSegment(InputSegment):
    """Inputs coded as differences to what the layer below gives back (XQuant-CL).

    The difference is to the reconstruction, not to the true input, so errors do not add up over layers. Both layers hold
    the same entries, and the one below codes them first.

    Args:
        below: the segment of the layer before.
    """

    def __init__(self, batch: int, heads: int, form: Form, every: int, below: InputSegment, start: int = 0) -> None:
        super().__init__(batch, heads, form, every, start)
        self.rest_on(below)

    def load(self, rows: Tensor, positions: Tensor | None) -> None:
        held = self.below.positions()
        if held.shape[2] != rows.shape[2] or (positions is not None and not bool((held == positions).all())):
            raise WorkbenchError(
                "The layers kept different tokens, which cannot be added up; use xquant, or an eviction that keeps the same "
                "tokens in every layer."
            )
        super().load(rows, positions)

    def _code(self, rows: Tensor) -> None:
        for part in rows.split(BLOCK, 2):
            delta = part - self.below.rows(self.coded, self.coded + part.shape[2])
            super()._code(F.linear(delta, self.form.rebuild.joint) if isinstance(self.form, JointLatent) else delta)

    def _decoded(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        delta = super()._decoded(start, stop, dtype)
        if isinstance(self.form, JointLatent):
            delta = delta @ self.form.rebuild.joint
        under = None if self.running is None else self.running.of(self.depth - 1, start, stop)
        rows = (self.below.rows(start, stop) if under is None else under) + delta
        if self.running is not None:
            self.running.note(self.depth, start, rows)
        return rows

    def rest_on(self, below: Segment) -> None:
        assert isinstance(below, InputSegment)
        self.below, self.running, self.depth = below, below.running, below.depth + 1

    def clone(self) -> DeltaSegment:
        twin = DeltaSegment(self.batch, self.heads, self.form, self.every, self.below, self.start)
        self._cloned_into(twin)
        return twin
