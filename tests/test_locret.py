"""Locret: the card's worked examples, eviction chunk by chunk, positions, and the training of retaining heads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import workbench as wb
from tests.builders import SIZES, build, feed, prompt, with_artifacts
from tests.checkpoints import write_checkpoint
from workbench.cache.attention import register
from workbench.cache.cache import WorkbenchCache
from workbench.cache.layer import LayerView
from workbench.models.load import Model
from workbench.runs.control import Control
from workbench.runs.prompt import read
from workbench.strategies.eviction.locret import HEADS, Locret, retain
from workbench.strategies.recipe import Recipe
from workbench.training import locret as training
from workbench.training.recall import text


def cache_of(model: Model, recipe: str, length: int) -> WorkbenchCache:
    return WorkbenchCache(Recipe.parse(recipe), model.geometry, length, artifacts=model.artifacts)


def reading(model: Model, recipe: str, ids: list[int], chunk: int = 2048) -> Iterator[WorkbenchCache]:
    """The cache after every chunk of the prompt, as a run feeds it."""
    cache = cache_of(model, recipe, len(ids))
    for _ in read(model, cache, ids, chunk, Control()):
        yield cache


def scripted(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """Every head says of a token what ``scores`` says of its position."""

    def judge(self: Locret, view: LayerView, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        return torch.tensor(scores)[view.seen - tokens : view.seen].expand(1, view.kv_heads, -1)

    monkeypatch.setattr(Locret, "judge", judge)


# -- the card ----------------------------------------------------------------------------------------------------------------


def test_retaining_head_card() -> None:
    x = torch.tensor([[1.0, -1.0, 0.5]])
    w1, w2 = torch.tensor([[1.0, 0, 1], [0, 1, -1]]), torch.tensor([[1.0, 2.0]])
    assert retain(x, w1, w2).item() == pytest.approx(0.6791, abs=1e-4)


def test_label_and_loss_card() -> None:
    logits = torch.tensor([[[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], [[2.0, -1.0, 0.2], [-1.0, 1.0, 0.9]]])[None]
    wanted = training.label(logits)  # [H, G, A, P]: one KV head, two query heads, two answer tokens
    assert wanted.tolist() == [pytest.approx([2.0, 3.0, 0.9])]
    scores = torch.tensor([[1.5, 2.0, 0.5]])
    assert torch.nn.functional.smooth_l1_loss(scores, wanted).item() == pytest.approx(0.235)
    assert training.loss_of(scores[None], wanted[None]).item() == pytest.approx(0.238125)


@pytest.mark.parametrize(
    "scores, recipe, trace",
    [
        (
            [0.9, 0.1, 0.8, 0.2, 0.3, 0.7, 0.05, 0.6, 0.4, 0.5],
            "locret(budget=6, chunk=3, stabilizers=1, local=2)",
            [[0, 1, 2], [0, 2, 4, 5], [0, 2, 5, 7], [0, 2, 5, 7, 8, 9]],
        ),
        (
            [0.9, 0.1, 0.8, 0.2, 0.3, 0.05, 0.7, 0.6, 0.4, 0.5],
            "locret(budget=5, chunk=3, stabilizers=1, local=2)",
            [[0, 1, 2], [0, 2, 5], [0, 2, 6], [0, 2, 6, 8, 9]],
        ),
        (
            [0.9, 0.1, 0.8, 0.2, 0.3, 0.05, 0.7, 0.6, 0.4, 0.5],
            "locret(budget=5, chunk=3, stabilizers=0, local=2)",
            [[0, 1, 2], [0, 2, 4], [0, 2, 6], [0, 2, 6, 8, 9]],
        ),
    ],
)
def test_eviction_trace_card(
    scores: list[float], recipe: str, trace: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, scores)
    found = [cache.kept(layer, head) for cache in reading(build(), recipe, prompt(10)) for layer, head in [(2, 1)]]
    assert found == trace


# -- chunk by chunk ------------------------------------------------------------------------------------------------------------

SMALL = "locret(budget=24, chunk=16, stabilizers=6, local=8)"


def test_the_cache_never_holds_more_than_budget_and_chunk() -> None:
    held = [cache.layers[0].store.lengths for cache in reading(build(), SMALL, prompt(100))]
    assert max(map(max, held)) <= 24 + 16 and held[-1] == [24, 24]
    cache = list(reading(build(), SMALL, prompt(100)))[-1]
    full = list(reading(build(), "full", prompt(100)))[-1]
    assert cache.memory().peak_bytes < full.memory().peak_bytes / 2
    assert "scores" not in cache.memory().by_kind  # what was noted of the prompt is gone


def test_smaller_chunks_of_the_run_change_nothing() -> None:
    outcomes = []
    for chunk in (2048, 16, 5):
        cache = list(reading(build(), SMALL, prompt(100), chunk))[-1]
        outcomes.append([cache.kept(layer, head) for layer in range(3) for head in range(2)])
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert outcomes[0][0] != outcomes[0][1]  # every head its own tokens


def test_a_budget_of_everything_is_full_attention_chunk_by_chunk() -> None:
    for positions in ("original", "compacted"):
        recipe = f'locret(budget=1.0, chunk=16, local=8, positions="{positions}")'
        ours, full = (list(reading(build(), r, prompt(100), 16))[-1] for r in (recipe, "full"))
        assert ours.kept(1, 0) == list(range(100))
        later = prompt(4, seed=1)
        torch.testing.assert_close(feed(build(), ours, later), feed(build(), full, later), atol=1e-5, rtol=0)


def test_scores_do_not_depend_on_the_chunks_while_everything_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    judge, said = Locret.judge, []

    def recorded(self: Locret, view: LayerView, x: Tensor) -> Tensor:
        scores = judge(self, view, x)
        said.append((view.layer, scores))
        return scores

    monkeypatch.setattr(Locret, "judge", recorded)
    whole = []
    for chunk in (64, 9):
        said.clear()
        list(reading(build(), f"locret(budget=1.0, chunk={chunk}, local=8)", prompt(64)))
        whole.append([torch.cat([s for layer, s in said if layer == number], -1) for number in range(3)])
    for once, parts in zip(*whole, strict=True):
        torch.testing.assert_close(once, parts, atol=1e-4, rtol=1e-4)


def test_one_forward_call_is_evicted_at_its_end() -> None:
    cache = cache_of(build(), SMALL, 100)
    feed(build(), cache, prompt(100))
    assert cache.kept(0, 0)[-8:] == list(range(92, 100)) and len(cache.kept(0, 0)) == 24


def test_sliding_layers_are_evicted_once_and_stay_in_their_window() -> None:
    cache = list(reading(build("gemma3"), SMALL, prompt(100)))[-1]
    assert len(cache.kept(1, 0)) == 24  # the full layer
    assert all(min(cache.kept(layer, head)) >= 92 for layer in (0, 2) for head in range(2))


def test_batches_are_judged_row_by_row() -> None:
    model, rows = build(), [prompt(60), prompt(60, seed=5)]
    both = cache_of(model, "locret(budget=20)", 60)
    with torch.inference_mode():
        model.network(torch.tensor(rows), past_key_values=both, use_cache=True)
    for number, row in enumerate(rows):
        alone = cache_of(model, "locret(budget=20)", 60)
        feed(model, alone, row)
        assert [both.kept(0, head, number) for head in range(2)] == [alone.kept(0, head) for head in range(2)]


# -- positions -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single() -> Model:
    """One layer: the keys of a token depend on the token alone, so what is left of a prompt is a prompt of its own."""
    register()
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 1})
    made = AutoModelForCausalLM.from_config(config, attn_implementation="workbench").eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
    return with_artifacts(Model("test/single", made, None))


@pytest.mark.parametrize("positions", ["original", "compacted"])
def test_kept_tokens_are_read_at_the_positions_asked_for(
    positions: str, single: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.rand(80, generator=torch.Generator().manual_seed(3)).tolist()
    scripted(monkeypatch, scores)
    ids, later = prompt(80), prompt(5, seed=1)
    recipe = f'locret(budget=20, chunk=16, stabilizers=4, local=4, positions="{positions}")'
    cache = list(reading(single, recipe, ids))[-1]
    kept = cache.kept(0, 0)
    assert kept == cache.kept(0, 1) and len(kept) == 20
    ours = torch.cat([feed_at(single, cache, later, 80)])

    left = [ids[position] for position in kept] + later
    at = list(range(25)) if positions == "compacted" else [*kept, *range(80, 85)]
    with torch.inference_mode():
        expected = single.network(torch.tensor([left]), position_ids=torch.tensor([at]), use_cache=False).logits[0, 20:]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def feed_at(model: Model, cache: WorkbenchCache, ids: list[int], start: int) -> Tensor:
    """Logits of tokens fed one by one at positions start, start + 1, …"""
    out = []
    with torch.inference_mode():
        for number, token in enumerate(ids):
            at = torch.tensor([[start + number]])
            out.append(
                model.network(torch.tensor([[token]]), position_ids=at, past_key_values=cache, use_cache=True).logits[0]
            )
    return torch.cat(out)


def test_compacted_keys_are_turned_from_the_origin_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, after many evictions, a key is as near to the truth as after one."""
    register()
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 1})
    torch.manual_seed(0)
    half = AutoModelForCausalLM.from_config(config, attn_implementation="workbench", dtype=torch.bfloat16).eval()
    model = with_artifacts(Model("test/half", half, None))
    scripted(monkeypatch, [1.0] * 10 + [0.0] * 390)  # the first ten stay throughout
    recipe = 'locret(budget=14, chunk=8, stabilizers=0, local=4, positions="compacted")'
    cache = list(reading(model, recipe, prompt(400)))[-1]
    plain = list(reading(model, "full", prompt(400)))[-1]
    rope, first = model.geometry.ropes[0], torch.arange(10)
    assert cache.kept(0, 0)[:10] == first.tolist()
    bare = rope.unrotate(plain.layers[0].store.keys()[:, :, :10], first)
    expected = rope.rotate(bare, torch.arange(386, 396))
    error = (cache.layers[0].store.keys()[:, :, :10].float() - expected).norm() / expected.norm()
    assert error < 0.01


