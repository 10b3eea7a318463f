"""What all browser tests share: Debian's Chromium, pages served by Panel, and a page without trouble.

Tests here carry `pytestmark = pytest.mark.browser`; tests/conftest.py skips them where there is no Chromium.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MISSING = [name for name in ("pytest_playwright", "panel", "anywidget") if importlib.util.find_spec(name) is None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if MISSING:
        skip = pytest.mark.skip(reason=f"browser tests need {', '.join(MISSING)}: pip install 'kv-workbench[app,dev]'")
        for item in items:
            if item.path.is_relative_to(HERE):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def browser_type_launch_args(chromium: str) -> dict[str, Any]:
    # no sandbox: a container's root has none; the rest keeps a small machine's /dev/shm and two cores free
    return {"executable_path": chromium, "args": ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for_port(port: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as door:
            if door.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listened on port {port} within {seconds:.0f} s")


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[], Any]], str]]:
    """`serve(factory)` serves what `factory()` returns, anew for every session, and gives the address."""
    import panel as pn

    servers: list[Any] = []

    def start(factory: Callable[[], Any]) -> str:
        port = free_port()
        here = {"port": port, "address": "127.0.0.1", "websocket_origin": f"127.0.0.1:{port}"}
        servers.append(pn.serve(factory, **here, threaded=True, show=False))
        wait_for_port(port, 20)
        return f"http://127.0.0.1:{port}/"

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(autouse=True)
def trouble(serve: Any, notebook: Any, context: Any) -> Iterator[list[str]]:
    """Console errors, page errors and requests to other hosts, of all pages of the test, which fails if there are any.

    It asks for `serve` and `notebook` so that servers stop after it: a connection they drop is no error of the page.
    """
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)  # a busy machine is no failure; budgets are measured where they are meant
    context.set_default_timeout(60_000)
    found: list[str] = []

    def outside(url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob", "about") and parts.hostname != "127.0.0.1":
            found.append(f"request to another host: {url}")

    context.on("console", lambda message: message.type == "error" and found.append(f"console: {message.text}"))
    context.on("weberror", lambda error: found.append(f"page error: {error.error.stack or error.error}"))
    context.on("request", lambda request: outside(request.url))
    context.on("page", lambda page: page.on("websocket", lambda channel: outside(channel.url)))
    yield found
    for page in context.pages:
        if not page.is_closed():
            page.evaluate("() => new Promise(requestAnimationFrame)")  # lets what is under way report itself
    assert not found, "\n".join(found)


@pytest.fixture
def eventually() -> Callable[[Callable[[], object]], None]:
    """`eventually(lambda: …)` waits until it is true: what a browser sends reaches Python a moment later."""

    def wait(true: Callable[[], object], seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                pytest.fail(f"not true within {seconds} s")
            time.sleep(0.02)

    return wait


@pytest.fixture
def notebook(tmp_path: Path) -> Iterator[Callable[[list[str]], str]]:
    """`notebook(cells)` starts JupyterLab on a notebook of these code cells and gives its address."""
    running: list[subprocess.Popen[bytes]] = []
    log = tmp_path / "jupyter.log"

    def start(cells: list[str]) -> str:
        if importlib.util.find_spec("jupyterlab") is None or importlib.util.find_spec("ipykernel") is None:
            pytest.skip("needs jupyterlab and ipykernel: pip install 'kv-workbench[notebook]'")
        code = {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": []}
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        content = {
            "nbformat": 4,
            "nbformat_minor": 5,
            "metadata": {"kernelspec": kernel},
            "cells": [{**code, "id": f"c{i}", "source": source} for i, source in enumerate(cells)],
        }
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "test.ipynb").write_text(json.dumps(content))
        # no user's settings or kernels, no news and no extension manager, which would ask other hosts
        own = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
        settings = tmp_path / "settings" / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True)
        (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
        own["JUPYTERLAB_SETTINGS_DIR"] = str(tmp_path / "settings")
        path = os.pathsep.join(
            [*map(str, (ROOT, ROOT / "kernels", ROOT / "widgets")), os.environ.get("PYTHONPATH", "")]
        )
        port = free_port()
        options = {
            "ServerApp.ip": "127.0.0.1",
            "ServerApp.port": port,
            "ServerApp.port_retries": 0,
            "ServerApp.root_dir": tmp_path / "work",
            "ServerApp.allow_root": True,
            "IdentityProvider.token": "",
            "LabApp.extension_manager": "readonly",
            "LabApp.expose_app_in_browser": True,
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        with log.open("wb") as out:
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", "jupyterlab", "--no-browser", *arguments],
                    env={**os.environ, **own, "PYTHONPATH": path},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
        wait_for_port(port, 60)
        return f"http://127.0.0.1:{port}/lab/tree/test.ipynb"

    yield start
    for process in running:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.apps.stand_in import write_model  # needs the app's packages

    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def address(serve: Callable[..., str], model: str) -> str:
    """The whole app, with a tiny model."""
    import tests.apps.stand_in  # noqa: F401  (makes the app importable)
    from workbench_app.frame import build

    return serve(lambda: build(model=model))
