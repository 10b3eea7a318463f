"""Decode attention over packed and sparse entries against dense attention: time, bytes read, memory at the peak.

On a GPU every contender is one CUDA graph, so that launches cost the same, and the second-level cache is emptied before
each run. On a CPU every contender goes through several layers' caches in turn, more than its caches hold, as decoding does.
A speed is refused where the result is not that of the definition. Axes as in :mod:`workbench_kernels`.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.cache.schemes.base import Scheme
from workbench.cache.schemes.bitmap import Bitmap
from workbench.cache.schemes.rtn import PerChannel, PerToken
from workbench_kernels import (
    Packed,
    Sparse,
    packed_attention,
    packed_attention_reference,
    sparse_attention,
    sparse_attention_reference,
)

KV_HEADS = 8
GPU_TOKENS = (4096, 8192, 16384, 32768, 65536, 131072)
CPU_TOKENS = (4096, 16384)
CPU_WORKING_SET = 1 << 28  # bytes of dense keys and values that a round goes through
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3}
CPU_TIME, CPU_MEMORY = 1.5, 0.25  # of dense float32, at most, at 2 bits and 16,384 tokens
GPU_SPEED = {4: 3.2, 2: 5.0}  # times fp16 SDPA, at least, from 32,768 tokens on, for heads of 128
GPU_BANDWIDTH = {4: 0.85}  # of the copy bandwidth, at least, in the same cases


@dataclass(frozen=True)
class Case:
    """One shape, and how its entries are held: ``bits`` in groups of ``group``, or pruned by ``sparsity``."""

    tokens: int
    head_dim: int
    queries: int  # query heads per KV head
    bits: int | None = None
    group: int = 64
    sparsity: float | None = None

    def describe(self) -> dict[str, Any]:
        held = {"sparsity": self.sparsity} if self.bits is None else {"bits": self.bits, "group_size": self.group}
        shape = {"tokens": self.tokens, "head_dim": self.head_dim, "query_heads_per_kv_head": self.queries}
        return {"kernel": "sparse" if self.bits is None else "packed", **held, **shape, "kv_heads": KV_HEADS}


def cases(device: str, lengths: Sequence[int] | None, quick: bool) -> list[Case]:
    """What is measured: everything on a GPU, a part of it on a CPU."""
    if quick:
        return [Case(512, 64, 4, bits=2), Case(512, 64, 4, sparsity=0.5)]
    gpu = device == "cuda"
    found = [
        Case(tokens, dim, queries, bits=bits, group=group)
        for tokens in lengths or (GPU_TOKENS if gpu else CPU_TOKENS)
        for dim in (64, 128)
        for queries in ((1, 4, 8) if gpu else (1, 4))
        for bits in (2, 4, 8)
        for group in ((32, 64) if gpu else (32,))
    ]
    pruned = [
        Case(tokens, 128, 4, sparsity=share)
        for tokens in lengths or (GPU_TOKENS if gpu else CPU_TOKENS)
        for share in (0.5, 0.7)
    ]
    return found + pruned


def measure_kernels(
    lengths: Sequence[int] | None, rounds: int | None, quick: bool, tell: Callable[[str], None]
) -> dict[str, Any]:
    """``device``, ``copy_gb_per_second`` (read and written, measured), and ``cases``; see :func:`measure_case`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.inference_mode():
        tell(f"kernels: copy bandwidth of the {device}")
        bandwidth = copy_bandwidth(device, quick)
        out = []
        for case in cases(device, lengths, quick):
            tell(f"kernels: {', '.join(f'{name} {value}' for name, value in case.describe().items())}")
            out.append(measure_case(case, device, rounds or (3 if quick else 30), bandwidth))
    return {"device": device, "copy_gb_per_second": round(bandwidth / 1e9, 2), "cases": out}


