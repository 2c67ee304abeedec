"""Sinks that are exchanged while a service runs: who gets what, and what is told of it."""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from typing import Any

import msgspec

from streamer.agent.service import Change
from streamer.config.settings import Filters, Settings, StdoutSink
from streamer.errors import SinkError
from streamer.events.batch import kind_of
from streamer.sinks.base import Sink
from streamer.sinks.memory import MemorySink
from tests.memory_kernel import MemoryPrograms
from tests.unit.test_service import ALL, GENERATION_AT, Run, Runs, runs, until

__all__ = ["runs"]


def change(run: Run, *sinks: Sink, settings: Settings | None = None, **more: Any) -> None:
    chosen = tuple(StdoutSink() for _ in sinks)
    settings = msgspec.structs.replace(settings or run.service.settings, sinks=chosen)
    run.service.adopt(Change(settings, ALL, list(sinks), ("sinks",), **more))


def kinds(sink: MemorySink) -> list[str]:
    return [kind_of(event) for event in sink.events]


class Slow(MemorySink):
    """Ends when it is told to, or when its time is over."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.may_end = asyncio.Event()

    async def stop(self, grace: float) -> None:
        try:
            async with asyncio.timeout(grace):
                await self.may_end.wait()
            self.hold = False
        except TimeoutError:
            pass
        finally:
            await super().stop(0)


async def test_a_new_sink_begins_with_a_manifest(runs: Runs) -> None:
    one, two = MemorySink("one"), MemorySink("two")
    run = runs(one)
    await run.start()
    run.programs.emit("process.exec", 3)
    await until(lambda: one.account.delivered["process.exec"] == 3)
    await two.start()
    change(run, one, two)
    run.programs.emit("process.exec", 2)
    await until(lambda: one.account.delivered["process.exec"] == 5)
    assert kinds(two) == ["stream.manifest", "process.exec", "process.exec"]
    (_, manifest) = run.of("stream.manifest", one)
    assert manifest.sinks == ["one", "two"]
    assert manifest.changes == ["sinks"]
    assert manifest.since_boot_ns > 0
    await run.stop()


async def test_a_sink_that_goes_delivers_what_it_has(runs: Runs) -> None:
    """It gets nothing more; the last heartbeat that names it has all of its account."""
    one, two = MemorySink("one"), Slow("two")
    run = runs(one, two, settings=Settings(grace_seconds=60))
    await run.start()
    two.hold = True
    run.programs.emit("process.exec", 3)
    await until(lambda: two.account.received["process.exec"] == 3)
    change(run, one)
    run.programs.emit("process.exec", 2)
    await until(lambda: one.account.delivered["process.exec"] == 5)
    assert run.of("stream.heartbeat", one) == []
    two.may_end.set()
    await until(lambda: len(run.of("stream.heartbeat", one)) == 1)
    assert kinds(two) == [
        *("stream.manifest", *["process.exec"] * 3),
        *("stream.manifest", "stream.heartbeat"),
    ]
    counts = run.of("stream.heartbeat", one)[0].sink_counts["two"]
    assert (counts.received, counts.delivered, counts.pending) == (6, 6, 0)
    account = await run.stop()
    assert "two" not in run.of("stream.heartbeat", one)[-1].sink_counts
    assert "; two 3 delivered, 0 dropped until it was taken out; one 5 delivered" in account


async def test_what_a_sink_that_goes_cannot_deliver_is_handed_on(runs: Runs) -> None:
    one, two = MemorySink("one"), Slow("two")
    run = runs(one, two, settings=Settings(grace_seconds=0.1))
    await run.start()
    two.hold = True
    run.programs.emit("process.exec", 3)
    await until(lambda: two.account.received["process.exec"] == 3)
    change(run, one)
    await until(lambda: len(run.of("stream.heartbeat", one)) == 1)
    counts = run.of("stream.heartbeat", one)[0].sink_counts["two"]
    assert (counts.received, counts.pending) == (counts.delivered + counts.dropped, 0)
    assert counts.dropped == 3 + 2  # and what it was told as it went
    await run.stop()
    told = [(loss.sink, loss.stage, loss.kinds) for loss in run.notes[-1].untold]
    assert told == [("two", "sink", {"process.exec": 3})]


async def test_a_sink_in_the_place_of_another_waits_for_it(runs: Runs) -> None:
    """What the first could not deliver is told by the second, before its own events."""
    old, new = Slow("same"), MemorySink("same")
    run = runs(old, settings=Settings(grace_seconds=1))
    await run.start()
    old.hold = True
    run.programs.emit("process.exec", 3)
    await until(lambda: old.account.received["process.exec"] == 3)
    change(run, new)
    run.programs.emit("process.exec", 2)
    await until(lambda: run.service._read["process.exec"] == 5)
    assert new.events == []
    await until(lambda: len(new.events) >= 3)
    assert Counter(kinds(new))["stream.manifest"] == 1
    assert kinds(new)[0] == "stream.manifest"
    await run.stop()
    found = Counter(kinds(new))
    assert (found["process.exec"], found["stream.loss"]) == (2, 1)
    (loss,) = [event for event in new.events if kind_of(event) == "stream.loss"]
    assert (loss.stage, loss.kinds) == ("sink", {"process.exec": 3})  # type: ignore[attr-defined]
    last: Any = new.events[-1]
    counts = last.sink_counts["same"]
    assert counts.dropped == 3
    assert counts.received == counts.delivered + counts.dropped + counts.pending


async def test_the_end_does_not_wait_for_a_sink_that_goes(runs: Runs) -> None:
    old, new = Slow("same"), MemorySink("same")
    run = runs(old, settings=Settings(grace_seconds=0.8))
    await run.start()
    old.hold = True
    run.programs.emit("process.exec", 3)
    await until(lambda: old.account.received["process.exec"] == 3)
    change(run, new)
    run.programs.emit("process.exec", 2)
    await until(lambda: run.service._read["process.exec"] == 5)
    await run.stop()
    found = Counter(kinds(new))
    assert (found["process.exec"], found["stream.loss"], found["stream.heartbeat"]) == (2, 1, 1)


class Unstartable(MemorySink):
    async def start(self) -> None:
        raise SinkError("its file is gone")


async def test_a_sink_that_cannot_begin_is_a_failure_of_its_own(runs: Runs) -> None:
    """Its events are lost, and counted; the others go on."""
    old, new, other = MemorySink("same"), Unstartable("same"), MemorySink("other")
    run = runs(old, other)
    await run.start()
    change(run, new, other)
    await until(lambda: bool(run.service.fanout.failures))
    run.programs.emit("process.exec", 2)
    await until(lambda: other.account.delivered["process.exec"] == 2)
    assert new.account.dropped["process.exec"] == 2
    assert run.service.fanout.failures == ["same: its file is gone"]
    await run.stop()


async def test_who_comes_back_is_told_what_was_in_between(runs: Runs) -> None:
    one, first, again = MemorySink("one"), MemorySink("two"), MemorySink("two")
    run = runs(one, first)
    await run.start()
    change(run, one)
    run.programs.emit("process.exec", 4)
    await until(lambda: one.account.delivered["process.exec"] == 4)
    await again.start()
    change(run, one, again)
    run.programs.emit("process.exec", 1)
    await until(lambda: one.account.delivered["process.exec"] == 5)
    await run.stop()
    found = [event for event in again.events if kind_of(event) != "stream.heartbeat"]
    assert [kind_of(event) for event in found] == ["stream.manifest", "stream.loss", "process.exec"]
    loss: Any = found[1]
    assert (loss.count, loss.kinds) == (4, {"process.exec": 4})
    assert [(one.seq_from, one.seq_to) for one in loss.ranges] == [(1, 4)]
    # Its account is that of the name.
    assert again.account.delivered["stream.manifest"] == 3


async def test_a_sink_that_goes_lets_the_reading_go_on(runs: Runs) -> None:
    one, full = MemorySink("one"), MemorySink("full", budget_bytes=2000)
    run = runs(one, full, on_full="pause")
    await run.start()
    full.hold = True
    run.programs.emit("process.exec", 20)
    await until(lambda: run.service.reader.paused)
    change(run, one)
    run.programs.emit("process.exec", 5)
    await until(lambda: one.account.delivered["process.exec"] == 25)
    await run.stop()


async def test_filters_and_times_change_at_once(runs: Runs) -> None:
    run = runs()
    await run.start()
    programs: MemoryPrograms = run.programs
    filters = Filters(pids=(77,))
    run.kernel.prepare_filters(filters)
    before = programs.memory("settings")[GENERATION_AT]
    settings = msgspec.structs.replace(
        run.service.settings, filters=filters, heartbeat_seconds=1.0, grace_seconds=3.0
    )
    change(run, *run.sinks, settings=settings, prepared=True)
    assert struct.unpack_from("<Q", programs.memory("settings"), GENERATION_AT) == (1 - before,)
    assert run.of("stream.manifest")[-1].filters == {"pids": ["77"]}
    await until(lambda: len(run.of("stream.heartbeat")) == 2)
    await run.stop()
