"""The cache layer handed to transformers, and the view of it that strategies work on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from workbench.cache.growable import MIN_SPARE
from workbench.cache.inputs import NO_INPUT
from workbench.cache.segments import Query, Segment, UniformSegment, causal_mask, entry_mask
from workbench.cache.store import Codec, Store, sink_share
from workbench.errors import ArtifactError, WorkbenchError
from workbench.models.projections import key_weight, output_weight
from workbench_kernels import attention_sums

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from workbench.cache.cache import WorkbenchCache
    from workbench.models.artifacts import Artifact
    from workbench.models.geometry import Geometry
    from workbench.models.rebuild import Rebuild
    from workbench.models.rope import Rope
    from workbench.strategies.base import Declared


SWEEP = 64  # tokens between two clearings of what a sliding window has passed


class LayerView:
    """One layer as a strategy sees it. Axes: B batch, H KV heads, G group, n entries, D head_dim.

    Attributes:
        layer: index of the layer.
        prompt_length: tokens of the prompt.
        in_prompt: whether the chunk just attended began in the prompt; False while generating.
        seen: tokens seen so far, kept or not, those that stayed behind in an earlier layer included.
        chunk: queries of the chunk just attended [B, Hq, Tq, D], after RoPE; after the last layer, the end of it.
        state: this strategy's own tensors for this layer; counted as cache memory.
    """

    def __init__(self, owner: WorkbenchLayer, query: Query, part: int) -> None:
        self._owner, self._query, self._part, self.state = owner, query, part, owner.states[part]
        self.layer, self.seen = owner.index, owner.seen
        self.prompt_length = owner.cache.prompt_length or owner.seen
        self.in_prompt = query.start < self.prompt_length
        self.chunk = query.q

    @property
    def batch(self) -> int:
        return self._owner.store.batch

    @property
    def kv_heads(self) -> int:
        return self._owner.store.heads

    @property
    def num_layers(self) -> int:
        return len(self._owner.cache.layers)

    @property
    def geometry(self) -> Geometry:
        """The model's."""
        return self._owner.cache.geometry

    def prompt_entries(self) -> list[int]:
        """Entries that each layer of the model can hold of the prompt: all, or what its sliding window leaves."""
        windows = (layer.sliding_window for layer in self._owner.cache.layers)
        return [self.prompt_length if window is None else min(window, self.prompt_length) for window in windows]

    def artifact(self, part: Declared) -> Artifact:
        """What was calibrated or trained for this model and ``part`` (a strategy, allocator or selector) needs."""
        cache = self._owner.cache
        if cache.artifacts is None or part.artifact_kind is None:
            raise ArtifactError(
                f"{part.key} asks for an artifact that was not checked for before the run; report this."
            )
        return cache.artifacts.get(part.artifact_kind, part.artifact_path)

    def earlier(self) -> list[LayerView]:
        """The layers before this one, to look at what they hold and to drop more of it."""
        return [layer.view(self._part, self._query) for layer in self._owner.cache.layers[: self.layer]]

    def asked(self) -> Tensor:
        """int64 [Tq], ascending: the position of every query of the chunk; with gaps where tokens stayed behind."""
        return self._query.asked()

    @property
    def scale(self) -> float:
        return self._query.scale

    @property
    def rope(self) -> Rope:
        """How this layer turns its queries and keys by position; a strategy's ``check`` asks for it beforehand."""
        return self._owner.cache.geometry.ropes[self.layer]

    @property
    def rebuild(self) -> Rebuild:
        """How this layer makes keys and values of its input; a strategy's ``check`` asks for it beforehand."""
        return self._owner.cache.geometry.rebuilds[self.layer]

    def inputs(self) -> Tensor:
        """[B, Tq, hidden]: the attention module's input, after its norm, for the chunk just attended.

        Of a strategy whose ``needs_inputs`` is True.
        """
        if self._owner.inputs is None:
            raise WorkbenchError(NO_INPUT)
        return self._owner.inputs

    @property
    def window(self) -> int | None:
        """Tokens that this layer sees; None for full attention."""
        return self._query.window

    @property
    def length(self) -> int:
        """Entries held by every row (rows must be of equal length)."""
        return self._owner.store.lengths[0]

    def keys(self) -> Tensor:
        """[B, H, n, D] decoded, after RoPE."""
        return self._owner.store.keys()

    def values(self) -> Tensor:
        """[B, H, n, D] decoded."""
        return self._owner.store.values()

    def positions(self) -> Tensor:
        """int32 [B, H, n]: the position of every entry in the token sequence."""
        return self._owner.store.all_positions()

    def output_weight(self) -> Tensor:
        """[Hq, D, hidden]: what the model multiplies each query head's output by. RecipeError where it has no such."""
        assert self._owner.module is not None
        return output_weight(self._owner.module, self.chunk.shape[1])

    def hidden(self) -> Tensor:
        """[B, Tq, hidden]: what entered the layer with the chunk just attended, before any norm. Only in ``on_chunk``."""
        assert self._owner.hidden is not None
        return self._owner.hidden

    @property
    def head_dim(self) -> int:
        return self.chunk.shape[-1]

    def key_weight(self) -> Tensor:
        """[H, D, hidden]: the rows of the model's key projection. RecipeError where it has no such."""
        assert self._owner.module is not None
        return key_weight(self._owner.module, self.chunk.shape[1], self.kv_heads, self.head_dim)

    def queries(self, window: int) -> Tensor:
        """The last ``window`` queries [B, Hq, min(window, seen), D], after RoPE."""
        return self._recent.q[:, :, -window:]

    @property
    def _recent(self) -> Query:
        return self._query if self._owner.recent is None else self._owner.recent

    def window_attention(self, window: int) -> Tensor:
        """Softmax weights of the last ``window`` queries over all n entries: float32 [B, H, G, W, n], causal."""
        q = self.queries(window)
        keys = self.keys()
        grouped = q.unflatten(1, (self.kv_heads, -1))  # [B, H, G, W, D]
        logits = torch.einsum("bhgwd,bhtd->bhgwt", grouped.float(), keys.float()) * self.scale
        if self._query.softcap is not None:
            logits = self._query.softcap * torch.tanh(logits / self._query.softcap)
        asked = self._recent.asked()[-q.shape[2] :]
        at = self.positions()[:, :, None, None, :]
        hidden = at > asked[:, None]
        if self._query.window is not None:
            hidden = hidden | (at <= asked[:, None] - self._query.window)
        logits = logits.masked_fill(hidden, float("-inf"))
        weights = logits.softmax(-1).nan_to_num(0.0)  # a query all of whose entries are gone pays nothing
        if self._query.sinks is not None:
            share = sink_share(logits.logsumexp(-1).flatten(1, 2), self._query.sinks)  # [B, Hq, W]
            weights = weights * share.view(*weights.shape[:-1], 1)
        return weights

    def chunk_attention_sums(self, rows: Tensor | None = None) -> Tensor:
        """Attention each entry received from the chunk's queries, summed over them: float32 [B, Hq, n].

        Args:
            rows: numbers of the queries in the chunk that count, each as often as it comes; None for all.
        """
        q, causal = self._query, self._query.own
        mask = None if q.window is None else entry_mask(q, self.positions())
        if rows is not None:
            q, causal = replace(q, q=q.q[:, :, rows], at=q.asked()[rows]), False
            mask = causal_mask(q, self.positions())
        return attention_sums(q.q, self.keys(), q.scale, causal=causal, mask=mask, softcap=q.softcap, sinks=q.sinks)

    def protected(self) -> Tensor | None:
        """Entries that a person protected by hand: bool [B, H, n]; None if there are none."""
        by_head = self._owner.protected
        if not by_head:
            return None
        at = self.positions()
        mask = torch.zeros_like(at, dtype=torch.bool)
        for head, positions in by_head.items():
            meant = torch.tensor(sorted(positions), dtype=at.dtype, device=at.device)
            mask[:, head] = torch.isin(at[:, head], meant)
        return mask

    def note_scores(self, scores: Tensor) -> None:
        """Tell whoever inspects the run by what the entries held now are about to be chosen: [B, H, n], larger means keep.

        A later note of the same layer takes the place of an earlier one, entry by entry.
        """
        probe = self._owner.cache.score_probe
        if probe is not None:
            probe.on_scores(self.layer, self._part, scores, self.positions())

    def keep(self, index: Tensor | Sequence[Tensor], keys: Tensor | None = None) -> None:
        """Keep only these entries, maybe with other keys (see :meth:`Store.keep`); the rest is freed."""
        self._owner.keep(index, keys)

    def narrow_keys(self, channels: Tensor, recent: int) -> None:
        """Hold only some channels of older keys (see :meth:`Store.narrow_keys`); the rest is freed."""
        self._owner.store.narrow_keys(channels, recent)
        self._owner.cache.note_bytes(self._owner)

    @property
    def below(self) -> Segment:
        """How the layer before holds its entries, where one segment holds them all."""
        (segment,) = self._owner.cache.layers[self.layer - 1].store.segments
        return segment

    def pass_on(self, positions: Tensor) -> None:
        """Let only these tokens of the prompt go on to the next layer; the others stay behind for good.

        To be called from ``after_prefill`` by a strategy whose ``needs_token_set`` is True.

        Args:
            positions: int64 [m], ascending, of tokens that entered this layer; the prompt's last token among them.
        """
        cache = self._owner.cache
        if cache.drive is None:
            raise WorkbenchError(
                f"A strategy of '{cache.recipe.text}' lets tokens stay behind and did not say so beforehand; its "
                "needs_token_set must be True."
            )
        cache.drive.going_on = positions

    def recode(self, codec: Codec) -> None:
        """Hold this layer's entries by ``codec`` from now on."""
        self._owner.store.recode(codec)

    @property
    def codec(self) -> Codec | None:
        """How entries of this layer are held, once a strategy said so."""
        return self._owner.store.codec

    def go_on_with(self, codec: Codec) -> None:
        """Leave what is held as it is; what another strategy makes anew from now on is held by ``codec``."""
        self._owner.store.codec = codec

    def pieces(self) -> Iterator[tuple[UniformSegment, Query]]:
        """The layer's segment with the queries that asked, or every row's where rows hold different numbers."""
        return self._owner.store.pieces(self._query)


