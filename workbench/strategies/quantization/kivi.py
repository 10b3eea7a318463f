"""KIVI (arXiv 2402.02750): keys in few bits per channel, values per token, the newest tokens in full precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import param
from torch import Tensor

from workbench.cache.packed import PackedSegment
from workbench.errors import RecipeError
from workbench.strategies.base import Strategy

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView
    from workbench.models.geometry import Geometry


class KIVI(Strategy):
    """After the prompt, keys are packed in groups of `group_size` tokens of one channel, values in groups of
    `group_size` channels of one token. Keys leave the residual `residual_length` at a time, values one by one."""

    key = "kivi"
    family: ClassVar[str] = "quantization"
    title = "KIVI"
    paper = "arXiv 2402.02750"
    summary = "Holds keys and values in 2, 4 or 8 bits, the newest tokens in full precision."

    bits: Any = param.Selector(default=2, objects=[2, 4, 8], doc="bits per number, for keys and values")
    key_bits: Any = param.Selector(default=None, objects=[None, 2, 4, 8], doc="bits for keys, where they differ")
    value_bits: Any = param.Selector(default=None, objects=[None, 2, 4, 8], doc="bits for values, where they differ")
    group_size = param.Integer(32, bounds=(16, 128), doc="numbers that share a scale and a minimum")
    residual_length = param.Integer(
        128, bounds=(16, 4096), doc="newest tokens in full precision (a multiple of group_size)"
    )

    def __init__(self, **values: object) -> None:
        super().__init__(**values)
        if self.group_size % 16 or 128 % self.group_size:
            raise RecipeError(f"kivi: group_size must be 16, 32, 64 or 128, got {self.group_size}.")
        if self.residual_length % self.group_size:
            raise RecipeError(
                f"kivi: residual_length must be a multiple of group_size ({self.group_size}), got "
                f"{self.residual_length}."
            )

    def check(self, geometry: Geometry) -> None:
        if geometry.head_dim % self.group_size:
            fits = [g for g in (16, 32, 64, 128) if geometry.head_dim % g == 0]
            offer = f"use group_size={fits[-1]}" if fits else "this model's heads are too small for kivi; use full"
            raise RecipeError(
                f"kivi: head_dim {geometry.head_dim} of this model is not a multiple of group_size "
                f"{self.group_size}; {offer}."
            )

    def after_prefill(self, view: LayerView) -> None:
        view.recode(self)

    def encode(self, k: Tensor, v: Tensor, positions: Tensor | None, start: int) -> PackedSegment:
        """Hold k, v [B, H, n, D] packed; see :class:`PackedSegment`."""
        segment = PackedSegment(
            k.shape[0],
            k.shape[1],
            self.key_bits or self.bits,
            self.value_bits or self.bits,
            self.group_size,
            self.residual_length,
        )
        segment.load(k, v, positions, start)
        return segment
