"""``kvw bench``: run the measurements, print them, write them."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workbench.commands.output import check_target, console, size, write_result
from workbench.errors import WorkbenchError

USUAL = ("speed", "bytes", "kernels", "load", "rerun", "app")
SUBJECTS = (*USUAL, "eviction", "accuracy", "inspect")
MARK = {None: "", True: "reached", False: "MISSED"}


def measure(
    subjects: Sequence[str],
    recipes: list[str] | None,
    lengths: list[int] | None,
    rounds: int | None,
    quick: bool,
    json_file: str | None,
    methods: list[str] | None = None,
    samples: int | None = None,
    kvpress_python: str | None = None,
) -> int:
    """Measure; 0, or 1 where a figure that is asked for is not reached or a speed was refused."""
    unknown = [name for name in subjects if name not in SUBJECTS]
    if unknown:
        raise WorkbenchError(f"There is no measurement '{unknown[0]}'; there are {', '.join(SUBJECTS)}.")
    if any(length < 16 for length in lengths or []):
        raise WorkbenchError(f"--length must be at least 16 tokens, got {min(lengths or [0])}.")
    check_target(json_file)
    from workbench.bench.accuracy import eviction_methods, measure_accuracy
    from workbench.bench.app import measure_app
    from workbench.bench.cache_bytes import measure_bytes
    from workbench.bench.eviction import PAIRS, measure_eviction
    from workbench.bench.inspect import measure_inspect
    from workbench.bench.kernels import measure_kernels
    from workbench.bench.latency import measure_load, measure_rerun
    from workbench.bench.machine import commit, describe_machine
    from workbench.strategies.recipe import Recipe

    recipes = [Recipe.parse(text).text for text in recipes] if recipes else None
    for subject, known in (("eviction", list(PAIRS)), ("accuracy", eviction_methods())):
        if subject in subjects and (strange := sorted(set(methods or ()) - set(known))):
            raise WorkbenchError(f"'{strange[0]}' is not measured by {subject}; there are {', '.join(known)}.")
    if kvpress_python and shutil.which(kvpress_python) is None:
        raise WorkbenchError(
            f"{kvpress_python} is no program; give --kvpress-python the Python of an environment that has kvpress."
        )
    result: dict[str, Any] = {
        "schema": 1,
        "command": command_line(subjects, recipes, lengths, rounds, quick, methods, samples, bool(kvpress_python)),
        "commit": commit(),
        "quick": quick,
        "machine": describe_machine(),
    }
    measurements: dict[str, Callable[[], Any]] = {
        "speed": lambda: _speed(recipes, lengths, rounds, quick),
        "bytes": lambda: measure_bytes(recipes, quick, _tell),
        "kernels": lambda: measure_kernels(lengths, rounds, quick, _tell),
        "load": lambda: measure_load(rounds, quick, _tell),
        "rerun": lambda: measure_rerun(rounds, quick, _tell),
        "app": lambda: measure_app(rounds, quick, _tell),
        "eviction": lambda: measure_eviction(methods, lengths, rounds, kvpress_python, quick, _tell),
        "accuracy": lambda: measure_accuracy(methods, samples, quick, _tell),
        "inspect": lambda: measure_inspect(lengths, rounds, quick, _tell),
    }
    failed: dict[str, str] = {}
    out = console() if json_file is None else Console(stderr=True, width=160, highlight=False)
    for name in dict.fromkeys(subjects or USUAL):
        try:
            result[name] = measurements[name]()
        except Exception as error:  # what the others measured is not lost
            if os.environ.get("KVW_DEBUG"):
                raise
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            _tell(f"{name} could not be measured ({failed[name]}).")
            continue
        SHOW[name](result[name], out)
    if failed:
        result["failed"] = failed
    if json_file is not None:
        write_result(json_file, result)
        if "kernels" in result and json_file != "-":
            _draw(json_file, result["kernels"])
    return 1 if failed or _missed(result) else 0


def command_line(
    subjects: Sequence[str],
    recipes: list[str] | None,
    lengths: list[int] | None,
    rounds: int | None,
    quick: bool,
    methods: list[str] | None = None,
    samples: int | None = None,
    kvpress: bool = False,
) -> str:
    """The command that repeats a measurement; whose kvpress it was is nobody else's path."""
    words = ["kvw", "bench", *subjects]
    words += [word for recipe in recipes or [] for word in ("--recipe", recipe)]
    words += [word for length in lengths or [] for word in ("--length", str(length))]
    words += ["--rounds", str(rounds)] if rounds else []
    words += [word for method in methods or [] for word in ("--method", method)]
    words += ["--samples", str(samples)] if samples else []
    words += ["--kvpress-python", "PYTHON"] if kvpress else []
    return shlex.join([*words, "--quick"] if quick else words)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _speed(recipes: list[str] | None, lengths: list[int] | None, rounds: int | None, quick: bool) -> dict[str, Any]:
    from workbench.bench.peak import measure_peaks
    from workbench.bench.speed import measure_speed

    return {
        "times": measure_speed(recipes, lengths, rounds, quick, _tell),
        "peak_memory": measure_peaks(recipes, lengths, rounds, quick, _tell),
    }


