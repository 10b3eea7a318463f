"""ZipCache: the card's worked examples, its byte formula, and which tokens get how many bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.builders import build, cache_for, feed, network, prompt
from workbench.cache.coded import PairCodec
from workbench.cache.positions import Choice, Chosen
from workbench.cache.schemes.spans import AcrossHeads, ChannelsOfRun, channel_sizes
from workbench.cache.tiers import TieredSegment
from workbench.strategies.quantization.zipcache import MixedCodec, ZipCache, normalised, probe_positions
from workbench_kernels import unpack

# -- the card, section 7 -------------------------------------------------------------------------------------------------

X = torch.tensor([[4.0, 1, 0], [-16, 0.25, 1], [8, -1, 0.5]])


def padded(x: Tensor) -> Tensor:
    """[n, 3] -> [1, 1, n, 16]: copies of the three channels, so that codes fill a word and no extreme changes."""
    return torch.cat([x.repeat(1, 5), x[:, :1]], 1)[None, None]


def test_card_channel_separable_values() -> None:
    x = padded(X)
    channel = channel_sizes(x)
    assert channel[0, 0, :3].tolist() == [4, 1, 1]
    scheme = AcrossHeads(2, channel)
    parts = scheme.encode(x, None)
    assert unpack(parts["codes"], 2)[0, 0, :, :3].tolist() == [[3, 3, 0], [0, 3, 3], [3, 0, 2]]
    torch.testing.assert_close(parts["scale"][0, 0].float(), torch.tensor([1 / 3, 5 / 3, 1]), atol=1e-3, rtol=0)
    assert parts["low"][0, 0].tolist() == [0, -4, -1]
    decoded = scheme.decode(parts, (0, 3), torch.float32, None)[0, 0, :, :3]
    torch.testing.assert_close(decoded, torch.tensor([[4.0, 1, 0], [-16, 1, 1], [8, -1, 1]]), atol=5e-3, rtol=0)
    assert float((decoded - X).square().mean()) == pytest.approx(0.090278, abs=1e-3)
    plain = AcrossHeads(2)
    decoded = plain.decode(plain.encode(x, None), (0, 3), torch.float32, None)[0, 0, :, :3]
    expected = torch.tensor([[4, 1.3333, 0], [-16, 1, 1], [8, -1, -1]])
    torch.testing.assert_close(decoded, expected, atol=2e-2, rtol=0)
    assert float((decoded - X).square().mean()) == pytest.approx(0.324846, abs=2e-3)


ATTENTION = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.4, 0.2, 0.4, 0], [0.3, 0.1, 0.2, 0.4]])


@pytest.mark.parametrize(
    "asked, divided_by, expected",
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], [0.55, 0.266667, 0.3, 0.4]),
        ([1, 3], [0, 1, 2, 3], [0.2, 0.2, 0.1, 0.4]),  # as the code has it
        ([1, 3], [1, 3], [0.4, 0.3, 0.2, 0.4]),
    ],
)
def test_card_saliency(asked: list[int], divided_by: list[int], expected: list[float]) -> None:
    received = ATTENTION[asked].sum(0)[None, None]
    found = normalised(received, torch.tensor(divided_by))[0, 0]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


# -- probes --------------------------------------------------------------------------------------------------------------


def test_probes_are_the_newest_and_as_many_at_random() -> None:
    probes = probe_positions(400, 0.1, 0)
    assert len(probes) == 40 and probes[20:].tolist() == list(range(380, 400)) and int(probes[:20].max()) < 380
    assert torch.equal(probes, probe_positions(400, 0.1, 0)) and not torch.equal(probes, probe_positions(400, 0.1, 1))
    assert probe_positions(12, 0.1, 0).tolist() == list(range(12)) == probe_positions(12, 1.0, 0).tolist()


@pytest.mark.parametrize("chunk", [None, 17])
@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gpt-oss"])
def test_all_rows_as_probes_are_the_mean_attention_of_the_model(
    chunk: int | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the weights that transformers itself reports."""
    found = []
    codec = ZipCache.codec

    def recorded(self: ZipCache, view: object = None, scores: Tensor | None = None) -> MixedCodec:
        found.extend([] if scores is None else [scores])
        return codec(self, view, scores)

    monkeypatch.setattr(ZipCache, "codec", recorded)
    cache = cache_for(build(name), "zipcache(probes=1.0)", 60)
    feed(build(name), cache, prompt(60), chunk)
    with torch.inference_mode():
        paid = network(name, "eager")(torch.tensor([prompt(60)]), output_attentions=True).attentions
    for layer, (scores, weights) in enumerate(zip(found, paid)):
        window = cache.layers[layer].sliding_window or 60
        sees = (60 - torch.arange(60)).clamp(max=window)
        expected = weights.sum(2).unflatten(1, (2, 2)).sum(2) / sees
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


# -- tiers ---------------------------------------------------------------------------------------------------------------


