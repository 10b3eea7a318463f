"""Kernels of KV Workbench: one file per kernel, each with the plain torch twin that defines it.

Axes used throughout: B batch, Hq query heads, H KV heads, G = Hq / H, Tq queries, N cached entries, D head_dim.
"""

from workbench_kernels.attention import attend, attention_received, attention_reference, attention_sums, merge_partials
from workbench_kernels.codes import decode_weights, encode_weights
from workbench_kernels.counting import AttentionCounts, attend_counting
from workbench_kernels.hadamard import hadamard
from workbench_kernels.pack import pack, unpack, unpack_float
from workbench_kernels.packed_attention import Packed, packed_attention, packed_attention_reference
from workbench_kernels.sparse import Sparse, compress, sparse_attention, sparse_attention_reference

__all__ = [
    "AttentionCounts",
    "Packed",
    "Sparse",
    "attend",
    "attend_counting",
    "attention_received",
    "attention_reference",
    "attention_sums",
    "compress",
    "decode_weights",
    "encode_weights",
    "hadamard",
    "merge_partials",
    "pack",
    "packed_attention",
    "packed_attention_reference",
    "sparse_attention",
    "sparse_attention_reference",
    "unpack",
    "unpack_float",
]
