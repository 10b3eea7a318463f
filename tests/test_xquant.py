"""XQuant and XQuant-CL: the method card's worked examples, exact bytes, and what must hold on every architecture."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import workbench as wb
from tests.builders import ARCHITECTURES, SIZES, build, cache_for, feed, prompt
from workbench.cache import inputs
from workbench.cache.cache import WorkbenchCache
from workbench.cache.inputs import DeltaSegment, InputSegment, JointLatent, LatentPair, WholeInput
from workbench.cache.schemes.base import Scheme, Verbatim
from workbench.cache.schemes.rtn import PerToken
from workbench.cache.segments import Query
from workbench.models.load import Model
from workbench.models.rebuild import Latents, Rebuild
from workbench_kernels import attention_reference

LENGTH = 90
SMALL = "group_size=16, residual_length=16"
CL = "base_layer=0, residual_length=16"
EXACT = [
    "xquant(bits=16)",
    "xquant(bits=16, hold='input', residual_length=16)",
    "xquant(bits=16, hold='latent', residual_length=7)",
    f"xquant_cl(bits=16, base_bits=16, {CL})",
]
LOSSY = [f"xquant({SMALL})", f"xquant(hold='input', {SMALL})", f"xquant_cl(group_size=32, {CL})"]
FULL_ATTENTION = [n for n in ARCHITECTURES if not any(build(n).geometry.sliding_windows)]


@functools.cache
def narrow() -> Model:
    """One KV head of 8 dims and an input of 64: differences are coded along 16 directions."""
    config = transformers.Qwen2Config(**SIZES | {"num_key_value_heads": 1}, head_dim=8)
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="workbench")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.15)
    return Model("test/narrow", network.eval(), None)


def run(model: Model, recipe: str, later: int = 20, chunk: int | None = None) -> tuple[Tensor, WorkbenchCache]:
    """Logits of the tokens after the prompt, one by one, and the cache."""
    cache = cache_for(model, recipe, LENGTH)
    feed(model, cache, prompt(LENGTH), chunk)
    return feed(model, cache, prompt(later, seed=1), 1), cache


# -- the card, section 7 -------------------------------------------------------------------------------------------------

X = torch.tensor([[1.0, 2, 0, -1], [0, 1, 3, 2], [2, -1, 1, 0]])
WK = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 0]])
PLAIN = {"norm": None, "flat": False, "rope": None, "copies": []}


def test_card_latents() -> None:
    latents = Latents.of(WK.T)
    z = X @ latents.down.T
    torch.testing.assert_close(latents.up.norm(dim=0), torch.tensor([2.497212, 1.328131]))  # the singular values
    expected = torch.tensor([[0.205727, 1.638581], [3.096155, 1.720256], [1.169203, 0.518969]])
    torch.testing.assert_close(z.abs(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(z @ latents.up.T, torch.tensor([[-1.0, 2], [7, 4], [3, 0]]), atol=1e-5, rtol=0)


def test_card_latents_rebuild_keys_and_values() -> None:
    rebuild = Rebuild((WK.T, None), (-WK.T, torch.tensor([0.5, 0.0])), heads=1, **PLAIN)
    k, v = rebuild.of_latents(rebuild.to_latents(X[None]), torch.arange(3))
    torch.testing.assert_close(k[0, 0], X @ WK, atol=1e-5, rtol=0)
    torch.testing.assert_close(v[0, 0], torch.tensor([0.5, 0.0]) - X @ WK, atol=1e-5, rtol=0)


class Fours(Scheme):
    """2 bits over groups of 4, as in the card; no words are packed, since these would take groups of 16."""

    kinds = {"numbers": "codes"}

    def encode(self, x: Tensor, at: Tensor | None) -> dict[str, Tensor]:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        step = (high - low) / 3
        return {"numbers": ((x - low) / step).round() * step + low}

    def decode(self, parts: dict[str, Tensor], span: object, dtype: torch.dtype, at: Tensor | None) -> Tensor:
        return parts["numbers"]


def stack(layers: Sequence[Tensor], base: Scheme, later: Scheme) -> list[InputSegment]:
    """Inputs [n, d] of consecutive layers, the first held by itself, the others as differences."""
    rebuild = Rebuild((WK.T, None), (WK.T, None), heads=1, **PLAIN)
    segments: list[InputSegment] = [InputSegment(1, 1, WholeInput(rebuild, [base]), 1)]
    segments += [DeltaSegment(1, 1, WholeInput(rebuild, [later]), 1, segments[0]) for _ in layers[1:]]
    for below, segment in zip(segments, segments[1:]):
        segment.rest_on(below)
    for segment, x in zip(segments, layers):
        segment.load(x[None, None], None)
    return segments


def test_card_cross_layer() -> None:
    inputs_of_layers = [4.0, -2, 1, 0], [4.3, -1.9, 1.2, -0.3], [4.2, -1.4, 1.9, -0.2]
    layers = [
        torch.tensor([row], dtype=torch.float64) for row in inputs_of_layers
    ]  # 0.2 lies midway between two codes: as the card rounds
    segments = stack(layers, Verbatim("inputs"), Fours())
    back = [segment.rows(0, 1)[0, 0] for segment in segments]
    torch.testing.assert_close(back[1], torch.tensor([[4.3, -1.9, 1.3, -0.3]]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(back[2], torch.tensor([[4.2, -1.3, 1.9, -0.166667]]).double(), atol=1e-6, rtol=0)
    assert (back[2] - layers[2]).abs().max() == pytest.approx(0.1, abs=1e-6)
    alone = Fours().encode(layers[2], None)["numbers"]
    assert (alone - layers[2]).abs().max() == pytest.approx(0.6667, abs=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**16), st.sampled_from([2, 4, 8]), st.integers(2, 6), st.floats(0.01, 3.0))
def test_an_error_is_that_of_its_own_layer_and_does_not_add_up(seed: int, bits: int, depth: int, drift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = drift * torch.randn(depth, 5, 32, generator=generator)
    steps[0] *= 10
    layers = list(steps.cumsum(0))
    scheme = PerToken(bits, 16)
    segments = stack(layers, scheme, scheme)
    for below, segment, x in zip([None, *segments], segments, layers):
        coded = x if below is None else x - below.rows(0, 5)[0, 0]
        grouped = coded.unflatten(-1, (-1, 16))
        step = (grouped.amax(-1) - grouped.amin(-1)) / ((1 << bits) - 1)
        error = (segment.rows(0, 5)[0, 0] - x).unflatten(-1, (-1, 16)).abs().amax(-1)
        assert (error <= 0.5 * step + 2e-3 * grouped.abs().amax(-1) + 1e-5).all()


# -- exactness: hooks, biases, norms, positions, chunks ------------------------------------------------------------------


@pytest.mark.parametrize("recipe, chunk", list(zip(EXACT, (None, 7, 33, 7))))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_not_quantized_gives_the_logits_of_the_full_cache(name: str, recipe: str, chunk: int | None) -> None:
    model = build(name)
    if "xquant_cl" in recipe and name not in FULL_ATTENTION:
        with pytest.raises(wb.RecipeError, match="sliding-window layers.*use xquant"):
            cache_for(model, recipe)
        return
    ours, cache = run(model, recipe, chunk=chunk)
    torch.testing.assert_close(ours, run(model, "full")[0], atol=1e-5, rtol=0)
    assert all(isinstance(layer.store.segments[0], InputSegment) for layer in cache.layers)


@pytest.mark.parametrize("recipe", EXACT)
def test_differences_along_singular_vectors_give_exact_keys_and_values(recipe: str) -> None:
    ours, cache = run(narrow(), recipe, chunk=40)
    torch.testing.assert_close(ours, run(narrow(), "full")[0], atol=1e-5, rtol=0)
    if "xquant_cl" in recipe:
        assert isinstance(cache.layers[2].store.segments[0].form, JointLatent)


@pytest.mark.parametrize("recipe", EXACT[:2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rebuilds_within_its_rounding(recipe: str, dtype: torch.dtype) -> None:
    config = ARCHITECTURES["qwen3"]()
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="workbench").to(dtype).eval()
    model = Model("test/half", network, None)
    ours, full = run(model, recipe)[0].float(), run(model, "full")[0].float()
    assert torch.nn.functional.cosine_similarity(ours, full, dim=-1).min() > 0.999


@pytest.mark.parametrize("recipe", [*EXACT, *LOSSY])
def test_chunks_of_the_prompt_and_of_the_answer_make_no_difference(recipe: str) -> None:
    model = narrow() if "cl" in recipe else build()
    _, whole = run(model, recipe, later=1)
    _, pieces = run(model, recipe, later=1, chunk=13)
    for a, b in zip(whole.layers, pieces.layers):
        torch.testing.assert_close(a.store.keys(), b.store.keys(), atol=2e-2, rtol=2e-2)
        assert a.nbytes() == b.nbytes() and a.store.positions(0).tolist() == list(range(LENGTH + 1))
    at_once = cache_for(model, recipe, LENGTH)
    feed(model, at_once, prompt(LENGTH))
    one_by_one = at_once.clone()
    later = prompt(40, seed=1)
    feed(model, at_once, later)
    feed(model, one_by_one, later, 1)
    assert at_once.memory().by_kind == one_by_one.memory().by_kind


@pytest.mark.parametrize("recipe", LOSSY)
def test_more_bits_are_nearer(recipe: str) -> None:
    model = narrow() if "cl" in recipe else build()
    full = run(model, "full")[0]
    errors = [float((run(model, recipe.replace("(", f"(bits={bits}, "))[0] - full).norm()) for bits in (2, 4, 8)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.1 * float(full.norm())


@pytest.mark.parametrize("recipe", [*EXACT, *LOSSY])
def test_attention_in_blocks_is_attention_over_all_rebuilt_entries(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "BLOCK", 24)  # no divisor of the groups
    made: list[int] = []
    finished = Rebuild._finished
    monkeypatch.setattr(
        Rebuild, "_finished", lambda self, k, v, at: (made.append(k.shape[1]), finished(self, k, v, at))[1]
    )
    model = narrow() if "cl" in recipe else build("qwen2")
    _, cache = run(model, recipe)
    assert max(made) == 24 + 1  # a query's own entry is always in the last block
    for layer in cache.layers:
        q = torch.randn(1, 4, 2, model.geometry.head_dim, generator=torch.Generator().manual_seed(0))
        ours = layer.store.attend(Query(q, layer.seen, False, 0.3))
        expected, _ = attention_reference(q, layer.store.keys(), layer.store.values(), 0.3)
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


# -- bytes ---------------------------------------------------------------------------------------------------------------


def scaled(numbers: int, bits: int, group: int) -> tuple[int, int]:
    """Bytes of codes, and of a float16 scale and minimum a group."""
    return numbers * bits // 8, numbers // group * 4


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_of_an_input_are_the_cards(bits: int) -> None:
    _, cache = run(build("gpt-neox"), f"xquant(bits={bits}, group_size=64, residual_length=64)", later=6)  # MHA, d = 64
    codes, scales = scaled(64 * 64, bits, 64)
    kinds = cache.memory().by_kind
    assert kinds == {"codes": 3 * codes, "scales": 3 * scales, "window": 3 * 32 * 64 * 4}
    # the fraction of the float16 K and V of these tokens: (bits + 32 / group) / 32
    assert (codes + scales) / (2 * 64 * 64 * 2) == (bits + 32 / 64) / 32


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_of_latents_are_the_cards(bits: int) -> None:
    _, cache = run(build(), f"xquant(bits={bits}, group_size=16, residual_length=32)", later=10)  # 100 tokens, C = 32
    codes, scales = scaled(96 * 64, bits, 16)
    assert cache.memory().by_kind == {"codes": 3 * codes, "scales": 3 * scales, "window": 3 * 4 * 64 * 4}
    assert (codes + scales) / (2 * 96 * 32 * 2) == (bits + 32 / 16) / 16
    assert isinstance(cache.layers[0].store.segments[0].form, LatentPair)
    assert cache.memory().factor_bytes == 3 * 4 * 2 * (32 * 64 + 32 * 32)  # Uk, Uv [d, C] and the fused [C, C]
    assert cache.memory().used_bytes == sum(cache.memory().by_kind.values()) == sum(cache.memory().by_layer)


def test_bytes_of_differences_count_every_layers_once() -> None:
    _, cache = run(
        narrow(), "xquant_cl(bits=2, base_bits=4, group_size=16, base_layer=1, residual_length=32)", later=10
    )
    base, later = scaled(96 * 64, 4, 16), scaled(96 * 16, 2, 16)
    assert cache.memory().by_layer == [sum(base) + 4 * 64 * 4] * 2 + [sum(later) + 4 * 64 * 4]
    assert cache.memory().factor_bytes == 16 * 64 * 4
    twin = cache.clone()
    assert twin.memory().factor_bytes == cache.memory().factor_bytes


def test_the_accumulator_changes_no_number_and_is_counted_once() -> None:
    recipe = "xquant_cl(bits=2, group_size=16, base_layer=0, residual_length=16, accumulator={})"
    (ours, cache), (plain, without) = (run(narrow(), recipe.format(held), later=40) for held in (True, False))
    assert torch.equal(ours, plain)
    kinds = cache.memory().by_kind
    assert (
        kinds.pop("accumulator") == 128 * 64 * 4 and kinds == without.memory().by_kind
    )  # 130 tokens, of which 128 coded
    twin, reference = cache.clone(), without.clone()
    feed(narrow(), cache, prompt(20, seed=3), 1)
    assert torch.equal(feed(narrow(), twin, prompt(20, seed=4), 1), feed(narrow(), reference, prompt(20, seed=4), 1))


def test_a_weight_that_had_to_be_copied_is_counted() -> None:
    _, cache = run(build("gpt-neox"), "xquant(group_size=64, residual_length=64)", later=1)
    assert cache.memory().factor_bytes == 3 * 2 * 64 * 64 * 4  # GPT-NeoX interleaves its rows head by head
    assert run(build("phi3"), f"xquant(hold='input', {SMALL})", later=1)[1].memory().factor_bytes == 0


def test_a_lane_says_what_the_models_matrices_take() -> None:
    lane = wb.compare(build(), prompt(LENGTH), ["full", LOSSY[0]], max_new_tokens=2)[1]
    assert lane.error is None and lane.memory.as_dict()["factor_bytes"] == lane.memory.factor_bytes > 0
    assert lane.memory.ratio is not None and lane.memory.ratio < 0.5