class WorkbenchLayer(CacheLayerMixin):
    """A transformers cache layer backed by a :class:`Store`.

    ``update`` returns only the new chunk's tensors, tagged with this layer; the registered attention function reads
    the tag and attends through the store.
    """

    is_croppable = False
    supports_early_init = False  # rows and dtype are known at the first chunk only

    def __init__(self, index: int, cache: WorkbenchCache, sliding_window: int | None) -> None:
        super().__init__()
        self.index, self.cache, self.sliding_window = index, cache, sliding_window
        self.is_sliding = sliding_window is not None
        self.store: Store = Store(1, 1)
        self.seen = 0
        self.prompt_tokens = 0  # tokens of the prompt that this layer was given
        self.module: torch.nn.Module | None = None  # the model's attention module, once it attended
        self.hidden: Tensor | None = None  # what entered the layer, while the prompt is read and a strategy asks for it
        self.inputs: Tensor | None = None  # of the attention module, for the chunk under way, if a strategy asks for it
        self.recent: Query | None = None  # the last queries, while the prompt is read and if a strategy votes with them
        self.states: list[dict[str, Tensor]] = [{} for _ in cache.recipe.parts]
        self.protected: dict[int, frozenset[int]] = {}  # per KV head: positions that no strategy may drop
        self._waiting = False

    # --- transformers' side -------------------------------------------------------------------------------------
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.store = Store(key_states.shape[0], key_states.shape[1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._waiting:
            raise WorkbenchError(
                f"Layer {self.index}'s attention did not run through this cache, so its output would ignore the past; "
                "call model.set_attn_implementation('workbench') before generating."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.store.batch:
            raise WorkbenchError(
                f"The batch changed from {self.store.batch} to {key_states.shape[0]} rows during generation; beam "
                "search is not supported by this cache, use greedy search or sampling."
            )
        if not self.cache.replaying:
            self.cache.note_prompt(key_states.shape[2])
            drive = self.cache.drive
            if drive is None and self.seen < (self.cache.prompt_length or 0) and self.cache.recipe.needs_token_set:
                raise self.cache.recipe.not_a_drop_in()
            if self.seen == 0:
                self.store.reserve(key_states, self._room(key_states.shape[2]))
            at = None if drive is None else drive.at
            if self.store.takes_inputs and self.inputs is not None:
                self.store.append_inputs(self.inputs, self.seen)
            else:
                self.store.append(key_states, value_states, self.seen, at)
            self.seen = self.seen + key_states.shape[2] if at is None else int(at[-1]) + 1
        self._waiting = True
        key_states._workbench_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens *seen*, not kept, so that positions stay true after eviction."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise WorkbenchError("This cache cannot reorder beams; use num_beams=1 (greedy search or sampling).")

    def reset(self) -> None:
        raise WorkbenchError("A workbench cache belongs to one run; make a new one with wb.cache(recipe, model).")

    def _room(self, chunk: int) -> int:
        """Entries to make room for at the first chunk: the prompt, or what a sliding window lets live of it."""
        prompt = max(chunk, self.cache.prompt_length or 0) if self.cache.drive is None else self.cache.drive.entering
        if self.sliding_window is not None:
            prompt = min(prompt, chunk + self.sliding_window + SWEEP)
        return prompt + MIN_SPARE

    # --- our side -----------------------------------------------------------------------------------------------
    def attend(
        self,
        q: Tensor,
        scale: float,
        *,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        padding: Tensor | None,
    ) -> Tensor:
        """Attention of q [B, Hq, Tq, D] over the store; then the recipe acts on this layer."""
        self._waiting = False
        cache = self.cache
        if padding is not None and cache.recipe.parts:
            raise WorkbenchError(
                f"The recipe '{cache.recipe.text}' cannot run on a padded batch; run prompts of different lengths one "
                "by one, or use 'full'."
            )
        at = None if cache.drive is None else cache.drive.at
        start = self.seen - q.shape[2] if at is None else int(at[0])
        query = Query(q, start, not cache.replaying, scale, window, softcap, padding, sinks, at)
        out = self.store.attend(query)
        for probe in cache.probes:
            probe.on_attention(self, query, out)
        if not cache.replaying:
            self._act(query)
        self.inputs = None
        return out

    def view(self, part: int, query: Query) -> LayerView:
        return LayerView(self, query, part)

    def _act(self, query: Query) -> None:
        cache, parts = self.cache, self.cache.recipe.parts
        prompt = cache.prompt_length or 0
        in_prompt = query.start < prompt
        ends_prompt = in_prompt and self.seen >= prompt
        if in_prompt:
            self.prompt_tokens += query.q.shape[2]
            self._remember(query)
            cache.note_chunk(self)
            for number, part in enumerate(parts):
                part.on_chunk(self.view(number, query))
            self.hidden = None
        if query.window is not None and (ends_prompt or self.seen // SWEEP > query.start // SWEEP):
            self.store.drop_before(self.seen - query.window)
        if ends_prompt:
            cache.finish_layer(self, query)
            self.recent = None
        elif not in_prompt:
            for number, part in enumerate(parts):
                part.after_step(self.view(number, query))
        if not in_prompt:
            self.store.settle()
        cache.note_bytes(self)
        if ends_prompt and self.index == len(cache.layers) - 1:
            cache.finish_prompt()

    def _remember(self, query: Query) -> None:
        window = self.cache.recipe.query_window
        if window:
            self.recent = query.last(window, self.recent)  # a copy, so that the rest of the chunk can be freed

    def keep(self, index: Tensor | Sequence[Tensor], keys: Tensor | None = None) -> None:
        """Keep only these entries, and what every part of the recipe noted of each of them."""
        if isinstance(index, Tensor):  # heads of different lengths are cut once only, and notes are then done with
            for part, state in zip(self.cache.recipe.parts, self.states, strict=True):
                for name in part.per_entry & state.keys():
                    noted = state[name]  # [B, H, n]; a sliding window may have dropped the oldest entries meanwhile
                    state[name] = noted[..., noted.shape[-1] - self.store.lengths[0] :].gather(-1, index)
        self.store.keep(index, keys)
        self.cache.note_bytes(self)

    def protect(self, positions: Sequence[int], kv_heads: Sequence[int] | None) -> None:
        """No strategy may drop these positions from now on, in these KV heads (None: all)."""
        for head in range(self.store.heads) if kv_heads is None else kv_heads:
            self.protected[head] = self.protected.get(head, frozenset()) | frozenset(positions)

    def unprotect(self, positions: Sequence[int], kv_heads: Sequence[int] | None) -> None:
        """Strategies may drop these positions again."""
        for head in list(self.protected) if kv_heads is None else kv_heads:
            self.protected[head] = self.protected.get(head, frozenset()) - frozenset(positions)

    def nbytes(self) -> dict[str, int]:
        """Bytes in use by kind, the strategies' own state included."""
        held = self.store.nbytes() if self.is_initialized else {}
        state = sum(t.numel() * t.element_size() for s in self.states for t in s.values())
        return {**held, "scores": state} if state else held

    def clone(self, cache: WorkbenchCache) -> WorkbenchLayer:
        twin = WorkbenchLayer(self.index, cache, self.sliding_window)
        twin.store, twin.seen, twin.is_initialized = self.store.clone(), self.seen, self.is_initialized
        twin.module, twin.recent, twin.prompt_tokens = self.module, self.recent, self.prompt_tokens
        twin.protected = dict(self.protected)
        twin.states = [dict(state) for state in self.states]  # strategies replace tensors, never write into them
        return twin
