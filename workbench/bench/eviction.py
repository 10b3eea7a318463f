"""Eviction methods against kvpress: the same weights, prompt, settings and number of threads, in two processes that take turns.

kvpress wants an older transformers than the workbench and wraps transformers' attention functions when it is imported, so
it runs in an environment of its own (tests/oracle/make_fixtures.py says how to make one), whose interpreter is given. In
every round each side reads the prompt in one forward call, compresses, and decodes the same tokens; who begins changes from
round to round. A ratio is taken within a round; reported are the median and the range. The full cache must give the same
logits on both sides, or nothing is timed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from transformers.utils import logging as transformers_logging

from workbench.bench import contest
from workbench.bench.held import measure_held
from workbench.bench.peak import MALLOC
from workbench.bench.speed import TOLERANCE
from workbench.bench.subjects import RANDOM_NAME, TINY_NAME, random_ids, subject
from workbench.models.load import Model

BUDGET = 0.2
LENGTH, DECODED = 8192, 64
EAGER_LENGTH = 2048  # kvpress's observed attention holds all T x T weights of a layer at once
GATE_TOKENS = 1024


@dataclass(frozen=True)
class Pair:
    """A method on both sides, with the same settings.

    Attributes:
        recipe: ours, acting once after the prompt, as kvpress does.
        press: kvpress's; see :class:`workbench.bench.contest.KVPress`.
        longest: tokens it is measured at, at most.
    """

    recipe: str
    press: dict[str, Any]
    longest: int | None = None


RATIO = round(1 - BUDGET, 6)  # kvpress counts what goes
SNAP = {"class": "SnapKVPress", "compression_ratio": RATIO, "window_size": 32, "kernel_size": 5}
VOTES = "window=32, kernel=5"


def scorer(name: str, **given: Any) -> dict[str, Any]:
    return {"class": name, "compression_ratio": RATIO, **given}


PAIRS = {
    "streaming_llm": Pair(
        f"streaming_llm(budget={BUDGET}, sinks=4, recompress_every=0)", scorer("StreamingLLMPress", n_sink=4)
    ),
    "observed_attention": Pair(
        f"observed_attention(budget={BUDGET})", scorer("ObservedAttentionPress", attention="eager"), EAGER_LENGTH
    ),
    "tova": Pair(f"tova(budget={BUDGET}, recompress_every=0)", scorer("TOVAPress")),
    "snapkv": Pair(f"snapkv(budget={BUDGET}, {VOTES})", SNAP),
    "pyramidkv": Pair(f"pyramidkv(budget={BUDGET}, {VOTES}, beta=20)", {**SNAP, "class": "PyramidKVPress", "beta": 20}),
    "adakv": Pair(
        f'adakv(scorer="snapkv", budget={BUDGET}, {VOTES}, alpha=0.2)',
        {"class": "AdaKVPress", "press": SNAP, "alpha_safeguard": 0.2},
    ),
    "critical": Pair(
        f'critical(scorer="snapkv", budget={BUDGET}, {VOTES}, first_stage=0.5, epsilon=0.0001)',
        {"class": "CriticalKVPress", "press": SNAP, "first_stage_ratio": 0.5, "epsilon": 1e-4},
    ),
    "adakv, critical": Pair(
        f'adakv(scorer="critical", budget={BUDGET}, {VOTES}, first_stage=0.5, epsilon=0.0001, alpha=0.2)',
        {
            "class": "CriticalAdaKVPress",
            "press": SNAP,
            "alpha_safeguard": 0.2,
            "first_stage_ratio": 0.5,
            "epsilon": 1e-4,
        },
    ),
    "knorm": Pair(f"knorm(budget={BUDGET})", scorer("KnormPress")),
    "keydiff": Pair(f"keydiff(budget={BUDGET}, block=0)", scorer("KeyDiffPress")),
    "expected_attention": Pair(
        f"expected_attention(budget={BUDGET}, n_future=512, sinks=4)",
        scorer("ExpectedAttentionPress", n_future_positions=512, n_sink=4),
    ),
    "chunkkv": Pair(
        f'chunkkv(scorer="snapkv", budget={BUDGET}, {VOTES}, chunk_length=20)',
        {"class": "ChunkKVPress", "press": SNAP, "chunk_length": 20},
    ),
    "random": Pair(f"random(budget={BUDGET}, seed=0)", scorer("RandomPress", seed=0)),
    "think": Pair(  # no budget: it drops channels of the keys, not tokens
        "think(ratio=0.4, window=32)", {"class": "ThinKPress", "key_channel_compression_ratio": 0.4, "window_size": 32}
    ),
}


class Contestant:
    """A process of :mod:`workbench.bench.contest`."""

    def __init__(self, side: str, python: str, folder: str, log: IO[str], malloc: bool = False) -> None:
        threads = torch.get_num_threads()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            **(MALLOC if malloc else {}),
        }
        if side == "workbench":
            environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
            how = ["-m", contest.__name__]
        else:
            how = ["-I", contest.__file__]  # nothing of ours on its path
        self.side, self.log = side, log
        command = [python, *how, side, folder, str(threads)]
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the process answers; RuntimeError where it failed or ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = Path(self.log.name).read_text().strip().splitlines() or ["nothing was said"]
            raise RuntimeError(f"the {self.side} side ended: {said[-1]}")
        found = dict(json.loads(line))
        if "failed" in found:
            raise RuntimeError(f"the {self.side} side failed: {found['failed']}")
        return found

    def close(self) -> None:
        self.process.communicate()  # closes its input: it ends


@contextmanager
def contestants(folder: str, kvpress_python: str | None, malloc: bool = False) -> Iterator[dict[str, Contestant]]:
    """Our side, and kvpress's where there is an interpreter for it."""
    pythons = {"workbench": sys.executable, "kvpress": kvpress_python}
    with tempfile.TemporaryDirectory() as logs:
        running: dict[str, Contestant] = {}
        try:
            for side, python in pythons.items():
                if python is not None:
                    with open(Path(logs) / side, "w") as log:
                        running[side] = Contestant(side, python, folder, log, malloc)
            yield running
        finally:
            for one in running.values():
                one.close()


