"""What a lane's keys and values are off by: the reference's numbers beside the error, token by token and channel by channel."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
import pandas as pd
import panel as pn
import panel_material_ui as pmui

from workbench.inspection.numbers import CODED, GONE, PLAIN, RESIDUAL, HeldNumbers, SideNumbers
from workbench_app import formats
from workbench_app.ask import LaneState
from workbench_app.looks import BAR
from workbench_app.maps import heat_map
from workbench_app.views.look import WIDE, Look, head_name, quiet, sentence
from workbench_widgets.panel import HeadMatrixPane

KEYS, VALUES = "keys", "values"
AS_HELD, ROTATED = "as attention reads them", "as they are coded, rotated"
BESIDE = """
:host { display: grid !important; gap: 4px 18px; grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); }
"""


class QuantizationError(Look):
    """Two heat-maps of one head, and which head is off by how much."""

    question = "Where are a head's keys and values large, and where is a lane off?"

    def build(self) -> list[Any]:
        self.side = pmui.RadioButtonGroup(
            label="Keys or values", options=[KEYS, VALUES], value=KEYS, size="small", margin=0
        )
        self.turned = pmui.RadioButtonGroup(
            label="Before or after rotation", options=[AS_HELD, ROTATED], value=AS_HELD, size="small", margin=0,
            visible=False,
        )  # fmt: skip
        self._titles = [sentence(), sentence()]
        self._panes = [pn.pane.Bokeh(None, sizing_mode="stretch_width", margin=0) for _ in range(2)]
        self.matrix = HeadMatrixPane(group="heads", margin=0)
        self._note = sentence()
        self._frame: Any = None
        for control in (self.side, self.turned):
            control.param.watch(lambda _: self.refresh(), "value")
        self.matrix.param.watch(lambda event: self.pick_head(event.new["layer"], event.new["head"]), "selected")
        maps = [pn.Column(title, pane, **WIDE) for title, pane in zip(self._titles, self._panes, strict=True)]
        self._bar = pn.Row(self.side, self.turned, stylesheets=[BAR], sizing_mode="stretch_width", margin=(8, 0, 4, 0))
        beside = pn.Column(*maps, stylesheets=[BESIDE], sizing_mode="stretch_width", margin=0)
        return [self._bar, beside, self._note, self.matrix]

    def known(self, lane: LaneState) -> tuple[Any, ...]:
        found = self.session.findings.numbers(lane)
        said = "" if found is not None else self.session.findings.said("numbers", lane)
        return (self.side.value, self.turned.value, id(found), said)

    def draw(self, lane: LaneState, at: tuple[int, int]) -> None:
        found = self.session.findings.numbers(lane)
        if found is None:
            self._frame = None
            self.empty(self.session.findings.said("numbers", lane))
            return
        data = side_of(found, at[0], self.side.value)
        self.turned.visible = data.rotated is not None
        rotated = data.rotated is not None and self.turned.value == ROTATED
        maps = data.rotated if rotated and data.rotated is not None else (data.size, data.error)
        size, error = (grid[0 if rotated else at[1]].numpy() for grid in maps)
        step = data.rotated_step if rotated else data.step
        self.lead.object = self._sentence(lane, at, data, size, error, step, rotated)
        who = f"L{at[0]}, all heads together" if rotated else head_name(at)
        self._show(0, f"<b>{who}</b> the reference's |{self.side.value}|", size, step)
        self._show(
            1,
            f"<b>{who}</b> the error |{self.look(lane).name.replace('T', 't').replace('Lane', 'lane')} − reference|",
            error,
            step,
        )
        self._note.object = quiet(self._words(data, at, step, rotated))
        grid = np.stack([side_of(found, layer, self.side.value).relative for layer in range(len(found.layers))])
        self.matrix.show(
            grid, metric=f"relative error of {self.side.value}", unit="%", low=0.0, high=max(grid.max(), 1e-3)
        )
        self.matrix.picked = list(at)
        self._frame = self._table(data, at, size, error, step)

    def _show(self, number: int, title: str, grid: np.ndarray, step: tuple[int, int]) -> None:
        high = float(np.nanmax(grid, initial=0.0))
        self._titles[number].object = f"<p>{title} <span class='quiet'>0 to {high:.3g}</span></p>"
        tokens = len(self.session.texts)
        self._panes[number].object = heat_map(
            grid, step, tokens, high, lambda token: self.state.param.update(key=token)
        )

    def _sentence(
        self,
        lane: LaneState,
        at: tuple[int, int],
        data: SideNumbers,
        size: np.ndarray,
        error: np.ndarray,
        step: tuple[int, int],
        rotated: bool,
    ) -> str:
        name, relative = self.look(lane).name, float(data.relative[at[1]])
        state = data.state[at[1]]
        if not bool((state == CODED).any()):
            held = int((state != GONE).sum())
            how = (
                "every number as the reference has it"
                if relative == 0
                else f"none as codes, but off by {formats.percent(relative, 1)}"
            )
            return f"<p><b>{name}</b>, {head_name(at)}: {held:,} of {len(state):,} tokens are held, {how}.</p>"
        row, column = np.unravel_index(int(np.nanargmax(error)), error.shape)
        first = int(row) * step[0]
        text = escape(formats.visible(self.session.texts[first]))
        where = (
            f"at token {first:,} <span class='chip'>{text}</span>"
            if step[0] == 1
            else f"in {span(int(row), step[0], 'token')}"
        )
        if rotated:
            before, after = (float(np.nanmax(grid)) for grid in (data.size.numpy(), size))
            return (
                f"<p><b>{name}</b>, L{at[0]}: rotated, the largest {self.side.value[:-1]} of the layer is <b>{after:.3g}</b>, "
                f"before it was <b>{before:.3g}</b>.</p>"
            )
        return (
            f"<p><b>{name}</b>, {head_name(at)}: its {self.side.value} are off by <b>{formats.percent(relative, 1)}</b> "
            f"(root mean square); most, by {error[row, column]:.3g}, {where}, {span(int(column), step[1], 'channel')}.</p>"
        )

    def _words(self, data: SideNumbers, at: tuple[int, int], step: tuple[int, int], rotated: bool) -> str:
        parts = []
        if max(step) > 1:
            parts.append(
                f"A cell is the largest of {formats.count(step[0], 'token')} × {formats.count(step[1], 'channel')}."
            )
        else:
            parts.append("Exact: a cell is one number.")
        gone = int((data.state[at[1]] == GONE).sum())
        if rotated:
            parts.append("Hatched: tokens that are not held as rotated codes. Keys are rotated as before RoPE.")
        elif gone:
            parts.append(f"Hatched: not held ({gone:,} tokens that the lane dropped), so there is no error to show.")
        if not rotated and bool((data.state[at[1]] == CODED).any()) and bool((data.state[at[1]] >= PLAIN).any()):
            parts.append("Tokens in full precision have no error.")
        parts.append("Keys are those after RoPE." if self.side.value == KEYS and not rotated else "")
        parts.append(
            "Numbers are the model's own, without a unit; each map has its own scale. Click a cell to pick its token; below, a head to see it."
        )
        return " ".join(part for part in parts if part)

    def _table(
        self, data: SideNumbers, at: tuple[int, int], size: np.ndarray, error: np.ndarray, step: tuple[int, int]
    ) -> Any:
        tokens = np.arange(len(size)) * step[0]
        states = data.state[at[1]].numpy()

        def most(grid: np.ndarray, row: int) -> tuple[str, str]:
            if np.isnan(grid[row]).all():
                return "–", "–"
            column = int(np.nanargmax(grid[row]))
            return f"{grid[row, column]:.3g}", span(column, step[1], "")

        rows = []
        for row, token in enumerate(tokens):
            held = states[token : token + step[0]]
            kinds = [
                word
                for word, kind in (
                    ("dropped", GONE),
                    ("coded", CODED),
                    ("full precision", PLAIN),
                    ("residual", RESIDUAL),
                )
                if (held == kind).any()
            ]
            large, off = most(size, row), most(error, row)
            rows.append([span(row, step[0], ""), large[0], large[1], off[0], off[1], " and ".join(kinds)])
        names = ["token", "largest in the reference", "its channel", "largest error", "its channel ", "held"]
        return pd.DataFrame(rows, columns=names)

    def table(self) -> Any:
        return self._frame


def side_of(found: HeldNumbers, layer: int, side: str) -> SideNumbers:
    return found.layers[layer].keys if side == KEYS else found.layers[layer].values


def span(cell: int, step: int, what: str) -> str:
    """A cell's tokens or channels: `channel 17`, `tokens 20–23`."""
    first = cell * step
    if step == 1:
        return f"{what} {first:,}".strip()
    return f"{what + 's' if what else ''} {first:,}–{first + step - 1:,}".strip()
