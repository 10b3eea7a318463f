"""``kvw bench eviction`` and ``accuracy``: both sides run the same thing, ratios are paired, the page says what was measured."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from workbench import cli
from workbench.bench import contest
from workbench.bench.accuracy import MODES, eviction_methods, measure_accuracy
from workbench.bench.accuracy_chart import chart
from workbench.bench.eviction import BUDGET, PAIRS, contestants, measure_pair, request
from workbench.bench.eviction_page import accuracy_part, filled, written
from workbench.bench.held import held
from workbench.bench.subjects import TINY_NAME, house_is_there, random_ids, subject
from workbench.strategies.recipe import Recipe

house = pytest.mark.skipif(not house_is_there(), reason="the house model's weights are not installed")
TOKENS = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    subject(TINY_NAME).network.save_pretrained(path)
    return str(path)


def asked(method: Any, decoded: int = 3) -> dict[str, Any]:
    model = subject(TINY_NAME)
    return {
        "method": method,
        "ids": random_ids(model, TOKENS),
        "following": random_ids(model, decoded, seed=1),
    }


class OldestGo:
    """A stand-in for a press: enters as kvpress's do, and drops the oldest half of every layer."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, network: Any) -> OldestGo:
        self.network = network
        return self

    def __enter__(self) -> None:
        def cut(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            gone = int(layer.keys.shape[2] * self.share)
            layer.keys, layer.values = (x[:, :, gone:].contiguous() for x in (layer.keys, layer.values))

        layers = self.network.model.layers
        self.hooks = [layer.self_attn.register_forward_hook(cut, with_kwargs=True) for layer in layers]

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


@pytest.fixture
def sides(folder: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, contest.Side]:
    monkeypatch.setitem(sys.modules, "kvpress", SimpleNamespace(OldestGo=OldestGo))  # type: ignore[arg-type]
    return {"workbench": contest.Workbench(folder), "kvpress": contest.KVPress(folder)}


@torch.inference_mode()
def test_both_sides_run_the_same_model(sides: dict[str, contest.Side]) -> None:
    ours = contest.race(sides["workbench"], asked("full"))
    theirs = contest.race(sides["kvpress"], asked(None))
    torch.testing.assert_close(torch.tensor(ours["logits"]), torch.tensor(theirs["logits"]), atol=1e-4, rtol=0)
    assert ours["held"]["bytes"] == theirs["held"]["bytes"] == subject(TINY_NAME).geometry.bytes_per_token * TOKENS


@torch.inference_mode()
def test_both_sides_go_on_alike_after_the_same_entries_left(sides: dict[str, contest.Side]) -> None:
    """Later tokens keep their own positions on both sides, though half of the cache is gone."""
    ours = contest.race(sides["workbench"], asked("streaming_llm(budget=0.5, sinks=0, recompress_every=0)"))
    theirs = contest.race(sides["kvpress"], asked({"class": "OldestGo", "share": 0.5}))
    torch.testing.assert_close(torch.tensor(ours["logits"]), torch.tensor(theirs["logits"]), atol=1e-4, rtol=0)
    assert theirs["held"]["by_kind"] == {
        "entries": ours["held"]["bytes"] - ours["held"]["by_kind"]["positions"],
        "hidden": 0,
    }


def test_hidden_entries_count_as_held(sides: dict[str, contest.Side]) -> None:
    side = sides["kvpress"]
    assert isinstance(side, contest.KVPress)
    with torch.inference_mode():
        before = contest.race(side, asked(None))["held"]["bytes"]
    side.network.model.layers[0].self_attn.masked_key_indices = (torch.zeros(5, dtype=torch.int64),) * 3
    assert side.held()["by_kind"]["hidden"] == 3 * 5 * 8
    assert (
        side.held()["by_kind"]["entries"] == before + 3 * subject(TINY_NAME).geometry.bytes_per_token
    )  # 3 were decoded


def test_a_press_may_hold_a_press(sides: dict[str, contest.Side]) -> None:
    side = sides["kvpress"]
    assert isinstance(side, contest.KVPress)
    side.presses.Around = lambda press, alpha: (press, alpha)  # type: ignore[attr-defined]
    press, alpha = side.press({"class": "Around", "press": {"class": "OldestGo", "share": 0.25}, "alpha": 0.2})
    assert (press.share, alpha) == (0.25, 0.2)


def test_a_failure_is_answered_and_the_side_goes_on(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"do": "race", **asked("snapkv(budget=2.0)")}, {"do": "about"}]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(line) + "\n" for line in lines)))
    monkeypatch.setattr(sys, "stdout", said := io.StringIO())
    contest.serve("workbench", folder, torch.get_num_threads())
    failed, about = map(json.loads, said.getvalue().splitlines())
    assert "budget" in failed["failed"] and set(about) == {"python", "torch", "transformers"}


