"""Eviction = a score per entry, a selector that picks the best, and an allocator that shares the budget.

Axes: B batch, H KV heads, n entries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import param
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.errors import RecipeError
from workbench.strategies.base import Budget, Declared, Strategy, tokens_kept

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView

PROTECTED = math.inf  # the score of an entry that stays as long as the budget allows


def ranked(scores: Tensor) -> Tensor:
    """Entries by falling score along the last axis: int64, shaped as ``scores``.

    Ties go to the later entry, so that the order does not depend on device or dtype.
    """
    return scores.shape[-1] - 1 - scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices


def select_top(scores: Tensor, count: int) -> Tensor:
    """Entries with the ``count`` highest scores along the last axis, in ascending order; of ties the later ones.

    Args:
        scores: [..., n]; larger means keep.

    Returns:
        int64 [..., count].
    """
    return ranked(scores)[..., :count].sort(-1).values


class Selector(Declared):
    """Picks the entries of a layer, the same number in every head."""

    key = "top"

    def pick(self, scores: Tensor, count: int) -> Tensor:
        """At most ``count`` entries by their scores [B, H, n]: int64 [B, H, m], ascending."""
        return select_top(scores, count)


class Allocator(Declared):
    """Shares the budget over layers and heads, and has the entries kept. This one gives every head of every layer the same.

    Class attributes:
        ragged: True when the heads of a layer may keep different numbers.
        spans_layers: True when a layer's entries are settled only after the last layer.
    """

    key = "even"
    ragged: ClassVar[bool] = False
    spans_layers: ClassVar[bool] = False

    @property
    def query_window(self) -> int:
        """Queries at the end of the prompt that the allocator looks at; 0 if none."""
        return 0

    def count(self, method: Eviction, view: LayerView) -> int:
        """Entries each KV head of this layer keeps of the prompt; a sliding layer that holds fewer keeps all."""
        return min(tokens_kept(method.budget, view.prompt_length), view.length)

    def capacity(self, method: Eviction, view: LayerView) -> int:
        """The same while generating; a budget given as a number may be more than the prompt had."""
        return method.budget if isinstance(method.budget, int) else tokens_kept(method.budget, view.prompt_length)

    def keeps_all(self, method: Eviction, view: LayerView) -> bool:
        """Whether the budget covers the whole prompt, so that nothing has to be shared."""
        return tokens_kept(method.budget, view.prompt_length) >= view.prompt_length

    def after_prefill(self, method: Eviction, view: LayerView) -> None:
        """After the prompt's last chunk attended in a layer."""
        count = self.count(method, view)
        if count < view.length:
            scores = shielded(method.score(view), view)
            view.note_scores(scores)
            method.keep(view, method.selector_part.pick(scores, count))

    def after_prompt(self, method: Eviction, views: Sequence[LayerView]) -> None:
        """After the last layer."""


