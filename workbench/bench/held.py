"""What every eviction method holds of a prompt: after each layer of the prefill, and in the end, as shares of the full cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from workbench.bench.accuracy import eviction_methods
from workbench.bench.subjects import HOUSE_NAME, RANDOM_NAME, TINY_NAME, house_is_there, random_ids, subject
from workbench.cache.cache import WorkbenchCache
from workbench.cache.layer import WorkbenchLayer
from workbench.cache.segments import Query
from workbench.errors import ArtifactError
from workbench.models.load import Model
from workbench.runs.prompt import read_through
from workbench.strategies.recipe import Recipe
from workbench.strategies.registry import registry

SLACK = 1.02  # of the budget: positions, and what else is held beside the entries


class Boundaries:
    """A probe: bytes of all other layers, each time that one has attended and not yet acted: what every layer done holds."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def on_attention(self, layer: WorkbenchLayer, query: Query, out: Tensor) -> None:
        others = (other for other in layer.cache.layers if other is not layer)
        self.bytes.append(sum(sum(other.nbytes().values()) for other in others))


def measure_held(budget: float, length: int, quick: bool, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Per model: every eviction method with a budget, its prompt read in one go, or as the method cuts it.

    Those that need something calibrated or trained are measured on the house model, the others on the random one.
    """
    names = [TINY_NAME] if quick else [RANDOM_NAME] + ([HOUSE_NAME] if house_is_there() else [])
    out = []
    for name in names:
        tell(f"bytes at the layers' boundaries: {name}")
        model = subject(name)
        tokens = min(length, model.geometry.max_positions - 1)
        full = model.geometry.bytes_per_token * tokens
        lanes = {}
        for key in eviction_methods():
            if name != TINY_NAME and (name == HOUSE_NAME) != bool(registry()[key]().artifacts):
                continue
            recipe = Recipe.parse(f"{key}(budget={budget})")
            try:
                recipe.check(model.geometry, model.artifacts)
            except ArtifactError as error:
                lanes[recipe.text] = {"left_out": str(error)}
                continue
            lanes[recipe.text] = held(model, recipe, tokens, full, None if quick else budget)
        out.append({"model": name, "dtype": model.geometry.dtype, "tokens": tokens, "full_bytes": full, "lanes": lanes})
    return out


def held(model: Model, recipe: Recipe, tokens: int, full: int, budget: float | None) -> dict[str, Any]:
    """``boundary``: the most that the layers done hold at a layer's boundary; ``end``: after the prompt; of the full cache.

    A method that settles all layers after the last one is only asked for the end (``cascades`` is False). ``reached``:
    whether that is within the budget and its slack; None without a budget (a tiny model's entries are hardly larger than what is
    noted of them).
    """
    probe = Boundaries()
    cache = WorkbenchCache(recipe, model.geometry, tokens, [probe], model.artifacts)
    read_through(model, cache, random_ids(model, tokens), tokens)
    (method,) = recipe.parts
    cascades = not method.spans_layers or getattr(getattr(method, "allocator_part", None), "cascade", False)
    end = cache.memory().used_bytes
    most = max(*probe.bytes, end) if cascades else end
    return {
        "boundary": round(max(probe.bytes) / full, 5),
        "end": round(end / full, 5),
        "cascades": cascades,
        "reached": None if budget is None else most <= budget * SLACK * full,
    }
