"""The models that are measured: the house model, and random Llamas of its size and of about 60 million parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from workbench.cache.attention import NAME, register
from workbench.models.house import HOUSE, house_path
from workbench.models.load import Model, load

HOUSE_NAME = "house/recall"
RANDOM_NAME = "random-60m"
SMALL_NAME = "random-house"  # the house model's shape, for prompts longer than the house model reads
TINY_NAME = "random-tiny"

LONGEST = 1 << 18

SIZES = {
    SMALL_NAME: LlamaConfig(
        vocab_size=1536,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
    ),
    RANDOM_NAME: LlamaConfig(  # 63 million parameters
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
    ),
    TINY_NAME: LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
    ),
}


def house_is_there() -> bool:
    """Whether the house model's weights are installed."""
    return HOUSE_NAME in HOUSE and any(house_path(HOUSE_NAME).glob("*.safetensors"))


def subject(name: str, dtype: str = "float32") -> Model:
    """A model by name, on the CPU: the house model, or random weights that are the same every time."""
    if name == HOUSE_NAME:
        return load(name, device="cpu", dtype=dtype)
    register()
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(
        copy.deepcopy(SIZES[name]), attn_implementation=NAME, dtype=getattr(torch, dtype)
    ).eval()
    return Model(name, network, None)


def plain_twin(model: Model) -> Any:
    """The same weights, not copied, as transformers runs them: SDPA attention."""
    config = copy.deepcopy(model.network.config)
    twin = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=model.network.dtype)
    twin.load_state_dict(model.network.state_dict(), assign=True)
    twin.tie_weights()
    return twin.eval()


def subjects(quick: bool) -> list[str]:
    """The names to measure."""
    if quick:
        return [TINY_NAME]
    return [RANDOM_NAME] + ([HOUSE_NAME] if house_is_there() else [])


def random_ids(model: Model, count: int, seed: int = 0) -> list[int]:
    """Token ids to feed: speed does not depend on what they say."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.geometry.vocab_size, (count,), generator=generator).tolist()
