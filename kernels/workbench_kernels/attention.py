"""Attention over one run of cached entries, returning (output, log-sum-exp) so that runs can be merged.

Nothing here builds a Tq x N matrix for a whole prompt: prefill goes through the fused kernel of torch, and what the
fused kernel cannot express (windows, soft-capping, padding) is done in blocks of queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_CELLS = 1 << 21  # query-block x keys cells of logits held at a time: 8 MiB in float32

MaskFn = Callable[[int, int, int, int], Tensor | None]
"""(q0, q1, n0, n1) -> additive float mask broadcastable to [B, Hq, q1 - q0, n1 - n0], or None where all is visible."""


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, in float32 and with the full logits: for tests and small inputs only.

    Args:
        q: [B, Hq, Tq, D]; k, v: [B, H, N, D] with Hq a multiple of H (query head h reads KV head h // G).
        visible: bool, broadcastable to [B, Hq, Tq, N]; None means every entry is visible.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).

    Returns:
        Output [B, Hq, Tq, D] in q's dtype and the log-sum-exp of the logits [B, Hq, Tq] in float32 (``-inf`` and a
        zero output where a query sees nothing).
    """
    group = q.shape[1] // k.shape[1]
    logits = q.float() @ k.float().repeat_interleave(group, 1).transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if visible is not None:
        logits = logits.masked_fill(~visible, -math.inf)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return (weights @ v.float().repeat_interleave(group, 1)).to(q.dtype), lse


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    causal: bool = False,
    window: int | None = None,
    mask: MaskFn | None = None,
    softcap: float | None = None,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention of q [B, Hq, Tq, D] over k, v [B, H, N, D] without repeating K and V over the GQA group.

    v may have another width than q and k; the output then has that of v.

    Args:
        causal: the queries belong to the *last* Tq entries (aligned at the end); earlier entries are all visible.
        window: with ``causal``, a query sees only the last ``window`` entries up to its own (sliding-window layers).
        mask: additive mask in query blocks, on top of ``causal``; see :data:`MaskFn`.
        need_lse: False lets a GPU use whatever fused kernel it likes (the second result is then None).

    Returns:
        (output [B, Hq, Tq, D], log-sum-exp [B, Hq, Tq] float32 or None).
    """
    queries, entries = q.shape[2], k.shape[2]
    if entries == 0:
        return q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
    if window is not None and entries <= window:
        window = None  # nothing lies outside the window
    if mask is not None or softcap is not None or window is not None:
        return _blockwise(q, k, v, scale, causal, window, mask, softcap)
    if not causal or queries == 1:
        return _fused(q, k, v, scale, False, need_lse)
    if queries == entries:
        return _fused(q, k, v, scale, True, need_lse)
    past = entries - queries
    parts = [
        _fused(q, k[:, :, :past], v[:, :, :past], scale, False, True),
        _fused(q, k[:, :, past:], v[:, :, past:], scale, True, True),
    ]
    return merge_partials(parts)  # type: ignore[arg-type]


def merge_partials(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint runs of entries by their (output, log-sum-exp); exact in real arithmetic."""
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])
    total = torch.logsumexp(lses, 0)
    safe = total.masked_fill(total == -math.inf, 0.0)
    out = torch.zeros_like(parts[0][0], dtype=torch.float32)
    for part, lse in parts:
        out += part.float() * torch.exp(lse - safe)[..., None]
    return out.to(parts[0][0].dtype), total


def softmax_with_lse(logits: Tensor, *, all_seen: bool = True) -> tuple[Tensor, Tensor]:
    """Weights [..., N] and log-sum-exp [...] of float32 logits, in one pass of exponentials: the largest weight is
    ``exp(largest logit - lse)``. A row of ``-inf`` has no weights and ``-inf``; say ``all_seen=False`` where there may be
    such."""
    weights, highest = logits.softmax(-1), logits.amax(-1)
    if not all_seen:
        weights.nan_to_num_(0.0)  # 0 / 0 where nothing is seen
    lse = highest - weights.amax(-1).log()
    return weights, lse if all_seen else lse.masked_fill(highest == -math.inf, -math.inf)


