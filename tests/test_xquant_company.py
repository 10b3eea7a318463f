"""X caches beside forks, other caches, evictions and bad input; what they compute is in test_xquant.py."""

from __future__ import annotations

import gc
import math

import pytest
import torch
import transformers
from torch import Tensor

import workbench as wb
from tests.builders import ARCHITECTURES, SIZES, build, cache_for, feed, prompt
from tests.test_xquant import EXACT, LENGTH, LOSSY, narrow, run
from workbench.cache.cache import WorkbenchCache
from workbench.cache.inputs import LatentPair, WholeInput
from workbench.models.geometry import Geometry
from workbench.models.load import Model
from workbench.strategies.eviction.tova import TOVA
from workbench.strategies.recipe import Recipe


def hooks(model: Model) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.network.modules())


# -- forks, hooks, generate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [*EXACT, *LOSSY])
def test_a_fork_goes_its_own_way(recipe: str) -> None:
    model = narrow() if "cl" in recipe else build()
    _, cache = run(model, recipe)
    _, reference = run(model, recipe)
    twin = cache.clone()
    feed(model, cache, prompt(40, seed=3), 1)  # another text, in the parent
    expected = feed(model, reference, prompt(40, seed=2), 1)
    torch.testing.assert_close(feed(model, twin, prompt(40, seed=2), 1), expected, atol=1e-5, rtol=1e-5)
    assert twin.memory().by_kind == reference.memory().by_kind


@pytest.mark.parametrize("recipe", LOSSY)
@pytest.mark.parametrize("raw", [True, False])
def test_generate_takes_the_cache_as_it_is_and_the_model_is_left_as_it_was(recipe: str, raw: bool) -> None:
    model = build("qwen3")
    gc.collect()
    feed(model, cache_for(model), prompt(3))  # hooks of caches that are gone leave now
    assert hooks(model) == 0
    cache = wb.cache(recipe, model.network if raw else model)
    assert hooks(model) == model.geometry.num_layers
    ids = torch.tensor([prompt(60)])
    out = model.network.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=cache)
    assert out.shape == (1, 72) and cache.get_seq_length() == 71
    other = cache_for(model)
    feed(model, other, prompt(9))  # another cache on the same model: nothing of it is heard
    assert all(layer.inputs is None for layer in (*cache.layers, *other.layers)) and cache.get_seq_length() == 71
    del cache
    gc.collect()
    feed(model, other, prompt(2), 1)
    assert hooks(model) == 0


def test_a_run_takes_its_hooks_out_even_where_it_fails() -> None:
    model = Model("test/alone", llama(), None)
    for recipe in (LOSSY[0], "snapkv(budget=6, selector='chunks', window=2) | " + LOSSY[0]):  # no chunk fits the budget
        lane = wb.compare(model, prompt(LENGTH), ["full", recipe], max_new_tokens=3)[1]
        assert (lane.error is None) == (recipe == LOSSY[0])
        assert hooks(model) == 0
    assert "different tokens" in str(lane.error)


def test_a_cache_whose_hooks_are_gone_says_so() -> None:
    _, cache = run(build(), LOSSY[0])
    cache.release()
    cache.release()
    with pytest.raises(wb.WorkbenchError, match="make a new one"):
        feed(build(), cache, prompt(1))


@pytest.mark.parametrize("recipe", LOSSY)
def test_a_batch_of_two_is_each_of_them_alone(recipe: str) -> None:
    model, rows = narrow() if "cl" in recipe else build(), [prompt(50), prompt(50, seed=5)]
    cache = cache_for(model, recipe, 50)
    with torch.inference_mode():
        model.network(torch.tensor(rows), past_key_values=cache)
        together = model.network(torch.tensor([[7], [9]]), past_key_values=cache).logits
    for row, (ids, token) in enumerate(zip(rows, (7, 9))):
        alone = cache_for(model, recipe, 50)
        feed(model, alone, ids)
        torch.testing.assert_close(together[row], feed(model, alone, [token]), atol=2e-3, rtol=2e-3)
    assert sum(sum(layer.store.nbytes_by_row()) for layer in cache.layers) == cache.memory().used_bytes


