"""Bytes that recipes hold after the prompt, against the full cache and against the figures they must reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from workbench.bench.subjects import HOUSE_NAME, RANDOM_NAME, TINY_NAME, house_is_there, random_ids, subject
from workbench.cache.cache import Memory, WorkbenchCache
from workbench.models.load import Model
from workbench.runs.prompt import read_through
from workbench.strategies.recipe import Recipe

LENGTH = 4096
AT_MOST = {  # of the full cache, after a prompt of 4,096 tokens
    "full": 1.0,
    "snapkv(budget=0.25)": 0.26,
    "adakv(budget=0.25)": 0.26,
    "kivi(bits=2, group_size=32)": 0.21,
    "snapkv(budget=0.25) | kivi(bits=2)": 0.08,
}


def measure_bytes(recipes: Sequence[str] | None, quick: bool, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Per model and dtype: bytes and ratio of every recipe; ``reached`` where a figure is asked for."""
    cases = [(TINY_NAME, "float32")] if quick else [(RANDOM_NAME, "float32"), (RANDOM_NAME, "bfloat16")]
    if not quick and house_is_there():
        cases.append((HOUSE_NAME, "float32"))
    out = []
    for name, dtype in cases:
        tell(f"bytes: {name}, {dtype}, {LENGTH:,} tokens")
        model = subject(name, dtype)
        full = after_prompt(model, "full", LENGTH)
        lanes = {}
        for recipe in dict.fromkeys(["full", *AT_MOST, *(recipes or [])]):
            memory = full if recipe == "full" else after_prompt(model, recipe, LENGTH)
            ratio = memory.used_bytes / full.used_bytes
            limit = AT_MOST.get(recipe)
            lanes[recipe] = {
                "used_bytes": memory.used_bytes,
                "reserved_bytes": memory.reserved_bytes,
                "peak_bytes": memory.peak_bytes,
                "by_kind": memory.by_kind,
                "ratio": round(ratio, 5),
                "at_most": limit,
                "reached": None if limit is None else ratio <= limit,
            }
        expected = model.geometry.bytes_per_token * LENGTH
        out.append({"model": name, "dtype": dtype, "tokens": LENGTH, "full_by_formula": expected, "lanes": lanes})
    return out


def after_prompt(model: Model, recipe: str, length: int) -> Memory:
    """What a recipe holds right after a prompt that was read in chunks of 2,048 tokens."""
    cache = WorkbenchCache(Recipe.parse(recipe), model.geometry, length, artifacts=model.artifacts)
    read_through(model, cache, random_ids(model, length), 2048)
    return cache.memory()
