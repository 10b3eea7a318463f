"""HeadKV's budgets (arXiv 2410.19258): every head a fixed share, by how well it retrieved in needle tests made beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import param

from workbench.models.artifacts import Kind
from workbench.strategies.base import tokens_kept
from workbench.strategies.eviction.allocators.rounds import settle
from workbench.strategies.eviction.base import Allocator, Eviction, select_top

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView

CALIBRATION = Kind(
    method="headkv",
    what="calibration",
    suffix=".json",
    command="kvw calibrate headkv {model}",
    instead="adakv",
    shapes=lambda g: {"retrieval": (g.num_layers, g.num_heads)},  # how often each query head looks at what is copied
)


class HeadKVAllocator(Allocator):
    """Static head budgets over all layers and heads; their sum is that of an even budget.

    The score's window stays in every head. A head's share of the rest is the mean over its group of query heads; none keeps more
    than the prompt has, and what that leaves over goes to the others.
    """

    key = "headkv"
    ragged = True
    artifact_kind = CALIBRATION

    beta = param.Number(
        1.01, bounds=(1.0, 1000.0), doc="1/beta of the budget is shared by importance; a larger beta is more even"
    )
    artifact = param.String("", doc="calibration file; empty: the one that belongs to the model", precedence=9)

    def after_prefill(self, method: Eviction, view: LayerView) -> None:
        counts = [min(count, view.length) for count in self.head_budgets(method, view)[view.layer]]
        if min(counts) == view.length:
            return
        scores = method.score(view)  # [B, H, n]
        view.note_scores(scores)
        method.keep(view, [select_top(row, count) for batch in scores for row, count in zip(batch, counts)])

    def head_budgets(self, method: Eviction, view: LayerView) -> list[list[int]]:
        """Entries per layer and KV head, window included."""
        even = tokens_kept(method.budget, view.prompt_length)
        window = min(method.score_window, even)
        importance = view.artifact(self).tensors["retrieval"].clamp_min(0.0)  # [L, Hq]
        counts = group_means(capacities(importance.tolist(), even - window, self.beta), view.kv_heads)
        weights = importance.unflatten(1, (view.kv_heads, -1)).mean(2).flatten().tolist()
        flat = [min(window + round(count), view.prompt_length) for row in counts for count in row]
        flat = settle(flat, even * len(flat), window, view.prompt_length, weights)
        return [flat[start : start + view.kv_heads] for start in range(0, len(flat), view.kv_heads)]


def capacities(importance: Sequence[Sequence[float]], base: int, beta: float) -> list[list[int]]:
    """Entries per layer and query head without the window: a floor for all, and a share of the pool by importance.

    ``base`` is what each would get of an even budget. With no importance anywhere, all get that.
    """
    heads = sum(map(len, importance))
    whole = sum(map(sum, importance))
    shared = int(base // beta)  # the code divides so, in floating point
    pool, floor = shared * heads, base - shared
    share = [[p / whole if whole else 1 / heads for p in row] for row in importance]
    return [[round(p * pool + floor) for p in row] for row in share]


def group_means(counts: Sequence[Sequence[int]], kv_heads: int) -> list[list[float]]:
    """[L][Hq] -> [L][H]: the mean over the query heads that share a KV head."""
    group = len(counts[0]) // kv_heads
    return [[sum(row[h * group : (h + 1) * group]) / group for h in range(kv_heads)] for row in counts]
