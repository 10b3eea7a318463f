"""The chart of ``kvw bench accuracy``, as SVG: one small panel a method, accuracy over budgets, the question seen or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COLUMNS, WIDTH, HEIGHT = 4, 190, 120  # of a panel's plot
GAP_X, GAP_Y, LEFT, TOP = 44, 52, 44, 60
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #333 } .small { font-size: 10px; fill: #666 }
.axis { stroke: #999 } .full { stroke: #999; stroke-dasharray: 2 3 }
.aware { stroke: #0b5fae; fill: none; stroke-width: 2 } .aware-dot { fill: #0b5fae }
.agnostic { stroke: #b4500f; fill: none; stroke-width: 2; stroke-dasharray: 6 3 } .agnostic-dot { fill: #b4500f }
@media (prefers-color-scheme: dark) {
text { fill: #ddd } .small { fill: #aaa } .axis, .full { stroke: #777 }
.aware { stroke: #6db3f2 } .aware-dot { fill: #6db3f2 } .agnostic { stroke: #f0a060 } .agnostic-dot { fill: #f0a060 } }
"""
LINES = {"query-aware": "aware", "query-agnostic": "agnostic"}


def chart(found: dict[str, Any]) -> str:
    """An SVG document of the result of :func:`workbench.bench.accuracy.measure_accuracy`."""
    names, budgets, samples = list(found["methods"]), found["budgets"], found["samples"]
    rows = -(-len(names) // COLUMNS)
    width, height = LEFT + COLUMNS * (WIDTH + GAP_X), TOP + rows * (HEIGHT + GAP_Y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>Exact answers of {found['model']} over the share of the cache kept, by eviction method</title>",
        f"<style>{STYLE}</style>",
        *legend(),
    ]
    for number, name in enumerate(names):
        row, column = divmod(number, COLUMNS)
        parts += [f'<g transform="translate({LEFT + column * (WIDTH + GAP_X)},{TOP + row * (HEIGHT + GAP_Y)})">']
        parts += axes(name, budgets, first=column == 0)
        for mode, kind in LINES.items():
            full = y(found["full"][mode] / samples)
            parts += (
                [f'<line class="full" x1="0" x2="{WIDTH}" y1="{full}" y2="{full}"/>'] if mode == "query-aware" else []
            )
            shares = [right / samples for right in found["methods"][name][mode]]
            parts += curve(budgets, shares, kind)
        parts += ["</g>"]
    return "\n".join([*parts, "</svg>", ""])


def legend() -> list[str]:
    entries = [("aware", "question in the prompt"), ("agnostic", "question after compression"), ("full", "full cache")]
    drawn = []
    for number, (kind, text) in enumerate(entries):
        at = LEFT + number * 230
        drawn += [
            f'<line class="{kind}" x1="{at}" x2="{at + 30}" y1="20" y2="20"/>',
            f'<text x="{at + 38}" y="24">{text}</text>',
        ]
    return drawn


def axes(name: str, budgets: Sequence[float], first: bool) -> list[str]:
    drawn = [f'<text y="-8">{name}</text>', f'<path class="axis" fill="none" d="M0 0V{HEIGHT}H{WIDTH}"/>']
    for budget in budgets:
        drawn += [
            f'<text class="small" x="{x(budget)}" y="{HEIGHT + 14}" text-anchor="middle">{100 * budget:.0f}{" %" if budget == budgets[-1] else ""}</text>'
        ]
    if first:
        drawn += [
            f'<text class="small" x="-6" y="{y(s) + 3}" text-anchor="end">{100 * s:.0f} %</text>' for s in (0, 0.5, 1)
        ]
    return drawn


def curve(budgets: Sequence[float], shares: Sequence[float], kind: str) -> list[str]:
    points = [(x(budget), y(part)) for budget, part in zip(budgets, shares)]
    line = " ".join(f"{a},{b}" for a, b in points)
    dots = [f'<circle class="{kind}-dot" cx="{a}" cy="{b}" r="2.5"/>' for a, b in points]
    return [f'<polyline class="{kind}" points="{line}"/>', *dots]


def x(budget: float) -> float:
    """Budgets from 0 to 50 % over the panel's width."""
    return round(budget / 0.5 * (WIDTH - 10), 1)


def y(part: float) -> float:
    return round((1 - part) * HEIGHT, 1)
