"""The numbers a lane holds against the reference's: their error where it arises, and the bits each of them takes.

Axes: L layers, H KV heads, T prompt tokens, D head_dim; a map has R rows of tokens and C of channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.cache.coded import CodedSegment
from workbench.cache.inputs import InputSegment
from workbench.cache.ragged import RaggedSegment
from workbench.cache.schemes.base import Verbatim
from workbench.cache.schemes.rotated import Rotated
from workbench.cache.segments import DenseSegment, UniformSegment
from workbench.cache.sides import Side
from workbench.cache.tiers import TieredSegment

if TYPE_CHECKING:
    from workbench.cache.segments import Segment
    from workbench.cache.store import Store

MOST_ROWS, MOST_CHANNELS = 128, 64  # cells of a map
# What became of a token: dropped, held as codes, held as the model's own numbers for good, or until it is coded.
GONE, CODED, PLAIN, RESIDUAL = range(4)


@dataclass(frozen=True)
class SideNumbers:
    """Keys or values of all heads of one layer.

    Attributes:
        size: float32 [H, R, C], the largest magnitude that the reference has in a cell; NaN where it holds nothing there.
        error: float32 [H, R, C], the largest |lane - reference| of a cell over tokens that both hold; NaN where none is.
        relative: float32 [H], root mean square of the error over that of the reference's numbers, on tokens that both
            hold; 0 where these are none or all zero.
        state: uint8 [H, T]: ``GONE``, ``CODED``, ``PLAIN`` or ``RESIDUAL``.
        bits: float16 [H, T], measured bits of a number of this token, scales and all else of its run included, so equal
            within a run; NaN where the token is gone. What all runs of a layer share is left out.
        step: tokens and channels of a cell.
        rotated: where heads are rotated together before they are coded (RotateKV), size and error [1, R, C] of the numbers
            that are coded: all channels of the layer, in the order of the codes; NaN where a token is not held so.
    """

    size: Tensor
    error: Tensor
    relative: Tensor
    state: Tensor
    bits: Tensor
    step: tuple[int, int]
    rotated: tuple[Tensor, Tensor] | None
    channels: int

    @property
    def rotated_step(self) -> tuple[int, int]:
        """Tokens and channels of a cell of :attr:`rotated`."""
        return steps(self.state.shape[1], self.channels * len(self.state))

    @property
    def nbytes(self) -> int:
        maps = (self.size, self.error, *(self.rotated or ()))
        return sum(t.nbytes for t in (*maps, self.relative, self.state, self.bits))


@dataclass(frozen=True)
class LayerNumbers:
    keys: SideNumbers
    values: SideNumbers

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class HeldNumbers:
    """What a lane holds after the prompt, layer by layer.

    Attributes:
        layers: one :class:`LayerNumbers` each.
        saliency: per layer float32 [H, T], by which a method chose the precision of each token; None where none did.
    """

    def __init__(self, layers: list[LayerNumbers], saliency: list[Tensor | None]) -> None:
        self.layers, self.saliency = layers, saliency

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers) + sum(s.nbytes for s in self.saliency if s is not None)


def compare_numbers(reference: Store, lane: Store, tokens: int) -> LayerNumbers:
    """One layer of a lane against the same layer of the reference, for the first row of the batch.

    Args:
        tokens: of the prompt; entries that stand beyond are left out.
    """
    heads = lane.heads
    ours, theirs = decoded(lane, tokens), decoded(reference, tokens)  # keys and values [H, T, D], NaN where dropped
    sides = []
    for side in (0, 1):
        state = torch.zeros(heads, tokens, dtype=torch.uint8)
        bits = torch.full((heads, tokens), math.nan)
        for run in runs(lane, side):
            rows = run.positions.long()
            for head, at in zip(run.heads, rows, strict=True):
                at = at[at < tokens]
                state[head, at], bits[head, at] = run.state, run.bits
        size, error = theirs[side].abs(), (ours[side] - theirs[side]).abs()
        both = ~error.isnan()
        power = torch.where(both, size, 0.0).double().square().sum((1, 2))
        wrong = torch.where(both, error, 0.0).double().square().sum((1, 2))
        relative = torch.where(power > 0, (wrong / power).sqrt(), 0.0).float()
        cells = [pooled(grid) for grid in (size, error)]
        step = steps(tokens, size.shape[-1])
        rotated = rotated_maps(lane, side, theirs[side], ours[side])
        sides.append(SideNumbers(cells[0], cells[1], relative, state, bits.half(), step, rotated, size.shape[-1]))
    return LayerNumbers(*sides)


def decoded(store: Store, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a store by position, float32 [H, T, D] on the CPU; NaN where a head holds nothing."""
    if store.uniform:  # heads that are coded together are decoded once
        rows = list(zip(store.keys()[0], store.values()[0], store.all_positions()[0], strict=True))
    else:
        rows = [store.entries(row) for row in range(store.heads)]
    out = tuple(torch.full((store.heads, tokens, side.shape[-1]), math.nan) for side in rows[0][:2])
    for head, (keys, values, positions) in enumerate(rows):
        at = positions.cpu().long()
        inside = at < tokens
        for grid, side in zip(out, (keys, values), strict=True):
            grid[head, at[inside]] = side.float().cpu()[inside]
    return out[0], out[1]


