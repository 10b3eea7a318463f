from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("panel_material_ui", reason="the app needs: pip install 'kv-workbench[app]'")

from tests.apps.stand_in import ready, session_for, write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def session(model_folder: Path) -> Iterator[Any]:
    """The default comparison, finished."""
    made = ready(session_for(model_folder))
    yield made
    made.close()
