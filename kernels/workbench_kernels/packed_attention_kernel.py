"""The Triton kernel of :mod:`workbench_kernels.packed_attention`: split-KV decode attention over packed entries.

One program reads one KV head's entries of one split, once, for all query rows of that head. Nothing is accumulated with
atomics, so the same input gives the same output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.splits import merge_splits, plan

if TYPE_CHECKING:
    from workbench_kernels.packed_attention import Packed

TILE = 64  # entries a program decodes at a time, where a group is not smaller


@triton.jit
def _as_float(code, dtype: tl.constexpr):
    """Unsigned codes as floats: set into the mantissa of a power of two, whose difference is exact (a conversion takes
    four times as long on current devices)."""
    if dtype == tl.float16:
        return (code.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
    else:
        return ((code.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0).to(dtype)


@triton.jit
def _codes(words, FIRST: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Codes FIRST, FIRST + STEP, … of each int32 word in dtype: [R, n] -> [R, n * 32 / (BITS * STEP)].

    The words are loaded whole: their loads are wide, and can be started ahead of time."""
    if BITS * STEP == 32:
        # `>>` is arithmetic on int32: mask after the shift, or negative words leak their sign.
        return _as_float((words >> (BITS * FIRST)) & ((1 << BITS) - 1), dtype)
    else:
        even = _codes(words, FIRST, 2 * STEP, BITS, dtype)
        return tl.interleave(even, _codes(words, FIRST + STEP, 2 * STEP, BITS, dtype))