def _missed(result: dict[str, Any]) -> bool:
    """Whether a speed was refused, a method failed, or a figure that is asked for was not reached."""
    eviction, kernels = result.get("eviction", {}), result.get("kernels", {}).get("cases", [])
    refused = any("refused" in case for case in [*result.get("speed", {}).get("times", []), *kernels, eviction])
    failed = any("failed" in method for method in eviction.get("methods", {}).values())
    cases = [*result.get("bytes", []), *eviction.get("held", [])]
    asked = [*kernels, *(lane for case in cases for lane in case["lanes"].values())]
    missed = any(figure.get("reached") is False for figure in asked)
    inspected = [reached for case in result.get("inspect", []) for reached in case["reached"].values()]
    return refused or failed or missed or not all(inspected)


def _show_speed(speed: dict[str, Any], out: Console) -> None:
    for case in speed["times"]:
        out.print(
            f"{case['model']}, {case['dtype']}, {case['tokens']:,} tokens, {case['rounds']} rounds, against plain transformers",
            markup=False,
        )
        if "refused" in case:
            out.print(case["refused"], markup=False)
            continue
        table = Table("recipe", "prefill", "range", "s", "decode", "range", "ms a token")
        for name, lane in case["lanes"].items():
            a, b = lane["prefill"], lane["decode"]
            row = (f"{a['ratio']:.3f}x", f"{a['low']:.3f}-{a['high']:.3f}", f"{a['seconds']:.3f}")
            table.add_row(
                escape(name), *row, f"{b['ratio']:.3f}x", f"{b['low']:.3f}-{b['high']:.3f}", f"{1e3 * b['seconds']:.2f}"
            )
        out.print(table)
    for case in speed["peak_memory"]:
        out.print(
            f"{case['model']}, {case['tokens']:,} tokens: peak resident memory, prompt and 8 tokens", markup=False
        )
        table = Table("recipe", "added to the loaded model", "of plain", "whole process", "of plain")
        for name, lane in case["lanes"].items():
            table.add_row(
                escape(name),
                size(lane["added"]),
                f"{lane['added_ratio']:.3f}x",
                size(lane["total"]),
                f"{lane['total_ratio']:.3f}x",
            )
        out.print(table)


def _show_bytes(cases: list[dict[str, Any]], out: Console) -> None:
    for case in cases:
        out.print(f"{case['model']}, {case['dtype']}, {case['tokens']:,} tokens: bytes after the prompt", markup=False)
        table = Table("recipe", "held", "of full", "at most", "")
        for name, lane in case["lanes"].items():
            limit = "" if lane["at_most"] is None else f"{lane['at_most']:.2f}x"
            table.add_row(escape(name), size(lane["used_bytes"]), f"{lane['ratio']:.4f}x", limit, MARK[lane["reached"]])
        out.print(table)


def _show_inspect(cases: list[dict[str, Any]], out: Console) -> None:
    for case in cases:
        out.print(
            f"{case['model']}, {case['dtype']}, {case['tokens']:,} tokens, {case['heads']} heads; read: {case['read']}",
            markup=False,
        )
        table = Table("reading", "s", "ratio")
        for way, found in case["prefill"].items():
            table.add_row(way, f"{found['seconds']:.3f}", f"{found['ratio']:.3f}x")
        out.print(table)
        memory = case["memory"]
        out.print(f"held per head {size(memory['held_per_head'])}", markup=False)
        if "peak_extra" in memory:
            out.print(f"peak beyond full {size(memory['peak_extra'])}, per head {size(memory['peak_extra_per_head'])}")
        for key, value in case.get("matrices", {}).items():
            out.print(f"against output_attentions=True, {key}: {value}", markup=False)
        table = Table("tile", "p50 ms", "p95 ms", "most ms", "rows", "of")
        for view, tile in case["tiles"].items():
            waits = (f"{tile[k]:.0f}" for k in ("p50_ms", "p95_ms", "max_ms"))
            table.add_row(view, *waits, "-".join(map(str, sorted(set(tile["rows"])))), f"{tile['rows_in_view']:,}")
        out.print(table)
        out.print("sent: " + ", ".join(f"{key} {size(count)}" for key, count in case["payload"].items()), markup=False)
        for goal, reached in case["reached"].items():
            out.print(f"{goal.replace('_', ' ')}: {'reached' if reached else 'MISSED'}", markup=False)


def _draw(json_file: str, kernels: dict[str, Any]) -> None:
    """The roofline plot, beside the figures."""
    from workbench.bench.roofline import plot

    target = Path(json_file).with_suffix(".svg")
    target.write_text(plot(kernels), encoding="utf-8")
    _tell(f"plot: {target}")


