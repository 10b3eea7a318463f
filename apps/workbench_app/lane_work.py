"""What the worker thread does: run a lane through the core and say what happened; explain why it broke."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import workbench as wb
from workbench.inspection.why import Why, explain
from workbench.runs.compare import Run
from workbench.runs.control import Control, device_queue
from workbench.runs.events import (
    AnyEvent,
    CacheState,
    Edited,
    LaneDone,
    Paused,
    PrefillProgress,
    Probe,
    Queued,
    Refused,
    Token,
)
from workbench.runs.lane import Lane, LaneMemory
from workbench.strategies.recipe import Recipe
from workbench_app.ask import PLAIN, Ask, Course, LaneState
from workbench_app.runner import Urgency

if TYPE_CHECKING:
    from workbench.runs.prompt import Snapshot
    from workbench.runs.reference import ReferenceRun

LOG = logging.getLogger("workbench.app")


@dataclass
class Said:
    """One event of one run of a lane, on its way to the page."""

    lane: int
    run: int
    ask: Ask
    base: str  # the reference's resolved recipe
    event: AnyEvent | Why | None
    memory: LaneMemory | None = None

    @property
    def name(self) -> str:
        return "why" if isinstance(self.event, Why) else "event"

    @property
    def finished(self) -> Lane | None:
        return self.event.result if isinstance(self.event, LaneDone) else None

    def apply(self, lane: LaneState) -> None:
        """Bring a lane up to date with the event."""
        event = self.event
        if isinstance(event, Queued):
            lane.status, lane.ahead = "queued", event.ahead
        elif isinstance(event, PrefillProgress):
            lane.status, lane.done, lane.total = "reading", event.done, event.total
        elif isinstance(event, CacheState):
            if event.moment == "prompt":
                lane.clear_output()
                lane.kept, lane.packed, lane.restored, lane.drift = event.kept, event.packed, event.restored, None
                lane.status = "generating"
            elif event.moment == "edit":
                lane.kept, lane.packed, lane.restored = event.kept, event.packed, event.restored
            lane.memory = self.memory
        elif isinstance(event, Edited):
            lane.edits = [*lane.edits, event.edit]
        elif isinstance(event, Paused):
            lane.status = "paused"
        elif isinstance(event, Token):
            lane.status = "generating"
            lane.tokens.append(event.token)
            lane.texts.append(event.text)
        elif isinstance(event, Probe):
            if event.name == "drift":
                lane.drift = event.data
            else:
                lane.kl = event.data
        elif isinstance(event, LaneDone):
            # The result knows only the tokens' ids; their texts came one by one.
            if event.result.error is None and event.result.stopped == "cancelled" and not event.result.tokens:
                lane.status = "cancelled"
            else:
                lane.show(event.result, lane.texts)
        elif isinstance(event, Why):
            lane.why = event


@dataclass
class Failed:
    """Something unexpected happened in a run; the log has the traceback."""

    lane: int
    run: int
    sentence: str


@dataclass
class Told:
    """News that belong to no lane."""

    topic: str
    data: Any = None


@dataclass
class Change:
    """What a batch of news touched."""

    lanes: set[int] = field(default_factory=set)
    topics: set[str] = field(default_factory=set)  # lanes (added, moved…), model, prompt, notice, why, texts, looked


@dataclass(frozen=True)
class Task:
    """One lane to run."""

    lane: int
    run: int
    model: wb.Model
    ask: Ask
    base: Recipe  # the reference lane's
    recipe: Recipe
    is_reference: bool
    course: Course = PLAIN


@dataclass
class Context:
    """What lanes of one ask and one reference share."""

    trace: ReferenceRun | None = None


@dataclass
class Going:
    """A run under way, of which a paused lane's rest still comes."""

    task: Task
    run: Run
    control: Control
    events: Generator[AnyEvent, None, None]
    context: Context
    snapshot: Snapshot | None


