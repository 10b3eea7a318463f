"""The parts of the page that have browser code of their own. The browser must know them all when the page comes, also
those that are put on it later: so the frame imports this, and this imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path

import param

from workbench_app.component import Component
from workbench_app.keys import Keys
from workbench_widgets.panel import HeadMatrixPane, TokenStripPane

HERE = Path(__file__).parent
__all__ = ["HeadMatrixPane", "Keys", "LaneView", "TokenStripPane"]


class LaneView(Component):
    """The part of a card that is drawn by `lane_view.js`."""

    _esm = HERE / "lane_view.js"
    _stylesheets = [HERE / "lane_view.css"]

    shown = param.Dict({}, doc="what is on show: see `lane_data`")
    chosen = param.Dict({}, doc='an action or a token: {"n": …, "action": "duplicate"}')
