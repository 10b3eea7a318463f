"""ZipCache (arXiv 2405.14256): tokens that queries attend to get more bits than the others.

Axes: B batch, H KV heads, n entries of a block, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import param
import torch
from torch import Tensor

from workbench.cache.coded import PairCodec
from workbench.cache.positions import Choice, Chosen
from workbench.cache.received import received_by
from workbench.cache.schemes.spans import AcrossHeads, ChannelsOfRun, channel_sizes
from workbench.cache.segments import DenseSegment, UniformSegment, take
from workbench.cache.tiers import TieredSegment
from workbench.strategies.quantization.base import Quantization
from workbench.strategies.quantization.observed import note_received, scores_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.cache.layer import LayerView
    from workbench.models.geometry import Geometry


class ZipCache(Quantization):
    """Of the prompt, and of every `residual_length` generated tokens, the `unimportant` share that scores lowest is held in
    `low_bits`, the rest in `bits`. Keys have one scale a channel for all tokens of a precision; values are divided by the
    root of their channel's largest magnitude, and then have one scale a token for all heads.

    Score = attention from probe queries, half of them the newest, half drawn at random, summed over the group and divided by
    the number of probes that can see the token (`divisor="all"`: of all queries that can, as the authors' code has it).
    Generated tokens are scored by the newest query. Blocks stay as they are, where the authors' code quantizes everything
    anew each time.
    """

    key = "zipcache"
    title = "ZipCache"
    paper = "arXiv 2405.14256"
    summary = "Gives tokens that queries attend to 4 bits, the others 2."

    bits: Any = param.Selector(default=4, objects=[2, 4, 8], doc="bits per number of important tokens")
    low_bits: Any = param.Selector(default=2, objects=[2, 4, 8], doc="bits per number of the others")
    unimportant = param.Number(0.4, bounds=(0.0, 1.0), doc="share of the tokens held in fewer bits")
    probes = param.Number(0.1, bounds=(0.0, 1.0), doc="share of the prompt's queries that vote")
    divisor: Any = param.Selector(
        default="probes",
        objects=["probes", "all"],
        doc="a token's score is divided by: probes that see it, or all queries",
    )
    residual_length = param.Integer(
        100, bounds=(1, 4096), doc="generated tokens in full precision until they are a block"
    )
    seed = param.Integer(0, bounds=(0, 2**31 - 1), doc="of the probes drawn at random")

    @property
    def needs_prompt(self) -> bool:
        return True

    def check(self, geometry: Geometry) -> None:
        self.need_whole_words(min(self.bits, self.low_bits), geometry)

    def on_chunk(self, view: LayerView) -> None:
        asked = view.asked()
        probes = probe_positions(view.prompt_length, self.probes, self.seed).to(asked.device)
        rows = torch.searchsorted(asked, probes).clamp(max=len(asked) - 1)
        rows = rows[asked[rows] == probes]
        note_received(view, rows)
        view.state["voted"] = torch.cat([view.state.get("voted", rows[:0]), asked[rows]])

    def after_prefill(self, view: LayerView) -> None:
        received = view.state.pop("received")
        voted = view.state.pop("voted")
        asked = voted if self.divisor == "probes" else torch.arange(view.prompt_length, device=voted.device)
        saliency = normalised(received, asked, view.window)
        view.note_saliency(saliency)
        view.recode(self.codec(view, saliency))

    def codec(self, view: LayerView | None = None, scores: Tensor | None = None) -> MixedCodec:
        return MixedCodec(self.bits, self.low_bits, self.unimportant, scores)

    def after_prompt(self, views: Sequence[LayerView]) -> None:
        for view in views:
            view.go_on_with(self.codec(view))  # the scores are done with

    def after_step(self, view: LayerView) -> None:
        for segment, query in view.pieces():
            if isinstance(segment, TieredSegment) and segment.tiers[-1].length >= self.residual_length:
                scores = received_by(segment, segment.tiers[-1], query.last(1))
                for block in scores.split(self.residual_length, -1):
                    if block.shape[-1] == self.residual_length:
                        self._code_oldest(segment, block)

    def _code_oldest(self, segment: TieredSegment, scores: Tensor) -> None:
        """The oldest generated tokens, as many as there are ``scores`` [B, H, n], become a block."""
        recent, count = segment.tiers[-1], scores.shape[-1]
        assert isinstance(recent, DenseSegment)
        at = recent.positions()[:, :, :count]
        base = at.expand(segment.batch, segment.heads, -1) if recent.at is not None else None
        k, v = recent.keys()[:, :, :count], recent.values()[:, :, :count]
        segment.tiers[-1:] = [*mixed_block(k, v, base, int(at[0, 0, 0]), scores, self.codec()), recent.after(count)]


@dataclass(frozen=True)
class MixedCodec:
    """Two precisions by scores.

    Args:
        scores: [B, H, T] by position; without them, the newest entries count most.
    """

    bits: int
    low_bits: int
    unimportant: float
    scores: Tensor | None = None

    def encode(self, k: Tensor, v: Tensor, positions: Tensor | None, start: int) -> TieredSegment:
        at = positions
        if at is None:
            at = torch.arange(start, start + k.shape[2], dtype=torch.int32, device=k.device)
            at = at.expand(*k.shape[:2], -1)
        tiers = mixed_block(k, v, positions, start, scores_at(self.scores, at), self)
        return TieredSegment([*tiers, DenseSegment(k.shape[0], k.shape[1])])

    def row(self, b: int, h: int) -> MixedCodec:
        return self if self.scores is None else replace(self, scores=self.scores[b : b + 1, h : h + 1])


def mixed_block(
    k: Tensor, v: Tensor, positions: Tensor | None, start: int, scores: Tensor, codec: MixedCodec
) -> list[UniformSegment]:
    """The tiers of one block k, v [B, H, n, D] with ``scores`` [B, H, n]."""
    n = k.shape[2]
    low = int(codec.unimportant * n + 1e-9)
    order = scores.argsort(dim=-1, stable=True)  # the lowest first, of ties the older
    important = torch.ones_like(scores, dtype=torch.bool).scatter(2, order[..., :low], False)
    channel = channel_sizes(v) if n else None
    choice = Choice(important, start if positions is None else positions)
    tiers: list[UniformSegment] = []
    for chosen, bits in ((True, codec.bits), (False, codec.low_bits)):
        count = n - low if chosen else low
        if not count and (n or not chosen):
            continue
        pair = PairCodec(ChannelsOfRun(bits), AcrossHeads(bits, channel))
        if count == n:  # one precision: entries stand as they came
            return [pair.encode(k, v, positions, start)]
        places = order[..., low:] if chosen else order[..., :low]
        index = places.sort(-1).values
        tier = pair.encode(take(k, index), take(v, index), None, start)
        tier.at = Chosen(choice, chosen)
        tiers.append(tier)
    return tiers


def probe_positions(length: int, share: float, seed: int) -> Tensor:
    """Queries that vote: the newest half, and as many drawn (with repetition) from the rest; all, of a short prompt."""
    recent = int(length - share / 2 * length + 1e-9)
    drawn = int(share / 2 * length + 1e-9)
    if length < 20 or share >= 1:
        return torch.arange(length)
    older = torch.randint(0, recent, (drawn,), generator=torch.Generator().manual_seed(seed))
    return torch.cat([older, torch.arange(recent, length)])


def normalised(received: Tensor, asked: Tensor, window: int | None = None) -> Tensor:
    """``received`` [B, H, T] by position, over how many of the queries ``asked`` [P] see each position."""
    at = torch.arange(received.shape[-1], device=asked.device)[:, None]
    sees = asked >= at
    if window is not None:
        sees &= asked - window < at
    return received / sees.sum(-1).clamp_min(1).to(received.device)
