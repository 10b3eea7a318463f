"""The attention and mask functions registered with transformers under the name ``workbench``.

No modelling code is patched: a model whose attention implementation is ``workbench`` calls these, and without a
workbench cache they compute ordinary attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from workbench.cache.layer import WorkbenchLayer
from workbench.cache.segments import DenseSegment, Query
from workbench.cache.store import Store

NAME = "workbench"


def workbench_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention through the cache layer that ``key`` is tagged with; [B, Hq, Tq, D] in, [B, Tq, Hq, D] out."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: WorkbenchLayer | None = getattr(key, "_workbench_layer", None)
    if layer is not None:
        layer.module = module
        out = layer.attend(query, scale, window=sliding_window, softcap=softcap, sinks=s_aux, padding=attention_mask)
    else:
        out = _without_cache(query, key, value, scale, sliding_window, softcap, s_aux, attention_mask)
    return out.transpose(1, 2).contiguous(), None


def _without_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    padding: Tensor | None,
) -> Tensor:
    store = Store(k.shape[0], k.shape[1])
    segment = store.segments[0]
    assert isinstance(segment, DenseSegment)
    segment.k, segment.v = segment.k.of(k), segment.v.of(v)
    return store.attend(Query(q, k.shape[2] - q.shape[2], True, scale, window, softcap, padding, sinks))


def padding_only(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """In place of a T x T mask: None, or the bool [B, seen] padding mask of a batch that has padding."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.bool()


def register() -> None:
    """Make ``attn_implementation="workbench"`` known to transformers; harmless when called again."""
    AttentionInterface.register(NAME, workbench_attention)
    AttentionMaskInterface.register(NAME, padding_only)
