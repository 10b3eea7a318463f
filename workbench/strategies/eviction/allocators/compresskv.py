"""CompressKV's layer budgets (arXiv 2508.02401): in proportion to how much a layer's output suffers from a very small cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import param

from workbench.models.artifacts import Kind
from workbench.strategies.eviction.allocators.rounds import settle
from workbench.strategies.eviction.base import Allocator, Eviction

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView

CALIBRATION = Kind(
    method="compresskv",
    what="calibration",
    suffix=".json",
    command="kvw calibrate compresskv {model}",
    instead="snapkv",
    # semantic: how strongly each query head reads the whole passage that holds the answer; errors: of each layer, summing to 1
    shapes=lambda g: {"semantic": (g.num_layers, g.num_heads), "errors": (g.num_layers,)},
)


class CompressKVAllocator(Allocator):
    """Static layer budgets from errors measured offline; the same number for every head of a layer.

    Between `least` and `most` times the even budget, and never more than the prompt has; their sum is that of an even budget.
    """

    key = "compresskv"
    artifact_kind = CALIBRATION

    least = param.Integer(32, bounds=(1, 4096), doc="tokens every layer keeps, where the budget has as many")
    most = param.Number(3.0, bounds=(1.0, 100.0), doc="the most a layer keeps, in even budgets")
    artifact = param.String("", doc="calibration file; empty: the one that belongs to the model", precedence=9)

    def count(self, method: Eviction, view: LayerView) -> int:
        return min(self.capacity(method, view), view.length)

    def capacity(self, method: Eviction, view: LayerView) -> int:
        even = super().capacity(method, view)
        most = min(int(self.most * even), max(view.prompt_length, even))
        errors = view.artifact(self).tensors["errors"].tolist()
        return layer_budgets(errors, even * view.num_layers, min(self.least, even), most)[view.layer]


def layer_budgets(errors: Sequence[float], total: int, least: int, most: int) -> list[int]:
    """Entries per layer, window included: ``least`` and a share of the rest by error, rounded half to even, then settled.

    Args:
        errors: per layer, not negative.
        total: entries of all layers together.
    """
    whole = sum(errors) or 1.0
    rest = total - least * len(errors)
    counts = [min(max(least + round(error / whole * rest), least), most) for error in errors]
    return settle(counts, total, least, most, errors)
