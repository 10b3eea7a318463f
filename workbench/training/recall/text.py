"""Procedural text whose answers can only be found in the context: training texts by level, and evaluation documents.

A training text is a list of pieces, so that the trainer knows which tokens can be predicted at all. A `Document` is one context with
one question, its answer and the place of the one sentence that holds the answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from . import facts, prose, words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Count = Callable[[str], int]  # tokens of a piece of text


class Role(IntEnum):
    """What a piece of a training text is for."""

    TEXT = 0
    ANSWER = 1  # can be predicted from the context: full weight in the loss
    COPY = 2  # second half of a repetition: full weight too
    QUESTION = 3  # text that asks; its last token has to look the answer up


class Piece(NamedTuple):
    """A stretch of training text. Pieces meet where the tokenizer splits anyway, so they can be encoded one by one."""

    text: str
    role: Role = Role.TEXT


@dataclass(frozen=True)
class Level:
    """One step of the curriculum: how many facts, how much else, and how they are asked."""

    facts: tuple[int, int]
    fillers: tuple[int, int] = (0, 0)
    length: tuple[int, int] | None = None  # tokens; if given, fillers fill the document up to it
    table: str | None = None  # tables with this separator instead of sentences
    reworded: float = 0.0  # share of questions in other words than the statement
    other_forms: float = 0.0  # share of statements in another than the canonical form
    long_share: float = 0.0  # share of attributes with long values
    rich_keys: float = 0.0  # share of documents whose keys are pairs or spelt
    repeat: tuple[int, int] = (6, 24)  # words in a repetition


LEVELS = (
    Level(facts=(4, 10), table="", repeat=(6, 16)),
    Level(facts=(4, 12), table=" :", repeat=(6, 24)),
    Level(facts=(4, 10), fillers=(0, 2), repeat=(6, 32)),
    Level(facts=(4, 12), fillers=(0, 6), reworded=0.6, repeat=(6, 40)),
    Level(facts=(8, 24), fillers=(4, 16), reworded=0.7, other_forms=0.1, long_share=0.2, rich_keys=0.1, repeat=(8, 60)),
    Level(
        facts=(8, 32),
        length=(200, 1000),
        reworded=0.8,
        other_forms=0.2,
        long_share=0.25,
        rich_keys=0.2,
        repeat=(8, 120),
    ),
    Level(
        facts=(8, 40),
        length=(300, 2000),
        reworded=0.8,
        other_forms=0.2,
        long_share=0.25,
        rich_keys=0.2,
        repeat=(8, 240),
    ),
)


def _haystack(rng: random.Random) -> Callable[[], str]:
    """A source of filler sentences: mostly prose, sometimes one unit over and over."""
    if rng.random() < 0.8:
        return lambda: prose.sentence(rng)
    unit = prose.noise_unit(rng)
    return lambda: unit


def _body(rng: random.Random, stated: list[str], fillers: int, room: int | None, count: Count) -> list[str]:
    """The statements and fillers in random order; with `room` (tokens), fillers are added until it is full."""
    filler = _haystack(rng)
    if room is None:
        lines = stated + [filler() for _ in range(fillers)]
    else:
        lines, left = list(stated), room - sum(count(" " + s) for s in stated)
        while (left := left - count(" " + (line := filler()))) > 0:
            lines.append(line)
    rng.shuffle(lines)
    return lines


def story(rng: random.Random, level: Level, count: Count) -> list[Piece]:
    """Facts among fillers, then questions about them in another order.

    A heading announces several questions; without it the text ends after one, so that the model learns when to stop.
    """
    room = None if level.length is None else int(level.length[0] * (level.length[1] / level.length[0]) ** rng.random())
    most = level.facts[1] if room is None else max(level.facts[0], min(level.facts[1], room // 20))
    known = facts.draw(rng, rng.randint(level.facts[0], most), level.long_share, level.rich_keys)
    reworded = level.reworded > 0
    single = reworded and rng.random() < 0.2
    asked = rng.sample(known, 1 if single else min(len(known), 16))
    stated = [f.statement(rng.randrange(6) if rng.random() < level.other_forms else 0) for f in known]
    if room is not None:
        room -= sum(count(f.question() + f.value) + 4 for f in asked)
    lines = _body(rng, stated, rng.randint(*level.fillers), room, count)
    pieces = [Piece(" ".join(lines) + ("\n" if single or not reworded else "\nQuestions\n"))]
    for f in asked:
        ask = f.question(rng.randrange(6)) if rng.random() < level.reworded else f.opening()
        pieces += [Piece(ask, Role.QUESTION), Piece(f" {f.value} .", Role.ANSWER), Piece("\n")]
    return pieces


def table(rng: random.Random, level: Level) -> list[Piece]:
    """Keys and values of one kind in a row, then all keys in another order, each to be followed by its value."""
    attribute = rng.choice(facts.SHORT)
    rows = [(k, attribute.draw(rng)) for k in facts.keys(rng, "name", rng.randint(*level.facts))]
    pieces = [Piece("Table\n" + " ;".join(f" {k}{level.table} {v}" for k, v in rows) + "\nLook up\n")]
    rng.shuffle(rows)
    for k, v in rows:
        pieces += [Piece(f" {k}{level.table}", Role.QUESTION), Piece(f" {v} ;", Role.ANSWER)]
    return [*pieces, Piece("\n")]


def repetition(rng: random.Random, low: int, high: int) -> list[Piece]:
    """Random words, twice; the second time they can be copied. Half of the texts say so at their beginning."""
    n = int(low * (high / low) ** rng.random())
    pools = [words.NAMES, words.OBJECTS, words.COLOURS, words.PLACES, words.THINGS, words.ADJECTIVES]
    run = " " + " ".join(words.invented(rng) if rng.random() < 0.5 else rng.choice(rng.choice(pools)) for _ in range(n))
    head, gap = ("Repeat :", " |") if rng.random() < 0.5 else ("", rng.choice(["", "\n", " ."]))
    return [Piece(head + run + gap), Piece(run + gap, Role.COPY), Piece("\n")]


def variables(rng: random.Random, n: int) -> list[Piece]:
    """Assignments, some of one variable to another, and what is printed in the end."""
    names = rng.sample("abcdefghijklmnopqrstuvwxyz", min(n, 26))
    value: dict[str, str] = {}
    lines = []
    for i, v in enumerate(names):
        if i and rng.random() < 0.5:
            source = rng.choice(names[:i])
            value[v] = value[source]
            lines.append(f"{v} = {source}")
        else:
            value[v] = rng.choice(words.COLOURS) if rng.random() < 0.5 else words.number(rng, 2, 4)
            lines.append(f"{v} = {value[v]}")
    pieces = [Piece("\n".join(lines) + "\n")]
    for v in rng.sample(names, min(8, len(names))):
        pieces += [Piece(f"print {v} ->", Role.QUESTION), Piece(f" {value[v]} .", Role.ANSWER), Piece("\n")]
    return pieces


def passkey(rng: random.Random, level: Level, count: Count) -> list[Piece]:
    """One number in a haystack, asked for at the end."""
    key = words.number(rng, 3, 7)
    room = None if level.length is None else int(level.length[0] * (level.length[1] / level.length[0]) ** rng.random())
    stated = [
        f"The pass key is {key} . Remember it ."
        if rng.random() < 0.5
        else f"The pass key is {key} . Remember it . {key} is the pass key ."
    ]
    lines = _body(rng, stated, rng.randint(3, 12), room, count)
    ask = rng.choice(["What is the pass key ?", "The pass key is"])
    return [Piece(" ".join(lines) + "\n"), Piece(ask, Role.QUESTION), Piece(f" {key} .", Role.ANSWER), Piece("\n")]


def _tight(pieces: list[Piece]) -> list[Piece]:
    """The same with punctuation close to its word, as people type it."""

    def close(text: str) -> str:
        for mark in ".,?:":
            text = text.replace(f" {mark}", mark)
        return text

    return [Piece(close(text), role) for text, role in pieces]


def task(rng: random.Random, number: int, count: Count) -> list[Piece]:
    """What level `number` is about: the text by which it is judged whether the level is mastered."""
    level = LEVELS[number]
    return story(rng, level, count) if level.table is None else table(rng, level)


def training_text(rng: random.Random, number: int, count: Count) -> list[Piece]:
    """A text for training at level `number`: its task, tasks of lower levels, repetition, prose, variables, pass keys."""
    if rng.random() >= 0.8:
        number = rng.randint(0, number)
    level = LEVELS[number]
    dice = rng.random()
    if dice < (0.35, 0.15, 0.15, 0.1)[min(number, 3)]:
        return repetition(rng, *level.repeat)
    if number > 0 and 0.15 <= dice < 0.2:
        return [Piece(prose.text(rng))]
    if number > 2 and 0.2 <= dice < 0.24:
        return variables(rng, rng.randint(3, 6 + 2 * number))
    if number > 2 and 0.24 <= dice < 0.26:
        return passkey(rng, level, count)
    pieces = task(rng, number, count)
    return _tight(pieces) if number > 2 and rng.random() < 0.25 else pieces


@dataclass(frozen=True)
class Document:
    """A context, one question about it, and where its answer stands.

    `prompt` is `context + question`; the model answers with ` {answer} .`. `evidence` is the sentence that states the fact,
    `evidence_span` its characters within the prompt and `evidence_tokens` its tokens within `prompt_ids` (start, end; BOS is token 0).
    """

    context: str
    question: str
    answer: str
    kind: str
    evidence: str
    evidence_span: tuple[int, int]
    evidence_tokens: tuple[int, int]
    prompt_ids: tuple[int, ...]
    depth: float  # where the evidence begins, as a fraction of the prompt's tokens

    @property
    def prompt(self) -> str:
        return self.context + self.question

    def is_answered_by(self, text: str) -> bool:
        """Whether generated text begins with exactly the answer and its full stop."""
        return text.split(".")[0].strip() == self.answer


def document(
    seed: int,
    length_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    depth: float | None = None,
    held_out: bool = True,
    kind: str | None = None,
) -> Document:
    """An evaluation document of at most `length_tokens` tokens, less than 40 below it, the same for the same arguments.

    `depth` (0 to 1) fixes where among the sentences the asked fact stands; None draws it. `held_out` takes the keys from words that
    training never saw. `kind` asks for one attribute by name (`colour`, `secret number`, …); None takes what the text offers.
    """
    known_kinds = [a.name for a in (*facts.SHORT, *facts.LONG)]
    if kind is not None and kind not in known_kinds:
        raise ValueError(f"document: kind must be one of {', '.join(known_kinds)}, got {kind!r}.")
    if length_tokens < 96:
        raise ValueError(f"document: length_tokens must be at least 96, got {length_tokens}.")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"document: depth must be from 0 to 1, got {depth}.")
    rng = random.Random(f"document {seed} {length_tokens} {depth} {held_out} {kind}")

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    most = min(LEVELS[-1].facts[1], length_tokens // 20)
    while True:
        known = facts.draw(rng, rng.randint(most // 2, most), LEVELS[-1].long_share, LEVELS[-1].rich_keys, held_out)
        candidates = [f for f in known if kind in (None, f.attribute.name)]
        if candidates:
            break
    asked = rng.choice(candidates)
    evidence = asked.statement(rng.randrange(6) if rng.random() < LEVELS[-1].other_forms else 0)
    question = asked.question(rng.randrange(6))
    room = length_tokens - 2 - count(question) - count(" " + evidence)
    others = []
    for f in known:
        sentence = f.statement(rng.randrange(6) if rng.random() < LEVELS[-1].other_forms else 0)
        if f is not asked and (room := room - count(" " + sentence)) > 0:
            others.append(sentence)
    lines = _body(rng, others, 0, sum(count(" " + s) for s in others) + max(room, 0), count)
    sizes = [count(" " + line) for line in lines]
    goal = (rng.random() if depth is None else depth) * sum(sizes)
    place = min(range(len(lines) + 1), key=lambda i: abs(sum(sizes[:i]) - goal))
    if place == 0 and evidence.startswith(asked.key):
        place = 1  # a text begins without a space, where a key would be spelt in other tokens
    lines.insert(place, evidence)
    while True:
        context = " ".join(lines) + "\n"
        encoded = tokenizer(context + question, return_offsets_mapping=True)
        if len(encoded["input_ids"]) <= length_tokens:
            break
        # The first word, which has no space before it, may take a few tokens more than was counted.
        gone = place - 1 if place == len(lines) - 1 else len(lines) - 1
        lines.pop(gone)
        place -= gone < place
    start = sum(len(line) + 1 for line in lines[:place])
    span = (start, start + len(evidence))
    inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if b > a and b > span[0] and a < span[1]]
    return Document(
        context=context,
        question=question,
        answer=asked.value,
        kind=asked.attribute.name,
        evidence=evidence,
        evidence_span=span,
        evidence_tokens=(inside[0], inside[-1] + 1),
        prompt_ids=tuple(encoded["input_ids"]),
        depth=inside[0] / len(encoded["input_ids"]),
    )
