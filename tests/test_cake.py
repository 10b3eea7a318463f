"""CAKE: the card's worked examples, the cascade, and the budget that layers share."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F

import workbench as wb
from tests.builders import build, feed, prompt
from tests.builders import whole_cache_for as cache_for
from workbench.cache.cache import WorkbenchCache
from workbench.cache.layer import LayerView
from workbench.runs.control import Control
from workbench.runs.prompt import take_snapshot
from workbench.strategies.eviction.allocators import cake as allocator
from workbench.strategies.eviction.allocators.cake import TINY, CakeAllocator, preference, shares
from workbench.strategies.eviction.base import Eviction, StepwiseEviction
from workbench.strategies.eviction.cake import CAKE
from workbench.strategies.recipe import Recipe
from workbench.strategies.registry import registry

LENGTH = 90
T = TypeVar("T")


def run(recipe: str, later: int = 0, chunk: int | None = None, name: str = "llama") -> WorkbenchCache:
    cache = cache_for(build(name), recipe, LENGTH)
    feed(build(name), cache, prompt(LENGTH), chunk)
    if later:
        feed(build(name), cache, prompt(later, seed=1), 1)
    return cache


def kept(cache: WorkbenchCache) -> list[list[list[int]]]:
    return [[cache.kept(layer, head) for head in range(2)] for layer in range(3)]


def counts(cache: WorkbenchCache) -> list[int]:
    """Entries per head of each layer; the heads of a layer hold the same number."""
    assert all(layer.store.uniform for layer in cache.layers)
    return [layer.store.lengths[0] for layer in cache.layers]


# rows of attention, entropy * variance, the same under tau (1.6, 0.4), the score before pooling, and after
CARD = [
    (
        [[0.1, 0.4, 0.1, 0.2], [0.3, 0, 0.1, 0.2]],
        0.206226,
        0.00497124,
        [4.2, 16.2, 0.1, 0.2],
        [4.1, 4.14, 4.14, 3.3],
    ),
    (
        [[0.7, 0.05, 0.05, 0], [0.1, 0.05, 0.65, 0]],
        0.435348,
        0.0875669,
        [36.4, 0.05, 36.35, 0],
        [14.56, 14.56, 14.56, 7.28],
    ),
    ([[0.2] * 4] * 2, TINY, TINY, [0.2] * 4, [0.12, 0.16, 0.16, 0.12]),
]


@pytest.mark.parametrize("rows, plain, tuned, before, after", CARD)
def test_card(rows: list, plain: float, tuned: float, before: list[float], after: list[float]) -> None:
    attention = torch.tensor(rows)[None, None, None]  # [B, H, G, W, P]
    assert preference(attention, 1.0, 1.0) == pytest.approx(plain, rel=1e-5)
    assert preference(attention, 1.6, 0.4) == pytest.approx(tuned, rel=1e-5)
    view: Any = SimpleNamespace(window_attention=lambda window: F.pad(attention, (0, 2)), length=6, in_prompt=True)
    for kernel, expected in ((1, before), (5, after)):
        score = CAKE(window=2, kernel=kernel).score(view)[0, 0]
        torch.testing.assert_close(score, torch.tensor([*expected, torch.inf, torch.inf]))


def test_while_generating_the_newest_query_scores_without_variance() -> None:
    row = torch.tensor([0.1, 0.4, 0.1, 0.2, 0.1, 0.1]).view(1, 1, 1, 1, 6)
    view: Any = SimpleNamespace(window_attention=lambda window: row, length=6, in_prompt=False)
    expected = torch.tensor([0.12, 0.16, 0.16, 0.14, torch.inf, torch.inf])
    torch.testing.assert_close(CAKE(window=2).score(view)[0, 0], expected)


@pytest.mark.parametrize(
    "total, limit, expected",
    [(41, 100, [21, 10, 10]), (90, 40, [40, 26, 24]), (60, 24, [24, 18, 18]), (100, 30, [30, 35, 35])],
)
def test_card_whole_shares(total: int, limit: int, expected: list[int]) -> None:
    assert shares([2, 1, 1], total, [limit] * 3) == expected


@pytest.mark.parametrize("known, expected", [(1, [30]), (2, [30, 10]), (3, [21, 6, 13]), (4, [15, 5, 10, 10])])
def test_card_cascade(known: int, expected: list[int]) -> None:
    method = CAKE(budget=12, window=2)  # (12 - 2) * 4 = 40 to share, and 32 - 2 = 30 is all of a layer
    views: Any = [
        SimpleNamespace(prompt_entries=lambda: [32] * 4, prompt_length=32, state={"preference": torch.tensor(p)})
        for p in (3.0, 1.0, 2.0, 2.0)[:known]
    ]
    part = method.allocator_part
    assert isinstance(part, CakeAllocator)
    assert part.budgets(method, views) == [2 + count for count in expected]


def test_a_layer_that_spreading_carries_past_its_limit_keeps_all_it_has() -> None:
    method = CAKE(budget=30, window=3)  # 81 to share, and 30 is all of a layer
    views: Any = [
        SimpleNamespace(prompt_entries=lambda: [33] * 3, prompt_length=33, state={"preference": torch.tensor(p)})
        for p in (60.0, 20.0, 1.0)
    ]
    part = method.allocator_part
    assert isinstance(part, CakeAllocator)
    assert shares([60, 20, 1], 81, [30] * 3) == [30, 35, 16]
    assert part.budgets(method, views) == [33, 33, 19]
    assert part.budgets(method, views[:2]) == [33, 33]  # two layers alone fit


def test_layers_share_one_budget_exactly_and_unevenly() -> None:
    cache = run("cake(budget=20, window=8)")
    assert sum(counts(cache)) == 3 * 20 and len(set(counts(cache))) > 1 and min(counts(cache)) >= 8
    assert all(head[-8:] == list(range(82, 90)) for layer in kept(cache) for head in layer)


def test_without_variance_and_with_equal_preferences_it_is_snapkv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "preference", lambda *_: 1.0)
    assert kept(run("cake(budget=20, window=8, gamma=0.0)")) == kept(run("snapkv(budget=20, window=8)"))
    assert kept(run('snapkv(budget=20, window=8, allocator="cake")')) == kept(run("snapkv(budget=20, window=8)"))


def stages(monkeypatch: pytest.MonkeyPatch, recipe: str) -> list[list[list[set[int]]]]:
    """What the layers held after each cut: [stages][layers so far][heads]."""
    found: list[list[list[set[int]]]] = []
    plain = CakeAllocator.cut

    def watched(self: CakeAllocator, method: Eviction, views: Sequence[LayerView]) -> None:
        plain(self, method, views)
        found.append([[set(head.tolist()) for head in view.positions()[0]] for view in views])

    with monkeypatch.context() as patch:
        patch.setattr(CakeAllocator, "cut", watched)
        run(recipe)
    return found


def test_every_stage_holds_part_of_the_one_before_and_never_more_than_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = stages(monkeypatch, "cake(budget=20, window=8)")
    assert [len(stage) for stage in found] == [1, 2, 3]
    assert len(found[0][0][0]) == min(LENGTH, 8 + 36)  # the first layer had the whole budget to itself
    for before, after in zip(found, found[1:]):
        for layer, heads in enumerate(before):
            assert all(later <= earlier for later, earlier in zip(after[layer], heads, strict=True))
    for stage in found:
        assert sum(len(heads[0]) for heads in stage) <= 36 + 8 * len(stage)
    assert len(stages(monkeypatch, "cake(budget=20, window=8, cascade=False)")) == 1


def test_the_cascade_keeps_the_entries_of_one_cut_within_rounding() -> None:
    once, cascade = (kept(run(f"cake(budget=20, window=8, cascade={on})")) for on in (False, True))
    for a, b in zip(once, cascade, strict=True):
        for one, other in zip(a, b, strict=True):
            assert len(set(one) ^ set(other)) <= 1


@pytest.mark.parametrize("budget, window", [(20, 8), (10, 4), (40, 16), (5, 8)])
def test_the_peak_is_the_budget_and_one_layer(budget: int, window: int) -> None:
    geometry = build().geometry
    entry = geometry.bytes_per_token // 3  # of one layer
    beside = 2 * (4 + 4)  # a position and a score for each of two heads
    most = budget * 3 * (entry + beside) + LENGTH * entry + 3 * 8  # and a preference per layer
    assert run(f"cake(budget={budget}, window={window})").peak_bytes <= most
    whole = run(f"cake(budget={budget}, window={window}, cascade=False)")
    assert whole.peak_bytes >= 3 * LENGTH * (entry + 2 * 4) > most


def finished(reading: Generator[Any, None, T]) -> T:
    while True:
        try:
            next(reading)
        except StopIteration as done:
            return done.value


def test_a_fork_of_a_read_prompt_is_the_same_with_the_same_peak() -> None:
    snapshot = finished(take_snapshot(build(), prompt(LENGTH), 2048, Control()))
    for recipe in ("cake(budget=20, window=8)", "cake(budget=20, window=8, cascade=False)", "layer_defensivekv"):
        fork, alone = snapshot.fork(Recipe.parse(recipe)), run(recipe)
        assert kept(fork) == kept(alone) and fork.peak_bytes == alone.peak_bytes
        assert fork.memory() == alone.memory()


def test_after_the_prompt_a_budget_per_layer_is_held_where_it_goes_on_and_nothing_else() -> None:
    assert run("cake(budget=20, window=8)").memory().by_kind["scores"] == 3 * 4
    for recipe in ("cake(budget=20, recompress_every=0)", 'snapkv(budget=20, allocator="cake")', "cake(budget=1.0)"):
        assert "scores" not in run(recipe).memory().by_kind


@pytest.mark.parametrize("every", [1, 3])
def test_every_layer_stays_within_its_budget_while_generating(every: int) -> None:
    cache = run(f"cake(budget=20, window=8, recompress_every={every})")
    held = counts(cache)
    for turn, token in enumerate(prompt(7, seed=1), 1):
        feed(build(), cache, [token])
        assert counts(cache) == [count + turn % every for count in held]
        assert all(head[-1] == LENGTH + turn - 1 for layer in kept(cache) for head in layer)


def test_a_count_that_the_prompt_does_not_fill_is_filled_while_generating() -> None:
    cache = run(f"cake(budget={LENGTH + 3}, window=8)", later=9)
    assert counts(cache) == [LENGTH + 3] * 3


@pytest.mark.parametrize("recipe", ["cake(budget=20, window=8)", "cake(budget=20, window=8, cascade=False)"])
def test_chunks_of_the_prompt_and_small_windows(recipe: str) -> None:
    assert kept(run(recipe, chunk=17)) == kept(run(recipe))


REFUSING = {"locret"}  # its scores cannot be compared between layers
SCORERS = [
    key
    for key, cls in registry().items()
    if issubclass(cls, Eviction) and not cls.fixed_allocator and key not in REFUSING
]


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("cascade", [True, False])
def test_the_allocator_takes_every_scorer(scorer: str, cascade: bool) -> None:
    recipe = f'{scorer}(budget=40, allocator="cake", cascade={cascade})'
    cache = run(recipe, later=2)
    goes_on = issubclass(registry()[scorer], StepwiseEviction)
    assert sum(counts(cache)) <= 3 * (40 if goes_on else 42)
    if goes_on:
        once = run(recipe.replace("budget", "recompress_every=0, budget"))
        assert sum(counts(once)) == 3 * 40 and "scores" not in once.memory().by_kind


@pytest.mark.parametrize("name", ["mistral-sliding", "qwen2-sliding", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("recipe", ["cake(budget=20, window=4)", "layer_defensivekv(budget=20, window=4)"])
def test_sliding_layers_take_no_more_of_the_budget_than_they_can_hold(name: str, recipe: str) -> None:
    cache = run(recipe, name=name)
    sizes = [min(LENGTH, window or LENGTH) for window in cache.geometry.sliding_windows]
    held = [sum(layer.store.lengths) for layer in cache.layers]
    assert sum(held) == 2 * sum(min(20, size) for size in sizes)
    assert all(count <= 2 * size for count, size in zip(held, sizes))


@pytest.mark.parametrize("recipe", ["cake(budget=40, window=8, recompress_every=0)", "layer_defensivekv(budget=40)"])
def test_a_codec_that_follows_waits_and_packs_what_stays_once(recipe: str) -> None:
    codec = "kivi(group_size=16, residual_length=16)"
    together, alone = run(f"{recipe} | {codec}"), run(recipe)
    part: Any = Recipe.parse(codec).parts[0]
    for ours, theirs in zip(together.layers, alone.layers, strict=True):
        theirs.store.recode(part.codec())
        for row in range(2):
            assert all(map(torch.equal, ours.store.entries(row), theirs.store.entries(row)))
            assert ours.store.packed(row) == theirs.store.packed(row)


def test_an_eviction_that_follows_votes_with_its_own_layers_queries() -> None:
    cake = run("cake(budget=40, window=8, recompress_every=0)")
    both = run("cake(budget=40, window=8, recompress_every=0) | tova(budget=5, recompress_every=0)")
    snapshot = finished(take_snapshot(build(), prompt(LENGTH), 2048, Control()))
    for layer, query in zip(cake.layers, snapshot.queries, strict=True):
        tova: Any = Recipe.parse("tova(budget=5)").parts[0]
        view = LayerView(layer, query.last(1), 0)
        tova.after_prefill(view)
        assert [cake.kept(layer.index, head) for head in range(2)] == kept(both)[layer.index]


def test_a_batch_is_refused_in_one_sentence() -> None:
    cache = wb.cache("cake(budget=5)", build())
    with pytest.raises(wb.RecipeError, match="run them one by one") as caught, torch.inference_mode():
        build().network(torch.tensor([prompt(20), prompt(20, seed=1)]), past_key_values=cache)
    assert "\n" not in str(caught.value)


def test_a_prompt_within_the_budget_is_left_as_it_is() -> None:
    for budget in (1.0, LENGTH, LENGTH + 5):
        cache = run(f"cake(budget={budget}, window=8)")
        assert counts(cache) == [LENGTH] * 3 and not cache.layers[0].store.changed
    # One below, it is cut, although the window alone would make up for that; spreading may leave some of the budget.
    assert 3 * (LENGTH - 3) <= sum(counts(run(f"cake(budget={LENGTH - 1}, window=8)"))) <= 3 * (LENGTH - 1)
