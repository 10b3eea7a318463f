"""The output projection by query head, on every architecture: the attention's output is the sum of its heads' parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import workbench as wb
from tests.builders import ARCHITECTURES, build, cache_for, feed, prompt
from workbench.models.projections import key_weight, output_weight


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_heads_times_their_weights_are_what_the_projection_gives(name: str) -> None:
    model = build(name)
    cache = cache_for(model)
    feed(model, cache, prompt(5))
    heads, dim = model.geometry.num_heads, model.geometry.head_dim
    for layer in [*cache.layers, *cache.clone().layers]:
        assert layer.module is not None
        weight = output_weight(layer.module, heads)
        assert weight.shape == (heads, dim, model.geometry.hidden_size)
        projection: Any = next(m for n, m in layer.module.named_children() if n in ("o_proj", "dense", "c_proj"))
        x = torch.randn(3, heads, dim)
        bias = projection(torch.zeros(1, heads * dim))
        torch.testing.assert_close(
            torch.einsum("thd,hdm->tm", x, weight), projection(x.flatten(1)) - bias, atol=1e-4, rtol=1e-4
        )


class Packed(nn.Module):
    """A projection whose weight is no matrix of numbers, as quantized ones are."""

    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Module()
        self.o_proj.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("module", [nn.Linear(4, 4), Packed()])
def test_without_one_that_can_be_read_a_sentence_names_what_does_without(module: nn.Module) -> None:
    with pytest.raises(wb.RecipeError, match="snapkv, adakv and cake do without") as caught:
        output_weight(module, 2)
    assert type(module).__name__ in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_keys_before_norm_and_rope_are_the_key_rows_times_the_input(name: str) -> None:
    """The cached key of a single token, at position 0, shows which rows made it."""
    model = build(name)
    cache, inputs = cache_for(model), []
    feed(model, cache, prompt(1))
    shape = model.geometry.num_heads, model.geometry.num_kv_heads, model.geometry.head_dim
    module = cache.layers[0].module
    assert module is not None
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    feed(model, cache_for(model), prompt(1))
    handle.remove()
    weight = key_weight(module, *shape)
    assert weight.shape == (*shape[1:], model.geometry.hidden_size)
    found = weight @ inputs[0][0, 0]
    held = cache.layers[0].store.keys()[0, :, 0]
    if name != "gpt2":
        held = model.geometry.ropes[0].unrotate(held, torch.zeros(1))  # YaRN scales even here
    if any(kind in name for kind in ("qwen3", "gemma3", "olmo2")):  # a norm stands between
        assert torch.nn.functional.cosine_similarity(found, held).min() > 0.9
    else:
        biases = [b for n, b in module.named_parameters() if n.endswith("bias") and "sinks" not in n]
        assert any(bias.any() for bias in biases) or not torch.testing.assert_close(found, held, atol=1e-4, rtol=1e-4)


def test_without_a_key_projection_a_sentence_names_what_does_without() -> None:
    with pytest.raises(wb.RecipeError, match=r"use bfp\(sort=False\)"):
        key_weight(Packed(), 2, 2, 4)
