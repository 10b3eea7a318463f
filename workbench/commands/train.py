"""``kvw train``: training with a bar, the time to go, and a checkpoint after Ctrl-C."""

from __future__ import annotations

import errno
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from workbench.commands.output import check_target, size
from workbench.commands.progress import bar, to_go
from workbench.errors import StorageError, WorkbenchError

if TYPE_CHECKING:
    from workbench.training.locret import Progress as HeadsState
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


def locret(
    name: str, out: str | None, steps: int | None, width: int | None, resume: bool, device: str, seed: int
) -> int:
    """Train retaining heads for a model; 0, or 1 after an interruption.

    Raises:
        WorkbenchError: bad input, an unreadable checkpoint, or a disk that is full.
    """
    for option, value in (("--steps", steps), ("--width", width)):
        if value is not None and value < 1:
            raise WorkbenchError(f"{option} must be at least 1, got {value}.")
    check_target(out)
    from workbench.models.load import load
    from workbench.strategies.eviction.locret import HEADS
    from workbench.training.locret import STEPS, train

    model = load(name, device)
    file = Path(out).expanduser() if out is not None else model.artifacts.target(HEADS)
    checkpoint = file.with_name(file.name + ".checkpoint")
    try:
        with bar(f"locret, {name}") as tell:
            artifact = train(
                model, checkpoint, steps or STEPS, width, seed, resume, lambda p: tell(p.done, describe_heads(p))
            )
        model.artifacts.save(artifact, file)
        checkpoint.unlink(missing_ok=True)
    except KeyboardInterrupt:
        again = f"kvw train locret --model {shlex.quote(name)} --resume" + (f" --out {shlex.quote(out)}" if out else "")
        print(f"Interrupted; go on with the same options and --resume: {again}", file=sys.stderr)
        return 1
    except ValueError as error:  # what train says about its checkpoint
        raise WorkbenchError(str(error)) from None
    except (OSError, RuntimeError) as error:
        reason = _why_not_saved(error)
        if reason is None:
            raise
        raise StorageError(f"The heads could not be saved in {file}, because {reason}.") from None
    measured = artifact.made_with["measured"]
    print(
        f"On other texts: loss {measured['loss']:.3f}, {measured['overlap']:.0%} of the tenth wanted most is in the tenth that "
        f"scores best.\nThe heads are in {file} ({size(file.stat().st_size)}).",
        file=sys.stderr,
    )
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


def describe_heads(state: HeadsState) -> str:
    """One line on where the training of retaining heads stands."""
    return f"step {state.step:,}, loss {state.loss:.3f}, best tenth {state.overlap:.0%} right, {to_go(state.eta)}"
