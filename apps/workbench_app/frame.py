"""The frame of the page, on the screen before anything heavy is imported; `page.App` fills it."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any

import panel as pn
import panel_material_ui as pmui
from tornado.iostream import StreamClosedError
from tornado.websocket import WebSocketClosedError

from workbench_app import elements  # noqa: F401  (known to the browser from the beginning)
from workbench_app.ask import DEFAULT_LANES
from workbench_app.kl_chart import KLChart
from workbench_app.looks import HEADER, MAIN, PAGE, SECTION, TEXT, THEME
from workbench_app.runner import Shelf

# The bar of a page restyles its buttons; the one that matters most stays filled.
FILLED = {
    "&.MuiButton-root": {"backgroundColor": "var(--panel-primary-color)", "color": "var(--panel-on-primary-color)"},
    "&.Mui-disabled": {"opacity": 0.45},
}
TITLE, MODEL = "KV Workbench", "house/recall"
WAITING = f"""
<p class="lead quiet" role="status">Starting {TITLE}…</p>
<div class="waiting" aria-hidden="true"><div></div><div></div><div></div></div>
"""

LOG = logging.getLogger("workbench.app")


@dataclass
class Frame:
    """The page and the places in it that are filled."""

    page: pmui.Page
    header: pn.Row
    drawer: pn.Column
    main: pn.Column
    chart: KLChart
    legend: pn.pane.HTML
    table: pn.pane.HTML
    below: pn.Column


def shelf() -> Shelf:
    """The models in memory, shared by all tabs of this server."""
    return pn.state.cache.setdefault("workbench models", Shelf())


def make_frame() -> Frame:
    wide: dict[str, Any] = {"margin": 0, "sizing_mode": "stretch_width"}
    title = pn.pane.HTML(f"<h1>{TITLE}</h1>", stylesheets=[TEXT], margin=0)
    header = pn.Row(title, stylesheets=[HEADER], **wide)
    drawer = pn.Column(**wide)
    main = pn.Column(pn.pane.HTML(WAITING, stylesheets=[TEXT], **wide), **wide)
    # The chart has its place from the beginning: Bokeh 3.9 may fail on a plot that is put into a page as it changes size.
    chart = KLChart()
    legend, table = (pn.pane.HTML("", stylesheets=[TEXT], **wide) for _ in range(2))
    plot = pn.pane.Bokeh(chart.figure, sizing_mode="stretch_width", height=190, margin=(4, 0, 0, 0))
    below = pn.Column(**wide)
    about = "teacher-forced, per token; ▼ first different token"
    parts = [main, section("Difference from the reference", about, legend, plot, table), below]
    page = pmui.Page(
        title="",
        meta_title=TITLE,
        header=[header],
        sidebar=[drawer],
        main=[pn.Column(*parts, stylesheets=[MAIN], **wide)],
        sidebar_open=not _on_a_phone(),
        sidebar_width=304,
        sidebar_resizable=False,
        busy_indicator=None,
        theme_config=THEME,
        raw_css=[PAGE],
    )
    return Frame(page, header, drawer, main, chart, legend, table, below)


def section(title: str, about: str, *objects: Any) -> pn.Column:
    """A part of the page with its heading."""
    wide: dict[str, Any] = {"margin": 0, "sizing_mode": "stretch_width"}
    head = pn.pane.HTML(f"<h2>{title}<small>{about}</small></h2>", stylesheets=[TEXT], **wide)
    return pn.Column(head, *objects, stylesheets=[SECTION], **wide)


_imported = threading.Event()


def app_class() -> Any:
    """The app's class; the first call imports torch and transformers, which takes seconds."""
    from workbench_app.page import App

    _imported.set()
    return App


def build(model: str = MODEL, lanes: tuple[str, ...] = DEFAULT_LANES) -> pmui.Page:
    """The page of a new tab: at once where the app was imported before, else the frame now and the rest when it can."""
    pn.extension("tabulator", notifications=False)
    logging.getLogger("asyncio").addFilter(gone)
    frame, document = make_frame(), pn.state.curdoc
    if _imported.is_set() or document is None:
        app_class()(frame, model, lanes)
        return frame.page

    def fill() -> None:
        with pn.io.hold(document):
            app_class()(frame, model, lanes)

    def fetch() -> None:
        try:
            app_class()
        except Exception:
            LOG.exception("the app could not be imported")
            document.add_next_tick_callback(lambda: frame.main.__setitem__(slice(None), [sorry()]))
            return
        document.add_next_tick_callback(fill)

    pn.state.onload(lambda: threading.Thread(target=fetch, name="workbench-import", daemon=True).start())
    return frame.page


def sorry() -> Any:
    sentence = (
        f"{TITLE} could not start; the server's log says why. Is everything installed: pip install 'kv-workbench[app]'?"
    )
    return pn.pane.HTML(
        f'<p class="trouble" role="alert">{sentence}</p>', stylesheets=[TEXT], sizing_mode="stretch_width"
    )


def gone(record: logging.LogRecord) -> bool:
    """Keeps out of the log that a tab was closed while something was on its way to it."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, WebSocketClosedError | StreamClosedError)


def _on_a_phone() -> bool:
    """A guess by what the browser says of itself, so that the drawer does not flash; the window's width decides."""
    return "Mobi" in (pn.state.headers or {}).get("User-Agent", "")
