"""DefensiveKV, Layer-DefensiveKV and CriticalKV: the card's worked examples, and what their budgets promise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.builders import build, cache_for, feed, prompt
from workbench.cache.cache import WorkbenchCache
from workbench.strategies.eviction.allocators.global_ import best_rows
from workbench.strategies.eviction.base import PROTECTED, flat_rows, select_top
from workbench.strategies.eviction.critical import CriticalKV, value_norms
from workbench.strategies.eviction.defensivekv import DefensiveKV, aggregated, carriers, pool_within_rows

LENGTH = 91
FIRST = [[0.60, 0.10, 0.10, 0.15, 0.05], [0.50, 0, 0.40, 0.05, 0.05]]
SECOND = [[0.10, 0.10, 0.10, 0.20, 0.50], [0.30, 0.30, 0.20, 0.10, 0.10]]


def run(recipe: str, length: int = LENGTH, name: str = "llama") -> WorkbenchCache:
    cache = cache_for(build(name), recipe, length)
    feed(build(name), cache, prompt(length))
    return cache


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_card_aggregation() -> None:
    alone = torch.tensor([FIRST])[None, None]  # [B, H, G, W, P]
    close(aggregated(alone, "mean")[0, 0], [0.55, 0.05, 0.25, 0.10, 0.05])
    close(aggregated(alone, "max")[0, 0], [0.60, 0.10, 0.40, 0.15, 0.05])
    close(aggregated(alone, "max_prior")[0, 0], [0.60, 0.26, 0.40, 0.26, 0.26])
    group = torch.tensor([FIRST, SECOND])[None, None]
    close(aggregated(group, "max")[0, 0], [0.60, 0.30, 0.40, 0.20, 0.50])
    close(aggregated(group, "max_prior")[0, 0], [0.60, 0.40, 0.40, 0.40, 0.50])


def test_card_pooling_leaves_every_rows_sum() -> None:
    group = torch.tensor([FIRST, SECOND])[None, None]
    pooled = pool_within_rows(group, 3)
    close(pooled[0, 0, 0, 0], [0.297872, 0.340426, 0.148936, 0.127660, 0.085106])
    torch.testing.assert_close(pooled.sum(-1), group.sum(-1))
    close(aggregated(pooled, "max_prior")[0, 0], [0.304198, 0.367347, 0.304198, 0.333333, 0.304198])
    assert torch.equal(pool_within_rows(torch.zeros(1, 4), 3), torch.zeros(1, 4))  # a head that looks nowhere


ROWS = torch.tensor(
    [
        [[0.50, 0.10, 0.10, 0.05, 0.05, 0], [0.40, 0.05, 0.20, 0.05, 0.05, 0.05]],
        [[0.10] * 6, [0.05, 0.05, 0.05, 0.05, 0.05, 0.45]],
    ]
)[None, :, None]  # [B, H, G, W, P]
NORMS = torch.tensor([[1.0, 2, 1, 1, 1, 1], [1, 1, 1, 1, 3, 1]])[None]


def card_view() -> Any:
    """A window of two after six entries; values of one channel whose projections have the card's norms."""
    return SimpleNamespace(
        window_attention=lambda window: F.pad(ROWS, (0, 2), value=0.1),
        values=lambda: F.pad(NORMS, (0, 2), value=1.0)[..., None],
        output_weight=lambda: torch.ones(2, 1, 1),
        length=8,
        prompt_length=8,
    )


def test_card_end_to_end() -> None:
    method = DefensiveKV(window=2, kernel=1, bias="none", budget=0.5)
    average = ROWS.mean((2, 3))
    assert carriers(average, torch.full((1, 1, 1), 0.9), 99).sum(-1).tolist() == [[3, 5]]
    close(aggregated(ROWS, "max_prior")[0, 0], [0.5, *[0.158333] * 1, 0.2, *[0.158333] * 3])
    scores = method.score(card_view())
    close(scores[0, 0], [0.25, 0.105556, 0.1, 0.079167, 0.039583, 0.079167, PROTECTED, PROTECTED])
    close(scores[0, 1], [0.079167, 0.052778, 0.079167, 0.079167, 0.11875, 0.25, PROTECTED, PROTECTED])
    assert [row.tolist() for row in flat_rows(scores, 8)] == [[0, 1, 6, 7], [4, 5, 6, 7]]


