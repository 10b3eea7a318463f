"""What all lanes are asked, and one lane as the app sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.errors import PromptError
from workbench.runs.steer import Edit, Script

if TYPE_CHECKING:
    import workbench as wb
    from workbench.inspection.why import Why
    from workbench.runs.lane import Lane, LaneMemory


DEFAULT_LANES = ("full", "snapkv(budget=0.25)", "kivi(bits=2)")


@dataclass(frozen=True)
class Ask:
    """Everything but the recipe that a result depends on: equal asks and recipes give equal results."""

    model: str = "house/recall"
    prompt: str = ""
    question: str = ""
    aware: bool = False  # the question is part of the prompt that is compressed
    max_new_tokens: int = 64
    seed: int = 0
    temperature: float = 0.0
    first_token: str = "replayed"

    @property
    def text(self) -> str:
        """The prompt that is read and compressed."""
        return self.prompt + self.question if self.aware else self.prompt

    @property
    def asked_later(self) -> str | None:
        """The question that is fed after the prompt was compressed, if any."""
        return self.question if self.question.strip() and not self.aware else None

    def check(self, model: wb.Model) -> None:
        """Raise PromptError, in one sentence, where the model cannot read this."""
        ids, later = model.encode(self.text), self.asked_later
        asked = len(model.encode(later, continues=True)) if later else 0
        limit = model.geometry.max_positions
        if len(ids) + asked >= limit:
            raise PromptError(
                f"Prompt and question together have {len(ids) + asked:,} tokens, but {model.id} reads at most {limit:,}; "
                "shorten them."
            )

    def options(self) -> dict[str, Any]:
        """Arguments of `wb.compare`."""
        return {
            "question": self.asked_later,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            "temperature": self.temperature,
            "first_token": self.first_token,
        }


BY_ITSELF = Script(strict=False)


@dataclass(frozen=True)
class Course:
    """What a person did to a lane by hand.

    Attributes:
        script: the tokens it has chosen before, and what was done on the way.
        origin: the key of the lane it was forked from, and the token there.
        held: stay before this token.
        ask: what the tokens answer; asked something else, a lane begins anew.
    """

    script: Script = BY_ITSELF
    origin: tuple[int, int] | None = None
    held: int | None = None
    ask: Ask | None = None

    @property
    def outcome(self) -> Script:
        """What a result depends on: without edits a lane says by itself what it has said."""
        return self.script if self.script.edits else BY_ITSELF


PLAIN = Course()

# What a lane is doing. "waiting": will start; "queued": others hold the device; "paused": a person holds it; then the ends.
BUSY = ("waiting", "queued", "reading", "generating", "comparing")
ENDS = ("idle", "done", "cancelled", "error")


@dataclass
class LaneState:
    """One lane on the screen: its recipe, and what is known of its run so far."""

    key: int
    recipe: str  # under which the prompt is read
    course: Course = PLAIN
    status: str = "idle"
    run: int = 0  # counts this lane's runs; what an earlier run still says is dropped
    ahead: int = 0
    done: int = 0
    total: int = 0
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    kl: list[float] | None = None
    drift: dict[str, list[list[float]]] | None = None
    memory: LaneMemory | None = None
    kept: list[list[list[int]]] = field(default_factory=list)
    packed: list[list[int]] = field(default_factory=list)
    restored: list[list[list[int]]] = field(default_factory=list)  # put back by hand, never coded
    result: Lane | None = None
    why: Why | None = None
    edits: list[Edit] = field(default_factory=list)  # done to the output on show
    error: str | None = None
    shown_run: int = 0  # the run that the output on show is of
    recalled: bool = False  # shown from the session's results, not run again
    began: float = 0.0

    @property
    def busy(self) -> bool:
        return self.status in BUSY

    @property
    def recipe_now(self) -> str:
        """The recipe the lane goes on with."""
        changes = [edit.recipe for edit in self.course.script.edits if edit.action == "recipe"]
        return changes[-1] if changes else self.recipe

    @property
    def live(self) -> bool:
        """Whether it generates, or is held while it does."""
        return self.status in ("generating", "paused")

    @property
    def stale(self) -> bool:
        """Whether what is on show is of an earlier run, with another recipe or prompt."""
        return self.shown_run != self.run

    def clear_output(self) -> None:
        """Forget the tokens and what was measured on them; the new run's come now."""
        self.shown_run = self.run
        self.tokens, self.texts, self.kl, self.result, self.why, self.edits = [], [], None, None, None, []

    def show(self, result: Lane, texts: list[str]) -> None:
        """Take over a finished lane."""
        answer = result.answers[0]
        self.shown_run = self.run
        self.result, self.memory, self.drift = result, result.memory, result.drift
        self.kept, self.packed, self.restored = result.kept_positions, result.packed, result.restored
        self.tokens, self.texts, self.kl = list(answer.tokens), texts, answer.kl
        self.error, self.edits = result.error, list(result.edits)
        self.status = {"cancelled": "cancelled", "error": "error"}.get(answer.stopped or "", "done")
