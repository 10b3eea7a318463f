"""Artifacts: what was calibrated or trained for one model, in a file that says for which method and model and how.

A calibration is JSON, trained weights are safetensors; both give named tensors. They lie in the folder ``artifacts`` beside the
model's weights (the house models' are shipped so), or, where that cannot be written to and for models from the Hub, in the
person's data folder under the model's hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from workbench.errors import ArtifactError, StorageError
from workbench.runs.save import check_writable, to_json, write_bytes, write_text

if TYPE_CHECKING:
    from workbench.models.geometry import Geometry

SCHEMA = 1
FOLDER = "artifacts"
HEADER = "kv_workbench"  # where a safetensors file keeps what a JSON one says at its top
SAMPLED = 64  # numbers hashed of every weight
OF_THE_DTYPE = ("dtype", "element_size", "bytes_per_token")  # of a geometry: not the same in every dtype
SMALLEST = 2.0**-14  # float16 holds what is below it less exactly

# What Python, json and torch raise where a file holds something else than it should.
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError)

Shape = tuple[int | str, ...]
"""Sizes along each axis; a word stands for any size, the same wherever it occurs in an artifact."""


@dataclass(frozen=True)
class Kind:
    """One kind of artifact.

    Attributes:
        method: key of the method it is for; what: what it is, in a sentence.
        suffix: ``.json`` for calibrated numbers, ``.safetensors`` for trained weights.
        command: that makes it; ``{model}`` is the model's name.
        instead: a method that needs none.
        shapes: the tensors it holds, by name, for a model of this geometry.
    """

    method: str
    what: str
    suffix: str
    command: str
    instead: str
    shapes: Callable[[Geometry], Mapping[str, Shape]]

    @property
    def file_name(self) -> str:
        return self.method + self.suffix

    def made_by(self, model: str) -> str:
        return self.command.format(model=shlex.quote(model))


@dataclass(frozen=True)
class Artifact:
    """A calibration or a trained part, with the hash of its model and the parameters it was made with."""

    kind: Kind
    model: str
    made_with: dict[str, Any]
    tensors: dict[str, Tensor]  # float32 from JSON, as saved from safetensors


def content_hash(network: Any, geometry: Geometry) -> str:
    """What a model's artifacts know it by: SHA-256 over its config and a sample of every weight, as 32 hex digits.

    The config counts by its geometry, model type and rope parameters; a weight by its name, its shape and :data:`SAMPLED` of its
    numbers, evenly spaced: milliseconds for any size, and no training leaves all of them as they were. Numbers are rounded to
    bfloat16, and below 2^-14 they count as zero, so a bfloat16 or float16 checkpoint has one hash in whatever dtype it is loaded.
    """
    config = network.config.get_text_config()
    shape = {name: value for name, value in geometry.as_dict().items() if name not in OF_THE_DTYPE}
    about = [config.model_type, shape, getattr(config, "rope_parameters", None)]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, weight in sorted(network.named_parameters()):
        numbers = weight.detach().flatten()
        at = torch.arange(SAMPLED, device=numbers.device) * (len(numbers) - 1) // (SAMPLED - 1)
        sample = numbers[at].float()
        rounded = torch.where(sample.abs() < SMALLEST, 0.0, sample).bfloat16()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(rounded.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def data_folder() -> Path:
    """Where a person's own files go: ``KVW_DATA``, or the place the system has for such."""
    if named := os.environ.get("KVW_DATA"):
        return Path(named).expanduser()
    home = Path(os.path.expanduser("~"))  # unlike Path.home(), no error where there is none
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    return base / "kv-workbench"


