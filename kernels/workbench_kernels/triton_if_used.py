"""Triton, where its kernels can run: on a CUDA device, or in its interpreter. Importing it takes a while elsewhere."""

from __future__ import annotations

import importlib
import os
from contextlib import suppress
from typing import Any

import torch

triton: Any = None
tl: Any = None
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"):
    with suppress(ImportError):  # without it the torch twins do the work
        triton = importlib.import_module("triton")
        tl = importlib.import_module("triton.language")


def runs(x: torch.Tensor) -> bool:
    """Whether a Triton kernel can take ``x`` as it is."""
    return triton is not None and x.is_cuda
