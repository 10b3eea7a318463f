"""``kvw calibrate``: measure a model for the methods that need it, with a bar and the time to go."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from workbench.commands.output import check_target
from workbench.commands.progress import bar, to_go
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from workbench.models.artifacts import Artifact


def calibrate(method: str, name: str, samples: int, out: str | None, device: str, dtype: str) -> int:
    """Measure ``name`` for ``method`` and write the artifact to ``out`` or to where it belongs."""
    if samples < 1:
        raise WorkbenchError(f"--samples must be at least 1, got {samples}.")
    check_target(out)
    from workbench.calibration.make import CALIBRATIONS
    from workbench.models.load import load

    model = load(name, device, dtype)
    stages: dict[str, float] = {}  # when each began

    with bar(f"{method}, {name}") as tell:

        def told(stage: str, done: int, total: int) -> None:
            began = stages.setdefault(stage, time.monotonic())
            left = (time.monotonic() - began) / max(1, done - 1) * (total - done) if done > 1 else float("inf")
            tell(done / total, f"{stage}, {done} of {total}, {to_go(left)}")

        artifact = CALIBRATIONS[method](model, samples, told)
    file = model.artifacts.save(artifact, out)
    print(summary(artifact), file=sys.stderr)
    print(f"The calibration is in {file}.", file=sys.stderr)
    return 0


def summary(artifact: Artifact) -> str:
    """What was found, in a few lines."""
    made = artifact.made_with
    lines = [f"{made['samples']} documents were read."]
    if "needles_answered" in made:
        lines = [f"{made['needles_answered']} of {made['samples']} needle prompts were answered."]
    for name, found in artifact.tensors.items():
        if found.ndim > 2:
            continue  # too much to print
        if found.ndim == 2:
            best = [row.argsort(descending=True, stable=True)[:4].tolist() for row in found]
            lines += [f"{name}, best heads of layer {layer}: {heads}" for layer, heads in enumerate(best)]
        else:
            lines.append(f"{name} by layer: {' '.join(f'{value:.3f}' for value in found.tolist())}")
    return "\n".join(lines)
