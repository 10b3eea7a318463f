"""KL per token of the reference's answer, one line per lane."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, Range1d
from bokeh.plotting import figure

from workbench_app import formats
from workbench_app.charts import BARE, plain

if TYPE_CHECKING:
    from workbench_app.session import Session

FLOOR, TOP = 1e-6, 30.0  # nats; smaller values are drawn on the floor, and the tooltip says what they are


class KLChart:
    """Teacher-forced KL(reference ‖ lane) in nats, on a log scale. Lines differ by colour, dash and marker."""

    def __init__(self) -> None:
        self.figure = figure(
            height=190,
            sizing_mode="stretch_width",
            y_axis_type="log",
            y_range=Range1d(FLOOR * 0.6, TOP),
            x_range=Range1d(-0.6, 16),
            **BARE,
        )
        plot = self.figure
        plot.xaxis.axis_label = "token of the reference's answer"
        plot.yaxis.axis_label = "KL, nats (log)"
        plot.yaxis.ticker = FixedTicker(ticks=[1e-6, 1e-4, 1e-2, 1, 10])
        plot.yaxis.major_label_overrides = {1e-6: "≤ 10⁻⁶", 1e-4: "10⁻⁴", 1e-2: "0.01", 1: "1", 10: "10"}
        plain(plot)
        self._hover = HoverTool(tooltips=[("lane", "@name"), ("token", "@x “@text”"), ("KL", "@kl nats")], renderers=[])
        plot.add_tools(self._hover)
        plot.line([], [])  # Bokeh warns about a plot without lines
        self._lines: dict[int, dict[str, Any]] = {}
        self._drawn: dict[int, Any] = {}

    def refresh(self, session: Session) -> None:
        """Bring the lines up to date; a line is only touched when its numbers changed."""
        reference = session.lanes[0] if session.lanes else None
        texts = [formats.visible(text) for text in reference.texts] if reference is not None else []
        longest = 0
        seen = set()
        for place, lane in enumerate(session.lanes):
            if place == 0:
                continue
            look, kl = formats.look(place), lane.kl or []
            seen.add(lane.key)
            longest = max(longest, len(kl))
            first = lane.result.first_divergence if lane.result is not None else None
            state = (look, tuple(kl), first, len(texts))
            if self._drawn.get(lane.key) == state:
                continue
            self._drawn[lane.key] = state
            line = self._lines.get(lane.key) or self._add(lane.key)
            line["source"].data = {
                "x": list(range(len(kl))),
                "y": [min(TOP, max(FLOOR, value)) for value in kl],
                "kl": [formats.nats(value) for value in kl],
                "name": [look.name] * len(kl),
                "text": [texts[i] if i < len(texts) else "" for i in range(len(kl))],
            }
            shown = first is not None and first < len(kl)
            line["first"].data = {"x": [first] if shown else [], "y": [TOP * 0.6] if shown else []}
            line["line"].glyph.update(line_color=look.colour, line_dash=look.dash)
            line["dots"].glyph.update(line_color=look.colour, fill_color=look.colour, marker=look.marker)
            line["mark"].glyph.update(fill_color=look.colour)
        for key in list(self._lines):
            self._lines[key]["line"].visible = key in seen
            self._lines[key]["dots"].visible = key in seen
            self._lines[key]["mark"].visible = key in seen
        if longest and self.figure.x_range.end != longest - 0.4:
            self.figure.x_range.end = longest - 0.4

    def _add(self, key: int) -> dict[str, Any]:
        source = ColumnDataSource({"x": [], "y": [], "kl": [], "name": [], "text": []})
        first = ColumnDataSource({"x": [], "y": []})
        plot = self.figure
        line = plot.line("x", "y", source=source, line_width=1.6, line_alpha=0.9)
        dots = plot.scatter("x", "y", source=source, size=6)
        mark = plot.scatter("x", "y", source=first, marker="inverted_triangle", size=11, line_color=None)
        self._hover.renderers = [*self._hover.renderers, dots]
        self._lines[key] = {"source": source, "first": first, "line": line, "dots": dots, "mark": mark}
        return self._lines[key]