# -- what it refuses -----------------------------------------------------------------------------------------------------------


def test_an_untrained_model_is_told_how_to_train(tmp_path: Path) -> None:
    model = wb.load(write_checkpoint(tmp_path / "my model"))
    with pytest.raises(wb.ArtifactError) as caught:
        wb.cache("locret()", model)
    assert f"`kvw train locret --model '{model.id}'`" in str(caught.value)
    assert "locret needs a set of trained retaining heads of" in str(caught.value)
    assert "or use snapkv, which needs none." in str(caught.value)


def test_what_does_not_fit_is_refused() -> None:
    for allocator in ("adakv", "headkv", "pyramidkv"):
        with pytest.raises(wb.RecipeError, match="cannot be compared between heads"):
            Recipe.parse(f'locret(allocator="{allocator}")')
    with pytest.raises(wb.RecipeError, match="cannot score with locret"):
        Recipe.parse('adakv(scorer="locret")')
    with pytest.raises(wb.RecipeError, match="rotary"):
        wb.cache("locret()", build("gpt2"))


# -- training ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    model = wb.load(write_checkpoint(tmp_path_factory.mktemp("models") / "tiny"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.network.parameters():  # larger than the usual 0.02, so that there is something to learn
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3, generator=generator)
    return model


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LEVEL", 2)
    monkeypatch.setattr(training, "MEASURED_ON", 2)


