"""One byte per attention weight: the logarithm from 10^-6 to 1 in 255 steps of 5.6 %, and 0 for what cannot be read."""

from __future__ import annotations

import torch
from torch import Tensor

DECADES, STEPS = 6, 254
HIDDEN = 0  # the code of a key that the query may not attend to: future, outside the window, evicted


def encode_weights(weights: Tensor, visible: Tensor | None = None) -> Tensor:
    """float weights in [0, 1] -> uint8 codes of the same shape; 1 stands for 10^-6 and everything below.

    Args:
        visible: bool of the same shape, False where the code is 0.
    """
    logarithm = weights.float().clamp(10.0**-DECADES, 1.0).log10_()
    codes = logarithm.add_(DECADES).mul_(STEPS / DECADES).add_(1.0).round_().to(torch.uint8)
    return codes if visible is None else codes.masked_fill_(~visible, HIDDEN)


def decode_weights(codes: Tensor) -> Tensor:
    """uint8 codes -> float32 weights, 0 where the code is 0: ``10 ** ((code - 1) / 254 * 6 - 6)``."""
    weights = 10.0 ** ((codes.float() - 1.0) * (DECADES / STEPS) - DECADES)
    return weights.masked_fill_(codes == HIDDEN, 0.0)
