"""Steering a run from another thread, and the queue in front of a device."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Control:
    """Handed to a run; ``cancel()`` may be called from any thread and takes effect at the next token or chunk."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()


class DeviceQueue:
    """First come, first served: one lane runs on a device at a time, and everyone can see their place."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextmanager
    def turn(self, control: Control) -> Iterator[bool]:
        """Wait for the device; yields False if the run was cancelled before it began."""
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
        try:
            with self._changed:
                while self._waiting[0] is not ticket and not control.cancelled:
                    self._changed.wait(0.05)
            yield not control.cancelled
        finally:
            with self._changed:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def ahead(self) -> int:
        """Runs holding or waiting for the device now."""
        with self._changed:
            return len(self._waiting)


_QUEUES: dict[str, DeviceQueue] = {}
_QUEUES_LOCK = threading.Lock()


def device_queue(device: object) -> DeviceQueue:
    """The queue of a device, shared by every run in this process."""
    with _QUEUES_LOCK:
        return _QUEUES.setdefault(str(device), DeviceQueue())
