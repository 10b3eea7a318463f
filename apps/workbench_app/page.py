"""What fills the frame: header, drawer, lanes, differences, heads. One `App` per browser tab."""

from __future__ import annotations

from html import escape
from typing import Any

import panel as pn
import panel_material_ui as pmui

from workbench_app import summary
from workbench_app.ask import DEFAULT_LANES, Ask
from workbench_app.drawer import Drawer
from workbench_app.elements import Keys
from workbench_app.frame import FILLED, MODEL, Frame, section, shelf
from workbench_app.heads import Heads
from workbench_app.lane_view import LaneCard
from workbench_app.looks import BAR, LANES, TEXT
from workbench_app.session import Change, Session
from workbench_app.state import UIState
from workbench_app.views.closer import Closer


class App:
    """One tab: builds the page, and brings it up to date when the session says that something changed."""

    def __init__(self, frame: Frame, model: str = MODEL, lanes: tuple[str, ...] = DEFAULT_LANES) -> None:
        self.frame = frame
        self.document = pn.state.curdoc
        self._drawn = False
        self.session = session = Session(shelf(), self.document, Ask(model=model))
        self.cards: dict[int, LaneCard] = {}
        self.drawer = Drawer(session, self.run)
        self.state = UIState()
        self.heads = Heads(session, self.state)
        self.closer = Closer(session, self.state, self.heads.reveal)
        self._build()
        session.watchers.append(self._heard)
        self.state.param.watch(self._turned, ["lane", "query"])
        session.start_with(lanes)
        if self.document is not None:
            session.mailbox.pause()
            pn.state.onload(self._begin)
            pn.state.on_session_destroyed(lambda context: session.close())

    def _begin(self) -> None:
        """The page came to the browser: load the model. What comes of it is shown when all controls are drawn."""
        self.session.load(self.session.draft.model, self._loaded)
        self.document.add_timeout_callback(self._show, 10_000)  # whatever became of the browser's word

    def _show(self) -> None:
        if not self._drawn:
            self._drawn = True
            self._fit()
            self.session.mailbox.resume()

    def _fit(self) -> None:
        """Put the drawer behind its button where the window is narrow."""
        if self._drawn and self.keys.window:
            self.frame.page.sidebar_open = not self.keys.window["narrow"]

    def _loaded(self) -> None:
        self.drawer.offer_examples()
        self.run()

    def run(self) -> None:
        self.state.query = None
        self.session.run()

    # -- the page -----------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        text: dict[str, Any] = {"stylesheets": [TEXT], "margin": 0, "sizing_mode": "stretch_width"}
        self.run_button = pmui.Button(
            label="Run", icon="play_arrow", color="primary", sx=FILLED, size="small", margin=0, width=76
        )
        self.stop_button = pmui.Button(
            label="Stop", icon="stop", size="small", margin=0, width=76, variant="outlined", disabled=True
        )
        self.undo_button = pmui.IconButton(icon="undo", size="small", margin=0, description="Undo (Ctrl+Z)")
        self.redo_button = pmui.IconButton(icon="redo", size="small", margin=0, description="Redo (Shift+Ctrl+Z)")
        self.add_button = pmui.Button(label="Add lane", icon="add", size="small", variant="outlined", margin=0)
        self.code_button = pmui.Button(label="As code", icon="code", size="small", variant="text", margin=0)
        self.run_button.on_click(lambda _: self.run())
        self.stop_button.on_click(lambda _: self.session.stop())
        self.undo_button.on_click(lambda _: self.session.undo())
        self.redo_button.on_click(lambda _: self.session.redo())
        self.add_button.on_click(lambda _: self.session.add("snapkv(budget=0.25)"))
        self.code_button.on_click(lambda _: self._show_code())
        self.lead = pn.pane.HTML("", min_height=78, **text)
        self.why = pn.pane.HTML("", **text)
        self.why_button = pmui.Button(
            label="Show it in the heads",
            icon="grid_view",
            size="small",
            variant="text",
            margin=(0, 0, 0, -6),
            visible=False,
        )
        self.why_button.on_click(lambda _: self._show_why())
        self.keys = Keys(width=0, height=0, margin=0)
        self.keys.param.watch(self._pressed, "pressed")
        self.keys.param.watch(lambda event: self._fit(), "window")
        self.keys.param.watch(lambda event: self._show(), "drawn")
        self.lanes_row = pn.Column(stylesheets=[LANES], sizing_mode="stretch_width", margin=(14, 0, 0, 0))
        self.status = pn.pane.HTML("", stylesheets=[TEXT], margin=0)
        self.code_texts = [pn.pane.HTML("", **text), pn.pane.HTML("", **text)]
        self.code_dialog = pmui.Dialog(
            *(self._code_box(number, title) for number, title in enumerate(("In Python", "In a shell"))),
            title="This screen as code",
            title_variant="h2",
            open=False,
            show_close_button=True,
            close_on_click=True,
            width_option="md",
        )

        bar = pn.Row(self.add_button, self.undo_button, self.redo_button, self.code_button, stylesheets=[BAR], margin=0)
        self.frame.header[1:] = [self.run_button, self.stop_button, self.status]
        self.frame.drawer[:] = [self.drawer]
        self.frame.main[:] = [
            self.keys, self.lead, self.why, self.why_button, self.lanes_row,
            pn.Row(bar, margin=(12, 0, 0, 0)),
            self.code_dialog,
        ]  # fmt: skip
        self.frame.below[:] = [
            section("What each head keeps", "after the prompt; pick a head to see its tokens", self.heads),
            section("Look closer", "at the lane, head and token picked above", self.closer),
        ]

    def _heard(self, change: Change) -> None:
        with pn.io.hold(self.document) if self.document is not None else pn.io.hold():
            self._refresh(change)

    def _refresh(self, change: Change) -> None:
        session = self.session
        if "lanes" in change.topics:
            self._arrange()
        touched = set(self.cards) if change.topics & {"lanes", "texts", "model"} else set(change.lanes)
        reference = session.reference
        if reference is not None and reference.key in touched:
            touched = set(self.cards)  # every lane is marked against it
        for key in touched & self.cards.keys():
            self.cards[key].refresh(self._picked(key))
        self.frame.chart.refresh(session)
        self.frame.legend.object = summary.legend(session)
        if not session.busy:
            self.frame.table.object = summary.kl_table(session)
        self._turn_to_the_break()
        if not self._begins(change):
            self.heads.refresh()
            self.closer.refresh()
        self._say()

    def _arrange(self) -> None:
        """The cards in the lanes' order; a card is built once."""
        lanes = self.session.lanes
        self.cards = {
            lane.key: self.cards.get(lane.key) or LaneCard(self.session, lane.key, self._pick) for lane in lanes
        }
        self.lanes_row[:] = list(self.cards.values())

    def _say(self) -> None:
        session = self.session
        self.lead.object = summary.lead(session)
        lane = self._explained()
        html = summary.why_html(session, lane.key) if lane is not None else ""
        self.why.object = html
        self.why_button.visible = bool(html) and lane is not None and bool(lane.why and lane.why.lost)
        self.run_button.disabled = session.model_state != "ready"
        held = any(lane.status == "paused" for lane in session.lanes)
        self.stop_button.disabled = not (session.busy or session.findings.busy or held)
        self.status.object = f'<span class="quiet roomy status" role="status">{escape(self._status())}</span>'

    def _begins(self, change: Change) -> bool:
        """Whether this is about a lane's first token, which nothing may hold up; what heads keep follows it closely."""
        lanes = [lane for lane in self.session.lanes if lane.key in change.lanes]
        return any(lane.status == "generating" and len(lane.tokens) <= 1 for lane in lanes)

    def _picked(self, key: int) -> int | None:
        """The token of a lane that is looked into."""
        return self.state.query if self.state.lane == key else None

    def _turn_to_the_break(self) -> None:
        """Until a person picks a lane or a head, the heads show the lane whose break is explained."""
        lane = self._explained()
        if lane is not None and not self.state.settled and not self.session.busy and lane.key != self.state.lane:
            self.state.lane = lane.key

    def _status(self) -> str:
        session = self.session
        if session.notice:
            return session.notice
        if session.model_state == "loading":
            return f"loading {session.draft.model}…"
        if session.model_state == "error":
            return "no model"
        busy = [lane for lane in session.lanes if lane.busy]
        if busy:
            return f"running, {len(busy)} of {len(session.lanes)} lanes to go"
        return "changed: press Run" if session.changed else ""

    def _explained(self) -> Any:
        """The lane whose break is explained: the one whose token was picked, else the first that has a reason."""
        session = self.session
        chosen = session.lane(self.state.lane) if self.state.query is not None else None
        if chosen is not None and chosen.why is not None:
            return chosen
        broken = [lane for lane in session.lanes[1:] if lane.why is not None and not lane.busy]
        return next((lane for lane in broken if lane.why.lost), broken[0] if broken else None)

    # -- what a person does ---------------------------------------------------------------------------------------------

    def _pick(self, key: int, token: int) -> None:
        """A generated token was chosen: everything turns to it."""
        self.state.turn_to(key, token)
        self.session.explain(key, token)

    def _turned(self, *events: Any) -> None:
        """Another lane or token is looked into: mark it, and say why it broke."""
        for event in events:
            for key in (
                {event.old, event.new} & self.cards.keys()
                if event.name == "lane"
                else {self.state.lane} & self.cards.keys()
            ):
                self.cards[key].refresh(self._picked(key))
        self._say()

    def _show_why(self) -> None:
        lane = self._explained()
        if lane is not None and lane.why is not None:
            self.state.param.update(metric="lost attention", layer=None, head=None)
            self.state.turn_to(lane.key, lane.why.token)

    def _pressed(self, event: Any) -> None:
        act = {"Escape": self.session.stop, "undo": self.session.undo, "redo": self.session.redo, "run": self.run}
        act[event.new["key"]]()

    def _code_box(self, number: int, title: str) -> Any:
        copy = pmui.Button(
            label=f"Copy: {title.lower()}", icon="content_copy", variant="outlined", size="small", margin=(6, 0, 14, 0)
        )
        copy.on_click(lambda _: self.keys.copy(summary.code(self.session)[number]))
        return pn.Column(self.code_texts[number], copy, sizing_mode="stretch_width", margin=0)

    def _show_code(self) -> None:
        for pane, title, code in zip(
            self.code_texts, ("In Python", "In a shell"), summary.code(self.session), strict=True
        ):
            pane.object = f"<p>{title}</p><pre>{escape(code)}</pre>"
        self.code_dialog.open = True
