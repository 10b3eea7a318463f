"""Decode attention that reads 2-, 4- and 8-bit codes as they are held: no dense copy of keys or values is ever made.

Scales are folded into the small operand wherever a group allows it. With keys grouped along tokens (``per="channel"``)
``q . k_t = sum_d (q_d s_d) c_td + sum_d q_d m_d``: the query is scaled once per group. With values grouped along tokens
``o_d = s_d sum_t p_t c_td + m_d sum_t p_t``. (Split-KV: flash-decoding; partial results merge by their log-sum-exp.)
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from workbench_kernels.attention import attention_reference, softmax_with_lse
from workbench_kernels.pack import BITS, unpack
from workbench_kernels.triton_if_used import runs

BLOCK_LEAST, BLOCK_MOST = 1 << 16, 1 << 20  # codes decoded at a time on a CPU: an eighth of a run, within these


class Packed(NamedTuple):
    """Keys or values of a run of entries: codes, and a float16 scale and minimum per group of g numbers.

    ``per="channel"``: a group is g consecutive entries of one channel. codes int32 [B, H, N / g, D, g * bits / 32],
    scale and low [B, H, N / g, D]. ``per="token"``: a group is g consecutive channels of one entry. codes
    [B, H, N, D / g, g * bits / 32], scale and low [B, H, N, D / g]. A number is ``code * scale + low``. All but the
    first two axes are dense.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor
    bits: int
    per: Literal["channel", "token"]

    @property
    def group_size(self) -> int:
        return self.codes.shape[-1] * 32 // self.bits

    @property
    def entries(self) -> int:
        return self.codes.shape[2] * (self.group_size if self.per == "channel" else 1)

    @property
    def width(self) -> int:
        """D, the numbers of an entry."""
        return self.codes.shape[3] * (1 if self.per == "channel" else self.group_size)

    def first(self, entries: int) -> Packed:
        """The first entries alone, whole groups of them: views."""
        rows = entries // (self.group_size if self.per == "channel" else 1)
        return Packed(self.codes[:, :, :rows], self.scale[:, :, :rows], self.low[:, :, :rows], self.bits, self.per)

    def dense(self, stop: int | None = None) -> Tensor:
        """float32 [B, H, N, D]: for tests and small runs."""
        numbers = unpack(self.codes, self.bits).float() * self.scale.float()[..., None] + self.low.float()[..., None]
        if self.per == "channel":
            numbers = numbers.transpose(-1, -2)  # [B, H, N / g, g, D]
            return numbers.flatten(2, 3)[:, :, :stop]
        return numbers.flatten(-2)[:, :, :stop]


