"""Integer budgets that add up: what rounding left over is given out, or taken back, in rounds."""

from __future__ import annotations

from collections.abc import Sequence


def settle(counts: Sequence[int], total: int, low: int, high: int, weights: Sequence[float]) -> list[int]:
    """Counts within [low, high] that sum to ``total``, as near as the limits let them.

    What is missing goes one by one, in rounds, to those below ``high``, the heaviest first; what is too much is taken in rounds
    from those above ``low``, the lightest first. Ties go to the earlier one. (The order of CompressKV's code; here a whole round is
    one step.)
    """
    counts = list(counts)
    missing = total - sum(counts)
    step, limit = (1, high) if missing > 0 else (-1, low)
    order = sorted(range(len(counts)), key=lambda i: -step * weights[i])
    left = abs(missing)
    while left and (free := [i for i in order if counts[i] != limit]):
        rounds = max(1, min(left // len(free), *(abs(limit - counts[i]) for i in free)))
        served = free[:left]
        for i in served:
            counts[i] += step * rounds
        left -= rounds * len(served)
    return counts
