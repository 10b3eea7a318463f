"""StreamingLLM (arXiv 2309.17453): the first tokens are attention sinks; keep them and the most recent ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import param
from torch import Tensor

from workbench.strategies.eviction.base import PROTECTED, StepwiseEviction

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView


class StreamingLLM(StepwiseEviction):
    """Score = position, with the first `sinks` protected. Keys keep their original rotation."""

    key = "streaming_llm"
    title = "StreamingLLM"
    paper = "arXiv 2309.17453"
    summary = "Keeps the first few tokens (attention sinks) and the most recent ones."

    sinks = param.Integer(4, bounds=(0, 256), doc="first tokens that always stay")

    def score(self, view: LayerView) -> Tensor:
        at = view.positions()
        return at.float().masked_fill(at < self.sinks, PROTECTED)
