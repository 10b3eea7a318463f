"""The forward pass that runs layers one by one: the model's own while all tokens go on, and exact when some stay behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import workbench as wb
from tests.builders import ARCHITECTURES, SIZES, build, cache_for, feed, network, prompt, random_model
from workbench.cache.cache import WorkbenchCache
from workbench.cache.layer import LayerView
from workbench.models.layerwise import LayerwisePrefill
from workbench.models.load import Model
from workbench.runs.control import Control
from workbench.runs.prompt import Cancelled, read
from workbench.strategies.base import Strategy
from workbench.strategies.recipe import Recipe

LENGTH = 45  # longer than five sliding windows
GOING_ON = [0, 3, 4, 5, 11, 20, 26, 27, 29, 30, 31, 33, 38, 39, 40, 42, 43, 44]


class Fixed(Strategy):
    """Lets the tokens at given positions go on after given layers, and drops no entry."""

    key, family = "fixed", "eviction"
    needs_token_set = True

    def __init__(self, going_on: dict[int, list[int]]) -> None:
        super().__init__()
        self.after = going_on

    def after_prefill(self, view: LayerView) -> None:
        if view.layer in self.after:
            view.pass_on(torch.tensor(self.after[view.layer]))


def thinned(model: Model, going_on: dict[int, list[int]]) -> WorkbenchCache:
    return WorkbenchCache(Recipe((Fixed(going_on),), "fixed"), model.geometry, LENGTH)


def by_layer(model: Model, cache: WorkbenchCache, ids: list[int], chunk: int | None = None) -> Tensor:
    """Logits [vocabulary] after the prompt."""
    with torch.inference_mode():
        reading = LayerwisePrefill(model.loop, cache, torch.tensor([ids]), chunk or len(ids))
        while not reading.finished:
            reading.step()
        return reading.logits()


def plainly(model: Model, cache: WorkbenchCache, ids: list[int], chunk: int | None = None) -> Tensor:
    """The same as a run reads it; through the model's own forward where no token stays behind."""
    reading = read(model, cache, ids, chunk or len(ids), Control())
    while True:
        try:
            next(reading)
        except StopIteration as finished:
            return finished.value


@pytest.mark.parametrize("chunk", [None, 1, 8, 19])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_with_all_tokens_it_is_the_models_own_forward_bit_for_bit(name: str, chunk: int | None) -> None:
    model, ids, later = build(name), prompt(LENGTH), prompt(4, seed=1)
    for recipe in ("full", "snapkv(budget=12, window=5)"):
        ours, theirs = cache_for(model, recipe, LENGTH), cache_for(model, recipe, LENGTH)
        assert torch.equal(by_layer(model, ours, ids, chunk), plainly(model, theirs, ids, chunk))
        for a, b in zip(ours.layers, theirs.layers, strict=True):
            assert a.seen == b.seen == LENGTH and a.prompt_tokens == b.prompt_tokens == LENGTH
            for row in range(a.store.rows):
                assert all(torch.equal(x, y) for x, y in zip(a.store.entries(row), b.store.entries(row), strict=True))
        assert replace(ours.memory(), peak_bytes=0) == replace(theirs.memory(), peak_bytes=0)
        waiting = LENGTH * model.geometry.hidden_size * 4
        assert ours.peak_bytes <= theirs.peak_bytes + waiting  # and at most one layer is whole and not yet compressed
        assert torch.equal(feed(model, ours, later, 1), feed(model, theirs, later, 1))


