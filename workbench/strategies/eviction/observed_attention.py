"""Observed attention: what a token received on average from the queries that could see it (kvpress' score)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from workbench.strategies.eviction.accumulated import AccumulatedAttention

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView


class ObservedAttention(AccumulatedAttention):
    """Score = attention received from the whole prompt, mean over the group, divided by the number of queries that
    can see the token: T - j for the token at position j. Unlike H2O's sum, it does not favour early tokens."""

    key = "observed_attention"
    title = "Observed attention"
    paper = "arXiv 2306.14048"
    summary = "Keeps the tokens that received most attention per query that could see them."

    def score(self, view: LayerView) -> Tensor:
        group = view.chunk.shape[1] // view.kv_heads
        seen_by = view.seen - view.positions()  # [B, H, n]; what a sliding window still holds, no query has lost yet
        return self.received(view) / group / seen_by
