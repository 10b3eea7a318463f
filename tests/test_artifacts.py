"""Artifacts: which model they belong to, where they lie, and one sentence for every way a file can be wrong."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import workbench as wb
from tests.builders import build, feed, network, prompt
from tests.checkpoints import copy, write_checkpoint
from workbench.errors import ArtifactError, StorageError
from workbench.models.artifacts import FOLDER, HEADER, Artifact, Kind, content_hash
from workbench.models.load import Model
from workbench.strategies.recipe import Recipe

NUMBERS = Kind(
    "numbers", "calibration", ".json", "kvw calibrate numbers {model}", "snapkv", lambda g: {"a": (g.num_layers, 2)}
)
WEIGHTS = Kind(
    "weights",
    "set of heads",
    ".safetensors",
    "kvw train weights {model}",
    "snapkv",
    lambda g: {"w1": (g.num_layers, "width"), "w2": ("width", 3)},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setenv("KVW_DATA", str(tmp_path / "data"))
    return wb.load(copy(folder, tmp_path / "model"))


def numbers(model: Model) -> Artifact:
    return model.artifacts.make(NUMBERS, {"a": torch.tensor([[0.1, 2.0], [-3.0, 1e-9]])}, {"samples": 3})


def weights(model: Model) -> Artifact:
    return model.artifacts.make(WEIGHTS, {"w1": torch.randn(2, 5).half(), "w2": torch.randn(5, 3).half()}, {"steps": 1})


def again(model: Model) -> Model:
    """The same model, loaded anew: nothing is remembered."""
    assert model.artifacts.folder is not None
    return wb.load(model.artifacts.folder)


def refused(model: Model, kind: Kind, path: str | Path = "") -> str:
    with pytest.raises(ArtifactError) as caught:
        again(model).artifacts.get(kind, str(path))
    said = str(caught.value)
    assert said.endswith(".") and "\n" not in said and len(said) < 500
    return said


@pytest.mark.parametrize("make", [numbers, weights])
def test_what_is_saved_is_found_beside_the_model(make: Callable[[Model], Artifact], model: Model) -> None:
    artifact = make(model)
    file = model.artifacts.save(artifact)
    assert file == Path(model.id).resolve() / FOLDER / artifact.kind.file_name
    found = again(model).artifacts.get(artifact.kind)
    assert (found.model, found.made_with) == (artifact.model, artifact.made_with)
    for name, tensor in artifact.tensors.items():
        assert torch.equal(found.tensors[name], tensor) and found.tensors[name].dtype == tensor.dtype
    assert model.artifacts.get(artifact.kind) is model.artifacts.get(artifact.kind)  # read once


def test_a_file_of_ones_own_goes_before_all(model: Model, tmp_path: Path) -> None:
    model.artifacts.save(numbers(model))
    other = model.artifacts.make(NUMBERS, {"a": torch.ones(2, 2)}, {})
    named = model.artifacts.save(other, tmp_path / "mine.json")
    assert torch.equal(model.artifacts.get(NUMBERS, str(named)).tensors["a"], torch.ones(2, 2))
    assert not torch.equal(model.artifacts.get(NUMBERS).tensors["a"], torch.ones(2, 2))


def test_a_new_file_takes_the_place_of_what_was_read(model: Model) -> None:
    file = model.artifacts.save(numbers(model))
    model.artifacts.get(NUMBERS)
    model.artifacts.save(model.artifacts.make(NUMBERS, {"a": torch.ones(2, 2)}, {}))
    os.utime(file, ns=(1, 1))  # as if time had passed
    assert torch.equal(model.artifacts.get(NUMBERS).tensors["a"], torch.ones(2, 2))


def test_where_the_model_cannot_be_written_to_the_data_folder_is_used(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writable = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != model.id and writable(path, mode))
    file = model.artifacts.save(numbers(model))
    assert file.is_relative_to((tmp_path / "data").resolve()) and model.content_hash in str(file)
    assert again(model).artifacts.get(NUMBERS).made_with == {"samples": 3}


def test_a_model_without_a_folder_has_its_place_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVW_DATA", str(tmp_path))
    model = Model("test/alone", network("llama", "workbench"), None)
    artifact = model.artifacts.make(NUMBERS, {"a": torch.ones(3, 2)}, {})
    assert model.artifacts.save(artifact).is_relative_to(tmp_path.resolve())
    assert Model("another/name", network("llama", "workbench"), None).artifacts.get(NUMBERS).model == model.content_hash


def test_a_place_that_cannot_be_made_is_said(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVW_DATA", str(tmp_path / "file"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(StorageError, match="cannot be made .* name a file with --out"):
        model.artifacts.save(numbers(model))


def test_none_is_said_with_the_command_and_a_method_without(model: Model) -> None:
    said = refused(model, NUMBERS)
    assert "numbers needs a calibration" in said and f"`kvw calibrate numbers {model.id}`" in said
    assert "or use snapkv, which needs none." in said


def test_a_name_with_a_blank_is_quoted_in_the_command(model: Model) -> None:
    assert NUMBERS.made_by("my models/a b") == "kvw calibrate numbers 'my models/a b'"


# -- files that are wrong --------------------------------------------------------------------------------------------------


def edited(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda file: file.write_text(""), "damaged, incomplete"),
    "cut short": (lambda file: file.write_text(file.read_text()[:-40]), "damaged, incomplete"),
    "not text": (lambda file: file.write_bytes(b"\xff\xfe\x00\x80"), "damaged, incomplete"),
    "a list": (lambda file: file.write_text("[1, 2]"), "damaged, incomplete"),
    "something else": (lambda file: file.write_text('{"a": 1}'), "is missing"),
    "no model": (lambda file: edited(file, model=None), "damaged, incomplete"),
    "made_with": (lambda file: edited(file, made_with=3), "damaged"),
    "a newer schema": (lambda file: edited(file, schema=2), "newer KV Workbench .schema 2, this one reads 1"),
    "no schema": (lambda file: edited(file, schema="one"), "schema 'one'"),
    "of another method": (lambda file: edited(file, method="headkv"), "for headkv, not for numbers"),
    "of another model": (
        lambda file: edited(file, model={"id": "house/other", "hash": "0" * 32}),
        "belongs to another model .it was made for house/other",
    ),
    "tensors are a list": (lambda file: edited(file, tensors=[1, 2]), "damaged, incomplete"),
    "a tensor is missing": (lambda file: edited(file, tensors={}), "a is missing"),
    "another shape": (lambda file: edited(file, tensors={"a": [[1.0], [2.0]]}), "shape"),
    "rows of unequal length": (lambda file: edited(file, tensors={"a": [[1.0], [2.0, 3.0]]}), "damaged"),
    "words": (lambda file: edited(file, tensors={"a": [["x", "y"], ["z", "w"]]}), "damaged"),
    "null": (lambda file: edited(file, tensors={"a": [[None, 1.0], [2.0, 3.0]]}), "damaged"),
    "not finite": (lambda file: file.write_text(file.read_text().replace("2.0", "NaN")), "NaN or infinity"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_calibration_that_is_wrong_is_one_sentence(name: str, model: Model) -> None:

    spoil, expected = WRONG[name]
    file = model.artifacts.save(numbers(model))
    spoil(file)
    said = refused(model, NUMBERS)
    assert re.search(expected, said) and str(file) in said
    assert f"make it again with `kvw calibrate numbers {model.id}`" in said


def test_trained_weights_that_are_wrong_are_one_sentence(model: Model) -> None:
    file = model.artifacts.save(weights(model))
    whole = file.read_bytes()
    for spoilt in (b"", whole[:7], whole[:60], whole[:-4], b"\xff" * 64, b'{"schema": 1}'):
        file.write_bytes(spoilt)
        assert "damaged, incomplete" in refused(model, WEIGHTS)
    head = {"schema": 1, "method": "weights", "model": {"id": "x", "hash": model.content_hash}, "made_with": {}}
    tensors = {"w1": torch.zeros(2, 5), "w2": torch.zeros(5, 3)}
    save_file(tensors, file)
    assert f"{HEADER} is missing" in refused(model, WEIGHTS)
    save_file(tensors, file, {HEADER: "not json"})
    assert "damaged" in refused(model, WEIGHTS)
    save_file({**tensors, "w2": torch.zeros(4, 3)}, file, {HEADER: json.dumps(head)})
    assert "w2 has the shape (4, 3)" in refused(model, WEIGHTS)  # the width of w1 is 5
    save_file({**tensors, "w1": torch.full((2, 5), torch.nan)}, file, {HEADER: json.dumps(head)})
    assert "w1 holds NaN" in refused(model, WEIGHTS)


def test_a_named_file_that_is_not_there_is_said(model: Model, tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", "\0", "x" * 5000):
        assert "cannot be read" in refused(model, NUMBERS, path)
    assert "damaged" in refused(model, NUMBERS, tmp_path)  # a folder


def test_tensors_that_no_one_could_use_are_not_made(model: Model) -> None:
    with pytest.raises(ArtifactError, match=r"a has the shape \(3, 2\)"):
        model.artifacts.make(NUMBERS, {"a": torch.ones(3, 2)}, {})


# -- the hash ----------------------------------------------------------------------------------------------------------------


def test_the_hash_is_the_models_in_every_dtype_and_no_others(folder: Path, tmp_path: Path) -> None:
    half = wb.load(folder).network.to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    loaded = [wb.load(tmp_path / "half", dtype=dtype) for dtype in ("bfloat16", "float32", "float16")]
    assert len({model.content_hash for model in loaded}) == 1
    changed = wb.load(tmp_path / "half")
    with torch.no_grad():
        changed.network.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    assert changed.content_hash != loaded[0].content_hash
    assert len({build(name).content_hash for name in ("llama", "mistral", "qwen2", "gemma2")}) == 4


def test_the_hash_knows_the_config(folder: Path) -> None:
    model = wb.load(folder)
    theta = dict(model.network.config.rope_parameters)
    model.network.config.rope_parameters = {**theta, "rope_theta": 5.0}
    assert content_hash(model.network, model.geometry) != wb.load(folder).content_hash


# -- strategies find them ----------------------------------------------------------------------------------------------------


def test_a_strategy_without_its_artifact_is_refused_before_anything_runs(model: Model) -> None:
    for recipe in ("compresskv()", 'snapkv(allocator="headkv")', 'adakv(scorer="compresskv")', "headkv() | kivi()"):
        with pytest.raises(ArtifactError, match="kvw calibrate"):
            wb.compare(model, prompt(40), ["full", recipe])
        with pytest.raises(ArtifactError, match="kvw calibrate"):
            wb.cache(recipe, model)
    with pytest.raises(ArtifactError, match="wb.cache"):
        Recipe.parse("compresskv()").check(model.geometry, None)


def test_the_drop_in_cache_of_a_transformers_model_finds_them_too(model: Model) -> None:
    from workbench.strategies.eviction.allocators.compresskv import CALIBRATION

    tensors = {"semantic": torch.rand(2, 4), "errors": torch.rand(2)}
    model.artifacts.save(model.artifacts.make(CALIBRATION, tensors, {}))
    cache = wb.cache("compresskv(budget=10)", again(model).network)
    feed(model, cache, prompt(60))
    assert sum(len(cache.kept(layer, 0)) for layer in range(2)) == 20


@pytest.mark.parametrize(
    "path", ['a "quoted" name.json', "back\\slash.json", "tab\there.json", "ä ö.json", "it's.json"]
)
def test_any_path_can_be_written_in_a_recipe(path: str) -> None:
    recipe = Recipe.parse(f"compresskv(artifact={path!r})")
    assert recipe.parts[0].artifact_path == path
    assert Recipe.parse(recipe.resolved) == recipe
    assert "artifact" not in Recipe.parse("compresskv()").resolved
