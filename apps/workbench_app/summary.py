"""What happened, in words: every sentence is built from the results."""

from __future__ import annotations

from html import escape

from workbench_app import formats, recipes
from workbench_app.ask import LaneState
from workbench_app.session import Session


def _answer(lane: LaneState) -> str:
    return lane.result.text if lane.result is not None else "".join(lane.texts)


def _first_line(lane: LaneState) -> str:
    lines = _answer(lane).strip().splitlines()
    return lines[0] if lines else ""


def lane_sentence(session: Session, lane: LaneState) -> str:
    """One lane against the reference, as HTML."""
    reference, result = session.lanes[0], lane.result
    assert result is not None
    name = formats.look(session.place(lane.key)).name
    ratio = result.memory.ratio
    size = f"its cache is <b class='n'>{formats.percent(ratio)}</b> of the reference's" if ratio else ""
    at = result.first_divergence
    full = "the full cache" if reference.recipe == "full" else "the reference"
    if result.tokens and at is None:
        said = f"<b>{name}</b> gives the same answer"
        return f"{said}; {size}." if size else f"{said}."
    if at is None:
        return f"<b>{name}</b> gave no answer."
    ours, theirs = _first_line(lane), _first_line(reference)
    if ours == theirs:
        ours, theirs = _answer(lane), _answer(reference)
    if len(ours) > 60 or len(theirs) > 60:
        ours, theirs = _around(lane, at), _around(reference, at)
    verb = f"says <b>{escape(formats.quoted(ours))}</b> where {full} says <b>{escape(formats.quoted(theirs))}</b>"
    return f"<b>{name}</b> {verb}; it first differs at token {at}" + (f"; {size}." if size else ".")


def _around(lane: LaneState, at: int, width: int = 10) -> str:
    return "".join(text for text in lane.texts[at : at + width] if text not in formats.ENDS)


def lead(session: Session) -> str:
    """The sentences at the top of the page."""
    reference = session.reference
    if session.model_state == "loading":
        return f'<p class="lead quiet">Loading {escape(session.draft.model)}…</p>'
    if reference is None or (reference.result is None and not session.busy):
        return '<p class="lead quiet">Choose a prompt and press Run.</p>'
    finished = [lane for lane in session.lanes[1:] if lane.result is not None and lane.error is None]
    if reference.result is None or reference.error is not None or not finished:
        doing = "Running the lanes one after another…" if session.busy else "Nothing to compare yet."
        return f'<p class="lead quiet">{doing}</p>'
    return "".join(f'<p class="lead">{lane_sentence(session, lane)}</p>' for lane in finished)


def why_sentence(session: Session, lane: LaneState) -> str | None:
    """Why a lane broke at a token, as HTML; None where nothing is known."""
    why, result = lane.why, lane.result
    if why is None or result is None:
        return None
    name = formats.look(session.place(lane.key)).name
    heads = sum(len(layer) for layer in why.lost_mass)
    if not why.lost:
        packed = any(any(layer) for layer in result.packed)
        how = "holds it in fewer bits, so what it reads is a little off" if packed else "holds it as it was"
        return f"<b>Why at token {why.token}?</b> {name} dropped nothing of the prompt; it {how}."
    texts = session.texts

    def read(position: int) -> str:
        return escape(formats.visible(texts[position])) if position < len(texts) else "?"

    first, rest = why.lost[0], why.lost[1:4]
    also = ""
    if rest:
        words = ", ".join(f'<span class="chip">{read(t.position)}</span> ({t.position:,})' for t in rest)
        also = f" Next: {words}."
    return (
        f"<b>Why at token {why.token}?</b> There the reference read "
        f'<span class="chip">{read(first.position)}</span> (position {first.position:,}); {name} dropped it in '
        f"<b>{first.heads} of {heads}</b> heads.{also}"
    )


def why_html(session: Session, key: int | None) -> str:
    lane = session.lane(key) if key is not None else None
    sentence = why_sentence(session, lane) if lane is not None else None
    return f'<p class="why">{sentence}</p>' if sentence else ""


