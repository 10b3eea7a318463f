"""ChunkKV (arXiv 2502.00299): neighbouring tokens belong together and are kept or dropped as chunks."""

from __future__ import annotations

from workbench.strategies.eviction.base import Wrapper


class ChunkKV(Wrapper):
    """Any scorer; whole chunks stay, by the sum over heads of their mean score, the same ones in every head."""

    key = "chunkkv"
    title = "ChunkKV"
    paper = "arXiv 2502.00299"
    summary = "Keeps whole chunks of neighbouring tokens, so that phrases survive in one piece."
    scores_alone = False
    fixed_selector = "chunks"
