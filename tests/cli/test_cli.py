"""The command line: its JSON, its exit codes, its table, and what Ctrl-C leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_checkpoint
from workbench import cli
from workbench.runs import compare as runs
from workbench.runs.events import Token

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = {"schema", "model", "prompt_tokens", "reference", "lanes"}
MODEL = {"id", "num_layers", "num_heads", "num_kv_heads", "head_dim", "dtype"}
LANE = {
    "recipe", "resolved", "tokens", "text", "stopped", "error", "kl", "kl_mean", "top1_agreement", "first_divergence",
    "memory", "kept", "drift", "seconds", "tokens_by_layer",
}  # fmt: skip
MEMORY = {
    "used_bytes",
    "final_bytes",
    "reserved_bytes",
    "reference_bytes",
    "ratio",
    "peak_bytes",
    "by_layer",
    "by_kind",
}
IDS = ",".join(str(5 + n % 60) for n in range(80))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def command(folder: Path, *more: str) -> list[str]:
    return [
        "compare",
        str(folder),
        "--lane",
        "full",
        "--lane",
        "snapkv(budget=0.25)",
        "--device",
        "cpu",
        "--max-new-tokens",
        "4",
        *more,
    ]


def json_of(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> dict[str, Any]:
    assert cli.run(arguments) == 0
    out, _ = capsys.readouterr()
    return json.loads(out)  # nothing else is on standard output


def test_json_has_the_documented_keys(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json_of(capsys, command(folder, "--token-ids", IDS, "--json", "-"))
    assert set(result) >= SCHEMA and result["schema"] == 1
    assert set(result["model"]) >= MODEL
    assert result["prompt_tokens"] == 80 and result["reference"] == 0
    full, snapkv = result["lanes"]
    for lane in (full, snapkv):
        assert set(lane) >= LANE and set(lane["memory"]) >= MEMORY and set(lane["seconds"]) == {"prefill", "decode"}
        assert len(lane["tokens"]) == 4 and lane["stopped"] == "length" and lane["error"] is None
        assert len(lane["kl"]) == 4 and lane["kept"] is None and lane["drift"] is None
    assert snapkv["resolved"] == "snapkv(budget=0.25, window=32, kernel=5)"
    assert (
        full["memory"]["used_bytes"] == 80 * 2 * 2 * 2 * 8 * 4
    )  # tokens, K and V, layers, KV heads, head_dim, float32
    assert snapkv["memory"]["ratio"] < 0.4
    assert full["kl"] == [0.0] * 4
    assert full["tokens_by_layer"] == snapkv["tokens_by_layer"] == [80, 80]


def test_json_says_how_many_tokens_each_layer_was_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lanes = ("--lane", "fastkv(tsp_rate=0.3)", "--lane", "fastkv | snapkv(budget=0.1)")
    result = json_of(capsys, command(folder, "--token-ids", IDS, *lanes, "--json", "-"))
    assert [lane["error"] for lane in result["lanes"]] == [None] * 4
    assert [lane["tokens_by_layer"] for lane in result["lanes"]] == [[80, 80], [80, 80], [80, 24], [80, 16]]


def test_kept_and_drift_come_when_asked(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "result.json"
    assert cli.run(command(folder, "--token-ids", IDS, "--kept", "--drift", "--json", str(target))) == 0
    out, err = capsys.readouterr()
    assert out == "" and str(target) in err
    lane = json.loads(target.read_text())["lanes"][1]
    assert [[len(head) for head in layer] for layer in lane["kept"]] == [[20, 20], [20, 20]]
    assert set(lane["drift"]) == {"key_cosine", "value_cosine", "output_relative_l2"}


def test_questions_are_asked_after_compression(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--question", "What is it ?", "--question", "Who is it ?")
    result = json_of(capsys, command(folder, "--prompt", "The colour of Mira is blue . " * 8, *asked, "--json", "-"))
    assert [answer["question"] for answer in result["lanes"][1]["answers"]] == ["What is it ?", "Who is it ?"]
    assert cli.run(command(folder, "--prompt", "The colour of Mira is blue .", *asked)) == 0
    out = capsys.readouterr().out
    assert "Query-agnostic" in out and "What is it ?" in out


@pytest.mark.parametrize("first", ["replayed", "prefill"])
def test_the_table_says_how_the_lanes_were_asked(first: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(command(folder, "--token-ids", IDS, "--first-token", first)) == 0
    out = capsys.readouterr().out
    assert f"first token: {first}" in out and "Query-aware" in out
    assert "snapkv(budget=0.25, window=32, kernel=5)" in out and "%" in out


def test_the_prompt_may_come_from_a_file_or_standard_input(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("The river was quiet .\n", encoding="utf-8")
    from_file = json_of(capsys, command(folder, "--prompt-file", str(tmp_path / "notes.txt"), "--json", "-"))
    with (tmp_path / "notes.txt").open() as opened:
        monkeypatch.setattr(sys, "stdin", opened)
        from_stdin = json_of(capsys, command(folder, "--prompt-file", "-", "--json", "-"))
    typed = json_of(capsys, command(folder, "--prompt", "The river was quiet .\n", "--json", "-"))
    assert from_file["lanes"][0]["tokens"] == from_stdin["lanes"][0]["tokens"] == typed["lanes"][0]["tokens"]


def test_one_lane_is_enough(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = [
        "compare",
        str(folder),
        "--lane",
        "knorm(budget=0.5)",
        "--token-ids",
        IDS,
        "--device",
        "cpu",
        "--max-new-tokens",
        "2",
        "--json",
        "-",
    ]
    assert len(json_of(capsys, only)["lanes"]) == 1


def test_the_same_seed_gives_the_same_tokens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampled = command(folder, "--token-ids", IDS, "--temperature", "1", "--seed", "7", "--json", "-")
    first, second = json_of(capsys, sampled), json_of(capsys, sampled)
    assert [lane["tokens"] for lane in first["lanes"]] == [lane["tokens"] for lane in second["lanes"]]


def test_an_interruption_writes_what_was_computed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C at the second token of the second lane: the first lane is whole, the second has two tokens."""
    events = runs.Run.events

    def interrupted(self: runs.Run, only: Any = None) -> Any:
        for event in events(self, only):
            yield event
            if isinstance(event, Token) and event.lane == 1 and event.index == 1:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runs.Run, "events", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert cli.run(command(folder, "--token-ids", IDS, "--json", "-")) == 1
    out, err = capsys.readouterr()
    full, snapkv = json.loads(out)["lanes"]
    assert (len(full["tokens"]), full["stopped"]) == (4, "length")
    assert (len(snapkv["tokens"]), snapkv["stopped"]) == (2, "cancelled")
    assert "Interrupted" in err and "Traceback" not in err
    assert signal.getsignal(signal.SIGINT) is before


