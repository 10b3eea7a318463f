"""Mustafar's bitmap format (arXiv 2505.22913): of every 64 numbers, which are held, and those in order.

A *tile* is 64 consecutive entries of one channel (keys) or 64 consecutive channels of one entry (values; where heads are
smaller than 64, of the entries that fill it; where they are no multiple of 64, the rest of the last tile is empty). 64
entries are a *block*: its key tiles lie channel by channel; its value tiles entry by entry, for each run of 64 channels.

Axes: B batch, H KV heads, W blocks of 64 entries, P tiles of a block, D head_dim.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench_kernels.attention import attention_reference, softmax_with_lse
from workbench_kernels.triton_if_used import runs

TILE = 64
PAD = 8  # a tile's numbers are padded with zeros to a multiple of this: 16-byte loads of half-precision numbers
BLOCK_TILES = 1 << 12  # decoded at a time on a CPU


class Sparse(NamedTuple):
    """Keys or values of N = W * 64 entries, of which only the non-zero numbers are held.

    Attributes:
        bitmaps: int64 [B, H, W, P]; number 0 of a tile is the most significant bit.
        offsets: int32 [B, H, W, P]: where a tile's numbers begin, in pairs of numbers.
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
        return self.bitmaps.shape[2] * TILE

    def dense(self) -> Tensor:
        """All entries: [B, H, N, D]."""
        return from_tiles(self.tiles(), self.width, self.of_keys)

    def tiles(self, first: int = 0, last: int | None = None) -> Tensor:
        """The blocks [first, last) decoded as they lie: [B, H, w, P, 64]."""
        return decode(self.bitmaps[:, :, first:last], self.offsets[:, :, first:last], self.numbers)


