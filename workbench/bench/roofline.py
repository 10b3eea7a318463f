"""A plot of measured decode attention against the time that its bytes alone take: plain SVG, no library."""

from __future__ import annotations

import math
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 470, 74, 46, 232, 58
COLOURS = ("#0b6e99", "#b5482a", "#2f7d4f", "#7a4fa3", "#8a6d00", "#444444", "#c2478d", "#3f9e9e", "#6b8e23")
DASHES = {"bound": "5 4", "measured": "none"}


def lines(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The curves: per way of holding entries, measured microseconds and the bound by bytes, over tokens.

    Heads of 128 and four query heads a KV head, where those were measured; else the first shape there is.
    """
    found = [case for case in result["cases"] if "refused" not in case]
    wanted = [case for case in found if (case["head_dim"], case["query_heads_per_kv_head"]) == (128, 4)] or found
    if not wanted:
        return []
    first = wanted[0]
    wanted = [
        case
        for case in wanted
        if (case["head_dim"], case["query_heads_per_kv_head"]) == (first["head_dim"], first["query_heads_per_kv_head"])
    ]
    rate = result["copy_gb_per_second"] * 1e3  # bytes a microsecond
    curves: dict[str, dict[str, Any]] = {}
    for case in sorted(wanted, key=lambda case: case["tokens"]):
        if case["kernel"] == "packed":
            name = f"{case['bits']} bit, groups of {case['group_size']}"
        else:
            name = f"{case['sparsity']:.0%} pruned"
        curve = curves.setdefault(name, {"name": name, "tokens": [], "measured": [], "bound": []})
        if case["tokens"] in curve["tokens"]:
            continue
        curve["tokens"].append(case["tokens"])
        curve["measured"].append(case["microseconds"]["fused"])
        curve["bound"].append(case["bytes_read"] / rate)
        dense = curves.setdefault(
            "dense", {"name": f"dense {case['dtype']}", "tokens": [], "measured": [], "bound": []}
        )
        if case["tokens"] not in dense["tokens"]:
            width = {"float16": 2, "bfloat16": 2, "float32": 4}[case["dtype"]]
            dense["tokens"].append(case["tokens"])
            dense["measured"].append(min(us for name, us in case["microseconds"].items() if name != "fused"))
            dense["bound"].append(2 * case["kv_heads"] * case["tokens"] * case["head_dim"] * width / rate)
    return [curves.pop("dense"), *curves.values()]


def _plain(power: int) -> str:
    """A power of ten as it is said: 0.1, 1, 1,000,000."""
    return f"{10**power:,}" if power >= 0 else f"{10.0**power:g}"


def plot(result: dict[str, Any]) -> str:
    """SVG text."""
    curves = lines(result)
    tokens = sorted({t for curve in curves for t in curve["tokens"]}) or [1]
    times = [t for curve in curves for t in (*curve["measured"], *curve["bound"]) if t > 0] or [1.0]
    low, high = (10 ** f(math.log10(t)) for f, t in ((math.floor, min(times)), (math.ceil, max(times))))
    high = high if high > low else 10 * low

    def x(count: float) -> float:
        span = math.log(tokens[-1] / tokens[0]) or 1.0
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log(count / tokens[0]) / span if len(tokens) > 1 else 0.5)

    def y(microseconds: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(microseconds / low) / math.log(high / low)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">Decode attention over one layer: measured (solid), and the time its bytes '
        "take (dashed)</text>",
    ]
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        at = y(10.0**power)
        out.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_plain(power)} µs</text>')
    for count in tokens:
        out.append(f'<path d="M{x(count):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#eee"/>')
        out.append(f'<text x="{x(count):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{count:,}</text>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 16}" text-anchor="middle">cached tokens</text>')
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        for kind, dash in DASHES.items():
            points = " ".join(f"{x(t):.1f},{y(us):.1f}" for t, us in zip(curve["tokens"], curve[kind], strict=True))
            style = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
            out.append(f'<polyline points="{points}" {style}/>')
        for t, us in zip(curve["tokens"], curve["measured"], strict=True):
            out.append(f'<circle cx="{x(t):.1f}" cy="{y(us):.1f}" r="3" fill="{colour}"/>')
        at = TOP + 18 * number
        out.append(f'<path d="M{WIDTH - RIGHT + 16} {at}h22" stroke="{colour}" stroke-width="2"/>')
        out.append(f'<text x="{WIDTH - RIGHT + 46}" y="{at + 4}">{escape(curve["name"])}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"
