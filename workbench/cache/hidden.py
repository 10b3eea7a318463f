"""The hidden states that enter each layer while the prompt is read, for methods that need more than keys and values."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import RecipeError

if TYPE_CHECKING:
    from workbench.cache.cache import WorkbenchCache
    from workbench.models.geometry import Geometry


class HiddenStates:
    """One pre-hook on each decoder layer, for one cache: the layer that reads for it gets ``hidden`` [B, Tq, hidden].

    Other caches of the same model are not touched, and the model is as it was once :meth:`stop` was called or the cache is
    gone.
    """

    def __init__(self, cache: WorkbenchCache) -> None:
        owner = weakref.ref(cache)
        layers = decoder_layers(cache.geometry)
        hooks = [partial(_note, owner, index) for index in range(len(layers))]
        handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer, hook in zip(layers, hooks)]
        self._stop = weakref.finalize(cache, _remove, handles)

    def stop(self) -> None:
        self._stop()


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _note(owner: Any, index: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = owner()
    if cache is not None and any(given is cache for given in (*args, *kwargs.values())):
        hidden = args[0] if args else kwargs["hidden_states"]
        assert isinstance(hidden, Tensor)
        cache.layers[index].hidden = hidden


def decoder_layers(geometry: Geometry) -> list[torch.nn.Module]:
    """The model's decoder layers in order; RecipeError where they cannot be told."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    network = geometry.ropes.network
    found = [] if network is None else [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
    if len(found) != geometry.num_layers:
        raise RecipeError(
            "This method needs the hidden states that enter each layer, and this model's layers cannot be told; use kivi or "
            "zipcache, which need keys and values only."
        )
    return found