def decode(bitmaps: Tensor, offsets: Tensor, numbers: Tensor) -> Tensor:
    """Tiles [..., 64] of any ``bitmaps`` and ``offsets`` [...], of which ``numbers`` are all.

    A byte of a bitmap at a time: a table says which of its 8 numbers are held, and which in order each of them is.
    """
    if numbers.numel() == 0:
        return numbers.new_zeros(*bitmaps.shape, TILE)
    octets = _octets(bitmaps).int().flatten()
    counts, ranks, bits = _tables(bitmaps.device)
    held = counts.index_select(0, octets).view(*bitmaps.shape, 8)
    before = held.cumsum(-1, dtype=torch.int32) - held + 2 * offsets[..., None]
    before.clamp_(max=numbers.numel() - 1)  # where nothing follows, there is nothing to point at
    index = ranks.index_select(0, octets).view(*bitmaps.shape, 8, 8) + before[..., None]
    tiles = numbers.index_select(0, index.flatten()).view(*bitmaps.shape, TILE)
    return tiles.mul_(bits.index_select(0, octets).view(torch.uint8).view(tiles.shape).to(tiles.dtype))


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For every byte, most significant bit first: how many bits are set, int32 [256]; how many before each that is set,
    int32 [256, 8]; and the bits, as 8 bytes of 0 and 1 in an int64 [256]."""
    octets = torch.arange(256, dtype=torch.int32, device=device)
    bits = (octets[:, None] >> torch.arange(7, -1, -1, device=device)) & 1
    ranks = ((bits.cumsum(-1) - 1) * bits).to(torch.int32)
    return bits.sum(-1, dtype=torch.int32), ranks, bits.to(torch.uint8).view(torch.int64).flatten()


def tiles_of(width: int, of_keys: bool) -> int:
    """P: tiles of 64 entries of head_dim ``width``."""
    return width if of_keys else _padded(width)


def compress(x: Tensor, of_keys: bool) -> Sparse:
    """Hold pruned keys or values x [B, H, n, D], n a multiple of 64."""
    if x.shape[2] % TILE:
        raise ValueError(f"compress takes a multiple of {TILE} entries, got {x.shape[2]}")
    tiles = _to_tiles(x, of_keys)
    held = tiles != 0
    counts = held.sum(-1)
    padded = -(-counts // PAD) * PAD
    ends = padded.flatten().cumsum(0)
    offsets = ((ends - padded.flatten()) // 2).to(torch.int32).view(counts.shape)
    # Behind each tile stand the zeros that pad it, so that one pass takes numbers and padding alike; row by row, as that
    # is a copy.
    rows = zip(tiles.flatten(0, 1), torch.cat((held, _padding(counts)), -1).flatten(0, 1), strict=True)
    numbers = torch.cat([F.pad(tile, (0, PAD))[mask] for tile, mask in rows])
    return Sparse(bitmaps_of(held), offsets, numbers, x.shape[-1], of_keys)


def bitmaps_of(held: Tensor) -> Tensor:
    """bool [..., 64] -> int64 [...], number 0 at the most significant bit."""
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=held.device)
    octets = (held.unflatten(-1, (8, 8)) * weights).sum(-1, dtype=torch.uint8)
    return octets.flip(-1).view(torch.int64)[..., 0]


def bits_of(bitmaps: Tensor) -> Tensor:
    """int64 [...] -> bool [..., 64]; the inverse of :func:`bitmaps_of`."""
    bits = _tables(bitmaps.device)[2].index_select(0, _octets(bitmaps).int().flatten())
    return bits.view(torch.uint8).view(torch.bool).view(*bitmaps.shape, TILE)


def _octets(bitmaps: Tensor) -> Tensor:
    """uint8 [..., 8]: a bitmap's bytes, those of its first numbers first (an int64's bytes lie lowest first)."""
    return bitmaps.contiguous()[..., None].view(torch.uint8).flip(-1)


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
    x = F.pad(x, (0, _padded(x.shape[-1]) - x.shape[-1]))
    if x.shape[-1] < TILE:
        return x.unflatten(2, (-1, TILE)).flatten(-2).unflatten(-1, (-1, TILE))
    return x.unflatten(2, (-1, TILE)).unflatten(-1, (-1, TILE)).transpose(-2, -3).flatten(3, 4)


def from_tiles(tiles: Tensor, width: int, of_keys: bool) -> Tensor:
    """[B, H, W, P, 64] -> [B, H, n, D]."""
    if of_keys:
        return tiles.transpose(-1, -2).flatten(2, 3)
    if width < TILE:
        return tiles.flatten(-2).unflatten(-1, (TILE, width)).flatten(2, 3)
    return tiles.unflatten(-2, (-1, TILE)).transpose(-2, -3).flatten(-2).flatten(2, 3)[..., :width]


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
        keys, values: the same N entries.
        splits: parts of the entries that run side by side on a GPU; None fills the device.

    Returns:
        Output [B, Hq, Tq, D] in q's dtype, and the log-sum-exp of the logits, float32 [B, Hq, Tq].

    Raises:
        ValueError: shapes that do not belong together.
    """
    batch, heads, blocks, _ = keys.bitmaps.shape
    if not keys.of_keys or values.of_keys or keys.bitmaps.shape[:3] != values.bitmaps.shape[:3]:
        raise ValueError(
            f"keys {tuple(keys.bitmaps.shape)} and values {tuple(values.bitmaps.shape)} do not hold the same entries"
        )
    if q.shape[0] != batch or q.shape[1] % heads or not q.shape[3] == keys.width == values.width:
        raise ValueError(f"keys of {heads} heads of width {keys.width} do not belong to queries {tuple(q.shape)}")
    if keys.entries == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
    if kernel or runs(q):
        from workbench_kernels.sparse_kernel import launch

        with torch.cuda.device_of(q):
            return launch(q, keys, values, scale, splits)
    asked = q.float().reshape(batch, heads, -1, keys.width) * scale  # [B, H, R, D]
    step = max(1, BLOCK_TILES // (batch * heads * values.bitmaps.shape[3]))
    cuts = [(a, min(blocks, a + step)) for a in range(0, blocks, step)]
    found = [asked[:, :, None] @ keys.tiles(a, b).float() for a, b in cuts]  # [B, H, w, R, 64]
    logits = torch.cat(found, 2).transpose(2, 3).flatten(-2)  # [B, H, R, N]
    weights, lse = softmax_with_lse(logits)
    out = torch.zeros_like(asked)
    for a, b in cuts:
        dense = from_tiles(values.tiles(a, b), values.width, of_keys=False)
        out += weights[..., a * TILE : b * TILE] @ dense.float()
    return out.view(q.shape).to(q.dtype), lse.view(q.shape[:3])
