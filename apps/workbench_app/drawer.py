"""The left drawer: model, prompt, sampling, and the strategies there are."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

import panel as pn
import panel_material_ui as pmui

import workbench as wb
from workbench.evaluation.tasks import Example, examples, needle
from workbench.training.recall import facts
from workbench_app import formats, recipes
from workbench_app.looks import DRAWER, PAIRS, TEXT
from workbench_app.session import Change, Session

WIDE: dict[str, Any] = {"size": "small", "sizing_mode": "stretch_width", "margin": (6, 0)}
NARROW: dict[str, Any] = {"size": "small", "sizing_mode": "stretch_width", "margin": 0}
OWN = "My own text"


def heading(text: str) -> Any:
    return pn.pane.HTML(f"<h2>{text}</h2>", stylesheets=[TEXT], margin=(14, 0, 2, 0), sizing_mode="stretch_width")


class Drawer(pn.viewable.Viewer):
    """What all lanes share. A change of the prompt or the sampling takes effect with Run."""

    def __init__(self, session: Session, run: Callable[[], None]) -> None:
        super().__init__()
        self._session, self._run = session, run
        self._examples: dict[str, Example] = {}
        self._filling = False
        house = [model["name"] for model in wb.models()]
        self.model = pmui.AutocompleteInput(
            label="Model: house name, folder or Hub id",
            options=list(dict.fromkeys([session.draft.model, *house])),
            value=session.draft.model,
            restrict=False,
            min_characters=0,
            **WIDE,
        )
        self.model_line = pn.pane.HTML("", stylesheets=[TEXT], margin=(0, 0, 4, 0), sizing_mode="stretch_width")
        self.pick = pmui.Select(label="Example", options=[OWN], value=OWN, **WIDE)
        self.length = pmui.IntInput(label="tokens", value=500, start=96, end=100_000, step=100, **NARROW)
        self.depth = pmui.FloatInput(label="depth", value=0.4, start=0.0, end=1.0, step=0.1, **NARROW)
        self.needle_seed = pmui.IntInput(label="seed", value=0, start=0, end=9999, **NARROW)
        kinds = {"any": "", **{a.name: a.name for a in (*facts.SHORT, *facts.LONG)}}
        self.kind = pmui.Select(label="what is asked", options=kinds, value="", **NARROW)
        self.make = pmui.Button(
            label="Make",
            variant="outlined",
            size="small",
            margin=0,
            description="Hide a new fact in prose and ask for it",
        )
        self.prompt = pmui.TextAreaInput(label="Prompt", rows=8, max_rows=8, max_length=2_000_000, **WIDE)
        self.question = pmui.TextAreaInput(label="Question", rows=1, max_rows=4, max_length=20_000, **WIDE)
        self.aware = pmui.RadioButtonGroup(
            label="When is the question asked?",
            options={"in the prompt": True, "after compression": False},
            value=session.draft.aware,
            **WIDE,
        )
        self.about = pn.pane.HTML("", stylesheets=[TEXT], margin=0, sizing_mode="stretch_width")
        self.trouble = pn.pane.HTML("", stylesheets=[TEXT], margin=(2, 0), sizing_mode="stretch_width")
        self.tokens = pmui.IntInput(label="new tokens", value=session.draft.max_new_tokens, start=1, end=4096, **NARROW)
        self.temperature = pmui.FloatInput(label="temperature", value=0.0, start=0.0, end=5.0, step=0.1, **NARROW)
        self.seed = pmui.IntInput(label="seed", value=0, start=0, end=2**31 - 1, **NARROW)
        self.first = pmui.RadioButtonGroup(
            label="First token of a compressed lane",
            options={"replayed": "replayed", "prefill": "prefill"},
            value="replayed",
            **WIDE,
        )
        self._first_about = pn.pane.HTML("", stylesheets=[TEXT], margin=0, sizing_mode="stretch_width")
        self._column = pn.Column(
            heading("Model"), self.model, self.model_line,
            heading("Prompt"), self.pick,
            pn.pane.HTML('<p class="quiet" style="font-size:12.5px">or hide a needle</p>', stylesheets=[TEXT], margin=(4, 0, 6, 0)),
            pn.Column(self.kind, self.length, self.depth, self.needle_seed, self.make, stylesheets=[PAIRS], margin=0, sizing_mode="stretch_width"),
            self.trouble, self.prompt, self.question, self.aware, self.about,
            heading("Sampling"),
            pn.Column(self.tokens, self.temperature, self.seed, stylesheets=[PAIRS], margin=(6, 0), sizing_mode="stretch_width"),
            self.first, self._first_about,
            heading("Strategies"), pn.pane.HTML(library(), stylesheets=[TEXT], margin=0, sizing_mode="stretch_width"),
            stylesheets=[DRAWER], sizing_mode="stretch_width", margin=0,
        )  # fmt: skip
        self._watch()
        session.watchers.append(self._heard)
        self._say()

    def __panel__(self) -> Any:
        return self._column

    def _watch(self) -> None:
        self.model.param.watch(lambda event: event.new and self._choose_model(event.new.strip()), "value")
        self.pick.param.watch(lambda event: self._choose(event.new), "value")
        self.make.on_click(lambda _: self._needle())
        self.prompt.param.watch(lambda event: self._typed(), "value")
        self.question.param.watch(lambda event: self._typed(), "value")
        self.aware.param.watch(lambda event: self._set(aware=event.new), "value")
        self.tokens.param.watch(lambda event: event.new and self._set(max_new_tokens=event.new), "value")
        self.temperature.param.watch(lambda event: event.new is not None and self._set(temperature=event.new), "value")
        self.seed.param.watch(lambda event: event.new is not None and self._set(seed=event.new), "value")
        self.first.param.watch(lambda event: self._set(first_token=event.new), "value")

    def offer_examples(self) -> None:
        """The ready examples of the loaded model; the first one is taken if there is no prompt yet."""
        model = self._session.model
        if model is None:
            return
        self._examples = {f"{e.title} ({e.tokens:,} tokens)": e for e in ready(model)}
        with_own = [*self._examples, OWN]
        self.pick.options = with_own
        if not self._session.draft.prompt.strip() and self._examples:
            self.take(next(iter(self._examples)))
        else:
            self._filling, self.pick.value, self._filling = True, OWN, False
        self.length.end = max(96, model.geometry.max_positions - 128)

    def take(self, title: str) -> None:
        """Fill in a ready example."""
        self._fill(self._examples[title])
        self._filling, self.pick.value, self._filling = True, title, False

    def _choose(self, title: str) -> None:
        if not self._filling and title in self._examples:
            self._fill(self._examples[title])
            self._run()

    def _needle(self) -> None:
        model = self._session.model
        if model is None:
            return
        try:
            made = needle(model, self.length.value, self.depth.value, self.needle_seed.value, self.kind.value or None)
        except wb.WorkbenchError as error:
            self._session.prompt_error = str(error)
            self._say()
            return
        self._fill(made)
        self._filling, self.pick.value, self._filling = True, OWN, False
        self._run()

    def _fill(self, example: Example) -> None:
        self._filling = True
        self.prompt.value, self.question.value = example.context, example.question
        self._filling = False
        self._session.prompt_error = None
        self._session.ask_example(example)

    def _typed(self) -> None:
        if self._filling:
            return
        self._session.ask_for(prompt=self.prompt.value, question=self.question.value)
        self._filling, self.pick.value, self._filling = True, OWN, False

    def _set(self, **changes: Any) -> None:
        self._session.ask_for(**changes)
        if self._session.draft.prompt.strip():
            self._run()

    def _choose_model(self, name: str) -> None:
        if name != self._session.draft.model or self._session.model_state == "error":
            self._session.load(name, self._loaded)

    def _loaded(self) -> None:
        self.offer_examples()
        self._run()

    def _heard(self, change: Change) -> None:
        if change.topics & {"model", "prompt", "texts"}:
            self._say()

    def _say(self) -> None:
        """Everything in the drawer that is told rather than entered."""
        session = self._session
        if session.model_state == "loading":
            line = f'<p class="quiet">Loading {escape(session.draft.model)}…</p>'
        elif session.model_error:
            line = f'<p class="trouble" role="alert">{escape(session.model_error)}</p>'
        elif session.model is not None:
            g = session.model.geometry
            line = (
                f'<p class="quiet" style="font-size:12.5px">{g.num_layers} layers × {g.num_kv_heads} KV heads of '
                f"{g.head_dim}, {g.dtype}, {g.bytes_per_token:,} bytes a token, on {session.model.device}</p>"
            )
        else:
            line = ""
        self.model_line.object = line
        error = session.prompt_error
        self.trouble.object = f'<p class="trouble" role="alert">{escape(error)}</p>' if error else ""
        how = (
            "The strategies see the question while they choose what to keep (query-aware)."
            if session.draft.aware
            else "The context is compressed first, then the question is fed (query-agnostic)."
        )
        answer = ""
        if session.draft_example is not None and session.draft_example.answer:
            answer = (
                f'<br>Expected: <span class="chip">{escape(formats.quoted(session.draft_example.answer, 40))}</span>'
            )
        self.about.object = f'<p class="quiet" style="font-size:12.5px">{how}{answer}</p>'
        self._first_about.object = '<p class="quiet" style="font-size:12.5px">' + (
            "The last prompt token is asked again, of the compressed cache."
            if session.draft.first_token == "replayed"
            else "It comes from uncompressed attention, as in the papers; short answers then hide every loss."
        ) + "</p>"  # fmt: skip


def ready(model: wb.Model) -> list[Example]:
    """The ready examples for a model, the one a session opens with first."""
    try:
        return examples(model)
    except wb.WorkbenchError:  # this model's tokenizer cannot tell where the evidence is
        return []


def library() -> str:
    """Every strategy with its sentence, by family."""
    out = []
    for family, classes in recipes.families().items():
        rows = "".join(f"<dt>{escape(cls.title or cls.key)}</dt><dd>{escape(cls.summary)}</dd>" for cls in classes)
        out.append(f'<p style="margin:6px 0 2px"><b>{escape(family.capitalize())}</b></p><dl>{rows}</dl>')
    return "".join(out)