@pytest.mark.slow
def test_an_environment_without_kvpress_is_said(folder: str) -> None:
    with contestants(folder, sys.executable) as running, pytest.raises(RuntimeError, match="No module named 'kvpress'"):
        running["kvpress"].ask({"do": "about"})


class Fake:
    """A side whose seconds are known beforehand."""

    def __init__(self, name: str, seconds: list[float], order: list[str]) -> None:
        self.name, self.seconds, self.order = name, seconds, order

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if len(request["following"]) == 2:  # the warm-up
            return {}
        self.order.append(self.name)
        return {"prefill": self.seconds.pop(0), "decode": 1.0, "held": {"bytes": 50}, "logits": [0.0, 1.0]}


def test_ratios_are_taken_within_a_round() -> None:
    """Rounds of 2/1, 3/4 and 9/3: the median of the ratios is 2, that of the seconds would give 1."""
    order: list[str] = []
    two = {"workbench": Fake("workbench", [2, 3, 9], order), "kvpress": Fake("kvpress", [1, 4, 3], order)}
    found = measure_pair(two, subject(TINY_NAME), PAIRS["snapkv"], TOKENS, 3)  # type: ignore[arg-type]
    assert order == ["workbench", "kvpress", "kvpress", "workbench", "workbench", "kvpress"]
    assert found["ratio"]["prefill"] == {"ratio": 2.0, "low": 0.75, "high": 3.0}
    assert found["ratio"]["total"]["ratio"] == 1.5 and found["ratio"]["decode"]["ratio"] == 1.0  # 3/2, 4/5, 10/4
    assert found["workbench"]["total"] == 4.0 and found["difference"] == 0.0


@pytest.mark.parametrize("name", PAIRS)
def test_both_sides_of_a_pair_keep_the_same_share(name: str) -> None:
    pair = PAIRS[name]
    (part,) = Recipe.parse(pair.recipe).parts
    inner = pair.press.get("press", pair.press)
    if name == "think":
        assert part.ratio == inner["key_channel_compression_ratio"]
    else:
        assert part.budget == BUDGET == pytest.approx(1 - inner["compression_ratio"])
        assert not part.keeps_acting  # kvpress compresses once
    assert request("race", "kvpress", subject(TINY_NAME), pair, TOKENS)["method"] == pair.press


def test_what_is_held_at_the_layers_boundaries() -> None:
    model = subject(TINY_NAME)
    full = model.geometry.bytes_per_token * TOKENS
    entry = model.geometry.bytes_per_token / model.geometry.num_layers / model.geometry.num_kv_heads  # of one head
    even = held(model, Recipe.parse("snapkv(budget=0.25)"), TOKENS, full, 0.25)
    assert even["end"] == pytest.approx(0.25 * (1 + 4 / entry), abs=1e-4)  # an int32 position each
    assert even["boundary"] == pytest.approx(even["end"] / 2, abs=1e-4)  # one of two layers is done
    late = held(model, Recipe.parse("layer_defensivekv(budget=0.25)"), TOKENS, full, 0.25)
    assert late["boundary"] > 0.5 and not late["cascades"] and late["reached"]
    assert held(model, Recipe.parse("cake(budget=0.4)"), TOKENS, full, 0.4)["cascades"]
    assert not held(model, Recipe.parse("snapkv(budget=0.25)"), TOKENS, full, 0.2)["reached"]


