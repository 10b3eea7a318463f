"""SnapKV (arXiv 2404.14469): the last queries of the prompt vote for the tokens they attend to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import param
import torch.nn.functional as F
from torch import Tensor

from workbench.strategies.eviction.base import PROTECTED, Eviction, pool

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView


class SnapKV(Eviction):
    """Score = attention of the last `window` queries, mean over them, average-pooled over neighbours, mean over the
    group; the window itself always stays. The budget includes the window."""

    key = "snapkv"
    title = "SnapKV"
    paper = "arXiv 2404.14469"
    summary = "Keeps what the last queries of the prompt attend to, with their neighbours."

    window = param.Integer(32, bounds=(1, 512), doc="queries at the end of the prompt that vote, and stay")
    kernel = param.Integer(5, bounds=(1, 63), doc="width of the average over neighbouring tokens (odd)")

    @property
    def score_window(self) -> int:
        return self.window

    def score(self, view: LayerView) -> Tensor:
        votes = view.window_attention(self.window).mean((2, 3))  # [B, H, n]
        window = min(self.window, view.length)
        pooled = pool(votes[..., : view.length - window], self.kernel)
        return F.pad(pooled, (0, window), value=PROTECTED)
