"""H2O (arXiv 2306.14048): heavy hitters by accumulated attention, plus the most recent tokens, at every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import param
from torch import Tensor

from workbench.strategies.eviction.accumulated import AccumulatedAttention
from workbench.strategies.eviction.base import StepwiseEviction, protect_last

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView


class H2O(AccumulatedAttention, StepwiseEviction):
    """Score = attention received so far, summed over all queries and the group; each step adds its own row."""

    key = "h2o"
    title = "H2O"
    paper = "arXiv 2306.14048"
    summary = "Keeps the tokens that have received most attention so far, and the most recent ones, at every step."

    recent = param.Number(0.5, bounds=(0.0, 1.0), doc="share of the budget for the most recent tokens")

    def after_step(self, view: LayerView) -> None:
        if self.keeps_acting:
            self.on_chunk(view)
            super().after_step(view)

    def score(self, view: LayerView) -> Tensor:
        recent = min(int(self.recent * self.allocator_part.capacity(self, view)), view.length)
        return protect_last(self.received(view), recent)
