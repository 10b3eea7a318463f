"""The counts of :mod:`workbench_kernels.counting` on a GPU, beside attention that ran on its own.

Two kernels, neither with atomics, so that two runs give the same numbers. One program of the first owns some queries of a
head and passes once over their entries, with a running maximum as in online softmax: log-sum-exp, entropy, sink mass, mass
by distance. One program of the second owns some entries of a map column and passes over all queries that see them: column
mass, and the largest and summed weight per map row. ``attend_counting`` defines what they must give.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from workbench_kernels.codes import encode_weights
from workbench_kernels.counting import AttentionCounts, check_queries, visible_pairs

try:
    if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")):
        raise ImportError("nothing here runs Triton's kernels, and importing it takes a while")
    import triton
    import triton.language as tl
except ImportError:  # the torch twin does the work
    triton = None

AVAILABLE = triton is not None
ROWS, ENTRIES = 64, 64  # of a tile


if triton is not None:

    @triton.jit
    def _logits(q, k, scale, at, entry, here, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, softcap):
        """Logits of a tile [ROWS, ENTRIES], -inf where a query may not look."""
        z = tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float32) * scale
        if SOFTCAP:
            z = z / softcap
            z = softcap * (2.0 / (1.0 + tl.exp(-2.0 * z)) - 1.0)  # tanh
        seen = here & (entry[None, :] <= at[:, None])
        if WINDOW > 0:
            seen = seen & (entry[None, :] > at[:, None] - WINDOW)
        return tl.where(seen, z, float("-inf"))

    @triton.jit
    def _rows_kernel(
        q_ptr, k_ptr, sink_ptr, lse_ptr, entropy_ptr, mass_ptr, distance_ptr,
        q_head, q_row, k_head, k_row, group, queries, entries, scale, softcap, first_sinks,
        SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
        BINS: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr,
    ):  # fmt: skip
        block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)  # int64 before any stride
        start = entries - queries
        row = block * ROWS + tl.arange(0, ROWS)
        at = start + row
        d = tl.arange(0, DIM)
        q = tl.load(
            q_ptr + head * q_head + row.to(tl.int64)[:, None] * q_row + d[None, :],
            mask=(row < queries)[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        keys = k_ptr + (head // group) * k_head
        most = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        dot = tl.zeros([ROWS], tl.float32)  # sum of exp(z - most) z
        sinks = tl.zeros([ROWS], tl.float32)
        near = tl.zeros([ROWS, BINS], tl.float32)
        bins = tl.arange(0, BINS)
        if SINK:
            z0 = tl.load(sink_ptr + head).to(tl.float32)
            most = tl.zeros([ROWS], tl.float32) + z0
            total += 1.0
            dot += z0
        low = 0
        if WINDOW > 0:
            low = tl.maximum(0, start + block * ROWS - WINDOW + 1) // ENTRIES * ENTRIES
        high = tl.minimum(entries, start + block * ROWS + ROWS)
        for n0 in range(low, high, ENTRIES):
            entry = n0 + tl.arange(0, ENTRIES)
            k = tl.load(
                keys + entry.to(tl.int64)[:, None] * k_row + d[None, :],
                mask=(entry < entries)[:, None] & (d < D)[None, :], other=0.0,
            )  # fmt: skip
            z = _logits(q, k, scale, at, entry, (entry < entries)[None, :], SOFTCAP, WINDOW, softcap)
            new = tl.maximum(most, tl.max(z, 1))
            safe = tl.maximum(new, -3.0e38)  # a row that has seen nothing yet: no inf - inf
            shrink = tl.exp(most - safe)
            p = tl.exp(z - safe[:, None])
            total = total * shrink + tl.sum(p, 1)
            dot = dot * shrink + tl.sum(p * tl.maximum(z, -1.0e30), 1)  # no zero times inf
            sinks = sinks * shrink + tl.sum(tl.where((entry < first_sinks)[None, :], p, 0.0), 1)
            near = near * shrink[:, None]
            far = tl.minimum(entries - 1, start + block * ROWS + ROWS - 1) - n0  # the largest distance in this tile
            closest = tl.maximum(start + block * ROWS - n0 - ENTRIES + 1, 0)
            distance = at[:, None] - entry[None, :]
            for b in range(0, BINS):
                least = (1 << b) >> 1
                if (least <= far) & ((1 << b) > closest):
                    inside = (distance >= least) & (distance < (1 << b))
                    near += tl.sum(tl.where(inside, p, 0.0), 1)[:, None] * tl.where(bins == b, 1.0, 0.0)[None, :]
            most = new
        here = row < queries
        total = tl.where(here, total, 1.0)
        lse = most + tl.log(total)
        out = head * queries + row
        tl.store(lse_ptr + out, lse, mask=here)
        tl.store(entropy_ptr + out, lse - dot / total, mask=here)
        tl.store(mass_ptr + out, sinks / total, mask=here)
        shares = tl.sum(tl.where(here[:, None], near / total[:, None], 0.0), 0)
        tl.store(distance_ptr + (head * tl.num_programs(0) + block) * BINS + bins, shares)

    @triton.jit
    def _columns_kernel(
        q_ptr, k_ptr, lse_ptr, column_ptr, most_ptr, sum_ptr,
        q_head, q_row, k_head, k_row, group, queries, entries, scale, softcap, cell, parts, lines,
        SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
        ENTRIES: tl.constexpr,
    ):  # fmt: skip
        part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
        start = entries - queries
        n0 = part // parts * cell + part % parts * ENTRIES  # parts of a map column, the last may be narrower
        stop = tl.minimum(entries, (part // parts + 1) * cell)
        entry = n0 + tl.arange(0, ENTRIES)
        here = entry < stop
        d = tl.arange(0, DIM)
        k = tl.load(
            k_ptr + (head // group) * k_head + entry.to(tl.int64)[:, None] * k_row + d[None, :],
            mask=here[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        column = tl.zeros([ENTRIES], tl.float32)
        for line in range(0, lines):
            most, total = tl.zeros([ENTRIES], tl.float32), tl.zeros([ENTRIES], tl.float32)
            first, last = line * cell, tl.minimum(queries, line * cell + cell)
            sees = start + last > n0
            if WINDOW > 0:
                sees = sees & (start + first - WINDOW + 1 < stop)
            if sees:
                for r0 in range(first, last, ROWS):
                    row = r0 + tl.arange(0, ROWS)
                    mine = row < last
                    q = tl.load(
                        q_ptr + head * q_head + row.to(tl.int64)[:, None] * q_row + d[None, :],
                        mask=mine[:, None] & (d < D)[None, :], other=0.0,
                    )  # fmt: skip
                    lse = tl.load(lse_ptr + head * queries + row, mask=mine, other=0.0)
                    z = _logits(
                        q, k, scale, start + row, entry, here[None, :] & mine[:, None], SOFTCAP, WINDOW, softcap
                    )
                    p = tl.exp(z - lse[:, None])
                    most = tl.maximum(most, tl.max(p, 0))
                    total += tl.sum(p, 0)
            out = (head * lines + line) * tl.num_programs(0) + part
            tl.store(most_ptr + out, tl.max(most))
            tl.store(sum_ptr + out, tl.sum(total))
            column += total
        tl.store(column_ptr + head * entries + entry, column, mask=here)


def count_attention(
    q: Tensor,
    k: Tensor,
    scale: float,
    counts: AttentionCounts,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Count what :func:`workbench_kernels.counting.attend_counting` counts; arguments and errors are the same."""
    check_queries(q, k, counts)
    heads, queries, dim = q.shape[1:]
    entries, group, cell = k.shape[2], heads // k.shape[1], counts.cell
    start, side = entries - queries, counts.largest.shape[2]
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    lines, bins = -(-queries // cell), counts.distance.shape[1]
    blocks, padded_bins = triton.cdiv(queries, ROWS), triton.next_power_of_2(bins)
    lse, entropy, mass = (q.new_empty(heads, queries, dtype=torch.float32) for _ in range(3))
    distance = q.new_empty(heads, blocks, padded_bins, dtype=torch.float32)
    padded_dim = max(16, triton.next_power_of_2(dim))
    shape = (q.stride(1), q.stride(2), k.stride(1), k.stride(2), group, queries, entries, scale, softcap or 1.0)
    how = {
        "SOFTCAP": softcap is not None,
        "WINDOW": window or 0,
        "D": dim,
        "DIM": padded_dim,
        "ROWS": ROWS,
        "ENTRIES": ENTRIES,
    }
    own_sinks = lse if sinks is None else sinks.float()
    _rows_kernel[(blocks, heads)](
        q,
        k,
        own_sinks,
        lse,
        entropy,
        mass,
        distance,
        *shape,
        counts.sinks,
        SINK=sinks is not None,
        BINS=padded_bins,
        **how,
    )
    ends = -(-entries // cell)  # map columns so far
    parts = triton.cdiv(cell, ENTRIES)
    columns = q.new_zeros(heads, entries, dtype=torch.float32)
    most, total = (q.new_empty(heads, lines, ends * parts, dtype=torch.float32) for _ in range(2))
    _columns_kernel[(ends * parts, heads)](q, k, lse, columns, most, total, *shape, cell, parts, lines, **how)

    rows = slice(start // cell, start // cell + lines)
    line = torch.arange(queries, device=q.device) // cell
    counts.columns[:, :entries] += columns
    counts.entropy[:, rows].index_add_(1, line, entropy)
    counts.sink[:, rows].index_add_(1, line, mass)
    counts.distance += distance.sum(1)[:, :bins]
    borders = torch.arange(side + 1, device=q.device).mul_(cell)
    pairs = visible_pairs(borders[rows.start : rows.stop + 1].clamp_max(entries), borders, window)
    most, total = most.unflatten(-1, (ends, parts)).amax(-1), total.unflatten(-1, (ends, parts)).sum(-1)
    missing = (0, side - ends)
    seen = (pairs > 0).expand(heads, -1, -1)
    counts.largest[:, rows] = encode_weights(torch.nn.functional.pad(most, missing), seen)
    counts.mean[:, rows] = encode_weights(torch.nn.functional.pad(total, missing) / pairs.clamp_min(1), seen)
