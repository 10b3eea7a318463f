"""How much of what the reference reads, at every step, lies on entries that the lanes still hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import panel as pn
from bokeh.models import ColumnDataSource, HoverTool, NumeralTickFormatter, Range1d

from workbench.inspection.retained import lowest_of_group
from workbench_app import formats
from workbench_app.ask import LaneState
from workbench_app.charts import chart, on_tap
from workbench_app.looks import HEADS
from workbench_app.summary import legend
from workbench_app.views.look import WIDE, Look, head_name, quiet, sentence
from workbench_widgets.panel import HeadMatrixPane


class Retained(Look):
    """The matrix of one lane at one step or over all, and the steps of one head for every lane."""

    question = "How much of what the reference reads does a lane still hold?"

    def build(self) -> list[Any]:
        self.matrix = HeadMatrixPane(group="heads", margin=0)
        self._note = sentence()
        self._title = sentence()
        self._pane = pn.pane.Bokeh(None, sizing_mode="stretch_width", margin=0)
        self._frame: Any = None
        self.matrix.param.watch(lambda event: self.pick_head(event.new["layer"], event.new["head"]), "selected")
        left, right = pn.Column(self.matrix, self._note, **WIDE), pn.Column(self._title, self._pane, **WIDE)
        return [pn.Column(left, right, stylesheets=[HEADS], sizing_mode="stretch_width", margin=(8, 0, 0, 0))]

    def _lanes(self) -> list[LaneState]:
        return [lane for lane in self.session.lanes if lane.result is not None and not lane.stale and not lane.error]

    def _found(self) -> list[tuple[LaneState, Any]]:
        lanes = self._lanes()
        return list(zip(lanes, self.session.findings.retained(lanes), strict=True))

    def known(self, lane: LaneState) -> tuple[Any, ...]:
        found = self._found()
        said = self.session.findings.said("retained", lane) if any(shares is None for _, shares in found) else ""
        return (said, *((other.key, id(shares)) for other, shares in found))

    def draw(self, lane: LaneState, at: tuple[int, int]) -> None:
        found = [(other, shares) for other, shares in self._found() if shares is not None]
        own = next((shares for other, shares in found if other is lane), None)
        if own is None:
            self.empty(self.session.findings.said("retained", lane))
            return
        heads = len(lane.kept[0])
        grid = lowest_of_group(own, heads).numpy()  # [steps, L, H]
        steps = len(grid)
        step = self.state.query if self.state.query is not None and self.state.query < steps else None
        self.lead.object = self._sentence(lane, grid, float(own.mean()))
        where = "mean over the steps" if step is None else f"at token {step}"
        self.matrix.show(grid.mean(0) if step is None else grid[step], metric=f"retained attention, {where}", unit="%")
        self.matrix.picked = list(at)
        of = "the query head that keeps least" if own.shape[-1] > heads else "its query head"
        self._note.object = quiet(
            f"{self.look(lane).name}: share of the reference's attention of a step, over all it holds, that falls on entries the "
            f"lane holds then; of a KV head, {of}. Exact, not sampled."
        )
        drawn = [pair for pair in found if pair[0] is not self.session.reference] or found  # the reference holds it all
        picked = [
            (self.look(other), lowest_of_group(shares, heads)[:, at[0], at[1]].numpy()) for other, shares in drawn
        ]
        self._title.object = f"<p><b>{head_name(at)}</b> <span class='quiet'>at every token of the reference's answer</span></p>{legend(self.session)}"
        self._pane.object = self._plot(picked, step)
        self._frame = pd.DataFrame(
            {"token": np.arange(steps)}
            | {
                f"lane {look.letter}": [formats.percent(float(v), 1) for v in line]
                for look, line in picked
                if len(line) == steps
            }
        )
        texts = self.session.lanes[0].texts
        self._frame.insert(
            1, "reference's token", [formats.visible(texts[i]) if i < len(texts) else "" for i in range(steps)]
        )

    def _sentence(self, lane: LaneState, grid: np.ndarray, mean: float) -> str:
        name = self.look(lane).name
        if grid.min() > 0.9999:
            return f"<p><b>{name}</b> holds everything the reference reads.</p>"
        step, layer, head = (int(i) for i in np.unravel_index(int(grid.argmin()), grid.shape))
        return (
            f"<p><b>{name}</b> holds <b>{formats.percent(mean)}</b> of what the reference reads, on average; least in "
            f"{head_name((layer, head))} at token {step}: <b>{formats.percent(float(grid[step, layer, head]))}</b>.</p>"
        )

    def _plot(self, lines: list[tuple[formats.Look, np.ndarray]], step: int | None) -> Any:
        longest = max(len(line) for _, line in lines)
        plot = chart(
            240,
            "token of the reference's answer",
            "retained attention, %",
            y_range=Range1d(-0.03, 1.06),
            x_range=Range1d(-0.6, max(1.0, longest - 0.4)),
        )
        plot.yaxis.formatter = NumeralTickFormatter(format="0 %")
        texts = self.session.lanes[0].texts
        marks = []
        for look, line in lines:
            source = ColumnDataSource(
                {
                    "x": np.arange(len(line)),
                    "y": line,
                    "share": [formats.percent(float(v), 1) for v in line],
                    "lane": [look.name] * len(line),
                    "text": [formats.visible(texts[i]) if i < len(texts) else "" for i in range(len(line))],
                }
            )
            plot.line("x", "y", source=source, line_color=look.colour, line_dash=look.dash, line_width=1.6)
            mark = plot.scatter("x", "y", source=source, marker=look.marker, size=7, color=look.colour)
            on_tap(plot, mark, lambda index: self.state.param.update(query=int(index)))
            marks.append(mark)
        if step is not None:
            plot.scatter([step], [1.045], marker="inverted_triangle", size=10, color="#8A8D8C")
        plot.add_tools(
            HoverTool(renderers=marks, tooltips=[("lane", "@lane"), ("token", "@x “@text”"), ("kept", "@share")])
        )
        return plot

    def table(self) -> Any:
        return self._frame
