"""AdaKV (arXiv 2407.11550): one budget for a layer, shared among its heads by what each of them needs."""

from __future__ import annotations

from workbench.strategies.eviction.base import Wrapper


class AdaKV(Wrapper):
    """Any scorer; the layer's budget goes to the best scores of all heads, each head keeping a safeguard.

    Parameters of the scorer are given alongside: ``adakv(scorer="snapkv", budget=0.25, window=16)``.
    """

    key = "adakv"
    title = "AdaKV"
    paper = "arXiv 2407.11550"
    summary = "Shares a layer's budget among its heads by their scores: every head keeps its own number of tokens."
    scores_alone = False
    fixed_allocator = "adakv"
