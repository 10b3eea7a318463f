"""Tiny random models and layers, built from configs on the spot; nothing is downloaded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from workbench.cache.attention import register
from workbench.cache.cache import WorkbenchCache
from workbench.models.load import Model
from workbench.strategies.recipe import Recipe
from workbench.strategies.registry import registry

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = 8  # of the sliding layers

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=None),
    "mistral-sliding": lambda: transformers.MistralConfig(**SIZES, sliding_window=WINDOW),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen2-sliding": lambda: transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=32),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES, head_dim=16, sliding_window=WINDOW, attn_logit_softcapping=2.0, query_pre_attn_scalar=16
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: transformers.Phi3Config(**SIZES, sliding_window=None),
    "phi3-sliding": lambda: transformers.Phi3Config(**SIZES, sliding_window=WINDOW),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=None
    ),
    "cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=1.0),
    "starcoder2": lambda: transformers.Starcoder2Config(**SIZES),
    "starcoder2-sliding": lambda: transformers.Starcoder2Config(**SIZES, sliding_window=WINDOW),
    "olmo": lambda: transformers.OlmoConfig(**SIZES),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **SIZES, head_dim=16, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1
    ),
}
EAGER = ("gemma2", "gpt-oss")  # their soft-cap and sinks are not in torch's SDPA: plain means eager


@functools.cache
def network(name: str, attention: str) -> Any:
    """A random model of this architecture; the same weights for every attention implementation."""
    register()
    config = ARCHITECTURES[name]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():  # larger than the usual 0.02, so that attention is far from uniform
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15, generator=generator)
            elif parameter.ndim == 1 and parameter.shape[0] == config.num_attention_heads:
                parameter.normal_(0.0, 1.0, generator=generator)  # GPT-OSS's sinks
    return model.eval()


def plain(name: str) -> Any:
    """The architecture as transformers runs it."""
    return network(name, "eager" if name in EAGER else "sdpa")


@functools.cache
def build(name: str = "llama") -> Model:
    """The same weights as a workbench model, with random artifacts for the strategies that need some."""
    return with_artifacts(Model(f"test/{name}", network(name, "workbench"), None))


def with_artifacts(model: Model) -> Model:
    """The model with an artifact of every kind that a strategy asks for, random and without meaning."""
    generator = torch.Generator().manual_seed(0)
    kinds = {kind for cls in registry().values() for kind in cls().artifacts}
    for kind in sorted(kinds, key=lambda kind: kind.method):
        tensors = {}
        for name, shape in kind.shapes(model.geometry).items():
            size = [8 if isinstance(axis, str) else axis for axis in shape]
            tensors[name] = torch.rand(size, generator=generator) - (0.5 if kind.suffix == ".safetensors" else 0.0)
        model.artifacts.put(model.artifacts.make(kind, tensors, {}))
    return model


def random_model(config: Any) -> Model:
    """A workbench model of any config."""
    register()
    torch.manual_seed(0)
    return Model("test/random", AutoModelForCausalLM.from_config(config, attn_implementation="workbench").eval(), None)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


def feed(model: Model, cache: Any, ids: list[int], chunk: int | None = None) -> Tensor:
    """Logits [tokens, vocabulary] of ``ids``, fed in chunks to a model whose cache may already hold tokens."""
    out = []
    with torch.inference_mode():
        for start in range(0, len(ids), chunk or len(ids)):
            part = torch.tensor([ids[start : start + (chunk or len(ids))]])
            out.append(model.network(input_ids=part, past_key_values=cache, use_cache=True).logits[0])
    return torch.cat(out)


def whole_cache_for(model: Model, recipe: str, prompt_length: int | None = None) -> WorkbenchCache:
    """FastKV with every token in every layer: as a cache alone it cannot do more. For the rest see test_fastkv.py and test_fastkv_lanes.py."""
    return cache_for(model, recipe.replace("fastkv(", "fastkv(tsp_rate=1.0, "), prompt_length)


def cache_for(model: Model, recipe: str = "full", prompt_length: int | None = None) -> WorkbenchCache:
    return WorkbenchCache(Recipe.parse(recipe), model.geometry, prompt_length, artifacts=model.artifacts)
