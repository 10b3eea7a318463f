"""RotateKV (arXiv 2501.16383): heads rotated together before RoPE, channels reordered, attention sinks left as they are.

Axes: B batch, H KV heads, n entries, D head_dim, C = H * D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import param
import torch
from torch import Tensor

from workbench.cache.coded import PairCodec
from workbench.cache.positions import Gaps
from workbench.cache.schemes.rotated import Rotated, rotated_together
from workbench.cache.segments import DenseSegment, UniformSegment, take
from workbench.cache.tiers import TieredSegment
from workbench.models.artifacts import Kind
from workbench.strategies.quantization.base import GROUPS, Quantization

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView
    from workbench.models.geometry import Geometry

SPANS = [1, 2, 4, 8]
CALIBRATION = Kind(
    method="rotatekv",
    what="channel order",
    suffix=".json",
    command="kvw calibrate rotatekv {model}",
    instead='rotatekv(reorder="none")',
    # Mean and mean magnitude of the rotated keys by channel, for each number of heads rotated together.
    shapes=lambda g: {
        statistic: (len(SPANS), g.num_layers, g.num_kv_heads * g.head_dim) for statistic in ("signed", "magnitude")
    },
)


class RotateKV(Quantization):
    """Keys are turned back to before RoPE; the channels of `heads` heads together go through a Hadamard matrix, those of all
    heads are put in an order that was calibrated, and each token is rounded in groups of `group_size` of them. Values go
    through a Hadamard matrix head by head. Tokens that hold the `pivots` largest numbers of the layer's input hidden states
    (attention sinks) stay in full precision.

    Ascending order of the rotated keys' mean (`reorder="signed"`), as the authors' code has it, or of their mean magnitude.
    The prompt's own attention is exact here, where the authors quantize before it. Heads that hold different tokens are
    rotated each by itself.
    """

    key = "rotatekv"
    title = "RotateKV"
    paper = "arXiv 2501.16383"
    summary = "Spreads outlier channels by a rotation before it rounds per token; needs a calibration."
    artifact_kind = CALIBRATION

    bits: Any = param.Selector(default=2, objects=[2, 4, 8], doc="bits per number")
    group_size: Any = param.Selector(
        default=32,
        objects=GROUPS,
        doc="channels that share a scale (the paper's models: 128; at most all of a token's)",
    )
    heads: Any = param.Selector(
        default=4, objects=SPANS, doc="heads rotated together (fewer, where these do not divide)"
    )
    clip: Any = param.Selector(
        default=None, objects=[None, 0.7, 0.8, 0.9, 1.0], doc="what extremes are cut to; if open, 0.8 at 2 bits, else 1"
    )
    reorder: Any = param.Selector(
        default="signed", objects=["signed", "magnitude", "none"], doc="what channels are ordered by"
    )
    pivots = param.Integer(20, bounds=(0, 1000), doc="largest hidden numbers whose tokens stay as they are")
    artifact = param.String("", doc="calibration file; empty: the one that belongs to the model", precedence=9)

    @property
    def artifacts(self) -> dict[Kind, str]:
        return {} if self.reorder == "none" else super().artifacts

    @property
    def needs_prompt(self) -> bool:
        return self.needs_hidden

    @property
    def needs_hidden(self) -> bool:
        return self.pivots > 0

    def check(self, geometry: Geometry) -> None:
        geometry.ropes.require("rotatekv")
        self.need_whole_words(self.bits, geometry)
        width = geometry.num_kv_heads * geometry.head_dim
        self.need_divisor("group_size", min(self.group_size, width), width, "the KV width")

    def on_chunk(self, view: LayerView) -> None:
        if self.pivots:
            note_pivots(view, self.pivots)

    def after_prefill(self, view: LayerView) -> None:
        super().after_prefill(view)
        view.state.clear()

    def codec(self, view: LayerView) -> RotatedCodec:
        heads, clip = view.kv_heads, self.clip or (0.8 if self.bits == 2 else 1.0)
        span = divisor(heads, self.heads)
        order = None
        if self.reorder != "none":
            statistic = view.artifact(self).tensors[self.reorder][SPANS.index(span), view.layer]  # [C]
            order = statistic.argsort(stable=True).to(torch.int16).to(view.chunk.device)
        keys = Rotated(heads, self.bits, self.group_size, clip, span, order, view.rope)
        values = Rotated(heads, self.bits, self.group_size, clip, 1)
        return RotatedCodec(PairCodec(keys, values), sinks_of(view.state["tokens"]) if self.pivots else None)


def divisor(heads: int, wanted: int) -> int:
    """The largest number of heads up to ``wanted``, of those calibrated, that divides them all."""
    return max(span for span in SPANS if span <= wanted and heads % span == 0)


def note_pivots(view: LayerView, count: int) -> None:
    """Keep the ``count`` largest magnitudes of the hidden states read so far, and whose tokens they are: state [B, count]."""
    hidden = view.hidden().abs()
    largest, flat = hidden.flatten(1).topk(min(count, hidden[0].numel()))
    tokens = view.asked()[flat // hidden.shape[2]]
    if "tokens" in view.state:
        largest, tokens = (
            torch.cat([view.state["largest"], largest], 1),
            torch.cat([view.state["tokens"], tokens], 1),
        )
        largest, chosen = largest.topk(min(count, largest.shape[1]))
        tokens = tokens.gather(1, chosen)
    view.state["largest"], view.state["tokens"] = largest, tokens


def sinks_of(tokens: Tensor) -> Tensor:
    """Distinct tokens [B, m] of [B, count], ascending; sequences that have fewer also take their first tokens."""
    distinct = [row.unique().tolist() for row in tokens]
    most = max(map(len, distinct))
    for row in distinct:
        row += [t for t in range(2 * most) if t not in row][: most - len(row)]
    return torch.tensor([sorted(row) for row in distinct], dtype=torch.int32, device=tokens.device)


@dataclass(frozen=True)
class RotatedCodec:
    """Sinks as they are, the rest rotated.

    Args:
        sinks: positions int32 [B, m], or None.
    """

    pair: PairCodec
    sinks: Tensor | None = None

    def encode(self, k: Tensor, v: Tensor, positions: Tensor | None, start: int) -> UniformSegment:
        batch, heads, n, _ = k.shape
        if self.sinks is None or n == 0:
            return self.pair.encode(k, v, positions, start)
        at = positions
        if at is None:
            at = torch.arange(start, start + n, dtype=torch.int32, device=k.device).expand(batch, heads, -1)
        sink = (at[..., None] == self.sinks[:, None, None]).any(-1)  # [B, H, n]
        count = int(sink.sum(-1).max())  # rows that hold fewer of them leave their oldest tokens as they are, too
        order = sink.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
        chosen, others = order[..., :count].sort(-1).values, order[..., count:].sort(-1).values
        rest = self.pair.encode(take(k, others), take(v, others), at.gather(2, others), start)
        places = at.gather(2, chosen)
        if positions is None and bool((chosen == chosen[:, :1]).all()):
            rest.start, rest.at = start, Gaps(start, n - count, places[:, 0], heads)
        if not count:
            return rest
        return TieredSegment([DenseSegment.of(take(k, chosen), take(v, chosen), places), rest])

    def row(self, b: int, h: int) -> RotatedCodec:
        sinks = None if self.sinks is None else self.sinks[b : b + 1]
        return replace(self, pair=self.pair.row(b, h), sinks=sinks)


def statistics(keys: Tensor, spans: Sequence[int] = SPANS) -> dict[str, Tensor]:
    """Sums over entries of keys before RoPE [B, H, n, D], rotated: signed and by magnitude, float64 [spans, C].

    A span that does not divide the heads takes the place of the largest below it that does.
    """
    turned = [rotated_together(keys.float(), divisor(keys.shape[1], span)).double() for span in spans]
    return {
        "signed": torch.stack([t.sum((0, 1)) for t in turned]),
        "magnitude": torch.stack([t.abs().sum((0, 1)) for t in turned]),
    }
