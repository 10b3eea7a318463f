"""Head matrix and token strip in a real browser: what is drawn, what a person does, what Python hears."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("panel", reason="needs Panel")
pytest.importorskip("playwright.sync_api", reason="needs pytest-playwright")

import panel as pn
from bokeh.palettes import Cividis256
from playwright.sync_api import Locator, Page, expect

from workbench_widgets.panel import HeadMatrixPane, TokenStripPane

pytestmark = pytest.mark.browser

GRID = np.array([[1.0, 0.25], [0.0, 0.5], [0.75, np.nan]], dtype=np.float32)
WORDS = ["The", " ferry", " to", " Oslo", " leaves", " at", " 07", ":", "40", ".", "\n", b"\xe2"]
STATUS = [1, 0, 2, 3, 4, 5, 1, 0, 0, 1, 0, 1]
SOMETHING = re.compile(".+")  # the summary is written with the first picture


class Stage:
    """The page's views and the server's objects of one session."""

    def __init__(self, page: Page, serve: Callable[..., str], build: Callable[[], list[Any]]) -> None:
        self.page = page
        self.document: Any = None
        self.views: list[Any] = []
        self.column: Any = None

        def factory() -> Any:
            self.document = pn.state.curdoc
            self.views = build()
            self.column = pn.Column(*self.views, sizing_mode="stretch_width")
            return self.column

        page.goto(serve(factory))
        expect(page.get_by_role("application")).to_have_count(len(self.views))
        for i in range(len(self.views)):
            expect(self.canvas(i)).to_have_attribute("aria-label", SOMETHING)

    def canvas(self, number: int = 0) -> Locator:
        return self.page.get_by_role("application").nth(number)

    def on_server(self, act: Callable[[], None]) -> None:
        self.document.add_next_tick_callback(act)


def read(canvas: Locator, x: float, y: float) -> Any:
    return canvas.evaluate("(node, [x, y]) => node.__kvw.read(x, y)", [x, y])


def box(canvas: Locator, thing: Any) -> dict[str, float]:
    """Where a cell {layer, head} or a token is drawn, in CSS pixels of the canvas."""
    found = canvas.evaluate("(node, thing) => node.__kvw.box(thing)", thing)
    assert found is not None, f"{thing} is not drawn"
    return found


def middle(canvas: Locator, thing: Any) -> dict[str, float]:
    b = box(canvas, thing)
    return {"x": b["x"] + b["width"] / 2, "y": b["y"] + b["height"] / 2}


def rgb(colour: str) -> list[int]:
    return [int(colour[k : k + 2], 16) for k in (1, 3, 5)]


def matrix(group: str = "") -> Any:
    pane = HeadMatrixPane(group=group)
    pane.show(GRID)
    return pane


def strip(group: str = "", **more: Any) -> Any:
    pane = TokenStripPane(group=group, tint="#3498D1")
    T = len(WORDS)
    pane.show(
        WORDS, STATUS, **{"score": np.arange(T) / 10, "share": np.arange(T) / T, "title": "Lane B · L3 KV1", **more}
    )
    return pane


@pytest.fixture
def open_views(page: Page, serve: Callable[..., str]) -> Callable[..., Stage]:
    return lambda *builders: Stage(page, serve, lambda: [build() for build in builders])


def test_cells_hold_the_numbers_and_their_colours(open_views: Callable[..., Stage]) -> None:
    canvas = open_views(matrix).canvas()
    for layer, head in itertools.product(range(3), range(2)):
        b = box(canvas, {"layer": layer, "head": head})
        seen = read(canvas, b["x"] + 3, b["y"] + 3)
        assert (seen["layer"], seen["head"]) == (layer, head)
        value = GRID[layer, head]
        if np.isnan(value):
            assert "not applicable" in seen["text"]
        else:
            assert seen["value"] == value
            assert seen["pixel"][:3] == rgb(Cividis256[round(255 * (1 - value))])
    assert read(canvas, 2, 2) is None
    label = canvas.get_attribute("aria-label") or ""
    assert (
        "3 layers by 2 heads" in label and "Lowest: L1 KV0" in label and "Highest: L0 KV0 · kept share 100 %" in label
    )


def test_click_and_keys_select_a_head(open_views: Callable[..., Stage], eventually: Callable[..., None]) -> None:
    stage = open_views(matrix)
    canvas, pane = stage.canvas(), stage.views[0]
    cell = {"layer": 1, "head": 1}
    canvas.click(position=middle(canvas, cell))
    eventually(lambda: pane.selected == {"n": 1, **cell})
    assert pane.picked == [1, 1]
    canvas.click(position=middle(canvas, cell))
    eventually(lambda: pane.selected == {"n": 2, **cell})

    canvas.focus()
    for key in ("ArrowUp", "ArrowLeft", "ArrowLeft", "Enter"):
        canvas.press(key)
    eventually(lambda: pane.selected == {"n": 3, "layer": 0, "head": 0})
    expect(stage.page.get_by_text("Selected: L0 KV0 · kept share 100 %")).to_be_visible()


def test_python_picks_and_redraws(open_views: Callable[..., Stage], eventually: Callable[..., None]) -> None:
    stage = open_views(matrix)
    canvas, pane = stage.canvas(), stage.views[0]
    b = box(canvas, {"layer": 2, "head": 0})
    edge = [b["x"], b["y"] + 4]
    before = read(canvas, b["x"] + 3, b["y"] + 4)
    stage.on_server(lambda: setattr(pane, "picked", [2, 0]))
    ink = [int(part) for part in re.findall(r"\d+", canvas.evaluate("node => getComputedStyle(node).color"))[:3]]
    eventually(lambda: read(canvas, *edge)["pixel"][:3] == ink)
    stage.on_server(lambda: pane.show([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], "sink mass", ""))
    eventually(lambda: abs(read(canvas, b["x"] + 3, b["y"] + 4)["value"] - 0.5) < 1e-6)
    assert read(canvas, b["x"] + 3, b["y"] + 4)["pixel"] != before["pixel"]
    assert "sink mass" in (canvas.get_attribute("aria-label") or "")
    assert pane.selected == {}


def test_hover_links_views_of_a_group_without_python(
    open_views: Callable[..., Stage], eventually: Callable[..., None]
) -> None:
    stage = open_views(lambda: matrix("one"), lambda: matrix("one"), lambda: matrix("two"), lambda: strip("one"))
    sent: list[Any] = []
    stage.page.on("websocket", lambda channel: channel.on("framesent", lambda frame: sent.append(frame)))
    stage.page.reload()
    canvases = [stage.canvas(i) for i in range(4)]
    for canvas in canvases:
        expect(canvas).to_have_attribute("aria-label", SOMETHING)
    cell = {"layer": 1, "head": 0}
    x, y = box(canvases[0], cell)["x"], box(canvases[0], cell)["y"] + 1
    stage.page.wait_for_timeout(300)  # for fonts and the last resize
    before = [canvas.evaluate("node => node.toDataURL()") for canvas in canvases]
    quiet = len(sent)
    stage.page.evaluate("window.heard = []; addEventListener('kvw:hover', (e) => window.heard.push(e.detail))")
    canvases[0].hover(position=middle(canvases[0], cell))
    expect(stage.page.get_by_text("L1 KV0 · kept share 0 %")).to_be_visible()
    stage.page.wait_for_timeout(100)
    after = [canvas.evaluate("node => node.toDataURL()") for canvas in canvases]
    assert [a != b for a, b in zip(after, before)] == [True, True, False, False]
    assert stage.page.evaluate("window.heard") == [{"group": "one", **cell}]
    assert read(canvases[1], x, y)["pixel"] == read(canvases[0], x, y)["pixel"]
    stage.page.mouse.move(2, 2)
    eventually(lambda: [canvas.evaluate("node => node.toDataURL()") for canvas in canvases] == before)
    canvases[3].hover(position=middle(canvases[3], 3))
    stage.page.wait_for_timeout(100)
    assert stage.page.evaluate("window.heard")[-1] == {"group": "one", "token": 3}
    assert len(sent) == quiet, "hovering called Python"


def test_dark_mode_redraws(open_views: Callable[..., Stage], eventually: Callable[..., None]) -> None:
    stage = open_views(matrix)
    canvas = stage.canvas()
    b = box(canvas, {"layer": 0, "head": 0})
    at = [b["x"] + 3, b["y"] + 3]
    theme = """(node, colours) => {
      const style = node.getRootNode().host.style;
      style.setProperty("--panel-background-color", colours[0]);
      style.setProperty("--panel-on-background-color", colours[1]);
    }"""
    for ground, ink, full in [("#fff", "#1a1a1a", 0), ("#121212", "#fff", 255), ("#fff", "#1a1a1a", 0)]:
        canvas.evaluate(theme, [ground, ink])
        eventually(lambda full=full: read(canvas, *at)["pixel"][:3] == rgb(Cividis256[full]))


def test_the_page_toggle_of_panel_material_ui_redraws(
    page: Page, serve: Callable[..., str], eventually: Callable[..., None]
) -> None:
    pmui = pytest.importorskip("panel_material_ui", reason="needs panel-material-ui")
    page.goto(serve(lambda: pmui.Page(title="t", theme_toggle=True, main=[matrix()])))
    canvas = page.get_by_role("application")
    expect(canvas).to_have_attribute("aria-label", SOMETHING)
    b = box(canvas, {"layer": 0, "head": 0})
    assert read(canvas, b["x"] + 3, b["y"] + 3)["pixel"][:3] == rgb(Cividis256[0])
    page.get_by_label("theme").first.click()
    eventually(lambda: read(canvas, b["x"] + 3, b["y"] + 3)["pixel"][:3] == rgb(Cividis256[255]))


def test_strip_draws_every_token_and_tells_it(open_views: Callable[..., Stage]) -> None:
    stage = open_views(lambda: strip(marks=[3]))
    canvas = stage.canvas()
    names = ["evicted", "kept", "quantized", "merged", "recomputed", "pending"]
    pictures: dict[int, bytes] = {}
    for token, status in enumerate(STATUS):
        where = middle(canvas, token)
        seen = read(canvas, where["x"], where["y"])
        assert (seen["token"], seen["status"], seen["name"]) == (token, status, names[status])
        assert seen["score"] == pytest.approx(token / 10)
        assert seen["share"] == pytest.approx(token / len(STATUS))
        b = box(canvas, token)
        pictures[status] = bytes(
            itertools.chain.from_iterable(
                canvas.evaluate("(n, [x, y]) => n.__kvw.pixel(x, y)", [b["x"] + i, b["y"] + 1 + j])
                for i in range(4)
                for j in range(18)
            )
        )
    assert len(set(pictures.values())) == 6, "two statuses look the same"
    oslo, byte = (read(canvas, *middle(canvas, token).values()) for token in (3, 11))
    assert oslo["text"] == "token 3 “·Oslo” · merged · score 0.3 · kept by 25 % of all heads · marked"
    assert byte["tokenText"] == "⟨0xE2⟩"
    assert canvas.get_attribute("aria-label") == (
        "Lane B · L3 KV1. 12 tokens: 4 kept, 4 evicted, 1 quantized, 1 merged, 1 recomputed, 1 pending. "
        "Arrow keys move, Enter selects."
    )
    canvas.hover(position=middle(canvas, 3))
    expect(stage.page.get_by_text("token 3 “·Oslo” · merged")).to_be_visible()


def test_click_and_keys_select_a_token(open_views: Callable[..., Stage], eventually: Callable[..., None]) -> None:
    stage = open_views(strip)
    canvas, pane = stage.canvas(), stage.views[0]
    canvas.click(position=middle(canvas, 3))
    eventually(lambda: pane.selected == {"n": 1, "token": 3})
    assert pane.picked == 3
    for key, token in [("ArrowRight", 4), ("End", 11), ("ArrowRight", 11), ("ArrowLeft", 10), ("Home", 0)]:
        canvas.press(key)
        canvas.press("Enter")
        eventually(lambda token=token: pane.selected["token"] == token)
    assert pane.selected["n"] == 6
    expect(stage.page.get_by_text("Selected: token 0 “The” · kept")).to_be_visible()


def test_131072_tokens_stay_quick_and_a_needle_stays_visible(
    open_views: Callable[..., Stage], eventually: Callable[..., None]
) -> None:
    T, needle = 131072, 70000
    share = np.zeros(T, dtype=np.float32)
    share[needle] = 1

    def build() -> Any:
        pane = TokenStripPane()
        pane.show([" word", " a", "n", "\n"] * (T // 4), (share > 0).astype(int), share=share)
        return pane

    stage = open_views(build)
    canvas, pane = stage.canvas(), stage.views[0]
    size = canvas.bounding_box()
    assert size is not None
    x = needle / T * size["width"]
    y = next(y for y in range(int(size["height"])) if "text" in (read(canvas, x, y) or {}))
    seen = read(canvas, x, y + 20)
    assert seen["from"] <= needle < seen["to"] and "max 100 %" in seen["text"]
    # the strip moves the page of text, and selects nothing
    canvas.click(position={"x": x, "y": y + 20})
    eventually(lambda: canvas.evaluate("(node, token) => Boolean(node.__kvw.box(token))", needle))
    assert pane.selected == {}
    drawn = canvas.evaluate(
        "(node, T) => [...Array(2000).keys()].filter(i => node.__kvw.box(T - 1000 + i)).length", needle
    )
    assert 20 < drawn <= 400
    canvas.click(position=middle(canvas, needle))
    eventually(lambda: pane.selected == {"n": 1, "token": needle})
    # a frame per move, as a person would cause them; the best of three rounds, since other work only slows it down
    frame = canvas.evaluate(
        """async (node, y) => {
          const next = () => new Promise(requestAnimationFrame);
          const top = node.getBoundingClientRect().y;
          const round = async (frames) => {
            await next();
            const start = performance.now();
            for (let i = 0; i < frames; i++) {
              node.dispatchEvent(new PointerEvent("pointermove", { clientX: 10 + 9 * i, clientY: top + y }));
              await next();
            }
            return (performance.now() - start) / frames;
          };
          return Math.min(await round(40), await round(40), await round(40));
        }""",
        middle(canvas, needle)["y"],
    )
    print(f"hover over 131,072 tokens: {frame:.1f} ms a frame")
    assert frame < 3 * 16
    canvas.press("End")
    eventually(lambda: canvas.evaluate("(node, token) => Boolean(node.__kvw.box(token))", T - 1))


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_widths(open_views: Callable[..., Stage], page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    stage = open_views(matrix, lambda: strip(marks=[3]), TokenStripPane)
    for i in range(3):
        size = stage.canvas(i).bounding_box()
        assert size is not None and size["x"] >= 0 and width - 40 <= size["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    last = box(stage.canvas(1), len(WORDS) - 1)
    assert last["x"] + last["width"] <= width
    page.set_viewport_size({"width": 600, "height": 800})
    expect(stage.canvas(1)).to_have_js_property("clientWidth", page.evaluate("document.body.clientWidth") or 600)


def test_nothing_to_show_is_a_sentence(open_views: Callable[..., Stage], eventually: Callable[..., None]) -> None:
    stage = open_views(HeadMatrixPane, TokenStripPane)
    expect(stage.canvas(0)).to_have_attribute("aria-label", "No values per head yet: run a lane to see them.")
    expect(stage.canvas(1)).to_have_attribute("aria-label", "No tokens yet: run a lane to see what it keeps.")
    for i in range(2):
        stage.canvas(i).press("ArrowRight")
        stage.canvas(i).press("Enter")
        stage.canvas(i).click(position={"x": 20, "y": 20})
    stage.on_server(lambda: (stage.views[0].show(GRID), stage.views[1].show(WORDS, STATUS)))
    expect(stage.canvas(0)).to_have_attribute("aria-label", re.compile("3 layers"))
    expect(stage.canvas(1)).to_have_attribute("aria-label", re.compile("12 tokens"))
    assert all(view.selected == {} for view in stage.views)


def test_removal_leaves_nothing_behind(open_views: Callable[..., Stage]) -> None:
    stage = open_views(lambda: matrix("one"), lambda: strip("one"))
    stage.canvas(0).hover(position=middle(stage.canvas(0), {"layer": 0, "head": 0}))
    for _ in range(3):
        stage.on_server(lambda: stage.column.clear())
        expect(stage.page.get_by_role("application")).to_have_count(0)
        stage.page.evaluate(
            "dispatchEvent(new CustomEvent('kvw:hover', {detail: {group: 'one', layer: 0, head: 0, token: 1}}))"
        )
        stage.page.set_viewport_size({"width": 900, "height": 700})
        stage.on_server(lambda: stage.column.extend([matrix("one"), strip("one")]))
        expect(stage.page.get_by_role("application")).to_have_count(2)
        expect(stage.canvas(1)).to_have_attribute("aria-label", SOMETHING)


CELL = """
import json, pathlib
from workbench_widgets import HeadMatrix, TokenStrip
matrix, strip = HeadMatrix(group="one"), TokenStrip(group="one")
matrix.show([[1.0, 0.25], [0.0, 0.5], [0.75, float("nan")]])
strip.show(["The", " ferry", " to", " Oslo"], [1, 0, 2, 3], share=[1, 0.5, 0, 0.25])
def tell(change):
    pathlib.Path("selected.new").write_text(json.dumps(change.new))
    pathlib.Path("selected.new").replace("selected.json")
