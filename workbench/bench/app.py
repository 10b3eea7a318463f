"""The app as a person meets it: started by ``panel serve apps/``, driven in a real Chromium without a window.

``server``: process start to the first answer of the server; ``page``: to the lanes on the screen; ``ready``: to the first
comparison complete. ``first_token`` and ``token_32``: from letting go of a budget slider to what the changed lane then
shows, stamped by the page itself when the new text is painted.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from workbench.bench.latency import percentiles
from workbench.bench.subjects import HOUSE_NAME, house_is_there
from workbench.commands.serve import HOST, free_port, serve_command, serve_environment
from workbench.errors import WorkbenchError

SECONDS = 120.0  # that a start or a run may take before the measurement gives up
PROMPT_TOKENS, NEW_TOKENS = 512, 32
LANE = "section.lane"
# Waits for the lane's next run, and notes when its first and 32nd token, and its end, were on the screen.
WATCH = """(lane, wanted) => {
  const before = lane.dataset.run, seen = {};
  window.__released = undefined;
  window.addEventListener("pointerup", () => { window.__released ??= performance.now(); }, { capture: true, once: true });
  window.__seen = seen;
  const look = () => {
    if (window.__released === undefined || lane.dataset.run === before) return;
    const count = Number(lane.dataset.tokens), now = () => performance.now() - window.__released;
    const note = (name) => { if (!(name in seen)) { seen[name] = -1; requestAnimationFrame(() => { seen[name] = now(); }); } };
    if (count >= 1) note("first_token");
    if (count >= wanted) note(`token_${wanted}`);
    if (["done", "error", "cancelled"].includes(lane.dataset.status)) { note("done"); seen.tokens = count; seen.status = lane.dataset.status; }
  };
  window.__watcher?.disconnect();
  window.__watcher = new MutationObserver(look);
  window.__watcher.observe(lane, { attributes: true });
}"""


def chromium() -> str | None:
    """The browser: the path in CHROMIUM, or one on the PATH."""
    named = os.environ.get("CHROMIUM")
    return next(
        filter(None, map(shutil.which, [named] if named else ["chromium", "chromium-browser", "google-chrome"])), None
    )


def measure_app(rounds: int | None, quick: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    """Start the app a few times, then move a budget slider ``rounds`` times; percentiles in milliseconds."""
    browser_path = chromium()
    missing = [name for name in ("panel", "playwright") if importlib.util.find_spec(name) is None]
    missing += [] if browser_path else ["chromium"]
    missing += [] if house_is_there() else ["the house model"]
    if missing:
        return {"skipped": f"{' and '.join(missing)} not installed"}
    from playwright.sync_api import sync_playwright

    moved: dict[str, Any] = {}
    starts: dict[str, list[float]] = {"server": [], "page": [], "ready": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        for number in range(1 if quick else 5):
            tell(f"app: start {number + 1}")
            with _served() as (address, began):
                page = browser.new_page(viewport={"width": 1440, "height": 900})
                starts["server"].append(_until_served(address) - began)
                page.goto(address)
                page.locator(LANE).first.wait_for(timeout=1e3 * SECONDS)
                starts["page"].append(time.perf_counter() - began)
                _until_done(page)
                starts["ready"].append(time.perf_counter() - began)
                if number == 0:
                    tell("app: slider")
                    moved = _slider(page, rounds or (3 if quick else 40))
                page.close()
        browser.close()
    return {**moved, **{f"start_to_{name}": percentiles(seconds) for name, seconds in starts.items()}}


@contextmanager
def _served() -> Iterator[tuple[str, float]]:
    """The app's address and when its process was started."""
    port = free_port()
    began = time.perf_counter()
    server = subprocess.Popen(
        serve_command(port), env=serve_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield f"http://{HOST}:{port}/", began
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _until_served(address: str) -> float:
    """When the server answered for the first time."""
    deadline = time.perf_counter() + SECONDS
    while time.perf_counter() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=SECONDS):
                return time.perf_counter()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.02)
    raise WorkbenchError(f"The app did not answer within {SECONDS:.0f} seconds.")


