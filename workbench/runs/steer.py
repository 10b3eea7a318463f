"""What a person does to a lane while it generates: evict, protect and restore entries, or go on with another recipe.

Everything done is an :class:`Edit` at a token, so a lane is its recipe, its tokens and its edits, and can be made again
from its prompt. Axes: B batch, H KV heads, n entries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from workbench.cache.coded import CodedSegment
from workbench.cache.ragged import RaggedSegment
from workbench.cache.segments import DenseSegment, Query, Segment
from workbench.errors import RecipeError, WorkbenchError
from workbench.runs.prompt import SNAPSHOT_WINDOW
from workbench.strategies.recipe import Recipe

if TYPE_CHECKING:
    from workbench.cache.cache import WorkbenchCache
    from workbench.cache.layer import WorkbenchLayer
    from workbench.models.geometry import Geometry

TOO_LATE = (
    "The question was read already, and the first token follows from it; edit the lane before a later token, or after its "
    "prompt (token 0) in a fork."
)
FIXED = "The reference lane stays as it is, because the others are compared with it; fork it, and steer the fork."
Action = Literal["evict", "protect", "restore", "recipe"]


@dataclass(frozen=True)
class Edit:
    """Something done to a lane before its token number ``token`` was chosen; the last token is then asked again. At token 0
    it is done right after the prompt, before a question is fed.

    Attributes:
        action: "evict" frees entries; "restore" puts back exactly the reference's entries of prompt tokens; "protect" does
            that where they are gone, and no strategy drops them from then on; "recipe" goes on with another recipe, which
            acts on what is held as it would after a prompt.
        recipe: the recipe to go on with.
        positions: of the tokens meant.
        layers: the layers meant; None for all.
        kv_heads: the KV heads meant, each with its group of query heads; None for all.
    """

    token: int
    action: Action
    recipe: str = ""
    positions: tuple[int, ...] = ()
    layers: tuple[int, ...] | None = None
    kv_heads: tuple[int, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        if self.action == "recipe":
            return {"token": self.token, "action": self.action, "recipe": self.recipe}
        meant = {"positions": self.positions, "layers": self.layers, "kv_heads": self.kv_heads}
        return {"token": self.token, "action": self.action} | {
            name: None if numbers is None else list(numbers) for name, numbers in meant.items()
        }


@dataclass(frozen=True)
class Script:
    """What a lane is to do again: its first tokens, already chosen, and what was done to it on the way.

    Attributes:
        stop: the token before which it stops; None where it goes on to the end.
        strict: whether an edit that changes nothing is an error.
    """

    tokens: tuple[int, ...] = ()
    edits: tuple[Edit, ...] = ()
    stop: int | None = None
    strict: bool = True


class RecentQueries:
    """A probe that knows each layer's last queries, those of the prompt before them, at hardly any cost a step."""

    def __init__(self, prompt: Sequence[Query], window: int = SNAPSHOT_WINDOW) -> None:
        self.window = window
        self._steps = [deque([query], maxlen=window) for query in prompt]

    def on_attention(self, layer: WorkbenchLayer, query: Query, out: Tensor) -> None:
        if not layer.cache.replaying:  # asked once more, not a new query
            self._steps[layer.index].append(query if query.q.shape[2] <= self.window else query.last(self.window))

    def copy(self) -> RecentQueries:
        twin = RecentQueries((), self.window)
        twin._steps = [deque(steps, maxlen=self.window) for steps in self._steps]
        return twin

    def take(self) -> list[Query]:
        """Per layer the last ``window`` queries."""
        out = []
        for first, *later in self._steps:
            for query in later:
                first = query.last(self.window, first)
            out.append(first)
        return out


@dataclass(frozen=True)
class Steering:
    """What editing a lane while it generates takes.

    Attributes:
        asked: the token that was fed last before the first one is generated.
        later: whether it is a question's, fed after the prompt was compressed.
        recent: a probe of the lane's cache that knows the last queries, the prompt's among them.
        source: the reference's cache after the prompt, from which entries can be restored.
        script: tokens already chosen, and edits to do on the way.
    """

    asked: int
    later: bool
    recent: RecentQueries
    source: WorkbenchCache | None = None
    script: Script = Script()


