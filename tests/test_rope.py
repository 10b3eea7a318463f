"""RoPE read from a model: every architecture, every kind of scaling, and the arithmetic of turning."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

import workbench as wb
from tests.builders import ARCHITECTURES, SIZES, build, prompt
from workbench.cache.attention import register
from workbench.models.geometry import Geometry
from workbench.models.rope import Rope, Ropes, closest, frequencies

WITH_ROPE = [name for name in ARCHITECTURES if name != "gpt2"]
LENGTH = 70


def random_network(config: Any) -> Any:
    register()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="workbench").eval()


def rotations(network: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Queries [1, Hq, n, D] before and after each rotation that the model itself makes while it reads a prompt."""
    found = []
    code = sys.modules[type(network).__module__]
    rotate = code.apply_rotary_pos_emb

    def recorded(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        turned = rotate(q, k, *args, **kwargs)
        found.append((q, turned[0]))
        return turned

    monkeypatch.setattr(code, "apply_rotary_pos_emb", recorded)
    with torch.inference_mode():
        network(torch.tensor([prompt(LENGTH)]), use_cache=False)
    return found


def check(ropes: list[Rope], network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, at = rotations(network, monkeypatch), torch.arange(LENGTH)
    assert len(pairs) == len(ropes)
    for rope, (before, after) in zip(ropes, pairs):
        torch.testing.assert_close(rope.rotate(before, at), after, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rope.unrotate(after, at), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", WITH_ROPE)
def test_every_architecture_is_turned_as_it_turns_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    check([model.geometry.ropes[layer] for layer in range(3)], model.network, monkeypatch)


def llama(**rope: Any) -> Any:
    return transformers.LlamaConfig(**SIZES, rope_parameters={"rope_theta": 10000.0, **rope})


SCALED = {
    "linear": lambda: llama(rope_type="linear", factor=4.0),
    "dynamic": lambda: llama(rope_type="dynamic", factor=2.0),
    "yarn": lambda: llama(rope_type="yarn", factor=8.0, original_max_position_embeddings=64),
    "llama3": lambda: llama(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "longrope": lambda: transformers.Phi3Config(
        **SIZES,
        sliding_window=None,
        original_max_position_embeddings=128,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.5] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 128,
        },
    ),
    "partial": lambda: transformers.Phi3Config(
        **SIZES,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_and_partial_rope_is_the_models(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = random_network(SCALED[kind]())
    ropes = [Ropes(network)[layer] for layer in range(3)]
    check(ropes, network, monkeypatch)
    assert (ropes[0].scaling > 1) == (kind in ("yarn", "longrope"))


def test_longrope_follows_the_frequencies_that_a_long_text_takes() -> None:
    network = random_network(SCALED["longrope"]())
    ropes = Ropes(network)
    short = ropes[0].frequencies.clone()
    with torch.inference_mode():
        network(torch.tensor([prompt(200)]), use_cache=False)
    assert not torch.allclose(ropes[0].frequencies, short)


def test_gemma3_takes_the_frequencies_of_each_kind_of_layer() -> None:
    network = build("gemma3").network
    held = [f for f, _ in frequencies(network)]
    ropes = build("gemma3").geometry.ropes
    assert len(held) == 2 and not torch.equal(*held)
    assert torch.equal(ropes[0].frequencies, ropes[2].frequencies)
    assert not torch.equal(ropes[0].frequencies, ropes[1].frequencies)


def test_interleaved_pairs_are_told_from_halves() -> None:
    assert build("cohere").geometry.ropes[0].interleaved and not build("llama").geometry.ropes[0].interleaved


def test_layers_without_rope_leave_keys_as_they_are() -> None:
    smollm = random_network(transformers.SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1]))
    cohere = random_network(
        transformers.Cohere2Config(
            **SIZES, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
        )
    )
    x = torch.randn(1, 2, 5, 16)
    for network in (smollm, cohere):
        ropes = Ropes(network)
        assert [len(ropes[layer].frequencies) for layer in range(3)] == [8, 0, 8]
        assert torch.equal(ropes[1].rotate(x, torch.arange(5)), x)
        assert torch.equal(ropes[1].mean_rotation(torch.arange(5), 16), torch.eye(16))


def test_reading_rope_leaves_the_model_as_it_was() -> None:
    network, ids = random_network(SCALED["longrope"]()), torch.tensor([prompt(200)])
    with torch.inference_mode():
        before = network(ids, use_cache=False).logits
        Ropes(network)[0]
        assert torch.equal(network(ids, use_cache=False).logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_read_as_well(dtype: torch.dtype) -> None:
    network = random_network(llama(rope_type="default")).to(dtype)
    rope = Ropes(network)[2]
    assert len(rope.frequencies) == 8 and not rope.interleaved


def test_models_without_rope_are_refused_in_one_sentence() -> None:
    with pytest.raises(wb.RecipeError, match="holds no frequencies of such; use another method") as caught:
        build("gpt2").geometry.ropes.require("expected_attention")
    assert str(caught.value).startswith("expected_attention needs rotary position embeddings, but this model")
    with pytest.raises(wb.ModelError, match="holds no frequencies"):
        build("gpt2").geometry.ropes[0]
    nope = random_network(transformers.SmolLM3Config(**SIZES, no_rope_layers=[0, 0, 0]))
    with pytest.raises(wb.RecipeError, match="no layer of this model has any"):
        Ropes(nope).require("keydiff")
    with pytest.raises(wb.RecipeError, match="only the config"):
        Geometry.of(transformers.LlamaConfig(**SIZES)).ropes.require("keydiff")


def test_a_rotation_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = random_network(llama(rope_type="default"))
    code = sys.modules[type(network).__module__]
    monkeypatch.setattr(code, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q + sin[:, None], k + sin[:, None]))
    with pytest.raises(wb.RecipeError, match="how layer 0 of this model turns its keys is not known here"):
        Ropes(network).require("locret")


def test_geometry_compares_and_prints_without_its_rope() -> None:
    geometry = build().geometry
    assert geometry == Geometry.of(build().network.config) and "ropes" not in repr(geometry)
    assert "ropes" not in geometry.as_dict() and geometry.as_dict()["bytes_per_token"] == geometry.bytes_per_token


# -- the arithmetic ------------------------------------------------------------------------------------------------------


def test_a_quarter_turn_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])  # two pairs, and one dim that passes
    quarter = torch.tensor([math.pi / 2, 0.0])
    halves = Rope(quarter).rotate(x, torch.tensor([1]))
    torch.testing.assert_close(halves, torch.tensor([[-3.0, 2, 1, 4, 5]]))
    neighbours = Rope(quarter, interleaved=True).rotate(x, torch.tensor([1]))
    torch.testing.assert_close(neighbours, torch.tensor([[-2.0, 1, 3, 4, 5]]))
    scaled = Rope(quarter, 2.0).rotate(x, torch.tensor([1]))
    torch.testing.assert_close(scaled, torch.tensor([[-6.0, 4, 2, 8, 5]]))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scaling", [1.0, 1.4])
def test_moving_is_turning_back_and_forth(interleaved: bool, scaling: float) -> None:
    rope = Rope(10000.0 ** -(torch.arange(6) / 6), scaling, interleaved)
    x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    old = torch.randint(0, 10_000, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    new = torch.randint(0, 10_000, (2, 3, 5), generator=torch.Generator().manual_seed(2))
    turned = rope.rotate(x, old)
    torch.testing.assert_close(rope.unrotate(turned, old), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rope.move(turned, old, new), rope.rotate(x, new), atol=5e-3, rtol=0)
    assert torch.equal(rope.move(x, old, old), x)


def test_attention_sees_distances_only() -> None:
    rope = Rope(10000.0 ** -(torch.arange(8) / 8))
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    near = rope.rotate(q, torch.tensor([12])) @ rope.rotate(k, torch.tensor([3])).mT
    far = rope.rotate(q, torch.tensor([512])) @ rope.rotate(k, torch.tensor([503])).mT
    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_mean_rotation_is_the_mean_of_rotations(interleaved: bool) -> None:
    rope = Rope(10000.0 ** -(torch.arange(6) / 6), 1.3, interleaved)
    x, at = torch.randn(16, generator=torch.Generator().manual_seed(0)), torch.arange(40, 90)
    expected = rope.rotate(x.expand(50, 16), at).mean(0)
    torch.testing.assert_close(rope.mean_rotation(at, 16) @ x, expected, atol=1e-6, rtol=1e-5)


def test_closest_prefers_no_rope_where_nothing_turned() -> None:
    none, rope = Rope(torch.empty(0)), Rope(torch.tensor([1.0, 0.5]))
    k = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert closest([none, rope], k, k) == (none, 0.0)
    assert closest([none, rope], k, rope.move(k, torch.zeros(1), torch.full((1,), 64)))[0] is rope
