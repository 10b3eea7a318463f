"""``wb.stream`` and ``wb.compare``: one prompt, several lanes, the same run event by event or as a result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from workbench.errors import PromptError, RecipeError
from workbench.models.load import Model
from workbench.runs.control import Control, Place, device_queue
from workbench.runs.decode import Sampling
from workbench.runs.events import AnyEvent, LaneDone, Paused, Queued
from workbench.runs.lane import Answer, Comparison, Lane
from workbench.runs.lane_run import LaneRun, Settings
from workbench.runs.prompt import Snapshot
from workbench.runs.reference import ReferenceRun
from workbench.runs.steer import Script
from workbench.strategies.recipe import Recipe

PROBES = ("drift", "attention")


class Run:
    """One comparison being made. Iterate :meth:`events`; results are in ``lanes`` as they come.

    ``snapshot`` and ``trace`` may be handed to a later run of the same prompt, which then neither reads the prompt
    nor runs the reference again.
    """

    def __init__(
        self,
        model: Model,
        prompt: str | Sequence[int],
        lanes: Sequence[str | Recipe],
        *,
        question: str | Sequence[str] | None = None,
        max_new_tokens: int = 64,
        seed: int = 0,
        temperature: float = 0.0,
        chunk: int = 2048,
        first_token: str = "replayed",
        probes: Sequence[str] = ("drift", "attention"),
        reference: int = 0,
        control: Control | None = None,
        reuse_prompt: bool = False,
        rewindable: bool = False,
        snapshot: Snapshot | None = None,
        trace: ReferenceRun | None = None,
    ) -> None:
        self.model = model
        self.control = control or Control()
        self.recipes = [Recipe.parse(recipe) for recipe in lanes]
        self.reference = reference
        self.snapshot, self.trace = snapshot, trace
        _check(self.recipes, max_new_tokens, temperature, seed, chunk, first_token, probes, reference)
        self.prompt = model.encode(prompt)
        texts = [question] if isinstance(question, str) else list(question or [])
        self.questions = [(text, model.encode(text, continues=True)) for text in texts]
        longest = max((len(ids) for _, ids in self.questions), default=0)
        if len(self.prompt) + longest >= model.geometry.max_positions:
            raise PromptError(
                f"Prompt and question together have {len(self.prompt) + longest:,} tokens, but {model.id} reads at most "
                f"{model.geometry.max_positions:,}; shorten them."
            )
        for recipe in self.recipes:
            recipe.check(model.geometry, model.artifacts)
        sampling = Sampling(max_new_tokens, temperature, seed)
        self.settings = Settings(sampling, chunk, first_token, tuple(probes), reuse_prompt, rewindable)
        self.scripts: dict[int, Script] = {}  # by lane: what it does again
        self.starts: dict[int, Snapshot] = {}  # by lane: right after its prompt, where that is held
        self.lanes = [
            Lane(r.text, r.resolved, [Answer(text) for text in texts] or [Answer()], first_token=first_token)
            for r in self.recipes
        ]

    def events(self, only: Sequence[int] | None = None) -> Iterator[AnyEvent]:
        """Run the lanes, the reference first (the others are compared with it), and say what happens.

        Args:
            only: the lanes to run; by default all.
        """
        wanted = range(len(self.recipes)) if only is None else only
        for number in sorted(wanted, key=lambda n: n != self.reference):
            queue = device_queue(self.model.device)
            if queue.ahead():
                yield Queued(number, queue.ahead())
            place = Place(queue, self.control)
            try:
                if not place.enter():
                    yield self._cancelled(number)
                    continue
                for event in LaneRun(self, number).events():
                    if isinstance(event, Paused):
                        place.leave()
                        yield event
                        self.control.wait()
                        place.enter()
                    else:
                        yield event
            finally:
                place.leave()

    def relate(self, lane: Lane) -> None:
        """Set a lane's bytes against the reference's."""
        base = self.trace.cache_bytes if self.trace is not None else 0
        lane.memory.reference_bytes = base
        lane.memory.ratio = lane.memory.used_bytes / base if base else None

    def _cancelled(self, number: int) -> LaneDone:
        for answer in self.lanes[number].answers:
            answer.stopped = "cancelled"
        return LaneDone(number, self.lanes[number])

    def comparison(self) -> Comparison:
        return Comparison(self)


def stream(
    model: Model, prompt: str | Sequence[int], lanes: Sequence[str | Recipe], **options: object
) -> Iterator[AnyEvent]:
    """The run of :func:`compare`, event by event; the same arguments, plus ``control`` to cancel it."""
    return Run(model, prompt, lanes, **options).events()  # type: ignore[arg-type]


def compare(
    model: Model,
    prompt: str | Sequence[int],
    lanes: Sequence[str | Recipe],
    *,
    on_event: Callable[[AnyEvent], None] | None = None,
    **options: object,
) -> Comparison:
    """Run one prompt through several lanes.

    Args:
        model: from :func:`workbench.load`.
        prompt: text or token ids.
        lanes: recipes, for example ``["full", "snapkv(budget=0.25)"]``.
        on_event: called with every event, for progress.
        options: ``question`` (text or several, fed after the prompt was compressed), ``max_new_tokens`` (64), ``seed``
            (0), ``temperature`` (0, greedy), ``chunk`` (2048 tokens per prefill step), ``first_token`` ("replayed":
            the last prompt token is asked again against the compressed cache; "prefill": from the uncompressed
            prefill), ``probes`` ("drift", "attention"), ``reference`` (lane 0), ``control``, ``reuse_prompt`` (read
            the prompt once and start every lane from it that can), ``rewindable`` (hold every lane's cache as it is
            after the prompt, so that it is rewound and forked at once; otherwise it reads the prompt again for that).

    Returns:
        A :class:`Comparison`; ``cmp[1].text``, ``cmp[1].memory``, ``cmp[1].kl`` …

    Raises:
        WorkbenchError: bad input, before anything runs. A lane that fails while running has ``error`` set instead.
    """
    run = Run(model, prompt, lanes, **options)  # type: ignore[arg-type]
    for event in run.events():
        if on_event is not None:
            on_event(event)
    return run.comparison()


def _check(
    recipes: Sequence[Recipe],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    chunk: int,
    first_token: str,
    probes: Sequence[str],
    reference: int,
) -> None:
    if not recipes:
        raise RecipeError("There is no lane to run; give at least one recipe, for example 'full'.")
    if not 0 <= reference < len(recipes):
        raise RecipeError(f"The reference is lane {reference}, but there are lanes 0 to {len(recipes) - 1}.")
    if max_new_tokens < 1:
        raise PromptError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if not 0 <= temperature < math.inf:
        raise PromptError(f"temperature must be 0 (greedy) or above, got {temperature}.")
    if not 0 <= seed < 1 << 63:
        raise PromptError(f"seed must be a whole number from 0 to 2^63 - 1, got {seed}.")
    if chunk < 1:
        raise PromptError(f"chunk must be at least 1 token, got {chunk}.")
    if first_token not in ("replayed", "prefill"):
        raise PromptError(f"first_token must be 'replayed' or 'prefill', got '{first_token}'.")
    unknown = sorted(set(probes) - set(PROBES))
    if unknown:
        raise PromptError(f"There is no probe '{unknown[0]}'; there are {' and '.join(PROBES)}.")