@pytest.mark.parametrize("budget", [0.25, 0.3, 0.5, 0.75, 0.9])
def test_the_window_outlives_what_comes_first(budget: float) -> None:
    scores = DefensiveKV(window=2, kernel=1, bias="none", mass=1.0, budget=budget).score(card_view())
    for row in flat_rows(scores, int(8 * budget * 2)):
        assert row.tolist()[-2:] == [6, 7]


@pytest.mark.parametrize("budget, most", [(0.1, 0), (0.2, 1), (0.5, 52), (20, 0), (100, 52), (1.0, 136)])
def test_a_small_budget_lets_nothing_come_first(budget: float | int, most: int) -> None:
    view: Any = SimpleNamespace(prompt_length=200)
    assert DefensiveKV(budget=budget).most(view, 168) == most


def test_no_mass_turns_the_first_stage_off() -> None:
    average = ROWS.mean((2, 3))
    for mass in (0.0, -0.3):
        assert not carriers(average, torch.full((1, 1, 1), mass), 99).any()
    assert carriers(average, torch.full((1, 1, 1), 2.0), 99).all()  # never reached: all of them, not none
    assert carriers(average, torch.full((1, 1, 1), 0.9), 2).sum(-1).tolist() == [[2, 2]]


def test_what_the_mass_is_reduced_by() -> None:
    attention = F.pad(ROWS, (0, 2), value=0.1)
    found = {bias: float(DefensiveKV(window=2, bias=bias).lost(attention, 6)) for bias in ("before", "window", "none")}
    assert found == {"before": pytest.approx((0.05 + 0.1 + 0.2 + 0.5) / 4), "window": pytest.approx(0.2), "none": 0.0}


def test_with_one_query_and_no_group_the_largest_is_the_mean() -> None:
    attention = torch.rand(1, 2, 1, 1, 9)
    assert torch.equal(aggregated(attention, "max"), aggregated(attention, "mean"))
    attention = torch.rand(1, 2, 3, 4, 9)
    prior = aggregated(attention, "max").mean(-1, keepdim=True)
    assert (aggregated(attention, "max_prior") >= prior).all()


@pytest.mark.parametrize("window", [1, 8, 32])
@pytest.mark.parametrize("budget", [0.34, 0.5, 0.77])
def test_the_sum_is_the_cards(budget: float, window: int) -> None:
    held = [sum(layer.store.lengths) for layer in run(f"defensivekv(budget={budget}, window={window})").layers]
    assert held == [int(LENGTH * budget * 2)] * 3
    cache = run(f"layer_defensivekv(budget={budget}, window={window})")
    assert sum(sum(layer.store.lengths) for layer in cache.layers) == int(LENGTH * budget * 2 * 3)


@pytest.mark.parametrize("aggregation", ["mean", "max", "max_prior"])
def test_every_head_keeps_the_window_and_its_own_number(aggregation: str) -> None:
    for key in ("defensivekv", "layer_defensivekv"):
        cache = run(f'{key}(budget=30, window=6, aggregation="{aggregation}")')
        rows = [cache.kept(layer, head) for layer in range(3) for head in range(2)]
        assert all(row[-6:] == list(range(LENGTH - 6, LENGTH)) for row in rows)
        assert len(set(map(len, rows))) > 1


def test_the_global_budget_goes_where_the_scores_are() -> None:
    low, high = torch.tensor([[[1.0, 2, 3, 4], [0.5, 0.2, 0.1, 0]]]), torch.tensor([[[9.0, 8, 7, 6], [5, 5, 5, 5]]])
    rows = best_rows([low, high], 6)
    assert [[row.tolist() for row in layer] for layer in rows] == [[[], []], [[0, 1, 2, 3], [2, 3]]]
    short = high[..., 2:]  # a sliding layer's entries are the newest
    rows = best_rows([low, short], 5)
    assert [[row.tolist() for row in layer] for layer in rows] == [[[3], []], [[0, 1], [0, 1]]]
    ties = [torch.zeros(1, 2, 4), torch.zeros(1, 2, 2)]
    assert [[row.tolist() for row in layer] for layer in best_rows(ties, 5)] == [[[3], [3]], [[1], [0, 1]]]


