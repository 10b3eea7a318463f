"""From pieces of text to batches of token ids with loss weights. Axes: B rows, S tokens of a row."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from . import text
from .text import Piece, Role

# Row length and rows a step, by level: about 2,300 tokens while texts are short, 4,096 for the longest.
SHAPES = ((160, 14), (192, 12), (256, 9), (320, 8), (512, 6), (1024, 4), (2048, 2))


class Encoded(NamedTuple):
    """A text as tokens; all lists are equally long and begin with BOS and end with EOS."""

    ids: list[int]
    roles: list[int]  # of each token, a Role
    groups: list[int]  # 1, 2, … for the question (or answer) a token belongs to, 0 outside
    blind: list[int]  # the same numbers on the tokens of a question but its last, else 0


class Batch(NamedTuple):
    """One training step's data."""

    ids: Tensor  # [B, S + 1]
    roles: Tensor  # [B, S + 1]
    blind: Tensor  # [B, S + 1]; questions numbered throughout the row


class Encoder:
    """Encodes pieces one by one; pieces meet where the tokenizer splits, so the result is that of the whole text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.backend = tokenizer.backend_tokenizer
        self.vocab_size = len(tokenizer)
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def ids(self, string: str) -> list[int]:
        return self.backend.encode(string, add_special_tokens=False).ids

    def count(self, string: str) -> int:
        return len(self.ids(string))

    def encode(self, pieces: Sequence[Piece]) -> Encoded:
        out = Encoded([self.bos], [Role.TEXT], [0], [0])
        group = 0
        for string, role in pieces:
            ids = self.ids(string)
            group += role == Role.QUESTION
            number = group if role in (Role.QUESTION, Role.ANSWER) else 0
            out.ids.extend(ids)
            out.roles.extend([role] * len(ids))
            out.groups.extend([number] * len(ids))
            out.blind.extend([number] * (len(ids) - 1) + [0] if role == Role.QUESTION else [0] * len(ids))
        for column, last in zip(out, (self.eos, Role.TEXT, 0, 0)):
            column.append(last)
        return out


def training_batch(rng: random.Random, level: int, encoder: Encoder) -> Batch:
    """Rows of whole texts, one after another; only the last text of a row is cut."""
    length, rows = SHAPES[level]
    columns: tuple[list, list, list] = ([], [], [])
    for _ in range(rows):
        row = Encoded([], [], [], [])
        questions = 0
        while len(row.ids) < length + 1:
            encoded = encoder.encode(text.training_text(rng, level, encoder.count))
            if len(row.ids) + len(encoded.ids) > length + 1 and level > 3:
                encoded = encoder.encode(text.training_text(rng, 3, encoder.count))
            for whole, new in zip(row[:3], encoded[:3]):
                whole.extend(new)
            row.blind.extend(b + questions if b else 0 for b in encoded.blind)
            questions += max(encoded.groups)
        for column, values in zip(columns, (row.ids, row.roles, row.blind)):
            column.append(values[: length + 1])
    return Batch(*(torch.tensor(column) for column in columns))


def blind_mask(blind: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, S] question numbers -> [B, 1, S, S] additive causal mask in which a question's tokens see only their question and token 0.

    The last token of a question carries 0 and sees everything: it alone can look the answer up, so the answer stays where the
    fact was stated and is not copied into the question's own cache entries.
    """
    length = blind.shape[1]
    seen = (blind[:, :, None] == 0) | (blind[:, :, None] == blind[:, None, :])
    seen[:, :, 0] = True
    seen &= torch.ones(length, length, dtype=torch.bool, device=blind.device).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=blind.device).masked_fill_(~seen, torch.finfo(dtype).min)[
        :, None
    ]
