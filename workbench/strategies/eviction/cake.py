"""CAKE (arXiv 2503.12491): entries that are attended to much, or at times, in layers that need them most."""

from __future__ import annotations

import param
import torch.nn.functional as F
from torch import Tensor

from workbench.cache.layer import LayerView
from workbench.strategies.eviction.base import PROTECTED, StepwiseEviction, pool


class CAKE(StepwiseEviction):
    """Score = mean + `gamma` * variance of the attention of the last `window` queries, average-pooled over neighbours,
    mean over the group; the window itself stays. While generating, the newest query's attention alone."""

    key = "cake"
    title = "CAKE"
    paper = "arXiv 2503.12491"
    summary = "Keeps more in layers whose attention is wide and changeable, and tokens that matter at times."
    fixed_allocator = "cake"

    window = param.Integer(32, bounds=(2, 512), doc="queries at the end of the prompt that vote, and stay")
    kernel = param.Integer(5, bounds=(1, 63), doc="width of the average over neighbouring tokens (odd)")
    gamma = param.Number(200.0, bounds=(0.0, 1000.0), doc="weight of the variance over queries; 0 is the mean alone")

    @property
    def score_window(self) -> int:
        return self.window

    def score(self, view: LayerView) -> Tensor:
        window = min(self.window, view.length)
        attention = view.window_attention(self.window)[..., : view.length - window]  # [B, H, G, W, P]
        votes = attention.mean(3)
        if view.in_prompt and attention.shape[-1]:
            votes = votes + self.gamma * attention.var(3)
        return F.pad(pool(votes, self.kernel).mean(2), (0, window), value=PROTECTED)
