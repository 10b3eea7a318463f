"""KV drift of a lane against the reference in three numbers a head, right after the prompt; all of it is ``wb.drift``.

Storage drift compares what both hold for the same token; read drift gives both the reference's own query of a layer
(local mode: each layer's error on its own, nothing accumulated) and compares the outputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from workbench.inspection.storage import common_entries

if TYPE_CHECKING:
    from workbench.cache.cache import WorkbenchCache
    from workbench.cache.layer import WorkbenchLayer
    from workbench.cache.segments import Query
    from workbench.runs.reference import ReferenceRun


def measure_drift(trace: ReferenceRun, cache: WorkbenchCache) -> dict[str, list[list[float]]]:
    """Drift per layer and KV head.

    Returns:
        ``key_cosine``, ``value_cosine``: mean cosine over the tokens both hold (evicted tokens are no part of it: see
        the kept sets); ``output_relative_l2``: |o_lane - o_reference| / |o_reference| for the query of the first
        generated token, the largest of the head's group. Each is [layers][KV heads].
    """
    queries = trace.answers[0].first_queries if trace.answers else []
    out: dict[str, list[list[float]]] = {"key_cosine": [], "value_cosine": [], "output_relative_l2": []}
    with torch.inference_mode():
        for layer, ours in enumerate(cache.layers):
            theirs = trace.cache.layers[layer]
            pairs = [stored_cosine(theirs, ours, row) for row in range(ours.store.heads)]
            out["key_cosine"].append([k for k, _ in pairs])
            out["value_cosine"].append([v for _, v in pairs])
            if queries:
                out["output_relative_l2"].append(read_error(theirs, ours, queries[layer]))
    return out


def stored_cosine(reference: WorkbenchLayer, lane: WorkbenchLayer, row: int) -> tuple[float, float]:
    """Mean cosine of keys and of values over the tokens both hold in one row; 1.0 where both hold none."""
    k_r, v_r, at_r = reference.store.entries(row)
    k_s, v_s, at_s = lane.store.entries(row)
    theirs, ours = common_entries(at_r, at_s)
    if len(ours) == 0:
        return 1.0, 1.0
    key = F.cosine_similarity(k_r[theirs].float(), k_s[ours].float(), dim=-1).mean()
    value = F.cosine_similarity(v_r[theirs].float(), v_s[ours].float(), dim=-1).mean()
    return float(key), float(value)


def read_error(reference: WorkbenchLayer, lane: WorkbenchLayer, query: Query) -> list[float]:
    """Relative L2 of the attention output per KV head (largest of its group) when both are asked ``query``."""
    asked = replace(query, own=False)
    o_r = reference.store.attend(asked).float()[0, :, -1]  # [Hq, D]
    o_s = lane.store.attend(asked).float()[0, :, -1]
    error = (o_s - o_r).norm(dim=-1) / (o_r.norm(dim=-1) + 1e-5)
    return error.view(lane.store.heads, -1).amax(-1).tolist()
