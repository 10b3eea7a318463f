"""Looking closer at a lane: scores and cuts, overlap of kept sets, retained attention mass. By hand, by law, by brute force."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.builders import build, plain, prompt
from workbench.inspection.overlap import held_masks, jaccard, overlap
from workbench.inspection.retained import lowest_of_group, mass_on
from workbench.inspection.scores import ScoreLog, curve, fate, thinned
from workbench.runs.control import Control
from workbench.runs.prompt import Cancelled, take_snapshot
from workbench.runs.replay import finish, scored
from workbench.strategies.registry import registry

INF, NAN = math.inf, math.nan
EVICTION = [k for k, cls in sorted(registry().items()) if cls.family == "eviction" and k != "think"]
FROM_A_SNAPSHOT = [k for k in EVICTION if not (registry()[k]().needs_prompt or registry()[k]().needs_token_set)]
BY_STAGES = ("chunkkv", "critical")  # what they keep is not simply the best by the score
T = 90


def recipe_of(key: str) -> str:
    return f"{key}(budget=0.3)"


# -- scores --------------------------------------------------------------------------------------------------------


def mask(*held: int, tokens: int = 6) -> Tensor:
    return held_masks([[held]], tokens)[0, 0]


def test_a_curve_by_hand() -> None:
    row = torch.tensor([INF, 3.0, 1.0, 2.0, NAN, 2.0])
    found = curve(row, mask(0, 1, 4, 5))
    assert found.positions.tolist() == [0, 1, 5, 3, 2]  # of the two with score 2 the later one first
    assert found.kept.tolist() == [True, True, True, False, False]
    assert (found.protected, found.unscored, found.cut, found.by_rank) == (1, 1, 2.0, True)
    assert curve(row, mask(0)).cut is None
    assert not curve(row, mask(0, 3)).by_rank


def test_the_fate_of_a_token_by_hand() -> None:
    log = ScoreLog(2, 4)
    log.on_scores(0, 0, torch.tensor([[[4.0, 1.0, 3.0, INF], [2.0, 2.0, 2.0, 2.0]]]), torch.arange(4).expand(1, 2, 4))
    kept = [[[0, 3], [2, 3]], [[0, 1, 2, 3], [1]]]
    found = fate(log, held_masks(kept, 4), 2)
    assert found.kept.tolist() == [[False, True], [True, False]]
    assert found.rank.tolist() == [[3, 2], [0, 0]]
    assert found.scored.tolist() == [[4, 4], [0, 0]]
    assert found.held.tolist() == [[2, 2], [4, 1]]
    assert found.cut[0].tolist() == [4.0, 2.0] and bool(found.cut[1].isnan().all())
    assert found.score[0].tolist() == [3.0, 2.0] and bool(found.score[1].isnan().all())


def test_a_token_dropped_early_keeps_its_score_and_another_part_starts_anew() -> None:
    log = ScoreLog(1, 4)
    log.on_scores(0, 0, torch.tensor([[[1.0, 5.0, 2.0]]]), torch.tensor([[[0, 1, 2]]]))
    log.on_scores(0, 0, torch.tensor([[[6.0, 7.0]]]), torch.tensor([[[1, 3]]]))
    assert log.layers[0].tolist() == [[1.0, 6.0, 2.0, 7.0]]
    log.on_scores(0, 1, torch.tensor([[[9.0]]]), torch.tensor([[[3]]]))
    torch.testing.assert_close(log.layers[0], torch.tensor([[NAN, NAN, NAN, 9.0]]), equal_nan=True)


@pytest.mark.parametrize("key", EVICTION)
def test_recorded_scores_are_those_the_lane_chose_by(key: str) -> None:
    model, ids = build(), prompt(T)
    lane = wb.compare(model, ids, ["full", recipe_of(key)], max_new_tokens=1, chunk=40)[1]
    log, cache = finish(scored(model, ids, lane.resolved, chunk=40))
    assert [[cache.kept(layer, head) for head in range(2)] for layer in range(3)] == lane.kept_positions
    competed = 0
    for rows, layer, given in zip(log.layers, lane.kept_positions, lane.tokens_by_layer, strict=True):
        if rows is None:
            assert all(len(head) == given for head in layer)  # nothing had to be chosen
            continue
        for row, kept in zip(rows, layer, strict=True):
            found = curve(row, mask(*kept, tokens=T))
            assert int(found.kept.sum()) + found.unscored == len(kept)
            assert found.by_rank or key in BY_STAGES
            competed += int((~found.kept).sum())
    assert competed > 0


@pytest.mark.parametrize("key", FROM_A_SNAPSHOT)
def test_a_snapshot_gives_the_same_scores(key: str) -> None:
    model, ids = build(), prompt(T)
    snapshot = finish(take_snapshot(model, ids, 2048, Control()))
    text = f"{recipe_of(key)} | kivi(group_size=16, residual_length=16)"
    if registry()[key]().keeps_acting:
        text = f"{key}(budget=0.3, recompress_every=0)"
    (fresh, _), (reused, _) = (finish(scored(model, ids, text, snapshot=held)) for held in (None, snapshot))
    for one, other in zip(fresh.layers, reused.layers, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    assert snapshot.cache.score_probe is None


@pytest.mark.parametrize("text", ["snapkv(budget=0.3)", 'adakv(scorer="critical", budget=0.3)', "h2o(budget=0.3)"])
def test_fate_and_curve_tell_the_same(text: str) -> None:
    model, ids = build(), prompt(T)
    log, cache = finish(scored(model, ids, text))
    held = held_masks([[cache.kept(layer, head) for head in range(2)] for layer in range(3)], T)
    for position in (0, 31, T - 1):
        found = fate(log, held, position)
        for layer in range(3):
            for head in range(2):
                row = curve(log.layers[layer][head], held[layer, head])
                place = row.positions.tolist().index(position)
                at = (layer, head)
                assert found.rank[at] == place + 1 and found.kept[at] == row.kept[place]
                assert found.score[at] == row.scores[place]
                assert row.cut is None or found.cut[at] == pytest.approx(row.cut)


def test_a_run_without_a_listener_notes_nothing_and_full_has_no_scores() -> None:
    log, _ = finish(scored(build(), prompt(T), "full"))
    assert log.layers == [None] * 3
    log, _ = finish(scored(build(), prompt(T), "snapkv(budget=1.0)"))
    assert log.layers == [None] * 3
    control = Control()
    control.cancel()
    with pytest.raises(Cancelled):
        finish(scored(build(), prompt(T), "snapkv()", control=control))


# -- overlap ----------------------------------------------------------------------------------------------------------

ONE = [[[0, 1], [2, 3]], [[0], []]]
TWO = [[[1, 2], [2, 3]], [[1], []]]


def test_overlap_by_hand() -> None:
    one, two = held_masks(ONE, 5), held_masks(TWO, 5)
    np.testing.assert_allclose(jaccard(one, two), [[1 / 3, 1.0], [0.0, NAN]])
    np.testing.assert_allclose(overlap([one, two]), [[1.0, 3 / 7], [3 / 7, 1.0]])
    np.testing.assert_allclose(overlap([one, two], at=(0, 0)), [[1.0, 1 / 3], [1 / 3, 1.0]])


def test_held_mask_leaves_out_what_came_after_the_prompt() -> None:
    assert held_masks([[[0, 2, 5], []]], 4).tolist() == [[[True, False, True, False], [False] * 4]]


# -- retained mass --------------------------------------------------------------------------------------------------


def test_card_a_keeping_two_tokens_retains_07() -> None:
    weights, held = torch.tensor([[0.4, 0.3, 0.2, 0.1]]), torch.tensor([True, True, False, False])
    assert mass_on(weights, torch.arange(4), held).tolist() == pytest.approx([0.7])
    assert mass_on(weights / 2, torch.arange(4), held).tolist() == pytest.approx([0.7])  # a sink took the other half
    assert mass_on(weights, torch.arange(4), held[:2]).tolist() == pytest.approx([1.0])  # the rest came later
    assert lowest_of_group(torch.tensor([[0.9, 0.5, 0.2, 0.7]]), 2).tolist() == [[0.5, pytest.approx(0.2)]]


def attention(name: str, ids: list[int]) -> list[Tensor]:
    """Per layer [Hq, T, T], as transformers computes it."""
    network: Any = plain(name)
    network.set_attn_implementation("eager")
    with torch.inference_mode():
        return [layer[0] for layer in network(torch.tensor([ids]), output_attentions=True).attentions]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("later", [0, 7])
def test_retained_mass_is_that_of_plain_attention(name: str, later: int) -> None:
    model, ids, asked = build(name), prompt(60), prompt(later, seed=3)
    recipes = ["full", "snapkv(budget=0.3, window=8)", "kivi(group_size=16, residual_length=16)"]
    options: dict[str, Any] = {"max_new_tokens": 6}
    if later:
        model.encode = lambda text, continues=False: asked if continues else text  # type: ignore[method-assign]
        options["question"] = "?"
    try:
        cmp = wb.compare(model, ids, recipes, **options)
        measured = [cmp.retained(lane) for lane in range(3)]
    finally:
        model.__dict__.pop("encode", None)
    tokens = [*ids, *asked, *cmp[0].tokens[:-1]]
    layers = attention(name, tokens)
    assert measured[1].shape == (6, 3, 4) and float(measured[1].min()) < 0.9
    for step in range(6):
        at = len(ids) + later - 1 + step
        for layer, weights in enumerate(layers):
            for head in range(4):
                held = torch.ones(at + 1, dtype=torch.bool)
                held[: len(ids)] = held_masks([[cmp[1].kept(layer, head // 2)]], len(ids))[0, 0]
                row = weights[head, at, : at + 1]
                expected = float(row[held].sum() / row.sum())
                assert float(measured[1][step, layer, head]) == pytest.approx(expected, abs=2e-5)
    for lane in (0, 2):
        torch.testing.assert_close(measured[lane], torch.ones(6, 3, 4), atol=1e-5, rtol=0)


def test_a_lane_that_goes_on_dropping_is_followed() -> None:
    ids, count = prompt(60), 18
    cmp = wb.compare(build(), ids, ["full", "streaming_llm(budget=18, sinks=4)"], max_new_tokens=8)
    measured = cmp.retained(1)
    layers = attention("llama", [*ids, *cmp[0].tokens[:-1]])
    for step in range(8):
        at = len(ids) - 1 + step  # the step attends before it drops: what it held, and its own entry
        held = torch.zeros(at + 1, dtype=torch.bool)
        held[:4] = True
        held[at + 1 - (count - 4) - (step > 0) :] = True
        for layer, weights in enumerate(layers):
            torch.testing.assert_close(
                measured[step, layer], weights[:, at, : at + 1][:, held].sum(-1), atol=2e-5, rtol=0
            )


def test_retained_mass_needs_a_reference_that_finished() -> None:
    cmp = wb.compare(build(), prompt(20), ["full", "knorm()"], max_new_tokens=2)
    cmp._trace = None
    with pytest.raises(wb.WorkbenchError, match="did not finish"):
        cmp.retained(1)


@pytest.mark.parametrize(
    "count, most, needed, expected",
    [(5, 10, [], [0, 1, 2, 3, 4]), (11, 3, [], [0, 5, 10]), (11, 3, [4, 99, -1], [0, 4, 5, 10]), (0, 3, [0], [])],
)
def test_thinned_keeps_the_ends_and_what_is_needed(
    count: int, most: int, needed: list[int], expected: list[int]
) -> None:
    assert thinned(count, most, needed).tolist() == expected
