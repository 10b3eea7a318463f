"""FastKV: the card's worked example and invariants, what the later layers are given, and lanes whose layers differ."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import workbench as wb
from tests.builders import ARCHITECTURES, SIZES, build, cache_for, feed, network, prompt, random_model
from workbench.cache.cache import WorkbenchCache
from workbench.models.load import Model
from workbench.runs.prompt import read_through
from workbench.runs.reference import QueryRecorder
from workbench.strategies.base import tokens_kept
from workbench.strategies.eviction.base import select_top
from workbench.strategies.eviction.expected_attention import ExpectedAttention
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


@pytest.mark.parametrize("scaled", [False, True])
def test_a_drop_in_cache_refuses_in_one_sentence(scaled: bool) -> None:
    model = build()
    with pytest.raises(wb.RecipeError, match="wb.compare") as caught:
        wb.cache("fastkv" if not scaled else f"fastkv(budget=0.1) | {KIVI}", model)
    assert str(caught.value).count(". ") == 0 and "fastkv" in str(caught.value)
    with pytest.raises(wb.RecipeError, match="model.generate cannot do"):
        feed(model, cache_for(model, "fastkv"), prompt(20))
    ids = torch.tensor([prompt(20)])
    out = model.generate(ids, max_new_tokens=3, past_key_values=wb.cache("fastkv(budget=0.5, tsp_rate=1.0)", model))
    assert out.shape == (1, 23)


def test_two_choices_of_tokens_are_refused() -> None:
    with pytest.raises(wb.RecipeError, match="use one of the two"):
        Recipe.parse("fastkv | fastkv(tsp_layer=2)")
    assert len(Recipe.parse("fastkv | fastkv(tsp_rate=1.0)").parts) == 2
    assert "token_set" in next(s for s in wb.strategies() if s["name"] == "fastkv")["needs"]


def test_what_comes_too_late_or_goes_by_its_own_account_is_refused() -> None:
    for late in ("layer_defensivekv", "cake", 'snapkv(allocator="global")'):
        with pytest.raises(wb.RecipeError, match="put fastkv first"):
            Recipe.parse(f"{late} | fastkv")

        assert len(Recipe.parse(f"fastkv | {late}").parts) == 2
    with pytest.raises(wb.RecipeError, match="take fastkv out"):
        Recipe.parse("fastkv | locret")


def layer_with_gaps(scorer: str, chunk: int) -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
    """Of the last layer, given 27 of 90 tokens: positions [27], queries [1, 4, 27, D], keys; and what ``scorer`` kept."""
    before = "fastkv(budget=1.0, tsp_rate=0.3)"
    recorder = QueryRecorder(LENGTH)
    cache = cache_for(build(), before, LENGTH)
    cache.probes.append(recorder)
    read_through(build(), cache, prompt(LENGTH), chunk)
    query = recorder.take()[2]
    scored = run(f"{before} | {scorer}", chunk=chunk)
    return query.asked(), query.q, cache.layers[2].store.keys(), kept(scored)[2]


@pytest.mark.parametrize("chunk", [LENGTH, 10])
def test_a_mean_over_queries_counts_those_that_the_layer_was_given(chunk: int) -> None:
    at, q, keys, got = layer_with_gaps("observed_attention(budget=9)", chunk)
    logits = torch.einsum("bhgqd,bhkd->bhgqk", q.unflatten(1, (2, 2)), keys) * 16**-0.5
    weights = logits.masked_fill(at > at[:, None], -torch.inf).softmax(-1).sum((2, 3))[0]  # [H, n]
    seen_by = torch.arange(len(at), 0, -1)
    assert [at[row].tolist() for row in select_top(weights / seen_by, 9)] == got
    assert [at[row].tolist() for row in select_top(weights / (LENGTH - at), 9)] != got


@pytest.mark.parametrize("chunk", [LENGTH, 10])
def test_queries_are_turned_back_by_their_own_positions(chunk: int) -> None:
    at, q, keys, got = layer_with_gaps("expected_attention(budget=9)", chunk)
    bare = build().geometry.ropes[2].unrotate(q, at)[:, :, int((at < 4).sum()) :]
    mean = bare.mean(2)
    spread = (bare - mean[:, :, None]).mT @ (bare - mean[:, :, None])
    scored = run("fastkv(budget=1.0, tsp_rate=0.3)").layers[2]
    view = SimpleNamespace(
        state={"mean": mean, "spread": spread, "queries": torch.tensor(bare.shape[2])},
        positions=lambda: at.expand(1, 2, -1),
        keys=lambda: keys,
        values=lambda: scored.store.values(),
        chunk=q,
        seen=LENGTH,
        rope=build().geometry.ropes[2],
        kv_heads=2,
        scale=16**-0.5,
    )
    scores = ExpectedAttention().score(view)[0]  # type: ignore[arg-type]
    assert [at[row].tolist() for row in select_top(scores, 9)] == got


LANES = [
    "full",
    "fastkv(budget=0.2)",
    "fastkv(budget=0.1, tsp_layer=0)",
    'fastkv(budget=0.2, allocator="adakv")',
    f"fastkv(budget=0.4, tsp_rate=0.5) | {KIVI}",
    f"{KIVI} | fastkv(budget=0.2)",
    "snapkv(budget=0.5, window=32) | fastkv(budget=0.2)",
    "fastkv(budget=0.4, tsp_rate=0.5) | snapkv(budget=0.2, window=32)",
    "fastkv(budget=0.4, tsp_rate=0.5) | h2o(budget=0.2)",
    "fastkv(budget=1.0, tsp_rate=0.3)",
    'fastkv(budget=0.2, allocator="cake")',
    'fastkv(budget=0.2, allocator="global")',
    'fastkv(budget=0.2, allocator="headkv")',
    "fastkv(budget=0.4, tsp_rate=0.5) | layer_defensivekv(budget=0.2)",
    "fastkv(budget=0.4, tsp_rate=0.5) | cake(budget=0.2)",
    "fastkv(budget=0.4, tsp_rate=0.5) | critical(budget=0.2)",
    "fastkv(budget=0.4, tsp_rate=0.5) | think(ratio=0.5)",
    "keydiff(budget=0.5) | fastkv(budget=0.2)",
]


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral-sliding", "gpt-oss", "gpt2"])
@pytest.mark.parametrize("first_token", ["replayed", "prefill"])
def test_lanes_whose_layers_hold_other_positions(name: str, first_token: str) -> None:
    model, ids = build(name), prompt(LENGTH)
    options: dict[str, Any] = {"max_new_tokens": 5, "chunk": 32, "first_token": first_token}
    cmp = wb.compare(model, ids, LANES, **options)
    again = wb.compare(model, ids, LANES, reuse_prompt=True, **options)
    for lane, twin in zip(cmp, again, strict=True):
        assert lane.error is None and len(lane.tokens) == 5 and len(lane.kl or []) == 5, lane.recipe
        assert min(lane.kl or []) >= 0 and lane.drift is not None
        assert (lane.tokens, lane.kept_positions, lane.tokens_by_layer) == (
            twin.tokens,
            twin.kept_positions,
            twin.tokens_by_layer,
        )
        assert not twin.prefill_reused  # the first read the prompt, and nobody else starts from there
        for number, layer in enumerate(lane.drift["key_cosine"]):
            early = number <= cmp[1].tokens_by_layer.index(min(cmp[1].tokens_by_layer)) - 1
            if early and not any(part in lane.recipe for part in ("kivi", "think", "tsp_layer=0")):
                assert layer == pytest.approx([1.0] * len(layer), abs=1e-5), lane.recipe  # as in full
    assert cmp[0].tokens_by_layer == [LENGTH] * 3 and min(cmp[1].tokens_by_layer) == 18
    assert cmp[2].tokens_by_layer == [LENGTH, 18, 18]
    assert cmp.why(1, 0) is not None


def test_the_first_token_is_replayed_over_what_each_layer_holds() -> None:
    model, ids, recipe = build(), prompt(LENGTH), "fastkv(budget=0.05, tsp_rate=0.2)"
    (_, first), (cache, _) = ran(model, recipe), ran(model, recipe)
    with cache.replay(), torch.inference_mode():
        at = torch.tensor([[LENGTH - 1]])
        again = model.network(torch.tensor([ids[-1:]]), position_ids=at, past_key_values=cache).logits[0, -1]
    lanes = [
        wb.compare(model, ids, ["full", recipe], max_new_tokens=1, first_token=f)[1] for f in ("prefill", "replayed")
    ]
    assert [lane.tokens for lane in lanes] == [[first.argmax()], [again.argmax()]]
    assert not torch.allclose(first, again) and cache.get_seq_length() == LENGTH
    # What later layers never had is no compression of theirs: asked again, an untouched store answers the same.
    cache, first = ran(model, "fastkv(budget=1.0, tsp_rate=0.2)")
    assert not any(layer.store.changed for layer in cache.layers)
    with cache.replay(), torch.inference_mode():
        again = model.network(torch.tensor([ids[-1:]]), position_ids=at, past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(again, first, atol=1e-5, rtol=0)


def test_kl_is_teacher_forced_on_a_lane_that_read_less() -> None:
    model, ids, recipe = build(), prompt(LENGTH), "fastkv(budget=0.05, tsp_rate=0.1)"
    cmp = wb.compare(model, ids, ["full", recipe], max_new_tokens=8, first_token="prefill")
    logs = []
    for text in ("full", recipe):
        cache, first = ran(model, text)
        logs.append(torch.cat([first[None], feed(model, cache, cmp[0].tokens[:-1], 1)]).log_softmax(-1))
    expected = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    assert cmp[1].kl == pytest.approx(expected.tolist(), abs=1e-5)


def test_it_may_be_the_reference() -> None:
    cmp = wb.compare(build(), prompt(LENGTH), ["fastkv(budget=0.2)", "full", "fastkv(budget=0.2)"], max_new_tokens=5)
    assert [lane.error for lane in cmp] == [None] * 3
    assert cmp[2].kl == [0.0] * 5 and cmp[2].tokens == cmp[0].tokens and cmp[1].memory.ratio > 1
    assert cmp[2].drift["output_relative_l2"] == [[0.0, 0.0]] * 3
    assert cmp.why(1, 2) is not None


def test_a_model_that_cannot_be_run_layer_by_layer_ends_the_lane_alone() -> None:
    model = random_model(transformers.GraniteConfig(**SIZES, embedding_multiplier=3.0))
    cmp = wb.compare(model, prompt(20), ["full", "fastkv", "fastkv(tsp_rate=1.0)"], max_new_tokens=2)
    assert "snapkv(budget=0.25)" in (cmp[1].error or "") and cmp[0].error is None is cmp[2].error


@pytest.mark.parametrize("rate", [0.2, 0.6])
def test_prefill_does_less_work(rate: float) -> None:
    """Counted at the layers' doors: what enters them is what they compute on."""
    model, entered = build(), [0, 0, 0]
    hooks = [
        layer.mlp.register_forward_hook(
            lambda module, given, out, at=number: entered.__setitem__(at, entered[at] + out.shape[1])
        )
        for number, layer in enumerate(model.loop.layers)
    ]
    try:
        cache, _ = ran(model, f"fastkv(tsp_rate={rate})", 32)
    finally:
        for hook in hooks:
            hook.remove()
    assert entered == cache.tokens_by_layer == [LENGTH, LENGTH, int(rate * LENGTH)]