def check_edit(edit: Edit, geometry: Geometry, artifacts: Any) -> None:
    """Raise, in one sentence, where an edit cannot mean anything for this model, before anything runs."""
    if edit.action == "recipe":
        recipe = Recipe.parse(edit.recipe)
        recipe.check(geometry, artifacts)
        late = [p for p in recipe.parts if p.needs_prompt or p.needs_token_set or p.needs_hidden or p.needs_inputs]
        if late or recipe.query_window > SNAPSHOT_WINDOW:
            key = late[0].key if late else recipe.parts[0].key
            raise RecipeError(
                f"{key} has to watch the prompt being read, so a lane cannot go on with it; give it a lane of its own, "
                "or go on with one that looks at the last queries only, such as snapkv."
            )
        return
    if not edit.positions:
        raise WorkbenchError(f"There is no token to {edit.action}; name at least one position.")
    for name, numbers, most in (
        ("layer", edit.layers, geometry.num_layers),
        ("KV head", edit.kv_heads, geometry.num_kv_heads),
    ):
        for number in numbers or ():
            if not 0 <= number < most:
                raise WorkbenchError(f"There is no {name} {number}; this model has {name}s 0 to {most - 1}.")


def apply_edit(
    edit: Edit, cache: WorkbenchCache, reference: WorkbenchCache | None, queries: Sequence[Query], strict: bool = True
) -> WorkbenchCache:
    """Do it to a cache; a cache that cannot take it is left as it was.

    Args:
        reference: the reference's cache after the prompt, from which entries are restored.
        queries: per layer, the last ones asked, with which another recipe votes.
        strict: whether an edit that changes nothing is an error.

    Returns:
        The cache to go on with: the same, or another that shares its storage.
    """
    check_edit(edit, cache.geometry, cache.artifacts)
    if edit.action == "recipe":
        return _with_recipe(cache, Recipe.parse(edit.recipe), queries)
    seen = cache.get_seq_length()
    outside = [p for p in edit.positions if not 0 <= p < seen]
    if outside:
        raise WorkbenchError(f"There is no token {outside[0]:,} yet; the lane has seen tokens 0 to {seen - 1:,}.")
    closing = next((part for part in cache.recipe.parts if part.closing), None)
    if closing is not None or not all(_editable(s) for layer in cache.layers for s in layer.store.segments):
        key = (closing or cache.recipe.parts[-1]).key
        raise WorkbenchError(
            f"{key} holds entries in a form from which none can be taken out or put back; edit a lane without it."
        )
    losses = _evictions(edit, cache) if edit.action == "evict" else {}
    gains = {} if edit.action == "evict" else _restorations(edit, cache, reference)
    if strict and not (losses or gains or (edit.action == "protect" and _holds_any(edit, cache))):
        were = "none of these heads holds it" if edit.action == "evict" else "all of these heads hold it already"
        raise WorkbenchError(f"There is nothing to {edit.action}, because {were}; choose another token or head.")
    with torch.inference_mode():
        for index, rows in losses.items():
            layer = cache.layers[index]
            even = len({len(row) for row in rows}) == 1
            layer.keep(torch.stack(rows).unflatten(0, (layer.store.batch, layer.store.heads)) if even else rows)
        for index, segment in gains.items():
            cache.layers[index].store.segments.insert(0, segment)
            cache.note_bytes(cache.layers[index])
        for index, _ in _meant(edit, cache):
            if edit.action == "protect":
                cache.layers[index].protect(edit.positions, edit.kv_heads)
            elif edit.action == "evict":
                cache.layers[index].unprotect(edit.positions, edit.kv_heads)
    return cache


def edited(
    edit: Edit, cache: WorkbenchCache, source: WorkbenchCache | None, recent: RecentQueries, strict: bool
) -> WorkbenchCache:
    """:func:`apply_edit` to a cache that is being generated with: its probes go on to the one that takes its place."""
    changed = apply_edit(edit, cache, source, recent.take(), strict)
    if changed is not cache:
        changed.probes, cache.probes = cache.probes, []
    return changed


def _editable(segment: Segment) -> bool:
    if isinstance(segment, RaggedSegment):
        return all(_editable(row) for row in segment.rows)
    return type(segment) in (DenseSegment, CodedSegment)


def _meant(edit: Edit, cache: WorkbenchCache) -> list[tuple[int, list[int]]]:
    """Layers, and of each the rows, that an edit is about."""
    layers = range(len(cache.layers)) if edit.layers is None else edit.layers
    return [
        (
            index,
            [
                row
                for row in range(cache.layers[index].store.rows)
                if edit.kv_heads is None or row % cache.layers[index].store.heads in edit.kv_heads
            ],
        )
        for index in sorted(set(layers))
    ]


def _holds_any(edit: Edit, cache: WorkbenchCache) -> bool:
    return any(
        set(cache.layers[layer].store.positions(row).tolist()) & set(edit.positions)
        for layer, rows in _meant(edit, cache)
        for row in rows
    )


