"""Evict, protect or restore the chosen token of the prompt, in one head, one layer or all of them."""

from __future__ import annotations

from html import escape
from typing import Any

import panel as pn
import panel_material_ui as pmui

from workbench_app import formats
from workbench_app.ask import LaneState
from workbench_app.looks import BAR, TEXT
from workbench_app.selection import head_on_show, lane_on_show, token_on_show
from workbench_app.session import Session
from workbench_app.state import UIState

ACTIONS = {
    "evict": ("Evict", "delete", "Free its entries"),
    "protect": ("Protect", "shield", "Put it back from the reference where it is gone, and let no strategy drop it"),
    "restore": ("Restore", "restore", "Put it back from the reference, exactly as it was"),
}
WHERE = ("this head", "this layer", "all heads")


class ByHand(pn.viewable.Viewer):
    """A row under the token strip; the lane runs again with the change."""

    def __init__(self, session: Session, state: UIState) -> None:
        super().__init__()
        self._session, self._state = session, state
        self._said: str | None = None
        self.about = pn.pane.HTML("", stylesheets=[TEXT], margin=0)
        self.where = pmui.RadioButtonGroup(
            label="Where", options=list(WHERE), value="all heads", size="small", margin=0
        )
        self.buttons = {}
        for action, (label, icon, words) in ACTIONS.items():
            button = pmui.Button(
                label=label, icon=icon, description=words, size="small", variant="outlined", margin=0, disabled=True
            )
            button.on_click(lambda _, action=action: self._do(action))
            self.buttons[action] = button
        self._view = pn.Row(
            self.about,
            self.where,
            *self.buttons.values(),
            stylesheets=[BAR],
            sizing_mode="stretch_width",
            margin=(8, 0, 0, 0),
        )

    def __panel__(self) -> Any:
        return self._view

    def _chosen(self) -> tuple[LaneState, int, tuple[int, int]] | None:
        lane = lane_on_show(self._session, self._state)
        if lane is None or not lane.kept:
            return None
        token, head = token_on_show(self._session, lane, self._state), head_on_show(lane, self._state)
        return None if token is None or head is None else (lane, token, head)

    def refresh(self) -> None:
        """Say which token is meant, and offer what can be done to it."""
        session, chosen = self._session, self._chosen()
        ready = chosen is not None and chosen[0].status in ("done", "paused", "cancelled")
        if chosen is None:
            said = ""
        elif chosen[0] is session.reference:
            ready = False
            said = "The reference keeps everything; pick a lane beside it to evict, protect or restore a token."
        else:
            text = escape(formats.visible(session.texts[chosen[1]]))
            said = f'Token <span class="chip">{text}</span> ({chosen[1]:,}), by hand'
        if said != self._said:
            self._said = said
            self.about.object = f'<p class="quiet" style="font-size:12.5px;line-height:30px">{said}</p>'
        self._view.visible = bool(said)
        for part in (self.where, *self.buttons.values()):
            part.visible = chosen is not None and chosen[0] is not session.reference
        for button in self.buttons.values():
            if button.disabled == ready:
                button.disabled = not ready

    def _do(self, action: Any) -> None:
        chosen = self._chosen()
        if chosen is None:
            return
        lane, token, (layer, head) = chosen
        place = {"this head": (layer, head), "this layer": (layer, None)}.get(self.where.value, (None, None))
        self._state.param.update(lane=lane.key, key=token, layer=layer, head=head, settled=True)
        self._session.live.edit(lane.key, action, token, *place)
