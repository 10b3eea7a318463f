"""What every strategy is: parameters declared once, a few lifecycle methods, equality by resolved text."""

from __future__ import annotations

import difflib
import functools
import json
import math
from typing import TYPE_CHECKING, Any, ClassVar

import param

from workbench.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.cache.layer import LayerView
    from workbench.models.artifacts import Kind
    from workbench.models.geometry import Geometry


class Budget(param.Parameter):
    """A share of the prompt's tokens, (0, 1] written with a point, or a count per KV head, an integer from 1 up."""

    def __init__(self, default: float | int = 0.25, **params: Any) -> None:
        super().__init__(default=default, **params)
        self._validate(default)

    def _validate(self, val: Any) -> None:
        whole = isinstance(val, int) and not isinstance(val, bool)
        share = isinstance(val, float) and math.isfinite(val)
        if not ((whole and val >= 1) or (share and 0.0 < val <= 1.0)):
            raise ValueError(
                f"budget must be a share above 0 and up to 1.0 (like 0.25) or a whole number of tokens from 1 up "
                f"(like 64), got {val!r}"
            )


def tokens_kept(budget: float | int, length: int) -> int:
    """Entries a budget keeps of ``length``: a share is rounded down, at least one; a count is a count."""
    if isinstance(budget, int):
        return min(budget, length)
    return min(length, max(1, math.floor(budget * length + 1e-9)))


def tokens_kept_together(budget: float | int, length: int, heads: int) -> int:
    """Entries that ``heads`` of ``length`` each keep together: a share is rounded down on the sum, not head by head."""
    return max(heads * tokens_kept(budget, length), tokens_kept(budget, heads * length))


class Declared(param.Parameterized):
    """Parameters declared once. Instances only hold them, never change, and compare by what they are.

    A part may be made of others (:meth:`components`), whose parameters are then given alongside its own:
    ``adakv(scorer="snapkv", window=16)``.

    Class attributes:
        key: the name in recipes and messages.
        private: parameters that are not given alongside when this is a component of another part.
        choosing: parameters that name components.
        artifact_kind: what must have been calibrated or trained for the model, if the part itself needs such.
    """

    key: ClassVar[str] = ""
    private: ClassVar[frozenset[str]] = frozenset()
    choosing: ClassVar[frozenset[str]] = frozenset({"allocator", "selector", "scorer"})
    artifact_kind: ClassVar[Kind | None] = None

    def __init__(self, **values: Any) -> None:
        own = self.parameter_names()
        mine = {name: canonical(self.key, self.param[name], v) for name, v in values.items() if name in own}
        try:
            super().__init__(**mine)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"{self.key}: {readable(error, mine, self.param)}") from None
        rest = {name: value for name, value in values.items() if name not in own}
        kinds = self.components()
        known = [*own, *(n for kind in kinds for n in kind.public_names() if n not in own)]
        for name in rest:
            if name not in known:
                raise RecipeError(
                    f"{self.key} has no parameter '{name}'; {self._with()}it has {', '.join(known) or 'none'}."
                    + suggestion(name, known)
                )
        self._parts = tuple(
            kind(**self.settled(kind), **{n: v for n, v in rest.items() if n in kind.public_names()}) for kind in kinds
        )
        self._sealed = True

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "_sealed", False) and name in self.parameter_names():
            raise AttributeError(f"{self.key}.{name} is fixed; make a new {self.key}({name}={value!r}) instead")
        super().__setattr__(name, value)

    def components(self) -> list[type[Declared]]:
        """The kinds of part this one is made of, as its own parameters choose them."""
        return []

    def settled(self, kind: type[Declared]) -> dict[str, Any]:
        """Parameters of a component that this part decides itself."""
        return {}

    @property
    def artifact_path(self) -> str:
        """The file named for this part's artifact; empty for the one that belongs to the model."""
        return getattr(self, "artifact", "")

    @property
    def artifacts(self) -> dict[Kind, str]:
        """All artifacts that this part and its components need: kind -> file, empty where it belongs."""
        found = {kind: path for part in self._parts for kind, path in part.artifacts.items()}
        return found if self.artifact_kind is None else {**found, self.artifact_kind: self.artifact_path}

    def _with(self) -> str:
        chosen = [str(value) for name, value in self.values().items() if name in self.choosing and value is not None]
        return f"with {' and '.join(chosen)} " if chosen else ""

    @classmethod
    def parameter_names(cls) -> list[str]:
        """Declared parameters, the budget first."""
        names = [name for name in cls.param if name != "name"]
        return sorted(names, key=lambda name: (cls.param[name].precedence or 0, names.index(name)))

    @classmethod
    @functools.cache
    def public_names(cls) -> tuple[str, ...]:
        """What may be given alongside when this is a component; its own components are those of its defaults."""
        return tuple(name for name in cls().fields() if name not in cls.private)

    def values(self) -> dict[str, Any]:
        """This part's own parameters."""
        return {name: getattr(self, name) for name in self.parameter_names()}

    def fields(self) -> dict[str, tuple[param.Parameter, Any]]:
        """All that can be written in a recipe, components included: name -> declared parameter and value."""
        found = {name: (self.param[name], value) for name, value in self.values().items()}
        for part in self._parts:
            public = part.public_names()
            for name, field in part.fields().items():
                if name in public:
                    found.setdefault(name, field)
        return found

    @property
    def resolved(self) -> str:
        """The part with every parameter written out: what it compares and hashes by."""
        return f"{self.key}({written_out({name: value for name, (_, value) in self.fields().items()})})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Declared) and self.resolved == other.resolved

    def __hash__(self) -> int:
        return hash(self.resolved)


