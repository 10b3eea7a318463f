"""What the worker thread does: run a lane through the core and say what happened; explain why it broke."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import workbench as wb
from workbench.inspection.why import Why, explain
from workbench.runs.compare import Run
from workbench.runs.control import Control
from workbench.runs.events import AnyEvent, CacheState, LaneDone, PrefillProgress, Probe, Queued, Token
from workbench.runs.lane import Lane, LaneMemory
from workbench.strategies.recipe import Recipe
from workbench_app.ask import Ask, LaneState
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
                lane.kept, lane.packed, lane.drift = event.kept, event.packed, None
                lane.status = "generating"
            lane.memory = self.memory
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


@dataclass
class Context:
    """What lanes of one ask and one reference share."""

    trace: ReferenceRun | None = None


class LaneWork:
    """Runs lanes on the worker thread, keeping the prompt's snapshot and the reference's trace for the next."""

    def __init__(self, post: Callable[[Any, Urgency], None]) -> None:
        self.post = post
        self._contexts: OrderedDict[tuple[Ask, str], Context] = OrderedDict()
        self._snapshots: OrderedDict[tuple[str, str], Snapshot] = OrderedDict()
        self._texts: OrderedDict[tuple[str, str], list[str]] = OrderedDict()

    def forget(self) -> None:
        for store in (self._contexts, self._snapshots, self._texts):
            store.clear()  # type: ignore[attr-defined]

    def texts(self, ask: Ask) -> list[str]:
        return self._texts.get((ask.model, ask.text), [])

    def trace(self, ask: Ask, base: str) -> ReferenceRun | None:
        context = self._contexts.get((ask, base))
        return None if context is None else context.trace

    def snapshot(self, ask: Ask) -> Snapshot | None:
        """The state after the prompt, if it is still held."""
        return self._snapshots.get((ask.model, ask.text))

    def run_lane(self, task: Task, control: Control) -> None:
        """Run one lane and say what happens; an unexpected failure becomes one sentence, the log has the rest."""
        try:
            self._run(task, control)
        except wb.WorkbenchError as error:
            self.post(Failed(task.lane, task.run, str(error)), Urgency.NOW)
        except Exception as error:
            LOG.exception("lane %s failed", task.recipe.text)
            sentence = f"Something failed inside {_module(error)}; the server's log has the details."
            self.post(Failed(task.lane, task.run, sentence), Urgency.NOW)

    def _run(self, task: Task, control: Control) -> None:
        """Where the reference's trace was dropped since, the reference runs first, unseen."""
        model, ask, base, recipe, is_reference = task.model, task.ask, task.base, task.recipe, task.is_reference
        context = _newest(self._contexts, (ask, base.resolved), Context, 4)
        place = (ask.model, ask.text)
        snapshot = self._snapshots.get(place)
        recipes = [base] if is_reference else [base, recipe]
        trace = None if is_reference else context.trace
        run = Run(
            model,
            ask.text,
            recipes,
            **ask.options(),
            control=control,
            reuse_prompt=True,
            snapshot=snapshot,
            trace=trace,
        )
        own = 0 if is_reference else 1
        only = [own] if is_reference or trace is not None else [0, 1]
        for event in run.events(only=only):
            if event.lane != own:
                continue
            memory = None
            if isinstance(event, CacheState):
                memory = replace(run.lanes[own].memory)
                if event.moment == "prompt" and run.snapshot is not None and snapshot is None:
                    snapshot = run.snapshot
                    self._keep_snapshot(place, snapshot)
            if isinstance(event, LaneDone):
                self._keep_trace(context, run)
            said = Said(task.lane, task.run, ask, base.resolved, event, memory)
            self.post(said, _urgency(event))
        if not self.texts(ask):
            self._texts[place] = model.token_text(run.prompt)
            while len(self._texts) > 4:
                self._texts.popitem(last=False)
            self.post(Told("texts"), Urgency.NOW)
        if control.cancelled or is_reference or run.lanes[own].first_divergence is None:
            return
        why = run.comparison().why(own)
        if why is not None:
            self.post(Said(task.lane, task.run, ask, base.resolved, why), Urgency.NOW)

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

    def _keep_trace(self, context: Context, run: Run) -> None:
        reference = run.lanes[0]
        complete = reference.stopped in ("length", "eos") or context.trace is run.trace
        if run.trace is not None and complete:
            context.trace = run.trace


def _urgency(event: AnyEvent) -> Urgency:
    """The first token, the end and a queue are told at once. What a first token follows closely waits for it."""
    if isinstance(event, LaneDone | Queued) or (isinstance(event, Token) and event.index == 0):
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
