"""Attention received so far, for the methods that score by it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from workbench.strategies.eviction.base import Eviction

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView


class AccumulatedAttention(Eviction):
    """Base of the methods that watch every query: each entry's attention, summed over all queries and the group."""

    @property
    def needs_prompt(self) -> bool:
        return True

    @property
    def per_entry(self) -> frozenset[str]:
        return frozenset({"received"})

    def received(self, view: LayerView) -> Tensor:
        """Attention each entry received so far: float32 [B, H, n]."""
        return newest(view.state["received"], view.length)

    def on_chunk(self, view: LayerView) -> None:
        received = view.chunk_attention_sums().unflatten(1, (view.kv_heads, -1)).sum(2)  # [B, H, n]
        before = view.state.get("received")
        if before is not None:
            held = received.shape[-1] - view.chunk.shape[2]  # entries from before this chunk
            received[..., :held] += newest(before, held)
        view.state["received"] = received

    def forget(self, view: LayerView) -> None:
        if not self.keeps_acting:
            view.state.pop("received", None)


def newest(received: Tensor, count: int) -> Tensor:
    """The last ``count`` of [B, H, n]: a sliding window may have dropped the oldest entries meanwhile."""
    return received[..., received.shape[-1] - count :]
