"""H2O (arXiv 2306.14048): heavy hitters by accumulated attention, plus the most recent tokens, at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import param
from torch import Tensor

from workbench.strategies.eviction.base import StepwiseEviction, protect_last

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView


class H2O(StepwiseEviction):
    """Score = attention received so far, summed over all queries and the group; each step adds its own row."""

    key = "h2o"
    title = "H2O"
    paper = "arXiv 2306.14048"
    summary = "Keeps the tokens that have received most attention so far, and the most recent ones, at every step."

    recent = param.Number(0.5, bounds=(0.0, 1.0), doc="share of the budget for the most recent tokens")

    @property
    def needs_prompt(self) -> bool:
        return True

    def on_chunk(self, view: LayerView) -> None:
        received = view.chunk_attention_sums().unflatten(1, (view.kv_heads, -1)).sum(2)  # [B, H, n]
        before = view.state.get("received")
        if before is not None:
            held = received.shape[-1] - view.chunk.shape[2]  # entries from before this chunk
            received[..., :held] += newest(before, held)
        view.state["received"] = received

    def after_prefill(self, view: LayerView) -> None:
        super().after_prefill(view)
        if not self.keeps_acting:
            del view.state["received"]  # needed no more

    def after_step(self, view: LayerView) -> None:
        if self.keeps_acting:
            self.on_chunk(view)
            super().after_step(view)

    def score(self, view: LayerView) -> Tensor:
        recent = min(int(self.recent * self.allocator_part.capacity(self, view)), view.length)
        return protect_last(newest(view.state["received"], view.length), recent)

    def keep(self, view: LayerView, index: Tensor | Sequence[Tensor]) -> None:
        # Heads of different lengths are cut once only; an allocator across layers may cut after the sums are done with.
        if isinstance(index, Tensor) and "received" in view.state:
            view.state["received"] = newest(view.state["received"], view.length).gather(-1, index)
        view.keep(index)


def newest(received: Tensor, count: int) -> Tensor:
    """The last ``count`` of [B, H, n]: a sliding window may have dropped the oldest entries meanwhile."""
    return received[..., received.shape[-1] - count :]
