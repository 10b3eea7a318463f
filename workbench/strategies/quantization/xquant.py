"""XQuant and XQuant-CL (arXiv 2508.10395): a layer's input is held in few bits; keys and values are rebuilt from it.

No code of the authors is known; this follows the paper. Axes: B batch, n tokens, d hidden_size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import param
import torch
from torch import Tensor

from workbench.cache.inputs import DeltaSegment, Form, InputSegment, JointLatent, LatentPair, RunningSum, WholeInput
from workbench.cache.schemes.base import Scheme, Verbatim
from workbench.cache.schemes.rtn import PerChannel, PerToken
from workbench.cache.segments import take
from workbench.errors import RecipeError
from workbench.strategies.quantization.base import BITS, GROUPS, Quantization

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView
    from workbench.models.geometry import Geometry


class InputCodec:
    """Takes over a layer after the prompt: its entries become rows of the layer's input, which was noted chunk by chunk.

    Args:
        noted: the rows of each chunk [B, 1, T, w]; taken out of it when they are encoded.
        seen: tokens of the prompt, so that the last row is that of position ``seen - 1``.
        empty: the segment that takes them.
    """

    def __init__(self, noted: dict[str, Tensor], seen: int, empty: InputSegment) -> None:
        self.noted, self.seen, self.empty = noted, seen, empty

    def encode(self, k: Tensor, v: Tensor, positions: Tensor | None, start: int) -> InputSegment:
        """Hold the inputs that k and v [B, H, n, D] were made of."""
        if not self.noted:
            raise RecipeError("Keys and values that are rebuilt cannot be evicted; put the eviction before xquant.")
        rows = torch.cat(list(self.noted.values()), 2)
        self.noted.clear()
        first = self.seen - rows.shape[2]
        at = None
        if positions is None:
            rows = rows[:, :, start - first : start - first + k.shape[2]]
        else:
            at = positions[:, :1]
            if not bool((positions == at).all()):
                raise RecipeError(
                    "The heads of a layer kept different tokens, which cannot share one row a token; use a larger budget, "
                    "or kivi instead of xquant."
                )
            rows = take(rows, at.long() - first)
        self.empty.start = start
        self.empty.load(rows, at)
        return self.empty

    def row(self, b: int, h: int) -> InputCodec:
        raise RecipeError("Heads of different lengths cannot share one row a token; use kivi instead of xquant.")


class InputQuantization(Quantization):
    """Base of both. Codes are made `residual_length` tokens at a time, in groups of at most `group_size`."""

    paper = "arXiv 2508.10395"
    closing = True

    bits: Any = param.Selector(default=4, objects=BITS, doc="bits per number; 16: as the model gives them")
    group_size: Any = param.Selector(
        default=128, objects=GROUPS, doc="numbers that share a scale; a whole row where that is shorter"
    )
    residual_length = param.Integer(
        128, bounds=(1, 4096), doc="tokens that are quantized together when so many are new"
    )

    @property
    def needs_prompt(self) -> bool:
        return True

    @property
    def needs_inputs(self) -> bool:
        return True

    def form(self, view: LayerView) -> Form:
        """What is held of the layer's input."""
        raise NotImplementedError

    def segment(self, view: LayerView) -> InputSegment:
        """An empty segment for the layer."""
        return InputSegment(view.batch, view.kv_heads, self.form(view), self.residual_length)

    def on_chunk(self, view: LayerView) -> None:
        view.state[f"{view.seen:09}"] = self.form(view).rows(view.inputs()).clone()
        oldest = int(view.positions()[0, 0, 0]) if view.length else view.seen
        for last in [name for name in view.state if int(name) <= oldest]:  # a sliding window has passed these
            del view.state[last]

    def codec(self, view: LayerView) -> InputCodec:
        return InputCodec(view.state, max(map(int, view.state)), self.segment(view))

    def per_token(self, bits: int, width: int) -> Scheme:
        """Rows of ``width`` numbers in groups of channels."""
        return Verbatim("inputs") if bits == 16 else PerToken(bits, min(self.group_size, width))

    def need_fit(self, width: int, bits: int, what: str) -> None:
        """RecipeError where rows of ``width`` numbers do not fill whole groups and whole words."""
        if bits == 16:
            return
        self.need_divisor("group_size", min(self.group_size, width), width, what)
        if width * bits % 32:
            raise RecipeError(
                f"{self.key}: {what} {width} times {bits} bits is no multiple of 32, so codes cannot be packed; use more "
                "bits, or full."
            )


