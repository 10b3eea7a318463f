"""wb.inspect: counts, rows and tiles of a model's attention equal the full matrix on short prompts."""

from __future__ import annotations

import functools
import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import workbench as wb
from tests.builders import EAGER, build, cache_for, feed, network, prompt
from workbench.errors import WorkbenchError
from workbench.inspection import queries as queries_module
from workbench.inspection.trace import AttentionTrace
from workbench.runs.control import Control
from workbench_kernels.codes import decode_weights, encode_weights

TOKENS = 150


@functools.cache
def attentions(name: str, tokens: int = TOKENS) -> Tensor:
    """What transformers' own eager attention says: [L, Hq, T, T]."""
    with torch.inference_mode():
        out = network(name, "eager")(input_ids=torch.tensor([prompt(tokens)]), output_attentions=True)
    return torch.cat(out.attentions)


@functools.cache
def traced(name: str, tokens: int = TOKENS) -> AttentionTrace:
    return wb.inspect(build(name), prompt(tokens), chunk=64)


@functools.cache
def sparse(name: str) -> AttentionTrace:
    """A trace that holds few queries, so that most are computed again."""
    with patch.object(queries_module, "HELD_BYTES", 0), patch.object(queries_module, "LAST", 5):
        return wb.inspect(build(name), prompt(TOKENS), chunk=64)


NAMES = ["llama", "mistral-sliding", "gemma2", "gpt2", "gpt-oss", "gpt-neox", "qwen3"]


