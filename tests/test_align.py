"""Lanes at equal bytes: the budget that is found measures what was asked for."""

from __future__ import annotations

import pytest

import workbench as wb
from tests.builders import build, prompt
from workbench.errors import RecipeError
from workbench.runs.align import aligned, budgeted, with_budget
from workbench.runs.control import Control
from workbench.runs.prompt import Cancelled, take_snapshot
from workbench.runs.replay import finish
from workbench.strategies.recipe import Recipe

T = 240


def bytes_of(recipe: str) -> int:
    cmp = wb.compare(build("qwen3"), prompt(T), ["full", recipe], max_new_tokens=1)
    return cmp[1].memory.used_bytes


@pytest.mark.parametrize(
    "recipe",
    [
        "snapkv(budget=0.1, window=8)",
        "adakv(budget=0.9, window=8)",
        "pyramidkv(budget=0.2, window=8)",
        "streaming_llm(budget=40)",
        "snapkv(budget=0.9, window=8) | kivi(bits=2, group_size=16, residual_length=16)",
    ],
)
def test_the_budget_found_holds_as_many_bytes(recipe: str) -> None:
    model, ids = build("qwen3"), prompt(T)
    target = bytes_of("kivi(bits=2, group_size=32, residual_length=32)") if "|" not in recipe else 40_000
    snapshot = finish(take_snapshot(model, ids, 2048, Control()))
    found = finish(aligned(model, ids, recipe, target, snapshot=snapshot))
    assert found.close and found.tries <= 12
    again = with_budget(Recipe.parse(recipe), found.budget)
    assert abs(bytes_of(again.resolved) / target - 1) <= 0.02
    assert isinstance(found.budget, type(Recipe.parse(recipe).parts[0].budget))
    assert again.parts[1:] == Recipe.parse(recipe).parts[1:]


def test_where_one_token_is_much_the_nearest_is_found() -> None:
    model, ids = build("qwen3"), prompt(T)
    (three, four) = (bytes_of(f"knorm(budget={n})") for n in (3, 4))
    target = three + (four - three) // 3
    found = finish(aligned(model, ids, "knorm(budget=9)", target))
    assert found.budget == 3 and not found.close and found.off < -0.02


@pytest.mark.parametrize("target", [10, 10**9])
def test_what_no_budget_holds_is_refused(target: int) -> None:
    with pytest.raises(RecipeError, match="cannot hold"):
        finish(aligned(build("qwen3"), prompt(T), "snapkv(budget=0.5)", target))


def test_a_recipe_without_a_budget_is_refused() -> None:
    assert budgeted(Recipe.parse("kivi() ")) is None and budgeted(Recipe.parse("full")) is None
    assert budgeted(Recipe.parse("snapkv() | kivi()")) == 0
    with pytest.raises(RecipeError, match="has no budget"):
        finish(aligned(build("qwen3"), prompt(T), "kivi(group_size=16)", 1000))


@pytest.mark.parametrize("reused", [False, True])
def test_a_search_can_be_cancelled(reused: bool) -> None:
    model, ids, control = build("qwen3"), prompt(T), Control()
    snapshot = finish(take_snapshot(model, ids, 2048, Control())) if reused else None
    search = aligned(model, ids, "snapkv(budget=0.5)", 30_000, control=control, snapshot=snapshot)
    next(search)
    control.cancel()
    with pytest.raises(Cancelled):
        finish(search)
