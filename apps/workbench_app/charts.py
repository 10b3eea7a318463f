"""What all Bokeh charts of the app have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, Range1d, TapTool
from bokeh.plotting import figure

from workbench_app import formats

NEUTRAL = "#8A8D8C"  # at least 3:1 on the light and on the dark ground
BARE: dict[str, Any] = {
    "toolbar_location": None,
    "tools": "",
    "background_fill_alpha": 0,
    "border_fill_alpha": 0,
    "outline_line_alpha": 0,
    "outline_line_color": None,
}


def plain(plot: Any) -> Any:
    """Axes that say what they must and no more."""
    plot.xgrid.visible = False
    plot.ygrid.grid_line_alpha = 0.25
    plot.min_border = 4
    for axis in (plot.xaxis, plot.yaxis):
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = "12px"
        axis.major_label_text_font_size = "12px"
        axis.minor_tick_line_color = None
        axis.axis_line_alpha = axis.major_tick_line_alpha = 0.4
    return plot


def chart(height: int, x_label: str, y_label: str, **options: Any) -> Any:
    """An empty chart as wide as its place."""
    plot = figure(height=height, sizing_mode="stretch_width", **BARE, **options)
    plot.xaxis.axis_label, plot.yaxis.axis_label = x_label, y_label
    return plain(plot)


def on_tap(plot: Any, renderer: Any, act: Any) -> None:
    """Call ``act(index)`` when a mark of ``renderer`` is clicked; marks look the same before and after."""
    renderer.selection_glyph = renderer.nonselection_glyph = None
    source = renderer.data_source

    def tapped(attribute: str, old: list[int], new: list[int]) -> None:
        if new:
            source.selected.indices = []
            act(new[0])

    source.selected.on_change("indices", tapped)
    taps = next((tool for tool in plot.tools if isinstance(tool, TapTool)), None)
    if taps is None:
        plot.add_tools(TapTool(renderers=[renderer]))
    else:
        taps.renderers = [*taps.renderers, renderer]


def layer_bars(
    counts: np.ndarray,
    full: int,
    label: str,
    names: list[list[str]],
    look: formats.Look,
    at: tuple[int, int],
    act: Callable[[int, int], None],
) -> Any:
    """One bar per layer, made of pieces, inside the outline of what it would be if every piece were full.

    Args:
        counts: int [layers, pieces], tokens.
        full: the most a piece can have.
        names: of the pieces, for the tooltip.
        at: the piece that is framed.
        act: called with layer and piece when one is clicked.
    """
    layers, pieces = counts.shape
    each = max(13, min(26, 560 // layers))
    most = full * pieces
    plot = chart(each * layers + 58, label, "", y_range=Range1d(layers - 0.45, -0.6), x_range=Range1d(0, most * 1.01))
    plot.ygrid.visible = False
    plot.yaxis.ticker = FixedTicker(ticks=list(range(layers)))
    shares = counts.sum(1) / most
    plot.yaxis.major_label_overrides = {n: f"L{n} · {formats.percent(share)}" for n, share in enumerate(shares)}
    right = counts.cumsum(1)
    left = right - counts
    rows, columns = np.indices(counts.shape)
    source = ColumnDataSource(
        {
            "left": left.ravel(),
            "right": right.ravel(),
            "top": rows.ravel() - 0.36,
            "bottom": rows.ravel() + 0.36,
            "alpha": np.where(columns % 2, 0.5, 0.85).ravel(),
            "name": [name for row in names for name in row],
            "tokens": [f"{n:,} of {full:,} ({formats.percent(n / full, 1)})" for n in counts.ravel()],
        }
    )
    each_layer = np.arange(layers)
    outline = {"fill_alpha": 0, "line_color": NEUTRAL, "line_dash": "dashed"}
    plot.quad(left=0, right=most, top=each_layer - 0.36, bottom=each_layer + 0.36, **outline)
    paint = {"fill_color": look.colour, "fill_alpha": "alpha", "line_color": look.colour, "line_width": 1}
    bars = plot.quad("left", "right", "top", "bottom", source=source, **paint)
    for colour, width in (("#ffffff", 4), ("#000000", 2)):  # seen on the bar in light and in dark
        frame = {"fill_alpha": 0, "line_color": colour, "line_width": width}
        plot.quad([left[at]], [right[at]], [at[0] - 0.36], [at[0] + 0.36], **frame)
    plot.add_tools(HoverTool(renderers=[bars], tooltips=[("", "@name"), ("tokens", "@tokens")]))
    on_tap(plot, bars, lambda index: act(*divmod(index, pieces)))
    return plot