_SHAPES = {
    "square": '<rect x="3" y="3" width="8" height="8"/>',
    "triangle": '<path d="M7 2 12 11H2z"/>',
    "diamond": '<path d="M7 1.5 12 7 7 12.5 2 7z"/>',
    "inverted_triangle": '<path d="M7 12 2 3H12z"/>',
    "cross": '<path d="M6 2h2v4h4v2H8v4H6V8H2V6h4z"/>',
    "circle": '<circle cx="7" cy="7" r="4.5"/>',
}


def legend(session: Session) -> str:
    """Marker, letter and name of every lane that is compared."""
    items = []
    for place, lane in enumerate(session.lanes[1:], start=1):
        look = formats.look(place)
        sign = f'<svg viewBox="0 0 14 14" width="14" height="14" fill="{look.colour}" aria-hidden="true">{_SHAPES[look.marker]}</svg>'
        items.append(f"<li>{sign}{look.letter} · {escape(recipes.title(lane.recipe_now))}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def kl_table(session: Session) -> str:
    """The chart's numbers as a table that can be unfolded."""
    lanes = [(formats.look(place), lane) for place, lane in enumerate(session.lanes) if place and lane.kl]
    if not lanes:
        return ""
    names = "".join(f'<th scope="col">{look.letter}</th>' for look, _ in lanes)
    rows = []
    for i, text in enumerate(session.lanes[0].texts):
        cells = "".join(
            f"<td>{formats.nats(lane.kl[i]) if lane.kl and i < len(lane.kl) else '–'}</td>" for _, lane in lanes
        )
        rows.append(f'<tr><th scope="row">{i}</th><td class="mono">{escape(formats.visible(text))}</td>{cells}</tr>')
    head = f'<thead><tr><th scope="col">token</th><th scope="col">reference</th>{names}</tr></thead>'
    return (
        "<details><summary>Data table: KL in nats, per token of the reference's answer</summary>"
        f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div></details>'
    )


def code(session: Session) -> tuple[str, str]:
    """The call and the command that reproduce the screen."""
    import shlex

    ask = session.ask
    lanes = [lane.recipe for lane in session.lanes]
    options = {name: value for name, value in ask.options().items() if value is not None}
    listed = ", ".join(repr(recipe) for recipe in lanes)
    call = ["import workbench as wb", "", f"model = wb.load({ask.model!r})", f"prompt = {ask.text!r}"]
    call += ["cmp = wb.compare(", "    model,", "    prompt,", f"    [{listed}],"]
    call += [f"    {name}={value!r}," for name, value in options.items()]
    call += [")", *_edits(session), "print(cmp)"]
    words = ["kvw", "compare", ask.model, "--prompt", ask.text]
    if ask.asked_later:
        words += ["--question", ask.asked_later]
    for recipe in lanes:
        words += ["--lane", recipe]
    words += ["--max-new-tokens", str(ask.max_new_tokens), "--seed", str(ask.seed)]
    if ask.temperature:
        words += ["--temperature", str(ask.temperature)]
    words += ["--first-token", ask.first_token]
    shell = shlex.join(words)
    if _edits(session):
        shell = "# without what was done by hand, which the Python call has\n" + shell
    return "\n".join(call), shell


def _edits(session: Session) -> list[str]:
    """A line for everything done to the lanes by hand."""
    out = []
    for place, lane in enumerate(session.lanes):
        for edit in lane.course.script.edits:
            if edit.action == "recipe":
                out.append(f"cmp.change({place}, {edit.recipe!r}, token={edit.token})")
                continue
            where = {"layer": edit.layers, "kv_head": edit.kv_heads}
            words = "".join(f", {name}={numbers[0]}" for name, numbers in where.items() if numbers is not None)
            out.append(f"cmp.{edit.action}({place}, {edit.positions[0]}{words}, token={edit.token})")
    return out


def title_of(session: Session) -> str:
    return " · ".join(recipes.title(lane.recipe_now) for lane in session.lanes)
