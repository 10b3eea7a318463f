"""MiKV (arXiv 2402.18096): what H2O would evict stays, at few bits.

Axes: B batch, H KV heads, n entries, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import param
import torch
from torch import Tensor

from workbench.cache.coded import CodedSegment, PairCodec
from workbench.cache.received import received_by
from workbench.cache.schemes.rtn import Balanced, PerToken
from workbench.cache.segments import DenseSegment, Query, UniformSegment, take
from workbench.cache.tiers import TieredSegment
from workbench.errors import RecipeError
from workbench.strategies.eviction.base import protect_last, select_top
from workbench.strategies.quantization.base import Quantization
from workbench.strategies.quantization.observed import note_received, scores_at

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView
    from workbench.models.geometry import Geometry

LEAST = 1e-4  # of a balancer, and one over it the most


class MiKV(Quantization):
    """The `importance` share of the tokens, by accumulated attention and recency as in H2O, is held in `high_bits`; all
    others in `bits`, per token in groups of half a head. A token that falls out of the important ones is quantized once and
    stays so.

    The balancer multiplies each channel of quantized keys by sqrt(max|q| / max|k|) of the prompt, which evens out channels
    that are large in keys, or matter much to queries.
    """

    key = "mikv"
    title = "MiKV"
    paper = "arXiv 2402.18096"
    summary = "Holds what H2O would evict at few bits, and the rest in full precision."

    bits: Any = param.Selector(default=2, objects=[2, 4, 8], doc="bits per number of unimportant tokens")
    high_bits: Any = param.Selector(default=16, objects=[4, 8, 16], doc="bits of important tokens; 16: as they are")
    importance = param.Number(0.2, bounds=(0.0, 1.0), doc="share of the tokens that are important")
    recent = param.Number(0.5, bounds=(0.0, 1.0), doc="share of these that are simply the newest")
    balancer = param.Boolean(True, doc="even out the channels of quantized keys")

    @property
    def exact(self) -> bool:
        return self.importance == 1.0 and self.high_bits == 16

    @property
    def needs_prompt(self) -> bool:
        return not self.exact

    def check(self, geometry: Geometry) -> None:
        if geometry.head_dim % 2:
            raise RecipeError(f"mikv: head_dim {geometry.head_dim} of this model cannot be halved; use kivi, or full.")
        self.need_whole_words(self.bits, geometry)
        self.need_whole_words(self.high_bits, geometry)

    def on_chunk(self, view: LayerView) -> None:
        if self.exact:
            return
        note_received(view)
        if self.balancer:
            q = view.chunk.abs().amax(2).unflatten(1, (view.kv_heads, -1)).amax(2)  # [B, H, D]
            k = view.keys()[:, :, -view.chunk.shape[2] :].abs().amax(2)
            for name, largest in (("q", q.float()), ("k", k.float())):
                view.state[name] = torch.maximum(view.state.get(name, largest), largest)

    def after_prefill(self, view: LayerView) -> None:
        if not self.exact:
            view.note_saliency(view.state["received"])
            view.recode(self.codec(view))
            view.state.clear()

    def codec(self, view: LayerView) -> ImportanceCodec:
        balancer = balancer_of(view.state["q"], view.state["k"]) if self.balancer else None
        return ImportanceCodec(self, balancer, view.state["received"])

    def after_prompt(self, views: Sequence[LayerView]) -> None:
        for view in views:
            if isinstance(held := view.codec, ImportanceCodec):
                view.go_on_with(replace(held, scores=None))  # they are done with

    def after_step(self, view: LayerView) -> None:
        for segment, query in view.pieces():
            if isinstance(segment, ImportanceSegment):
                segment.weigh(query)
                segment.demote()


def balancer_of(q: Tensor, k: Tensor) -> Tensor:
    """sqrt(max|q| / max|k|) by channel, float32; 1 where either is zero. q, k: largest magnitudes [B, H, D]."""
    found = (q / k).sqrt().clamp(LEAST, 1 / LEAST)
    return torch.where((q > 0) & (k > 0), found, 1.0)


@dataclass(frozen=True)
class ImportanceCodec:
    """High and low precision by scores.

    Args:
        balancer: [B, H, D] or None; scores: [B, H, T] by position, without which the newest count most.
    """

    method: MiKV
    balancer: Tensor | None
    scores: Tensor | None = None

    def encode(self, k: Tensor, v: Tensor, positions: Tensor | None, start: int) -> ImportanceSegment:
        batch, heads, n, dim = k.shape
        at = positions
        if at is None:
            at = (
                torch.arange(start, start + n, dtype=torch.int32, device=k.device).expand(batch, heads, -1).contiguous()
            )
        scores, method = scores_at(self.scores, at), self.method
        high, low = split(scores, method)
        values = PerToken(method.bits, dim // 2)
        keys = values if self.balancer is None else Balanced(method.bits, dim // 2, self.balancer)
        few = PairCodec(keys, values).encode(take(k, low), take(v, low), at.gather(2, low), start)
        many: UniformSegment
        if method.high_bits == 16:
            many = DenseSegment.of(take(k, high), take(v, high), at.gather(2, high))
        else:
            scheme = PerToken(method.high_bits, dim // 2)
            many = PairCodec(scheme, scheme).encode(take(k, high), take(v, high), at.gather(2, high), start)
        return ImportanceSegment(method, few, many, scores.gather(2, high))

    def row(self, b: int, h: int) -> ImportanceCodec:
        balancer, scores = (None if x is None else x[b : b + 1, h : h + 1] for x in (self.balancer, self.scores))
        return ImportanceCodec(self.method, balancer, scores)


def split(scores: Tensor, method: MiKV, total: int | None = None) -> tuple[Tensor, Tensor]:
    """Which of the entries with ``scores`` [B, H, n] are important, and which not: numbers in ascending order.

    Args:
        total: entries held in all, of which ``importance`` is a share; n if not given.
    """
    n = scores.shape[-1]
    count = int(method.importance * (n if total is None else total) + 1e-9)
    high = select_top(protect_last(scores, int(method.recent * count)), count)
    chosen = torch.zeros_like(scores, dtype=torch.uint8).scatter(2, high, 1)
    return high, chosen.argsort(dim=-1, stable=True)[..., : n - count]


class ImportanceSegment(TieredSegment):
    """Entries in two precisions; the important ones carry the attention they received, float32 [B, H, n]."""

    def __init__(self, method: MiKV, few: CodedSegment, many: UniformSegment, scores: Tensor) -> None:
        super().__init__([few, many])
        self.method, self.scores = method, scores

    @property
    def few(self) -> CodedSegment:
        tier = self.tiers[0]
        assert isinstance(tier, CodedSegment)
        return tier

    def weigh(self, query: Query) -> None:
        """Add what the important entries received from the queries; the queries' own entries are new ones."""
        received = received_by(self, self.tiers[1], query)
        received[..., : self.scores.shape[-1]] += self.scores
        self.scores = received

    def demote(self) -> None:
        """Quantize what is no longer important."""
        many = self.tiers[1]
        many.settle()
        high, low = split(self.scores, self.method, self.length)
        if low.shape[-1] == 0:
            return
        k, v, at = many.keys(), many.values(), many.positions()
        self.few.join(take(k, low), take(v, low), at.gather(2, low))
        if isinstance(many, CodedSegment):
            self.tiers[1] = many.take(high)
        else:
            self.tiers[1] = DenseSegment.of(take(k, high), take(v, high), at.gather(2, high))
        self.scores = self.scores.gather(2, high)

    def drop_before(self, position: int) -> None:
        super().drop_before(position)
        self.scores = self.scores[..., self.scores.shape[-1] - self.tiers[1].length :]

    def nbytes(self) -> dict[str, int]:
        return {**super().nbytes(), "scores": self.scores.numel() * self.scores.element_size()}

    def clone(self) -> ImportanceSegment:
        few, many = (tier.clone() for tier in self.tiers)
        assert isinstance(few, CodedSegment) and isinstance(many, UniformSegment)
        return ImportanceSegment(self.method, few, many, self.scores)
