"""Kernels of KV Workbench: one file per kernel, each with the plain torch twin that defines it.

Axes used throughout: B batch, Hq query heads, H KV heads, G = Hq / H, Tq queries, N cached entries, D head_dim.
"""

from workbench_kernels.attention import attend, attention_received, attention_reference, attention_sums, merge_partials
from workbench_kernels.pack import pack, unpack, unpack_float

__all__ = [
    "attend",
    "attention_received",
    "attention_reference",
    "attention_sums",
    "merge_partials",
    "pack",
    "unpack",
    "unpack_float",
]
