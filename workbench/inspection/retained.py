"""Retained attention mass: how much of what the reference reads, at each step, lies on entries that a lane still holds.

Axes: N lanes, L layers, Hq query heads, H KV heads, G group, n entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.inspection.why import reference_attention

if TYPE_CHECKING:
    from workbench.cache.layer import WorkbenchLayer
    from workbench.cache.segments import Query


class RetainedMass:
    """A probe of the reference's attention: the weights of its last query, one row [G, n] at a time, and nothing kept.

    Set ``held`` before each step: per lane and layer a bool mask [H, positions] of the positions held. What lies beyond
    the mask came after it was made and counts as held.
    """

    def __init__(self, layers: int) -> None:
        self.held: Sequence[Sequence[Tensor]] = []
        self._step: list[Tensor | None] = [None] * layers

    def on_attention(self, layer: WorkbenchLayer, query: Query, out: Tensor) -> None:
        rows = []
        for row in range(layer.store.heads):
            weights, at = reference_attention(layer, query, row)
            masks = [lane[layer.index][row] for lane in self.held]
            rows.append(torch.stack([mass_on(weights, at, mask) for mask in masks]))  # [N, G]
        self._step[layer.index] = torch.cat(rows, 1).cpu()  # [N, Hq]

    def take(self) -> Tensor:
        """The step's shares, float32 [N, L, Hq], 0 to 1."""
        done = [step for step in self._step if step is not None]
        self._step = [None] * len(self._step)
        return torch.stack(done, 1)


def mass_on(weights: Tensor, positions: Tensor, held: Tensor) -> Tensor:
    """The share of each query's attention that falls on held entries: float32 [G], 0 to 1.

    What an attention sink without an entry takes (GPT-OSS) is no part of the whole.

    Args:
        weights: [G, n], not negative.
        positions: int [n] of the entries.
        held: bool [positions]; entries beyond it count as held.
    """
    inside = positions < len(held)
    counted = ~inside
    counted[inside] = held.to(positions.device)[positions[inside].long()]
    return ((weights * counted).sum(-1) / weights.sum(-1).clamp_min(torch.finfo(weights.dtype).tiny)).clamp_max(1.0)


def lowest_of_group(shares: Tensor, kv_heads: int) -> Tensor:
    """[..., Hq] -> [..., H]: of the query heads that share a KV head, the one that lost most."""
    return shares.unflatten(-1, (kv_heads, -1)).amin(-1)
