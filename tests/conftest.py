"""Settings that must be in place before torch, triton and transformers are imported, and skips for what a machine lacks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# No test needs the network; a name that would be fetched from the Hub fails at once. Subprocesses inherit all of this.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs in several processes instead: make test WORKERS=…
# Notebook kernels and commands that a test starts take the same checkout as the tests, installed or not.
os.environ.setdefault("KVW_DATA", str(ROOT / "test-results" / "data"))  # not what the person has calibrated
_roots = [str(ROOT / folder) for folder in (".", "kernels", "widgets")]
os.environ["PYTHONPATH"] = os.pathsep.join([*_roots, *filter(None, [os.environ.get("PYTHONPATH")])])

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels' own code, on the CPU; read when triton is imported

NO_CUDA = "needs a CUDA device"
NO_CHROMIUM = "needs chromium on the PATH, or its path in CHROMIUM (Debian: apt-get install chromium)"


def chromium_path() -> str | None:
    """The browser that the tests drive: never one that a test tool downloaded."""
    named = os.environ.get("CHROMIUM")
    names = [named] if named else ["chromium", "chromium-browser", "google-chrome"]
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="session")
def chromium() -> str:
    return chromium_path() or pytest.skip(NO_CHROMIUM)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_cuda, no_chromium = not torch.cuda.is_available(), chromium_path() is None
    for item in items:
        if no_cuda and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_CUDA))
        if no_chromium and item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.skip(reason=NO_CHROMIUM))
