"""What inspecting a prompt costs: time against plain prefill, memory per head, tiles, and bytes a view is sent.

Up to :data:`WHOLE` tokens whole prompts are read, in turn with plain transformers. Beyond, reading one takes many minutes
on a CPU; there the prompt's last chunk is read onto random entries for all tokens before it, which is where inspecting
costs most, and the result says so.

Run as a module it measures one peak and prints JSON; :func:`measure_inspect` starts it for each.
"""

from __future__ import annotations

import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from workbench.bench.contest import can_count, resident_peak
from workbench.bench.latency import percentiles
from workbench.bench.peak import in_own_process
from workbench.bench.subjects import RANDOM_NAME, SMALL_NAME, TINY_NAME, plain_twin, random_ids, subject
from workbench.cache.cache import WorkbenchCache
from workbench.cache.segments import DenseSegment
from workbench.inspection.queries import Rows
from workbench.inspection.trace import AttentionTrace
from workbench.models.load import Model
from workbench.runs.inspect import inspect
from workbench.runs.prompt import forward
from workbench.strategies.recipe import Recipe

LENGTHS = (4096, 16384, 131072)
WHOLE = 16384  # tokens up to which whole prompts are read
MATRICES = 4096  # tokens up to which transformers' output_attentions=True is run beside
CHUNK = 2048
VIEWS = {  # what a person looks at: where it starts, how much of the prompt it shows
    "whole prompt": (0.0, 1.0),
    "a quarter": (0.7, 0.25),
    "512 tokens": (0.6, 512),
    "256 tokens": (0.4, 256),
}
GOALS = {"time": 1.6, "matrices_time": 0.5, "matrices_memory": 1 / 20, "per_head": 1 << 20, "first_tile_ms": 400.0}


