"""What is kept of the reference lane so that the others can be compared with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from workbench.cache.cache import WorkbenchCache
    from workbench.cache.layer import WorkbenchLayer
    from workbench.cache.segments import Query


@dataclass
class ReferenceAnswer:
    """The reference's continuation of one question: its tokens, and the distribution each was drawn from."""

    first_queries: list[Query] = field(default_factory=list)  # per layer: what asked for the first token
    tokens: list[int] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)  # per token: float32 [vocabulary]
    later_queries: list[list[Query]] = field(default_factory=list)  # per later token and layer

    def queries(self, token: int) -> list[Query]:
        """The queries, one per layer, whose attention led to ``token``; empty if they were not recorded."""
        if token == 0:
            return self.first_queries
        return self.later_queries[token - 1] if token <= len(self.later_queries) else []


@dataclass
class ReferenceRun:
    """The reference lane: its cache right after the prompt (shared storage, not a copy) and its answers."""

    cache: WorkbenchCache
    cache_bytes: int
    answers: list[ReferenceAnswer] = field(default_factory=list)


class QueryRecorder:
    """A probe that remembers the last ``window`` queries of each layer."""

    def __init__(self, window: int = 1) -> None:
        self.window = window
        self.queries: dict[int, Query] = {}

    def on_attention(self, layer: WorkbenchLayer, query: Query, out: Tensor) -> None:
        self.queries[layer.index] = query.last(self.window, self.queries.get(layer.index))

    def take(self) -> list[Query]:
        """The queries by layer; the recorder is empty afterwards."""
        taken = [self.queries[i] for i in sorted(self.queries)]
        self.queries = {}
        return taken
