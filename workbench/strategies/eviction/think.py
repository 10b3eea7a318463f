"""ThinK (arXiv 2407.21018): channels of the keys that recent queries hardly use are removed from storage."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import param
from torch import Tensor

from workbench.strategies.base import Strategy
from workbench.strategies.eviction.base import select_top

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView


class ThinK(Strategy):
    """After the prompt, every head loses the `ratio` of its key channels that score lowest, in all but the `recent` newest
    tokens. Score of a channel = mean square of the last `window` queries (over them and the group) times mean square of
    the keys held. Values, and the keys of what is generated later, stay whole.

    It drops no token, so it has no budget; put a method that does before it: snapkv(budget=0.25) | think(ratio=0.4).

    Axes: B batch, Hq query heads, H KV heads, D head_dim.
    """

    key = "think"
    family: ClassVar[str] = "eviction"
    title = "ThinK"
    paper = "arXiv 2407.21018"
    summary = "Removes the key channels that recent queries hardly use; all tokens stay."
    closing = True

    ratio = param.Number(
        0.4, bounds=(0.0, 1.0), doc="share of the key channels removed; one at least stays", precedence=-1
    )
    window = param.Integer(32, bounds=(1, 512), doc="queries at the end of the prompt that choose the channels")
    recent = param.Integer(32, bounds=(0, 4096), doc="newest tokens of the prompt whose keys stay whole")

    @property
    def query_window(self) -> int:
        return self.window

    def after_prefill(self, view: LayerView) -> None:
        dim = view.chunk.shape[-1]
        removed = min(int(dim * self.ratio + 1e-9), dim - 1)
        if removed and view.length > self.recent:
            scores = channel_scores(view.queries(self.window), view.keys())
            view.narrow_keys(select_top(scores, dim - removed), self.recent)


def channel_scores(q: Tensor, keys: Tensor) -> Tensor:
    """[B, H, D] float32: mean square of queries [B, Hq, w, D] over w and the group, times that of keys [B, H, n, D]."""
    asked = q.float().square().mean(2).unflatten(1, (keys.shape[1], -1)).mean(2)
    return asked * keys.float().square().mean(2)
