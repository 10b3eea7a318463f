"""Write what was measured of eviction into docs/eviction.md and its chart: `python -m workbench.bench.eviction_page`.

It reads ``benchmarks/accuracy.json`` and ``benchmarks/eviction.json`` (`kvw bench accuracy`, `kvw bench eviction`) and
replaces the parts of the page between its marks; nothing is measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from workbench.bench.accuracy_chart import chart
from workbench.bench.machine import ROOT

SEEDS = ("cake", "compresskv", "defensivekv", "layer_defensivekv", "locret", "fastkv")
ASKED = 0.2  # the budget at which figures are asked for
MODES = {"query-aware": "the question is in the prompt", "query-agnostic": "the question comes after compression"}


def share(right: int, of: int) -> str:
    return f"{100 * right / of:.0f} %"


def accuracy_part(found: dict[str, Any]) -> str:
    """The tables of ``kvw bench accuracy``, best first at the budget asked for."""
    samples, budgets = found["samples"], found["budgets"]
    at = budgets.index(ASKED)
    lines = [f"{found['model']}, {found['tokens']} tokens, {samples} documents, greedy, exact answers:"]
    for mode, meaning in MODES.items():
        full = found["full"][mode]
        lines += ["", f"**{mode.capitalize()}** ({meaning}); the full cache: {share(full, samples)}", ""]
        lines += ["| method | " + " | ".join(f"{b:.0%}".replace("%", " %") for b in budgets) + " |"]
        lines += ["|---" * (len(budgets) + 1) + "|"]
        order = sorted(found["methods"], key=lambda name: -found["methods"][name][mode][at])
        for name in order:
            cells = [share(right, samples) for right in found["methods"][name][mode]]
            lines += [f"| `{name}`{' (seed)' if name in SEEDS else ''} | " + " | ".join(cells) + " |"]
    lines += ["", *(f"Left out: {reason}" for reason in found["left_out"].values())]
    return "\n".join([*lines, *figures(found), "", *evidence(found)])


def evidence(found: dict[str, Any]) -> list[str]:
    """Query-agnostic answers beside what the head that answers still holds of the fact, most of it first."""
    (layer, head), mode, shown = found["retrieval_head"], "query-agnostic", (ASKED, 0.5)
    at = [found["budgets"].index(budget) for budget in shown]
    lines = [
        f"Query-agnostic: the share of the fact's tokens still held by layer {layer}'s KV head {head}, through which this model "
        "looks answers up, and the answers:",
        "",
        "| method | " + " | ".join(f"held at {b:.0%} | right".replace("%", " %") for b in shown) + " |",
        "|---" * (2 * len(shown) + 1) + "|",
    ]
    held = {name: [by[mode][i] for i in at] for name, by in found["evidence"].items()}
    for name in sorted(held, key=lambda name: held[name], reverse=True):
        right = [found["methods"][name][mode][i] for i in at]
        cells = [
            f"{part:.0%} | {share(n, found['samples'])}".replace("% |", " % |") for part, n in zip(held[name], right)
        ]
        lines += [f"| `{name}` | " + " | ".join(cells) + " |"]
    return lines


def figures(found: dict[str, Any]) -> list[str]:
    """What is asked for, and what was measured."""
    at = found["budgets"].index(ASKED)
    right = {mode: {name: by[mode][at] for name, by in found["methods"].items()} for mode in MODES}
    aware, agnostic, full = right["query-aware"], right["query-agnostic"], found["full"]["query-aware"]
    best = max((name for name in SEEDS if name in aware), key=lambda name: aware[name])
    chain = ("layer_defensivekv", "adakv", "snapkv")
    kept = [agnostic[name] for name in chain]
    return [
        "| figure, at a budget of 20 % | measured | asked for |",
        "|---|---|---|",
        f"| best seed method of full accuracy, query-aware | `{best}`: {aware[best] / full:.1%} | at least 90 % |",
        f"| {' ≥ '.join(f'`{name}`' for name in chain)}, query-agnostic | "
        f"{', '.join(share(n, found['samples']) for n in kept)} | {'holds' if kept == sorted(kept, reverse=True) else 'does not hold'} |",
    ]


def speed_part(found: dict[str, Any]) -> str:
    """The tables of ``kvw bench eviction``."""
    kvpress = found["kvpress"]
    lines = [
        f"{found['model']} ({found['dtype']}), budget {found['budget']}, prompt and {found['decoded']} tokens, {found['threads']} "
        f"threads, median of {found['rounds']} paired rounds, kvpress {kvpress['kvpress']} on transformers {kvpress['transformers']}:",
        "",
        "| method | tokens | time | of kvpress's | decoding alone | peak | of kvpress's | held, of full | kvpress holds |",
        "|---" * 9 + "|",
    ]
    for name, method in found["methods"].items():
        ours, theirs, ratio = method["workbench"], method["kvpress"], method["ratio"]
        total, decode = ratio["total"], ratio["decode"]
        lines += [
            f"| `{name}` | {method['tokens']:,} | {ours['total']:.1f} s | {total['ratio']:.2f}x ({total['low']:.2f} to {total['high']:.2f}) "
            f"| {decode['ratio']:.2f}x | {ours['peak'] / 2**20:.0f} MiB | {ratio['peak']:.2f}x | {ours['of_full']:.3f} | {theirs['of_full']:.3f} |"
        ]
    return "\n".join(lines)


def held_part(found: dict[str, Any]) -> str:
    """The bytes at the layers' boundaries."""
    lines = ["| method | model | most at a boundary | after the prompt | |", "|---|---|---|---|---|"]
    for case in found["held"]:
        for name, lane in case["lanes"].items():
            if "left_out" not in lane:
                boundary = f"{lane['boundary']:.4f}" if lane["cascades"] else "whole until the end"
                mark = "reached" if lane["reached"] else "missed"
                lines += [f"| `{name}` | {case['model']} | {boundary} | {lane['end']:.4f} | {mark} |"]
    return "\n".join(lines)


def filled(page: str, parts: dict[str, str]) -> str:
    """The page with each part between its marks, ``<!-- name -->`` and ``<!-- /name -->``."""
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = page.partition(begin)
        _, ended, after = rest.partition(end)
        if not (found and ended):
            raise ValueError(f"the page has no part between {begin} and {end} to fill.")
        page = f"{before}{begin}\n{part}\n{end}{after}"
    return page


def written(root: Path = ROOT) -> dict[Path, str]:
    """The page and the chart as the measurements in ``benchmarks`` have them: file -> text. What was not measured stays."""
    parts, files = {}, {}
    if (accuracy := measured(root, "accuracy")) is not None:
        parts["accuracy"] = accuracy_part(accuracy)
        files[root / "docs/eviction-accuracy.svg"] = chart(accuracy)
    if (eviction := measured(root, "eviction")) is not None:
        parts |= {"speed": speed_part(eviction), "held": held_part(eviction)}
    page = root / "docs/eviction.md"
    return {page: filled(page.read_text(encoding="utf-8"), parts), **files}


def measured(root: Path, subject: str) -> dict[str, Any] | None:
    file = root / "benchmarks" / f"{subject}.json"
    return json.loads(file.read_text(encoding="utf-8"))[subject] if file.is_file() else None


if __name__ == "__main__":
    for file, text in written().items():
        file.write_text(text, encoding="utf-8")
        print(file.relative_to(ROOT))
