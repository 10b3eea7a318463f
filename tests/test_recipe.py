"""The recipe grammar: what it reads, what it refuses and in which words."""

from __future__ import annotations

import warnings
from typing import Any

import param
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.strategies.base import Budget, Strategy
from workbench.strategies.recipe import Recipe
from workbench.strategies.registry import registry, strategies

BUDGETS = st.one_of(st.integers(1, 5000), st.floats(0.0, 1.0, exclude_min=True))


def values_of(cls: type[Strategy]) -> st.SearchStrategy[dict[str, Any]]:
    """Any parameters that ``cls`` declares and takes."""
    choices: dict[str, st.SearchStrategy[Any]] = {}
    for name in cls.parameter_names():
        declared = cls.param[name]
        if isinstance(declared, Budget):
            choices[name] = BUDGETS
        elif isinstance(declared, param.Selector):
            choices[name] = st.sampled_from(list(declared.objects))
        elif isinstance(declared, param.Boolean):
            choices[name] = st.booleans()
        elif isinstance(declared, param.Number):
            low, high = declared.bounds
            number = st.integers if isinstance(declared, param.Integer) else st.floats
            choices[name] = number(low, high)
    if cls.key in ("kivi", "gear", "xquant"):
        choices["group_size"], choices["residual_length"] = (
            st.sampled_from([16, 32, 64] if cls.key == "gear" else [16, 32, 64, 128]),
            st.sampled_from([128, 256]),
        )
    if cls.key == "mustafar":
        choices["flush_length"] = st.sampled_from([64, 128, 256])
    return st.fixed_dictionaries({}, optional=choices)


def written(key: str, values: dict[str, Any]) -> str:
    return f"{key}({', '.join(f'{name} = {value!r}' for name, value in values.items())})"


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_the_resolved_text_parses_to_an_equal_recipe(data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.sampled_from(sorted(registry())), max_size=3))
    parts = [written(key, data.draw(values_of(registry()[key]))) for key in keys]
    try:
        recipe = Recipe.parse(" | ".join(["full", *parts]))
    except wb.RecipeError as refused:
        alone = len(parts) == 1 and "allocator" not in parts[0] and "selector" not in parts[0]
        assert not alone, refused  # one strategy with its own parameters is always fine
        return
    again = Recipe.parse(recipe.resolved)
    assert again == recipe and hash(again) == hash(recipe) and again.resolved == recipe.resolved
    assert [part.values() for part in again.parts] == [part.values() for part in recipe.parts]


PIECES = st.sampled_from(
    "full snapkv kivi adakv h2o ( ) | , = . 1 0.5 budget bits window ** * [ ] { } ' \" : lambda 1e999 -3 None True 2j ~ \\ \n \0 scorer".split(
        " "
    )
)


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=14).map(" ".join)))
def test_any_text_is_a_recipe_or_a_recipe_error_of_one_sentence(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert isinstance(Recipe.parse(text), Recipe)
        except wb.RecipeError as error:
            assert len(str(error)) > 20


LITERALS = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.binary(max_size=3),
        st.complex_numbers(),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=2), inner, max_size=2)),
    max_leaves=3,
)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_value_of_any_parameter_is_taken_or_refused_by_name(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(registry())))
    name = data.draw(st.sampled_from(registry()[key].parameter_names()))
    text = f"{key}({name}={data.draw(LITERALS)!r})"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            recipe = Recipe.parse(text)
        except wb.RecipeError as error:
            assert (
                name in str(error)
                or "strategy" in str(error)
                or "characters" in str(error)
                or "cannot be read" in str(error)
            )
        else:
            assert Recipe.parse(recipe.resolved) == recipe


