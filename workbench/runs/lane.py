"""A lane's result, and the comparison of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.cache.cache import Memory
    from workbench.inspection.scores import ScoreLog
    from workbench.inspection.why import Why
    from workbench.runs.compare import Run
    from workbench.runs.prompt import Snapshot
    from workbench.runs.steer import Action, Edit
    from workbench.strategies.recipe import Recipe


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
    at_token: int | None = (
        None  # where the lane was steered later than after the prompt: used_bytes is what it held then
    )

    def take(self, memory: Memory) -> None:
        """The state right after the prompt, or after an edit."""
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
    stopped: str | None = None  # length, eos, cancelled, error, rewound
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


@dataclass(frozen=True)
class Origin:
    """Where a lane was forked from: lane number ``lane``, before its token number ``token``."""

    lane: int
    token: int


@dataclass
class Lane:
    """Everything one lane produced.

    ``tokens``, ``text``, ``kl`` … are those of the first answer; with several questions see ``answers``. ``recipe`` is the
    one under which the prompt was read; a lane that goes on with another has it in ``edits``.
    """

    recipe: str
    resolved: str
    answers: list[Answer] = field(default_factory=lambda: [Answer()])
    error: str | None = None
    memory: LaneMemory = field(default_factory=LaneMemory)
    kept_positions: list[list[list[int]]] = field(default_factory=list)  # after the prompt
    packed: list[list[int]] = field(default_factory=list)  # per layer and head: first kept entries held as codes
    restored: list[list[list[int]]] = field(default_factory=list)  # of kept_positions: put back by hand, never coded
    drift: dict[str, list[list[float]]] | None = None
    prefill_seconds: float = 0.0
    prefill_reused: bool = False
    tokens_by_layer: list[int] = field(default_factory=list)  # of the prompt: fewer where a strategy left some behind
    first_token: str = "replayed"
    origin: Origin | None = None
    edits: tuple[Edit, ...] = ()  # what was done by hand, in order
    start: Snapshot | None = field(default=None, repr=False)  # right after the prompt, if the run is rewindable

    tokens = property(lambda self: self.answers[0].tokens)
    text = property(lambda self: self.answers[0].text)
    stopped = property(lambda self: self.answers[0].stopped)
    kl = property(lambda self: self.answers[0].kl)
    kl_mean = property(lambda self: self.answers[0].kl_mean)
    top1_agreement = property(lambda self: self.answers[0].top1_agreement)
    first_divergence = property(lambda self: self.answers[0].first_divergence)

    @property
    def steered(self) -> bool:
        """Whether something was done to the lane by hand, its recipe changed on the way included."""
        return bool(self.edits)

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
        if self.origin is not None:
            out["origin"] = {"lane": self.origin.lane, "token": self.origin.token}
        if self.edits:
            out["edits"] = [edit.as_dict() for edit in self.edits]
        if self.answers[0].question is not None:
            out["answers"] = [{"question": a.question, **a.as_dict()} for a in self.answers]
        return out


class Comparison:
    """Lanes of one prompt, in order; the one at ``reference`` is what the others are compared with."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.model, self.prompt, self.chunk = run.model, run.prompt, run.settings.chunk
        self.lanes, self.reference, self._trace = run.lanes, run.reference, run.trace

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

        self._as_run(lane)
        return finish(scored(self.model, self.prompt, self.lanes[lane].resolved, self.chunk))[0]

    def retained(self, lane: int, answer: int = 0) -> Tensor:
        """What share of the reference's attention, at each of its steps, fell on entries the lane held then.

        Returns:
            float32 [steps, layers, query heads], 0 to 1; step t led to the reference's token t.

        Raises:
            WorkbenchError: the reference did not finish.
        """
        from workbench.runs.replay import finish, retained

        self._as_run(lane)
        if self._trace is None or answer >= len(self._trace.answers):
            raise WorkbenchError(
                "The reference lane did not finish, so there is no attention to compare with; run it again."
            )
        question = self.lanes[self.reference].answers[answer].question
        ids = self.model.encode(question, continues=True) if question is not None else []
        steps = retained(self.model, self._trace, self.prompt, [self.lanes[lane]], ids, answer, self.chunk)
        return finish(steps)[0]

    def _as_run(self, lane: int) -> None:
        if self.lanes[lane].steered:
            raise WorkbenchError(
                f"Lane {lane} was changed by hand on the way, and this measures lanes that ran by their recipe alone; ask it "
                "of the lane it was forked from."
            )

    # -- steering: see workbench.runs.live -------------------------------------------------------------------------

    def fork(self, lane: int, token: int | None = None, recipe: str | Recipe | None = None, **options: Any) -> Lane:
        """A new lane that goes on from another's token ``token``, where that had chosen so many tokens.

        With the same recipe it repeats the lane to the last bit. Another recipe acts at that token on what the lane holds
        then: what was dropped or rounded off before does not come back (see :meth:`restore`).

        Args:
            lane: number of the lane to fork; one that failed cannot be.
            token: 0, right after the prompt (before a question), to the number of the lane's tokens; by default there.
            recipe: to go on with; by default the lane's own.
            options: ``answer`` (0, which of several questions), ``max_new_tokens`` (the run's), ``on_event``, ``control``.

        Returns:
            The new lane, which is the last of the comparison.

        Raises:
            WorkbenchError: there is no such token, or the recipe cannot go on from there; nothing has changed then.
        """
        from workbench.runs.live import fork

        return fork(self, lane, token, recipe, **options)

    def rewind(self, lane: int, token: int, **options: Any) -> Lane:
        """Take a lane back to where it had chosen ``token`` tokens; :meth:`resume` goes on from there."""
        from workbench.runs.live import rewind

        return rewind(self, lane, token, **options)

    def resume(self, lane: int, **options: Any) -> Lane:
        """Go on from a lane's last token: one that was rewound or cancelled, or that may now take ``max_new_tokens``."""
        from workbench.runs.live import resume

        return resume(self, lane, **options)

    def evict(self, lane: int, positions: int | Sequence[int], **where: Any) -> Lane:
        """Free entries by hand and generate again from there.

        Where entries are held as codes in groups, what stays of the layer is coded anew.

        Args:
            lane: its number; not the reference.
            positions: of the tokens.
            where: ``layer`` and ``kv_head`` (a number or several; by default all; a KV head stands for its group),
                ``token`` (0: before the lane's token of that number), and the options of :meth:`fork`.

        Returns:
            The lane as it is now, at its number.

        Raises:
            WorkbenchError: no head holds them, or one would hold nothing at all; nothing has changed then.
        """
        return self._edit(lane, "evict", positions, **where)

    def restore(self, lane: int, positions: int | Sequence[int], **where: Any) -> Lane:
        """Put back exactly the entries that the reference holds of prompt tokens; arguments as for :meth:`evict`."""
        return self._edit(lane, "restore", positions, **where)

    def protect(self, lane: int, positions: int | Sequence[int], **where: Any) -> Lane:
        """:meth:`restore` what is gone, and let no strategy drop these positions from there on."""
        return self._edit(lane, "protect", positions, **where)

    def change(self, lane: int, recipe: str | Recipe, token: int = 0, **options: Any) -> Lane:
        """Let a lane go on with another recipe from a token on, as :meth:`fork` does in a lane of its own."""
        from workbench.runs.live import change

        return change(self, lane, recipe, token, **options)

    def _edit(self, lane: int, action: Action, positions: int | Sequence[int], **where: Any) -> Lane:
        from workbench.runs.live import edit

        return edit(self, lane, action, positions, **where)

    def held_bytes(self) -> int:
        """Bytes held so that lanes can be compared, rewound and forked; storage that caches share is counted once."""
        from workbench.cache.storage import storages

        caches = [lane.start.cache for lane in self.lanes if lane.start is not None]
        caches += [kept.cache for kept in (self._trace, self._run.snapshot) if kept is not None]
        return sum({key: size for cache in caches for key, size in storages(cache).items()}.values())

    def as_dict(self, kept: bool = True) -> dict[str, Any]:
        g = self.model.geometry
        return {
            "schema": 1,
            "model": {
                "id": self.model.id,
                "num_layers": g.num_layers,
                "num_heads": g.num_heads,
                "num_kv_heads": g.num_kv_heads,
                "head_dim": g.head_dim,
                "dtype": g.dtype,
            },
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
