"""wb.drift: the worked examples of the card kv-drift, and the laws it names."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.builders import build, prompt
from workbench.errors import WorkbenchError
from workbench.inspection.drift_table import Drift
from workbench.inspection.reading import Reading, layer_error, read_drift
from workbench.inspection.storage import Status, centred, relative_frobenius, vector_drift
from workbench.models.rope import Ropes
from workbench.runs.control import Control

F64 = torch.float64
# Oracle A: d = 2, four tokens; the logits are q . k / sqrt(2).
Q = torch.tensor([[math.sqrt(2), 0.0]], dtype=F64)
KEYS = torch.tensor([[math.log(4), 0], [math.log(3), 1], [math.log(2), 0], [0, 1.0]], dtype=F64)
VALUES = torch.tensor([[1.0, 0], [0, 1], [2, 0], [0, 4]], dtype=F64)


def reading(k: Tensor, v: Tensor, at: list[int]) -> Reading:
    return Reading(Q @ k.T / math.sqrt(2), v, torch.tensor(at, dtype=torch.int32))


def card_a(kept: list[int]) -> dict[str, float]:
    found = read_drift(reading(KEYS, VALUES, [0, 1, 2, 3]), reading(KEYS[kept], VALUES[kept], kept))
    return {name: float(x[0]) for name, x in found.items()}


@pytest.mark.parametrize("kept", [[0, 1], [1, 0]])  # the order of the slots changes nothing
def test_card_a_eviction(kept: list[int]) -> None:
    found = card_a(kept)
    wanted = {
        "retained": 0.7,
        "output_relative_l2": 0.333815,
        "lost": 0.532152,
        "gain": 0.201583,
        "output_cosine": 0.997164,
        "total_variation": 0.3,
        "kl": 0.356675,
        "js": 0.117277,
        "beyond": 0.0,
        "logit_rms": 0.0,
        "changed": 0.0,
        "values_only": 0.0,
        "keys_only": 0.0,
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)
    assert found["kl"] == pytest.approx(-math.log(0.7), abs=1e-6)
    parts = [found[f"signed_{name}"] for name in ("lost", "gain", "changed")]
    assert sum(parts) == pytest.approx(found["output_relative_l2"], abs=1e-6)  # the split is exact
    assert parts[0] > 0 > parts[1]  # the two cancel partly


@pytest.mark.parametrize("kept", [[0], [3], [1, 2, 3], [0, 3], [0, 1, 2, 3]])
def test_pure_eviction_has_closed_forms(kept: list[int]) -> None:
    found = card_a(kept)
    m = sum((0.4, 0.3, 0.2, 0.1)[i] for i in kept)
    rest = (1 - m) * math.log(2) if m < 1 else 0.0
    js = 0.5 * (math.log(2 / (1 + m)) + m * math.log(2 * m / (1 + m)) + rest)
    assert found["retained"] == pytest.approx(m) and found["total_variation"] == pytest.approx(1 - m, abs=1e-6)
    assert found["kl"] == pytest.approx(-math.log(m), abs=1e-6) and found["js"] == pytest.approx(js, abs=1e-6)


def test_nothing_kept_is_no_infinite_distance() -> None:
    found = card_a([])
    assert found["retained"] == 0.0 and found["total_variation"] == pytest.approx(1.0)
    assert found["beyond"] == 0.0 and found["js"] == pytest.approx(math.log(2))
    assert math.isnan(found["kl"]) and found["output_relative_l2"] == pytest.approx(1.0)
    assert all(not math.isinf(x) for x in found.values())


def test_tokens_only_the_lane_holds_are_told_and_make_nothing_infinite() -> None:
    found = read_drift(reading(KEYS[:2], VALUES[:2], [0, 1]), reading(KEYS, VALUES, [0, 1, 2, 3]))
    assert float(found["beyond"]) == pytest.approx(0.3) and float(found["retained"]) == pytest.approx(1.0)
    assert float(found["kl"]) == pytest.approx(0.0, abs=1e-6) and math.isfinite(float(found["js"]))


def test_card_b_a_shift_of_all_keys_is_storage_drift_alone() -> None:
    moved = KEYS + torch.tensor([3.0, -5.0], dtype=F64)
    assert relative_frobenius(KEYS, moved) == pytest.approx(4.924005, abs=1e-6)
    assert relative_frobenius(*centred(KEYS, moved)) == pytest.approx(0.0, abs=1e-12)
    found = read_drift(reading(KEYS, VALUES, [0, 1, 2, 3]), reading(moved, VALUES, [0, 1, 2, 3]))
    for name in ("output_relative_l2", "total_variation", "js", "kl", "logit_rms", "keys_only"):
        assert float(found[name]) == pytest.approx(0.0, abs=1e-7), name


def test_card_c_keys_are_compared_at_the_same_rotation() -> None:
    at = {p: torch.tensor([[math.cos(p), math.sin(p)]], dtype=F64) for p in (3, 5)}
    apart = vector_drift(at[3], at[5])
    assert (float(apart.cosine), float(apart.relative)) == pytest.approx((-0.416147, 1.682942), abs=1e-6)
    rope = Ropes(build().network)[0]
    key = torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(0))
    three, five = (rope.move(key, torch.zeros(1, dtype=torch.int64), torch.tensor([p])) for p in (3, 5))
    again = rope.move(three, torch.tensor([3]), torch.tensor([5]))
    turned = vector_drift(five[0, 0], again[0, 0])
    assert float(turned.cosine) == pytest.approx(1.0, abs=1e-6) and float(turned.relative) == pytest.approx(
        0.0, abs=1e-5
    )


def test_card_d_norms() -> None:
    found = vector_drift(torch.tensor([[3.0, 4]]), torch.tensor([[3.0, 0]]))
    assert (float(found.cosine), float(found.relative), float(found.norm_ratio)) == pytest.approx((0.6, 0.8, 0.6))


def test_a_short_reference_vector_does_not_blow_up_the_relative_error() -> None:
    reference = torch.tensor([[10.0, 0], [10, 0], [0.001, 0]])
    found = vector_drift(reference, reference + torch.tensor([0.0, 0.1]))
    assert found.relative.tolist() == pytest.approx([0.01, 0.01, 0.2])  # against 5 % of the median, 0.5
    both_nothing = vector_drift(torch.zeros(1, 2), torch.zeros(1, 2))
    assert (float(both_nothing.cosine), float(both_nothing.relative), float(both_nothing.norm_ratio)) == (1.0, 0.0, 1.0)


def test_the_values_and_the_keys_share_of_an_error() -> None:
    noisy_v = VALUES + torch.tensor([0.1, -0.2], dtype=F64)
    found = read_drift(reading(KEYS, VALUES, [0, 1, 2, 3]), reading(KEYS, noisy_v, [0, 1, 2, 3]))
    assert float(found["keys_only"]) == pytest.approx(0.0, abs=1e-7)
    assert float(found["values_only"]) == pytest.approx(float(found["output_relative_l2"]))
    assert float(found["changed"]) == pytest.approx(float(found["output_relative_l2"]))
    other_k = KEYS * 1.1
    found = read_drift(reading(KEYS, VALUES, [0, 1, 2, 3]), reading(other_k, VALUES, [0, 1, 2, 3]))
    assert float(found["keys_only"]) == pytest.approx(float(found["output_relative_l2"]))
    assert float(found["values_only"]) == 0.0 < min(float(found[x]) for x in ("logit_rms", "keys_only"))


def test_layer_error_by_hand() -> None:
    weight = torch.tensor([[[2.0], [0.0]], [[0.0], [1.0]]])  # [Hq 2, D 2, hidden 1]: 2 a0 + b1
    assert layer_error(torch.tensor([[1.0, 9], [9, 2]]), torch.tensor([[1.0, 0], [0, 3]]), weight) == pytest.approx(
        0.25, abs=1e-5
    )


# --- on a model -------------------------------------------------------------------------------------------------------
TOKENS = 60
LANES = ["full", "snapkv(budget=20, window=8)", "kivi(bits=4, group_size=16, residual_length=16)", "snapkv(budget=1.0)",
         "snapkv(budget=30, window=8) | kivi(bits=2, group_size=16, residual_length=16)", "h2o(budget=20)"]  # fmt: skip


@functools.cache
def compared() -> wb.compare:  # type: ignore[valid-type]
    return wb.compare(build(), prompt(TOKENS), LANES, max_new_tokens=6, chunk=16)


@functools.cache
def drifted(lane: int) -> Drift:
    return wb.drift(compared(), lane)


def test_the_reference_and_a_budget_of_everything_do_not_drift_beyond_the_floor() -> None:
    for lane in (0, 3):
        found = drifted(lane)
        assert found.floor is not None and bool((found.coverage == 1).all())
        for name in ("output_relative_l2", "total_variation", "kl", "lost", "gain", "changed"):
            for mode, floor in ((found.local, found.floor.local), (found.propagated, found.floor.propagated)):
                assert float(mode.values[name].max()) <= float(floor.values[name].max()) + 1e-6, name
        assert float(found.stored["value_relative"].max()) <= float(found.floor.stored["value_relative"].max()) + 1e-6
    assert 0 < float(drifted(0).floor.local.values["output_relative_l2"].max()) < 1e-4  # type: ignore[union-attr]


@pytest.mark.parametrize("lane", range(len(LANES)))
def test_laws(lane: int) -> None:
    found, cmp = drifted(lane), compared()
    steps, layers, heads = found.local.values["kl"].shape
    assert (steps, layers, heads) == (6, 3, 4) and found.status.shape == (3, 2, TOKENS)
    # Local and propagated are the same before anything was fed after the prompt: the prompt was read uncompressed.
    for name in ("output_relative_l2", "retained"):
        a, b = (x.values[name][0, 0] for x in (found.local, found.propagated))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    for name, x in found.local.values.items():
        assert not bool(x.isinf().any()), name
    evicted = found.status == Status.EVICTED
    torch.testing.assert_close(found.coverage + evicted.float().mean(-1), torch.ones(3, 2))
    assert torch.equal(found.stored["key_cosine"].isnan(), evicted)  # evicted is no number
    for layer in range(3):
        for head in range(2):
            held = (~evicted[layer, head]).nonzero().squeeze(-1).tolist()
            assert held == cmp[lane].kept(layer, head)
    split = sum(found.local.values[f"signed_{name}"] for name in ("lost", "gain", "changed"))
    torch.testing.assert_close(split, found.local.values["output_relative_l2"], atol=1e-5, rtol=1e-4)
    assert found.decoded_keys.shape == found.decoded_values.shape == (3, 2, 5)


def test_eviction_and_codes_drift_in_their_own_ways() -> None:
    evicted, coded, both = drifted(1), drifted(2), drifted(4)
    assert float(evicted.stored["key_relative"].nan_to_num(0).max()) < 1e-5  # what is kept is kept
    torch.testing.assert_close(
        evicted.local.values["kl"][0], -evicted.local.values["retained"][0].log(), atol=1e-4, rtol=1e-3
    )
    assert float(evicted.local.values["changed"][0].max()) < 1e-4 < float(evicted.local.values["lost"][0].max())
    assert bool((coded.coverage == 1).all()) and float(coded.local.values["lost"].max()) < 1e-6
    assert bool((coded.status == Status.QUANTIZED).any()) and bool((coded.status == Status.KEPT).any())
    packed = coded.status == Status.QUANTIZED
    assert bool((coded.stored["key_relative"][packed] > 0).all())
    exact = torch.minimum(coded.stored["key_relative"], coded.stored["value_relative"])[~packed]
    assert float(exact.max()) < 1e-5  # KIVI packs keys and values at different times
    assert bool((coded.frobenius["keys"] > 0).all())
    assert set(both.status.unique().tolist()) == {Status.EVICTED, Status.KEPT, Status.QUANTIZED}


def test_propagated_drift_adds_up_while_local_stays_by_layer() -> None:
    found = drifted(1)
    local, propagated = (x.values["output_relative_l2"][3:, 1:] for x in (found.local, found.propagated))
    assert float((local - propagated).abs().max()) > 1e-3
    # In layer 0 the lane sees the same embeddings in either mode.
    torch.testing.assert_close(
        found.local.values["output_relative_l2"][:, 0], found.propagated.values["output_relative_l2"][:, 0],
        atol=1e-5, rtol=1e-3,
    )  # fmt: skip
    assert float(found.decoded_keys[0].max()) < 1e-5 < float(found.decoded_keys[1:].max())
    errors = found.propagated.layer_error
    assert errors.shape == (6, 3) and bool((errors > 0).all())


def test_summaries_show_the_head_that_broke_and_what_is_gone() -> None:
    found = drifted(1)
    told = found.as_dict()
    assert told["coverage"]["p50"] == pytest.approx(20 / 60)
    assert told["status_counts"] == {"evicted": 3 * 2 * 40, "kept": 3 * 2 * 20, "quantized": 0, "out": 0}
    output = told["local"]["output_relative_l2"]
    assert (
        output["p50"]
        <= output["p95"]
        <= output["worst"]
        == pytest.approx(float(found.local.values["output_relative_l2"].max()))
    )
    assert told["retained"]["worst"] == pytest.approx(float(found.local.values["retained"].min()))
    assert told["floor"]["local"]["output_relative_l2"] < output["p50"]
    assert "holds 33.3% of the tokens" in repr(found)
    grid = found.by_kv_head("output_relative_l2")
    assert grid.shape == (3, 2)
    assert torch.equal(grid[0, 1], found.local.values["output_relative_l2"][0, 0, 2:].max())
    assert bool((found.by_kv_head("output_relative_l2", reduce="mean") <= grid).all())


@pytest.mark.parametrize("name", ["gpt-oss", "gemma2", "mistral-sliding", "gpt2"])
def test_other_architectures(name: str) -> None:
    cmp = wb.compare(build(name), prompt(40), ["full", "snapkv(budget=5, window=2)"], max_new_tokens=3)
    found = wb.drift(cmp, 1)
    assert found.floor is not None
    assert float(found.floor.local.values["output_relative_l2"].max()) < 1e-3
    assert not bool(found.local.values["kl"].isinf().any())
    worst = float(found.local.values["output_relative_l2"].max())
    assert worst > 1e-3
    out = bool((found.status[0, :, 0] == Status.OUT).all())
    assert out == (name != "gpt2")  # the first layer's window has passed the first token; GPT-2 has none


@pytest.mark.parametrize(
    "recipe",
    [
        "xquant(bits=4)",
        "xquant(bits=2)",
        "mustafar",
        "think",
        "streaming_llm(budget=20, rerotate=True)",
        "fastkv(budget=0.25)",
    ],
)
def test_other_ways_of_holding_a_cache(recipe: str) -> None:
    cmp = wb.compare(build(), prompt(70), ["full", recipe], max_new_tokens=4, chunk=32)
    found = wb.drift(cmp, 1, floor=False)
    assert found.floor is None and found.local.values["kl"].shape == (4, 3, 4)
    assert not any(bool(x.isinf().any()) for x in found.local.values.values())
    assert found.turned_keys == ("rerotate" in recipe)
    # In layer 0 both modes see the same embeddings.
    a, b = (x.values["output_relative_l2"][:, 0] for x in (found.local, found.propagated))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_bad_input_cancel_and_progress() -> None:
    model = build()
    with pytest.raises(WorkbenchError, match="no lane 5"):
        wb.drift(wb.compare(model, prompt(20), ["full", "full"], max_new_tokens=1), 5)
    with pytest.raises(WorkbenchError, match="steps must be at least 1"):
        wb.drift(compared(), 1, steps=0)
    control = Control()
    control.cancel()
    with pytest.raises(WorkbenchError, match="was cancelled"):
        wb.drift(compared(), 1, control=control)
    seen: list[tuple[int, int]] = []
    wb.drift(compared(), 1, steps=2, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
