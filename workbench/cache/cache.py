"""The cache of one run: a transformers ``Cache`` whose layers follow a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from torch import Tensor
from transformers.cache_utils import Cache

from workbench.cache.hidden import HiddenStates
from workbench.cache.layer import WorkbenchLayer
from workbench.cache.tap import InputTap
from workbench.errors import WorkbenchError
from workbench.strategies.recipe import Recipe

if TYPE_CHECKING:
    from workbench.cache.segments import Query
    from workbench.models.artifacts import Artifacts
    from workbench.models.geometry import Geometry


class AttentionProbe(Protocol):
    """Observes attention without changing it."""

    def on_attention(self, layer: WorkbenchLayer, query: Query, out: Tensor) -> None:
        """Called after each layer attended; ``out`` is [B, Hq, Tq, D]."""
        ...


class ScoreProbe(Protocol):
    """Observes by what strategies choose the entries they keep of the prompt."""

    def on_scores(self, layer: int, part: int, scores: Tensor, positions: Tensor) -> None:
        """Called before part number ``part`` of the recipe drops entries: scores and positions are [B, H, n]."""
        ...


@dataclass(frozen=True)
class Memory:
    """What a cache really holds, in bytes. Every tensor is counted once, metadata included."""

    used_bytes: int
    reserved_bytes: int  # allocated for entries to come, not in use
    peak_bytes: int  # the most at any time, hidden states that wait between two layers among it
    by_layer: list[int]
    by_kind: dict[str, int]
    by_head: list[list[int]] = field(default_factory=list)  # [layers][KV heads]
    factor_bytes: int = 0  # matrices made of the model's weights, the same for all its caches; not in used_bytes


@dataclass
class Drive:
    """What a layer-by-layer forward pass (:mod:`workbench.models.layerwise`) and the layers tell each other.

    Attributes:
        entering: tokens of the prompt that enter the layer.
        waiting: bytes of the hidden states that wait between two layers.
        at: int64 [Tq], positions of this chunk's tokens, once some of the prompt stayed behind; None before.
        going_on: int64 [m], positions of the tokens that a strategy lets go on to the next layer; None for all.
    """

    entering: int
    waiting: int
    at: Tensor | None = None
    going_on: Tensor | None = None


class WorkbenchCache(Cache):
    """Drop-in for ``model.generate(past_key_values=…)``; made by :func:`workbench.cache`.

    Args:
        recipe: what happens to the cached entries.
        geometry: of the model this cache is for.
        prompt_length: tokens of the prompt when it is fed in several chunks; without it the first forward call is
            taken for the whole prompt.
        probes: observers of attention.
        artifacts: what was calibrated or trained for the model.
        tap: that of the cache this one is a fork of.
    """

    def __init__(
        self,
        recipe: Recipe,
        geometry: Geometry,
        prompt_length: int | None = None,
        probes: Sequence[AttentionProbe] = (),
        artifacts: Artifacts | None = None,
        tap: InputTap | None = None,
    ) -> None:
        self.recipe, self.geometry, self.prompt_length = recipe, geometry, prompt_length
        self.probes: list[AttentionProbe] = list(probes)
        self.artifacts = artifacts
        self.score_probe: ScoreProbe | None = None
        self.replaying = False
        self.drive: Drive | None = None  # while the layers are run one by one
        self.peak_bytes = 0
        self._layer_bytes = [0] * geometry.num_layers
        self._chunk_bytes = [0] * geometry.num_layers  # with the prompt's last chunk, before anything was dropped
        self._before_chunk = (0, [0] * geometry.num_layers)  # the peak and the layers' bytes before that chunk
        self._asked: list[Query] = []  # per layer read so far: the prompt's last queries, until the prompt is finished
        super().__init__(layers=[WorkbenchLayer(i, self, w) for i, w in enumerate(geometry.sliding_windows)])
        recipe.check(geometry, artifacts)
        self.tap = tap
        if recipe.needs_inputs:
            self.tap = tap or InputTap(geometry.rebuilds)
            self.tap.add(self)
        self._hidden = HiddenStates(self) if recipe.needs_hidden else None

    def note_prompt(self, tokens: int) -> None:
        """The first forward call tells the prompt's length unless it was given."""
        if self.prompt_length is None:
            self.prompt_length = tokens

    def note_bytes(self, layer: WorkbenchLayer) -> None:
        self._layer_bytes[layer.index] = sum(layer.nbytes().values())
        waiting = 0 if self.drive is None else self.drive.waiting
        self.peak_bytes = max(self.peak_bytes, sum(self._layer_bytes) + waiting)

    def note_chunk(self, layer: WorkbenchLayer) -> None:
        """A chunk of the prompt arrived in ``layer`` and nothing was dropped yet: what prefill really holds."""
        if layer.index == 0:
            self._before_chunk = (self.peak_bytes, list(self._layer_bytes))
        self.note_bytes(layer)
        self._chunk_bytes[layer.index] = self._layer_bytes[layer.index]

    def release(self) -> None:
        """Take this cache's hooks, if it has any, out of the model; it can be read from then on, but takes no more tokens."""
        if self.tap is not None:
            self.tap.remove()

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Inside, queries attend to what is held and nothing is appended: the last token asked once more."""
        self.replaying = True
        try:
            yield
        finally:
            self.replaying = False

    @contextmanager
    def driven(self, drive: Drive) -> Iterator[None]:
        """Inside, a layer is run on its own, on the tokens that ``drive`` says."""
        self.drive = drive
        try:
            yield
        finally:
            self.drive = None

    @property
    def tokens_by_layer(self) -> list[int]:
        """Tokens of the prompt that each layer was given: fewer after a layer where some stayed behind."""
        return [layer.prompt_tokens for layer in self.layers]

    def apply_recipe(self, queries: Sequence[Query]) -> None:
        """Act as after the prompt, on a cache whose prompt was read under the empty recipe.

        The peak becomes that of a run that had read the prompt under this recipe: layer by layer the last chunk came,
        and the recipe acted.

        Args:
            queries: per layer, the last queries of the prompt.
        """
        self.peak_bytes, self._layer_bytes = self._before_chunk[0], list(self._before_chunk[1])
        for layer, query in zip(self.layers, queries, strict=True):
            self._layer_bytes[layer.index] = self._chunk_bytes[layer.index]
            self.peak_bytes = max(self.peak_bytes, sum(self._layer_bytes))
            self.finish_layer(layer, query)
            self.note_bytes(layer)
        self.finish_prompt()

    def finish_layer(self, layer: WorkbenchLayer, query: Query) -> None:
        """The prompt was read in ``layer``: the parts act on it, up to one that spans layers; the rest waits for that."""
        self._asked.append((layer.recent or query).last(max(1, self.recipe.query_window)))
        for number, part in enumerate(self.recipe.parts):
            part.after_prefill(layer.view(number, query))
            if part.spans_layers:
                break

    def finish_prompt(self) -> None:
        """After the last layer: decisions across layers, and the parts that waited for them."""
        waited = False
        for number, part in enumerate(self.recipe.parts):
            views = [layer.view(number, query) for layer, query in zip(self.layers, self._asked, strict=True)]
            if waited:
                for view in views:
                    part.after_prefill(view)
            part.after_prompt(views)
            waited = waited or part.spans_layers
        self._asked = []
        if self._hidden is not None:
            self._hidden.stop()
        for layer in self.layers:
            self.note_bytes(layer)

    def clone(self, recipe: Recipe | None = None) -> WorkbenchCache:
        """Fork: the twin shares all storage held now. A new recipe applies from the next step on."""
        tap = self.tap if self.tap is not None and self.tap.live else None
        twin = WorkbenchCache(recipe or self.recipe, self.geometry, self.prompt_length, (), self.artifacts, tap)
        twin.layers = [layer.clone(twin) for layer in self.layers]
        for below, layer in pairwise(twin.layers):
            layer.store.rest_on(below.store)
        if recipe is not None:
            for layer in twin.layers:
                layer.states = [{} for _ in recipe.parts]
        twin.peak_bytes, twin._layer_bytes = self.peak_bytes, list(self._layer_bytes)
        twin._chunk_bytes, twin._before_chunk = list(self._chunk_bytes), self._before_chunk
        if twin._hidden is not None and self.get_seq_length() >= (self.prompt_length or 1):
            twin._hidden.stop()  # the prompt is read
        return twin

    def memory(self) -> Memory:
        """The bytes held now, by layer, head and kind."""
        by_layer = [sum(layer.nbytes().values()) for layer in self.layers]
        by_kind: dict[str, int] = {}
        for layer in self.layers:
            for kind, size in layer.nbytes().items():
                by_kind[kind] = by_kind.get(kind, 0) + size
        heads = self.geometry.num_kv_heads
        by_head = []
        for layer in self.layers:
            rows = layer.store.nbytes_by_row()
            by_head.append([sum(rows[h::heads]) for h in range(heads)] if layer.is_initialized else [0] * heads)
        reserved = sum(layer.store.reserved_bytes() for layer in self.layers)
        factors = {id(f): f for layer in self.layers for segment in layer.store.segments for f in segment.factors()}
        shared = sum(factor.numel() * factor.element_size() for factor in factors.values())
        return Memory(sum(by_layer), reserved, max(self.peak_bytes, sum(by_layer)), by_layer, by_kind, by_head, shared)

    def kept(self, layer: int, kv_head: int, batch: int = 0) -> list[int]:
        """Positions one head still holds, ascending."""
        store = self.layers[layer].store
        if not 0 <= kv_head < store.heads:
            raise WorkbenchError(f"KV head {kv_head} does not exist; this model has heads 0 to {store.heads - 1}.")
        return sorted(store.positions(batch * store.heads + kv_head).tolist())
