"""FastKV among other methods and in lanes: what it goes with, and layers that hold different positions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import workbench as wb
from tests.builders import SIZES, build, cache_for, feed, prompt, random_model
from tests.test_fastkv import KIVI, LENGTH, kept, ran, run
from workbench.runs.prompt import read_through
from workbench.runs.reference import QueryRecorder
from workbench.strategies.eviction.base import select_top
from workbench.strategies.eviction.expected_attention import ExpectedAttention
from workbench.strategies.recipe import Recipe


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
    at, q, keys, got = layer_with_gaps("expected_attention(budget=9, n_future=1, use_vnorm=False)", chunk)
    bare = build().geometry.ropes[2].unrotate(q, at)[:, :, int((at < 4).sum()) :]
    mean = bare.mean(2)
    spread = (bare - mean[:, :, None]).mT @ (bare - mean[:, :, None])
    view = SimpleNamespace(
        state={"mean": mean, "spread": spread, "queries": torch.tensor(bare.shape[2])},
        positions=lambda: at.expand(1, 2, -1),
        keys=lambda: keys,
        chunk=q,
        seen=LENGTH,
        rope=build().geometry.ropes[2],
        kv_heads=2,
        scale=16**-0.5,
    )
    scores = ExpectedAttention(n_future=1, use_vnorm=False).score(view)[0]  # type: ignore[arg-type]
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
