"""RotateKV's scheme: heads rotated together by a Hadamard matrix, channels reordered, then integers per token.

Axes: B batch, H KV heads, n entries, D head_dim, C = H * D, g group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.cache.schemes.base import Parts, Scheme, require_finite
from workbench.models.rope import Rope
from workbench_kernels import hadamard, pack, unpack_float

FARTHEST = 2048.0  # zero point up to which float16 holds every integer


class Rotated(Scheme):
    """Per token, in groups of channels that may belong to several heads, with an integer zero point.

    Keys are turned back to before RoPE when they are stored, and to their positions when they are read.

    Parts: codes int32 [B, 1, n, C * bits / 32]; scale, zero float16 [B, 1, n, C / g]; x = scale * (code - zero).

    Args:
        heads: H.
        group: channels that share a scale. clip: what extremes are multiplied by.
        span: heads rotated together; it divides H.
        order: [C] of the rotated channels, or None. rope: of the layer, for keys; None for values.
    """

    kinds = {"codes": "codes", "scale": "scales", "zero": "scales"}

    def __init__(
        self,
        heads: int,
        bits: int,
        group: int,
        clip: float,
        span: int,
        order: Tensor | None = None,
        rope: Rope | None = None,
    ) -> None:
        self.heads, self.bits, self.group, self.clip, self.span, self.order, self.rope = (
            heads,
            bits,
            group,
            clip,
            span,
            order,
            rope,
        )
        self.positional = rope is not None  # type: ignore[misc]
        self.separable = False  # type: ignore[misc]

    def encode(self, x: Tensor, at: Tensor | None) -> Parts:
        turned = self.rotate(x, at)  # [B, n, C]
        grouped = turned.unflatten(-1, (-1, min(self.group, turned.shape[-1])))
        codes, scale, zero = integers(grouped, self.bits, self.clip)
        return {"codes": pack(codes.flatten(-2), self.bits)[:, None], "scale": scale[:, None], "zero": zero[:, None]}

    def decode(self, parts: Parts, span: tuple[int, int], dtype: torch.dtype, at: Tensor | None) -> Tensor:
        codes = unpack_float(parts["codes"][:, 0], self.bits)
        groups = parts["scale"].shape[-1]
        grouped = codes.unflatten(-1, (groups, -1))
        turned = (grouped - parts["zero"][:, 0].float()[..., None]) * parts["scale"][:, 0].float()[..., None]
        return self.undo(turned.flatten(-2), at).to(dtype)

    def rotate(self, x: Tensor, at: Tensor | None) -> Tensor:
        """x [B, H, n, D] -> [B, n, C]: before RoPE, rotated, in order; float32."""
        x = x.float()
        if self.rope is not None:
            assert at is not None
            x = self.rope.unrotate(x, at)
        turned = rotated_together(x, self.span)
        return turned if self.order is None else turned[..., self.order.long()]

    def undo(self, turned: Tensor, at: Tensor | None) -> Tensor:
        """The inverse: [B, n, C] -> [B, H, n, D] as the model's queries meet it."""
        if self.order is not None:
            turned = torch.empty_like(turned).index_copy_(-1, self.order.long(), turned)
        x = hadamard(turned.unflatten(-1, (self.heads // self.span, -1))).flatten(2)
        x = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if self.rope is not None:
            assert at is not None
            x = self.rope.rotate(x, at)
        return x

    def shared(self) -> list[tuple[str, Tensor]]:
        return [] if self.order is None else [("order", self.order)]

    def row(self, b: int, h: int) -> Scheme:
        """A head that holds other tokens than its neighbours is rotated by itself, its channels as they come."""
        return Rotated(1, self.bits, self.group, self.clip, 1, None, self.rope)


def rotated_together(x: Tensor, span: int) -> Tensor:
    """x [B, H, n, D] -> [B, n, H * D]: the channels of every ``span`` heads through one Hadamard matrix.

    Where their number is no power of two, through as many equal ones as make it one.
    """
    return hadamard(x.transpose(1, 2).unflatten(2, (-1, span)).flatten(3)).flatten(2)


def integers(x: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """Groups along the last axis as codes uint8 [..., g], scale and integer zero point float16 [...].

    ``scale = clip (max - min) / levels``, ``zero = round(-clip min / scale)``, ``code = round(x / scale) + zero``, clamped.
    A group whose numbers are equal, or so near that float16 holds no zero point for them, is that one number.
    """
    levels = (1 << bits) - 1
    low, high = clip * x.amin(-1), clip * x.amax(-1)
    scale = ((high - low) / levels).half()
    step = scale.float()
    zero = torch.where(step > 0, torch.round(-low / step), torch.inf)
    flat = zero.abs() > FARTHEST
    middle = (x.amin(-1) + x.amax(-1)) / 2
    # One number c is scale |c| with code 0 and a zero point of the other sign.
    scale = torch.where(flat, middle.abs().half(), scale)
    zero = torch.where(flat, -middle.sign(), zero).half()
    require_finite(scale, zero, middle)
    ratio = torch.where(flat[..., None], 0.0, x / scale.float().clamp_min(1e-30)[..., None])
    codes = (torch.round(ratio) + zero.float()[..., None]).clamp_(0, levels)
    codes = torch.where(flat[..., None], 0.0, codes)
    return codes.to(torch.uint8), scale, zero
