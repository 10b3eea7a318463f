"""Observed attention, KeyDiff, Expected Attention and re-rotated StreamingLLM: the card's examples, and what they promise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import workbench as wb
from tests.builders import ARCHITECTURES, build, cache_for, feed, network, plain, prompt
from tests.test_eviction_examples import view_of
from workbench.cache.cache import WorkbenchCache
from workbench.cache.layer import LayerView
from workbench.models.rope import Rope
from workbench.strategies.eviction.base import PROTECTED, select_top
from workbench.strategies.eviction.expected_attention import ExpectedAttention
from workbench.strategies.eviction.keydiff import KeyDiff, best_by_block
from workbench.strategies.eviction.observed_attention import ObservedAttention

LENGTH = 60


def after(recipe: str, later: int = 0, chunk: int | None = None, name: str = "llama") -> WorkbenchCache:
    cache = cache_for(build(name), recipe, LENGTH)
    feed(build(name), cache, prompt(LENGTH), chunk)
    if later:
        feed(build(name), cache, prompt(later, seed=1), 1)
    return cache


def kept(cache: WorkbenchCache) -> list[list[int]]:
    return [cache.kept(layer, head) for layer in range(3) for head in range(2)]


# -- observed attention --------------------------------------------------------------------------------------------------


def test_observed_attention_card() -> None:
    rows = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.1, 0.2, 0.6]])
    # Keys are unit vectors, so that a query's components are its logits: attention is then exactly these rows.
    q = torch.log(rows.clamp_min(1e-30))[None, None].expand(1, 4, 4, 4)
    view, _ = view_of(q, torch.eye(4).expand(1, 2, 4, 4).clone())
    observed = ObservedAttention(budget=2)
    observed.on_chunk(view)
    scores = observed.score(view)
    torch.testing.assert_close(scores[0, 0], torch.tensor([0.45, 0.30, 0.35, 0.60]))
    assert select_top(scores, 2)[0].tolist() == [[0, 3], [0, 3]]


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gpt-oss"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_observed_attention_is_what_the_model_itself_pays(
    name: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, score = [], ObservedAttention.score

    def recorded(self: ObservedAttention, view: LayerView) -> Tensor:
        scores.append(score(self, view))
        return scores[-1]

    monkeypatch.setattr(ObservedAttention, "score", recorded)
    after("observed_attention(budget=3)", chunk=chunk, name=name)
    with torch.inference_mode():
        paid = network(name, "eager")(torch.tensor([prompt(LENGTH)]), output_attentions=True).attentions
    assert len(scores) == len(paid) == 3
    for ours, weights in zip(scores, paid):  # [1, 2, n] and [1, 4, T, T]
        sums = weights.sum(2).unflatten(1, (2, 2)).mean(2)
        expected = sums / (LENGTH - torch.arange(LENGTH))
        torch.testing.assert_close(ours, expected[..., LENGTH - ours.shape[-1] :], atol=1e-5, rtol=1e-4)


def test_what_was_noted_while_reading_is_let_go_after_the_prompt() -> None:
    for recipe in (
        "observed_attention(budget=0.3)",
        "expected_attention(budget=0.3)",
        "h2o(budget=0.3, recompress_every=0)",
        'adakv(scorer="h2o", budget=0.3)',
        'adakv(scorer="expected_attention", budget=1.0)',
        'chunkkv(scorer="observed_attention", budget=0.3, chunk_length=5)',
    ):
        assert "scores" not in after(recipe).memory().by_kind, recipe


# -- KeyDiff -------------------------------------------------------------------------------------------------------------

CARD_KEYS = torch.tensor([[1.0, 0], [1, 0], [0, 1], [2, 0]])[None, None].expand(1, 2, 4, 2)


def test_keydiff_card() -> None:
    view, _ = view_of(torch.zeros(1, 4, 1, 2), CARD_KEYS.clone())
    expected = torch.tensor([-0.948683, -0.948683, -0.316228, -0.948683])
    torch.testing.assert_close(KeyDiff().score(view)[0, 0], expected, atol=1e-6, rtol=0)


def test_keydiff_by_block_is_the_naive_loop() -> None:
    keys = torch.randn(1, 1, 50, 8, generator=torch.Generator().manual_seed(0))
    for count, block in ((7, 4), (20, 13), (49, 3), (2, 1)):
        held = list(range(count))
        for start in range(count, 50, block):
            rivals = [*held, *range(start, min(start + block, 50))]
            units = torch.nn.functional.normalize(keys[0, 0, rivals], dim=-1)
            scores = -torch.nn.functional.cosine_similarity(units, units.mean(0, keepdim=True), dim=-1)
            held = sorted(rivals[i] for i in scores.argsort(descending=True)[:count].tolist())
        assert best_by_block(keys, count, block)[0, 0].tolist() == held


def test_keydiff_blocks_as_large_as_the_prompt_are_one_choice() -> None:
    assert kept(after("keydiff(budget=0.3, block=60)")) == kept(after("keydiff(budget=0.3)"))
    assert kept(after("keydiff(budget=0.3, block=4)")) != kept(after("keydiff(budget=0.3)"))


@pytest.mark.parametrize("budget, count", [(0.3, 18), (7, 7), (1.0, 60)])
def test_keydiff_by_block_keeps_its_budget_however_the_prompt_is_read(budget: float, count: int) -> None:
    recipe = f"keydiff(budget={budget}, block=16)"
    once = kept(after(recipe))
    assert all(len(head) == count and head == sorted(set(head)) for head in once)
    assert kept(after(recipe, chunk=13)) == once
    assert kept(after(recipe, name="mistral-sliding"))


def test_keydiff_blocks_are_its_own_and_even() -> None:
    for text in ('keydiff(block=8, allocator="adakv")', 'keydiff(block=8, selector="chunks")'):
        with pytest.raises(wb.RecipeError, match="leave block= out"):
            wb.cache(text, build())
    with pytest.raises(wb.RecipeError, match="no parameter 'block'"):
        wb.cache('adakv(scorer="keydiff", block=8)', build())


# -- Expected Attention --------------------------------------------------------------------------------------------------


def card_view(chunks: list[slice] | None = None, scorer: ExpectedAttention | None = None) -> tuple[Any, Tensor]:
    """The card's layer: one head, D = 2, one frequency of 1, T = 4; and the scores."""
    rope = Rope(torch.tensor([1.0]))
    queries = torch.tensor([[9.0, 9], [1, 0], [0, 1], [1, 1]])[None, None]
    scorer = scorer or ExpectedAttention(n_future=2, sinks=1)
    view: Any = SimpleNamespace(
        rope=rope,
        state={},
        kv_heads=1,
        scale=2**-0.5,
        keys=lambda: torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]])[None, None],
        values=lambda: torch.tensor([[5.0, 0], [1, 0], [2, 0], [0, 3]])[None, None],
        positions=lambda: torch.arange(4, dtype=torch.int32)[None, None],
    )
    for part in chunks or [slice(0, 4)]:
        at = torch.arange(part.start, part.stop)
        view.seen, view.chunk, view.asked = part.stop, rope.rotate(queries[:, :, part], at), lambda at=at: at
        scorer.on_chunk(view)
    return view, scorer.score(view)[0, 0]


