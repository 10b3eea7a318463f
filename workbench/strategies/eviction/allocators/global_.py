"""Layer-DefensiveKV (arXiv 2510.13334): one budget for the whole model, shared by the scores of all layers and heads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.cache.layer import LayerView
from workbench.strategies.base import tokens_kept_together
from workbench.strategies.eviction.base import Allocator, Eviction, flat_rows


class GlobalAllocator(Allocator):
    """The best scores of all layers and heads stay, decided after the last layer; until then every layer is whole, and
    its scores are held beside it: nothing is saved at the peak."""

    key = "global"
    ragged = True
    spans_layers = True

    def after_prefill(self, method: Eviction, view: LayerView) -> None:
        if not self.keeps_all(method, view):
            view.state["scores"] = method.need(view)  # [B, H, n]
            view.note_scores(view.state["scores"])

    def after_prompt(self, method: Eviction, views: Sequence[LayerView]) -> None:
        if self.keeps_all(method, views[0]):
            return
        rows = best_rows([view.state.pop("scores") for view in views], self.total(method, views))
        for view, best in zip(views, rows, strict=True):
            method.keep(view, method.choose(view, best, safe=0))

    def total(self, method: Eviction, views: Sequence[LayerView]) -> int:
        """Entries of all layers and heads together; a sliding layer that holds less than its part adds what it holds."""
        heads, layers = views[0].kv_heads, len(views)
        even = tokens_kept_together(method.budget, views[0].prompt_length, layers * heads) / layers
        return math.floor(sum(min(even, heads * view.length) for view in views) + 1e-6)


def best_rows(scores: Sequence[Tensor], total: int) -> list[list[Tensor]]:
    """The best ``total`` entries of all layers together, for each row of a batch on its own.

    Args:
        scores: per layer [B, H, n]; n may differ.

    Returns:
        Per layer, one ascending int64 vector per (batch, head).
    """
    batch, heads, _ = scores[0].shape
    longest = max(layer.shape[-1] for layer in scores)
    # The newest entries stand in one column, so that ties between layers also go to the later entry.
    aligned = [F.pad(layer, (longest - layer.shape[-1], 0), value=-math.inf).to(scores[0].device) for layer in scores]
    flat = flat_rows(torch.cat(aligned, 1), total)  # of [B, L * H, longest]
    found = []
    for number, layer in enumerate(scores):
        rows = [flat[(b * len(scores) + number) * heads + h] for b in range(batch) for h in range(heads)]
        found.append([row.to(layer.device) - (longest - layer.shape[-1]) for row in rows])
    return found