@pytest.mark.parametrize("name", NAMES)
def test_the_counts_are_those_of_the_models_own_attention(name: str) -> None:
    trace, exact = traced(name), attentions(name)
    for layer in trace.layers:
        torch.testing.assert_close(trace.column_mass(layer), exact[layer].sum(1), atol=2e-3, rtol=1e-3)
        if name not in EAGER:  # GPT-OSS's sinks take a share that is an outcome of its own
            entropy = torch.special.entr(exact[layer]).sum(-1).mean(-1)
            torch.testing.assert_close(trace.entropy()[layer], entropy, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(
            trace.sink_mass()[layer], exact[layer][..., :4].sum(-1).mean(-1), atol=1e-4, rtol=1e-3
        )
        assert torch.equal(trace.map(layer, 0) == 0, exact[layer, 0] == 0)  # 150 tokens: a cell is one weight
        shown = decode_weights(trace.map(layer, 1))
        torch.testing.assert_close(shown, exact[layer, 1].clamp_min(1e-6) * (shown > 0), atol=1e-6, rtol=0.04)
    assert trace.cell == 1 and torch.allclose(trace.distance_mass().sum(-1), exact.sum(-1).mean(-1), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_exact_held_or_computed_again(name: str) -> None:
    at = [0, 149, 7, 80, 7]
    for trace in (traced(name), sparse(name)):
        for layer in range(3):
            got = trace.rows(layer, 2, at)
            torch.testing.assert_close(got, attentions(name)[layer, 2, at], atol=1e-4, rtol=1e-3)
    assert sparse(name).nbytes()["queries"] < traced(name).nbytes()["queries"]
    assert sparse(name).nbytes()["queries_again"] > 0 == traced(name).nbytes()["queries_again"]


def test_inspecting_does_not_change_what_the_model_computes_or_the_cache() -> None:
    trace = traced("llama")
    plain = cache_for(build(), "full", TOKENS)
    feed(build(), plain, prompt(TOKENS), 64)
    ours, theirs = trace.cache.layers[2].store.keys(), plain.layers[2].store.keys()
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    before = trace.cache.memory().used_bytes
    sparse("llama").rows(2, 0, [3])
    assert trace.cache.memory().used_bytes == before == plain.memory().used_bytes
    assert trace.cache.get_seq_length() == TOKENS and not trace.cache.probes and trace.cache.reader is None


@settings(deadline=None, max_examples=60)
@given(
    q=st.tuples(st.integers(0, TOKENS - 1), st.integers(1, TOKENS)).filter(lambda v: v[0] < v[1]),
    k=st.tuples(st.integers(0, TOKENS - 1), st.integers(1, TOKENS)).filter(lambda v: v[0] < v[1]),
    height=st.integers(1, 160),
    width=st.integers(1, 160),
    reduce=st.sampled_from(["max", "mean"]),
    name=st.sampled_from(["llama", "mistral-sliding"]),
    few=st.booleans(),
    layer=st.integers(0, 2),
)
def test_a_tile_is_the_pooled_exact_matrix(
    q: tuple[int, int], k: tuple[int, int], height: int, width: int, reduce: str, name: str, few: bool, layer: int
) -> None:
    tile = (sparse if few else traced)(name).tile(layer, 3, *q, *k, height, width, reduce)  # type: ignore[arg-type]
    weights = attentions(name)[layer, 3].double()
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    visible = (distance >= 0) & (distance < (8 if name == "mistral-sliding" else TOKENS))
    lines, columns = tile.codes.shape
    assert lines <= height and columns <= width and not tile.sampled and tile.rows == q[1] - q[0]
    for a in range(lines):
        for b in range(columns):
            rows = slice(q[0] + a * tile.queries_per_line, min(q[1], q[0] + (a + 1) * tile.queries_per_line))
            keys = slice(k[0] + b * tile.keys_per_column, min(k[1], k[0] + (b + 1) * tile.keys_per_column))
            part, seen = weights[rows, keys], visible[rows, keys]
            if not seen.any():
                assert tile.codes[a, b] == 0
                continue
            wanted = part.max() if reduce == "max" else part.sum() / seen.sum()
            assert abs(int(tile.codes[a, b]) - int(encode_weights(wanted[None])[0])) <= 1
    single = tile.keys_per_column == tile.queries_per_line == 1
    assert tile.exact == single and tile.level == (4 if single else 3) and (tile.badge == "exact") == single


def test_beyond_the_budget_rows_are_sampled_and_the_tile_says_so() -> None:
    trace = traced("llama")
    full = trace.tile(1, 0, 0, 150, 0, 150, 10, 150)
    some = trace.tile(1, 0, 0, 150, 0, 150, 10, 150, budget=150 * 16 * 20, always=[33])
    assert full.rows == 150 and not full.sampled and full.badge == "15 rows/line"
    assert some.sampled and 64 + 10 <= some.rows < 150 and some.badge == f"rows sampled: {some.rows} of 150"
    assert some.codes.shape == full.codes.shape == (10, 150)
    assert bool((some.codes <= full.codes).all())  # a largest weight of fewer rows
    assert torch.equal(some.codes[-4:], full.codes[-4:])  # the last 64 rows are always there
    row = encode_weights(trace.rows(1, 0, [33])[0])[:34]
    assert bool((some.codes[2, :34] >= row).all())  # so is the one that was asked for
    first = trace.tile(1, 0, 0, 80, 0, 150, 64, 150, rows=8)
    assert first.rows <= 8 and first.codes.shape[0] <= 8 and first.sampled
    assert trace.tile(1, 0, 0, 150, 0, 150, 10, 150) is full


def test_computing_queries_again_costs_and_is_counted() -> None:
    trace = sparse.__wrapped__("llama")  # one of its own: nothing was computed again yet
    assert trace.queries.cost(0) == 0 < trace.queries.cost(1) < trace.queries.cost(2)
    cheap = trace.tile(2, 1, 0, 80, 0, 150, 80, 150, budget=trace.queries.cost(2))
    assert cheap.sampled and 1 <= cheap.rows <= 10


def test_the_needle_is_the_top_source() -> None:
    trace, exact = traced("llama"), attentions("llama")
    for head, found in enumerate(trace.top(2, 140, 3)):
        strongest = exact[2, head, 140].topk(3)
        assert [at for at, _ in found] == strongest.indices.tolist()
        assert [weight for _, weight in found] == pytest.approx(strongest.values.tolist(), rel=1e-3)
    assert len(trace.top(0, 1)[0]) == 2  # as many as there are


def test_retained_mass_of_a_kept_set_for_all_queries_and_for_one() -> None:
    trace, exact = traced("llama"), attentions("llama")
    cmp = wb.compare(build(), prompt(TOKENS), ["full", "snapkv(budget=30, window=8)"], max_new_tokens=1)
    kept = cmp[1].kept_positions
    for layer in range(3):
        for head in range(4):
            mine = kept[layer][head // 2]
            wanted = exact[layer, head][:, mine].sum() / TOKENS
            assert trace.retained(kept)[layer, head] == pytest.approx(float(wanted), rel=1e-3)
            one = exact[layer, head, 149, mine].sum()
            assert trace.retained(kept, query=149)[layer, head] == pytest.approx(float(one), rel=1e-3)
    torch.testing.assert_close(trace.retained(cmp[0].kept_positions), torch.ones(3, 4))


def test_thumbnails_keep_the_largest() -> None:
    trace = traced("llama")
    small = trace.thumbnails(32)
    assert small.shape == (3, 4, 30, 30) and small.dtype == torch.uint8
    assert small[1, 2, 29].max() == trace.map(1, 2)[145:].max()


def test_chosen_layers_alone_are_counted_and_tiles_of_all_can_be_had() -> None:
    trace = wb.inspect(build(), prompt(TOKENS), layers=[1])
    assert trace.layers == [1] and trace.entropy().shape == (1, 4)
    assert torch.equal(trace.tile(1, 0, 0, 9, 0, 9).codes, traced("llama").tile(1, 0, 0, 9, 0, 9).codes)
    assert torch.equal(trace.tile(2, 0, 0, 9, 0, 9).codes, traced("llama").tile(2, 0, 0, 9, 0, 9).codes)
    with pytest.raises(WorkbenchError, match=r"Layer 2 was not counted.*layers=\[2\]"):
        trace.map(2, 0)


def test_a_trace_is_small_and_says_what_it_holds() -> None:
    trace = traced("llama")
    held = trace.nbytes()
    assert held["counts"] == sum(trace.counts(n).nbytes() for n in trace.layers)
    assert held["queries"] == 3 * (4 * TOKENS * 16 * 4 + TOKENS * 8)
    assert held["cache"] == 3 * 2 * 2 * TOKENS * 16 * 4
    assert "150 tokens, 3 of 3 layers" in repr(trace)
    data = trace.as_dict()
    assert data["prompt_tokens"] == TOKENS and data["sampled"] is False
    assert len(data["top_of_last"]) == 3 and len(data["top_tokens"][0]) == 4
    assert math.isclose(sum(data["distance_mass"][0][0]), 1.0, abs_tol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((3, 0, 0, 9, 0, 9), "no layer 3 with query head 0"),
        ((0, 4, 0, 9, 0, 9), "no layer 0 with query head 4"),
        ((0, 0, 0, 151, 0, 9), "no part of a prompt of 150 tokens"),
        ((0, 0, 5, 5, 0, 9), "no part of a prompt"),
        ((0, 0, 0, 9, -1, 9), "no part of a prompt"),
        ((0, 0, 0, 9, 0, 9, 0, 5), "at least one cell"),
        ((0, 0, 0, 9, 0, 9, 5, 5, "sum"), "'max' or 'mean', got 'sum'"),
    ],
)
def test_a_viewport_outside_the_prompt_is_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        traced("llama").tile(*arguments)  # type: ignore[arg-type]


def test_bad_input_is_refused_before_anything_runs() -> None:
    model = build()
    for options, message in (
        ({"layers": [3]}, "from 0 to 2"),
        ({"layers": []}, "at least one"),
        ({"sinks": -1}, "sinks must be at least 0"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            wb.inspect(model, prompt(9), **options)  # type: ignore[arg-type]
    with pytest.raises(WorkbenchError, match="at most 512"):
        wb.inspect(model, prompt(513))
    with pytest.raises(WorkbenchError, match="positions in the prompt"):
        traced("llama").rows(0, 0, [150])


def test_progress_and_cancel() -> None:
    seen: list[tuple[int, int]] = []
    control = Control()

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if done >= 100:
            control.cancel()

    with pytest.raises(WorkbenchError, match="was cancelled"):
        wb.inspect(build(), prompt(TOKENS), chunk=50, on_progress=progress, control=control)
    assert seen == [(50, 150), (100, 150)]