def numbers(n: int, heads: int = 2, dim: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(1, heads, n, dim, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.floats(0, 1), st.booleans(), st.integers(0, 2**16))
def test_a_choice_says_where_both_kinds_stand(n: int, share: float, explicit: bool, seed: int) -> None:
    order = torch.rand(2, 3, n, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    chosen = torch.zeros(2, 3, n, dtype=torch.bool).scatter(2, order[..., : int(share * n)], True)
    base = (3 * torch.arange(n, dtype=torch.int32) + 5).expand(2, 3, n) if explicit else 7
    choice = Choice(chosen, base)
    at = base if isinstance(base, Tensor) else torch.arange(7, 7 + n)
    for which in (True, False):
        found = Chosen(choice, which).read(0, n)
        for b in range(2):
            for h in range(3):
                row = at[b, h] if explicit else at
                assert found[b, h].tolist() == row[chosen[b, h] == which].tolist()


@pytest.mark.parametrize("unimportant", [0.0, 0.4, 1.0])
def test_the_lowest_scores_get_fewer_bits(unimportant: float) -> None:
    k, v = numbers(50), numbers(50, seed=1)
    scores = torch.rand(1, 2, 50, generator=torch.Generator().manual_seed(2))
    segment = MixedCodec(8, 2, unimportant, scores).encode(k, v, None, 0)
    low = int(unimportant * 50)
    for row in range(2):
        keys, _, at = segment.entries(row)
        assert at.tolist() == list(range(50))
        error = (keys - k[0, row]).abs().amax(-1)
        coarse = error > 0.05
        expected = torch.zeros(50, dtype=torch.bool)
        expected[scores[0, row].argsort()[:low]] = True
        assert torch.equal(coarse, expected)


def test_one_precision_is_that_schemes_own() -> None:
    k, v = numbers(50), numbers(50, seed=1)
    scores = torch.rand(1, 2, 50)
    for unimportant, bits in ((0.0, 4), (1.0, 2)):
        ours = MixedCodec(4, 2, unimportant, scores).encode(k, v, None, 0)
        plain = PairCodec(ChannelsOfRun(bits), AcrossHeads(bits, channel_sizes(v))).encode(k, v, None, 0)
        assert torch.equal(ours.keys(), plain.keys()) and torch.equal(ours.values(), plain.values())
        assert "mask" not in ours.nbytes()


def test_scaling_a_channel_scales_its_divisor_by_the_root() -> None:
    v = numbers(50)
    louder = v.clone()
    louder[..., 3] *= 16
    torch.testing.assert_close(channel_sizes(louder)[..., 3], 4 * channel_sizes(v)[..., 3])


@pytest.mark.parametrize("tokens", [840, 1000])
@pytest.mark.parametrize("unimportant", [0.4, 0.3])
def test_bytes_are_those_of_the_cards_formula(tokens: int, unimportant: float) -> None:
    heads, dim = 2, 64
    c = heads * dim
    scores = torch.rand(1, heads, tokens)
    segment = MixedCodec(4, 2, unimportant, scores).encode(numbers(tokens, 2, dim), numbers(tokens, 2, dim, 1), None, 0)
    low = int(unimportant * tokens)
    held = {kind: size for kind, size in segment.nbytes().items() if size}
    codes = 2 * c * (4 * (tokens - low) + 2 * low) // 8
    assert held == {"codes": codes, "scales": (c + 2 * tokens) * 2 + 8 * c, "mask": heads * tokens // 8}


def test_card_ratio() -> None:
    """60 % salient, width 1024, 4096 tokens: 4.96 times smaller than half precision, but for the bits that say which."""
    segment = MixedCodec(4, 2, 0.4, torch.rand(1, 8, 4096)).encode(
        numbers(4096, 8, 128), numbers(4096, 8, 128, 1), None, 0
    )
    held = segment.nbytes()
    assert 4 * 4096 * 1024 / (sum(held.values()) - held["mask"]) == pytest.approx(4.96, abs=5e-3)


def test_generated_tokens_become_a_block_and_what_was_coded_stays() -> None:
    cache = cache_for(build(), "zipcache(residual_length=10)", 50)
    feed(build(), cache, prompt(50))
    segment = cache.layers[0].store.segments[0]
    assert isinstance(segment, TieredSegment) and [tier.length for tier in segment.tiers] == [30, 20, 0]
    before = segment.entries(0)[0]
    feed(build(), cache, prompt(9, seed=1), 1)
    assert [tier.length for tier in segment.tiers] == [30, 20, 9]
    feed(build(), cache, prompt(1, seed=2))
    assert [tier.length for tier in segment.tiers] == [30, 20, 6, 4, 0]
    feed(build(), cache, prompt(25, seed=3))
    assert [tier.length for tier in segment.tiers] == [30, 20, 6, 4, 6, 4, 6, 4, 5]
    keys, _, at = segment.entries(0)
    assert torch.equal(keys[:50], before) and at.tolist() == list(range(85))


def test_generated_tokens_are_scored_by_the_newest_query() -> None:
    """The tokens of a block that get more bits are those the last query attends to most."""
    cache = cache_for(build(), "zipcache(residual_length=10)", 50)
    feed(build(), cache, prompt(50))
    feed(build(), cache, prompt(9, seed=1), 1)
    exact = cache_for(build(), "zipcache(residual_length=11)", 50)
    feed(build(), exact, prompt(50))
    feed(build(), exact, prompt(9, seed=1), 1)

    class Watch:
        weights: Tensor

        def on_attention(self, layer, query, out) -> None:
            if layer.index == 0:
                keys = layer.store.keys().repeat_interleave(2, 1)
                weights = (query.q.float() @ keys.mT * query.scale).softmax(-1)
                self.weights = weights.unflatten(1, (2, 2)).sum((2, 3))[0]

    watch = Watch()
    exact.probes.append(watch)
    for each in (cache, exact):
        feed(build(), each, [7])
    segment = cache.layers[0].store.segments[0]
    assert isinstance(segment, TieredSegment)
    important = segment.tiers[2].positions()[0]
    for head in range(2):
        expected = watch.weights[head, 50:60].topk(6).indices.sort().values + 50
        assert important[head].tolist() == expected.tolist()


def test_scores_are_let_go_after_the_prompt() -> None:
    cache = cache_for(build(), "zipcache", 50)
    feed(build(), cache, prompt(50))
    assert "scores" not in cache.memory().by_kind and cache.layers[0].store.codec.scores is None
