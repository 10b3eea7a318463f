"""Generating one answer, and feeding the reference's answer to a lane (teacher forcing)."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.cache.cache import WorkbenchCache
from workbench.errors import WorkbenchError
from workbench.runs.events import Edited, Paused, Refused, Token
from workbench.runs.lane import Answer
from workbench.runs.prompt import forward
from workbench.runs.reference import QueryRecorder, ReferenceAnswer
from workbench.runs.steer import FIXED, TOO_LATE, Edit, Steering, edited

if TYPE_CHECKING:
    from workbench.models.load import Model
    from workbench.runs.control import Control
    from workbench.runs.events import AnyEvent


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedy at temperature 0, else sampled with a seed shared by all lanes."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0

    def generator(self, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(self.seed)

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        weights = torch.softmax(logits / self.temperature, -1)
        return int(torch.multinomial(weights, 1, generator=generator))


def end_tokens(model: Model) -> set[int]:
    """Ids that end an answer, from the generation config or the tokenizer."""
    config = getattr(model.network, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    if ends is None and model.tokenizer is not None:
        ends = model.tokenizer.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, list | tuple) else {int(ends)}


def kl_divergence(reference: Tensor, lane: Tensor) -> float:
    """KL(reference || lane) in nats of two log-distributions [vocabulary]; never below 0."""
    # Where the reference gives no probability (masked vocabulary), 0 * (-inf) counts as 0.
    kl = torch.where(reference > -torch.inf, reference.exp() * (reference - lane), 0.0).sum()
    return float(kl.clamp_min(0.0))  # rounding may leave it a little below


class Decoder:
    """Decodes one answer of a lane, comparing it with the reference's on the way.

    Args:
        lane: its number, for the events.
        answer: filled while decoding.
        steering: what editing it on the way takes.

    Attributes:
        cache: the cache now; another one after the recipe was changed.
        edits: all that was done so far.
    """

    def __init__(
        self,
        lane: int,
        model: Model,
        cache: WorkbenchCache,
        sampling: Sampling,
        control: Control,
        answer: Answer,
        steering: Steering,
    ) -> None:
        self.lane, self.model, self.cache = lane, model, cache
        self.sampling, self.control, self.answer = sampling, control, answer
        self.edits: list[Edit] = []
        self._steering, self._script = steering, steering.script
        self._fork_recent, self._fixed = steering.recent, False
        self._reference: ReferenceAnswer | None = None
        self._fork: WorkbenchCache | None = None  # the lane's cache where it left the reference's tokens
        self._agreed = 0
        self._kl: list[float] = []

    def generate(
        self,
        logits: Tensor,
        reference: ReferenceAnswer | None,
        record: ReferenceAnswer | None,
        recorder: QueryRecorder | None,
    ) -> Generator[AnyEvent, None, None]:
        """Generate until the end token, the length, or a cancel; yields every token, and what was done by hand.

        Args:
            logits: distribution of the first token [vocabulary].
            reference: the reference's finished answer, to compare with.
            record: where the reference lane leaves its own answer, with the queries of ``recorder``.
        """
        model, answer, self._reference = self.model, self.answer, reference
        generator, ends = self.sampling.generator(model.device), end_tokens(model)
        room = model.geometry.max_positions - self.cache.get_seq_length()
        began = time.perf_counter()
        answer.stopped = "length"
        most, script = max(0, min(self.sampling.max_new_tokens, room)), self._script.tokens
        self._fixed = record is not None
        for index in range(most):
            fed = answer.tokens[-1] if answer.tokens else self._steering.asked
            for edit in self._script.edits:
                if edit.token == index > 0:  # those before the first token were done before the question was fed
                    logits = self._edit(edit, fed, self._script.strict)
                    yield Edited(self.lane, edit)
            if index == self._script.stop:
                answer.stopped = "rewound"
                break
            logits = yield from self._live(index, fed, logits)
            if self.control.cancelled:
                answer.stopped = "cancelled"
                break
            token = self.sampling.choose(logits, generator)
            if index < len(script):
                token = script[index]  # drawn all the same, so that what follows is drawn as it was
            if record is not None:
                record.tokens.append(token)
                record.log_probs.append(logits.log_softmax(-1))
            self._compare(index, token, logits)
            answer.tokens.append(token)
            answer.decode_seconds = time.perf_counter() - began
            yield Token(self.lane, index, token, model.token_text([token])[0], answer.decode_seconds)
            if token in ends:
                answer.stopped = "eos"
                break
            if index + 1 < self.sampling.max_new_tokens:
                logits = forward(model, self.cache, [token])
                if record is not None and recorder is not None:
                    record.later_queries.append(recorder.take())
        answer.decode_seconds = time.perf_counter() - began
        answer.text = model.decode(answer.tokens)
        self._first_divergence()

    def _live(self, index: int, fed: int, logits: Tensor) -> Generator[AnyEvent, None, Tensor]:
        """Wait while the run is held, and do what is asked for meanwhile; hands on the logits of token ``index``."""
        late = index == 0 and self._steering.later
        while True:
            # Where the question was fed, what is asked for waits for the next token; if the lane is held, it cannot.
            for asked in () if late and not self.control.paused else self.control.take_edits():
                edit = replace(asked, token=index)
                try:
                    if self._fixed or late:
                        raise WorkbenchError(FIXED if self._fixed else TOO_LATE)
                    logits = self._edit(edit, fed)
                except WorkbenchError as error:
                    yield Refused(self.lane, str(error))
                else:
                    yield Edited(self.lane, edit)
            if not self.control.holds(index):
                return logits
            yield Paused(self.lane, index)

    def _edit(self, edit: Edit, fed: int, strict: bool = True) -> Tensor:
        """Do it, and ask the last token again: its answer must come from what is held now."""
        self.cache = edited(edit, self.cache, self._steering.source, self._steering.recent, strict)
        self.edits.append(edit)
        return self._again(self.cache, fed)

    def _again(self, cache: WorkbenchCache, fed: int) -> Tensor:
        with cache.replay():
            return forward(self.model, cache, [fed], cache.get_seq_length() - 1)

    def _compare(self, index: int, token: int, logits: Tensor) -> None:
        """Compare the distribution of token ``index`` while the lane still follows the reference."""
        if self._reference is None or self._fork is not None or index >= len(self._reference.tokens):
            return
        self._add_kl(index, logits)
        if token != self._reference.tokens[index]:
            self._fork = self.cache.clone()  # the lane goes its own way from here; teacher forcing starts from the fork
            self._fork_recent = self._steering.recent.copy()
            self._fork.probes.append(self._fork_recent)

    def _add_kl(self, index: int, logits: Tensor) -> None:
        assert self._reference is not None
        p = self._reference.log_probs[index]
        q = logits.log_softmax(-1)
        kl = kl_divergence(p, q)
        if math.isnan(kl):
            raise WorkbenchError(
                "The logits of this lane are not numbers (NaN); load the model with dtype='float32', or use a recipe "
                "that changes the cache less."
            )
        self._kl.append(kl)
        self._agreed += int(p.argmax() == q.argmax())

    def _first_divergence(self) -> None:
        if self._reference is None:
            return
        ours, theirs = self.answer.tokens, self._reference.tokens
        unequal = (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        first = next(unequal, None)
        if first is None and len(ours) != len(theirs):
            first = min(len(ours), len(theirs))
        self.answer.first_divergence = first

    def teacher_force(self) -> None:
        """Feed the rest of the reference's tokens to the lane as it was where the two parted; completes the KL.

        Stops early, keeping what was compared, when the run is cancelled or was rewound. Edits of the lane are done to it as well.
        """
        if self._reference is None:
            count = len(self.answer.tokens)
            self.answer.kl, self.answer.top1_agreement = [0.0] * count, 1.0 if count else None
            return
        theirs = self._reference.tokens
        cache = self._fork or self.cache
        for index in range(len(self._kl), len(theirs)):
            if self.control.cancelled or self.answer.stopped == "rewound":
                break
            logits = forward(self.model, cache, [theirs[index - 1]])
            for edit in self.edits:  # what was done to the lane later is done here at the same places
                if edit.token == index:
                    cache = edited(edit, cache, self._steering.source, self._fork_recent, strict=False)
                    logits = self._again(cache, theirs[index - 1])
            self._add_kl(index, logits)
        self.answer.kl = list(self._kl)
        self.answer.top1_agreement = self._agreed / len(self._kl) if self._kl else None
