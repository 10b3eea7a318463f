"""Methods with a calibration: the cards' worked examples, what they keep, and how a calibration is measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.builders import cache_for, feed, network, prompt
from tests.checkpoints import write_checkpoint
from workbench.cache.cache import WorkbenchCache
from workbench.calibration import layer_errors, needles
from workbench.calibration.make import CALIBRATIONS
from workbench.models.load import Model
from workbench.strategies.eviction.allocators.compresskv import CALIBRATION, layer_budgets
from workbench.strategies.eviction.allocators.headkv import CALIBRATION as HEADKV
from workbench.strategies.eviction.allocators.headkv import capacities, group_means
from workbench.strategies.eviction.allocators.rounds import settle
from workbench.strategies.eviction.base import select_top
from workbench.strategies.eviction.compresskv import CompressKV, vote
from workbench.strategies.recipe import Recipe


def kept(cache: WorkbenchCache) -> list[list[list[int]]]:
    heads = range(cache.geometry.num_kv_heads)
    return [[cache.kept(layer, head) for head in heads] for layer in range(len(cache.layers))]


def calibrated(**tensors: Tensor) -> Model:
    """The random Llama (3 layers, 4 query heads, 2 KV heads) with calibrations of one's own."""
    model = Model("test/llama", network("llama", "workbench"), None)
    for kind in (CALIBRATION, HEADKV):
        shapes = kind.shapes(model.geometry)
        model.artifacts.put(
            model.artifacts.make(kind, {n: tensors.get(n, torch.ones(s)) for n, s in shapes.items()}, {})
        )
    return model


def run(model: Model, recipe: str, tokens: int = 90) -> WorkbenchCache:
    cache = cache_for(model, recipe, tokens)
    feed(model, cache, prompt(tokens))
    return cache


# -- CompressKV --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "errors, total, most, budgets",
    [
        ([0.4, 0.3, 0.2, 0.1], 256, 192, [83, 70, 58, 45]),
        ([0.7, 0.1, 0.1, 0.1], 256, 96, [96, 54, 53, 53]),
        ([0.85, 0.05, 0.05, 0.05], 1024, 768, [768, 86, 85, 85]),
    ],
)
def test_compresskv_card_budgets(errors: list[float], total: int, most: int, budgets: list[int]) -> None:
    assert layer_budgets(errors, total, 32, most) == budgets


def one_by_one(counts: list[int], total: int, low: int, high: int, weights: list[float]) -> list[int]:
    """The procedure as the paper's code writes it."""
    counts, missing = list(counts), total - sum(counts)
    order = sorted(range(len(counts)), key=lambda i: -weights[i] if missing > 0 else weights[i])
    while missing:
        before = missing
        for i in order:
            if missing > 0 and counts[i] < high:
                counts[i], missing = counts[i] + 1, missing - 1
            elif missing < 0 and counts[i] > low:
                counts[i], missing = counts[i] - 1, missing + 1
        if missing == before:
            break
    return counts


def test_settling_in_whole_rounds_is_settling_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        counts = torch.randint(3, 20, (6,), generator=generator).tolist()
        weights = torch.randint(0, 4, (6,), generator=generator).tolist()  # ties too
        total = int(torch.randint(0, 160, (1,), generator=generator))
        assert settle(counts, total, 3, 20, weights) == one_by_one(counts, total, 3, 20, weights)


