"""Packed segment: keys quantized per channel in groups of tokens, values per token in groups of channels (KIVI).

Both sides keep their newest tokens in full precision; they leave that residual at different times, so keys and values
have different packed lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.cache.affine import dequantize, quantize
from workbench.cache.growable import Growable, Residual
from workbench.cache.segments import Partial, Query, UniformSegment, entry_mask
from workbench_kernels import attend, merge_partials

KEY_TENSORS = ("key_codes", "key_scale", "key_low")
VALUE_TENSORS = ("value_codes", "value_scale", "value_low")
BLOCK = 1024  # entries decoded at a time while attending; no dense copy of more than this exists


class PackedSegment(UniformSegment):
    """Entries of equal number per row, held as codes plus a full-precision residual.

    Args:
        key_bits, value_bits: 2, 4 or 8.
        group_size: elements per scale (g): tokens of one channel for keys, channels of one token for values.
        residual_length: newest tokens in full precision (R, a multiple of g).
    """

    def __init__(
        self, batch: int, heads: int, key_bits: int, value_bits: int, group_size: int, residual_length: int
    ) -> None:
        super().__init__(batch, heads)
        self.key_bits, self.value_bits = key_bits, value_bits
        self.group_size, self.residual_length = group_size, residual_length
        # keys: codes [B, H, groups, D, g * bits / 32], scale and minimum [B, H, groups, D]
        flush = residual_length // group_size  # groups that arrive together
        self.key_codes, self.key_scale, self.key_low = (Growable(spare=flush) for _ in range(3))
        # values: codes [B, H, n, D / g, g * bits / 32], scale and minimum [B, H, n, D / g]
        self.value_codes, self.value_scale, self.value_low = Growable(), Growable(), Growable()
        self.key_residual, self.value_residual = Residual(residual_length), Residual(residual_length + 1)

    @property
    def packed_keys(self) -> int:
        return self.key_scale.length * self.group_size

    @property
    def packed_values(self) -> int:
        return self.value_scale.length

    @property
    def length(self) -> int:
        return self.packed_keys + self.key_residual.length

    @property
    def device(self) -> torch.device:
        return self.key_residual.view().device

    def load(self, k: Tensor, v: Tensor, positions: Tensor | None, start: int = 0) -> None:
        """Take over k, v [B, H, n, D] and pack all that lies before the residual (the state after a prompt).

        Keys: the first n - (n mod R) tokens. Values: the first n - R tokens.
        """
        n, residual = k.shape[2], self.residual_length
        self.start = start
        if positions is not None:
            self.at = Growable.of(positions)
        cut = n - n % residual if n >= residual else 0
        self._pack_keys(k[:, :, :cut])
        self.key_residual.append(k[:, :, cut:])
        cut = max(n - residual, 0)
        self._pack_values(v[:, :, :cut])
        self.value_residual.append(v[:, :, cut:])

    def append(self, k: Tensor, v: Tensor, start: int, at: Tensor | None = None) -> None:
        self._note_positions(start, k.shape[2], at)
        self.key_residual.append(k)
        self.value_residual.append(v)

    def settle(self) -> None:
        """Pack what has left the residual: keys R at a time, values one token at a time."""
        full = self.key_residual.length // self.residual_length * self.residual_length
        if full:
            self._pack_keys(self.key_residual.pop_front(full))
        over = self.value_residual.length - self.residual_length
        if over > 0:
            self._pack_values(self.value_residual.pop_front(over))

    def _pack_keys(self, k: Tensor) -> None:
        if k.shape[2] == 0:
            return
        grouped = k.unflatten(2, (-1, self.group_size)).transpose(-1, -2)  # [B, H, groups, D, g]
        codes, scale, low = quantize(grouped, self.key_bits)
        self.key_codes.append(codes)
        self.key_scale.append(scale)
        self.key_low.append(low)

    def _pack_values(self, v: Tensor) -> None:
        if v.shape[2] == 0:
            return
        codes, scale, low = quantize(v.unflatten(-1, (-1, self.group_size)), self.value_bits)
        self.value_codes.append(codes)
        self.value_scale.append(scale)
        self.value_low.append(low)

    def keys(self, start: int, stop: int, row: int | None = None) -> Tensor:
        """Decoded keys [B, H, stop - start, D] of one block of entries; [1, 1, stop - start, D] of one row."""
        cut, g = self.packed_keys, self.group_size
        of, parts = self._rows(row), []
        if start < cut:
            g0, g1 = start // g, -(-min(stop, cut) // g)
            dense = dequantize(
                self.key_codes.read(g0, g1)[of],
                self.key_scale.read(g0, g1)[of],
                self.key_low.read(g0, g1)[of],
                self.key_bits,
                self.key_residual.view().dtype,
            )
            dense = dense.transpose(-1, -2).flatten(2, 3)  # [B, H, groups * g, D]
            parts.append(dense[:, :, start - g0 * g : min(stop, cut) - g0 * g])
        if stop > cut or not parts:
            parts.append(self.key_residual.view()[of][:, :, max(start - cut, 0) : max(stop - cut, 0)])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def values(self, start: int, stop: int, row: int | None = None) -> Tensor:
        """Decoded values [B, H, stop - start, D] of one block of entries; [1, 1, stop - start, D] of one row."""
        cut = self.packed_values
        of, parts = self._rows(row), []
        if start < cut:
            n1 = min(stop, cut)
            dense = dequantize(
                self.value_codes.read(start, n1)[of],
                self.value_scale.read(start, n1)[of],
                self.value_low.read(start, n1)[of],
                self.value_bits,
                self.value_residual.view().dtype,
            )
            parts.append(dense.flatten(-2))
        if stop > cut or not parts:
            parts.append(self.value_residual.view()[of][:, :, max(start - cut, 0) : max(stop - cut, 0)])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _rows(self, row: int | None) -> tuple[slice, slice]:
        """What to take of the first two axes: everything, or one row."""
        if row is None:
            return slice(None), slice(None)
        b, h = divmod(row, self.heads)
        return slice(b, b + 1), slice(h, h + 1)

    def attend(self, query: Query, need_lse: bool = True) -> Partial:
        if self.packed_keys == self.packed_values == 0 and self._banded(query):
            return self._attend_run(self.keys(0, self.length), self.values(0, self.length), query, need_lse)
        # The queries' own entries were appended last and must all be in the final block.
        last = self.length - (query.q.shape[2] if query.own else 0)
        edges = [*range(0, max(last, 1), BLOCK), self.length]
        masked = query.window is not None or query.padding is not None
        positions = self.positions() if masked else None
        parts: list[Partial] = []
        for a, b in zip(edges, edges[1:], strict=False):
            mask = None if positions is None else entry_mask(query, positions[:, :, a:b])
            own = query.own and b == self.length
            k, v = self.keys(a, b), self.values(a, b)
            parts.append(attend(query.q, k, v, query.scale, causal=own, mask=mask, softcap=query.softcap))  # type: ignore[arg-type]
        return merge_partials(parts)

    def entries(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.keys(0, self.length, row), self.values(0, self.length, row)
        return k[0, 0], v[0, 0], self.positions_of(row)

    def drop_before(self, position: int) -> None:
        # Only whole groups of which both sides are packed can leave.
        cut = min(self._passed(position), self.packed_keys, self.packed_values) // self.group_size * self.group_size
        if cut == 0:
            return
        self._forget(cut)
        for name in KEY_TENSORS:
            setattr(self, name, getattr(self, name).after(cut // self.group_size))
        for name in VALUE_TENSORS:
            setattr(self, name, getattr(self, name).after(cut))

    def _codes(self) -> list[Growable]:
        return [self.key_codes, self.value_codes]

    def _scales(self) -> list[Growable]:
        return [self.key_scale, self.key_low, self.value_scale, self.value_low]

    def nbytes(self) -> dict[str, int]:
        held = {
            "codes": sum(g.nbytes() for g in self._codes()),
            "scales": sum(g.nbytes() for g in self._scales()),
            "window": self.key_residual.nbytes() + self.value_residual.nbytes(),
        }
        if self.at is not None:
            held["positions"] = self.at.nbytes()
        return held

    def reserved_bytes(self) -> int:
        growing = [*self._codes(), *self._scales(), *([self.at] if self.at is not None else [])]
        residuals = self.key_residual.reserved_bytes() + self.value_residual.reserved_bytes()
        return sum(g.reserved_bytes() for g in growing) + residuals

    def clone(self) -> PackedSegment:
        twin = PackedSegment(
            self.batch, self.heads, self.key_bits, self.value_bits, self.group_size, self.residual_length
        )
        for name in KEY_TENSORS + VALUE_TENSORS:
            setattr(twin, name, getattr(self, name).clone())
        twin.key_residual, twin.value_residual = self.key_residual.clone(), self.value_residual.clone()
        twin.start, twin.at = self.start, None if self.at is None else self.at.clone()
        return twin

    def packed(self, row: int) -> int:
        return min(self.packed_keys, self.packed_values)
