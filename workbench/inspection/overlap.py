"""Which tokens lanes hold, counted and compared.

Axes: L layers, H KV heads. ``kept`` is [L][H] positions held after the prompt, as in ``Lane.kept_positions``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Kept = Sequence[Sequence[Sequence[int]]]


def kept_counts(kept: Kept) -> np.ndarray:
    """Tokens each head holds: int64 [L, H]."""
    return np.array([[len(head) for head in layer] for layer in kept], dtype=np.int64)


def jaccard(one: Sequence[int] | np.ndarray, other: Sequence[int] | np.ndarray) -> float:
    """Size of what both sets of positions hold over size of what either holds, 0 to 1; NaN where both are empty.

    Neither may name a position twice.
    """
    both = len(np.intersect1d(one, other, assume_unique=True))
    either = len(one) + len(other) - both
    return both / either if either else math.nan


def overlap_by_head(one: Kept, other: Kept) -> np.ndarray:
    """The Jaccard index of two lanes' kept sets, head by head: float64 [L, H]."""
    return np.array([[jaccard(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(one, other, strict=True)])


def overlap(lanes: Sequence[Kept], at: tuple[int, int] | None = None) -> np.ndarray:
    """The Jaccard index of every pair of lanes: float64 [lanes, lanes], symmetric, 1 on its diagonal.

    Args:
        at: (layer, KV head) to compare in that head alone; by default all (layer, head, position) entries together.
    """
    sets = [_entries(kept) if at is None else np.asarray(kept[at[0]][at[1]], dtype=np.int64) for kept in lanes]
    out = np.empty((len(lanes), len(lanes)))
    for i, a in enumerate(sets):
        for j, b in enumerate(sets[: i + 1]):
            out[i, j] = out[j, i] = jaccard(a, b)
    return out


def _entries(kept: Kept) -> np.ndarray:
    """Every (layer, head, position) as one number: int64."""
    heads = [np.asarray(head, dtype=np.int64) for layer in kept for head in layer]
    return np.concatenate([(number << 40) + head for number, head in enumerate(heads)])
