"""Why a lane broke: what the reference read for a token, and how much of it the lane no longer holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.inspection.reading import SINK, take_reading

if TYPE_CHECKING:
    from workbench.cache.layer import WorkbenchLayer
    from workbench.cache.segments import Query
    from workbench.runs.lane import Lane
    from workbench.runs.reference import ReferenceRun


@dataclass(frozen=True)
class LostToken:
    """A prompt token the reference read and some heads of the lane dropped."""

    position: int
    mass: float  # attention the reference paid it, summed over the (layer, KV head) pairs that dropped it
    heads: int  # pairs that dropped it


@dataclass(frozen=True)
class Why:
    """What was lost for one generated token.

    Attributes:
        token: index of the generated token.
        lost_mass: [layers][KV heads], share of the reference's attention that falls on dropped prompt tokens (the
            largest over the head's group); 0 where everything read is still held.
        lost: the dropped tokens that mattered most, largest mass first.
        read: [layers][KV heads], the prompt positions the reference read most there, with their weights.
    """

    token: int
    lost_mass: list[list[float]]
    lost: list[LostToken]
    read: list[list[list[tuple[int, float]]]]


def reference_attention(layer: WorkbenchLayer, query: Query, row: int) -> tuple[Tensor, Tensor]:
    """The reference's attention of one query to what it held after the prompt.

    Returns:
        weights float32 [G, n] over the prompt entries of the row, and their positions int32 [n].
    """
    found = take_reading(layer, query, row)
    weights = found.logits.softmax(-1)
    own = found.at != SINK  # what a sink takes is missing from the sum
    return weights[:, own], found.at[own]


def explain(trace: ReferenceRun, lane: Lane, token: int, answer: int = 0, most: int = 8) -> Why | None:
    """Compare what the reference read for ``token`` with what ``lane`` kept of the prompt.

    Attention among generated tokens is left out: weights are over the prompt alone. None if the reference recorded
    no queries for this token.
    """
    queries = trace.answers[answer].queries(token) if answer < len(trace.answers) else []
    if not queries or not lane.kept_positions:
        return None
    mass: dict[int, float] = {}
    heads: dict[int, int] = {}
    lost_mass, read = [], []
    with torch.inference_mode():
        for number, (layer, query) in enumerate(zip(trace.cache.layers, queries, strict=True)):
            row_mass, row_read = [], []
            for row in range(layer.store.heads):
                weights, at = reference_attention(layer, query, row)
                kept = torch.tensor(lane.kept_positions[number][row], dtype=at.dtype, device=at.device)
                dropped = ~torch.isin(at, kept)
                row_mass.append(float((weights * dropped).sum(-1).max()))
                strongest = weights.amax(0)  # [n], over the group
                top = strongest.topk(min(most, len(at)))
                row_read.append(list(zip(at[top.indices].tolist(), top.values.tolist(), strict=True)))
                for position, weight in zip(at[dropped].tolist(), strongest[dropped].tolist(), strict=True):
                    mass[position] = mass.get(position, 0.0) + weight
                    heads[position] = heads.get(position, 0) + 1
            lost_mass.append(row_mass)
            read.append(row_read)
    ranked = sorted(mass, key=lambda position: (-mass[position], position))[:most]
    return Why(token, lost_mass, [LostToken(p, mass[p], heads[p]) for p in ranked], read)
