"""CompressKV (arXiv 2508.02401): only the heads known to read the passage around an answer vote, for all heads of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import param
import torch.nn.functional as F
from torch import Tensor

from workbench.strategies.base import Declared
from workbench.strategies.eviction.allocators.compresskv import CALIBRATION, CompressKVAllocator
from workbench.strategies.eviction.base import PROTECTED, Eviction, pool

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView


class CompressKV(Eviction):
    """Score = attention of the last `window` queries of the layer's semantic retrieval heads, summed over the window,
    average-pooled over neighbours, mean over these heads: one kept set for all KV heads of a layer. Layer budgets are those of
    the allocator of the same name, window included. `most=1.0` makes them even."""

    key = "compresskv"
    title = "CompressKV"
    paper = "arXiv 2508.02401"
    summary = (
        "Lets only the heads that find answers vote, and gives more to layers that suffer most; needs a calibration."
    )
    fixed_allocator = "compresskv"
    artifact_kind = CALIBRATION

    heads = param.Integer(4, bounds=(1, 256), doc="query heads of each layer that vote (all, where it has fewer)")
    window = param.Integer(8, bounds=(1, 512), doc="queries at the end of the prompt that vote, and stay")
    kernel = param.Integer(5, bounds=(1, 63), doc="width of the average over neighbouring tokens (odd)")
    artifact = param.String("", doc="calibration file; empty: the one that belongs to the model", precedence=9)

    def settled(self, kind: type[Declared]) -> dict[str, Any]:
        return {"artifact": self.artifact} if kind is CompressKVAllocator else {}

    @property
    def score_window(self) -> int:
        return self.window

    def score(self, view: LayerView) -> Tensor:
        semantic = view.artifact(self).tensors["semantic"][view.layer]  # [Hq]
        voters = semantic.argsort(descending=True, stable=True)[: self.heads]
        votes = view.window_attention(self.window).flatten(1, 2)  # [B, Hq, W, n]
        window = min(self.window, view.length)
        older = votes[:, voters.to(votes.device), :, : view.length - window].sum(2)  # [B, k, n - W]
        shared = F.pad(vote(older, self.kernel), (0, window), value=PROTECTED)
        return shared[:, None].expand(-1, view.kv_heads, -1)


def vote(attention: Tensor, kernel: int) -> Tensor:
    """Pooled over neighbours (zeros beyond the ends), then the mean of the voters: [B, k, n] -> [B, n]."""
    return pool(attention, kernel).mean(1)
