"""The form of a recipe, generated from the parameters its strategies declare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import panel as pn
import panel_material_ui as pmui
import param

from workbench.errors import WorkbenchError
from workbench.strategies.base import Strategy
from workbench.strategies.recipe import Recipe
from workbench_app import recipes
from workbench_app.looks import FORM, FORM_ROW

SMALL: dict[str, Any] = {"size": "small", "sizing_mode": "stretch_width", "margin": (5, 0)}
SMALLEST_SHARE = 0.05


def control(field: recipes.Field, prompt_tokens: int) -> tuple[Any, str]:
    """A labelled control for one declared parameter, and which of its params tells the value a person settled on."""
    value, declared = field.value, field.declared
    label, doc = field.name.replace("_", " "), declared.doc or ""
    low, high = getattr(declared, "bounds", None) or (None, None)
    if field.kind == "budget" and isinstance(value, int):
        most = max(prompt_tokens, value, 16)
        return pmui.IntSlider(label="budget, tokens a head", value=value, start=1, end=most, **SMALL), "value_throttled"
    if field.kind in ("budget", "share"):
        names = {"budget": ("budget, share of the prompt", SMALLEST_SHARE, 0.01)}
        label, start, step = names.get(field.kind, (label, 0.0, 0.05))
        slider = pmui.FloatSlider(
            label=label, value=value, start=min(start, value), end=1.0, step=step, format="0%", **SMALL
        )
        return slider, "value_throttled"
    if field.kind == "choice":
        names = {"as bits" if choice is None else str(choice): choice for choice in declared.objects}
        return pmui.Select(label=label, options=names, value=value, description=doc, **SMALL), "value"
    if field.kind == "switch":
        return pmui.Switch(label=label, value=value, description=doc, margin=(5, 0)), "value"
    if field.kind in ("whole", "number"):
        kind = pmui.IntInput if field.kind == "whole" else pmui.FloatInput
        return kind(label=label, value=value, start=low, end=high, description=doc, **SMALL), "value"
    return pmui.TextInput(label=label, value=str(value), description=doc, **SMALL), "value"


def read(field: recipes.Field, value: Any) -> Any:
    """What a control says, as the parameter wants it; None while a number field is empty."""
    if field.kind == "whole" or (field.kind == "budget" and isinstance(field.value, int)):
        return None if value is None else int(value)
    if field.kind in ("budget", "share", "number"):
        return None if value is None else round(float(value), 6)
    return value


class RecipeForm(pn.viewable.Viewer):
    """One row per strategy: which, its first parameter, the others on demand; and the recipe as text for experts.

    Args:
        change: takes the new recipe when a person changed something.
        lane_name: for labels.
    """

    def __init__(self, change: Callable[[str], None], lane_name: Callable[[], str]) -> None:
        super().__init__()
        self._change, self._lane_name = change, lane_name
        self._recipe, self._text, self._prompt_tokens = Recipe(), "", 0
        self._told: str | None = None  # what this form said last: its controls stand there already
        self._built: tuple[Any, ...] | None = None
        self._open: set[int] = set()
        self._writing = False
        self._filling = False
        self.controls: dict[tuple[int, str], Any] = {}
        self.text_box: Any = None
        self._column = pn.Column(sizing_mode="stretch_width", stylesheets=[FORM], margin=0)

    def __panel__(self) -> Any:
        return self._column

    def show(self, text: str, prompt_tokens: int) -> None:
        """Show a recipe. Controls that fit already only get its values, so that none loses the keyboard's focus."""
        try:
            self._recipe = Recipe.parse(text)
        except WorkbenchError:
            self._recipe = Recipe()
        news = text not in (self._told, self._text) or prompt_tokens != self._prompt_tokens
        self._told = self._told if text == self._told else None
        self._text, self._prompt_tokens = text, prompt_tokens
        shape = (
            tuple((part.key, isinstance(getattr(part, "budget", None), int)) for part in self._recipe.parts),
            tuple(sorted(field.name for part in self._recipe.parts for field in recipes.fields(part))),
            frozenset(self._open),
            self._writing,
        )
        if shape != self._built:
            self._built = shape
            self.controls = {}
            rows = [self._part(number, part) for number, part in enumerate(self._recipe.parts)]
            self._column[:] = [*rows, self._foot()]
        elif news:
            self._fill()

    def _say(self, text: str) -> None:
        self._told = text
        self._change(text)

    def _fill(self) -> None:
        self._filling = True
        try:
            for number, part in enumerate(self._recipe.parts):
                for field in recipes.fields(part):
                    widget = self.controls.get((number, field.name))
                    if widget is not None and widget.value != field.value:
                        _put(widget, field.value)
                    if widget is not None and field.kind == "budget" and isinstance(field.value, int):
                        widget.end = max(self._prompt_tokens, field.value, 16)
            if self.text_box is not None and self._writing:
                self.text_box.value = self._text
        finally:
            self._filling = False

    def _set(self, number: int, text: str | None) -> None:
        if not self._filling:
            self._say(recipes.with_part(self._recipe, number, text))

    def _set_field(self, number: int, name: str, value: Any) -> None:
        if self._filling or number >= len(self._recipe.parts):
            return
        part = self._recipe.parts[number]
        field = next((f for f in recipes.fields(part) if f.name == name), None)
        told = None if field is None else read(field, value)
        if field is None or (told is None and field.kind != "choice") or told == field.value:
            return
        self._say(recipes.with_part(self._recipe, number, recipes.part_text(part, **{name: told})))

    def _part(self, number: int, part: Strategy) -> Any:
        keys = {cls.title or cls.key: cls.key for classes in recipes.families().values() for cls in classes}
        pick = pmui.Select(
            label="strategy",
            groups={
                family.capitalize(): [cls.title or cls.key for cls in classes]
                for family, classes in recipes.families().items()
            },
            value=part.title or part.key,
            description=f"{part.summary} ({part.paper})" if part.paper else part.summary,
            **SMALL,
        )
        pick.param.watch(lambda event: self._set(number, recipes.default_part(keys[event.new])), "value")
        fields = recipes.fields(part)
        icon: dict[str, Any] = {"size": "small", "margin": (4, 0, 0, 0)}
        words = "Fewer parameters" if number in self._open else "All parameters"
        more = pmui.IconButton(icon="tune", description=f"{words} of {part.title}", **icon)
        drop = pmui.IconButton(icon="close", description=f"Take {part.title} out", **icon)
        more.on_click(lambda _: self._toggle(number))
        drop.on_click(lambda _: self._set(number, None))
        head = pn.Row(
            pick,
            *([more] if len(fields) > 1 else []),
            drop,
            sizing_mode="stretch_width",
            stylesheets=[FORM_ROW],
            margin=0,
        )
        shown = fields if number in self._open else fields[:1]
        return pn.Column(head, *(self._field(number, field) for field in shown), sizing_mode="stretch_width", margin=0)

    def _field(self, number: int, field: recipes.Field) -> Any:
        widget, told = control(field, self._prompt_tokens)
        widget._debounce = 1  # ms; Panel waits 50 before it says that a slider was let go
        widget.param.watch(lambda event: self._set_field(number, field.name, event.new), told)
        self.controls[number, field.name] = widget
        if field.kind != "budget":
            return widget
        counted = isinstance(field.value, int)
        words = "as a share of the prompt" if counted else "as a number of tokens a head"
        unit = pmui.IconButton(
            icon="percent" if counted else "tag",
            description=f"Give the budget {words}",
            size="small",
            margin=(14, 0, 0, 4),
        )
        unit.on_click(lambda _: self._other_unit(number))
        return pn.Row(widget, unit, sizing_mode="stretch_width", stylesheets=[FORM_ROW], margin=0)

    def _other_unit(self, number: int) -> None:
        """The same budget as a count instead of a share, or the other way round."""
        part, tokens = self._recipe.parts[number], max(self._prompt_tokens, 1)
        budget: float | int = part.budget  # type: ignore[attr-defined]
        other: float | int
        if isinstance(budget, int):
            other = min(1.0, max(SMALLEST_SHARE, round(budget / tokens, 2)))
        else:
            other = max(1, int(budget * tokens))
        self._say(recipes.with_part(self._recipe, number, recipes.part_text(part, budget=other)))

    def _toggle(self, number: int) -> None:
        self._open ^= {number}
        self.show(self._text, self._prompt_tokens)

    def _foot(self) -> Any:
        """Add a strategy, or write the recipe oneself."""
        keys = {cls.title or cls.key: cls.key for classes in recipes.families().values() for cls in classes}
        add = pmui.MenuButton(
            label="then" if self._recipe.parts else "strategy",
            icon="add",
            items=[{"label": title} for title in keys],
            variant="text",
            size="small",
            margin=0,
        )

        def added(event: Any) -> None:
            if event.new:
                label = event.new["label"] if isinstance(event.new, dict) else event.new
                self._set(len(self._recipe.parts), recipes.default_part(keys[label]))

        add.param.watch(added, "value", onlychanged=False)
        write = pmui.Button(label="as text", icon="edit", variant="text", size="small", margin=0)
        write.on_click(lambda _: self._write())
        row = pn.Row(add, write, sizing_mode="stretch_width", stylesheets=[FORM_ROW], margin=(2, 0, 0, -6))
        self.text_box = None
        if not self._writing:
            return row
        self.text_box = pmui.TextInput(label=f"Recipe of {self._lane_name()}", value=self._text, **SMALL)
        self.text_box.param.watch(lambda event: self._filling or self._say(event.new), "value")
        return pn.Column(row, self.text_box, sizing_mode="stretch_width", margin=0)

    def _write(self) -> None:
        self._writing = not self._writing
        self.show(self._text, self._prompt_tokens)


def _put(widget: Any, value: Any) -> None:
    """Set a control's value; a slider's settled value follows, or the next move back to it would go unheard."""
    if "value_throttled" in widget.param:
        with param.parameterized.edit_constant(widget):
            widget.param.update(value=value, value_throttled=value)
    else:
        widget.value = value
