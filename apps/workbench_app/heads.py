"""Which heads keep what: the matrix of layers and KV heads, and the token strip of the head that was picked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import panel as pn
import panel_material_ui as pmui

from workbench.inspection.why import reference_attention
from workbench_app import formats
from workbench_app.ask import LaneState
from workbench_app.by_hand import ByHand
from workbench_app.looks import BAR, HEADS, TEXT
from workbench_app.selection import head_on_show, lane_on_show
from workbench_app.session import Session
from workbench_app.state import UIState
from workbench_widgets import TokenStatus
from workbench_widgets.panel import HeadMatrixPane, TokenStripPane


@dataclass(frozen=True)
class Metric:
    """A number per layer and KV head, and how it is shown."""

    name: str
    unit: str
    explains: str
    grid: Callable[[Session, LaneState], Any]


def _kept(session: Session, lane: LaneState) -> Any:
    total = len(session.texts)
    return [[len(head) / total for head in layer] for layer in lane.kept] if total else None


def _bytes(session: Session, lane: LaneState) -> Any:
    return lane.memory.by_head if lane.memory is not None else None


def _cosine(name: str) -> Callable[[Session, LaneState], Any]:
    return lambda session, lane: 1.0 - np.asarray(lane.drift[name]) if lane.drift and lane.drift.get(name) else None


def _read_error(session: Session, lane: LaneState) -> Any:
    return lane.drift.get("output_relative_l2") or None if lane.drift else None


def _lost(session: Session, lane: LaneState) -> Any:
    return lane.why.lost_mass if lane.why is not None else None


METRICS = (
    Metric("kept share", "%", "share of the prompt's tokens the head holds after the prompt", _kept),
    Metric("bytes", "bytes", "bytes the head holds now, codes and metadata included", _bytes),
    Metric("key drift", "1 − cosine", "how far held keys are from the reference's, mean", _cosine("key_cosine")),
    Metric("value drift", "1 − cosine", "how far held values are from the reference's, mean", _cosine("value_cosine")),
    Metric("output drift", "relative L2", "error of the head's output for the first generated token", _read_error),
    Metric("lost attention", "%", "share of the reference's attention that falls on dropped tokens", _lost),
)


def status_codes(kept: list[int], packed: int, total: int, restored: Sequence[int] = ()) -> np.ndarray:
    """What became of every prompt token in one head: of the kept entries that were not ``restored`` by hand, the first
    ``packed`` are held as codes.
    """
    codes = np.full(total, int(TokenStatus.EVICTED), dtype=np.int64)
    held = [position for position in kept if position < total]
    codes[held] = int(TokenStatus.KEPT)
    coded = [position for position in held if position not in restored]
    codes[coded[:packed]] = int(TokenStatus.QUANTIZED)
    return codes


def share_over_heads(kept: list[list[list[int]]], total: int) -> np.ndarray:
    """For every prompt token, the fraction of all heads that hold it."""
    votes = np.zeros(total, dtype=np.float32)
    heads = [head for layer in kept for head in layer]
    for head in heads:
        held = np.asarray(head, dtype=np.int64)
        votes[held[held < total]] += 1
    return votes / max(1, len(heads))


class Heads(pn.viewable.Viewer):
    """The matrix and the strip, for one lane at a time."""

    def __init__(self, session: Session, state: UIState) -> None:
        super().__init__()
        self._session, self.state = session, state
        self._drawn: tuple[Any, ...] | None = None
        self.lane_picker = pmui.RadioButtonGroup(label="Lane", options=["Ref"], value="Ref", size="small", margin=0)
        self.metric = pmui.Select(
            label="Number per head",
            options=[m.name for m in METRICS],
            value="kept share",
            size="small",
            width=170,
            margin=0,
        )
        self.table_switch = pmui.Switch(label="Data table", value=False, margin=(0, 0, 0, 4))
        self._explains = pn.pane.HTML("", stylesheets=[TEXT], margin=0, sizing_mode="stretch_width")
        self.matrix = HeadMatrixPane(group="heads", margin=0)
        self.strip = TokenStripPane(group="heads", hint="Pick a head in the matrix to see what it keeps.", margin=0)
        self._tables = pn.Column(sizing_mode="stretch_width", visible=False)
        bar = pn.Row(
            self.lane_picker,
            self.metric,
            self.table_switch,
            stylesheets=[BAR],
            sizing_mode="stretch_width",
            margin=(8, 0, 4, 0),
        )
        left = pn.Column(self.matrix, self._explains, sizing_mode="stretch_width", margin=0)
        self.by_hand = ByHand(session, state)
        right = pn.Column(self.strip, self.by_hand, sizing_mode="stretch_width", margin=0)
        views = pn.Column(left, right, stylesheets=[HEADS], sizing_mode="stretch_width", margin=0)
        self._view = pn.Column(bar, views, self._tables, sizing_mode="stretch_width", margin=0)
        self.lane_picker.param.watch(self._lane_chosen, "value")
        self.metric.param.watch(lambda event: self.state.param.update(metric=event.new), "value")
        self.table_switch.param.watch(lambda _: self.refresh(), "value")
        self.matrix.param.watch(self._head_chosen, "selected")
        self.strip.param.watch(lambda event: self.state.param.update(key=event.new["token"]), "selected")
        state.param.watch(lambda *_: self.refresh(), ["lane", "layer", "head", "query", "key", "metric"])

    def __panel__(self) -> Any:
        return self._view

    def _lane_chosen(self, event: Any) -> None:
        lane, session = lane_on_show(self._session, self.state), self._session
        places = {formats.look(place).letter: other for place, other in enumerate(session.lanes)}
        chosen = places.get(event.new)
        if chosen is not None and chosen is not lane:
            self.state.param.update(lane=chosen.key, settled=True)

    def _head_chosen(self, event: Any) -> None:
        self.state.param.update(layer=event.new["layer"], head=event.new["head"], settled=True)

    def reveal(self) -> None:
        """Bring the token strip into sight."""
        self.strip.reveal += 1

    def refresh(self) -> None:
        """Bring the views up to date; nothing is sent when nothing changed."""
        session, lane = self._session, lane_on_show(self._session, self.state)
        if lane is None:
            return
        letters = [formats.look(place).letter for place in range(len(session.lanes))]
        look = formats.look(session.place(lane.key))
        if self.lane_picker.options != letters:
            self.lane_picker.options = letters
        if self.lane_picker.value != look.letter:
            self.lane_picker.value = look.letter
        metric = next(m for m in METRICS if m.name == self.state.metric)
        if self.metric.value != metric.name:
            self.metric.value = metric.name
        head = head_on_show(lane, self.state)
        state = (
            lane.key, look, metric.name, head, self.state.query, self.table_switch.value, id(lane.kept), id(lane.memory),
            id(lane.drift), id(lane.why), len(session.texts), session.evidence,
        )  # fmt: skip
        if self.state.key is not None and self.strip.picked != self.state.key:
            self.strip.picked = self.state.key
        self.by_hand.refresh()
        if state == self._drawn:
            return
        self._drawn = state
        grid = metric.grid(session, lane) if lane.kept else None
        self._explains.object = f'<p class="quiet" style="font-size:12.5px">{look.name}: {metric.explains}.</p>'
        if grid is None:
            shape = (len(lane.kept), len(lane.kept[0])) if lane.kept else (0, 0)
            grid = np.full(shape, np.nan)
            self._explains.object = f'<p class="quiet" style="font-size:12.5px">{self._missing(metric, lane)}</p>'
        self.matrix.hint = "Run the lanes to see what each head keeps."
        self.matrix.show(grid, metric=metric.name, unit=metric.unit)
        self.matrix.picked = list(head or ())
        data = self._strip_data(lane, head) if head is not None and session.texts else None
        if data is not None and head is not None:
            self._show_strip(data, look, head)
        self._show_tables(data, np.asarray(grid, dtype=float))

    def _missing(self, metric: Metric, lane: LaneState) -> str:
        if metric.name == "lost attention":
            return "Nothing was lost that is known: the lane never differed, or it is the reference."
        return f"The {metric.name} is not measured yet."

    def _strip_data(self, lane: LaneState, at: tuple[int, int]) -> dict[str, Any]:
        """What became of every prompt token in one head."""
        layer, head = at
        total = len(self._session.texts)
        kept = lane.kept[layer][head]
        restored = lane.restored[layer][head] if lane.restored else ()
        return {
            "status": status_codes(kept, lane.packed[layer][head] if lane.packed else 0, total, restored),
            "share": share_over_heads(lane.kept, total),
            "score": self._attention(layer, head, total),
            "kept": len(kept),
        }

    def _attention(self, layer: int, head: int, total: int) -> np.ndarray | None:
        """What the reference's head paid every prompt token for the token in question (largest of its group)."""
        session = self._session
        trace = session.reference_trace()
        if trace is None or not trace.answers:
            return None
        queries = trace.answers[0].queries(self.state.query or 0)
        if not queries:
            return None
        weights, at = reference_attention(trace.cache.layers[layer], queries[layer], head)
        score = np.full(total, np.nan, dtype=np.float32)
        places = at.cpu().numpy()
        score[places[places < total]] = weights.amax(0).float().cpu().numpy()[places < total]
        return score

    def _show_strip(self, data: dict[str, Any], look: formats.Look, at: tuple[int, int]) -> None:
        texts = self._session.texts
        marks = [position for position in self._session.evidence if position < len(texts)]
        about = f"{look.name} · L{at[0]} KV{at[1]} · {data['kept']:,} of {len(texts):,} tokens kept"
        if data["score"] is not None:
            about += f" · score: the reference's attention for token {self.state.query or 0}"
        self.strip.tint = look.colour
        self.strip.show(texts, data["status"], score=data["score"], share=data["share"], marks=marks, title=about)

    def _show_tables(self, data: dict[str, Any] | None, grid: np.ndarray) -> None:
        """The same numbers as tables, for who cannot or will not read a canvas."""
        self._tables.visible = self.table_switch.value
        if not self.table_switch.value:
            self._tables[:] = []
            return
        import pandas as pd

        heads = pd.DataFrame(
            grid, columns=[f"KV{h}" for h in range(grid.shape[1])], index=[f"L{i}" for i in range(grid.shape[0])]
        )
        options: dict[str, Any] = {"disabled": True, "sizing_mode": "stretch_width", "theme": "simple"}
        tables = [pn.widgets.Tabulator(heads.round(5), pagination="local", page_size=32, **options)]
        if data is not None:
            names = {int(code): code.name.lower() for code in TokenStatus}
            texts = self._session.texts
            columns = {
                "token": [formats.visible(text) for text in texts],
                "state": [names[int(code)] for code in data["status"]],
                "kept by heads": [formats.percent(float(s)) for s in data["share"]],
            }
            if data["score"] is not None:
                columns["reference's attention"] = [f"{s:.2g}" for s in data["score"]]
            tables.append(pn.widgets.Tabulator(pd.DataFrame(columns), pagination="remote", page_size=20, **options))
        self._tables[:] = tables
