"""KeyDiff (arXiv 2504.15364): keys that differ from the others are rarely redundant; keep those."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import param
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.cache.segments import take
from workbench.errors import RecipeError
from workbench.strategies.eviction.base import Eviction, select_top

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView


class KeyDiff(Eviction):
    """Score = minus the cosine between a key (after RoPE) and the mean direction of all keys of its head.

    With `block`, the first entries that the budget has room for are kept, and every further block of the prompt competes
    with what was kept before it. This is done after the prompt: the scores look at keys alone, and the keys of one
    prefill do not depend on what is evicted (as in kvpress' BlockPress). The paper evicts while it reads, so that later
    blocks also attend to less.
    """

    key = "keydiff"
    title = "KeyDiff"
    paper = "arXiv 2504.15364"
    summary = "Keeps the tokens whose keys point away from the mean of all keys; looks at no query."
    private = Eviction.private | {"block"}

    block = param.Integer(0, bounds=(0, 65536), doc="tokens that compete at a time with those kept; 0 for all at once")

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.block and (self.ragged or self.selector):
            raise RecipeError(
                "keydiff: blocks leave every head the same number of tokens, picked one by one; leave block= out, or "
                "allocator= and selector=."
            )

    def score(self, view: LayerView) -> Tensor:
        return difference(view.keys())

    def after_prefill(self, view: LayerView) -> None:
        count = self.allocator_part.count(self, view)
        if self.block and count < view.length:
            self.keep(view, best_by_block(view.keys(), count, self.block))
        else:
            super().after_prefill(view)


def difference(keys: Tensor) -> Tensor:
    """Minus the cosine of every key [B, H, n, D] with the mean of the keys' directions: float32 [B, H, n]."""
    keys = keys.float()
    anchor = F.normalize(keys, dim=-1).mean(2, keepdim=True)
    return -F.cosine_similarity(keys, anchor, dim=-1)


def best_by_block(keys: Tensor, count: int, block: int) -> Tensor:
    """The ``count`` entries kept [B, H, count], ascending, when each block competes with those kept before it."""
    batch, heads, n, _ = keys.shape
    every = torch.arange(n, device=keys.device).expand(batch, heads, -1)
    kept = every[..., :count]
    for start in range(count, n, block):
        rivals = torch.cat([kept, every[..., start : start + block]], -1)
        kept = rivals.gather(-1, select_top(difference(take(keys, rivals)), count))
    return kept
