"""What every closer look has in common: it follows the page's selection and draws only when something changed."""

from __future__ import annotations

from typing import Any, ClassVar

import panel as pn

from workbench_app import formats
from workbench_app.ask import LaneState
from workbench_app.looks import TEXT
from workbench_app.selection import head_on_show, lane_on_show
from workbench_app.session import Session
from workbench_app.state import UIState

WIDE: dict[str, Any] = {"margin": 0, "sizing_mode": "stretch_width"}


def sentence(html: str = "") -> Any:
    return pn.pane.HTML(html, stylesheets=[TEXT, "p { font-size: 14px; }"], **WIDE)


def quiet(html: str) -> str:
    return f'<p class="quiet" style="font-size:12.5px">{html}</p>'


def score_text(value: float) -> str:
    """A score as people read it; an infinite one is protected, one that is not a number was never given."""
    if value != value:
        return "not scored"
    return "protected" if value == float("inf") else f"{value:.3g}"


def head_name(at: tuple[int, int]) -> str:
    return f"L{at[0]} KV{at[1]}"


class Look(pn.viewable.Viewer):
    """One closer look.

    Subclasses build their panes in ``build`` and fill them in ``draw``; ``known`` is what a drawing depends on beside
    the selection.
    """

    question: ClassVar[str] = ""

    def __init__(self, session: Session, state: UIState) -> None:
        super().__init__()
        self.session, self.state = session, state
        self.lead = sentence()
        self._drawn: Any = None
        self._view = pn.Column(self.lead, *self.build(), **WIDE)

    def __panel__(self) -> Any:
        return self._view

    def build(self) -> list[Any]:
        raise NotImplementedError

    def known(self, lane: LaneState) -> tuple[Any, ...]:
        """Everything else that the drawing shows; compared by equality, so big things by their id."""
        return ()

    def draw(self, lane: LaneState, at: tuple[int, int]) -> None:
        raise NotImplementedError

    def table(self) -> Any:
        """The numbers on show as a data frame, or None."""
        return None

    def look(self, lane: LaneState) -> formats.Look:
        return formats.look(self.session.place(lane.key))

    def empty(self, why: str) -> None:
        """Nothing to show: say why."""
        self.lead.object = quiet(why)
        for pane in self._view[1:]:
            pane.visible = False

    def refresh(self) -> bool:
        """Bring the view up to date; False if it was."""
        session, state = self.session, self.state
        lane = lane_on_show(session, state)
        at = head_on_show(lane, state) if lane is not None else None
        if lane is None or at is None or not session.texts:
            now: tuple[Any, ...] = ("nothing",)
        else:
            now = (
                lane.key,
                self.look(lane),
                at,
                state.key,
                state.query,
                id(lane.kept),
                len(session.texts),
                *self.known(lane),
            )
        if now == self._drawn:
            return False
        self._drawn = now
        if lane is None or at is None or not session.texts:
            self.empty("Run the lanes to look closer at one of them.")
        else:
            for pane in self._view[1:]:
                pane.visible = True
            self.draw(lane, at)
        return True

    def pick_head(self, layer: int, head: int) -> None:
        self.state.param.update(layer=int(layer), head=int(head), settled=True)
