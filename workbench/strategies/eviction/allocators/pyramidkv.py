"""PyramidKV (arXiv 2406.02069): early layers spread their attention and keep more, late layers keep less."""

from __future__ import annotations

from typing import TYPE_CHECKING

import param

from workbench.strategies.eviction.base import Allocator, Eviction

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView


class PyramidAllocator(Allocator):
    """Layer budgets fall linearly with depth; their sum is that of an even budget."""

    key = "pyramidkv"

    beta = param.Integer(20, bounds=(1, 200), doc="how steep: the last layer's share beyond the window is 1 / beta")

    def count(self, method: Eviction, view: LayerView) -> int:
        return min(self.budgets(method, view)[view.layer], view.length)

    def capacity(self, method: Eviction, view: LayerView) -> int:
        return self.budgets(method, view)[view.layer]

    def budgets(self, method: Eviction, view: LayerView) -> list[int]:
        budget, tokens = method.budget, view.prompt_length
        even = budget if isinstance(budget, int) else max(1.0, budget * tokens)
        return pyramid(tokens, even, max(method.score_window, 1), view.num_layers, self.beta)


def pyramid(tokens: int, even: float, window: int, layers: int, beta: int) -> list[int]:
    """Entries per layer, window included (as kvpress 0.5.4 counts); an even budget where the slope does not fit.

    Args:
        tokens: of the prompt.
        even: entries per layer if all had the same.
        window: newest entries that always stay.
    """
    low = even / beta
    high = 2 * even - low
    if high >= tokens - window:
        high = tokens - window
        low = 2 * even - high
    if not tokens >= high >= low >= window or layers == 1:
        return [round(even)] * layers
    step = (high - low) / (layers - 1)
    return [round(high - layer * step) for layer in range(layers)]
