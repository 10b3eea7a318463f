"""The recipe grammar: strategies composed left to right, ``snapkv(budget=0.25) | kivi(bits=2)``; ``full`` is empty."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.errors import ArtifactError, RecipeError
from workbench.strategies.base import Strategy

if TYPE_CHECKING:
    from workbench.models.artifacts import Artifacts
    from workbench.models.geometry import Geometry

FULL = "full"
LONGEST = 2000  # characters of a recipe


@dataclass(frozen=True)
class Recipe:
    """Parsed strategies in order, and the text they came from. Compares by what it does, not by how it is written."""

    parts: tuple[Strategy, ...] = ()
    text: str = FULL

    @property
    def resolved(self) -> str:
        """Every parameter written out; parsing it gives an equal recipe."""
        return " | ".join(part.resolved for part in self.parts) or FULL

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.resolved == other.resolved

    def __hash__(self) -> int:
        return hash(self.resolved)

    @property
    def query_window(self) -> int:
        """Queries at the end of the prompt that the strategies vote with."""
        return max((part.query_window for part in self.parts), default=0)

    @property
    def needs_prompt(self) -> bool:
        """Whether a strategy must watch the prompt being read."""
        return any(part.needs_prompt for part in self.parts)

    @property
    def keeps_acting(self) -> bool:
        """Whether a strategy acts at every generated token."""
        return any(part.keeps_acting for part in self.parts)

    @property
    def needs_hidden(self) -> bool:
        """Whether a strategy looks at the hidden states that enter the layers."""
        return any(part.needs_hidden for part in self.parts)

    @property
    def needs_inputs(self) -> bool:
        """Whether a strategy holds the inputs of the attention modules."""
        return any(part.needs_inputs for part in self.parts)

    @property
    def needs_token_set(self) -> bool:
        """Whether a strategy lets tokens of the prompt stay behind between two layers."""
        return any(part.needs_token_set for part in self.parts)

    def not_a_drop_in(self) -> RecipeError:
        """Why a cache with this recipe cannot be handed to a model, which gives every layer every token."""
        part = next(part for part in self.parts if part.needs_token_set)
        return RecipeError(
            f"{part.key} gives the later layers fewer tokens, which a cache in model.generate cannot do; run it with "
            "wb.compare, kvw compare or the app, which drive the layers one by one."
        )

    def chunks(self, length: int, most: int) -> list[tuple[int, int]]:
        """A prompt in pieces [start, stop) of at most ``most`` tokens, cut also where a strategy acts within it."""
        wanted = {cut for part in self.parts for cut in part.cuts(length) if 0 < cut < length}
        ends = sorted({*range(most, length, most), *wanted, length})
        return list(zip([0, *ends], ends))

    def check(self, geometry: Geometry, artifacts: Artifacts | None) -> None:
        """Raise, in one sentence, where a strategy cannot run on such a model or lacks what is made for it beforehand."""
        for part in self.parts:
            part.check(geometry)
            for kind, path in part.artifacts.items():
                if artifacts is None:
                    raise ArtifactError(
                        f"{kind.method} needs a {kind.what}, which belongs to a model; make the cache with wb.cache(recipe, model)."
                    )
                artifacts.get(kind, path)

    @classmethod
    def parse(cls, text: str | Recipe) -> Recipe:
        """Read a recipe; RecipeError says in one sentence what is wrong with it."""
        if isinstance(text, Recipe):
            return text
        if isinstance(text, str) and len(text) > LONGEST:
            raise RecipeError(f"The recipe is {len(text):,} characters long; {LONGEST:,} is the most.")
        if not isinstance(text, str) or not text.strip():
            raise RecipeError(
                "The recipe is empty; write 'full' for the full cache, or for example snapkv(budget=0.25)."
            )
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise RecipeError(
                f"The recipe '{text}' cannot be read; write it like snapkv(budget=0.25) | kivi(bits=2)."
            ) from None
        parts = tuple(part for node in _pieces(tree) if (part := _strategy(node, text)) is not None)
        _check_order(parts)
        return cls(parts, text.strip())


def _pieces(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_pieces(node.left), *_pieces(node.right)]
    return [node]


def _strategy(node: ast.expr, text: str) -> Strategy | None:
    from workbench.strategies.registry import strategy_class  # the registry imports strategies that parse scorers

    if isinstance(node, ast.Name):
        return None if node.id == FULL else strategy_class(node.id)()
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise RecipeError(
            f"'{_source(node)}' in the recipe '{text}' is not a strategy; write it like snapkv(budget=0.25)."
        )
    name = node.func.id
    if name == FULL and not node.args and not node.keywords:
        return None
    cls = strategy_class(name)
    if node.args:
        raise RecipeError(f"{name}: name its parameters, like {name}({_example(cls)}).")
    values: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise RecipeError(f"{name}: '**' is not allowed in a recipe.")
        if keyword.arg in values:
            raise RecipeError(f"{name}: the parameter '{keyword.arg}' is given twice.")
        try:
            values[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise RecipeError(
                f"{name}: '{_source(keyword.value)}' is not a value for {keyword.arg}; write a number or a quoted text."
            ) from None
    return cls(**values)


def _source(node: ast.expr) -> str:
    try:
        return ast.unparse(node)
    except RecursionError:
        return "…"


def _example(cls: type[Strategy]) -> str:
    names = cls.parameter_names()
    return f"{names[0]}={cls.param[names[0]].default!r}" if names else ""


def _check_order(parts: tuple[Strategy, ...]) -> None:
    """Refuse combinations that make no sense, and say which do."""
    _check_alike(parts)
    for number, part in enumerate(parts):
        before = parts[:number]
        closing = next((p for p in before if p.closing), None)
        if closing is not None:
            remedy = f"put {part.key} before it" if _drops_tokens(part) else "use one of the two"
            raise RecipeError(
                f"{part.key} cannot follow {closing.key}, whose keys no other method can take over; {remedy}."
            )
        ragged = next((p for p in before if p.ragged), None)
        if part.family == "eviction" and ragged is not None:
            remedy = "use one of the two" if part.closing else f"put {part.key} first or use one of the two"
            raise RecipeError(
                f"{part.key} cannot follow {ragged.key}, which leaves every head with its own number of tokens; {remedy}."
            )
        coded = next((p for p in before if p.family == "quantization"), None)
        if coded is not None and (part.family == "quantization" or part.closing):
            raise RecipeError(
                f"{part.key} cannot follow {coded.key}: entries are held by one codec; use one of the two."
            )
    alone = next((p for p in parts if p.alone), None)
    other = next((p for p in parts if p is not alone and _drops_tokens(p)), None)
    if alone is not None and other is not None:
        raise RecipeError(
            f"{alone.resolved} goes by its own account of what is held, so no other method may evict beside it; take "
            f"{other.key} out."
        )
    choosing = [part.key for part in parts if part.needs_token_set]
    if len(choosing) > 1:
        raise RecipeError(
            f"{' and '.join(choosing)} would both choose the tokens that the later layers are given; use one of the two."
        )
    late = next((p for p in parts if p.spans_layers), None)
    early = next((p for p in parts[parts.index(late) + 1 :] if p.needs_token_set), None) if late is not None else None
    if late is not None and early is not None:
        raise RecipeError(
            f"{early.key} chooses between two layers what the later ones are given, but {late.key} lets the parts after it act "
            f"only when all layers were read; put {early.key} first."
        )
    acting = next((p for p in parts if p.family == "eviction" and p.keeps_acting), None)
    coded = next((p for p in parts if p.family == "quantization" or p.closing), None)
    if acting is not None and coded is not None:
        would = "take apart what" if coded.closing else "quantize anew what"
        raise RecipeError(
            f"{acting.key} evicts at every step, which would {would} {coded.key} holds, each time; write "
            f"{acting.key}(recompress_every=0) so that it acts once, or use snapkv(...) | {coded.key}(...)."
        )


def _check_alike(parts: tuple[Strategy, ...]) -> None:
    """Refuse evictions by head or by layer beside a strategy that holds one row a token for several of them."""
    shared = next((p for p in parts if p.wants_alike), None)
    if shared is None:
        return
    enough = {"layers": ("layers",), "heads": ("layers", "heads")}[shared.wants_alike]
    free = next((p for p in parts if _drops_tokens(p) and p.keeps_alike not in enough), None)
    if free is None:
        return
    evictions = "streaming_llm(recompress_every=0)" + ("" if shared.wants_alike == "layers" else " or chunkkv(...)")
    raise RecipeError(
        f"{shared.key} holds one row a token for all {shared.wants_alike} together, and {free.key} lets each of them keep "
        f"tokens of its own; write {evictions} | {shared.key}(...), or {free.key}(...) | kivi(...)."
    )


def _drops_tokens(part: Strategy) -> bool:
    return part.needs_token_set or (part.family == "eviction" and not part.closing)
