"""Undo and redo over the lanes and their recipes."""

from __future__ import annotations

Layout = tuple[tuple[int, str], ...]  # (key, recipe) of every lane, in order


class History:
    """Two stacks of layouts; what is undone can be redone until something new is done."""

    def __init__(self, most: int = 200) -> None:
        self._most = most
        self._back: list[Layout] = []
        self._ahead: list[Layout] = []

    def remember(self, layout: Layout) -> None:
        """Note what was before a change."""
        if not self._back or self._back[-1] != layout:
            self._back = [*self._back, layout][-self._most :]
        self._ahead.clear()

    def undo(self, now: Layout) -> Layout | None:
        return self._step(self._back, self._ahead, now)

    def redo(self, now: Layout) -> Layout | None:
        return self._step(self._ahead, self._back, now)

    @staticmethod
    def _step(source: list[Layout], other: list[Layout], now: Layout) -> Layout | None:
        while source:
            layout = source.pop()
            if layout != now:
                other.append(now)
                return layout
        return None
