"""The closer looks: what each shows is what the core measured, and picking in one leads to the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import tests.apps.stand_in  # noqa: F401  (makes the app importable)
from tests.apps.stand_in import settle
from workbench.inspection.overlap import held_masks, jaccard, overlap
from workbench.inspection.scores import curve, fate
from workbench.runs.replay import finish, retained, scored
from workbench_app.heads import Heads
from workbench_app.state import UIState
from workbench_app.views.closer import CLOSED, LOOKS, Closer

Open = Callable[[str], Any]


@pytest.fixture
def closer(session: Any) -> Iterator[Closer]:
    state = UIState()
    made = Closer(session, state, lambda: None)
    session.watchers.append(lambda change: made.refresh())
    state.turn_to(session.lanes[1].key)
    yield made


@pytest.fixture
def opened(session: Any, closer: Closer) -> Open:
    def open_(name: str) -> Any:
        closer.picker.value = name
        settle(session)
        return closer.open

    return open_


def held_of(lane: Any, session: Any) -> Any:
    return held_masks(lane.kept, len(session.texts))


def log_of(session: Any) -> Any:
    model, lane = session.model, session.lanes[1]
    return finish(scored(model, model.encode(session.ask.text), lane.result.resolved))[0]


def test_nothing_is_built_or_measured_before_it_is_chosen(session: Any, closer: Closer) -> None:
    closer.refresh()
    assert closer.open is None and not closer._looks and session.runner.idle and not session.findings._known
    closer.picker.value = "Budgets"
    closer.picker.value = CLOSED
    assert closer.open is None and list(closer._place) == [] and set(closer._looks) == {"Budgets"}
    assert session.runner.idle  # budgets are known without measuring


def test_budget_bars_are_the_kept_counts(session: Any, closer: Closer, opened: Open) -> None:
    session.set_recipe(session.lanes[1].key, "adakv(budget=0.25)")
    settle(session)
    look = opened("Budgets")
    kept, tokens = session.lanes[1].kept, len(session.texts)
    plot = look._pane.object
    bars = plot.renderers[1].data_source.data
    np.testing.assert_array_equal(bars["right"] - bars["left"], [len(head) for layer in kept for head in layer])
    assert plot.renderers[0].glyph.right == 2 * tokens and "prompt tokens" in plot.xaxis[0].axis_label
    assert f"{sum(len(h) for layer in kept for h in layer):,}" in look.lead.object
    plot.renderers[1].data_source.selected.indices = [3]
    assert (closer.state.layer, closer.state.head) == (1, 1)
    assert plot.renderers[1].data_source.selected.indices == []  # so that the same piece can be chosen again


def test_the_curve_is_that_of_the_recorded_scores(session: Any, closer: Closer, opened: Open) -> None:
    closer.state.param.update(layer=1, head=0)
    look = opened("Scores")
    expected = curve(log_of(session).layers[1][0], held_of(session.lanes[1], session)[1, 0])
    table = look.table()
    assert table["position"].tolist() == expected.positions.tolist()
    assert (table["state"] == "kept").tolist() == expected.kept.tolist()
    assert f"{expected.cut:.3g}" in look.lead.object and "L1 KV0" in look.lead.object
    marks = [r for r in look._pane.object.renderers if r.name is None and "state" in getattr(r.data_source, "data", {})]
    drawn = {r.data_source.data["state"][0]: r for r in marks if len(r.data_source.data["state"])}
    assert set(drawn) == {"protected", "kept", "dropped"}
    assert len({r.glyph.marker for r in drawn.values()}) == 3  # told apart by shape
    dropped = drawn["dropped"].data_source
    dropped.selected.indices = [0]
    assert closer.state.key == int(expected.positions[len(session.lanes[1].kept[1][0])])


@pytest.mark.parametrize("number", ["rank", "score"])
def test_why_a_token_was_dropped(session: Any, closer: Closer, opened: Open, number: str) -> None:
    closer.state.param.update(layer=1, head=0, key=20)
    look = opened("Why dropped?")
    look.number.value = number
    expected = fate(log_of(session), held_of(session.lanes[1], session), 20)
    grid = np.frombuffer(look.matrix.values, "<f4").reshape(2, 2)
    np.testing.assert_allclose(grid, expected.rank if number == "rank" else expected.score, rtol=1e-6)
    signs = np.frombuffer(look.matrix.signs, np.uint8).reshape(2, 2)
    np.testing.assert_array_equal(signs == 1, expected.kept)
    assert f"{int(expected.kept.sum())} of 4" in look.lead.object and "prompt token 20" in look.lead.object
    assert f"rank {int(expected.rank[1, 0]):,} of" in look._note.object
    look.matrix.selected = {"n": 1, "layer": 0, "head": 1}
    assert (closer.state.layer, closer.state.head) == (0, 1)
    for wrong in ("x", "-1", str(len(session.texts))):
        look.token.value = wrong
        assert closer.state.key == 20 and look.token.value == "20"
    look.token.value = "3"
    assert closer.state.key == 3 and "prompt token 3" in look.lead.object


def test_the_token_shown_first_is_no_choice_of_a_person(session: Any, closer: Closer, opened: Open) -> None:
    look = opened("Why dropped?")
    assert closer.state.key is None and look.token.value == str(session.lanes[1].why.lost[0].position)


def test_a_picked_token_leads_to_the_strip(session: Any, closer: Closer, opened: Open) -> None:
    heads = Heads(session, closer.state)
    heads.refresh()
    opened("Scores")
    closer.state.key = 17
    assert heads.strip.picked == 17
    before = heads.strip.reveal
    heads.reveal()
    assert heads.strip.reveal == before + 1


def test_overlap_of_all_lanes_and_of_a_head(session: Any, closer: Closer, opened: Open) -> None:
    closer.state.param.update(layer=1, head=1)
    look = opened("Overlap")
    kept = [held_of(lane, session) for lane in session.lanes]
    table = look.table()
    np.testing.assert_allclose(table[["Ref", "A", "B"]][:3], overlap(kept).round(4))
    np.testing.assert_allclose(table[["Ref", "A", "B"]][3:], overlap(kept, (1, 1)).round(4))
    look.other.value = "Ref"
    grid = np.frombuffer(look.matrix.values, "<f4").reshape(2, 2)
    np.testing.assert_allclose(grid, jaccard(kept[1], kept[0]), rtol=1e-6)
    assert "<table" in look._tables.object and "L1 KV1" in look._tables.object


def test_retained_attention_of_every_lane(session: Any, closer: Closer, opened: Open) -> None:
    look = opened("Retained attention")
    model, ask = session.model, session.ask
    results = [lane.result for lane in session.lanes]
    question = model.encode(ask.asked_later, continues=True)
    expected = finish(retained(model, session.reference_trace(), model.encode(ask.text), results, question))
    lowest = expected[1].unflatten(-1, (2, 2)).amin(-1).numpy()
    grid = np.frombuffer(look.matrix.values, "<f4").reshape(2, 2)
    np.testing.assert_allclose(grid, lowest.mean(0), rtol=1e-5)
    closer.state.query = 2
    np.testing.assert_allclose(np.frombuffer(look.matrix.values, "<f4").reshape(2, 2), lowest[2], rtol=1e-5)
    assert "at token 2" in look.matrix.metric and look.matrix.unit == "%"
    closer.state.lane = session.lanes[2].key
    assert "holds everything" in look.lead.object  # kivi drops nothing


@pytest.mark.parametrize("name", [name for name in LOOKS])
def test_every_look_says_why_it_is_empty(session: Any, closer: Closer, opened: Open, name: str) -> None:
    closer.state.lane = session.lanes[0].key
    look = opened(name)
    assert look.lead.object and "None" not in look.lead.object
    if name == "Scores":
        assert "keeps every token" in look.lead.object and not look._pane.visible
    session.lanes[0].kept = []
    look.refresh()
    assert ("Run the lanes" in look.lead.object and look.table() is None) or name != "Scores"


def test_a_strategy_without_one_score_per_token_says_so(session: Any, closer: Closer, opened: Open) -> None:
    session.set_recipe(session.lanes[1].key, "keydiff(budget=0.25, block=16)")
    settle(session)
    assert "does not choose by one score" in opened("Scores").lead.object
    closer.state.key = 20
    look = opened("Why dropped?")
    assert np.isnan(np.frombuffer(look.matrix.values, "<f4")).all()
    held = [20 in head for layer in session.lanes[1].kept for head in layer]
    assert (np.frombuffer(look.matrix.signs, np.uint8) == 1).tolist() == held
    assert "not by one score" in look._note.object


def test_a_changed_lane_is_measured_again_and_a_known_one_is_not(session: Any, closer: Closer, opened: Open) -> None:
    look = opened("Scores")
    first = look.table()
    assert len(session.findings._known) == 1
    session.set_recipe(session.lanes[1].key, "knorm(budget=0.5)")
    assert look.table().equals(first)  # the old result is on show until the new one comes, and so is its curve
    settle(session)
    assert len(session.findings._known) == 2 and not look.table().equals(first)
    session.undo()
    assert session.runner.idle and look.table().equals(first)


def test_what_is_stopped_is_measured_when_a_person_comes_back(session: Any, closer: Closer) -> None:
    session.findings._stopped = True
    closer.picker.value = "Budgets"  # turning to a view forgets that
    session.findings._under_way["x"] = "Measuring…"
    session.stop()
    assert session.findings._stopped and not session.findings.busy
    closer.open.session.findings.scores(session.lanes[1])
    assert session.runner.idle
    assert "Stopped" in session.findings.said("scores", session.lanes[1])
    closer.picker.value = "Scores"
    settle(session)
    assert closer.open.table() is not None


def test_a_failure_is_one_sentence(session: Any, closer: Closer, opened: Open, monkeypatch: Any) -> None:
    import workbench as wb
    from workbench_app import findings

    def broken(*args: Any, **options: Any) -> Any:
        raise wb.WorkbenchError("It is full; use a shorter prompt.")
        yield

    monkeypatch.setattr(findings, "scored", broken)
    assert "It is full; use a shorter prompt." in opened("Scores").lead.object
    assert not session.findings.busy


@pytest.mark.parametrize("name", [name for name in LOOKS])
def test_the_numbers_are_there_as_a_table(session: Any, closer: Closer, opened: Open, name: str) -> None:
    closer.table_switch.value = True
    look = opened(name)
    (table,) = closer._table
    assert table.value.equals(look.table()) and len(table.value) > 0
    closer.table_switch.value = False
    assert list(closer._table) == []


def test_fewer_tokens_for_later_layers(session: Any, closer: Closer, opened: Open) -> None:
    lane, total = session.lanes[1], len(session.texts)
    assert "every layer processed all" in opened("Tokens processed").lead.object
    session.set_recipe(lane.key, "fastkv(budget=0.1, tsp_rate=0.25, tsp_layer=0)")
    settle(session)
    given = lane.result.tokens_by_layer
    assert given == [total, total // 4]
    look = opened("Tokens processed")
    assert look.table()["tokens processed"].tolist() == given
    bars = look._pane.object.renderers[1].data_source.data
    assert (bars["right"] - bars["left"]).tolist() == given
    assert f"from L1 on, layers processed <b>{total // 4:,}</b>" in look.lead.object


def test_a_layer_that_keeps_all_it_was_given_says_so(session: Any, closer: Closer, opened: Open) -> None:
    session.set_recipe(session.lanes[1].key, "fastkv(budget=0.25, tsp_rate=0.25, tsp_layer=0)")
    settle(session)
    closer.state.param.update(layer=1, head=0)
    total = len(session.texts)
    assert f"gave L1 only {total // 4:,} of {total:,} tokens and keeps them all" in opened("Scores").lead.object
    closer.state.key = next(p for p in range(total) if p not in session.lanes[1].kept[1][0])
    assert f"it stayed behind; L1 was given {total // 4:,} of {total:,} tokens" in opened("Why dropped?")._note.object
