"""Random eviction: the baseline every method has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

import param
import torch
from torch import Tensor

from workbench.strategies.eviction.base import Eviction

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView


class Random(Eviction):
    """Score = a uniform random number per entry, seeded by `seed` and the layer."""

    key = "random"
    title = "Random"
    paper = ""
    summary = "Keeps tokens at random; the baseline every method has to beat."

    seed = param.Integer(0, bounds=(0, 2**31 - 1), doc="seed of the choice; each layer draws its own")

    def score(self, view: LayerView) -> Tensor:
        at = view.positions()
        drawn = torch.Generator().manual_seed(self.seed * 100_003 + view.layer)  # on CPU: the same on every device
        return torch.rand(at.shape, generator=drawn).to(at.device)