def _until_done(page: Any) -> None:
    """All lanes have come to an end, and one has tokens."""
    deadline = time.perf_counter() + SECONDS
    while time.perf_counter() < deadline:
        lanes = page.locator(LANE).evaluate_all(
            "all => all.map((one) => [one.dataset.status, Number(one.dataset.tokens)])"
        )
        if lanes and all(status == "done" and count > 0 for status, count in lanes):
            return
        if any(status == "error" for status, _ in lanes):
            raise WorkbenchError("A lane of the app's first comparison failed; see it with kvw app.")
        time.sleep(0.02)
    raise WorkbenchError(f"The app's comparison was not complete within {SECONDS:.0f} seconds: {lanes}.")


def _slider(page: Any, rounds: int) -> dict[str, Any]:
    """Let go of the second lane's budget slider at ever new places, on a prompt of 512 tokens to be copied."""
    _ask(page)
    lane = page.locator(LANE).nth(1).element_handle()
    found: dict[str, list[float]] = {"first_token": [], f"token_{NEW_TOKENS}": [], "done": []}
    for number in range(rounds):
        slider = _slider_below(page, lane)
        place = 0.30 + 0.65 * ((number * 17 % 40) / 40)  # no two neighbours alike, and no place twice
        lane.evaluate(WATCH, NEW_TOKENS)
        thumb, track = slider["thumb"], slider["track"]
        page.mouse.move(thumb["x"], thumb["y"])
        page.mouse.down()
        page.mouse.move(track["x"] + place * track["width"], thumb["y"], steps=4)
        page.mouse.up()
        page.wait_for_function("window.__seen.done > 0", timeout=1e3 * SECONDS)
        seen = page.evaluate("window.__seen")
        for name, values in found.items():
            if seen.get(name, 0) > 0:
                values.append(seen[name] / 1e3)
        _until_done(page)
    counted = {name: percentiles(values) for name, values in found.items() if values}
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "releases": rounds,
        "reached_32": len(found[f"token_{NEW_TOKENS}"]),
        **counted,
    }


def _ask(page: Any) -> None:
    """Put a prompt of about 512 tokens into the drawer, and run it."""
    from workbench.evaluation.tasks import copying
    from workbench.models.load import load

    model = load(HOUSE_NAME, device="cpu")
    words = 40
    while copying(model, words + 5).tokens <= PROMPT_TOKENS:
        words += 5
    before = [one.get_attribute("data-run") for one in page.locator(LANE).all()]
    box = page.get_by_role("textbox", name="Prompt", exact=True)
    box.fill(copying(model, words).prompt)
    box.blur()
    page.get_by_role("textbox", name="Question", exact=True).fill("")
    page.get_by_role("textbox", name="Question", exact=True).blur()
    page.wait_for_timeout(500)
    page.get_by_role("button", name="Run", exact=True).click()
    deadline = time.perf_counter() + SECONDS
    while [one.get_attribute("data-run") for one in page.locator(LANE).all()] == before:
        if time.perf_counter() > deadline:
            raise WorkbenchError("The app did not run the prompt that was typed into it.")
        time.sleep(0.02)
    _until_done(page)


def _slider_below(page: Any, lane: Any) -> dict[str, dict[str, float]]:
    """The thumb's middle and the track of the first slider below a lane's view, within its card."""
    lane.scroll_into_view_if_needed()
    for slider in page.locator(".MuiSlider-root").all():
        slider.scroll_into_view_if_needed()
        track, box = slider.bounding_box(), lane.bounding_box()
        if (
            track is not None
            and box["x"] <= track["x"] + track["width"] / 2 <= box["x"] + box["width"]
            and track["y"] >= box["y"]
        ):
            thumb = slider.locator(".MuiSlider-thumb").bounding_box()
            return {
                "thumb": {"x": thumb["x"] + thumb["width"] / 2, "y": thumb["y"] + thumb["height"] / 2},
                "track": track,
            }
    raise WorkbenchError("The app's second lane shows no budget slider to move.")
