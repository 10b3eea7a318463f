"""What is measured only when somebody looks closer: in the worker, behind the lanes' runs, and kept while it fits."""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import workbench as wb
from workbench.inspection.overlap import held_masks
from workbench.runs.align import Aligned, aligned
from workbench.runs.control import Control, device_queue
from workbench.runs.prompt import Cancelled
from workbench.runs.replay import numbers, retained, scored
from workbench_app.lane_work import Told
from workbench_app.runner import Job, Urgency

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.inspection.numbers import HeldNumbers
    from workbench.inspection.scores import ScoreLog
    from workbench_app.ask import Ask, LaneState
    from workbench_app.session import Session

LOG = logging.getLogger("workbench.app")
OF_REFERENCE = ("retained", "numbers")  # compared with the reference
MOST = 256 << 20  # bytes of measurements kept, the newest at least


class Findings:
    """Scores and retained attention of finished lanes. Asking for what is not known yet starts measuring it."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known: OrderedDict[Hashable, Any] = OrderedDict()
        self._trouble: dict[Hashable, str] = {}
        self._under_way: dict[Hashable, str] = {}  # what is being measured, and how far it is
        self._stopped = False
        self._then: dict[Hashable, Callable[[Any], None]] = {}  # called with what was found
        self._held: dict[int, tuple[Any, Tensor]] = {}  # by lane
        self._numbers = itertools.count()

    # -- asking ---------------------------------------------------------------------------------------------------------

    def scores(self, lane: LaneState) -> ScoreLog | None:
        """By what a lane chose the tokens it kept; None until it was measured."""
        session = self._session
        if lane.result is None or session.model is None:
            return None
        key = self._key("scores", lane)
        if self._wanted(key):
            model, ask, recipe = session.model, session.ask, lane.result.resolved
            self._submit([key], lambda control: self._score(model, ask, recipe, control))
        return self._known.get(key)

    def retained(self, lanes: Sequence[LaneState]) -> list[Any]:
        """Per lane a tensor [steps, layers, query heads], or None until it was measured."""
        session, reference = self._session, self._session.reference
        keys = [self._key("retained", lane) if lane.result is not None else None for lane in lanes]
        missing = [n for n, key in enumerate(keys) if key is not None and self._wanted(key)]
        trace = session.reference_trace()
        if missing and trace is not None and trace.answers and session.model is not None and reference is not None:
            model, ask = session.model, session.ask
            results = [lanes[n].result for n in missing]
            wanted = [keys[n] for n in missing]
            self._submit(wanted, lambda control: self._retain(model, ask, trace, results, control))
        return [self._known.get(key) for key in keys]

    def numbers(self, lane: LaneState) -> HeldNumbers | None:
        """What a lane's keys and values are off by, and the bits they take; None until it was measured."""
        session, trace = self._session, self._session.reference_trace()
        if lane.result is None or session.model is None:
            return None
        key = self._key("numbers", lane)
        if trace is not None and self._wanted(key):
            model, ask, recipe = session.model, session.ask, lane.result.resolved
            self._submit([key], lambda control: self._compare(model, ask, trace, recipe, control))
        return self._known.get(key)

    def align(self, lane: LaneState, target: int, then: Callable[[Aligned], None]) -> None:
        """Search the budget with which a lane holds ``target`` bytes; ``then`` is called with what was found."""
        session = self._session
        if lane.result is None or session.model is None:
            return
        self.opened()
        key = self.align_key(lane, target)
        if key in self._known:
            then(self._known[key])
        elif self._wanted(key):
            self._then[key] = then
            model, ask, recipe = session.model, session.ask, lane.result.resolved
            self._submit([key], lambda control: self._align(model, ask, recipe, target, control))

    def align_key(self, lane: LaneState, target: int) -> Hashable:
        return (self._key("align", lane), target)

    def align_said(self, key: Hashable) -> str:
        """How far a search is, or why it found nothing."""
        return self._under_way.get(key) or self._trouble.get(key) or ""

    def held(self, lane: LaneState) -> Tensor:
        """What a lane holds of the prompt, as a mask bool [layers, KV heads, tokens]; made once for what it holds now."""
        tokens = len(self._session.texts)
        known = self._held.get(lane.key)
        if known is None or known[0] is not lane.kept or known[1].shape[-1] != tokens:
            known = self._held[lane.key] = (lane.kept, held_masks(lane.kept, tokens))
            for key in self._held.keys() - {lane.key for lane in self._session.lanes}:
                del self._held[key]
        return known[1]

    def said(self, kind: str, lane: LaneState) -> str:
        """Why there is nothing to see yet, in a sentence."""
        session = self._session
        if lane.result is None or session.busy:
            return "This is measured when the lanes have run."
        key = self._key(kind, lane)
        if key in self._trouble:
            return self._trouble[key]
        if key in self._under_way:
            return self._under_way[key]
        if kind in OF_REFERENCE and session.reference_trace() is None:
            return "What the reference read and held is gone; press Run to run it again."
        return "Stopped. Choose another view and come back to measure it."

    # -- being told -----------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self._under_way)

    def hear(self, data: tuple[str, Any, Any]) -> None:
        """News from the worker, on the page's thread: ("progress" | "known" | "trouble", keys, what)."""
        news, keys, what = data
        for number, key in enumerate(keys):
            if news == "progress":
                if key in self._under_way:
                    self._under_way[key] = what
                continue
            self._under_way.pop(key, None)
            then = self._then.pop(key, None)
            if news == "trouble":
                self._trouble[key] = what
                continue
            self._known[key] = what[number]
            if then is not None:
                then(what[number])
            while len(self._known) > 1 and sum(held.nbytes for held in self._known.values()) > MOST:
                self._known.popitem(last=False)

    def opened(self) -> None:
        """A person turned to a view: measure again what was stopped or failed."""
        self._stopped = False
        self._trouble.clear()

    def make_way(self) -> None:
        """Lanes are about to run: what is being measured waits until they are done."""
        self._session.runner.cancel_where(lambda key: isinstance(key, tuple) and key[0] == "look")
        self._under_way.clear()
        self._then.clear()
        self._stopped = False

    def stop(self) -> None:
        """A person stopped everything."""
        self._stopped = self._stopped or self.busy
        self._under_way.clear()
        self._then.clear()

    # -- measuring ------------------------------------------------------------------------------------------------------

    def _key(self, kind: str, lane: LaneState) -> Hashable:
        assert lane.result is not None
        reference = self._session.reference
        base = reference.result.resolved if reference is not None and reference.result is not None else ""
        return (kind, self._session.ask, base if kind in OF_REFERENCE else "", lane.result.resolved)

    def _wanted(self, key: Hashable) -> bool:
        if key in self._known:
            self._known.move_to_end(key)
            return False
        session = self._session
        ready = session.model_state == "ready" and session.draft.model == session.ask.model and not session.busy
        return ready and not (self._stopped or key in self._under_way or key in self._trouble)

    def _submit(self, keys: list[Any], measure: Any) -> None:
        for key in keys:
            self._under_way[key] = "Measuring…"
        self._session.runner.submit(
            Job(("look", next(self._numbers)), lambda control: self._measure(keys, measure, control))
        )

    def _measure(self, keys: list[Any], measure: Any, control: Control) -> None:
        """In the worker: run a generator of progress sentences; its result is one finding per key."""
        post = self._session.work.post
        steps = measure(control)
        try:
            while True:
                post(Told("looked", ("progress", keys, next(steps))), Urgency.SOON)
        except StopIteration as done:
            post(Told("looked", ("known", keys, done.value)), Urgency.NOW)
        except Cancelled:
            return
        except wb.WorkbenchError as error:
            post(Told("looked", ("trouble", keys, str(error))), Urgency.NOW)
        except Exception:
            LOG.exception("looking closer failed")
            sentence = "Something failed while measuring; the server's log has the details."
            post(Told("looked", ("trouble", keys, sentence)), Urgency.NOW)

    def _score(self, model: wb.Model, ask: Ask, recipe: str, control: Control) -> Generator[str, None, list[ScoreLog]]:
        prompt = model.encode(ask.text)
        with _turn(model, control):
            steps = scored(model, prompt, recipe, control=control, snapshot=self._session.work.snapshot(ask))
            log, _ = yield from _told(steps, f"Compressing the prompt again: {{:,}} of {len(prompt):,} tokens")
        return [log]

    def _compare(
        self, model: wb.Model, ask: Ask, trace: Any, recipe: str, control: Control
    ) -> Generator[str, None, list[HeldNumbers]]:
        prompt = model.encode(ask.text)
        with _turn(model, control):
            snapshot = self._session.work.snapshot(ask)
            steps = numbers(model, trace.cache, prompt, recipe, control=control, snapshot=snapshot)
            return [(yield from _told(steps, f"Compressing the prompt again: {{:,}} of {len(prompt):,} tokens"))]

    def _align(
        self, model: wb.Model, ask: Ask, recipe: str, target: int, control: Control
    ) -> Generator[str, None, list[Aligned]]:
        prompt = model.encode(ask.text)
        with _turn(model, control):
            snapshot = self._session.work.snapshot(ask)
            steps = aligned(model, prompt, recipe, target, control=control, snapshot=snapshot)
            return [(yield from _told(steps, "Searching the budget: {} tried"))]

    def _retain(
        self, model: wb.Model, ask: Ask, trace: Any, results: list[Any], control: Control
    ) -> Generator[str, None, list[Any]]:
        prompt = model.encode(ask.text)
        question = model.encode(ask.asked_later, continues=True) if ask.asked_later else []
        total = max(1, len(trace.answers[0].tokens))
        with _turn(model, control):
            snapshot = self._session.work.snapshot(ask)
            steps = retained(model, trace, prompt, results, question, control=control, snapshot=snapshot)
            return (yield from _told(steps, f"Feeding the reference's answer again: step {{:,}} of {total:,}"))


@contextmanager
def _turn(model: wb.Model, control: Control) -> Iterator[None]:
    """The device, once it is free; Cancelled where the wait for it was ended."""
    with device_queue(model.device).turn(control) as granted:
        if not granted:
            raise Cancelled
        yield


def _told(steps: Generator[int, None, Any], sentence: str) -> Generator[str, None, Any]:
    """Counts as sentences; hands on the result."""
    while True:
        try:
            yield sentence.format(next(steps))
        except StopIteration as done:
            return done.value
