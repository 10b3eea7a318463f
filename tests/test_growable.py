"""Growable and Residual against plain concatenation, with clones that go their own way."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench.cache.growable import Growable, Residual

ACTIONS = st.lists(st.tuples(st.sampled_from(["append", "append", "clone", "after"]), st.integers(0, 90)), max_size=12)


def rows(count: int, tag: float) -> Tensor:
    return tag + torch.arange(count * 6, dtype=torch.float32).view(1, 2, count, 3)


def bytes_of(x: Tensor) -> int:
    return x.numel() * x.element_size()


@settings(deadline=None, max_examples=60)
@given(ACTIONS, st.integers(0, 200))
def test_growable_holds_what_was_appended_and_clones_do_not_see_each_other(actions: list, reserved: int) -> None:
    tag = 0.0
    first = Growable()
    first.reserve(rows(1, 0.0), reserved)
    alive: list[tuple[Growable, Tensor]] = [(first, rows(0, 0.0))]
    for turn, (action, number) in enumerate(actions):
        which = turn % len(alive)
        held, model = alive[which]
        if action == "append":
            tag += 1000.0
            new = rows(number, tag)
            held.append(new)
            alive[which] = (held, torch.cat([model, new], 2))
            new.fill_(torch.nan)  # what was appended is a copy
        elif action == "clone":
            alive.append((held.clone(), model))
        elif held.length:
            start = min(number, held.length)
            alive[which] = (held.after(start), model[:, :, start:])
        for each, expected in alive:
            assert each.length == expected.shape[2]
            assert each.nbytes() == bytes_of(expected)
            if each.length:
                assert torch.equal(torch.cat(each.blocks(), 2), expected)
                middle = each.length // 2
                assert torch.equal(each.read(middle, each.length), expected[:, :, middle:])
                assert torch.equal(each.read(0, middle), expected[:, :, :middle])


def test_appending_is_amortised() -> None:
    held, moved = Growable(), 0
    for turn in range(4000):
        before = held.blocks()[0].data_ptr() if turn else 0
        held.append(rows(1, 0.0))
        moved += turn * (held.blocks()[0].data_ptr() != before)
    assert moved < 4000 * 25  # each row is copied a bounded number of times, not once per append
    assert held.reserved_bytes() <= held.nbytes() // 8


def test_fork_at_8k_tokens_allocates_under_5_percent() -> None:
    held = Growable()
    held.append(torch.zeros(1, 2, 8192, 16))
    twin = held.clone()
    twin.append(torch.ones(1, 2, 1, 16))
    held.append(torch.full((1, 2, 1, 16), 2.0))
    fresh = [b for b in twin.blocks() if b.data_ptr() != held.blocks()[0].data_ptr()]
    allocated = sum(b.untyped_storage().nbytes() for b in fresh)
    assert len(fresh) == 1 and allocated < 0.05 * held.nbytes()
    assert twin.read(8192, 8193).unique().tolist() == [1.0]
    assert held.read(8192, 8193).unique().tolist() == [2.0]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=15), st.integers(1, 32))
def test_residual_is_a_queue(actions: list, capacity: int) -> None:
    held, expected = Residual(capacity), rows(0, 0.0)
    held.append(expected)
    for turn, (take, number) in enumerate(actions):
        if take:
            number = min(number, held.length)
            assert torch.equal(held.pop_front(number), expected[:, :, :number])
            expected = expected[:, :, number:]
        else:
            new = rows(number, 1000.0 * turn)
            twin = held.clone()
            held.append(new)
            assert torch.equal(twin.view(), expected)
            expected = torch.cat([expected, new], 2)
        assert held.length == expected.shape[2] and torch.equal(held.view(), expected)
        assert held.nbytes() == bytes_of(expected)
