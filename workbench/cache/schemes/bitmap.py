"""Mustafar's scheme: of every entry only its largest numbers are held, found by bitmaps.

Axes: B batch, H KV heads, n entries, D head_dim. See :mod:`workbench_kernels.sparse` for the format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.cache.schemes.base import Parts, Scheme
from workbench.errors import WorkbenchError
from workbench_kernels import Sparse, compress
from workbench_kernels.sparse import TILE, decode, from_tiles


def prune(x: Tensor, sparsity: float) -> Tensor:
    """x [..., D] with the smallest of every D numbers set to zero.

    Those below the n-th smallest magnitude go, n = max(1, int(sparsity * D)): without ties n - 1 of them, as the paper's
    code does it; ties with the n-th stay. What stays is not changed.
    """
    width = x.shape[-1]
    size = x.float().abs()
    least = size.kthvalue(max(1, int(sparsity * width + 1e-9)), dim=-1, keepdim=True).values
    return x.masked_fill(size < least, 0.0)


class Bitmap(Scheme):
    """Entries pruned by magnitude, each token on its own, 64 entries at a time.

    Args:
        sparsity: share of an entry's numbers that go; of_keys: which way tiles are cut; width: D.

    Parts: bitmaps int64 and offsets int32 [B, H, n / 64, P]; numbers [m] in the model's dtype, those of the whole run.
    """

    unit = TILE
    whole = frozenset({"numbers"})
    separable = False  # the numbers of all heads follow each other

    def __init__(self, sparsity: float, of_keys: bool, width: int) -> None:
        self.sparsity, self.of_keys, self.width = sparsity, of_keys, width
        self.kinds = {  # type: ignore[misc]
            "bitmaps": "bitmaps",
            "offsets": "bitmaps",
            "numbers": "keys" if of_keys else "values",
        }

    def encode(self, x: Tensor, at: Tensor | None) -> Parts:
        if not bool(torch.isfinite(x).all()):
            raise WorkbenchError(
                "These keys or values cannot be quantized: they hold NaN or infinity, which have no order to prune by; "
                "use a recipe without quantization for this model."
            )
        held = compress(prune(x, self.sparsity), self.of_keys)
        return {"bitmaps": held.bitmaps, "offsets": held.offsets, "numbers": held.numbers}

    def decode(self, parts: Parts, span: tuple[int, int], dtype: torch.dtype, at: Tensor | None) -> Tensor:
        tiles = decode(parts["bitmaps"], parts["offsets"], parts["numbers"])
        return from_tiles(tiles, self.width, self.of_keys)

    def held(self, parts: Parts) -> Sparse:
        return Sparse(parts["bitmaps"], parts["offsets"], parts["numbers"], self.width, self.of_keys)
