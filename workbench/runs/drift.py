"""``wb.drift``: a lane and the reference fed the same tokens, and compared in what they hold and what they read.

The lane's prompt is compressed once more, so a comparison itself pays nothing for it. Three caches then go through the
reference's answer in step: the reference's; the lane's with its own activations (*propagated*); and the lane's whose layers
are each given the reference's queries, keys and values (*local*).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.cache.cache import WorkbenchCache
from workbench.errors import RecipeError, WorkbenchError
from workbench.inspection.drift_table import Drift, Reads, collect
from workbench.inspection.reading import Reading, layer_error, read_drift, take_reading
from workbench.inspection.storage import SMALL, common_entries, head_drift, vector_drift
from workbench.models.projections import output_weight
from workbench.runs.control import Control
from workbench.runs.prompt import Cancelled, forward, read
from workbench.strategies.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workbench.cache.layer import WorkbenchLayer
    from workbench.cache.segments import Query
    from workbench.models.load import Model
    from workbench.runs.lane import Comparison


class Watch:
    """A probe that notes, per layer, what the last query of a step finds and gets."""

    def __init__(self, then: Callable[[WorkbenchLayer, Query], None] | None = None) -> None:
        self.then = then
        self.readings: list[list[Reading]] = []  # per layer and row
        self.outputs: list[Tensor] = []  # per layer [Hq, D]

    def on_attention(self, layer: WorkbenchLayer, query: Query, out: Tensor) -> None:
        self.readings.append([take_reading(layer, query, row) for row in range(layer.store.heads)])
        self.outputs.append(out[0, :, -1])
        if self.then is not None:
            self.then(layer, query)


class Local:
    """A lane's cache whose layers are fed what the reference's layers were given."""

    def __init__(self, cache: WorkbenchCache) -> None:
        self.cache, self.watch = cache, Watch()
        cache.probes.append(self.watch)

    def follow(self, layer: WorkbenchLayer, query: Query) -> None:
        """The same layer of the lane appends what the reference's just appended, and attends with its queries."""
        ours = self.cache.layers[layer.index]
        if query.own:
            fed = [layer.store.entries(row) for row in range(layer.store.heads)]
            new = query.q.shape[2]
            ours.inputs = layer.inputs
            ours.update(*(torch.stack([x[side][-new:] for x in fed])[None] for side in (0, 1)))
        ours.module = layer.module
        ours.attend(
            query.q, query.scale, window=query.window, softcap=query.softcap, sinks=query.sinks, padding=None
        )  # fmt: skip