def measure_eviction(
    methods: Sequence[str] | None,
    lengths: Sequence[int] | None,
    rounds: int | None,
    kvpress_python: str | None,
    quick: bool,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Times, peak memory and bytes of every method on both sides, and the bytes of all our methods (:mod:`.held`).

    Returns:
        ``methods``: name -> what :func:`measure_pair` found, or ``failed``. ``kvpress``: its versions, None without it.
        ``equal``, ``largest_difference``: whether both sides' full caches give the same logits; where not, ``refused``.
    """
    model = subject(TINY_NAME if quick else RANDOM_NAME)
    length = max(lengths or ((256,) if quick else (LENGTH,)))
    rounds = rounds or (2 if quick else 5)
    out: dict[str, Any] = {
        "model": model.id,
        "dtype": model.geometry.dtype,
        "budget": BUDGET,
        "decoded": DECODED,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "kvpress": None,
        "methods": {},
    }
    if kvpress_python is None:
        tell("eviction: our side alone; --kvpress-python PATH, an interpreter with kvpress, measures both.")
    with tempfile.TemporaryDirectory() as folder:
        transformers_logging.disable_progress_bar()
        model.network.save_pretrained(folder)
        with contestants(folder, kvpress_python) as sides:
            if kvpress_python is not None:
                out["kvpress"] = sides["kvpress"].ask({"do": "about"})
                out |= same_logits(sides, model, min(length, GATE_TOKENS))
                if not out["equal"]:
                    return out
            for name in methods or PAIRS:
                tell(f"eviction: {name}")
                try:
                    out["methods"][name] = measure_pair(sides, model, PAIRS[name], length, rounds)
                except RuntimeError as error:  # the other methods are not lost
                    out["methods"][name] = {"recipe": PAIRS[name].recipe, "failed": str(error)}
        if contest.can_count():
            for name, found in out["methods"].items():
                if "failed" not in found:
                    tell(f"eviction: {name}, peak memory")
                    for side, added in peaks(folder, kvpress_python, model, PAIRS[name], found["tokens"]).items():
                        found[side]["peak"] = added
                    found["ratio"] |= peak_ratio(found)
    out["held"] = measure_held(BUDGET, length, quick, tell)
    return out


def request(do: str, side: str, model: Model, pair: Pair | None, length: int, decoded: int = DECODED) -> dict[str, Any]:
    """What to ask of a side; without a pair its full cache."""
    method = {"workbench": pair.recipe, "kvpress": pair.press}[side] if pair else {"workbench": "full"}.get(side)
    ids, following = random_ids(model, length), random_ids(model, decoded, seed=1)
    return {"do": do, "method": method, "ids": ids, "following": following}


def same_logits(sides: dict[str, Contestant], model: Model, length: int) -> dict[str, Any]:
    """Whether both full caches lead to the same logits after ``length`` tokens and 8 decoded ones."""
    found = {name: side.ask(request("race", name, model, None, length, 8))["logits"] for name, side in sides.items()}
    difference = distance(found["workbench"], found["kvpress"])
    out: dict[str, Any] = {"equal": difference <= TOLERANCE, "largest_difference": difference}
    if not out["equal"]:
        out["refused"] = (
            f"the full caches of the two sides differ by {difference:.2g} standard deviations of the logits, so nothing is compared."
        )
    return out


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest difference, in standard deviations of ``b``."""
    x, y = torch.tensor(a), torch.tensor(b)
    return float((x - y).abs().max() / y.std())


def measure_pair(sides: dict[str, Contestant], model: Model, pair: Pair, length: int, rounds: int) -> dict[str, Any]:
    """One method: per side the median seconds and the bytes held; the ratios, ours to kvpress's, within the rounds.

    Returns:
        ``workbench`` and ``kvpress``: {prefill, decode, total: seconds; held: bytes; of_full}; ``ratio``: of prefill,
        decode and total {ratio, low, high}, and of the bytes held; ``difference`` between the last logits, in standard
        deviations: not 0 where the sides keep other entries (ties, whole chunks, the newest keys of ThinK).
    """
    length = min(length, pair.longest or length)
    for name, side in sides.items():  # warm: kernels chosen, memory mapped
        side.ask(request("race", name, model, pair, min(256, length), 2))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            found = sides[name].ask(request("race", name, model, pair, length))
            runs[name].append(found | {"total": found["prefill"] + found["decode"]})
    out: dict[str, Any] = {"recipe": pair.recipe, "press": pair.press, "tokens": length}
    full = model.geometry.bytes_per_token * length
    for name, of_side in runs.items():
        held = of_side[-1]["held"]["bytes"]
        seconds = {part: statistics.median(run[part] for run in of_side) for part in ("prefill", "decode", "total")}
        out[name] = {**seconds, "held": held, "of_full": round(held / full, 5)}
    if "kvpress" in runs:
        ours, theirs = runs["workbench"], runs["kvpress"]
        out["ratio"] = {
            part: ratios([a[part] / b[part] for a, b in zip(ours, theirs)]) for part in ("prefill", "decode", "total")
        } | {"held": round(out["workbench"]["held"] / out["kvpress"]["held"], 4)}
        out["difference"] = round(distance(ours[-1]["logits"], theirs[-1]["logits"]), 6)
    else:
        out["ratio"] = {}
    return out


def ratios(found: Sequence[float]) -> dict[str, float]:
    return {"ratio": round(statistics.median(found), 4), "low": round(min(found), 4), "high": round(max(found), 4)}


def peaks(folder: str, kvpress_python: str | None, model: Model, pair: Pair, length: int) -> dict[str, int]:
    """Per side, resident bytes that the run adds to the loaded model, in a process of its own."""
    with contestants(folder, kvpress_python, malloc=True) as sides:
        return {name: side.ask(request("peak", name, model, pair, length, 8))["added"] for name, side in sides.items()}


def peak_ratio(found: dict[str, Any]) -> dict[str, float]:
    if "kvpress" not in found:
        return {}
    return {"peak": round(found["workbench"]["peak"] / max(1, found["kvpress"]["peak"]), 4)}
