"""Round to nearest in groups: of tokens of one channel, or of channels of one token (KIVI's two ways), in integers or fp8.

Axes: B batch, H KV heads, n entries, D head_dim, g group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.cache.affine import codes_of, dequantize, quantize
from workbench.cache.schemes.base import Parts, Scheme, require_finite
from workbench_kernels import Packed, pack, unpack_float

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


class PerChannel(Scheme):
    """Groups of ``group`` consecutive entries of one channel, packed along entries.

    Parts: codes int32 [B, H, n / g, D, g * bits / 32]; scale, low float16 [B, H, n / g, D].
    """

    def __init__(self, bits: int, group: int) -> None:
        self.bits, self.unit = bits, group

    def encode(self, x: Tensor, at: Tensor | None) -> Parts:
        grouped = x.unflatten(2, (-1, self.unit)).transpose(-1, -2)  # [B, H, groups, D, g]
        codes, scale, low = quantize(grouped, self.bits)
        return {"codes": codes, "scale": scale, "low": low}

    def decode(self, parts: Parts, span: tuple[int, int], dtype: torch.dtype, at: Tensor | None) -> Tensor:
        dense = dequantize(parts["codes"], parts["scale"], parts["low"], self.bits, dtype)
        return dense.transpose(-1, -2).flatten(2, 3)

    def held(self, parts: Parts) -> Packed:
        return Packed(parts["codes"], parts["scale"], parts["low"], self.bits, "channel")


class PerToken(Scheme):
    """Groups of ``group`` consecutive channels of one entry, packed along channels.

    Parts: codes int32 [B, H, n, D * bits / 32]; scale, low float16 [B, H, n, D / g].
    """

    def __init__(self, bits: int, group: int) -> None:
        self.bits, self.group = bits, group

    def encode(self, x: Tensor, at: Tensor | None) -> Parts:
        codes, scale, low = codes_of(x.unflatten(-1, (-1, self.group)), self.bits)
        return {"codes": pack(codes.flatten(-2), self.bits), "scale": scale, "low": low}

    def decode(self, parts: Parts, span: tuple[int, int], dtype: torch.dtype, at: Tensor | None) -> Tensor:
        dense = unpack_float(parts["codes"], self.bits).unflatten(-1, (-1, self.group))
        return dense.mul_(parts["scale"].float()[..., None]).add_(parts["low"].float()[..., None]).flatten(-2).to(dtype)

    def held(self, parts: Parts) -> Packed | None:
        if self.group * self.bits % 32 or self.group & (self.group - 1):
            return None
        words = parts["codes"].unflatten(-1, (-1, self.group * self.bits // 32))
        return Packed(words, parts["scale"], parts["low"], self.bits, "token")


class Float8(Scheme):
    """fp8 e4m3 with one float16 scale a group, which takes the group's largest magnitude to 448.

    Parts: codes uint8 [B, H, n / unit, …] (the bits of e4m3 numbers); scale float16.

    Args:
        group: numbers that share a scale; per_channel: consecutive entries of one channel instead of channels of one entry.
    """

    def __init__(self, group: int, per_channel: bool) -> None:
        self.group, self.per_channel = group, per_channel
        self.unit = group if per_channel else 1

    def encode(self, x: Tensor, at: Tensor | None) -> Parts:
        if self.per_channel:
            grouped = x.float().unflatten(2, (-1, self.group)).transpose(-1, -2)  # [B, H, groups, D, g]
        else:
            grouped = x.float().unflatten(-1, (-1, self.group))  # [B, H, n, D / g, g]
        largest = grouped.abs().amax(-1)
        scale = (largest / FP8_MAX).half()
        require_finite(scale, largest)
        step = scale.float()[..., None]
        numbers = torch.where(step > 0, grouped / step, 0.0).clamp_(-FP8_MAX, FP8_MAX)
        return {"codes": numbers.to(FP8).view(torch.uint8), "scale": scale}

    def decode(self, parts: Parts, span: tuple[int, int], dtype: torch.dtype, at: Tensor | None) -> Tensor:
        numbers = parts["codes"].contiguous().view(FP8).float() * parts["scale"].float()[..., None]
        dense = numbers.transpose(-1, -2).flatten(2, 3) if self.per_channel else numbers.flatten(-2)
        return dense.to(dtype)


class Balanced(PerToken):
    """Per token, each channel multiplied by a number of its own before and divided by it after (MiKV's balancer).

    Args:
        balancer: float32 [B, H, D], positive.
    """

    def __init__(self, bits: int, group: int, balancer: Tensor) -> None:
        super().__init__(bits, group)
        self.balancer = balancer

    def encode(self, x: Tensor, at: Tensor | None) -> Parts:
        return super().encode(x.float() * self.balancer[:, :, None], at)

    def decode(self, parts: Parts, span: tuple[int, int], dtype: torch.dtype, at: Tensor | None) -> Tensor:
        return super().decode(parts, span, torch.float32, at).div_(self.balancer[:, :, None]).to(dtype)

    def held(self, parts: Parts) -> None:
        return None  # its channels are still to be divided

    def shared(self) -> list[tuple[str, Tensor]]:
        return [("scales", self.balancer)]

    def row(self, b: int, h: int) -> Scheme:
        return Balanced(self.bits, self.group, self.balancer[b : b + 1, h : h + 1])
