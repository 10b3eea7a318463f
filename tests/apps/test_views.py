"""What is shown says what was measured: lanes, meters, heads, sentences; and news that reach the page in batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tests.apps.stand_in  # noqa: F401  (makes the app importable)
from tests.apps.stand_in import settle
from workbench_app import formats, summary
from workbench_app.heads import METRICS, Heads, share_over_heads, status_codes
from workbench_app.kl_chart import FLOOR, KLChart
from workbench_app.lane_view import differences, lane_data
from workbench_app.runner import Mailbox, Urgency
from workbench_app.state import UIState


def shown(session: Any, place: int) -> dict[str, Any]:
    return lane_data(session, session.lanes[place], None)


def test_tokens_that_differ_are_marked_and_the_first_one_twice(session: Any) -> None:
    for place, lane in enumerate(session.lanes):
        rows = shown(session, place)["tokens"]
        assert [row[0] for row in rows] == [formats.visible(text) for text in lane.texts]
        first = [i for i, row in enumerate(rows) if "first" in row[1].split()]
        at = None if place == 0 else lane.result.first_divergence
        assert first == ([] if at is None else [at])
        known = [i for i, row in enumerate(rows) if row[2] is not None]
        last = len(rows) - 1 if at is None else at
        assert known == ([] if place == 0 else list(range(last + 1)))
        assert all(rows[i][2] == lane.kl[i] for i in known)


@pytest.mark.parametrize(
    "ours, theirs, other", [([1, 2, 3], [1, 2, 3], set()), ([1, 9, 2, 3], [1, 2, 3], {1}), ([4, 5], [1, 2], {0, 1})]
)
def test_differences_are_those_of_the_common_text(ours: list[int], theirs: list[int], other: set[int]) -> None:
    assert differences(ours, theirs) == other


def test_the_meter_shows_measured_bytes_on_one_scale(session: Any) -> None:
    sizes = [lane.memory for lane in session.lanes]
    scale = max(max(m.peak_bytes, m.used_bytes + m.reserved_bytes) for m in sizes)
    for place, memory in enumerate(sizes):
        meter = shown(session, place)["meter"]
        assert sum(part["share"] for part in meter["parts"]) == pytest.approx(100 * memory.used_bytes / scale)
        assert meter["ghost"] == pytest.approx(100 * sizes[0].used_bytes / scale)
        assert meter["peak"] == pytest.approx(100 * memory.peak_bytes / scale)
        assert {part["words"].split()[0] for part in meter["parts"]} == {
            k for k, size in memory.by_kind.items() if size
        }
    assert shown(session, 1)["meter"]["nominal"] is not None and shown(session, 2)["meter"]["nominal"] is None
    assert {part["kind"] for part in shown(session, 2)["meter"]["parts"]} >= {"codes", "scales"}


def test_a_lane_says_what_it_does(session: Any) -> None:
    lane = session.lanes[1]
    assert "6 tokens" in shown(session, 1)["said"]
    lane.status, lane.done, lane.total = "reading", 20, 80
    assert (shown(session, 1)["said"], shown(session, 1)["progress"]) == ("reading the prompt: 20 of 80 tokens", 0.25)
    lane.done = 80
    assert "recomputing from token 80" in shown(session, 1)["said"]
    lane.status, lane.ahead = "queued", 2
    assert shown(session, 1)["said"] == "2 runs ahead on this device"
    lane.run += 1
    assert shown(session, 1)["stale"]


def test_status_codes_and_shares_by_hand() -> None:
    assert status_codes([0, 2, 5], 2, 6).tolist() == [2, 0, 2, 0, 0, 1]
    assert share_over_heads([[[0, 1], [1]], [[1, 2], [0]]], 4).tolist() == [0.5, 0.75, 0.25, 0.0]


def test_the_matrix_shows_every_number_of_every_lane(session: Any) -> None:
    heads = Heads(session, UIState())
    layers, kv = session.model.geometry.num_layers, session.model.geometry.num_kv_heads
    for lane in session.lanes:
        heads.state.lane = lane.key
        for metric in METRICS:
            heads.metric.value = metric.name
            heads.refresh()
            grid = np.frombuffer(heads.matrix.values, "<f4").reshape(layers, kv)
            if metric.name == "kept share":
                expected = [[len(head) / len(session.texts) for head in layer] for layer in lane.kept]
                np.testing.assert_allclose(grid, expected, rtol=1e-6)
            elif metric.name == "bytes":
                assert grid.sum() == pytest.approx(sum(map(sum, lane.memory.by_head)))
            elif metric.name == "lost attention" and lane.why is None:
                assert np.isnan(grid).all()


def test_a_head_opens_its_tokens(session: Any) -> None:
    heads = Heads(session, UIState())
    lane = session.lanes[1]
    heads.state.lane = lane.key
    heads.matrix.selected = {"n": 1, "layer": 1, "head": 0}
    codes = np.frombuffer(heads.strip.status, np.uint8)
    assert codes.nonzero()[0].tolist() == lane.kept[1][0]
    assert heads.strip.tokens.split("\0") == session.texts
    assert "L1 KV0" in heads.strip.title and "attention for token 0" in heads.strip.title
    score = np.frombuffer(heads.strip.score, "<f4")
    assert len(score) == len(session.texts) and np.nansum(score) > 0
    heads.table_switch.value = True
    rows = heads._tables[1].value
    assert (rows["state"] == "kept").sum() == len(lane.kept[1][0])


def test_the_sentences_come_from_the_results(session: Any) -> None:
    lead = summary.lead(session)
    for place, lane in enumerate(session.lanes[1:], start=1):
        sentence = summary.lane_sentence(session, lane)
        assert sentence in lead and f"Lane {formats.look(place).letter}" in sentence
        assert formats.percent(lane.memory.ratio) in sentence
        if lane.result.first_divergence is None:
            assert "same answer" in sentence
        else:
            assert f"token {lane.result.first_divergence}" in sentence
    session.explain(session.lanes[1].key, 1)
    settle(session)
    why = summary.why_sentence(session, session.lanes[1])
    lost = session.lanes[1].why.lost[0]
    assert f"position {lost.position:,}" in why and f"{lost.heads} of 4" in why


def test_text_of_a_prompt_is_never_markup(session: Any) -> None:
    session.lanes[1].texts = ["<script>alert(1)</script>"] * len(session.lanes[1].texts)
    session.lanes[1].result.answers[0].text = "<img src=x>"
    assert "<script" not in summary.lead(session) and "<img" not in summary.lead(session)


def test_the_chart_has_a_line_per_lane_and_a_mark_where_it_breaks(session: Any) -> None:
    chart = KLChart()
    chart.refresh(session)
    for lane in session.lanes[1:]:
        line = chart._lines[lane.key]
        np.testing.assert_allclose(line["source"].data["y"], np.clip(lane.kl, FLOOR, None))
        first = lane.result.first_divergence
        assert line["first"].data["x"] == ([] if first is None else [first])


@pytest.mark.parametrize(
    "size, text", [(0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (300 * 1024, "300 KiB"), (5 * 2**30, "5.0 GiB")]
)
def test_bytes_text(size: int, text: str) -> None:
    assert formats.bytes_text(size) == text


def test_small_text_formats() -> None:
    assert (formats.percent(0.263), formats.percent(0.001), formats.percent(None)) == ("26 %", "< 0.5 %", "–")
    assert (formats.visible(" a\n"), formats.visible("")) == ("·a↵", "∅")
    assert formats.quoted("x" * 100).endswith("…”") and formats.quoted(" \n") == "nothing"
    assert (formats.seconds_text(0.0123), formats.seconds_text(2.34)) == ("12 ms", "2.3 s")
    assert (formats.nats(0.0), formats.nats(1.5), formats.nats(2e-5)) == ("0", "1.5", "2e-05")


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_lanes_are_told_apart_by_more_than_colour() -> None:
    looks = [formats.look(place) for place in range(5)]
    for ground in ("#FFFFFF", "#121212"):
        assert all(contrast(look.colour, ground) >= 3 for look in looks)
    for field in ("letter", "colour", "dash", "marker"):
        assert len({getattr(look, field) for look in looks}) == 5
    assert {formats.look(place).colour for place in range(5, 30)} == {formats.REFERENCE.colour}


def test_the_theme_is_readable() -> None:
    from workbench_app.looks import PRIMARY, PRIMARY_DARK

    assert contrast(PRIMARY, "#ffffff") >= 4.5 and contrast(PRIMARY_DARK, "#121212") >= 4.5


class Document:
    """Stands for Bokeh's: remembers the callbacks."""

    def __init__(self) -> None:
        self.next: list[Any] = []
        self.later: list[tuple[Any, int]] = []

    def add_next_tick_callback(self, act: Any) -> None:
        self.next.append(act)

    def add_timeout_callback(self, act: Any, milliseconds: int) -> None:
        self.later.append((act, milliseconds))


def test_news_reach_the_page_in_batches_and_urgent_ones_at_once() -> None:
    got: list[list[int]] = []
    document = Document()
    box = Mailbox(got.append, document)
    for i in range(5):
        box.post(i)
    assert len(document.next) == 1  # one callback for all of them
    document.next.pop()()
    assert got == [[0, 1, 2, 3, 4]]
    box.post(5)
    document.next.pop()()
    assert len(document.later) == 1 and 0 < document.later[0][1] <= 100  # too soon after the last
    box.post(6, Urgency.NOW)
    document.next.pop()()
    assert got[1:] == [[5, 6]]
    document.later.pop()[0]()
    assert got[1:] == [[5, 6]]  # nothing was left
    box.post(7, Urgency.LATER)
    assert not document.next  # goes with what comes next
    box.post(8, Urgency.NOW)
    document.next.pop()()
    assert got[2:] == [[7, 8]]
    box.pause()
    box.post(9, Urgency.NOW)
    box.drain()
    assert not document.next and got[3:] == []
    box.resume()
    assert got[3:] == [[9]]
    box.close()
    box.post(10)
    assert not document.next
