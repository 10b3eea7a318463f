"""One-token queries attend to coded entries as they are held; what they see is what decoding them gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import build, cache_for, feed, prompt
from workbench.cache import coded
from workbench.cache.coded import CodedSegment, PairCodec
from workbench.cache.fused import attend_held
from workbench.cache.schemes.base import Scheme, Verbatim
from workbench.cache.schemes.bitmap import Bitmap
from workbench.cache.schemes.recovered import Recovered
from workbench.cache.schemes.rtn import PerChannel, PerToken
from workbench.cache.segments import Query
from workbench.cache.sides import Flush
from workbench_kernels import attention_reference, merge_partials

WIDTH = 64
SCHEMES: dict[str, tuple[Scheme, Scheme]] = {
    "kivi": (PerChannel(2, 32), PerToken(4, 32)),
    "per token": (PerToken(4, 16), PerToken(8, 64)),
    "per channel": (PerChannel(4, 16), PerChannel(2, 32)),
    "bitmaps": (Bitmap(0.5, True, WIDTH), Bitmap(0.7, False, WIDTH)),
}


def segment_of(
    schemes: tuple[Scheme, Scheme], tokens: int, flushes: tuple[Flush, Flush], later: int = 0, batch: int = 1
) -> CodedSegment:
    made = torch.Generator().manual_seed(tokens)
    k, v = torch.randn(2, batch, 2, tokens, WIDTH, generator=made)
    segment = PairCodec(*schemes, *flushes).encode(k, v, None, 0)
    for _ in range(later):
        k, v = torch.randn(2, batch, 2, 1, WIDTH, generator=made)
        segment.append(k, v, segment.length)
        segment.settle()
    return segment


def query(segment: CodedSegment, own: bool = True, **more: Any) -> Query:
    q = torch.randn(segment.batch, 6, 1, WIDTH, generator=torch.Generator().manual_seed(7))
    return Query(q, segment.length - 1, own, 0.2, **more)


def assert_attends(segment: CodedSegment, asked: Query) -> None:
    expected = attention_reference(asked.q, segment.keys(), segment.values(), asked.scale, softcap=asked.softcap)
    for found, wanted in zip(segment.attend(asked), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_fused_attention_is_that_of_the_decoded_entries(name: str, own: bool, batch: int) -> None:
    segment = segment_of(SCHEMES[name], 400, (Flush(every=64, keep=16),) * 2, later=70, batch=batch)
    asked = query(segment, own)
    _, covered = attend_held(asked, segment.key_side, segment.value_side)
    assert covered == segment.key_side.coded == 448
    assert_attends(segment, asked)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["kivi", "per token", "per channel", "bitmaps"]),
    st.integers(1, 300),
    st.sampled_from([(Flush(every=64), Flush(every=64)), (Flush(every=128), Flush(every=64, keep=64))]),
    st.integers(0, 70),
)
def test_any_length_and_sides_that_leave_their_residual_at_different_times(
    name: str, tokens: int, flushes: tuple[Flush, Flush], later: int
) -> None:
    assert_attends(segment := segment_of(SCHEMES[name], tokens, flushes, later), query(segment))


def test_keys_that_left_before_their_values_are_decoded() -> None:
    """KIVI: 256 keys and 172 values of 300 tokens are coded."""
    segment = segment_of(SCHEMES["kivi"], 300, (Flush(every=128), Flush(keep=128)))
    parts, covered = attend_held(query(segment), segment.key_side, segment.value_side)
    assert covered == 172 and len(parts) == 1
    assert_attends(segment, query(segment))


@pytest.mark.parametrize(
    "schemes",
    [
        (Verbatim("keys"), PerToken(4, 32)),
        (Recovered(PerChannel(4, 32), 0.1, 2, 2, True), PerToken(4, 32)),
        (PerToken(2, 8), PerToken(4, 32)),  # 16 bits a group: half a word
        (PerChannel(4, 32), Bitmap(0.5, False, WIDTH)),
    ],
    ids=["as they are", "with corrections", "half words", "mixed"],
)
def test_what_no_kernel_reads_is_decoded(schemes: tuple[Scheme, Scheme]) -> None:
    segment = segment_of(schemes, 256, (Flush(every=64),) * 2)
    assert attend_held(query(segment), segment.key_side, segment.value_side) == ([], 0)
    assert_attends(segment, query(segment))


def test_soft_capped_logits() -> None:
    for name, covered in (("kivi", 256), ("bitmaps", 0)):
        segment = segment_of(SCHEMES[name], 256, (Flush(every=64),) * 2)
        asked = query(segment, softcap=2.0)
        assert attend_held(asked, segment.key_side, segment.value_side)[1] == covered
        assert_attends(segment, asked)


def test_several_queries_windows_and_padding_are_answered_by_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Any:
        raise AssertionError("not for the fused path")

    segment = segment_of(SCHEMES["kivi"], 256, (Flush(every=64),) * 2)
    segment.append(*torch.randn(2, 1, 2, 3, WIDTH), 256)
    monkeypatch.setattr(coded, "attend_held", refuse)
    q = torch.randn(1, 6, 3, WIDTH)
    segment.attend(Query(q, 256, True, 0.2))
    segment.attend(Query(q[:, :, :1], 258, False, 0.2, window=40))
    segment.attend(Query(q[:, :, :1], 258, False, 0.2, padding=torch.ones(1, 259, dtype=torch.bool)))


@pytest.mark.parametrize("recipe", ["kivi(group_size=16, residual_length=16)", "rtn(group_size=16)"])
def test_generated_logits_are_those_of_decoding_first(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, later = build(), prompt(120), prompt(30, seed=1)
    fused = cache_for(model, recipe)
    feed(model, fused, ids)
    said = feed(model, fused, later, 1)
    monkeypatch.setattr(coded, "attend_held", lambda *_: ([], 0))
    decoded = cache_for(model, recipe)
    feed(model, decoded, ids)
    torch.testing.assert_close(said, feed(model, decoded, later, 1), atol=1e-3, rtol=1e-3)


def test_parts_of_a_fork_are_read_where_they_lie() -> None:
    segment = segment_of(SCHEMES["kivi"], 300, (Flush(every=64),) * 2, later=10)
    twin = segment.clone()
    for _ in range(70):
        twin.append(*torch.randn(2, 1, 2, 1, WIDTH), twin.length)
        twin.settle()
    assert_attends(twin, query(twin))
    parts, _ = attend_held(query(segment), segment.key_side, segment.value_side)
    rest = attention_reference(query(segment).q, segment.keys(256), segment.values(256), 0.2)
    torch.testing.assert_close(
        merge_partials([*parts, rest])[0], segment.attend(query(segment))[0], atol=1e-6, rtol=1e-5
    )
