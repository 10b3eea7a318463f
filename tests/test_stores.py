"""Stores against a naive model: lists of entries per row, and attention by its definition."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.held import held_by
from workbench.cache.coded import PairCodec
from workbench.cache.schemes.base import Verbatim
from workbench.cache.schemes.blockfloat import BlockFloat
from workbench.cache.schemes.rotated import Rotated
from workbench.cache.segments import DenseSegment, Query
from workbench.cache.store import Store
from workbench.strategies.quantization.gear import GEAR
from workbench.strategies.quantization.kivi import KIVI
from workbench.strategies.quantization.mikv import ImportanceCodec, MiKV
from workbench.strategies.quantization.rotatekv import RotatedCodec
from workbench.strategies.quantization.rtn import RTN
from workbench.strategies.quantization.zipcache import MixedCodec
from workbench_kernels import attend, attention_reference, attention_sums, merge_partials

BATCH, HEADS, GROUP, DIM = 2, 2, 3, 16
ROWS = BATCH * HEADS
SMALL = KIVI(bits=4, group_size=16, residual_length=16).codec()
EIGHT = MixedCodec(8, 8, 0.4)
SINKS = torch.tensor([[0, 3], [1, 2]], dtype=torch.int32)
CODECS: list[Any] = [
    SMALL,
    RTN(bits=8, axis="channel", group_size=16).codec(),
    RTN(bits="fp8", group_size=16, residual_length=3).codec(),
    GEAR(bits=4, group_size=16, residual_length=16, outliers=0.2).codec(),
    GEAR(bits=4, backbone="kcvt", residual_length=16).codec(),
    EIGHT,
    ImportanceCodec(MiKV(bits=8, importance=0.4), torch.ones(BATCH, HEADS, DIM)),
    PairCodec(BlockFloat(8, 16), Verbatim("values")),
    RotatedCodec(PairCodec(Rotated(HEADS, 8, 16, 1.0, 2), Rotated(HEADS, 8, 16, 1.0, 1)), SINKS),
]


@dataclass
class Naive:
    """What a store should hold: per row, keys [n, D], values [n, D], positions."""

    k: list[Tensor]
    v: list[Tensor]
    at: list[Tensor]

    def append(self, k: Tensor, v: Tensor, start: int, at: Tensor | None = None) -> Naive:
        new = (torch.arange(start, start + k.shape[2]) if at is None else at).to(torch.int32)
        flat_k, flat_v = k.flatten(0, 1), v.flatten(0, 1)
        return Naive(
            [torch.cat([a, b]) for a, b in zip(self.k, flat_k)],
            [torch.cat([a, b]) for a, b in zip(self.v, flat_v)],
            [torch.cat([a, new]) for a in self.at],
        )

    def keep(self, index: list[Tensor]) -> Naive:
        return Naive(*([x[i] for x, i in zip(side, index)] for side in (self.k, self.v, self.at)))

    def attend(self, query: Query) -> Tensor:
        """By the definition, row by row, over what is held."""
        out = torch.empty_like(query.q)
        asked = query.asked()[:, None]
        for row in range(ROWS):
            b, h = divmod(row, HEADS)
            group = slice(h * GROUP, (h + 1) * GROUP)
            at = self.at[row][None, :]
            visible = at <= asked
            if query.window is not None:
                visible &= at > asked - query.window
            if query.padding is not None:
                visible &= query.padding[b][at.long()]
            part, lse = attention_reference(
                query.q[b : b + 1, group],
                self.k[row][None, None],
                self.v[row][None, None],
                query.scale,
                visible,
                query.softcap,
            )
            if query.sinks is not None:
                s = query.sinks[group].view(1, -1, 1)
                part = part * (lse.exp() / (lse.exp() + s.exp()))[..., None]
            out[b, group] = part[0]
        return out


def empty() -> tuple[Store, Naive]:
    none = [torch.zeros(0, DIM)] * ROWS
    return Store(BATCH, HEADS), Naive(none, none, [torch.zeros(0, dtype=torch.int32)] * ROWS)


def chunk(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, BATCH, HEADS, count, DIM, generator=generator)
    return k, v


def decoded(store: Store) -> Naive:
    return Naive(*(list(side) for side in zip(*(store.entries(row) for row in range(ROWS)))))


def check(store: Store, naive: Naive, exact: bool = True) -> None:
    """The store holds what the model holds; a packed one within its codes' error."""
    held = decoded(store)
    for ours, theirs in zip(held.at, naive.at):
        assert ours.dtype == torch.int32 and ours.tolist() == theirs.tolist()
    tolerance = 0.0 if exact else 0.35  # 4 bits over 16 standard normals: half of (max - min) / 15
    for side in ("k", "v"):
        for ours, theirs in zip(getattr(held, side), getattr(naive, side)):
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
    assert store.lengths == [len(at) for at in naive.at]
    assert [store.positions(row).tolist() for row in range(ROWS)] == [at.tolist() for at in naive.at]
    assert sum(store.nbytes_by_row()) == sum(store.nbytes().values())
    if store.uniform:
        assert torch.equal(store.keys().flatten(0, 1), torch.stack(held.k))
        assert torch.equal(store.all_positions().flatten(0, 1), torch.stack(held.at))


