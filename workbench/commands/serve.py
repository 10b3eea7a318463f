"""``kvw app``: serve the Panel app on this machine."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

from workbench.errors import StorageError, WorkbenchError

HOST = "localhost"


def apps_folder() -> Path:
    """The app: in a checkout ``apps/``, in an installed package ``workbench/_apps``."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "apps", package / "_apps"):
        if (folder / "main.py").is_file():
            return folder
    raise StorageError("The app's files are not installed; install kv-workbench again, or run kvw app in its checkout.")


def serve_command(port: int, show: bool = False) -> list[str]:
    """The command that serves the app at :data:`HOST` on ``port``."""
    command = [sys.executable, "-m", "panel", "serve", str(apps_folder()), "--port", str(port), "--address", HOST]
    return [*command, "--show"] if show else command


def serve_environment() -> dict[str, str]:
    """This process's environment, with the import path it runs with."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def serve(port: int, show: bool) -> int:
    """Serve until Ctrl-C; returns the server's exit code (0 after an interruption).

    Raises:
        WorkbenchError: panel is missing, the app's files are, or the port is taken.
    """
    if importlib.util.find_spec("panel") is None:
        raise WorkbenchError('The app needs panel, which is not installed; run pip install "kv-workbench[app]".')
    port = port or free_port()
    command = serve_command(port, show)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise WorkbenchError(
                f"Port {port} is taken; choose another with --port, or --port 0 for a free one."
            ) from None
    print(f"KV Workbench is at http://{HOST}:{port}/ (stop it with Ctrl-C)", flush=True)
    server = subprocess.Popen(command, env=serve_environment())
    try:
        return server.wait()
    except KeyboardInterrupt:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
        return 0
