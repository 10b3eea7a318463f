"""StreamingLLM (arXiv 2309.17453): the first tokens are attention sinks; keep them and the most recent ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import param
import torch
from torch import Tensor

from workbench.cache.segments import take
from workbench.errors import RecipeError
from workbench.strategies.base import tokens_kept
from workbench.strategies.eviction.base import PROTECTED, StepwiseEviction

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView
    from workbench.models.geometry import Geometry


class StreamingLLM(StepwiseEviction):
    """Score = position, with the first `sinks` protected.

    Keys keep their original rotation, or with `rerotate` get that of their place inside the cache, as in the paper. RoPE
    sees distances only, so instead of moving the recent tokens and all that comes back by the number of evicted tokens,
    the sinks move forward by it: every logit is that of compact positions 0, 1, … with the next token right behind them,
    and positions handed to the model stay the number of tokens seen. The sinks are turned each time from the keys they
    came with, once and in float32.
    """

    key = "streaming_llm"
    title = "StreamingLLM"
    paper = "arXiv 2309.17453"
    summary = "Keeps the first few tokens (attention sinks) and the most recent ones."
    private = StepwiseEviction.private | {"rerotate"}

    sinks = param.Integer(4, bounds=(0, 256), doc="first tokens that always stay")
    rerotate = param.Boolean(False, doc="give keys the positions they have inside the cache, as if nothing lay between")

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.rerotate and (self.ragged or self.selector):
            raise RecipeError(
                "streaming_llm: rerotate=True closes the one gap between sinks and recent tokens; leave rerotate= out, or "
                "allocator= and selector=."
            )

    @property
    def scores_alike(self) -> str:
        return "" if self.rerotate else "layers"  # turned keys are no longer those of the layers' inputs

    @property
    def alone(self) -> bool:
        return self.rerotate

    def check(self, geometry: Geometry) -> None:
        if self.rerotate:
            geometry.ropes.require("streaming_llm(rerotate=True)")

    def score(self, view: LayerView) -> Tensor:
        at = view.positions()
        # Where the budget has no room for all sinks, it goes to the first ones, which are looked at most.
        room = self.budget if isinstance(self.budget, int) else tokens_kept(self.budget, view.prompt_length)
        return at.float().masked_fill(at < min(self.sinks, room), PROTECTED)

    def keep(self, view: LayerView, index: Tensor | Sequence[Tensor]) -> None:
        if self.rerotate and isinstance(index, Tensor):
            view.keep(index, self._closed_up(view, index))
        else:
            view.keep(index)

    def _closed_up(self, view: LayerView, index: Tensor) -> Tensor:
        """Keys [B, H, m, D] of the entries ``index`` [B, H, m], the sinks turned to lie right before the others."""
        keys, at = view.keys(), view.positions()
        held = int((at[0, 0] < self.sinks).sum())  # sinks in this layer, the same in every head
        original = view.state.get("sinks", keys[:, :, :held])
        original = original[:, :, original.shape[2] - held :]  # a sliding window drops the oldest
        chosen = index[..., : int((index[0, 0] < held).sum())]
        original = take(original, chosen)
        first = view.seen - index.shape[-1]  # where the first entry lies when all are consecutive up to the newest
        place = torch.arange(first, first + chosen.shape[-1], device=keys.device)
        sinks = view.rope.move(original, at.gather(2, chosen), place).to(keys.dtype)
        if self.keeps_acting:
            view.state["sinks"] = original
        return torch.cat([sinks, take(keys, index[..., chosen.shape[-1] :])], 2)
