"""Memory of one decode attention, in a process of its own: what is held, and what a call adds at its peak.

Run as a module it measures one contender and prints JSON.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from workbench.bench.contest import CLEAR, can_count, status
from workbench.bench.peak import MALLOC

if TYPE_CHECKING:
    from workbench.bench.kernels import Case


def peak_of_call(case: Case, contender: str) -> dict[str, int] | None:
    """``held`` and ``passing`` bytes; None where the kernel does not count them."""
    if not can_count():
        return None
    environment = {**os.environ, **MALLOC, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "workbench.bench.kernel_memory", json.dumps(asdict(case)), contender]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring memory of {contender} failed: {done.stderr.strip().splitlines()[-1:]}")
    return dict(json.loads(done.stdout))


def measure(case: Case, contender: str) -> dict[str, int]:
    """In this process, which should have done nothing else."""
    import torch

    from workbench.bench.kernels import Case, Layer, dense_bytes

    with torch.inference_mode():
        small = Layer(
            Case(512, case.head_dim, case.queries, case.bits, case.group, case.sparsity), "cpu", torch.float32, 0
        )
        small.contenders()[contender]()  # the libraries' own buffers are no part of it
        layer = Layer(case, "cpu", torch.float32, 0)
        call = layer.contenders()[contender]
        held = layer.bytes_read() if contender == "fused" else dense_bytes(case, torch.float32)
        gc.collect()
        CLEAR.write_text("5")  # the high-water mark starts anew
        before = status("VmRSS")
        call()
        return {"held": held, "passing": max(0, status("VmHWM") - before)}


if __name__ == "__main__":
    from workbench.bench.kernels import Case

    print(json.dumps(measure(Case(**json.loads(sys.argv[1])), sys.argv[2])))