STEPS = st.lists(
    st.tuples(st.sampled_from("append keep ragged clone recode step gaps".split()), st.integers(1, 40)), max_size=9
)


@settings(deadline=None, max_examples=80)
@given(STEPS, st.integers(0, 2**16))
def test_store_follows_the_naive_model_through_any_sequence(steps: list, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    store, naive = empty()
    alive = [(store, naive, 0)]  # store, model, tokens seen
    for turn, (action, number) in enumerate([("append", 20), *steps]):
        which = turn % len(alive)
        store, naive, seen = alive[which]
        if action in ("append", "step"):
            count = 1 if action == "step" else number
            k, v = chunk(count, generator)
            store.append(k, v, seen)
            store.settle()
            naive, seen = naive.append(k, v, seen), seen + count
        elif action == "gaps":
            at = seen + torch.randint(1, 4, (number,), generator=generator).cumsum(0)
            k, v = chunk(number, generator)
            store.append(k, v, seen, at)
            store.settle()
            naive, seen = naive.append(k, v, seen, at), int(at[-1]) + 1
        elif action == "clone":
            alive.append((store.clone(), naive, seen))
        elif action == "recode":
            store.recode(CODECS[number % len(CODECS)])
        else:
            lengths = store.lengths
            if action == "keep" and store.uniform:
                m = min(number, lengths[0])
                index = torch.rand(ROWS, lengths[0], generator=generator).topk(m).indices.sort(-1).values
                kept, argument = list(index), index.unflatten(0, (BATCH, HEADS))
            else:
                kept = argument = [
                    torch.randperm(n, generator=generator)[: max(0, number - row)].sort().values
                    for row, n in enumerate(lengths)
                ]
            if store.codec is not None:  # packing again what was decoded moves it once more: compare with what is held
                naive = decoded(store)
            store.keep(argument)
            naive = naive.keep(kept)
        alive[which] = (store, naive, seen)
        for each, model, _ in alive:
            check(each, model, exact=each.codec is None)
        store, _, seen = alive[which]
        q = torch.randn(BATCH, HEADS * GROUP, 1, DIM, generator=generator)
        query = Query(q, seen, False, 0.3)
        torch.testing.assert_close(store.attend(query), decoded(store).attend(query), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["fresh", "dense", "evicted", "ragged", "packed"])
@pytest.mark.parametrize("window", [None, 2, 6, 30])
@pytest.mark.parametrize("padded", [False, True])
def test_a_chunk_with_gaps_is_causal_and_windowed_by_position(kind: str, window: int | None, padded: bool) -> None:
    """Tokens between these stayed behind in an earlier layer; they arrive in two chunks."""
    generator = torch.Generator().manual_seed(5)
    store, naive = empty()
    if kind != "fresh":
        k, v = chunk(20, generator)
        store.append(k, v, 0)
        naive = naive.append(k, v, 0)
    if kind in ("evicted", "ragged"):
        kept = [torch.arange(row % 2 if kind == "evicted" else row, 20, 2) for row in range(ROWS)]
        store.keep(torch.stack(kept).unflatten(0, (BATCH, HEADS)) if kind == "evicted" else kept)
        naive = naive.keep(kept)
    if kind == "packed":
        store.recode(SMALL)
    for at in (torch.tensor([22, 23, 27]), torch.tensor([30, 37, 38, 44])):
        k, v = chunk(len(at), generator)
        store.append(k, v, int(at[0]), at)
        naive = naive.append(k, v, 0, at)
        padding = torch.arange(45).expand(BATCH, -1) >= torch.tensor([[3], [0]]) if padded else None
        q = torch.randn(BATCH, HEADS * GROUP, len(at), DIM, generator=generator)
        query = Query(q, int(at[0]), True, 0.3, window, padding=padding, at=at)
        check(store, naive, exact=kind != "packed")
        torch.testing.assert_close(store.attend(query), decoded(store).attend(query), atol=2e-5, rtol=1e-4)
    store.drop_before(25)
    assert kind == "packed" or all(min(at) >= 25 for at in decoded(store).at)  # codes leave by whole groups


def test_the_last_queries_keep_their_positions_over_chunks_with_gaps() -> None:
    def asked(at: list[int]) -> Query:
        return Query(torch.tensor(at, dtype=torch.float32).view(1, 1, -1, 1), at[0], True, 1.0, at=torch.tensor(at))

    last = asked([40, 41]).last(4, asked([3, 7, 20, 31]).last(4))
    assert last.asked().tolist() == [20, 31, 40, 41] == last.q.flatten().tolist() and (last.start, last.stop) == (
        20,
        42,
    )
    plain = Query(torch.tensor([42.0, 43.0]).view(1, 1, 2, 1), 42, True, 1.0)
    joined = plain.last(3, last)  # tokens after the prompt come without gaps
    assert joined.asked().tolist() == [41, 42, 43] == joined.q.flatten().tolist()
    again = Query(torch.tensor([41.0]).view(1, 1, 1, 1), 41, False, 1.0)
    assert again.last(3, last).asked().tolist() == [41]  # a replayed query follows nothing


KINDS = ["dense", "cloned", "evicted", "ragged", "packed", "packed-evicted", "packed-ragged", "two-segments"]
KINDS += "tiered tiered-ragged sinks sinks-evicted importance importance-ragged".split()
KINDS += ["ragged-with-an-empty-row", "packed-ragged-with-an-empty-row", "all-rows-empty"]


def make(kind: str, tokens: int = 60) -> tuple[Store, int]:
    """A store of one kind that has seen ``tokens``, three of them in the last append."""
    generator = torch.Generator().manual_seed(7)
    store, _ = empty()
    store.append(*chunk(tokens - 10, generator), 0)
    index = torch.rand(ROWS, tokens - 10, generator=generator).argsort()
    if "evicted" in kind:
        store.keep(index[:, :30].sort(-1).values.unflatten(0, (BATCH, HEADS)))
    if "ragged" in kind:
        fewest = 0 if "empty" in kind else 3
        store.keep([row[: fewest + 9 * n].sort().values for n, row in enumerate(index)])
    if kind == "all-rows-empty":
        store.keep([row[:0] for row in index])
    if "packed" in kind:
        store.recode(SMALL)
    for name, codec in (("tiered", EIGHT), ("importance", CODECS[6]), ("sinks", CODECS[8])):
        if name in kind:
            store.recode(codec)
    if kind == "two-segments":
        store.segments.append(DenseSegment(BATCH, HEADS, tokens - 10))
    store.append(*chunk(7, generator), tokens - 10)
    store.settle()
    if kind == "cloned":
        store = store.clone()
    store.append(*chunk(3, generator), tokens - 3)
    return store, tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("window", [None, 2, 20])
@pytest.mark.parametrize("extra", ["", "softcap", "sinks", "padding"])
def test_attention_through_a_store_is_attention_over_its_decoded_entries(
    kind: str, own: bool, window: int | None, extra: str
) -> None:
    store, seen = make(kind)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(BATCH, HEADS * GROUP, 3, DIM, generator=generator)
    query = Query(q, seen - 3 if own else seen + 4, own, 0.3, window)
    if extra == "softcap":
        query = replace(query, softcap=1.5)
    if extra == "sinks":
        query = replace(query, sinks=torch.randn(HEADS * GROUP, generator=generator))
    if extra == "padding":
        query = replace(query, padding=torch.arange(seen).expand(BATCH, -1) >= torch.tensor([[5], [0]]))
    torch.testing.assert_close(store.attend(query), decoded(store).attend(query), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 4])
