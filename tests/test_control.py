"""Cancelling from another thread, and the queue in front of a device."""

from __future__ import annotations

import threading
import time

import pytest

import workbench as wb
from tests.builders import build, prompt
from workbench.runs.control import DeviceQueue, device_queue
from workbench.runs.events import LaneDone, PrefillProgress, Queued, Token


def test_cancel_from_another_thread_stops_at_the_next_token_and_keeps_what_came() -> None:
    control, seen = wb.Control(), threading.Event()
    result: list[wb.compare] = []

    def run() -> None:
        result.append(
            wb.compare(
                build(),
                prompt(20),
                ["full", "knorm(budget=5)"],
                max_new_tokens=480,
                control=control,
                on_event=lambda event: seen.set() if isinstance(event, Token) and event.index == 5 else None,
            )
        )

    worker = threading.Thread(target=run)
    worker.start()
    assert seen.wait(60)
    control.cancel()
    worker.join(60)
    first, second = result[0]
    assert first.stopped == second.stopped == "cancelled"
    assert 6 <= len(first.tokens) < 480 and second.tokens == [] and second.kl is None
    assert device_queue(build().device).ahead() == 0


def test_cancel_between_two_chunks_of_the_prompt() -> None:
    control, events = wb.Control(), []
    for event in wb.stream(build(), prompt(60), ["full"], chunk=10, control=control):
        events.append(event)
        if isinstance(event, PrefillProgress) and event.done == 30:
            control.cancel()
    assert isinstance(events[-1], LaneDone) and events[-1].result.stopped == "cancelled"
    assert max(e.done for e in events if isinstance(e, PrefillProgress)) == 30


def test_teacher_forcing_is_cancelled_too() -> None:
    control = wb.Control()
    for event in wb.stream(build(), prompt(30), ["full", "knorm(budget=2)"], max_new_tokens=60, control=control):
        if isinstance(event, Token) and event.lane == 1 and event.index == 59:
            control.cancel()
    last = event
    assert isinstance(last, LaneDone) and len(last.result.tokens) == 60 and len(last.result.kl or []) < 60


def test_a_run_that_is_left_gives_the_device_back() -> None:
    events = wb.stream(build(), prompt(20), ["full"], max_new_tokens=5)
    next(events)
    assert device_queue(build().device).ahead() == 1
    events.close()
    assert device_queue(build().device).ahead() == 0


def test_the_queue_is_first_come_first_served() -> None:
    queue, order, threads = DeviceQueue(), [], []

    def wait(name: int) -> None:
        with queue.turn(wb.Control()) as granted:
            assert granted
            order.append(name)

    with queue.turn(wb.Control()):
        for name in range(6):
            thread = threading.Thread(target=wait, args=(name,))
            thread.start()
            threads.append(thread)
            deadline = time.monotonic() + 10
            while queue.ahead() < name + 2 and time.monotonic() < deadline:
                time.sleep(0.001)
        assert order == [] and queue.ahead() == 7
    for thread in threads:
        thread.join(10)
    assert order == list(range(6)) and queue.ahead() == 0


def test_one_cancelled_in_the_queue_leaves_and_the_next_gets_its_turn() -> None:
    queue, control, got = DeviceQueue(), wb.Control(), []

    def wait(own: wb.Control) -> None:
        with queue.turn(own) as granted:
            got.append(granted)

    with queue.turn(wb.Control()):
        impatient = threading.Thread(target=wait, args=(control,))
        impatient.start()
        control.cancel()
        impatient.join(10)
        assert got == [False] and queue.ahead() == 1
    wait(wb.Control())
    assert got == [False, True]


def test_an_error_inside_a_turn_gives_the_device_back() -> None:
    queue = DeviceQueue()
    with pytest.raises(ValueError), queue.turn(wb.Control()):
        raise ValueError
    assert queue.ahead() == 0


def test_two_runs_take_turns_lane_by_lane_and_say_that_they_wait() -> None:
    lanes = ["full", "knorm(budget=5)"]
    first = wb.stream(build(), prompt(20), lanes, max_new_tokens=2)
    next(first)  # holds the device
    told: list[object] = []
    second = threading.Thread(target=lambda: told.extend(wb.stream(build(), prompt(20), lanes, max_new_tokens=2)))
    second.start()
    deadline = time.monotonic() + 10
    while device_queue(build().device).ahead() < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    rest = list(first)
    second.join(60)
    assert isinstance(told[0], Queued) and told[0].ahead == 1
    assert isinstance(rest[-1], LaneDone) and isinstance(told[-1], LaneDone)
