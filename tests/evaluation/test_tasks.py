"""Examples: deterministic, at the length asked for, with their answers at the spans they name."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from workbench.errors import PromptError
from workbench.evaluation.tasks import Example, copying, examples, needle, table_lookup, variable_tracking
from workbench.training.recall import tokenizer, words


@dataclass
class Reader:
    """As much of a model as examples need."""

    tokenizer: Any
    id: str = "test/reader"
    geometry: Any = field(default_factory=lambda: SimpleNamespace(max_positions=8192))


@pytest.fixture(scope="module")
def model() -> Any:
    return Reader(tokenizer.build(texts=50))


def at_spans(model: Any, example: Example) -> list[str]:
    ids = model.tokenizer.encode(example.prompt)
    return [model.tokenizer.decode(ids[a:b]).strip() for a, b in example.evidence]


def test_every_example_holds_its_answer_where_it_says(model: Any) -> None:
    found = examples(model)
    assert len(found) == 6 and len({e.title for e in found}) == 6
    for example in found:
        ids = model.tokenizer.encode(example.prompt)
        assert example.tokens == len(ids)
        said = " ".join(at_spans(model, example))
        if example.answer is None:
            assert example.evidence == ()
        else:
            assert example.answer.rstrip(" .;") in said


def test_the_question_can_be_fed_after_the_context(model: Any) -> None:
    """Context and question, encoded apart, are the tokens of the whole prompt: both protocols ask the same."""
    for example in examples(model):
        later = model.tokenizer.encode(example.question, add_special_tokens=False) if example.question else []
        assert model.tokenizer.encode(example.context) + later == model.tokenizer.encode(example.prompt)


@pytest.mark.parametrize("make", [needle, table_lookup, variable_tracking, copying])
def test_examples_depend_on_the_seed_alone(make: Any, model: Any) -> None:
    assert make(model, seed=3) == make(model, seed=3)
    assert make(model, seed=3).prompt != make(model, seed=4).prompt


@pytest.mark.parametrize("length", [128, 500, 1000])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_has_the_length_and_depth_asked_for(length: int, depth: float, model: Any) -> None:
    found = needle(model, length, depth, seed=1)
    assert length - 40 < found.tokens <= length
    ((start, _),) = found.evidence
    assert abs(start / found.tokens - depth) < 0.15 + 20 / length


def test_a_chain_is_stated_in_order_and_ends_in_its_value(model: Any) -> None:
    for seed in range(20):
        found = variable_tracking(model, 6 + seed, seed)
        value: dict[str, str] = {}
        for line in found.context.strip().split("\n"):
            name, source = line.split(" = ")
            value[name] = value.get(source, source)
        assert len(value) == 6 + seed
        assert f"{value[found.question.split()[1]]} ." == found.answer
        assert len(found.evidence) == 3


def test_keys_are_words_that_training_never_saw(model: Any) -> None:
    copied = copying(model).answer or ""
    assert set(copied.split()) <= set(words.HELD_OUT_INVENTED)
    known = set(words.NAMES) | {word.capitalize() for word in words.INVENTED}
    keys = [row.split(" : ")[0].strip() for row in table_lookup(model).context.split("\n")[1].split(" ;")]
    assert not known & set(keys)


def test_an_answer_is_recognised_up_to_spaces(model: Any) -> None:
    found = table_lookup(model)
    assert found.is_answered_by(f"  {found.answer} and more") is True
    assert found.is_answered_by("something else ;") is False
    assert examples(model)[-1].is_answered_by("anything") is None


def test_bad_arguments_and_models_are_refused(model: Any) -> None:
    for call in (
        lambda: needle(model, 10),
        lambda: needle(model, 500, 1.5),
        lambda: needle(model, kind="nonsense"),
        lambda: variable_tracking(model, 3),
        lambda: needle(Reader(None)),
    ):
        with pytest.raises(PromptError) as caught:
            call()
        assert str(caught.value).endswith(".")
    assert examples(Reader(None)) == []
    short = Reader(model.tokenizer, geometry=SimpleNamespace(max_positions=150))
    assert all(example.tokens < 150 for example in examples(short))