def test_a_replayed_query_attends_as_it_did_when_it_was_appended(kind: str, window: int | None) -> None:
    store, seen = make(kind)
    q = torch.randn(BATCH, HEADS * GROUP, 3, DIM, generator=torch.Generator().manual_seed(1))
    first = store.attend(Query(q, seen - 3, True, 0.3, window))
    again = store.attend(Query(q[:, :, -1:], seen - 1, False, 0.3, window))
    torch.testing.assert_close(again, first[:, :, -1:], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_tensors_held(kind: str) -> None:
    store, _ = make(kind)
    tensors = {id(x): x for x in held_by(store.segments)}.values()
    filled = [x for x in tensors if x.numel()]
    assert len({(x.data_ptr(), x.shape) for x in filled}) == len(filled)
    total = sum(x.numel() * x.element_size() for x in tensors)
    assert total == sum(store.nbytes().values())


def test_a_uniform_keep_frees_the_rest() -> None:
    store, _ = make("dense")
    before = sum(store.nbytes().values())
    store.keep(torch.arange(6).expand(BATCH, HEADS, 6))
    assert store.nbytes() == {"keys": 6 * ROWS * DIM * 4, "values": 6 * ROWS * DIM * 4, "positions": 6 * ROWS * 4}
    held = [store.segments[0].k.blocks()[0], store.segments[0].v.blocks()[0]]
    assert sum(x.untyped_storage().nbytes() for x in held) < before // 5


def test_keeping_everything_leaves_the_store_as_it_is() -> None:
    store, _ = make("dense")
    segment = store.segments[0]
    store.keep(torch.arange(60).expand(BATCH, HEADS, 60))
    assert store.segments[0] is segment and not store.changed and "positions" not in store.nbytes()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_window_has_passed_is_freed_and_attention_within_it_stays(kind: str) -> None:
    store, seen = make(kind)
    query = Query(torch.ones(BATCH, HEADS * GROUP, 1, DIM), seen, False, 0.3, window=12)
    before, bytes_before = store.attend(query), sum(store.nbytes().values())
    store.drop_before(seen - 12)
    torch.testing.assert_close(store.attend(query), before, atol=1e-5, rtol=1e-5)
    assert sum(store.nbytes().values()) < bytes_before or kind == "all-rows-empty"  # whose entries are all within it
    store.append(*chunk(1, torch.Generator().manual_seed(3)), seen)
    assert [store.positions(row)[-1].item() for row in range(ROWS)] == [seen] * ROWS


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 2**16))
def test_merging_runs_of_entries_is_exact(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 4, 3, 8, generator=generator)
    k, v = 4 * torch.randn(2, 1, 2, sum(sizes), 8, generator=generator)
    parts = [attention_reference(q, a, b, 0.5) for a, b in zip(k.split(sizes, 2), v.split(sizes, 2))]
    out, lse = merge_partials(parts)
    whole, whole_lse = attention_reference(q, k, v, 0.5)
    torch.testing.assert_close(out, whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=1e-4)


