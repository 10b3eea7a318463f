"""How long a person waits: loading the house model, and a lane running again after a parameter changed."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from workbench.bench.subjects import HOUSE_NAME, TINY_NAME, house_is_there, random_ids, subject
from workbench.runs.compare import Run
from workbench.runs.events import Token

LOAD = (
    "import time; began = time.perf_counter(); import json; import workbench as wb; wb.load; imported = time.perf_counter(); "
    "wb.load('house/recall', device='cpu'); done = time.perf_counter(); "
    "print(json.dumps({'import': imported - began, 'load': done - imported}))"
)
PROMPT_TOKENS, NEW_TOKENS = 512, 32


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median, 95th percentile (nearest rank) and largest, in milliseconds."""
    ranked = sorted(seconds)
    nearest = ranked[min(len(ranked) - 1, max(0, -(-95 * len(ranked) // 100) - 1))]
    return {
        "p50_ms": round(1e3 * statistics.median(ranked), 1),
        "p95_ms": round(1e3 * nearest, 1),
        "max_ms": round(1e3 * ranked[-1], 1),
    }


def measure_load(rounds: int | None, quick: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    """The house model from a fresh process: importing, loading, and the whole process."""
    if not house_is_there():
        return {"skipped": "the house model's weights are not installed"}
    tell("load: house/recall")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    runs: dict[str, list[float]] = {"import": [], "load": [], "process": []}
    for _ in range(rounds or (1 if quick else 7)):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, check=True)
        runs["process"].append(time.perf_counter() - began)
        for key, seconds in json.loads(done.stdout).items():
            runs[key].append(seconds)
    return {
        "model": HOUSE_NAME,
        "rounds": len(runs["load"]),
        **{key: percentiles(seconds) for key, seconds in runs.items()},
    }


def measure_rerun(rounds: int | None, quick: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    """A lane again with another budget, the prompt and the reference reused: to its first token, and to the last of 32."""
    name = TINY_NAME if quick or not house_is_there() else HOUSE_NAME
    tell(f"rerun: {name}, {PROMPT_TOKENS} prompt tokens, {NEW_TOKENS} new ones")
    model = subject(name)
    prompt = random_ids(model, PROMPT_TOKENS)
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "probes": ("drift",), "reuse_prompt": True}
    first = Run(model, prompt, ["full", "snapkv(budget=0.25)"], **options)
    for _ in first.events():
        pass
    first_token: list[float] = []
    all_tokens: list[float] = []
    finished: list[float] = []
    counts: set[int] = set()
    for number in range(rounds or (3 if quick else 60)):
        recipe = f"snapkv(budget={0.10 + 0.8 * (number % 40) / 40:.3f})"
        began = time.perf_counter()
        again = Run(model, prompt, ["full", recipe], snapshot=first.snapshot, trace=first.trace, **options)
        tokens = []
        for event in again.events(only=[1]):
            if isinstance(event, Token):
                tokens.append(time.perf_counter() - began)
        finished.append(time.perf_counter() - began)
        first_token.append(tokens[0])
        all_tokens.append(tokens[-1])
        counts.add(len(tokens))
    return {
        "model": name,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": sorted(counts),
        "runs": len(finished),
        "first_token": percentiles(first_token),
        "all_tokens": percentiles(all_tokens),
        "with_teacher_forcing": percentiles(finished),
    }