def drifting(
    cmp: Comparison, lane: int, *, steps: int = 16, floor: bool = True, answer: int = 0, control: Control | None = None
) -> Generator[tuple[int, int], None, Drift]:
    """The work of :func:`drift`.

    Yields:
        (done, total) of its pieces.

    Raises:
        Cancelled: ``control`` was cancelled.
    """
    control = control or Control()
    recipe, reference = Recipe.parse(cmp[lane].resolved), Recipe.parse(cmp[cmp.reference].resolved)
    theirs = cmp.trace.answers[answer]
    question = cmp[cmp.reference].answers[answer].question
    asked = [] if question is None else cmp.model.encode(question, continues=True)
    fed = [asked, *([token] for token in theirs.tokens[:-1][: steps - 1])]
    total, done = (2 if floor else 1) * len(fed), 0
    found = []
    # The floor comes first: the reference once more, in chunks that are cut elsewhere.
    for one, chunk in [(reference, min(cmp.chunk, len(cmp.prompt)) // 2 + 1)] * floor + [(recipe, cmp.chunk)]:
        work = _measure(cmp, one, reference, chunk, fed, control)
        while True:
            try:
                next(work)
            except StopIteration as finished:
                found.append(finished.value)
                break
            done += 1
            yield done, total
    result: Drift = found[-1]
    result.floor = found[0] if floor else None
    return result


def drift(
    cmp: Comparison,
    lane: int = 1,
    *,
    steps: int = 16,
    floor: bool = True,
    answer: int = 0,
    control: Control | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Drift:
    """How far a lane is from the reference in what it holds, and in what it reads at each of the reference's tokens.

    Args:
        cmp: from :func:`workbench.compare`.
        lane: which of its lanes.
        steps: tokens of the reference's answer to follow, at most.
        floor: measure the noise floor too: the reference read once more in other chunks.
        answer: which question's answer.
        control: to cancel from another thread.
        on_progress: called with the pieces done and all there are.

    Raises:
        WorkbenchError: the reference or the lane did not finish, or the run was cancelled.
    """
    if not 0 <= lane < len(cmp):
        raise WorkbenchError(f"There is no lane {lane}; this comparison has lanes 0 to {len(cmp) - 1}.")
    if cmp[lane].error is not None:
        raise WorkbenchError(f"The lane {cmp[lane].recipe} failed, so there is nothing to measure: {cmp[lane].error}")
    if steps < 1:
        raise WorkbenchError(f"steps must be at least 1, got {steps}.")
    if not 0 <= answer < len(cmp.trace.answers):
        raise WorkbenchError(f"There is no answer {answer}; there are answers 0 to {len(cmp.trace.answers) - 1}.")
    work = drifting(cmp, lane, steps=steps, floor=floor, answer=answer, control=control)
    while True:
        try:
            pieces = next(work)
        except StopIteration as finished:
            result: Drift = finished.value
            return result
        except Cancelled:
            raise WorkbenchError("Measuring the drift was cancelled; run it again.") from None
        if on_progress is not None:
            on_progress(*pieces)


def _measure(
    cmp: Comparison, recipe: Recipe, reference: Recipe, chunk: int, fed: list[list[int]], control: Control
) -> Generator[None, None, Drift]:
    """Read the prompt under a recipe and follow the reference's answer; yields after each step."""
    model, prompt = cmp.model, cmp.prompt
    own = WorkbenchCache(recipe, model.geometry, len(prompt), artifacts=model.artifacts)
    for _ in read(model, own, prompt, chunk, control):
        pass
    base = cmp.trace.cache.clone()
    with torch.inference_mode():
        heads = [
            [head_drift(a.store, b.store, row, len(prompt)) for row in range(a.store.heads)]
            for a, b in zip(base.layers, own.layers, strict=True)
        ]
    local = Local(own.clone())
    if own.tap is not None:  # a cache of layer inputs: the local one is given the reference's
        own.tap.add(base)
    found: dict[str, list[dict[str, Tensor]]] = {"local": [], "propagated": []}
    errors: dict[str, list[Tensor]] = {"local": [], "propagated": []}
    for ids in fed:
        if control.cancelled:
            raise Cancelled
        theirs, ours = Watch(local.follow), Watch()
        with _step(local.cache, not ids):
            _feed(model, base, theirs, prompt, ids)
        _feed(model, own, ours, prompt, ids)
        for mode, watch in (("local", local.watch), ("propagated", ours)):
            found[mode].append(_compare(theirs, watch))
            errors[mode].append(_layer_errors(base, theirs, watch))
        local.watch.readings, local.watch.outputs = [], []
        yield
    reads = {
        mode: Reads({name: torch.stack([step[name] for step in of]) for name in of[0]}, torch.stack(errors[mode]))
        for mode, of in found.items()
    }
    turned = any(getattr(part, "rerotate", False) for part in recipe.parts)
    with torch.inference_mode():
        decoded = _decoded(base, own, len(prompt))
    return collect(recipe.text, reference.text, heads, reads["local"], reads["propagated"], decoded, turned)


@contextmanager
def _step(cache: WorkbenchCache, replayed: bool) -> Iterator[None]:
    """The local cache appends in this step, or only answers again."""
    if not replayed:
        yield
        return
    with cache.replay():
        yield


def _feed(model: Model, cache: WorkbenchCache, watch: Watch, prompt: list[int], ids: list[int]) -> None:
    """One step: new tokens, or the prompt's last one asked once more."""
    cache.probes.append(watch)
    try:
        if ids:
            forward(model, cache, ids)
        else:
            with cache.replay():
                forward(model, cache, prompt[-1:], len(prompt) - 1)
    finally:
        cache.probes.remove(watch)


def _compare(theirs: Watch, ours: Watch) -> dict[str, Tensor]:
    """Read drift of one step, by name float32 [L, Hq]."""
    layers = []
    for a, b in zip(theirs.readings, ours.readings, strict=True):
        rows = [read_drift(x, y) for x, y in zip(a, b, strict=True)]
        layers.append({name: torch.cat([row[name] for row in rows]).cpu() for name in rows[0]})
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}


def _layer_errors(base: WorkbenchCache, theirs: Watch, ours: Watch) -> Tensor:
    """CompressKV's layer error of one step, float32 [L]; NaN where the output projection cannot be read."""
    out = []
    for layer, a, b in zip(base.layers, theirs.outputs, ours.outputs, strict=True):
        assert layer.module is not None
        try:
            out.append(layer_error(a, b, output_weight(layer.module, a.shape[0])))
        except RecipeError:
            out.append(float("nan"))
    return torch.tensor(out)


def _decoded(base: WorkbenchCache, own: WorkbenchCache, start: int) -> tuple[Tensor, Tensor]:
    """Relative error of keys and values of the tokens from ``start`` on: two of float32 [L, H, tokens]."""
    tokens = base.layers[0].seen - start
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for theirs, ours in zip(base.layers, own.layers, strict=True):
        for row in range(theirs.store.heads):
            k_r, v_r, at_r = theirs.store.entries(row)
            k_s, v_s, at_s = ours.store.entries(row)
            first, second = common_entries(at_r, at_s)
            fed = at_s[second] >= start
            first, second = first[fed], second[fed]
            for side, x_r, x_s in ((0, k_r, k_s), (1, v_r, v_s)):
                laid = torch.full((tokens,), float("nan"))
                eps = SMALL * float(x_r.float().norm(dim=-1).median())
                error = vector_drift(x_r[first], x_s[second], eps).relative
                laid[(at_s[second].long() - start).cpu()] = error.cpu()
                sides[side].append(laid)
    heads = base.layers[0].store.heads
    keys, values = (torch.stack(side).unflatten(0, (-1, heads)) for side in sides)
    return keys, values