class LaneWork:
    """Runs lanes on the worker thread, keeping the prompt's snapshot and the reference's trace for the next."""

    def __init__(self, post: Callable[[Any, Urgency], None]) -> None:
        self.post = post
        self._contexts: OrderedDict[tuple[Ask, str], Context] = OrderedDict()
        self._snapshots: OrderedDict[tuple[str, str], Snapshot] = OrderedDict()
        self._texts: OrderedDict[tuple[str, str], list[str]] = OrderedDict()
        self._starts: OrderedDict[tuple[str, str, str], Snapshot] = OrderedDict()  # lanes right after their prompt
        self._held: dict[int, Going] = {}  # paused lanes, by key

    def forget(self) -> None:
        for key in list(self._held):
            self.drop(key)
        for store in (self._contexts, self._snapshots, self._texts, self._starts):
            store.clear()  # type: ignore[attr-defined]

    def texts(self, ask: Ask) -> list[str]:
        return self._texts.get((ask.model, ask.text), [])

    def trace(self, ask: Ask, base: str) -> ReferenceRun | None:
        context = self._contexts.get((ask, base))
        return None if context is None else context.trace

    def snapshot(self, ask: Ask) -> Snapshot | None:
        """The state after the prompt, if it is still held."""
        return self._snapshots.get((ask.model, ask.text))

    def drop(self, key: int) -> None:
        """A paused lane does not go on. What it has hung into the model is taken out when nobody computes with it."""
        going = self._held.pop(key, None)
        if going is not None:
            going.control.cancel()
            threading.Thread(target=_close, args=(going,), name="workbench-drop", daemon=True).start()

    def holds(self, key: int) -> Control | None:
        """The control of a lane that is paused."""
        going = self._held.get(key)
        return None if going is None else going.control

    def run_lane(self, task: Task, control: Control) -> None:
        """Run one lane and say what happens; an unexpected failure becomes one sentence, the log has the rest."""
        self._guarded(task, lambda: self._go_on(self._begun(task, control)))

    def go_on(self, key: int) -> None:
        """Take up a paused lane where it was left."""
        going = self._held.get(key)
        if going is not None and going.control.ready:  # else somebody pressed twice, and all was done at once
            self._held.pop(key, None)
            self._guarded(going.task, lambda: self._go_on(going))

    def _guarded(self, task: Task, work: Callable[[], None]) -> None:
        try:
            work()
        except wb.WorkbenchError as error:
            self.post(Failed(task.lane, task.run, str(error)), Urgency.NOW)
        except Exception as error:
            LOG.exception("lane %s failed", task.recipe.text)
            sentence = f"Something failed inside {_module(error)}; the server's log has the details."
            self.post(Failed(task.lane, task.run, sentence), Urgency.NOW)

    def _begun(self, task: Task, control: Control) -> Going:
        """Where the reference's trace was dropped since, the reference runs first, unseen."""
        ask, base, is_reference = task.ask, task.base, task.is_reference
        context = _newest(self._contexts, (ask, base.resolved), Context, 4)
        snapshot = self.snapshot(ask)
        trace = None if is_reference else context.trace
        run = Run(
            task.model,
            ask.text,
            [base] if is_reference else [base, task.recipe],
            **ask.options(),
            control=control,
            reuse_prompt=True,
            rewindable=True,
            snapshot=snapshot,
            trace=trace,
        )
        own = 0 if is_reference else 1
        run.scripts[own] = task.course.script
        start = self._starts.get((ask.model, ask.text, task.recipe.resolved))
        if start is not None:
            run.starts[own] = start
        events = run.events(only=[own] if is_reference or trace is not None else [0, 1])
        return Going(task, run, control, events, context, snapshot)

    def _go_on(self, going: Going) -> None:
        """Say what happens until the end, or until the lane is held."""
        task, run, ask = going.task, going.run, going.task.ask
        own, place = len(run.lanes) - 1, (ask.model, ask.text)
        for event in going.events:
            if event.lane != own:
                continue
            memory = None
            if isinstance(event, CacheState):
                memory = replace(run.lanes[own].memory)
                if event.moment == "prompt" and task.course.held is not None:
                    going.control.pause(at=task.course.held)  # now that it is this lane that generates
                if event.moment == "prompt" and run.snapshot is not None and going.snapshot is None:
                    going.snapshot = run.snapshot
                    self._keep_snapshot(place, run.snapshot)
            if isinstance(event, LaneDone):
                self._keep_trace(going.context, run)
                self._keep_start(task, event.result)
            if isinstance(event, Paused):
                self._held[task.lane] = going  # before it is said, so that whoever hears of it can go on
            self.post(Said(task.lane, task.run, ask, task.base.resolved, event, memory), _urgency(event))
            if isinstance(event, Paused):
                self._read_texts(task)
                return
        self._read_texts(task)
        if going.control.cancelled or task.is_reference or run.lanes[own].first_divergence is None:
            return
        why = run.comparison().why(own)
        if why is not None:
            self.post(Said(task.lane, task.run, ask, task.base.resolved, why), Urgency.NOW)

    def _read_texts(self, task: Task) -> None:
        ask = task.ask
        if not self.texts(ask):
            self._texts[ask.model, ask.text] = task.model.token_text(task.model.encode(ask.text))
            while len(self._texts) > 4:
                self._texts.popitem(last=False)
            self.post(Told("texts"), Urgency.NOW)

    def _keep_start(self, task: Task, result: Lane) -> None:
        """Lanes of the newest prompts start again from where their prompt was read; results themselves hold no cache."""
        start, result.start = result.start, None
        if start is not None:
            self._starts[task.ask.model, task.ask.text, task.recipe.resolved] = start
            while len(self._starts) > 8:
                self._starts.popitem(last=False)

    def explain(self, ask: Ask, base: str, result: Lane, lane: int, number: int, token: int) -> None:
        """What the reference read for a token of a finished lane, and the lane lost."""
        trace = self.trace(ask, base)
        why = explain(trace, result, token) if trace is not None else None
        if why is not None:
            self.post(Said(lane, number, ask, base, why), Urgency.NOW)

    def _keep_snapshot(self, place: tuple[str, str], snapshot: Snapshot) -> None:
        """A snapshot holds a full cache: only the newest two prompts keep theirs."""
        self._snapshots[place] = snapshot
        while len(self._snapshots) > 2:
            self._snapshots.popitem(last=False)
        for key in [key for key in self._starts if key[:2] not in self._snapshots]:
            del self._starts[key]

    def _keep_trace(self, context: Context, run: Run) -> None:
        reference = run.lanes[0]
        complete = reference.stopped in ("length", "eos") or context.trace is run.trace
        if run.trace is not None and complete:
            context.trace = run.trace


def _close(going: Going) -> None:
    with device_queue(going.task.model.device).turn(Control()):
        going.events.close()


def _urgency(event: AnyEvent) -> Urgency:
    """The first token, the end and a queue are told at once. What a first token follows closely waits for it."""
    if isinstance(event, LaneDone | Queued | Paused | Refused) or (isinstance(event, Token) and event.index == 0):
        return Urgency.NOW
    reused = isinstance(event, PrefillProgress) and event.done == event.total
    return Urgency.LATER if reused or (isinstance(event, CacheState) and event.moment == "prompt") else Urgency.SOON


def _module(error: Exception) -> str:
    """The innermost module of ours on the way to the error."""
    found, trace = "the workbench", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        if name.startswith("workbench.") or name.startswith("workbench_kernels"):
            found = name
        trace = trace.tb_next
    return found


def _newest(store: OrderedDict[Any, Any], key: Any, make: Callable[[], Any], most: int) -> Any:
    """The entry of a key, made if missing, as the newest of at most ``most``."""
    value = store.pop(key, None) or make()
    store[key] = value
    while len(store) > most:
        store.popitem(last=False)
    return value
