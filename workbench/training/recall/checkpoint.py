"""Checkpoints of a training run: everything that resuming needs, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

FILE = "checkpoint.pt"


def save(folder: Path, state: dict[str, Any], file: str = FILE) -> None:
    """Write beside the old checkpoint, then take its place in one move: an interruption leaves one of the two."""
    fresh = folder / (file + ".new")
    torch.save(state, fresh)
    os.replace(fresh, folder / file)


def load(folder: Path, file: str = FILE) -> dict[str, Any]:
    """The state saved in `folder`; a missing or unreadable file is a ValueError in one sentence."""
    path = folder / file
    if not path.exists():
        raise ValueError(f"There is no checkpoint {path} to resume from; start without resume.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}); delete it and start again."
        ) from error
