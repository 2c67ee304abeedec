"""Times that nothing older follows: taken before programs ended, told when all theirs has come."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import Mapping, Sequence

import pytest

from streamer.agent.watermarks import Watermarks
from streamer.kernel.grace_period import wait_for_programs


class Numbers:
    """What the kernel has numbered, of a ring on two CPUs; programs end when they are let."""

    def __init__(self) -> None:
        self.taken = [0, 0]
        self.ended = threading.Event()
        self.asked = 0

    def read(self) -> Mapping[str, Sequence[int]]:
        return {"bulk": list(self.taken)}

    def wait(self) -> None:
        self.asked += 1
        assert self.ended.wait(30)


def now() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


async def until_noted(marks: Watermarks) -> None:
    async with asyncio.timeout(30):
        while marks.noting:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def noted(marks: Watermarks, numbers: Numbers) -> tuple[int, int]:
    """Note a time, and between which times that was."""
    numbers.ended.set()
    before, asked = now(), numbers.asked
    marks.tick()
    await until_noted(marks)
    assert numbers.asked == asked + 1
    return before, now()


async def test_the_time_is_of_before_the_programs_ended_and_the_numbers_of_after() -> None:
    numbers = Numbers()
    marks = Watermarks(numbers.read, numbers.wait)
    before = now()
    marks.tick()
    await asyncio.sleep(0.02)
    meanwhile = now()
    numbers.taken = [3, 0]  # of programs that had begun
    marks.advance({("bulk", 0): 3})
    assert marks.of("bulk", 0) == 0  # they have not ended
    numbers.ended.set()
    await until_noted(marks)
    marks.advance({("bulk", 0): 2})
    assert marks.of("bulk", 0) == 0  # the third has not come
    assert before < marks.of("bulk", 1) < meanwhile  # nothing was numbered there
    marks.advance({("bulk", 0): 3})
    assert before < marks.of("bulk", 0) < meanwhile


async def test_the_newest_time_of_which_all_has_come() -> None:
    numbers = Numbers()
    marks = Watermarks(numbers.read, numbers.wait)
    times = []
    for taken in (5, 7, 9):
        numbers.taken = [taken, 0]
        times.append(await noted(marks, numbers))
    marks.advance({("bulk", 0): 8})
    assert times[1][0] <= marks.of("bulk", 0) <= times[1][1]
    assert times[2][0] <= marks.of("bulk", 1) <= times[2][1]
    marks.advance({("bulk", 0): 9})
    assert times[2][0] <= marks.of("bulk", 0) <= times[2][1]


async def test_numbers_that_are_read_minutes_late_still_get_their_times() -> None:
    """Though by then more times were noted than are kept."""
    numbers = Numbers()
    marks = Watermarks(numbers.read, numbers.wait)
    late, seconds = 100, 400
    told = []
    for second in range(seconds):
        numbers.taken = [second, second]
        await noted(marks, numbers)
        marks.advance({("bulk", cpu): max(second - late, 0) for cpu in range(2)})
        told.append(marks.of("bulk", 0))
    assert told == sorted(told)
    assert len(set(told[2 * late :])) > 20


async def test_the_oldest_time_is_kept_until_all_of_before_it_has_come() -> None:
    """However many are noted meanwhile: else one who reads late enough would never know any."""
    numbers = Numbers()
    marks = Watermarks(numbers.read, numbers.wait)
    numbers.taken = [1, 1]
    before, after = await noted(marks, numbers)
    for second in range(2, 200):
        numbers.taken = [second, second]
        await noted(marks, numbers)
        marks.advance({})
    assert len(marks._noted) <= 64, "and room is taken for so many"
    marks.advance({("bulk", 0): 1})
    assert before <= marks.of("bulk", 0) <= after
    assert marks.of("bulk", 1) == 0


async def test_one_is_noted_at_a_time() -> None:
    numbers = Numbers()
    marks = Watermarks(numbers.read, numbers.wait)
    marks.tick()
    await asyncio.sleep(0.02)
    marks.tick()
    numbers.ended.set()
    await until_noted(marks)
    assert numbers.asked == 1


async def test_at_the_end_of_all_that_has_come() -> None:
    numbers = Numbers()
    marks = Watermarks(numbers.read, numbers.wait)
    numbers.taken = [5, 6]
    before = now()
    marks.end({("bulk", 0): 5, ("bulk", 1): 5})
    assert (before < marks.of("bulk", 0) < now(), marks.of("bulk", 1)) == (True, 0)


async def test_a_kernel_that_cannot_tell_is_asked_once(caplog: pytest.LogCaptureFixture) -> None:
    asked = 0

    def refuse() -> None:
        nonlocal asked
        asked += 1
        raise OSError(errno.EINVAL, "")

    marks = Watermarks(lambda: {"bulk": [1]}, refuse)
    for _ in range(3):
        marks.tick()
        await until_noted(marks)
        marks.advance({("bulk", 0): 1})
    assert (asked, marks.of("bulk", 0)) == (1, 0)
    assert "no watermarks" in caplog.text
    assert "EINVAL" in caplog.text


def test_the_kernel_waits() -> None:
    wait_for_programs()