@pytest.mark.parametrize(
    "text",
    [
        "(" * 1500,
        "-" * 1900 + "1",
        "full|" * 380 + "full",
        "snapkv(budget=" + "9" * 1900 + ")",
        "[" * 90 + "]" * 90,
        "snapkv(budget=" + "[" * 90 + "]" * 90 + ")",
    ],
)
def test_monsters_are_recipes_or_recipe_errors(text: str) -> None:
    try:
        Recipe.parse(text)
    except wb.RecipeError:
        pass


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "write 'full'"),
        ("   ", "write 'full'"),
        ("snapkv(", "cannot be read"),
        ("full full", "cannot be read"),
        ("snapkw(budget=0.5)", "Did you mean snapkv?"),
        ("kivy", "Did you mean kivi"),
        ("nothing_like_it", f"Known: {', '.join(sorted(registry()))}."),
        ("snapkv(budgt=0.5)", "Did you mean budget?"),
        ("snapkv(0.5)", "name its parameters, like snapkv(budget=0.25)"),
        ("full(0.5)", "full"),
        ("snapkv(budget=0.5, budget=0.6)", "given twice"),
        ("snapkv(**{})", "not allowed"),
        ("snapkv(budget=x)", "write a number or a quoted text"),
        ("snapkv(budget=1+1)", "not a value"),
        ("__import__('os').getcwd()", "not a strategy"),
        ("snapkv & kivi", "not a strategy"),
        ("snapkv.score()", "not a strategy"),
        ("snapkv(budget=0)", "a whole number of tokens from 1 up"),
        ("snapkv(budget=0.0)", "a share above 0"),
        ("snapkv(budget=1.01)", "up to 1.0"),
        ("snapkv(budget=-3)", "got -3"),
        ("snapkv(budget=True)", "got True"),
        ("snapkv(budget='a')", "got 'a'"),
        ("snapkv(budget=1e999)", "got inf"),
        ("snapkv(window=0)", "window must be a whole number between 1 and 512, got 0"),
        ("snapkv(window=2.0)", "whole number"),
        ("snapkv(window=True)", "got True"),
        ("h2o(recent=2)", "recent must be a number between 0.0 and 1.0, got 2"),
        ("kivi(bits=3)", "bits must be one of 2, 4, 8, 16, got 3"),
        ("kivi(bits=2.0)", "got 2.0"),
        ("kivi(bits=True)", "got True"),
        ("kivi(group_size=48)", "16, 32, 64 or 128, got 48"),
        ("kivi(residual_length=100)", "multiple of group_size (32), got 100"),
        ("adakv(scorer='nobody')", "no strategy 'nobody'"),
        ("adakv(scorer='adakv')", "cannot score with adakv; use one of snapkv"),
        ("adakv(scorer='kivi')", "cannot score with kivi"),
        ("adakv(scorer='chunkkv')", "cannot score with chunkkv"),
        ("critical(scorer='critical')", "cannot score with critical"),
        ("adakv(scorer='layer_defensivekv')", "cannot score with layer_defensivekv"),
        ("adakv(scorer='cake', tau1=1.5)", "with cake it has budget, scorer"),
        ("cake(allocator='adakv')", "cake is itself the allocator"),
        ("cake(cascade=1)", "cascade"),
        ("cake | kivi", "cake(recompress_every=0)"),
        ("layer_defensivekv | snapkv", "snapkv cannot follow layer_defensivekv"),
        ("h2o(allocator='global')", "h2o(recompress_every=0, …)"),
        ("adakv(allocator='pyramidkv')", "adakv is itself the allocator"),
        ("chunkkv(allocator='adakv')", "chunks are the same tokens for every head"),
        ("h2o(allocator='adakv')", "h2o(recompress_every=0, …)"),
        ("snapkv(alpha=0.5)", "snapkv has no parameter 'alpha'; it has"),
        ("adakv(scorer=7)", "in quotes"),
        ("adakv(scorer='knorm', window=3)", "no parameter 'window'; with knorm it has"),
        ("adakv | snapkv", "snapkv cannot follow adakv"),
        ("adakv | adakv", "adakv cannot follow adakv"),
        ("kivi | kivi(bits=4)", "one codec"),
        ("h2o | kivi", "h2o(recompress_every=0)"),
        ("kivi | tova", "tova(recompress_every=0)"),
        (
            "think | snapkv",
            "snapkv cannot follow think, whose keys no other method can take over; put snapkv before it",
        ),
        ("think | kivi", "kivi cannot follow think, whose keys no other method can take over; use one of the two"),
        ("think | think", "use one of the two"),
        ("kivi | think", "think cannot follow kivi: entries are held by one codec"),
        ("adakv | think", "think cannot follow adakv, which leaves every head with its own number of tokens; use one"),
        ("tova | think", "take apart what think holds, each time; write tova(recompress_every=0)"),
        ("think(ratio=1.5)", "ratio must be a number between 0.0 and 1.0, got 1.5"),
        ("adakv(scorer='think')", "cannot score with think"),
        ("streaming_llm(rerotate=1)", "rerotate cannot be 1; its default is False"),
        ("snapkv | streaming_llm(rerotate=True)", "no other method may evict beside it; take snapkv out"),
        ("streaming_llm(rerotate=True) | knorm", "take knorm out"),
        ("locret | snapkv", "no other method may evict beside it; take snapkv out"),
        ("streaming_llm(rerotate=True) | kivi", "streaming_llm(recompress_every=0)"),
        ("full" + " " * 3000, "2,000 is the most"),
    ],
)
def test_what_is_refused_and_how(text: str, says: str) -> None:
    with pytest.raises(wb.RecipeError) as caught:
        Recipe.parse(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))


