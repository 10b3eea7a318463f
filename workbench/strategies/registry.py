"""All strategies by name: ours, and those other packages offer through the entry point ``kv_workbench.strategies``."""

from __future__ import annotations

import functools
import logging
from importlib.metadata import entry_points
from typing import Any

from workbench.errors import RecipeError
from workbench.strategies.base import Strategy, suggestion
from workbench.strategies.eviction.adakv import AdaKV
from workbench.strategies.eviction.cake import CAKE
from workbench.strategies.eviction.chunkkv import ChunkKV
from workbench.strategies.eviction.compresskv import CompressKV
from workbench.strategies.eviction.critical import CriticalKV
from workbench.strategies.eviction.defensivekv import DefensiveKV, LayerDefensiveKV
from workbench.strategies.eviction.expected_attention import ExpectedAttention
from workbench.strategies.eviction.fastkv import FastKV
from workbench.strategies.eviction.h2o import H2O
from workbench.strategies.eviction.headkv import HeadKV
from workbench.strategies.eviction.keydiff import KeyDiff
from workbench.strategies.eviction.knorm import KNorm
from workbench.strategies.eviction.locret import Locret
from workbench.strategies.eviction.observed_attention import ObservedAttention
from workbench.strategies.eviction.pyramidkv import PyramidKV
from workbench.strategies.eviction.random import Random
from workbench.strategies.eviction.snapkv import SnapKV
from workbench.strategies.eviction.streaming_llm import StreamingLLM
from workbench.strategies.eviction.think import ThinK
from workbench.strategies.eviction.tova import TOVA
from workbench.strategies.quantization.bfp import BFP
from workbench.strategies.quantization.gear import GEAR
from workbench.strategies.quantization.kivi import KIVI
from workbench.strategies.quantization.mikv import MiKV
from workbench.strategies.quantization.mustafar import Mustafar
from workbench.strategies.quantization.rotatekv import RotateKV
from workbench.strategies.quantization.rtn import RTN
from workbench.strategies.quantization.xquant import XQuant, XQuantCL
from workbench.strategies.quantization.zipcache import ZipCache

GROUP = "kv_workbench.strategies"
OURS: list[type[Strategy]] = [
    SnapKV,
    AdaKV,
    HeadKV,
    PyramidKV,
    ChunkKV,
    CriticalKV,
    CAKE,
    CompressKV,
    DefensiveKV,
    LayerDefensiveKV,
    FastKV,
    ExpectedAttention,
    H2O,
    ObservedAttention,
    TOVA,
    StreamingLLM,
    KeyDiff,
    KNorm,
    Random,
    Locret,
    ThinK,
    RTN,
    KIVI,
    GEAR,
    ZipCache,
    MiKV,
    BFP,
    RotateKV,
    Mustafar,
    XQuant,
    XQuantCL,
]


@functools.cache
def registry() -> dict[str, type[Strategy]]:
    """Name -> class. A third-party strategy that fails to import is skipped with a warning that names it."""
    found = {cls.key: cls for cls in OURS}
    for entry in entry_points(group=GROUP):
        try:
            cls = entry.load()
        except Exception as error:  # somebody else's package: it must not take the workbench down
            logging.getLogger(__name__).warning("The strategy '%s' could not be loaded: %s", entry.name, error)
            continue
        found.setdefault(entry.name, cls)
    return found


def strategy_class(name: str) -> type[Strategy]:
    """The class registered as ``name``; RecipeError with the nearest names otherwise."""
    known = registry()
    if name not in known:
        raise RecipeError(
            f"There is no strategy '{name}'.{suggestion(name, list(known))} Known: {', '.join(sorted(known))}."
        )
    return known[name]


def describe(cls: type[Strategy]) -> dict[str, Any]:
    """A strategy for people and machines: what the CLI prints, the app draws and the docs list."""
    parameters = {}
    for name in cls.parameter_names():
        declared = cls.param[name]
        parameters[name] = {
            "default": declared.default,
            "doc": declared.doc or "",
            "type": type(declared).__name__.lower(),
            "bounds": list(bounds) if (bounds := getattr(declared, "bounds", None)) else None,
            "choices": list(declared.objects) if hasattr(declared, "objects") else None,
        }
    return {
        "name": cls.key,
        "title": cls.title,
        "family": cls.family,
        "paper": cls.paper,
        "summary": cls.summary,
        "parameters": parameters,
        "needs": needs(cls()),
    }


def needs(part: Strategy) -> list[str]:
    """What a strategy takes beside keys and values: the prompt's last queries, the choice of later layers' tokens, and the
    commands that make what a model needs beforehand."""
    beforehand = [kind.made_by("MODEL") for kind in part.artifacts]
    return (
        ["queries"] * bool(part.query_window)
        + ["token_set"] * part.needs_token_set
        + ["inputs"] * part.needs_inputs
        + beforehand
    )


def strategies() -> list[dict[str, Any]]:
    """Every strategy there is, described: name, title, family, paper, summary, parameters, needs."""
    return [describe(cls) for cls in registry().values()]
