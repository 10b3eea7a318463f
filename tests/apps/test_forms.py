"""Forms come from the declared parameters: every strategy has one, and what a person sets is what the recipe says."""

from __future__ import annotations

from typing import Any

import pytest

import tests.apps.stand_in  # noqa: F401  (makes the app importable)
from workbench.strategies.recipe import Recipe
from workbench.strategies.registry import registry
from workbench_app import recipes
from workbench_app.forms import RecipeForm, control, read

NAMES = sorted(registry())


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_labelled_control_with_its_bounds(name: str) -> None:
    part = registry()[name]()
    shown = recipes.fields(part)
    assert {field.name for field in shown} >= set(part.parameter_names())
    for field in shown:
        widget, told = control(field, 400)
        assert widget.label and widget.value == field.value and told in widget.param
        bounds = getattr(field.declared, "bounds", None)
        if field.kind in ("whole", "number") and bounds:
            assert (widget.start, widget.end) == tuple(bounds)
        assert read(field, widget.value) == field.value


@pytest.mark.parametrize("name", NAMES)
def test_a_part_is_written_as_it_is_read(name: str) -> None:
    part = registry()[name]()
    text = recipes.part_text(part)
    assert Recipe.parse(text).parts == (part,)
    assert text == recipes.default_part(name)


def test_parts_are_added_replaced_and_taken_out() -> None:
    recipe = Recipe.parse("full")
    text = recipes.with_part(recipe, 0, "snapkv(budget=0.25)")
    assert text == "snapkv(budget=0.25)"
    text = recipes.with_part(Recipe.parse(text), 9, "kivi(bits=2)")
    assert text == "snapkv(budget=0.25) | kivi(bits=2)"
    assert recipes.with_part(Recipe.parse(text), 0, "tova(budget=0.5)") == "tova(budget=0.5) | kivi(bits=2)"
    assert recipes.with_part(Recipe.parse(text), 0, None) == "kivi(bits=2)"
    assert recipes.with_part(Recipe.parse("snapkv()"), 0, None) == "full"


def form(text: str) -> tuple[RecipeForm, list[str]]:
    said: list[str] = []
    made = RecipeForm(said.append, lambda: "lane A")
    made.show(text, 400)
    return made, said


def settle_on(slider: Any, value: float) -> None:
    import param

    with param.parameterized.edit_constant(slider):
        slider.param.update(value=value, value_throttled=value)


def test_the_slider_says_the_recipe_when_it_is_let_go() -> None:
    made, said = form("snapkv(budget=0.25, window=16) | kivi(bits=2)")
    slider = made.controls[0, "budget"]
    slider.value = 0.3  # still dragging
    assert said == []
    settle_on(slider, 0.4)
    assert said == ["snapkv(budget=0.4, window=16) | kivi(bits=2)"]
    made.controls[1, "bits"].value = 4
    assert said[-1] == "snapkv(budget=0.25, window=16) | kivi(bits=4)"


def test_a_new_value_keeps_the_controls_and_is_not_said_again() -> None:
    made, said = form("snapkv(budget=0.25)")
    slider = made.controls[0, "budget"]
    made.show("snapkv(budget=0.6)", 400)
    assert made.controls[0, "budget"] is slider and slider.value == 0.6 and said == []
    settle_on(slider, 0.25)  # back to where it began is news
    assert said == ["snapkv(budget=0.25)"]


def test_a_budget_may_be_a_count() -> None:
    made, said = form("snapkv(budget=0.25)")
    made._other_unit(0)
    assert said == ["snapkv(budget=100)"]
    made.show(said[0], 400)
    slider = made.controls[0, "budget"]
    assert (slider.start, slider.end, slider.value) == (1, 400, 100)
    settle_on(slider, 64)
    assert said[-1] == "snapkv(budget=64)"
    made._other_unit(0)
    assert said[-1] == "snapkv(budget=0.25)"


def test_a_wrapper_shows_its_scorers_parameters_too() -> None:
    part = Recipe.parse('adakv(scorer="snapkv", budget=0.25, window=16)').parts[0]
    assert {"alpha", "scorer", "window", "kernel"} <= {field.name for field in recipes.fields(part)}
    text = recipes.part_text(part, alpha=0.5)
    assert (
        Recipe.parse(text).parts[0].resolved
        == Recipe.parse('adakv(scorer="snapkv", budget=0.25, window=16, alpha=0.5)').parts[0].resolved
    )


def test_an_empty_number_field_changes_nothing() -> None:
    made, said = form("snapkv(budget=0.25)")
    made._toggle(0)
    made.controls[0, "window"].value = None
    assert said == []
    made.controls[0, "window"].value = 16
    assert said == ["snapkv(budget=0.25, window=16)"]


@pytest.mark.parametrize(
    "text, tokens, share",
    [
        ("full", 400, None),
        ("kivi(bits=2)", 400, None),
        ("snapkv(budget=0.25)", 400, 0.25),
        ("tova(budget=64)", 400, 0.16),
    ],
)
def test_nominal_share(text: str, tokens: int, share: float | None) -> None:
    assert recipes.nominal_share(Recipe.parse(text), tokens) == share
