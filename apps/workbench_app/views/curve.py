"""A head's scores in falling order, and where the cut fell."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
import pandas as pd
import panel as pn
from bokeh.models import ColumnDataSource, HoverTool, Range1d, Span

from workbench.inspection.scores import Curve, ScoreLog, curve, thinned
from workbench_app import formats
from workbench_app.ask import LaneState
from workbench_app.charts import NEUTRAL, chart, on_tap
from workbench_app.selection import token_on_show
from workbench_app.views.look import Look, head_name, quiet, score_text, sentence

MOST = 2_000  # tokens drawn


class ScoreCurve(Look):
    """Kept tokens are discs, dropped ones crosses; the cut is a dashed line."""

    question = "By what scores did this head choose, and where was the cut?"

    def build(self) -> list[Any]:
        self._pane = pn.pane.Bokeh(None, sizing_mode="stretch_width", margin=(4, 0, 0, 0))
        self._note = sentence()
        self._found: Curve | None = None
        return [self._pane, self._note]

    def known(self, lane: LaneState) -> tuple[Any, ...]:
        log = self.session.findings.scores(lane)
        return (id(log), "" if log is not None else self.session.findings.said("scores", lane))

    def draw(self, lane: LaneState, at: tuple[int, int]) -> None:
        self._found = None
        log = self.session.findings.scores(lane)
        if log is None:
            self.empty(self.session.findings.said("scores", lane))
            return
        rows, look = log.layers[at[0]], self.look(lane)
        if rows is None:
            self.empty(unscored(look.name, log, at[0], lane))
            return
        self._found = found = curve(rows[at[1]], self.session.findings.held(lane)[at])
        token = token_on_show(self.session, lane, self.state)
        self.lead.object = self._sentence(found, look, at)
        self._pane.object = self._plot(found, look, token)
        self._note.object = quiet(
            f"{'□ protected (drawn at the highest score) · ' if found.protected else ''}● kept · ✕ dropped · ◇ the token that is looked into{self._where(found, token)}. Larger means keep. Click a mark "
            "to see why its token stayed or went."
            + ("" if len(found.scores) <= MOST else f" {MOST:,} of {len(found.scores):,} tokens are drawn.")
        )

    def _sentence(self, found: Curve, look: formats.Look, at: tuple[int, int]) -> str:
        kept = int(found.kept.sum())
        always = f", of them {found.protected:,} protected whatever the others score" if found.protected else ""
        cut = f"; the lowest score that stayed is <b>{score_text(found.cut)}</b>" if found.cut is not None else ""
        more = f" {formats.count(found.unscored, 'token')} more stayed without a score." if found.unscored else ""
        mixed = (
            ""
            if found.by_rank
            else " Some that scored higher went: chunks or several stages chose, not this score alone."
        )
        return f"<p><b>{look.name}, {head_name(at)}</b> keeps {kept:,} of {len(found.scores):,} scored tokens{always}{cut}.{more}{mixed}</p>"

    def _where(self, found: Curve, token: int | None) -> str:
        places = (found.positions == token).nonzero() if token is not None else ()
        if not len(places):
            return ""
        place = int(places[0, 0])
        text = escape(formats.visible(self.session.texts[token or 0]))
        return f' (<span class="chip">{text}</span>, position {token:,}, rank {place + 1:,}, score {score_text(float(found.scores[place]))})'

    def _plot(self, found: Curve, look: formats.Look, token: int | None) -> Any:
        finite = found.scores[found.scores < np.inf]
        log = bool(len(finite)) and float(finite.min()) > 0 and float(finite.max() / finite.min()) > 50
        plot = chart(
            300,
            "tokens by rank (1 scores highest)",
            "score (log)" if log else "score",
            y_axis_type="log" if log else "linear",
            x_range=Range1d(0, len(found.scores) + 1),
        )
        last = int(found.kept.nonzero()[-1]) if bool(found.kept.any()) else 0
        mine = (found.positions == token).nonzero().flatten().tolist() if token is not None else []
        places = thinned(len(found.scores), MOST, [found.protected, last, last + 1, *mine])
        top = float(finite.max()) if len(finite) else 1.0
        texts, held = self.session.texts, found.kept[places].numpy()
        drawn = found.scores[places].clamp_max(top).numpy()
        data = {
            "x": places.numpy() + 1,
            "y": drawn,
            "position": found.positions[places].numpy(),
            "text": [formats.visible(texts[p]) for p in found.positions[places].tolist()],
            "score": [score_text(s) for s in found.scores[places].tolist()],
        }
        plot.line(data["x"], data["y"], color=NEUTRAL, line_width=1)
        marks = []
        safe = (found.scores[places] == np.inf).numpy()
        for name, which, marker in (
            ("protected", held & safe, "square"),
            ("kept", held & ~safe, "circle"),
            ("dropped", ~held, "x"),
        ):
            source = ColumnDataSource(
                {key: np.asarray(value)[which] for key, value in data.items()} | {"state": [name] * int(which.sum())}
            )
            colour = NEUTRAL if name == "dropped" else look.colour
            mark = plot.scatter("x", "y", source=source, marker=marker, size=6, color=colour, line_width=1.2)
            if name == "protected":
                mark.glyph.update(fill_alpha=0, size=7)
            on_tap(plot, mark, lambda index, source=source: self._pick(int(source.data["position"][index])))
            marks.append(mark)
        if mine:
            place = mine[0]
            y = min(float(found.scores[place]), top)
            plot.scatter(
                [place + 1],
                [y],
                marker="diamond",
                size=17,
                fill_alpha=0,
                line_color="#E77116" if look.colour != "#E77116" else "#3498D1",
                line_width=2.5,
            )
        if bool((~found.kept).any()):
            plot.add_layout(
                Span(location=last + 1.5, dimension="height", line_color=NEUTRAL, line_dash="dashed", line_width=2)
            )
        tips = [("token", "@position “@text”"), ("rank", "@x"), ("score", "@score"), ("state", "@state")]
        plot.add_tools(HoverTool(renderers=marks, tooltips=tips))
        return plot

    def _pick(self, token: int) -> None:
        self.state.key = token

    def table(self) -> Any:
        found, texts = self._found, self.session.texts
        if found is None:
            return None
        return pd.DataFrame(
            {
                "rank": np.arange(1, len(found.scores) + 1),
                "position": found.positions.numpy(),
                "token": [formats.visible(texts[p]) for p in found.positions.tolist()],
                "score": [score_text(s) for s in found.scores.tolist()],
                "state": np.where(found.kept.numpy(), "kept", "dropped"),
            }
        )


def unscored(name: str, log: ScoreLog, layer: int, lane: LaneState) -> str:
    """Why a layer has no scores."""
    given = given_to(lane, layer, log.tokens)
    if all(len(head) >= given for head in lane.kept[layer]):
        if given < log.tokens:
            return f"{name} gave L{layer} only {given:,} of {log.tokens:,} tokens and keeps them all, so nothing was scored there."
        return f"{name} keeps every token in L{layer}, so nothing was scored there."
    return f"{name} does not choose by one score per token in L{layer}; the strip above shows what stayed."


def given_to(lane: LaneState, layer: int, tokens: int) -> int:
    """How many of the prompt's tokens a layer was given."""
    given = lane.result.tokens_by_layer if lane.result is not None else []
    return given[layer] if layer < len(given) else tokens
