"""The byte-level BPE of the house text models: any text tokenizes, each digit is a token, `<s>` begins every prompt."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from . import prose, text, words

VOCAB_SIZE = 1536
BOS, EOS = "<s>", "</s>"


def _corpus(rng: random.Random, texts: int) -> Iterator[str]:
    """Training texts of the fourth level (all kinds of facts, prose, repetitions), and each listed word a few times."""
    yield from (
        " " + " ".join(pool)
        for pool in [
            words.NAMES,
            words.COLOURS,
            words.PLACES,
            words.OBJECTS,
            words.TRADES,
            words.ANIMALS,
            words.FRUITS,
            words.ADJECTIVES,
            words.THINGS,
        ]
        for _ in range(40)
    )
    # Syllables, alone and capitalised after a space, often enough that they become tokens and no pair across two of them does.
    for syllable in words.SYLLABLES:
        yield from [f" {syllable.capitalize()}-{syllable} {syllable}"] * 600
    for _ in range(texts):
        yield "".join(piece.text for piece in text.training_text(rng, 4, count=len))
        yield prose.text(rng)


def build(seed: int = 0, texts: int = 2500) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the model's own training text; the same for the same seed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r" ?\d"), behavior="isolated"
            ),  # digits one by one: long numbers are long answers
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _corpus(random.Random(f"tokenizer {seed}"), texts),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[BOS, EOS],
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )


def load_or_build(folder: Path, seed: int = 0) -> PreTrainedTokenizerFast:
    """The tokenizer saved in `folder`, or a new one, saved there."""
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = build(seed)
    tokenizer.save_pretrained(folder)
    return tokenizer
