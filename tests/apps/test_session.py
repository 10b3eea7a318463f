"""The app's controller without a browser: what runs, what is reused, what a person is told."""

from __future__ import annotations

import ast
import logging
import shlex
import time
from pathlib import Path
from typing import Any

import pytest

import workbench as wb
from tests.apps.stand_in import CONTEXT, QUESTION, ready, session_for, settle


def keys(session: Any) -> list[int]:
    return [lane.key for lane in session.lanes]


def recipes(session: Any) -> list[str]:
    return [lane.recipe for lane in session.lanes]


def test_the_default_comparison_is_that_of_the_core(session: Any) -> None:
    assert [lane.status for lane in session.lanes] == ["done"] * 3
    expected = wb.compare(
        session.model, CONTEXT, recipes(session), question=QUESTION, max_new_tokens=6, reuse_prompt=True
    )
    for lane, ours in zip(session.lanes, expected, strict=True):
        assert lane.tokens == ours.tokens
        assert lane.texts == session.model.token_text(ours.tokens)
        assert lane.kl == pytest.approx(ours.kl)
        assert lane.memory.used_bytes == ours.memory.used_bytes
        assert lane.memory.ratio == pytest.approx(ours.memory.ratio)
        assert lane.kept == ours.kept_positions
    assert len(session.texts) == len(expected.prompt)
    broken = [i for i, lane in enumerate(expected) if lane.first_divergence is not None]
    assert [i for i, lane in enumerate(session.lanes) if lane.why is not None] == broken


def test_a_changed_lane_runs_alone_and_does_not_read_the_prompt_again(session: Any) -> None:
    reference, changed, other = session.lanes
    before = [lane.run for lane in session.lanes]
    trace = session.reference_trace()
    session.set_recipe(changed.key, "snapkv(budget=0.5)")
    assert [lane.busy for lane in session.lanes] == [False, True, False]
    settle(session)
    assert [lane.run for lane in session.lanes] == [before[0], before[1] + 1, before[2]]
    assert changed.status == "done" and changed.result.prefill_reused
    assert session.reference_trace() is trace
    assert other.recipe == "kivi(bits=2)" and reference.recipe == "full"
    assert len(changed.kept[0][0]) == len(session.texts) // 2


def test_undo_shows_known_results_at_once(session: Any) -> None:
    lane = session.lanes[1]
    tokens, used = list(lane.tokens), lane.memory.used_bytes
    session.set_recipe(lane.key, "snapkv(budget=0.75)")
    settle(session)
    assert lane.memory.used_bytes > used
    session.undo()
    assert session.runner.idle and lane.recipe == "snapkv(budget=0.25)" and lane.recalled
    assert (lane.tokens, lane.memory.used_bytes) == (tokens, used)
    session.redo()
    assert session.runner.idle and lane.recipe == "snapkv(budget=0.75)"


def test_undo_brings_a_removed_lane_back(session: Any) -> None:
    before = [(lane.key, lane.recipe) for lane in session.lanes]
    session.remove(session.lanes[1].key)
    assert len(session.lanes) == 2
    session.undo()
    settle(session)
    assert [(lane.key, lane.recipe) for lane in session.lanes] == before
    assert [lane.status for lane in session.lanes] == ["done"] * 3


def test_another_reference_runs_all_lanes(session: Any) -> None:
    before = [lane.run for lane in session.lanes]
    session.move(session.lanes[1].key, -1)
    settle(session)
    assert recipes(session) == ["snapkv(budget=0.25)", "full", "kivi(bits=2)"]
    assert all(lane.run > run for lane, run in zip(session.lanes, before, strict=True))
    assert session.lanes[1].memory.ratio > 1
    assert session.lanes[0].kl == [0.0] * len(session.lanes[0].tokens)


def test_lanes_are_added_duplicated_and_limited(session: Any) -> None:
    from workbench_app.session import MOST_LANES

    copy = session.duplicate(session.lanes[1].key)
    settle(session)
    assert recipes(session)[1:3] == ["snapkv(budget=0.25)"] * 2
    assert session.lane(copy).tokens == session.lanes[1].tokens and session.lane(copy).recalled
    while len(session.lanes) < MOST_LANES:
        session.add("tova(budget=0.5)")
    assert session.add("full") is None and "remove one" in session.notice
    settle(session)
    for key in keys(session)[1:]:
        session.remove(key)
    session.remove(keys(session)[0])  # the last one stays
    assert len(session.lanes) == 1