@house
def test_accuracy_counts_right_answers() -> None:
    found = measure_accuracy(["snapkv", "random"], 2, True, lambda line: None)
    assert found["full"] == dict.fromkeys(MODES, 2)  # on these two short documents
    assert set(found["methods"]) == {"snapkv", "random"} and not found["left_out"]
    assert all(0 <= n <= 2 for by in found["methods"].values() for mode in MODES for n in by[mode])
    assert found["methods"]["random"]["query-aware"] < found["methods"]["snapkv"]["query-aware"]
    held = {name: by["query-aware"][0] for name, by in found["evidence"].items()}
    assert 0 < held["random"] < held["snapkv"] <= 1  # the fact's tokens, in the head that looks answers up


def test_every_eviction_method_with_a_budget_is_measured() -> None:
    assert {"snapkv", "cake", "random"} <= set(eviction_methods()) and not {"think", "kivi"} & set(eviction_methods())


RESULT = {
    "model": "house/recall",
    "tokens": 512,
    "samples": 50,
    "budgets": [0.2, 0.5],
    "full": {"query-aware": 50, "query-agnostic": 40},
    "methods": {
        "snapkv": {"query-aware": [10, 45], "query-agnostic": [10, 25]},
        "adakv": {"query-aware": [20, 47], "query-agnostic": [20, 26]},
        "layer_defensivekv": {"query-aware": [40, 40], "query-agnostic": [15, 30]},
    },
    "retrieval_head": [1, 0],
    "evidence": {
        "snapkv": {"query-aware": [0.9, 1.0], "query-agnostic": [0.1, 0.8]},
        "adakv": {"query-aware": [0.9, 1.0], "query-agnostic": [0.1, 0.9]},
        "layer_defensivekv": {"query-aware": [0.9, 1.0], "query-agnostic": [0.3, 0.4]},
    },
    "left_out": {"headkv": "headkv needs a calibration."},
}


def test_the_tables_say_what_was_measured() -> None:
    text = accuracy_part(RESULT)
    assert "| `layer_defensivekv` (seed) | 80 % | 80 % |" in text
    assert text.index("`layer_defensivekv` (seed)") < text.index("`adakv` |") < text.index("`snapkv` |")  # best first
    assert "`layer_defensivekv`: 80.0% |" in text and "30 %, 40 %, 20 % | does not hold |" in text
    assert "headkv needs a calibration." in text
    assert "| method | held at 20 % | right | held at 50 % | right |" in text and "layer 1's KV head 0" in text
    assert text.endswith("| `adakv` | 10 % | 40 % | 90 % | 52 % |\n| `snapkv` | 10 % | 20 % | 80 % | 50 % |")


def test_the_chart_has_a_curve_for_each_method_and_mode() -> None:
    drawn = chart(RESULT)
    assert drawn.count("<polyline") == 6 and all(name in drawn for name in RESULT["methods"])
    assert 'points="72.0,96.0 180.0,12.0"' in drawn  # snapkv, the question seen: 20 % and 90 % right, of 120 px


def test_only_what_lies_between_the_marks_is_replaced() -> None:
    page = "before <!-- a -->old<!-- /a --> after"
    assert filled(page, {"a": "new"}) == "before <!-- a -->\nnew\n<!-- /a --> after"
    with pytest.raises(ValueError, match="no part between"):
        filled(page, {"b": "new"})


def test_the_page_is_that_of_the_measurements_in_the_repository() -> None:
    for file, text in written().items():
        assert file.read_text(encoding="utf-8") == text, "run python -m workbench.bench.eviction_page"


def test_wrong_methods_and_interpreters_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "eviction", "--method", "kivi"]) == 2
    assert "'kivi' is not measured by eviction" in capsys.readouterr().err
    assert cli.run(["bench", "eviction", "--kvpress-python", "/nowhere/python"]) == 2
    assert "--kvpress-python" in capsys.readouterr().err


@pytest.mark.slow
def test_our_side_is_measured_alone_where_there_is_no_kvpress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "bench.json"
    assert cli.run(["bench", "eviction", "--quick", "--method", "adakv", "--json", str(target)]) == 0
    found = json.loads(target.read_text())["eviction"]
    assert found["kvpress"] is None and found["methods"]["adakv"]["ratio"] == {}
    assert found["methods"]["adakv"]["workbench"]["of_full"] <= BUDGET * 1.02
    assert "our side alone" in capsys.readouterr().err
