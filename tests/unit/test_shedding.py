"""The level in the programs, the records of it and what is shown, over a kernel in memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from streamer.agent.pressure import LOOK_SECONDS
from streamer.config.settings import LEVELS, SHED_BY_DEFAULT, Kernel, Settings, SheddingSection
from streamer.events.kinds import KINDS
from streamer.events.stream import StreamShed
from streamer.events.timing import Timing
from streamer.operation.metrics import exposition
from streamer.sinks.latency import LatencySamples
from streamer.sinks.memory import MemorySink
from streamer.terminal.status import status_text
from tests.unit.test_metrics import parsed
from tests.unit.test_service import Run

RATES = SHED_BY_DEFAULT["file.open"]
ON = Settings(shedding=SheddingSection(enabled=True))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    # The test looks, and says what time it is.
    monkeypatch.setattr("streamer.agent.shedding.LOOK_SECONDS", 3600)
    made: list[Run] = []

    def make(*sinks: MemorySink, **options: Any) -> Run:
        made.append(Run(*sinks, **options))
        return made[-1]

    yield make
    for run in made:
        run.kernel.close()
        run.programs.release()


class Spooled(MemorySink):
    spool_filled = 0.9


class Clock:
    """Looks, a quarter of a second after the other, while a sink holds a share of its budget."""

    def __init__(self, run: Run) -> None:
        self.run, self.now = run, 0.0

    def look(self, held: float, looks: int = 1) -> None:
        marks = self.run.sink.watermarks
        before, marks.held = marks.held, round(held * marks.high)
        for _ in range(looks):
            self.run.service.shedding.step(self.now)
            self.now += LOOK_SECONDS
        marks.held = before


def left_out(run: Run, count: int, kind: str = "file.open") -> None:
    """So many happen that sampling leaves out."""
    for _ in range(count):
        run.programs._count(kind, 0, "produced")
        run.programs._count(kind, 1, "shed")


def told(run: Run) -> list[tuple[int, int, dict[str, int]]]:
    return [(one.before, one.level, one.kinds) for one in run.of("stream.shed")]


async def test_each_change_is_told_with_what_was_left_out(runs: Any) -> None:
    run = runs(settings=ON)
    await run.start()
    clock = Clock(run)
    left_out(run, 100)  # by other sampling, before
    clock.look(0.6, 3)
    assert (run.programs.level, run.programs.sample("file.open")) == (1, RATES[0])
    left_out(run, 7)
    clock.look(1.0, 3)
    assert (run.programs.level, run.programs.sample("file.open")) == (3, RATES[2])
    left_out(run, 5)
    left_out(run, 2, "net.close")
    run.service.shedding.repeat()
    left_out(run, 1)
    while run.programs.level:
        clock.look(0.0)
    assert run.programs.sample("file.open") == 1
    left_out(run, 4)  # by a program that had begun before
    clock.look(0.0)
    assert told(run) == [
        (0, 1, {}),
        (1, 3, {"file.open": 7}),
        (3, 3, {"file.open": 5, "net.close": 2}),
        (3, 2, {"file.open": 1}),
        (2, 1, {}),
        (1, 0, {"file.open": 4}),
    ]
    await run.stop()
    assert len(run.of("stream.shed")) == 6


async def test_what_is_critical_is_never_sampled(runs: Any) -> None:
    run = runs(settings=ON)
    await run.start()
    Clock(run).look(0.99, 3)
    assert run.programs.level == LEVELS
    for kind, info in KINDS.items():
        sampled = run.programs.sample(kind) > 1
        assert sampled == (info.ring == "bulk" and kind not in ("net.bind", "net.listen")), kind
    await run.stop()


async def test_what_is_left_out_until_the_end_is_told(runs: Any) -> None:
    run = runs(settings=ON)
    await run.start()
    Clock(run).look(0.99, 3)
    left_out(run, 3)
    await run.stop()
    last = run.of("stream.shed")[-1]
    assert (last.level, last.kinds, last.reason) == (3, {"file.open": 3}, "the agent stops")
    assert last.rates["file.open"] == RATES[2], "by which they were left out"
    final = run.of("stream.heartbeat")[-1]
    assert final.final
    assert final.seq > last.seq


async def test_that_it_is_over_is_told_though_the_agent_stops_before_it_looks_again(
    runs: Any,
) -> None:
    run = runs(settings=ON)
    await run.start()
    clock = Clock(run)
    clock.look(0.6, 3)
    while run.programs.level:
        clock.look(0.0)
    left_out(run, 3)  # by a program that had begun before
    assert run.of("stream.shed")[-1].level == 1
    await run.stop()
    last = run.of("stream.shed")[-1]
    assert (last.before, last.level, last.kinds) == (1, 0, {"file.open": 3})
    assert last.reason == "the pressure is over"


async def test_why_and_since_when(runs: Any) -> None:
    run = runs(settings=ON)
    await run.start()
    Clock(run).look(0.9, 3)
    record = run.of("stream.shed")[-1]
    assert isinstance(record, StreamShed)
    assert record.reason == "memory: holds 90% of its budget"
    (cause,) = record.causes
    assert (cause.measure, cause.where, cause.level) == ("budget", "memory:", 3)
    assert cause.value == pytest.approx(0.9, abs=0.001)
    assert record.boot_ns - 10**9 < record.since_boot_ns <= record.boot_ns
    assert abs((record.time_ns - record.boot_ns) - (record.since_ns - record.since_boot_ns)) < 10**8
    await run.stop()


async def test_since_when_is_as_coarse_as_times_are(runs: Any) -> None:
    """With `[timing]` no record tells a time more exactly."""
    run = runs(settings=ON)
    await run.start()
    timing = Timing(1_000_000_000, bytes(16))
    run.service.shedding._envelope.timing = timing
    Clock(run).look(0.9, 3)
    record = run.of("stream.shed")[-1]
    assert record.since_boot_ns % timing.resolution_ns == 0 < record.since_boot_ns
    await run.stop()


async def test_sampling_is_multiplied_and_in_the_manifest(runs: Any) -> None:
    settings = msgspec.structs.replace(ON, kernel=Kernel(sample={"file.open": 5, "net.udp": 2}))
    run = runs(settings=settings)
    await run.start()
    assert run.of("stream.manifest")[0].shedding["file.open"] == [5 * rate for rate in RATES]
    assert "process.exec" not in run.of("stream.manifest")[0].shedding
    Clock(run).look(0.99, 3)
    assert run.programs.sample("file.open") == 5 * RATES[2]
    assert run.of("stream.shed")[-1].rates["net.udp"] == 2 * SHED_BY_DEFAULT["net.udp"][2]
    await run.stop()


async def test_nothing_is_shed_unless_asked_for(runs: Any) -> None:
    run = runs()
    await run.start()
    assert not run.service.shedding.enabled
    assert run.of("stream.manifest")[0].shedding == {}
    assert all(run.programs.sample(kind) <= 1 for kind in KINDS)
    run.service.shedding.repeat()  # as with each heartbeat
    await run.stop()
    assert not run.of("stream.shed")


async def pressed_by(run: Run) -> StreamShed:
    await run.start()
    Clock(run).look(0.2, 3)  # less than presses by itself
    record = run.of("stream.shed")[-1]
    assert isinstance(record, StreamShed)
    assert run.programs.level == record.level > 0
    await run.stop()
    return record


async def test_a_spool_that_fills_presses(runs: Any) -> None:
    record = await pressed_by(runs(Spooled(), settings=ON))
    assert [one.measure for one in record.causes] == ["spool"]
    assert record.reason == "the spool of memory: is 90% full"


async def test_a_batch_that_is_long_under_way_presses(runs: Any) -> None:
    sink, times = MemorySink(), itertools.chain([0.0], itertools.repeat(60.0))
    sink.latency = LatencySamples(times.__next__)
    sink.latency.taken(1000)
    record = await pressed_by(runs(sink, settings=ON))
    assert [one.measure for one in record.causes] == ["lag"]
    assert record.reason == "a batch has been under way to memory: for 60.0 s"


async def test_a_sink_that_is_closed_presses_nobody(runs: Any) -> None:
    first, second = MemorySink("first:"), MemorySink("second:")
    run = runs(first, second, settings=ON, on_full="pause")
    await run.start()
    first._set_status("closed", "gone")
    Clock(run).look(1.0, 5)
    assert run.programs.level == 0
    await run.stop()


async def test_the_fullest_of_several_buffers_of_a_ring_presses(runs: Any) -> None:
    run = runs(settings=ON)
    await run.start()
    shedding = run.service.shedding
    shedding._sources = [SimpleNamespace(name="bulk", filled=filled) for filled in (0.1, 0.95, 0.2)]
    Clock(run).look(0.0, 3)
    (cause,) = run.of("stream.shed")[-1].causes
    assert (cause.measure, cause.where, cause.value) == ("ring", "bulk", 0.95)
    await run.stop()


@pytest.mark.parametrize(("status", "level"), [("up", LEVELS), ("down", LEVELS), ("closed", 0)])
async def test_a_sink_of_another_worker_presses_unless_it_is_closed(
    runs: Any, status: str, level: int
) -> None:
    run = runs(settings=ON)
    await run.start()
    theirs = SimpleNamespace(status=status, full=1.0, lag_seconds=0.0)
    run.service.shedding._crew = SimpleNamespace(of_sink=lambda _: [theirs])
    Clock(run).look(0.0, 3)
    assert run.programs.level == level
    await run.stop()


async def test_status_and_metrics_say_it(runs: Any) -> None:
    run = runs(settings=ON)
    await run.start()
    assert "shedding" not in status_text(run.service.look())
    Clock(run).look(0.9, 3)
    look = run.service.look()
    text = "shedding, level 3, because memory: holds 90% of its budget: "
    assert text in status_text(look)
    assert f"file.open 1 in {RATES[2]}" in status_text(look)
    found = parsed(exposition(look))
    assert found["streamer_pressure_level"] == {(): 3}
    assert found["streamer_shedding_rate"]["file.open",] == RATES[2]
    await run.stop()
