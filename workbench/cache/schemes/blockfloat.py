"""Block floating point: channels of one entry in blocks that share an exponent, integers instead of a scale.

Axes: B batch, H KV heads, n entries, D head_dim, g block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.cache.schemes.base import Parts, Scheme, require_finite
from workbench_kernels import pack, unpack

LEAST = -119  # exponent of a block: below, the step would leave float32's normal numbers


class BlockFloat(Scheme):
    """Mantissas of ``bits`` bits with the sign, one 8-bit exponent a block: x = mantissa * 2^(exponent - bits + 2).

    Parts: codes int32 [B, H, n, D * bits / 32], two's complement; exponent int8 [B, H, n, D / g].

    Args:
        order: uint8 or int16 [1, H, D], the channels in the order in which they are cut into blocks, or None.
    """

    kinds = {"codes": "codes", "exponent": "scales"}

    def __init__(self, bits: int, block: int, order: Tensor | None = None) -> None:
        self.bits, self.block, self.order = bits, block, order

    def encode(self, x: Tensor, at: Tensor | None) -> Parts:
        blocks = self._ordered(x.float()).unflatten(-1, (-1, self.block))  # [B, H, n, D / g, g]
        largest = blocks.abs().amax(-1)
        require_finite(largest)
        # frexp gives the exact floor(log2) plus one, where a logarithm rounds up just below a power of two.
        exponent = (torch.frexp(largest).exponent - 1).clamp(LEAST, 127).masked_fill(largest == 0, LEAST)
        top = (1 << (self.bits - 1)) - 1
        mantissa = (blocks / self._step(exponent)).round_().clamp_(-top, top)  # half to even
        codes = mantissa.to(torch.int16).bitwise_and_((1 << self.bits) - 1).to(torch.uint8)
        return {"codes": pack(codes.flatten(-2), self.bits), "exponent": exponent.to(torch.int8)}

    def decode(self, parts: Parts, span: tuple[int, int], dtype: torch.dtype, at: Tensor | None) -> Tensor:
        codes = unpack(parts["codes"], self.bits).to(torch.int16)
        signed = codes - ((codes >> (self.bits - 1)) << self.bits)
        blocks = signed.float().unflatten(-1, (-1, self.block)) * self._step(parts["exponent"])
        return self._unordered(blocks.flatten(-2)).to(dtype)

    def _step(self, exponent: Tensor) -> Tensor:
        return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.int() - (self.bits - 2))[..., None]

    def _ordered(self, x: Tensor) -> Tensor:
        if self.order is None:
            return x
        return x.gather(-1, self.order.long()[:, :, None].expand(x.shape))

    def _unordered(self, x: Tensor) -> Tensor:
        if self.order is None:
            return x
        return torch.empty_like(x).scatter_(-1, self.order.long()[:, :, None].expand(x.shape), x)

    def shared(self) -> list[tuple[str, Tensor]]:
        return [] if self.order is None else [("order", self.order)]

    def row(self, b: int, h: int) -> Scheme:
        return self if self.order is None else BlockFloat(self.bits, self.block, self.order[:, h : h + 1])


def smallest_index(order: Tensor) -> Tensor:
    """Channel numbers in the smallest type that holds them."""
    return order.to(torch.uint8 if order.shape[-1] <= 256 else torch.int16)
