"""How many of the prompt's tokens each layer was given to process, where a strategy leaves some behind (FastKV)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import panel as pn

from workbench_app import formats
from workbench_app.ask import LaneState
from workbench_app.charts import layer_bars
from workbench_app.views.look import Look, quiet, sentence


class TokensProcessed(Look):
    """One bar per layer inside the outline of the whole prompt."""

    question = "How many of the prompt's tokens did each layer process?"

    def build(self) -> list[Any]:
        self._pane = pn.pane.Bokeh(None, sizing_mode="stretch_width", margin=(4, 0, 0, 0))
        self._note = sentence()
        self._frame: Any = None
        return [self._pane, self._note]

    def known(self, lane: LaneState) -> tuple[Any, ...]:
        return (id(lane.result),)

    def draw(self, lane: LaneState, at: tuple[int, int]) -> None:
        if lane.result is None or not lane.result.tokens_by_layer:
            self._frame = None
            self.empty("This is known when the lane has run.")
            return
        given, total = np.array(lane.result.tokens_by_layer), len(self.session.texts)
        name, share = self.look(lane).name, given.sum() / (total * len(given))
        if given.min() == total:
            self.lead.object = f"<p><b>{name}</b>: every layer processed all <b>{total:,}</b> tokens of the prompt.</p>"
        else:
            first = int((given < total).argmax())
            self.lead.object = (
                f"<p><b>{name}</b>: from L{first} on, layers processed <b>{given[first]:,}</b> of {total:,} tokens; all layers "
                f"together <b>{formats.percent(share)}</b> of the prompt's token-layers.</p>"
            )
        self._frame = pd.DataFrame(
            {
                "layer": np.arange(len(given)),
                "tokens processed": given,
                "of the prompt": [formats.percent(n / total, 1) for n in given],
            }
        )
        names = [[f"L{layer}"] for layer in range(len(given))]
        frame = (at[0], 0)
        label = "prompt tokens that the layer processed"
        self._pane.object = layer_bars(
            given[:, None], total, label, names, self.look(lane), frame, lambda layer, _: self.pick_head(layer, at[1])
        )
        self._note.object = quiet(
            f"The outline is the whole prompt, {total:,} tokens; a layer can only keep what it was given. The framed layer is "
            f"L{at[0]}. Click a layer to see its tokens above."
        )

    def table(self) -> Any:
        return self._frame
