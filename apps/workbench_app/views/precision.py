"""Which of a head's tokens are packed and which lie in the residual window, keys and values apart, and at how many bits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import panel as pn
from bokeh.events import Tap
from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, Range1d

from workbench.inspection.numbers import CODED, GONE, PLAIN, RESIDUAL, HeldNumbers, SideNumbers
from workbench.inspection.scores import thinned
from workbench_app import formats
from workbench_app.ask import LaneState
from workbench_app.charts import NEUTRAL, chart, on_tap
from workbench_app.maps import HATCH, colour_bar, colours
from workbench_app.views.look import Look, head_name, quiet, sentence

COLUMNS = 512  # of the strip
POINTS = 600  # of the saliency chart
LEVELS = 4  # precisions that a sentence names


class Precision(Look):
    """Two rows of tokens coloured by the bits of a number; below, where a method chose them by it, the saliency."""

    question = "Which tokens are packed, which lie in the residual window, and how many bits does each take?"

    def build(self) -> list[Any]:
        self._pane = pn.pane.Bokeh(None, sizing_mode="stretch_width", margin=(4, 0, 0, 0))
        self._note = sentence()
        self._title = sentence()
        self._saliency = pn.pane.Bokeh(None, sizing_mode="stretch_width", margin=0)
        self._shown: Any = None  # sides, head and its saliency: a row for every token is made only when asked for
        return [self._pane, self._note, self._title, self._saliency]

    def known(self, lane: LaneState) -> tuple[Any, ...]:
        found = self.session.findings.numbers(lane)
        return (id(found), "" if found is not None else self.session.findings.said("numbers", lane))

    def draw(self, lane: LaneState, at: tuple[int, int]) -> None:
        found = self.session.findings.numbers(lane)
        if found is None:
            self._shown = None
            self.empty(self.session.findings.said("numbers", lane))
            return
        layer, head = found.layers[at[0]], at[1]
        sides = {"keys": layer.keys, "values": layer.values}
        name = self.look(lane).name
        self.lead.object = "".join(
            [
                f"<p><b>{name}</b>, {head_name(at)}</p>",
                *(f"<p>{side}: {levels(data, head)}</p>" for side, data in sides.items()),
            ]
        )
        self._pane.object = self._strip(sides, head)
        pooled = -(-len(self.session.texts) // COLUMNS)
        self._note.object = quiet(
            ("Exact: a column is one token. " if pooled == 1 else f"A column is the mean of {pooled} tokens. ")
            + "Bits are measured: all bytes of a token's run, scales included, over its numbers. Hatched: dropped. Dotted: "
            "the residual window, the newest tokens, which wait in the model's own precision to be coded. Click a token to pick it."
        )
        saliency = found.saliency[at[0]]
        self._title.visible = self._saliency.visible = saliency is not None
        if saliency is not None:
            self._title.object = (
                f"<p><b>{head_name(at)}</b> <span class='quiet'>saliency by which the method chose each token's bits: "
                "■ most bits, ○ fewer, × dropped</span></p>"
            )
            self._saliency.object = self._scatter(found, at, saliency[head].numpy())
        self._shown = (sides, head, None if saliency is None else saliency[head])

    def _strip(self, sides: dict[str, SideNumbers], head: int) -> Any:
        tokens = len(self.session.texts)
        step = -(-tokens // COLUMNS)
        plot = chart(
            160, "prompt token (colour: bits of a number)", "", x_range=Range1d(0, tokens), y_range=Range1d(-0.06, 2.06)
        )
        plot.ygrid.visible = False
        plot.yaxis.ticker = FixedTicker(ticks=[0.5, 1.5])
        plot.yaxis.major_label_overrides = {0.5: "values", 1.5: "keys"}
        most = max(float(data.bits[head].float().nan_to_num().max()) for data in sides.values())
        mapper = colours(plot, math.log2(max(most, 2.0)))
        images = []
        for row, (side, data) in zip((1, 0), sides.items(), strict=True):
            plot.quad([0], [tokens], [row + 0.94], [row + 0.06], **HATCH)
            bits = mean_of(data.bits[head].float().numpy(), step)
            first = np.arange(len(bits)) * step
            source = ColumnDataSource(
                {
                    "image": [np.log2(bits)[None].astype(np.float32)],
                    "bits": [bits[None].astype(np.float32)],
                    "token": [first[None].astype(np.int32)],
                    "side": [side],
                }
            )
            images.append(plot.image(
                "image", x=0, y=row + 0.06, dw=len(bits) * step, dh=0.88, source=source, color_mapper=mapper
            ))  # fmt: skip
            left, right = residual(data.state[head].numpy())
            paint = {"fill_alpha": 0, "line_color": NEUTRAL, "line_width": 2, "hatch_pattern": "."}
            ink = {"hatch_color": NEUTRAL, "hatch_scale": 6}
            plot.quad(left, right, [row + 0.94] * len(left), [row + 0.06] * len(left), **paint, **ink)
        ticks = range(int(math.log2(max(most, 2.0))) + 1)
        names = {n: f"{2**n}" for n in ticks}
        bar = colour_bar(mapper, ticker=FixedTicker(ticks=list(ticks)), major_label_overrides=names)
        plot.add_layout(bar, "right")
        plot.add_tools(HoverTool(renderers=images, tooltips=[("token", "@token"), ("bits of a number", "@bits{0.00}")]))
        plot.on_event(Tap, lambda event: self._pick(event.x))
        return plot

    def _pick(self, x: float | None) -> None:
        if x is not None and 0 <= x < len(self.session.texts):
            self.state.key = int(x)

    def _scatter(self, found: HeldNumbers, at: tuple[int, int], saliency: np.ndarray) -> Any:
        layer = found.layers[at[0]]
        bits = (layer.keys.bits[at[1]].float() + layer.values.bits[at[1]].float()).numpy() / 2
        places = thinned(len(saliency), POINTS, [] if self.state.key is None else [self.state.key]).numpy()
        positive = saliency[saliency > 0]
        least = float(positive.min()) if len(positive) else 1e-6
        plot = chart(220, "prompt token", "saliency", x_range=Range1d(0, len(saliency)), y_axis_type="log")
        most = np.nanmax(bits)
        marks = []
        for marker, chosen in (("square", bits >= most - 0.01), ("circle", bits < most - 0.01), ("x", np.isnan(bits))):
            some = places[chosen[places]]
            source = ColumnDataSource(
                {
                    "x": some,
                    "y": np.maximum(saliency[some], least),
                    "text": [formats.visible(self.session.texts[i]) for i in some],
                    "bits": [bits_text(float(bits[i])) for i in some],
                }
            )
            fill = {"fill_alpha": 0.8 if marker == "square" else 0.0}
            mark = plot.scatter("x", "y", source=source, marker=marker, size=6, color=NEUTRAL, **fill)
            marks.append(mark)
            on_tap(plot, mark, lambda index, some=some: self.state.param.update(key=int(some[index])))
        plot.add_tools(
            HoverTool(
                renderers=marks, tooltips=[("token", "@x “@text”"), ("saliency", "@y{0.000a}"), ("bits", "@bits")]
            )
        )
        return plot

    def table(self) -> Any:
        if self._shown is None:
            return None
        sides, head, saliency = self._shown
        return pd.DataFrame(
            {"token": np.arange(len(self.session.texts)), "text": [formats.visible(t) for t in self.session.texts]}
            | {side: [STATES[int(s)] for s in data.state[head]] for side, data in sides.items()}
            | {f"bits of {side}": [bits_text(float(b)) for b in data.bits[head]] for side, data in sides.items()}
            | ({} if saliency is None else {"saliency": [f"{float(s):.3g}" for s in saliency]})
        )


STATES = {GONE: "dropped", CODED: "packed", PLAIN: "full precision", RESIDUAL: "residual"}


def bits_text(bits: float) -> str:
    return "–" if math.isnan(bits) else f"{bits:.3g}"


def residual(state: np.ndarray) -> tuple[list[int], list[int]]:
    """Where stretches of the residual window begin, and where they end (the token after)."""
    edges = np.diff((state == RESIDUAL).astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist()


def mean_of(bits: np.ndarray, step: int) -> np.ndarray:
    """The mean of every ``step`` tokens over those that are held; NaN where none is."""
    padded = np.append(bits, np.full(-len(bits) % step, np.nan)).reshape(-1, step)
    held = ~np.isnan(padded)
    return np.where(held.any(1), np.nansum(padded, 1) / np.maximum(held.sum(1), 1), np.nan)


def levels(data: SideNumbers, head: int) -> str:
    """`96 packed at 4 bits, the newest 4 in the residual window at 32 bits, 10 dropped`."""
    state, bits = data.state[head].numpy(), data.bits[head].float().numpy()
    said = []
    for kind, words in ((CODED, "packed"), (PLAIN, "in full precision")):
        found, counts = np.unique(bits[state == kind].round(2), return_counts=True)
        some = [f"<b>{count:,}</b> {words} at {level:.3g} bits" for level, count in zip(found, counts, strict=True)]
        more = f"and {counts[LEVELS:].sum():,} {words} at {len(found) - LEVELS} other precisions"
        said += some if len(some) <= LEVELS else [*some[:LEVELS], more]
    newest = state == RESIDUAL
    if newest.any():
        said.append(f"the newest <b>{newest.sum():,}</b> in the residual window at {bits[newest][0]:.3g} bits")
    gone = int((state == GONE).sum())
    return ", ".join([*said, *([f"<b>{gone:,}</b> dropped"] if gone else [])])
