"""Statistics of rotated keys by channel, which RotateKV orders them by."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.cache.cache import WorkbenchCache
from workbench.calibration.needles import needle_documents
from workbench.runs.prompt import forward
from workbench.strategies.quantization.rotatekv import statistics
from workbench.strategies.recipe import Recipe

if TYPE_CHECKING:
    from workbench.models.load import Model


def measure_channels(model: Model, samples: int, tell: Callable[[int, int], None]) -> dict[str, Tensor]:
    """Means over the tokens of ``samples`` documents: signed and by magnitude, float32 [spans, L, C]."""
    sums: dict[str, Tensor] = {}
    tokens = 0
    for number, document in enumerate(needle_documents(model, samples)):
        ids = list(document.prompt_ids)
        cache = WorkbenchCache(Recipe(), model.geometry, len(ids))
        forward(model, cache, ids)
        by_layer = []
        for layer in cache.layers:
            rope = model.geometry.ropes[layer.index]
            by_layer.append(statistics(rope.unrotate(layer.store.keys(), layer.store.all_positions())))
        tokens += len(ids)
        for name in by_layer[0]:
            found = torch.stack([layer[name] for layer in by_layer], 1).cpu()  # [spans, L, C]
            sums[name] = sums[name] + found if name in sums else found
        tell(number + 1, samples)
    return {name: (total / tokens).float() for name, total in sums.items()}
