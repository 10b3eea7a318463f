"""H2O (arXiv 2306.14048): heavy hitters by accumulated attention, plus the most recent tokens, at every step."""

from __future__ import annotations

import param
from torch import Tensor

from workbench.cache.layer import LayerView
from workbench.strategies.eviction.base import StepwiseEviction, protect_last, tokens_kept


class H2O(StepwiseEviction):
    """Score = attention received so far, summed over all queries and the group; each step adds its own row."""

    key = "h2o"
    title = "H2O"
    paper = "arXiv 2306.14048"
    summary = "Keeps the tokens that have received most attention so far, and the most recent ones, at every step."
    needs_prompt = True

    recent = param.Number(0.5, bounds=(0.0, 1.0), doc="share of the budget for the most recent tokens")

    def on_chunk(self, view: LayerView) -> None:
        received = view.chunk_attention_sums().unflatten(1, (view.kv_heads, -1)).sum(2)  # [B, H, n]
        before = view.state.get("received")
        if before is not None:
            shared = min(before.shape[-1], received.shape[-1])  # a sliding window may have dropped the oldest
            received[..., :shared] += before[..., before.shape[-1] - shared :] if shared < before.shape[-1] else before
        view.state["received"] = received

    def after_step(self, view: LayerView) -> None:
        if self.recompress_every:
            self.on_chunk(view)
            super().after_step(view)

    def score(self, view: LayerView) -> Tensor:
        kept = tokens_kept(self.budget, view.prompt_length)
        return protect_last(view.state["received"], min(int(self.recent * kept), view.length))

    def keep(self, view: LayerView, index: Tensor) -> None:
        view.state["received"] = view.state["received"].gather(-1, index)
        view.keep(index)
