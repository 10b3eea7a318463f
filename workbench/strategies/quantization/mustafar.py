"""Mustafar (arXiv 2505.22913): every token stays, with only the largest numbers of its keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import param

from workbench.cache.coded import PairCodec
from workbench.cache.schemes.bitmap import Bitmap
from workbench.cache.sides import Flush
from workbench.errors import RecipeError
from workbench.strategies.quantization.base import Quantization

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView

BLOCK = 64  # entries that bitmaps are made of


class Mustafar(Quantization):
    """After the prompt, and then whenever `residual_length` + `flush_length` tokens are held in full, the oldest are
    pruned, `flush_length` at a time: each token keeps the channels of largest magnitude, as they are, found by bitmaps.

    A share s drops max(1, int(s * head_dim)) - 1 of a head's channels, as the paper's code does.
    """

    key = "mustafar"
    title = "Mustafar"
    paper = "arXiv 2505.22913"
    summary = "Holds only the largest numbers of every token's keys and values, and bitmaps of where they are."

    key_sparsity = param.Number(0.5, bounds=(0.0, 1.0), doc="share of a key's numbers that is dropped")
    value_sparsity = param.Number(0.5, bounds=(0.0, 1.0), doc="share of a value's numbers that is dropped")
    residual_length = param.Integer(32, bounds=(0, 4096), doc="newest tokens that always stay whole")
    flush_length = param.Integer(256, bounds=(64, 4096), doc="tokens pruned together (a multiple of 64)")

    def __init__(self, **values: object) -> None:
        super().__init__(**values)
        if self.flush_length % BLOCK:
            raise RecipeError(f"mustafar: flush_length must be a multiple of {BLOCK}, got {self.flush_length}.")

    def codec(self, view: LayerView) -> PairCodec:
        width = view.chunk.shape[-1]
        flush = Flush(every=self.flush_length, keep=self.residual_length)
        return PairCodec(
            keys=Bitmap(self.key_sparsity, of_keys=True, width=width),
            values=Bitmap(self.value_sparsity, of_keys=False, width=width),
            key_flush=flush,
            value_flush=flush,
        )
