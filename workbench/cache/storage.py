"""Which memory a cache really refers to: caches that were forked share most of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from workbench.cache.cache import WorkbenchCache


def storages(cache: WorkbenchCache) -> dict[int, int]:
    """The blocks of memory that a cache's entries lie in, spare room included: address -> bytes."""
    found: dict[int, int] = {}
    seen: set[int] = set()

    def visit(thing: Any) -> None:
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif id(thing) in seen:
            return
        elif isinstance(thing, list | tuple | set | frozenset):
            seen.add(id(thing))
            for part in thing:
                visit(part)
        elif isinstance(thing, dict):
            seen.add(id(thing))
            for part in thing.values():
                visit(part)
        elif type(thing).__module__.startswith("workbench.cache"):
            seen.add(id(thing))
            visit(vars(thing))

    for layer in cache.layers:
        visit(layer.store.segments)
        visit(layer.states)
    return found
