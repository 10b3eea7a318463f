"""ChunkKV (arXiv 2502.00299): neighbouring tokens belong together and are kept or dropped as chunks."""

from __future__ import annotations

import param
import torch
from torch import Tensor

from workbench.strategies.eviction.base import Selector, select_top


class ChunkSelector(Selector):
    """The best chunks by the sum over heads of their mean score, as many as the budget has room for; all heads of a layer
    keep the same ones. Where not one fits, or the rows of a batch would keep different numbers, the best entries stay.
    """

    key = "chunks"

    chunk_length = param.Integer(20, bounds=(1, 512), doc="tokens of a chunk")

    def pick(self, scores: Tensor, count: int) -> Tensor:
        batch, heads, n = scores.shape
        values = self.chunk_scores(scores)
        last = values.shape[-1] - 1
        order = last - values.flip(-1).argsort(dim=-1, descending=True, stable=True)  # ties go to the later chunk
        chunk_of = torch.arange(n, device=scores.device) // self.chunk_length
        sizes = chunk_of.bincount()
        rows = []
        for best in order:
            fitting = best[sizes[best].cumsum(0) <= count]
            rows.append(torch.isin(chunk_of, fitting).nonzero().squeeze(-1))
        if len({len(row) for row in rows}) > 1 or not len(rows[0]):
            return select_top(scores, count)
        return torch.stack(rows)[:, None].expand(batch, heads, -1)

    def chunk_scores(self, scores: Tensor) -> Tensor:
        """[B, H, n] -> [B, chunks]: summed over heads, mean over a chunk's tokens (the last one may be shorter)."""
        top = scores.masked_fill(scores.isinf(), -torch.inf).amax()
        per_token = scores.masked_fill(scores.isinf(), float(top) + 1 if top > -torch.inf else 1.0).sum(1)
        return torch.stack([chunk.mean(-1) for chunk in per_token.split(self.chunk_length, -1)], -1)
