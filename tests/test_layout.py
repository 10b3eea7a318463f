"""The repository's own shape: names it leaves free, who imports whom, what ships, and what must never be written down."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "workbench": ROOT / "workbench",
    "workbench_kernels": ROOT / "kernels" / "workbench_kernels",
    "workbench_widgets": ROOT / "widgets" / "workbench_widgets",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# -- names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["kernels", "widgets", "apps", "tutorials", "tests"])
def test_folder_is_not_a_package(folder: str) -> None:
    """kernels/__init__.py would hide the Hugging Face package `kernels`, which transformers imports."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_kernels_is_nobodys_module_or_someone_elses() -> None:
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).resolve().is_relative_to(ROOT)


def test_import_kernels_gives_the_other_package_even_behind_the_root(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("CUDAProperties = 'theirs'\n")
    code = "import kernels; from kernels import CUDAProperties; print(CUDAProperties)"
    path = os.pathsep.join(map(str, [ROOT, ROOT / "kernels", ROOT / "widgets", tmp_path]))
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, env={"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == ("theirs", "")


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_typed_and_comes_from_this_checkout(package: str) -> None:
    assert (PACKAGES[package] / "__init__.py").is_file()
    assert (PACKAGES[package] / "py.typed").is_file()
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert Path(spec.origin or "").resolve().parent == PACKAGES[package]


# -- who imports whom: apps -> widgets -> workbench -> kernels -------------------------------------------------------------

UI_LIBRARIES = {
    "anywidget",
    "bokeh",
    "holoviews",
    "ipywidgets",
    "jupyterlab",
    "matplotlib",
    "panel",
    "plotly",
    "traitlets",
}
UI_LIBRARIES |= {"IPython", "panel_material_ui"}
NOT_PACKAGES = {"apps", "workbench_app", "tutorials", "tests"}


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level name) of every absolute import, also those inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.partition(".")[0]


def breaches(folder: Path, forbidden: set[str]) -> list[str]:
    return [
        f"{file.relative_to(folder.parent)}:{line} imports {name}"
        for file in sorted(folder.rglob("*.py"))
        for line, name in imported(file)
        if name in forbidden
    ]


def test_imported_sees_every_form(tmp_path: Path) -> None:
    file = tmp_path / "planted.py"
    file.write_text("import a.b\nfrom c.d import e\nfrom . import own\ndef f():\n    import g\n")
    assert list(imported(file)) == [(1, "a"), (2, "c"), (5, "g")]
    assert breaches(tmp_path, {"g"}) == [f"{tmp_path.name}/planted.py:5 imports g"]


def test_core_imports_no_ui_library_but_param() -> None:
    assert breaches(PACKAGES["workbench"], UI_LIBRARIES | {"workbench_widgets"} | NOT_PACKAGES) == []


def test_widgets_do_not_import_the_app() -> None:
    assert breaches(PACKAGES["workbench_widgets"], NOT_PACKAGES) == []


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = {"torch", "triton", "workbench_kernels"} | sys.stdlib_module_names
    names = {name for file in PACKAGES["workbench_kernels"].rglob("*.py") for _, name in imported(file)}
    assert breaches(PACKAGES["workbench_kernels"], names - allowed) == []


# -- what is installed -----------------------------------------------------------------------------------------------------


def test_every_requirement_is_pinned_within_its_range() -> None:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}
    extras = PROJECT["optional-dependencies"].values()
    for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]:
        need = Requirement(text)
        pin = pins.get(canonicalize_name(need.name))
        assert pin, f"constraints.txt does not pin {need.name}"
        assert need.specifier.contains(pin), f"constraints.txt pins {need.name}=={pin}, pyproject.toml asks for {need}"


def test_conda_environment_installs_every_extra() -> None:
    wanted = f"- -e .[{','.join(PROJECT['optional-dependencies'])}]"
    assert wanted in [line.strip() for line in (ROOT / "environment.yml").read_text().splitlines()]


# -- what must not be in a file --------------------------------------------------------------------------------------------

# Home and scratch folders of the machine a file was made on; notebook outputs are where they slip in.
MACHINE_PATH = re.compile(r"(?<![\w.:/+~-])/(?:root|work|home/\w+|Users/\w+|tmp/\w+)/[\w.]")
# A module, style, script or picture fetched from a site; a W3C namespace or a link to a paper is not.
OUTSIDE = re.compile(
    r"""(?: \bfrom | \bimport | \bimport\s*\( | \bimportScripts\s*\( | \bfetch\s*\( | \bWorker\s*\( | \burl\s*\( | \bsrc\s*= )
        \s* ["'`]? \s* https?://""",
    re.VERBOSE,
)


def repository_files() -> list[Path]:
    """Every file that git tracks or would add."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout, to tell the repository's files from a build's")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def lines_with(pattern: re.Pattern[str], files: list[Path]) -> list[str]:
    found = []
    for file in files:
        raw = file.read_bytes()
        if b"\0" in raw[:8192]:  # weights and pictures
            continue
        lines = enumerate(raw.decode("utf-8", errors="replace").splitlines(), start=1)
        found += [f"{file.relative_to(ROOT)}:{n}: {line.strip()[:120]}" for n, line in lines if pattern.search(line)]
    return found


def test_no_file_names_a_machine_path() -> None:
    assert lines_with(MACHINE_PATH, repository_files()) == []


def test_no_component_loads_anything_from_a_site() -> None:
    """Everything must work offline. Python files count, since a component's code may stand in a string."""
    folders = (ROOT / "widgets", ROOT / "apps")
    kinds = {".css", ".html", ".js", ".mjs", ".py", ".ts"}
    files = [file for file in repository_files() if file.suffix in kinds and set(file.parents) & set(folders)]
    assert lines_with(OUTSIDE, files) == []


@pytest.mark.parametrize(
    "pattern, text, hit",
    [
        (MACHINE_PATH, 'File "/{}/project/x.py"'.format("root"), True),
        (MACHINE_PATH, "cd /{}/main".format("work"), True),
        (MACHINE_PATH, "the app's /{}/ page, or a/{}/b".format("work", "root"), False),
        (OUTSIDE, 'import * as d3 from "{}://cdn.example/d3"'.format("https"), True),
        (OUTSIDE, "const m = await import('{}://cdn.example/m.js')".format("https"), True),
        (OUTSIDE, "@import url({}://fonts.example/a.css);".format("https"), True),
        (OUTSIDE, 'import { bus } from "./bus.js"; // formula: https://arxiv.org/abs/2404.14469', False),
        (OUTSIDE, 'document.createElementNS("http://www.w3.org/2000/svg", "svg")', False),
    ],
)
def test_patterns(pattern: re.Pattern[str], text: str, hit: bool) -> None:
    assert bool(pattern.search(text)) is hit
