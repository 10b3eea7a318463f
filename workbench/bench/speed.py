"""Prefill and decode of recipes against plain transformers: same weights, same tokens, same process, interleaved.

Every round feeds the prompt in one forward call (where a recipe lets tokens stay behind: one per layer) to each contender in
turn, then decodes the same fixed tokens in short
blocks, again in turn. A ratio is taken within a round; reported are the median and the range over the rounds. The
full recipe's logits must equal plain transformers', or no speed is reported.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from workbench.bench.subjects import plain_twin, random_ids, subject, subjects
from workbench.cache.cache import WorkbenchCache
from workbench.models.load import Model
from workbench.runs.prompt import read_through
from workbench.strategies.recipe import Recipe

PLAIN = "plain transformers"
RECIPES = (
    "full",
    "streaming_llm(budget=0.25)",
    "snapkv(budget=0.25)",
    "adakv(budget=0.25)",
    "h2o(budget=0.25)",
    "kivi(bits=2)",
    "snapkv(budget=0.25) | kivi(bits=2)",
)
LENGTHS = (2048, 8192)
BLOCKS, BLOCK_TOKENS = 4, 8  # decoded a round
TOLERANCE = 2e-3  # of the logits' standard deviation, float32


class Contender:
    """One way of running the network: plain, or a recipe.

    Args:
        by_layer: the model, where the recipe needs its layers run one by one.
    """

    def __init__(
        self, name: str, network: Any, make_cache: Callable[[int], Any], by_layer: Model | None = None
    ) -> None:
        self.name, self.network, self.make_cache, self.by_layer = name, network, make_cache, by_layer
        self.cache: Any = None

    def prefill(self, ids: Tensor) -> tuple[float, Tensor]:
        """Seconds, and the logits after the prompt."""
        self.cache = self.make_cache(ids.shape[1])
        if self.by_layer is None:
            return self._feed(ids)
        tokens = ids[0].tolist()
        began = time.perf_counter()
        logits = read_through(self.by_layer, self.cache, tokens, len(tokens))
        return time.perf_counter() - began, logits

    def decode(self, ids: Tensor) -> tuple[float, Tensor]:
        """Seconds to feed the tokens one by one, and the last logits."""
        total = 0.0
        for n in range(ids.shape[1]):
            seconds, logits = self._feed(ids[:, n : n + 1])
            total += seconds
        return total, logits

    def _feed(self, ids: Tensor) -> tuple[float, Tensor]:
        began = time.perf_counter()
        with torch.inference_mode():
            logits = self.network(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return time.perf_counter() - began, logits[0, -1].float()


def contenders(model: Model, recipes: Sequence[str]) -> list[Contender]:
    """Plain transformers first, then the recipes."""
    twin = plain_twin(model)
    found = [Contender(PLAIN, twin, lambda length: DynamicCache(config=twin.config))]
    for text in recipes:
        recipe = Recipe.parse(text)
        by_layer = model if recipe.needs_token_set else None
        found.append(Contender(text, model.network, partial(WorkbenchCache, recipe, model.geometry), by_layer))
    return found


def measure_speed(
    recipes: Sequence[str] | None,
    lengths: Sequence[int] | None,
    rounds: int | None,
    quick: bool,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One entry per model and length; see :func:`measure_one`."""
    recipes = [Recipe.parse(text).text for text in recipes or RECIPES]
    recipes = recipes if "full" in recipes else ["full", *recipes]
    out = []
    for name in subjects(quick):
        model = subject(name)
        for length in lengths or ((128,) if quick else LENGTHS):
            used = min(length, model.geometry.max_positions - BLOCKS * BLOCK_TOKENS - 1)
            tell(f"speed: {name}, {used:,} tokens")
            out.append(measure_one(model, recipes, used, rounds or (2 if quick else 7)))
    return out


def measure_one(model: Model, recipes: Sequence[str], length: int, rounds: int) -> dict[str, Any]:
    """Times of every recipe relative to plain transformers, prefill and decode apart.

    Returns:
        ``lanes``: per recipe ``prefill`` and ``decode``, each {ratio: median, low, high, seconds}; ``equal``: whether full
        gave plain's logits; ``largest_difference``, in standard deviations. Where they differ, ``lanes`` is empty.
    """
    everyone = contenders(model, recipes)
    ids = torch.tensor([random_ids(model, length)])
    following = torch.tensor([random_ids(model, BLOCKS * BLOCK_TOKENS, seed=1)])
    out: dict[str, Any] = {"model": model.id, "dtype": model.geometry.dtype, "tokens": length, "rounds": rounds}
    difference = _largest_difference(everyone[0], next(c for c in everyone if c.name == "full"), ids, following)
    out |= {"equal": difference <= TOLERANCE, "largest_difference": difference, "lanes": {}}
    if not out["equal"]:
        out["refused"] = (
            f"full differs from plain transformers by {difference:.2g} standard deviations, so no speed is reported."
        )
        return out
    for one in everyone:  # warm: kernels chosen, memory mapped
        one.prefill(ids[:, : min(256, length)])
        one.decode(following[:, :2])
    prefill: dict[str, list[float]] = {one.name: [] for one in everyone}
    decode: dict[str, list[float]] = {one.name: [] for one in everyone}
    for number in range(rounds):
        order = everyone[number % len(everyone) :] + everyone[: number % len(everyone)]
        for one in order:
            gc.collect()
            prefill[one.name].append(one.prefill(ids)[0])
        spent = dict.fromkeys(decode, 0.0)
        for block in range(BLOCKS):
            tokens = following[:, block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS]
            for one in order if block % 2 == 0 else order[::-1]:
                spent[one.name] += one.decode(tokens)[0]
        for name, seconds in spent.items():
            decode[name].append(seconds / (BLOCKS * BLOCK_TOKENS))
    for one in everyone:
        out["lanes"][one.name] = {
            "prefill": _ratio(prefill[one.name], prefill[PLAIN]),
            "decode": _ratio(decode[one.name], decode[PLAIN]),
        }
        one.cache = None
    return out


def _largest_difference(plain: Contender, full: Contender, ids: Tensor, following: Tensor) -> float:
    """After the prompt and after every decoded token, in standard deviations of plain's logits."""
    worst = 0.0
    pairs = [(plain.prefill(ids)[1], full.prefill(ids)[1])]
    for n in range(following.shape[1]):
        token = following[:, n : n + 1]
        pairs.append((plain.decode(token)[1], full.decode(token)[1]))
    for expected, got in pairs:
        worst = max(worst, float((expected - got).abs().max() / expected.std()))
    return worst


def _ratio(ours: list[float], plain: list[float]) -> dict[str, float]:
    """Median and range of the paired ratios, and the median seconds (per prompt, or per token)."""
    ratios = [a / b for a, b in zip(ours, plain)]
    return {
        "ratio": round(statistics.median(ratios), 4),
        "low": round(min(ratios), 4),
        "high": round(max(ratios), 4),
        "seconds": statistics.median(ours),
    }
