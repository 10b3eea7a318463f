"""What was recorded of a prompt's attention, and what can be asked of it afterwards.

The trace holds the counts, some of the queries, and the cache itself by reference: the keys are those the model holds
anyway. Nothing of the size tokens x tokens exists. Axes: L layers, Hq query heads, H KV heads, G group, T tokens of the
prompt, C cells on either axis of a map, B distance bins.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.inspection.overlap import held_masks
from workbench.inspection.queries import Queries, rows_to_hold
from workbench.inspection.retained import mass_on
from workbench.inspection.tile import Reduce, Tile, plan_rows, pool
from workbench_kernels.counting import AttentionCounts, attend_counting
from workbench_kernels.counting_triton import AVAILABLE, count_attention
from workbench_kernels.rows import row_weights

if TYPE_CHECKING:
    from workbench.cache.cache import WorkbenchCache
    from workbench.cache.layer import WorkbenchLayer
    from workbench.cache.segments import Query
    from workbench.models.load import Model

CELLS = 256  # on either axis of a pooled map
TILE_BYTES = 64 << 20  # of tiles that are kept for the next time
BUDGETS = {"cpu": 2e9, "cuda": 2e12}  # multiply-adds of one tile


class CountingReader:
    """Reads for the layers of a cache while a prompt comes in, and counts (a :class:`~workbench.cache.cache.AttentionReader`)."""

    def __init__(self, queries: Queries, counts: dict[int, AttentionCounts]) -> None:
        self.queries, self.counts = queries, counts
        self.asked: dict[int, Query] = {}  # per layer one query, for its scale, window, soft-capping and sinks

    def attend(self, layer: WorkbenchLayer, query: Query) -> Tensor:
        self.asked[layer.index] = query.last(1)
        counts = self.counts.get(layer.index)
        if counts is None:
            return layer.store.attend(query)
        self.queries.hold(layer.index, query)
        how: dict[str, Any] = {"window": query.window, "softcap": query.softcap, "sinks": query.sinks}
        keys = layer.store.keys()
        if query.q.is_cuda and AVAILABLE:
            count_attention(query.q, keys, query.scale, counts, **how)
            return layer.store.attend(query)
        return attend_counting(query.q, keys, layer.store.values(), query.scale, counts, **how)


class AttentionTrace:
    """Attention of one prompt, read in full; made by :func:`workbench.inspect`.

    Attributes:
        prompt: its token ids; ``layers``: those whose attention was counted. Rows, tiles and top sources can be had of
            every layer.
    """

    def __init__(
        self, model: Model, prompt: list[int], layers: Sequence[int], sinks: int, cache: WorkbenchCache
    ) -> None:
        g = model.geometry
        self.model, self.prompt, self.layers, self.cache = model, prompt, list(layers), cache
        self.queries = Queries(model, cache, prompt, rows_to_hold(len(prompt), g.head_dim * g.element_size))
        counts = {n: AttentionCounts.empty(g.num_heads, len(prompt), CELLS, sinks, model.device) for n in self.layers}
        self.reader = CountingReader(self.queries, counts)
        self._tiles: OrderedDict[tuple[Any, ...], Tile] = OrderedDict()
        self._lock = threading.RLock()

    # --- what was counted while the prompt was read ------------------------------------------------------------------
    def counts(self, layer: int) -> AttentionCounts:
        """Everything counted of one layer. WorkbenchError where it was not."""
        found = self.reader.counts.get(layer)
        if found is None:
            known = f"layers {self.layers[0]} to {self.layers[-1]}" if self.layers else "no layer"
            raise WorkbenchError(
                f"Layer {layer} was not counted, of {known}; inspect the prompt again with layers=[{layer}]."
            )
        return found

    @property
    def cell(self) -> int:
        """Tokens that a cell of a pooled map stands for, on either axis."""
        return -(-len(self.prompt) // CELLS)

    def column_mass(self, layer: int) -> Tensor:
        """The attention each token received, summed over all queries: float32 [Hq, T]."""
        return self.counts(layer).columns

    def entropy(self) -> Tensor:
        """Mean entropy of a query's weights, nats: float32 [layers, Hq]."""
        return torch.stack([self.counts(n).entropy.sum(1) for n in self.layers]) / len(self.prompt)

    def sink_mass(self) -> Tensor:
        """The mean share of a query's attention that falls on the first tokens: float32 [layers, Hq], 0 to 1."""
        return torch.stack([self.counts(n).sink.sum(1) for n in self.layers]) / len(self.prompt)

    def distance_mass(self) -> Tensor:
        """The share of attention at distance 0, 1, 2-3, 4-7, …: float32 [layers, Hq, B]; bin b > 0 starts at 2^(b-1)."""
        return torch.stack([self.counts(n).distance for n in self.layers]) / len(self.prompt)

    def map(self, layer: int, head: int, reduce: Reduce = "max") -> Tensor:
        """One head's pooled map: uint8 codes [C, C], :attr:`cell` tokens to a cell."""
        self._check_place(layer, head)
        counts = self.counts(layer)
        return (counts.largest if _checked(reduce) == "max" else counts.mean)[head]

    def thumbnails(self, side: int = 32) -> Tensor:
        """Every head's map of largest weights, at most ``side`` x ``side``: uint8 codes [layers, Hq, c, c]."""
        maps = torch.stack([self.counts(n).largest for n in self.layers])
        step = -(-maps.shape[-1] // side)
        spare = -maps.shape[-1] % step
        padded = torch.nn.functional.pad(maps, (0, spare, 0, spare))
        return padded.unflatten(-1, (-1, step)).amax(-1).unflatten(-2, (-1, step)).amax(-2)

    # --- what is computed when asked for ------------------------------------------------------------------------------
    def rows(self, layer: int, head: int, at: Sequence[int]) -> Tensor:
        """Exact weights of one head's queries over all tokens: float32 [len(at), T]."""
        self._check_place(layer, head)
        wanted = torch.tensor(list(at), dtype=torch.int64)
        self._check_tokens(wanted)
        with self._lock, torch.inference_mode():
            ascending, back = wanted.unique(return_inverse=True)
            q = self.queries.of(layer, ascending)[head, back][None]
            return self._weights(layer, head, q, wanted)[0]

    def top(self, layer: int, query: int, count: int = 8) -> list[list[tuple[int, float]]]:
        """What one query reads most: per query head (position, weight), the strongest first."""
        found = []
        for head in range(self.model.geometry.num_heads):
            strongest = self.rows(layer, head, [query])[0].topk(min(count, query + 1))
            found.append(list(zip(strongest.indices.tolist(), strongest.values.tolist(), strict=True)))
        return found

    def retained(self, kept: Sequence[Sequence[Sequence[int]]], query: int | None = None) -> Tensor:
        """The share of attention that falls on the tokens a lane kept: float32 [layers, Hq], 0 to 1.

        Args:
            kept: [L][H] positions held, as in ``Lane.kept_positions``.
            query: one query alone; by default all of the prompt together, which takes no computing.
        """
        group = self.model.geometry.num_heads // self.model.geometry.num_kv_heads
        every = torch.arange(len(self.prompt))
        masks = held_masks(kept, len(self.prompt)).repeat_interleave(group, 1)  # [L, Hq, T]
        shares = []
        for layer in self.layers:
            for head, held in enumerate(masks[layer]):
                weights = self.column_mass(layer)[head, None] if query is None else self.rows(layer, head, [query])
                shares.append(mass_on(weights.cpu(), every, held))
        return torch.cat(shares).unflatten(0, (len(self.layers), -1))

    def tile(
        self,
        layer: int,
        head: int,
        q0: int,
        q1: int,
        k0: int,
        k1: int,
        height: int = 512,
        width: int = 512,
        reduce: Reduce = "max",
        budget: float | None = None,
        *,
        rows: int | None = None,
        always: Sequence[int] = (),
    ) -> Tile:
        """Attention of queries q0 to q1 to keys k0 to k1 of one head, in at most ``height`` lines and ``width`` columns.

        Args:
            reduce: how the weights of a cell become one: "max" keeps needles visible, "mean" is over what can be seen.
            budget: multiply-adds it may cost; by default what takes some tenths of a second. Where all queries would cost
                more, a stratified sample is computed and :attr:`Tile.sampled` is True. Keys are never left out.
            rows: queries to compute at most, for a first picture; the prompt's last ones in view come on top.
            always: queries that a sample must have (selected, pinned).

        Raises:
            WorkbenchError: a layer, head or viewport outside the prompt, or an empty one.
        """
        self._check_place(layer, head)
        self._check_view(q0, q1, k0, k1, height, width)
        budget = BUDGETS.get(self.model.device.type, BUDGETS["cpu"]) if budget is None else budget
        key = (layer, head, q0, q1, k0, k1, height, width, _checked(reduce), budget, rows, tuple(always))
        with self._lock, torch.inference_mode():
            found = self._tiles.get(key)
            if found is None:
                found = self._tiles[key] = self._tile(*key[:9], budget, rows, torch.tensor(always, dtype=torch.int64))
            self._tiles.move_to_end(key)
            while len(self._tiles) > 1 and sum(tile.nbytes() for tile in self._tiles.values()) > TILE_BYTES:
                self._tiles.popitem(last=False)
            return found

    def nbytes(self) -> dict[str, int]:
        """Bytes the trace holds beside the cache, by kind, and the cache's own, which it refers to."""
        return {
            "counts": sum(counts.nbytes() for counts in self.reader.counts.values()),
            **self.queries.nbytes(),
            "tiles": sum(tile.nbytes() for tile in self._tiles.values()),
            "cache": self.cache.memory().used_bytes,
        }

    def as_dict(self, top: int = 8) -> dict[str, Any]:
        """The numbers of every head, as in the CLI's JSON: maps, masses of single tokens and rows are left out."""
        last = len(self.prompt) - 1
        return {
            "schema": 1,
            "model": self.model.as_dict(),
            "prompt_tokens": len(self.prompt),
            "layers": self.layers,
            "sampled": False,
            "sinks": next((counts.sinks for counts in self.reader.counts.values()), 0),
            "entropy": self.entropy().tolist(),
            "sink_mass": self.sink_mass().tolist(),
            "distance_mass": self.distance_mass().tolist(),
            "top_tokens": [self._top_columns(layer, top) for layer in self.layers],
            "top_of_last": [self.top(layer, last, top) for layer in self.layers],
            "bytes": self.nbytes(),
        }

    def __repr__(self) -> str:
        held = self.nbytes()
        own = sum(size for kind, size in held.items() if kind != "cache")
        return (
            f"attention of {self.model.id} to {len(self.prompt):,} tokens, {len(self.layers)} of "
            f"{self.model.geometry.num_layers} layers, all counted exactly; holds {own / 2**20:.1f} MiB beside the cache"
        )

    def _top_columns(self, layer: int, count: int) -> list[list[tuple[int, float]]]:
        mass = self.column_mass(layer) / len(self.prompt)
        strongest = mass.topk(min(count, mass.shape[1]))
        pairs = zip(strongest.indices.tolist(), strongest.values.tolist(), strict=True)
        return [list(zip(at, share, strict=True)) for at, share in pairs]

    def _tile(
        self, layer: int, head: int, q0: int, q1: int, k0: int, k1: int, height: int, width: int, reduce: Reduce,
        budget: float, rows: int | None, always: Tensor,
    ) -> Tile:  # fmt: skip
        plan = plan_rows(
            q0, q1, height, len(self.prompt), q1 * self.model.geometry.head_dim, self.queries.cost(layer), budget,
            lambda at: self.queries.held(layer, at), rows, always,
        )  # fmt: skip
        q = self.queries.of(layer, plan.at)[head, None]  # [1, R, D]

        def weights(at: Tensor) -> Tensor:
            chosen = torch.searchsorted(plan.at, at).to(q.device)
            return self._weights(layer, head, q[:, chosen], at, int(at[-1]) + 1)[0]

        window = self.reader.asked[layer].window
        codes, per_column = pool(weights, plan, (q0, q1, k0, k1), width, reduce, window)
        return Tile(
            layer, head, q0, q1, k0, k1, reduce, codes, per_column, plan.queries_per_line, len(plan.at)
        )  # fmt: skip

    def _weights(self, layer: int, head: int, q: Tensor, at: Tensor, entries: int | None = None) -> Tensor:
        """Weights [1, R, entries] of one head's queries q [1, R, D] at positions ``at``."""
        asked, store = self.reader.asked[layer], self.cache.layers[layer].store
        keys = store.keys()[0, head * store.heads // self.model.geometry.num_heads, :entries]
        sinks = None if asked.sinks is None else asked.sinks[head : head + 1]
        return row_weights(
            q, keys, asked.scale, at.to(q.device), window=asked.window, softcap=asked.softcap, sinks=sinks
        )  # fmt: skip

    def _check_place(self, layer: int, head: int) -> None:
        g = self.model.geometry
        if not 0 <= layer < g.num_layers or not 0 <= head < g.num_heads:
            raise WorkbenchError(
                f"There is no layer {layer} with query head {head}; this model has layers 0 to {g.num_layers - 1} and heads "
                f"0 to {g.num_heads - 1}."
            )

    def _check_tokens(self, at: Tensor) -> None:
        if len(at) == 0 or int(at.min()) < 0 or int(at.max()) >= len(self.prompt):
            raise WorkbenchError(
                f"Queries are positions in the prompt, 0 to {len(self.prompt) - 1}; got {at.tolist()[:8]}."
            )

    def _check_view(self, q0: int, q1: int, k0: int, k1: int, height: int, width: int) -> None:
        tokens = len(self.prompt)
        if not (0 <= q0 < q1 <= tokens and 0 <= k0 < k1 <= tokens) or height < 1 or width < 1:
            raise WorkbenchError(
                f"Queries {q0} to {q1} and keys {k0} to {k1} in {height} x {width} cells are no part of a prompt of {tokens} "
                "tokens; give 0 <= q0 < q1 <= tokens, keys alike, and at least one cell."
            )


def _checked(reduce: str) -> Reduce:
    if reduce not in ("max", "mean"):
        raise WorkbenchError(f"reduce is 'max' or 'mean', got '{reduce}'.")
    return reduce  # type: ignore[return-value]
