"""Run optimum-quanto on random keys and values and freeze what it makes of them: codes, scales, shifts and decoded numbers.

Only needed to renew ``tests/oracle/fixtures/quanto.npz``; the tests read the file alone. quanto is no dependency of the
workbench, so it lives in an environment of its own:

    python3.11 -m venv quanto-env
    quanto-env/bin/pip install torch==2.13.0 numpy
    quanto-env/bin/pip install torch==2.13.0 "optimum-quanto==0.2.7"
    quanto-env/bin/python -m tests.oracle.make_quanto        # in the repository's root; seconds

Axis 0 makes groups of consecutive channels of one token, axis -1 groups of consecutive tokens of one channel, as Hugging Face's
``QuantizedCache`` uses it. Numbers are such that float16 holds every scale and minimum: the workbench keeps them so, and
quanto in the input's float32, which is the one thing in which they differ otherwise.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimum.quanto import MaxOptimizer, qint2, qint4, quantize_weight

FIXTURE = Path(__file__).parent / "fixtures" / "quanto.npz"
SHAPES = [(1, 2, 128, 64), (2, 1, 64, 32)]
GROUPS = (32, 64)
TYPES = {2: qint2, 4: qint4}


def numbers(shape: tuple[int, ...], group: int, axis: int, bits: int, seed: int) -> torch.Tensor:
    """Random float16 numbers whose groups have float16 minima and steps: low + step * [0, levels], both ends met."""
    generator = torch.Generator().manual_seed(seed)
    levels = (1 << bits) - 1
    x = torch.rand(shape, generator=generator)
    grouped = x.unflatten(2, (-1, group)) if axis == -1 else x.unflatten(3, (-1, group))
    along = 3 if axis == -1 else 4
    low, high = grouped.amin(along, keepdim=True), grouped.amax(along, keepdim=True)
    spread = (grouped - low) / (high - low)  # 0 and 1 are met in every group
    step = torch.randint(1, 50, low.shape, generator=generator) / 16  # so that the largest number is a float16, too
    shift = torch.randint(-300, 300, low.shape, generator=generator) / 16
    return (spread * (step * levels) + shift).reshape(shape).half().float()


def main() -> None:
    held: dict[str, Any] = {
        "versions": f"torch {torch.__version__}, optimum-quanto {version('optimum-quanto')}, python {platform.python_version()}"
    }
    for number, shape in enumerate(SHAPES):
        for bits, qtype in TYPES.items():
            for group in GROUPS:
                for axis in (0, -1):
                    if shape[2 if axis == -1 else 3] % group:
                        continue
                    x = numbers(shape, group, axis, bits, number)
                    scale, shift = MaxOptimizer()(x, qtype, axis, group)
                    found = quantize_weight(x, qtype, axis, scale, shift, group)
                    name = f"{number}/{bits}/{group}/{axis}"
                    held[f"{name}/x"], held[f"{name}/decoded"] = x.half().numpy(), found.dequantize().numpy()
    np.savez_compressed(FIXTURE, **held)


if __name__ == "__main__":
    main()
