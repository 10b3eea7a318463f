"""The closer looks in a real browser: each opens, leads to the tokens by mouse and by keyboard, and fits a phone.

Every test also fails on a console error, a page error and a request to another host (`trouble` in conftest.py).
"""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.browser
pytest.importorskip("panel_material_ui", reason="needs the app's libraries: pip install 'kv-workbench[app]'")
pytest.importorskip("playwright.sync_api", reason="needs pytest-playwright")

from playwright.sync_api import Locator, Page, expect  # noqa: E402

SLOW = 25_000  # ms; a busy machine takes its time
SENTENCES = {
    "Budgets": r"keeps [\d,]+ of [\d,]+ entries",
    "Scores": r"keeps [\d,]+ of [\d,]+ scored tokens",
    "Why dropped?": r"Lane A kept it in \d+ of 4 heads",
    "Overlap": r"Jaccard index \d\.\d\d",
    "Retained attention": r"of what the reference reads",
    "Bytes by kind": r"holds [\d,]+ bytes per prompt token",
    "Quantization error": r"every number as the reference has it",
    "Packed or residual": r"in full precision at 32 bits",
}


def opened(page: Page, address: str) -> None:
    page.goto(address)
    for letter in ("Ref", "A", "B"):
        lane = page.locator(f'section.lane[data-lane="{letter}"]')
        expect(lane).to_have_attribute("data-status", "done", timeout=SLOW)
    page.get_by_role("button", name="A", exact=True).click()


def look(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()
    expect(page.get_by_text(re.compile(SENTENCES[name])).first).to_be_visible(timeout=SLOW)


def strip(page: Page) -> Locator:
    return page.get_by_role("application").nth(1)


def test_every_look_opens_and_leads_to_the_tokens(page: Page, address: str) -> None:
    opened(page, address)
    expect(page.get_by_text("To its tokens")).to_be_hidden()
    expect(strip(page)).to_have_attribute("aria-label", re.compile("Lane A"), timeout=SLOW)

    look(page, "Budgets")
    plot = page.locator(".bk-Figure").last
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    plot.click(position={"x": 90, "y": box["height"] * 0.42})  # the second of two bars, at its beginning: KV0
    expect(strip(page)).to_have_attribute("aria-label", re.compile("L1 KV0"), timeout=SLOW)

    look(page, "Scores")
    expect(page.get_by_text("L1 KV0 keeps")).to_be_visible()

    look(page, "Why dropped?")
    matrix = page.get_by_role("application").nth(2)
    expect(matrix).to_have_attribute("aria-label", re.compile(r"kept in \d, dropped in \d heads"), timeout=SLOW)
    matrix.focus()
    matrix.press("ArrowRight")
    matrix.press("Enter")
    expect(strip(page)).to_have_attribute("aria-label", re.compile("L1 KV1"), timeout=SLOW)

    page.get_by_role("button", name="To its tokens").click()
    expect(strip(page)).to_be_focused(timeout=SLOW)
    expect(strip(page)).to_be_in_viewport()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.get_by_text("(prompt token 1)")).to_be_visible(timeout=SLOW)

    look(page, "Overlap")
    expect(page.get_by_role("table").first).to_contain_text("SnapKV")
    look(page, "Retained attention")
    page.get_by_label("Numbers as a table").check()
    expect(page.locator(".tabulator").first).to_be_visible(timeout=SLOW)
    page.get_by_role("button", name="None", exact=True).click()
    expect(page.get_by_text("To its tokens")).to_be_hidden(timeout=SLOW)


def test_errors_follow_the_theme_and_a_lane_is_brought_to_equal_bytes(page: Page, address: str) -> None:
    opened(page, address)
    page.get_by_role("button", name="B", exact=True).click()
    page.get_by_role("button", name="Quantization error", exact=True).click()
    expect(page.get_by_text(re.compile(r"its keys are off by [\d.]+ %"))).to_be_visible(timeout=SLOW)
    page.get_by_role("button", name="values", exact=True).click()
    expect(page.get_by_text(re.compile(r"its values are off by [\d.]+ %"))).to_be_visible(timeout=SLOW)
    palettes = """() => {
      const found = new Set();
      for (const root of Bokeh.documents.flatMap((doc) => [...doc._all_models.values()]))
        if (root.type === "LinearColorMapper") found.add(root.palette[0]);
      return [...found];
    }"""
    page.wait_for_function(f"({palettes})().length == 1", timeout=SLOW)
    light = page.evaluate(palettes)
    page.get_by_label("Toggle theme").click()
    page.wait_for_function(f"({palettes})().length == 1 && ({palettes})()[0] != {light[0]!r}", timeout=SLOW)
    plot = page.locator(".bk-Figure").last
    plot.scroll_into_view_if_needed()
    plot.click(position={"x": 120, "y": 90})
    expect(page.get_by_text("To its tokens")).to_be_visible()
    page.get_by_label("Numbers as a table").check()
    expect(page.locator(".tabulator").first).to_contain_text("largest error", timeout=SLOW)

    page.get_by_role("button", name="A", exact=True).click()
    look(page, "Bytes by kind")
    page.get_by_role("button", name="Match bytes").click()
    expect(page.get_by_text(re.compile(r"Found in \d+ tries"))).to_be_visible(timeout=SLOW)
    lane = page.locator('section.lane[data-lane="A"]')
    expect(lane).to_have_attribute("data-status", "done", timeout=SLOW)
    expect(lane).not_to_contain_text("snapkv(budget=0.25)")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_looks_fit_the_screen(page: Page, address: str, width: int, scheme: str) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    opened(page, address)
    if scheme == "dark":
        page.get_by_label("Toggle theme").click()
    for name in SENTENCES:
        look(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.get_by_role("main").evaluate("node => node.scrollWidth") <= width + 1
