"""``kvw bench kernels``: what it reports is what was computed, and a wrong result gets no speed."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench import cli
from workbench.bench import kernels
from workbench.bench.kernel_memory import peak_of_call
from workbench.bench.kernels import Case, Layer, cases, judged, measure_case
from workbench.bench.peak import can_count
from workbench.bench.roofline import lines, plot

TINY = Case(256, 32, 2, bits=2, group=32)


def fake(tokens: int, microseconds: float, bytes_read: int, bits: int = 2) -> dict[str, Any]:
    case = Case(tokens, 128, 4, bits=bits)
    speed = {"sdpa": {"median": 40 / microseconds, "low": 0, "high": 0}}
    return case.describe() | {
        "dtype": "float32",
        "microseconds": {"fused": microseconds, "sdpa": 40.0},
        "bytes_read": bytes_read,
        "speedup": speed,
        "memory": {"ratio": 0.2},
    }


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_read_are_codes_and_scales(bits: int) -> None:
    layer = Layer(Case(256, 64, 2, bits=bits, group=32), "cpu", torch.float32, 0)
    numbers = 2 * kernels.KV_HEADS * 256 * 64
    assert layer.bytes_read() == numbers * bits // 8 + numbers // 32 * 4
    assert kernels.dense_bytes(layer.case, torch.float32) == 4 * numbers


def test_all_contenders_compute_the_same_attention() -> None:
    layer = Layer(Case(256, 32, 2, bits=8, group=32), "cpu", torch.float32, 0)
    sdpa, matmul, (fused, _) = (layer.contenders()[name]() for name in ("sdpa", "matmul", "fused"))
    torch.testing.assert_close(matmul.reshape(sdpa.shape), sdpa, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fused, sdpa, atol=2e-2, rtol=0)  # 8 bits


def test_a_wrong_result_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "packed_attention", lambda q, *_: (torch.zeros_like(q), torch.zeros(q.shape[:3])))
    found = measure_case(TINY, "cpu", 1, 1e9)
    assert "no speed is reported" in found["refused"] and "microseconds" not in found


def test_what_is_measured_depends_on_the_device() -> None:
    assert {case.tokens for case in cases("cuda", None, False)} == {4096 << n for n in range(6)}
    on_gpu = [case for case in cases("cuda", None, False) if case.bits]
    assert {(c.bits, c.head_dim, c.queries) for c in on_gpu} == {
        (b, d, g) for b in (2, 4, 8) for d in (64, 128) for g in (1, 4, 8)
    }
    assert {case.tokens for case in cases("cpu", [300], False)} == {300}


def test_figures_that_are_asked_for_are_judged_against_the_fastest_dense_contender() -> None:
    case = Case(16384, 128, 4, bits=2)
    found = fake(16384, 50.0, 1)
    assert judged(case, "cpu", found)["reached"] is True
    found["speedup"]["matmul"] = {"median": 0.5, "low": 0.5, "high": 0.5}
    assert judged(case, "cpu", found)["reached"] is False
    assert judged(Case(4096, 128, 4, bits=2), "cpu", found) == {"asked": None, "reached": None}
    gpu = fake(32768, 10.0, 1, bits=4) | {"of_copy_bandwidth": 0.9}
    assert judged(Case(32768, 128, 4, bits=4), "cuda", gpu)["reached"] is True
    assert judged(Case(32768, 128, 4, bits=4), "cuda", gpu | {"of_copy_bandwidth": 0.8})["reached"] is False


@pytest.mark.skipif(not can_count(), reason="this kernel does not count peaks of memory")
def test_memory_at_the_peak_is_what_is_held_and_what_a_call_adds() -> None:
    case = Case(8192, 128, 1, bits=2, group=32)
    fused, dense = peak_of_call(case, "fused"), peak_of_call(case, "matmul")
    assert fused is not None and dense is not None
    assert dense["held"] == 2 * 8 * 8192 * 128 * 4 and fused["held"] == dense["held"] * 3 // 32
    assert sum(fused.values()) < 0.25 * sum(dense.values())


def test_the_plot_shows_every_way_of_holding_entries_and_its_bound() -> None:
    result = {"copy_gb_per_second": 100.0, "cases": [fake(n, n / 100, n * 768) for n in (4096, 8192)]}
    dense, packed = lines(result)
    assert packed["name"] == "2 bit, groups of 64" and packed["tokens"] == [4096, 8192]
    assert packed["measured"] == [40.96, 81.92] and packed["bound"] == [4096 * 768 / 1e5, 8192 * 768 / 1e5]
    assert dense["measured"] == [40.0, 40.0] and dense["bound"][0] == pytest.approx(2 * 8 * 4096 * 128 * 4 / 1e5)
    drawn = ElementTree.fromstring(plot(result))
    assert len(drawn.findall("{http://www.w3.org/2000/svg}polyline")) == 4
    ElementTree.fromstring(plot({"copy_gb_per_second": 1.0, "cases": []}))  # nothing measured: still a picture


def test_the_command_writes_figures_and_a_plot(tmp_path: Path) -> None:
    target = tmp_path / "kernels.json"
    assert cli.run(["bench", "kernels", "--quick", "--rounds", "1", "--json", str(target)]) == 0
    found = json.loads(target.read_text())["kernels"]
    assert found["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    for case in found["cases"]:
        assert case["path"] == "fused" and case["largest_difference"] < 5e-3
        assert set(case["speedup"]) >= {"sdpa"} and case["gb_per_second"] > 0
    assert "cached tokens" in target.with_suffix(".svg").read_text()
