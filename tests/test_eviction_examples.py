"""The method cards' worked examples, and behaviour a person can check by eye."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.builders import build, cache_for, feed, prompt
from workbench.cache.cache import WorkbenchCache
from workbench.cache.layer import LayerView
from workbench.cache.segments import Query
from workbench.strategies.base import tokens_kept
from workbench.strategies.eviction.allocators.adakv import AdaKVAllocator
from workbench.strategies.eviction.allocators.chunks import ChunkSelector
from workbench.strategies.eviction.allocators.pyramidkv import pyramid
from workbench.strategies.eviction.base import select_top
from workbench.strategies.eviction.h2o import H2O
from workbench.strategies.eviction.knorm import KNorm
from workbench.strategies.eviction.snapkv import SnapKV
from workbench.strategies.eviction.tova import TOVA


def kept_after(recipe: str, tokens: int) -> list[int]:
    cache = cache_for(build(), recipe)
    feed(build(), cache, prompt(tokens))
    first = cache.kept(0, 0)
    assert all(cache.kept(layer, head) == first for layer in range(3) for head in range(2))
    return first


def view_of(
    q: Tensor, k: Tensor, prompt_length: int | None = None, sinks: Tensor | None = None
) -> tuple[LayerView, WorkbenchCache]:
    """A layer of a cache into which k [1, H, n, D] came at once with the last queries q [1, Hq, Tq, D]."""
    cache = cache_for(build(), "full", prompt_length or k.shape[2])
    layer = cache.layers[0]
    layer.update(k, k.clone())
    layer.states = [{}]
    return LayerView(layer, Query(q, k.shape[2] - q.shape[2], True, 1.0, sinks=sinks), 0), cache


@pytest.mark.parametrize(
    "budget, length, count",
    [
        (0.25, 100, 25),
        (0.1, 9, 1),
        (0.1, 100, 10),
        (0.3, 10, 3),
        (0.7, 10, 7),
        (1.0, 7, 7),
        (64, 100, 64),
        (64, 10, 10),
        (1, 10, 1),
        (0.29, 100, 29),
    ],
)
def test_number_kept(budget: float | int, length: int, count: int) -> None:
    assert tokens_kept(budget, length) == count  # 0.29 * 100 is 28.999… in floating point


def test_streaming_llm_card() -> None:
    assert kept_after("streaming_llm(budget=48)", 97) == [*range(4), *range(53, 97)]
    assert kept_after("streaming_llm(budget=0.5)", 97) == [*range(4), *range(53, 97)]
    assert kept_after("streaming_llm(budget=10, sinks=0)", 97) == [*range(87, 97)]


def test_h2o_card_column_sums_and_choice() -> None:
    rows = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.1, 0.2, 0.6]])
    # Keys are unit vectors, so that a query's components are its logits: attention is then exactly these rows.
    q = torch.log(rows.clamp_min(1e-30))[None, None].expand(1, 2, 4, 4)
    view, _ = view_of(q, torch.eye(4).expand(1, 2, 4, 4).clone())
    h2o = H2O(budget=2)
    h2o.on_chunk(view)
    torch.testing.assert_close(view.state["received"][0, 0], torch.tensor([1.8, 0.9, 0.7, 0.6]))
    assert select_top(h2o.score(view), 2)[0, 0].tolist() == [0, 3]  # one heavy hitter and one recent
    assert select_top(view.state["received"], 2)[0, 0].tolist() == [0, 1]  # by the sums alone


def test_h2o_sums_over_chunks_and_steps_are_those_of_the_whole_attention() -> None:
    cache = cache_for(build(), "h2o(budget=100)", 40)
    feed(build(), cache, prompt(40), 7)
    once = cache_for(build(), "h2o(budget=100)", 40)
    feed(build(), once, prompt(40))
    for a, b in zip(cache.layers, once.layers):
        torch.testing.assert_close(a.states[0]["received"], b.states[0]["received"], atol=1e-4, rtol=1e-4)
        assert a.states[0]["received"].sum().item() == pytest.approx(40 * 4, rel=1e-4)  # every query pays 1 in all
    feed(build(), cache, prompt(5, seed=1), 1)
    assert cache.layers[2].states[0]["received"].sum().item() == pytest.approx(45 * 4, rel=1e-4)


def test_h2o_on_a_sliding_layer_keeps_scores_and_entries_aligned() -> None:
    """The window drops entries between chunks; each entry's sum must stay its own."""
    outcomes = []
    for chunk in (200, 70, 13, 1):
        cache = cache_for(build("mistral-sliding"), "h2o(budget=6)", 200)
        feed(build("mistral-sliding"), cache, prompt(200), chunk)
        outcomes.append([cache.kept(layer, head) for layer in range(3) for head in range(2)])
    assert outcomes[1:] == outcomes[:-1]
    assert all(len(kept) == 6 and min(kept) >= 192 for kept in outcomes[0])


