"""Storage drift: what two runs hold for the same token, compared vector by vector.

Card kv-drift §2. Axes: n tokens, D head_dim; one KV head of one layer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from workbench.cache.store import Store

SMALL = 0.05  # of the median norm: below it a token's relative error is measured against this (card §2)


class Status(IntEnum):
    """What became of a token in one KV head."""

    EVICTED = 0  # the reference holds it, the lane does not
    KEPT = 1
    QUANTIZED = 2  # key and value are held as codes
    OUT = 3  # the reference does not hold it either: a sliding window has passed it


@dataclass(frozen=True)
class VectorDrift:
    """Per token float32 [n]; NaN where the lane holds no vector for it, which is no distance."""

    cosine: Tensor
    relative: Tensor  # |x_S - x_R| / max(|x_R|, eps)
    norm_ratio: Tensor  # |x_S| / |x_R|


@dataclass(frozen=True)
class HeadDrift:
    """One KV head of one layer.

    Attributes:
        status: uint8 [n], a :class:`Status` per token of the prompt.
        keys, values: as they are held. ``centred``: keys less the mean of what both runs hold, each run its own: a vector
            added to all keys changes no softmax.
        frobenius: relative error over all tokens together, by name; sinks weigh heavily in that of the keys.
    """

    status: Tensor
    keys: VectorDrift
    centred: VectorDrift
    values: VectorDrift
    frobenius: dict[str, float]

    @property
    def coverage(self) -> float:
        """The share of the tokens the reference holds that the lane represents; NaN where it holds none."""
        held = int((self.status == Status.KEPT).sum() + (self.status == Status.QUANTIZED).sum())
        evicted = int((self.status == Status.EVICTED).sum())
        return held / (held + evicted) if held + evicted else float("nan")


def vector_drift(reference: Tensor, lane: Tensor, eps: float | None = None) -> VectorDrift:
    """Compare vectors [n, D] token by token, in float32 or better.

    Args:
        eps: the least norm that an error is set against; by default 5 % of the reference's median norm, because sinks
            have values near zero.
    """
    x, y = (t if t.dtype == torch.float64 else t.float() for t in (reference, lane))
    size = x.norm(dim=-1)
    if eps is None:
        eps = SMALL * float(size.median()) if len(size) else 0.0
    tiny = torch.finfo(x.dtype).tiny
    same = (size == 0) & (y.norm(dim=-1) == 0)
    cosine = F.cosine_similarity(x, y, dim=-1, eps=tiny).masked_fill(same, 1.0)
    relative = (y - x).norm(dim=-1) / size.clamp_min(max(eps, tiny))
    ratio = (y.norm(dim=-1) / size.clamp_min(tiny)).masked_fill(same, 1.0)
    return VectorDrift(cosine, relative, ratio)


def relative_frobenius(reference: Tensor, lane: Tensor) -> float:
    """|X_S - X_R|_F / |X_R|_F; 0 where both hold nothing."""
    size = float(reference.norm())
    error = float((lane - reference).norm())
    return error / size if size else (0.0 if not error else float("inf"))


def head_drift(reference: Store, lane: Store, row: int, tokens: int) -> HeadDrift:
    """Compare one row of two stores over the positions 0 to tokens - 1."""
    k_r, v_r, at_r = reference.entries(row)
    k_s, v_s, at_s = lane.entries(row)
    theirs, ours = common_entries(at_r, at_s)
    at = at_s[ours].long()
    status = torch.full((tokens,), int(Status.OUT), dtype=torch.uint8)
    status[at_r.long().cpu()] = Status.EVICTED
    status[at.cpu()] = (
        torch.where(ours < lane.packed(row), int(Status.QUANTIZED), int(Status.KEPT)).to(torch.uint8).cpu()
    )
    k_r, v_r, k_s, v_s = (x.float() for x in (k_r, v_r, k_s, v_s))
    pairs = {
        "keys": (k_r[theirs], k_s[ours], k_r),
        "centred": (*centred(k_r[theirs], k_s[ours]), k_r - k_r[theirs].mean(0) if len(theirs) else k_r),
        "values": (v_r[theirs], v_s[ours], v_r),
    }
    drifts = {}
    for name, (x, y, everything) in pairs.items():
        eps = SMALL * float(everything.norm(dim=-1).median()) if len(everything) else 0.0
        drifts[name] = _laid_out(vector_drift(x, y, eps), at, tokens)
    return HeadDrift(
        status, drifts["keys"], drifts["centred"], drifts["values"],
        {name: relative_frobenius(x, y) for name, (x, y, _) in pairs.items()},
    )  # fmt: skip


def centred(reference: Tensor, lane: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [n, D] of the tokens both hold, each run less its own mean."""
    if len(reference) == 0:
        return reference, lane
    return reference - reference.mean(0), lane - lane.mean(0)


def common_entries(reference: Tensor, lane: Tensor) -> tuple[Tensor, Tensor]:
    """Entry numbers, in the reference and in the lane, of the positions both hold (int32 [n] each, any order)."""
    order = reference.argsort()
    held = reference[order]
    slot = torch.searchsorted(held, lane).clamp_(max=max(0, len(held) - 1))
    both = held[slot] == lane if len(held) else torch.zeros_like(lane, dtype=torch.bool)
    return order[slot[both]], both.nonzero().squeeze(-1)


def _laid_out(drift: VectorDrift, at: Tensor, tokens: int) -> VectorDrift:
    """By position [tokens], NaN where there is none."""
    out = {}
    for field in fields(drift):
        laid = torch.full((tokens,), float("nan"))
        laid[at.cpu()] = getattr(drift, field.name).float().cpu()
        out[field.name] = laid
    return VectorDrift(**out)
