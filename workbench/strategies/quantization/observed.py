"""Attention that tokens received while the prompt was read, for the methods that choose bits by it.

Axes: B batch, H KV heads, T tokens of the prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView


def note_received(view: LayerView, rows: Tensor | None = None) -> None:
    """Add what every token received from the chunk's queries (those numbered by ``rows``) to ``state["received"]``.

    It is kept by position, float32 [B, H, T], whatever becomes of the entries; summed over queries and the group.
    """
    sums = view.chunk_attention_sums(rows).unflatten(1, (view.kv_heads, -1)).sum(2)  # [B, H, n]
    before = view.state.get("received")
    received = sums.new_zeros(*sums.shape[:2], view.seen)
    if before is not None:
        received[..., : before.shape[-1]] = before
    view.state["received"] = received.scatter_add(2, view.positions().long(), sums)


def scores_at(scores: Tensor | None, positions: Tensor) -> Tensor:
    """Scores [B, H, T] by position, at ``positions`` [B, H, n]: what came after the prompt counts most; without any, all are equal."""
    if scores is None:
        return torch.zeros(positions.shape, device=positions.device)
    beyond = positions >= scores.shape[-1]
    found = scores.gather(2, positions.long().clamp(max=scores.shape[-1] - 1))
    return torch.where(beyond, torch.inf, found)
