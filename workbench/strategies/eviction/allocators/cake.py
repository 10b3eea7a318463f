"""CAKE (arXiv 2503.12491): layers whose queries look widely, and at changing entries, get more of one budget."""

from __future__ import annotations

from collections.abc import Sequence

import param
import torch
from torch import Tensor

from workbench.cache.layer import LayerView
from workbench.errors import RecipeError
from workbench.strategies.base import tokens_kept
from workbench.strategies.eviction.base import Allocator, Eviction

WINDOW = 32  # queries looked at where the scorer has no window of its own (default of the authors' code)
TINY = torch.finfo(torch.float64).tiny  # preference of a layer that has none: only its window stays


class CakeAllocator(Allocator):
    """Every layer keeps a window; the rest of the budget is shared in proportion to the layers' preferences.

    With the cascade, each layer that was read takes its part from the layers before it. A prompt read in one chunk then
    never takes more than the budget and one whole layer; without it, or before the last of several chunks, all layers
    are whole. The sum over layers is at most that of an even budget, so nothing is dropped while a prompt fits in it
    (the authors' code lets it exceed the budget by a window first).
    """

    key = "cake"
    spans_layers = True

    tau1 = param.Number(1.0, bounds=(0.2, 3.0), doc="preference = entropy^(1/tau1) * variance^(1/tau2)")
    tau2 = param.Number(1.0, bounds=(0.2, 3.0), doc="the larger, the less the variance over queries says")
    cascade = param.Boolean(True, doc="shrink earlier layers while later ones are read, not all after the last one")

    @property
    def query_window(self) -> int:
        return WINDOW

    def window(self, method: Eviction) -> int:
        """Queries that tell a layer's preference, and entries every layer is sure to keep: the scorer's window."""
        return method.score_window if method.score_window > 1 else WINDOW  # the variance needs two

    def capacity(self, method: Eviction, view: LayerView) -> int:
        budget = view.state.get("budget")
        return super().capacity(method, view) if budget is None else int(budget)

    def after_prefill(self, method: Eviction, view: LayerView) -> None:
        if view.batch > 1:
            raise RecipeError(
                f"{method.key} shares its budget among layers by their attention, which would mix the {view.batch} "
                "prompts of this batch; run them one by one."
            )
        if self.keeps_all(method, view):
            return
        window = self.window(method)
        attention = view.window_attention(window)[..., : max(0, view.length - window)]
        view.state["preference"] = torch.tensor(preference(attention, self.tau1, self.tau2), dtype=torch.float64)
        view.state["scores"] = method.score(view)  # [1, H, n]
        view.note_scores(view.state["scores"])
        if self.cascade:
            self.cut(method, [*view.earlier(), view])

    def after_prompt(self, method: Eviction, views: Sequence[LayerView]) -> None:
        if self.keeps_all(method, views[0]):
            return
        if not self.cascade:
            self.cut(method, views)
        for view, budget in zip(views, self.budgets(method, views), strict=True):
            del view.state["preference"], view.state["scores"]
            if method.keeps_acting:
                view.state["budget"] = torch.tensor(budget, dtype=torch.int32)

    def cut(self, method: Eviction, views: Sequence[LayerView]) -> None:
        """Drop what lies beyond the layers' budgets; the scores stay in step with the entries."""
        for view, budget in zip(views, self.budgets(method, views), strict=True):
            scores = view.state["scores"]
            if budget < scores.shape[-1]:
                kept = method.selector_part.pick(scores, budget)
                view.state["scores"] = scores.gather(-1, kept)
                method.keep(view, kept)

    def budgets(self, method: Eviction, views: Sequence[LayerView]) -> list[int]:
        """Entries per KV head of each of the first layers, the window included, when these share the whole budget."""
        sizes = views[0].prompt_entries()
        even = [min(tokens_kept(method.budget, views[0].prompt_length), size) for size in sizes]
        windows = [min(self.window(method), count) for count in even]
        limits = [size - window for size, window in zip(sizes, windows, strict=True)][: len(views)]
        preferences = [float(view.state["preference"]) for view in views]
        total = sum(even) - sum(windows)
        parts = limits if total >= sum(limits) else shares(preferences, total, limits)
        return [window + min(part, limit) for window, part, limit in zip(windows, parts, limits)]


def preference(attention: Tensor, tau1: float, tau2: float) -> float:
    """How much cache a layer asks for beyond its window: entropy^(1/tau1) * variance^(1/tau2), never 0.

    Args:
        attention: [..., W, P], what the last queries pay the entries before them. Rows need not sum to 1.
    """
    if attention.shape[-1] == 0:
        return TINY
    entropy = -float((attention * (attention + 1e-10).log()).sum())
    variance = float(attention.var(-2).sum())  # of each entry over the queries
    return max(TINY, max(0.0, entropy) ** (1 / tau1) * variance ** (1 / tau2))


def shares(preferences: Sequence[float], total: int, limits: Sequence[int]) -> list[int]:
    """``total`` entries in proportion to the preferences, in whole numbers that sum to it while the limits allow.

    As in the authors' code: rounded down and clipped; what was clipped, then what rounding left, is spread evenly over
    the layers below their limits. Spreading may carry a layer past its limit.
    """
    rounded = [int(total * preference / sum(preferences)) for preference in preferences]
    parts = [min(part, limit) for part, limit in zip(rounded, limits, strict=True)]
    parts = spread(parts, sum(rounded) - sum(parts), limits)
    return spread(parts, total - sum(parts), limits)


def spread(parts: Sequence[int], more: int, limits: Sequence[int]) -> list[int]:
    """``more`` in equal parts over the layers below their limits; what does not divide goes to the first of them."""
    below = [layer for layer, (part, limit) in enumerate(zip(parts, limits, strict=True)) if part < limit]
    parts = list(parts)
    for turn, layer in enumerate(below):
        each, rest = divmod(more, len(below))
        parts[layer] += each + (turn < rest)
    return parts
