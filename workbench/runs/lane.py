"""A lane's result, and the comparison of several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.cache.cache import Memory
    from workbench.inspection.numbers import HeldNumbers
    from workbench.inspection.scores import ScoreLog
    from workbench.inspection.why import Why
    from workbench.models.load import Model
    from workbench.runs.reference import ReferenceRun


@dataclass
class LaneMemory:
    """Bytes a lane held, all measured. ``ratio`` is used_bytes over the reference lane's."""

    used_bytes: int = 0
    final_bytes: int = 0
    reserved_bytes: int = 0
    reference_bytes: int = 0
    ratio: float | None = None
    peak_bytes: int = 0
    by_layer: list[int] = field(default_factory=list)
    by_kind: dict[str, int] = field(default_factory=dict)
    by_head: list[list[int]] = field(default_factory=list)
    factor_bytes: int = 0  # matrices made of the model's weights, once per model; not in the others

    def take(self, memory: Memory) -> None:
        """The state right after the prompt."""
        self.used_bytes, self.reserved_bytes = memory.used_bytes, memory.reserved_bytes
        self.by_layer, self.by_kind, self.by_head = memory.by_layer, memory.by_kind, memory.by_head
        self.final_bytes, self.peak_bytes = memory.used_bytes, memory.peak_bytes
        self.factor_bytes = memory.factor_bytes

    def as_dict(self) -> dict[str, Any]:
        names = (
            "used_bytes",
            "final_bytes",
            "reserved_bytes",
            "reference_bytes",
            "ratio",
            "peak_bytes",
            "factor_bytes",
        )
        return {name: getattr(self, name) for name in (*names, "by_layer", "by_kind")}


@dataclass
class Answer:
    """What a lane generated for one question (or for the prompt itself), and how it compares with the reference."""

    question: str | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    stopped: str | None = None  # length, eos, cancelled, error
    kl: list[float] | None = None  # nats per reference token, teacher-forced: KL(reference || lane)
    top1_agreement: float | None = None
    first_divergence: int | None = None
    decode_seconds: float = 0.0

    @property
    def kl_mean(self) -> float | None:
        return sum(self.kl) / len(self.kl) if self.kl else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "text": self.text,
            "stopped": self.stopped,
            "kl": self.kl,
            "kl_mean": self.kl_mean,
            "top1_agreement": self.top1_agreement,
            "first_divergence": self.first_divergence,
        }


@dataclass
class Lane:
    """Everything one lane produced.

    ``tokens``, ``text``, ``kl`` … are those of the first answer; with several questions see ``answers``.
    """

    recipe: str
    resolved: str
    answers: list[Answer] = field(default_factory=lambda: [Answer()])
    error: str | None = None
    memory: LaneMemory = field(default_factory=LaneMemory)
    kept_positions: list[list[list[int]]] = field(default_factory=list)  # after the prompt
    packed: list[list[int]] = field(default_factory=list)  # per layer and head: first kept entries held as codes
    drift: dict[str, list[list[float]]] | None = None
    decode_paths: list[str] = field(default_factory=list)  # how decoding read codes: fused, dequantize, rebuild
    prefill_seconds: float = 0.0
    prefill_reused: bool = False
    tokens_by_layer: list[int] = field(default_factory=list)  # of the prompt: fewer where a strategy left some behind
    first_token: str = "replayed"

    tokens = property(lambda self: self.answers[0].tokens)
    text = property(lambda self: self.answers[0].text)
    stopped = property(lambda self: self.answers[0].stopped)
    kl = property(lambda self: self.answers[0].kl)
    kl_mean = property(lambda self: self.answers[0].kl_mean)
    top1_agreement = property(lambda self: self.answers[0].top1_agreement)
    first_divergence = property(lambda self: self.answers[0].first_divergence)

    @property
    def seconds(self) -> dict[str, float]:
        return {"prefill": self.prefill_seconds, "decode": sum(a.decode_seconds for a in self.answers)}

    def kept(self, layer: int, kv_head: int) -> list[int]:
        """Positions one head held right after the prompt, ascending."""
        try:
            return self.kept_positions[layer][kv_head]
        except IndexError:
            raise WorkbenchError(f"There is no layer {layer} with KV head {kv_head} in this lane.") from None

    def as_dict(self, kept: bool = True) -> dict[str, Any]:
        """The lane as in the CLI's JSON (design of the ``compare`` schema, version 1)."""
        first = self.answers[0].as_dict()
        out = {
            "recipe": self.recipe,
            "resolved": self.resolved,
            **{key: first[key] for key in ("tokens", "text", "stopped")},
            "error": self.error,
            **{key: first[key] for key in ("kl", "kl_mean", "top1_agreement", "first_divergence")},
            "memory": self.memory.as_dict(),
            "kept": self.kept_positions if kept else None,
            "drift": self.drift,
            "seconds": self.seconds,
            "tokens_by_layer": self.tokens_by_layer,
            "first_token": self.first_token,
        }
        if self.answers[0].question is not None:
            out["answers"] = [{"question": a.question, **a.as_dict()} for a in self.answers]
        return out


