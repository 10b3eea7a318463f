"""What a scheme is, and the one that leaves entries as they are.

Axes: B batch, H KV heads, n entries, D head_dim. x is one side of a segment, keys or values: [B, H, n, D].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench_kernels import Packed, Sparse

Parts = dict[str, Tensor]


class Scheme(ABC):
    """Makes named tensors, the parts, of a run of entries, and entries of parts.

    A scheme is constant. Most parts grow with the entries along axis 2, one row per ``unit`` entries, so that later entries
    join the same run; where a scheme has parts that belong to a run as a whole, every run is encoded at once and stays.

    Class attributes:
        kinds: part -> what its bytes are counted as (codes, scales, …).
        whole: parts that belong to a run as a whole.
        positional: True when entries are coded by where they stand, so that positions are needed both ways.
        separable: False when heads are coded together, so that one head alone cannot be decoded.
    """

    kinds: ClassVar[Mapping[str, str]] = {"codes": "codes", "scale": "scales", "low": "scales"}
    whole: ClassVar[frozenset[str]] = frozenset()
    positional: ClassVar[bool] = False
    separable: ClassVar[bool] = True
    unit: int = 1

    @abstractmethod
    def encode(self, x: Tensor, at: Tensor | None) -> Parts:
        """Parts of x [B, H, n, D], n a multiple of ``unit``; ``at`` are positions [B or 1, H or 1, n] where needed.

        Raises:
            WorkbenchError: numbers that the scheme cannot hold (NaN, infinity, beyond float16's range where it counts).
        """

    @abstractmethod
    def decode(self, parts: Parts, span: tuple[int, int], dtype: torch.dtype, at: Tensor | None) -> Tensor:
        """Entries ``span`` of a run, [B, H, stop - start, D] in ``dtype``; growing parts are cut to their rows.

        The span begins and ends at multiples of ``unit``.
        """

    def held(self, parts: Parts) -> Packed | Sparse | None:
        """All entries of a run as the kernels read them, or None where there is no kernel for this scheme."""
        return None

    def shared(self) -> list[tuple[str, Tensor]]:
        """(kind, tensor) that the scheme itself holds, for all runs."""
        return []

    def row(self, b: int, h: int) -> Scheme:
        """The scheme for one row alone: what it holds for other heads is left out."""
        return self


class Verbatim(Scheme):
    """Entries as the model gave them."""

    def __init__(self, kind: str) -> None:
        self.kinds = {"numbers": kind}  # type: ignore[misc]

    def encode(self, x: Tensor, at: Tensor | None) -> Parts:
        return {"numbers": x}

    def decode(self, parts: Parts, span: tuple[int, int], dtype: torch.dtype, at: Tensor | None) -> Tensor:
        return parts["numbers"]


def require_finite(*stored: Tensor) -> None:
    """What will be stored must be finite: NaN and infinity come from the input, or from beyond float16's range."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in stored):
        raise WorkbenchError(
            "These keys or values cannot be quantized: they hold NaN, infinity or numbers beyond float16's 65,504; "
            "use a recipe without quantization for this model."
        )
