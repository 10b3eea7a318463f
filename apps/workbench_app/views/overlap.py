"""How far lanes hold the same tokens."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
import pandas as pd
import panel as pn
import panel_material_ui as pmui

from workbench.inspection.overlap import jaccard, overlap
from workbench_app import formats, recipes
from workbench_app.ask import LaneState
from workbench_app.looks import BAR, HEADS
from workbench_app.views.look import WIDE, Look, head_name, quiet, sentence
from workbench_widgets.panel import HeadMatrixPane


class Overlap(Look):
    """Lanes × lanes overall and in the head on show, and head by head against one other lane."""

    question = "Do the lanes hold the same tokens?"

    def build(self) -> list[Any]:
        self._tables = sentence()
        self.other = pmui.RadioButtonGroup(
            label="Head by head against lane", options=["–"], value="–", size="small", margin=0
        )
        self.matrix = HeadMatrixPane(group="heads", margin=0)
        self._note = sentence()
        self._frame: Any = None
        self.other.param.watch(lambda _: self.refresh(), "value")
        self.matrix.param.watch(lambda event: self.pick_head(event.new["layer"], event.new["head"]), "selected")
        right = pn.Column(pn.Row(self.other, stylesheets=[BAR], margin=0), self.matrix, self._note, **WIDE)
        return [pn.Column(self._tables, right, stylesheets=[HEADS], sizing_mode="stretch_width", margin=(8, 0, 0, 0))]

    def _lanes(self) -> list[tuple[str, LaneState]]:
        """Letter and lane of all that hold something of this prompt."""
        return [
            (formats.look(place).letter, lane)
            for place, lane in enumerate(self.session.lanes)
            if lane.kept and not lane.stale
        ]

    def known(self, lane: LaneState) -> tuple[Any, ...]:
        return (self.other.value, *((letter, id(other.kept), other.recipe_now) for letter, other in self._lanes()))

    def draw(self, lane: LaneState, at: tuple[int, int]) -> None:
        lanes = self._lanes()
        if len(lanes) < 2:
            self.empty("There is one lane only; add another to compare what they hold.")
            return
        letters = [letter for letter, _ in lanes]
        own = self.look(lane).letter
        options = [letter for letter in letters if letter != own]
        if self.other.options != options or self.other.value not in options:
            # best the next method beside this one; the reference holds everything
            value = self.other.value if self.other.value in options else options[-1]
            self.other.param.update(options=options, value=value)
        other = dict(lanes)[self.other.value]
        held = self.session.findings.held
        masks = [held(one) for _, one in lanes]
        whole, head = overlap(masks), overlap(masks, at)
        titles = [recipes.title(one.recipe_now) for _, one in lanes]
        self.lead.object = self._sentence(lane, other, whole[letters.index(own), letters.index(self.other.value)])
        self._tables.object = "".join(
            (
                matrix_html("All layers and heads", letters, titles, whole),
                matrix_html(head_name(at), letters, titles, head),
            )
        )
        self.matrix.show(
            jaccard(held(lane), held(other)),
            metric=f"Jaccard index of {own} and {self.other.value}",
            unit="",
            low=0.0,
            high=1.0,
        )
        self.matrix.picked = list(at)
        self._note.object = quiet("1: the same tokens; 0: not one in common. Pick a head to see its tokens above.")
        index = [(place, name) for place in ("all", head_name(at)) for name in letters]
        frame = pd.DataFrame(np.concatenate([whole, head]).round(4), columns=letters)
        frame.insert(0, "lane", [name for _, name in index])
        frame.insert(0, "where", [place for place, _ in index])
        self._frame = frame

    def _sentence(self, lane: LaneState, other: LaneState, index: float) -> str:
        one, two = self.look(lane).name, self.look(other).name
        two = two[0].lower() + two[1:]
        return (
            f"<p><b>{one}</b> and <b>{two}</b> share {formats.percent(index)} of the entries that either holds "
            f"(Jaccard index {index:.2f}).</p>"
        )

    def table(self) -> Any:
        return self._frame


def matrix_html(title: str, letters: list[str], names: list[str], values: np.ndarray) -> str:
    """A table of numbers between 0 and 1, on a ground that is the stronger the more is shared."""
    head = "".join(f'<th scope="col">{letter}</th>' for letter in letters)
    rows = []
    for letter, name, row in zip(letters, names, values, strict=True):
        cells = "".join(
            f'<td style="--much:{0 if v != v else round(34 * v)}%">{"–" if v != v else f"{v:.2f}"}</td>' for v in row
        )
        rows.append(f'<tr><th scope="row">{letter}<span class="quiet"> {escape(name)}</span></th>{cells}</tr>')
    return (
        f'<table class="grid"><caption>{title} <span class="quiet">Jaccard index, 0 to 1</span></caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )
