"""How near every quantization method stays to the full cache, for the bytes it holds: recall of the house model.

The question is part of the prompt; the whole prompt goes over to the method's codes, and the first token of the answer comes
from them. KL and top-1 agreement are teacher-forced over the full cache's own answer. Bytes are those of all tensors held
after the prompt. Windows in full precision are kept short, or at a thousand tokens they would be most of a 2-bit cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from workbench.bench.accuracy import FIRST_SEED, answered, runnable
from workbench.bench.subjects import HOUSE_NAME, house_is_there, subject
from workbench.cache.cache import WorkbenchCache
from workbench.models.load import Model
from workbench.runs.prompt import read_through
from workbench.strategies.recipe import Recipe
from workbench.training.recall import text

TOKENS, SAMPLES = 1024, 100
CHUNK = 2048

# Series of the chart -> recipes. The house model's heads have 32 channels, so that groups of channels end there.
SETTINGS: dict[str, tuple[str, ...]] = {
    "rtn per token": ("rtn(bits=8)", 'rtn(bits="fp8")', "rtn(bits=4)", "rtn(bits=2)"),
    "rtn per channel": tuple(f'rtn(bits={bits}, axis="channel")' for bits in (8, '"fp8"', 4, 2)),
    "kivi": (
        *(f"kivi(bits={bits}, residual_length=32)" for bits in (8, 4, 2)),
        "kivi(key_bits=4, value_bits=2, residual_length=32)",
        "kivi(key_bits=2, value_bits=4, residual_length=32)",
        "kivi(bits=2, residual_length=64)",
        "kivi(bits=2, residual_length=128)",
        "kivi(bits=2, group_size=16, residual_length=16)",
    ),
    "gear": tuple(f"gear(bits={bits}, residual_length=32)" for bits in (8, 4, 2)),
    "zipcache": tuple(
        f"zipcache(bits={high}, low_bits={low})" for high, low in ((8, 8), (8, 4), (4, 4), (4, 2), (2, 2))
    ),
    "mikv": tuple(f"mikv(bits={low}, high_bits={high})" for low, high in ((8, 16), (4, 16), (4, 8), (2, 16), (2, 8))),
    "bfp": ("bfp(bits=8)", "bfp(bits=4)", "bfp(bits=4, group_size=16)"),
    "rotatekv": (
        *(f"rotatekv(bits={bits})" for bits in (8, 4, 2)),
        "rotatekv(bits=2, pivots=0)",
        "rotatekv(bits=2, pivots=40)",
        "rotatekv(bits=2, group_size=16)",
    ),
    "mustafar": tuple(
        f"mustafar(key_sparsity={share}, value_sparsity={share}, flush_length=64)" for share in (0.5, 0.7, 0.9)
    ),
    "xquant": tuple(f"xquant(bits={bits}, group_size=32, residual_length=32)" for bits in (8, 4, 2)),
    "xquant_cl": tuple(
        f"xquant_cl(bits={bits}, base_bits={base}, group_size=32)" for bits, base in ((4, 8), (2, 4), (2, 2))
    ),
}


def quantization_methods() -> list[str]:
    """The methods that are measured, by their names in recipes."""
    return list(dict.fromkeys(method_of(recipe) for recipes in SETTINGS.values() for recipe in recipes))


def method_of(recipe: str) -> str:
    return Recipe.parse(recipe).parts[0].key


def measure_quantization(
    methods: Sequence[str] | None, samples: int | None, quick: bool, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Distance from the full cache and bytes held, by setting.

    Returns:
        ``full``: {right, bytes_per_token, float16_bytes_per_token}. ``settings``: recipe -> the same, ``series``, and
        ``kl``: nats, mean of the documents' means; ``kl_by_document``; ``top1``: mean share of tokens; ``lost``,
        ``won``: documents that only the full cache, or only the setting, answers; ``factor_bytes``: held besides, once per
        model. ``left_out``: recipe -> why.
        Bytes are means over the documents, in float16 those of the first document. ``skipped`` instead of all this where
        there is no house model.
    """
    if not house_is_there():
        return {"skipped": "the house model's weights are not installed"}
    model = subject(HOUSE_NAME)
    samples, tokens = samples or (2 if quick else SAMPLES), 256 if quick else TOKENS
    series = {
        recipe: name
        for name, recipes in SETTINGS.items()
        for recipe in recipes
        if methods is None or method_of(recipe) in methods
    }
    ready, left_out = runnable(model, list(series))
    names = ["full", *ready]
    factor_bytes: dict[str, int] = {}
    found: dict[str, dict[str, list[float]]] = {
        name: {"kl": [], "top1": [], "right": [], "bytes": []} for name in names
    }
    for number in range(samples):
        if number % 10 == 0:
            tell(f"quantization: {number} of {samples} documents")
        document = text.document(FIRST_SEED + number, tokens, model.tokenizer)
        for name, lane in zip(names, answered(model, document, names, "query-aware"), strict=True):
            assert lane.kl_mean is not None and lane.top1_agreement is not None
            of_lane = found[name]
            factor_bytes[name] = lane.memory.factor_bytes
            of_lane["kl"].append(lane.kl_mean)
            of_lane["top1"].append(lane.top1_agreement)
            of_lane["right"].append(document.is_answered_by(lane.text))
            of_lane["bytes"].append(lane.memory.used_bytes / len(document.prompt_ids))
    tell("quantization: bytes in float16")
    half = subject(HOUSE_NAME, "float16")
    first = text.document(FIRST_SEED, tokens, model.tokenizer)
    settings = {
        name: summary(found[name], found["full"]["right"])
        | {"float16_bytes_per_token": round(bytes_per_token(half, name, first.prompt_ids), 2)}
        for name in names
    }
    full = settings.pop("full")
    return {
        "model": model.id,
        "dtype": model.geometry.dtype,
        "tokens": tokens,
        "samples": samples,
        "full": {key: full[key] for key in ("right", "bytes_per_token", "float16_bytes_per_token")},
        "settings": {
            name: {"series": series[name], **of, "factor_bytes": factor_bytes[name]} for name, of in settings.items()
        },
        "left_out": left_out,
    }


def summary(of: dict[str, list[float]], full_right: Sequence[float]) -> dict[str, Any]:
    """What the documents say of one setting together."""
    pairs = list(zip(of["right"], full_right, strict=True))
    return {
        "bytes_per_token": round(statistics.mean(of["bytes"]), 2),
        "kl": round(statistics.mean(of["kl"]), 7),
        "kl_by_document": [round(kl, 7) for kl in of["kl"]],
        "top1": round(statistics.mean(of["top1"]), 5),
        "right": int(sum(of["right"])),
        "lost": sum(theirs > ours for ours, theirs in pairs),
        "won": sum(ours > theirs for ours, theirs in pairs),
    }


def bytes_per_token(model: Model, recipe: str, ids: Sequence[int]) -> float:
    """Bytes held right after the prompt ``ids``, per token of it."""
    cache = WorkbenchCache(Recipe.parse(recipe), model.geometry, len(ids), artifacts=model.artifacts)
    read_through(model, cache, list(ids), CHUNK)
    return cache.memory().used_bytes / len(ids)


def front(settings: dict[str, dict[str, Any]], measure: str = "kl") -> list[str]:
    """The settings that no other beats: none holds as few bytes and is as near, fewest bytes first. ``measure``: less is better."""
    best, kept = float("inf"), []
    for name in sorted(settings, key=lambda name: (settings[name]["bytes_per_token"], settings[name][measure])):
        if settings[name][measure] < best:
            best = settings[name][measure]
            kept.append(name)
    return kept
