"""The recall text: the same for the same seed, as long as asked for, and its evidence where it says."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.training.recall import batches, facts, text, tokenizer, words
from workbench.training.recall.text import Role


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer.load_or_build(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def encoder(tok):
    return batches.Encoder(tok)


@pytest.mark.parametrize("length", [128, 512, 2048])
def test_documents_depend_on_the_seed_alone_and_have_the_length_asked_for(tok, length):
    for seed in range(5):
        document = text.document(seed, length, tok)
        assert document == text.document(seed, length, tok)
        assert document != text.document(seed + 1, length, tok)
        assert length - 40 < len(document.prompt_ids) <= length


def test_evidence_stands_at_its_span_and_nowhere_else(tok):
    for seed in range(30):
        document = text.document(seed, 384, tok)
        start, stop = document.evidence_span
        assert document.prompt[start:stop] == document.evidence
        assert document.prompt.count(document.evidence) == 1
        first, last = document.evidence_tokens
        assert tok.decode(document.prompt_ids[first:last]).strip() == document.evidence
        assert f" {document.answer} ." in document.evidence
        assert document.is_answered_by(f" {document.answer} .\n") and not document.is_answered_by(" nothing .")


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_depth_places_the_fact(tok, depth):
    for seed in range(5):
        document = text.document(seed, 1024, tok, depth=depth)
        assert document.depth == pytest.approx(depth, abs=0.05)


def test_kind_is_honoured_and_mistakes_are_named(tok):
    assert text.document(3, 256, tok, kind="secret number").answer.isdigit()
    with pytest.raises(ValueError, match="kind must be one of colour"):
        text.document(0, 256, tok, kind="shape")
    with pytest.raises(ValueError, match="at least 96"):
        text.document(0, 10, tok)
    with pytest.raises(ValueError, match="depth must be from 0 to 1"):
        text.document(0, 256, tok, depth=2)


def test_held_out_keys_are_never_trained_on(encoder):
    assert not set(words.NAMES) & set(words.HELD_OUT_NAMES)
    assert not set(words.INVENTED) & set(words.HELD_OUT_INVENTED)
    assert not set(words.PAIRS) & set(words.HELD_OUT_PAIRS)
    rng = random.Random(0)
    held_out = {
        *words.HELD_OUT_NAMES,
        *words.HELD_OUT_PAIRS,
        *words.HELD_OUT_INVENTED,
        *(w.capitalize() for w in words.HELD_OUT_INVENTED),
    }
    for level in range(len(text.LEVELS)):
        for _ in range(20):
            written = "".join(piece.text for piece in text.training_text(rng, level, encoder.count))
            assert not held_out & set(
                written.replace(".", " ").replace("?", " ").replace(":", " ").replace(",", " ").split()
            )


def test_held_out_documents_use_held_out_keys():
    rng = random.Random(0)
    for fact in facts.draw(rng, 40, held_out=True):
        assert fact.key in words.HELD_OUT_NAMES or fact.key.lower() in words.HELD_OUT_INVENTED


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_survives_the_tokenizer(tok, written):
    assert tok.decode(tok.encode(written, add_special_tokens=False)) == written or "<s>" in written or "</s>" in written


def test_every_prompt_begins_with_bos_and_digits_stand_alone(tok):
    ids = tok("The number is 4821937 .").input_ids
    assert ids[0] == tok.bos_token_id
    assert tok.convert_ids_to_tokens(ids)[-8:-1] == ["Ġ4", "8", "2", "1", "9", "3", "7"]


@pytest.mark.parametrize("level", range(len(text.LEVELS)))
def test_pieces_encode_as_the_whole_text(encoder, level):
    rng = random.Random(level)
    for _ in range(10):
        pieces = text.training_text(rng, level, encoder.count)
        assert encoder.encode(pieces).ids[1:-1] == encoder.ids("".join(piece.text for piece in pieces))


def test_answers_can_be_found_in_the_context(encoder):
    rng = random.Random(0)
    for level in range(len(text.LEVELS)):
        pieces = text.task(rng, level, encoder.count)
        context = pieces[0].text
        answers = [piece.text.rstrip(" .;") for piece in pieces if piece.role == Role.ANSWER]
        assert answers and all(answer in context for answer in answers)


def test_blind_mask_by_hand():
    import torch

    mask = batches.blind_mask(torch.tensor([[0, 0, 1, 1, 0]]), torch.float32)[0, 0] == 0
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],  # a question's token: itself and token 0
        [1, 0, 1, 1, 0],
        [1, 1, 1, 1, 1],  # its last token: everything
    ]
