"""Which tokens lanes hold, counted and compared.

Axes: L layers, H KV heads, T prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def held_masks(kept: Sequence[Sequence[Sequence[int]]], tokens: int) -> Tensor:
    """Which of the prompt's tokens each head holds: bool [L, H, T]; positions beyond the prompt are left out.

    Args:
        kept: [L][H] positions held after the prompt, as in ``Lane.kept_positions``.
    """
    mask = torch.zeros(len(kept), len(kept[0]), tokens, dtype=torch.bool)
    for rows, heads in zip(mask, kept, strict=True):
        for row, positions in zip(rows, heads, strict=True):
            at = torch.from_numpy(np.array(positions, dtype=np.int64))  # far quicker for a long list than torch.tensor
            row[at[at < tokens]] = True
    return mask


def counted(mask: Tensor) -> Tensor:
    """How many are true along the last axis: int64 [...]. NumPy counts bytes; torch would sum them as int64."""
    rows = [np.count_nonzero(row) for row in mask.flatten(0, -2).numpy()]
    return torch.tensor(rows, dtype=torch.int64).view(mask.shape[:-1])


def jaccard(one: Tensor, other: Tensor) -> Tensor:
    """Size of what both sets hold over size of what either holds, 0 to 1; NaN where both are empty: float64 [...].

    Args:
        one, other: bool [..., T].
    """
    return counted(one & other).double() / counted(one | other)


def overlap(lanes: Sequence[Tensor], at: tuple[int, int] | None = None) -> np.ndarray:
    """The Jaccard index of every pair of lanes: float64 [lanes, lanes], symmetric, 1 on its diagonal.

    Args:
        lanes: :func:`held_masks` of each.
        at: (layer, KV head) to compare in that head alone; by default all (layer, head, position) entries together.
    """
    sets = [held.flatten()[None] if at is None else held[at][None] for held in lanes]
    out = np.empty((len(lanes), len(lanes)))
    for i, a in enumerate(sets):
        for j, b in enumerate(sets[: i + 1]):
            out[i, j] = out[j, i] = jaccard(a, b)
    return out
