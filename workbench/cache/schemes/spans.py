"""Scales that span more than a group: of a channel over a whole run, of a token over all heads (KCVT, ZipCache).

Axes: B batch, H KV heads, n entries, D head_dim. Codes are packed along channels: int32 [B, H, n, D * bits / 32].
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.cache.affine import codes_of
from workbench.cache.schemes.base import Parts, Scheme, require_finite
from workbench_kernels import pack, unpack_float


class ChannelsOfRun(Scheme):
    """One scale and one minimum a channel for all entries of a run: float16 [B, H, 1, D]."""

    whole = frozenset({"scale", "low"})

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def encode(self, x: Tensor, at: Tensor | None) -> Parts:
        codes, scale, low = codes_of(x.transpose(2, 3), self.bits)  # [B, H, D, n]
        packed = pack(codes.transpose(2, 3).contiguous(), self.bits)
        return {"codes": packed, "scale": scale[:, :, None], "low": low[:, :, None]}

    def decode(self, parts: Parts, span: tuple[int, int], dtype: torch.dtype, at: Tensor | None) -> Tensor:
        dense = unpack_float(parts["codes"], self.bits)
        return dense.mul_(parts["scale"].float()).add_(parts["low"].float()).to(dtype)


class AcrossHeads(Scheme):
    """One scale and one minimum an entry for the channels of all heads, float16 [B, 1, n]; optionally channels are divided
    by a number of their own first (ZipCache's channel-separable tokenwise scheme).

    Args:
        channel: float16 [B, H, D], positive, or None.
    """

    separable = False

    def __init__(self, bits: int, channel: Tensor | None = None) -> None:
        self.bits, self.channel = bits, channel

    def encode(self, x: Tensor, at: Tensor | None) -> Parts:
        heads = x.shape[1]
        x = x.float() if self.channel is None else x.float() / self.channel.float()[:, :, None]
        codes, scale, low = codes_of(x.transpose(1, 2).flatten(2), self.bits)  # groups are [B, n, H * D]
        by_head = codes.unflatten(2, (heads, -1)).transpose(1, 2).contiguous()
        return {"codes": pack(by_head, self.bits), "scale": scale[:, None], "low": low[:, None]}

    def decode(self, parts: Parts, span: tuple[int, int], dtype: torch.dtype, at: Tensor | None) -> Tensor:
        dense = unpack_float(parts["codes"], self.bits)
        dense = dense.mul_(parts["scale"].float()[..., None]).add_(parts["low"].float()[..., None])
        return (dense if self.channel is None else dense.mul_(self.channel.float()[:, :, None])).to(dtype)

    def shared(self) -> list[tuple[str, Tensor]]:
        return [] if self.channel is None else [("scales", self.channel)]


def channel_sizes(x: Tensor) -> Tensor:
    """ZipCache's c = sqrt(max |x|) of every channel over entries x [B, H, n, D]: float16 [B, H, D], 1 where all are zero."""
    sizes = x.float().abs().amax(2).sqrt().half()
    require_finite(sizes)
    return sizes.masked_fill(sizes == 0, 1.0)
