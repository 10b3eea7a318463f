"""Observed attention: what a token received on average from the queries that could see it (kvpress' score)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.strategies.eviction.accumulated import AccumulatedAttention

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView


class ObservedAttention(AccumulatedAttention):
    """Score = attention received from the whole prompt, mean over the group, divided by the number of queries that
    can see the token: T - j for the token at position j, less where tokens stayed behind in an earlier layer (FastKV).
    Unlike H2O's sum, it does not favour early tokens."""

    key = "observed_attention"
    title = "Observed attention"
    paper = "arXiv 2306.14048"
    summary = "Keeps the tokens that received most attention per query that could see them."

    def on_chunk(self, view: LayerView) -> None:
        super().on_chunk(view)
        asked = view.asked().to(torch.int32)
        view.state["asked"] = torch.cat([view.state["asked"], asked]) if "asked" in view.state else asked

    def score(self, view: LayerView) -> Tensor:
        group, asked = view.chunk.shape[1] // view.kv_heads, view.state["asked"]
        # [B, H, n]; what a sliding window still holds, no query has lost yet
        seen_by = len(asked) - torch.searchsorted(asked, view.positions().contiguous())
        return self.received(view) / group / seen_by

    def forget(self, view: LayerView) -> None:
        super().forget(view)
        view.state.pop("asked", None)
