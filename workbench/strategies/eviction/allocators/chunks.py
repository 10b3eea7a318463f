"""ChunkKV (arXiv 2502.00299): neighbouring tokens belong together and are kept or dropped as chunks."""

from __future__ import annotations

import param
import torch
from torch import Tensor

from workbench.strategies.eviction.base import Selector, select_top


class ChunkSelector(Selector):
    """The best chunks by the sum over heads of their mean score; all heads of a layer keep the same ones.

    Only whole chunks are kept, so a head may keep fewer than the budget allows, and at least one chunk.
    """

    key = "chunks"

    chunk_length = param.Integer(20, bounds=(1, 512), doc="tokens of a chunk")

    def pick(self, scores: Tensor, count: int) -> Tensor:
        batch, heads, n = scores.shape
        length = self.chunk_length
        values = self.chunk_scores(scores)  # [B, chunks]
        chosen = select_top(values, int(values.shape[-1] * count / n + 1e-9))
        sizes = (
            torch.arange(0, n, length, device=scores.device).add(length).clamp(max=n).diff(prepend=scores.new_zeros(1))
        )
        rows = []
        for row, best in zip(values, chosen, strict=True):
            held = best[row[best].argsort(descending=True, stable=True)]
            held = held[sizes[held].cumsum(0) <= count]  # the last chunks that the budget has no room for
            rows.append(torch.isin(torch.arange(n, device=scores.device) // length, held).nonzero().squeeze(-1))
        if len({len(row) for row in rows}) > 1 or not len(rows[0]):
            return select_top(scores, count)  # no whole chunk fits
        return torch.stack(rows)[:, None].expand(batch, heads, -1)

    def chunk_scores(self, scores: Tensor) -> Tensor:
        """[B, H, n] -> [B, chunks]: summed over heads, mean over a chunk's tokens (the last one may be shorter)."""
        top = scores.masked_fill(scores.isinf(), -torch.inf).amax()
        per_token = scores.masked_fill(scores.isinf(), float(top) + 1 if top > -torch.inf else 1.0).sum(1)
        return torch.stack([chunk.mean(-1) for chunk in per_token.split(self.chunk_length, -1)], -1)