def test_compresskv_card_selection() -> None:
    scores = torch.tensor([[0.9, 0.02, 0.02, 0.02, 0.04], [0.1, 0.1, 0.6, 0.1, 0.1], [0.2, 0.0, 0.2, 0.5, 0.1]])[None]
    everyone, chosen = vote(scores, 3), vote(scores[:, 1:], 3)
    torch.testing.assert_close(
        everyone[0], torch.tensor([0.146667, 0.237778, 0.173333, 0.186667, 0.095556]), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(chosen[0], torch.tensor([0.066667, 0.2, 0.25, 0.266667, 0.133333]), atol=1e-6, rtol=0)
    assert select_top(everyone, 2).tolist() == [[1, 3]] and select_top(chosen, 2).tolist() == [[2, 3]]


def test_only_the_chosen_heads_of_a_layer_vote() -> None:
    torch.manual_seed(0)
    votes = torch.rand(1, 2, 2, 4, 30)
    semantic = torch.tensor([[0.0, 0, 0, 0], [0.1, 0.9, 0.3, 0.2]])
    artifact = SimpleNamespace(tensors={"semantic": semantic})
    view: Any = SimpleNamespace(
        artifact=lambda part: artifact, layer=1, length=30, kv_heads=2, window_attention=lambda window: votes
    )
    scores = CompressKV(heads=2, window=4, kernel=1).score(view)
    expected = votes.flatten(1, 2)[:, [1, 2], :, :26].sum(2).mean(1)
    torch.testing.assert_close(scores[:, 0, :26], expected)
    assert torch.equal(scores[:, 0], scores[:, 1]) and bool(scores[..., 26:].isinf().all())


def test_all_heads_and_even_budgets_are_snapkv_with_one_set_a_layer() -> None:
    model = calibrated()
    ours = kept(run(model, "compresskv(budget=24, heads=4, window=8, kernel=5, most=1.0)"))
    cache = cache_for(model, "full", 90)
    snapped = []

    class Votes:
        def on_attention(self, layer: Any, query: Any, out: Any) -> None:
            layer.states = [{}]
            snapped.append(layer.view(0, query).window_attention(8))

    cache.probes.append(Votes())
    feed(model, cache, prompt(90))
    for layer, votes in zip(ours, snapped, strict=True):
        shared = vote(votes.flatten(1, 2).mean(2)[..., :82], 5)
        assert layer == [[*select_top(shared, 16)[0].tolist(), *range(82, 90)]] * 2


def test_layers_that_suffer_more_keep_more_and_all_heads_the_same() -> None:
    model = calibrated(errors=torch.tensor([0.6, 0.3, 0.1]))
    layers = kept(run(model, "compresskv(budget=20, least=10)"))
    assert [len(layer[0]) for layer in layers] == layer_budgets([0.6, 0.3, 0.1], 60, 10, 60)
    assert all(layer[0] == layer[1] and layer[0][-8:] == [*range(82, 90)] for layer in layers)
    scored = kept(run(model, 'snapkv(budget=20, allocator="compresskv", least=10, window=4)'))
    assert [[len(head) for head in layer] for layer in scored] == [[len(layer[0])] * 2 for layer in layers]


def test_layer_budgets_never_ask_for_more_than_there_is() -> None:
    model = calibrated(errors=torch.tensor([1.0, 0.0, 0.0]))
    assert [len(layer[0]) for layer in kept(run(model, "compresskv(budget=60, least=1)"))] == [90, 45, 45]


# -- HeadKV ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "beta, expected",
    [(1.01, [[191, 49], [144, 96]]), (1.2, [[180, 60], [140, 100]]), (2.0, [[156, 84], [132, 108]])],
)
def test_headkv_card(beta: float, expected: list[list[int]]) -> None:
    found = capacities([[0.4, 0.1], [0.3, 0.2]], 120, beta)
    assert found == expected and sum(map(sum, found)) == 480
    assert capacities([[4.0, 1.0], [3.0, 2.0]], 120, beta) == expected  # shares, whatever they sum to


def test_headkv_without_importance_is_even_and_groups_take_their_mean() -> None:
    assert capacities([[0.0, 0.0]], 7, 1.0) == [[7, 7]]
    assert group_means([[10, 20, 1, 2]], 2) == [[15.0, 1.5]]


def test_headkv_gives_by_importance_and_every_head_its_window() -> None:
    importance = torch.tensor([[4.0, 4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 4.0]])
    model = calibrated(retrieval=importance)
    layers = kept(run(model, "headkv(budget=20, window=4)"))
    counts = [[len(head) for head in layer] for layer in layers]
    assert sum(map(sum, counts)) == 20 * 6
    assert counts[0][0] > counts[2][1] > counts[1][0] == counts[1][1] > counts[0][1] == counts[2][0] >= 4
    assert all(head[-4:] == [*range(86, 90)] for layer in layers for head in layer)
    even = kept(run(model, "headkv(budget=20, window=4, beta=1000.0)"))
    assert {len(head) for layer in even for head in layer} <= {19, 20, 21}


