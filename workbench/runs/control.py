"""Steering a run from another thread, and the queue in front of a device."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workbench.runs.steer import Edit


class Control:
    """Handed to a run; its methods may be called from any thread and take effect at the next token (or chunk)."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._cancelled = self._paused = False
        self._allowed = 0  # tokens that may still come while paused
        self._pause_at: int | None = None
        self._edits: list[Edit] = []

    def cancel(self) -> None:
        """End the run; what was computed stays."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def pause(self, at: int | None = None) -> None:
        """Hold the lane that generates before its next token, or before its token number ``at``.

        A run that is held gives the device to others and says :class:`~workbench.runs.events.Paused`; whoever iterates
        it then waits in the next step until another thread calls :meth:`resume`, :meth:`step` or :meth:`cancel`.
        """
        with self._changed:
            self._allowed = 0
            if at is None:
                self._paused = True
            else:
                self._pause_at = at

    def step(self, tokens: int = 1) -> None:
        """Let so many more tokens come, and hold the lane again."""
        with self._changed:
            self._paused, self._allowed = True, self._allowed + tokens
            self._changed.notify_all()

    def resume(self) -> None:
        """Go on after a pause."""
        with self._changed:
            self._paused, self._allowed, self._pause_at = False, 0, None
            self._changed.notify_all()

    @property
    def paused(self) -> bool:
        return self._paused

    @property
    def ready(self) -> bool:
        """Whether there is something to do: tokens that may come, an edit, or the end."""
        return not self._paused or bool(self._allowed or self._edits or self._cancelled)

    def edit(self, edit: Edit) -> None:
        """Do something to the lane that generates, before its next token is chosen; also while it is held.

        One that cannot be done is answered by :class:`~workbench.runs.events.Refused`, and the run goes on.
        """
        with self._changed:
            self._edits.append(edit)
            self._changed.notify_all()

    # -- the run's side ---------------------------------------------------------------------------------------------

    def take_edits(self) -> list[Edit]:
        """What was asked for since the last time."""
        with self._changed:
            edits, self._edits = self._edits, []
        return edits

    def holds(self, index: int) -> bool:
        """Whether token number ``index`` may not come yet; to be asked until it may."""
        with self._changed:
            if self._pause_at is not None and index >= self._pause_at:
                self._paused, self._pause_at = True, None
            if not self._paused or self._cancelled:
                return False
            if self._allowed:
                self._allowed -= 1
                return False
            return True

    def wait(self) -> None:
        """Until the run is :attr:`ready`."""
        with self._changed:
            self._changed.wait_for(lambda: self.ready)


class DeviceQueue:
    """First come, first served: one lane runs on a device at a time, and everyone can see their place."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextmanager
    def turn(self, control: Control) -> Iterator[bool]:
        """Wait for the device; yields False if the run was cancelled before it began."""
        place = Place(self, control)
        try:
            yield place.enter()
        finally:
            place.leave()

    def ahead(self) -> int:
        """Runs holding or waiting for the device now."""
        with self._changed:
            return len(self._waiting)


class Place:
    """One run's place in the queue of a device, which it may leave and take again at the end."""

    def __init__(self, queue: DeviceQueue, control: Control) -> None:
        self._queue, self._control = queue, control

    def enter(self) -> bool:
        """Wait for the device; False if the run was cancelled meanwhile."""
        queue = self._queue
        with queue._changed:
            queue._waiting.append(self)
            while queue._waiting[0] is not self and not self._control.cancelled:
                queue._changed.wait(0.05)
        return not self._control.cancelled

    def leave(self) -> None:
        """Let the next one have it; harmless when called again."""
        queue = self._queue
        with queue._changed:
            if self in queue._waiting:
                queue._waiting.remove(self)
                queue._changed.notify_all()


_QUEUES: dict[str, DeviceQueue] = {}
_QUEUES_LOCK = threading.Lock()


def device_queue(device: object) -> DeviceQueue:
    """The queue of a device, shared by every run in this process."""
    with _QUEUES_LOCK:
        return _QUEUES.setdefault(str(device), DeviceQueue())
