"""By what a lane's strategy chose the prompt's entries it kept: scores, ranks, and where the cut fell.

Axes: L layers, H KV heads, T prompt tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.inspection.overlap import counted
from workbench.strategies.eviction.base import ranked


class ScoreLog:
    """A probe (``cache.score_probe``) that keeps the score rows of every layer, by position; no keys, no values.

    A token that was dropped before the last selection keeps the score it was dropped with. Scores of another part of the
    recipe are not comparable and start the layer anew.

    Attributes:
        tokens: of the prompt.
        layers: per layer float32 [H, T], larger means keep, infinite where protected, NaN where nothing was scored; None
            where the strategy never had to choose.
        saliency: per layer float32 [H, T], by which the precision of each token was chosen; None where it was not.
    """

    def __init__(self, layers: int, tokens: int) -> None:
        self.tokens = tokens
        self.layers: list[Tensor | None] = [None] * layers
        self.saliency: list[Tensor | None] = [None] * layers
        self._parts = [-1] * layers

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in (*self.layers, *self.saliency) if rows is not None)

    def on_scores(self, layer: int, part: int, scores: Tensor, positions: Tensor) -> None:
        """Scores and positions [1, H, n] of the entries a layer holds."""
        rows = self.layers[layer]
        if rows is None or self._parts[layer] != part:
            rows = torch.full((scores.shape[1], self.tokens), math.nan)
            self.layers[layer], self._parts[layer] = rows, part
        rows.scatter_(1, positions[0].cpu().long(), scores[0].float().cpu())

    def on_saliency(self, layer: int, saliency: Tensor) -> None:
        """Saliency [1, H, T] by position."""
        self.saliency[layer] = saliency[0, :, : self.tokens].float().cpu()


@dataclass(frozen=True)
class Curve:
    """One head's scores in falling order, ties as the selection breaks them.

    Attributes:
        positions: int64 [m] of the tokens that were scored.
        scores: float32 [m].
        kept: bool [m].
        protected: how many of the first are infinite: they stay whatever the others score.
        unscored: kept tokens that had no score, because they never had to compete.
    """

    positions: Tensor
    scores: Tensor
    kept: Tensor
    protected: int
    unscored: int

    @property
    def cut(self) -> float | None:
        """The lowest score that was kept, of those that had to compete; None if only protected tokens were."""
        competing = self.scores[self.protected :][self.kept[self.protected :]]
        return float(competing[-1]) if len(competing) else None

    @property
    def by_rank(self) -> bool:
        """Whether all that was kept outranks all that was dropped; not so where chunks or several stages chose."""
        return not bool(self.kept.int().diff().gt(0).any())


def curve(scores: Tensor, held: Tensor) -> Curve:
    """The score curve of one head.

    Args:
        scores: float32 [T], a row of :attr:`ScoreLog.layers`.
        held: bool [T], whether the head held the token after the prompt.
    """
    known = (~scores.isnan()).nonzero().squeeze(-1)
    order = known[ranked(scores[known])]
    unscored = int((held & scores.isnan()).sum())
    return Curve(order, scores[order], held[order], int((scores[order] == math.inf).sum()), unscored)


@dataclass(frozen=True)
class Fate:
    """What became of one prompt token in every layer and KV head, and why. All are [L, H].

    Attributes:
        kept: bool.
        score: float32; infinite where protected, NaN where it was not scored.
        rank: int64, 1 is the best of the head; 0 where it was not scored.
        scored: int64, tokens of the head that were scored.
        cut: float32, the lowest score kept of those that had to compete; NaN where there is none.
        held: int64, tokens of the prompt that the head kept.
    """

    position: int
    kept: Tensor
    score: Tensor
    rank: Tensor
    scored: Tensor
    cut: Tensor
    held: Tensor


def fate(log: ScoreLog, held: Tensor, position: int) -> Fate:
    """Score, rank and cut of one prompt token in every layer and head.

    Args:
        held: bool [L, H, T], what the lane held after the prompt (:func:`workbench.inspection.overlap.held_masks`).
        position: of the token, below ``log.tokens``.
    """
    later = torch.arange(log.tokens) > position
    unknown = torch.full(held.shape[1:], math.nan)
    score, rank, cut, scored = [], [], [], []
    for rows, mask in zip(log.layers, held, strict=True):
        known = unknown if rows is None else rows  # [H, T]
        own = known[:, position]
        better = (known > own[:, None]) | ((known == own[:, None]) & later)
        competing = torch.where(mask & (known < math.inf), known, math.inf).amin(1)
        score.append(own)
        rank.append(torch.where(own.isnan(), 0, counted(better) + 1))
        cut.append(torch.where(competing == math.inf, math.nan, competing))
        scored.append(counted(known == known))
    return Fate(
        position,
        kept=held[..., position],
        score=torch.stack(score),
        rank=torch.stack(rank),
        scored=torch.stack(scored),
        cut=torch.stack(cut),
        held=counted(held),
    )


def thinned(count: int, most: int, needed: Sequence[int] = ()) -> Tensor:
    """At most ``most`` of ``count`` places in even steps, the first and last among them, and the ``needed`` ones: int64."""
    even = torch.linspace(0, max(0, count - 1), min(count, most)).round().long()
    return torch.cat([even, torch.tensor([n for n in needed if 0 <= n < count], dtype=torch.long)]).unique()
