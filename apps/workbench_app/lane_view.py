"""A lane's card: what the browser shows of a lane's state, its form, and what a person does in it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import panel as pn

from workbench.errors import WorkbenchError
from workbench.evaluation.tasks import Example
from workbench.strategies.recipe import Recipe
from workbench_app import formats, recipes
from workbench_app.ask import LaneState
from workbench_app.elements import LaneView
from workbench_app.forms import RecipeForm
from workbench_app.looks import CARD
from workbench_app.session import MOST_LANES, Session

ORDER = ("keys", "values", "codes", "scales", "window", "positions", "scores")
STOPPED = {"length": "stopped at the length asked for", "eos": "ended by itself", "cancelled": "stopped"}


def said(lane: LaneState) -> str:
    """What a lane is doing, in a few words."""
    tokens = formats.count(len(lane.tokens), "token")
    if lane.status == "waiting":
        return "waiting for its turn" if lane.result is None else "recomputing…"
    if lane.status == "queued":
        return f"{formats.count(lane.ahead, 'run')} ahead on this device"
    if lane.status == "reading":
        if lane.done >= lane.total:
            return f"recomputing from token {lane.total:,}; the prompt is reused"
        return f"reading the prompt: {lane.done:,} of {lane.total:,} tokens"
    if lane.status == "generating":
        return f"generating: {tokens}"
    if lane.status == "paused":
        return f"paused before token {len(lane.tokens)}"
    if lane.status == "cancelled":
        if lane.stale and lane.tokens:
            return "cancelled; below is the output before"
        return f"cancelled at {tokens}" if lane.tokens else "cancelled before it began"
    if lane.status == "error":
        return "cannot run"
    if lane.result is not None:
        stop = STOPPED.get(lane.result.stopped or "", "done")
        return f"{tokens}, {stop}" + (" · shown again" if lane.recalled else "")
    return "not run yet"


def differences(ours: list[int], theirs: list[int]) -> set[int]:
    """Our tokens that the reference does not have in the same place of the common text."""
    matcher = difflib.SequenceMatcher(a=theirs, b=ours, autojunk=False)
    same = {j for _, j, size in matcher.get_matching_blocks() for j in range(j, j + size)}
    return set(range(len(ours))) - same


def tokens_data(lane: LaneState, reference: LaneState, is_reference: bool) -> list[list[Any]]:
    """[text, marks, KL or None, words] of every token."""
    ours, theirs = lane.tokens, reference.tokens
    running = lane.busy
    known = theirs[: len(ours)] if running else theirs
    other = set() if is_reference else differences(ours, known)
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if lane.result is not None:
        first = lane.result.first_divergence
    edited = {edit.token for edit in lane.edits}
    rows: list[list[Any]] = []
    for i, text in enumerate(lane.texts):
        # KL of token i is over the reference's tokens before it: the lane's own tokens only as long as they agree.
        kl = lane.kl[i] if lane.kl and not is_reference and (first is None or i <= first) and i < len(lane.kl) else None
        marks = [name for name, true in (("other", i in other), ("first", i == first and not is_reference)) if true]
        shown = formats.visible(text)
        words = f"token {i}: “{shown}”"
        if i == first and not is_reference:
            instead = formats.visible(reference.texts[i]) if i < len(reference.texts) else "the end"
            words += f", first difference: the reference has “{instead}”"
        elif i in other:
            words += ", differs from the reference"
        if i in edited:
            marks.append("edit")
            words += ", chosen after a change by hand"
        if kl is not None:
            words += f", KL {formats.nats(kl)} nats"
        if text in formats.ENDS:
            shown, marks = "⟨end⟩", [*marks, "end"]
        rows.append([shown, " ".join(marks), kl, words])
    return rows


def meter_data(lane: LaneState, reference: LaneState, full_scale: float, prompt_tokens: int) -> dict[str, Any] | None:
    """The memory meter: measured bytes by kind, against the reference, on a scale that all lanes share."""
    memory = lane.memory
    if memory is None or not full_scale:
        return None
    text = formats.bytes_text
    base = reference.memory.used_bytes if reference.memory is not None else memory.reference_bytes
    kinds = sorted(memory.by_kind.items(), key=lambda item: ORDER.index(item[0]) if item[0] in ORDER else len(ORDER))
    parts = [
        {
            "kind": kind if kind in ORDER else "else",
            "share": 100 * size / full_scale,
            "words": f"{kind} {text(size)}",
        }
        for kind, size in kinds
        if size
    ]
    marks = [{"kind": "ghost", "words": f"reference {text(base)}"}] if base else []
    nominal = None
    when = "after the prompt" if memory.at_token is None else f"at token {memory.at_token}"
    if lane is not reference and memory.at_token is None:
        try:
            nominal = recipes.nominal_share(Recipe.parse(lane.recipe), prompt_tokens)
        except WorkbenchError:
            nominal = None
    if nominal is not None and base:
        marks.append({"kind": "nominal", "words": f"budget {formats.percent(nominal, 1)} of the tokens"})
    marks.append({"kind": "peak", "words": f"peak {text(memory.peak_bytes)}"})
    used = text(memory.used_bytes)
    if lane is reference:
        of = f"held {when}"
    else:
        of = f"of {text(base)}, held {when}" if base else f"held {when}"
    ratio = f"{formats.percent(memory.used_bytes / base)}" if base else ""
    return {
        "used": used if lane is reference or not base else f"{ratio} · {used}",
        "of": of,
        "words": f"Memory: {used} {of}; " + ", ".join(part["words"] for part in parts),
        "parts": parts,
        "reserved": {
            "kind": "reserved",
            "share": 100 * memory.reserved_bytes / full_scale,
            "words": f"reserved {text(memory.reserved_bytes)}",
        },
        "ghost": 100 * base / full_scale,
        "ghost_words": f"the reference holds {text(base)}",
        "nominal": None if nominal is None or not base else 100 * nominal * base / full_scale,
        "nominal_words": "the budget's share of the reference's bytes",
        "peak": 100 * memory.peak_bytes / full_scale,
        "peak_words": f"most held at any time: {text(memory.peak_bytes)}",
        "marks": marks,
    }


def facts(lane: LaneState, is_reference: bool, example: Example | None = None) -> list[str]:
    """A line of numbers under the output."""
    result = lane.result
    if result is None:
        return []
    seconds = result.seconds
    right = example.is_answered_by(result.text) if example is not None else None
    out = [] if right is None else ["✓ the expected answer" if right else "✗ not the expected answer"]
    if not is_reference and result.kl_mean is not None:
        out.append(f"KL {formats.nats(result.kl_mean)} nats a token")
    if not is_reference and result.top1_agreement is not None:
        out.append(f"{formats.percent(result.top1_agreement)} same choice")
    reused = " (reused)" if result.prefill_reused else ""
    out += [
        f"{formats.seconds_text(seconds['decode'])} decoding",
        f"prompt {formats.seconds_text(seconds['prefill'])}{reused}",
    ]
    if not is_reference:
        later = result.answers[0].question is not None
        out.append("question asked after compression" if later else f"first token {result.first_token}")
    return out


def steering(session: Session, lane: LaneState, picked: int | None) -> list[dict[str, str]]:
    """The buttons under the output: what can be done to the lane now."""
    out = []
    if lane.status == "generating":
        out.append({"action": "pause", "label": "Pause", "words": "Hold the lane before its next token"})
    if lane.status == "paused":
        out.append({"action": "step", "label": "Step", "words": "Let one more token come"})
        out.append({"action": "continue", "label": "Continue", "words": "Let the lane run to its end"})
    still = lane.status in ("done", "paused", "cancelled") and not lane.stale
    if still and picked is not None and picked < len(lane.tokens):
        if lane is not session.reference:
            words = f"Take the lane back to before token {picked}, and hold it there"
            out.append({"action": "rewind", "label": f"Rewind to {picked}", "words": words})
        words = f"A new lane that shares what is held before token {picked} and goes on from there"
        out.append({"action": "fork", "label": f"Fork from {picked}", "words": words})
    return out


def lane_data(session: Session, lane: LaneState, picked: int | None) -> dict[str, Any]:
    """Everything `lane_view.js` draws."""
    place, reference = session.place(lane.key), session.lanes[0]
    look, is_reference = formats.look(place), lane is reference
    stale = lane.stale and bool(lane.tokens)
    peaks = [other.memory for other in session.lanes if other.memory is not None]
    scale = max((max(m.peak_bytes, m.used_bytes + m.reserved_bytes, m.reference_bytes) for m in peaks), default=0)
    reading = lane.status == "reading" and lane.total
    many = len(session.lanes)
    hints = {
        "error": "No output.",
        "idle": "The model is loading." if session.model_state == "loading" else "Press Run to fill this lane.",
        "cancelled": "Cancelled. Press Run to go on.",
    }
    out = {
        "key": lane.key,
        "run": lane.run,
        "name": "the reference lane" if is_reference else f"lane {look.letter}",
        "letter": look.letter,
        "colour": look.colour,
        "dash": look.dash,
        "title": recipes.title(lane.recipe_now),
        "recipe": lane.recipe if lane.recipe != "full" else "full · every token, as computed",
        "marks": session.live.words(lane),
        "steering": steering(session, lane, picked),
        "status": lane.status,
        "said": said(lane),
        "progress": lane.done / lane.total if reading else None,
        "error": lane.error,
        "tokens": tokens_data(lane, reference, is_reference),
        "text": lane.result.text if lane.result is not None else "".join(lane.texts),
        "picked": picked,
        "stale": stale,
        "hint": hints.get(lane.status, "…" if lane.busy else "Nothing was generated."),
        "facts": facts(lane, is_reference, session.example if not lane.stale else None),
        "meter": meter_data(lane, reference, scale, len(session.texts)),
        "disabled": [
            *(["left"] if place == 0 else []),
            *(["right"] if place == many - 1 else []),
            *(["remove"] if many == 1 else []),
            *(["duplicate"] if many >= MOST_LANES else []),
        ],
    }
    return out


class LaneCard(pn.viewable.Viewer):
    """One lane on the page."""

    def __init__(self, session: Session, key: int, pick: Callable[[int, int], None]) -> None:
        super().__init__()
        self._session, self.key, self._pick = session, key, pick
        self._picked: int | None = None
        self.view = LaneView(sizing_mode="stretch_width", margin=0)
        self.view.param.watch(self._chosen, "chosen")
        self.form = RecipeForm(lambda text: session.set_recipe(key, text), self._name)
        self._card = pn.Column(self.view, self.form, sizing_mode="stretch_width", margin=0, stylesheets=[CARD])

    def __panel__(self) -> Any:
        return self._card

    def _name(self) -> str:
        return formats.look(self._session.place(self.key)).name.lower()

    def refresh(self, picked: int | None) -> None:
        lane = self._session.lane(self.key)
        if lane is None:
            return
        self.view.shown = lane_data(self._session, lane, picked)
        self._picked = picked
        self.form.show(lane.recipe_now, len(self._session.texts))

    def _chosen(self, event: Any) -> None:
        action, token = event.new.get("action"), event.new.get("token")
        session = self._session
        hold = {"pause": session.live.pause, "step": session.live.step, "continue": session.live.go_on}
        at = self._picked if token is None else int(token)
        if action in hold:
            hold[action](self.key)
        elif action in ("rewind", "fork") and at is not None:
            (session.live.rewind if action == "rewind" else session.live.fork)(self.key, at)
        elif action == "duplicate":
            session.duplicate(self.key)
        elif action == "remove":
            session.remove(self.key)
        elif action in ("left", "right"):
            session.move(self.key, -1 if action == "left" else 1)
        elif token is not None:
            self._pick(self.key, int(token))