def test_rows_of_a_batch_share_no_budget() -> None:
    scores = [torch.rand(3, 2, 7) for _ in range(4)]
    together = best_rows(scores, 20)
    for b in range(3):
        alone = best_rows([layer[b : b + 1] for layer in scores], 20)
        for layer, rows in zip(together, alone, strict=True):
            assert [row.tolist() for row in layer[2 * b : 2 * b + 2]] == [row.tolist() for row in rows]


@pytest.mark.parametrize("scorer", ["knorm", "random", "snapkv"])
def test_flat_is_adakv_without_its_safeguard(scorer: str) -> None:
    flat, safe = run(f'{scorer}(budget=20, allocator="flat")'), run(f'adakv(scorer="{scorer}", budget=20, alpha=0.0)')
    assert all(flat.kept(layer, head) == safe.kept(layer, head) for layer in range(3) for head in range(2))


def test_value_norms_are_those_of_the_projected_values(monkeypatch: pytest.MonkeyPatch) -> None:
    values, weight = torch.randn(2, 2, 11, 4), torch.randn(6, 4, 9)  # three query heads a KV head
    projected = values.repeat_interleave(3, 1) @ weight  # [B, Hq, n, hidden]
    expected = projected.abs().sum(-1).unflatten(1, (2, 3)).mean(2)
    torch.testing.assert_close(value_norms(values, weight), expected)
    monkeypatch.setattr("workbench.strategies.eviction.critical.BLOCK", 4)
    torch.testing.assert_close(value_norms(values, weight), expected)


def test_critical_weighs_by_values_after_a_first_stage() -> None:
    plain = torch.tensor([[[0.3, 0.2, 0.1, 0.05, PROTECTED]]])
    norms = torch.tensor([1.0, 1.0, 5.0, 20.0, 0.0])
    view: Any = SimpleNamespace(
        prompt_length=5, length=5, values=lambda: norms.view(1, 1, 5, 1), output_weight=lambda: torch.ones(1, 1, 1)
    )
    method = CriticalKV(budget=4, first_stage=0.5, epsilon=0.1)
    inner: Any = SimpleNamespace(score=lambda view: plain)
    method._parts = (*method._parts[:2], inner)
    close(method.score(view)[0, 0], [PROTECTED, 0.3, 1.0, 3.0, PROTECTED])
    assert select_top(method.score(view), 3)[0, 0].tolist() == [0, 3, 4]


def rows(recipe: str) -> list[list[int]]:
    cache = run(recipe)
    return [cache.kept(layer, head) for layer in range(3) for head in range(2)]


def test_critical_keeps_the_first_stage_and_chooses_the_rest_by_values() -> None:
    found = rows("critical(budget=30, window=6)")
    for held, first in zip(found, rows("snapkv(budget=15, window=6)"), strict=True):
        assert len(held) == 30 and set(first) <= set(held)
    assert found != rows("snapkv(budget=30, window=6)")
    assert rows("critical(budget=30, window=6, first_stage=1.0)") == rows("snapkv(budget=30, window=6)")


@pytest.mark.parametrize("allocator", ["adakv", "flat", "global"])
def test_heads_that_share_a_budget_get_it_by_need_and_choose_within(allocator: str) -> None:
    plain = rows(f'snapkv(budget=20, window=6, allocator="{allocator}")')
    critical = rows(f'critical(budget=20, window=6, allocator="{allocator}")')
    assert [len(row) for row in critical] == [len(row) for row in plain] and critical != plain
    for held, first in zip(critical, plain, strict=True):
        assert set(range(LENGTH - 6, LENGTH)) <= set(held) and len(set(held) & set(first)) >= len(held) // 2


def test_ada_critical_is_critical_under_adakv_and_its_safeguard_goes_by_need() -> None:
    assert rows('adakv(scorer="critical", budget=20, window=6)') == rows(
        'critical(budget=20, window=6, allocator="adakv")'
    )
    assert rows('adakv(scorer="critical", budget=20, window=6, alpha=1.0)') == rows("snapkv(budget=20, window=6)")
