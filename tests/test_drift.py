"""Drift and its explanation: the card's worked examples, and what must be zero."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.builders import build, cache_for, prompt
from workbench.cache.layer import WorkbenchLayer
from workbench.cache.segments import Query
from workbench.inspection.drift import read_error, stored_cosine
from workbench.inspection.storage import common_entries
from workbench.inspection.why import reference_attention
from workbench.runs.decode import kl_divergence

# Card kv-drift, oracle A: d = 2, four tokens.
Q = torch.tensor([[[[math.sqrt(2), 0.0]]]])
KEYS = torch.tensor([[math.log(4), 0], [math.log(3), 1], [math.log(2), 0], [0, 1.0]])
VALUES = torch.tensor([[1.0, 0], [0, 1], [2, 0], [0, 4]])


def layer_of(k: Tensor, v: Tensor) -> WorkbenchLayer:
    """A layer holding k, v [n, D] in both KV heads."""
    layer = cache_for(build(), "full", len(k)).layers[0]
    layer.update(k.expand(1, 2, -1, -1).clone(), v.expand(1, 2, -1, -1).clone())
    return layer


def query(sinks: Tensor | None = None, window: int | None = None) -> Query:
    return Query(Q.expand(1, 4, 1, 2), 3, False, 2**-0.5, window, sinks=sinks)


def evicted(layer: WorkbenchLayer, kept: list[int]) -> WorkbenchLayer:
    twin = layer.clone(layer.cache)
    twin.store.keep(torch.tensor(kept).expand(1, 2, -1))
    return twin


def test_card_a_the_reference_reads_04_03_02_01() -> None:
    weights, at = reference_attention(layer_of(KEYS, VALUES), query(), 0)
    torch.testing.assert_close(weights, torch.tensor([[0.4, 0.3, 0.2, 0.1]]).expand(2, 4), atol=1e-6, rtol=0)
    assert at.tolist() == [0, 1, 2, 3]


def test_card_a_output_error_of_keeping_two_tokens() -> None:
    reference = layer_of(KEYS, VALUES)
    lane = evicted(reference, [0, 1])
    torch.testing.assert_close(reference.store.attend(query())[0, 0, 0], torch.tensor([0.8, 0.7]), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        lane.store.attend(query())[0, 0, 0], torch.tensor([0.571429, 0.428571]), atol=1e-6, rtol=0
    )
    assert read_error(reference, lane, query()) == pytest.approx([0.333815] * 2, abs=1e-5)


def test_card_b_a_shift_of_all_keys_changes_nothing_that_is_read() -> None:
    reference, lane = layer_of(KEYS, VALUES), layer_of(KEYS + torch.tensor([3.0, -5.0]), VALUES)
    assert read_error(reference, lane, query()) == pytest.approx([0.0] * 2, abs=1e-6)
    assert stored_cosine(reference, lane, 0)[0] < 0.9


def test_card_c_and_d_cosines() -> None:
    turned = [torch.tensor([[math.cos(p), math.sin(p)]]) for p in (3, 5)]
    key, value = stored_cosine(
        layer_of(turned[0], torch.tensor([[3.0, 4]])), layer_of(turned[1], torch.tensor([[3.0, 0]])), 0
    )
    assert (key, value) == pytest.approx((-0.416147, 0.6), abs=1e-6)


def test_evicted_tokens_are_no_part_of_the_cosine() -> None:
    reference = layer_of(KEYS, VALUES)
    assert stored_cosine(reference, evicted(reference, [1, 3]), 0) == pytest.approx((1.0, 1.0), abs=1e-6)


def test_common_entries_finds_positions_in_any_order() -> None:
    theirs, ours = common_entries(torch.tensor([5, 1, 9, 3]), torch.tensor([9, 4, 1, 10]))
    assert (theirs.tolist(), ours.tolist()) == ([2, 1], [0, 2])
    assert [x.tolist() for x in common_entries(torch.tensor([], dtype=torch.int32), torch.tensor([1]))] == [[], []]


def test_sinks_take_their_share_of_what_is_read() -> None:
    sinks = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    reference = layer_of(KEYS, VALUES)
    weights = torch.cat([reference_attention(reference, query(sinks), row)[0] for row in range(2)])
    # exp(logits) = 4, 3, 2, 1: the sum 10 shares the mass with exp(sink).
    torch.testing.assert_close(weights.sum(-1), 10 / (10 + sinks.exp()), atol=1e-6, rtol=0)
    out = reference.store.attend(query(sinks))[0, :, 0]
    torch.testing.assert_close(out, torch.tensor([0.8, 0.7]) * weights.sum(-1, keepdim=True), atol=1e-6, rtol=0)


def test_a_windows_query_reads_only_its_window() -> None:
    weights, _ = reference_attention(layer_of(KEYS, VALUES), query(window=2), 0)
    torch.testing.assert_close(weights[0], torch.tensor([0, 0, 2 / 3, 1 / 3]), atol=1e-6, rtol=0)


def test_card_kl() -> None:
    reference, lane = (torch.tensor(x).log_softmax(-1) for x in ([3.0, 1.0, 0.0], [2.0, 2.5, 0.0]))
    assert kl_divergence(reference, lane) == pytest.approx(0.526565, abs=1e-6)
    assert kl_divergence(reference, reference) == 0.0
    masked = torch.tensor([0.0, 0.0, -torch.inf]).log_softmax(-1)
    assert kl_divergence(masked, masked) == 0.0 and kl_divergence(reference, masked) == math.inf
    assert math.isnan(kl_divergence(reference, torch.full((3,), math.nan)))


def test_nothing_drifts_at_a_budget_of_everything_and_more_at_a_smaller_one() -> None:
    cmp = wb.compare(
        build(), prompt(60), ["full", "snapkv(budget=1.0)", "knorm(budget=30)", "knorm(budget=5)"], max_new_tokens=2
    )
    for name in ("key_cosine", "value_cosine"):
        assert all(x == pytest.approx(1.0, abs=1e-6) for lane in cmp for row in lane.drift[name] for x in row)
    errors = [sum(sum(row) for row in lane.drift["output_relative_l2"]) for lane in cmp]
    assert errors[0] == errors[1] == 0.0 < errors[2] < errors[3]


def test_codes_drift_less_with_more_bits() -> None:
    recipes = [f"kivi(bits={bits}, group_size=16, residual_length=16)" for bits in (8, 4, 2)]
    cmp = wb.compare(build(), prompt(64), ["full", *recipes], max_new_tokens=1)
    keys = [min(min(row) for row in lane.drift["key_cosine"]) for lane in cmp]
    assert keys == sorted(keys, reverse=True) and keys[1] > 0.999 > keys[3] > 0.5


def test_why_names_the_tokens_that_were_read_and_dropped() -> None:
    cmp = wb.compare(build(), prompt(60), ["full", "streaming_llm(budget=10, sinks=2)"], max_new_tokens=4)
    why = cmp.why(1, token=0)
    assert why is not None
    kept = {0, 1, *range(52, 60)}
    assert why.lost and all(lost.position not in kept and lost.heads == 6 for lost in why.lost)
    assert [lost.mass for lost in why.lost] == sorted((lost.mass for lost in why.lost), reverse=True)
    trace, layer = cmp._trace, 1
    weights, at = reference_attention(trace.cache.layers[layer], trace.answers[0].queries(0)[layer], 1)
    dropped = torch.tensor([p not in kept for p in at.tolist()])
    assert why.lost_mass[layer][1] == pytest.approx(weights[:, dropped].sum(-1).max().item(), abs=1e-6)
    assert why.read[layer][1][0][1] == pytest.approx(weights.max().item(), abs=1e-6)
    assert cmp.why(0) is None and cmp.why(1, token=99) is None


def test_why_after_a_question_uses_the_questions_own_query_on_sliding_layers() -> None:
    model = build("mistral-sliding")
    trace = wb.compare(model, prompt(30), ["full"], question=None, max_new_tokens=6)._trace
    layer, asked = trace.cache.layers[0], trace.answers[0].queries(5)[0]
    assert asked.stop == 35  # five tokens were generated since
    out = layer.store.attend(Query(asked.q, asked.start, False, asked.scale, asked.window))
    k, v, at = layer.store.entries(0)
    visible = at > asked.start - 8
    logits = asked.q[0, :2, -1] @ k[visible].T * asked.scale
    torch.testing.assert_close(out[0, :2, 0], logits.softmax(-1) @ v[visible], atol=1e-5, rtol=1e-4)
