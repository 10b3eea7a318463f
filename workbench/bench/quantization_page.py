"""Write what was measured of quantization into docs/quantization.md and its chart: `python -m workbench.bench.quantization_page`.

It reads ``benchmarks/quantization.json`` (`kvw bench quantization`) and replaces the parts of the page between its marks;
nothing is measured.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from workbench.bench.eviction_page import filled, measured, share
from workbench.bench.machine import ROOT
from workbench.bench.quantization import front
from workbench.bench.quantization_chart import chart

FOUR_BITS = (  # asked for: within 1 point of the full cache
    "kivi(bits=4, residual_length=32)",
    "zipcache(bits=4, low_bits=4)",
    "zipcache(bits=4, low_bits=2)",
    "gear(bits=4, residual_length=32)",
    "rotatekv(bits=4)",
)
PAIRS = (  # 2 bits at about equal bytes: RotateKV, plain KIVI
    ("rotatekv(bits=2, pivots=40)", "kivi(bits=2, residual_length=32)"),
    ("rotatekv(bits=2, group_size=16)", "kivi(bits=2, group_size=16, residual_length=16)"),
)


def settings_part(found: dict[str, Any]) -> str:
    """The table of all settings, fewest bytes first; those on the Pareto front are marked."""
    samples, settings, full = found["samples"], found["settings"], found["full"]
    best = front(settings)
    lines = [
        f"{found['model']} in {found['dtype']}, {found['tokens']:,} tokens, {samples} documents, greedy. `full`: "
        f"{full['bytes_per_token']:,.0f} bytes a token ({full['float16_bytes_per_token']:,.0f} in float16), "
        f"{share(full['right'], samples)} right. **Bold**: on the Pareto front of KL.",
        "",
        "| setting | bytes a token | of full | in float16 | KL, nats | median | top-1 | right | lost / won |",
        "|---" * 9 + "|",
    ]
    for name in sorted(settings, key=lambda name: settings[name]["bytes_per_token"]):
        of = settings[name]
        lines += [
            f"| {f'**`{name}`**' if name in best else f'`{name}`'} | {of['bytes_per_token']:,.0f} "
            f"| {of['bytes_per_token'] / full['bytes_per_token']:.3f} | {of['float16_bytes_per_token']:,.0f} "
            f"| {nats(of['kl'])} | {nats(statistics.median(of['kl_by_document']))} | {100 * of['top1']:.1f} % "
            f"| {share(of['right'], samples)} | {of['lost']} / {of['won']} |"
        ]
    factors = {of["series"]: of["factor_bytes"] for of in settings.values() if of["factor_bytes"]}
    if factors:
        besides = ", ".join(f"{size / 1024:,.0f} KiB for {series}" for series, size in factors.items())
        lines += ["", f"Held besides, once per model and not per token, and not counted above: {besides}."]
    return "\n".join([*lines, *(["", *found["left_out"].values()] if found["left_out"] else [])])


def figures_part(found: dict[str, Any]) -> str:
    """What is asked for, and what was measured."""
    samples, settings, full = found["samples"], found["settings"], found["full"]
    lines = [
        f"Within 1 point of the full cache ({share(full['right'], samples)}; one document is {100 / samples:.2g} points)?",
        "",
        "| at 4 bits | right | difference | documents lost / won | KL, nats | |",
        "|---" * 6 + "|",
    ]
    for name in FOUR_BITS:
        of = settings[name]
        points = 100 * (of["right"] - full["right"]) / samples
        verdict = "within 1 point" if abs(points) <= 1 else "better" if points > 0 else "not within 1 point"
        lines += [
            f"| `{name}` | {share(of['right'], samples)} | {points:+.1f} points | {of['lost']} / {of['won']} | {nats(of['kl'])} "
            f"| {verdict} |"
        ]
    lines += [
        "",
        "RotateKV at 2 bits against plain KIVI at 2 bits, at about equal bytes:",
        "",
        "| | bytes a token | KL, nats | median | top-1 | right | KL is less in |",
        "|---" * 7 + "|",
    ]
    for pair in PAIRS:
        for name, other in (pair, pair[::-1]):
            of = settings[name]
            less = sum(a < b for a, b in zip(of["kl_by_document"], settings[other]["kl_by_document"]))
            lines += [
                f"| `{name}` | {of['bytes_per_token']:.0f} | {nats(of['kl'])} | {nats(statistics.median(of['kl_by_document']))} "
                f"| {100 * of['top1']:.1f} % | {share(of['right'], samples)} | {less} of {samples} documents |"
            ]
    return "\n".join(lines)


def nats(kl: float) -> str:
    return f"{kl:.2f}" if kl >= 1 else f"{kl:.3f}" if kl >= 0.01 else f"{kl:.1e}"


def written(root: Path = ROOT) -> dict[Path, str]:
    """The page and the chart as ``benchmarks/quantization.json`` has them: file -> text; nothing where it is not there."""
    if (found := measured(root, "quantization")) is None:
        return {}
    page = root / "docs/quantization.md"
    parts = {"settings": settings_part(found), "figures": figures_part(found)}
    text = filled(page.read_text(encoding="utf-8"), parts)
    return {page: text, root / "docs/quantization-pareto.svg": chart(found)}


if __name__ == "__main__":
    for file, text in written().items():
        file.write_text(text, encoding="utf-8")
        print(file.relative_to(ROOT))
