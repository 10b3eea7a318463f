"""A rectangle of one head's attention, computed when somebody looks at it.

Keys are never left out, only pooled. Queries are left out only where all of them would cost more than the budget, and
then the tile says so. Axes: R rows (queries) that were computed, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from workbench.inspection.queries import LAST, stratified
from workbench_kernels.codes import encode_weights

if TYPE_CHECKING:
    from collections.abc import Callable

Reduce = Literal["max", "mean"]
EXACT_TOKENS = 256  # on either axis, up to which a tile that leaves nothing out is of level 4
BLOCK_CELLS = 1 << 22  # weights held at a time: 16 MiB


@dataclass(frozen=True)
class Tile:
    """Attention of queries q0 to q1 to keys k0 to k1 of one head.

    Attributes:
        codes: uint8 [lines, columns]; 0 where no query of the line can see a key of the column, else the logarithm of the
            weight (see :func:`workbench_kernels.codes.decode_weights`).
        keys_per_column, queries_per_line: tokens that a cell stands for; the last column and line may be narrower.
        rows: queries that were computed; ``rows_in_view`` are all there are.
    """

    layer: int
    head: int
    q0: int
    q1: int
    k0: int
    k1: int
    reduce: Reduce
    codes: Tensor
    keys_per_column: int
    queries_per_line: int
    rows: int

    @property
    def rows_in_view(self) -> int:
        return self.q1 - self.q0

    @property
    def sampled(self) -> bool:
        """Whether queries were left out."""
        return self.rows < self.rows_in_view

    @property
    def exact(self) -> bool:
        """Whether every cell is one weight."""
        return not self.sampled and self.keys_per_column == self.queries_per_line == 1

    @property
    def level(self) -> int:
        """4: every cell is one weight, few enough to be clicked; 3: pooled or sampled."""
        return 4 if self.exact and max(self.rows_in_view, self.k1 - self.k0) <= EXACT_TOKENS else 3

    @property
    def badge(self) -> str:
        """What the picture must say about itself."""
        if self.exact:
            return "exact"
        said = [f"{self.reduce} of {self.keys_per_column:,} tokens/column"] if self.keys_per_column > 1 else []
        if self.sampled:
            said.append(f"rows sampled: {self.rows:,} of {self.rows_in_view:,}")
        elif self.queries_per_line > 1:
            said.append(f"{self.queries_per_line:,} rows/line")
        return "; ".join(said)

    def nbytes(self) -> int:
        return self.codes.numel()


@dataclass(frozen=True)
class Plan:
    """Which queries of a viewport are computed, and how many queries a line stands for."""

    at: Tensor  # int64 [R], ascending
    queries_per_line: int


def plan_rows(
    q0: int,
    q1: int,
    height: int,
    tokens: int,
    row_cost: int,
    again_cost: int,
    budget: float,
    held: Callable[[Tensor], Tensor],
    limit: int | None,
    always: Tensor,
) -> Plan:
    """All queries where they fit the budget, else at least one for each line, the same ones every time.

    A sample has ``always`` and the prompt's last queries in it, as far as they are in view and whatever they cost, and
    prefers queries that are held, because the others have to be computed again.

    Args:
        tokens: of the prompt.
        row_cost, again_cost: multiply-adds of a row's weights, and of computing its query again.
        held: which of the given positions are held, bool.
        limit: rows at most, whatever the budget; None for no limit.
    """
    everything = torch.arange(q0, q1)
    known = held(everything)
    total = len(everything) * row_cost + int((~known).sum()) * again_cost
    if total <= budget and (limit is None or len(everything) <= limit):
        return Plan(everything, -(-len(everything) // height))
    wanted = torch.cat([always, torch.arange(min(q1, max(q0, tokens - LAST)), q1)])
    wanted = wanted[(wanted >= q0) & (wanted < q1)].unique()
    room = max(1, min(len(everything) if limit is None else limit, int(budget // row_cost)))
    while True:  # fewer rows, and coarser lines, until what has to be computed again fits too
        plan = _sample(q0, q1, min(height, room), room, everything[known], wanted)
        beyond = plan.at[~torch.isin(plan.at, wanted)]
        cost = len(beyond) * row_cost + int((~known[beyond - q0]).sum()) * again_cost
        if cost <= budget or room == 1:
            return plan
        room //= 2


def _sample(q0: int, q1: int, lines: int, rows: int, held: Tensor, wanted: Tensor) -> Plan:
    """About ``rows`` queries, at least one in each of at most ``lines`` lines, held ones where a line has any."""
    per_line = -(-(q1 - q0) // lines)
    first = torch.arange(q0, q1, per_line)[:, None]  # of every line
    each = max(1, rows // len(first))
    strata = stratified(first + torch.arange(each + 1) * (q1 - first).clamp_max(per_line) // each).flatten()
    if len(held):
        place = torch.searchsorted(held, strata).clamp_max(len(held) - 1)
        before = (place - 1).clamp_min(0)
        closer = (strata - held[before]).abs() <= (held[place] - strata).abs()
        nearest = torch.where(closer, held[before], held[place])
        strata = torch.where((nearest - q0) // per_line == (strata - q0) // per_line, nearest, strata)
    return Plan(torch.cat([strata, wanted]).unique(), per_line)


def pool(
    weights: Callable[[Tensor], Tensor],
    plan: Plan,
    view: tuple[int, int, int, int],
    width: int,
    reduce: Reduce,
    window: int | None,
) -> tuple[Tensor, int]:
    """Pool rows of weights into a tile.

    Args:
        weights: positions int64 [r] -> float32 [r, n] with n at least the last position + 1, over keys 0 to n - 1.
        view: q0, q1, k0, k1.
        width: columns at most.

    Returns:
        Codes uint8 [lines, columns], and the keys a column stands for.
    """
    q0, q1, k0, k1 = view
    per_column = -(-(k1 - k0) // width)
    columns = -(-(k1 - k0) // per_column)
    lines = -(-(q1 - q0) // plan.queries_per_line)
    pooled = torch.zeros(lines, columns)
    borders = (k0 + torch.arange(columns + 1) * per_column).clamp_max(k1)
    pairs = torch.zeros(lines, columns, dtype=torch.int64)
    step = max(1, min(32, BLOCK_CELLS // max(1, int(plan.at[-1]) + 1)))
    for at in plan.at.split(step):
        block = weights(at)[:, k0:k1].cpu()
        block = torch.nn.functional.pad(block, (0, columns * per_column - block.shape[1]))
        cells = block.unflatten(1, (columns, per_column))
        line = (at - q0) // plan.queries_per_line
        first = torch.zeros_like(at) if window is None else (at + 1 - window).clamp_min(0)
        right, left = torch.minimum(at[:, None] + 1, borders[1:]), torch.maximum(first[:, None], borders[:-1])
        pairs.index_add_(0, line, (right - left).clamp_min(0))
        if reduce == "max":
            pooled.scatter_reduce_(0, line[:, None].expand(-1, columns), cells.amax(2), "amax")
        else:
            pooled.index_add_(0, line, cells.sum(2))
    if reduce == "mean":
        pooled /= pairs.clamp_min(1)
    return encode_weights(pooled, pairs > 0), per_column