matrix.observe(tell, "selected")
strip.observe(tell, "selected")
display(matrix, strip)
"""


@pytest.mark.slow
def test_the_same_in_jupyterlab(
    page: Page, notebook: Callable[..., str], tmp_path: Path, eventually: Callable[..., None]
) -> None:
    page.goto(notebook([CELL, "matrix.show([[0.5, 0.5]])"]))
    heard = tmp_path / "work" / "selected.json"
    page.locator(".jp-Notebook").wait_for(timeout=60_000)
    run = """async (cell) => {
      const notebook = jupyterapp.shell.currentWidget;
      await notebook.context.ready;
      await notebook.sessionContext.ready;
      notebook.content.activeCellIndex = cell;
      await jupyterapp.commands.execute("notebook:run-cell-and-select-next");
    }"""
    page.evaluate(run, 0)
    canvases = page.get_by_role("application", name=re.compile("Enter selects"))
    expect(canvases).to_have_count(2, timeout=60_000)
    matrix, strip = canvases.nth(0), canvases.nth(1)
    b = box(matrix, {"layer": 0, "head": 0})
    assert read(matrix, b["x"] + 3, b["y"] + 3)["pixel"][:3] == rgb(Cividis256[0])
    matrix.click(position=middle(matrix, {"layer": 1, "head": 1}))
    eventually(lambda: heard.exists() and json.loads(heard.read_text()) == {"n": 1, "layer": 1, "head": 1})
    strip.click(position=middle(strip, 3))
    eventually(lambda: json.loads(heard.read_text()) == {"n": 1, "token": 3})
    strip.press("ArrowLeft")
    strip.press("Enter")
    eventually(lambda: json.loads(heard.read_text()) == {"n": 2, "token": 2})

    for theme, full in [("Dark", 255), ("Light", 0), ("Dark", 255)]:
        expect(page.locator("#jupyterlab-splash")).to_have_count(0)  # JupyterLab trips over two of its own at a time
        page.evaluate(
            "name => jupyterapp.commands.execute('apputils:change-theme', {theme: name})", f"JupyterLab {theme}"
        )
        eventually(lambda full=full: read(matrix, b["x"] + 3, b["y"] + 3)["pixel"][:3] == rgb(Cividis256[full]))

    page.evaluate(run, 1)
    expect(matrix).to_have_attribute("aria-label", re.compile("1 layers by 2 heads"))
    page.evaluate("jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    expect(canvases).to_have_count(0)


def test_trouble_is_noticed(page: Page, trouble: list[str], serve: Callable[..., str]) -> None:
    page.goto(serve(matrix))
    expect(page.get_by_role("application")).to_have_attribute("aria-label", SOMETHING)
    assert trouble == []
    page.evaluate("fetch('http://example.invalid/x.js').catch(() => console.error('planted'))")
    page.evaluate("setTimeout(() => { throw new Error('thrown') })")
    page.wait_for_timeout(300)
    assert any("another host" in line for line in trouble)
    assert any("planted" in line for line in trouble)
    assert any("thrown" in line for line in trouble)
    trouble.clear()
