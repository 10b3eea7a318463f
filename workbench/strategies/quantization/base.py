"""What the quantization methods share: after the prompt a layer's entries go over to the method's codec."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from workbench.errors import RecipeError
from workbench.strategies.base import Strategy

if TYPE_CHECKING:
    from workbench.cache.layer import LayerView
    from workbench.cache.store import Codec
    from workbench.models.geometry import Geometry

GROUPS = [16, 32, 64, 128]
BITS = [2, 4, 8, 16]


class Quantization(Strategy):
    """Base of the quantization methods. 16 bits mean numbers as the model gives them."""

    family: ClassVar[str] = "quantization"

    @property
    def exact(self) -> bool:
        """Whether these parameters leave every number as it is."""
        return False

    @abstractmethod
    def codec(self, view: LayerView) -> Codec:
        """How the layer's entries are held after the prompt."""

    def after_prefill(self, view: LayerView) -> None:
        if not self.exact:
            view.recode(self.codec(view))

    def need_divisor(self, name: str, group: int, width: int, of: str = "head_dim") -> None:
        """RecipeError where ``group`` numbers do not divide a head's ``width`` of them."""
        if width % group:
            fits = [g for g in GROUPS if width % g == 0]
            offer = f"use {name}={fits[-1]}" if fits else f"this model's heads are too small for {self.key}; use full"
            raise RecipeError(f"{self.key}: {of} {width} of this model is not a multiple of {name} {group}; {offer}.")

    def need_whole_words(self, bits: Any, geometry: Geometry) -> None:
        """RecipeError where a head's codes of one token do not fill whole 32-bit words."""
        if bits in (2, 4, 8) and geometry.head_dim * bits % 32:
            raise RecipeError(
                f"{self.key}: head_dim {geometry.head_dim} times {bits} bits is no multiple of 32, so codes cannot be "
                "packed; use more bits, or full."
            )
