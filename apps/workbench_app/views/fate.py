"""Why a prompt token was dropped: its score, rank and the cut, in every layer and head."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import panel as pn
import panel_material_ui as pmui

from workbench.inspection.scores import Fate, ScoreLog, fate
from workbench_app import formats
from workbench_app.ask import LaneState
from workbench_app.looks import BAR
from workbench_app.selection import token_on_show
from workbench_app.views.curve import given_to
from workbench_app.views.look import Look, head_name, quiet, score_text, sentence
from workbench_widgets.panel import HeadMatrixPane

RANK, SCORE = "rank", "score"


class WhyDropped(Look):
    """Layers × heads: a disc where the token stayed, a cross where it was dropped."""

    question = "Why was this token dropped, or kept, in each layer and head?"

    def build(self) -> list[Any]:
        self.token = pmui.TextInput(label="prompt token", value="", size="small", width=130, margin=0)
        self.number = pmui.RadioButtonGroup(
            label="Number in the cells", options=[RANK, SCORE], value=RANK, size="small", margin=0
        )
        self.matrix = HeadMatrixPane(group="heads", margin=0)
        self._note = sentence()
        self._frame: Any = None
        self._shown: int | None = None
        self._filling = False
        self.token.param.watch(self._typed, "value")
        self.number.param.watch(lambda _: self.refresh(), "value")
        self.matrix.param.watch(lambda event: self.pick_head(event.new["layer"], event.new["head"]), "selected")
        return [pn.Row(self.token, self.number, stylesheets=[BAR], margin=(8, 0, 4, 0)), self.matrix, self._note]

    def known(self, lane: LaneState) -> tuple[Any, ...]:
        log = self.session.findings.scores(lane)
        token = token_on_show(self.session, lane, self.state)
        return (
            token,
            self.number.value,
            id(log),
            "" if log is not None else self.session.findings.said("scores", lane),
        )

    def _typed(self, event: Any) -> None:
        if self._filling:
            return
        text = event.new.strip()
        if text.isdecimal() and int(text) < len(self.session.texts):
            self.state.key = int(text)
        elif self._shown is not None:
            self._fill(self._shown)  # no token of the prompt

    def _fill(self, token: int) -> None:
        self._filling = True
        self.token.value = str(token)
        self._filling = False

    def draw(self, lane: LaneState, at: tuple[int, int]) -> None:
        token = token_on_show(self.session, lane, self.state)
        log = self.session.findings.scores(lane)
        if log is None or token is None:
            self.empty(self.session.findings.said("scores", lane))
            return
        found = fate(log, self.session.findings.held(lane), token)
        self._shown = token
        self._fill(token)
        self.lead.object = self._sentence(found, log, lane)
        signs = np.where(found.kept.numpy(), 1, 2)
        if self.number.value == RANK:
            ranks = np.where(found.rank.numpy() > 0, found.rank.numpy(), np.nan)
            most = max(2.0, float(found.scored.max()))
            self.matrix.show(
                ranks, metric="rank among the head's tokens, 1 scores highest", unit="", low=1.0, high=most, signs=signs
            )
        else:
            self.matrix.show(found.score.numpy(), metric="score of the token", unit="", signs=signs)
        self.matrix.picked = list(at)
        hatched = " Hatched: the token has no score there." if bool(found.score.isnan().any()) else ""
        self._note.object = quiet(f"{head_name(at)}: {self._cell(found, at, log, lane)}{hatched}")
        self._frame = pd.DataFrame(
            [
                {
                    "head": head_name((layer, head)),
                    "state": "kept" if found.kept[layer, head] else "dropped",
                    "score": score_text(float(found.score[layer, head])),
                    "rank": int(found.rank[layer, head]) or None,
                    "of scored": int(found.scored[layer, head]),
                    "cut": "–" if math.isnan(found.cut[layer, head]) else score_text(float(found.cut[layer, head])),
                    "head keeps": int(found.held[layer, head]),
                }
                for layer in range(found.kept.shape[0])
                for head in range(found.kept.shape[1])
            ]
        )

    def _sentence(self, found: Fate, log: ScoreLog, lane: LaneState) -> str:
        name = self.look(lane).name
        text = escape(formats.visible(self.session.texts[found.position]))
        heads, kept = found.kept.numel(), int(found.kept.sum())
        out = f'<span class="chip">{text}</span> (prompt token {found.position:,}): {name} kept it in <b>{kept} of {heads}</b> heads'
        out += f" and dropped it in {heads - kept}." if kept < heads else "."
        miss = nearest_miss(found)
        if miss is not None:
            out += (
                f" Nearest miss: {head_name(miss)}, rank {int(found.rank[miss]):,} where the head keeps {int(found.held[miss]):,} "
                f"(score {score_text(float(found.score[miss]))}, lowest kept {score_text(float(found.cut[miss]))})."
            )
        return f"<p>{out}</p>"

    def _cell(self, found: Fate, at: tuple[int, int], log: ScoreLog, lane: LaneState) -> str:
        score, cut, kept = float(found.score[at]), float(found.cut[at]), bool(found.kept[at])
        state = "kept" if kept else "dropped"
        given = given_to(lane, at[0], log.tokens)
        if not kept and given < log.tokens and math.isnan(score):
            return f"{state}: it stayed behind; L{at[0]} was given {given:,} of {log.tokens:,} tokens."
        if log.layers[at[0]] is None:
            return state + (
                "; the layer keeps all it was given."
                if int(found.held[at]) >= given
                else "; not by one score per token."
            )
        if math.isnan(score):
            return f"{state} without a score: {'it never had to compete' if kept else 'it was gone before the choice was made'}."
        out = f"{state} · score {score_text(score)} · rank {int(found.rank[at]):,} of {int(found.scored[at]):,}"
        if not math.isnan(cut):
            out += f" · lowest score kept {score_text(cut)} ({int(found.held[at]):,} kept)"
            if not kept and score > cut:
                out += " · it scored higher than that and went: chunks or several stages chose"
        return out + "."

    def table(self) -> Any:
        return self._frame


def nearest_miss(found: Fate) -> tuple[int, int] | None:
    """The head that dropped the token although it was least far behind what the head keeps."""
    behind = (found.rank - found.held).masked_fill(found.kept | (found.rank == 0), 1 << 62)
    if int(behind.min()) >= 1 << 62 or math.isnan(float(found.cut.flatten()[behind.argmin()])):
        return None
    layer, head = divmod(int(behind.argmin()), found.kept.shape[1])
    return layer, head