class Artifacts:
    """The artifacts of one model, read when first asked for.

    Args:
        name: of the model, for sentences and commands; geometry: its shape.
        model_hash: gives its content hash.
        folder: of its weights, or None for a model that has no folder of its own.
    """

    def __init__(
        self, name: str, geometry: Geometry, model_hash: Callable[[], str], folder: Path | None = None
    ) -> None:
        self.name, self.geometry, self.folder, self._hash = name, geometry, folder, model_hash
        self._held: dict[str, Artifact] = {}  # by method: put here by hand
        self._read: dict[tuple[Path, int], Artifact] = {}  # by file and its time of change

    @property
    def model_hash(self) -> str:
        return self._hash()

    def make(self, kind: Kind, tensors: dict[str, Tensor], made_with: dict[str, Any]) -> Artifact:
        """An artifact of this model; ArtifactError where the tensors are not what its kind says."""
        wrong = _wrong(kind, tensors, self.geometry)
        if wrong:
            raise ArtifactError(f"The {kind.what} of {self.name} cannot be used: {wrong}.")
        return Artifact(kind, self.model_hash, made_with, tensors)

    def put(self, artifact: Artifact) -> None:
        """Use ``artifact`` from now on, whatever is on disk."""
        self._held[artifact.kind.method] = artifact

    def holding(self, artifact: Artifact) -> Artifacts:
        """The same, with ``artifact`` put; this collection stays as it is."""
        twin = Artifacts(self.name, self.geometry, self._hash, self.folder)
        twin._held, twin._read = dict(self._held), self._read
        twin.put(artifact)
        return twin

    def get(self, kind: Kind, path: str = "") -> Artifact:
        """The artifact of a kind, from ``path`` or from where it belongs.

        Raises:
            ArtifactError: there is none, it is of another model, method or schema, or damaged.
        """
        if path:
            return self._from(kind, Path(path).expanduser())
        if kind.method in self._held:
            return self._held[kind.method]
        for place in self._places():
            if (file := place / kind.file_name).is_file():
                return self._from(kind, file)
        raise ArtifactError(
            f"{kind.method} needs a {kind.what} of {self.name}, and there is none; make it with "
            f"`{kind.made_by(self.name)}`, or use {kind.instead}, which needs none."
        )

    def save(self, artifact: Artifact, path: str | Path | None = None) -> Path:
        """Write an artifact to ``path``, or to where it belongs; the file is there whole or not at all.

        Returns:
            The file written.

        Raises:
            StorageError: it cannot be written there.
        """
        target = Path(path).expanduser() if path is not None else self.target(artifact.kind)
        head = {
            "schema": SCHEMA,
            "method": artifact.kind.method,
            "model": {"id": self.name, "hash": artifact.model},
            "made_with": artifact.made_with,
        }
        if artifact.kind.suffix == ".json":
            numbers = {name: tensor.tolist() for name, tensor in artifact.tensors.items()}
            return write_text(target, to_json({**head, "tensors": numbers}))
        held = {name: tensor.contiguous() for name, tensor in artifact.tensors.items()}
        return write_bytes(target, save(held, {HEADER: json.dumps(head)}))

    def target(self, kind: Kind) -> Path:
        """Where an artifact of this kind is saved; its folder is made."""
        own, *beside = self._places()
        place = next((p for p in beside if os.access(p if p.exists() else p.parent, os.W_OK)), own)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"The folder {place} for the {kind.what} cannot be made ({error.strerror or error}); name a file with --out."
            ) from None
        return check_writable(place / kind.file_name)

    def _places(self) -> list[Path]:
        """The person's own place first: what is there could not be saved beside the model."""
        own = data_folder() / FOLDER / self.model_hash
        return [own] if self.folder is None else [own, self.folder / FOLDER]

    def _from(self, kind: Kind, file: Path) -> Artifact:
        try:
            stamp = file.stat().st_mtime_ns
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ArtifactError(
                f"The {kind.what} {str(file)[:80]!r} for {kind.method} cannot be read ({reason}); make it with "
                f"`{kind.made_by(self.name)}`, or leave artifact= out."
            ) from None
        if (file, stamp) not in self._read:
            self._read[file, stamp] = read(kind, file, self)
        return self._read[file, stamp]


def read(kind: Kind, file: Path, model: Artifacts) -> Artifact:
    """Read an artifact of ``model`` and check that it is one; ArtifactError in one sentence otherwise."""
    again = f"make it again with `{kind.made_by(model.name)}`"
    try:
        head, tensors = _json(file) if kind.suffix == ".json" else _safetensors(file)
        schema, method = head["schema"], head["method"]
        made_for, made_with, owner = head["model"]["hash"], head["made_with"], head["model"]["id"]
    except (OSError, SafetensorError, *MALFORMED) as error:
        raise ArtifactError(f"{file} is damaged, incomplete or no {kind.what} ({_reason(error)}); {again}.") from None
    if isinstance(schema, int) and schema > SCHEMA:
        raise ArtifactError(
            f"{file} was written by a newer KV Workbench (schema {schema}, this one reads {SCHEMA}); update, or {again}."
        )
    if method != kind.method:
        raise ArtifactError(f"{file} is for {str(method)[:40]}, not for {kind.method}; {again}.")
    if made_for != model.model_hash:
        raise ArtifactError(
            f"{file} belongs to another model (it was made for {str(owner)[:80]}, or the weights have changed since); "
            f"{again}."
        )
    wrong = _wrong(kind, tensors, model.geometry) if schema == SCHEMA else f"it says schema {str(schema)[:20]!r}"
    if wrong or not isinstance(made_with, dict):
        raise ArtifactError(f"{file} is damaged ({wrong or 'made_with is no table'}); {again}.")
    return Artifact(kind, made_for, made_with, tensors)


def _json(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    head = json.loads(file.read_text(encoding="utf-8"))
    return head, {name: torch.tensor(numbers, dtype=torch.float32) for name, numbers in head["tensors"].items()}


def _safetensors(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        head = json.loads((opened.metadata() or {})[HEADER])
        return head, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)


def _wrong(kind: Kind, tensors: Mapping[str, Tensor], geometry: Geometry) -> str:
    """What is wrong with the tensors, or nothing."""
    sizes: dict[str, int] = {}
    for name, shape in kind.shapes(geometry).items():
        if name not in tensors:
            return f"{name} is missing"
        found = tuple(tensors[name].shape)
        wanted = [sizes.setdefault(want, size) if isinstance(want, str) else want for want, size in zip(shape, found)]
        if len(found) != len(shape) or list(found) != wanted:
            return f"{name} has the shape {found}, not {shape}"
        if not bool(tensors[name].isfinite().all()):
            return f"{name} holds NaN or infinity"
    return ""


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:120]
