"""Allocators and selectors by the name they have in a recipe: ``snapkv(allocator="adakv", selector=…)``."""

from workbench.strategies.eviction.allocators.adakv import AdaKVAllocator
from workbench.strategies.eviction.allocators.cake import CakeAllocator
from workbench.strategies.eviction.allocators.chunks import ChunkSelector
from workbench.strategies.eviction.allocators.compresskv import CompressKVAllocator
from workbench.strategies.eviction.allocators.flat import FlatAllocator
from workbench.strategies.eviction.allocators.global_ import GlobalAllocator
from workbench.strategies.eviction.allocators.headkv import HeadKVAllocator
from workbench.strategies.eviction.allocators.pyramidkv import PyramidAllocator
from workbench.strategies.eviction.base import Allocator, Selector

ALLOCATORS: dict[str | None, type[Allocator]] = {
    None: Allocator,
    "adakv": AdaKVAllocator,
    "pyramidkv": PyramidAllocator,
    "flat": FlatAllocator,
    "global": GlobalAllocator,
    "cake": CakeAllocator,
    "compresskv": CompressKVAllocator,
    "headkv": HeadKVAllocator,
}
SELECTORS: dict[str | None, type[Selector]] = {None: Selector, "chunks": ChunkSelector}
