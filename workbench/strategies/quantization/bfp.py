"""BFP with sorted channels (arXiv 2403.20137): keys as integers that share an exponent with channels of like size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import param

from workbench.cache.coded import PairCodec
from workbench.cache.schemes.base import Verbatim
from workbench.cache.schemes.blockfloat import BlockFloat, smallest_index
from workbench.strategies.quantization.base import GROUPS, Quantization

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView
    from workbench.models.geometry import Geometry


class BFP(Quantization):
    """Keys are held as mantissas of `bits` bits, `group_size` channels of one token sharing a power of two. With `sort`,
    each head's channels are put in blocks by the norm of their rows in the model's key projection, the largest first, so
    that an outlier channel does not silence small ones. Values stay as they are.

    Channels are sorted when a key is stored and put back when it is read, after RoPE: the logits are those of sorting the
    weights of keys and queries.
    """

    key = "bfp"
    title = "Block floating point"
    paper = "arXiv 2403.20137"
    summary = "Holds keys as 4-bit integers whose blocks share an exponent, channels sorted by size."

    bits: Any = param.Selector(
        default=4, objects=[4, 8, 16], doc="bits of a mantissa with its sign; 16: keys as they are"
    )
    group_size: Any = param.Selector(default=32, objects=GROUPS, doc="channels that share an exponent")
    sort = param.Boolean(True, doc="cut channels into blocks by the norms of the key projection's rows")

    @property
    def exact(self) -> bool:
        return self.bits == 16

    def check(self, geometry: Geometry) -> None:
        if not self.exact:
            self.need_divisor("group_size", self.group_size, geometry.head_dim)

    def codec(self, view: LayerView) -> PairCodec:
        order = None
        if self.sort and self.group_size < view.head_dim:  # one block holds all, in whatever order
            norms = view.key_weight().float().norm(dim=-1)  # [H, D]
            order = smallest_index(norms.argsort(dim=-1, descending=True, stable=True))[None]
        return PairCodec(BlockFloat(self.bits, self.group_size, order), Verbatim("values"))