def test_a_run_that_a_query_cannot_see_adds_nothing() -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    nothing = attend(q, k[:, :, :0], k[:, :, :0], 0.5)
    seen = attention_reference(q, k, k, 0.5)
    hidden = attention_reference(q, k, k, 0.5, torch.zeros(3, 5, dtype=torch.bool))
    for unseen in (nothing, hidden):
        assert torch.equal(merge_partials([seen, unseen])[0], seen[0])
        out, lse = merge_partials([unseen, unseen])
        assert torch.equal(out, torch.zeros_like(q)) and lse.unique().tolist() == [-math.inf]


@pytest.mark.parametrize("queries, entries", [(1, 1), (1, 9), (5, 5), (5, 12), (300, 700)])
@pytest.mark.parametrize("causal, window", [(True, None), (True, 3), (False, None)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attend_equals_its_definition(
    queries: int, entries: int, causal: bool, window: int | None, softcap: float | None
) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, queries, 8), torch.randn(1, 2, entries, 8), torch.randn(1, 2, entries, 8)
    own = torch.arange(entries - queries, entries)[:, None]
    at = torch.arange(entries)[None]
    visible = (at <= own) if causal else torch.ones(queries, entries, dtype=torch.bool)
    if window is not None:
        visible &= at > own - window
    out, lse = attend(q, k, v, 0.4, causal=causal, window=window, softcap=softcap)
    expected, expected_lse = attention_reference(q, k, v, 0.4, visible, softcap)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(lse, expected_lse, atol=2e-6, rtol=1e-4)
    if causal:
        sums = attention_sums(q, k, 0.4, window=window, softcap=softcap)
        logits = q @ k.repeat_interleave(2, 1).mT * 0.4
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        weights = logits.masked_fill(~visible, -math.inf).softmax(-1)
        torch.testing.assert_close(sums, weights.sum(2), atol=1e-4, rtol=1e-4)
        sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
        with_sinks = torch.cat(
            [logits.masked_fill(~visible, -math.inf), sinks.view(1, 4, 1, 1).expand(-1, -1, queries, 1)], -1
        )
        expected_sums = with_sinks.softmax(-1)[..., :-1].sum(2)
        sums = attention_sums(q, k, 0.4, window=window, softcap=softcap, sinks=sinks)
        torch.testing.assert_close(sums, expected_sums, atol=1e-4, rtol=1e-4)
