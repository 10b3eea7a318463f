"""The same count keeps the same entries as in kvpress 0.5.4, whose choices are frozen in ``tests/oracle/fixtures``.

Random tiny models (Llama and Qwen3 with grouped queries, Gemma 3 with sliding layers), float32, prompts of 97, 203 and
331 tokens, ratios 0.1, 0.3, 0.5 and 0.8. ``tests/oracle/make_fixtures.py`` says how they were made.

What differs on purpose, and is therefore not compared:

- Order: kvpress stores most presses' entries by descending score, we by position. Sets are compared.
- Rounding: kvpress takes a ratio that goes and keeps ``int(T * (1 - r))`` in floating point, which for T=10, r=0.9 is
  nothing. We take a share that stays, rounded down with a guard and at least one, or a count. Here: the count; but the
  share for PyramidKVPress, which divides the unrounded ``T * (1 - r)`` among layers, and the count that came out for
  ChunkKVPress, which rounds to whole chunks.
- Ties: kvpress keeps what torch.topk happens to; we keep the later entry. Layers are compared where relative noise of
  1e-5 on the scores changes nothing (nearly all of them: the first test counts).
- Protected entries: kvpress scores them one above the largest score, we ``inf``: alike, unless there are more of them
  than the budget, where kvpress keeps any of them (a tie) and we the later ones.
- Padding: kvpress ignores the mask, we refuse padded batches with an eviction method. Batches of one row are compared.
- Scale: kvpress divides queries times keys by the root of head_dim, we take the model's own scale; Gemma 3's is set alike.
- Sliding layers: kvpress leaves them alone, we evict in them too. Full layers are compared.
- Heads of different lengths: kvpress only hides what such a press drops, we free it. What is not hidden is compared.
- Acting while generating (TOVA, StreamingLLM): kvpress does not. Caches are compared after the prompt.
- ThinK: kvpress writes zeros into the pruned channels of every key, we keep the newest keys whole and store fewer
  channels of the others. Compared by the oldest key's zeros.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

import workbench as wb
from tests.oracle.cases import ARCHITECTURES, Case, about, cases, cases_of, digest, last_logits, network, prompt
from workbench.cache.attention import register
from workbench.cache.cache import WorkbenchCache
from workbench.cache.layer import LayerView
from workbench.models.load import Model
from workbench.strategies.eviction.base import Eviction
from workbench.strategies.recipe import Recipe

FREE = 1e-5  # relative noise on the scores that a layer's choice must bear to be compared


def tokens(cache: WorkbenchCache, case: Case) -> np.ndarray:
    """bool [L, H, T]: the prompt's tokens that the compared layers hold."""
    held = np.zeros(case.kept.shape, dtype=bool)
    for row, layer in enumerate(case.layers):
        for head in range(held.shape[1]):
            held[row, head, cache.layers[layer].store.positions(head).numpy()] = True
    return held


def channels(cache: WorkbenchCache, case: Case) -> np.ndarray:
    """bool [L, H, D]: the channels that the oldest key of each head still has."""
    return np.stack([(cache.layers[layer].store.keys()[0, :, 0] != 0).numpy() for layer in case.layers])


# A press -> our recipe, with kvpress's own parameters by their names in kvpress, and
#   {budget}  the count per head it keeps, int(T * (1 - r));  {ratio} r, the share that goes;  {share} 1 - r;
#   {kept}    the count per head that it has kept in truth, where whole chunks do not fill the budget.
RECIPES = {
    "StreamingLLMPress": "streaming_llm(budget={budget}, sinks={n_sink})",
    "KeyRerotationPress(StreamingLLMPress)": "streaming_llm(budget={budget}, sinks={n_sink})",  # the entries; keys below
    "ObservedAttentionPress": "observed_attention(budget={budget})",
    "TOVAPress": "tova(budget={budget})",
    "SnapKVPress": "snapkv(budget={budget}, window={window_size}, kernel={kernel_size})",
    "PyramidKVPress": "pyramidkv(budget={share}, window={window_size}, kernel={kernel_size}, beta={beta})",
    "AdaKVPress(SnapKVPress)": (
        'adakv(scorer="snapkv", budget={budget}, window={window_size}, kernel={kernel_size}, alpha={alpha_safeguard})'
    ),
    "KnormPress": "knorm(budget={budget})",
    "KeyDiffPress": "keydiff(budget={budget}, block=0)",
    "BlockPress(KeyDiffPress)": "keydiff(budget={budget}, block={block_size})",
    "ExpectedAttentionPress": (
        "expected_attention(budget={budget}, n_future={n_future_positions}, sinks={n_sink}, "
        "use_covariance={use_covariance}, use_vnorm={use_vnorm}, epsilon={epsilon})"
    ),
    "ChunkKVPress(SnapKVPress)": (
        'chunkkv(scorer="snapkv", budget={kept}, window={window_size}, kernel={kernel_size}, chunk_length={chunk_length})'
    ),
    "CriticalKVPress(SnapKVPress)": (
        'critical(scorer="snapkv", budget={budget}, window={window_size}, kernel={kernel_size}, epsilon={epsilon}, '
        "first_stage={first_stage_ratio})"
    ),
    "CriticalAdaKVPress(SnapKVPress)": (
        'adakv(scorer="critical", budget={budget}, window={window_size}, kernel={kernel_size}, '
        "epsilon={epsilon}, first_stage={first_stage_ratio}, alpha={alpha_safeguard})"
    ),
    "ThinKPress": "think(ratio={ratio}, window={window_size})",
}
READ: dict[str, Callable[[WorkbenchCache, Case], np.ndarray]] = {"ThinKPress": channels}
SAME_SCORES = ("SnapKVPress", "KnormPress", "TOVAPress")  # not only the same order


