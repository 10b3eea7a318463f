"""The models on which kvpress and the workbench are compared, and what kvpress kept of them.

``make_fixtures.py`` runs this file beside kvpress, in an environment without the workbench; the tests run it beside the
workbench. So it imports torch and transformers only, and both sides build the same weights to the bit.
Axes: L layers compared, H KV heads, T tokens, D head_dim.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

FIXTURES = Path(__file__).with_name("fixtures")
SEED = 20_2509
VOCABULARY = 512
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
ARCHITECTURES = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, num_hidden_layers=4, head_dim=8),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, num_hidden_layers=3, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SIZES,
        num_hidden_layers=4,
        head_dim=16,
        query_pre_attn_scalar=16,  # kvpress divides by the root of head_dim whatever the config says
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}
SHARP = 1.6  # of queries and keys: attention far from uniform, and far from a single token


def compared_layers(name: str) -> list[int]:
    """The full-attention layers: kvpress leaves the sliding ones alone."""
    config = ARCHITECTURES[name]()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]


@functools.cache
def network(name: str, attention: str) -> Any:
    """A model with random weights; the same in every process, environment and attention implementation.

    Uniform numbers, since their bits do not depend on a processor's vector instructions as those of a normal do.
    """
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name](), attn_implementation=attention).float().eval()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            drawn = torch.rand(parameter.shape, generator=generator) * 2 - 1
            sharp = SHARP if any(part in key for part in ("q_proj", "k_proj", "q_norm", "k_norm")) else 1.0
            if parameter.ndim == 1:  # a norm: channels between half and one and a half; Gemma adds the one itself
                drawn = (1 + drawn / 2) * sharp - (1.0 if name == "gemma3" else 0.0)
            elif "embed" in key:
                drawn = drawn * 3**0.5
            else:
                drawn = drawn * sharp * (3 / parameter.shape[1]) ** 0.5
            parameter.copy_(drawn)
    return model


def digest(model: Any) -> str:
    """SHA-256 over the weights, in the order of their names."""
    total = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        total.update(parameter.detach().numpy().tobytes())
    return total.hexdigest()


def prompt(length: int) -> list[int]:
    """Token ids, none of them twice: equal tokens have equal values, and keys of equal norm, in the first layer."""
    generator = torch.Generator().manual_seed(SEED + length)
    return (torch.rand(VOCABULARY - 3, generator=generator).argsort()[:length] + 3).tolist()


@dataclass(frozen=True)
class Case:
    """What one press kept of one prompt.

    Attributes:
        press: the class in kvpress, with the class of the press inside it: ``AdaKVPress(SnapKVPress)``.
        parameters: of both, by kvpress's names, the ratio apart.
        ratio: kvpress's compression ratio, the share that goes.
        budget: ``int(length * (1 - ratio))``, the count that nearly every press keeps per KV head.
        kept: bool [L, H, T]; for ThinKPress [L, H, D], the channels that stay.
        margin: [L], how much relative noise on the scores changes nothing in that layer: 1e-4, 1e-5 or 0.
        scores: float32 [L, H, T] or None; the scores as the press cut them (with the shortest prompt and ratio 0.5).
        keys: float32 [L, H, n, D] or None; the kept keys where the press rotates them (with the shortest prompt).
    """

    architecture: str
    press: str
    parameters: dict[str, Any]
    length: int
    ratio: float
    layers: list[int]
    kept: np.ndarray
    margin: np.ndarray
    scores: np.ndarray | None
    keys: np.ndarray | None

    @property
    def budget(self) -> int:
        return int(self.length * (1 - self.ratio))

    def __str__(self) -> str:
        given = ", ".join(f"{k}={v}" for k, v in self.parameters.items())
        return f"{self.architecture} {self.press}({given}) T={self.length} r={self.ratio}"


@functools.cache
def about(architecture: str) -> dict[str, Any]:
    """How an architecture's fixture was made: versions, digest of the weights, the cases' table."""
    with np.load(FIXTURES / f"{architecture}.npz") as held:
        return json.loads(held["about"].tobytes())


@functools.cache
def last_logits(architecture: str) -> dict[int, np.ndarray]:
    """The last token's logits under plain transformers, by prompt length."""
    with np.load(FIXTURES / f"{architecture}.npz") as held:
        return dict(zip(about(architecture)["lengths"], held["logits"], strict=True))


@functools.cache
def cases(architecture: str) -> tuple[Case, ...]:
    """Every case of an architecture."""
    with np.load(FIXTURES / f"{architecture}.npz") as held:
        bits, margins, scores, keys = (held[part] for part in ("kept", "margin", "scores", "keys"))
    layers, heads = about(architecture)["layers"], SIZES["num_key_value_heads"]
    columns = Columns(bits, scores, keys)
    found = []
    for row, margin in zip(about(architecture)["cases"], margins, strict=True):
        kept = columns.bits((len(layers), heads, row["width"]))
        drawn = columns.numbers("scores", (len(layers), heads, row["width"])) if row["scores"] else None
        wide = ARCHITECTURES[architecture]().head_dim
        turned = columns.numbers("keys", (len(layers), heads, row["keys"], wide)) if row["keys"] else None
        given = {k: row[k] for k in ("press", "parameters", "length", "ratio")}
        found.append(Case(architecture, **given, layers=layers, kept=kept, margin=margin, scores=drawn, keys=turned))
    return tuple(found)


def cases_of(press: str) -> Iterator[Case]:
    """The cases of one press, over all architectures."""
    for architecture in ARCHITECTURES:
        yield from (case for case in cases(architecture) if case.press == press)


class Columns:
    """The fixture's long columns, read from front to back as the table of cases says."""

    def __init__(self, packed: np.ndarray, scores: np.ndarray, keys: np.ndarray) -> None:
        self._all = {"bits": packed, "scores": scores, "keys": keys}
        self._at = dict.fromkeys(self._all, 0)

    def _take(self, column: str, count: int) -> np.ndarray:
        start = self._at[column]
        self._at[column] = start + count
        return self._all[column][start : start + count]

    def bits(self, shape: tuple[int, ...]) -> np.ndarray:
        count = int(np.prod(shape))
        return np.unpackbits(self._take("bits", -(-count // 8)), count=count).astype(bool).reshape(shape)

    def numbers(self, column: str, shape: tuple[int, ...]) -> np.ndarray:
        return self._take(column, int(np.prod(shape))).reshape(shape)
