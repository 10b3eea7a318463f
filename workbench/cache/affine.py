"""Asymmetric round-to-nearest quantization of groups, with float16 scale and minimum (4 bytes a group)."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.cache.schemes.base import require_finite
from workbench_kernels import pack, unpack_float


def codes_of(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize groups along the last axis.

    Args:
        x: [..., g] any float dtype; bits: up to 8.

    Returns:
        codes uint8 [..., g], scale float16 [...], minimum float16 [...].

    Raises:
        WorkbenchError: NaN, infinity, or a group whose minimum or scale does not fit float16.
    """
    x = x.float()
    levels = (1 << bits) - 1
    low, high = x.amin(-1), x.amax(-1)
    low16 = low.half()
    # The step is taken from the stored minimum, so that rounding it to float16 costs no second error.
    step16 = ((high - low16.float()) / levels).half()
    require_finite(step16, low16)
    step = step16.float()[..., None]
    codes = torch.where(step > 0, (x - low16.float()[..., None]) / step, 0.0)  # constant groups: code 0, exact
    codes = codes.round_().clamp_(0, levels)  # round half to even, as the paper's kernel does
    return codes.to(torch.uint8), step16, low16


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`codes_of`, the codes packed: int32 [..., g * bits / 32]; g * bits must be a multiple of 32."""
    codes, step, low = codes_of(x, bits)
    return pack(codes, bits), step, low


def dequantize(words: Tensor, scale: Tensor, low: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Invert :func:`quantize`: [..., g] in ``dtype``; the arithmetic is float32."""
    codes = unpack_float(words, bits)
    return codes.mul_(scale.float()[..., None]).add_(low.float()[..., None]).to(dtype)
