"""TOVA (arXiv 2401.06104): the newest query alone decides, at every step, for all heads of a layer together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from workbench.strategies.eviction.base import StepwiseEviction, protect_last

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView


class TOVA(StepwiseEviction):
    """Score = attention of the last query, mean over all query heads of the layer; the last token stays."""

    key = "tova"
    title = "TOVA"
    paper = "arXiv 2401.06104"
    summary = "Drops what the newest token attends to least; all heads of a layer keep the same tokens."

    @property
    def scores_alike(self) -> str:
        return "heads"

    @property
    def score_window(self) -> int:
        return 1

    def score(self, view: LayerView) -> Tensor:
        votes = view.window_attention(1).mean((1, 2, 3))  # [B, n]
        return protect_last(votes[:, None].expand(-1, view.kv_heads, -1), 1)
