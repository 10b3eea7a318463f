"""Recipes as a person edits them: one part after another, each with the parameters its strategy declares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import param

from workbench.strategies.base import Budget, Strategy, written
from workbench.strategies.recipe import FULL, Recipe
from workbench.strategies.registry import registry, strategy_class


@dataclass(frozen=True)
class Field:
    """One declared parameter of a strategy, with the value it has in a recipe."""

    name: str
    declared: param.Parameter
    value: Any

    @property
    def kind(self) -> str:
        """Which control suits it: budget, choice, whole, share, number, switch or text."""
        declared = self.declared
        if isinstance(declared, Budget):
            return "budget"
        if isinstance(declared, param.Selector):
            return "choice"
        if isinstance(declared, param.Boolean):
            return "switch"
        if isinstance(declared, param.Integer):
            return "whole"
        if isinstance(declared, param.Number):
            return "share" if declared.bounds == (0.0, 1.0) else "number"
        return "text"


def fields(part: Strategy) -> list[Field]:
    """The parameters of a part, those of its components included."""
    return [Field(name, declared, value) for name, (declared, value) in part.fields().items()]


def part_text(part: Strategy, **changes: Any) -> str:
    """A part as it is written in a recipe: its first parameter, and those that are not the default."""
    values = {field.name: field.value for field in fields(part)} | changes
    defaults = {field.name: field.declared.default for field in fields(part)}
    first = next(iter(values), None)
    shown = [
        f"{name}={written(value)}"
        for name, value in values.items()
        if value is not None and (name == first or value != defaults.get(name))
    ]
    return f"{part.key}({', '.join(shown)})"


def with_part(recipe: Recipe, number: int, text: str | None) -> str:
    """The recipe's text with one part replaced, or left out (None), or added (a number past the end)."""
    parts = [part_text(part) for part in recipe.parts]
    if number >= len(parts):
        parts += [text] if text else []
    else:
        parts[number : number + 1] = [text] if text else []
    return " | ".join(parts) or FULL


def families() -> dict[str, list[type[Strategy]]]:
    """The strategies by family, in the registry's order."""
    found: dict[str, list[type[Strategy]]] = {}
    for cls in registry().values():
        found.setdefault(cls.family, []).append(cls)
    return found


def default_part(name: str) -> str:
    return part_text(strategy_class(name)())


def title(text: str) -> str:
    """A recipe's name for people: `SnapKV + KIVI`; `Full cache`; the text itself if it cannot be read."""
    try:
        parts = Recipe.parse(text).parts
    except Exception:
        return text
    return " + ".join(part.title or part.key for part in parts) or "Full cache"


def nominal_share(recipe: Recipe, prompt_tokens: int) -> float | None:
    """The share of the prompt's tokens that the budgets of a recipe allow; None where it has no budget."""
    from workbench.strategies.base import tokens_kept

    left = None
    for part in recipe.parts:
        budget = getattr(part, "budget", None)
        if budget is not None and prompt_tokens:
            kept = tokens_kept(budget, prompt_tokens)
            left = kept if left is None else min(left, kept)
    return None if left is None else left / prompt_tokens