A, B = [0.6, 0, 0, 0.3, 0, 0.1], [0, 0.2, 0.2, 0.2, 0.2, 0.2]


def test_snapkv_card_average_pooling_and_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    votes = torch.tensor([A, B])[None, None, :, None]  # [B, H, G, W, n], and a window of one entry at the end
    view: Any = SimpleNamespace(window_attention=lambda window: F.pad(votes, (0, 1), value=9.0), length=7)
    scores = SnapKV(window=1, kernel=3).score(view)[0, 0]
    torch.testing.assert_close(
        scores[:6], torch.tensor([0.13333, 0.16667, 0.15, 0.15, 0.16667, 0.08333]), atol=1e-5, rtol=0
    )
    assert scores[6] == torch.inf
    alone: Any = SimpleNamespace(window_attention=lambda window: F.pad(votes[:, :, :1], (0, 1)), length=7)
    expected = torch.tensor([0.2, 0.2, 0.1, 0.1, 0.13333, 0.03333])
    torch.testing.assert_close(SnapKV(window=1, kernel=3).score(alone)[0, 0, :6], expected, atol=1e-5, rtol=0)


def test_snapkv_keeps_its_window_and_the_planted_token_with_its_neighbours() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 4, 16), 0.01 * torch.randn(1, 2, 60, 16)
    k[:, :, 20] = 50 * q.mean(2).unflatten(1, (2, 2)).mean(2)
    view, _ = view_of(q, k)
    assert select_top(SnapKV(window=4, kernel=5).score(view), 9)[0].tolist() == [[*range(18, 23), *range(56, 60)]] * 2


