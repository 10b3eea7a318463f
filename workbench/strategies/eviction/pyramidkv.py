"""PyramidKV (arXiv 2406.02069): SnapKV's scores, with layer budgets that fall with depth."""

from __future__ import annotations

from workbench.strategies.eviction.base import Wrapper


class PyramidKV(Wrapper):
    """Any scorer; the first layer keeps most, the last least, and their sum is that of an even budget."""

    key = "pyramidkv"
    title = "PyramidKV"
    paper = "arXiv 2406.02069"
    summary = "Keeps more tokens in early layers, which spread their attention, and fewer in late ones."
    scores_alone = False
    fixed_allocator = "pyramidkv"
