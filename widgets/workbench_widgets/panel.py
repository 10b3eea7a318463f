"""The components as Panel components: the same browser code, traits and methods. Needs `panel`."""

from __future__ import annotations

from functools import cache
from typing import Any

import anywidget
import panel as pn
import param
import traitlets as t

from workbench_widgets.base import CSS, Component, Publisher
from workbench_widgets.head_matrix import HeadMatrix
from workbench_widgets.token_strip import TokenStrip

PARAMS: dict[type, type[param.Parameter]] = {
    t.Bytes: param.Bytes,
    t.Bool: param.Boolean,
    t.Int: param.Integer,
    t.Float: param.Number,
    t.Unicode: param.String,
    t.List: param.List,
    t.Dict: param.Dict,
}


class Twin(Publisher, pn.custom.AnyWidgetComponent):
    """Panel's side of `Component`."""

    _esm = "export default { render() { return () => {}; } };"
    _stylesheets = [CSS]

    seq: int
    sizing_mode = "stretch_width"

    @classmethod
    def _process_importmap(cls) -> dict[str, Any]:
        return {}  # Panel's names React's web address; we import nothing

    def _publish(self, **traits: Any) -> None:
        with pn.io.hold():  # one message; `seq` last, which is what redraws
            self.param.update(**traits)
            self.param.update(seq=self.seq + 1)


@cache
def panel_twin(cls: type[Component]) -> type[Any]:
    """The Panel component of an anywidget class: its synced traits as params, its plain bases (`show`) as they are."""
    members: dict[str, Any] = {"__doc__": cls.__doc__, "__module__": cls.__module__, "_esm": str(vars(cls)["_esm"])}
    for name, trait in cls.class_traits(sync=True).items():
        if trait.this_class is None or not issubclass(trait.this_class, Component):
            continue  # anywidget's own
        if hasattr(Twin, name) or hasattr(anywidget.AnyWidget, name):
            raise ValueError(f"trait {cls.__name__}.{name} hides a name of Panel's or anywidget's; choose another")
        if type(trait) not in PARAMS:
            known = ", ".join(sorted(kind.__name__ for kind in PARAMS))
            raise TypeError(f"trait {cls.__name__}.{name} is a {type(trait).__name__}; Panel twins know {known}")
        members[name] = PARAMS[type(trait)](default=trait.default(), doc=trait.help)
    plain = tuple(base for base in cls.__bases__ if not issubclass(base, t.HasTraits))
    return type(f"{cls.__name__}Pane", (*plain, Twin), members)


HeadMatrixPane = panel_twin(HeadMatrix)
TokenStripPane = panel_twin(TokenStrip)
