"""ThinK and the segment that holds keys without some of their channels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import workbench as wb
from tests.builders import ARCHITECTURES, build, cache_for, feed, prompt
from tests.test_eviction_examples import view_of
from workbench.cache.cache import WorkbenchCache
from workbench.cache.channels import ChannelSegment, pack_bits, unpack_bits
from workbench.cache.segments import DenseSegment, Query
from workbench.cache.store import Store
from workbench.strategies.eviction.think import ThinK, channel_scores
from workbench_kernels import attend, attention_reference

BATCH, HEADS, GROUP = 2, 2, 3
LENGTH = 90


def after(recipe: str, later: int = 0, chunk: int | None = None, name: str = "llama") -> WorkbenchCache:
    cache = cache_for(build(name), recipe, LENGTH)
    feed(build(name), cache, prompt(LENGTH), chunk)
    if later:
        feed(build(name), cache, prompt(later, seed=1), 1)
    return cache


# -- the segment ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_bits_come_back(bits: list[bool]) -> None:
    packed = pack_bits(torch.tensor([bits]))
    assert packed.dtype == torch.uint8 and packed.shape == (1, math.ceil(len(bits) / 8))
    assert unpack_bits(packed, len(bits)).tolist() == [bits]


def test_bits_by_hand() -> None:
    assert pack_bits(torch.tensor([[True, False, True] + [False] * 5 + [True]])).tolist() == [[5, 1]]


def choice(dim: int, held: int, generator: torch.Generator) -> Tensor:
    """Channels [B, H, held], ascending, other ones in every head."""
    return torch.rand(BATCH, HEADS, dim, generator=generator).argsort(-1)[..., :held].sort(-1).values


def naive(k: Tensor, channels: Tensor, cut: int) -> Tensor:
    """Keys [B, H, n, D] with zeros in the channels that the ``cut`` oldest do not hold."""
    mask = torch.zeros(BATCH, HEADS, k.shape[-1]).scatter(-1, channels, 1.0)
    return torch.cat([k[:, :, :cut] * mask[:, :, None], k[:, :, cut:]], 2)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_narrowed_store_holds_and_answers_as_keys_with_zeros(data: st.DataObject) -> None:
    dim, n = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 40))
    held, recent, later = data.draw(st.integers(1, dim)), data.draw(st.integers(0, 12)), data.draw(st.integers(0, 5))
    evicted, forked = data.draw(st.booleans()), data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    k, v = torch.randn(2, BATCH, HEADS, n, dim, generator=generator)
    channels, store, at = choice(dim, held, generator), Store(BATCH, HEADS), torch.arange(n)
    if forked:  # rows in two blocks
        store.append(k[:, :, : n // 2], v[:, :, : n // 2], 0)
        store = store.clone()
        store.append(k[:, :, n // 2 :], v[:, :, n // 2 :], n // 2)
    else:
        store.append(k, v, 0)
    if evicted:
        at = torch.randperm(n, generator=generator)[: max(1, n // 2)].sort().values
        store.keep(at.expand(BATCH, HEADS, -1))
        k, v = k[:, :, at], v[:, :, at]
    store.narrow_keys(channels, recent)
    cut = max(len(at) - recent, 0)
    expected, bytes_per = naive(k, channels, cut), 4
    sizes = store.nbytes()
    rows, entries = BATCH * HEADS, len(at)
    assert sizes["keys"] == rows * (cut * held + (entries - cut) * dim) * bytes_per
    assert sizes["values"] == rows * entries * dim * bytes_per and sizes["mask"] == rows * math.ceil(dim / 8)
    assert sum(store.nbytes_by_row()) == sum(sizes.values())
    assert store.changed

    fork = store.clone()
    for segment, twin in zip(store.segments, fork.segments):
        for ours, theirs in ((segment.k, twin.k), (segment.v, twin.v)):
            assert [x.data_ptr() for x in ours.blocks() if x.numel()] == [
                x.data_ptr() for x in theirs.blocks() if x.numel()
            ]
    if later:
        more_k, more_v = torch.randn(2, BATCH, HEADS, later, dim, generator=generator)
        store.append(more_k, more_v, n)
        expected, v = torch.cat([expected, more_k], 2), torch.cat([v, more_v], 2)
        at = torch.cat([at, torch.arange(n, n + later)])
    assert torch.equal(store.keys(), expected) and torch.equal(store.values(), v)
    assert all(store.positions(row).tolist() == at.tolist() for row in range(rows))
    assert torch.equal(fork.keys(), expected[:, :, :entries]) and fork.lengths == [entries] * rows

    q = torch.randn(BATCH, HEADS * GROUP, 2, dim, generator=generator)
    query = Query(q, n + later, False, 0.3, data.draw(st.sampled_from([None, n + later + 2, 7])))
    visible = torch.ones(2, len(at), dtype=torch.bool)
    if query.window is not None:
        visible = at[None] > torch.arange(query.start, query.stop)[:, None] - query.window
    torch.testing.assert_close(
        store.attend(query), attention_reference(q, expected, v, 0.3, visible)[0], atol=2e-5, rtol=1e-4
    )


def test_what_a_window_has_passed_leaves_a_narrowed_store() -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, BATCH, HEADS, 30, 8, generator=generator)
    store = Store(BATCH, HEADS)
    store.append(k, v, 0)
    store.narrow_keys(choice(8, 3, generator), 10)
    for position in (5, 20, 25, 30):
        store.drop_before(position)
        assert store.lengths == [30 - position] * 4 and torch.equal(store.values(), v[:, :, position:])
    store.append(k[:, :, :2], v[:, :, :2], 30)
    assert store.positions(3).tolist() == [30, 31]
    q = torch.randn(BATCH, HEADS * GROUP, 1, 8, generator=generator)
    expected = attention_reference(q, k[:, :, :2], v[:, :, :2], 0.3)[0]
    torch.testing.assert_close(store.attend(Query(q, 32, False, 0.3)), expected, atol=1e-5, rtol=1e-4)


def test_the_channels_taken_out_are_freed_and_those_appended_are_narrowed() -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, BATCH, HEADS, 400, 8, generator=generator)
    dense, channels = DenseSegment(BATCH, HEADS), choice(8, 2, generator)
    dense.append(k, v, 0)
    segment = ChannelSegment.narrowed(dense, 300, channels)
    assert segment.k.blocks()[0].untyped_storage().nbytes() == BATCH * HEADS * 300 * 2 * 4
    assert segment.v.blocks()[0].untyped_storage().nbytes() == BATCH * HEADS * 300 * 8 * 4
    segment.append(k[:, :, 300:], v[:, :, 300:], 300)
    assert torch.equal(segment.keys(), naive(k, channels, 400)) and torch.equal(segment.channels, channels)


def test_codes_and_ragged_rows_cannot_be_narrowed() -> None:
    store = Store(1, 2)
    store.append(*torch.randn(2, 1, 2, 9, 4), 0)
    store.keep([torch.arange(3), torch.arange(5)])
    with pytest.raises(wb.WorkbenchError, match="equally many a head"):
        store.narrow_keys(torch.zeros(1, 2, 1, dtype=torch.long), 2)


@pytest.mark.parametrize("entries", [0, 1, 9])
def test_attention_gives_the_width_of_the_values(entries: int) -> None:
    q, k, v = torch.randn(1, 4, 3, 5), torch.randn(1, 2, entries, 5), torch.randn(1, 2, entries, 8)
    for need_lse in (True, False):
        out, _ = attend(q, k, v, 0.4, need_lse=need_lse)
        expected = attention_reference(q, k, v, 0.4)[0] if entries else torch.zeros(1, 4, 3, 8)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


# -- the method ----------------------------------------------------------------------------------------------------------


def test_think_card() -> None:
    q = torch.tensor([[[1.0, 2, 0, 1], [1, 0, 2, 1]], [[0, 1, 1, 3], [2, 1, 1, 1]]])[None]  # [1, 2, w, D]
    keys = torch.tensor([[1.0, 1, 2, 0.1], [1, 3, 1, 0.1], [2, 1, 0, 0.1]])[None, None]
    torch.testing.assert_close(channel_scores(q, keys)[0, 0], torch.tensor([3, 5.5, 2.5, 0.03]))
    view, cache = view_of(q.repeat(1, 2, 1, 1), keys.repeat(1, 2, 1, 1))
    ThinK(ratio=0.5, recent=1).after_prefill(view)
    narrow, rest = cache.layers[0].store.segments
    assert narrow.channels.tolist() == [[[0, 1], [0, 1]]]
    assert narrow.keys()[0, 0].tolist() == [[1, 1, 0, 0], [1, 3, 0, 0]] and torch.equal(
        rest.keys(), keys.repeat(1, 2, 1, 1)[:, :, 2:]
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("recipe", ["think(ratio=0.0)", "think(ratio=0.03)", "think(recent=90)"])
def test_thinking_of_nothing_is_bit_identical_to_full(name: str, recipe: str) -> None:
    outputs = []
    for text in ("full", recipe):
        cache = cache_for(build(name), text, LENGTH)
        outputs.append(torch.cat([feed(build(name), cache, ids) for ids in (prompt(LENGTH), prompt(3, seed=1))]))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.5, 1.0])
@pytest.mark.parametrize("before, tokens", [("", 90), ("snapkv(budget=0.5) | ", 45), ("snapkv(budget=40) | ", 40)])
def test_think_takes_the_bytes_that_the_card_says(ratio: float, before: str, tokens: int) -> None:
    cache, removed = after(f"{before}think(ratio={ratio})"), min(int(16 * ratio), 15)
    rows, old = 3 * 2, tokens - 32
    kinds = cache.memory().by_kind
    assert kinds["keys"] == rows * (old * (16 - removed) + 32 * 16) * 4
    assert kinds["values"] == rows * tokens * 16 * 4 and kinds["mask"] == rows * 16 // 8
    assert kinds.get("positions", 0) == (rows * tokens * 4 if before else 0)
    assert sum(kinds.values()) == cache.memory().used_bytes == sum(map(sum, cache.memory().by_head))


@pytest.mark.parametrize("before", ["", "snapkv(budget=0.5) | ", "h2o(budget=50, recompress_every=0) | "])
def test_generation_after_think_is_over_keys_with_zeros(before: str) -> None:
    cache = after(f"{before}think(ratio=0.5, recent=10)")
    zeros = after(f"{before}think(ratio=0.5, recent=10)")
    for layer in zeros.layers:
        k, v, at = layer.store.keys(), layer.store.values(), layer.store.all_positions()
        assert (k[:, :, :-10] == 0).float().mean() == 0.5 and not (k[:, :, -10:] == 0).any()
        layer.store.segments = [DenseSegment.of(k, v, at)]
    later = prompt(8, seed=1)
    ours, expected = feed(build(), cache, later, 1), feed(build(), zeros, later, 1)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_think_however_the_prompt_is_read_and_forked() -> None:
    once = after("think(ratio=0.5)")
    chunked = after("think(ratio=0.5)", chunk=17)
    for a, b in zip(once.layers, chunked.layers):
        assert torch.equal(a.store.segments[0].mask, b.store.segments[0].mask)
        torch.testing.assert_close(a.store.keys(), b.store.keys(), atol=1e-5, rtol=1e-5)
    alone, forked = (
        wb.compare(build(), prompt(LENGTH), ["full", "think(ratio=0.5)"], max_new_tokens=5, reuse_prompt=reuse)[1]
        for reuse in (False, True)
    )
    assert alone.tokens == forked.tokens and alone.memory.used_bytes == forked.memory.used_bytes
    assert alone.kl[0] > 0  # the first token is asked again of what is held


def test_think_drifts_in_keys_only() -> None:
    lane = wb.compare(build(), prompt(LENGTH), ["full", "think(ratio=0.5)"], max_new_tokens=1)[1]
    assert all(0.5 < x < 1 - 1e-4 for row in lane.drift["key_cosine"] for x in row)
    assert all(x == pytest.approx(1, abs=1e-6) for row in lane.drift["value_cosine"] for x in row)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("recipe", ["think(recent=3)", "snapkv(budget=0.4) | think(recent=3)"])
def test_think_runs_on_every_architecture(name: str, recipe: str) -> None:
    cache = after(recipe, later=70, chunk=40, name=name)  # long enough for sliding layers to pass it all
    full = after("full" if "snapkv" not in recipe else "snapkv(budget=0.4)", later=70, chunk=40, name=name)
    assert [layer.store.lengths for layer in cache.layers] == [layer.store.lengths for layer in full.layers]
    assert cache.memory().used_bytes < full.memory().used_bytes or "sliding" in name
