"""``kvw train recall``: training with a bar, the time to go, and a checkpoint after Ctrl-C."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from workbench.commands.progress import bar, to_go
from workbench.errors import StorageError, WorkbenchError

if TYPE_CHECKING:
    from workbench.training.recall.train import Progress as State


def recall(out: Path, minutes: float | None, steps: int | None, resume: bool, device: str, seed: int) -> int:
    """Train into ``out``; 0, or 1 after an interruption.

    Raises:
        WorkbenchError: bad input, an unreadable checkpoint, or a disk that is full.
    """
    for name, value in (("--minutes", minutes), ("--steps", steps)):
        if value is not None and not value > 0:
            raise WorkbenchError(f"{name} must be above 0, got {value}.")
    if out.exists() and not out.is_dir():
        raise StorageError(f"{out} is a file; give a folder for the model.")
    from workbench.models.load import pick_device
    from workbench.training.recall.train import train

    place = pick_device(device)
    try:
        with bar("house/recall") as tell:
            train(out, minutes, steps, resume, str(place), seed, lambda state: tell(state.done, describe(state)))
    except KeyboardInterrupt:
        print(f"Interrupted; go on with: kvw train recall --out {out} --resume", file=sys.stderr)
        return 1
    except ValueError as error:  # what train says about its arguments and its checkpoint
        raise WorkbenchError(str(error)) from None
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _why_not_saved(error)
        if reason is None:
            raise
        raise StorageError(
            f"The model could not be saved in {out}, because {reason}; an earlier checkpoint is intact."
        ) from None
    print(f"The model is in {out}.", file=sys.stderr)
    return 0


def _why_not_saved(error: Exception) -> str | None:
    """The reason where saving failed, None for any other failure. torch and safetensors wrap what the disk says."""
    if isinstance(error, OSError):
        return "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
    text = str(error)
    if any(sign in text for sign in ("No space left", "PytorchStreamWriter", "iostream error", "file write failed")):
        return "the disk is full or cannot be written to"
    return None


def describe(state: State) -> str:
    """One line on where the training stands."""
    level = state.accuracy.get(state.level)
    judged = f", answers right {level:.0%}" if level is not None else ""
    return f"step {state.step:,}, level {state.level}, loss {state.loss:.2f}{judged}, {to_go(state.eta)}"
