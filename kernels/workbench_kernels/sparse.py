"""Mustafar's bitmap format (arXiv 2505.22913): of every 64 numbers, which are held, and those in order.

A *tile* is 64 consecutive entries of one channel (keys) or 64 consecutive channels of one entry (values; where heads are
smaller than 64, of the entries that fill it; where they are no multiple of 64, the rest of the last tile is empty). 64
entries are a *block*: its key tiles lie channel by channel; its value tiles entry by entry, for each run of 64 channels.
Blocks that were compressed together are a *batch*; batches follow each other, so appending never moves what is held.

Axes: U batches, B batch of prompts, H KV heads, W blocks of 64 entries in a batch, D head_dim, P tiles of a block.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from workbench_kernels.attention import attention_reference
from workbench_kernels.triton_if_used import runs

TILE = 64
PAD = 8  # a tile's numbers are padded with zeros to a multiple of this: 16-byte loads of half-precision numbers
BLOCK_TILES = 1 << 13  # decoded at a time on a CPU


class Sparse(NamedTuple):
    """Keys or values of N = U * W * 64 entries, of which only the non-zero numbers are held.

    Attributes:
        bitmaps: int64 [U, B, H, W, P]; number 0 of a tile is the most significant bit.
        offsets: int32 [U, B, H, W, P]: where a tile's numbers begin, in pairs of numbers.
        numbers: [n] in the model's dtype, tile after tile, each padded with zeros to a multiple of 8.
        width: D.
        of_keys: how tiles are cut.
    """

    bitmaps: Tensor
    offsets: Tensor
    numbers: Tensor
    width: int
    of_keys: bool

    @property
    def entries(self) -> int:
        return self.bitmaps.shape[0] * self.bitmaps.shape[3] * TILE

    def dense(self, first: int = 0, last: int | None = None) -> Tensor:
        """Entries of the batches [first, last): [B, H, n, D]."""
        tiles = self.tiles(first, self.bitmaps.shape[0] if last is None else last)
        return _from_tiles(tiles, self.width, self.of_keys)

    def tiles(self, first: int, last: int) -> Tensor:
        """The batches [first, last) decoded as they lie: [u, B, H, W, P, 64]."""
        bits = bits_of(self.bitmaps[first:last])
        wide = torch.zeros(*bits.shape[:-1], TILE + PAD, dtype=self.numbers.dtype, device=bits.device)
        # Behind each tile stand the zeros that pad it, so that one pass takes numbers and padding alike.
        wide.masked_scatter_(torch.cat((bits, _padding(bits.sum(-1))), -1), self.numbers[self._start(first) :])
        return wide[..., :TILE]

    def _start(self, batch: int) -> int:
        """Where the numbers of a batch begin; a batch is contiguous."""
        return 2 * int(self.offsets[batch].flatten()[0]) if 0 < batch < self.offsets.shape[0] else 0


def tiles_of(width: int, of_keys: bool) -> int:
    """P: tiles of 64 entries of head_dim ``width``."""
    return width if of_keys else _padded(width)


def compress(x: Tensor, of_keys: bool, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Make one batch of pruned keys or values x [B, H, n, D], n a multiple of 64.

    Args:
        start: numbers held already, before which these do not begin.

    Returns:
        bitmaps int64 and offsets int32, both [1, B, H, n / 64, P], and numbers [m]; see :class:`Sparse`.
    """
    if x.shape[2] % TILE:
        raise ValueError(f"compress takes a multiple of {TILE} entries, got {x.shape[2]}")
    tiles = _to_tiles(x, of_keys)[None]
    held = tiles != 0
    counts = held.sum(-1)
    padded = -(-counts // PAD) * PAD
    ends = padded.flatten().cumsum(0)
    offsets = ((ends - padded.flatten() + start) // 2).to(torch.int32).view(counts.shape)
    wide = torch.cat((tiles, tiles.new_zeros(*counts.shape, PAD)), -1)
    return bitmaps_of(held), offsets, wide[torch.cat((held, _padding(counts)), -1)]


def bitmaps_of(held: Tensor) -> Tensor:
    """bool [..., 64] -> int64 [...], number 0 at the most significant bit."""
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=held.device)
    octets = (held.unflatten(-1, (8, 8)) * weights).sum(-1, dtype=torch.uint8)
    return octets.flip(-1).view(torch.int64)[..., 0]  # an int64's bytes lie lowest first


def bits_of(bitmaps: Tensor) -> Tensor:
    """int64 [...] -> bool [..., 64]; the inverse of :func:`bitmaps_of`."""
    octets = bitmaps.contiguous()[..., None].view(torch.uint8).flip(-1)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=bitmaps.device)
    return ((octets[..., None] & weights) != 0).flatten(-2)