class Comparison:
    """Lanes of one prompt, in order; the one at ``reference`` is what the others are compared with."""

    def __init__(
        self,
        model: Model,
        prompt: list[int],
        lanes: list[Lane],
        reference: int,
        trace: ReferenceRun | None,
        chunk: int = 2048,
    ) -> None:
        self.model, self.prompt, self.lanes, self.reference, self.chunk = model, prompt, lanes, reference, chunk
        self._trace = trace

    @property
    def trace(self) -> ReferenceRun:
        """The reference as it was right after the prompt, and its answers. WorkbenchError where it did not get there."""
        if self._trace is None or not self._trace.answers:
            raise WorkbenchError(
                "The reference lane did not finish, so there is nothing to compare with; run it again."
            )
        return self._trace

    def __getitem__(self, lane: int) -> Lane:
        return self.lanes[lane]

    def __len__(self) -> int:
        return len(self.lanes)

    def __iter__(self) -> Iterator[Lane]:
        return iter(self.lanes)

    def why(self, lane: int, token: int | None = None) -> Why | None:
        """What the reference read at ``token`` (default: the first divergence) that the lane no longer holds.

        None where the lane never diverged and no token is given, or the reference did not finish.
        """
        from workbench.inspection.why import explain

        at = self.lanes[lane].first_divergence if token is None else token
        if at is None or self._trace is None:
            return None
        return explain(self._trace, self.lanes[lane], at)

    def scores(self, lane: int) -> ScoreLog:
        """By what a lane's strategy chose what it kept of the prompt: the prompt is compressed once more, and listened to."""
        from workbench.runs.replay import finish, scored

        return finish(scored(self.model, self.prompt, self.lanes[lane].resolved, self.chunk))[0]

    def numbers(self, lane: int) -> HeldNumbers:
        """The keys and values a lane holds against the reference's, and the bits they take: the prompt is compressed once more.

        Raises:
            WorkbenchError: the reference did not finish.
        """
        from workbench.runs.replay import finish, numbers

        if self._trace is None:
            raise WorkbenchError(
                "The reference lane did not finish, so there is nothing to compare with; run it again."
            )
        return finish(numbers(self.model, self._trace.cache, self.prompt, self.lanes[lane].resolved, self.chunk))

    def retained(self, lane: int, answer: int = 0) -> Tensor:
        """What share of the reference's attention, at each of its steps, fell on entries the lane held then.

        Returns:
            float32 [steps, layers, query heads], 0 to 1; step t led to the reference's token t.

        Raises:
            WorkbenchError: the reference did not finish.
        """
        from workbench.runs.replay import finish, retained

        if self._trace is None or answer >= len(self._trace.answers):
            raise WorkbenchError(
                "The reference lane did not finish, so there is no attention to compare with; run it again."
            )
        question = self.lanes[self.reference].answers[answer].question
        ids = self.model.encode(question, continues=True) if question is not None else []
        steps = retained(self.model, self._trace, self.prompt, [self.lanes[lane]], ids, answer, self.chunk)
        return finish(steps)[0]

    def as_dict(self, kept: bool = True) -> dict[str, Any]:
        return {
            "schema": 1,
            "model": self.model.as_dict(),
            "prompt_tokens": len(self.prompt),
            "reference": self.reference,
            "lanes": [lane.as_dict(kept) for lane in self.lanes],
        }

    def __repr__(self) -> str:
        rows = [f"{self.model.id}: {len(self.prompt):,} prompt tokens, reference lane {self.reference}"]
        for number, lane in enumerate(self.lanes):
            ratio = f"{lane.memory.ratio:.1%}" if lane.memory.ratio is not None else "-"
            kl = f"{lane.kl_mean:.3g} nats" if lane.kl_mean is not None else "-"
            said = lane.error or lane.text.strip().replace("\n", " ↵ ")[:60]
            rows.append(f"  {number} {lane.recipe}: {said!r}, cache {ratio}, KL {kl}, stopped: {lane.stopped}")
        return "\n".join(rows)
