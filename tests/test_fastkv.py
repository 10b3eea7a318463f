"""FastKV: the card's worked example and invariants, and what the later layers are given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import workbench as wb
from tests.builders import ARCHITECTURES, build, cache_for, feed, network, prompt
from workbench.cache.cache import WorkbenchCache
from workbench.models.load import Model
from workbench.runs.prompt import read_through
from workbench.strategies.base import tokens_kept
from workbench.strategies.eviction.base import select_top
from workbench.strategies.eviction.fastkv import FastKV
from workbench.strategies.recipe import Recipe

LENGTH = 90
KIVI = "kivi(group_size=16, residual_length=16)"

CARD = torch.tensor(  # attention summed over the window, per query head, five tokens before the window
    [
        [0.50, 0.05, 0.12, 0.03, 0.10],
        [0.10, 0.15, 0.20, 0.07, 0.30],
        [0.08, 0.60, 0.02, 0.11, 0.04],
        [0.01, 0.22, 0.13, 0.35, 0.17],
    ]
)


def card_view(window: int = 1) -> Any:
    """Two KV heads of two query heads; the sums fall on the first of the window's queries."""
    votes = torch.zeros(1, 2, 2, window, 5 + window)
    votes[:, :, :, 0, :5] = CARD.view(1, 2, 2, 5)
    votes[..., 5:] = 0.01  # what the window pays itself; no score
    at = torch.arange(5 + window, dtype=torch.int32).expand(1, 2, -1)
    return SimpleNamespace(
        window_attention=lambda asked: votes, length=5 + window, prompt_length=5 + window, positions=lambda: at
    )


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_card_group_sums_and_what_is_kept(window: int, pooling: str) -> None:
    fastkv = FastKV(window=window, kernel=1, pooling=pooling)
    scores = fastkv.score(card_view(window))[0]
    sums = torch.tensor([[0.60, 0.20, 0.32, 0.10, 0.40], [0.09, 0.82, 0.15, 0.46, 0.21]])
    torch.testing.assert_close(scores[:, :5], sums)
    assert scores[:, 5:].isinf().all()
    newest = list(range(5, 5 + window))
    assert select_top(scores, 2 + window).tolist() == [[0, 4, *newest], [1, 3, *newest]]
    share = (3 + window) / (5 + window) + 1e-6
    going_on = FastKV(window=window, kernel=1, tsp_rate=share).going_on(card_view(window))
    assert going_on.tolist() == [0, 1, 4, *newest]  # importance .69, 1.02, .47, .56, .61


def test_card_average_over_three_neighbours() -> None:
    fastkv = FastKV(window=1, kernel=3, pooling="avg", tsp_rate=0.67)
    scores = fastkv.score(card_view())[0]
    expected = torch.tensor(
        [[0.266667, 0.373333, 0.206667, 0.273333, 0.166667], [0.303333, 0.353333, 0.476667, 0.273333, 0.223333]]
    )
    torch.testing.assert_close(scores[:, :5], expected, atol=1e-6, rtol=0)
    assert select_top(scores, 3).tolist() == [[1, 3, 5], [1, 2, 5]]
    assert fastkv.going_on(card_view()).tolist() == [0, 1, 2, 5]


def test_maxima_are_taken_per_query_head_and_then_summed() -> None:
    scores = FastKV(window=1, kernel=3).score(card_view())[0, :, :5]
    per_head = [[max(row[max(0, i - 1) : i + 2]) for i in range(5)] for row in CARD.tolist()]
    expected = [[a + b for a, b in zip(*pair, strict=True)] for pair in (per_head[:2], per_head[2:])]
    torch.testing.assert_close(scores, torch.tensor(expected))
    first_sums = F.max_pool1d(CARD.view(2, 2, 5).sum(1), 3, stride=1, padding=1)
    assert not torch.allclose(scores, first_sums)  # the other order is another score


@pytest.mark.parametrize("tokens, kept, going_on", [(10_000, 1000, 2000), (1003, 100, 200), (15, 1, 8), (5, 1, 5)])
def test_card_lengths(tokens: int, kept: int, going_on: int) -> None:
    """The window of 8 always goes on. Later layers keep the prompt's share, never a rounded share of a share."""
    fastkv = FastKV(budget=0.1, tsp_rate=0.2)
    assert (tokens_kept(fastkv.budget, tokens), fastkv.tokens_going_on(tokens)) == (kept, going_on)


def test_a_share_of_a_share_is_not_rounded_twice() -> None:
    cache = run("fastkv(budget=0.3, tsp_rate=0.7)", length=100)  # int(70 * (0.3 / 0.7)) may be 29
    assert [cache.layers[layer].store.lengths for layer in range(3)] == [[30, 30]] * 3


def run(recipe: str, name: str = "llama", chunk: int | None = None, length: int = LENGTH) -> WorkbenchCache:
    return ran(build(name), recipe, chunk, length)[0]


