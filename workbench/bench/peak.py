"""Peak memory of one contender, each in a process of its own: what the kernel counted, on Linux.

Run as a module it measures one contender and prints JSON; :func:`measure_peaks` starts it for each.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from workbench.bench.contest import can_count, resident_peak

MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}  # freed is freed at once


def measure_peaks(
    recipes: Sequence[str] | None,
    lengths: Sequence[int] | None,
    rounds: int | None,
    quick: bool,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Per model and length: peak resident bytes of reading the prompt and decoding 8 tokens, per contender.

    ``added`` is what the run added to the loaded model, ``total`` the whole process; both also as ratios to plain
    transformers. Empty where the kernel does not count it (it takes Linux's /proc/self/clear_refs).
    """
    from workbench.bench.speed import LENGTHS, PLAIN, RECIPES
    from workbench.bench.subjects import subjects

    if not can_count():
        return []
    names = [PLAIN, *dict.fromkeys(["full", *(recipes or RECIPES)])]
    out = []
    for model in subjects(quick):
        for length in lengths or ((128,) if quick else LENGTHS):
            lanes: dict[str, dict[str, float]] = {}
            for name in names:
                tell(f"peak memory: {model}, {length:,} tokens, {name}")
                runs = [
                    in_own_process("workbench.bench.peak", model, str(length), name)
                    for _ in range(1 if quick else min(rounds or 3, 3))
                ]
                lanes[name] = {key: statistics.median(run[key] for run in runs) for key in ("added", "total")}
            for lane in lanes.values():
                lane["added_ratio"] = round(lane["added"] / max(1.0, lanes[PLAIN]["added"]), 4)
                lane["total_ratio"] = round(lane["total"] / lanes[PLAIN]["total"], 4)
            out.append({"model": model, "tokens": length, "lanes": lanes})
    return out


def in_own_process(module: str, *arguments: str) -> dict[str, float]:
    """The JSON that a module prints in a process of its own, where freed memory is given back at once."""
    environment = {**os.environ, **MALLOC, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {' '.join(arguments)} failed: {done.stderr.strip().splitlines()[-1:]}")
    return dict(json.loads(done.stdout))


def peak_of(model_name: str, length: int, name: str) -> dict[str, int]:
    """Bytes at the peak of one prompt and 8 tokens: added to the loaded model, and in all."""
    import torch

    from workbench.bench.speed import contenders
    from workbench.bench.subjects import random_ids, subject

    model = subject(model_name)
    one = next(c for c in contenders(model, [] if name == "plain transformers" else [name]) if c.name == name)
    length = min(length, model.geometry.max_positions - 9)
    ids, following = torch.tensor([random_ids(model, length)]), torch.tensor([random_ids(model, 8, seed=1)])
    one.prefill(ids[:, :64])  # the libraries' own buffers are no part of it
    one.decode(following[:, :2])
    one.cache = None
    return resident_peak(lambda: (one.prefill(ids), one.decode(following)))


if __name__ == "__main__":
    print(json.dumps(peak_of(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
