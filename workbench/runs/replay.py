"""Looking closer at lanes that have run: the prompt compressed, or the reference's answer fed, once more with a probe.

What is measured here is paid for when somebody asks, so a run itself pays nothing for it. A replay does the run's own
computations in the run's own order.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from workbench.cache.cache import WorkbenchCache
from workbench.inspection.numbers import HeldNumbers, compare_numbers
from workbench.inspection.overlap import held_masks
from workbench.inspection.retained import RetainedMass
from workbench.inspection.scores import ScoreLog
from workbench.runs.control import Control
from workbench.runs.prompt import Cancelled, forward, read
from workbench.strategies.recipe import Recipe

if TYPE_CHECKING:
    from workbench.models.load import Model
    from workbench.runs.lane import Lane
    from workbench.runs.prompt import Snapshot
    from workbench.runs.reference import ReferenceRun

T = TypeVar("T")


def finish(work: Generator[int, None, T]) -> T:
    """Run a generator of progress to its end, for its result."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value


def scored(
    model: Model,
    prompt: list[int],
    recipe: str,
    chunk: int = 2048,
    control: Control | None = None,
    snapshot: Snapshot | None = None,
) -> Generator[int, None, tuple[ScoreLog, WorkbenchCache]]:
    """Compress a prompt under a recipe and keep the scores by which entries were chosen.

    Args:
        snapshot: of this prompt; where it serves the recipe, nothing is read again.

    Yields:
        Tokens read so far.

    Returns:
        The scores, and the cache as the lane had it after the prompt.

    Raises:
        Cancelled: ``control`` was cancelled.
    """
    parsed = Recipe.parse(recipe)
    log = ScoreLog(model.geometry.num_layers, len(prompt))
    if snapshot is not None and snapshot.serves(parsed):
        yield len(prompt)
        return log, snapshot.fork(parsed, log)
    cache = WorkbenchCache(parsed, model.geometry, len(prompt), artifacts=model.artifacts)
    cache.score_probe = log
    yield from read(model, cache, prompt, chunk, control or Control())
    cache.score_probe = None
    return log, cache


def numbers(
    model: Model,
    reference: WorkbenchCache,
    prompt: list[int],
    recipe: str,
    chunk: int = 2048,
    control: Control | None = None,
    snapshot: Snapshot | None = None,
) -> Generator[int, None, HeldNumbers]:
    """Compress a prompt under a recipe and compare every number it holds with the reference's.

    Args:
        reference: the reference lane's cache right after the same prompt.
        snapshot: of this prompt; where it serves the recipe, nothing is read again.

    Yields:
        Tokens read so far.

    Raises:
        Cancelled: ``control`` was cancelled.
    """
    control = control or Control()
    log, cache = yield from scored(model, prompt, recipe, chunk, control, snapshot)
    layers = []
    for ours, theirs in zip(cache.layers, reference.layers, strict=True):
        if control.cancelled:
            raise Cancelled
        with torch.inference_mode():
            layers.append(compare_numbers(theirs.store, ours.store, len(prompt)))
        yield len(prompt)
    return HeldNumbers(layers, log.saliency)


def retained(
    model: Model,
    trace: ReferenceRun,
    prompt: list[int],
    lanes: Sequence[Lane],
    question: list[int],
    answer: int = 0,
    chunk: int = 2048,
    control: Control | None = None,
    snapshot: Snapshot | None = None,
) -> Generator[int, None, list[Tensor]]:
    """The share of the reference's attention, at each of its steps, that falls on what the lanes hold at that step.

    The reference's answer is fed to its own cache again; a lane that drops entries while it generates is fed the same
    tokens beside it (teacher-forced), the others hold what they held after the prompt. O(T) memory: one row of attention
    at a time.

    Args:
        question: ids that were fed after the prompt was compressed; the last of them led to the first token.

    Yields:
        Steps done so far.

    Returns:
        Per lane float32 [steps, L, Hq], 0 to 1.

    Raises:
        Cancelled: ``control`` was cancelled.
    """
    control = control or Control()
    probe = RetainedMass(model.geometry.num_layers)
    cache = trace.cache.clone()
    own: dict[int, WorkbenchCache] = {}  # of the lanes that go on dropping, by number
    for number, lane in enumerate(lanes):
        if Recipe.parse(lane.resolved).keeps_acting:
            own[number] = finish(scored(model, prompt, lane.resolved, chunk, control, snapshot))[1]
    after_prompt: list[Sequence[Tensor]] = [list(held_masks(lane.kept_positions, len(prompt))) for lane in lanes]
    cache.probes.append(probe)
    steps = []
    fed = [question, *([token] for token in trace.answers[answer].tokens[:-1])]
    for ids in fed:
        if control.cancelled:
            raise Cancelled
        probe.held = [masks(own[number]) if number in own else mask for number, mask in enumerate(after_prompt)]
        if ids:
            forward(model, cache, ids)
        else:
            with cache.replay():
                forward(model, cache, prompt[-1:], len(prompt) - 1)
        steps.append(probe.take())
        for lane_cache in own.values():
            if ids:
                forward(model, lane_cache, ids)
        yield len(steps)
    return list(torch.stack(steps, 1))


def masks(cache: WorkbenchCache) -> list[Tensor]:
    """Per layer bool [H, seen]: the positions that each head of a cache holds now."""
    out = []
    for layer in cache.layers:
        mask = torch.zeros(layer.store.heads, layer.seen, dtype=torch.bool)
        for row in range(layer.store.heads):
            mask[row, layer.store.positions(row).cpu().long()] = True
        out.append(mask)
    return out
