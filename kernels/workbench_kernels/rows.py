"""Attention weights of chosen queries, each at its own position: what a tile, a top-k list or a replay is made of.

Axes: g query heads that read one KV head, R chosen queries, n entries, D head_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def row_weights(
    q: Tensor,
    k: Tensor,
    scale: float,
    at: Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax weights of queries over all entries up to their own: float32 [g, R, n].

    Args:
        q: [g, R, D]; k: [n, D] at positions 0 to n - 1.
        at: int64 [R], the queries' positions, all below n.
        window, softcap, sinks: as in :func:`workbench_kernels.attention.attention_sums`; what sinks [g] take is missing
            from the weights' sum.
    """
    grouped = (q.float() * scale).flatten(0, 1)  # [g * R, D]
    logits = (grouped @ k.float().T).unflatten(0, q.shape[:2])
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    entry = torch.arange(k.shape[0], device=q.device)
    hidden = entry > at[:, None]
    if window is not None:
        hidden |= entry <= at[:, None] - window
    logits.masked_fill_(hidden, -math.inf)
    if sinks is None:
        return logits.softmax(-1)
    column = sinks.float().view(-1, 1, 1).expand(*q.shape[:2], 1)
    return torch.cat([logits, column], -1).softmax(-1)[..., :-1]
