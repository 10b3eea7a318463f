"""Reading a prompt in chunks, and the state after it from which lanes can start again."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from workbench.cache.cache import WorkbenchCache
from workbench.errors import OutOfMemoryError
from workbench.models.layerwise import LayerwisePrefill
from workbench.runs.control import Control
from workbench.runs.reference import QueryRecorder
from workbench.strategies.recipe import Recipe

if TYPE_CHECKING:
    from workbench.cache.cache import ScoreProbe
    from workbench.cache.segments import Query
    from workbench.models.load import Model

SNAPSHOT_WINDOW = 128  # queries kept at the end of a prompt; recipes that vote with more read the prompt again


class Cancelled(Exception):
    """The run was cancelled; raised and caught inside this package."""


def forward(model: Model, cache: WorkbenchCache, ids: list[int], position: int | None = None) -> Tensor:
    """Feed tokens through the model; logits of the last one, float32 [vocabulary].

    Args:
        position: the position of the first token; by default the next one.

    Raises:
        OutOfMemoryError: the device is full.
    """
    tokens = torch.tensor([ids], device=model.device)
    start = cache.get_seq_length() if position is None else position
    positions = torch.arange(start, start + len(ids), device=model.device)[None]
    with _computing(model, cache):
        out = model.network(
            input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
    return out.logits[0, -1].float()


@contextmanager
def _computing(model: Model, cache: WorkbenchCache) -> Iterator[None]:
    """Without gradients; a device that is full becomes one sentence."""
    try:
        with torch.inference_mode():
            yield
    except (torch.cuda.OutOfMemoryError, MemoryError):
        raise _full(model, cache) from None
    except RuntimeError as error:
        if "not enough memory" not in str(error) and "out of memory" not in str(error).lower():
            raise
        raise _full(model, cache) from None


def _full(model: Model, cache: WorkbenchCache) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"{model.device} ran out of memory after {cache.get_seq_length():,} tokens; use a shorter prompt, a smaller "
        "chunk, or a recipe with a smaller cache."
    )


def read(
    model: Model, cache: WorkbenchCache, ids: list[int], chunk: int, control: Control
) -> Generator[int, None, Tensor]:
    """Feed a prompt in chunks of at most ``chunk`` tokens, cut where the recipe acts within the prompt; layer by layer where
    it lets tokens stay behind.

    Yields:
        The number of tokens read so far, after each chunk; layer by layer, as many as that share of the work.

    Returns:
        Logits [vocabulary] after the last token.

    Raises:
        Cancelled: ``control`` was cancelled between two chunks.
    """
    if cache.recipe.needs_token_set:
        return (yield from _read_by_layer(model, cache, ids, chunk, control))
    for start, stop in cache.recipe.chunks(len(ids), chunk):
        if control.cancelled:
            raise Cancelled
        logits = forward(model, cache, ids[start:stop])
        yield stop
    return logits


def read_through(model: Model, cache: WorkbenchCache, ids: list[int], chunk: int) -> Tensor:
    """:func:`read` without a stop between chunks: logits [vocabulary] after the last token."""
    reading = read(model, cache, ids, chunk, Control())
    while True:
        try:
            next(reading)
        except StopIteration as finished:
            return cast(Tensor, finished.value)


def _read_by_layer(
    model: Model, cache: WorkbenchCache, ids: list[int], chunk: int, control: Control
) -> Generator[int, None, Tensor]:
    with _computing(model, cache):
        reading = LayerwisePrefill(model.loop, cache, torch.tensor([ids], device=model.device), chunk)
    while not reading.finished:
        if control.cancelled:
            raise Cancelled
        with _computing(model, cache):
            reading.step()
        yield reading.done
    with _computing(model, cache):
        return reading.logits().float()


@dataclass
class Snapshot:
    """A prompt that was read: under the empty recipe, so that lanes start from here instead of reading it again; or by a
    lane, right after its recipe acted, so that it can be rewound and forked. Nothing is appended to ``cache`` any more.
    """

    cache: WorkbenchCache
    logits: Tensor
    queries: list[Query]  # per layer, the last SNAPSHOT_WINDOW
    seconds: float

    def serves(self, recipe: Recipe) -> bool:
        """Whether a lane with ``recipe`` may start here: every layer has every token, it looks at the last queries only."""
        read_as_it_was = not recipe.needs_prompt and not recipe.needs_token_set
        return read_as_it_was and recipe.query_window <= SNAPSHOT_WINDOW

    def fork(self, recipe: Recipe, score_probe: ScoreProbe | None = None) -> WorkbenchCache:
        """The cache of a lane that read the prompt and then applied ``recipe``."""
        cache = self.cache.clone(recipe)
        cache.score_probe = score_probe
        with torch.inference_mode():
            cache.apply_recipe(self.queries)
        return cache


def take_snapshot(model: Model, ids: list[int], chunk: int, control: Control) -> Generator[int, None, Snapshot]:
    """Read a prompt under the empty recipe and keep its state; yields the tokens read so far."""
    recorder = QueryRecorder(SNAPSHOT_WINDOW)
    cache = WorkbenchCache(Recipe(), model.geometry, len(ids), [recorder], model.artifacts)
    began = time.perf_counter()
    logits = yield from read(model, cache, ids, chunk, control)
    cache.probes.clear()
    return Snapshot(cache, logits, recorder.take(), time.perf_counter() - began)
