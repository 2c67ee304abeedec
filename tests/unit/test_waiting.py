"""Calls that may never return."""

from __future__ import annotations

import time
from collections.abc import Iterator
from threading import Event

import pytest

from streamer.kernel.waiting import BoundedCalls


@pytest.fixture
def never() -> Iterator[Event]:
    """What calls wait for that do not return before the test ends."""
    event = Event()
    yield event
    event.set()


def test_a_call_that_returns() -> None:
    calls = BoundedCalls(10, 1)
    assert [calls.call(lambda n=n: n + 1) for n in range(3)] == [1, 2, 3]  # type: ignore[misc]


def test_a_call_that_fails() -> None:
    def fail() -> None:
        raise FileNotFoundError

    calls = BoundedCalls(10, 1)
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            calls.call(fail)


def test_calls_that_do_not_return(never: Event) -> None:
    """They are waited for so long, and then there are none until one has returned."""
    calls = BoundedCalls(0.05, 2)
    for _ in range(2):
        with pytest.raises(TimeoutError, match="timed out"):
            calls.call(never.wait)
    with pytest.raises(TimeoutError, match="others do not return"):
        calls.call(lambda: True)
    never.set()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            assert calls.call(lambda: True)
        except TimeoutError:
            continue
        return
    raise AssertionError("they have returned")


def test_a_result_that_comes_late_is_not_lost(never: Event) -> None:
    """Such as a descriptor, which somebody has to close."""
    late: list[bool] = []
    came = Event()

    def take(result: bool) -> None:
        late.append(result)
        came.set()

    calls = BoundedCalls(0.05, 2)
    with pytest.raises(TimeoutError):
        calls.call(never.wait, take)
    assert late == []
    never.set()
    assert came.wait(10)
    assert late == [True]
