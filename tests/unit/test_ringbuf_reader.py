"""When the reader looks, sleeps and wakes: what its callers and the sinks rely on.

The rings here are scripted, because a real one cannot be made to stay full, or to lose a race.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest

from streamer.events.batch import Batch
from streamer.events.kinds import RECORDS
from streamer.events.spans import NO_SPANS, Spans
from streamer.kernel.objects import CONTRACT
from streamer.ring.gaps import GapTracker
from streamer.ring.reader import AGAIN, LOOKS_IN_VAIN, RingReader

INTERVAL_MS = 2
WAKE = {name: number for name, number, _ in CONTRACT["enum wake"]}


class Thing(msgspec.Struct, tag_field="event", tag="file.open"):
    """An event."""


Drained = tuple[list[Thing], dict[str, int], tuple[()], bool, bool]


class ScriptedRing:
    """Holds a number of records, or never ends."""

    def __init__(self) -> None:
        self.held = 0
        self.endless = False
        self.records = 0
        self.drains = 0
        self.broken = False

    @property
    def pending(self) -> int:
        return 8 * (self.held or self.endless)

    def drain(self, _decoder: object, most: int) -> Drained:
        if self.broken:
            raise ValueError("corrupt ring")
        self.drains += 1
        count = most if self.endless else min(self.held, most)
        self.held -= 0 if self.endless else count
        self.records += count
        return [Thing()] * count, {"file.open": count}, (), bool(self.pending), False

    def next_seq(self, _cpu: int) -> int:
        return self.records + 1


class Source:
    """What a reader needs of a ring; a pipe stands for the descriptor that the kernel wakes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.wake_index = ("critical", "bulk").index(name)
        self.cpus = range(1)
        self.ring = ScriptedRing()
        self.decoder = None
        self.gaps = GapTracker()
        self.more = False
        self.fd, self._waker = os.pipe()

    def passed(self, _gaps: object) -> Spans:
        return NO_SPANS

    def wake(self) -> None:
        os.write(self._waker, b"!")

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._waker)


class Bench:
    """A reader over two scripted rings."""

    def __init__(self, max_events: int | None = None, *, sleeps: bool = True) -> None:
        self.critical, self.bulk = Source("critical"), Source("bulk")
        self.state = mmap.mmap(-1, mmap.PAGESIZE)
        self.read = 0
        self.errors: list[Exception] = []
        self.pause_after: int | None = None
        self.reader = RingReader(
            [self.critical, self.bulk],  # type: ignore[list-item]
            self.state,
            on_batch=self._on_batch,
            on_error=self.errors.append,
            poll_interval_ms=INTERVAL_MS,
            drain_records=10,
            sleeps=sleeps,
            max_events=max_events,
        )

    def _on_batch(self, batch: Batch) -> None:
        self.read += len(batch)
        if self.pause_after is not None and self.read >= self.pause_after:
            self.reader.pause()

    @property
    def asked(self) -> list[int]:
        """What the programs are asked for, per ring (enum wake)."""
        return [int.from_bytes(self.state[at : at + 4], "little") for at in (0, 4)]

    async def until_asleep(self) -> None:
        everything = [WAKE["WAKE_ANY"]] * 2
        await until(lambda: self.asked == everything and self.reader._timer is None)

    async def until_read(self, count: int) -> None:
        await until(lambda: self.read >= count)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - nothing announces what is waited for
            await asyncio.sleep(INTERVAL_MS / 1000)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    made.reader.close()
    made.critical.close()
    made.bulk.close()


async def test_an_idle_reader_sleeps_and_a_wake_up_makes_it_read(bench: Bench) -> None:
    bench.reader.start()
    await bench.until_asleep()
    bench.bulk.ring.held = 25
    bench.bulk.wake()
    await bench.until_read(25)
    assert bench.critical.ring.drains >= LOOKS_IN_VAIN


async def test_one_that_does_not_sleep_is_woken_by_a_ring_that_fills_alone() -> None:
    """Where times are coarse, when an event comes must not tell when it happened."""
    bench = Bench(sleeps=False)
    bench.reader.start()
    await until(lambda: bench.bulk.ring.drains > 4 * LOOKS_IN_VAIN)
    assert bench.asked == [WAKE["WAKE_FULL"]] * 2
    assert bench.reader._timer is not None
    bench.bulk.ring.held = 25
    await bench.until_read(25)
    bench.reader.close()
    bench.critical.close()
    bench.bulk.close()


async def test_who_drains_by_the_way_leaves_the_reader_awake(bench: Bench) -> None:
    """Else the record that would have woken it is gone, and the next ones wake nobody."""
    bench.reader.start()
    await bench.until_asleep()
    bench.bulk.ring.held = 1
    bench.reader.drain_once()
    bench.bulk.ring.held = 35  # no wake-up: the program has given the one that was asked for
    await bench.until_read(36)


async def test_a_full_ring_is_drained_once_a_turn(bench: Bench) -> None:
    """The sinks get their turn after each drain, however long the backlog lasts."""
    bench.bulk.ring.endless = True
    bench.reader.start()
    turns = 0
    deadline = asyncio.get_running_loop().time() + 0.1
    while asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0)
        turns += 1
    assert bench.bulk.ring.drains <= turns + 1


