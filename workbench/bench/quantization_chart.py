"""The chart of ``kvw bench quantization``, as SVG: KL and wrong answers over measured bytes per token, a curve a method."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from workbench.bench.quantization import SETTINGS, front

WIDTH, HEIGHT = 410, 330  # of a panel's plot
LEFT, TOP, GAP, LEGEND = 58, 40, 70, 190
LEAST_KL = 1e-6  # the floor of the logarithmic axis: below lies rounding
LEAST_BYTES, MOST_BYTES = 192, 3072
COLOURS = (
    *("#8a8a8a", "#b08d57", "#1f77b4", "#d6604d", "#2ca25f", "#9467bd"),
    *("#8c6d31", "#e08214", "#c2478d", "#17a2b8", "#6b8e23"),
)
SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "M-3.5 -3.5H3.5V3.5H-3.5z",
    "M0 -4.5L4.5 3.5H-4.5z",
    "M0 -5L5 0L0 5L-5 0z",
)
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #333 } .small { font-size: 10px; fill: #666 }
.axis { stroke: #999; fill: none } .grid { stroke: #ddd } .full { stroke: #999; stroke-dasharray: 2 3 }
.front { stroke: #333; fill: none; stroke-dasharray: 5 4; opacity: .6 } .curve { fill: none; stroke-width: 1; opacity: .55 }
@media (prefers-color-scheme: dark) {
text { fill: #ddd } .small { fill: #aaa } .axis, .full { stroke: #777 } .grid { stroke: #3a3a3a } .front { stroke: #ddd } }
"""
BYTE_TICKS = (192, 256, 384, 512, 768, 1024, 1536, 2048, 3072)


def chart(found: dict[str, Any]) -> str:
    """An SVG document of the result of :func:`workbench.bench.quantization.measure_quantization`."""
    settings, samples = found["settings"], found["samples"]
    full = right_y(found["full"]["right"] / samples)
    width, height = LEFT + 2 * WIDTH + GAP + LEGEND, TOP + HEIGHT + 54
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>Quantization of {found['model']}'s cache: distance from the full cache over bytes per token</title>",
        f"<style>{STYLE}</style>",
        f'<g transform="translate({LEFT},{TOP})">',
        *axes(
            "KL from the full cache, nats a token (less is better)", [(kl_y(10.0**n), f"1e{n}") for n in range(-6, 2)]
        ),
        *stairs([(x(settings[name]["bytes_per_token"]), kl_y(settings[name]["kl"])) for name in front(settings)]),
        *curves({name: kl_y(of["kl"]) for name, of in settings.items()}, settings),
        f'</g><g transform="translate({LEFT + WIDTH + GAP},{TOP})">',
        *axes("exact answers", [(right_y(part), f"{100 * part:.0f}%") for part in (0, 0.25, 0.5, 0.75, 1)]),
        f'<line class="full" x1="0" x2="{WIDTH}" y1="{full}" y2="{full}"/>',
        *curves({name: right_y(of["right"] / samples) for name, of in settings.items()}, settings),
        f'</g><g transform="translate({LEFT + 2 * WIDTH + GAP + 24},{TOP + 6})">',
        *legend({of["series"] for of in settings.values()}),
        "</g></svg>",
        "",
    ]
    return "\n".join(parts)


def axes(title: str, ticks: list[tuple[float, str]]) -> list[str]:
    drawn = [f'<text y="-14">{title}</text>']
    for at, label in ticks:
        drawn += [
            f'<line class="grid" x1="0" x2="{WIDTH}" y1="{at}" y2="{at}"/>',
            f'<text class="small" x="-6" y="{at + 3}" text-anchor="end">{label}</text>',
        ]
    for count in BYTE_TICKS:
        drawn += [f'<text class="small" x="{x(count)}" y="{HEIGHT + 14}" text-anchor="middle">{count}</text>']
    drawn += [f'<text class="small" x="{WIDTH}" y="{HEIGHT + 32}" text-anchor="end">bytes a token, measured</text>']
    return [*drawn, f'<path class="axis" d="M0 0V{HEIGHT}H{WIDTH}"/>']


def stairs(points: list[tuple[float, float]]) -> list[str]:
    """The Pareto front: what is reached with so many bytes or fewer."""
    (first_x, first_y), *rest = points
    return [f'<path class="front" d="M{first_x} {first_y}' + "".join(f"H{a}V{b}" for a, b in rest) + f'H{WIDTH}"/>']


def curves(heights: dict[str, float], settings: dict[str, Any]) -> list[str]:
    """A mark for every setting; a line through those of a method that its others do not beat."""
    drawn = []
    for series in SETTINGS:
        own = {name: of for name, of in settings.items() if of["series"] == series}
        places = {name: (x(of["bytes_per_token"]), heights[name]) for name, of in own.items()}
        line = " ".join(f"{a},{b}" for a, b in (places[name] for name in front(own)))
        drawn += [f'<polyline class="curve" stroke="{colour(series)}" points="{line}"/>'] if own else []
        drawn += [mark(series, a, b, name) for name, (a, b) in places.items()]
    return drawn


def mark(series: str, a: float, b: float, title: str) -> str:
    shape = SHAPES[list(SETTINGS).index(series) % len(SHAPES)]
    return f'<path d="{shape}" fill="{colour(series)}" transform="translate({a},{b})"><title>{escape(title)}</title></path>'


def legend(shown: set[str]) -> list[str]:
    drawn = []
    for number, series in enumerate(name for name in SETTINGS if name in shown):
        drawn += [mark(series, 0, 20 * number, series), f'<text x="12" y="{20 * number + 4}">{series}</text>']
    below = 20 * len(shown) + 10
    lines = [("front", "Pareto front of KL"), ("full", "full cache")]
    for number, (kind, label) in enumerate(lines):
        at = below + 20 * number
        drawn += [f'<line class="{kind}" x1="-6" x2="18" y1="{at}" y2="{at}"/><text x="26" y="{at + 4}">{label}</text>']
    return drawn


def colour(series: str) -> str:
    return COLOURS[list(SETTINGS).index(series)]


def x(count: float) -> float:
    """Bytes a token, logarithmic, over the panel's width."""
    inside = min(max(count, LEAST_BYTES), MOST_BYTES)
    return round(math.log(inside / LEAST_BYTES) / math.log(MOST_BYTES / LEAST_BYTES) * WIDTH, 1)


def kl_y(kl: float) -> float:
    """Seven powers of ten, from the floor to 10 nats, over the panel's height."""
    return round((1 - math.log10(min(max(kl, LEAST_KL), 10) / LEAST_KL) / 7) * HEIGHT, 1)


def right_y(part: float) -> float:
    return round((1 - part) * HEIGHT, 1)
