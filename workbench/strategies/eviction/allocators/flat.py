"""The layer's budget goes to its best scores, whichever heads they are in: AdaKV without its safeguard."""

from __future__ import annotations

from workbench.cache.layer import LayerView
from workbench.strategies.base import tokens_kept_together
from workbench.strategies.eviction.base import Allocator, Eviction, flat_rows


class FlatAllocator(Allocator):
    """Every head of a layer keeps its own number, maybe none. A share is rounded down on the layer's sum."""

    key = "flat"
    ragged = True

    def after_prefill(self, method: Eviction, view: LayerView) -> None:
        total = tokens_kept_together(method.budget, view.prompt_length, view.kv_heads)
        if total < view.kv_heads * view.length:
            needs = method.need(view)
            view.note_scores(needs)
            method.keep(view, method.choose(view, flat_rows(needs, total), safe=0))