class XQuant(InputQuantization):
    """Holds the input of every attention layer (after its norm) per token, or where heads share keys and values
    (`hold="auto"`) its two latents along the left singular vectors of the projections: the keys' per channel in groups of
    `group_size` tokens, the values' per token. Keys and values are rebuilt a block at a time when a token attends."""

    key = "xquant"
    title = "XQuant"
    summary = "Holds each layer's input in few bits instead of keys and values, and rebuilds these when they are read."

    hold: Any = param.Selector(
        default="auto",
        objects=["auto", "input", "latent"],
        doc="the input itself, its latents for keys and values, or whichever are fewer numbers",
    )

    def __init__(self, **values: object) -> None:
        super().__init__(**values)
        if self.bits != 16 and self.residual_length % self.group_size:
            raise RecipeError(
                f"xquant: residual_length must be a multiple of group_size ({self.group_size}), got {self.residual_length}."
            )

    @property
    def wants_alike(self) -> str:
        return "heads"

    def latent(self, geometry: Geometry) -> bool:
        """Whether latents are held: two of the width of the keys instead of the input."""
        fewer = 2 * geometry.num_kv_heads * geometry.head_dim <= geometry.hidden_size
        return self.hold == "latent" or (self.hold == "auto" and fewer)

    def check(self, geometry: Geometry) -> None:
        geometry.rebuilds.require(self.key)
        if self.latent(geometry):
            width = min(geometry.num_kv_heads * geometry.head_dim, geometry.hidden_size)
            self.need_fit(width, self.bits, "a latent's width")
        else:
            self.need_fit(geometry.hidden_size, self.bits, "hidden_size")

    def form(self, view: LayerView) -> Form:
        rebuild, geometry, bits = view.rebuild, view.geometry, self.bits
        if not self.latent(geometry):
            return WholeInput(rebuild, [self.per_token(bits, geometry.hidden_size)])
        keys = Verbatim("inputs") if bits == 16 else PerChannel(bits, self.group_size)
        return LatentPair(rebuild, [keys, self.per_token(bits, len(rebuild.value_latents.down))])


class XQuantCL(InputQuantization):
    """Up to `base_layer` every layer holds its own input in `base_bits`; each later one what its input differs by from
    that which the layer below gives back, in `bits`, along the left singular vectors of its projections where these are
    fewer numbers. What a layer attends to is the sum over the layers from the base up, made a block at a time; without an
    `accumulator` a step takes time with the square of the number of layers."""

    key = "xquant_cl"
    title = "XQuant-CL"
    summary = "Holds what each layer's input differs by from the layer below, in few bits; rebuilds keys and values."

    bits: Any = param.Selector(default=2, objects=BITS, doc="bits per number of the differences; 16: as they are")
    base_bits: Any = param.Selector(default=4, objects=BITS, doc="bits per number up to the base layer")
    base_layer = param.Integer(2, bounds=(0, 512), doc="the layer, counted from 0, whose input the later ones refer to")
    accumulator = param.Boolean(
        False, doc="hold the running sum between layers, hidden_size numbers a token once, instead of adding up anew"
    )
    residual_length = param.Integer(32, bounds=(1, 4096), doc="tokens that are quantized together when so many are new")

    @property
    def wants_alike(self) -> str:
        return "layers"

    def latent(self, geometry: Geometry) -> bool:
        """Whether differences are coded along the projections' singular vectors."""
        return 2 * geometry.num_kv_heads * geometry.head_dim < geometry.hidden_size

    def check(self, geometry: Geometry) -> None:
        geometry.rebuilds.require(self.key)
        if any(geometry.sliding_windows):
            raise RecipeError(
                "xquant_cl adds up what all layers hold of a token, and this model's sliding-window layers forget theirs; "
                "use xquant."
            )
        if self.base_layer + 1 >= geometry.num_layers:
            raise RecipeError(
                f"xquant_cl: no layer lies above base_layer {self.base_layer} in this model of {geometry.num_layers} layers; "
                + ("use a smaller one, or xquant." if geometry.num_layers > 1 else "use xquant.")
            )
        self.need_fit(geometry.hidden_size, self.base_bits, "hidden_size")
        width = 2 * geometry.num_kv_heads * geometry.head_dim
        self.need_fit(width if self.latent(geometry) else geometry.hidden_size, self.bits, "a difference's width")

    def form(self, view: LayerView) -> Form:
        hidden_size = view.geometry.hidden_size
        if view.layer <= self.base_layer:
            return WholeInput(view.rebuild, [self.per_token(self.base_bits, hidden_size)])
        if self.latent(view.geometry):
            return JointLatent(view.rebuild, [self.per_token(self.bits, len(view.rebuild.joint))])
        return WholeInput(view.rebuild, [self.per_token(self.bits, hidden_size)])

    def segment(self, view: LayerView) -> InputSegment:
        if view.layer <= self.base_layer:
            segment = super().segment(view)
            segment.running = RunningSum() if self.accumulator and view.layer == self.base_layer else None
            return segment
        below = view.below
        assert isinstance(below, InputSegment)
        return DeltaSegment(view.batch, view.kv_heads, self.form(view), self.residual_length, below)
