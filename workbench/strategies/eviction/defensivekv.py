"""DefensiveKV (arXiv 2510.13334): a token's importance jumps at rare moments, so the worst case counts, not the mean."""

from __future__ import annotations

import math
from typing import Any

import param
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.cache.layer import LayerView
from workbench.strategies.eviction.base import PROTECTED, Eviction, pool, ranked
from workbench.strategies.eviction.critical import value_norms


class DefensiveKV(Eviction):
    """Score = worst case over the last `window` queries and the group, times the entry's share of ‖v W_O‖₁ among the KV
    heads. The entries that carry `mass` of a head's mean attention come first, after the window, which stays."""

    key = "defensivekv"
    title = "DefensiveKV"
    paper = "arXiv 2510.13334"
    summary = "Keeps what mattered most to any of the last queries; every head keeps its own number of tokens."
    fixed_allocator = "flat"

    window = param.Integer(32, bounds=(1, 512), doc="queries at the end of the prompt that vote, and stay")
    kernel = param.Integer(5, bounds=(1, 63), doc="width of the average over neighbouring tokens (odd)")
    aggregation: Any = param.Selector(
        default="max_prior",
        objects=["mean", "max", "max_prior"],
        doc="over queries and group: their mean, the largest, or the largest and no less than the head's average of it",
    )
    mass = param.Number(
        0.9, bounds=(0.0, 1.0), doc="share of a head's mean attention whose tokens come first; 0 is none"
    )
    bias: Any = param.Selector(
        default="before",
        objects=["before", "window", "none"],
        doc="what mass is reduced by: the attention on as many tokens before the window (the authors' code), on the "
        "window itself, or nothing",
    )

    @property
    def score_window(self) -> int:
        return self.window

    def score(self, view: LayerView) -> Tensor:
        attention = view.window_attention(self.window)  # [B, H, G, W, n]
        before = view.length - min(self.window, view.length)
        if before == 0:
            return attention.new_full(attention[:, :, 0, 0].shape, PROTECTED)
        older = attention[..., :before]  # [B, H, G, W, P]
        risk = aggregated(pool_within_rows(older, self.kernel), self.aggregation)  # [B, H, P]
        norms = value_norms(view.values()[:, :, :before], view.output_weight())
        scores = risk * norms / norms.sum(1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
        first = carriers(older.mean((2, 3)), self.mass - self.lost(attention, before), self.most(view, before))
        scores = torch.where(first, scores.amax((1, 2), keepdim=True), scores)
        return F.pad(scores, (0, view.length - before), value=PROTECTED)

    def lost(self, attention: Tensor, before: int) -> Tensor:
        """Attention that `mass` is reduced by: [B, 1, 1], mean over heads and queries."""
        start, stop = {
            "before": (max(0, before - self.window), before),
            "window": (before, attention.shape[-1]),
            "none": (0, 0),
        }[self.bias]
        return attention[..., start:stop].sum(-1).mean((1, 2, 3)).view(-1, 1, 1)

    def most(self, view: LayerView, before: int) -> int:
        """Entries of a head that may come first: the budget's share of those before the window, less a window."""
        share = self.budget if isinstance(self.budget, float) else self.budget / view.prompt_length
        return max(0, math.floor(before * share - self.window + 1e-9))


class LayerDefensiveKV(DefensiveKV):
    """DefensiveKV with one budget for all layers and heads, shared after the last layer."""

    key = "layer_defensivekv"
    title = "Layer-DefensiveKV"
    summary = "DefensiveKV with one budget for the model: layers and heads keep as much as their scores earn."
    scores_alone = False
    fixed_allocator = "global"


def pool_within_rows(attention: Tensor, kernel: int) -> Tensor:
    """Average over neighbouring entries that leaves the sum of every row [..., P] as it was."""
    pooled = pool(attention, kernel)
    return pooled * (attention.sum(-1) / pooled.sum(-1).clamp_min(torch.finfo(pooled.dtype).tiny))[..., None]


def aggregated(attention: Tensor, how: str) -> Tensor:
    """[B, H, G, W, P] -> [B, H, P]: over the group and the queries, by their mean or defensively."""
    if how == "mean":
        return attention.mean((2, 3))
    largest = attention.amax((2, 3))
    return largest if how == "max" else largest.maximum(largest.mean(-1, keepdim=True))


def carriers(attention: Tensor, mass: Tensor, most: int) -> Tensor:
    """Bool [B, H, P]: a head's strongest entries before their sum first reaches ``mass`` of the row's; ``most`` at most.

    Args:
        attention: [B, H, P], mean over queries and group.
        mass: [B, 1, 1], share of a row's sum.
    """
    order = ranked(attention)
    reached = attention.gather(-1, order).cumsum(-1)
    first = reached < mass * attention.sum(-1, keepdim=True)
    first[..., most:] = False
    return torch.zeros_like(first).scatter(-1, order, first)
