"""Laws every strategy of the registry obeys, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import workbench as wb
from tests.builders import ARCHITECTURES, build, feed, network, prompt
from tests.builders import whole_cache_for as cache_for
from workbench.cache.cache import WorkbenchCache
from workbench.strategies.base import tokens_kept, tokens_kept_together
from workbench.strategies.eviction.base import Eviction, StepwiseEviction
from workbench.strategies.recipe import Recipe
from workbench.strategies.registry import registry

LENGTH = 90
EVICTIONS = [key for key, cls in registry().items() if issubclass(cls, Eviction)]
STEPWISE = [key for key in EVICTIONS if issubclass(registry()[key], StepwiseEviction)]
RAGGED = [key for key, cls in registry().items() if cls().ragged]
TOGETHER = {"defensivekv": 1, "layer_defensivekv": 3}  # layers whose heads share a budget that is rounded on their sum
UNEVEN = {"pyramidkv", "cake", "compresskv"}  # layers keep different numbers
GLOBAL = {"headkv"}  # one budget for all layers together
CHUNKS = {"chunkkv"}  # whole chunks: fewer than the budget allows, maybe
EVEN = [key for key in EVICTIONS if key not in {*RAGGED, *UNEVEN, *CHUNKS}]
NEEDS_ROPE = {"expected_attention", "locret"}
BYTES_OF_POSITION = 4


@pytest.fixture(params=EVICTIONS)
def key(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def run(recipe: str, later: int = 0, chunk: int | None = None, name: str = "llama") -> WorkbenchCache:
    """A cache after a prompt and ``later`` generated tokens."""
    cache = cache_for(build(name), recipe, LENGTH)
    feed(build(name), cache, prompt(LENGTH), chunk)
    if later:
        feed(build(name), cache, prompt(later, seed=1), 1)
    return cache


def kept(cache: WorkbenchCache) -> list[list[list[int]]]:
    heads = range(cache.geometry.num_kv_heads)
    return [
        [cache.layers[layer].store.positions(head).tolist() for head in heads] for layer in range(len(cache.layers))
    ]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("chunk", [None, 32])
def test_a_budget_of_everything_is_bit_identical_to_full(key: str, name: str, chunk: int | None) -> None:
    model, ids, later = build(name), prompt(LENGTH), prompt(8, seed=1)
    outputs = []
    for recipe in ("full", f"{key}(budget=1.0)"):
        cache = cache_for(model, recipe, LENGTH)
        outputs.append(
            torch.cat([feed(model, cache, ids, chunk), feed(model, cache, later[:5], 1), feed(model, cache, later[5:])])
        )
    assert torch.equal(*outputs)


@pytest.mark.parametrize("budget", [1, 7, 45, 0.001, 0.1, 0.34, 0.999, LENGTH + 5])
def test_as_many_entries_stay_as_the_budget_says(key: str, budget: float | int) -> None:
    count = tokens_kept(budget, LENGTH)
    layers = kept(run(f"{key}(budget={budget})"))
    if key in EVEN:
        assert all(len(head) == count for layer in layers for head in layer)
    elif key in UNEVEN:
        held = sum(len(head) for layer in layers for head in layer)
        share = budget if isinstance(budget, float) else min(budget, LENGTH) / LENGTH
        assert held <= max(count, share * LENGTH) * len(layers) * len(layers[0]) + len(layers)  # each layer rounds
    elif key in TOGETHER:
        rows = [len(head) for layer in layers for head in layer]
        shared = TOGETHER[key] * len(layers[0])
        expected = tokens_kept_together(budget, LENGTH, shared)
        assert expected <= shared * max(count, budget * LENGTH if isinstance(budget, float) else count)
        assert all(sum(rows[first : first + shared]) == expected for first in range(0, len(rows), shared))
    elif key in GLOBAL:
        assert sum(len(head) for layer in layers for head in layer) == count * len(layers) * len(layers[0])
    elif key in RAGGED:
        assert all(sum(map(len, layer)) == count * len(layer) for layer in layers)
    else:
        assert all(len(head) <= count for layer in layers for head in layer)


def test_kept_positions_ascend_and_are_the_prompts(key: str) -> None:
    for layer in kept(run(f"{key}(budget=0.3)")):
        for head in layer:
            assert head == sorted(set(head)) and set(head) <= set(range(LENGTH))


def test_bytes_fall_with_the_budget_and_are_what_the_budget_says(key: str) -> None:
    full = run("full").memory().used_bytes
    sizes = [run(f"{key}(budget={budget})").memory().used_bytes for budget in (1.0, 0.5, 0.25, 0.1)]
    assert sizes[0] == full and sizes == sorted(set(sizes), reverse=True)
    entries = full // build().geometry.bytes_per_token
    rows = build().geometry.num_layers * build().geometry.num_kv_heads
    for budget, size in zip((0.5, 0.25, 0.1), sizes[1:]):
        per_entry = BYTES_OF_POSITION + (
            4 if registry()[key]().needs_prompt else 0
        )  # and a float32 score where it goes on
        rounding = 3 * (full // entries + rows * per_entry) if key in UNEVEN else 0
        assert size <= budget * (full + entries * rows * per_entry) + rounding


def test_chunks_of_the_prompt_do_not_change_what_stays(key: str) -> None:
    assert kept(run(f"{key}(budget=0.3)", chunk=17)) == kept(run(f"{key}(budget=0.3)"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_strategy_runs_on_every_architecture(key: str, name: str) -> None:
    if key in NEEDS_ROPE and name == "gpt2":
        with pytest.raises(wb.RecipeError, match=f"{key} needs rotary position embeddings"):
            run(key, name=name)
        return
    cache = run(f"{key}(budget=0.2)", later=3, chunk=40, name=name)
    assert cache.get_seq_length() == LENGTH + 3
    for window, layer in zip(cache.geometry.sliding_windows, kept(cache)):
        for head in layer:
            assert head == sorted(set(head)) and head[-1] == LENGTH + 2
            assert window is None or head[0] >= LENGTH - window


def attention_mask(held: list[list[int]], heads: int, tokens: int) -> torch.Tensor:
    """Causal over ``tokens``, where the queries after the prompt do not see what the prompt's layer dropped."""
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().repeat(1, heads, 1, 1)
    for head, positions in enumerate(held):
        group = heads // len(held)
        gone = sorted(set(range(LENGTH)) - set(positions))
        for q in range(head * group, (head + 1) * group):
            mask[0, q, LENGTH:, gone] = False
    return mask


