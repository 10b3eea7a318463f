"""A session's worker thread, the way back from it to the page, and the models that all sessions share."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import workbench as wb
from workbench.runs.control import Control

LOG = logging.getLogger("workbench.app")


@dataclass
class Job:
    """Work for the worker thread. A newer job with the same key takes the place of an older one."""

    key: Hashable
    work: Callable[[Control], None]
    control: Control = field(default_factory=Control)


class Runner:
    """One thread that does one job after another. The core's device queue makes sessions take turns."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: dict[Hashable, Job] = {}
        self._current: Job | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, job: Job) -> None:
        """Do ``job`` when its turn comes; a job of that key that runs now is cancelled, unless they share their control."""
        with self._changed:
            if self._closed:
                return
            current = self._current
            if current is not None and current.key == job.key and current.control is not job.control:
                current.control.cancel()
            self._jobs.pop(job.key, None)
            self._jobs[job.key] = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="workbench-lanes", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def cancel(self, key: Hashable) -> None:
        """Forget a waiting job and cancel a running one."""
        self.cancel_where(lambda other: other == key)

    def cancel_where(self, meant: Callable[[Hashable], bool]) -> None:
        """The same for all jobs whose key is meant."""
        with self._changed:
            for key in [key for key in self._jobs if meant(key)]:
                del self._jobs[key]
            if self._current is not None and meant(self._current.key):
                self._current.control.cancel()

    def stop(self) -> None:
        """Forget all waiting jobs and cancel the running one."""
        with self._changed:
            self._jobs.clear()
            if self._current is not None:
                self._current.control.cancel()

    def close(self) -> None:
        """Stop, and let the thread end."""
        self._closed = True
        self.stop()
        with self._changed:
            self._changed.notify_all()

    @property
    def idle(self) -> bool:
        with self._changed:
            return not self._jobs and self._current is None

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                self._current = self._jobs.pop(next(iter(self._jobs)))
            try:
                self._current.work(self._current.control)
            except Exception:
                LOG.exception("a job of the app's worker failed")
            finally:
                with self._changed:
                    self._current = None


class Urgency(Enum):
    """How soon the page should hear of something."""

    LATER = 0  # with what comes next, which is not far
    SOON = 1  # within the mailbox's interval
    NOW = 2


class Mailbox:
    """Messages from the worker to the page, in batches: at most one per ``interval`` seconds unless one is urgent.

    Args:
        deliver: takes a list of messages, on the page's thread.
        document: the Bokeh document of the session; without one (in tests) somebody calls :meth:`drain`.
    """

    interval = 0.1

    def __init__(self, deliver: Callable[[list[Any]], None], document: Any = None) -> None:
        self._deliver, self._document = deliver, document
        self._lock = threading.Lock()
        self._waiting: list[Any] = []
        self._asked = False  # a callback is on its way
        self._last = 0.0
        self._closed = self._paused = False

    def pause(self) -> None:
        """Keep messages until :meth:`resume`."""
        self._paused = True

    def resume(self) -> None:
        """Deliver what was kept; on the page's thread only."""
        self._paused = False
        self.drain()

    def post(self, message: Any, urgency: Urgency = Urgency.SOON) -> None:
        with self._lock:
            if self._closed:
                return
            self._waiting.append(message)
            if self._document is None or self._paused or urgency is Urgency.LATER:
                return
            if self._asked and urgency is Urgency.SOON:
                return
            self._asked = True
            document = self._document
        document.add_next_tick_callback(self.drain if urgency is Urgency.NOW else self._soon)

    def _soon(self) -> None:
        wait = self._last + self.interval - time.monotonic()
        if wait <= 0.005:
            self.drain()
        elif not self._closed:
            self._document.add_timeout_callback(self.drain, int(1000 * wait))

    def drain(self) -> None:
        """Deliver what waits; on the page's thread only."""
        if self._paused:
            return
        with self._lock:
            messages, self._waiting, self._asked = self._waiting, [], False
            self._last = time.monotonic()
            closed = self._closed
        if messages and not closed:
            self._deliver(messages)

    def close(self) -> None:
        with self._lock:
            self._closed, self._waiting, self._document = True, [], None


class Shelf:
    """The models in memory, shared by all sessions of a server; at most ``room`` beside those in use."""

    def __init__(self, room: int = 2) -> None:
        self._room = room
        self._lock = threading.Lock()
        self._models: dict[str, wb.Model] = {}
        self._loading: dict[str, threading.Lock] = {}

    def get(self, name: str) -> wb.Model:
        """The model, loaded on the caller's thread if nobody loaded it before.

        Raises:
            ModelError: it cannot be loaded.
        """
        with self._lock:
            gate = self._loading.setdefault(name, threading.Lock())
        with gate:
            with self._lock:
                if name in self._models:
                    self._models[name] = self._models.pop(name)  # the newest is last
                    return self._models[name]
            model = wb.load(name)
            with self._lock:
                self._models[name] = model
                while len(self._models) > self._room:
                    self._models.pop(next(iter(self._models)))
            return model

    def loaded(self, name: str) -> wb.Model | None:
        with self._lock:
            return self._models.get(name)
