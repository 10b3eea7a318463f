"""Bad input of every kind: one clear sentence, exit code 2 on the command line, no traceback, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench as wb
from tests.checkpoints import copy, edit_config, write_checkpoint
from workbench import cli
from workbench.runs import save

ROOT = Path(__file__).resolve().parents[1]
LANES = ["full", "snapkv(budget=0.25)"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "sound")


@pytest.fixture(scope="module")
def model(folder: Path) -> wb.Model:
    return wb.load(folder)


def command(
    folder: Path | str, *more: str, prompt: tuple[str, ...] = ("--token-ids", "5,6,7,8,9,10,11,12")
) -> list[str]:
    lanes = [] if "--lane" in more else ["--lane", "full", "--lane", "snapkv(budget=0.25)"]
    return ["compare", str(folder), *prompt, *lanes, "--max-new-tokens", "3", "--device", "cpu", *more]


def one_sentence(text: str) -> bool:
    return (
        20 < len(text.strip()) < 400
        and "\n" not in text.strip()
        and "Traceback" not in text
        and text.strip()[-1] in ".?"
    )


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The sentence on stderr of a command line that must be refused, with nothing on standard output."""
    code = cli.run(arguments)
    out, err = capsys.readouterr()
    assert code == 2, (out, err)
    assert one_sentence(err), err
    assert out == ""
    return err


# -- prompts -----------------------------------------------------------------------------------------------------------

