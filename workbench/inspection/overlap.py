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


def jaccard(one: Sequence[int], other: Sequence[int]) -> float:
    """Size of what both sets of positions hold over size of what either holds, 0 to 1; NaN where both are empty."""
    a, b = set(one), set(other)
    return len(a & b) / len(a | b) if a or b else math.nan


def overlap_by_head(one: Kept, other: Kept) -> np.ndarray:
    """The Jaccard index of two lanes' kept sets, head by head: float64 [L, H]."""
    return np.array([[jaccard(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(one, other, strict=True)])


def overlap(lanes: Sequence[Kept], at: tuple[int, int] | None = None) -> np.ndarray:
    """The Jaccard index of every pair of lanes: float64 [lanes, lanes], symmetric, 1 on its diagonal.

    Args:
        at: (layer, KV head) to compare in that head alone; by default all (layer, head, position) entries together.
    """
    sets = [_entries(kept) if at is None else set(kept[at[0]][at[1]]) for kept in lanes]
    out = np.full((len(lanes), len(lanes)), math.nan)
    for i, a in enumerate(sets):
        for j, b in enumerate(sets[: i + 1]):
            out[i, j] = out[j, i] = len(a & b) / len(a | b) if a or b else math.nan
    return out


def _entries(kept: Kept) -> set[tuple[int, int, int]]:
    return {(layer, h, p) for layer, heads in enumerate(kept) for h, head in enumerate(heads) for p in head}
