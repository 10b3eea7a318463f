"""Compile every launch of the kernels for a GPU that need not be there; run as a process of its own, without the
interpreter. Prints one line per launch: kernel, target, registers that did not fit."""

from __future__ import annotations

import sys
from typing import Any

import torch

torch.cuda.is_available = lambda: True  # the kernels are defined where a device could run them

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import workbench_kernels
from workbench_kernels import hadamard as hadamard_module  # noqa: F401  (named, so that the modules are loaded)
from workbench_kernels import packed_attention_kernel, sparse_kernel, splits

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Compiled:
    """Stands where a kernel stands, and compiles what would be launched, from the arguments of the launch itself."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel, self.capability = kernel, capability

    def __getitem__(self, grid: Any) -> Any:
        return self._compile

    def _compile(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
        signature: dict[str, str] = {}
        aligned = {}
        for index, (name, value) in enumerate(zip(self.kernel.arg_names, args, strict=False)):
            if isinstance(value, torch.Tensor):
                signature[name], aligned[(index,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(self.kernel, signature, constexprs=constants, attrs=aligned)
        target = GPUTarget("cuda", self.capability, 32)
        done = triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})
        assert done.asm["cubin"]
        print(
            self.kernel.fn.__name__,
            f"sm_{self.capability}",
            f"{done.metadata.shared} bytes of shared memory",
            flush=True,
        )


def replace(module: Any, name: str, capability: int) -> None:
    setattr(module, name, Compiled(getattr(module, name), capability))


def main(capability: int) -> None:
    modules = {
        sys.modules["workbench_kernels.pack"]: ("_pack_kernel", "_unpack_kernel"),
        sys.modules["workbench_kernels.hadamard"]: ("_hadamard_kernel",),
        packed_attention_kernel: ("_attend_kernel",),
        sparse_kernel: ("_attend_kernel",),
        splits: ("_merge_kernel",),
    }
    for module, names in modules.items():
        for name in names:
            replace(module, name, capability)
    for bits in (2, 4, 8):
        words = workbench_kernels.pack(torch.zeros(3, 64, dtype=torch.uint8), bits, kernel=True)
        workbench_kernels.unpack(words, bits, kernel=True)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for width in (32, 96, 256):
            workbench_kernels.hadamard(torch.zeros(5, width, dtype=dtype), kernel=True)
        for bits, per, ragged in ((2, "channel", False), (4, "token", True), (8, "channel", True)):
            _packed(dtype, bits, per, ragged)
        x = torch.zeros(1, 2, 64, 128, dtype=dtype)
        keys, values = (workbench_kernels.compress(x, of_keys) for of_keys in (True, False))
        workbench_kernels.sparse_attention(torch.zeros(1, 8, 1, 128, dtype=dtype), keys, values, 1.0, kernel=True)


def _packed(dtype: torch.dtype, bits: int, per: str, ragged: bool) -> None:
    def side(shape: tuple[int, ...], per: Any) -> workbench_kernels.Packed:
        codes = torch.zeros(*shape, bits, dtype=torch.int32)  # groups of 32
        return workbench_kernels.Packed(codes, torch.zeros(shape).half(), torch.zeros(shape).half(), bits, per)

    keys = side((1, 2, 2, 128), per) if per == "channel" else side((1, 2, 64, 4), per)
    masks: dict[str, Any] = {}
    if ragged:
        masks = {
            "lengths": torch.ones(1, 2, dtype=torch.int32),
            "visible": torch.ones(1, 2, 64, dtype=torch.bool),
            "softcap": 30.0,
        }
    q = torch.zeros(1, 8, 1, 128, dtype=dtype)
    workbench_kernels.packed_attention(q, keys, side((1, 2, 64, 4), "token"), 1.0, kernel=True, **masks)


if __name__ == "__main__":
    main(int(sys.argv[1]))