def measure_inspect(
    lengths: Sequence[int] | None, rounds: int | None, quick: bool, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One entry per model and length: ``prefill``, ``memory``, ``tiles``, ``payload`` and, on short prompts, ``matrices``."""
    out = []
    for name in [TINY_NAME] if quick else [SMALL_NAME, RANDOM_NAME]:
        for length in lengths or ((256,) if quick else LENGTHS):
            tell(f"inspect: {name}, {length:,} tokens")
            out.append(measure_one(name, length, rounds or (1 if quick else 3), quick, tell))
    return out


def measure_one(name: str, length: int, rounds: int, quick: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    """One model, one length."""
    model = subject(name)
    g = model.geometry
    whole = length <= WHOLE
    case: dict[str, Any] = {"model": name, "dtype": g.dtype, "tokens": length, "rounds": rounds}
    case["heads"] = g.num_layers * g.num_heads
    case["read"] = "the whole prompt" if whole else f"the last {CHUNK:,} tokens, onto random entries before them"
    ways = {"plain": _plain(model), "full": _full(model), "inspect": _inspect(model)} if whole else _last_chunk(model)
    if length <= MATRICES:
        if _room_for(g.num_layers * g.num_heads * length**2 * 4 * 2):
            ways["matrices"] = _matrices(model)
        else:
            case["matrices"] = {"skipped": "two times the matrices do not fit the memory that is free"}
    spent: dict[str, list[float]] = {way: [] for way in ways}
    trace = None
    for number in range(rounds):
        order = list(ways) if number % 2 == 0 else list(ways)[::-1]
        for way in order:
            gc.collect()
            began = time.perf_counter()
            found = ways[way](length)
            spent[way].append(time.perf_counter() - began if not isinstance(found, tuple) else found[0])
            if way == "inspect":
                trace = found[1] if isinstance(found, tuple) else found
            del found
    base = "plain" if whole else "full"
    case["prefill"] = {
        way: {
            "seconds": statistics.median(seconds),
            "ratio": round(statistics.median(a / b for a, b in zip(seconds, spent[base])), 3),
        }
        for way, seconds in spent.items()
    }
    assert isinstance(trace, AttentionTrace)
    held = trace.nbytes()
    case["memory"] = {"held": held, "held_per_head": (held["counts"] + held["queries"]) / case["heads"]}
    if whole and can_count():
        case["memory"] |= _peaks(name, length, case["heads"], "matrices" in ways, tell)
    if "matrices" in ways:
        case["matrices"] = {
            "time": round(statistics.median(a / b for a, b in zip(spent["inspect"], spent["matrices"])), 3)
        }
        if "extra_of_matrices" in case["memory"]:
            case["matrices"]["memory"] = case["memory"].pop("extra_of_matrices")
    tell(f"inspect: {name}, {length:,} tokens, tiles")
    case["tiles"], largest = measure_tiles(trace, 2 if quick else 8)
    scalars = 4 * (2 + trace.distance_mass().shape[-1]) * case["heads"]
    case["payload"] = {
        "tile": largest,
        "thumbnails": trace.thumbnails().numel(),
        "scalars": scalars,
        "map": trace.map(0, 0).numel(),
    }
    case["reached"] = _reached(case)
    return case


def measure_tiles(trace: AttentionTrace, repeats: int) -> tuple[dict[str, dict[str, Any]], int]:
    """Per view and step how long a tile takes, over different heads and places, nothing computed before; and most bytes."""
    tokens, g = len(trace.prompt), trace.model.geometry
    out: dict[str, dict[str, Any]] = {}
    largest = 0
    for view, (start, extent) in VIEWS.items():
        width = max(1, int(tokens * extent)) if extent <= 1 else int(extent)
        if width > tokens or (extent > 1 and width == tokens):
            continue  # the whole prompt was looked at
        for step in ("first picture", "refined"):
            seconds, shown = [], []
            for number in range(repeats):
                layer, head = (g.num_layers - 1 - number) % g.num_layers, number % g.num_heads
                q0 = min(int(tokens * start) + 1031 * number, tokens - width)
                options = {"rows": 32} if step == "first picture" else {}
                began = time.perf_counter()
                tile = trace.tile(layer, head, q0, q0 + width, q0, q0 + width, **options)  # type: ignore[arg-type]
                seconds.append(time.perf_counter() - began)
                shown.append(tile.rows)
                largest = max(largest, tile.nbytes())
            out[f"{view}, {step}"] = {**percentiles(seconds), "rows": [min(shown), max(shown)], "rows_in_view": width}
    return out, largest


def _reached(case: dict[str, Any]) -> dict[str, bool]:
    """The figures that are asked for at this length, and whether they were reached."""
    found = {}
    if case["tokens"] == WHOLE:
        found["time"] = case["prefill"]["inspect"]["ratio"] <= GOALS["time"]
    if case["tokens"] >= 131072:
        found["per_head"] = case["memory"]["held_per_head"] <= GOALS["per_head"]
        first = [tile["p50_ms"] for name, tile in case["tiles"].items() if name.endswith("first picture")]
        found["first_tile_ms"] = max(first) <= GOALS["first_tile_ms"]
    if case["tokens"] == MATRICES:
        for key in ("time", "memory"):
            if key in case.get("matrices", {}):
                found[f"matrices_{key}"] = case["matrices"][key] <= GOALS[f"matrices_{key}"]
    return found


# --- the ways a prompt is read ----------------------------------------------------------------------------------------
Way = Callable[[int], Any]


def _plain(model: Model) -> Way:
    twin = plain_twin(model)

    def read(length: int) -> None:
        ids = torch.tensor([random_ids(model, length)])
        with torch.inference_mode():
            twin(input_ids=ids, past_key_values=DynamicCache(config=twin.config), use_cache=True, logits_to_keep=1)

    return read


def _full(model: Model) -> Way:
    def read(length: int) -> None:
        ids = random_ids(model, length)
        cache = WorkbenchCache(Recipe(), model.geometry, length)
        for start in range(0, length, CHUNK):
            forward(model, cache, ids[start : start + CHUNK])

    return read


def _inspect(model: Model) -> Way:
    return lambda length: inspect(model, random_ids(model, length), chunk=CHUNK)


def _matrices(model: Model) -> Way:
    config = copy.deepcopy(model.network.config)
    twin = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=model.network.dtype)
    twin.load_state_dict(model.network.state_dict(), assign=True)
    twin.tie_weights()
    twin.eval()

    def read(length: int) -> int:
        ids = torch.tensor([random_ids(model, length)])
        with torch.inference_mode():
            return len(twin(input_ids=ids, use_cache=True, logits_to_keep=1, output_attentions=True).attentions)

    return read


def _last_chunk(model: Model) -> dict[str, Way]:
    """Seconds of the last chunk, and the trace, with random entries and queries for all that came before."""

    def read(length: int, count: bool) -> tuple[float, AttentionTrace | None]:
        ids, cache = random_ids(model, length), random_past(model, length, length - CHUNK)
        trace = None
        if count:
            trace = AttentionTrace(model, ids, range(model.geometry.num_layers), 4, cache)
            random_queries(trace, length - CHUNK)
            cache.reader = trace.reader
        began = time.perf_counter()
        forward(model, cache, ids[-CHUNK:])
        seconds = time.perf_counter() - began
        cache.reader = None
        return seconds, trace

    return {"full": lambda length: read(length, False), "inspect": lambda length: read(length, True)}


def random_past(model: Model, length: int, past: int) -> WorkbenchCache:
    """A cache for a prompt of ``length`` tokens that holds random keys and values for the first ``past``."""
    g = model.geometry
    cache = WorkbenchCache(Recipe(), g, length)
    generator = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        entries = torch.randn(1, g.num_kv_heads, past, g.head_dim, generator=generator)
        layer.lazy_initialization(entries, entries)
        segment = layer.store.segments[0]
        assert isinstance(segment, DenseSegment)
        segment.reserve(entries, length)
        segment.append(entries, entries.roll(1, 2), 0)
        layer.seen = past
    return cache


def random_queries(trace: AttentionTrace, past: int) -> None:
    """Random queries for the rows below ``past`` that the trace would hold."""
    g = trace.model.geometry
    at = trace.queries.at[trace.queries.at < past]
    generator = torch.Generator().manual_seed(1)
    for layer in range(g.num_layers):
        q = torch.randn(g.num_heads, len(at), g.head_dim, generator=generator)
        trace.queries.hold_rows(layer, Rows(at, q))


# --- memory -----------------------------------------------------------------------------------------------------------
def _peaks(name: str, length: int, heads: int, matrices: bool, tell: Callable[[str], None]) -> dict[str, float]:
    """Peak resident bytes beyond those of reading without counting, in the same chunks; and against those of the matrices."""
    added = {}
    for way in ("plain", "full", "inspect", *(["matrices"] if matrices else [])):
        tell(f"inspect: {name}, {length:,} tokens, peak of {way}")
        added[way] = in_own_process("workbench.bench.inspect", name, str(length), way)["added"]
    extra = max(0.0, added["inspect"] - added["full"])
    found = {"peak_extra": extra, "peak_extra_per_head": extra / heads}
    if matrices:
        found["extra_of_matrices"] = round(extra / max(1.0, added["matrices"] - added["plain"]), 4)
    return found


def peak_of(name: str, length: int, way: str) -> dict[str, int]:
    """Bytes at the peak of one way of reading a prompt."""
    model = subject(name)
    read = {"plain": _plain, "full": _full, "inspect": _inspect, "matrices": _matrices}[way](model)
    read(64)  # the libraries' own buffers are no part of it
    return resident_peak(lambda: read(length))


def _room_for(size: int) -> bool:
    import psutil

    return bool(psutil.virtual_memory().available > size)


if __name__ == "__main__":
    print(json.dumps(peak_of(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