def packed_attention_reference(
    q: Tensor,
    keys: Packed,
    values: Packed,
    scale: float,
    lengths: Tensor | None = None,
    visible: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: decode everything to float32, then attend. Arguments as in :func:`packed_attention`."""
    seen = _seen(q, values, lengths, visible)
    if seen is not None:
        seen = seen.repeat_interleave(q.shape[1] // seen.shape[1], 1)[:, :, None]
    entries = values.entries
    return attention_reference(q, keys.dense(entries), values.dense(), scale, seen, softcap)


def packed_attention(
    q: Tensor,
    keys: Packed,
    values: Packed,
    scale: float,
    *,
    lengths: Tensor | None = None,
    visible: Tensor | None = None,
    softcap: float | None = None,
    splits: int | None = None,
    kernel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of few queries over packed entries, all of which precede the queries.

    CUDA tensors take the Triton kernel, others torch in blocks; ``kernel=True`` forces the kernel (tests run it in
    Triton's interpreter).

    Args:
        q: [B, Hq, Tq, D], Hq a multiple of H; query head h reads KV head h // (Hq / H).
        keys, values: runs of the same N entries; keys may hold more (whole groups), which are not looked at.
        lengths: int [B, H]: only a row's first entries count (ragged rows in one rectangle); None means all N.
        visible: bool, broadcastable to [B, H, N]: entries that the queries see; None means all.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
        splits: parts of the entries that run side by side on a GPU; None fills the device.

    Returns:
        Output [B, Hq, Tq, D] in q's dtype, and the log-sum-exp of the logits, float32 [B, Hq, Tq] (zero and ``-inf``
        where a row sees nothing).

    Raises:
        ValueError: shapes, bits or dtypes that do not belong together.
    """
    _check(q, keys, values)
    if values.entries == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
    if kernel or runs(q):
        from workbench_kernels.packed_attention_kernel import launch

        with torch.cuda.device_of(q):
            return launch(q, keys, values, scale, lengths, visible, softcap, splits)
    return _blockwise(q, keys, values, scale, _seen(q, values, lengths, visible), softcap)


def _check(q: Tensor, keys: Packed, values: Packed) -> None:
    for name, side in (("keys", keys), ("values", values)):
        if side.bits not in BITS or side.per not in ("channel", "token"):
            raise ValueError(f"{name}: bits must be one of {BITS} and per 'channel' or 'token', got {side[3:]}")
        if side.codes.dtype != torch.int32 or side.codes.shape[:-1] != side.scale.shape != side.low.shape:
            raise ValueError(
                f"{name}: expected int32 codes [..., words] with scale and low [...], got {side.codes.dtype} "
                f"{tuple(side.codes.shape)}, {tuple(side.scale.shape)} and {tuple(side.low.shape)}"
            )
        if side.group_size * side.bits % 32 or side.group_size & (side.group_size - 1):
            raise ValueError(f"{name}: a group must be a power of two that fills whole words, got {side.group_size}")
        if side.codes.shape[0] != q.shape[0] or q.shape[1] % side.codes.shape[1] or side.width != q.shape[3]:
            raise ValueError(
                f"{name} {tuple(side.codes.shape)} of width {side.width} do not belong to queries {tuple(q.shape)}"
            )
    if keys.entries < values.entries:
        raise ValueError(f"{keys.entries} keys do not cover {values.entries} values")


def _seen(q: Tensor, values: Packed, lengths: Tensor | None, visible: Tensor | None) -> Tensor | None:
    """bool [B, H, N], or [B, 1, N] where all heads see the same; None where all is seen."""
    seen = None
    if lengths is not None:
        seen = torch.arange(values.entries, device=q.device) < lengths[..., None]
    if visible is not None:
        visible = (
            visible.expand(q.shape[0], *visible.shape[-2:]) if visible.dim() == 3 else visible.expand(q.shape[0], 1, -1)
        )
        seen = visible if seen is None else seen & visible
    return seen


# -- the CPU ---------------------------------------------------------------------------------------------------------


class _Scratch:
    """Decodes codes to floats with two passes over memory, in an order of its own.

    A byte holds F = 8 / bits codes; they are masked in place, not shifted, so that code j of a byte comes out times
    ``2 ** (bits * j)``. For speed that is done on a whole machine word of m bytes (m = 4 or 8) at a time, for all j at
    once, and the words' codes lie in the order (word, j, byte). The small operand is brought into the same order and
    divided by the same powers: exact, as they are powers of two.
    """

    def __init__(self, bits: int, group_size: int, capacity: int, device: torch.device) -> None:
        self.planes = 8 // bits
        row = group_size * bits // 8  # bytes
        self.word = 8 if row % 8 == 0 else 4
        self.dtype = torch.int64 if self.word == 8 else torch.int32
        octets = [
            sum((((1 << bits) - 1) << (bits * j)) << (8 * k) for k in range(self.word)) for j in range(self.planes)
        ]
        top = 1 << (8 * self.word - 1)
        self.masks = torch.tensor([m - 2 * top if m >= top else m for m in octets], dtype=self.dtype, device=device)
        self.order = (row // self.word, self.word, self.planes)  # of a group as it is stored
        self.undo = torch.tensor([2.0 ** (-bits * j) for j in range(self.planes)], device=device)
        self.floats = torch.empty(capacity, device=device)
        self.octets = torch.empty(capacity, dtype=torch.uint8, device=device)

    def decode(self, words: Tensor) -> Tensor:
        """int32 [..., w] -> float32 [..., g] in the scratch's order and scale; overwritten by the next call."""
        shape = (*words.shape[:-1], self.order[0] * self.order[1] * self.planes)
        count = math.prod(shape)
        floats = self.floats[:count].view(shape)
        if self.planes == 1:
            return floats.copy_(words.contiguous().view(torch.uint8))
        if not words.is_contiguous():  # a view of a store with room to grow: contiguous within each row
            words = words.contiguous()
        octets = self.octets[:count].view(shape)
        spread = octets.view(self.dtype).unflatten(-1, (-1, self.planes))
        torch.bitwise_and(words.view(self.dtype)[..., None], self.masks, out=spread)
        return floats.copy_(octets)

    def to(self, x: Tensor) -> Tensor:
        """[..., g] in the stored order -> the scratch's, times the inverse powers: to multiply decoded numbers with."""
        if self.planes == 1:
            return x
        return (x.unflatten(-1, self.order) * self.undo).transpose(-1, -2).flatten(-3)

    def back(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[..., g] sums of decoded numbers in the scratch's order -> the stored order and scale, maybe into ``out``."""
        words, octets, planes = self.order
        out = torch.empty_like(x) if out is None else out
        torch.mul(
            x.unflatten(-1, (words, planes, octets)).transpose(-1, -2), self.undo, out=out.unflatten(-1, self.order)
        )
        return out


def _blockwise(
    q: Tensor, keys: Packed, values: Packed, scale: float, seen: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    batch, heads = keys.codes.shape[:2]
    rows = q.shape[1] // heads * q.shape[2]  # query rows of one KV head
    asked = q.float().reshape(batch, heads, rows, -1) * scale  # [B, H, R, D]
    logits = _logits(asked, keys, values.entries)  # [B, H, R, N]
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    if seen is not None:
        logits.masked_fill_(~seen[:, :, None], -math.inf)
    weights, lse = softmax_with_lse(logits, all_seen=seen is None)
    out = _weighted(weights, values)
    return out.view(q.shape).to(q.dtype), lse.view(q.shape[:3])


def _blocks(side: Packed, entries: int) -> tuple[_Scratch, list[tuple[int, int]]]:
    """Where to cut the third axis of ``side.codes``, and the scratch for one block."""
    batch, heads, _, columns = side.codes.shape[:4]
    of_one = batch * heads * columns * side.group_size  # numbers per step along the third axis
    steps = -(-entries // side.group_size) if side.per == "channel" else entries
    block = min(BLOCK_MOST, max(BLOCK_LEAST, steps * of_one // 8))
    size = min(steps, max(1, block // of_one))
    return _Scratch(side.bits, side.group_size, size * of_one, side.codes.device), [
        (a, min(steps, a + size)) for a in range(0, steps, size)
    ]


def _logits(q: Tensor, keys: Packed, entries: int) -> Tensor:
    """float32 [B, H, R, N] of scaled queries [B, H, R, D]."""
    g, (scratch, cuts) = keys.group_size, _blocks(keys, entries)
    steps, transposed = cuts[-1][1], q.transpose(-1, -2)
    low = keys.low[:, :, :steps].float()
    if keys.per == "token":
        grouped = q.unflatten(-1, (-1, g))
        logits = grouped.sum(-1) @ low.transpose(-1, -2)  # what the minima give: [B, H, R, N]
        transposed = scratch.to(grouped).flatten(-2).transpose(-1, -2)
        for a, b in cuts:
            numbers = scratch.decode(keys.codes[:, :, a:b]).mul_(keys.scale[:, :, a:b].float()[..., None])
            logits[..., a:b] += (numbers.flatten(-2) @ transposed).transpose(-1, -2)
        return logits
    logits = q.new_empty(*q.shape[:3], steps * g)
    for a, b in cuts:
        numbers = scratch.decode(keys.codes[:, :, a:b])  # [B, H, groups, D, g]
        scaled = q[:, :, None] * keys.scale[:, :, a:b].float()[:, :, :, None]  # [B, H, groups, R, D]
        scratch.back(scaled @ numbers, out=logits[..., a * g : b * g].unflatten(-1, (-1, g)).transpose(2, 3))
    logits.unflatten(-1, (-1, g)).add_((low @ transposed).transpose(-1, -2)[..., None])
    return logits[..., :entries]


def _weighted(weights: Tensor, values: Packed) -> Tensor:
    """float32 [B, H, R, D]: values summed with weights [B, H, R, N]."""
    g, (scratch, cuts) = values.group_size, _blocks(values, weights.shape[-1])
    batch, heads, rows, _ = weights.shape
    low = values.low.float()
    out = weights.new_zeros(batch * heads, rows, values.width)
    if values.per == "token":
        for a, b in cuts:
            numbers = scratch.decode(values.codes[:, :, a:b]).mul_(values.scale[:, :, a:b].float()[..., None])
            out.baddbmm_(weights[..., a:b].flatten(0, 1), numbers.flatten(-2).flatten(0, 1))
        grouped = scratch.back(out.view(batch, heads, rows, -1, g))
        return (grouped + (weights @ low)[..., None]).flatten(-2)
    grouped = weights.unflatten(-1, (-1, g)).transpose(2, 3)  # [B, H, groups, R, g]
    for a, b in cuts:
        numbers = scratch.decode(values.codes[:, :, a:b]).transpose(-1, -2)  # [B, H, groups, g, D]
        found = (scratch.to(grouped[:, :, a:b]) @ numbers).mul_(values.scale[:, :, a:b].float()[:, :, :, None])
        out += found.sum(2).flatten(0, 1)
    return out.view(batch, heads, rows, -1) + grouped.sum(-1).transpose(2, 3) @ low
