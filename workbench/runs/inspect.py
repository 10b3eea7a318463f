"""``wb.inspect``: read a prompt under the empty recipe and count its attention on the way."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

from workbench.cache.cache import WorkbenchCache
from workbench.errors import PromptError, WorkbenchError
from workbench.inspection.trace import AttentionTrace
from workbench.runs.control import Control, device_queue
from workbench.runs.prompt import Cancelled, read
from workbench.strategies.recipe import Recipe

if TYPE_CHECKING:
    from workbench.models.load import Model


def inspecting(
    model: Model,
    prompt: str | Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    sinks: int = 4,
    chunk: int = 2048,
    control: Control | None = None,
) -> Generator[int, None, AttentionTrace]:
    """The work of :func:`inspect`, chunk by chunk.

    Yields:
        Tokens read so far.

    Raises:
        Cancelled: ``control`` was cancelled.
    """
    ids = model.encode(prompt)
    wanted = list(range(model.geometry.num_layers)) if layers is None else sorted(set(layers))
    _check(model, ids, wanted, sinks, chunk)
    control = control or Control()
    cache = WorkbenchCache(Recipe(), model.geometry, len(ids), artifacts=model.artifacts)
    cache.keep_passed = True  # a tile may ask for what a sliding window has passed
    trace = AttentionTrace(model, ids, wanted, sinks, cache)
    with device_queue(model.device).turn(control) as granted:
        if not granted:
            raise Cancelled
        cache.reader = trace.reader
        try:
            # Whole map rows at a time, so that none is finished in a later chunk.
            yield from read(model, cache, ids, max(1, chunk // trace.cell) * trace.cell, control)
        finally:
            cache.reader = None
    return trace


def inspect(
    model: Model,
    prompt: str | Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    sinks: int = 4,
    chunk: int = 2048,
    control: Control | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> AttentionTrace:
    """Read a prompt and count what every head attends to, in O(tokens) memory per head.

    Args:
        model: from :func:`workbench.load`.
        prompt: text or token ids.
        layers: to count; by default all.
        sinks: how many first tokens the sink mass is about.
        chunk: tokens per prefill step, about.
        control: to cancel from another thread.
        on_progress: called with the tokens read so far and all there are.

    Returns:
        An :class:`AttentionTrace`; ``trace.entropy()``, ``trace.map(layer, head)``, ``trace.tile(…)`` …

    Raises:
        WorkbenchError: bad input; or the run was cancelled.
    """
    ids = model.encode(prompt)
    work = inspecting(model, ids, layers=layers, sinks=sinks, chunk=chunk, control=control)
    while True:
        try:
            done = next(work)
        except StopIteration as finished:
            trace: AttentionTrace = finished.value
            return trace
        except Cancelled:
            raise WorkbenchError(
                "The inspection was cancelled, so there is nothing to look at; run it again."
            ) from None
        if on_progress is not None:
            on_progress(done, len(ids))


def _check(model: Model, ids: list[int], layers: list[int], sinks: int, chunk: int) -> None:
    g = model.geometry
    if not ids:
        raise PromptError("The prompt is empty, so there is no attention to look at; give at least one token.")
    if len(ids) > g.max_positions:
        raise PromptError(
            f"The prompt has {len(ids):,} tokens, but {model.id} reads at most {g.max_positions:,}; shorten it."
        )
    if not layers or layers[0] < 0 or layers[-1] >= g.num_layers:
        raise WorkbenchError(f"layers are numbers from 0 to {g.num_layers - 1}, at least one; got {layers}.")
    if sinks < 0:
        raise WorkbenchError(f"sinks must be at least 0 tokens, got {sinks}.")
    if chunk < 1:
        raise PromptError(f"chunk must be at least 1 token, got {chunk}.")