def ran(model: Model, recipe: str, chunk: int | None = None, length: int = LENGTH) -> tuple[WorkbenchCache, Tensor]:
    """The cache and the logits [vocabulary] after the prompt."""
    cache = cache_for(model, recipe, length)
    return cache, read_through(model, cache, prompt(length), chunk or length)


def kept(cache: WorkbenchCache) -> list[list[list[int]]]:
    heads = range(cache.geometry.num_kv_heads)
    return [[cache.kept(layer, head) for head in heads] for layer in range(len(cache.layers))]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("chunk", [None, 32])
def test_everything_kept_and_everything_going_on_is_full_bit_for_bit(name: str, chunk: int | None) -> None:
    (ours, got), (full, expected) = (
        ran(build(name), recipe, chunk) for recipe in ("fastkv(budget=1.0, tsp_rate=1.0)", "full")
    )
    later = prompt(5, seed=1)
    assert torch.equal(got, expected)
    assert torch.equal(feed(build(name), ours, later, 1), feed(build(name), full, later, 1))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt-oss", "mistral-sliding"])
@pytest.mark.parametrize("budget", [20, 0.5])
def test_with_all_tokens_going_on_it_keeps_what_snapkv_keeps(name: str, budget: float) -> None:
    """Sums over the window and the group rank as their means do, where pooling is an average."""
    ours = run(f'fastkv(budget={budget}, tsp_rate=1.0, pooling="avg")', name)
    assert kept(ours) == kept(run(f"snapkv(budget={budget}, window=8, kernel=7)", name))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-neox", "gpt2"])
@pytest.mark.parametrize("chunk", [None, 32])
def test_up_to_the_tsp_layer_everything_is_bit_identical_to_full(name: str, chunk: int | None) -> None:
    states: list[dict[int, list[Tensor]]] = []
    model = build(name)
    for recipe in ("full", "fastkv(budget=0.1, tsp_rate=0.3)"):
        states.append({0: [], 1: [], 2: []})
        hooks = [
            layer.register_forward_hook(lambda m, i, out, at=number, to=states[-1]: to[at].append(out.clone()))
            for number, layer in enumerate(model.loop.layers)
        ]
        try:
            cache, _ = ran(model, recipe, chunk)
        finally:
            for hook in hooks:
                hook.remove()
    full, ours = ({layer: torch.cat(parts, 1) for layer, parts in one.items()} for one in states)
    assert all(torch.equal(full[layer], ours[layer]) for layer in (0, 1))  # half of three layers: t = 1
    assert ours[2].shape[1] == 27 and full[2].shape[1] == LENGTH
    assert cache.tokens_by_layer == [LENGTH, LENGTH, 27]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("tsp_layer", [0, 1])
def test_tokens_going_on_ascend_hold_the_window_and_do_not_depend_on_chunks(name: str, tsp_layer: int) -> None:
    recipe = f"fastkv(budget=1.0, tsp_rate=0.3, tsp_layer={tsp_layer})"
    cache = run(recipe, name)
    assert cache.tokens_by_layer == [LENGTH] * (tsp_layer + 1) + [27] * (2 - tsp_layer)
    for window, layer in zip(cache.geometry.sliding_windows[tsp_layer + 1 :], kept(cache)[tsp_layer + 1 :]):
        assert layer[0] == layer[1] == sorted(set(layer[0])) and layer[0][-8:] == list(range(LENGTH - 8, LENGTH))
        assert len(layer[0]) == 27 if window is None else min(layer[0]) >= LENGTH - window
    assert kept(run(recipe, name, chunk=17)) == kept(cache)
    assert all(layer.seen == LENGTH for layer in cache.layers)