@pytest.mark.parametrize(
    "text, part",
    [
        ("snapkv(budget=2.5)", "budget"),
        ("snapkv(budgte=0.5)", "Did you mean budget"),
        ("snapvk()", "Did you mean snapkv"),
        ("", "empty"),
        ("snapkv(", "cannot be read"),
        ("kivi(bits=2) | kivi(bits=4)", "one codec"),
    ],
)
def test_a_bad_recipe_is_said_in_its_lane(session: Any, text: str, part: str) -> None:
    lane, tokens = session.lanes[1], list(session.lanes[1].tokens)
    session.set_recipe(lane.key, text)
    assert part in lane.error and "\n" not in lane.error
    assert (lane.recipe, lane.tokens, session.runner.idle) == ("snapkv(budget=0.25)", tokens, True)
    session.set_recipe(lane.key, "snapkv(budget=0.25)")
    settle(session)
    assert lane.error is None and lane.status == "done"


def test_a_recipe_that_does_not_fit_the_model_is_said_in_its_lane(session: Any) -> None:
    lane = session.lanes[2]
    session.set_recipe(lane.key, "kivi(bits=2, group_size=64, residual_length=128)")
    assert "group_size=32" in lane.error
    assert [other.status for other in session.lanes] == ["done"] * 3


@pytest.mark.parametrize(
    "prompt, part", [("", "empty"), ("   \n", "empty"), ("word " * 3000, "at most 1,024"), ("a " * 1020, "shorten")]
)
def test_a_bad_prompt_is_said_and_the_lanes_stay(session: Any, prompt: str, part: str) -> None:
    tokens = [list(lane.tokens) for lane in session.lanes]
    session.ask_for(prompt=prompt)
    session.run()
    assert part in session.prompt_error and session.runner.idle
    assert [lane.tokens for lane in session.lanes] == tokens
    session.ask_for(prompt=CONTEXT)
    session.run()
    assert session.prompt_error is None


def test_what_was_typed_waits_for_run(session: Any) -> None:
    session.ask_for(prompt="Another text about nothing . " * 12)
    assert session.changed
    session.set_recipe(session.lanes[1].key, "snapkv(budget=0.5)")
    settle(session)
    assert session.ask.prompt == CONTEXT and session.changed  # the lane is still compared on the prompt on show
    session.run()
    settle(session)
    assert not session.changed and session.ask.prompt.startswith("Another")
    assert all(lane.status == "done" and not lane.recalled for lane in session.lanes)


def test_the_question_may_be_part_of_the_prompt(session: Any) -> None:
    later = len(session.texts)
    session.ask_for(aware=True)
    session.run()
    settle(session)
    assert len(session.texts) > later
    assert session.lanes[1].result.answers[0].question is None


def test_an_example_knows_its_answer_and_where_it_stands(session: Any) -> None:
    from workbench.evaluation.tasks import needle
    from workbench_app.lane_view import lane_data

    example = needle(session.model, 300, 0.5, 1, "colour")
    session.ask_example(example)
    assert session.evidence == ()  # not run yet
    session.run()
    settle(session)
    held = "".join(session.texts[position] for position in session.evidence)
    assert example.answer.split()[0] in held
    session.lanes[1].result.answers[0].text = f" {example.answer}"
    said = [lane_data(session, lane, None)["facts"][0] for lane in session.lanes]
    assert said == ["✗ not the expected answer", "✓ the expected answer", "✗ not the expected answer"]
    session.ask_for(prompt=CONTEXT)
    session.run()
    assert session.evidence == () and session.example is None


def test_a_missing_model_is_one_sentence_and_the_old_one_stays(session: Any) -> None:
    name = session.ask.model
    session.load("./no/such/model", session.run)
    settle(session)
    assert "no such folder" in session.model_error
    assert session.model_state == "ready" and session.draft.model == name
    session.set_recipe(session.lanes[1].key, "snapkv(budget=0.5)")
    settle(session)
    assert session.lanes[1].status == "done"


