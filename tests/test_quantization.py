"""Laws that every quantization method obeys, on small random models."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.builders import ARCHITECTURES, build, cache_for, feed, network, prompt
from tests.test_fastkv import ran
from workbench.cache.cache import WorkbenchCache
from workbench.cache.layer import WorkbenchLayer
from workbench.strategies.registry import registry

LENGTH = 90
SMALL = {  # parameters that fit heads of 16 channels and a short prompt
    "rtn": "group_size=16",
    "kivi": "group_size=16, residual_length=16",
    "gear": "bits=4, outliers=0.1, group_size=16, residual_length=16, rank=2, later_rank=1",
    "zipcache": "residual_length=16",
    "mikv": "bits=4",
    "bfp": "group_size=16",
    "rotatekv": "bits=4, group_size=32",
    "mustafar": "residual_length=8, flush_length=64",
}
METHODS = [  # X caches have laws of their own: test_xquant.py
    key for key, cls in registry().items() if cls.family == "quantization" and not cls().needs_inputs
]
NEEDS_ROPE = {"rotatekv"}
EXACT = ["rtn(bits=16)", "kivi(bits=16)", "mikv(importance=1.0)", "bfp(bits=16)"]


def small(key: str, **more: object) -> str:
    given = ", ".join(
        [*([SMALL[key]] if SMALL.get(key) else []), *(f"{name}={value!r}" for name, value in more.items())]
    )
    return f"{key}({given})"


def run(recipe: str, later: int = 0, chunk: int | None = None, name: str = "llama") -> WorkbenchCache:
    cache = cache_for(build(name), recipe, LENGTH)
    feed(build(name), cache, prompt(LENGTH), chunk)
    if later:
        feed(build(name), cache, prompt(later, seed=1), 1)
    return cache


def logits(recipe: str, length: int = LENGTH, later: int = 6) -> Tensor:
    cache = cache_for(build(), recipe, length)
    feed(build(), cache, prompt(length))
    return feed(build(), cache, prompt(later, seed=1), 1)


def test_every_method_is_tested_here() -> None:
    assert set(METHODS) == set(SMALL)


@pytest.mark.parametrize("recipe", EXACT)
def test_sixteen_bits_are_the_full_cache_to_the_bit(recipe: str) -> None:
    assert torch.equal(logits(recipe), logits("full"))
    assert run(recipe, 3).memory() == run("full", 3).memory()


@pytest.mark.parametrize(
    "key", [key for key in METHODS if key != "mustafar"]
)  # random heads have no small numbers to drop
def test_the_cache_is_smaller_and_the_logits_are_near(key: str) -> None:
    recipe, full = small(key), run("full", 4).memory()
    cache = run(recipe, 4)
    assert cache.memory().used_bytes < 0.75 * full.used_bytes
    assert cache.layers[0].store.changed
    near = torch.nn.functional.cosine_similarity(logits(recipe), logits("full"), dim=-1)
    assert near.min() > 0.8 and not torch.equal(logits(recipe), logits("full"))


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("before", ["snapkv(budget=0.5, window=8)", "adakv(budget=0.4, window=8)", ""])
def test_bytes_positions_and_attention_agree_after_any_eviction(key: str, before: str) -> None:
    recipe = " | ".join(filter(None, [before, small(key)]))
    cache = run(recipe, 40)
    memory = cache.memory()
    assert sum(memory.by_kind.values()) == memory.used_bytes == sum(memory.by_layer)
    exact = run(before or "full", 40)
    for ours, theirs in zip(cache.layers, exact.layers):
        agree(ours, theirs)
    assert [cache.kept(layer, head) for layer in range(3) for head in range(2)] == [
        exact.kept(layer, head) for layer in range(3) for head in range(2)
    ]


def agree(ours: WorkbenchLayer, theirs: WorkbenchLayer) -> None:
    """Entries stand in order, in the model's dtype, near those of a cache that is not quantized, and are what attends."""
    for row in range(2):
        k, v, at = ours.store.entries(row)
        assert at.tolist() == sorted(set(at.tolist())) and at.dtype == torch.int32
        assert torch.equal(at, ours.store.positions(row)) and at.tolist() == theirs.store.positions(row).tolist()
        assert k.dtype == v.dtype == torch.float32 and k.shape == v.shape == (len(at), 16)
        assert torch.isfinite(k).all() and torch.isfinite(v).all()
    if ours.store.uniform:
        stacked = torch.stack([ours.store.entries(row)[0] for row in range(2)])
        torch.testing.assert_close(ours.store.keys()[0], stacked, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_method_runs_on_every_architecture(key: str, name: str) -> None:
    if key in NEEDS_ROPE and name == "gpt2":
        with pytest.raises(wb.RecipeError, match=f"{key} needs rotary position embeddings"):
            run(small(key), name=name)
        return
    cache = run(small(key), later=3, chunk=40, name=name)
    assert cache.get_seq_length() == LENGTH + 3


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("tokens", [1, 2, 15, 17])
def test_the_shortest_prompts(key: str, tokens: int) -> None:
    """One token, and residuals that nothing leaves: as many entries as tokens, finite logits."""
    cache = cache_for(build(), small(key), tokens)
    feed(build(), cache, prompt(tokens))
    said = feed(build(), cache, prompt(20, seed=1), 1)
    assert torch.isfinite(said).all() and cache.layers[0].store.lengths == [tokens + 20] * 2


@pytest.mark.parametrize("key", METHODS)
def test_generated_tokens_and_a_chunk_leave_the_same_entries(key: str) -> None:
    one, at_once = run(small(key)), run(small(key))
    feed(build(), one, prompt(5, seed=1), 1)
    feed(build(), at_once, prompt(5, seed=1))
    for ours, theirs in zip(one.layers, at_once.layers):
        assert ours.store.positions(0).tolist() == theirs.store.positions(0).tolist()
        assert ours.store.lengths == theirs.store.lengths


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("before", ["adakv(budget=0.4, window=8)", ""])
def test_a_fork_goes_its_own_way_and_costs_little(key: str, before: str) -> None:
    recipe = " | ".join(filter(None, [before, small(key)]))
    cache = run(recipe, 20)
    twin = cache.clone()
    reference = run(recipe, 20)
    expected = feed(build(), reference, prompt(40, seed=2), 1)
    feed(build(), cache, prompt(40, seed=3), 1)  # another text, in the parent
    torch.testing.assert_close(feed(build(), twin, prompt(40, seed=2), 1), expected, atol=1e-4, rtol=1e-4)
    assert twin.memory().by_kind == reference.memory().by_kind


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("before", ["", "snapkv(budget=0.25, window=8) | ", "adakv(budget=0.4, window=8) | "])
def test_generate_takes_the_cache_as_it_is(key: str, before: str) -> None:
    model = build()
    ids = torch.tensor([prompt(60)])
    cache = wb.cache(before + small(key), model)
    out = model.network.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=cache)
    assert out.shape == (1, 72) and cache.get_seq_length() == 71