def test_window_attention_is_the_models_attention_sinks_included() -> None:
    torch.manual_seed(0)
    q, k, sinks = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 12, 16), torch.tensor([0.0, 1.0, 5.0, -1.0])
    view, _ = view_of(q, k, sinks=sinks)
    logits = q @ k.repeat_interleave(2, 1).mT
    logits = logits.masked_fill(~torch.ones(5, 12, dtype=torch.bool).tril(7), -torch.inf)
    expected = torch.cat([logits, sinks.view(1, 4, 1, 1).expand(-1, -1, 5, 1)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(view.window_attention(3).flatten(1, 2), expected[:, :, -3:], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(view.chunk_attention_sums(), expected.sum(2), atol=1e-5, rtol=1e-5)


def test_tova_keeps_one_set_per_layer_by_the_last_query_and_the_last_token() -> None:
    q = torch.zeros(1, 4, 3, 4)
    q[:, :, -1] = torch.tensor([[3.0, 0, 0, 0], [0, 2.0, 0, 0], [3.0, 0, 0, 0], [3.0, 0, 0, 0]])
    k = torch.zeros(1, 2, 6, 4)
    k[:, :, 1, 0], k[:, :, 3, 1] = 2.0, 2.0
    view, _ = view_of(q, k)
    assert select_top(TOVA().score(view), 2)[0].tolist() == [[1, 5], [1, 5]]
    assert select_top(TOVA().score(view), 3)[0].tolist() == [[1, 3, 5], [1, 3, 5]]


def test_knorm_card() -> None:
    keys = torch.tensor([[1.0, 0], [1, 0], [0, 1], [2, 0]])[None, None].expand(1, 2, 4, 2).clone()
    view, _ = view_of(torch.zeros(1, 4, 1, 2), keys)
    assert KNorm().score(view)[0, 0].tolist() == [-1, -1, -1, -2]


CARD_ADAKV = torch.tensor([[0.50, 0.30, 0.12, 0.05, 0.03, 2.0], [0.02, 0.01, 0.009, 0.008, 0.007, 2.0]])[None]


@pytest.mark.parametrize(
    "alpha, first, second",
    [(0.2, [0, 1, 2, 3, 5], [5]), (0.7, [0, 1, 2, 5], [0, 5]), (1.0, [0, 1, 5], [0, 1, 5])],
)
def test_adakv_card(alpha: float, first: list[int], second: list[int]) -> None:
    assert [row.tolist() for row in AdaKVAllocator(alpha=alpha).select(CARD_ADAKV, 3)] == [first, second]


def test_adakv_rows_of_a_batch_are_chosen_one_by_one() -> None:
    swapped = torch.cat([CARD_ADAKV, CARD_ADAKV.flip(1)])
    assert [row.tolist() for row in AdaKVAllocator().select(swapped, 3)] == [[0, 1, 2, 3, 5], [5], [5], [0, 1, 2, 3, 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_ties_go_to_the_later_entry(dtype: torch.dtype) -> None:
    assert select_top(torch.tensor([1, 1, 2, 1, 1], dtype=dtype), 3).tolist() == [2, 3, 4]
    assert select_top(torch.zeros(2, 5, dtype=dtype), 2).tolist() == [[3, 4], [3, 4]]
    assert select_top(torch.full((4,), torch.inf, dtype=dtype), 1).tolist() == [3]
    assert [row.tolist() for row in AdaKVAllocator(alpha=0.0).select(torch.zeros(1, 2, 4, dtype=dtype), 1)] == [
        [3],
        [3],
    ]


@pytest.mark.parametrize(
    "tokens, even, layers, budgets",
    [
        (97, 48.5, 4, [89, 62, 35, 8]),
        (97, 67.9, 4, [89, 75, 61, 47]),
        (97, 19.4, 4, [19, 19, 19, 19]),  # the slope does not fit: even
        (1000, 200.0, 4, [390, 263, 137, 10]),
    ],
)
def test_pyramidkv_card(tokens: int, even: float, layers: int, budgets: list[int]) -> None:
    assert pyramid(tokens, even, window=8, layers=layers, beta=20) == budgets


def test_chunkkv_card() -> None:
    scores = torch.tensor(
        [[0.1, 0.2, 0.3, 0.4, 0, 0, 0.9, 0.1, 0.5, 0.5], [0.2, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0, 0.1]]
    )
    chunks = ChunkSelector(chunk_length=4)
    assert chunks.chunk_scores(scores[None]).tolist() == [pytest.approx([0.45, 0.35, 0.55])]
    assert chunks.pick(scores[None], 5).tolist() == [[[8, 9]] * 2]
    assert chunks.pick(scores[None], 7).tolist() == [[[0, 1, 2, 3, 8, 9]] * 2]
    assert chunks.pick(scores[None], 1).tolist() == [[[6], [3]]]  # no whole chunk fits: the best entries


def test_random_draws_by_seed_and_layer() -> None:
    def kept(seed: int) -> list[list[int]]:
        cache = cache_for(build(), f"random(budget=10, seed={seed})")
        feed(build(), cache, prompt(60))
        return [cache.kept(layer, head) for layer in range(3) for head in range(2)]

    assert kept(0) == kept(0) != kept(1)
    assert len({tuple(k) for k in kept(0)}) == 6  # every layer and head its own


def test_kept_of_a_head_that_is_not_there_says_which_are() -> None:
    cache = cache_for(build())
    feed(build(), cache, prompt(5))
    with pytest.raises(Exception, match="heads 0 to 1"):
        cache.kept(0, 2)


@pytest.mark.parametrize("budget, first, last", [(1, 1, 0), (2, 2, 0), (4, 4, 0), (6, 4, 2)])
def test_streaming_without_room_for_all_sinks_keeps_the_first_ones(budget: int, first: int, last: int) -> None:
    assert kept_after(f"streaming_llm(budget={budget}, sinks=4)", 30) == [*range(first), *range(30 - last, 30)]
