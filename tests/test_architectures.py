"""The seam over many architectures: `full` is exactly the model, and the cache drops into `generate`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers

import workbench as wb
from tests.builders import ARCHITECTURES, SIZES, WINDOW, build, cache_for, feed, network, plain, prompt
from workbench.strategies.recipe import Recipe

LENGTH = 29  # longer than three sliding windows


@pytest.fixture(params=ARCHITECTURES)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


@pytest.mark.parametrize("chunk", [None, 1, 5, WINDOW, LENGTH - 1])
def test_full_gives_the_logits_of_plain_transformers(name: str, chunk: int | None) -> None:
    ids = prompt(LENGTH)
    with torch.inference_mode():
        expected = plain(name)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(
        feed(build(name), cache_for(build(name), "full", LENGTH), ids, chunk), expected, atol=1e-5, rtol=0
    )


def test_full_gives_the_greedy_tokens_of_plain_transformers(name: str) -> None:
    ids = torch.tensor([prompt(LENGTH)])
    expected = plain(name).generate(ids, max_new_tokens=12, do_sample=False)
    ours = build(name).generate(ids, max_new_tokens=12, do_sample=False, past_key_values=wb.cache("full", build(name)))
    assert ours.tolist() == expected.tolist()


def test_full_samples_the_tokens_of_plain_transformers(name: str) -> None:
    ids, options = torch.tensor([prompt(LENGTH)]), {"max_new_tokens": 6, "do_sample": True, "temperature": 0.9}
    torch.manual_seed(3)
    expected = plain(name).generate(ids, **options)
    torch.manual_seed(3)
    ours = build(name).generate(ids, past_key_values=wb.cache("full", build(name)), **options)
    assert ours.tolist() == expected.tolist()


def test_without_our_cache_the_registered_attention_is_ordinary_attention(name: str) -> None:
    ids = torch.tensor([prompt(LENGTH)])
    with torch.inference_mode():
        torch.testing.assert_close(
            build(name).network(ids, use_cache=False).logits, plain(name)(ids).logits, atol=1e-5, rtol=0
        )


def test_every_row_of_a_left_padded_batch_equals_the_row_alone(name: str) -> None:
    rows = [prompt(LENGTH), prompt(11, seed=1), prompt(3, seed=2)]
    ids = torch.tensor([[0] * (LENGTH - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (LENGTH - len(row)) + [1] * len(row) for row in rows])
    together = build(name).generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, past_key_values=wb.cache("full", build(name))
    )
    for got, row in zip(together, rows, strict=True):
        alone = plain(name).generate(torch.tensor([row]), max_new_tokens=5, do_sample=False)
        assert got[LENGTH:].tolist() == alone[0, len(row) :].tolist()


@pytest.mark.parametrize("recipe", ["snapkv(budget=1.0)", "kivi(group_size=16, residual_length=64)"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_recipes_that_change_nothing_yet_are_bit_identical_to_full(name: str, recipe: str, chunk: int | None) -> None:
    model, ids, later = build(name), prompt(LENGTH), prompt(6, seed=5)
    caches = [cache_for(model, "full", LENGTH), cache_for(model, recipe, LENGTH)]
    outputs = [torch.cat([feed(model, cache, ids, chunk), feed(model, cache, later, 1)]) for cache in caches]
    assert torch.equal(*outputs)
    assert sum(caches[0].memory().by_layer) == sum(caches[1].memory().by_layer)


@pytest.mark.parametrize(
    "recipe", ["snapkv(budget=6, window=4)", "h2o(budget=9)", "adakv(budget=8, window=4)", "tova(budget=7)"]
)
def test_generate_takes_the_cache_as_it_is(name: str, recipe: str) -> None:
    model, ids = build(name), torch.tensor([prompt(LENGTH)])
    cache = wb.cache(recipe, model)
    out = model.generate(ids, max_new_tokens=5, do_sample=False, past_key_values=cache)
    assert out.shape == (1, LENGTH + 5)
    assert cache.get_seq_length() == LENGTH + 4  # tokens seen, not kept
    step = Recipe.parse(recipe).parts[0].keeps_acting
    count = Recipe.parse(recipe).parts[0].budget
    total = sum(cache.layers[0].store.lengths) / cache.layers[0].store.rows
    window = model.geometry.sliding_windows[0]
    held = min(count, window) if window else count  # what the prompt leaves, plus the fed tokens
    assert total == (held if step and not window else min(total, held + 4))


@pytest.mark.parametrize("chunk", [16, 64])
def test_prefill_of_sliding_layers_holds_about_a_window(chunk: int) -> None:
    model = build("mistral-sliding")
    cache = cache_for(model, "full", 400)
    feed(model, cache, prompt(400), chunk)
    entry = model.geometry.bytes_per_token
    assert cache.memory().used_bytes == WINDOW * entry
    assert cache.peak_bytes <= (WINDOW + chunk + 64) * entry
    assert cache.memory().used_bytes + cache.memory().reserved_bytes <= (2 * WINDOW + chunk + 3 * 64) * entry


def test_long_generation_with_sliding_layers_stays_bounded_under_every_kind_of_store() -> None:
    model = build("mistral-sliding")
    for recipe in ("full", "knorm(budget=5)", "adakv(budget=5, window=2)", "kivi(group_size=16, residual_length=16)"):
        cache = cache_for(model, recipe, 40)
        feed(model, cache, prompt(40))
        feed(model, cache, prompt(200, seed=9), 1)
        # a window, up to 64 tokens not cleared yet, and for kivi a residual and a group besides
        assert max(cache.layers[0].store.lengths) <= WINDOW + 64 + 2 * 16, recipe


def test_beam_search_is_refused_in_one_sentence() -> None:
    model, ids = build(), torch.tensor([prompt(8)])
    with pytest.raises(wb.WorkbenchError, match="num_beams=1"):
        model.generate(ids, num_beams=2, max_new_tokens=4, past_key_values=wb.cache("full", model))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_attention_implementation_is_refused_before_it_ignores_the_cache(attention: str) -> None:
    other = network("llama", attention)
    with pytest.raises(wb.ModelError, match=r"set_attn_implementation\('workbench'\)"):
        wb.cache("full", other)


def test_a_cache_used_by_another_attention_implementation_says_so() -> None:
    cache = cache_for(build())
    with pytest.raises(wb.WorkbenchError, match="did not run through this cache"):
        network("llama", "sdpa").generate(torch.tensor([prompt(8)]), max_new_tokens=3, past_key_values=cache)


def test_a_transformers_model_is_taken_as_well_as_ours() -> None:
    out = build().network.generate(
        torch.tensor([prompt(8)]), max_new_tokens=3, past_key_values=wb.cache("full", build().network)
    )
    assert out.shape == (1, 11)


def test_recipes_refuse_padded_batches_in_one_sentence() -> None:
    model = build()
    mask = torch.tensor([[0, 1, 1, 1]])
    with pytest.raises(wb.WorkbenchError, match="one by one"):
        model.network(torch.tensor([[0, 5, 6, 7]]), attention_mask=mask, past_key_values=wb.cache("knorm", model))


def test_the_recipe_acts_even_where_a_chunk_passes_the_end_of_the_prompt() -> None:
    model = build()
    cache = cache_for(model, "knorm(budget=5)", 10)
    feed(model, cache, prompt(LENGTH))
    assert cache.layers[0].store.lengths == [5, 5]


@pytest.mark.parametrize(
    "config",
    [
        transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4),
        transformers.Qwen3NextConfig(**SIZES, layer_types=["linear_attention", "linear_attention", "full_attention"]),
    ],
    ids=["state-space", "hybrid"],
)
def test_models_without_a_plain_cache_are_refused_by_load(config: transformers.PreTrainedConfig, tmp_path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(wb.ModelError, match="choose a model") as caught:
        wb.load(str(tmp_path))
    assert str(caught.value).count(". ") == 0