ONCE = [f"{key}(budget=0.2{', recompress_every=0' if key in STEPWISE else ''})" for key in EVICTIONS]
EMPTY_HEADS = ['random(budget=1, allocator="flat", seed=1)', 'knorm(budget=1, allocator="global")']
SMALL_WINDOWS = [
    "cake(budget=20, window=4, recompress_every=0)",
    "defensivekv(budget=20, window=4)",
    "layer_defensivekv(budget=20, window=4)",
    'adakv(scorer="critical", budget=20, window=4)',
]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-neox"])
@pytest.mark.parametrize("recipe", [*ONCE, *EMPTY_HEADS, *SMALL_WINDOWS])
def test_generation_after_eviction_is_the_model_under_a_mask(recipe: str, name: str) -> None:
    """Against plain eager attention with, per layer and head, a mask that hides what was dropped."""
    model, ids, later = build(name), prompt(LENGTH), prompt(6, seed=1)
    cache = cache_for(model, recipe)
    feed(model, cache, ids)
    held = kept(cache)
    assert recipe not in EMPTY_HEADS or any(not head for layer in held for head in layer)
    ours = feed(model, cache, later, 1)

    plain, heads = network(name, "eager"), model.geometry.num_heads
    layers = plain.gpt_neox.layers if name == "gpt-neox" else plain.model.layers
    hooks = []
    for number, layer in enumerate(layers):
        bias = torch.zeros(()).masked_fill(~attention_mask(held[number], heads, LENGTH + 6), -torch.inf)
        attention = layer.attention if name == "gpt-neox" else layer.self_attn
        hooks.append(
            attention.register_forward_pre_hook(
                lambda module, args, kwargs, bias=bias: (args, {**kwargs, "attention_mask": bias}), with_kwargs=True
            )
        )
    try:
        with torch.inference_mode():
            expected = plain(torch.tensor([ids + later]), use_cache=False).logits[0, LENGTH:]
    finally:
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("key", STEPWISE)
@pytest.mark.parametrize("every", [1, 4])
def test_stepwise_methods_keep_their_count_while_generating(key: str, every: int) -> None:
    cache = cache_for(build(), f"{key}(budget=20, recompress_every={every})")
    feed(build(), cache, prompt(LENGTH))
    for turn, token in enumerate(prompt(9, seed=1), 1):
        feed(build(), cache, [token])
        held = kept(cache)
        assert [[len(head) for head in layer] for layer in held] == [[20 + turn % every] * 2] * 3
        assert all(head[-1] == LENGTH + turn - 1 or every == 1 for layer in held for head in layer)


