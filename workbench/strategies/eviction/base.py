"""Eviction = a score per entry, and a selector that keeps the best within the budget."""

from __future__ import annotations

import math
from typing import ClassVar

import param
from torch import Tensor

from workbench.cache.layer import LayerView
from workbench.strategies.base import Budget, Strategy, tokens_kept

PROTECTED = math.inf  # the score of an entry that stays as long as the budget allows


def select_top(scores: Tensor, count: int) -> Tensor:
    """Entries with the ``count`` highest scores along the last axis, in ascending order.

    Ties go to the later entry, so that the choice does not depend on device or dtype.

    Args:
        scores: [..., n]; larger means keep.

    Returns:
        int64 [..., count].
    """
    n = scores.shape[-1]
    later_first = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return (n - 1 - later_first).sort(-1).values


class Eviction(Strategy):
    """Base of the methods that keep the best-scored entries, the same number in every head."""

    family: ClassVar[str] = "eviction"

    budget = Budget(
        0.25,
        doc="share of the prompt's tokens kept per KV head (0.25), or their number (64)",
        precedence=-1,
    )

    def score(self, view: LayerView) -> Tensor:
        """[B, H, n] float; larger means keep, ``PROTECTED`` stays first."""
        raise NotImplementedError

    def count(self, view: LayerView) -> int:
        """Entries to keep per KV head in this layer; a sliding layer that holds fewer keeps all it has."""
        return min(tokens_kept(self.budget, view.prompt_length), view.length)

    def after_prefill(self, view: LayerView) -> None:
        count = self.count(view)
        if count < view.length:
            self.keep(view, select_top(self.score(view), count))

    def keep(self, view: LayerView, index: Tensor) -> None:
        view.keep(index)


class StepwiseEviction(Eviction):
    """Eviction that the literature also runs while generating: the number kept stays that of the prompt.

    A budget of 1.0 is everything, so it never evicts.
    """

    recompress_every = param.Integer(
        1, bounds=(0, 4096), doc="generated tokens between evictions; 0 acts once, after the prompt", precedence=9
    )

    def capacity(self, view: LayerView) -> int:
        """Entries per KV head while generating; a count may be more than the prompt had."""
        return self.budget if isinstance(self.budget, int) else tokens_kept(self.budget, view.prompt_length)

    @property
    def keeps_acting(self) -> bool:
        return self.recompress_every > 0 and not (isinstance(self.budget, float) and self.budget == 1.0)

    def after_step(self, view: LayerView) -> None:
        if not self.keeps_acting:
            return
        count = self.capacity(view)
        # With an interval the cache may grow by that many tokens before it is cut back.
        if view.length - count >= self.recompress_every:
            self.keep(view, select_top(self.score(view), count))


def protect_last(scores: Tensor, count: int) -> Tensor:
    """Scores with the newest ``count`` entries protected."""
    scores = scores.clone()
    scores[..., scores.shape[-1] - count :] = PROTECTED
    return scores
