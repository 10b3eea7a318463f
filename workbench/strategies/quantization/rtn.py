"""Round to nearest: the plain baselines, integers or fp8, with a scale per token or per channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import param

from workbench.cache.coded import PairCodec
from workbench.cache.schemes.base import Scheme
from workbench.cache.schemes.rtn import Float8, PerChannel, PerToken
from workbench.cache.sides import Flush
from workbench.strategies.quantization.base import GROUPS, Quantization

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView
    from workbench.models.geometry import Geometry


class RTN(Quantization):
    """Keys and values in groups of `group_size` channels of one token (`axis="token"`) or `group_size` tokens of one channel
    (`axis="channel"`). Integers have a scale and a minimum a group, fp8 (e4m3) numbers a scale. Every token is coded as soon
    as its group is full, but for the newest `residual_length`."""

    key = "rtn"
    title = "Round to nearest"
    paper = ""
    summary = "Holds keys and values in 2, 4 or 8 bits or in fp8 by plain rounding: the baseline of the other methods."

    bits: Any = param.Selector(
        default=8, objects=[2, 4, 8, "fp8", 16], doc="bits per number, fp8 for e4m3 numbers; 16: as they are"
    )
    axis: Any = param.Selector(
        default="token", objects=["token", "channel"], doc="whose numbers share a scale: one token's, or one channel's"
    )
    group_size: Any = param.Selector(default=32, objects=GROUPS, doc="numbers that share a scale")
    residual_length = param.Integer(0, bounds=(0, 4096), doc="newest tokens in full precision")

    @property
    def exact(self) -> bool:
        return self.bits == 16

    def check(self, geometry: Geometry) -> None:
        if self.axis == "token" and not self.exact:
            self.need_divisor("group_size", self.group_size, geometry.head_dim)

    def codec(self, view: LayerView | None = None) -> PairCodec:
        per_channel = self.axis == "channel"
        scheme: Scheme
        if self.bits == "fp8":
            scheme = Float8(self.group_size, per_channel)
        else:
            scheme = (PerChannel if per_channel else PerToken)(self.bits, self.group_size)
        flush = Flush(every=self.group_size if per_channel else 1, keep=self.residual_length)
        return PairCodec(scheme, scheme, flush, flush)
