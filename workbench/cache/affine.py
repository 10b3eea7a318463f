"""Asymmetric round-to-nearest quantization of groups, with float16 scale and minimum (4 bytes a group)."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench_kernels import pack, unpack_float


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize groups along the last axis.

    Args:
        x: [..., g] any float dtype; g * bits must be a multiple of 32.
        bits: 2, 4 or 8.

    Returns:
        packed codes int32 [..., g * bits / 32], scale float16 [...], minimum float16 [...].

    Raises:
        WorkbenchError: NaN, infinity, or a group whose minimum or scale does not fit float16.
    """
    x = x.float()
    levels = (1 << bits) - 1
    low, high = x.amin(-1), x.amax(-1)
    low16 = low.half()
    # The step is taken from the stored minimum, so that rounding it to float16 costs no second error.
    step16 = ((high - low16.float()) / levels).half()
    if not bool(torch.isfinite(step16).all() & torch.isfinite(low16).all()):
        raise WorkbenchError(
            "These keys or values cannot be quantized: they hold NaN, infinity or numbers beyond float16's 65,504; "
            "use a recipe without quantization for this model."
        )
    step = step16.float()[..., None]
    codes = torch.where(step > 0, (x - low16.float()[..., None]) / step, 0.0)  # constant groups: code 0, exact
    codes = codes.round_().clamp_(0, levels)  # round half to even, as the paper's kernel does
    return pack(codes.to(torch.uint8), bits), step16, low16


def dequantize(words: Tensor, scale: Tensor, low: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Invert :func:`quantize`: [..., g] in ``dtype``; the arithmetic is float32."""
    codes = unpack_float(words, bits)
    return codes.mul_(scale.float()[..., None]).add_(low.float()[..., None]).to(dtype)