def recipe_for(case: Case) -> str:
    """Our recipe for a case; skips where its strategy is not there yet."""
    counts = {"budget": case.budget, "ratio": case.ratio, "share": 1 - case.ratio, "kept": int(case.kept[0, 0].sum())}
    text = RECIPES[case.press].format(**counts, **case.parameters)
    asked = re.findall(r'(?:^|scorer=")(\w+)', text)
    if missing := set(asked) - {known["name"] for known in wb.strategies()}:
        pytest.skip(f"no such strategy yet: {', '.join(sorted(missing))}")
    return text


def prefilled(case: Case, recipe: str) -> WorkbenchCache:
    """The workbench's cache after the case's prompt."""
    register()
    model = Model(f"test/{case.architecture}", network(case.architecture, "workbench"), None)
    cache = wb.cache(recipe, model)
    with torch.inference_mode():
        model.network(input_ids=torch.tensor([prompt(case.length)]), past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nearly_every_choice_is_free_of_ties(architecture: str) -> None:
    margins = np.concatenate([case.margin for case in cases(architecture)])
    assert len(margins) > 500 and (margins >= FREE).mean() > 0.97


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_is_the_one_that_kvpress_ran(architecture: str) -> None:
    """The weights to the bit, and the logits of kvpress's older transformers."""
    assert digest(network(architecture, "sdpa")) == about(architecture)["weights"]
    for length, expected in last_logits(architecture).items():
        with torch.inference_mode():
            found = network(architecture, "sdpa")(torch.tensor([prompt(length)])).logits[0, -1]
        torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-4, rtol=0)


def test_every_press_has_a_line() -> None:
    assert {case.press for architecture in ARCHITECTURES for case in cases(architecture)} == set(RECIPES)


@pytest.fixture(params=RECIPES)
def press(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_entries_stay_as_in_kvpress(press: str, architecture: str) -> None:
    compared, wrong = 0, []
    for case in cases_of(press):
        if case.architecture != architecture:
            continue
        found = READ.get(press, tokens)(prefilled(case, recipe_for(case)), case)
        assert found.sum() == case.kept.sum(), f"{case}: {found.sum()} entries, kvpress keeps {case.kept.sum()}"
        for row in np.flatnonzero(case.margin >= FREE):
            compared += 1
            if not np.array_equal(found[row], case.kept[row]):
                ours, theirs = found[row] & ~case.kept[row], case.kept[row] & ~found[row]
                wrong.append(f"{case} layer {case.layers[row]}: only ours {places(ours)}, only theirs {places(theirs)}")
    assert compared and not wrong, f"{len(wrong)} of {compared} differ\n" + "\n".join(wrong[:5])


def places(rows: np.ndarray) -> str:
    """(KV head, position) of what is set."""
    return str([tuple(map(int, at)) for at in np.argwhere(rows)][:6])


@pytest.mark.parametrize("press", SAME_SCORES)
def test_scores_are_kvpress_numbers_where_nothing_is_protected(press: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in cases_of(press):
        if case.scores is None:
            continue
        recipe = recipe_for(case)
        cls, scored = type(Recipe.parse(recipe).parts[0]), {}
        plain = cls.score

        def watched(self: Eviction, view: LayerView, plain=plain, scored=scored) -> torch.Tensor:
            scored[view.layer] = plain(self, view)
            return scored[view.layer]

        with monkeypatch.context() as patch:
            patch.setattr(cls, "score", watched)
            prefilled(case, recipe)
        for row, layer in enumerate(case.layers):
            ours = scored[layer][0]
            free = torch.isfinite(ours)
            theirs = torch.from_numpy(case.scores[row])
            assert (theirs[~free] > theirs[free].max()).all()
            torch.testing.assert_close(ours[free], theirs[free], atol=1e-6, rtol=1e-4)


def test_rotated_keys_are_those_of_key_rerotation() -> None:
    """StreamingLLM with positions assigned anew inside the cache: key i stands at position i there.

    Here all of them stand later by the number of evicted tokens, so that the next token's position is the number seen.
    """
    for case in cases_of("KeyRerotationPress(StreamingLLMPress)"):
        if case.keys is None:
            continue
        sinks = case.parameters["n_sink"]
        cache = prefilled(case, f"streaming_llm(budget={case.budget}, sinks={sinks}, rerotate=True)")
        for row, layer in enumerate(case.layers):
            found, places = cache.layers[layer].store.keys()[0], torch.arange(case.budget)
            found = cache.geometry.ropes[layer].move(found, places + case.length - case.budget, places)
            torch.testing.assert_close(found, torch.from_numpy(case.keys[row]), atol=1e-4, rtol=0)
