"""What the server does before anybody opens a page: read the house model, in a thread that keeps no one waiting."""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the server takes this entry back once this file has run,
import workbench_app  # noqa: F401  but a package that was found keeps finding its modules

LOG = logging.getLogger("workbench.app")


def warm() -> None:
    """Import the heavy libraries and put the house model on the shelf; a page that comes first just waits for it."""
    try:
        from workbench.errors import WorkbenchError
        from workbench_app.frame import MODEL, app_class, shelf

        app_class()
        try:
            shelf().get(MODEL)
        except WorkbenchError as error:
            LOG.warning("%s", error)
    except Exception:
        LOG.exception("warming up failed")


def on_server_loaded(server_context: Any) -> None:
    threading.Thread(target=warm, name="workbench-warm-up", daemon=True).start()
