"""The house models: small, shipped with the package, loaded without a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "house"


@dataclass(frozen=True)
class HouseModel:
    """A shipped model: what it is and where."""

    name: str
    title: str
    folder: str


HOUSE = {
    "house/recall": HouseModel(
        "house/recall", "Causal LM trained on recall, copying and variable tracking; byte-level BPE", "recall"
    ),
}


def house_path(name: str) -> Path:
    return ROOT / HOUSE[name].folder


def models() -> list[dict[str, str]]:
    """The models that need no network: name and title. Folders and Hub ids load as well."""
    return [{"name": m.name, "title": m.title} for m in HOUSE.values() if (house_path(m.name) / "config.json").exists()]
