"""`import workbench` is quick: neither torch nor a UI library comes with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import workbench as wb

ROOT = Path(__file__).resolve().parents[1]


def python(code: str) -> str:
    path = os.pathsep.join(map(str, [ROOT, ROOT / "kernels", ROOT / "widgets"]))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = ["torch", "transformers", "numpy", "panel", "bokeh", "param", "triton", "anywidget"]


def test_import_brings_nothing_heavy() -> None:
    assert python(f"import sys, workbench; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


def test_import_takes_a_fraction_of_a_second() -> None:
    began = "import time; t = time.process_time(); import workbench; print(time.process_time() - t)"
    assert min(float(python(began)) for _ in range(3)) < 0.1


def test_asking_for_errors_brings_no_torch_and_strategies_no_ui() -> None:
    assert python("import sys, workbench; workbench.RecipeError; print('torch' in sys.modules)") == "False"
    code = "import sys, workbench as wb; wb.strategies(); print([m for m in ('panel', 'bokeh', 'anywidget') if m in sys.modules])"
    assert python(code) == "[]"


def test_every_public_name_is_there_and_no_other() -> None:
    for name in wb.__all__:
        assert getattr(wb, name) is not None
    assert set(wb.__all__) <= set(dir(wb))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        wb.nothing


def test_packages_are_called_as_functions() -> None:
    code = "import workbench as wb; import workbench.cache.store; print(len(wb.strategies()) > 5, callable(wb.cache), callable(wb.models))"
    assert python(code) == "True True True"
