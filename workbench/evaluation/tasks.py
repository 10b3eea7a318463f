"""Needles, tables, variables and copying: prompts with their answers and the tokens that hold them.

Every example is the same for the same arguments, works offline, and asks about names and words that the house models
never saw in training. Text goes through the model's own tokenizer, and spans are in its token indices (BOS counts).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.errors import PromptError
from workbench.training.recall import facts, prose, text, words

if TYPE_CHECKING:
    from workbench.models.load import Model


@dataclass(frozen=True)
class Example:
    """A prompt ready to run.

    Attributes:
        title: for a menu.
        context, question: the prompt's two parts; run the context with ``question=`` to ask after compression
            (query-agnostic), or :attr:`prompt` as a whole (query-aware).
        answer: what a right answer begins with; None for free text.
        evidence: token spans [start, end) of the prompt that hold the answer.
        tokens: length of the prompt.
    """

    title: str
    context: str
    question: str
    answer: str | None
    evidence: tuple[tuple[int, int], ...]
    tokens: int

    @property
    def prompt(self) -> str:
        return self.context + self.question

    def is_answered_by(self, generated: str) -> bool | None:
        """Whether generated text begins with the answer, up to spaces; None where there is no right answer."""
        if self.answer is None:
            return None
        said, right = generated.split(), self.answer.split()
        return said[: len(right)] == right


FIRST_NEEDLE = 9  # snapkv loses its answer at a budget of 0.25 and gives it at 0.4, whenever the question is asked


def needle(
    model: Model, length_tokens: int = 500, depth: float = 0.5, seed: int = 0, kind: str | None = None
) -> Example:
    """One fact among others and prose, asked for at the end.

    Args:
        length_tokens: of the whole prompt, at least 96; the result is at most this and less than 40 below it.
        depth: 0 to 1, where among the sentences the fact stands.
        kind: which attribute is asked ("secret number", "colour", …); None takes what the text offers.

    Raises:
        PromptError: a model without a tokenizer, or an argument out of range.
    """
    try:
        found = text.document(seed, length_tokens, fast_tokenizer(model), depth=depth, kind=kind)
    except ValueError as error:
        raise PromptError(str(error).removeprefix("document: ").capitalize()) from None
    title = f"Needle in prose, {found.kind}"
    return Example(
        title, found.context, found.question, f"{found.answer} .", (found.evidence_tokens,), len(found.prompt_ids)
    )


def table_lookup(model: Model, rows: int = 24, seed: int = 0) -> Example:
    """Names and values in a row; one name is looked up."""
    rng = random.Random(f"table {seed} {rows}")
    attribute = rng.choice([a for a in facts.SHORT if a.name != "number"])
    pairs = [(key, attribute.draw(rng)) for key in facts.keys(rng, "name", rows, held_out=True)]
    key, value = pairs[rng.randrange(rows // 4, max(rows // 4 + 1, 3 * rows // 4))]
    context = "Table\n" + " ;".join(f" {k} : {v}" for k, v in pairs) + "\nLook up\n"
    return _example(model, f"Table lookup, {rows} rows", context, f" {key} :", f"{value} ;", [f" {key} : {value} ;"])


def variable_tracking(model: Model, variables: int = 14, seed: int = 0) -> Example:
    """Assignments (6 to 26 variables); what is printed got its value from another, which got it from a third."""
    if not 6 <= variables <= 26:
        raise PromptError(f"Variable tracking takes 6 to 26 variables, got {variables}.")
    rng = random.Random(f"variables {seed} {variables}")
    names = rng.sample("abcdefghijklmnopqrstuvwxyz", variables)
    chain, others = names[:3], names[3:]
    values = [
        rng.choice(words.COLOURS) if rng.random() < 0.5 else words.number(rng, 2, 4) for _ in range(len(others) + 1)
    ]
    steps = [f"{chain[0]} = {values[0]}", f"{chain[1]} = {chain[0]}", f"{chain[2]} = {chain[1]}"]
    lines = [f"{name} = {value}" for name, value in zip(others, values[1:])]
    places = sorted(rng.sample(range(len(lines) + 1), len(steps)))
    for before, (place, step) in enumerate(zip(places, steps)):
        lines.insert(place + before, step)
    context = "\n".join(lines) + "\n"
    return _example(model, "Variable tracking, two hops", context, f"print {chain[2]} ->", f"{values[0]} .", steps)


def copying(model: Model, count: int = 40, seed: int = 0) -> Example:
    """Words to be repeated: every one of them is evidence."""
    rng = random.Random(f"copying {seed} {count}")
    run = " ".join(words.several(lambda: words.invented(rng, held_out=True), count))
    return _example(model, f"Copying, {count} words", f"Repeat : {run} |", "", run, [run])


def free_text(model: Model, sentences: int = 16, seed: int = 0) -> Example:
    """A story to go on with; there is no right answer."""
    rng = random.Random(f"free {seed} {sentences}")
    body = " ".join(prose.sentence(rng) for _ in range(sentences))
    return _example(model, "Free text", f"Once upon a time there was a brave sailor . {body}", "", None, [])


def examples(model: Model) -> list[Example]:
    """Prompts for a first look, in the order of a menu; none for a model without a tokenizer, or too short a one."""
    if model.tokenizer is None:
        return []
    made = [
        needle(model, 500, 0.4, seed=FIRST_NEEDLE),
        needle(model, 500, 0.4, kind="secret number"),
        table_lookup(model),
        variable_tracking(model),
        copying(model),
        free_text(model),
    ]
    return [example for example in made if example.tokens < model.geometry.max_positions]


def fast_tokenizer(model: Model) -> Any:
    if model.tokenizer is None or not getattr(model.tokenizer, "is_fast", False):
        raise PromptError(
            f"{model.id} has no fast tokenizer, which examples need to tell where their evidence is; give a prompt of your own."
        )
    return model.tokenizer


def _example(
    model: Model, title: str, context: str, question: str, answer: str | None, evidence: Sequence[str]
) -> Example:
    """Encode the prompt and find the tokens of each piece of evidence, which stands in the context once."""
    fast_tokenizer(model)
    encoded = model.tokenizer(context + question, return_offsets_mapping=True)
    spans = []
    for piece in evidence:
        start = context.index(piece)
        stop = start + len(piece)
        inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if b > a and b > start and a < stop]
        spans.append((inside[0], inside[-1] + 1))
    return Example(title, context, question, answer, tuple(spans), len(encoded["input_ids"]))
