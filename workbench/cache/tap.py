"""Hooks that hand the layers' inputs to the caches that work on them."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache

from workbench.models.rebuild import input_of

if TYPE_CHECKING:
    from torch import nn

    from workbench.cache.cache import WorkbenchCache
    from workbench.models.rebuild import Rebuilds


class InputTap:
    """One pre-hook per attention module; a cache and its forks share them.

    A forward call through one of these caches tells it the layer's input before the layer appends to it; any other call
    passes unnoticed. Nothing is computed and nothing is kept. The hooks go with :meth:`remove`, or at the first forward
    call after the last of the caches is gone.
    """

    def __init__(self, rebuilds: Rebuilds) -> None:
        self._caches: weakref.WeakSet[WorkbenchCache] = weakref.WeakSet()
        self._handles = [m.register_forward_pre_hook(self._hear, with_kwargs=True) for m in rebuilds.modules]
        self._layer_of = {module: layer for layer, module in enumerate(rebuilds.modules)}

    def add(self, cache: WorkbenchCache) -> None:
        self._caches.add(cache)

    @property
    def live(self) -> bool:
        """Whether its hooks are in the model."""
        return bool(self._handles)

    def remove(self) -> None:
        """Leave the model as it was; harmless when called again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._caches:
            # Here, and not when the last cache is collected, which may be while torch goes through a module's hooks.
            self.remove()
            return
        for given in (*kwargs.values(), *args):
            if isinstance(given, Cache) and given in self._caches:
                given.layers[self._layer_of[module]].inputs = input_of(args, kwargs)
