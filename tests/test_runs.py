"""Lanes and their comparison: what is compared with what, questions, reuse of a prompt, errors, events."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import workbench as wb
from tests.builders import VOCABULARY, build, cache_for, feed, network, prompt
from workbench.models.load import Model
from workbench.runs.compare import Run
from workbench.runs.decode import Decoder, Sampling
from workbench.runs.events import CacheState, LaneDone, PrefillProgress, Probe, Token
from workbench.runs.lane import Answer, Lane
from workbench.runs.lane_run import LaneRun
from workbench.runs.reference import ReferenceAnswer
from workbench.runs.steer import RecentQueries, Steering
from workbench.strategies.base import Strategy
from workbench.strategies.eviction.base import Eviction
from workbench.strategies.recipe import Recipe
from workbench.strategies.registry import registry

KIVI = "kivi(group_size=16, residual_length=16)"
RECIPES = [
    "full",
    KIVI,
    *(f"{key}(budget=0.3)" for key, cls in registry().items() if issubclass(cls, Eviction)),
    "think",
    f"snapkv(budget=0.5, window=8) | {KIVI}",
    f"adakv(budget=0.4, window=8) | {KIVI}",
    f"{KIVI} | knorm(budget=0.5)",
]


class Words:
    """A tokenizer in which token 10 is the word w10."""

    eos_token_id = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [int(word[1:]) for word in text.split()]

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(f"w{i}" for i in ids)


@pytest.fixture
def spoken() -> Model:
    return Model("test/spoken", network("llama", "workbench"), Words())


@pytest.mark.parametrize(
    "name, chunk", [("llama", 2048), ("llama", 40), ("gemma2", 64), ("mistral-sliding", 33), ("gpt-oss", 1000)]
)
def test_reusing_a_read_prompt_gives_exactly_the_same_lanes(name: str, chunk: int) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "chunk": chunk}
    fresh, reused = (wb.compare(build(name), prompt(100), RECIPES, reuse_prompt=r, **options) for r in (False, True))
    assert [lane.prefill_reused for lane in fresh] == [False] * len(RECIPES)
    alone = {r for r in RECIPES if (recipe := Recipe.parse(r)).needs_prompt or recipe.needs_token_set}
    assert [lane.prefill_reused for lane in reused] == [i > 0 and r not in alone for i, r in enumerate(RECIPES)]
    for a, b in zip(fresh, reused):
        assert a.error is None
        assert (a.tokens, a.kept_positions, a.packed) == (b.tokens, b.kept_positions, b.packed), a.recipe
        assert a.kl == pytest.approx(b.kl, abs=1e-5), a.recipe  # a fork merges two runs of entries: float32 rounding
        assert a.drift == b.drift, a.recipe
        assert a.memory.as_dict() | {"reserved_bytes": 0} == b.memory.as_dict() | {"reserved_bytes": 0}, a.recipe


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_lane_that_changes_nothing_agrees_with_the_reference_entirely(temperature: float) -> None:
    cmp = wb.compare(
        build(), prompt(50), ["full", "full", "snapkv(budget=1.0)"], max_new_tokens=8, temperature=temperature, seed=3
    )
    for lane in cmp:
        assert lane.kl == [0.0] * 8 and lane.top1_agreement == 1.0 and lane.first_divergence is None
        assert lane.tokens == cmp[0].tokens and lane.memory.ratio == 1.0 and lane.stopped == "length"


def test_kl_is_teacher_forced_on_the_references_tokens() -> None:
    """Against a run by hand: the lane's cache is fed the reference's tokens, whatever it would have said."""
    model, ids, recipe = build(), prompt(60), "knorm(budget=10)"
    cmp = wb.compare(model, ids, ["full", recipe], max_new_tokens=8, first_token="prefill")
    assert 0 < (cmp[1].first_divergence or 0) < 8  # they part on the way, so both halves are put to the test
    logs = []
    for text in ("full", recipe):
        cache = cache_for(model, text)
        first = feed(model, cache, ids)[-1:]
        logs.append(torch.cat([first, feed(model, cache, cmp[0].tokens[:-1], 1)]).log_softmax(-1))
    expected = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    assert cmp[1].kl == pytest.approx(expected.tolist(), abs=1e-5) and min(cmp[1].kl) >= 0
    agreed = (logs[0].argmax(-1) == logs[1].argmax(-1)).float().mean()
    assert cmp[1].top1_agreement == pytest.approx(agreed.item())


@pytest.mark.parametrize(
    "ours, theirs, first",
    [
        ([5, 9, 4, 2, 7], [5, 9, 2, 2, 7], 2),
        ([5, 9], [5, 9], None),
        ([5], [5, 9], 1),
        ([5, 9, 1], [5, 9], 2),
        ([], [3], 0),
    ],
)
def test_first_divergence(ours: list[int], theirs: list[int], first: int | None) -> None:
    steering = Steering(0, False, RecentQueries(()))
    decoder = Decoder(1, build(), cache_for(build()), Sampling(), wb.Control(), Answer(tokens=ours), steering)
    decoder._reference = ReferenceAnswer(tokens=theirs)
    decoder._first_divergence()
    assert decoder.answer.first_divergence == first


def test_first_token_prefill_comes_from_the_uncompressed_prompt_and_replayed_does_not() -> None:
    model, ids, recipe = build(), prompt(60), "knorm(budget=4)"
    full = feed(model, cache_for(model), ids)[-1]
    assert wb.compare(model, ids, [recipe], max_new_tokens=1, first_token="prefill")[0].tokens == [full.argmax()]
    both = [wb.compare(model, ids, ["full", recipe], max_new_tokens=3, first_token=f) for f in ("prefill", "replayed")]
    assert both[0][1].kl[0] == 0.0 < both[1][1].kl[0]
    assert both[0][0].tokens == both[1][0].tokens  # the full cache answers the same either way
    # By hand: the last prompt token's query over what was kept (its own entry among it, or not).
    cache = cache_for(model, recipe)
    feed(model, cache, ids)
    with cache.replay(), torch.inference_mode():
        again = model.network(
            torch.tensor([ids[-1:]]), position_ids=torch.tensor([[59]]), past_key_values=cache
        ).logits[0, -1]
    assert both[1][1].tokens[0] == again.argmax() and cache.get_seq_length() == 60
    assert cache.layers[0].store.lengths == [4, 4]  # nothing was appended


def test_questions_each_start_from_the_compressed_context(spoken: Model) -> None:
    questions, recipe = ["w7 w8 w9", "w20", "w7 w8 w9"], f"snapkv(budget=0.4, window=8) | {KIVI}"
    for reuse in (False, True):
        cmp = wb.compare(spoken, prompt(60), ["full", recipe], question=questions, max_new_tokens=6, reuse_prompt=reuse)
        for lane in cmp:
            assert [answer.question for answer in lane.answers] == questions
            assert lane.answers[0].tokens == lane.answers[2].tokens
            assert lane.answers[0].kl == pytest.approx(lane.answers[2].kl, abs=1e-5)
            for text, answer in zip(questions, lane.answers):
                alone = wb.compare(spoken, prompt(60), [lane.recipe], question=text, max_new_tokens=6)[0]
                assert alone.tokens == answer.tokens
        cache = cache_for(spoken, recipe, 60)
        feed(spoken, cache, prompt(60))
        logits = feed(spoken, cache, [7, 8, 9])[-1]
        assert cmp[1].answers[0].tokens[0] == logits.argmax()
        assert cmp[1].as_dict()["answers"][1]["question"] == "w20"


def test_events_tell_the_run_in_order() -> None:
    events = list(wb.stream(build(), prompt(50), ["full", "knorm(budget=9)"], max_new_tokens=3, chunk=20))
    assert [(type(e).__name__, e.lane) for e in events if e.lane == 1] == [
        *[("PrefillProgress", 1)] * 3,
        ("CacheState", 1),
        ("Probe", 1),
        *[("Token", 1)] * 3,
        ("Probe", 1),
        ("CacheState", 1),
        ("LaneDone", 1),
    ]
    done = [e for e in events if isinstance(e, LaneDone)]
    assert [e.done for e in events if isinstance(e, PrefillProgress)] == [20, 40, 50] * 2
    assert [e.token for e in events if isinstance(e, Token) and e.lane == 1] == done[1].result.tokens
    assert [e.name for e in events if isinstance(e, Probe) and e.lane == 1] == ["drift", "kl"]
    state = next(e for e in events if isinstance(e, CacheState) and e.lane == 1)
    assert state.memory.used_bytes == done[1].result.memory.used_bytes and len(state.kept[0][0]) == 9


@pytest.mark.parametrize("reference", [0, 1])
def test_bytes_are_set_against_the_references(reference: int) -> None:
    cmp = wb.compare(build(), prompt(64), ["full", "knorm(budget=16)"], max_new_tokens=3, reference=reference)
    full, evicted = cmp[0].memory, cmp[1].memory
    assert full.used_bytes == 64 * build().geometry.bytes_per_token == sum(full.by_layer) == sum(full.by_kind.values())
    assert evicted.used_bytes == 16 * build().geometry.bytes_per_token + evicted.by_kind["positions"]
    assert evicted.by_kind["positions"] == 16 * 4 * 2 * 3
    assert full.used_bytes + 2 * build().geometry.bytes_per_token == full.final_bytes == full.peak_bytes
    # Only one layer is ever uncompressed: two evicted layers and a whole one.
    assert evicted.peak_bytes == (full.used_bytes + 2 * evicted.used_bytes) // 3
    assert [cmp[0].memory.reference_bytes, cmp[1].memory.reference_bytes] == [cmp[reference].memory.used_bytes] * 2
    assert sum(map(sum, evicted.by_head)) == evicted.used_bytes


class Failing(Strategy):
    key, title, summary, family = "failing", "Failing", "Fails.", "eviction"

    def after_prefill(self, view: Any) -> None:
        raise wb.WorkbenchError("It fails on purpose; use another.")


@pytest.mark.parametrize("reference", [0, 1])
@pytest.mark.parametrize("reuse", [False, True])
def test_an_error_in_one_lane_leaves_the_others_usable(
    reference: int, reuse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry(), "failing", Failing)
    recipes = ["full", "failing", "knorm(budget=9)"]
    cmp = wb.compare(build(), prompt(40), recipes, max_new_tokens=4, reference=reference, reuse_prompt=reuse)
    assert cmp[1].error == "It fails on purpose; use another." and cmp[1].stopped == "error"
    assert cmp[0].stopped == cmp[2].stopped == "length" and len(cmp[2].tokens) == 4
    assert (cmp[2].kl is None) == (reference == 1)
    assert wb.compare(build(), prompt(40), ["full"], max_new_tokens=4)[0].tokens == cmp[0].tokens  # the device is free
    repr(cmp), cmp.as_dict()


def test_logits_that_are_not_numbers_end_the_lane_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import workbench.runs.lane_run as lane_run

    real = lane_run.forward
    broken = [False]
    monkeypatch.setattr(lane_run, "forward", lambda *a: real(*a) * (torch.nan if broken[0] else 1.0))
    run = Run(build(), prompt(20), ["full", "knorm(budget=4)"], max_new_tokens=2)
    for number in (0, 1):
        broken[0] = number == 1
        list(LaneRun(run, number).events())
    assert run.lanes[0].error is None and "NaN" in (run.lanes[1].error or "")


def test_generation_ends_at_the_end_token_and_at_the_models_last_position() -> None:
    model = build()
    free = wb.compare(model, prompt(500), ["full"], max_new_tokens=64)[0]
    assert len(free.tokens) == 512 - 500 and free.stopped == "length"
    model.network.generation_config.eos_token_id = [free.tokens[2], VOCABULARY]
    try:
        stopped = wb.compare(model, prompt(500), ["full", "knorm(budget=400)"], max_new_tokens=64)
    finally:
        model.network.generation_config.eos_token_id = None
    end = free.tokens.index(free.tokens[2]) + 1
    assert stopped[0].tokens == free.tokens[:end] and stopped[0].stopped == "eos" and len(stopped[1].kl) == end


@pytest.mark.parametrize(
    "given, says",
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [97]}, "ids from 0 to 96"),
        ({"prompt": [1.5]}, "1.5"),
        ({"prompt": "text"}, "no tokenizer"),
        ({"prompt": [5] * 512}, "at most 512"),
        ({"lanes": []}, "no lane"),
        ({"lanes": ["full", "snapkw"]}, "snapkv"),
        ({"reference": 2}, "lanes 0 to 0"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"chunk": 0}, "chunk"),
        ({"first_token": "x"}, "'prefill'"),
        ({"probes": ["x"]}, "drift and attention"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(given: dict[str, Any], says: str) -> None:
    arguments = {"prompt": [5, 6], "lanes": ["full"], **given}
    with pytest.raises(wb.WorkbenchError) as caught:
        wb.compare(build(), **arguments)
    assert says in str(caught.value)


def test_kept_of_a_lane_and_its_json() -> None:
    lane = wb.compare(build(), prompt(40), ["knorm(budget=9)"], max_new_tokens=2)[0]
    assert len(lane.kept(2, 1)) == 9 and lane.as_dict(kept=False)["kept"] is None
    with pytest.raises(wb.WorkbenchError, match="no layer 3"):
        lane.kept(3, 0)
    assert not math.isnan(lane.kl_mean) and Lane("full", "full").kl_mean is None