def test_no_model_at_all_is_one_sentence() -> None:
    session = ready(session_for("house/nothing"))
    assert session.model_state == "error" and "no house model" in session.model_error
    session.run()
    assert "not loaded" in session.notice
    session.close()


def test_cancel_keeps_what_was_computed_and_run_goes_on(model_folder: Path) -> None:
    session = ready(session_for(model_folder, max_new_tokens=1))
    session.ask_for(max_new_tokens=700)
    session.run()
    deadline = time.monotonic() + 30
    while not session.lanes[0].tokens or session.lanes[0].stale:
        session.mailbox.drain()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    session.stop()
    settle(session)
    assert [lane.status for lane in session.lanes] == ["cancelled"] * 3
    assert 0 < len(session.lanes[0].tokens) < 700
    session.ask_for(max_new_tokens=3)
    session.run()
    settle(session)
    assert [lane.status for lane in session.lanes] == ["done"] * 3
    assert [len(lane.tokens) for lane in session.lanes] == [3, 3, 3]
    session.close()


def test_the_newest_change_wins(session: Any) -> None:
    lane = session.lanes[1]
    for budget in (0.3, 0.4, 0.5, 0.6, 0.7):
        session.set_recipe(lane.key, f"snapkv(budget={budget})")
    settle(session)
    assert lane.status == "done" and lane.result.recipe == "snapkv(budget=0.7)"
    assert len(lane.kept[0][0]) == int(0.7 * len(session.texts))


def test_the_unexpected_is_logged_and_told_in_one_sentence(
    session: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import workbench.runs.lane_run as lane_run

    def broken(*arguments: Any) -> Any:
        raise ZeroDivisionError("a number that must not be seen")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(lane_run, "packed_counts", broken)
        session.set_recipe(session.lanes[1].key, "snapkv(budget=0.5)")
        settle(session)
    lane = session.lanes[1]
    assert lane.status == "error" and lane.error.startswith("Something failed inside workbench.runs.lane_run")
    assert "must not be seen" not in lane.error and "must not be seen" in caplog.text
    assert session.lanes[2].status == "done"
    session.set_recipe(lane.key, "snapkv(budget=0.6)")
    settle(session)
    assert lane.status == "done" and lane.error is None


def test_two_sessions_share_one_model_and_take_turns(model_folder: Path) -> None:
    first, second = session_for(model_folder), session_for(model_folder)
    second.shelf = first.shelf
    for session in (first, second):
        session.load(session.draft.model, session.run)
    for session in (first, second):
        settle(session)
    assert first.model is second.model
    assert [lane.tokens for lane in first.lanes] == [lane.tokens for lane in second.lanes]
    first.close()
    second.close()


def test_closing_in_the_middle_ends_the_worker(model_folder: Path) -> None:
    session = ready(session_for(model_folder, max_new_tokens=1))
    session.ask_for(max_new_tokens=800)
    session.run()
    thread = session.runner._thread
    session.close()
    thread.join(20)
    assert not thread.is_alive()
    session.mailbox.drain()


def test_a_token_can_be_explained(session: Any) -> None:
    lane = session.lanes[1]
    session.explain(lane.key, 2)
    settle(session)
    assert lane.why.token == 2
    assert len(lane.why.lost_mass) == session.model.geometry.num_layers
    assert all(lost.position not in lane.kept[0][0] or lost.heads < 4 for lost in lane.why.lost)


def test_the_code_reproduces_the_screen(session: Any) -> None:
    from workbench_app.summary import code

    call, command = code(session)
    found: dict[str, Any] = {}
    body = call.replace("print(cmp)", "").replace("import workbench as wb", "")
    ast.parse(call)
    exec(body, {"wb": wb}, found)
    assert [lane.tokens for lane in found["cmp"]] == [lane.tokens for lane in session.lanes]
    words = shlex.split(command)
    assert words[:3] == ["kvw", "compare", session.ask.model]
    assert [words[i + 1] for i, word in enumerate(words) if word == "--lane"] == recipes(session)
    assert words[words.index("--prompt") + 1] == CONTEXT
