"""Running one lane: read the prompt or fork from a snapshot, compress, measure, generate."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from workbench.cache.cache import WorkbenchCache
from workbench.errors import WorkbenchError
from workbench.inspection.drift import measure_drift
from workbench.runs.decode import Decoder, Sampling
from workbench.runs.events import AnyEvent, CacheState, LaneDone, PrefillProgress, Probe
from workbench.runs.prompt import Cancelled, forward, read, take_snapshot
from workbench.runs.reference import QueryRecorder, ReferenceAnswer, ReferenceRun

if TYPE_CHECKING:
    from workbench.runs.compare import Run

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What all lanes of a run share."""

    sampling: Sampling
    chunk: int
    first_token: str
    probes: tuple[str, ...]
    reuse_prompt: bool


class LaneRun:
    """One lane of a :class:`Run`. The reference lane leaves ``run.trace``; a reused prompt is left in ``run.snapshot``."""

    def __init__(self, run: Run, number: int) -> None:
        self.run, self.number = run, number
        self.model, self.settings, self.control = run.model, run.settings, run.control
        self.recipe, self.lane = run.recipes[number], run.lanes[number]
        self.is_reference = number == run.reference
        self.cache: WorkbenchCache | None = None  # once the prompt is being read under the recipe

    def events(self) -> Iterator[AnyEvent]:
        """Everything the lane says, its result last; an error of ours ends the lane, not the run."""
        try:
            yield from self._events()
        except Cancelled:
            self._stop("cancelled")
        except WorkbenchError as error:
            self.lane.error = str(error)
            self._stop("error")
        finally:
            if self.cache is not None:
                self.cache.release()
        yield LaneDone(self.number, self.lane)

    def _stop(self, reason: str) -> None:
        for answer in self.lane.answers:
            if answer.stopped is None or reason == "error":
                answer.stopped = reason

    def _events(self) -> Iterator[AnyEvent]:
        lane, heads = self.lane, range(self.model.geometry.num_kv_heads)
        cache, logits = yield from self._prompt()
        memory = cache.memory()
        lane.memory.take(memory)
        lane.kept_positions = [[cache.kept(layer, head) for head in heads] for layer in range(len(cache.layers))]
        lane.packed, lane.tokens_by_layer = packed_counts(cache), cache.tokens_by_layer
        if self.is_reference:
            self.run.trace = ReferenceRun(cache.clone(), memory.used_bytes)
        self.run.relate(lane)
        yield CacheState(self.number, "prompt", memory, lane.kept_positions, lane.packed)

        questions = [ids for _, ids in self.run.questions] or [[]]
        for index, question in enumerate(questions):
            # Every question starts from the compressed context; the last one may use the cache itself.
            own = cache if index == len(questions) - 1 else cache.clone()
            yield from self._answer(index, question, own, logits)
        lane.decode_paths = sorted(set().union(*(layer.store.paths for layer in cache.layers)))
        memory = cache.memory()
        lane.memory.final_bytes, lane.memory.peak_bytes = memory.used_bytes, memory.peak_bytes
        yield CacheState(self.number, "end", memory, lane.kept_positions, packed_counts(cache))

    def _prompt(self) -> Generator[AnyEvent, None, tuple[WorkbenchCache, Tensor]]:
        """Read the prompt under the recipe, or fork from the snapshot."""
        run, lane, chunk = self.run, self.lane, self.settings.chunk
        total = len(run.prompt)
        if self.settings.reuse_prompt and run.snapshot is None:
            reading = take_snapshot(self.model, run.prompt, chunk, self.control)
            run.snapshot = yield from self._reported(reading, total)
        elif run.snapshot is not None:
            lane.prefill_reused = run.snapshot.serves(self.recipe)
        if run.snapshot is not None and run.snapshot.serves(self.recipe):
            if lane.prefill_reused:
                yield PrefillProgress(self.number, total, total)
            began = time.perf_counter()
            cache = run.snapshot.fork(self.recipe)
            lane.prefill_seconds = run.snapshot.seconds + time.perf_counter() - began
            return cache, run.snapshot.logits
        self.cache = cache = WorkbenchCache(self.recipe, self.model.geometry, total, artifacts=self.model.artifacts)
        began = time.perf_counter()
        logits = yield from self._reported(read(self.model, cache, run.prompt, chunk, self.control), total)
        lane.prefill_seconds = time.perf_counter() - began
        return cache, logits

    def _reported(self, reading: Generator[int, None, T], total: int) -> Generator[PrefillProgress, None, T]:
        """Turn the tokens read so far into events; hands on the reading's result."""
        while True:
            try:
                yield PrefillProgress(self.number, next(reading), total)
            except StopIteration as finished:
                return finished.value

    def _answer(self, index: int, question: list[int], cache: WorkbenchCache, logits: Tensor) -> Iterator[AnyEvent]:
        """Generate one answer: for a question fed now, or for the prompt itself."""
        trace, probes, record = self.run.trace, self.settings.probes, None
        recorder = QueryRecorder() if self.is_reference and probes else None
        if recorder is not None:
            cache.probes.append(recorder)
        replayed = self.settings.first_token == "replayed" and any(layer.store.changed for layer in cache.layers)
        if question:
            logits = forward(self.model, cache, question)
        elif replayed or recorder is not None:
            # The last prompt token asks once more, of what is held now; where that is everything, its answer is
            # already known and only the probe listens.
            with cache.replay():
                again = forward(self.model, cache, self.run.prompt[-1:], len(self.run.prompt) - 1)
            logits = again if replayed else logits
        if self.is_reference and trace is not None:
            record = ReferenceAnswer(first_queries=recorder.take() if recorder is not None else [])
            trace.answers.append(record)
        if "drift" in probes and index == 0 and trace is not None and trace.answers:
            self.lane.drift = measure_drift(trace, cache)
            yield Probe(self.number, "drift", self.lane.drift)
        known = None if self.is_reference or trace is None or len(trace.answers) <= index else trace.answers[index]
        answer = self.lane.answers[index]
        decoder = Decoder(self.number, self.model, cache, self.settings.sampling, self.control, answer)
        yield from decoder.generate(logits, known, record, recorder)
        if recorder is not None:
            cache.probes.remove(recorder)
        if self.is_reference or known is not None:
            decoder.teacher_force()
            yield Probe(self.number, "kl", answer.kl)


def packed_counts(cache: WorkbenchCache) -> list[list[int]]:
    """Per layer and KV head: how many of the first kept entries are held as codes."""
    heads = cache.geometry.num_kv_heads
    return [[layer.store.packed(head) for head in range(heads)] for layer in cache.layers]
