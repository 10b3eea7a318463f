"""The Walsh-Hadamard transform along head_dim: spreads what a few channels hold over all, and undoes itself."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from workbench_kernels.triton_if_used import runs, tl, triton

LARGEST = 256  # block that the kernel takes


def hadamard_reference(x: Tensor, block: int) -> Tensor:
    """Butterflies in float32: Sylvester's order, times ``block ** -0.5``, so that lengths stay as they are."""
    y = x.float().unflatten(-1, (-1, block))
    half = 1
    while half < block:
        pairs = y.unflatten(-1, (-1, 2, half))
        y = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2).flatten(-3)
        half *= 2
    return (y * block**-0.5).flatten(-2).to(x.dtype)


@cache
def hadamard_matrix(block: int, device: torch.device) -> Tensor:
    """float32 [block, block]: symmetric, and its own inverse."""
    return hadamard_reference(torch.eye(block, device=device), block)


if triton is not None:

    @triton.jit
    def _signs(i, j):
        """Sylvester's +-1 at rows i and columns j: -1 where i and j have an odd number of ones in common."""
        odd = i & j
        odd = odd ^ (odd >> 4)
        odd = odd ^ (odd >> 2)
        odd = odd ^ (odd >> 1)
        return 1.0 - 2.0 * (odd & 1).to(tl.float32)

    @triton.jit
    def _hadamard_kernel(x, out, rows, factor, BLOCK: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr):
        # In parts of the sum, so that a matrix of 256 x 256 need not fit the registers.
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # int64 before any stride
        column = tl.arange(0, BLOCK)
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, BLOCK, PART):
            term = start + tl.arange(0, PART)
            part = tl.load(x + row[:, None] * BLOCK + term[None, :], mask=(row < rows)[:, None], other=0.0)
            signs = _signs(term[:, None], column[None, :]).to(part.dtype)  # exact in every dtype
            total += tl.dot(part, signs, input_precision="ieee")
        tl.store(
            out + row[:, None] * BLOCK + column[None, :],
            (total * factor).to(out.dtype.element_ty),
            mask=(row < rows)[:, None],
        )


def hadamard(x: Tensor, block: int | None = None, *, reference: bool = False, kernel: bool = False) -> Tensor:
    """Transform runs of ``block`` numbers along the last axis; applied twice it gives x back.

    Args:
        x: [..., D], any float dtype; the sums are float32.
        block: a power of two that divides D; None takes the largest, which is D itself for 32, 64, 128 and 256.
        reference, kernel: ask for the butterflies, or for the Triton kernel (tests run it in Triton's interpreter).

    Returns:
        [..., D] in x's dtype.

    Raises:
        ValueError: ``block`` is no power of two, or does not divide D.
    """
    width = x.shape[-1]
    block = width & -width if block is None else block
    if block < 1 or block & (block - 1) or width % block:
        raise ValueError(f"a Hadamard block must be a power of two that divides {width}, got {block}")
    if reference or x.numel() == 0:
        return hadamard_reference(x, block)
    if kernel or (runs(x) and 16 <= block <= LARGEST):
        if not 16 <= block <= LARGEST:
            raise ValueError(f"the kernel takes blocks of 16 to {LARGEST}, got {block}")
        with torch.cuda.device_of(x):
            return _launch(x, block)
    if block > 2 * LARGEST:
        return hadamard_reference(x, block)  # fewer operations than the product with a matrix
    return (x.float().unflatten(-1, (-1, block)) @ hadamard_matrix(block, x.device)).flatten(-2).to(x.dtype)


def _launch(x: Tensor, block: int) -> Tensor:
    x = x.contiguous()
    out, rows = torch.empty_like(x), x.numel() // block
    _hadamard_kernel[(triton.cdiv(rows, 32),)](x, out, rows, block**-0.5, BLOCK=block, PART=min(32, block), ROWS=32)
    return out