def test_a_prefix_ends_where_asking_begins(tiny: Model) -> None:
    for seed in range(10):
        ids, prefix = training.example(random.Random(seed), tiny)
        rng, pieces = random.Random(seed), []
        while not any(piece.role for piece in pieces):  # prose asks nothing and is passed over
            pieces = text.training_text(rng, 2, lambda part: len(tiny.tokenizer.tokenize(part)))
        before = "".join(piece.text for piece in pieces[: [bool(piece.role) for piece in pieces].index(True)])
        assert tiny.tokenizer.decode(ids[1:prefix]) == before and ids[0] == tiny.tokenizer.bos_token_id


def test_a_lesson_is_the_models_queries_keys_and_values_and_its_logits(tiny: Model) -> None:
    rng = random.Random(1)
    ids, prefix = training.example(random.Random(1), tiny)
    seen, wanted = training.lesson(tiny, rng)
    layer = tiny.network.model.layers[0]
    with torch.no_grad():
        hidden = layer.input_layernorm(tiny.network.model.embed_tokens(torch.tensor([ids])))
        projected = [getattr(layer.self_attn, name)(hidden)[0] for name in ("q_proj", "k_proj", "v_proj")]
    torch.testing.assert_close(seen[0], torch.cat([p[:prefix] for p in projected], -1), atol=1e-5, rtol=1e-4)
    rope = tiny.geometry.ropes[0]
    q, k = (rope.rotate(p.unflatten(-1, (-1, 8)).transpose(0, 1), torch.arange(len(ids))) for p in projected[:2])
    logits = torch.einsum("hgad,hpd->hgap", q[:, prefix:].unflatten(0, (2, 2)), k[:, :prefix]) * 8**-0.5
    torch.testing.assert_close(wanted[0], logits.amax((1, 2)), atol=1e-5, rtol=1e-4)