def test_models_and_strategies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["models", "--json", str(tmp_path / "models.json")]) == 0
    assert isinstance(json.loads((tmp_path / "models.json").read_text()), list)
    capsys.readouterr()
    assert cli.run(["strategies", "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["kivi"]["parameters"]["bits"]["default"] == 2
    assert cli.run(["strategies"]) == 0
    assert "snapkv" in capsys.readouterr().out


def test_help_and_version_are_quick_and_load_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kvw ")
    code = "import sys; from workbench import cli; r = cli.run(['--help']); assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(r)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "widgets"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in ("app", "models", "strategies", "compare", "inspect", "bench", "train", "calibrate"):
        assert name in done.stdout
    for name in ("denoise", "sweep"):  # only commands that work
        assert name not in done.stdout


def test_training_leaves_a_checkpoint_when_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from workbench.training.recall import train as training

    step = training.Training.step

    def interrupted(self: Any) -> None:
        step(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Training, "step", interrupted)
    assert cli.run(["train", "recall", "--out", str(tmp_path), "--steps", "2", "--device", "cpu"]) == 1
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "arguments",
    [("--steps", "0"), ("--minutes", "-1"), ("--minutes", "1", "--steps", "1"), ("--resume",), ("--device", "quantum")],
    ids=" ".join,
)
def test_training_refuses_bad_input(
    arguments: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["train", "recall", "--out", str(tmp_path), *arguments]) == 2
    err = capsys.readouterr().err.strip()
    assert err.endswith(".") and "\n" not in err and "Traceback" not in err


def test_a_taken_port_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    pytest.importorskip("panel")
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        assert cli.run(["app", "--port", str(taken.getsockname()[1])]) == 2
    assert "taken" in capsys.readouterr().err


def test_inspect_writes_what_every_head_attends_to(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inspect", str(folder), "--token-ids", IDS, "--device", "cpu"]
    assert cli.run([*words, "--json", "-", "--top", "3", "--sinks", "2"]) == 0
    data = json.loads(capsys.readouterr().out)
    layers, heads = data["model"]["num_layers"], data["model"]["num_heads"]
    assert data["schema"] == 1 and data["prompt_tokens"] == 80 and set(data["model"]) == MODEL and not data["sampled"]
    assert len(data["entropy"]) == len(data["sink_mass"]) == len(data["top_of_last"]) == layers
    assert all(len(row) == heads and all(0 <= x <= 4.4 for x in row) for row in data["entropy"])
    assert all(abs(sum(share) - 1) < 1e-3 for row in data["distance_mass"] for share in row)
    assert all(len(head) == 3 for row in data["top_of_last"] for head in row) and data["sinks"] == 2
    assert cli.run([*words, "--layer", "1"]) == 0
    out = capsys.readouterr().out
    assert f"L1 H{heads - 1}" in out and "L0 H0" not in out and "none sampled" in out


def test_inspect_refuses_what_it_cannot_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (["--layer", "99"], "layers are numbers from 0 to"),
        (["--top", "0"], "--top must be at least 1"),
        (["--sinks", "-1"], "sinks must be at least 0"),
    ):
        assert cli.run(["inspect", str(folder), "--token-ids", IDS, "--device", "cpu", *more]) == 2
        assert message in capsys.readouterr().err
    assert cli.run(["inspect", str(folder), "--device", "cpu"]) == 2
    assert "Give the prompt once" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_runs_at_tiny_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "bench.json"
    began = time.perf_counter()
    recipes = ("--recipe", "full", "--recipe", "fastkv(budget=0.25)")
    assert cli.run(["bench", "speed", "bytes", "rerun", "inspect", "--quick", *recipes, "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    (inspected,) = result["inspect"]
    assert inspected["memory"]["held_per_head"] < 1 << 20 and inspected["payload"]["tile"] <= 512 << 10
    assert all(tile["p50_ms"] > 0 for tile in inspected["tiles"].values())
    (times,) = result["speed"]["times"]
    assert times["equal"] and times["lanes"]["full"]["prefill"]["ratio"] > 0
    assert set(times["lanes"]) == {"plain transformers", "full", "fastkv(budget=0.25)"}
    assert all(lane["reached"] is not False for case in result["bytes"] for lane in case["lanes"].values())
    assert result["rerun"]["first_token"]["p50_ms"] > 0
    assert {"machine", "command", "commit"} <= set(result)
    assert time.perf_counter() - began < 300
