"""How a lane's budget came to be shared over layers and KV heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import panel as pn

from workbench.inspection.overlap import counted
from workbench_app import formats
from workbench_app.ask import LaneState
from workbench_app.charts import layer_bars
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
        counts, total = counted(self.session.findings.held(lane)).numpy(), len(self.session.texts)  # [L, H]
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
        names = [[f"{head_name((layer, head))}" for head in range(heads)] for layer in range(layers)]
        label = "prompt tokens kept, all KV heads"
        self._pane.object = layer_bars(counts, total, label, names, look, at, self.pick_head)
        self._note.object = quiet(
            f"A bar is a layer, a piece of it a KV head (KV0 first); the outline is the full cache, {heads} × {total:,} tokens. "
            f"The framed piece is {head_name(at)}. Click a piece to see its tokens above."
        )

    def table(self) -> Any:
        return self._frame
