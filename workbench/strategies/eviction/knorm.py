"""KNorm (arXiv 2406.11430): keys of small norm tend to receive attention; keep those."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from workbench.strategies.eviction.base import Eviction

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView


class KNorm(Eviction):
    """Score = minus the L2 norm of the key (RoPE does not change it)."""

    key = "knorm"
    title = "KNorm"
    paper = "arXiv 2406.11430"
    summary = "Keeps the tokens whose keys have the smallest norm; looks at no query."

    def score(self, view: LayerView) -> Tensor:
        return -view.keys().float().norm(dim=-1)
