"""The Triton kernel of :mod:`workbench_kernels.sparse`: load compressed, compute dense, split over the entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.splits import merge_splits, plan

if TYPE_CHECKING:
    from workbench_kernels.sparse import Sparse


@triton.jit
def _tiles(bitmaps, offsets, numbers, at, here, dtype: tl.constexpr):
    """Decode the tiles ``at`` [n]: [n, 64] in dtype, zeros where nothing is held."""
    bitmap = tl.load(bitmaps + at, mask=here, other=0)
    start = tl.load(offsets + at, mask=here, other=0).to(tl.int64) * 2
    j = tl.arange(0, 64)
    held = ((bitmap[:, None] >> (63 - j).to(tl.int64)[None, :]) & 1).to(
        tl.int32
    )  # the shift keeps the sign: mask after
    rank = tl.cumsum(held, 1) - held  # held numbers of the tile before this one
    return tl.load(numbers + start[:, None] + rank, mask=held != 0, other=0.0).to(dtype)


@triton.jit
def _attend_kernel(
    q, k_bitmaps, k_offsets, k_numbers, v_bitmaps, v_offsets, v_numbers, out, lse,
    R, BLOCKS, CHUNK, scale,
    D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, V_TILES: tl.constexpr, VP: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Grid (B * H, splits); CHUNK and BLOCKS count blocks of 64 entries. q [B * H, R, D] dense; out float32
    [B * H, splits, R, D] and lse [B * H, splits, R]."""
    row = tl.program_id(0).to(tl.int64)  # int64 before any stride
    split = tl.program_id(1)
    r, d = tl.arange(0, RP), tl.arange(0, DP)
    asked = (r < R)[:, None] & (d < D)[None, :]
    query = tl.load(q + row * R * D + r[:, None] * D + d[None, :], mask=asked, other=0.0).to(tl.float32) * scale
    # Value tiles in the order that makes [tiles, 64] entries of VP channels: those of one entry side by side.
    v = tl.arange(0, VP)
    order = v
    if VP > 64:
        order = v % (VP // 64) * 64 + v // (VP // 64)

    highest = tl.full([RP], float("-inf"), tl.float32)
    mass = tl.zeros([RP], tl.float32)
    total = tl.zeros([RP, VP], tl.float32)
    for block in range(split * CHUNK, tl.minimum(split * CHUNK + CHUNK, BLOCKS)):
        first = row * BLOCKS + block
        keys = _tiles(k_bitmaps, k_offsets, k_numbers, first * D + d, d < D, dtype)  # [DP, 64]
        logits = tl.dot(query.to(dtype), keys, input_precision="ieee")
        raised = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp(logits - raised[:, None])
        fade = tl.exp(highest - raised)
        mass = mass * fade + tl.sum(weights, 1)
        tiles = _tiles(v_bitmaps, v_offsets, v_numbers, first * V_TILES + order, order < V_TILES, dtype)  # [VP, 64]
        values = tl.reshape(tiles, (64, VP))
        total = total * fade[:, None] + tl.dot(weights.to(dtype), values, input_precision="ieee")
        highest = raised
    at = (row * tl.num_programs(1) + split) * R + r
    c = tl.arange(0, VP)
    tl.store(lse + at, highest + tl.log(mass), mask=r < R)
    tl.store(out + at[:, None] * D + c[None, :], total / mass[:, None], mask=(r < R)[:, None] & (c < D)[None, :])


def launch(q: Tensor, keys: Sparse, values: Sparse, scale: float, splits: int | None) -> tuple[Tensor, Tensor]:
    """Arguments as in :func:`workbench_kernels.sparse.sparse_attention`, already checked."""
    batch, heads, blocks, tiles = *keys.bitmaps.shape[:3], values.bitmaps.shape[3]
    rows, queries, width = batch * heads, q.shape[1] // heads * q.shape[2], q.shape[3]
    chunk, splits = plan(rows, keys.entries, 64, splits, q.device)
    parts = torch.empty(rows, splits, queries, width, dtype=torch.float32, device=q.device)
    lses = torch.empty(rows, splits, queries, dtype=torch.float32, device=q.device)
    _attend_kernel[(rows, splits)](
        q.reshape(rows, queries, width).contiguous(),
        *(x.contiguous() for side in (keys, values) for x in side[:3]),
        parts, lses, queries, blocks, chunk // 64, scale,
        D=width, DP=max(16, triton.next_power_of_2(width)), RP=max(16, triton.next_power_of_2(queries)),
        V_TILES=tiles, VP=triton.next_power_of_2(tiles),
        dtype={torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(q.dtype, tl.float32),
        num_warps=4, num_stages=2,
    )  # fmt: skip
    out, lse = merge_splits(parts, lses, q.dtype)
    return out.view(q.shape), lse.view(q.shape[:3])
