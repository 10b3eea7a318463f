"""AdaKV (arXiv 2407.11550): one budget for a layer, shared among its heads by what each of them needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import param
from torch import Tensor

from workbench.strategies.eviction.base import PROTECTED, Allocator, Eviction, flat_rows, select_top

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView


class AdaKVAllocator(Allocator):
    """The layer's budget goes to the best scores of all heads, each head keeping a safeguard."""

    key = "adakv"
    ragged = True

    alpha = param.Number(0.2, bounds=(0.0, 1.0), doc="share of an even budget that every head is sure to keep")

    def after_prefill(self, method: Eviction, view: LayerView) -> None:
        count = self.count(method, view)
        if count < view.length:
            needs = method.need(view)
            view.note_scores(needs)
            rows = self.select(needs, count)
            method.keep(view, method.choose(view, rows, int(count * self.alpha)))

    def select(self, scores: Tensor, count: int) -> list[Tensor]:
        """Entries kept by each row: the best ``count * H`` of a layer's flattened scores, ``int(count * alpha)`` safe.

        Args:
            scores: [B, H, n].
        """
        scores = scores.scatter(-1, select_top(scores, int(count * self.alpha)), PROTECTED)
        return flat_rows(scores, count * scores.shape[1])
