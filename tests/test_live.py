"""Rewinding, forking and editing lanes: exact to the last bit, sharing what is held."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import workbench as wb
from tests.builders import build, cache_for, feed, network, prompt, random_model
from tests.test_runs import Words
from workbench.cache.storage import storages
from workbench.models.load import Model
from workbench.runs.compare import Run
from workbench.runs.control import device_queue
from workbench.runs.events import CacheState, Edited, LaneDone, Paused, Refused, Token
from workbench.runs.steer import Edit, RecentQueries, apply_edit

RECIPES = [
    "full",
    "snapkv(budget=0.25, window=8)",
    "adakv(budget=0.25, window=8)",
    "h2o(budget=0.3)",
    "tova(budget=0.5)",
    "kivi(bits=2, group_size=16, residual_length=16)",
    "snapkv(budget=0.5, window=8) | kivi(bits=4, group_size=16, residual_length=16)",
    "xquant(bits=4)",
]


def compared(*recipes: str, tokens: int = 12, length: int = 64, **options: Any) -> Any:
    return wb.compare(build("qwen3"), prompt(length), ["full", *recipes], max_new_tokens=tokens, **options)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("options", [{}, {"rewindable": True}, {"reuse_prompt": True, "temperature": 1.5, "seed": 3}])
def test_a_fork_with_the_same_recipe_repeats_the_lane_to_the_last_bit(recipe: str, options: dict[str, Any]) -> None:
    cmp = compared(recipe, **options)
    lane = cmp[1]
    for token in (0, 5, 12):
        fork = cmp.fork(1, token)
        assert fork.tokens == lane.tokens and fork.kl == lane.kl and fork.stopped == lane.stopped
        assert fork.first_divergence == lane.first_divergence and fork.kept_positions == lane.kept_positions
        assert (fork.origin.lane, fork.origin.token) == (1, token)
    assert len(cmp) == 5 and cmp[2].recipe == recipe


@pytest.mark.parametrize("recipe", ["snapkv(budget=0.25, window=8)", "tova(budget=0.5)"])
def test_rewound_and_resumed_is_as_never_left(recipe: str) -> None:
    cmp = compared(recipe, rewindable=True)
    before = cmp[1]
    rewound = cmp.rewind(1, 4)
    assert cmp[1] is rewound and rewound.tokens == before.tokens[:4] and rewound.stopped == "rewound"
    again = cmp.resume(1)
    assert again.tokens == before.tokens and again.kl == before.kl and again.stopped == "length"
    longer = cmp.resume(1, max_new_tokens=20)
    assert longer.tokens[:12] == before.tokens and len(longer.tokens) == 20
    assert cmp.rewind(1, 0).tokens == [] and cmp.resume(1).kl == before.kl


def test_another_recipe_from_a_token_on_keeps_the_tokens_before_and_acts_on_what_is_held() -> None:
    cmp = compared("full", rewindable=True)
    fork = cmp.fork(1, 6, "snapkv(budget=0.25, window=8)")
    assert fork.tokens[:6] == cmp[1].tokens[:6] and fork.recipe == "full" and fork.steered
    assert fork.kl[:6] == [0.0] * 6 and max(fork.kl[6:]) > 0
    kept = (64 + 6) // 4  # a quarter of what was seen by then, generated tokens among it
    assert all(len(head) <= kept for layer in fork.kept_positions for head in layer)
    assert fork.memory.at_token == 6 and fork.memory.used_bytes < cmp[1].memory.used_bytes
    assert fork.as_dict()["edits"] == [{"token": 6, "action": "recipe", "recipe": "snapkv(budget=0.25, window=8)"}]


def test_a_lane_changes_its_recipe_in_place_as_a_fork_does_beside_it() -> None:
    cmp = compared("knorm(budget=0.5)", rewindable=True)
    fork = cmp.fork(1, 5, "tova(budget=0.25)")
    changed = cmp.change(1, "tova(budget=0.25)", token=5)
    assert cmp[1] is changed and (changed.tokens, changed.kl, changed.edits) == (fork.tokens, fork.kl, fork.edits)
    assert cmp.held_bytes() < 4 * cmp[0].memory.used_bytes


def test_at_the_prompt_another_recipe_is_that_recipe() -> None:
    recipe = "knorm(budget=0.25)"
    cmp = compared("full", recipe, reuse_prompt=True)
    fork = cmp.fork(1, 0, recipe)
    assert fork.kept_positions == cmp[2].kept_positions
    assert fork.tokens == cmp[2].tokens and fork.kl == pytest.approx(cmp[2].kl, abs=1e-5)


def test_what_is_done_at_token_0_is_done_before_the_question_is_fed() -> None:
    model, recipe = Model("test/spoken", network("llama", "workbench"), Words()), "knorm(budget=0.25)"
    questions = ["w20", "w7 w8 w9"]
    cmp = wb.compare(
        model, prompt(60), ["full", "full", recipe], question=questions, max_new_tokens=6, reuse_prompt=True
    )
    for answer, text in enumerate(questions):
        fork = cmp.fork(1, 0, recipe, answer=answer)
        theirs = cmp[2].answers[answer]
        assert fork.kept_positions == cmp[2].kept_positions and fork.memory.at_token is None
        assert fork.answers[0].question == text and fork.tokens == theirs.tokens
        assert fork.kl == pytest.approx(theirs.kl, abs=1e-5)


def test_once_the_question_is_read_the_prompt_is_not_edited_before_the_first_token() -> None:
    model, seen = Model("test/spoken", network("llama", "workbench"), Words()), []
    for held in (True, False):
        control = wb.Control()
        run = Run(model, prompt(60), ["full", "full"], question="w7 w8", max_new_tokens=4, control=control)
        list(run.events(only=[0]))
        control.edit(Edit(-1, "evict", "", (3,)))
        if held:
            control.pause(at=0)
        for event in run.events(only=[1]):
            seen.append(event)
            if isinstance(event, Refused):
                control.resume()
        assert [type(e) for e in seen if isinstance(e, Refused | Edited)] == [Refused, Edited][: 1 if held else 2]
    assert run.lanes[1].edits[0].token == 1


def test_what_a_recipe_lost_does_not_come_back_with_another() -> None:
    cmp = compared("snapkv(budget=0.25, window=8)", "kivi(bits=2, group_size=16, residual_length=16)", rewindable=True)
    full = cmp.fork(1, 3, "full")
    assert full.kept_positions == cmp[1].kept_positions and full.kl == pytest.approx(cmp[1].kl, abs=1e-5)
    decoded = cmp.fork(2, 3, "full")
    assert decoded.kl[3] > 0 and decoded.memory.by_kind.get("codes", 0) == 0
    assert decoded.memory.used_bytes > cmp[2].memory.used_bytes
    coded = cmp.fork(1, 3, "kivi(bits=4, group_size=16, residual_length=16)")
    assert coded.kept_positions == cmp[1].kept_positions and coded.memory.by_kind["codes"] > 0


def test_restoring_everything_is_the_reference() -> None:
    cmp = compared("snapkv(budget=0.25, window=8)")
    assert max(cmp[1].kl) > 1e-4
    healed = cmp.restore(1, range(64))
    assert all(head == list(range(64)) for layer in healed.kept_positions for head in layer)
    assert healed.tokens == cmp[0].tokens and max(healed.kl) < 1e-5


def test_restored_entries_are_exactly_the_reference_s_and_nothing_else_is_touched() -> None:
    model, ids = build("qwen3"), prompt(64)
    run = Run(model, ids, ["full", "adakv(budget=0.25, window=8)"], max_new_tokens=1, rewindable=True)
    list(run.events())
    cache, source = run.lanes[1].start.cache.clone(), run.trace.cache
    before = [[tuple(t.clone() for t in layer.store.entries(row)) for row in range(2)] for layer in cache.layers]
    gone = next(p for p in range(64) if p not in cache.kept(1, 0))
    apply_edit(Edit(0, "restore", "", (gone,), (1,), (0,)), cache, source, [])
    for index, layer in enumerate(cache.layers):
        for row in range(2):
            entries = layer.store.entries(row)
            if (index, row) == (1, 0):
                theirs = source.layers[1].store.entries(0)
                assert all(torch.equal(ours[0], side[gone]) for ours, side in zip(entries, theirs, strict=True))
                entries = tuple(side[1:] for side in entries)
            assert all(torch.equal(a, b) for a, b in zip(entries, before[index][row], strict=True))


def test_evicting_by_hand_frees_the_entry_in_the_heads_that_are_meant() -> None:
    cmp = compared("snapkv(budget=0.5, window=8)")
    before, used, entry = cmp[1].kept_positions, cmp[1].memory.used_bytes, 2 * 32 * 4 + 4
    token = before[1][0][3]
    lane = cmp.evict(1, token, layer=1, kv_head=0)
    assert lane.kept(1, 0) == [p for p in before[1][0] if p != token]
    assert lane.kept(1, 1) == before[1][1] and lane.kept_positions[::2] == before[::2]
    assert lane.memory.used_bytes == used - entry and lane.memory.at_token is None
    lane = cmp.protect(1, token, layer=1, kv_head=0)
    assert token in lane.kept(1, 0) and lane.memory.used_bytes == used
    assert [e.action for e in lane.edits] == ["evict", "protect"]
    with pytest.raises(wb.WorkbenchError, match="hand"):
        cmp.retained(1)


@pytest.mark.parametrize("recipe", ["kivi(bits=4, group_size=16, residual_length=16)", "adakv(budget=0.5, window=8)"])
def test_evict_and_restore_on_codes_and_on_uneven_heads(recipe: str) -> None:
    cmp = compared(recipe)
    token = next(p for p in range(64) if all(p in cmp[1].kept(layer, 1) for layer in range(3)))
    lane = cmp.evict(1, [token], kv_head=1)
    assert not any(token in lane.kept(layer, 1) for layer in range(3))
    lane = cmp.restore(1, [token], kv_head=1, token=4)
    assert all(token in lane.kept(layer, 1) for layer in range(3)) and len(lane.kl) == 12
    assert lane.restored == [[[], [token]]] * 3  # in full precision, whatever the others are held as


def test_what_is_protected_no_strategy_drops() -> None:
    cmp = compared("tova(budget=0.25)", tokens=24, rewindable=True)

    def held_at_the_end(lane: Any) -> bool:
        edits = lane.edits
        run = Run(build("qwen3"), prompt(64), ["full", "tova(budget=0.25)"], max_new_tokens=24)
        from workbench.runs.steer import Script

        run.scripts[1] = Script(tuple(lane.tokens), edits)
        from workbench.runs.lane_run import LaneRun

        list(run.events(only=[0]))
        work = LaneRun(run, 1)
        list(work.events())
        return all(7 in work.cache.kept(layer, head) for layer in range(3) for head in range(2))

    gone = cmp.restore(1, 7)
    assert not held_at_the_end(gone)
    assert held_at_the_end(cmp.protect(1, 7))


def test_recipes_change_and_entries_leave_while_it_generates() -> None:
    control = wb.Control()
    run = Run(build("qwen3"), prompt(64), ["full", "full"], max_new_tokens=10, control=control, rewindable=True)
    seen = []
    for event in run.events():
        seen.append(event)
        if isinstance(event, Token) and event.lane == 1 and event.index == 3:
            control.edit(Edit(-1, "recipe", "knorm(budget=0.25)"))
            control.edit(Edit(-1, "evict", "", (63,), (0,)))
            control.edit(Edit(-1, "evict", "", (9999,)))
    lane = run.lanes[1]
    assert [e.edit.action for e in seen if isinstance(e, Edited)] == [e.action for e in lane.edits]
    assert lane.edits[0] == Edit(4, "recipe", "knorm(budget=0.25)")
    assert any(isinstance(e, Refused) and "9,999" in e.sentence for e in seen)
    assert any(isinstance(e, CacheState) and e.moment == "edit" for e in seen)
    cmp = run.comparison()
    again = cmp.fork(1, 7)  # what was done live is done again
    assert again.tokens == lane.tokens and again.kl == lane.kl and again.edits == lane.edits


def test_the_reference_is_not_steered() -> None:
    cmp, control = compared("knorm(budget=0.5)"), wb.Control()
    for refused in (lambda: cmp.rewind(0, 2), lambda: cmp.evict(0, 3), lambda: cmp.resume(0)):
        with pytest.raises(wb.WorkbenchError, match="fork it"):
            refused()
    fork = cmp.fork(0, 4, "knorm(budget=0.5)")
    assert fork.tokens[:4] == cmp[0].tokens[:4] and fork.kl[:4] == [0.0] * 4
    control.edit(Edit(-1, "evict", "", (3,)))
    events = list(wb.stream(build("qwen3"), prompt(64), ["full"], max_new_tokens=3, control=control))
    assert any(isinstance(event, Refused) and "fork it" in event.sentence for event in events)


BAD = [
    (lambda cmp: cmp.fork(1, 13), "no token 13"),
    (lambda cmp: cmp.fork(1, -1), "no token -1"),
    (lambda cmp: cmp.fork(7), "no lane 7"),
    (lambda cmp: cmp.fork(1, 3, "nonsense(1)"), "nonsense"),
    (lambda cmp: cmp.fork(1, 3, "h2o(budget=0.5)"), "watch the prompt"),
    (lambda cmp: cmp.fork(2, 3, "knorm(budget=0.1)"), "equally many"),
    (lambda cmp: cmp.evict(1, range(76)), "no token 64 yet"),
    (lambda cmp: cmp.evict(1, range(64)), "nothing at all"),
    (lambda cmp: cmp.evict(1, []), "at least one position"),
    (lambda cmp: cmp.evict(1, -2), "no token -2"),
    (lambda cmp: cmp.evict(1, 3, layer=9), "no layer 9"),
    (lambda cmp: cmp.evict(1, 3, kv_head=2), "no KV head 2"),
    (lambda cmp: cmp.restore(1, 63), "already"),
    (lambda cmp: cmp.restore(1, 66, token=8, kv_head=0, layer=0), "already"),
    (
        lambda cmp: (cmp.fork(0, 8, "knorm(budget=0.1)"), cmp.lanes.pop(), cmp.restore(1, 64, token=0)),
        "no token 64 yet",
    ),
    (lambda cmp: cmp.fork(1, 12, "full"), "ended before"),
    (lambda cmp: cmp.evict(1, 3, token=12), "ended before"),
    (lambda cmp: cmp.evict(3, 63, layer=0, kv_head=1), "heads of equal length"),
    (lambda cmp: cmp.evict(4, 63), "taken out"),
]


@pytest.fixture(scope="module")
def various() -> Any:
    lanes = ("snapkv(budget=0.25, window=8)", "adakv(budget=0.25, window=8)", "tova(budget=0.5)", "xquant(bits=4)")
    return compared(*lanes, rewindable=True)


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_input_is_one_sentence_and_changes_nothing(various: Any, number: int) -> None:
    act, part = BAD[number]
    before = list(various.lanes)
    with pytest.raises(wb.WorkbenchError, match=part) as caught:
        act(various)
    assert "\n" not in str(caught.value) and various.lanes == before


def test_a_failed_lane_is_not_forked() -> None:
    cmp = compared("knorm(budget=0.5)")
    cmp[1].error = "The device is full."
    with pytest.raises(wb.WorkbenchError, match="failed"):
        cmp.fork(1, 0)


def test_a_cancelled_lane_goes_on() -> None:
    whole, control = compared("knorm(budget=0.5)")[1], wb.Control()
    run = Run(build("qwen3"), prompt(64), ["full", "knorm(budget=0.5)"], max_new_tokens=12, control=control)
    for event in run.events():
        if isinstance(event, Token) and (event.lane, event.index) == (1, 4):
            control.cancel()
    assert run.lanes[1].stopped == "cancelled" and len(run.lanes[1].tokens) == 5
    cmp = run.comparison()
    assert cmp.resume(1).tokens == whole.tokens and cmp[1].kl == whole.kl


def test_pause_step_and_resume_leave_the_device_to_others() -> None:
    whole = compared("knorm(budget=0.5)", tokens=8)[1]
    control, told, threads = wb.Control(), [], []
    stopped = threading.Event()

    def listen() -> None:
        run = Run(build("qwen3"), prompt(64), ["full", "knorm(budget=0.5)"], max_new_tokens=8, control=control)
        for event in run.events():
            if isinstance(event, Token) and (event.lane, event.index) == (1, 1):
                control.pause()
            told.append(event)
            if isinstance(event, Paused):
                stopped.set()

    threads.append(threading.Thread(target=listen))
    threads[0].start()

    def paused_at(index: int) -> None:
        assert stopped.wait(60)
        stopped.clear()
        pauses = [event for event in told if isinstance(event, Paused)]
        assert pauses[-1].index == index and device_queue(build().device).ahead() == 0

    paused_at(2)
    assert wb.compare(build("qwen3"), prompt(8), ["full"], max_new_tokens=1)[0].tokens  # another run has its turn
    control.step()
    paused_at(3)
    control.step(2)
    paused_at(5)
    control.edit(Edit(-1, "evict", "", (9999,)))
    paused_at(5)  # it was refused, and the lane is held as before
    control.resume()
    threads[0].join(60)
    last = told[-1]
    assert isinstance(last, LaneDone) and last.result.tokens == whole.tokens and last.result.kl == whole.kl


def test_cancel_ends_a_pause() -> None:
    control = wb.Control()
    control.pause(at=2)
    for event in wb.stream(build(), prompt(20), ["full"], max_new_tokens=8, control=control):
        if isinstance(event, Paused):
            control.cancel()
    assert isinstance(event, LaneDone) and event.result.stopped == "cancelled" and len(event.result.tokens) == 2


@pytest.mark.parametrize("recipe", ["full", "snapkv(budget=0.25)", "kivi(bits=2)", "adakv(budget=0.25)"])
def test_a_fork_at_8k_tokens_shares_all_but_a_twentieth(recipe: str) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=16384,
    )  # fmt: skip
    model = random_model(config)
    cache = cache_for(model, recipe, 8192)
    feed(model, cache, prompt(8192), 2048)
    fork = cache.clone()
    feed(model, fork, prompt(16))  # goes its own way
    held, own = storages(cache), storages(fork)
    fresh = sum(size for address, size in own.items() if address not in held)
    # A codec's newest entries, in full precision, change in place and are copied: as many however long the prompt is.
    whole = 2 * 8192 * 2 * 32 * 2 * 4 if "kivi" in recipe else sum(own.values())
    assert fresh < 0.05 * whole and len(own.keys() & held.keys()) >= 4


def test_recent_queries_are_those_of_one_long_read() -> None:
    model, ids = build("qwen3"), prompt(40)
    from workbench.runs.reference import QueryRecorder

    whole, recorder = cache_for(model, "full", 40), QueryRecorder(16)
    whole.probes.append(recorder)
    feed(model, whole, ids)
    parts, first = cache_for(model, "full", 30), QueryRecorder(16)
    parts.probes.append(first)
    feed(model, parts, ids[:30])
    recent = RecentQueries(first.take(), 16)
    parts.probes[:] = [recent]
    for token in ids[30:]:
        feed(model, parts, [token])
    for ours, theirs in zip(recent.take(), recorder.take(), strict=True):
        assert ours.start == theirs.start == 24 and torch.allclose(ours.q, theirs.q, atol=1e-4)