@pytest.mark.parametrize("key", METHODS)
def test_a_batch_of_two_is_each_of_them_alone(key: str) -> None:
    ids = [prompt(50), prompt(50, seed=5)]
    model = network("llama", "workbench")
    # How many sinks are protected is one number for the batch.
    recipe = small(key, **({"pivots": 0} if key == "rotatekv" else {}))
    cache = cache_for(build(), recipe, 50)
    both = torch.tensor(ids)
    with torch.inference_mode():
        model(both, past_key_values=cache)
        for _ in range(3):
            together = model(torch.tensor([[7], [9]]), past_key_values=cache).logits
    for number, token in enumerate((7, 9)):
        alone = cache_for(build(), recipe, 50)
        feed(build(), alone, ids[number])
        said = [feed(build(), alone, [token]) for _ in range(3)][-1]
        torch.testing.assert_close(together[number], said, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("key", METHODS)
def test_a_codec_then_an_eviction(key: str) -> None:
    kept = 80 if key == "mustafar" else 40  # it compresses 64 tokens at a time
    cache = run(f"{small(key)} | knorm(budget={kept})", later=4)
    assert cache.layers[0].store.lengths == [kept + 4] * 2
    assert cache.memory().used_bytes < run(f"knorm(budget={kept})", later=4).memory().used_bytes


@pytest.mark.parametrize("key", METHODS)
def test_long_generation_with_sliding_layers_stays_bounded(key: str) -> None:
    cache = cache_for(build("mistral-sliding"), small(key), 40)
    feed(build("mistral-sliding"), cache, prompt(40))
    feed(build("mistral-sliding"), cache, prompt(300, seed=9), 1)
    assert max(cache.layers[0].store.lengths) <= 8 + 64 + 2 * 64


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("side", ["k_proj", "v_proj"])
def test_numbers_that_no_code_holds_are_refused_in_one_sentence(
    key: str, bad: float, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workbench.cache.store import Store

    append = Store.append

    def spoiled(self: Store, k: Tensor, v: Tensor, *where: object) -> None:
        k, v = k.clone(), v.clone()
        (k if side == "k_proj" else v)[..., 3, 5] = bad
        append(self, k, v, *where)

    monkeypatch.setattr(Store, "append", spoiled)
    if key == "bfp" and (side == "v_proj" or bad == 1e38):
        return  # its values stay as they are, and its exponents reach as far as float32's
    if key == "mustafar" and bad == 1e38:
        return  # what it holds stays as it is
    with pytest.raises(wb.WorkbenchError, match="cannot be quantized.*use a recipe without") as caught:
        run(small(key, **({"importance": 0.0} if key == "mikv" else {})))  # important tokens stay as they are
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("chunk", [LENGTH, 24])
def test_after_a_method_that_gives_later_layers_fewer_tokens(key: str, chunk: int) -> None:
    """Queries and entries then stand at positions with gaps; what stayed behind votes for nothing and is no sink."""
    before = "fastkv(budget=0.5, tsp_rate=0.4, window=8, tsp_layer=0)"
    caches = []
    for recipe in (before, f"{before} | {small(key)}"):
        cache, _ = ran(build(), recipe, chunk, LENGTH)
        feed(build(), cache, prompt(12, seed=1), 1)
        caches.append(cache)
    for ours, theirs in zip(caches[1].layers, caches[0].layers):
        agree(ours, theirs)
