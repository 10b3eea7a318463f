"""``kvw calibrate``: files that serve their method, sentences where something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoints import copy, write_checkpoint
from workbench import cli
from workbench.calibration import needles

IDS = ",".join(str(5 + n % 60) for n in range(80))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return copy(original, tmp_path / "model")


def compared(folder: Path, lane: str) -> int:
    command = ["compare", str(folder), "--lane", "full", "--lane", lane, "--token-ids", IDS, "--max-new-tokens", "2"]
    return cli.run([*command, "--device", "cpu"])


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.strip().endswith(".") and "\n" not in err.strip() and "Traceback" not in err
    return err


def test_compresskv_is_calibrated_and_then_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(needles, "ENOUGH", -1.0)  # a random model answers nothing
    lane = "compresskv(budget=0.5)"
    assert compared(folder, lane) == 2
    assert f"`kvw calibrate compresskv {folder}`" in capsys.readouterr().err
    assert cli.run(["calibrate", "compresskv", str(folder), "--samples", "5", "--device", "cpu"]) == 0
    file = folder / "artifacts" / "compresskv.json"
    out, err = capsys.readouterr()
    assert out == "" and str(file) in err and "5 of 5 needle prompts" in err
    assert json.loads(file.read_text())["made_with"] == {"samples": 5, "needles_answered": 5}
    assert compared(folder, lane) == 0


def test_headkv_is_calibrated_on_a_model_that_recalls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "heads.json"
    command = ["calibrate", "headkv", "house/recall", "--samples", "6", "--device", "cpu", "--out", str(target)]
    assert cli.run(command) == 0
    found = json.loads(target.read_text())
    assert found["method"] == "headkv" and found["model"]["id"] == "house/recall"
    assert max(max(row) for row in found["tensors"]["retrieval"]) > 0
    lane = f"headkv(budget=0.5, artifact={str(target)!r})"
    command = ["compare", "house/recall", "--lane", lane, "--token-ids", IDS, "--max-new-tokens", "2"]
    assert cli.run([*command, "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["calibrate", "compresskv", "{folder}", "--samples", "0"], "--samples"),
        (["calibrate", "compresskv", "{folder}", "--samples", "2"], "answered none of 2"),
        (["calibrate", "headkv", "{folder}", "--out", "{folder}"], "is a folder"),
        (["calibrate", "headkv", "no/such/model/here"], "no model"),
    ],
    ids=lambda value: " ".join(value[:2] + value[3:]) if isinstance(value, list) else "",
)
def test_bad_input_is_refused(
    arguments: list[str], expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, [argument.format(folder=folder) for argument in arguments])
    assert expected.lower() in said.lower()