def test_two_steps_and_two_resumed_equal_four(tiny: Model, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(state: training.Progress) -> None:
        if state.step == 2:
            raise Stop

    whole = training.train(tiny, tmp_path / "whole", steps=4, width=8)
    with pytest.raises(Stop):
        training.train(tiny, tmp_path / "parts", steps=4, width=8, tell=stop)
    rest = training.train(tiny, tmp_path / "parts", steps=4, width=8, resume=True)
    assert all(torch.equal(whole.tensors[name], rest.tensors[name]) for name in whole.tensors)
    assert whole.made_with == rest.made_with
    with pytest.raises(ValueError, match="made with width 8, not 16; resume with the same"):
        training.train(tiny, tmp_path / "parts", steps=4, width=16, resume=True)
    with pytest.raises(ValueError, match="There is no checkpoint"):
        training.train(tiny, tmp_path / "none", steps=4, resume=True)


def test_the_heads_learn(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "RATE", 5e-3)
    monkeypatch.setattr(training, "MEASURED_ON", 12)
    first, last = (training.train(tiny, tmp_path / "run", steps, 16).made_with["measured"] for steps in (1, 200))
    assert last["loss"] < 0.7 * first["loss"] and last["overlap"] > first["overlap"] + 0.05


def test_trained_heads_are_of_the_card_and_serve_the_strategy(tiny: Model, tmp_path: Path) -> None:
    artifact = training.train(tiny, tmp_path / "run", steps=2)
    assert {name: tuple(t.shape) for name, t in artifact.tensors.items()} == {"w1": (2, 16, 64), "w2": (2, 2, 16)}
    assert set(artifact.made_with["measured"]) == {"loss", "overlap"}
    file = tiny.artifacts.save(artifact, tmp_path / "heads.safetensors")
    cache = wb.cache(f"locret(budget=12, artifact={str(file)!r})", tiny)
    feed(tiny, cache, prompt(50))
    assert len(cache.kept(0, 0)) == 12


def test_widths_follow_the_card_and_small_models_take_less() -> None:
    geometry: Any = build().geometry
    assert training.width_for(geometry) == 32
    big: Any = type("Big", (), {"hidden_size": 4096})
    assert training.width_for(big) == 1024
    shapes = HEADS.shapes(geometry)
    assert shapes["w1"] == (3, "width", (4 + 2 * 2) * 16) and shapes["w2"] == (3, 2, "width")
