"""Channel segment: entries whose keys hold only some of their channels, other ones in every head (ThinK)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.cache.growable import Growable
from workbench.cache.segments import DenseSegment, Partial, Query


class ChannelSegment(DenseSegment):
    """Entries in the model's dtype, their keys without some channels; values are whole.

    A query meets these keys with the same channels of its own, so that the logits are those of keys that are zero in the
    others.

    Args:
        mask: uint8 [B, H, D / 8], one bit per channel of a whole key: whether it is held.
        held: how many are, the same in every head.
        dim: D.
    """

    def __init__(self, mask: Tensor, held: int, dim: int, start: int = 0) -> None:
        super().__init__(mask.shape[0], mask.shape[1], start)
        self.mask, self.held, self.dim = mask, held, dim

    @classmethod
    def narrowed(cls, dense: DenseSegment, count: int, channels: Tensor) -> ChannelSegment:
        """The ``count`` oldest entries of a dense segment, of their keys only ``channels`` [B, H, m]: a copy."""
        k, v = dense.keys()[:, :, :count], dense.values()[:, :, :count]
        whole = torch.zeros(*channels.shape[:2], k.shape[-1], dtype=torch.bool, device=k.device)
        self = cls(pack_bits(whole.scatter(-1, channels, True)), channels.shape[-1], k.shape[-1], dense.start)
        self.k, self.v = Growable.of(k.gather(-1, per_entry(channels, count))), Growable.of(v.clone())
        if dense.at is not None:
            self.at = Growable.of(dense.positions()[:, :, :count].clone())
        return self

    @property
    def channels(self) -> Tensor:
        """int64 [B, H, m], ascending."""
        absent = ~unpack_bits(self.mask, self.dim)
        return absent.to(torch.uint8).argsort(dim=-1, stable=True)[..., : self.held]

    def append(self, k: Tensor, v: Tensor, start: int, at: Tensor | None = None) -> None:
        super().append(k.gather(-1, per_entry(self.channels, k.shape[2])), v, start, at)

    def attend(self, query: Query, need_lse: bool = True) -> Partial:
        group = query.q.shape[1] // self.heads
        channels = self.channels.repeat_interleave(group, 1)  # [B, Hq, m]
        q = query.q.gather(-1, per_entry(channels, query.q.shape[2]))
        return super().attend(replace(query, q=q), need_lse)

    def keys(self) -> Tensor:
        """[B, H, n, D]: a copy, zero in the channels that are gone."""
        narrow = self.k.read(0, self.length)
        whole = narrow.new_zeros(self.batch, self.heads, self.length, self.dim)
        return whole.scatter_(-1, per_entry(self.channels, self.length), narrow)

    def nbytes(self) -> dict[str, int]:
        return {**super().nbytes(), "mask": self.mask.numel()}

    def clone(self) -> ChannelSegment:
        twin = ChannelSegment(self.mask, self.held, self.dim, self.start)
        twin.k, twin.v = self.k.clone(), self.v.clone()
        twin.at = None if self.at is None else self.at.clone()
        return twin


def per_entry(channels: Tensor, count: int) -> Tensor:
    """Channels [B, H, m] repeated for ``count`` entries: [B, H, count, m]."""
    return channels[:, :, None].expand(-1, -1, count, -1)


def pack_bits(bits: Tensor) -> Tensor:
    """bool [..., D] -> uint8 [..., ceil(D / 8)], the first bit lowest."""
    bytes_of = F.pad(bits, (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bytes_of * weights(bits.device)).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Invert :func:`pack_bits`: bool [..., count]."""
    return (packed[..., None] & weights(packed.device)).ne(0).flatten(-2)[..., :count]


def weights(device: torch.device) -> Tensor:
    return 1 << torch.arange(8, dtype=torch.uint8, device=device)
