"""MiKV: the card's worked example, its selection, its byte formula, and what demotion leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.builders import build, cache_for, feed, prompt
from workbench.cache.cache import WorkbenchCache
from workbench.cache.schemes.rtn import Balanced, PerToken
from workbench.strategies.quantization.mikv import ImportanceCodec, ImportanceSegment, MiKV, balancer_of, split
from workbench_kernels import unpack

# -- the card, section 7 -------------------------------------------------------------------------------------------------

Q = torch.tensor([[0.5, 1, -2, 1], [-1, 4, 1, 0.25]])
K = torch.tensor([[16, 1, 0.5, -0.25], [-9, -0.25, 2, 1], [4, 0.5, -1, 0.5]])


def four_times(x: Tensor) -> Tensor:
    return x.repeat(1, 4)[None, None]  # 16 channels fill a word; the group's extremes stay


def test_card_balancer_and_codes() -> None:
    b = balancer_of(Q.abs().amax(0), K.abs().amax(0))
    assert b.tolist() == [0.25, 2, 1, 1]
    scheme = Balanced(2, 16, b.repeat(4)[None, None])
    parts = scheme.encode(four_times(K), None)
    assert unpack(parts["codes"], 2)[0, 0, :, :4].tolist() == [[3, 2, 1, 0], [0, 1, 3, 2], [3, 3, 0, 2]]
    steps = torch.tensor([1.416667, 1.416667, 0.666667])
    torch.testing.assert_close(parts["scale"][0, 0, :, 0].float(), steps, atol=1e-3, rtol=0)
    assert parts["low"][0, 0, :, 0].tolist() == [-0.25, -2.25, -1]
    decoded = scheme.decode(parts, (0, 3), torch.float32, None)[0, 0, :, :4]
    expected = torch.tensor([[16, 1.291667, 1.166667, -0.25], [-9, -0.416667, 2, 0.583333], [4, 0.5, -1, 0.333333]])
    torch.testing.assert_close(decoded, expected, atol=1e-2, rtol=0)
    q = torch.tensor([1.0, 2, 1, -1])
    assert (K @ q).tolist() == [18.75, -8.5, 3.5]
    torch.testing.assert_close(decoded @ q, torch.tensor([20, -8.416667, 3.666667]), atol=2e-2, rtol=0)
    plain = PerToken(2, 16)
    coarse = plain.decode(plain.encode(four_times(K), None), (0, 3), torch.float32, None)[0, 0, :, :4]
    torch.testing.assert_close(coarse @ q, torch.tensor([15.5, -12.333333, 3.666667]), atol=2e-2, rtol=0)
    for found, rmse in ((decoded, 0.949575), (coarse, 3.246838)):
        assert float(((found - K) @ Q.T).square().mean().sqrt()) == pytest.approx(rmse, abs=5e-3)


def test_a_channel_that_no_query_or_key_has_is_left_alone() -> None:
    assert balancer_of(torch.tensor([0.0, 2, 0]), torch.tensor([3.0, 0, 0])).tolist() == [1, 1, 1]
    assert balancer_of(torch.tensor([1e30]), torch.tensor([1e-30])).tolist() == [1e4]


SCORES = torch.tensor([5, 0.2, 0.9, 0.1, 0.4, 0.3, 0.05, 0.6, 0.7, 0.8])[None, None]


@pytest.mark.parametrize("importance, high", [(0.4, [0, 2, 8, 9]), (0.2, [0, 9]), (1.0, list(range(10))), (0.0, [])])
def test_card_selection(importance: float, high: list[int]) -> None:
    found, rest = split(SCORES, MiKV(importance=importance))
    assert found[0, 0].tolist() == high and rest[0, 0].tolist() == [n for n in range(10) if n not in high]


# -- laws ----------------------------------------------------------------------------------------------------------------


def run(recipe: str, later: int = 0) -> WorkbenchCache:
    cache = cache_for(build(), recipe, 60)
    feed(build(), cache, prompt(60))
    if later:
        feed(build(), cache, prompt(later, seed=1), 1)
    return cache


def segments(cache: WorkbenchCache) -> list[ImportanceSegment]:
    found = [layer.store.segments[0] for layer in cache.layers]
    assert all(isinstance(segment, ImportanceSegment) for segment in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("high_bits", [16, 8, 4])
def test_the_share_holds_at_every_step_and_what_is_demoted_never_changes(high_bits: int) -> None:
    cache = run(f"mikv(bits=4, high_bits={high_bits}, importance=0.3)")
    few: list[dict[int, Tensor]] = [{}, {}]
    for step in range(25):
        (segment, *_) = segments(cache)
        assert segment.length == 60 + step and segment.tiers[1].length == int(0.3 * (60 + step) + 1e-9)
        assert segment.scores.shape[-1] == segment.tiers[1].length
        for row in range(2):
            keys, _, at = segment.few.entries(row)
            held = dict(zip(at.tolist(), keys))
            assert set(few[row]) <= set(held)  # never promoted
            assert all(torch.equal(held[place], key) for place, key in few[row].items())
            few[row] = held
        feed(build(), cache, prompt(1, seed=step))


def test_the_newest_are_always_important() -> None:
    for segment in segments(run("mikv(importance=0.3)", 13)):
        count = segment.tiers[1].length // 2
        for row in range(2):
            assert segment.tiers[1].positions_of(row)[-count:].tolist() == list(range(73 - count, 73))


def test_prompt_scores_are_h2os() -> None:
    """The high set after the prompt is what H2O keeps of it."""
    ours, theirs = run("mikv(importance=0.3)"), run("h2o(budget=0.3, recompress_every=0)")
    for layer, segment in enumerate(segments(ours)):
        for head in range(2):
            assert segment.tiers[1].positions_of(head).tolist() == theirs.kept(layer, head)


def test_without_importance_everything_is_rounded_per_token() -> None:
    cache = run("mikv(bits=4, importance=0.0, balancer=False)", 5)
    plain = run("rtn(bits=4, group_size=16)", 5)
    assert segments(cache)[0].tiers[1].length == 0 and cache.layers[0].store.lengths == [65, 65]
    exact = run("full", 5).layers[0].store.keys()
    halves = PerToken(4, 8)
    expected = halves.decode(halves.encode(exact, None), (0, 65), torch.float32, None)
    torch.testing.assert_close(cache.layers[0].store.keys(), expected)
    assert plain.layers[0].store.lengths == [65, 65]


def test_the_balancer_lessens_the_error_of_logits_where_channels_stand_out() -> None:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 80, 32, generator=generator)
    q = torch.randn(1, 2, 40, 32, generator=generator)
    k[..., 3] *= 30
    q[..., 3] /= 10
    b = balancer_of(q.abs().amax((1, 2))[:, None], k.abs().amax(2))
    errors = []
    for scheme in (Balanced(2, 16, b), PerToken(2, 16)):
        found = scheme.decode(scheme.encode(k, None), (0, 80), torch.float32, None)
        errors.append(float((q @ (found - k).mT).square().mean()))
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("high_bits", [16, 8])
@pytest.mark.parametrize("importance, tokens", [(0.2, 400), (0.33, 111)])
def test_bytes_are_those_of_the_cards_formula(high_bits: int, importance: float, tokens: int) -> None:
    """f(N) = N + 32 / g bits, and what the paper does not count: positions, scores and the balancer."""
    heads, d = 2, 64
    k, v = torch.randn(2, 1, heads, tokens, d, generator=torch.Generator().manual_seed(0)).half()
    method = MiKV(importance=importance, high_bits=high_bits)
    segment = ImportanceCodec(method, torch.ones(1, heads, d), torch.rand(1, heads, tokens)).encode(k, v, None, 0)
    high = int(importance * tokens)

    def bits(n: int) -> float:
        return 16 if n == 16 else n + 32 / (d // 2)

    numbers = 2 * heads * d * (high * bits(high_bits) + (tokens - high) * bits(2)) / 8
    beside = heads * (4 * tokens + 4 * high + 4 * d)
    assert sum(segment.nbytes().values()) == numbers + beside


@pytest.mark.parametrize("high_bits, percent", [(16, 32.5), (8, 23.1), (4, 18.1)])
def test_card_fractions(high_bits: int, percent: float) -> None:
    k, v = torch.randn(2, 1, 1, 1000, 128, generator=torch.Generator().manual_seed(0)).half()
    segment = ImportanceCodec(MiKV(high_bits=high_bits), None, torch.rand(1, 1, 1000)).encode(k, v, None, 0)
    held = segment.nbytes()
    numbers = sum(size for kind, size in held.items() if kind not in ("positions", "scores"))
    assert 100 * numbers / (2 * 1000 * 128 * 2) == pytest.approx(percent, abs=0.06)


def test_what_was_noted_while_reading_is_let_go() -> None:
    cache = run("mikv")
    assert all(not state for layer in cache.layers for state in layer.states)
    assert cache.memory().by_kind["scores"] == 3 * 2 * 12 * 4
    assert cache.layers[0].store.codec.scores is None
