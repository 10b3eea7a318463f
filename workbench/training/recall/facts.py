"""Facts: a key, an attribute and a value, the sentences that state them and the questions that ask for them.

Every statement names the key before the value, so that the tokens of the value can know whom they belong to.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from . import words


@dataclass(frozen=True)
class Attribute:
    """What can be said about a key: `{k}` is the key and `{v}` the value; the first statement is the canonical one."""

    name: str
    draw: Callable[[random.Random], str]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One key, what is said of it, and the answer a question expects (without its leading space)."""

    key: str
    attribute: Attribute
    value: str

    def statement(self, form: int = 0) -> str:
        """The sentence that states the fact, ending in ` .`."""
        forms = self.attribute.statements
        return forms[form % len(forms)].format(k=self.key, v=self.value)

    def question(self, form: int = 0) -> str:
        """A question the value answers, ending in ` ?`."""
        forms = self.attribute.questions
        return forms[form % len(forms)].format(k=self.key)

    def opening(self) -> str:
        """The canonical statement up to the value: the same sentence begun again asks for the value too."""
        return self.statement()[: -len(f" {self.value} .")]


def _of(values: list[str]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(values)


def _pair_of(values: list[str]) -> Callable[[random.Random], str]:
    return lambda rng: " and ".join(rng.sample(values, 2))


def _phrase(rng: random.Random) -> str:
    return " ".join(
        rng.choice(rng.choice([words.THINGS, words.ADJECTIVES, words.OBJECTS])) for _ in range(rng.randint(2, 4))
    )


def _password(rng: random.Random) -> str:
    return "-".join(rng.choice(rng.choice([words.THINGS, words.ANIMALS])) for _ in range(rng.randint(2, 3)))


# Values of one word, all but the number: the first levels of the curriculum use these and nothing else.
SHORT = (
    Attribute(
        "colour",
        _of(words.COLOURS),
        ("The colour of {k} is {v} .", "{k} has the colour {v} .", "{k} is painted {v} ."),
        ("What is the colour of {k} ?", "Which colour has {k} ?"),
    ),
    Attribute(
        "home",
        _of(words.PLACES),
        ("The home of {k} is {v} .", "{k} lives at {v} .", "{k} is at home in {v} ."),
        ("Where is the home of {k} ?", "Where does {k} live ?"),
    ),
    Attribute(
        "gift",
        _of(words.OBJECTS),
        ("The gift for {k} is {v} .", "{k} was given {v} ."),
        ("What is the gift for {k} ?", "What was given to {k} ?"),
    ),
    Attribute(
        "trade",
        _of(words.TRADES),
        ("The trade of {k} is {v} .", "{k} works as {v} ."),
        ("What is the trade of {k} ?", "What does {k} work as ?"),
    ),
    Attribute(
        "animal",
        _of(words.ANIMALS),
        ("The animal of {k} is {v} .", "{k} looks after {v} ."),
        ("What is the animal of {k} ?", "Which animal has {k} ?"),
    ),
    Attribute(
        "fruit",
        _of(words.FRUITS),
        ("The fruit of {k} is {v} .", "{k} likes to eat {v} ."),
        ("What is the fruit of {k} ?", "Which fruit does {k} eat ?"),
    ),
    Attribute(
        "number",
        lambda rng: words.number(rng, 2, 2),
        ("The number of {k} is {v} .", "{k} has the number {v} ."),
        ("What is the number of {k} ?", "Which number has {k} ?"),
    ),
)
# Values of up to eight tokens.
LONG = (
    Attribute("secret number", lambda rng: words.number(rng, 3, 7), ("The secret number kept for {k} is {v} .", "One secret number belongs to {k} : {v} .", "Remember that the secret number of {k} is {v} ."), ("What is the secret number of {k} ?", "Which secret number is kept for {k} ?")),
    Attribute("password", _password, ("The password of {k} is {v} .", "{k} uses the password {v} ."), ("What is the password of {k} ?", "Which password does {k} use ?")),
    Attribute("motto", _phrase, ("The motto of {k} is {v} .", "{k} has the motto {v} ."), ("What is the motto of {k} ?", "Which motto has {k} ?")),
    Attribute("colours", _pair_of(words.COLOURS), ("The flag of {k} is {v} .", "{k} has a flag in {v} ."), ("What is the flag of {k} ?", "Which flag has {k} ?")),
    Attribute("friends", _pair_of(words.NAMES), ("The friends of {k} are {v} .", "{k} has the friends {v} ."), ("Who are the friends of {k} ?", "Which friends has {k} ?")),
)  # fmt: skip


def keys(rng: random.Random, kind: str, n: int, held_out: bool = False) -> list[str]:
    """`n` different keys of a kind: `name`, `pair` (`quiet-river`) or `spelt` (any letters; training only)."""
    one = {
        "name": lambda: words.name(rng, held_out),
        "pair": lambda: words.pair(rng, held_out),
        "spelt": lambda: words.spelt(rng),
    }
    return words.several(one[kind], n)


def draw(
    rng: random.Random, n: int, long_share: float = 0.0, rich_keys: float = 0.0, held_out: bool = False
) -> list[Fact]:
    """`n` facts of which no two have the same key and attribute.

    Three documents in five have one attribute, so that a guess among values of the right kind is a guess among `n`.
    """
    kind = "name"
    if rng.random() < rich_keys:
        kind = "pair" if held_out or rng.random() < 0.5 else "spelt"
    pool = [
        rng.choice(LONG) if rng.random() < long_share else rng.choice(SHORT) for _ in range(rng.choice([1, 1, 1, 2, 3]))
    ]
    pool = list(dict.fromkeys(pool))
    found: list[Fact] = []
    if len(pool) > 1 and rng.random() < 0.5:  # keys with several attributes: the key alone does not tell the value
        subjects = keys(rng, kind, -(-n // len(pool)), held_out)
        found = [Fact(k, a, a.draw(rng)) for k in subjects for a in pool]
        rng.shuffle(found)
        return found[:n]
    return [Fact(k, a, a.draw(rng)) for k in keys(rng, kind, n, held_out) for a in [rng.choice(pool)]]
