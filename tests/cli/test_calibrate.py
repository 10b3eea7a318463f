"""``kvw calibrate`` and ``kvw train locret``: files that serve their method, sentences where something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import copy, write_checkpoint
from workbench import cli
from workbench.calibration import needles
from workbench.training import locret as training

IDS = ",".join(str(5 + n % 60) for n in range(80))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return copy(original, tmp_path / "model")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LEVEL", 2)
    monkeypatch.setattr(training, "MEASURED_ON", 2)


def compared(folder: Path, lane: str) -> int:
    command = ["compare", str(folder), "--lane", "full", "--lane", lane, "--token-ids", IDS, "--max-new-tokens", "2"]
    return cli.run([*command, "--device", "cpu"])


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    *progress, sentence = err.strip().splitlines()
    assert out == "" and sentence.endswith(".") and not any("Traceback" in line for line in progress)
    return sentence


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


def test_rotatekv_is_calibrated_and_then_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lane = "rotatekv(bits=4)"
    assert compared(folder, lane) == 2
    assert f"`kvw calibrate rotatekv {folder}`" in capsys.readouterr().err
    assert cli.run(["calibrate", "rotatekv", str(folder), "--samples", "3", "--device", "cpu"]) == 0
    file = folder / "artifacts" / "rotatekv.json"
    assert str(file) in capsys.readouterr().err
    assert json.loads(file.read_text())["made_with"] == {"samples": 3}
    assert compared(folder, lane) == 0


def test_locret_is_trained_and_then_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lane = "locret(budget=0.5, chunk=16)"
    assert compared(folder, lane) == 2
    assert f"`kvw train locret --model {folder}`" in capsys.readouterr().err
    assert cli.run(["train", "locret", "--model", str(folder), "--steps", "2", "--device", "cpu"]) == 0
    file = folder / "artifacts" / "locret.safetensors"
    assert str(file) in capsys.readouterr().err
    assert [found.name for found in file.parent.iterdir()] == [file.name]  # the checkpoint is gone
    assert compared(folder, lane) == 0


def test_an_interrupted_training_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = training.Training.step

    def interrupted(self: Any) -> None:
        step(self)
        if self.progress.step == 2:
            raise KeyboardInterrupt

    command = ["train", "locret", "--model", str(folder), "--steps", "3", "--width", "8", "--device", "cpu"]
    monkeypatch.setattr(training.Training, "step", interrupted)
    assert cli.run(command) == 1
    assert "--resume" in capsys.readouterr().err
    assert (folder / "artifacts" / "locret.safetensors.checkpoint").exists()
    monkeypatch.setattr(training.Training, "step", step)
    assert "width 8, not 16" in refused(capsys, [*command[:-4], "--device", "cpu", "--resume"])
    assert cli.run([*command, "--resume"]) == 0


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["calibrate", "compresskv", "{folder}", "--samples", "0"], "--samples"),
        (["calibrate", "compresskv", "{folder}", "--samples", "2"], "answered none of 2"),
        (["calibrate", "headkv", "{folder}", "--out", "{folder}"], "is a folder"),
        (["calibrate", "headkv", "no/such/model/here"], "no model"),
        (["train", "locret", "--model", "{folder}", "--steps", "0"], "--steps"),
        (["train", "locret", "--model", "{folder}", "--width", "-1"], "--width"),
        (["train", "locret", "--model", "{folder}", "--resume"], "no checkpoint"),
        (["train", "locret", "--model", "{folder}", "--out", "{folder}/no/such/place"], "folder does not exist"),
        (["train", "locret"], "--model"),
    ],
    ids=lambda value: " ".join(value[:2] + value[3:]) if isinstance(value, list) else "",
)
def test_bad_input_is_refused(
    arguments: list[str], expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, [argument.format(folder=folder) for argument in arguments])
    assert expected.lower() in said.lower()