@pytest.mark.parametrize("recipe", LOSSY)
def test_reusing_a_read_prompt_reads_it_again_for_these(recipe: str) -> None:
    lanes = wb.compare(narrow(), prompt(LENGTH), ["full", recipe], max_new_tokens=5, reuse_prompt=True)
    fresh = wb.compare(narrow(), prompt(LENGTH), ["full", recipe], max_new_tokens=5)
    assert not lanes[1].prefill_reused and lanes[1].tokens == fresh[1].tokens and lanes[1].drift == fresh[1].drift


# -- beside evictions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["xquant", "xquant_cl"])
@pytest.mark.parametrize(
    "eviction", ["snapkv", "adakv", "h2o(recompress_every=0)", "knorm", "headkv", "streaming_llm(rerotate=True)"]
)
@pytest.mark.parametrize("first", [True, False])
def test_heads_that_keep_tokens_of_their_own_are_refused_with_what_works(
    method: str, eviction: str, first: bool
) -> None:
    parts = [eviction, method] if first else [method, eviction]
    with pytest.raises(
        wb.RecipeError, match=r"one row a token for all (heads|layers).*write streaming_llm.*kivi"
    ) as caught:
        Recipe.parse(" | ".join(parts))
    assert str(caught.value).count(". ") == 0


def test_the_offers_of_that_sentence_work_and_layers_are_told_from_heads() -> None:
    for text in (
        "streaming_llm(recompress_every=0) | xquant_cl",
        "chunkkv | xquant",
        "tova(recompress_every=0) | xquant",
    ):
        assert len(Recipe.parse(text).parts) == 2
    for text in (
        "chunkkv | xquant_cl",
        "tova(recompress_every=0) | xquant_cl",
        "streaming_llm(allocator='pyramidkv') | xquant_cl",
    ):
        with pytest.raises(wb.RecipeError, match="for all layers together"):
            Recipe.parse(text)
    with pytest.raises(wb.RecipeError, match="put streaming_llm before it"):
        Recipe.parse("xquant | streaming_llm(recompress_every=0)")
    for text in ("xquant | kivi", "kivi | xquant", "xquant | think", "tova | xquant"):
        with pytest.raises(wb.RecipeError):
            Recipe.parse(text)


@pytest.mark.parametrize(
    "before",
    [
        "streaming_llm(budget=0.5, recompress_every=0)",
        "tova(budget=40, recompress_every=0)",
        "chunkkv(budget=0.6, window=8, chunk_length=8)",
        "snapkv(budget=0.6, window=8, selector='chunks', chunk_length=8, allocator='pyramidkv')",
    ],
)
@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_after_an_eviction_that_heads_share_the_same_tokens_are_rebuilt(before: str, name: str) -> None:
    model = build(name)
    exact, full = run(model, f"{before} | {EXACT[1]}", chunk=33), run(model, before, chunk=33)
    torch.testing.assert_close(exact[0], full[0], atol=1e-5, rtol=0)
    for ours, theirs in zip(exact[1].layers, full[1].layers):
        held = ours.store.positions(1).tolist()
        assert held[-20:] == list(range(LENGTH, LENGTH + 20)) and set(theirs.store.positions(1).tolist()) <= set(held)
    coded = run(model, f"{before} | {LOSSY[0]}")[1].memory()
    assert coded.used_bytes < 0.75 * full[1].memory().used_bytes or name == "gemma2"


def test_differences_add_up_after_an_eviction_that_all_layers_share(monkeypatch: pytest.MonkeyPatch) -> None:
    before = "streaming_llm(budget=0.5, recompress_every=0)"
    exact, full = run(narrow(), f"{before} | {EXACT[3]}"), run(narrow(), before)
    torch.testing.assert_close(exact[0], full[0], atol=1e-5, rtol=0)
    monkeypatch.setattr(TOVA, "keeps_alike", "layers")  # an eviction that says so and does otherwise
    with pytest.raises(wb.WorkbenchError, match="layers kept different tokens"):
        run(narrow(), f"tova(budget=40, recompress_every=0) | {EXACT[3]}")


