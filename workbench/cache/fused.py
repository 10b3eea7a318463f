"""Attention that reads coded entries as they are held, where there is a kernel for the way both sides are coded."""

from __future__ import annotations

from workbench.cache.segments import Partial, Query
from workbench.cache.sides import Side
from workbench_kernels import Packed, Sparse, packed_attention, sparse_attention


def attend_held(query: Query, keys: Side, values: Side) -> tuple[list[Partial], int]:
    """Attention over the first entries, run by run, and how many entries that is; the others have to be decoded.

    All entries must be visible to all queries, of which there should be few.
    """
    parts: list[Partial] = []
    covered = 0
    for key_run, value_run in zip(keys.runs, values.runs, strict=False):
        ours, theirs = key_run.held(), value_run.held()
        count = min(key_run.length, value_run.length)
        if isinstance(ours, Packed) and isinstance(theirs, Packed):
            if theirs.per == "channel" and count % theirs.group_size:
                break
            parts.append(packed_attention(query.q, ours, theirs.first(count), query.scale, softcap=query.softcap))
        elif isinstance(ours, Sparse) and isinstance(theirs, Sparse) and query.softcap is None:
            if key_run.length != value_run.length:
                break
            parts.append(sparse_attention(query.q, ours, theirs, query.scale))
        else:
            break
        covered += count
        if key_run.length != value_run.length:
            break  # from here on the two sides' runs do not begin at the same entries
    return parts, covered