def _padding(counts: Tensor) -> Tensor:
    """bool [..., 8]: how many zeros follow tiles of ``counts`` numbers."""
    return torch.arange(PAD, device=counts.device) < (-counts % PAD)[..., None]


def _padded(width: int) -> int:
    """Channels of an entry with those that fill its last tile."""
    return width if TILE % width == 0 else -(-width // TILE) * TILE


def _to_tiles(x: Tensor, of_keys: bool) -> Tensor:
    """[B, H, n, D] -> [B, H, W, P, 64]."""
    if of_keys:
        return x.unflatten(2, (-1, TILE)).transpose(-1, -2)
    x = torch.nn.functional.pad(x, (0, _padded(x.shape[-1]) - x.shape[-1]))
    if x.shape[-1] < TILE:
        return x.unflatten(2, (-1, TILE)).flatten(-2).unflatten(-1, (-1, TILE))
    return x.unflatten(2, (-1, TILE)).unflatten(-1, (-1, TILE)).transpose(-2, -3).flatten(3, 4)


def _from_tiles(tiles: Tensor, width: int, of_keys: bool) -> Tensor:
    """[u, B, H, W, P, 64] -> [B, H, n, D]."""
    tiles = tiles.movedim(0, 2)  # [B, H, u, W, P, 64]
    if of_keys:
        return tiles.transpose(-1, -2).flatten(2, 4)
    if width < TILE:
        return tiles.flatten(-2).unflatten(-1, (TILE, width)).flatten(2, 4)
    return tiles.unflatten(-2, (-1, TILE)).transpose(-2, -3).flatten(-2).flatten(2, 4)[..., :width]


def sparse_attention_reference(q: Tensor, keys: Sparse, values: Sparse, scale: float) -> tuple[Tensor, Tensor]:
    """The definition: decode everything, then attend. Arguments as in :func:`sparse_attention`."""
    return attention_reference(q, keys.dense(), values.dense(), scale)


def sparse_attention(
    q: Tensor, keys: Sparse, values: Sparse, scale: float, *, splits: int | None = None, kernel: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention of few queries over entries of which only the non-zero numbers are held; all precede the queries.

    CUDA tensors take the Triton kernel, others torch in blocks; ``kernel=True`` forces the kernel (tests run it in
    Triton's interpreter).

    Args:
        q: [B, Hq, Tq, D], Hq a multiple of H; query head h reads KV head h // (Hq / H).
        keys, values: the same N entries, in the same batches.
        splits: parts of the entries that run side by side on a GPU; None fills the device.

    Returns:
        Output [B, Hq, Tq, D] in q's dtype, and the log-sum-exp of the logits, float32 [B, Hq, Tq].

    Raises:
        ValueError: shapes that do not belong together.
    """
    batches, batch, heads, blocks, _ = keys.bitmaps.shape
    if not keys.of_keys or values.of_keys or keys.bitmaps.shape[:4] != values.bitmaps.shape[:4]:
        raise ValueError(
            f"keys {tuple(keys.bitmaps.shape)} and values {tuple(values.bitmaps.shape)} do not hold the same entries"
        )
    if q.shape[0] != batch or q.shape[1] % heads or not q.shape[3] == keys.width == values.width:
        raise ValueError(f"keys of {heads} heads of width {keys.width} do not belong to queries {tuple(q.shape)}")
    if keys.entries == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
    if kernel or runs(q):
        from workbench_kernels.sparse_kernel import launch

        return launch(q, keys, values, scale, splits)
    asked = q.float().reshape(batch, heads, -1, keys.width) * scale  # [B, H, R, D]
    step = max(1, BLOCK_TILES // (batch * heads * blocks * max(keys.bitmaps.shape[4], values.bitmaps.shape[4])))
    cuts = [(a, min(batches, a + step)) for a in range(0, batches, step)]
    logits = torch.cat(
        [
            (asked[:, :, None] @ keys.tiles(a, b).movedim(0, 2).flatten(2, 3).float()).transpose(2, 3).flatten(-2)
            for a, b in cuts
        ],
        -1,
    )  # [B, H, R, N]
    lse = logits.logsumexp(-1)
    weights = logits.sub_(lse[..., None]).exp_()
    out = torch.zeros_like(asked)
    for a, b in cuts:
        part = weights[..., a * blocks * TILE : b * blocks * TILE]
        out += part @ values.dense(a, b).float()
    return out.view(q.shape).to(q.dtype), lse.view(q.shape[:3])