# -- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe, words",
    [
        ("xquant(residual_length=100)", "multiple of group_size"),
        ("xquant(bits=3)", "bits must be one of 2, 4, 8, 16"),
        ("xquant_cl(base_layer=2)", "no layer lies above base_layer 2"),
        ("xquant_cl", "no layer lies above base_layer 2"),
    ],
)
def test_parameters_that_cannot_be_are_refused(recipe: str, words: str) -> None:
    with pytest.raises(wb.RecipeError, match=words) as caught:
        cache_for(build(), recipe)
    assert "\n" not in str(caught.value)


def test_rows_that_do_not_fill_groups_are_refused_with_what_does() -> None:
    config = transformers.LlamaConfig(**SIZES | {"hidden_size": 48, "num_key_value_heads": 1})
    model = Model(
        "test/odd", transformers.AutoModelForCausalLM.from_config(config, attn_implementation="workbench"), None
    )
    with pytest.raises(wb.RecipeError, match="hidden_size 48 .* not a multiple of group_size 32; use group_size=16"):
        cache_for(model, "xquant(hold='input', group_size=32)")
    with pytest.raises(wb.RecipeError, match="12 times 2 bits is no multiple of 32.*use more bits"):
        cache_for(model, "xquant(bits=2)")


def test_models_that_cannot_be_read_are_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model("test/strange", llama(), None)
    attention = model.network.model.layers[1].self_attn
    monkeypatch.setattr(attention.v_proj, "forward", lambda x, f=attention.v_proj.forward: 2 * f(x))
    with pytest.raises(wb.RecipeError, match="layer 1 of this model makes them in a way that is not known here"):
        cache_for(model, "xquant")
    wrapped = Model("test/wrapped", llama(), None)
    attention = wrapped.network.model.layers[2].self_attn
    attention.k_proj = torch.nn.Sequential(attention.k_proj)  # what adapters and quantized weights do
    with pytest.raises(wb.RecipeError, match="projections of layer 2 of this model cannot be read in full precision"):
        cache_for(wrapped, "xquant")
    assert hooks(wrapped) == hooks(model) == 0
    unknown = Model("test/unknown", llama(), None)
    for layer in unknown.network.model.layers:
        monkeypatch.setattr(layer.self_attn, "layer_idx", 1)
    with pytest.raises(wb.RecipeError, match="not every layer of this model projects"):
        cache_for(unknown, "xquant_cl")
    with pytest.raises(wb.RecipeError, match="only the config"):
        WorkbenchCache(Recipe.parse("xquant"), Geometry.of(ARCHITECTURES["llama"]()))


def llama() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_config(
        ARCHITECTURES["llama"](), attn_implementation="workbench"
    ).eval()


@pytest.mark.parametrize("recipe", LOSSY)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
def test_numbers_that_no_code_holds_are_refused_in_one_sentence(
    recipe: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = WholeInput.rows

    def spoiled(self: WholeInput, x: Tensor) -> Tensor:
        x = x.clone()
        x[..., 3, 5] = bad
        return append(self, x)

    monkeypatch.setattr(WholeInput, "rows", spoiled)
    pair = LatentPair.rows
    monkeypatch.setattr(
        LatentPair, "rows", lambda self, x: pair(self, x.masked_fill(torch.arange(x.shape[1])[:, None] == 3, bad))
    )
    with pytest.raises(wb.WorkbenchError, match="cannot be quantized.*use a recipe without") as caught:
        run(build(), recipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", [*EXACT, *LOSSY])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17])
def test_the_shortest_prompts(recipe: str, tokens: int) -> None:
    cache = cache_for(build(), recipe, tokens)
    feed(build(), cache, prompt(tokens))
    said = feed(build(), cache, prompt(20, seed=1), 1)
    assert torch.isfinite(said).all() and cache.layers[0].store.lengths == [tokens + 20] * 2


def test_long_generation_with_sliding_layers_stays_bounded() -> None:
    model = build("mistral-sliding")
    for recipe in LOSSY[:2]:
        cache = cache_for(model, recipe, 40)
        feed(model, cache, prompt(40))
        feed(model, cache, prompt(200, seed=9), 1)
        assert max(cache.layers[0].store.lengths) <= 8 + 64 + 2 * 16
