"""KV Workbench: see, compare and steer the caches inside generative models.

The public names below load on first use, so that ``import workbench`` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "load": "workbench.models.load",
    "Model": "workbench.models.load",
    "Geometry": "workbench.models.geometry",
    "Recipe": "workbench.strategies.recipe",
    "compare": "workbench.runs.compare",
    "stream": "workbench.runs.compare",
    "inspect": "workbench.runs.inspect",
    "drift": "workbench.runs.drift",
    "Control": "workbench.runs.control",
    "WorkbenchError": "workbench.errors",
    "ModelError": "workbench.errors",
    "PromptError": "workbench.errors",
    "RecipeError": "workbench.errors",
    "StorageError": "workbench.errors",
    "ArtifactError": "workbench.errors",
    "OutOfMemoryError": "workbench.errors",
}
_CALLABLE_PACKAGES = ("cache", "models", "strategies")  # folders and functions of one name: see _callable.py
__all__ = [*_WHERE, *_CALLABLE_PACKAGES, "__version__"]

if TYPE_CHECKING:
    from workbench.cache.make import cache as cache
    from workbench.errors import ArtifactError as ArtifactError
    from workbench.errors import ModelError as ModelError
    from workbench.errors import OutOfMemoryError as OutOfMemoryError
    from workbench.errors import PromptError as PromptError
    from workbench.errors import RecipeError as RecipeError
    from workbench.errors import StorageError as StorageError
    from workbench.errors import WorkbenchError as WorkbenchError
    from workbench.models.geometry import Geometry as Geometry
    from workbench.models.house import models as models
    from workbench.models.load import Model as Model
    from workbench.models.load import load as load
    from workbench.runs.compare import compare as compare
    from workbench.runs.compare import stream as stream
    from workbench.runs.control import Control as Control
    from workbench.runs.drift import drift as drift
    from workbench.runs.inspect import inspect as inspect
    from workbench.strategies.recipe import Recipe as Recipe
    from workbench.strategies.registry import strategies as strategies


def __getattr__(name: str) -> Any:
    if name in _CALLABLE_PACKAGES:
        return import_module(f"workbench.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'workbench' has no attribute '{name}'")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