def expected(name: str, ids: list[int], entered: list[list[int]]) -> Tensor:
    """Logits [tokens, vocabulary] by plain eager attention, in which nobody sees what did not enter a layer.

    All tokens are computed everywhere, but those that stayed behind are read by no other, so that the rest come out as
    if they were not there.
    """
    plain, model = network(name, "eager"), build(name)
    base, tokens = plain.get_decoder(), len(ids)
    hooks = []
    for number, layer in enumerate(base.h if name == "gpt2" else base.layers):
        there = torch.zeros(tokens, dtype=torch.bool)
        there[[*entered[number], *range(LENGTH, tokens)]] = True
        at = torch.arange(tokens)
        visible = (at <= at[:, None]) & (there | (at == at[:, None]))
        window = model.geometry.sliding_windows[number]
        if window is not None:
            visible &= at > at[:, None] - window
        bias = torch.zeros(1, 1, tokens, tokens).masked_fill(~visible, -torch.inf)
        attention = next(m for n, m in layer.named_children() if n in ("self_attn", "attention", "attn"))
        hooks.append(
            attention.register_forward_pre_hook(
                lambda module, args, kwargs, bias=bias: (args, {**kwargs, "attention_mask": bias}), with_kwargs=True
            )
        )
    try:
        with torch.inference_mode():
            return plain(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_that_stay_behind_are_as_if_masked(name: str, chunk: int | None) -> None:
    model, ids, later = build(name), prompt(LENGTH), prompt(6, seed=1)
    cache = thinned(model, {1: GOING_ON})
    first = by_layer(model, cache, ids, chunk)
    got = torch.cat([first[None], feed(model, cache, later[:3], 1), feed(model, cache, later[3:])])
    entered = [list(range(LENGTH)), list(range(LENGTH)), GOING_ON]
    torch.testing.assert_close(got, expected(name, ids + later, entered)[LENGTH - 1 :], atol=2e-5, rtol=0)
    assert cache.tokens_by_layer == [LENGTH, LENGTH, len(GOING_ON)]
    assert cache.get_seq_length() == LENGTH + 6 and all(layer.seen == LENGTH + 6 for layer in cache.layers)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt2"])
def test_the_set_may_shrink_again_and_again(name: str) -> None:
    model, ids, later = build(name), prompt(LENGTH), prompt(3, seed=1)
    fewer = GOING_ON[::3] + [LENGTH - 1]
    cache = thinned(model, {0: GOING_ON, 1: fewer})
    first = by_layer(model, cache, ids, 5)
    got = torch.cat([first[None], feed(model, cache, later, 1)])
    entered = [list(range(LENGTH)), GOING_ON, fewer]
    torch.testing.assert_close(got, expected(name, ids + later, entered)[LENGTH - 1 :], atol=2e-5, rtol=0)
    assert cache.tokens_by_layer == [LENGTH, len(GOING_ON), len(fewer)]


def test_later_layers_hold_and_count_the_positions_they_were_given() -> None:
    model = build()
    cache = thinned(model, {0: GOING_ON})
    by_layer(model, cache, prompt(LENGTH), 8)
    assert [cache.kept(layer, 0) for layer in range(3)] == [list(range(LENGTH)), GOING_ON, GOING_ON]
    entry, rows = model.geometry.bytes_per_token // 3, model.geometry.num_kv_heads
    memory = cache.memory()
    assert memory.by_layer == [LENGTH * entry] + [len(GOING_ON) * (entry + 4 * rows)] * 2
    assert memory.by_kind["positions"] == 2 * 4 * rows * len(GOING_ON)
    assert memory.peak_bytes == memory.used_bytes + len(GOING_ON) * 64 * 4  # and the hidden states on their way
    assert memory.reserved_bytes <= 3 * 2 * 64 * (entry + 4 * rows)  # no room for tokens that never come
    twin = cache.clone()
    assert twin.tokens_by_layer == cache.tokens_by_layer and twin.kept(2, 1) == GOING_ON
    assert torch.allclose(feed(model, twin, [5, 6, 7]), feed(model, cache, [5, 6, 7]), atol=1e-5)


def test_a_thinned_layer_votes_with_the_queries_it_was_given() -> None:
    """Six votes in chunks of four tokens: the queries' positions have gaps, and each sees what lies before it."""
    seen: list[Tensor] = []

    class Watching(Fixed):
        query_window = 6

        def after_prefill(self, view: LayerView) -> None:
            super().after_prefill(view)
            seen.append(view.window_attention(6))

    model = build("mistral-sliding")
    cache = WorkbenchCache(Recipe((Watching({0: GOING_ON}),), "watching"), model.geometry, LENGTH)
    by_layer(model, cache, prompt(LENGTH), 4)
    at, asked = torch.tensor(cache.kept(1, 0)), torch.tensor(GOING_ON[-6:])[:, None]
    visible = (at <= asked) & (at > asked - 8)
    assert torch.equal(seen[1][0, 0, 0] > 0, visible)
    torch.testing.assert_close(seen[1].sum(-1), torch.ones(seen[1].shape[:-1]))


def test_progress_rises_to_the_whole_prompt_and_a_cancel_is_heard_between_chunks() -> None:
    model, control = build(), Control()
    cache = thinned(model, {1: GOING_ON})
    done = list(read(model, cache, prompt(LENGTH), 15, control))
    assert done == sorted(set(done)) and done[-1] == LENGTH and done[2] == LENGTH // 3
    assert len(done) == 3 + 3 + 2  # the last layer is given 18 tokens
    control.cancel()
    with pytest.raises(Cancelled):
        list(read(model, thinned(model, {1: GOING_ON}), prompt(LENGTH), 15, control))


@pytest.mark.parametrize("going_on", [[1, 5, 20], [5, 1, 44], [1, 5, 44, 45]])
def test_a_choice_that_cannot_be_is_refused(going_on: list[int]) -> None:
    with pytest.raises(wb.WorkbenchError, match="correct what it passes on"):
        by_layer(build(), thinned(build(), {1: going_on}), prompt(LENGTH))


def test_a_strategy_must_say_beforehand_that_it_leaves_tokens_behind() -> None:
    class Quiet(Fixed):
        needs_token_set = False

    cache = WorkbenchCache(Recipe((Quiet({1: GOING_ON}),), "quiet"), build().geometry, LENGTH)
    with pytest.raises(wb.WorkbenchError, match="needs_token_set must be True"):
        plainly(build(), cache, prompt(LENGTH))


@pytest.mark.parametrize(
    "config",
    [
        transformers.GraniteConfig(**SIZES, embedding_multiplier=3.0),  # scales its embeddings in the loop itself
        transformers.OPTConfig(
            vocab_size=97, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
        ),
    ],
    ids=["granite", "opt"],
)
def test_a_model_with_another_loop_is_refused_in_one_sentence_that_names_what_works(config: Any) -> None:
    model = random_model(config)
    with pytest.raises(wb.ModelError, match="snapkv") as caught:
        model.loop
    assert config.model_type in str(caught.value) and str(caught.value).count(". ") == 0


def test_a_loop_that_only_happens_to_be_the_same_is_taken() -> None:
    model = random_model(transformers.GraniteConfig(**SIZES))  # all its multipliers are 1
    cache = cache_for(model, "full", LENGTH)
    assert torch.equal(by_layer(model, cache, prompt(LENGTH)), plainly(model, cache_for(model), prompt(LENGTH)))