@triton.jit
def _by_token(codes, scale, low, n0, N, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr,
              T: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """T entries whose groups run along channels, decoded: [T, DP] in dtype, zero beyond N and D."""
    row: tl.constexpr = D * BITS // 32  # words of an entry
    groups: tl.constexpr = DP // G
    t = n0 + tl.arange(0, T)
    w = tl.arange(0, DP * BITS // 32)
    words = tl.load(codes + t[:, None] * row + w[None, :], mask=(t < N)[:, None] & (w < row)[None, :], other=0)
    g = tl.arange(0, groups)
    here = (t < N)[:, None] & (g < D // G)[None, :]
    s = tl.load(scale + t[:, None] * (D // G) + g[None, :], mask=here, other=0.0).to(tl.float32)
    m = tl.load(low + t[:, None] * (D // G) + g[None, :], mask=here, other=0.0).to(tl.float32)
    s = tl.reshape(tl.broadcast_to(s[:, :, None], (T, groups, G)), (T, DP))
    m = tl.reshape(tl.broadcast_to(m[:, :, None], (T, groups, G)), (T, DP))
    return (_codes(words, 0, 1, BITS, tl.float32) * s + m).to(dtype)


@triton.jit
def _by_channel(codes, scale, low, n0, N, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr,
                T: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """T entries of one group along entries: codes [DP, T] in dtype, scale and minimum [DP] in float32."""
    row: tl.constexpr = G * BITS // 32  # words of a group
    group, within = n0 // G, n0 % G
    d = tl.arange(0, DP)
    w = within * BITS // 32 + tl.arange(0, T * BITS // 32)
    here = (d < D) & (n0 < N)
    words = tl.load(codes + group * (D * row) + d[:, None] * row + w[None, :], mask=here[:, None], other=0)
    s = tl.load(scale + group * D + d, mask=here, other=0.0).to(tl.float32)
    m = tl.load(low + group * D + d, mask=here, other=0.0).to(tl.float32)
    return _codes(words, 0, 1, BITS, dtype), s, m


@triton.jit
def _attend_kernel(
    q, k_codes, k_scale, k_low, v_codes, v_scale, v_low, lengths, visible, out, lse,
    H, R, N, CHUNK, scale, softcap,
    kc_b, kc_h, ks_b, ks_h, km_b, km_h, vc_b, vc_h, vs_b, vs_h, vm_b, vm_h, see_b, see_h, see_n,
    D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, T: tl.constexpr, dtype: tl.constexpr,
    K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_BY_TOKEN: tl.constexpr,
    V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_BY_TOKEN: tl.constexpr,
    RAGGED: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Grid (B * H, splits). q [B * H, R, D] dense; out float32 [B * H, splits, R, D] and lse [B * H, splits, R]."""
    row = tl.program_id(0).to(tl.int64)  # int64 before any stride
    split = tl.program_id(1)
    b, h = row // H, row % H
    k_codes += b * kc_b + h * kc_h
    k_scale += b * ks_b + h * ks_h
    k_low += b * km_b + h * km_h
    v_codes += b * vc_b + h * vc_h
    v_scale += b * vs_b + h * vs_h
    v_low += b * vm_b + h * vm_h
    visible += b * see_b + h * see_h
    held = N
    if RAGGED:
        held = tl.minimum(tl.load(lengths + row), N)
    r, d = tl.arange(0, RP), tl.arange(0, DP)
    asked = (r < R)[:, None] & (d < D)[None, :]
    query = tl.load(q + row * R * D + r[:, None] * D + d[None, :], mask=asked, other=0.0).to(tl.float32) * scale

    highest = tl.full([RP], float("-inf"), tl.float32)
    mass = tl.zeros([RP], tl.float32)
    total = tl.zeros([RP, DP], tl.float32)
    for n0 in range(split * CHUNK, tl.minimum(split * CHUNK + CHUNK, held), T):
        n = n0 + tl.arange(0, T)
        if K_BY_TOKEN:
            keys = _by_token(k_codes, k_scale, k_low, n0, held, D, DP, K_GROUP, K_BITS, T, dtype)
            logits = tl.dot(query.to(dtype), tl.trans(keys), input_precision="ieee")
        else:
            codes, s, m = _by_channel(k_codes, k_scale, k_low, n0, held, D, DP, K_GROUP, K_BITS, T, dtype)
            logits = tl.dot((query * s[None, :]).to(dtype), codes, input_precision="ieee")
            logits += tl.sum(query * m[None, :], 1)[:, None]
        if CAPPED:
            logits = softcap * (1.0 - 2.0 / (tl.exp(2.0 * logits / softcap) + 1.0))  # tanh, by what exp gives
        seen = n < held
        if MASKED:
            seen = seen & (tl.load(visible + n * see_n, mask=seen, other=0) != 0)
        logits = tl.where(seen[None, :], logits, float("-inf"))
        raised = tl.maximum(highest, tl.max(logits, 1))
        base = tl.where(raised == float("-inf"), 0.0, raised)  # a row that has seen nothing yet
        weights = tl.exp(logits - base[:, None])
        fade = tl.exp(highest - base)
        mass = mass * fade + tl.sum(weights, 1)
        total = total * fade[:, None]
        if V_BY_TOKEN:
            values = _by_token(v_codes, v_scale, v_low, n0, held, D, DP, V_GROUP, V_BITS, T, dtype)
            total += tl.dot(weights.to(dtype), values, input_precision="ieee")
        else:
            codes, s, m = _by_channel(v_codes, v_scale, v_low, n0, held, D, DP, V_GROUP, V_BITS, T, dtype)
            total += tl.dot(weights.to(dtype), tl.trans(codes), input_precision="ieee") * s[None, :]
            total += tl.sum(weights, 1)[:, None] * m[None, :]
        highest = raised
    at = (row * tl.num_programs(1) + split) * R + r
    empty = mass == 0.0
    total = total / tl.where(empty, 1.0, mass)[:, None]
    tl.store(lse + at, tl.where(empty, float("-inf"), highest + tl.log(tl.where(empty, 1.0, mass))), mask=r < R)
    tl.store(out + at[:, None] * D + d[None, :], total, mask=asked)


def launch(
    q: Tensor,
    keys: Packed,
    values: Packed,
    scale: float,
    lengths: Tensor | None,
    visible: Tensor | None,
    softcap: float | None,
    splits: int | None,
) -> tuple[Tensor, Tensor]:
    """Arguments as in :func:`workbench_kernels.packed_attention.packed_attention`, already checked."""
    batch, heads = keys.codes.shape[:2]
    rows, width, entries = q.shape[1] // heads * q.shape[2], q.shape[3], values.entries
    tile = min([TILE, *(side.group_size for side in (keys, values) if side.per == "channel")])
    chunk, splits = plan(batch * heads, entries, tile, splits, q.device)
    query = q.reshape(batch * heads, rows, width).contiguous()
    parts = torch.empty(batch * heads, splits, rows, width, dtype=torch.float32, device=q.device)
    lses = torch.empty(batch * heads, splits, rows, dtype=torch.float32, device=q.device)
    sides = [_rows(side) for side in (keys, values)]
    seen = q.new_empty(1) if visible is None else visible.expand(batch, heads, entries).view(torch.uint8)
    ragged = q.new_empty(1) if lengths is None else lengths.expand(batch, heads).to(torch.int32).contiguous()
    _attend_kernel[(batch * heads, splits)](
        query, *sides[0], *sides[1], ragged, seen, parts, lses,
        heads, rows, entries, chunk, scale, 0.0 if softcap is None else softcap,
        *(stride for side in sides for x in side for stride in x.stride()[:2]),
        *(seen.stride() if visible is not None else (0, 0, 0)),
        D=width, DP=triton.next_power_of_2(width), RP=max(16, triton.next_power_of_2(rows)), T=tile,
        dtype={torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(q.dtype, tl.float32),
        K_BITS=keys.bits, K_GROUP=keys.group_size, K_BY_TOKEN=keys.per == "token",
        V_BITS=values.bits, V_GROUP=values.group_size, V_BY_TOKEN=values.per == "token",
        RAGGED=lengths is not None, MASKED=visible is not None, CAPPED=softcap is not None,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    out, lse = merge_splits(parts, lses, q.dtype)
    return out.view(q.shape), lse.view(q.shape[:3])


def _rows(side: Packed) -> tuple[Tensor, ...]:
    """Codes, scale and minimum: each row dense, rows anywhere (a store's spare room is not copied)."""
    return tuple(x if x[0, 0].is_contiguous() else x.contiguous() for x in (side.codes, side.scale, side.low))
