"""The ways a kernel's result can be computed, as test parameters: the torch twin, Triton's interpreter, a CUDA device."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import pytest
import torch


class Path(NamedTuple):
    """Where the tensors lie, and what to ask of a kernel's public function."""

    device: str
    kernel: bool


def _no_interpreter() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed here"
    return "Triton compiles where there is a CUDA device" if torch.cuda.is_available() else ""


TWIN: Any = pytest.param(Path("cpu", False), id="twin")
INTERPRETED: Any = pytest.param(
    Path("cpu", True),
    id="interpreted",
    marks=pytest.mark.skipif(bool(_no_interpreter()), reason=_no_interpreter() or "-"),
)
COMPILED: Any = pytest.param(Path("cuda", True), id="compiled", marks=pytest.mark.gpu)
KERNELS = [INTERPRETED, COMPILED]
ALL_PATHS = [TWIN, *KERNELS]
