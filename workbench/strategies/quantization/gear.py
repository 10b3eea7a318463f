"""GEAR (arXiv 2403.05527): few bits, and what they miss as a low-rank product and a few numbers in full."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import param

from workbench.cache.coded import PairCodec
from workbench.cache.schemes.base import Scheme
from workbench.cache.schemes.recovered import Recovered
from workbench.cache.schemes.rtn import PerChannel, PerToken
from workbench.cache.schemes.spans import AcrossHeads, ChannelsOfRun
from workbench.cache.sides import Flush
from workbench.errors import RecipeError
from workbench.strategies.quantization.base import GROUPS, Quantization

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView
    from workbench.models.geometry import Geometry


class GEAR(Quantization):
    """The prompt is one block, and every `residual_length` generated tokens are another. A block is held as codes
    (`backbone="kivi"`: in groups, keys per channel and values per token; `"kcvt"`: one scale a channel of the block for
    keys, one a token over all heads for values), as the `outliers` share of extreme numbers in float16, and as a product of
    rank `rank` (`later_rank` for generated blocks) per head for what is then still missing. `outliers=0.0` is GEAR-L.

    The number of a key channel's outliers is counted along tokens, where the authors' simulation takes the width instead.
    """

    key = "gear"
    title = "GEAR"
    paper = "arXiv 2403.05527"
    summary = "Holds few bits, and recovers their error by a low-rank product and a few numbers in full."

    bits: Any = param.Selector(default=2, objects=[2, 4, 8], doc="bits per number of the backbone")
    backbone: Any = param.Selector(default="kivi", objects=["kivi", "kcvt"], doc="what the codes' scales span")
    group_size: Any = param.Selector(default=32, objects=GROUPS, doc="numbers that share a scale (kivi backbone)")
    outliers = param.Number(0.02, bounds=(0.0, 0.5), doc="share of the numbers held apart, in float16")
    rank = param.Integer(4, bounds=(0, 64), doc="rank of the correction of the prompt, per head")
    later_rank = param.Integer(2, bounds=(0, 64), doc="rank of the correction of a block of generated tokens")
    iterations = param.Integer(3, bounds=(1, 50), doc="rounds of power iteration for the correction")
    residual_length = param.Integer(
        64, bounds=(16, 4096), doc="tokens in full precision until so many are a block (a multiple of group_size)"
    )

    def __init__(self, **values: object) -> None:
        super().__init__(**values)
        if self.backbone == "kivi" and self.residual_length % self.group_size:
            raise RecipeError(
                f"gear: residual_length must be a multiple of group_size ({self.group_size}), got "
                f"{self.residual_length}."
            )

    def check(self, geometry: Geometry) -> None:
        if self.backbone == "kivi":
            self.need_divisor("group_size", self.group_size, geometry.head_dim)
        else:
            self.need_whole_words(self.bits, geometry)

    def codec(self, view: LayerView | None = None) -> PairCodec:
        grouped = self.backbone == "kivi"
        keys: Scheme = PerChannel(self.bits, self.group_size) if grouped else ChannelsOfRun(self.bits)
        values: Scheme = PerToken(self.bits, self.group_size) if grouped else AcrossHeads(self.bits)
        flush = Flush(every=self.residual_length)
        return PairCodec(
            keys=self._recovered(keys, self.later_rank, per_channel=True),
            values=self._recovered(values, self.later_rank, per_channel=False),
            key_flush=flush,
            value_flush=flush,
            first_keys=self._recovered(keys, self.rank, per_channel=True),
            first_values=self._recovered(values, self.rank, per_channel=False),
            first_flush=Flush(every=self.group_size if grouped else 1),
        )

    def _recovered(self, scheme: Scheme, rank: int, per_channel: bool) -> Scheme:
        if not rank and not self.outliers:
            return scheme
        return Recovered(scheme, self.outliers, rank, self.iterations, per_channel)
