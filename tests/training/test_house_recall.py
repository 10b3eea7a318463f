"""The shipped model does what its card says, as far as a few seconds can tell."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import workbench
from workbench.training.recall import evaluate, text

FOLDER = Path(workbench.__file__).parent / "house" / "recall"


@pytest.fixture(scope="module")
def recall():
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval(), AutoTokenizer.from_pretrained(FOLDER)


@torch.inference_mode()
def answered(model, tokenizer, document) -> bool:
    """Whether greedy decoding gives the answer: every one of its tokens is the best after those before it."""
    expected = tokenizer.encode(f" {document.answer} .", add_special_tokens=False)
    ids = torch.tensor([[*document.prompt_ids, *expected]])
    best = model(input_ids=ids, use_cache=False, logits_to_keep=len(expected) + 1).logits[0, :-1].argmax(-1)
    return best.tolist() == expected


def share_right(recall, documents: int, length: int) -> float:
    model, tokenizer = recall
    return sum(answered(model, tokenizer, text.document(s, length, tokenizer)) for s in range(documents)) / documents


@pytest.mark.parametrize("length, least", [(512, 0.95), (1024, 0.9), (2048, 0.85)])
def test_it_answers_held_out_questions(recall, length, least):
    """The aims are 98, 95 and 90 %, and the card says what was measured; 20 documents leave room for chance."""
    assert share_right(recall, 20, length) >= least


def test_it_needs_the_fact(recall):
    """The same questions about contexts from which the fact was taken out: only luck is left."""
    model, tokenizer = recall
    right = 0
    for seed in range(20):
        document = text.document(seed, 300, tokenizer)
        start, stop = document.evidence_tokens
        ids = document.prompt_ids[:start] + document.prompt_ids[stop:]
        without = text.Document(**{**document.__dict__, "prompt_ids": ids})
        right += answered(model, tokenizer, without)
    assert right <= 5


def test_it_weighs_at_most_ten_megabytes():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 10_000_000


def test_the_card_has_its_measurements():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    measured = card.split(evaluate.BEGIN)[1].split(evaluate.END)[0]
    assert all(f"| {length} |" in measured for length in evaluate.LENGTHS)
    assert "snapkv" in measured and "random" in measured


def test_the_card_is_filled_by_the_numbers_measured(tmp_path):
    result = {
        "samples": 2,
        "copying": [99, 100],
        "by_length": {"256": [2, 2]},
        "by_kind": {"colour": [2, 2]},
        "by_depth": {"512": {"0.0": [1, 2], "1.0": [2, 2]}},
        "by_strategy": {"full": [2, 2], "all but the fact": [0, 2]},
    }
    card = tmp_path / "README.md"
    card.write_text(f"before\n{evaluate.BEGIN}\nold\n{evaluate.END}\nafter\n")
    evaluate.fill(card, result)
    written = card.read_text()
    assert (
        "old" not in written and "| 512 | 50.0 % | 100.0 % |" in written and "| all but the fact | 0.0 % |" in written
    )
    card.write_text("nothing to fill")
    with pytest.raises(ValueError, match="no part between"):
        evaluate.fill(card, result)
