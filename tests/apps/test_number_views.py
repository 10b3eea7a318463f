"""The looks at what quantization does: bytes by kind, equal bytes, errors and precision show what the core measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import tests.apps.stand_in  # noqa: F401  (makes the app importable)
from tests.apps.stand_in import settle
from workbench.inspection.numbers import CODED, GONE, PLAIN, RESIDUAL
from workbench.runs.replay import finish, numbers
from workbench_app.state import UIState
from workbench_app.views.closer import Closer
from workbench_app.views.precision import mean_of, residual

Open = Callable[[str], Any]
A, B = 1, 2  # snapkv and kivi


@pytest.fixture
def closer(session: Any) -> Iterator[Closer]:
    state = UIState()
    made = Closer(session, state, lambda: None)
    session.watchers.append(lambda change: made.refresh())
    state.turn_to(session.lanes[B].key, layer=1, head=0)
    yield made


@pytest.fixture
def opened(session: Any, closer: Closer) -> Open:
    def open_(name: str) -> Any:
        closer.picker.value = name
        settle(session)
        return closer.open

    return open_


def measured(session: Any, lane: int) -> Any:
    model = session.model
    trace = session.reference_trace()
    return finish(numbers(model, trace.cache, model.encode(session.ask.text), session.lanes[lane].result.resolved))


def image_of(pane: Any) -> Any:
    return next(r for r in pane.object.renderers if r.glyph.__class__.__name__ == "Image").data_source.data["image"][0]


@pytest.mark.parametrize("side", ["keys", "values"])
def test_the_maps_are_the_measured_numbers(session: Any, closer: Closer, opened: Open, side: str) -> None:
    look = opened("Quantization error")
    look.side.value = side
    expected = measured(session, B)
    data = getattr(expected.layers[1], side)
    np.testing.assert_allclose(image_of(look._panes[0]).T, data.size[0], rtol=1e-5)
    np.testing.assert_allclose(image_of(look._panes[1]).T, data.error[0], rtol=1e-5)
    grid = np.frombuffer(look.matrix.values, "<f4").reshape(2, 2)
    np.testing.assert_allclose(grid, [getattr(layer, side).relative for layer in expected.layers], rtol=1e-5)
    assert f"its {side} are off by" in look.lead.object and "L1 KV0" in look.lead.object
    assert not look.turned.visible
    look.matrix.selected = {"n": 1, "layer": 0, "head": 1}
    assert (closer.state.layer, closer.state.head) == (0, 1) and "L0 KV1" in look._titles[1].object


def test_what_a_lane_dropped_has_no_error(session: Any, closer: Closer, opened: Open) -> None:
    session.set_recipe(session.lanes[B].key, "snapkv(budget=0.5) | kivi(bits=2, group_size=16, residual_length=16)")
    settle(session)
    look = opened("Quantization error")
    step = measured(session, B).layers[1].keys.step[0]
    kept = np.zeros(len(session.texts) + -len(session.texts) % step, bool)
    kept[session.lanes[B].kept[1][0]] = True
    held = kept.reshape(-1, step).any(1)
    np.testing.assert_array_equal(~np.isnan(image_of(look._panes[1]).T).all(1), held)
    assert "Hatched: not held" in look._note.object and not np.isnan(image_of(look._panes[0])).any()
    (ordinary,) = [r for r in look._panes[1].object.renderers if r.glyph.__class__.__name__ == "Quad"]
    assert ordinary.glyph.hatch_pattern == "/"


def test_a_lane_without_codes_says_so(session: Any, closer: Closer, opened: Open) -> None:
    closer.state.lane = session.lanes[A].key
    assert "every number as the reference has it" in opened("Quantization error").lead.object


def test_rotatekv_is_shown_before_and_after_its_rotation(session: Any, closer: Closer, opened: Open) -> None:
    session.set_recipe(session.lanes[B].key, 'rotatekv(bits=4, reorder="none")')
    settle(session)
    look = opened("Quantization error")
    before = image_of(look._panes[0]).copy()
    assert look.turned.visible
    look.turned.value = look.turned.options[1]
    data = measured(session, B).layers[1].keys
    np.testing.assert_allclose(image_of(look._panes[0]).T, data.rotated[0][0], rtol=1e-5)
    assert before.shape != image_of(look._panes[0]).shape and "rotated, the largest key" in look.lead.object
    assert look._panes[0].object.y_range.end == 64


def test_the_strip_shows_the_residual_of_each_side(session: Any, closer: Closer, opened: Open) -> None:
    look = opened("Packed or residual")
    layer = measured(session, B).layers[1]
    for row, data in zip(("keys", "values"), (layer.keys, layer.values), strict=True):
        packed = int((data.state[0] == CODED).sum())
        assert f"{row}: <b>{packed:,}</b> packed" in look.lead.object
    images = [r.data_source.data for r in look._pane.object.renderers if r.glyph.__class__.__name__ == "Image"]
    assert [data["side"] for data in images] == [["keys"], ["values"]]
    np.testing.assert_allclose(images[0]["bits"][0][0], layer.keys.bits[0].float(), rtol=1e-3)
    boxes = [r.data_source.data for r in look._pane.object.renderers if getattr(r.glyph, "hatch_pattern", None) == "."]
    for box, data in zip(boxes, (layer.keys, layer.values), strict=True):
        assert len(box["left"]) == 1  # the newest tokens, without a gap
        assert int(box["right"][0] - box["left"][0]) == int((data.state[0] == RESIDUAL).sum()) > 0
        assert int(box["right"][0]) == len(session.texts)
    assert not look._saliency.visible
    assert look.table()["keys"].tolist().count("packed") == int((layer.keys.state[0] == CODED).sum())


def test_mixed_precision_shows_its_saliency(session: Any, closer: Closer, opened: Open) -> None:
    session.set_recipe(session.lanes[B].key, "zipcache(bits=4, low_bits=2)")
    settle(session)
    look = opened("Packed or residual")
    found = measured(session, B)
    assert look._saliency.visible and look.lead.object.count("packed at") >= 4  # two precisions on two sides
    drawn = {r.glyph.marker: r.data_source.data["x"].tolist() for r in look._saliency.object.renderers}
    bits = found.layers[1].values.bits[0]
    assert drawn["square"] == (bits == bits.max()).nonzero().flatten().tolist()
    assert len(drawn["square"]) + len(drawn["circle"]) == len(session.texts) and drawn["x"] == []
    np.testing.assert_allclose(look.table()["saliency"].astype(float), found.saliency[1][0], rtol=6e-3)  # three digits


def test_helpers_of_the_strip() -> None:
    assert residual(np.array([CODED, RESIDUAL, GONE, RESIDUAL, RESIDUAL], np.uint8)) == ([1, 3], [2, 5])
    assert residual(np.array([CODED, GONE, PLAIN])) == ([], [])
    got = mean_of(np.array([2.0, np.nan, np.nan, np.nan, 4.0]), 2)
    np.testing.assert_array_equal(got, [2.0, np.nan, 4.0])


def test_bytes_by_kind_are_the_measured_ones(session: Any, closer: Closer, opened: Open) -> None:
    look = opened("Bytes by kind")
    table, tokens = look.table(), len(session.texts)
    for n, lane in enumerate(session.lanes):
        for kind, size in lane.memory.by_kind.items():
            assert table[f"{kind}, B/token"][n] == pytest.approx(size / tokens, abs=0.06)
        assert table["all, B/token"][n] == pytest.approx(lane.memory.used_bytes / tokens, abs=0.06)
    assert table["bits of a number"][0] == "32.00"
    assert "no budget to search" in look._words.object and not look.match.visible
    bars = [
        r for r in look._pane.object.renderers if r.glyph.__class__.__name__ == "Quad" and "kind" in r.data_source.data
    ]
    width = sum((r.data_source.data["right"] - r.data_source.data["left"])[A] for r in bars)
    assert width == pytest.approx(session.lanes[A].memory.used_bytes / tokens)
    bars[0].data_source.selected.indices = [A]
    assert closer.state.lane == session.lanes[A].key and look.match.visible


def test_a_lane_is_brought_to_anothers_bytes(session: Any, closer: Closer, opened: Open) -> None:
    lane, other = session.lanes[A], session.lanes[B]
    session.set_recipe(other.key, "kivi(bits=4, group_size=16, residual_length=16)")
    settle(session)
    closer.state.lane = lane.key
    look = opened("Bytes by kind")
    look.target.value = other.key
    look._start()
    assert "Searching" in look._said.object or "Measuring" in look._said.object
    settle(session)
    assert abs(lane.memory.used_bytes / other.memory.used_bytes - 1) <= 0.02
    assert lane.recipe.startswith("snapkv(budget=0.") and lane.recipe != "snapkv(budget=0.25)"
    assert "Found in" in look._said.object and "Lane B" in look._said.object
    session.set_recipe(lane.key, "snapkv(budget=0.9)")
    settle(session)
    assert "Found in" not in look._said.object


def test_a_search_is_stopped_or_fails_in_words(session: Any, closer: Closer, opened: Open) -> None:
    lane = session.lanes[A]
    closer.state.lane = lane.key
    look = opened("Bytes by kind")
    session.lanes[0].memory.used_bytes *= 1000
    look.target.value = session.lanes[0].key
    look._start()
    settle(session)
    assert "cannot hold" in look._said.object and lane.recipe == "snapkv(budget=0.25)"
    session.lanes[0].memory.used_bytes //= 2000
    look._start()
    session.stop()
    settle(session)
    look.refresh()
    assert "stopped" in look._said.object and lane.recipe == "snapkv(budget=0.25)"


def test_the_timing_line_names_the_path(session: Any) -> None:
    from workbench_app.lane_view import facts

    decoding = [next(fact for fact in facts(lane, False) if "decoding" in fact) for lane in session.lanes]
    assert decoding[0].endswith("decoding") and decoding[A].endswith("decoding")  # they hold no codes
    lane = session.lanes[B]
    assert lane.result.decode_paths in (["fused"], ["dequantize"])
    assert decoding[B].endswith("(fused)" if lane.result.decode_paths == ["fused"] else "(dequantize-then-attend)")