def attention_sums(
    q: Tensor,
    k: Tensor,
    scale: float,
    *,
    causal: bool = True,
    window: int | None = None,
    mask: MaskFn | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Column sums of the softmax over all queries, in O(N) memory per head and blocks of queries.

    Args:
        q: [B, Hq, Tq, D]; k: [B, H, N, D]; the rest as in :func:`attend`.
        sinks: [Hq] learnt logits that take a share of every query's mass (GPT-OSS).

    Returns:
        [B, Hq, N] float32: the attention each entry receives, summed over the queries.
    """
    batch, heads, queries, _ = q.shape
    entries = k.shape[2]
    sums = torch.zeros(batch, heads, entries, device=q.device)
    for q0, q1 in _query_blocks(batch * heads, queries, entries):
        logits = _block_logits(q, k, scale, (q0, q1), (0, entries), causal, window, mask, softcap)
        weights = logits.softmax(-1).nan_to_num(0.0)  # a row that sees nothing pays nothing
        if sinks is not None:
            weights *= torch.sigmoid(logits.logsumexp(-1) - sinks.float().view(1, -1, 1))[..., None]
        sums += weights.sum(2)
    return sums


def attention_received(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, *, visible: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """What some entries received of the attention of all: the softmax over everything is known by its log-sum-exp.

    Args:
        q: [B, Hq, Tq, D]; k: [B, H, N, D], the entries asked about; lse: [B, Hq, Tq] over all entries.
        visible: bool [B, H, Tq, N], which query sees which; None where all see all.

    Returns:
        [B, Hq, N] float32, summed over the queries.
    """
    logits = _block_logits(q, k, scale, (0, q.shape[2]), (0, k.shape[2]), False, None, None, softcap)
    if visible is not None:
        logits = logits.masked_fill(~visible.repeat_interleave(q.shape[1] // visible.shape[1], 1), -math.inf)
    return torch.exp(logits - lse[..., None]).nan_to_num(0.0).sum(2)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    if q.device.type == "cpu" and k.shape[-1] == v.shape[-1]:
        # The CPU kernel reads rows as if the last axis were dense, and says nothing where it is not.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        together = q.shape[2] == 1 and q.shape[1] > k.shape[1]
        if together:  # a generated token: the group's heads as so many queries, so that keys and values are read once
            q = q.squeeze(2).unflatten(1, (k.shape[1], -1))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return (out.flatten(1, 2)[:, :, None], lse.flatten(1, 2)[..., None]) if together else (out, lse)
    if not need_lse:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True), None
    return _blockwise(q, k, v, scale, causal, None, None, None)


def _blockwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    mask: MaskFn | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    entries, kv_heads = k.shape[2], k.shape[1]
    out = q.new_empty(batch, heads, queries, v.shape[-1])
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    for q0, q1 in _query_blocks(batch * heads, queries, entries):
        n1 = entries - queries + q1 if causal else entries
        n0 = max(0, entries - queries + q0 - window + 1) if window is not None else 0
        logits = _block_logits(q, k, scale, (q0, q1), (n0, n1), causal, window, mask, softcap)
        block_lse = logits.logsumexp(-1)
        weights = torch.exp(logits - block_lse.masked_fill(block_lse == -math.inf, 0.0)[..., None])
        grouped = weights.to(v.dtype).reshape(batch, kv_heads, -1, n1 - n0)  # [B, H, G * q, n]
        out[:, :, q0:q1] = (grouped @ v[:, :, n0:n1]).view(batch, heads, q1 - q0, -1)
        lse[:, :, q0:q1] = block_lse
    return out, lse


def _block_logits(
    q: Tensor,
    k: Tensor,
    scale: float,
    rows: tuple[int, int],
    columns: tuple[int, int],
    causal: bool,
    window: int | None,
    mask: MaskFn | None,
    softcap: float | None,
) -> Tensor:
    """Float32 logits [B, Hq, rows, columns] of a block, masked with -inf."""
    batch, heads, queries, dim = q.shape
    kv_heads, entries = k.shape[1], k.shape[2]
    (q0, q1), (n0, n1) = rows, columns
    grouped = q[:, :, q0:q1].reshape(batch, kv_heads, -1, dim)  # [B, H, G * q, D]
    logits = (grouped @ k[:, :, n0:n1].transpose(-1, -2)).float().view(batch, heads, q1 - q0, n1 - n0) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if causal:
        own = torch.arange(q0, q1, device=q.device)[:, None] + (entries - queries)
        entry = torch.arange(n0, n1, device=q.device)[None, :]
        hidden = entry > own
        if window is not None:
            hidden |= entry <= own - window
        logits = logits.masked_fill(hidden, -math.inf)
    if mask is not None:
        extra = mask(q0, q1, n0, n1)
        if extra is not None:
            logits = logits + extra
    return logits


def _query_blocks(rows: int, queries: int, entries: int) -> list[tuple[int, int]]:
    step = max(1, min(256, BLOCK_CELLS // max(1, rows * entries)))
    return [(q0, min(queries, q0 + step)) for q0 in range(0, queries, step)]
