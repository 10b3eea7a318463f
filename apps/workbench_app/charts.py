"""What all Bokeh charts of the app have in common."""

from __future__ import annotations

from typing import Any

from bokeh.models import TapTool
from bokeh.plotting import figure

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
