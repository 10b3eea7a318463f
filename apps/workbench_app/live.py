"""Steering lanes: pause, step, rewind, fork, and what a person does to their entries. Page's thread only."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workbench.runs.control import Control
from workbench.runs.events import Edited, Refused
from workbench.runs.steer import Action, Edit, Script, check_edit
from workbench_app import formats
from workbench_app.ask import PLAIN, Course, LaneState
from workbench_app.runner import Job

if TYPE_CHECKING:
    from workbench.strategies.recipe import Recipe
    from workbench_app.session import Session

DONE = {"evict": "evicted", "protect": "protected", "restore": "restored"}


class Live:
    """What can be done to a session's lanes while they run and afterwards; all but pausing can be undone."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.controls: dict[int, Control] = {}  # of the lanes' last runs

    # -- holding a lane ---------------------------------------------------------------------------------------------

    def pause(self, key: int) -> None:
        """Hold a lane before its next token."""
        if self._lane(key, "generating") is not None and key in self.controls:
            self.controls[key].pause()

    def step(self, key: int) -> None:
        """Let one more token come."""
        self._go(key, lambda control: control.step())

    def go_on(self, key: int) -> None:
        """Let a lane run to its end."""
        self._go(key, lambda control: control.resume())

    def _go(self, key: int, how: Any) -> None:
        session, lane = self._session, self._lane(key, "paused")
        control = session.work.holds(key)
        if lane is None or control is None:
            return
        how(control)
        if not control.paused:
            lane.course = replace(lane.course, held=None)
        lane.status = "generating"
        session.findings.make_way()
        session.runner.submit(Job(key, lambda _: session.work.go_on(key), control))
        session.tell({key})

    # -- going back, and another way --------------------------------------------------------------------------------

    def rewind(self, key: int, token: int) -> None:
        """Take a lane back to where it had chosen ``token`` tokens, and hold it there."""
        lane = self._steerable(key)
        if lane is not None and 0 <= token <= len(lane.tokens):
            self._take(lane, self._course(lane, token, held=token))

    def fork(self, key: int, token: int) -> int | None:
        """A new lane after this one that goes on from ``token``; give it another recipe, and it does so with that."""
        session, lane = self._session, self._session.lane(key)
        if lane is None or not 0 <= token <= len(lane.tokens):
            return None
        if lane.status == "error" or not lane.tokens:
            return self._say("This lane has no output to fork; run it first.")
        course = replace(self._course(lane, token), origin=(key, token))
        return session.add(lane.recipe, key, course)

    def edit(self, key: int, action: Action, position: int, layer: int | None = None, head: int | None = None) -> None:
        """Evict, protect or restore a token of the prompt: in a lane that is held from there on, else from the prompt on.

        Args:
            layer, head: the layer and KV head meant; None for all.
        """
        lane = self._steerable(key)
        if lane is None:
            return
        at = len(lane.tokens) if lane.status == "paused" else 0
        meant = Edit(
            at, action, "", (position,), None if layer is None else (layer,), None if head is None else (head,)
        )
        held = [
            position in kept
            for index, heads in enumerate(lane.kept)
            for number, kept in enumerate(heads)
            if layer in (None, index) and head in (None, number)
        ]
        if (action == "evict" and not any(held)) or (action == "restore" and all(held)):
            nothing = "does not hold it" if action == "evict" else "holds it already"
            where = "this head" if head is not None else "this layer" if layer is not None else "the lane"
            self._say(f"There is nothing to {action}: {where} {nothing}.")
            return
        self._take(lane, self._course(lane, at, meant, held=at if lane.status == "paused" else None))

    def changes(self, lane: LaneState, recipe: Recipe) -> bool:
        """Take over a change of recipe where it is one from some token on.

        Raises:
            WorkbenchError: the recipe cannot begin there.
        """
        session = self._session
        model = session.model
        if lane is session.reference or model is None or not (lane.live or lane.course.origin is not None):
            return False
        at = len(lane.tokens) if lane.live else lane.course.origin[1]  # type: ignore[index]
        edit = Edit(at, "recipe", recipe.text)
        check_edit(edit, model.geometry, model.artifacts)
        lane.error = None
        if lane.status == "generating":
            session.history.remember()
            self.controls[lane.key].edit(edit)
            return True
        course = self._course(lane, at, edit, held=at if lane.status == "paused" else None)
        if not lane.live:  # the recipe that the fork had before makes way
            edits = tuple(e for e in course.script.edits[:-1] if (e.token, e.action) != (at, "recipe"))
            same = recipe.text == LaneState(0, lane.recipe, Course(Script((), edits, strict=False))).recipe_now
            course = replace(course, script=replace(course.script, edits=edits if same else (*edits, edit)))
        self._take(lane, course)
        return True

    # -- in words ---------------------------------------------------------------------------------------------------

    def words(self, lane: LaneState) -> list[str]:
        """What was done to a lane, a line each."""
        session, course, out = self._session, lane.course, []
        if course.origin is not None:
            parent = session.lane(course.origin[0])
            name = "a lane that is gone" if parent is None else formats.look(session.place(parent.key)).letter
            out.append(f"forked from {name} at token {course.origin[1]}")
        for edit in course.script.edits:
            if edit.action == "recipe":
                out.append(f"from token {edit.token}: {edit.recipe}")
                continue
            text = formats.visible(session.texts[edit.positions[0]]) if edit.positions[0] < len(session.texts) else "?"
            layer = "" if edit.layers is None else f"L{edit.layers[0]}"
            head = "" if edit.kv_heads is None else f" KV{edit.kv_heads[0]}"
            when = f" at token {edit.token}" if edit.token else ""
            out.append(f"{DONE[edit.action]} “{text}” ({edit.positions[0]:,}) in {(layer + head) or 'all heads'}{when}")
        return out

    # -- inside -----------------------------------------------------------------------------------------------------

    def hear(self, lane: LaneState, event: Any) -> None:
        """A lane that runs was edited on the way, or could not be."""
        if isinstance(event, Refused):
            self._session.notice = event.sentence
        elif isinstance(event, Edited) and event.edit not in lane.course.script.edits:
            lane.course = self._course(lane, event.edit.token, event.edit)

    def before_run(self, other: bool) -> None:
        """All lanes are about to run: none is held, and what was done to the tokens of ``other`` prompts is past."""
        for lane in self._session.lanes:
            if other:
                lane.recipe, lane.course = lane.recipe_now, PLAIN
            elif lane.course.held is not None:
                lane.course = replace(lane.course, held=None)

    def under(self, lane: LaneState, recipe: Recipe) -> None:
        """Let a lane read the prompt under another recipe; what was done right after it is done again."""
        first = tuple(e for e in lane.course.script.edits if e.token == 0 and e.action != "recipe")
        lane.recipe, lane.error = recipe.text, None
        lane.course = Course(Script((), first, strict=False), None, None, self._session.ask) if first else PLAIN

    def _course(self, lane: LaneState, token: int, *edits: Edit, held: int | None = None) -> Course:
        """On from a token, with what was done up to there and these edits."""
        before = tuple(edit for edit in lane.course.script.edits if edit.token <= token)
        script = Script(tuple(lane.tokens[:token]), (*before, *edits), strict=False)
        return Course(script, lane.course.origin, held, self._session.ask)

    def _take(self, lane: LaneState, course: Course) -> None:
        self._session.history.remember()
        lane.course, lane.error = course, None
        self._session.run([lane.key])

    def _lane(self, key: int, status: str) -> LaneState | None:
        lane = self._session.lane(key)
        return lane if lane is not None and lane.status == status else None

    def _steerable(self, key: int) -> LaneState | None:
        session, lane = self._session, self._session.lane(key)
        if lane is None or lane is session.reference:
            return self._say("The reference lane stays as it is, because the others are compared with it; fork it.")
        if lane.status not in ("done", "paused", "cancelled"):
            return self._say("The lane runs; pause it first.")
        return lane

    def _say(self, sentence: str) -> None:
        self._session.notice = sentence
        self._session.tell(topics={"notice"})
