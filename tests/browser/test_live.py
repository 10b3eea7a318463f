"""Steering lanes in a real browser: rewind, step, continue, fork by keyboard, protect a token and undo it.

Every test also fails on a console error, a page error and a request to another host (`trouble` in conftest.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.browser
pytest.importorskip("panel_material_ui", reason="needs the app's libraries: pip install 'kv-workbench[app]'")
pytest.importorskip("playwright.sync_api", reason="needs pytest-playwright")

from playwright.sync_api import Locator, Page, expect  # noqa: E402

from tests.apps.stand_in import write_model  # noqa: E402

SLOW = 25_000  # ms; a busy machine takes its time


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def address(serve: Callable[..., str], model: str) -> str:
    from workbench_app.frame import build

    return serve(lambda: build(model=model))


def lane(page: Page, letter: str) -> Locator:
    return page.locator(f'section.lane[data-lane="{letter}"]')


def is_now(page: Page, letter: str, status: str, tokens: int | None = None) -> None:
    expect(lane(page, letter)).to_have_attribute("data-status", status, timeout=SLOW)
    if tokens is not None:
        expect(lane(page, letter)).to_have_attribute("data-tokens", str(tokens), timeout=SLOW)


def steer(page: Page, letter: str, action: str) -> Locator:
    return lane(page, letter).locator(f'button.steer[data-action="{action}"]')


def opened(page: Page, address: str) -> int:
    """The page with the default comparison finished; tokens of lane A."""
    page.goto(address)
    for letter in ("Ref", "A", "B"):
        is_now(page, letter, "done")
    return int(lane(page, "A").get_attribute("data-tokens") or 0)


def test_a_lane_is_rewound_steps_and_is_forked_by_keyboard(page: Page, address: str) -> None:
    total = opened(page, address)
    ours = lane(page, "A")
    text = ours.locator(".output").get_attribute("aria-label")
    ours.locator(".token").nth(3).click()
    steer(page, "A", "rewind").click()
    is_now(page, "A", "paused", 3)
    expect(ours.locator(".said")).to_have_text("paused before token 3")
    step = steer(page, "A", "step")
    step.focus()
    step.press("Enter")
    is_now(page, "A", "paused", 4)
    steer(page, "A", "step").press("Enter")  # the button kept its place, or gave the keyboard to the one that came
    is_now(page, "A", "paused", 5)
    steer(page, "A", "continue").click()
    is_now(page, "A", "done", total)
    expect(ours.locator(".output")).to_have_attribute("aria-label", text or "", timeout=SLOW)

    output = ours.locator(".output")
    output.focus()
    output.press("Home")
    output.press("ArrowRight")
    output.press("f")
    is_now(page, "B", "done", total)  # the fork stands beside its lane
    expect(lane(page, "B").locator(".marks")).to_have_text("forked from A at token 1")
    expect(page.locator("section.lane")).to_have_count(4)
    page.keyboard.press("Control+z")
    expect(page.locator("section.lane")).to_have_count(3, timeout=SLOW)


def test_a_running_lane_is_paused_and_the_others_go_on(page: Page, address: str) -> None:
    opened(page, address)
    tokens = page.get_by_label("new tokens")
    tokens.fill("600")
    tokens.press("Enter")
    is_now(page, "Ref", "generating")
    steer(page, "Ref", "pause").click()
    is_now(page, "Ref", "paused")
    is_now(page, "A", "generating")
    page.keyboard.press("Escape")
    is_now(page, "Ref", "cancelled")


def test_a_token_is_protected_and_that_is_undone(page: Page, address: str) -> None:
    opened(page, address)
    page.get_by_role("button", name="A", exact=True).click()
    before = lane(page, "A").locator(".sum").inner_text()
    protect = page.get_by_role("button", name="Protect", exact=True)
    expect(protect).to_be_enabled(timeout=SLOW)
    strip = page.get_by_role("application").nth(1)
    strip.focus()
    strip.press("Home")
    strip.press("Enter")
    expect(page.get_by_text(re.compile(r"\(0\), by hand"))).to_be_visible(timeout=SLOW)
    protect.click()
    expect(lane(page, "A").locator(".marks")).to_contain_text("(0) in all heads", timeout=SLOW)
    is_now(page, "A", "done")
    expect(lane(page, "A").locator(".sum")).not_to_have_text(before, timeout=SLOW)
    page.keyboard.press("Control+z")
    expect(lane(page, "A").locator(".marks li")).to_have_count(0, timeout=SLOW)
    expect(lane(page, "A").locator(".sum")).to_have_text(before, timeout=SLOW)


def test_on_a_phone_nothing_runs_over_the_edge(page: Page, address: str) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    opened(page, address)
    lane(page, "Ref").locator(".token").nth(1).click()
    expect(steer(page, "Ref", "fork")).to_be_visible(timeout=SLOW)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390