def measure_case(case: Case, device: str, rounds: int, bandwidth: float) -> dict[str, Any]:
    """One case against the dense contenders of the same run.

    Returns:
        Its shape; ``microseconds`` of each contender (median); ``bytes_read``, ``gb_per_second`` and ``of_copy_bandwidth``;
        ``speedup`` of the fused path over each dense contender (median of the ratios within a round, and their range);
        on a CPU ``memory``, the bytes at the peak, held and passing, of both and their ratio; ``asked`` and ``reached``.
    """
    dtype = torch.float16 if device == "cuda" else torch.float32
    out = case.describe() | {"dtype": str(dtype).removeprefix("torch."), "path": "fused"}
    layers = 1 if device == "cuda" else max(1, CPU_WORKING_SET // dense_bytes(case, dtype))
    many = [Layer(case, device, dtype, seed) for seed in range(layers)]
    difference = many[0].difference()
    out["largest_difference"] = difference
    if not difference <= TOLERANCE[dtype]:
        out["refused"] = f"the result differs from the definition by {difference:.2g}, so no speed is reported"
        return out
    names = list(many[0].contenders())
    seconds = (_gpu_seconds if device == "cuda" else _cpu_seconds)(many, names, rounds)
    fused = statistics.median(seconds["fused"])
    out["microseconds"] = {name: round(1e6 * statistics.median(taken), 2) for name, taken in seconds.items()}
    out["bytes_read"] = many[0].bytes_read()
    out["gb_per_second"] = round(out["bytes_read"] / fused / 1e9, 2)
    out["of_copy_bandwidth"] = round(out["bytes_read"] / fused / bandwidth, 4)
    out["speedup"] = {
        name: _spread([dense / ours for dense, ours in zip(seconds[name], seconds["fused"], strict=True)])
        for name in names
        if name != "fused"
    }
    del many
    if device == "cpu":
        out["memory"] = memory(case)
    return out | judged(case, device, out)


def memory(case: Case) -> dict[str, Any] | None:
    """Bytes at the peak of one decode attention, held and passing: fused, dense and their ratio. None where the kernel
    of the operating system does not count them."""
    from workbench.bench.kernel_memory import peak_of_call

    peaks = {name: peak_of_call(case, name) for name in ("fused", "matmul")}
    fused, dense = peaks["fused"], peaks["matmul"]
    if fused is None or dense is None:
        return None
    return {"fused": fused, "dense": dense, "ratio": round(sum(fused.values()) / sum(dense.values()), 4)}


def judged(case: Case, device: str, found: dict[str, Any]) -> dict[str, Any]:
    """The figures asked for in this case, if any, and whether they were reached."""
    asked: dict[str, float] = {}
    reached = []
    if device == "cpu" and case.bits == 2 and case.tokens >= 16384 and case.head_dim == 128:
        against_fastest = min(speed["median"] for speed in found["speedup"].values())
        asked["time_of_dense_at_most"] = CPU_TIME
        reached.append(against_fastest >= 1 / CPU_TIME)
        if found["memory"] is not None:
            asked["memory_of_dense_at_most"] = CPU_MEMORY
            reached.append(found["memory"]["ratio"] <= CPU_MEMORY)
    if (
        device == "cuda"
        and case.bits in GPU_SPEED
        and case.tokens >= 32768
        and case.head_dim == 128
        and case.group >= 64
    ):
        asked["speedup_over_sdpa_at_least"] = GPU_SPEED[case.bits]
        reached.append(found["speedup"]["sdpa"]["median"] >= GPU_SPEED[case.bits])
        if case.bits in GPU_BANDWIDTH:
            asked["of_copy_bandwidth_at_least"] = GPU_BANDWIDTH[case.bits]
            reached.append(found["of_copy_bandwidth"] >= GPU_BANDWIDTH[case.bits])
    return {"asked": asked or None, "reached": all(reached) if reached else None}


class Layer:
    """One layer's entries, held both ways, and a query."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype, seed: int) -> None:
        made = torch.Generator(device).manual_seed(seed)
        self.case, self.scale = case, case.head_dim**-0.5
        shape = (1, KV_HEADS, case.tokens, case.head_dim)
        self.k, self.v = (torch.randn(shape, generator=made, device=device).to(dtype) for _ in range(2))
        self.q = torch.randn(1, KV_HEADS * case.queries, 1, case.head_dim, generator=made, device=device).to(dtype)
        self.keys, self.values = held(case, self.k, self.v)

    def contenders(self) -> dict[str, Callable[[], Any]]:
        """Name -> one decode attention; ``fused`` is ours, the others read dense entries."""
        grouped = self.q.view(1, KV_HEADS, self.case.queries, -1)
        found: dict[str, Any] = {
            "fused": self.fused,
            "sdpa": lambda: F.scaled_dot_product_attention(self.q, self.k, self.v, scale=self.scale, enable_gqa=True),
        }
        if self.q.is_cuda:
            if (flash := _flash_attention()) is not None:
                q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
                found["flash_attention"] = lambda: flash(q, k, v, softmax_scale=self.scale)
        else:  # faster than torch's own where several query heads share keys
            found["matmul"] = lambda: ((grouped * self.scale) @ self.k.mT).softmax(-1) @ self.v
        return found

    def fused(self) -> tuple[Tensor, Tensor]:
        if isinstance(self.keys, Packed) and isinstance(self.values, Packed):
            return packed_attention(self.q, self.keys, self.values, self.scale)
        assert isinstance(self.keys, Sparse) and isinstance(self.values, Sparse)
        return sparse_attention(self.q, self.keys, self.values, self.scale)

    def difference(self) -> float:
        """The largest difference from the definition, output and log-sum-exp."""
        if isinstance(self.keys, Packed) and isinstance(self.values, Packed):
            expected = packed_attention_reference(self.q.float(), self.keys, self.values, self.scale)
        else:
            assert isinstance(self.keys, Sparse) and isinstance(self.values, Sparse)
            expected = sparse_attention_reference(self.q.float(), self.keys, self.values, self.scale)
        return max(float((a.float() - b).abs().max()) for a, b in zip(self.fused(), expected, strict=True))

    def bytes_read(self) -> int:
        """Every byte of keys and values as they are held, once."""
        tensors = [x for side in (self.keys, self.values) for x in side if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in tensors)


def held(case: Case, k: Tensor, v: Tensor) -> tuple[Any, Any]:
    """Keys and values as the case says: both Packed, or both Sparse."""
    schemes: list[Scheme]
    if case.bits is not None:
        schemes = [PerChannel(case.bits, case.group), PerToken(case.bits, case.group)]
    else:
        assert case.sparsity is not None
        schemes = [Bitmap(case.sparsity, of_keys, case.head_dim) for of_keys in (True, False)]
    keys, values = (scheme.held(scheme.encode(x, None)) for scheme, x in zip(schemes, (k, v), strict=True))
    return keys, values


def dense_bytes(case: Case, dtype: torch.dtype) -> int:
    """Keys and values of one layer, not compressed."""
    return 2 * KV_HEADS * case.tokens * case.head_dim * dtype.itemsize


def copy_bandwidth(device: str, quick: bool) -> float:
    """Bytes read and written a second by copying a large tensor: the roof that a measurement here can reach."""
    source = torch.empty(
        (1 << 24) if quick else (1 << 30 if device == "cuda" else 1 << 28), dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    target.copy_(source)
    taken = []
    for _ in range(10):
        with _Clock(device) as clock:
            target.copy_(source)
        taken.append(clock.seconds)
    return 2 * source.numel() / statistics.median(taken)


class _Clock:
    """Seconds that a block takes on its device."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        self.seconds = math.nan

    def __enter__(self) -> _Clock:
        if self.gpu:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        else:
            self._began = time.perf_counter()
        return self

    def __exit__(self, *raised: object) -> None:
        if self.gpu:
            self._events[1].record()
            self._events[1].synchronize()
            self.seconds = self._events[0].elapsed_time(self._events[1]) / 1e3
        else:
            self.seconds = time.perf_counter() - self._began


def _cpu_seconds(layers: list[Layer], names: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds a layer, all layers one after the other; contenders take turns."""
    calls = {name: [layer.contenders()[name] for layer in layers] for name in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            with _Clock("cpu") as clock:
                for call in calls[name]:
                    call()
            if number:  # the first round warms up
                taken[name].append(clock.seconds / len(layers))
    return taken


def _gpu_seconds(layers: list[Layer], names: list[str], rounds: int) -> dict[str, list[float]]:
    (layer,) = layers
    graphs = {name: _graph(layer.contenders()[name]) for name in names}
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")  # more than any second-level cache
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 3):
        for name, graph in graphs.items():
            flush.zero_()
            with _Clock("cuda") as clock:
                graph.replay()
            if number >= 3:
                taken[name].append(clock.seconds)
    return taken


def _graph(call: Callable[[], Any]) -> Any:
    """The launches of one call, to be repeated without Python."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and chooses what has to be chosen
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def _flash_attention() -> Any:
    """flash-attn's own function, or None where it is not installed."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    return importlib.import_module("flash_attn").flash_attn_func


def _spread(ratios: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(ratios), 4),
        "low": round(min(ratios), 4),
        "high": round(max(ratios), 4),
    }
