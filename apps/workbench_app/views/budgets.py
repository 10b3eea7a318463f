"""How a lane's budget came to be shared over layers and KV heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import panel as pn
from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, Range1d

from workbench.inspection.overlap import kept_counts
from workbench_app import formats
from workbench_app.ask import LaneState
from workbench_app.charts import NEUTRAL, chart, on_tap
from workbench_app.views.look import Look, head_name, quiet, sentence


class Budgets(Look):
    """One bar per layer, made of its heads, inside the outline of the full cache."""

    question = "How was the budget shared over layers and heads?"

    def build(self) -> list[Any]:
        self._pane = pn.pane.Bokeh(None, sizing_mode="stretch_width", margin=(4, 0, 0, 0))
        self._note = sentence()
        self._frame: Any = None
        return [self._pane, self._note]

    def draw(self, lane: LaneState, at: tuple[int, int]) -> None:
        counts, total = kept_counts(lane.kept), len(self.session.texts)  # [L, H]
        layers, heads = counts.shape
        full, look = total * heads, self.look(lane)
        sums = counts.sum(1)
        low, high = int(sums.argmin()), int(sums.argmax())
        held = f"<b>{look.name}</b> keeps <b>{sums.sum():,}</b> of {full * layers:,} entries"
        if sums.min() == sums.max():
            apart = "every layer the same number"
        else:
            apart = f"least in L{low} ({formats.percent(sums[low] / full)}), most in L{high} ({formats.percent(sums[high] / full)})"
        self.lead.object = f"<p>{held} ({formats.percent(sums.sum() / full / layers)}): {apart}.</p>"
        self._frame = pd.DataFrame(
            {
                "layer": np.repeat(np.arange(layers), heads),
                "KV head": np.tile(np.arange(heads), layers),
                "tokens kept": counts.ravel(),
                "of the prompt": [formats.percent(share, 1) for share in counts.ravel() / total],
                "layer's total": np.repeat(sums, heads),
                "layer's total, full": full,
            }
        )
        self._pane.object = self._plot(counts, total, look, at)
        self._note.object = quiet(
            f"A bar is a layer, a piece of it a KV head (KV0 first); the outline is the full cache, {heads} × {total:,} tokens. "
            f"The framed piece is {head_name(at)}. Click a piece to see its tokens above."
        )

    def _plot(self, counts: np.ndarray, total: int, look: formats.Look, at: tuple[int, int]) -> Any:
        layers, heads = counts.shape
        each = max(13, min(26, 560 // layers))
        plot = chart(
            each * layers + 58,
            "prompt tokens kept, summed over the layer's KV heads",
            "",
            y_range=Range1d(layers - 0.45, -0.75),
            x_range=Range1d(0, total * heads * 1.01),
        )
        plot.ygrid.visible = False
        plot.yaxis.ticker = FixedTicker(ticks=list(range(layers)))
        shares = counts.sum(1) / (total * heads)
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
                "head": [f"L{layer} KV{head}" for layer, head in zip(rows.ravel(), columns.ravel(), strict=True)],
                "kept": [f"{n:,} of {total:,} tokens ({formats.percent(n / total, 1)})" for n in counts.ravel()],
            }
        )
        plot.quad(
            left=0, right=total * heads, top=np.arange(layers) - 0.36, bottom=np.arange(layers) + 0.36,
            fill_alpha=0, line_color=NEUTRAL, line_dash="dashed",
        )  # fmt: skip
        bars = plot.quad(
            "left", "right", "top", "bottom", source=source, fill_color=look.colour, fill_alpha="alpha",
            line_color=look.colour, line_width=1,
        )  # fmt: skip
        for colour, width in (("#ffffff", 4), ("#000000", 2)):  # seen on the bar in light and in dark
            plot.quad(
                [left[at]],
                [right[at]],
                [at[0] - 0.36],
                [at[0] + 0.36],
                fill_alpha=0,
                line_color=colour,
                line_width=width,
            )
        plot.add_tools(HoverTool(renderers=[bars], tooltips=[("head", "@head"), ("kept", "@kept")]))
        on_tap(plot, bars, lambda index: self.pick_head(*divmod(index, heads)))
        return plot

    def table(self) -> Any:
        return self._frame
