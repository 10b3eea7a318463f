"""At equal bytes: the budget at which a recipe's cache holds as many bytes as another lane's."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from workbench.cache.cache import WorkbenchCache
from workbench.errors import RecipeError
from workbench.runs.control import Control
from workbench.runs.prompt import Cancelled
from workbench.runs.replay import scored
from workbench.strategies.base import Budget, Strategy, tokens_kept
from workbench.strategies.recipe import Recipe

if TYPE_CHECKING:
    from workbench.models.load import Model
    from workbench.runs.prompt import Snapshot

TOLERANCE = 0.02


@dataclass(frozen=True)
class Aligned:
    """What a search found: the budget, and the bytes that the cache measured with it after the prompt."""

    budget: float | int
    used_bytes: int
    target_bytes: int
    tries: int
    nbytes: ClassVar[int] = 64  # of this finding itself, for whoever keeps findings within bounds

    @property
    def off(self) -> float:
        """How far the bytes are from those that were asked for, as a share of these; negative below."""
        return self.used_bytes / self.target_bytes - 1

    @property
    def close(self) -> bool:
        return abs(self.off) <= TOLERANCE


def budgeted(recipe: Recipe) -> int | None:
    """The number of the part whose budget decides how many tokens stay; None where no part has one."""
    parts = (n for n, part in enumerate(recipe.parts) if isinstance(part.fields().get("budget", (None,))[0], Budget))
    return next(parts, None)


def with_budget(recipe: Recipe, budget: float | int) -> Recipe:
    """The recipe with another budget in its :func:`budgeted` part."""
    number = budgeted(recipe)
    if number is None:
        raise RecipeError(
            f"'{recipe.text}' has no budget to change; put an eviction method before it, like snapkv(budget=0.5) | …."
        )
    parts: list[Strategy] = list(recipe.parts)
    values = {name: value for name, (_, value) in parts[number].fields().items()}
    parts[number] = type(parts[number])(**{**values, "budget": budget})
    return Recipe.parse(" | ".join(part.resolved for part in parts))


def aligned(
    model: Model,
    prompt: list[int],
    recipe: str,
    target_bytes: int,
    chunk: int = 2048,
    control: Control | None = None,
    snapshot: Snapshot | None = None,
) -> Generator[int, None, Aligned]:
    """Search the budget with which the cache holds ``target_bytes`` after the prompt, within 2 %.

    The prompt is compressed with one budget after another, and what is then held is measured; each try lies where a line
    through the two nearest measurements meets the target, or half way between them where that gains little.

    Yields:
        How often the prompt was compressed so far.

    Returns:
        The nearest that was found; not :attr:`Aligned.close` where one token more is already more than 2 % too much.

    Raises:
        RecipeError: the recipe has no budget, or no budget holds as many, or as few, bytes.
        Cancelled: ``control`` was cancelled.
    """
    control = control or Control()
    parsed, length, tries = Recipe.parse(recipe), len(prompt), 0
    number = budgeted(parsed)
    whole = number is not None and isinstance(parsed.parts[number].fields()["budget"][1], int)

    def budget_of(tokens: int) -> float | int:
        return tokens if whole else max(0.0001, round(tokens / length, 4))

    def measured(tokens: int) -> Generator[int, None, Aligned]:
        nonlocal tries
        if control.cancelled:
            raise Cancelled
        budget = budget_of(tokens)
        reading = scored(model, prompt, with_budget(parsed, budget).resolved, chunk, control, snapshot)
        cache: WorkbenchCache
        while True:
            try:
                next(reading)
                yield tries
            except StopIteration as done:
                cache = done.value[1]
                break
        tries += 1
        yield tries
        return Aligned(budget, cache.memory().used_bytes, target_bytes, tries)

    low, high = 1, length
    least, most = (yield from measured(low)), (yield from measured(high))
    for edge, reached in ((least, least.used_bytes <= target_bytes), (most, most.used_bytes >= target_bytes)):
        if not reached and not edge.close:
            raise RecipeError(
                f"'{parsed.text}' cannot hold {target_bytes:,} bytes: with every budget it holds {least.used_bytes:,} to "
                f"{most.used_bytes:,}; match it to another lane, or change its other parameters."
            )
    best = min(least, most, key=lambda found: abs(found.off))
    halve = False
    while not best.close and high - low > 1:
        span = most.used_bytes - least.used_bytes
        share = (target_bytes - least.used_bytes) / span if span > 0 and not halve else 0.5
        tokens = min(high - 1, max(low + 1, low + round(share * (high - low))))
        before = high - low
        found = yield from measured(tokens)
        best = min(best, found, key=lambda one: abs(one.off))
        if found.used_bytes < target_bytes:
            low, least = tokens, found
        else:
            high, most = tokens, found
        halve = high - low > before / 2
    return Aligned(best.budget, best.used_bytes, target_bytes, tries)


def kept_by(budget: float | int, length: int) -> str:
    """A budget in words: `0.31 (254 of 812 tokens)`."""
    return f"{budget:g} ({tokens_kept(budget, length):,} of {length:,} tokens)"
