"""Running one lane: read the prompt or fork from a snapshot, compress, measure, generate."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from workbench.cache.cache import WorkbenchCache
from workbench.cache.store import is_dense
from workbench.errors import WorkbenchError
from workbench.inspection.drift import measure_drift
from workbench.runs.decode import Decoder, Sampling
from workbench.runs.events import AnyEvent, CacheState, Edited, LaneDone, PrefillProgress, Probe
from workbench.runs.prompt import SNAPSHOT_WINDOW, Cancelled, Snapshot, forward, read, take_snapshot
from workbench.runs.reference import QueryRecorder, ReferenceAnswer, ReferenceRun
from workbench.runs.steer import Edit, RecentQueries, Script, Steering, edited

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
    rewindable: bool


class LaneRun:
    """One lane of a :class:`Run`. The reference lane leaves ``run.trace``; a reused prompt is left in ``run.snapshot``."""

    def __init__(self, run: Run, number: int) -> None:
        self.run, self.number = run, number
        self.model, self.settings, self.control = run.model, run.settings, run.control
        self.recipe, self.lane = run.recipes[number], run.lanes[number]
        self.is_reference = number == run.reference
        self.cache: WorkbenchCache | None = None  # the one in use, once the prompt is being read

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
        lane = self.lane
        start = yield from self._prompt()
        if self.settings.rewindable:
            lane.start = start
        memory = start.cache.memory()
        lane.memory.take(memory)
        lane.kept_positions = kept_of(start.cache)
        lane.packed, lane.tokens_by_layer = packed_counts(start.cache), start.cache.tokens_by_layer
        if self.is_reference:
            self.run.trace = ReferenceRun(start.cache.clone(), memory.used_bytes)
        self.run.relate(lane)
        yield CacheState(self.number, "prompt", memory, lane.kept_positions, lane.packed)

        for index, question in enumerate([ids for _, ids in self.run.questions] or [[]]):
            # Every question starts from the compressed context. What it adds lies in blocks of its own, behind those
            # that are shared, here as in a fork: so both compute the same to the last bit.
            self.cache = start.cache.clone()
            yield from self._answer(index, question, self.cache, start)
        assert self.cache is not None
        cache = self.cache
        memory = cache.memory()
        lane.memory.final_bytes, lane.memory.peak_bytes = memory.used_bytes, memory.peak_bytes
        yield CacheState(self.number, "end", memory, lane.kept_positions, packed_counts(cache))

    def _prompt(self) -> Generator[AnyEvent, None, Snapshot]:
        """Read the prompt under the recipe, or start from a snapshot of it."""
        run, lane, chunk = self.run, self.lane, self.settings.chunk
        total = len(run.prompt)
        known = run.starts.get(self.number)
        if known is not None:
            lane.prefill_reused, lane.prefill_seconds = True, known.seconds
            yield PrefillProgress(self.number, total, total)
            return known
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
            return Snapshot(cache, run.snapshot.logits, run.snapshot.queries, lane.prefill_seconds)
        self.cache = cache = WorkbenchCache(self.recipe, self.model.geometry, total, artifacts=self.model.artifacts)
        recorder = QueryRecorder(SNAPSHOT_WINDOW)
        cache.probes.append(recorder)
        began = time.perf_counter()
        logits = yield from self._reported(read(self.model, cache, run.prompt, chunk, self.control), total)
        lane.prefill_seconds = time.perf_counter() - began
        cache.probes.clear()
        return Snapshot(cache, logits, recorder.take(), lane.prefill_seconds)

    def _reported(self, reading: Generator[int, None, T], total: int) -> Generator[PrefillProgress, None, T]:
        """Turn the tokens read so far into events; hands on the reading's result."""
        while True:
            try:
                yield PrefillProgress(self.number, next(reading), total)
            except StopIteration as finished:
                return finished.value

    def _answer(
        self, index: int, question: list[int], cache: WorkbenchCache, start: Snapshot
    ) -> Generator[AnyEvent, None, None]:
        """Generate one answer: for a question fed now, or for the prompt itself."""
        logits, recent, script = start.logits, RecentQueries(start.queries), self.run.scripts.get(self.number, Script())
        cache.probes.append(recent)
        first = [edit for edit in script.edits if edit.token == 0]
        for edit in first:
            source = self.run.trace.cache if self.run.trace is not None else None
            self.cache = cache = edited(edit, cache, source, recent, script.strict)
            yield Edited(self.number, edit)
            yield self._after_edit(edit, cache)
        trace, probes, record = self.run.trace, self.settings.probes, None
        recorder = QueryRecorder() if self.is_reference and probes else None
        if recorder is not None:
            cache.probes.append(recorder)
        replayed = self.settings.first_token == "replayed" and any(layer.store.changed for layer in cache.layers)
        if question:
            logits = forward(self.model, cache, question)
        elif replayed or first or recorder is not None:
            # The last prompt token asks once more, of what is held now; where that is everything, its answer is
            # already known and only the probe listens.
            with cache.replay():
                again = forward(self.model, cache, self.run.prompt[-1:], len(self.run.prompt) - 1)
            logits = again if replayed or first else logits
        if self.is_reference and trace is not None:
            record = ReferenceAnswer(first_queries=recorder.take() if recorder is not None else [])
            trace.answers.append(record)
        if "drift" in probes and index == 0 and trace is not None and trace.answers:
            self.lane.drift = measure_drift(trace, cache)
            yield Probe(self.number, "drift", self.lane.drift)
        known = None if self.is_reference or trace is None or len(trace.answers) <= index else trace.answers[index]
        answer = self.lane.answers[index]
        source = trace.cache if trace is not None else None
        steering = Steering((question or self.run.prompt)[-1], bool(question), recent, source, script)
        sampling = self.settings.sampling
        decoder = Decoder(self.number, self.model, cache, sampling, self.control, answer, steering)
        for event in decoder.generate(logits, known, record, recorder):
            yield event
            if isinstance(event, Edited):
                self.cache = decoder.cache
                yield self._after_edit(event.edit, decoder.cache)
        self.cache = decoder.cache
        if recorder is not None:
            cache.probes.remove(recorder)
        if self.is_reference or known is not None:
            decoder.teacher_force()
            yield Probe(self.number, "kl", answer.kl)

    def _after_edit(self, edit: Edit, cache: WorkbenchCache) -> CacheState:
        """Note what was done by hand, what the lane holds of the prompt then, and in all."""
        lane, prompt = self.lane, len(self.run.prompt)
        lane.edits = (*lane.edits, edit)
        memory, lane.packed = cache.memory(), packed_counts(cache)
        lane.memory.take(memory)
        lane.memory.at_token = edit.token or None
        lane.kept_positions = [[[p for p in head if p < prompt] for head in layer] for layer in kept_of(cache)]
        lane.restored = restored_of(cache)
        self.run.relate(lane)
        if lane.drift is not None and self.run.trace is not None:
            lane.drift = measure_drift(self.run.trace, cache)
        return CacheState(self.number, "edit", memory, lane.kept_positions, lane.packed, lane.restored)


def kept_of(cache: WorkbenchCache) -> list[list[list[int]]]:
    """Positions that each KV head of each layer holds."""
    heads = range(cache.geometry.num_kv_heads)
    return [[cache.kept(layer, head) for head in heads] for layer in range(len(cache.layers))]


def restored_of(cache: WorkbenchCache) -> list[list[list[int]]]:
    """Positions that lie in segments of their own before the others: what was put back by hand."""
    heads = range(cache.geometry.num_kv_heads)
    return [
        [
            sorted(p for part in layer.store.segments[:-1] if is_dense(part) for p in part.positions_of(h).tolist())
            for h in heads
        ]
        for layer in cache.layers
    ]


def packed_counts(cache: WorkbenchCache) -> list[list[int]]:
    """Per layer and KV head: how many of the first kept entries are held as codes."""
    heads = cache.geometry.num_kv_heads
    return [[layer.store.packed(head) for head in range(heads)] for layer in cache.layers]
