"""GEAR's error recovery around any scheme: extreme numbers apart in float16, and a low-rank product for what is still wrong.

x = backbone + sparse outliers + Q P^T. Axes: B batch, H KV heads, n entries of a run, D head_dim, r rank, k outliers a side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.cache.schemes.base import Parts, Scheme, require_finite

OWN = {"outliers": "outliers", "places": "outliers", "left": "factors", "right": "factors"}
SEED = 0  # of the start of the power iteration: the same text gives the same codes


class Recovered(Scheme):
    """A backbone with what it misses.

    Parts besides the backbone's: left Q float16 [B, H, n / unit, unit, r], right P float16 [B, H, D, r]; outliers float16 and
    places int16 or int32, [B, H, D, 2k] among the entries of a channel, or [B, 1, n / unit, unit, 2k] among all channels of
    an entry.

    Args:
        outliers: share of the numbers of a vector that are held apart, half of them the smallest, half the largest.
        rank: of the product, per head; at most the run's length and D.
        iterations: rounds of power iteration.
        per_channel: a vector is one channel over the run's entries (keys) instead of one entry over all heads (values).
    """

    def __init__(self, backbone: Scheme, outliers: float, rank: int, iterations: int, per_channel: bool) -> None:
        self.backbone, self.outliers, self.rank, self.iterations = backbone, outliers, rank, iterations
        self.per_channel, self.unit = per_channel, backbone.unit
        self.kinds = {**backbone.kinds, **OWN}  # type: ignore[misc]
        extra = ({"right"} if rank else set()) | ({"outliers", "places"} if outliers and per_channel else set())
        self.whole = backbone.whole | extra  # type: ignore[misc]
        self.separable = backbone.separable and (per_channel or not outliers)  # type: ignore[misc]

    def row(self, b: int, h: int) -> Scheme:
        return Recovered(self.backbone.row(b, h), self.outliers, self.rank, self.iterations, self.per_channel)

    def encode(self, x: Tensor, at: Tensor | None) -> Parts:
        x, parts = x.float(), {}
        rest = x
        vectors = self._vectors(x)
        k = int(vectors.shape[-1] * self.outliers / 2 + 1e-9)
        if k:
            order = vectors.argsort(dim=-1, stable=True)
            places = torch.cat([order[..., :k], order[..., -k:]], -1)
            extreme = vectors.gather(-1, places).half()
            require_finite(extreme)
            filled = vectors.scatter(-1, places, vectors.mean(-1, keepdim=True).expand(*places.shape))
            rest = self._entries(filled, x.shape[1])
            width = torch.int16 if vectors.shape[-1] <= torch.iinfo(torch.int16).max else torch.int32
            parts = {"outliers": self._stored(extreme), "places": self._stored(places.to(width))}
        parts |= self.backbone.encode(rest, at)
        rank = min(self.rank, *x.shape[2:])
        if rank:
            without = {name: part for name, part in parts.items() if name not in ("left", "right")}
            missed = x - self.decode(without, (0, x.shape[2]), torch.float32, at)
            left, right = (factor.half() for factor in low_rank(missed, rank, self.iterations))
            require_finite(left, right)
            parts |= {"left": left.unflatten(2, (-1, self.unit)), "right": right}
        return parts

    def decode(self, parts: Parts, span: tuple[int, int], dtype: torch.dtype, at: Tensor | None) -> Tensor:
        dense = self.backbone.decode(parts, span, torch.float32, at)
        if "outliers" in parts:
            values, places = parts["outliers"].float(), parts["places"].long()
            if self.per_channel:
                here = (places >= span[0]) & (places < span[1])
                vectors = torch.cat([self._vectors(dense), dense.new_zeros(*places.shape[:3], 1)], -1)
                vectors = vectors.scatter_(-1, torch.where(here, places - span[0], span[1] - span[0]), values)
                dense = self._entries(vectors[..., :-1], dense.shape[1])  # the last took what lies elsewhere
            else:
                heads = dense.shape[1]
                vectors = self._vectors(dense).scatter(-1, places.flatten(2, 3), values.flatten(2, 3))
                dense = self._entries(vectors, heads)
        if "left" in parts:
            dense = dense + parts["left"].float().flatten(2, 3) @ parts["right"].float().mT
        return dense.to(dtype)

    def _vectors(self, x: Tensor) -> Tensor:
        """What outliers are sought in: the entries of a channel [B, H, D, n], or the channels of an entry [B, 1, n, H * D]."""
        return x.transpose(2, 3) if self.per_channel else x.transpose(1, 2).flatten(2)[:, None]

    def _entries(self, vectors: Tensor, heads: int) -> Tensor:
        if self.per_channel:
            return vectors.transpose(2, 3)
        return vectors[:, 0].unflatten(-1, (heads, -1)).transpose(1, 2)

    def _stored(self, sparse: Tensor) -> Tensor:
        return sparse if self.per_channel else sparse.unflatten(2, (-1, self.unit))

    def shared(self) -> list[tuple[str, Tensor]]:
        return self.backbone.shared()


def low_rank(x: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Q [..., n, r] and P [..., D, r] with Q P^T near x [..., n, D]: power iteration from a fixed start."""
    start = torch.rand(x.shape[-1], rank, generator=torch.Generator().manual_seed(SEED))
    p = start.to(x.device).expand(*x.shape[:-2], -1, -1)
    for _ in range(iterations):
        # Orthonormal in every round, not in the last alone: the span is the same, and nothing overflows.
        q = torch.linalg.qr(x @ torch.linalg.qr(p).Q).Q
        p = x.mT @ q
    return q, p
