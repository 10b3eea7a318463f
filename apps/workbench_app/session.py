"""One browser tab's comparison: lanes and their recipes, what runs, what is known. No picture is drawn here."""

from __future__ import annotations

import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import Any

import workbench as wb
from workbench.evaluation.tasks import Example
from workbench.strategies.recipe import Recipe
from workbench_app.ask import PLAIN, Ask, Course, LaneState
from workbench_app.findings import Findings
from workbench_app.history import History
from workbench_app.lane_work import Change, Failed, LaneWork, Said, Task, Told
from workbench_app.live import Live
from workbench_app.runner import Job, Mailbox, Runner, Shelf, Urgency

LOG = logging.getLogger("workbench.app")
MOST_LANES = 8


class Session:
    """The state of one tab and everything a person can do to it. All methods are called on the page's thread."""

    def __init__(self, shelf: Shelf, document: Any = None, ask: Ask | None = None) -> None:
        self.shelf = shelf
        self.ask = ask or Ask()  # what the lanes on show were asked
        self.draft = self.ask  # what they will be asked by the next `run()`
        self.example: Example | None = None  # where the prompt came from, if its answer is known
        self.draft_example: Example | None = None
        self.lanes: list[LaneState] = []
        self.model: wb.Model | None = None
        self.model_state = "loading"  # loading, ready, error; a session begins by loading its model
        self.model_error: str | None = None
        self.prompt_error: str | None = None
        self.notice: str | None = None
        self.watchers: list[Callable[[Change], None]] = []
        self.history = History(self)
        self.results: OrderedDict[tuple[Hashable, ...], tuple[Any, list[str], Any]] = OrderedDict()
        self.work = LaneWork(self._post)
        self.runner = Runner()
        self.findings = Findings(self)
        self.live = Live(self)
        self.mailbox = Mailbox(self._deliver, document)
        self._keys = itertools.count()
        self._after_load: Callable[[], None] | None = None

    # -- looking things up ------------------------------------------------------------------------------------------------

    @property
    def reference(self) -> LaneState | None:
        return self.lanes[0] if self.lanes else None

    @property
    def busy(self) -> bool:
        return any(lane.busy for lane in self.lanes)

    def lane(self, key: int) -> LaneState | None:
        return next((lane for lane in self.lanes if lane.key == key), None)

    def place(self, key: int) -> int:
        return next((i for i, lane in enumerate(self.lanes) if lane.key == key), 0)

    @property
    def texts(self) -> list[str]:
        """The tokens of the prompt as texts, as soon as the prompt was read."""
        return self.work.texts(self.ask)

    def reference_trace(self) -> Any:
        """What the reference recorded for the lanes on show, if it is still held."""
        reference = self.reference
        if reference is None or reference.result is None:
            return None
        return self.work.trace(self.ask, reference.result.resolved)

    # -- what a person does -----------------------------------------------------------------------------------------------

    def load(self, name: str, then: Callable[[], None] | None = None) -> None:
        """Load a model in the worker; ``then`` is called on the page's thread when it is ready."""
        self.stop()
        self.draft = replace(self.draft, model=name)
        self.model_state, self.model_error = "loading", None
        self._after_load = then
        self.runner.submit(Job("model", lambda control: self._load(name)))
        self.tell(topics={"model", "notice"})

    def ask_for(self, **changes: Any) -> None:
        """Change the prompt, the question or the sampling; takes effect with the next :meth:`run` of all lanes."""
        self.draft = replace(self.draft, **changes)
        if "prompt" in changes or "question" in changes:
            self.draft_example = None
        self.tell(topics={"prompt"})

    def ask_example(self, example: Example) -> None:
        """Ask a ready example, whose answer and evidence are known."""
        self.ask_for(prompt=example.context, question=example.question)
        self.draft_example = example
        self.tell(topics={"prompt"})

    @property
    def evidence(self) -> tuple[int, ...]:
        """The prompt's tokens that hold the answer, where it is known."""
        spans = self.example.evidence if self.example is not None else ()
        return tuple(position for start, end in spans for position in range(start, end))

    @property
    def changed(self) -> bool:
        """Whether something was changed that only a run of all lanes will show."""
        return self.draft != self.ask and bool(self.ask.prompt)

    def run(self, keys: Iterable[int] | None = None, fresh: bool = False) -> None:
        """Show every lane's result for what is asked now, running what was not run before.

        Args:
            keys: lanes to run with what the others were asked; by default all, with what was changed since.
            fresh: run again even what is known.
        """
        if self.model is None or self.model_state != "ready":
            self.notice = "The model is not loaded yet."
            self.tell(topics={"notice"})
            return
        self.notice = self.prompt_error = None
        reference = self.reference
        if reference is None:
            return
        if keys is None or not self.ask.prompt:
            keys = None
            if not self._prompt_is_good(self.draft):
                self.tell(topics={"prompt", "notice"})
                return
            self.live.before_run(other=self.draft != self.ask)
            self.ask, self.example = self.draft, self.draft_example
        wanted = {lane.key for lane in self.lanes} if keys is None else set(keys)
        if reference.key in wanted:
            wanted = {lane.key for lane in self.lanes}
        try:
            base = self._checked(reference.recipe)
        except wb.WorkbenchError as error:
            self._refuse(reference, str(error))
            for lane in self.lanes[1:]:
                self._refuse(lane, "The reference lane cannot run; put its recipe right first.")
            self.tell(lanes={lane.key for lane in self.lanes}, topics={"notice"})
            return
        for lane in self.lanes:
            if lane.key in wanted:
                self._start(lane, base, fresh)
        self.tell(lanes=wanted, topics={"prompt", "notice"})

    def stop(self) -> None:
        """Cancel everything; what was computed stays."""
        self.runner.stop()
        self.findings.stop()
        for lane in self.lanes:
            if lane.busy or lane.live:
                lane.status = "cancelled"
                self.work.drop(lane.key)
        self.tell(lanes={lane.key for lane in self.lanes}, topics={"notice"})

    def set_recipe(self, key: int, text: str) -> None:
        """Give a lane another recipe and run it alone; a recipe that cannot be read is refused inline.

        One that generates, or is held, goes on with it from its next token; a fork, from where it was forked.
        """
        lane = self.lane(key)
        if lane is None or (text == lane.recipe_now and lane.error is None):
            return
        try:
            recipe = self._checked(text)
            if self.live.changes(lane, recipe):
                return
        except wb.WorkbenchError as error:
            lane.error = str(error)
            self.tell(lanes={key})
            return
        self.history.remember()
        self.live.under(lane, recipe)
        if self.model is not None and self.model_state == "ready":
            self.run([key])
        else:
            self.tell(lanes={key})

    def add(self, recipe: str, after: int | None = None, course: Course = PLAIN) -> int | None:
        """A new lane with a recipe, at the end or after another; it runs at once."""
        if len(self.lanes) >= MOST_LANES:
            self.notice = f"There are {MOST_LANES} lanes already; remove one first."
            self.tell(topics={"notice"})
            return None
        self.history.remember()
        lane = LaneState(next(self._keys), recipe, course)
        place = len(self.lanes) if after is None else self.place(after) + 1
        self.lanes.insert(place, lane)
        self.tell(lanes={lane.key}, topics={"lanes"})
        if self.ask.prompt:
            self.run([lane.key])
        return lane.key

    def start_with(self, recipes: Iterable[str]) -> None:
        """The lanes of a new session."""
        self.lanes = [LaneState(next(self._keys), recipe) for recipe in recipes]
        self.tell(lanes={lane.key for lane in self.lanes}, topics={"lanes"})

    def duplicate(self, key: int) -> int | None:
        lane = self.lane(key)
        return None if lane is None else self.add(lane.recipe, key, replace(lane.course, held=None))

    def remove(self, key: int) -> None:
        """Remove a lane; the last one stays."""
        lane = self.lane(key)
        if lane is None or len(self.lanes) == 1 or self._bars(self.lanes[1] if lane is self.reference else None):
            return
        self.history.remember()
        was_reference = lane is self.reference
        self.end(key)
        self.lanes.remove(lane)
        self.tell(lanes={other.key for other in self.lanes}, topics={"lanes"})
        if was_reference and self.model is not None:
            self.run()

    def move(self, key: int, by: int) -> None:
        """Move a lane left (-1) or right (1); whichever comes first is the reference."""
        place = self.place(key)
        target = place + by
        if not 0 <= target < len(self.lanes):
            return
        if 0 in (place, target) and self._bars(self.lanes[max(place, target)]):
            return
        self.history.remember()
        lanes = self.lanes
        lanes[place], lanes[target] = lanes[target], lanes[place]
        self.tell(lanes={lane.key for lane in lanes}, topics={"lanes"})
        if 0 in (place, target) and self.model is not None:
            self.run()

    def undo(self) -> None:
        self.history.undo()

    def redo(self) -> None:
        self.history.redo()

    def explain(self, key: int, token: int) -> None:
        """Find out, in the worker, what the reference read for one of a lane's tokens and the lane no longer holds."""
        lane, reference = self.lane(key), self.reference
        if lane is None or lane is reference or lane.result is None or reference is None or reference.result is None:
            return
        ask, run, result, base = self.ask, lane.run, lane.result, reference.result.resolved
        self.runner.submit(Job(("why", key), lambda control: self.work.explain(ask, base, result, key, run, token)))

    def close(self) -> None:
        """The tab is gone: cancel and free everything."""
        self.runner.close()
        self.mailbox.close()
        self.watchers.clear()
        self.results.clear()
        self.work.forget()
        self.lanes, self.model = [], None

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _checked(self, text: str) -> Recipe:
        recipe = Recipe.parse(text)
        if self.model is not None:
            recipe.check(self.model.geometry, self.model.artifacts)
        return recipe

    def _prompt_is_good(self, ask: Ask) -> bool:
        assert self.model is not None
        try:
            ask.check(self.model)
        except wb.WorkbenchError as error:
            self.prompt_error = str(error)
            return False
        return True

    def _start(self, lane: LaneState, base: Recipe, fresh: bool) -> None:
        try:
            recipe = self._checked(lane.recipe)
        except wb.WorkbenchError as error:
            self._refuse(lane, str(error))
            return
        lane.run += 1
        lane.error = None
        known = (
            None
            if fresh or lane.course.held is not None
            else self.results.get(self._key(lane, base.resolved, recipe.resolved))
        )
        if known is not None:
            self.end(lane.key)
            result, texts, why = known
            lane.show(result, texts)
            lane.why, lane.recalled = why, True
            return
        lane.status, lane.began, lane.recalled = "waiting", time.monotonic(), False
        assert self.model is not None
        self.findings.make_way()
        self.work.drop(lane.key)
        task = Task(lane.key, lane.run, self.model, self.ask, base, recipe, lane is self.reference, lane.course)
        job = Job(lane.key, lambda control: self.work.run_lane(task, control))
        self.live.controls[lane.key] = job.control
        self.runner.submit(job)

    def end(self, key: int) -> None:
        """A lane's run is not wanted any more."""
        self.runner.cancel(key)
        self.work.drop(key)

    def _bars(self, lane: LaneState | None) -> bool:
        """Whether a lane cannot become the reference; if so, a person is told."""
        if lane is None or not lane.course.script.edits:
            return False
        self.notice = "A lane that was changed by hand cannot be the reference."
        self.tell(topics={"notice"})
        return True

    def _key(self, lane: LaneState, base: str, resolved: str) -> tuple[Hashable, ...]:
        """What a lane's result depends on."""
        return (self.ask, base, resolved, lane.course.outcome)

    def _refuse(self, lane: LaneState, sentence: str) -> None:
        self.end(lane.key)
        lane.run += 1
        lane.error = sentence
        lane.status = "error"

    def _load(self, name: str) -> None:
        try:
            self._post(Told("model", (name, self.shelf.get(name), None)), Urgency.NOW)
        except wb.WorkbenchError as error:
            self._post(Told("model", (name, None, str(error))), Urgency.NOW)
        except Exception:
            LOG.exception("loading %s failed", name)
            sentence = f"Something failed while loading {name}; the server's log has the details."
            self._post(Told("model", (name, None, sentence)), Urgency.NOW)

    def _post(self, message: Any, urgency: Urgency) -> None:
        self.mailbox.post(message, urgency)

    def _deliver(self, messages: list[Any]) -> None:
        change, loaded = Change(), False
        for message in messages:
            if isinstance(message, Said):
                self._hear(message, change)
            elif isinstance(message, Failed):
                lane = self.lane(message.lane)
                if lane is not None and lane.run == message.run:
                    lane.status, lane.error = "error", message.sentence
                    change.lanes.add(lane.key)
            elif message.topic == "model":
                name, model, error = message.data
                if name == self.draft.model:
                    loaded = self._take_model(model, error)
                    change.topics.add("model")
            else:
                if message.topic == "looked":
                    self.findings.hear(message.data)
                change.topics.add(message.topic)
        self.tell(change.lanes, change.topics)
        if loaded and self._after_load is not None:
            then, self._after_load = self._after_load, None
            then()

    def _take_model(self, model: wb.Model | None, error: str | None) -> bool:
        """A model was loaded, or could not be: then the one before stays in use."""
        self.model, self.model_error = model or self.model, error
        self.model_state = "ready" if self.model is not None else "error"
        if model is None and self.model is not None:
            self.draft = replace(self.draft, model=self.model.id)
        return error is None

    def _hear(self, said: Said, change: Change) -> None:
        """Apply one event to its lane, unless the lane has started anew since."""
        lane = self.lane(said.lane)
        if lane is None or lane.run != said.run or lane.status in ("cancelled", "idle"):
            return
        change.lanes.add(lane.key)
        said.apply(lane)
        self.live.hear(lane, said.event)
        if said.finished is not None:
            if lane.status == "done":
                self.results[self._key(lane, said.base, said.finished.resolved)] = (said.finished, lane.texts, None)
                while len(self.results) > 64:
                    self.results.popitem(last=False)
        elif said.name == "why":
            change.topics.add("why")
            key = self._key(lane, said.base, lane.result.resolved if lane.result is not None else "")
            if key in self.results:
                self.results[key] = (*self.results[key][:2], lane.why)

    def tell(self, lanes: Iterable[int] = (), topics: Iterable[str] = ()) -> None:
        change = Change(set(lanes), set(topics))
        if change.lanes or change.topics:
            for watcher in list(self.watchers):
                watcher(change)
