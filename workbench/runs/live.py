"""Forking, rewinding and editing lanes that have run.

A lane is made again from its state after the prompt, with the tokens it had chosen and what was done to it on the way. That
is exact, since it repeats the lane's own computations, holds nothing beside that state, and costs a step a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.runs.events import LaneDone
from workbench.runs.lane import Lane, Origin
from workbench.runs.reference import ReferenceRun
from workbench.runs.steer import FIXED, Action, Edit, Script, check_edit
from workbench.strategies.recipe import Recipe

if TYPE_CHECKING:
    from workbench.runs.control import Control
    from workbench.runs.events import AnyEvent
    from workbench.runs.lane import Comparison


def fork(
    cmp: Comparison, lane: int, token: int | None = None, recipe: str | Recipe | None = None, **options: Any
) -> Lane:
    """See :meth:`Comparison.fork`."""
    old = _known(cmp, lane)
    answer = options.get("answer", 0)
    at = len(old.answers[answer].tokens) if token is None else token
    script = script_at(old, at, answer)
    if recipe is not None:
        edit = Edit(at, "recipe", Recipe.parse(recipe).text)
        check_edit(edit, cmp.model.geometry, cmp.model.artifacts)
        if Recipe.parse(recipe) != now(old, at):
            script = Script(script.tokens, (*script.edits, edit))
    made = _again(cmp, old, script, **options)
    made.origin = Origin(lane, at)
    cmp.lanes.append(made)
    return made


def rewind(cmp: Comparison, lane: int, token: int, **options: Any) -> Lane:
    """See :meth:`Comparison.rewind`."""
    old = _steerable(cmp, lane)
    script = replace(script_at(old, token, options.get("answer", 0)), stop=token)
    return _take_place(cmp, lane, old, _again(cmp, old, script, **options))


def resume(cmp: Comparison, lane: int, **options: Any) -> Lane:
    """See :meth:`Comparison.resume`."""
    old = _steerable(cmp, lane)
    answer = options.get("answer", 0)
    script = script_at(old, len(old.answers[answer].tokens), answer)
    return _take_place(cmp, lane, old, _again(cmp, old, script, **options))


def edit(
    cmp: Comparison,
    lane: int,
    action: Action,
    positions: int | Sequence[int],
    *,
    token: int = 0,
    layer: int | Sequence[int] | None = None,
    kv_head: int | Sequence[int] | None = None,
    **options: Any,
) -> Lane:
    """See :meth:`Comparison.evict`."""
    old = _steerable(cmp, lane)
    meant = Edit(token, action, "", _numbers(positions) or (), _numbers(layer), _numbers(kv_head))
    check_edit(meant, cmp.model.geometry, cmp.model.artifacts)
    script = script_at(old, token, options.get("answer", 0))
    made = _again(cmp, old, Script(script.tokens, (*script.edits, meant)), **options)
    return _take_place(cmp, lane, old, made)


def change(cmp: Comparison, lane: int, recipe: str | Recipe, token: int = 0, **options: Any) -> Lane:
    """See :meth:`Comparison.change`."""
    old = _steerable(cmp, lane)
    meant = Edit(token, "recipe", Recipe.parse(recipe).text)
    check_edit(meant, cmp.model.geometry, cmp.model.artifacts)
    script = script_at(old, token, options.get("answer", 0))
    made = _again(cmp, old, Script(script.tokens, (*script.edits, meant)), **options)
    return _take_place(cmp, lane, old, made)


def script_at(lane: Lane, token: int, answer: int = 0) -> Script:
    """What brings a lane back to where it had chosen ``token`` tokens, with all that was done to it up to there."""
    tokens = lane.answers[answer].tokens
    if not 0 <= token <= len(tokens):
        raise WorkbenchError(
            f"There is no token {token}: this lane has chosen {len(tokens)}, so name 0 to {len(tokens)}."
        )
    return Script(tuple(tokens[:token]), tuple(e for e in lane.edits if e.token <= token))


def now(lane: Lane, token: int) -> Recipe:
    """The recipe that a lane follows when it has chosen ``token`` tokens."""
    changes = [e.recipe for e in lane.edits if e.action == "recipe" and e.token <= token]
    return Recipe.parse(changes[-1] if changes else lane.resolved)


def _known(cmp: Comparison, lane: int) -> Lane:
    if not 0 <= lane < len(cmp.lanes):
        raise WorkbenchError(f"There is no lane {lane}; this comparison has lanes 0 to {len(cmp.lanes) - 1}.")
    old = cmp.lanes[lane]
    if old.error is not None:
        raise WorkbenchError(
            f"Lane {lane} failed ({old.error.rstrip('.')}), so there is nothing to go on from; run it again."
        )
    if len(old.answers) > 1 and old.edits:
        raise WorkbenchError(
            f"Lane {lane} was edited while it answered several questions, so it is not known for which; compare with one "
            "question to go on from it."
        )
    return old


def _steerable(cmp: Comparison, lane: int) -> Lane:
    old = _known(cmp, lane)
    if lane == cmp.reference:
        raise WorkbenchError(FIXED)
    return old


def _take_place(cmp: Comparison, lane: int, old: Lane, made: Lane) -> Lane:
    made.origin = old.origin
    cmp.lanes[lane] = made
    return made


def _numbers(given: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    return (given,) if isinstance(given, int) else tuple(int(number) for number in given)


def _again(
    cmp: Comparison,
    old: Lane,
    script: Script,
    *,
    answer: int = 0,
    max_new_tokens: int | None = None,
    control: Control | None = None,
    on_event: Callable[[AnyEvent], None] | None = None,
) -> Lane:
    """The lane made again by its script, as lane 1 of a run whose reference is known."""
    from workbench.runs.compare import Run

    first, trace = cmp._run, cmp._trace
    settings = first.settings
    if trace is not None:
        trace = ReferenceRun(trace.cache, trace.cache_bytes, trace.answers[answer : answer + 1])
    run = Run(
        cmp.model,
        cmp.prompt,
        [first.recipes[cmp.reference], Recipe.parse(old.recipe)],
        question=old.answers[answer].question,
        max_new_tokens=max_new_tokens or settings.sampling.max_new_tokens,
        seed=settings.sampling.seed,
        temperature=settings.sampling.temperature,
        chunk=settings.chunk,
        first_token=settings.first_token,
        probes=settings.probes,
        control=control,
        rewindable=True,
        snapshot=first.snapshot,
        trace=trace,
    )
    run.scripts[1] = script
    if old.start is not None:
        run.starts[1] = old.start
    for event in run.events(only=[1]):
        if on_event is not None:
            on_event(event)
        if isinstance(event, LaneDone):
            old.start = old.start or event.result.start
    made = run.lanes[1]
    if made.error is not None:
        raise WorkbenchError(made.error)
    undone = [edit.token for edit in script.edits if edit not in made.edits]
    if undone and made.stopped != "cancelled":
        raise WorkbenchError(
            f"The lane ended before token {undone[0]} could be chosen, so nothing would come of it; name an earlier token, or "
            "give a larger max_new_tokens."
        )
    return made
