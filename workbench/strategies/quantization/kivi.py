"""KIVI (arXiv 2402.02750): keys in few bits per channel, values per token, the newest tokens in full precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import param

from workbench.cache.coded import PairCodec
from workbench.cache.schemes.base import Verbatim
from workbench.cache.schemes.rtn import PerChannel, PerToken
from workbench.cache.sides import Flush
from workbench.errors import RecipeError
from workbench.strategies.quantization.base import BITS, GROUPS, Quantization

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView
    from workbench.models.geometry import Geometry


class KIVI(Quantization):
    """After the prompt, keys are packed in groups of `group_size` tokens of one channel, values in groups of
    `group_size` channels of one token. Keys leave the residual `residual_length` at a time, values one by one."""

    key = "kivi"
    title = "KIVI"
    paper = "arXiv 2402.02750"
    summary = "Holds keys and values in 2, 4 or 8 bits, the newest tokens in full precision."

    bits: Any = param.Selector(default=2, objects=BITS, doc="bits per number, for keys and values; 16: as they are")
    key_bits: Any = param.Selector(default=None, objects=[None, *BITS], doc="bits for keys, where they differ")
    value_bits: Any = param.Selector(default=None, objects=[None, *BITS], doc="bits for values, where they differ")
    group_size = param.Integer(32, bounds=(16, 128), doc="numbers that share a scale and a minimum")
    residual_length = param.Integer(
        128, bounds=(16, 4096), doc="newest tokens in full precision (a multiple of group_size)"
    )

    def __init__(self, **values: object) -> None:
        super().__init__(**values)
        if self.group_size not in GROUPS:
            raise RecipeError(f"kivi: group_size must be 16, 32, 64 or 128, got {self.group_size}.")
        if self.residual_length % self.group_size:
            raise RecipeError(
                f"kivi: residual_length must be a multiple of group_size ({self.group_size}), got "
                f"{self.residual_length}."
            )

    @property
    def sides(self) -> tuple[int, int]:
        """Bits for keys and for values."""
        return self.key_bits or self.bits, self.value_bits or self.bits

    @property
    def exact(self) -> bool:
        return self.sides == (16, 16)

    def check(self, geometry: Geometry) -> None:
        if not self.exact:
            self.need_divisor("group_size", self.group_size, geometry.head_dim)

    def codec(self, view: LayerView | None = None) -> PairCodec:
        key_bits, value_bits = self.sides
        return PairCodec(
            keys=Verbatim("keys") if key_bits == 16 else PerChannel(key_bits, self.group_size),
            values=Verbatim("values") if value_bits == 16 else PerToken(value_bits, self.group_size),
            key_flush=Flush(every=self.residual_length),
            value_flush=Flush(keep=self.residual_length),
        )