def test_tokens_that_matter_go_on() -> None:
    """The importance is that of the model's own attention at layer t, by plain eager attention weights."""
    cache = run("fastkv(budget=1.0, tsp_rate=0.3)")
    with torch.inference_mode():
        weights = network("llama", "eager")(torch.tensor([prompt(LENGTH)]), output_attentions=True).attentions[1][0]
    votes = weights[:, -8:].sum(1)[:, :-8]  # [Hq, n - 8]
    importance = F.max_pool1d(votes, 7, stride=1, padding=3).sum(0)
    best = select_top(importance, 27 - 8).tolist()  # maxima are plateaus: of equals, the later token
    assert cache.kept(2, 0) == [*best, *range(LENGTH - 8, LENGTH)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-neox"])
@pytest.mark.parametrize(
    "recipe", ["fastkv(budget=0.15, tsp_rate=0.3)", "fastkv(budget=12, tsp_rate=0.3, tsp_layer=0)"]
)
def test_generation_is_the_model_under_a_mask(name: str, recipe: str) -> None:
    """Against plain eager attention: prompt tokens do not see what stayed behind, later ones not what was dropped."""
    model, ids, later = build(name), prompt(LENGTH), prompt(6, seed=1)
    part = Recipe.parse(recipe).parts[0]
    assert isinstance(part, FastKV)
    t = part.tsp_layer_of(model.geometry)
    entered = run(f"fastkv(budget=1.0, tsp_rate=0.3, tsp_layer={t})", name).kept(2, 0)
    cache, first = ran(model, recipe)
    held = kept(cache)
    got = torch.cat([first[None], feed(model, cache, later, 1)])

    plain, heads, tokens = network(name, "eager"), model.geometry.num_heads, LENGTH + 6
    group = heads // model.geometry.num_kv_heads
    hooks = []
    for number, layer in enumerate(plain.get_decoder().layers):
        visible = torch.ones(tokens, tokens, dtype=torch.bool).tril().repeat(1, heads, 1, 1)
        if number > t:
            behind = sorted(set(range(LENGTH)) - set(entered))
            visible[..., behind] = False
            visible |= torch.eye(tokens, dtype=torch.bool)
        for q in range(heads):
            visible[0, q, LENGTH:, sorted(set(range(LENGTH)) - set(held[number][q // group]))] = False
        bias = torch.zeros(()).masked_fill(~visible, -torch.inf)
        attention = layer.attention if name == "gpt-neox" else layer.self_attn
        hooks.append(
            attention.register_forward_pre_hook(
                lambda module, args, kwargs, bias=bias: (args, {**kwargs, "attention_mask": bias}), with_kwargs=True
            )
        )
    try:
        with torch.inference_mode():
            expected = plain(torch.tensor([ids + later]), use_cache=False).logits[0, LENGTH - 1 :]
    finally:
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_default_tsp_layer_is_half_way_and_sees_everything(name: str) -> None:
    geometry = build(name).geometry
    t = FastKV().tsp_layer_of(geometry)
    full = [layer for layer, window in enumerate(geometry.sliding_windows) if window is None]
    assert t == 1 if 1 in full or not full else t in full


@pytest.mark.parametrize("layers, half", [(1, 0), (2, 0), (6, 2), (32, 15), (40, 19), (36, 17)])
def test_half_the_depth_is_the_papers_layer(layers: int, half: int) -> None:
    assert FastKV().tsp_layer_of(SimpleNamespace(num_layers=layers, sliding_windows=(None,) * layers)) == half


def test_a_tsp_layer_that_is_not_there_is_refused() -> None:
    assert FastKV(tsp_layer=2).tsp_layer_of(build().geometry) == 2
    with pytest.raises(wb.RecipeError, match="layers 0 to 2"):
        wb.compare(build(), prompt(20), ["fastkv(tsp_layer=3)"])
    with pytest.raises(wb.RecipeError, match="tsp_layer must be a whole number between"):
        Recipe.parse("fastkv(tsp_layer=-1)")


def test_a_budget_above_the_tsp_rate_keeps_all_that_later_layers_have() -> None:
    cache = run("fastkv(budget=0.5, tsp_rate=0.2)")
    assert [layer.store.lengths for layer in cache.layers] == [[45, 45], [45, 45], [18, 18]]


@pytest.mark.parametrize("budget, going_on", [(LENGTH + 1, LENGTH), (LENGTH, 18), (30, 18)])
def test_a_prompt_below_a_budget_in_tokens_is_left_alone(budget: int, going_on: int) -> None:
    assert run(f"fastkv(budget={budget})").tokens_by_layer == [LENGTH, LENGTH, going_on]


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 12])
@pytest.mark.parametrize("tsp_rate", [0.0, 0.2, 0.9])
def test_prompts_about_as_long_as_the_window(length: int, tsp_rate: float) -> None:
    cache = run(f"fastkv(budget=0.5, tsp_rate={tsp_rate})", length=length)
    assert cache.tokens_by_layer[2] == min(length, max(8, int(tsp_rate * length)))
    feed(build(), cache, prompt(3, seed=1), 1)
    assert cache.layers[2].store.lengths == [max(1, length // 2) + 3] * 2


def test_bytes_fall_with_both_rates_and_no_later_layer_ever_holds_more_than_it_is_given() -> None:
    full = run("full").memory()
    for tsp_rate in (0.2, 0.5):
        sizes = [run(f"fastkv(budget={b}, tsp_rate={tsp_rate})").memory() for b in (1.0, 0.2, 0.1)]
        assert full.used_bytes > sizes[0].used_bytes > sizes[1].used_bytes > sizes[2].used_bytes
        assert all(sum(m.by_kind.values()) == sum(m.by_layer) == m.used_bytes for m in sizes)
        given = int(LENGTH * tsp_rate) * (full.by_layer[2] // LENGTH + 2 * 4)
        assert sizes[0].by_layer[2] == given  # a position for each entry and head besides
        # Layer t is whole, those before it are cut, and the hidden states of all tokens wait.
        assert sizes[1].peak_bytes == full.by_layer[0] + sizes[1].by_layer[0] + LENGTH * 64 * 4
        assert sizes[1].reserved_bytes <= 3 * 2 * 64 * (full.by_layer[2] // LENGTH + 8)