def _show_kernels(found: dict[str, Any], out: Console) -> None:
    out.print(
        f"Decode attention on the {found['device']}, {found['copy_gb_per_second']:.1f} GB/s by copying; the fused path "
        "against dense attention in the same run",
        markup=False,
    )
    dense = sorted({name for case in found["cases"] for name in case.get("speedup", {})})
    table = Table(
        "held as", "tokens", "D", "G", "µs", "GB/s", "of copy", *(f"vs {name}" for name in dense), "memory", ""
    )
    for case in found["cases"]:
        how = f"{case['bits']} bit, g {case['group_size']}" if "bits" in case else f"{case['sparsity']:.0%} pruned"
        shape = (how, f"{case['tokens']:,}", str(case["head_dim"]), str(case["query_heads_per_kv_head"]))
        if "refused" in case:
            table.add_row(*shape, case["refused"])
            continue
        speed = [f"{case['speedup'][name]['median']:.2f}x" if name in case["speedup"] else "" for name in dense]
        memory = f"{case['memory']['ratio']:.3f}x" if case.get("memory") else ""
        mark = {None: "", True: "reached", False: "MISSED"}[case["reached"]]
        figures = (
            f"{case['microseconds']['fused']:,.0f}",
            f"{case['gb_per_second']:.1f}",
            f"{case['of_copy_bandwidth']:.0%}",
        )
        table.add_row(*shape, *figures, *speed, memory, mark)
    out.print(table)


def _show_waits(found: dict[str, Any], out: Console) -> None:
    if "skipped" in found:
        out.print(f"Not measured: {found['skipped']}.", markup=False)
        return
    about = ", ".join(f"{key} {value}" for key, value in found.items() if not isinstance(value, dict))
    table = Table(about, "p50 ms", "p95 ms", "most ms")
    for key, value in found.items():
        if isinstance(value, dict):
            table.add_row(key.replace("_", " "), *(f"{value[k]:.1f}" for k in ("p50_ms", "p95_ms", "max_ms")))
    out.print(table)


def _show_eviction(found: dict[str, Any], out: Console) -> None:
    kvpress = found["kvpress"]
    against = f"against kvpress {kvpress['kvpress']}" if kvpress else "without kvpress"
    out.print(
        f"{found['model']}, {found['dtype']}, budget {found['budget']}, {found['threads']} threads, {found['rounds']} rounds, "
        f"prompt and {found['decoded']} tokens, {against}",
        markup=False,
    )
    if "refused" in found:
        out.print(found["refused"], markup=False)
        return
    table = Table(
        "method", "tokens", "s", "of kvpress", "range", "decode", "peak", "of kvpress", "held", "of full", "there"
    )
    for name, method in found["methods"].items():
        if "failed" in method:
            table.add_row(escape(name), escape(method["failed"]))
            continue
        ours, theirs, ratio = method["workbench"], method.get("kvpress", {}), method["ratio"]
        total, decode = ratio.get("total"), ratio.get("decode")
        table.add_row(
            escape(name),
            f"{method['tokens']:,}",
            f"{ours['total']:.2f}",
            f"{total['ratio']:.3f}x" if total else "",
            f"{total['low']:.3f}-{total['high']:.3f}" if total else "",
            f"{decode['ratio']:.3f}x" if decode else "",
            size(ours["peak"]) if "peak" in ours else "",
            f"{ratio['peak']:.3f}x" if "peak" in ratio else "",
            size(ours["held"]),
            f"{ours['of_full']:.4f}",
            f"{theirs['of_full']:.4f}" if theirs else "",
        )
    out.print(table)
    for case in found["held"]:
        out.print(f"{case['model']}, {case['tokens']:,} tokens: bytes held, of full", markup=False)
        table = Table("recipe", "most at a layer's boundary", "after the prompt", "")
        for name, lane in case["lanes"].items():
            if "left_out" in lane:
                table.add_row(escape(name), escape(lane["left_out"]))
                continue
            boundary = f"{lane['boundary']:.4f}" + ("" if lane["cascades"] else " (not asked)")
            table.add_row(escape(name), boundary, f"{lane['end']:.4f}", MARK[lane["reached"]])
        out.print(table)


def _show_accuracy(found: dict[str, Any], out: Console) -> None:
    if "skipped" in found:
        out.print(f"Not measured: {found['skipped']}.", markup=False)
        return
    for mode, right in found["full"].items():
        out.print(f"{found['model']}, {mode}: right of {found['samples']}; the full cache {right}", markup=False)
        table = Table("method", *map(str, found["budgets"]))
        for name, by_mode in found["methods"].items():
            table.add_row(escape(name), *map(str, by_mode[mode]))
        out.print(table)
    for reason in found["left_out"].values():
        out.print(reason, markup=False)


SHOW: dict[str, Callable[[Any, Console], None]] = {
    "speed": _show_speed,
    "bytes": _show_bytes,
    "kernels": _show_kernels,
    "load": _show_waits,
    "rerun": _show_waits,
    "app": _show_waits,
    "eviction": _show_eviction,
    "accuracy": _show_accuracy,
    "inspect": _show_inspect,
}