async def test_a_paused_reader_does_nothing_until_it_is_resumed(bench: Bench) -> None:
    bench.bulk.ring.endless = True
    bench.pause_after = 30
    bench.reader.start()
    await bench.until_read(30)
    drains = bench.bulk.ring.drains
    assert bench.reader._timer is None
    assert bench.asked == [WAKE["WAKE_NEVER"]] * 2
    await asyncio.sleep(10 * INTERVAL_MS / 1000)
    assert bench.bulk.ring.drains == drains
    bench.pause_after = 60
    bench.reader.resume()
    await bench.until_read(60)
    assert bench.reader.pauses == 2


async def test_nothing_brings_a_closed_reader_back(bench: Bench) -> None:
    bench.bulk.ring.endless = True
    bench.reader.start()
    await bench.until_read(10)
    bench.reader.pause()
    bench.reader.close()
    bench.reader.resume()
    read = bench.read
    assert not bench.reader.drain_once()
    await asyncio.sleep(10 * INTERVAL_MS / 1000)
    assert bench.read == read


async def test_an_unreadable_ring_is_told_once_and_ends_the_reading(bench: Bench) -> None:
    bench.reader.start()
    bench.bulk.ring.broken = True
    await until(lambda: bool(bench.errors))
    await asyncio.sleep(10 * INTERVAL_MS / 1000)
    assert [str(error) for error in bench.errors] == ["corrupt ring"]
    assert bench.reader.done


async def test_the_limit_of_events_is_exact() -> None:
    bench = Bench(max_events=23)
    bench.bulk.ring.endless = True
    bench.reader.start()
    await bench.until_read(23)
    await asyncio.sleep(10 * INTERVAL_MS / 1000)
    assert bench.read == 23
    assert bench.reader.done
    bench.reader.close()
    bench.critical.close()
    bench.bulk.close()


async def test_the_bulk_ring_is_paused_first(bench: Bench) -> None:
    """What is critical is read on, also out of sleep, until that is paused as well."""
    reader, critical, bulk = bench.reader, bench.critical, bench.bulk
    reader.start()
    await bench.until_asleep()
    reader.pause(critical=False)
    reader.pause(critical=False)
    bulk.ring.held = 35
    critical.ring.held = 35
    bulk.wake()
    critical.wake()
    await bench.until_read(35)
    os.read(critical.fd, 1)
    await until(lambda: bench.asked == [WAKE["WAKE_ANY"], WAKE["WAKE_NEVER"]])
    assert not reader.drain_once()
    assert (critical.ring.held, bulk.ring.held) == (0, 35)
    reader.pause()
    critical.ring.held = 5
    critical.wake()
    await asyncio.sleep(5 * INTERVAL_MS / 1000)
    assert not reader.drain_once()
    reader.pause(critical=False)  # another sink is full, too: no ring is read for that
    assert not reader.drain_once()
    assert (critical.ring.held, bulk.ring.held) == (5, 35)
    assert (reader.paused, reader.pauses) == (True, 1)
    critical.ring.held = 0
    reader.resume()
    await bench.until_read(70)
    assert not bench.errors


async def test_a_reader_that_sleeps_and_is_paused_is_not_woken(bench: Bench) -> None:
    """Neither do the programs wake it for nothing, nor does it read what it was to leave."""
    bench.reader.start()
    await bench.until_asleep()
    bench.reader.pause()
    assert bench.asked == [WAKE["WAKE_NEVER"]] * 2
    bench.bulk.ring.held = 5
    bench.bulk.wake()
    await asyncio.sleep(10 * INTERVAL_MS / 1000)
    assert bench.read == 0
    bench.reader.resume()
    await bench.until_read(5)


async def test_a_ring_that_is_never_empty_is_not_waited_for(bench: Bench) -> None:
    """Its descriptor stays readable, so that the loop would spin."""
    bench.reader.start()
    await bench.until_asleep()
    bench.bulk.ring.endless = True
    bench.bulk.wake()
    await bench.until_read(100)
    await asyncio.sleep(5 * INTERVAL_MS / 1000)
    asked_of_bulk = bench.asked[1]
    assert asked_of_bulk == WAKE["WAKE_NEVER"]
    assert not asyncio.get_running_loop().remove_reader(bench.bulk.fd)


async def test_a_stopped_reader_drains_only_when_asked(bench: Bench) -> None:
    bench.reader.start()
    await bench.until_asleep()
    bench.reader.stop()
    bench.bulk.ring.held = 15
    bench.bulk.wake()
    await asyncio.sleep(10 * INTERVAL_MS / 1000)
    assert bench.read == 0
    assert bench.reader.drain_once()
    await asyncio.sleep(10 * INTERVAL_MS / 1000)
    assert bench.read == 10
    bench.reader.drain_once()
    assert bench.read == 15


async def test_a_reader_that_was_not_started_does_not_look(bench: Bench) -> None:
    bench.bulk.ring.held = 15
    bench.reader.resume()
    await asyncio.sleep(10 * INTERVAL_MS / 1000)
    assert bench.read == 0


async def test_a_backlog_is_drained_without_waiting_for_the_timer(bench: Bench) -> None:
    bench.reader._interval = 60
    bench.bulk.ring.held = 1000
    bench.reader.start()
    await bench.until_read(1000)


def test_no_record_is_larger_than_what_is_mapped_again() -> None:
    assert max(record.max_size for record in RECORDS.values()) + 8 <= AGAIN
    assert AGAIN % mmap.PAGESIZE == 0