class Strategy(Declared):
    """One method with its parameters.

    Class attributes:
        family: eviction, quantization, …; title, paper, summary: for people.
        query_window: queries at the end of the prompt that the method votes with; 0 if none.
        needs_prompt: True when it must watch the prompt being read (then a finished prefill cannot be reused).
        needs_token_set: True when it lets tokens of the prompt stay behind between two layers (``view.pass_on``): the
            layers are then run one by one, which is no part of ``model.generate``.
        keeps_acting: True when it acts at every generated token.
        ragged: True when heads may keep different numbers of entries.
        spans_layers: True when a layer's entries are settled only after the last layer; the parts that follow in a
            recipe then act after that.
        needs_hidden: True when it looks at the hidden states that enter each layer while the prompt is read.
        needs_inputs: True when it holds the inputs of the attention modules instead of keys and values.
        per_entry: names in a layer's state that hold a number for each entry, [B, H, n]; whoever evicts, they stay in step.
        alone: True when no other method may drop tokens in the same recipe.
        closing: True when it holds entries in a form that no other method can take over, so it comes last.
    """

    family: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    closing: ClassVar[bool] = False

    @property
    def alone(self) -> bool:
        return False

    @property
    def per_entry(self) -> frozenset[str]:
        return frozenset()

    @property
    def needs_prompt(self) -> bool:
        return False

    @property
    def needs_hidden(self) -> bool:
        return False

    @property
    def needs_inputs(self) -> bool:
        return False

    @property
    def needs_token_set(self) -> bool:
        return False

    @property
    def ragged(self) -> bool:
        return False

    @property
    def spans_layers(self) -> bool:
        return False

    @property
    def keeps_alike(self) -> str:
        """Who is sure to keep the same tokens: "layers" (all heads of all layers), "heads" (those of a layer), or nobody: ""."""
        return ""

    @property
    def wants_alike(self) -> str:
        """Who must keep the same tokens for this to work after an eviction, in the same words; "" for nobody."""
        return ""

    @property
    def query_window(self) -> int:
        return 0

    @property
    def keeps_acting(self) -> bool:
        return False

    def check(self, geometry: Geometry) -> None:
        """Raise RecipeError, in one sentence, where this strategy cannot run on such a model."""

    def cuts(self, prompt_length: int) -> Sequence[int]:
        """Numbers of tokens after which the method wants to act: no chunk of the prompt is fed across one."""
        return ()

    def on_chunk(self, view: LayerView) -> None:
        """After each chunk of the prompt attended in a layer."""

    def after_prefill(self, view: LayerView) -> None:
        """After the prompt's last chunk attended in a layer, layer by layer. ``view.earlier()`` are the layers before."""

    def after_prompt(self, views: Sequence[LayerView]) -> None:
        """Once, after the last layer, with a view of every layer: for decisions across them."""

    def after_step(self, view: LayerView) -> None:
        """After each later chunk (a generated token, a question) attended in a layer."""


def canonical(key: str, declared: param.Parameter, value: Any) -> Any:
    """One spelling for values that mean the same (1 and 1.0), so that recipes compare; refuses look-alikes."""
    choices = list(getattr(declared, "objects", []))
    number = isinstance(declared, param.Number)
    if (number and isinstance(value, bool)) or (
        value in choices and not any(value == choice and type(value) is type(choice) for choice in choices)
    ):
        takes = f"one of {', '.join(map(written, choices))}" if choices else "a number"
        raise RecipeError(f"{key}: {declared.name} must be {takes}, got {written(value)}.")
    if number and not isinstance(declared, param.Integer) and isinstance(value, int):
        return float(value) if abs(value) < 1 << 53 else value
    return value


def written(value: Any) -> str:
    """A parameter value as it is written in a recipe."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def written_out(values: dict[str, Any]) -> str:
    """Parameters as they are written in a recipe; those left open (None, or no text) are left out."""
    return ", ".join(f"{name}={written(value)}" for name, value in values.items() if value not in (None, ""))


def suggestion(name: str, known: list[str]) -> str:
    """' Did you mean …?' for the nearest known names, or nothing."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def readable(error: Exception, values: dict[str, Any], declared: Any) -> str:
    """param's message in our words: which parameter, what it takes, what came."""
    for name, value in values.items():
        parameter = declared[name]
        try:
            parameter._validate(value)
        except (ValueError, TypeError):
            if isinstance(parameter, Budget):
                return str(error) + "."
            if isinstance(parameter, param.Selector):
                choices = ", ".join(written(choice) for choice in parameter.objects)
                return f"{name} must be one of {choices}, got {written(value)}."
            if isinstance(parameter, param.String):
                return f"{name} must be a name in quotes, got {written(value)}."
            bounds = getattr(parameter, "bounds", None)
            kind = "a whole number" if isinstance(parameter, param.Integer) else "a number"
            if bounds:
                low, high = bounds
                between = f" between {low} and {high}" if high is not None else f" of at least {low}"
                return f"{name} must be {kind}{between}, got {written(value)}."
            return f"{name} cannot be {written(value)}; its default is {written(parameter.default)}."
    return str(error) + "."
