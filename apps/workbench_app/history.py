"""Undo and redo over the lanes, their recipes and what was done to them by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from workbench_app.ask import PLAIN, Course, LaneState

if TYPE_CHECKING:
    from workbench_app.session import Session

Layout = tuple[tuple[int, str, Course], ...]  # (key, recipe, course) of every lane, in order


class History:
    """Two stacks of layouts; what is undone can be redone until something new is done."""

    def __init__(self, session: Session, most: int = 200) -> None:
        self._session, self._most = session, most
        self._back: list[Layout] = []
        self._ahead: list[Layout] = []

    def remember(self) -> None:
        """Note what is before a change."""
        layout = self._now()
        if not self._back or self._back[-1] != layout:
            self._back = [*self._back, layout][-self._most :]
        self._ahead.clear()

    def undo(self) -> None:
        self._step(self._back, self._ahead)

    def redo(self) -> None:
        self._step(self._ahead, self._back)

    def _now(self) -> Layout:
        return tuple((lane.key, lane.recipe, replace(lane.course, held=None)) for lane in self._session.lanes)

    def _step(self, source: list[Layout], other: list[Layout]) -> None:
        now = self._now()
        while source:
            layout = source.pop()
            if layout != now:
                other.append(now)
                self._restore(layout)
                return

    def _restore(self, layout: Layout) -> None:
        session = self._session
        before = {lane.key: lane for lane in session.lanes}
        old_reference = session.lanes[0].recipe
        session.lanes = [before.get(key) or LaneState(key, recipe) for key, recipe, _ in layout]
        for key in before.keys() - {lane.key for lane in session.lanes}:
            session.end(key)
        changed = []
        for lane, (_, recipe, course) in zip(session.lanes, layout, strict=True):
            course = course if course.ask in (None, session.ask) else PLAIN
            same = lane.recipe == recipe and lane.course == course and lane.error is None
            if not same or lane.result is None:
                lane.recipe, lane.course, lane.error = recipe, course, None
                changed.append(lane.key)
        session.tell(lanes={lane.key for lane in session.lanes}, topics={"lanes"})
        if session.model is not None:
            session.run(None if session.lanes[0].recipe != old_reference else changed)