PROMPTS = {
    "empty text": (("--prompt", ""), "empty"),
    "blank text": (("--prompt", " \n\t "), "empty"),
    "no ids": (("--token-ids", ""), "empty"),
    "only commas": (("--token-ids", ",,"), "empty"),
    "too many ids": (("--token-ids", ",".join(["5"] * 256)), "256"),
    "too long a text": (("--prompt", "no end " * 2000), "at most 256"),
    "negative id": (("--token-ids", "1,-5"), "-5"),
    "id beyond the vocabulary": (("--token-ids", "1,99999999999999999999"), "99999999999999999999"),
    "an id that is a word": (("--token-ids", "1,two"), "two"),
    "two prompts": (("--prompt", "a", "--token-ids", "1"), "--prompt and --token-ids"),
    "no prompt": ((), "none"),
    "a file that is not there": (("--prompt-file", "no/such/file.txt"), "no/such/file.txt"),
    "a folder as prompt": (("--prompt-file", "."), "cannot be read"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_bad_prompt_is_refused(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, expected = PROMPTS[name]
    assert expected in refused(capsys, command(folder, prompt=prompt))


def test_a_prompt_file_that_is_not_text_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    assert "UTF-8" in refused(capsys, command(folder, prompt=("--prompt-file", str(tmp_path / "photo.png"))))


@pytest.mark.parametrize("prompt", ["", "   ", [], [-1], [10**9], [1.5], [True], ["1"], [5] * 256], ids=str)
def test_the_api_refuses_a_bad_prompt(model: wb.Model, prompt: Any) -> None:
    with pytest.raises(wb.PromptError) as caught:
        wb.compare(model, prompt, LANES)
    assert one_sentence(str(caught.value))


def test_a_question_that_does_not_fit_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = command(folder, "--question", "why " * 300, prompt=("--token-ids", "5,6,7"))
    assert "256" in refused(capsys, long)
    assert "empty" in refused(capsys, command(folder, "--question", " "))


def test_the_longest_prompt_that_fits_answers_with_what_room_there_is(model: wb.Model) -> None:
    result = wb.compare(model, [5] * 255, LANES, max_new_tokens=8)
    assert [lane.error for lane in result] == [None, None]
    assert len(result[0].tokens) == 1


# -- recipes and options -------------------------------------------------------------------------------------------------

RECIPES = {
    "snapkv(budget=0)": "budget",
    "snapkv(budget=0.0)": "budget",
    "snapkv(budget=1.5)": "1.5",
    'snapkv(budget="abc")': "abc",
    "snapkv(budget=-3)": "-3",
    "snapkv(budget=True)": "True",
    "snapkv(budget=None)": "None",
    "snapkv(budget=1e999)": "inf",
    "snapkv(window=0)": "window",
    "snapkv(0.25)": "name its parameters",
    "snapkv(bugdet=0.25)": "budget",
    "snapkw(budget=0.25)": "snapkv",
    "kivi(bits=3)": "bits",
    "kivi(bits=2": "cannot be read",
    "": "empty",
    "full | | kivi": "cannot be read",
    "__import__('os').system('true')": "not a strategy",
    "snapkv(budget=__import__('os'))": "not a value",
    "kivi(bits=2) | kivi(bits=4)": "cannot follow",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_bad_recipe_is_refused(recipe: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert RECIPES[recipe] in refused(capsys, command(folder, "--lane", "full", "--lane", recipe))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_api_refuses_a_bad_recipe(recipe: str, model: wb.Model) -> None:
    for call in (lambda: wb.compare(model, [5, 6, 7], ["full", recipe]), lambda: wb.cache(recipe, model)):
        with pytest.raises(wb.RecipeError) as caught:
            call()
        assert one_sentence(str(caught.value))


OPTIONS = [
    ("--max-new-tokens", "0"),
    ("--max-new-tokens", "many"),
    ("--temperature", "-1"),
    ("--temperature", "nan"),
    ("--temperature", "inf"),
    ("--chunk", "0"),
    ("--seed", "-1"),
    ("--seed", "99999999999999999999999"),
    ("--first-token", "guessed"),
    ("--device", "quantum"),
    ("--dtype", "float3"),
    ("--no-such-option", "1"),
]


@pytest.mark.parametrize("option", OPTIONS, ids="=".join)
def test_a_bad_option_is_refused(option: tuple[str, str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, command(folder, *option))


@pytest.mark.parametrize(
    "arguments", [["inspekt"], ["compare"], ["train"], ["bench", "moon"], ["app", "--port", "70000"]], ids=" ".join
)
def test_a_wrong_command_line_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if arguments == ["train"]:  # without its command: the help
        assert cli.run(arguments) == 2
        return
    refused(capsys, arguments)


# -- checkpoints ---------------------------------------------------------------------------------------------------------


def truncate(at: Path) -> None:
    file = at / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def cut_header(at: Path) -> None:
    file = at / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5])


def empty_weights(at: Path) -> None:
    (at / "model.safetensors").write_bytes(b"")


def pickle_only(at: Path) -> None:
    (at / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2)}, at / "pytorch_model.bin")


def no_weights(at: Path) -> None:
    (at / "model.safetensors").unlink()


def no_config(at: Path) -> None:
    (at / "config.json").unlink()


def torn_config(at: Path) -> None:
    (at / "config.json").write_text('{"model_type": "llama", "hidden')


def list_config(at: Path) -> None:
    (at / "config.json").write_text("[1, 2]")


def binary_config(at: Path) -> None:
    (at / "config.json").write_bytes(b"\xff\xfe\x00")


def state_space(at: Path) -> None:
    (at / "config.json").write_text(
        json.dumps({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64})
    )


def remote_code(at: Path) -> None:
    edit_config(at, model_type="novel", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (at / "code.py").write_text(f"open({str(at / 'ran')!r}, 'w').close()")


def remote_code_of_a_known_type(at: Path) -> None:
    remote_code(at)
    edit_config(at, model_type="llama")


def torn_tokenizer(at: Path) -> None:
    (at / "tokenizer.json").write_text("{")


def missing_shard(at: Path) -> None:
    (at / "model.safetensors").rename(at / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (at / "model.safetensors.index.json").write_text(json.dumps(index))


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated weights": (truncate, "damaged"),
    "weights cut within the header": (cut_header, "damaged"),
    "empty weights": (empty_weights, "damaged"),
    "pickle only": (pickle_only, "safetensors"),
    "no weights": (no_weights, "no weights"),
    "a missing shard": (missing_shard, ""),
    "no config": (no_config, "config.json"),
    "a torn config": (torn_config, ""),
    "a config that is a list": (list_config, ""),
    "a config that is not text": (binary_config, ""),
    "a config of no type": (lambda at: (at / "config.json").write_text("{}"), ""),
    "a larger hidden size": (lambda at: edit_config(at, hidden_size=64), "fit"),
    "more layers": (lambda at: edit_config(at, num_hidden_layers=3), "fit"),
    "fewer layers": (lambda at: edit_config(at, num_hidden_layers=1), "fit"),
    "more KV heads": (lambda at: edit_config(at, num_key_value_heads=4), "fit"),
    "another head size": (lambda at: edit_config(at, head_dim=16), "fit"),
    "another vocabulary": (lambda at: edit_config(at, vocab_size=7), "fit"),
    "heads that do not divide": (lambda at: edit_config(at, num_key_value_heads=3), ""),
    "no heads": (lambda at: edit_config(at, num_attention_heads=0), "config"),
    "negative layers": (lambda at: edit_config(at, num_hidden_layers=-1), "config"),
    "a hidden size that is a word": (lambda at: edit_config(at, hidden_size="wide"), "config"),
    "an absurd size": (lambda at: edit_config(at, hidden_size=1 << 40), ""),
    "no positions": (lambda at: edit_config(at, max_position_embeddings=0), ""),
    "a state-space model": (state_space, "attention"),
    "code of its own": (remote_code, "code"),
    "an encoder": (lambda at: edit_config(at, model_type="bert"), ""),
    "a torn tokenizer": (torn_tokenizer, "tokenizer"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_bad_checkpoint_is_refused(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, expected = CHECKPOINTS[name]
    at = copy(folder, tmp_path / "model")
    spoil(at)
    assert expected in refused(capsys, command(at))
    assert not (at / "ran").exists()
    with pytest.raises(wb.ModelError) as caught:
        wb.load(at, device="cpu")
    assert one_sentence(str(caught.value))


def test_code_beside_a_known_model_never_runs(folder: Path, tmp_path: Path) -> None:
    """auto_map on a type that transformers knows: its own code is used, the folder's is not."""
    at = copy(folder, tmp_path / "model")
    remote_code_of_a_known_type(at)
    assert wb.load(at, device="cpu").geometry.num_layers == 2
    assert not (at / "ran").exists()


@pytest.mark.parametrize(
    "name",
    ["house/nothing", "./nowhere", "nowhere", "a/b/c", "nobody/nothing", "", " ", "model\x00name", "x" * 5000],
    ids=lambda n: repr(n[:20]),
)
def test_a_model_that_is_not_there_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, command(name))


def test_a_file_is_no_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "folder" in refused(capsys, command(folder / "model.safetensors"))


def test_a_hub_id_without_a_network_is_refused_soon() -> None:
    """Not offline mode but a network that does not answer: a proxy nobody listens at."""
    nowhere = {
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
    }
    environment = {
        **os.environ,
        **nowhere,
        "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in ("", "kernels", "widgets")),
    }
    code = "import time; from workbench import cli; import workbench.models.load; t = time.time(); r = cli.run(%r); print(r, time.time() - t)"
    done = subprocess.run(
        [sys.executable, "-c", code % (command("nobody/nothing"),)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    result, seconds = done.stdout.split()
    assert result == "2" and one_sentence(done.stderr), done.stderr
    assert float(seconds) < 10


# -- a disk that is full, and places that cannot be written to -------------------------------------------------------------


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_costs_no_result(
    step: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "result.json"
    target.write_text("older result")
    monkeypatch.setattr(save.os, step, full_disk)
    assert cli.run(command(folder, "--json", str(target))) == 2
    out, err = capsys.readouterr()
    assert "disk is full" in err and "\n" not in err.strip() and "Traceback" not in err
    assert [lane["recipe"] for lane in json.loads(out)["lanes"]] == LANES  # on standard output instead
    assert target.read_text() == "older result"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]  # no half file is left


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, the device that is always full")
def test_a_full_device_costs_no_result(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(command(folder, "--json", "/dev/full")) == 2
    out, err = capsys.readouterr()
    assert "disk is full" in err
    assert len(json.loads(out)["lanes"]) == 2
    assert Path("/dev/full").is_char_device()


def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.perf_counter()
    for place in (tmp_path, tmp_path / "no" / "folder.json", tmp_path / ("x" * 400)):
        refused(capsys, command(folder, "--json", str(place)))
    assert time.perf_counter() - began < 60


def test_the_api_says_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save.os, "replace", full_disk)
    with pytest.raises(wb.StorageError) as caught:
        save.write_json(tmp_path / "a.json", {"x": 1})
    assert one_sentence(str(caught.value))
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_went_away_is_no_traceback(folder: Path) -> None:
    """kvw compare … --json - | true"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in ("", "kernels", "widgets"))}
    arguments = [sys.executable, "-m", "workbench.cli", *command(folder, "--json", "-")]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(arguments, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, timeout=280)
    os.close(write)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert done.returncode == 1
