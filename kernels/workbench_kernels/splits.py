"""Splitting the entries of a decode attention over a GPU's processors, and merging what the splits found."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST = 256  # entries that a split is worth


def plan(rows: int, entries: int, tile: int, splits: int | None, device: torch.device) -> tuple[int, int]:
    """Entries per split (a multiple of ``tile``) and the number of splits: two programs for every processor."""
    if splits is None:
        wanted = 1
        if device.type == "cuda":
            wanted = -(-2 * torch.cuda.get_device_properties(device).multi_processor_count // rows)
        splits = max(1, min(wanted, entries // LEAST))
    chunk = -(-math.ceil(entries / splits) // tile) * tile
    return chunk, -(-entries // chunk)


@triton.jit
def _merge_kernel(parts, lses, out, lse, R, SPLITS, D: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr):
    """Grid (B * H, R): merge the splits of one query row, one by one in a fixed order."""
    row, r = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, d = tl.arange(0, SP), tl.arange(0, DP)
    each = tl.load(lses + (row * SPLITS + s) * R + r, mask=s < SPLITS, other=float("-inf"))
    highest = tl.max(each, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    mass = tl.sum(tl.exp(each - base), 0)
    total = tl.zeros([DP], tl.float32)
    for split in range(SPLITS):
        at = (row * SPLITS + split) * R + r
        share = tl.exp(tl.load(lses + at) - base) / tl.where(mass == 0.0, 1.0, mass)
        total += share * tl.load(parts + at * D + d, mask=d < D, other=0.0)
    tl.store(out + (row * R + r) * D + d, total.to(out.dtype.element_ty), mask=d < D)
    tl.store(lse + row * R + r, tl.where(mass == 0.0, float("-inf"), base + tl.log(tl.where(mass == 0.0, 1.0, mass))))


def merge_splits(parts: Tensor, lses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Partial outputs float32 [rows, splits, R, D] and log-sum-exps [rows, splits, R] -> [rows, R, D] and [rows, R]."""
    rows, splits, queries, width = parts.shape
    out = torch.empty(rows, queries, width, dtype=dtype, device=parts.device)
    lse = torch.empty(rows, queries, dtype=torch.float32, device=parts.device)
    _merge_kernel[(rows, queries)](
        parts, lses, out, lse, queries, splits,
        D=width, DP=triton.next_power_of_2(width), SP=triton.next_power_of_2(splits),
    )  # fmt: skip
    return out, lse