@pytest.mark.parametrize("key", STEPWISE)
def test_recompress_every_0_acts_once(key: str) -> None:
    cache = run(f"{key}(budget=20, recompress_every=0)", later=5)
    assert cache.layers[0].store.lengths == [25, 25]
    assert "scores" not in cache.memory().by_kind  # nothing it would need again is held
    assert not Recipe.parse(f"{key}(recompress_every=0)").parts[0].keeps_acting


@pytest.mark.parametrize("scorer", [key for key in EVICTIONS if registry()[key].scores_alone])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_adakv_takes_every_scorer_and_guards_every_head(scorer: str, alpha: float) -> None:
    cache = run(f'adakv(scorer="{scorer}", budget=20, alpha={alpha})', later=2)
    for layer in kept(cache):
        assert sum(map(len, layer)) == 44
        assert min(map(len, layer)) >= int(20 * alpha) + 2
    if alpha == 1.0 and scorer in EVEN:
        once = ", recompress_every=0" if scorer in STEPWISE else ""
        inner = run(f"{scorer}(budget=20{once})")
        assert [[h[:20] for h in layer] for layer in kept(cache)] == kept(inner)


def test_prompts_no_longer_than_the_window_run_everywhere(key: str) -> None:
    for tokens in (1, 2, 5, 33):
        cache = cache_for(build(), f"{key}(budget=3)")
        feed(build(), cache, prompt(tokens))
        feed(build(), cache, prompt(2, seed=1), 1)
        held = min(tokens + 2, 3) if key in STEPWISE else min(tokens, 3) + 2
        entries = sum(len(h) for h in kept(cache)[0])
        assert entries <= 2 * held if key in UNEVEN | CHUNKS else entries == 2 * held


@pytest.mark.parametrize("key", EVEN)
def test_eviction_then_codes_and_codes_then_eviction(key: str) -> None:
    once = f"{key}(budget=40, recompress_every=0)" if key in STEPWISE else f"{key}(budget=40)"
    alone = run(once)
    for recipe in (
        f"{once} | kivi(group_size=16, residual_length=16)",
        f"kivi(group_size=16, residual_length=16) | {once}",
    ):
        cache = run(recipe, later=4)
        assert cache.layers[0].store.lengths == [44, 44]
        assert cache.layers[0].store.packed(0) == 28  # 40 - 16 values after the prompt, and one with each token
        assert cache.memory().used_bytes < alone.memory().used_bytes
    first = run(f"{once} | kivi(group_size=16, residual_length=16)")
    assert kept(first) == kept(alone)  # the first chooses on exact keys


@pytest.mark.parametrize("first", ["snapkv(budget=89, window=4)", "knorm(budget=88)", "tova(budget=87)"])
@pytest.mark.parametrize("second", ["h2o", "observed_attention", 'critical(scorer="h2o")'])
def test_what_was_noted_of_entries_stays_in_step_when_another_method_evicts(first: str, second: str) -> None:
    """The second method chooses among what is left by the same sums as it would alone."""
    recipe = second.replace(")", ", budget=10)") if "(" in second else f"{second}(budget=10)"
    once = recipe.replace("budget=10", "budget=10, recompress_every=0") if second == "h2o" else recipe
    alone, together, before = (kept(run(text)) for text in (once, f"{first} | {once}", first))
    for layer in range(3):
        for head in range(2):
            lost = set(range(LENGTH)) - set(before[layer][head])
            assert len(set(alone[layer][head]) - lost - set(together[layer][head])) <= len(lost)
            if not lost & set(alone[layer][head]):
                assert alone[layer][head] == together[layer][head]