class Eviction(Strategy):
    """Base of the methods that keep the best-scored entries."""

    family: ClassVar[str] = "eviction"
    scores_alone: ClassVar[bool] = True  # whether its score means something under another method's allocator
    fixed_allocator: ClassVar[str | None] = None  # where the method is its allocator, or its selector
    fixed_selector: ClassVar[str | None] = None
    private = frozenset({"budget", "allocator", "selector", "recompress_every"})

    budget = Budget(
        0.25,
        doc="share of the prompt's tokens kept per KV head (0.25), or their number (64)",
        precedence=-1,
    )
    allocator: Any = param.Selector(
        default=None,
        objects=[None, "adakv", "pyramidkv", "flat", "global", "cake", "compresskv", "headkv"],
        doc="who shares the budget over layers and heads; without one every head keeps the same number",
        precedence=7,
    )
    selector: Any = param.Selector(
        default=None,
        objects=[None, "chunks"],
        doc="how entries are picked by their scores: the best ones, or the best chunks of neighbours",
        precedence=8,
    )

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        for role, fixed in (("allocator", self.fixed_allocator), ("selector", self.fixed_selector)):
            if fixed and getattr(self, role) not in (None, fixed):
                raise RecipeError(
                    f"{self.key} is itself the {role} {fixed!r}; leave {role}= out, or use the scorer alone."
                )
        if self.allocator_part.ragged and (self.fixed_selector or self.selector):
            raise RecipeError(
                f"{self.key}: chunks are the same tokens for every head, but the allocator "
                f"{self.allocator_part.key!r} gives heads different numbers; use one of the two."
            )
        if self.allocator_part.ragged and self.keeps_acting:
            raise RecipeError(
                f"{self.key} acts at every generated token, which needs heads of equal length; write "
                f"{self.key}(recompress_every=0, …) to combine it with allocator={self.allocator_part.key!r}."
            )

    @classmethod
    @functools.cache
    def public_names(cls) -> tuple[str, ...]:
        """What the score needs: as another method's scorer, the allocator that this method comes with has no say."""
        default = cls()
        apart = {*default.allocator_part.fields(), *default.selector_part.fields()}
        return tuple(name for name in super().public_names() if name not in apart)

    def components(self) -> list[type[Declared]]:
        from workbench.strategies.eviction.allocators import ALLOCATORS, SELECTORS

        return [ALLOCATORS[self.fixed_allocator or self.allocator], SELECTORS[self.fixed_selector or self.selector]]

    @property
    def allocator_part(self) -> Allocator:
        return self._parts[0]  # type: ignore[return-value]

    @property
    def selector_part(self) -> Selector:
        return self._parts[1]  # type: ignore[return-value]

    @property
    def ragged(self) -> bool:
        return self.allocator_part.ragged

    @property
    def spans_layers(self) -> bool:
        return self.allocator_part.spans_layers

    @property
    def scores_alike(self) -> str:
        """Who is sure to have the same scores, in the words of :attr:`keeps_alike`."""
        return ""

    @property
    def keeps_alike(self) -> str:
        if self.ragged:
            return ""
        if self.scores_alike == "layers" and self.allocator:
            return "heads"
        return self.scores_alike or ("heads" if self.selector_part.key == "chunks" else "")

    @property
    def score_window(self) -> int:
        """Queries at the end of the prompt that the score looks at; 0 if none."""
        return 0

    @property
    def query_window(self) -> int:
        return max(self.score_window, self.allocator_part.query_window)

    def score(self, view: LayerView) -> Tensor:
        """[B, H, n] float; larger means keep, ``PROTECTED`` stays first."""
        raise NotImplementedError

    def need(self, view: LayerView) -> Tensor:
        """[B, H, n] float, by which heads that share a budget are compared."""
        return self.score(view)

    def choose(self, view: LayerView, rows: list[Tensor], safe: int) -> list[Tensor]:
        """What stays where the best by :meth:`need` are ``rows``, one per (batch, head): as many, if not the same ones.

        Args:
            safe: best entries of each head, by need, that every head is sure to keep.
        """
        return rows

    def after_prefill(self, view: LayerView) -> None:
        self.allocator_part.after_prefill(self, view)
        if not self.spans_layers:
            self.forget(view)

    def after_prompt(self, views: Sequence[LayerView]) -> None:
        self.allocator_part.after_prompt(self, views)
        if self.spans_layers:
            for view in views:
                self.forget(view)

    def forget(self, view: LayerView) -> None:
        """Let go of what was noted while the prompt was read, unless it is needed while generating."""

    def keep(self, view: LayerView, index: Tensor | Sequence[Tensor]) -> None:
        """Keep only these entries; a method with state per entry keeps that in step."""
        view.keep(index)


class StepwiseEviction(Eviction):
    """Eviction that the literature also runs while generating: the number kept stays that of the prompt.

    A budget of 1.0 is everything, so it never evicts.
    """

    recompress_every = param.Integer(
        1, bounds=(0, 4096), doc="generated tokens between evictions; 0 acts once, after the prompt", precedence=9
    )

    @property
    def keeps_acting(self) -> bool:
        return self.recompress_every > 0 and not (isinstance(self.budget, float) and self.budget == 1.0)

    def after_step(self, view: LayerView) -> None:
        if not self.keeps_acting:
            return
        count = self.allocator_part.capacity(self, view)
        # With an interval the cache may grow by that many tokens before it is cut back.
        if view.length - count >= self.recompress_every:
            self.keep(view, self.selector_part.pick(shielded(self.score(view), view), count))


