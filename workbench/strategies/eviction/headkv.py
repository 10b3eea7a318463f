"""HeadKV (arXiv 2410.19258): heads that retrieve keep more, by a test made once per model and not by the prompt at hand."""

from __future__ import annotations

from workbench.strategies.eviction.base import Wrapper


class HeadKV(Wrapper):
    """Any scorer; how many entries a head keeps was decided by the importance it showed in needle tests."""

    key = "headkv"
    title = "HeadKV"
    paper = "arXiv 2410.19258"
    summary = "Gives heads that retrieve more of the cache, as measured once per model; needs a calibration."
    scores_alone = False
    fixed_allocator = "headkv"
