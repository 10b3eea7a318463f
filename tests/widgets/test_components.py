"""The Python side of the components: what `show` accepts, the bytes it sends, and the rules every component keeps."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("anywidget", reason="the components need anywidget")

from workbench_widgets import HeadMatrix, TokenStatus, TokenStrip
from workbench_widgets.base import Component, module_text
from workbench_widgets.token_strip import LEGEND, LOOKS, token_text

HERE = Path(__file__).parent
COMPONENTS = [HeadMatrix, TokenStrip]


def hosts(cls: type[Component]) -> list[Any]:
    """The component in Jupyter, and in Panel where it is installed."""
    try:
        from workbench_widgets.panel import panel_twin
    except ImportError:
        return [cls()]
    return [cls(), panel_twin(cls)()]


# -- head matrix -----------------------------------------------------------------------------------------------------


def test_head_matrix_sends_rows_of_float32() -> None:
    grid = torch.tensor([[0.25, 1.0], [0.5, float("nan")], [0.0, 0.75]], dtype=torch.bfloat16)
    for matrix in hosts(HeadMatrix):
        matrix.show(grid)
        assert matrix.shape == [3, 2]
        np.testing.assert_array_equal(np.frombuffer(matrix.values, "<f4"), grid.float().numpy().ravel())
        assert (matrix.metric, matrix.unit, matrix.low, matrix.high, matrix.seq) == ("kept share", "%", 0, 1, 1)


@pytest.mark.parametrize(
    "grid, arguments, expected",
    [
        ([[2.0, 8.0]], {"unit": "bytes"}, (0, 8)),
        ([[-2.0, 8.0]], {"unit": ""}, (-2, 8)),
        ([[0.0, 0.01, 10.0]], {"unit": "", "log": True}, (0.01, 10)),  # 0 has no logarithm
        ([[0.0, 0.1]], {"unit": "%", "log": True}, (0.1, 1)),
        ([[0.0, 0.0]], {"unit": ""}, (0, 1)),
        ([[np.nan, np.nan]], {"unit": ""}, (0, 1)),
        ([[np.nan]], {"unit": "", "log": True}, (0.1, 1)),
        ([[np.inf, 3.0]], {"unit": "nats"}, (0, 3)),
        ([[0.2, 0.3]], {"low": 0.1, "high": 0.4}, (0.1, 0.4)),
        (np.zeros((0, 0)), {}, (0, 1)),
    ],
)
def test_head_matrix_colour_range(grid: Any, arguments: dict[str, Any], expected: tuple[float, float]) -> None:
    matrix = HeadMatrix()
    matrix.show(grid, **arguments)
    assert (matrix.low, matrix.high) == pytest.approx(expected)


@pytest.mark.parametrize(
    "grid, arguments, message",
    [
        (np.zeros(3), {}, r"grid \[layers, heads\], got shape \(3,\)"),
        (np.zeros((1, 2, 3)), {}, r"\(1, 2, 3\)"),
        ([[0.5]], {"low": 1, "high": 0}, "low < high"),
        ([[0.5]], {"high": float("inf")}, "finite"),
        ([[0.5]], {"low": 0, "log": True}, "above 0"),
        ([[0.5]], {"heads_per_kv": 0}, "at least 1"),
    ],
)
def test_head_matrix_says_no(grid: Any, arguments: dict[str, Any], message: str) -> None:
    for matrix in hosts(HeadMatrix):
        with pytest.raises(ValueError, match=message):
            matrix.show(grid, **arguments)
        assert matrix.seq == 0


# -- token strip -----------------------------------------------------------------------------------------------------


def test_token_strip_sends_codes_values_and_texts() -> None:
    for strip in hosts(TokenStrip):
        strip.show(
            ["The", " key", b"\xe2\x82", "\0"],
            [TokenStatus.KEPT, 0, 2, 3],
            score=torch.tensor([0.5, 0.25, float("nan"), 1]),
            share=np.array([1, 0.5, 0, 0.25]),
            positions=[0, 1, 2, 3],
            marks=[3, 1],
            title="Lane B · L3 KV1",
        )
        assert strip.tokens.split("\0") == ["The", " key", "⟨0xE2⟩⟨0x82⟩", "⟨0x00⟩"]
        assert strip.status == bytes([1, 0, 2, 3])
        np.testing.assert_array_equal(np.frombuffer(strip.score, "<f4"), np.float32([0.5, 0.25, np.nan, 1]))
        np.testing.assert_array_equal(np.frombuffer(strip.share, "<f4"), np.float32([1, 0.5, 0, 0.25]))
        np.testing.assert_array_equal(np.frombuffer(strip.positions, "<i4"), [0, 1, 2, 3])
        assert (strip.marks, strip.title, strip.seq) == ([1, 3], "Lane B · L3 KV1", 1)

        strip.show(["The"], [1])
        assert (strip.score, strip.share, strip.positions, strip.marks, strip.seq) == (b"", b"", b"", [], 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"status": [1, 1, 1]}, r"status .* 2 tokens, got shape \(3,\)"),
        ({"status": [1, 6]}, r"unknown status codes \[6\]; known are 0 evicted, 1 kept"),
        ({"score": [1.0]}, r"score takes one value per token: 2 tokens, got shape \(1,\)"),
        ({"share": [0.5, 1.5]}, "0 to 1"),
        ({"positions": [[0, 1]]}, "positions"),
        ({"marks": [0, 2]}, r"from 0 to 1, got \[2\]"),
        ({"marks": [-1]}, r"got \[-1\]"),
    ],
)
def test_token_strip_says_no(arguments: dict[str, Any], message: str) -> None:
    for strip in hosts(TokenStrip):
        with pytest.raises(ValueError, match=message):
            strip.show(["a", "b"], **{"status": [1, 0], **arguments})
        assert strip.seq == 0


def test_every_status_has_a_look_of_its_own() -> None:
    assert set(LOOKS) == set(TokenStatus)
    legend = json.loads(LEGEND)
    assert len({entry["look"] for entry in legend}) == len(legend) == len(TokenStatus)
    code = (Path(sys.modules[TokenStrip.__module__].__file__ or "").parent / "index.js").read_text()
    assert not [entry for entry in legend if f'look === "{entry["look"]}"' not in code]


@pytest.mark.parametrize(
    "token, text",
    [("é", "é"), (b"\xc3\xa9", "é"), (b"a\xff", "a⟨0xFF⟩"), ("a\0b", "a⟨0x00⟩b"), ("\ud800", "?"), (b"", "")],
)
def test_token_text(token: str | bytes, text: str) -> None:
    assert token_text(token) == text


def test_131072_tokens_are_shown_within_a_second_and_two_megabytes() -> None:
    import time

    tokens, codes = [" word", " a"] * 65536, np.arange(131072) % 2
    strip = TokenStrip()
    start = time.perf_counter()
    strip.show(tokens, codes, share=np.ones(131072), score=np.ones(131072))
    assert time.perf_counter() - start < 1
    assert len(strip.tokens) + len(strip.status) + len(strip.share) + len(strip.score) < 2 * 2**20


# -- the contract of every component ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", COMPONENTS)
def test_one_message_and_no_half_drawn_state(cls: type[Component], monkeypatch: pytest.MonkeyPatch) -> None:
    component = cls()
    messages: list[dict[str, Any]] = []
    monkeypatch.setattr(component, "_send", lambda message, buffers=None: messages.append(message))
    arguments = ([[0.5]],) if cls is HeadMatrix else (["a"], [1])
    component.show(*arguments)  # type: ignore[attr-defined]
    updates = [message for message in messages if message.get("method") == "update"]
    assert len(updates) == 1
    assert updates[0]["state"]["seq"] == 1


@pytest.mark.parametrize("cls", COMPONENTS)
def test_the_browser_gets_one_module_without_imports(cls: type[Component], tmp_path: Path) -> None:
    source = Path(sys.modules[cls.__module__].__file__ or "").with_name("index.js")
    code = module_text(source)
    assert not [line for line in code.splitlines() if line.startswith("import ")]
    for forbidden in ("http:", "https:", "import(", "model.send", "document.querySelector", "experimental"):
        assert forbidden not in code
    assert max(len(source.read_bytes()), len((source.parents[1] / "canvas.js").read_bytes())) < 25_000
    assert len(code.encode()) < 32_000
    if node := shutil.which("node"):
        (tmp_path / "whole.mjs").write_text(code)
        command = [
            node,
            "--input-type=module",
            "-e",
            "console.log(typeof (await import('./whole.mjs')).default.render)",
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.strip() == "function", done.stderr


def test_module_text_wants_the_one_import(tmp_path: Path) -> None:
    (tmp_path / "index.js").write_text('import * as all from "../canvas.js";\n')
    with pytest.raises(ValueError, match="exactly one line"):
        module_text(tmp_path / "index.js")


def test_importing_the_components_does_not_import_panel() -> None:
    code = "import sys, workbench_widgets; print(sorted({'panel', 'bokeh', 'param'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE.parents[1] / "widgets", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_palette_is_cividis() -> None:
    palettes = pytest.importorskip("bokeh.palettes", reason="compares with Bokeh's palette")
    code = (Path(sys.modules["workbench_widgets"].__file__ or "").parent / "canvas.js").read_text()
    assert "".join(colour[1:].lower() for colour in palettes.Cividis256) in code


# -- Panel -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", COMPONENTS)
def test_the_twin_has_the_same_traits_and_defaults(cls: type[Component]) -> None:
    panel = pytest.importorskip("panel", reason="needs Panel")
    from workbench_widgets.panel import panel_twin

    pane, widget = panel_twin(cls)(), cls()
    names = [name for name, trait in cls.class_traits(sync=True).items() if issubclass(trait.this_class, Component)]
    assert {"selected", "picked", "group", "seq", "hint"} <= set(names)
    assert {name: getattr(pane, name) for name in names} == {name: getattr(widget, name) for name in names}
    assert panel_twin(cls) is type(pane)
    assert panel.Column(pane).select(type(pane)) == [pane]  # Panel's own methods still work
    assert pane.get_root() is not None


def test_the_twin_refuses_names_of_the_hosts() -> None:
    pytest.importorskip("panel", reason="needs Panel")
    import traitlets as t

    from workbench_widgets.panel import panel_twin

    for name in ("select", "loading", "log", "visible"):
        bad = type("Bad", (Component,), {"_esm": "export default {}", name: t.Unicode().tag(sync=True)})
        with pytest.raises(ValueError, match=f"Bad.{name} hides a name"):
            panel_twin(bad)
    odd = type("Odd", (Component,), {"_esm": "export default {}", "when": t.Complex().tag(sync=True)})
    with pytest.raises(TypeError, match=r"Odd\.when is a Complex"):
        panel_twin(odd)
