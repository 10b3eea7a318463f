"""What a person has turned to. Views read and write this and nothing of each other."""

from __future__ import annotations

import param


class UIState(param.Parameterized):
    """One selection for the whole page; lanes are named by their keys."""

    lane = param.Integer(None, allow_None=True, doc="the lane whose heads are on show")
    layer = param.Integer(None, allow_None=True, doc="the layer whose tokens are on show")
    head = param.Integer(None, allow_None=True, doc="the KV head whose tokens are on show")
    query = param.Integer(None, allow_None=True, doc="the generated token that is looked into")
    key = param.Integer(None, allow_None=True, doc="the prompt token that was picked")
    metric = param.String("kept share", doc="the number in the matrix")
    view = param.String(None, allow_None=True, doc="the closer look that is open")
    settled = param.Boolean(False, doc="a person chose the lane or the head; until then they follow what broke")

    def turn_to(self, lane: int, query: int | None = None, layer: int | None = None, head: int | None = None) -> None:
        """Look at a lane, at one of its tokens, and at a head, in one step."""
        changes = {"lane": lane, "query": query, "layer": layer, "head": head}
        self.param.update(**{name: value for name, value in changes.items() if value is not None})
