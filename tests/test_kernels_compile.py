"""Triton compiles every kernel for two generations of GPUs; that needs its compiler, not a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT = importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.backends.nvidia") is None


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(WITHOUT, reason="Triton's compiler for CUDA is not installed here")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script), str(capability)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    assert compiled == {"_pack_kernel", "_unpack_kernel", "_hadamard_kernel", "_attend_kernel", "_merge_kernel"}
