"""Every tensor that a segment holds, found without asking the segment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from workbench.cache.growable import Growable, Residual
from workbench.cache.positions import Gaps
from workbench.cache.segments import Segment


def held_by(x: Any) -> Iterator[Tensor]:
    """Every tensor that a segment holds, however deep; some come more than once."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Growable):
        yield from x.blocks() if x.length else ()
    elif isinstance(x, Residual):
        yield x.view()
    elif isinstance(x, Gaps):
        return  # its holes are a view of the positions of the entries in them
    elif isinstance(x, dict):
        yield from (tensor for each in x.values() for tensor in held_by(each))
    elif isinstance(x, list):
        yield from (tensor for each in x for tensor in held_by(each))
    elif type(x).__module__.startswith("workbench.cache") or isinstance(x, Segment):
        yield from held_by(vars(x))
