"""Steering lanes in the app without a browser: pause, step, rewind, fork, edits by hand, undo."""

from __future__ import annotations

import time
from typing import Any

import pytest

import workbench as wb
from tests.apps.stand_in import CONTEXT, QUESTION, session_for, settle
from workbench.runs.steer import Edit


def until(session: Any, true: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        session.mailbox.drain()
        if time.monotonic() > deadline:
            raise TimeoutError([(lane.status, lane.error) for lane in session.lanes])
        time.sleep(0.002)


def snap(session: Any) -> Any:
    return session.lanes[1]


def shown(lane: Any) -> tuple[Any, ...]:
    return lane.tokens, lane.texts, lane.kl, lane.kept


def test_a_fork_opens_beside_its_lane_at_once_and_takes_another_recipe_from_there(session: Any) -> None:
    lane = snap(session)
    key = session.live.fork(lane.key, 3)
    fork = session.lane(key)
    assert session.lanes.index(fork) == 2 and fork.recalled and session.runner.idle
    assert shown(fork) == shown(lane) and session.live.words(fork) == ["forked from A at token 3"]
    session.set_recipe(key, "kivi(bits=4)")
    settle(session)
    assert fork.status == "done" and fork.tokens[:3] == lane.tokens[:3] and fork.kept == lane.kept
    assert fork.recipe == "snapkv(budget=0.25)" and fork.recipe_now == "kivi(bits=4)"
    assert fork.memory.at_token == 3 and "window" in fork.memory.by_kind
    assert session.live.words(fork) == ["forked from A at token 3", "from token 3: kivi(bits=4)"]
    session.set_recipe(key, "kivi(bits=2)")  # takes the place of the other, from the same token
    settle(session)
    assert [edit.recipe for edit in fork.result.edits] == ["kivi(bits=2)"]
    session.undo()
    assert fork.recalled and fork.recipe_now == "kivi(bits=4)"
    session.undo()
    assert fork.recalled and shown(fork) == shown(lane)


def test_a_fork_is_what_the_core_forks(session: Any) -> None:
    key = session.live.fork(snap(session).key, 2)
    session.set_recipe(key, "knorm(budget=0.1)")
    settle(session)
    cmp = wb.compare(session.model, CONTEXT, ["full", "snapkv(budget=0.25)"], question=QUESTION, max_new_tokens=6)
    theirs, ours = cmp.fork(1, 2, "knorm(budget=0.1)"), session.lane(key)
    assert ours.tokens == theirs.tokens and ours.kl == pytest.approx(theirs.kl) and ours.kept == theirs.kept_positions


def test_a_recipe_that_must_watch_the_prompt_is_refused_in_the_fork(session: Any) -> None:
    key = session.live.fork(snap(session).key, 2)
    session.set_recipe(key, "h2o(budget=0.5)")
    fork = session.lane(key)
    assert "watch the prompt" in fork.error and fork.tokens == snap(session).tokens and session.runner.idle


def test_rewound_a_lane_is_held_steps_and_goes_on(session: Any) -> None:
    lane = snap(session)
    before = shown(lane)
    session.live.rewind(lane.key, 2)
    settle(session)
    assert lane.status == "paused" and lane.tokens == before[0][:2] and not session.busy
    for count in (3, 4):
        session.live.step(lane.key)
        settle(session)
        assert (lane.status, len(lane.tokens)) == ("paused", count)
    session.live.go_on(lane.key)
    settle(session)
    assert lane.status == "done" and shown(lane) == before


def test_a_held_lane_leaves_the_worker_to_others_and_ends_with_stop(session: Any) -> None:
    lane, other = snap(session), session.lanes[2]
    session.live.rewind(lane.key, 1)
    settle(session)
    session.set_recipe(other.key, "kivi(bits=4)")
    settle(session)
    assert other.status == "done" and lane.status == "paused" and session.work.holds(lane.key) is not None
    session.stop()
    assert lane.status == "cancelled" and session.work.holds(lane.key) is None
    session.undo()
    session.undo()
    settle(session)
    assert lane.status == "done" and len(lane.tokens) == 6


def test_twice_pressed_does_not_hang(session: Any) -> None:
    lane = snap(session)
    session.live.rewind(lane.key, 1)
    settle(session)
    session.live.step(lane.key)
    lane.status = "paused"  # as if the second press came before anything was heard
    session.live.step(lane.key)
    settle(session)
    assert lane.status == "paused" and len(lane.tokens) in (2, 3)
    session.live.go_on(lane.key)
    settle(session)
    assert lane.status == "done"


def test_protect_heals_by_one_entry_a_head_and_undo_takes_it_back(session: Any) -> None:
    lane = snap(session)
    before, used = shown(lane), lane.memory.used_bytes
    gone = next(p for p in range(len(session.texts)) if not any(p in head for layer in lane.kept for head in layer))
    session.live.edit(lane.key, "protect", gone)
    settle(session)
    heads = [head for layer in lane.kept for head in layer]
    assert all(gone in head for head in heads)
    assert lane.memory.used_bytes == used + len(heads) * (2 * 32 * 4 + 4)
    text = session.texts[gone].replace(" ", "").strip()
    assert f"({gone}) in all heads" in session.live.words(lane)[0] and text in session.live.words(lane)[0]
    session.live.edit(lane.key, "evict", gone, 1, 0)
    settle(session)
    assert gone not in lane.kept[1][0] and gone in lane.kept[1][1] and gone in lane.kept[0][0]
    session.live.edit(lane.key, "evict", gone, 1, 0)
    assert "nothing to evict: this head does not hold it" in session.notice and session.runner.idle
    session.undo()
    assert lane.recalled and all(gone in head for layer in lane.kept for head in layer)
    session.undo()
    assert shown(lane) == before and lane.memory.used_bytes == used


def test_what_was_protected_stays_when_the_budget_changes_and_goes_with_the_prompt(session: Any) -> None:
    lane = snap(session)
    gone = next(p for p in range(len(session.texts)) if not any(p in head for layer in lane.kept for head in layer))
    session.live.edit(lane.key, "protect", gone)
    settle(session)
    session.set_recipe(lane.key, "snapkv(budget=0.3)")
    settle(session)
    assert lane.status == "done" and all(gone in head for layer in lane.kept for head in layer)
    assert "cmp.protect(1, " in _code(session)
    session.ask_for(prompt="Something else altogether . " * 10)
    session.run()
    settle(session)
    assert lane.status == "done" and session.live.words(lane) == []


def _code(session: Any) -> str:
    from workbench_app.summary import code

    return code(session)[0]


def test_the_screen_as_code_makes_the_same_lanes(session: Any) -> None:
    lane = snap(session)
    key = session.live.fork(lane.key, 3)
    session.set_recipe(key, "knorm(budget=0.2)")
    session.live.edit(lane.key, "evict", lane.kept[0][1][2], 0, 1)
    settle(session)
    scope: dict[str, Any] = {}
    exec(_code(session), scope)
    for ours, theirs in zip(session.lanes, scope["cmp"], strict=True):
        assert ours.tokens == theirs.tokens and ours.kept == theirs.kept_positions


def test_a_running_lane_is_paused_and_takes_another_recipe_from_its_next_token(model_folder: Any) -> None:
    session = session_for(model_folder, max_new_tokens=200)
    session.load(session.draft.model, session.run)
    lane = snap(session)
    until(session, lambda: lane.status == "generating" and len(lane.tokens) >= 2)
    session.set_recipe(lane.key, "knorm(budget=0.2)")
    until(session, lambda: lane.edits)
    at = lane.edits[0].token
    assert lane.edits == [Edit(at, "recipe", "knorm(budget=0.2)")] and 2 <= at < 200 and lane.memory.at_token == at
    session.live.pause(lane.key)
    until(session, lambda: lane.status == "paused")
    assert lane.recipe_now == "knorm(budget=0.2)" and at <= len(lane.tokens) < 200
    session.set_recipe(lane.key, "full")  # held: from here on
    settle(session)
    assert lane.status == "paused" and [edit.recipe for edit in lane.edits] == ["knorm(budget=0.2)", "full"]
    session.live.go_on(lane.key)
    settle(session)
    assert lane.status == "done" and len(lane.tokens) == 200 and len(lane.result.edits) == 2
    session.close()


def test_the_reference_stays_and_no_steered_lane_takes_its_place(session: Any) -> None:
    reference, lane = session.lanes[0], snap(session)
    for act in (session.live.rewind, lambda key, token: session.live.edit(key, "evict", token)):
        act(reference.key, 2)
        assert "fork it" in session.notice and session.runner.idle
    session.live.edit(lane.key, "evict", lane.kept[0][0][0])
    settle(session)
    session.move(lane.key, -1)
    assert session.lanes[0] is reference and "cannot be the reference" in session.notice
    session.remove(reference.key)
    assert session.lanes[0] is reference
    fork = session.lane(session.live.fork(reference.key, 2))
    assert fork.tokens == reference.tokens


def test_evicting_everything_is_said_in_the_lane(session: Any) -> None:
    lane = snap(session)
    session.set_recipe(lane.key, "snapkv(budget=1, window=1)")
    settle(session)
    session.live.edit(lane.key, "evict", lane.kept[0][0][0], 0, 0)
    settle(session)
    assert lane.status == "error" and "nothing at all" in lane.error
    session.undo()
    assert lane.status == "done" and lane.error is None


def test_a_closer_look_says_that_it_is_for_lanes_by_their_recipe_alone(session: Any) -> None:
    lane = snap(session)
    session.live.edit(lane.key, "evict", lane.kept[0][0][0])
    settle(session)
    assert session.findings.scores(lane) is None and "by hand" in session.findings.said("scores", lane)
    assert session.findings.retained([lane]) == [None] and session.runner.idle


def test_the_card_offers_what_can_be_done(session: Any) -> None:
    from workbench_app.lane_view import lane_data

    lane, reference = snap(session), session.lanes[0]

    def offered(lane: Any, picked: int | None) -> list[str]:
        return [button["action"] for button in lane_data(session, lane, picked)["steering"]]

    assert offered(lane, None) == [] and offered(lane, 2) == ["rewind", "fork"] and offered(reference, 2) == ["fork"]
    session.live.rewind(lane.key, 2)
    settle(session)
    assert offered(lane, None) == ["step", "continue"] and offered(lane, 1) == ["step", "continue", "rewind", "fork"]
    assert lane_data(session, lane, None)["said"] == "paused before token 2"