def test_headkv_hands_on_what_a_head_cannot_keep() -> None:
    model = calibrated(retrieval=torch.tensor([[9.0, 9.0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    counts = [len(head) for layer in kept(run(model, "headkv(budget=30, window=2)")) for head in layer]
    assert counts[0] == 90 and counts[1:] == [18] * 5


def test_the_allocator_takes_any_scorer() -> None:
    model = calibrated(retrieval=torch.tensor([[3.0, 3.0, 1.0, 1.0]] * 3))
    for scorer in ("knorm", "tova", "random", "compresskv"):
        once = ", recompress_every=0" if scorer == "tova" else ""
        recipe = (
            f'headkv(scorer="{scorer}", budget=20)'
            if scorer == "compresskv"
            else f'{scorer}(budget=20, allocator="headkv"{once})'
        )
        counts = [[len(head) for head in layer] for layer in kept(run(model, recipe))]
        assert sum(map(sum, counts)) == 120 and all(first > second for first, second in counts)


# -- calibration -------------------------------------------------------------------------------------------------------------


def test_semantic_score_card() -> None:
    a, b, x = 7, 8, 9
    assert needles.semantic_score([a, b, x], [a, b, a], torch.tensor([0.6, 0.5, 0.4])).item() == pytest.approx(1.7)
    spans = torch.tensor([[0.6, 0.0], [0.5, 1.0], [0.4, 1.0]])  # two heads
    assert needles.semantic_score([a, b, x], [a, b, a], spans).tolist() == pytest.approx([1.7, 1.0])


def test_retrieval_counts_looks_at_the_very_token_that_is_said() -> None:
    prompt_ids, span = [1, 5, 6, 7, 2], (1, 4)
    said = [6, 7, 6]
    looked = torch.tensor([[2, 2], [3, 4], [4, 6]])  # position 4 is outside; 6 is a generated 7
    assert needles.retrieval_score(said, prompt_ids, span, looked).tolist() == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize(
    "answer, said, share",
    [("teal", " teal .\n", 1.0), ("quiet-river", "quiet.", 0.5), ("Mira and Tovi", "tovi, mira", 2 / 3), ("a", "", 0)],
)
def test_word_recall(answer: str, said: str, share: float) -> None:
    assert needles.word_recall(answer, said) == pytest.approx(share)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return wb.load(write_checkpoint(tmp_path_factory.mktemp("models") / "tiny"))


def test_recorded_attention_is_the_models(tiny: Model) -> None:
    ids = prompt(40)
    recorder = needles.AttentionRecorder()
    cache = WorkbenchCache(Recipe(), tiny.geometry, 40, [recorder])
    feed(tiny, cache, ids)
    found = recorder.take()
    tiny.network.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            attentions = tiny.network(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    finally:
        tiny.network.set_attn_implementation("workbench")
    for ours, theirs in zip(found, attentions, strict=True):
        torch.testing.assert_close(ours, theirs[0, :, -1], atol=1e-5, rtol=1e-4)


def test_needle_documents_fit_the_model_and_are_about_known_words(tiny: Model) -> None:
    documents = list(needles.needle_documents(tiny, 4))
    assert [document.depth for document in documents] == sorted(document.depth for document in documents)
    assert all(len(document.prompt_ids) + needles.MOST_TOKENS < 256 for document in documents)


def test_a_model_that_answers_nothing_is_refused(tiny: Model) -> None:
    with pytest.raises(wb.ArtifactError, match="answered none of 2 needle prompts"):
        needles.measure_heads(tiny, 2, lambda done, total: None)


def test_the_error_of_a_cache_that_keeps_everything_is_none(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = tiny.artifacts.make(CALIBRATION, {"semantic": torch.rand(2, 4), "errors": torch.ones(2)}, {})
    artifacts = tiny.artifacts.holding(draft)
    small = layer_errors.prompt_errors(tiny, prompt(60), artifacts)
    assert len(small) == 2 and min(small) > 0.01
    monkeypatch.setattr(layer_errors, "SMALL", 60)
    assert layer_errors.prompt_errors(tiny, prompt(60), artifacts) == pytest.approx([0.0, 0.0], abs=1e-3)


def test_a_calibration_is_whole_and_serves_its_method(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needles, "ENOUGH", -1.0)  # a random model answers nothing
    told: list[tuple[str, int, int]] = []
    artifact = CALIBRATIONS["compresskv"](tiny, 5, lambda *state: told.append(state))
    assert artifact.tensors["errors"].sum().item() == pytest.approx(1.0) and bool(
        (artifact.tensors["errors"] > 0).all()
    )
    assert {stage for stage, *_ in told} == {"heads", "layers"} and told[4] == ("heads", 5, 5)
    assert artifact.made_with == {"samples": 5, "needles_answered": 5}
    cache = WorkbenchCache(
        Recipe.parse("compresskv(budget=0.2)"), tiny.geometry, artifacts=tiny.artifacts.holding(artifact)
    )
    feed(tiny, cache, prompt(60))
    assert sum(len(cache.kept(layer, 0)) for layer in range(2)) == 24


@pytest.mark.parametrize("method", ["compresskv", "headkv", "locret"])
def test_the_house_model_ships_what_its_methods_need(
    method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVW_DATA", str(tmp_path))  # nothing of the person's own
    model = wb.load("house/recall")
    cache = wb.cache(f"{method}(budget=0.2)", model, 300)
    feed(model, cache, prompt(300))
    held = sum(layer.nbytes()["keys"] for layer in cache.layers)
    assert 0.19 * 300 < held / 6 / (model.geometry.num_kv_heads * model.geometry.head_dim * 4) <= 0.2 * 300
