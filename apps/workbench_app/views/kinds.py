"""Where each lane's bytes are: codes, scales, outliers, residual window, positions; and lanes brought to equal bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import panel as pn
import panel_material_ui as pmui
from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, Legend, LegendItem, Range1d

from workbench.errors import WorkbenchError
from workbench.runs.align import Aligned, budgeted, kept_by
from workbench.strategies.recipe import Recipe
from workbench_app import formats, recipes
from workbench_app.ask import LaneState
from workbench_app.charts import NEUTRAL, chart, on_tap
from workbench_app.looks import BAR
from workbench_app.selection import lane_on_show
from workbench_app.views.look import Look, quiet, sentence

# Kind -> how full its colour is, and its hatch: the lane's colour alone would not tell kinds apart.
KINDS: dict[str, tuple[float, str]] = {
    "codes": (0.95, "."), "scales": (0.3, "|"), "outliers": (0.3, "x"), "factors": (0.3, "+"), "bitmaps": (0.3, "o"),
    "keys": (0.95, " "), "values": (0.45, " "), "window": (0.45, "/"), "positions": (0.1, "-"), "mask": (0.1, "`"), "scores": (0.1, "v"),
}  # fmt: skip
OTHER = (0.1, "*")
WORDS = {"window": "in the residual window"}  # the others speak for themselves


class BytesByKind(Look):
    """One bar per lane, made of kinds; and a search that gives the lane on show another lane's bytes."""

    question = "What do a lane's bytes hold, and what do lanes do at equal bytes?"

    def build(self) -> list[Any]:
        self._pane = pn.pane.Bokeh(None, sizing_mode="stretch_width", margin=(4, 0, 0, 0))
        self._note = sentence()
        self.target = pmui.Select(label="as many bytes as", options={"–": None}, size="small", width=200, margin=0)
        self.match = pmui.Button(label="Match bytes", icon="balance", size="small", variant="outlined", margin=0)
        self._words, self._said = sentence(), sentence()
        self._row = pn.Row(self.target, self.match, stylesheets=[BAR], sizing_mode="stretch_width", margin=(8, 0, 4, 0))
        self._frame: Any = None
        self._search: tuple[Any, int] | None = None  # key of the search, and the lane it is for
        self._found: dict[int, tuple[str, str]] = {}  # by lane: the recipe it was given, and what to say of it
        self.match.on_click(lambda _: self._start())
        self.target.param.watch(lambda _: self.refresh(), "value")
        return [self._pane, self._note, self._words, self._row, self._said]

    def _lanes(self) -> list[LaneState]:
        return [lane for lane in self.session.lanes if lane.memory is not None and not lane.stale and lane.kept]

    def known(self, lane: LaneState) -> tuple[Any, ...]:
        held = [(other.key, other.recipe, id(other.memory), other.stale) for other in self._lanes()]
        return (*held, self.target.value, self._telling(lane), self.session.busy, len(self.session.lanes))

    def draw(self, lane: LaneState, at: tuple[int, int]) -> None:
        tokens, lanes = len(self.session.texts), self._lanes()
        if lane not in lanes:
            self._frame = None
            self.empty("This is measured when the lane has run.")
            return
        kinds = [kind for kind in KINDS if any(other.memory.by_kind.get(kind) for other in lanes if other.memory)]
        extra = {kind for other in lanes if other.memory for kind, size in other.memory.by_kind.items() if size}
        kinds += sorted(extra - set(kinds))
        per_token = np.array([[m.by_kind.get(k, 0) / tokens for k in kinds] for m in (o.memory for o in lanes) if m])
        bits = [self._bits(other) for other in lanes]
        own = lanes.index(lane)
        widest = kinds[int(per_token[own].argmax())]
        self.lead.object = (
            f"<p><b>{self.look(lane).name}</b> holds <b>{per_token[own].sum():,.0f} bytes</b> per prompt token"
            f"{self._spent(bits[own])}, most of them {WORDS.get(widest, widest)}.</p>"
        )
        self._pane.object = self._bars(lanes, kinds, per_token, bits)
        self._note.object = quiet(
            "Measured after the prompt, all layers and heads. Bits of a number: all the lane's bytes over the keys and values it "
            "still holds. Click a bar to turn to its lane."
        )
        self._offer(lane, lanes)
        self._said.object = self._telling(lane)
        self._frame = pd.DataFrame(
            {"lane": [f"{self.look(o).letter} {recipes.title(o.recipe)}" for o in lanes]}
            | {f"{kind}, B/token": per_token[:, n].round(1) for n, kind in enumerate(kinds)}
            | {
                "all, B/token": per_token.sum(1).round(1),
                "bits of a number": ["–" if b is None else f"{b:.2f}" for b in bits],
            }
        )

    def _bits(self, lane: LaneState) -> float | None:
        """Bits that a number takes which the lane still holds."""
        model, memory = self.session.model, lane.memory
        numbers = sum(len(head) for layer in lane.kept for head in layer)
        if model is None or memory is None or not numbers:
            return None
        return 8 * memory.used_bytes / (numbers * 2 * model.geometry.head_dim)

    def _spent(self, bits: float | None) -> str:
        return "" if bits is None else f", <b>{bits:.2f} bits</b> for each number it holds"

    def _bars(self, lanes: list[LaneState], kinds: list[str], sizes: np.ndarray, bits: list[float | None]) -> Any:
        count, most = len(lanes), float(sizes.sum(1).max())
        plot = chart(
            34 * count + 110,
            "bytes per prompt token",
            "",
            y_range=Range1d(count - 0.4, -0.6),
            x_range=Range1d(0, most * 1.02),
        )
        plot.ygrid.visible = False
        plot.yaxis.ticker = FixedTicker(ticks=list(range(count)))
        plot.yaxis.major_label_overrides = {
            n: self.look(lane).letter + ("" if bits[n] is None else f" · {bits[n]:.1f} bits")
            for n, lane in enumerate(lanes)
        }
        right = sizes.cumsum(1)
        items, marks = [], []
        rows = np.arange(count)
        colours = [self.look(lane).colour for lane in lanes]
        for number, kind in enumerate(kinds):
            alpha, hatch = KINDS.get(kind, OTHER)
            source = ColumnDataSource(
                {
                    "left": right[:, number] - sizes[:, number],
                    "right": right[:, number],
                    "top": rows - 0.36,
                    "bottom": rows + 0.36,
                    "colour": colours,
                    "words": [
                        f"{size:,.1f} B per token ({formats.percent(size / whole, 1)})"
                        for size, whole in zip(sizes[:, number], sizes.sum(1), strict=True)
                    ],
                    "lane": [self.look(lane).name for lane in lanes],
                    "kind": [kind] * count,
                }
            )
            paint = {"fill_alpha": alpha, "hatch_pattern": hatch, "hatch_scale": 7, "hatch_weight": 1.2}
            ink = "#ffffff" if alpha > 0.8 else "colour"
            mark = plot.quad(
                "left",
                "right",
                "top",
                "bottom",
                source=source,
                fill_color="colour",
                line_color="colour",
                hatch_color=ink,
                **paint,
            )
            marks.append(mark)
            on_tap(plot, mark, lambda index: self.state.param.update(lane=lanes[index].key, settled=True))
            key = plot.quad(
                [0], [0], [0], [0], fill_color=NEUTRAL, line_color=NEUTRAL,
                hatch_color="#ffffff" if alpha > 0.8 else NEUTRAL, **paint,
            )  # fmt: skip
            items.append(LegendItem(label=kind, renderers=[key]))
        columns = 3 if len(items) > 4 else 4
        legend = Legend(
            items=items, orientation="horizontal", ncols=columns, border_line_alpha=0, background_fill_alpha=0, padding=0,
            margin=4, label_text_font_size="12px", spacing=10, click_policy="none", location="left",
        )  # fmt: skip
        plot.add_layout(legend, "below")
        plot.add_tools(HoverTool(renderers=marks, tooltips=[("", "@lane: @kind"), ("held", "@words")]))
        return plot

    def table(self) -> Any:
        return self._frame

    # -- at equal bytes -------------------------------------------------------------------------------------------------

    def _offer(self, lane: LaneState, lanes: list[LaneState]) -> None:
        name = self.look(lane).name
        able = budgeted(Recipe.parse(lane.recipe)) is not None
        options: dict[str, int | None] = {
            f"{self.look(other).name} ({formats.bytes_text(other.memory.used_bytes)})": other.key
            for other in lanes
            if other is not lane and other.memory is not None
        }
        if list(self.target.options.values()) != list(options.values()) or list(self.target.options) != list(options):
            chosen = (
                self.target.value if self.target.value in options.values() else next(reversed(options.values()), None)
            )
            self.target.param.update(options=options or {"–": None}, value=chosen)
        self.target.visible = self.match.visible = able and bool(options)
        self.match.disabled = self.session.busy
        self._words.object = (
            f"<p>Give <b>{name}</b> the budget with which it holds</p>"
            if able and options
            else quiet(f"{name} has no budget to search: turn to a lane that evicts, and match it to this one.")
        )

    def _start(self) -> None:
        session = self.session
        lane = lane_on_show(session, self.state)
        other = None if self.target.value is None else session.lane(self.target.value)
        if lane is None or other is None or other is lane or other.memory is None or lane.result is None:
            return
        target, key, before = other.memory.used_bytes, lane.key, lane.result.resolved
        self._search = (session.findings.align_key(lane, target), key)
        name = self.look(other).name
        session.findings.align(lane, target, lambda found: self._take(key, before, name, found))
        self.refresh()

    def _take(self, key: int, before: str, target: str, found: Aligned) -> None:
        """Give the lane the budget that was found, unless it was changed meanwhile."""
        session, self._search = self.session, None
        lane = session.lane(key)
        if lane is None or lane.result is None or lane.result.resolved != before:
            return
        recipe, tokens = Recipe.parse(lane.recipe), len(session.texts)
        number = budgeted(recipe)
        assert number is not None
        text = recipes.with_part(recipe, number, recipes.part_text(recipe.parts[number], budget=found.budget))
        held, wanted = (formats.bytes_text(size) for size in (found.used_bytes, found.target_bytes))
        near = "" if found.close else " One token more or less is already farther off."
        words = (
            f"<p>Found in {found.tries} tries: budget <b>{kept_by(found.budget, tokens)}</b> "
            f"holds {held}, {target} {wanted} ({signed(found.off)}).{near}</p>"
        )
        self._found[key] = (text, words)
        session.set_recipe(key, text)

    def _telling(self, lane: LaneState) -> str:
        """How far the search is, why it failed, or what it found."""
        if self._search is not None and self._search[1] == lane.key:
            said = self.session.findings.align_said(self._search[0])
            return quiet(said or "The search was stopped.")
        recipe, words = self._found.get(lane.key, ("", ""))
        try:
            return words if recipe and Recipe.parse(recipe) == Recipe.parse(lane.recipe) else ""
        except WorkbenchError:
            return ""


def signed(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−")
