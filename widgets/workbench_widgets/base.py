"""What every component shares: its browser code as one module, arrays as bytes, and the traits of the contract.

A component is three small things:

* `NAME/index.js`, its drawing code, which imports from `canvas.js` beside this file and from nowhere else;
* a plain mixin whose `show(...)` checks the data and hands traits to `_publish`;
* an `anywidget.AnyWidget` class with the traits, made of the mixin and `Component`.

`workbench_widgets.panel.panel_twin` makes the Panel component from that class; the mixin comes along.

Names that Panel already uses must not be traits. Among them is `select`, a method Panel calls on every view of a
page, so a person's choice arrives in `selected`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets as t

HERE = Path(__file__).parent
CSS = (HERE / "canvas.css").read_text(encoding="utf-8")

_IMPORT = re.compile(r'^import \{[^}]*\} from "\.\./canvas\.js";\n', re.MULTILINE)


def module_text(source: Path) -> str:
    """The one ES module a browser gets: a component's code with the shared code in the place of its import."""
    shared = (HERE / "canvas.js").read_text(encoding="utf-8")
    text, found = _IMPORT.subn(lambda _: shared, source.read_text(encoding="utf-8"))
    if found != 1:
        raise ValueError(f'{source} must have exactly one line `import {{…}} from "../canvas.js";`, found {found}')
    return text


def as_array(values: Any, dtype: str) -> np.ndarray:
    """Anything array-like, torch tensors of any float type and device included, as a contiguous NumPy array."""
    if hasattr(values, "detach"):
        values = values.detach()
        values = (values.float() if values.is_floating_point() else values).cpu().numpy()
    return np.ascontiguousarray(values, dtype=dtype)


class Publisher:
    """The seam between a mixin's `show` and its host, Jupyter or Panel."""

    def _publish(self, **traits: Any) -> None:
        """Set all traits and then `seq`, in one message to the browser."""
        raise NotImplementedError


class Component(Publisher, anywidget.AnyWidget):
    """Traits every component has; `seq` is bumped last and is what the browser redraws on."""

    _css = CSS

    selected = t.Dict({}, help='what a person chose by click or Enter; "n" counts up with every choice').tag(sync=True)
    group = t.Unicode("", help="views with the same group share their hover; empty: none").tag(sync=True)
    hint = t.Unicode("Nothing to show yet.", help="the sentence shown while there is no data").tag(sync=True)
    seq = t.Int(0, help="number of the data on show").tag(sync=True)

    def _publish(self, **traits: Any) -> None:
        with self.hold_sync():
            for name, value in traits.items():
                setattr(self, name, value)
            self.seq += 1
