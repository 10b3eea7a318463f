"""Heat-maps of tokens × something: Cividis, reversed with the page's theme, and hatched where nothing is held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from bokeh.events import Tap
from bokeh.models import ColorBar, ColumnDataSource, CustomJS, HoverTool, LinearColorMapper, Range1d
from bokeh.palettes import Cividis256

from workbench_app.charts import NEUTRAL, chart

HATCH = {"fill_alpha": 0, "line_alpha": 0, "hatch_pattern": "/", "hatch_color": NEUTRAL, "hatch_scale": 8.0}
# Much is far from the ground: dark on light, bright on dark. The page's theme is known to the browser alone.
FOLLOW_THEME = """
const root = document.documentElement;
const follow = () => {
  const light = (getComputedStyle(document.body).color.match(/\\d+/g) ?? [0]).slice(0, 3).reduce((sum, part) => sum + Number(part), 0);
  const palette = light > 382 ? bright : deep;  // light ink: a dark page
  if (mapper.palette[0] !== palette[0]) mapper.palette = palette;
};
if (!mapper.tags.includes("follows")) {
  mapper.tags.push("follows");
  const observer = new MutationObserver(() => (mapper.document == null ? observer.disconnect() : requestAnimationFrame(follow)));
  for (const part of [root, document.body]) observer.observe(part, {attributes: true});
  observer.observe(document.head, {childList: true, subtree: true, characterData: true});
}
follow();
"""


def colours(plot: Any, high: float, low: float = 0.0) -> LinearColorMapper:
    """A colour for each number from ``low`` to ``high``, that follows the page's theme."""
    bright, deep = list(Cividis256), list(reversed(Cividis256))
    mapper = LinearColorMapper(palette=deep, low=low, high=high, nan_color="rgba(0,0,0,0)")
    plot.js_on_change(
        "inner_width", CustomJS(args={"mapper": mapper, "bright": bright, "deep": deep}, code=FOLLOW_THEME)
    )
    return mapper


def heat_map(
    grid: np.ndarray,
    step: tuple[int, int],
    tokens: int,
    high: float,
    act: Callable[[int], None],
    height: int = 240,
    number: str = "largest magnitude",
) -> Any:
    """Cells of tokens (along x) and channels.

    Args:
        grid: float [R, C]; NaN is hatched.
        step: tokens and channels of a cell.
        tokens: of the prompt; the last cell may reach beyond.
        high: the number of the last colour.
        act: called with the token that is clicked.
        number: what a cell says, for the tooltip.
    """
    rows, columns = grid.shape
    wide, tall = rows * step[0], columns * step[1]
    plot = chart(height, "prompt token", "channel", x_range=Range1d(0, tokens), y_range=Range1d(0, tall))
    plot.ygrid.visible = False
    plot.quad([0], [tokens], [tall], [0], **HATCH)
    mapper = colours(plot, high or 1.0)
    source = ColumnDataSource(
        {
            "image": [grid.T.astype(np.float32)],
            "token": [np.broadcast_to(np.arange(rows) * step[0], (columns, rows)).astype(np.int32)],
            "channel": [np.broadcast_to((np.arange(columns) * step[1])[:, None], (columns, rows)).astype(np.int32)],
        }
    )
    image = plot.image("image", x=0, y=0, dw=wide, dh=tall, source=source, color_mapper=mapper)
    several = [" and the next" if n > 1 else "" for n in step]
    tips = [("token", "@token" + several[0]), ("channel", "@channel" + several[1]), (number, "@image{0.000a}")]
    plot.add_tools(HoverTool(renderers=[image], tooltips=tips))
    plot.add_layout(colour_bar(mapper), "right")
    plot.on_event(Tap, lambda event: act(int(event.x)) if event.x is not None and 0 <= event.x < tokens else None)
    return plot


def colour_bar(mapper: LinearColorMapper, **options: Any) -> ColorBar:
    return ColorBar(
        color_mapper=mapper, width=8, padding=2, margin=0, label_standoff=4, background_fill_alpha=0,
        major_tick_line_color=None, bar_line_color=None, major_label_text_font_size="12px", **options,
    )  # fmt: skip