@pytest.mark.parametrize(
    "one, other",
    [
        ("full", "full()"),
        ("full", "full | full"),
        ("snapkv", "snapkv()"),
        ("snapkv(budget=0.25)", " snapkv( window=32 , budget = .25,kernel=5 ) "),
        ("snapkv | kivi", "snapkv | full | kivi(bits=2)"),
        ("h2o(recent=1)", "h2o(recent=1.0)"),
        ("kivi(key_bits=None)", "kivi"),
        ("adakv", "adakv(scorer='snapkv', window=32)"),
        ("adakv(scorer='critical', window=16)", "adakv(scorer='critical', kernel=5, window=16, first_stage=.5)"),
        ("(snapkv | kivi)", "snapkv | kivi"),
    ],
)
def test_recipes_that_do_the_same_are_equal(one: str, other: str) -> None:
    assert Recipe.parse(one) == Recipe.parse(other) and len({Recipe.parse(one), Recipe.parse(other)}) == 1


@pytest.mark.parametrize(
    "one, other",
    [
        ("full", "snapkv"),
        ("snapkv(budget=1)", "snapkv(budget=1.0)"),
        ("snapkv | kivi", "kivi | snapkv"),
        ("adakv", "adakv(window=31)"),
    ],
)
def test_recipes_that_do_not_are_not(one: str, other: str) -> None:
    assert Recipe.parse(one) != Recipe.parse(other)


def test_a_recipe_remembers_its_text_and_a_recipe_is_taken_as_it_is() -> None:
    recipe = Recipe.parse(" snapkv(budget=0.5)|kivi ")
    assert recipe.text == "snapkv(budget=0.5)|kivi" and Recipe.parse(recipe) is recipe
    assert recipe.resolved.startswith("snapkv(budget=0.5, window=32, kernel=5) | kivi(bits=2, ")


@pytest.mark.parametrize(
    "text",
    [
        "h2o(recompress_every=0) | kivi(bits=4)",
        "kivi | snapkv",
        "adakv | kivi",
        "tova(budget=1.0) | kivi",
        "snapkv | knorm",
        "snapkv(budget=0.25) | think(ratio=0.5)",
        "h2o(recompress_every=0) | think",
        "tova(budget=1.0) | think",
        "streaming_llm(rerotate=True, recompress_every=0) | kivi",
        "streaming_llm(rerotate=True, recompress_every=0) | think",
    ],
)
def test_compositions_that_make_sense_are_taken(text: str) -> None:
    assert len(Recipe.parse(text).parts) == 2


def test_parts_never_change() -> None:
    part = Recipe.parse("snapkv").parts[0]
    with pytest.raises(AttributeError, match="make a new snapkv"):
        part.budget = 0.5


def test_strategies_describes_every_one_for_a_form() -> None:
    described = {entry["name"]: entry for entry in strategies()}
    assert set(described) == set(registry()) and described["kivi"]["parameters"]["bits"]["choices"] == [2, 4, 8, 16]
    assert described["headkv"]["needs"] == ["queries", "kvw calibrate headkv MODEL"]
    for entry in described.values():
        assert entry["title"] and entry["summary"].endswith(".") and entry["family"]
        for name, parameter in entry["parameters"].items():
            assert parameter["doc"], f"{entry['name']}.{name} says nothing"


def test_a_head_dim_that_does_not_fit_is_refused_with_one_that_does() -> None:
    from tests.builders import build

    with pytest.raises(wb.RecipeError, match="use group_size=16"):
        wb.cache("kivi", build())  # head_dim 16
