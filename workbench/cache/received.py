"""How much attention some entries of a segment received from the queries just asked."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.cache.segments import Query, UniformSegment, seen_by
from workbench_kernels import attention_received


def received_by(segment: UniformSegment, tier: UniformSegment, query: Query) -> Tensor:
    """Softmax weights over all of ``segment``, of the entries in its part ``tier``: float32 [B, H, n].

    Summed over the queries and over the heads of a group.
    """
    if tier.length == 0:
        return torch.zeros(tier.batch, tier.heads, 0, device=segment.device)
    _, lse = segment.attend(query)
    if query.sinks is not None:
        lse = torch.logaddexp(lse, query.sinks.float().view(1, -1, 1))
    visible = seen_by(query, tier.positions())
    received = attention_received(query.q, tier.keys(), lse, query.scale, visible=visible, softcap=query.softcap)
    return received.unflatten(1, (tier.heads, -1)).sum(2)