@pytest.mark.parametrize("cuts", [[0, 4], [0, 1, 4], [0, 2, 4], [0, 1, 2, 3, 4]])
def test_expected_attention_card(cuts: list[int]) -> None:
    view, scores = card_view([slice(a, b) for a, b in zip(cuts, cuts[1:])])
    mean, spread = view.state["mean"][0, 0], view.state["spread"][0, 0] / 3
    torch.testing.assert_close(mean, torch.tensor([0.666667, 0.666667]), atol=1e-6, rtol=0)
    torch.testing.assert_close(spread, torch.tensor([[0.222222, -0.111111], [-0.111111, 0.222222]]), atol=1e-6, rtol=0)
    turn = view.rope.mean_rotation(torch.arange(4, 6), 2)
    torch.testing.assert_close(turn, torch.tensor([[-0.184991, 0.857863], [-0.857863, -0.184991]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(turn @ mean, torch.tensor([0.448582, -0.695236]), atol=1e-6, rtol=0)
    assert scores[0] == PROTECTED
    torch.testing.assert_close(scores[1:], torch.tensor([0.477204, 0.417656, 0.941904]), atol=1e-6, rtol=0)


def test_expected_attention_card_without_its_parts() -> None:
    _, weights = card_view(scorer=ExpectedAttention(n_future=2, sinks=1, use_vnorm=False))
    torch.testing.assert_close(weights[1:], torch.tensor([0.477204, 0.208828, 0.313968]), atol=1e-6, rtol=0)
    _, raised = card_view(scorer=ExpectedAttention(n_future=2, sinks=1, epsilon=1.0))
    torch.testing.assert_close(raised[1:], torch.tensor([1.477204, 2.417656, 3.941904]), atol=1e-6, rtol=0)
    view, by_mean = card_view(scorer=ExpectedAttention(n_future=2, sinks=1, use_covariance=False, use_vnorm=False))
    logits = torch.tensor([0.448582, -0.695236, 0.448582 - 0.695236]) / 2**0.5
    torch.testing.assert_close(by_mean[1:], logits.softmax(-1), atol=1e-6, rtol=0)
    assert "spread" not in view.state


def test_expected_attention_statistics_are_those_of_the_whole_prompt() -> None:
    """Against float64 moments of queries far from zero, where summing squares in float32 would lose the spread."""
    rope, scorer = Rope(10000.0 ** -(torch.arange(4) / 4)), ExpectedAttention(sinks=3)
    queries = 100 + torch.randn(1, 4, 57, 8, generator=torch.Generator().manual_seed(0))
    view: Any = SimpleNamespace(rope=rope, state={})
    for start in range(0, 57, 10):
        view.seen = min(start + 10, 57)
        at = torch.arange(start, view.seen)
        view.chunk, view.asked = rope.rotate(queries[:, :, start : view.seen], at), lambda at=at: at
        scorer.on_chunk(view)
    exact = queries[:, :, 3:].double()
    centred = exact - exact.mean(2, keepdim=True)
    torch.testing.assert_close(view.state["mean"].double(), exact.mean(2), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(view.state["spread"].double() / 54, centred.mT @ centred / 54, atol=1e-3, rtol=1e-3)
    assert sum(x.numel() for x in view.state.values()) == 4 * 8 + 4 * 8 * 8 + 1  # nothing as long as the prompt


def test_expected_attention_is_the_mean_of_what_future_queries_pay() -> None:
    """With hardly any spread, and one position ahead, it is the softmax of the next query."""
    rope = Rope(10000.0 ** -(torch.arange(4) / 4))
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(8, generator=generator), torch.randn(1, 1, 20, 8, generator=generator)
    view: Any = SimpleNamespace(
        rope=rope,
        state={},
        kv_heads=1,
        scale=8**-0.5,
        seen=20,
        chunk=rope.rotate(query.expand(1, 1, 20, 8), torch.arange(20)),
        asked=lambda: torch.arange(20),
        keys=lambda: keys,
        positions=lambda: torch.arange(20)[None, None],
    )
    scorer = ExpectedAttention(n_future=1, sinks=0, use_vnorm=False)
    scorer.on_chunk(view)
    expected = (rope.rotate(query[None], torch.tensor([20])) @ keys[0, 0].T * 8**-0.5).softmax(-1)
    torch.testing.assert_close(scorer.score(view)[0], expected, atol=1e-5, rtol=1e-4)


def test_expected_attention_keeps_its_sinks_even_where_the_prompt_is_little_more() -> None:
    assert all(head[:4] == [0, 1, 2, 3] for head in kept(after("expected_attention(budget=0.3)")))
    for tokens in (1, 3, 4, 5):
        cache = cache_for(build(), "expected_attention(budget=2)")
        feed(build(), cache, prompt(tokens))
        assert all(len(head) == min(tokens, 2) for head in kept(cache))


def test_expected_attention_is_refused_without_rope_in_whatever_it_is_wrapped() -> None:
    for text in ("expected_attention", 'adakv(scorer="expected_attention")', "snapkv | expected_attention"):
        with pytest.raises(wb.RecipeError, match="expected_attention needs rotary position embeddings"):
            wb.cache(text, build("gpt2"))
        with pytest.raises(wb.RecipeError, match="expected_attention needs rotary position embeddings"):
            wb.compare(build("gpt2"), prompt(9), [text])


# -- StreamingLLM inside the cache's own positions -----------------------------------------------------------------------


def compact(name: str, ids: list[int], later: list[int], count: int, sinks: int, every_step: bool) -> Tensor:
    """Logits [later, vocabulary] of plain transformers over a cache whose keys sit at positions 0, 1, …"""
    network, ropes = plain(name), build(name).geometry.ropes
    cache, layers = DynamicCache(), range(3)
    network(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    bare = [ropes[i].unrotate(cache.layers[i].keys, torch.arange(len(ids))) for i in layers]
    values = [cache.layers[i].values for i in layers]

    def evict() -> None:
        n = bare[0].shape[2]
        index = [*range(sinks), *range(n - count + sinks, n)]
        for i in layers:
            bare[i], values[i] = bare[i][:, :, index], values[i][:, :, index]

    evict()
    out = []
    for token in later:
        n, cache = bare[0].shape[2], DynamicCache()
        for i in layers:
            cache.update(ropes[i].rotate(bare[i], torch.arange(n)), values[i], i)
        asked = {"input_ids": torch.tensor([[token]]), "position_ids": torch.tensor([[n]])}
        out.append(network(**asked, past_key_values=cache, use_cache=True).logits[0])
        for i in layers:
            new = ropes[i].unrotate(cache.layers[i].keys[:, :, -1:], torch.tensor([n]))
            bare[i], values[i] = torch.cat([bare[i], new], 2), cache.layers[i].values
        if every_step:
            evict()
    return torch.cat(out)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-neox", "cohere", "phi3", "olmo2"])
@pytest.mark.parametrize("every", [0, 1])
def test_rerotated_streaming_is_the_model_at_compact_positions(name: str, every: int) -> None:
    later = prompt(9, seed=1)
    cache = cache_for(build(name), f"streaming_llm(budget=20, rerotate=True, recompress_every={every})")
    feed(build(name), cache, prompt(LENGTH))
    ours = feed(build(name), cache, later, 1)
    with torch.inference_mode():
        expected = compact(name, prompt(LENGTH), later, 20, 4, bool(every))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    where_they_were = cache_for(build(name), f"streaming_llm(budget=20, recompress_every={every})")
    feed(build(name), where_they_were, prompt(LENGTH))
    assert (feed(build(name), where_they_were, later, 1) - ours).abs().max() > 1e-2  # it does make a difference
    assert kept(where_they_were) == kept(cache)  # to the keys only


def test_rerotated_streaming_drops_into_generate_and_runs_as_it_is() -> None:
    text = "streaming_llm(budget=20, rerotate=True)"
    ids = torch.tensor([prompt(LENGTH)])
    ours = build().generate(ids, max_new_tokens=6, do_sample=False, past_key_values=wb.cache(text, build()))
    lane = wb.compare(build(), prompt(LENGTH), ["full", text], max_new_tokens=6, first_token="prefill", chunk=17)[1]
    assert ours[0, LENGTH:].tolist() == lane.tokens and lane.error is None
    reused = wb.compare(build(), prompt(LENGTH), ["full", text], max_new_tokens=6, first_token="prefill")[1]
    assert reused.tokens == lane.tokens and reused.kept_positions == lane.kept_positions


def test_rerotated_sinks_are_turned_once_from_the_keys_they_came_with() -> None:
    full, cache = after("full"), cache_for(build(), "streaming_llm(budget=20, rerotate=True)", LENGTH)
    feed(build(), cache, prompt(LENGTH))
    feed(build(), cache, prompt(30, seed=1), 1)
    for number, layer in enumerate(cache.layers):
        came = full.layers[number].store.keys()[:, :, :4]
        place = torch.arange(LENGTH + 30 - 20, LENGTH + 30 - 16)
        turned = build().geometry.ropes[number].move(came, torch.arange(4), place)
        assert torch.equal(layer.store.keys()[:, :, :4], turned)
    assert cache.memory().by_kind["scores"] == 3 * 2 * 4 * 16 * 4  # layers, heads, sinks, head_dim, float32
    assert "scores" not in after("streaming_llm(budget=20, rerotate=True, recompress_every=0)").memory().by_kind


def test_a_fork_of_rerotated_streaming_goes_on_as_its_parent() -> None:
    cache = after("streaming_llm(budget=20, rerotate=True)", later=3)
    twin = cache.clone()
    logits = [feed(build(), each, prompt(5, seed=2), 1) for each in (cache, twin)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [1, 3, 4, 5, 1.0])
def test_rerotated_streaming_with_hardly_room_or_all_of_it(budget: float) -> None:
    cache = after(f"streaming_llm(budget={budget}, rerotate=True)", later=4)
    everything = isinstance(budget, float)
    assert cache.layers[0].store.lengths == [64 if everything else budget] * 2
    if everything:
        assert torch.equal(cache.layers[2].store.keys(), after("full", later=4).layers[2].store.keys())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rerotated_streaming_runs_on_every_architecture_with_rope(name: str) -> None:
    if name == "gpt2":
        with pytest.raises(wb.RecipeError, match=r"streaming_llm\(rerotate=True\) needs rotary position embeddings"):
            after("streaming_llm(rerotate=True)", name=name)
        return
    cache = after("streaming_llm(budget=12, rerotate=True)", later=20, chunk=17, name=name)
    assert cache.get_seq_length() == LENGTH + 20
    for window, layer in zip(cache.geometry.sliding_windows, range(3)):
        assert cache.kept(layer, 0)[-1] == LENGTH + 19
        assert window is not None or cache.kept(layer, 0)[:4] == [0, 1, 2, 3]


def test_rerotate_is_streamings_own() -> None:
    for text in (
        'streaming_llm(rerotate=True, allocator="adakv", recompress_every=0)',
        "streaming_llm(rerotate=True, selector='chunks')",
    ):
        with pytest.raises(wb.RecipeError, match="leave rerotate= out"):
            wb.cache(text, build())
    with pytest.raises(wb.RecipeError, match="no parameter 'rerotate'"):
        wb.cache('adakv(scorer="streaming_llm", rerotate=True)', build())