class Wrapper(Eviction):
    """A method that is a scorer of one's choice with one more part; ``adakv(scorer="snapkv", window=16)``."""

    scorer = param.String("snapkv", doc="the eviction method whose score is used")

    def components(self) -> list[type[Declared]]:
        return [*super().components(), scorer_class(self.key, self.scorer)]

    def settled(self, kind: type[Declared]) -> dict[str, Any]:
        if not issubclass(kind, Eviction):
            return {}
        once = {"recompress_every": 0} if "recompress_every" in kind.parameter_names() else {}
        return {"budget": self.budget, **once}

    @property
    def inner(self) -> Eviction:
        """The scorer with its parameters."""
        return self._parts[2]  # type: ignore[return-value]

    @property
    def needs_prompt(self) -> bool:
        return self.inner.needs_prompt

    @property
    def per_entry(self) -> frozenset[str]:
        return self.inner.per_entry

    @property
    def score_window(self) -> int:
        return self.inner.score_window

    def check(self, geometry: Any) -> None:
        self.inner.check(geometry)

    def on_chunk(self, view: LayerView) -> None:
        self.inner.on_chunk(view)

    def score(self, view: LayerView) -> Tensor:
        return self.inner.score(view)

    def need(self, view: LayerView) -> Tensor:
        return self.inner.need(view)

    def choose(self, view: LayerView, rows: list[Tensor], safe: int) -> list[Tensor]:
        return self.inner.choose(view, rows, safe)

    def forget(self, view: LayerView) -> None:
        self.inner.forget(view)

    def keep(self, view: LayerView, index: Tensor | Sequence[Tensor]) -> None:
        self.inner.keep(view, index)


def scorer_class(key: str, name: str) -> type[Eviction]:
    """The eviction method registered as ``name``, to be used for its score alone."""
    from workbench.strategies.registry import registry, strategy_class

    cls = strategy_class(name)
    if not issubclass(cls, Eviction) or cls.key == key or not cls.scores_alone:
        usable = [k for k, c in registry().items() if issubclass(c, Eviction) and k != key and c.scores_alone]
        raise RecipeError(f"{key} cannot score with {name}; use one of {', '.join(usable)}.")
    return cls


def shielded(scores: Tensor, view: LayerView) -> Tensor:
    """Scores [B, H, n] in which what a person protected by hand comes first."""
    protected = view.protected()
    return scores if protected is None else scores.masked_fill(protected, PROTECTED)


def protect_last(scores: Tensor, count: int) -> Tensor:
    """Scores with the newest ``count`` entries protected."""
    scores = scores.clone()
    scores[..., scores.shape[-1] - count :] = PROTECTED
    return scores


def pool(scores: Tensor, kernel: int) -> Tensor:
    """Average over ``kernel`` neighbouring entries of the last axis, zeros beyond its ends; shaped as ``scores``."""
    n = scores.shape[-1]
    if n == 0:
        return scores
    pooled = F.avg_pool1d(scores.flatten(0, -2), kernel, stride=1, padding=kernel // 2)[..., :n]
    return pooled.reshape(scores.shape)


def flat_rows(scores: Tensor, count: int) -> list[Tensor]:
    """The best ``count`` of all heads' scores together, by head.

    Args:
        scores: [B, H, n].

    Returns:
        One ascending int64 vector per (batch, head).
    """
    batch, heads, n = scores.shape
    # Flatten with the position outermost, so that ties between heads also go to the later entry.
    best = select_top(scores.transpose(1, 2).flatten(1), count)  # [B, count] of n * H
    kept = torch.zeros(batch, n * heads, dtype=torch.bool, device=scores.device).scatter(1, best, True)
    rows = kept.view(batch, n, heads).transpose(1, 2).flatten(0, 1)  # [B * H, n]
    return [row.nonzero().squeeze(-1) for row in rows]