def rotated_maps(lane: Store, side: int, theirs: Tensor, ours: Tensor) -> tuple[Tensor, Tensor] | None:
    """Size and error [1, R, C] of the numbers that a rotating scheme codes; None where there is none, or where heads that
    are rotated together hold different tokens.

    Args:
        theirs, ours: :func:`decoded` numbers [H, T, D] of the reference and of the lane.
    """
    grids: list[Tensor] = []
    segments = [tier for s in lane.segments for tier in (s.filled if isinstance(s, TieredSegment) else [s])]
    for segment in segments:
        if not isinstance(segment, CodedSegment):
            continue
        start, tokens = 0, theirs.shape[1]
        every = segment.positions().expand(segment.batch, segment.heads, -1)[0]
        for run in (segment.value_side if side else segment.key_side).runs:
            at = every[:, start : start + run.length]
            start += run.length
            scheme = run.scheme
            if not isinstance(scheme, Rotated):
                continue
            index = at[0].cpu().long()
            if bool((at != at[:1]).any()) or int(index.max()) >= tokens or bool(theirs[:, index].isnan().any()):
                return None
            turned = [scheme.rotate(x[:, index][None].to(at.device), at[None, :1])[0].cpu() for x in (theirs, ours)]
            if not grids:
                grids = [torch.full((tokens, turned[0].shape[-1]), math.nan) for _ in range(2)]
            grids[0][index], grids[1][index] = turned[0].abs(), (turned[1] - turned[0]).abs()
    return (pooled(grids[0][None]), pooled(grids[1][None])) if grids else None


@dataclass(frozen=True)
class HeldRun:
    """Entries of some heads that are held in one way: ``positions`` int [heads, n]."""

    heads: range
    positions: Tensor
    state: int
    bits: float


def runs(store: Store, side: int) -> Iterator[HeldRun]:
    """How the entries of a store's first batch row are held, keys (0) or values (1)."""
    for segment in store.segments:
        yield from _runs(segment, range(store.heads), side)


def _runs(segment: Segment, heads: range, side: int) -> Iterator[HeldRun]:
    if isinstance(segment, RaggedSegment):
        for head in heads:
            yield from _runs(segment.rows[head], range(head, head + 1), side)
        return
    assert isinstance(segment, UniformSegment)
    if isinstance(segment, TieredSegment):
        for tier in segment.filled:
            yield from _runs(tier, heads, side)
        return
    if not segment.length:
        return
    positions = segment.positions().expand(segment.batch, segment.heads, -1)[0].cpu()
    if isinstance(segment, DenseSegment):
        name, whole = ("values", segment.values()) if side else ("keys", segment.keys())
        yield HeldRun(heads, positions, PLAIN, 8 * segment.nbytes()[name] / whole.numel())
        return
    if isinstance(segment, InputSegment):
        yield from _input_runs(segment, heads, positions)
        return
    assert isinstance(segment, CodedSegment)
    start = 0
    for length, state, bits in side_runs(segment.value_side if side else segment.key_side):
        yield HeldRun(heads, positions[:, start : start + length], state, bits)
        start += length


def _input_runs(segment: InputSegment, heads: range, positions: Tensor) -> Iterator[HeldRun]:
    """A layer's inputs: the bytes of a row, over the keys and values of all heads that are rebuilt of it."""
    numbers = 2 * segment.batch * segment.heads * segment.keys_values(0, 1)[0].shape[-1]
    newest, cut = segment.residual.view(), segment.coded
    if cut:
        size = sum(part.nbytes() for run in segment.runs for part in run.growing.values())
        yield HeldRun(heads, positions[:, :cut], CODED, 8 * size / (cut * numbers))
    if newest.shape[2]:
        size = newest.numel() * newest.element_size()
        yield HeldRun(heads, positions[:, cut:], RESIDUAL, 8 * size / (newest.shape[2] * numbers))


def side_runs(side: Side) -> Iterator[tuple[int, int, float]]:
    """(entries, state, bits of a number) of a side's coded runs, and of its residual, the oldest first."""
    newest = side.residual.view()  # [B, H, n, D]
    per_entry = newest.shape[0] * newest.shape[1] * newest.shape[3]
    for run in side.runs:
        whole = sum(part.numel() * part.element_size() for part in run.whole.values())
        size = whole + sum(part.nbytes() for part in run.growing.values())
        state = PLAIN if isinstance(run.scheme, Verbatim) else CODED
        yield run.length, state, 8 * size / (run.length * per_entry)
    if newest.shape[2]:
        yield newest.shape[2], RESIDUAL, 8.0 * newest.element_size()


def steps(tokens: int, channels: int) -> tuple[int, int]:
    """Tokens and channels that share a cell of a map."""
    return max(1, -(-tokens // MOST_ROWS)), max(1, -(-channels // MOST_CHANNELS))


def pooled(grid: Tensor) -> Tensor:
    """[H, T, D] -> [H, R, C]: the largest number of each cell, NaN where the cell has none but NaN."""
    rows, columns = steps(grid.shape[1], grid.shape[2])
    known = torch.where(grid.isnan(), -math.inf, grid)
    pad = (0, -grid.shape[2] % columns, 0, -grid.shape[1] % rows)
    known = torch.nn.functional.pad(known, pad, value=-math.inf)
    most = known.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).amax((2, 4))
    return torch.where(most == -math.inf, math.nan, most)
