"""AdaKV (arXiv 2407.11550): one budget for a layer, shared among its heads by what each of them needs."""

from __future__ import annotations

from typing import Any

import param
import torch
from torch import Tensor

from workbench.cache.layer import LayerView
from workbench.errors import RecipeError
from workbench.strategies.base import written_out
from workbench.strategies.eviction.base import PROTECTED, Eviction, select_top


def scorer_class(name: str) -> type[Eviction]:
    """The eviction method registered as ``name``, to be used for its score alone."""
    from workbench.strategies.registry import registry, strategy_class

    if not isinstance(name, str):
        raise RecipeError(f'adakv: scorer must be the name of a method in quotes, like "snapkv", got {name!r}.')
    cls = strategy_class(name)
    if not issubclass(cls, Eviction) or cls is AdaKV or cls.needs_prompt:
        usable = [k for k, c in registry().items() if issubclass(c, Eviction) and c is not AdaKV and not c.needs_prompt]
        raise RecipeError(f"adakv cannot score with {name}; use one of {', '.join(usable)}.")
    return cls


class AdaKV(Eviction):
    """Any scorer; the layer's budget goes to the best scores of all heads, each head keeping a safeguard.

    Parameters of the scorer are given alongside: ``adakv(scorer="snapkv", budget=0.25, window=16)``.
    """

    key = "adakv"
    title = "AdaKV"
    paper = "arXiv 2407.11550"
    summary = "Shares a layer's budget among its heads by their scores: every head keeps its own number of tokens."
    ragged = True

    scorer = param.String("snapkv", doc="the eviction method whose score is used")
    alpha = param.Number(0.2, bounds=(0.0, 1.0), doc="share of an even budget that every head is sure to keep")

    def __init__(self, **values: Any) -> None:
        own = set(self.parameter_names())
        inner = scorer_class(values.get("scorer", type(self).scorer))
        passed = {k: v for k, v in values.items() if k not in own}
        for name in passed:
            if name not in inner.parameter_names():
                known = sorted({*own, *inner.parameter_names()} - {"recompress_every"})
                raise RecipeError(f"adakv has no parameter '{name}'; with this scorer it has {', '.join(known)}.")
        super().__init__(**{k: v for k, v in values.items() if k in own})
        if "recompress_every" in inner.parameter_names():
            passed["recompress_every"] = 0  # only the score is used
        object.__setattr__(self, "_inner", inner(budget=self.budget, **passed))

    @property
    def inner(self) -> Eviction:
        """The scorer with its parameters."""
        return self._inner  # type: ignore[attr-defined]

    @property
    def resolved(self) -> str:
        shared = {k: v for k, v in self.inner.values().items() if k not in ("budget", "recompress_every")}
        return f"{self.key}({written_out({**self.values(), **shared})})"

    @property
    def query_window(self) -> int:
        return self.inner.query_window

    def score(self, view: LayerView) -> Tensor:
        return self.inner.score(view)

    def after_prefill(self, view: LayerView) -> None:
        count = self.count(view)
        if count < view.length:
            view.keep(self.select(self.score(view), count))

    def select(self, scores: Tensor, count: int) -> list[Tensor]:
        """Entries kept by each row: the best ``count * H`` of a layer's flattened scores, ``int(count * alpha)`` safe.

        Args:
            scores: [B, H, n].

        Returns:
            One ascending int64 vector per (batch, head).
        """
        batch, heads, n = scores.shape
        safe = int(count * self.alpha)
        scores = scores.scatter(-1, select_top(scores, safe), PROTECTED)
        # Flatten with the position outermost, so that ties between heads also go to the later entry.
        best = select_top(scores.transpose(1, 2).flatten(1), count * heads)  # [B, count * H] of n * H
        kept = torch.zeros(batch, n * heads, dtype=torch.bool, device=scores.device).scatter(1, best, True)
        rows = kept.view(batch, n, heads).transpose(1, 2).flatten(0, 1)  # [B * H, n]
        return [row.nonzero().squeeze(-1) for row in rows]