def _even_still(cache: WorkbenchCache, layer: int, lengths: set[int], word: str) -> None:
    if cache.recipe.keeps_acting and len(lengths) > 1:
        raise WorkbenchError(
            f"'{cache.recipe.text}' acts at every token, which needs heads of equal length, and layer {layer}'s would differ "
            f"after this; {word} the token in all heads of the layer that hold equally many."
        )


def _evictions(edit: Edit, cache: WorkbenchCache) -> dict[int, list[Tensor]]:
    """Per layer that loses something: the entry numbers that each row keeps."""
    found: dict[int, list[Tensor]] = {}
    for index, meant in _meant(edit, cache):
        store = cache.layers[index].store
        rows = []
        for row in range(store.rows):
            at = store.positions(row)
            gone = torch.isin(at, torch.tensor(edit.positions, dtype=at.dtype, device=at.device))
            kept = (~gone if row in meant else torch.ones_like(gone)).nonzero().squeeze(-1)
            if not len(kept):
                raise WorkbenchError(
                    f"Layer {index}'s KV head {row % store.heads} would hold nothing at all; leave it at least one token."
                )
            rows.append(kept)
        if [len(row) for row in rows] != store.lengths:
            _even_still(cache, index, {len(row) for row in rows}, "evict")
            found[index] = rows
    return found


def _restorations(edit: Edit, cache: WorkbenchCache, reference: WorkbenchCache | None) -> dict[int, Segment]:
    """Per layer that gets something back: the reference's entries, as a segment of their own."""
    if reference is None:
        raise WorkbenchError("The reference lane did not finish, so there is nothing to restore from; run it again.")
    found: dict[int, Segment] = {}
    for index, meant in _meant(edit, cache):
        layer = cache.layers[index]
        store, source = layer.store, reference.layers[index].store
        rows = []
        for row in range(store.rows):
            held = set(store.positions(row).tolist())
            wanted = [p for p in sorted(set(edit.positions)) if row in meant and p not in held]
            k, v, at = source.entries(row)
            places = (at[:, None] == torch.tensor(wanted, dtype=at.dtype, device=at.device)).nonzero()
            if len(places) < len(wanted):
                raise WorkbenchError(
                    f"The reference does not hold token {wanted[0]:,} of the prompt in layer {index}, KV head "
                    f"{row % store.heads}; only what it holds after the prompt can be restored."
                )
            order = places[:, 0]
            rows.append(tuple(side[order][None, None] for side in (k, v, at)))
        lengths = {n + part[2].shape[-1] for n, part in zip(store.lengths, rows, strict=True)}
        if not any(part[2].shape[-1] for part in rows):
            continue
        _even_still(cache, index, lengths, edit.action)
        if any(part.per_entry & state.keys() for part, state in zip(cache.recipe.parts, layer.states, strict=True)):
            raise WorkbenchError(
                f"'{cache.recipe.text}' has noted how each entry was read so far, which a restored one would lack; restore "
                "it in a lane with another recipe, or fork this one first."
            )
        if len({part[2].shape[-1] for part in rows}) == 1:
            k, v, at = (
                torch.cat(side).view(store.batch, store.heads, *side[0].shape[2:]) for side in zip(*rows, strict=True)
            )
            found[index] = DenseSegment.of(k, v, at)
        else:
            found[index] = RaggedSegment([DenseSegment.of(*part) for part in rows], store.heads)
    return found


def _with_recipe(cache: WorkbenchCache, recipe: Recipe, queries: Sequence[Query]) -> WorkbenchCache:
    """A cache that holds what ``cache`` holds and goes on with ``recipe``, which acts on it first.

    Dense entries are shared. Entries held as codes are decoded: what they lost does not come back, their bytes do.
    """
    if recipe == cache.recipe:
        return cache
    ragged = next((i for i, layer in enumerate(cache.layers) if not layer.store.uniform), None)
    scored = [part for part in recipe.parts if part.family == "eviction"]
    if ragged is not None and scored:
        raise RecipeError(
            f"{scored[0].key} needs heads that hold equally many tokens, and those of layer {ragged} do not; go on with "
            "'full' or a codec, or fork from a lane that keeps as many in every head."
        )
    twin = cache.clone(recipe)
    with torch.inference_mode():
        for layer in twin.layers:
            layer.store.decode()
        twin.prompt_length = cache.get_seq_length()
        for layer, query in zip(twin.layers, queries, strict=True):
            twin.finish_layer(layer, query)
            twin.note_bytes(layer)
        twin.finish_prompt()
    return twin
