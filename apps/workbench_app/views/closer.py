"""The closer looks on the page: a row of buttons, and below it the one that is open."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import panel as pn
import panel_material_ui as pmui

from workbench_app.looks import BAR
from workbench_app.session import Session
from workbench_app.state import UIState
from workbench_app.views.look import WIDE, Look, quiet, sentence

# Name, module and class: a look's module, and what draws it, is imported when it is first chosen.
LOOKS = {
    "Budgets": ("budgets", "Budgets"),
    "Scores": ("curve", "ScoreCurve"),
    "Why dropped?": ("fate", "WhyDropped"),
    "Overlap": ("overlap", "Overlap"),
    "Retained attention": ("retained", "Retained"),
    "Tokens processed": ("given", "TokensProcessed"),
    "Bytes by kind": ("kinds", "BytesByKind"),
    "Quantization error": ("errors", "QuantizationError"),
    "Packed or residual": ("precision", "Precision"),
}
CLOSED = "None"
# The group's buttons stand apart, so that they may wrap on a narrow screen.
PILLS = {
    "flexWrap": "wrap",
    "gap": "6px",
    "& .MuiToggleButton-root.MuiToggleButton-root": {
        "flex": "none", "width": "auto", "px": 1.5, "ml": 0, "borderRadius": "5px", "border": "1px solid", "borderColor": "divider",
    },
}  # fmt: skip


class Closer(pn.viewable.Viewer):
    """One closer look at a time; none is built before it is chosen.

    Args:
        to_tokens: brings the token strip into sight.
    """

    def __init__(self, session: Session, state: UIState, to_tokens: Callable[[], None]) -> None:
        super().__init__()
        self._session, self.state = session, state
        self._looks: dict[str, Look] = {}
        self.picker = pmui.RadioButtonGroup(
            label="View", options=[CLOSED, *LOOKS], value=CLOSED, size="small", margin=0,
            sx=PILLS,
        )  # fmt: skip
        self.table_switch = pmui.Switch(label="Numbers as a table", value=False, margin=(0, 0, 0, 4), visible=False)
        self.tokens_button = pmui.Button(
            label="To its tokens", icon="arrow_upward", size="small", variant="text", margin=0, visible=False
        )
        self.tokens_button.on_click(lambda _: to_tokens())
        self._question = sentence()
        self._place = pn.Column(**WIDE)
        self._table = pn.Column(**WIDE)
        bar = pn.Row(
            self.picker,
            self.tokens_button,
            self.table_switch,
            stylesheets=[BAR],
            sizing_mode="stretch_width",
            margin=(8, 0, 6, 0),
        )
        self._view = pn.Column(bar, self._question, self._place, self._table, **WIDE)
        self.picker.param.watch(self._chosen, "value")
        self.table_switch.param.watch(lambda _: self._show_table(), "value")
        state.param.watch(lambda *_: self.refresh(), ["lane", "layer", "head", "key", "query"])

    def __panel__(self) -> Any:
        return self._view

    @property
    def open(self) -> Look | None:
        return self._looks.get(self.state.view) if self.state.view else None

    def _chosen(self, event: Any) -> None:
        name = None if event.new == CLOSED else event.new
        if name is not None and name not in self._looks:
            module, cls = LOOKS[name]
            kind = getattr(import_module(f"workbench_app.views.{module}"), cls)
            self._looks[name] = kind(self._session, self.state)
        self.state.view = name
        self._session.findings.opened()
        look = self.open
        self.table_switch.visible = self.tokens_button.visible = look is not None
        self._question.object = quiet(look.question) if look is not None else ""
        if look is not None:
            look.refresh()
        self._place[:] = [look] if look is not None else []
        self._show_table()

    def refresh(self) -> None:
        """Bring the open look up to date, if there is one."""
        look = self.open
        if look is not None and look.refresh():
            self._show_table()

    def _show_table(self) -> None:
        look = self.open
        frame = look.table() if look is not None and self.table_switch.value else None
        options: dict[str, Any] = {
            "disabled": True,
            "sizing_mode": "stretch_width",
            "theme": "simple",
            "show_index": False,
        }
        self._table[:] = (
            [] if frame is None else [pn.widgets.Tabulator(frame, pagination="remote", page_size=20, **options)]
        )
