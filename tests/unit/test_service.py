"""A whole service over a kernel in memory: start, stop, cancellation, overload, what it tells.

Nothing here needs privileges: see `tests/memory_kernel.py`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest

from streamer.agent.service import Outcome, Service
from streamer.config.settings import Filters, Limits, Rings, Settings, StdoutSink
from streamer.errors import ConfigError, HelperGone, KernelError, SinkError
from streamer.events.batch import Batch, kind_of
from streamer.events.kinds import KINDS
from streamer.events.stream import PreviousRun, UntoldLoss
from streamer.events.summaries import XdpCounters
from streamer.kernel.objects import CONTRACT, SENSORS
from streamer.sinks.base import Sink
from streamer.sinks.memory import MemorySink
from tests.memory_kernel import INITIAL_MNTNS, MemoryKernel, MemoryPrograms

GENERATION_AT = next(at for name, at, _ in CONTRACT["settings"] if name == "generation")
ALL = frozenset(KINDS)
TINY = Rings(critical_bytes=4096, bulk_bytes=4096)


class Run:
    """A service, its programs, and the sinks that it publishes to."""

    def __init__(
        self,
        *sinks: Sink,
        settings: Settings | None = None,
        limits: Limits | None = None,
        programs: MemoryPrograms | None = None,
        on_full: str = "auto",
        previous: PreviousRun | None = None,
    ) -> None:
        self.notes: list[PreviousRun] = []
        self.sinks = sinks or (MemorySink(),)
        chosen = tuple(StdoutSink(on_full=on_full) for _ in self.sinks)  # type: ignore[arg-type]
        self.settings = msgspec.structs.replace(settings or Settings(), sinks=chosen)
        self.kernel = MemoryKernel(self.settings, ALL, programs)
        self.programs = self.kernel.programs
        self.service = Service(
            self.settings,
            ALL,
            limits or Limits(),
            list(self.sinks),
            self.kernel,
            previous=previous,
            leave_note=self.notes.append,
        )
        self.task: asyncio.Task[Outcome] | None = None

    @property
    def sink(self) -> MemorySink:
        assert isinstance(self.sinks[0], MemorySink)
        return self.sinks[0]

    async def start(self) -> None:
        """Until it has attached and says so, or has ended."""
        self.task = asyncio.create_task(self.service.run())
        await until(lambda: self.ended or bool(self.of("stream.manifest")))

    @property
    def ended(self) -> bool:
        return self.task is not None and self.task.done()

    async def stop(self) -> str:
        self.service.stop()
        return await self.end()

    async def end(self) -> str:
        """The account, when it has ended by itself."""
        return (await self.outcome()).account

    async def outcome(self) -> Outcome:
        """The same, with what was not delivered."""
        assert self.task is not None
        return await asyncio.wait_for(self.task, 20)

    def of(self, kind: str, sink: MemorySink | None = None) -> list[Any]:
        return [event for event in (sink or self.sink).events if kind_of(event) == kind]

    def events(self, sink: MemorySink | None = None) -> list[Any]:
        """Those of the kernel, in the order in which they were delivered."""
        found = (sink or self.sink).events
        return [event for event in found if not kind_of(event).startswith("stream.")]

    def lost(self, sink: MemorySink | None = None) -> int:
        return sum(loss.count for loss in self.of("stream.loss", sink))

    def numbers(self) -> dict[tuple[str, int], list[int]]:
        """Of every ring and CPU the numbers that were delivered or told as lost."""
        found: dict[tuple[str, int], list[int]] = {}
        for event in self.events():
            found.setdefault((event.ring, event.cpu), []).append(event.seq)
        for loss in self.of("stream.loss"):
            for one in getattr(loss, "ranges", None) or [loss]:
                taken = range(one.seq_from, one.seq_to + 1)
                found.setdefault((one.ring, one.cpu), []).extend(taken)
        return {place: sorted(numbers) for place, numbers in found.items()}

    def check(self) -> None:
        """Every number is there once, and the last heartbeat's account is that of the stream."""
        last = self.of("stream.heartbeat")[-1]
        for mark in last.marks:
            assert self.numbers()[mark.ring, mark.cpu] == list(range(1, mark.seq + 1)), mark
        delivered = Counter(kind_of(event) for event in self.events())
        lost = Counter[str]()
        for loss in self.of("stream.loss"):
            lost.update(loss.kinds)
        for kind, counts in last.counts.items():
            assert counts.produced == counts.read + counts.filtered + counts.lost, kind
            assert (counts.read, counts.lost) == (delivered[kind], lost[kind]), kind


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - nothing announces what is waited for
            await asyncio.sleep(0.002)


@pytest.fixture
def runs() -> Iterator[Callable[..., Run]]:
    """Makes runs, and releases their memory."""
    made: list[Run] = []

    def make(*sinks: Sink, **options: Any) -> Run:
        made.append(Run(*sinks, **options))
        return made[-1]

    yield make
    for run in made:
        run.kernel.close()
        run.programs.release()


Runs = Callable[..., Run]


@pytest.fixture
def seconds_fly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the service does every second it does every 20 ms."""
    fast = SimpleNamespace(**vars(asyncio))
    fast.sleep = lambda seconds: asyncio.sleep(seconds / 50)
    monkeypatch.setattr("streamer.agent.service.asyncio", fast)


class Clock:
    """The service's time: it passes only where the service sleeps, and there at once.

    It stands still until a test gives it a rate.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.rate = 0.0
        self.due: list[tuple[float, Callable[[], object]]] = []

    async def sleep(self, seconds: float) -> None:
        self.now += seconds * self.rate
        for one in [one for one in self.due if one[0] <= self.now]:
            self.due.remove(one)
            one[1]()
        await asyncio.sleep(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    asleep = SimpleNamespace(**vars(asyncio))
    asleep.sleep = made.sleep
    monkeypatch.setattr("streamer.agent.service.asyncio", asleep)
    told = SimpleNamespace(monotonic=lambda: made.now, time_ns=time.time_ns)
    monkeypatch.setattr("streamer.agent.service.time", told)
    return made


# ---------------------------------------------------------------- start and stop


async def test_events_of_both_rings_and_every_cpu_come_as_they_happened(runs: Runs) -> None:
    run = runs()
    await run.start()
    for kind in KINDS:
        for cpu in range(run.programs.cpus):
            assert run.programs.emit(kind, 3, cpu) == 3
    await until(lambda: len(run.events()) == 6 * len(KINDS))
    account = await run.stop()
    assert Counter(kind_of(event) for event in run.events()) == dict.fromkeys(KINDS, 6)
    run.check()
    marks = run.of("stream.heartbeat")[-1].marks
    assert {(mark.ring, mark.cpu) for mark in marks} == set(run.numbers())
    assert all(mark.read == mark.seq for mark in marks)
    count = 6 * len(KINDS)
    assert f"{count} events in " in account
    assert f"{count} delivered, 0 dropped; 0 filtered, 0 lost" in account


async def test_the_manifest_is_first_and_the_last_heartbeat_is_last(runs: Runs) -> None:
    run = runs()
    await run.start()
    run.programs.emit("process.exec", 5)
    await run.stop()
    kinds = [kind_of(event) for event in run.sink.events]
    assert kinds == ["stream.manifest", *["process.exec"] * 5, "stream.heartbeat"]
    manifest, heartbeat = run.sink.events[0], run.sink.events[-1]
    reports = manifest.coverage  # type: ignore[attr-defined]
    for kind, info in KINDS.items():  # a host of cgroup v1 adds a line
        assert reports[kind].unseen[: len(info.unseen)] == info.unseen
    assert manifest.initial_mntns == INITIAL_MNTNS  # type: ignore[attr-defined]
    assert heartbeat.counts["process.exec"].read == 5  # type: ignore[attr-defined]


async def test_nothing_is_attached_before_the_sinks_have_started(runs: Runs) -> None:
    """Else events would happen that nobody can take; and a sink that fails costs no attach."""
    run = runs(Unstartable("broken"))
    await run.start()
    with pytest.raises(ConfigError, match="broken: no such certificate"):
        await run.end()
    assert not [step for step in run.programs.done if step.startswith("attach")]


async def test_what_the_rings_hold_at_the_end_is_delivered_and_nothing_happens_later(
    runs: Runs,
) -> None:
    """It detaches first: what happened before that is read, what comes later is not there."""
    run = runs(settings=Settings(rings=Rings(drain_records=64)))
    await run.start()
    run.programs.emit("file.open", 500)
    run.programs.emit("process.exit", 300, cpu=1)
    await run.stop()
    assert len(run.events()) == 800
    run.check()
    assert run.programs.emit("file.open") == 0
    assert run.programs.attached == set()


async def test_detached_is_before_the_last_look_at_the_rings(runs: Runs) -> None:
    run = runs()
    await run.start()
    unload = run.programs.unload

    def unload_late(sensor: str) -> None:
        run.programs.emit("process.fork")  # in the moment before the programs go
        unload(sensor)

    run.programs.unload = unload_late  # type: ignore[method-assign]
    await run.stop()
    assert len(run.of("process.fork")) >= 1
    run.check()


async def test_what_a_program_was_writing_when_it_was_detached_is_there(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was preempted, and goes on while the agent waits for it."""
    run = runs()
    await run.start()

    def wait() -> None:
        assert run.programs.attached == set()
        run.programs._event("process.fork", 0, False)

    monkeypatch.setattr("streamer.agent.service.wait_for_programs", wait)
    await run.stop()
    assert len(run.of("process.fork")) == 1
    run.check()


async def test_what_was_counted_and_has_no_number_yet_is_waited_for(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel does not tell when programs have ended, the counters do."""
    run = runs()
    await run.start()
    loop = asyncio.get_running_loop()

    def number() -> None:
        record = run.programs._record("process.fork", 0, run.programs._next_seq("critical", 0))
        assert run.programs.rings["critical"].write(record) is not None

    def wait() -> None:
        run.programs._count("process.fork", 0, "produced")
        loop.call_soon_threadsafe(loop.call_later, 0.05, number)

    monkeypatch.setattr("streamer.agent.service.wait_for_programs", wait)
    await run.stop()
    assert len(run.of("process.fork")) == 1
    run.check()


@pytest.mark.parametrize("error", [OSError(errno.ENOSYS, "no"), TimeoutError()])
async def test_a_kernel_that_does_not_tell_when_programs_have_ended(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run = runs()
    await run.start()
    run.programs.emit("process.exec", 5)
    waits = Mock(side_effect=error)
    monkeypatch.setattr("streamer.agent.service.wait_for_programs", waits)
    await run.stop()
    waits.assert_called_once()
    assert len(run.of("process.exec")) == 5
    run.check()


@pytest.mark.parametrize("limit", [Limits(max_events=7), Limits(duration_seconds=0.05)])
async def test_a_limit_ends_the_run(runs: Runs, limit: Limits) -> None:
    run = runs(limits=limit)
    await run.start()
    run.programs.emit("process.exec", 7)
    assert "7 events in " in await run.end()
    assert len(run.of("process.exec")) == 7
    run.check()


async def test_more_than_the_limit_is_told_as_not_read(runs: Runs) -> None:
    run = runs(limits=Limits(max_events=7))
    await run.start()
    run.programs.emit("process.exec", 10)
    await run.end()
    (loss,) = run.of("stream.loss")
    assert (loss.stage, loss.count, loss.seq_from, loss.seq_to) == ("stop", 3, 8, 10)
    assert len(run.of("process.exec")) == 7


async def test_a_run_that_was_told_to_fail_delivers_first(runs: Runs) -> None:
    run = runs()
    await run.start()
    run.programs.emit("process.exec", 5)
    run.service.fail(HelperGone("the helper has ended"))
    run.service.fail(KernelError("a second reason is not told"))
    with pytest.raises(HelperGone, match="the helper has ended"):
        await run.end()
    assert len(run.of("process.exec")) == 5
    run.check()


async def test_a_ring_that_cannot_be_read_ends_the_run_with_the_reason(runs: Runs) -> None:
    run = runs()
    await run.start()
    run.programs.rings["critical"].produced = 1 << 40
    run.programs.ring_fds["critical"].wake()
    with pytest.raises(KernelError, match="the events cannot be read"):
        await run.end()
    assert run.programs.attached == set()


# ---------------------------------------------------------------- what can be observed


async def test_a_program_that_cannot_be_run_ends_the_run_with_the_reason(
    runs: Runs, seconds_fly: None
) -> None:
    programs = MemoryPrograms()

    def refuse(sensor: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    programs.run = refuse  # type: ignore[method-assign]
    run = runs(programs=programs)
    await run.start()
    assert run.task is not None
    with pytest.raises(KernelError, match=r"run every second cannot be: .*not permitted"):
        await run.task
    assert run.of("stream.heartbeat")


async def test_what_is_not_observed_is_said_and_the_rest_runs(
    runs: Runs, caplog: pytest.LogCaptureFixture
) -> None:
    run = runs(programs=MemoryPrograms(refused=frozenset({"file"})))
    with caplog.at_level(logging.WARNING, "streamer"):
        await run.start()
    run.programs.emit("process.exec")
    await run.stop()
    manifest = run.of("stream.manifest")[0]
    assert (manifest.coverage["file.open"].status, manifest.coverage["file.open"].reason) == (
        "missing",
        "file is refused",
    )
    assert manifest.coverage["process.exec"].status == "full"
    assert "file.open is not observed: file is refused" in caplog.text
    assert len(run.of("process.exec")) == 1


async def test_without_anything_to_observe_it_ends_and_closes_its_sinks(runs: Runs) -> None:
    programs = MemoryPrograms(unattached=frozenset(SENSORS))
    run = runs(programs=programs)
    await run.start()
    with pytest.raises(KernelError, match="none of the events asked for can be observed"):
        await run.end()
    assert run.sink.status == "closed"
    assert [step for step in programs.done if step.startswith("unload")]


# ---------------------------------------------------------------- cancellation


async def test_a_cancelled_run_detaches_reports_and_closes_its_sinks(runs: Runs) -> None:
    run = runs()
    await run.start()
    run.programs.emit("process.exec", 5)
    assert run.task is not None
    run.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run.task
    assert run.programs.attached == set()
    assert run.sink.status == "closed"
    assert len(run.of("process.exec")) == 5
    run.check()


async def test_a_start_that_is_cancelled_leaves_nothing_attached(runs: Runs) -> None:
    slow = NeverStarts("slow")
    run = runs(slow)
    run.task = asyncio.create_task(run.service.run())
    await until(lambda: slow.starting)
    run.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run.task
    assert run.programs.attached == set()
    assert slow.status == "closed"


async def test_a_defect_in_what_it_does_every_second_is_seen(
    runs: Runs, seconds_fly: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs()

    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(run.service.reader, "refresh_clock", fail)
    await run.start()
    run.programs.emit("process.exec", 5)
    with pytest.raises(ZeroDivisionError):
        await run.end()
    assert run.programs.attached == set()
    assert len(run.of("process.exec")) == 5


async def test_a_summary_that_is_not_ready_at_the_end(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not hold up the end for long, and the stream says that it is lost."""
    run = runs(settings=Settings(grace_seconds=1))
    go_on = threading.Event()
    monkeypatch.setattr(run.service._summaries, "collect", lambda: go_on.wait(30) and [])
    await run.start()
    run.programs.emit("process.exec", 5)
    await run.stop()
    go_on.set()
    (loss,) = run.of("stream.loss")
    assert (loss.stage, loss.count) == ("stop", 1)
    assert loss.reason == "summaries were not ready when the agent stopped"
    assert len(run.of("process.exec")) == 5


async def test_a_defect_in_a_summary_is_seen(
    runs: Runs, seconds_fly: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs(settings=Settings(summary_seconds=1))

    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(run.service._summaries, "collect", fail)
    await run.start()
    with pytest.raises(ZeroDivisionError):
        await run.stop()
    assert run.programs.attached == set()
    assert run.sink.status == "closed"


# ---------------------------------------------------------------- overload


async def test_overload_of_both_rings_is_accounted_to_the_last_number(runs: Runs) -> None:
    """A full sink makes the reading wait, both rings overflow, on both CPUs, again and again."""
    sink = MemorySink(budget_bytes=4000)
    run = runs(sink, settings=Settings(rings=TINY))
    await run.start()
    happened = 0
    for _ in range(4):
        sink.hold = True
        for _ in range(20):
            for kind, cpu in (("process.exit", 0), ("file.open", 1), ("net.close", 0)):
                run.programs.emit(kind, 10, cpu)
                happened += 10
            await asyncio.sleep(0.001)
        assert run.service.reader.paused
        sink.hold = False
        sink.release()
        await until(lambda: not run.service.reader.paused)
    account = await run.stop()
    run.check()
    assert len(run.events()) + run.lost() == happened
    assert {loss.ring for loss in run.of("stream.loss")} == {"critical", "bulk"}
    assert {(loss.stage, loss.sink) for loss in run.of("stream.loss")} == {("kernel", None)}
    for loss in run.of("stream.loss"):
        ends = loss.ranges[0].seq_from, loss.ranges[-1].seq_to
        assert (loss.seq_from, loss.seq_to) == ends
    assert f"{len(run.events())} delivered, 0 dropped" in account
    assert account.endswith(f"{run.lost():,} lost")
    assert run.of("stream.heartbeat")[-1].reader.pauses >= 4


async def test_a_flood_of_one_ring_costs_the_other_nothing(runs: Runs) -> None:
    run = runs(settings=Settings(rings=TINY))
    await run.start()
    for _ in range(10):
        run.programs.emit("file.open", 100)
        assert run.programs.emit("process.exec", 2) == 2
        await until(lambda: not run.programs.rings["bulk"].produced - consumed(run))
    await run.stop()
    run.check()
    assert len(run.of("process.exec")) == 20
    assert {loss.ring for loss in run.of("stream.loss")} == {"bulk"}


def consumed(run: Run) -> int:
    return run.programs.rings["bulk"].consumed


async def test_a_loss_at_the_tail_is_told_while_it_runs(
    runs: Runs, seconds_fly: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing follows it, so no record shows the gap: the counters do."""
    run = runs(settings=Settings(rings=TINY))
    await run.start()
    fitted = run.programs.emit("file.open", 100)
    await until(lambda: bool(run.of("stream.loss")))
    (loss,) = run.of("stream.loss")
    assert (loss.stage, loss.ring, loss.cpu) == ("kernel", "bulk", 0)
    assert (loss.seq_from, loss.seq_to, loss.count) == (fitted + 1, 100, 100 - fitted)
    assert loss.kinds == {"file.open": 100 - fitted}
    assert f"{100 - fitted} events lost in the kernel of bulk" in caplog.text
    await run.stop()
    run.check()


async def test_a_single_event_lost_at_the_tail_is_told(runs: Runs, seconds_fly: None) -> None:
    run = runs(settings=Settings(rings=TINY))
    await run.start()
    run.service.reader.pause()
    while run.programs.emit("process.exit", cpu=1):
        pass
    run.service.reader.resume()
    await until(lambda: bool(run.of("stream.loss")))
    (loss,) = run.of("stream.loss")
    assert (loss.ring, loss.cpu, loss.count) == ("critical", 1, 1)
    await run.stop()
    run.check()


async def test_what_a_sink_cannot_deliver_is_named_and_no_more(runs: Runs) -> None:
    """Also what is late: its program took a number, and another one interrupted it."""
    good, deaf = MemorySink("good"), Deaf("deaf")
    run = runs(good, deaf)
    deaf.hears = True
    await run.start()
    programs = run.programs
    number = programs._next_seq("critical", 0)
    programs.emit("process.exec")
    programs.emit("file.open", 3)
    await until(lambda: len(run.events(good)) == 4)
    deaf.hears = False
    programs.rings["critical"].write(programs._record("process.exec", 0, number))
    programs.emit("file.open", 2)
    await until(lambda: len(run.events(good)) == 7)
    await run.stop()
    assert run.of("stream.loss", good) == []
    ranges = [(one.ring, one.seq_from, one.seq_to) for one in run.notes[-1].untold[0].ranges]
    assert sorted(ranges) == [("bulk", 4, 5), ("critical", 1, 1)]


async def test_what_a_filter_keeps_back_is_no_loss(runs: Runs) -> None:
    run = runs()
    await run.start()
    run.programs.emit("file.open", 10, filtered=True)
    run.programs.emit("file.open", 3)
    account = await run.stop()
    assert "3 delivered, 0 dropped; 10 filtered, 0 lost" in account
    assert run.of("stream.loss") == []
    run.check()


# ---------------------------------------------------------------- what it tells besides


async def test_records_that_cannot_be_decoded_are_told_as_lost_once(
    runs: Runs, seconds_fly: None
) -> None:
    run = runs(settings=Settings(heartbeat_seconds=0.02))
    await run.start()
    for ring in ("critical", "bulk", "bulk"):
        run.programs.garbage(ring)
    run.programs.emit("process.exec")
    await until(lambda: bool(run.of("stream.loss")))
    run.programs.garbage("bulk", cpu=1)
    run.programs.garbage("critical", short=True)
    await run.stop()
    losses = run.of("stream.loss")
    assert {loss.stage for loss in losses} == {"decode"}
    assert [loss.count for loss in losses] == [3, 2]
    reader = run.of("stream.heartbeat")[-1].reader
    assert (reader.unknown_kind, reader.short_record) == (4, 1)


async def test_runs_that_the_kernel_left_out_are_told_once(runs: Runs, seconds_fly: None) -> None:
    """As soon as other losses, and those of the end as well."""
    run = runs()
    run.kernel.runs_missed["on_exec"] = 3
    await run.start()
    await until(lambda: bool(run.of("stream.loss")))
    run.kernel.runs_missed["on_exec"] = 5
    run.kernel.runs_missed["on_exit"] = 1
    account = await run.stop()
    losses = run.of("stream.loss")
    assert [(loss.count, loss.reason.split()[0], loss.stage, loss.ring) for loss in losses] == [
        (3, "on_exec", "kernel", None),
        (2, "on_exec", "kernel", None),
        (1, "on_exit", "kernel", None),
    ]
    assert all(loss.reason.endswith("or something of one") for loss in losses)
    assert run.of("stream.heartbeat")[-1].missed == {"on_exec": 5, "on_exit": 1}
    assert account.endswith("6 times a program was not run")


async def test_the_clock_is_looked_at_again(
    runs: Runs, seconds_fly: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody sets it while the agent runs: later events have the new time."""
    run = runs()
    await run.start()
    run.programs.emit("process.exec")
    await until(lambda: len(run.events()) == 1)
    hours = 3600 * 10**9
    monkeypatch.setattr("streamer.ring.reader.clock_offset_ns", lambda: 7 * hours)

    async def emitted_later() -> None:
        while run.events()[-1].time_ns - run.events()[-1].boot_ns != 7 * hours:
            run.programs.emit("process.exec")
            run.programs.emit("file.open")
            await asyncio.sleep(0.01)

    await asyncio.wait_for(emitted_later(), 5)
    await run.stop()
    assert {event.ring for event in run.events() if event.time_ns - event.boot_ns == 7 * hours} == {
        "critical",
        "bulk",
    }


async def test_heartbeats_come_while_it_runs_with_all_that_went_wrong(
    runs: Runs, seconds_fly: None
) -> None:
    filters = Filters(uids=(1000,), exclude_comms=("sshd",))
    run = runs(settings=Settings(heartbeat_seconds=0.02, filters=filters))
    run.programs.fault("FAULT_LISTENERS_FULL", 3)
    await run.start()
    run.programs.emit("process.exec", 4)
    await until(lambda: len(run.of("stream.heartbeat")) >= 2)
    assert not run.ended
    heartbeat = run.of("stream.heartbeat")[-1]
    assert heartbeat.faults == {"listeners_full": 3}
    assert heartbeat.sink_counts["memory:"].status == "up"
    assert heartbeat.counts["process.exec"].read == 4
    manifest = run.of("stream.manifest")[0]
    assert manifest.filters == {"uids": ["1000"], "exclude_comms": ["sshd"]}
    await run.stop()


async def test_a_heartbeat_says_what_a_sink_holds_and_waits_until_it_is_not_full(
    runs: Runs, seconds_fly: None
) -> None:
    held, good = MemorySink("held", budget_bytes=20_000), MemorySink("good")
    run = runs(held, good, settings=Settings(heartbeat_seconds=0.02))
    await run.start()
    held.hold = True
    run.programs.emit("process.exec", 5)
    await until(lambda: held.account.pending >= 5)
    await until(lambda: run.of("stream.heartbeat", good)[-1:] != [])
    count = len(run.of("stream.heartbeat", good))
    await until(lambda: len(run.of("stream.heartbeat", good)) > count)
    told = run.of("stream.heartbeat", good)[-1].sink_counts["held"]
    assert told.pending >= 5
    assert 0 < told.pending_bytes <= held.watermarks.held
    run.programs.emit("process.exec", 100)
    await until(lambda: held.watermarks.full)
    waiting, count = (
        held.account.received["stream.heartbeat"],
        len(run.of("stream.heartbeat", good)),
    )
    await until(lambda: len(run.of("stream.heartbeat", good)) > count + 3)
    assert held.account.received["stream.heartbeat"] == waiting
    held.hold = False
    held.release()
    await run.stop()


async def test_what_programs_count_waits_in_their_tables_while_a_sink_has_no_room(
    runs: Runs, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a broker that is away for days would be owed a summary of every period."""
    sink = MemorySink(budget_bytes=2000)
    run = runs(sink)
    made: list[XdpCounters] = []

    def collect() -> list[XdpCounters]:
        made.append(summary(run.service))
        return made[-1:]

    monkeypatch.setattr(run.service._summaries, "collect", collect)
    await run.start()
    sink.hold = True
    clock.rate = 1
    await until(lambda: sink.watermarks.full and not run.service.summarises)
    clock.rate = 10
    then, count = clock.now, len(made)
    await until(lambda: clock.now > then + 1000)
    assert len(made) == count
    sink.hold = False
    sink.release()
    await until(lambda: len(made) > count)
    await run.stop()
    assert run.of("xdp.counters") == made


def summary(service: Service) -> XdpCounters:
    return service.envelope.record(
        XdpCounters,
        period_ns=1,
        interface="lo",
        ifindex=1,
        vlan="none",
        network="ipv4",
        transport="udp",
        ports="user",
        verdict="whole",
        packets=1,
        bytes=60,
        packets_total=1,
        bytes_total=60,
    )


async def test_heartbeats_come_as_often_as_they_are_asked_for(
    runs: Runs, seconds_fly: None
) -> None:
    run = runs(settings=Settings(heartbeat_seconds=60))
    await run.start()
    await asyncio.sleep(0.2)  # ten of its seconds
    assert run.of("stream.heartbeat") == []
    await run.stop()
    assert len(run.of("stream.heartbeat")) == 1


async def test_sinks_get_the_grace_to_deliver_and_it_is_said(
    runs: Runs, caplog: pytest.LogCaptureFixture
) -> None:
    slow = SlowToStop("slow")
    run = runs(slow, settings=Settings(grace_seconds=0.5))
    await run.start()
    slow.hold = True
    slow._set_status("down", "refused")
    run.programs.emit("process.exec", 5)
    await until(lambda: slow.account.pending >= 5)
    with caplog.at_level(logging.WARNING, "streamer"):
        await run.stop()
    assert 0 < slow.grace <= 0.5
    assert "stopping within 0.5 s; Ctrl-C again stops at once" in caplog.text


async def test_ids_of_events_and_records_are_unique(runs: Runs, seconds_fly: None) -> None:
    run = runs(settings=Settings(heartbeat_seconds=0.02))
    await run.start()
    for cpu in range(run.programs.cpus):
        for kind in KINDS:
            run.programs.emit(kind, 10, cpu)
    await until(lambda: len(run.of("stream.heartbeat")) >= 2)
    await run.stop()
    ids = [event.id for event in run.sink.events]  # type: ignore[attr-defined]
    assert len(set(ids)) == len(ids) == 20 * len(KINDS) + 1 + len(run.of("stream.heartbeat"))


# ---------------------------------------------------------------- sinks


async def test_a_sink_that_fails_costs_the_others_nothing(
    runs: Runs, caplog: pytest.LogCaptureFixture
) -> None:
    """It gets no more, and everything that it did not get is in its account."""
    good, bad = MemorySink("good"), Failing("bad")
    run = runs(good, bad)
    await run.start()
    run.programs.emit("process.exec", 5)
    await until(lambda: len(run.events(good)) == 5)
    run.programs.emit("process.exec", 3)
    await until(lambda: len(run.events(good)) == 8)
    account = await run.stop()
    assert "good 8 delivered, 0 dropped" in account
    assert "bad 0 delivered, 8 dropped" in account
    assert bad.account.pending == 0
    assert bad.tried == 1
    assert "bad failed and gets no more events" in caplog.text


async def test_what_a_failing_sink_had_taken_of_a_batch_is_not_counted_twice(runs: Runs) -> None:
    good, bad = MemorySink("good"), FailsHalfway("bad")
    run = runs(good, bad)
    await run.start()
    run.programs.emit("process.exec", 5)
    run.programs.emit("file.open", 4)
    await until(lambda: len(run.events(good)) == 9)
    await run.stop()
    assert bad.account.received["process.exec"] == 5
    assert bad.account.received["file.open"] == 4
    assert bad.account.dropped.total() + bad.account.delivered.total() == (
        bad.account.received.total() - bad.taken
    )


async def test_a_sink_that_drops_all_is_told_later_and_later(runs: Runs, seconds_fly: None) -> None:
    """Of its events, not of what it was told: that would make another one, for ever."""
    good, dropping = MemorySink("good"), Dropping("dropping")
    run = runs(good, dropping)
    await run.start()
    run.programs.emit("process.exec", 5)
    await until(lambda: dropping.account.received["stream.loss"] >= 1)
    await asyncio.sleep(0.3)  # fifteen of its seconds
    assert dropping.account.received["stream.loss"] <= 5
    await run.stop()
    (lost,) = [lost for lost in run.service.fanout.untold(dropping) or run.service._untold]
    assert (lost.count, lost.kinds) == (5, {"process.exec": 5})


async def test_when_the_only_sink_fails_the_run_ends_with_the_reason(runs: Runs) -> None:
    good = Failing("only")
    run = runs(good)
    run.task = asyncio.create_task(run.service.run())
    with pytest.raises(SinkError, match=r"no sink is left: only: ValueError: a defect"):
        await run.end()
    assert run.programs.attached == set()


async def test_a_full_sink_is_told_what_it_lost_and_no_loss_makes_another(
    runs: Runs, seconds_fly: None
) -> None:
    """Not even when the record of the loss finds no room itself: it would go on for ever."""
    full, good = MemorySink("full", budget_bytes=2000), MemorySink("good")
    run = runs(full, good, settings=Settings(heartbeat_seconds=0.02))
    await run.start()
    full.hold = True
    for _ in range(50):
        run.programs.emit("file.open", 10)
        await asyncio.sleep(0.02)
    full.hold = False
    full.release()
    await until(lambda: bool(run.of("stream.loss", full)))
    await run.stop()
    assert len(run.events(good)) == 500
    assert run.of("stream.loss", good) == []
    losses = run.of("stream.loss", full)
    assert {loss.sink for loss in losses} == {"full"}
    assert all(loss.kinds == {"file.open": loss.count} for loss in losses)
    assert len(run.events(full)) + run.lost(full) == 500


async def test_a_full_sink_holds_a_bounded_amount_whatever_there_is_to_tell(
    runs: Runs, seconds_fly: None
) -> None:
    """Records of losses go to a full sink as well, which must not make it grow for ever."""
    budget = 30_000
    full = MemorySink("full", budget_bytes=budget)
    run = runs(full, MemorySink("good"), settings=Settings(rings=TINY))
    await run.start()
    full.hold = True
    most = 0
    for _ in range(60):
        for cpu in range(run.programs.cpus):
            run.programs.emit("file.open", 60, cpu)
            run.programs.emit("process.exit", 60, cpu)
        await asyncio.sleep(0.025)
        most = max(most, full.watermarks.held)
    full.hold = False
    full.release()
    await run.stop()
    assert most > budget
    assert most < 2.5 * budget  # with what is critical, and the batch that took it there


async def test_a_sink_that_pauses_and_closes_lets_the_others_go_on(runs: Runs) -> None:
    held, good = MemorySink("held", budget_bytes=1000), MemorySink("good")
    run = runs(held, good, on_full="pause")
    await run.start()
    held.hold = True
    run.programs.emit("process.exec", 20)
    await until(lambda: run.service.reader.paused)
    await held.stop(0)
    run.programs.emit("process.exec", 20)
    await until(lambda: len(run.events(good)) == 40)
    await run.stop()
    assert held.account.received == held.account.delivered + held.account.dropped


async def test_every_sink_is_asked_to_open_anew(
    runs: Runs, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if one of them has a defect."""
    one, two = Reopening("one"), Reopening("two")
    run = runs(one, CannotReopen("bad"), two)
    await run.start()
    run.service.reopen()
    await run.stop()
    assert (one.reopened, two.reopened) == (1, 1)
    assert "bad could not be opened anew" in caplog.text


# ---------------------------------------------------------------- the end, and the note of it


class Stuck(MemorySink):
    """Delivers nothing until what waits is discarded, as a broker that answers slowly."""

    grace = -1.0

    def discard(self, reason: str) -> None:
        super().discard(reason)
        self.hold = False

    async def stop(self, grace: float) -> None:
        self.grace = grace
        await super().stop(grace)


async def test_what_cannot_be_delivered_is_told_in_the_rest_of_the_grace(
    runs: Runs, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """By the topic itself, before the last heartbeat; and by the outcome and the note."""
    sink = Stuck()
    run = runs(sink, settings=Settings(grace_seconds=80))
    await run.start()
    sink.hold = True
    run.programs.emit("process.exec", 5)
    await until(lambda: sink.account.pending == 5)
    begun, clock.rate = clock.now, 1
    run.service.stop()
    outcome = await run.outcome()
    loss, heartbeat = sink.events[-2:]
    assert (kind_of(loss), kind_of(heartbeat)) == ("stream.loss", "stream.heartbeat")
    assert (loss.stage, loss.count, loss.kinds) == ("sink", 5, {"process.exec": 5})  # type: ignore[attr-defined]
    assert heartbeat.sink_counts["memory:"].dropped == 5  # type: ignore[attr-defined]
    assert outcome.undelivered == "5 events to memory:: not delivered when the agent stopped"
    assert "0 delivered, 5 dropped" in outcome.account
    assert "5 events lost in memory:: not delivered" in caplog.text
    assert (run.notes[-1].ended, run.notes[-1].untold) == ("undelivered", [])
    # Most of the grace is for delivering; what is left has to be enough for telling.
    assert sink.grace >= 10
    assert clock.now - begun >= 40


async def test_a_sink_that_needs_a_while_delivers_all_and_nobody_waits_longer(
    runs: Runs, clock: Clock
) -> None:
    sink = Stuck()
    run = runs(sink, settings=Settings(grace_seconds=100))
    await run.start()
    sink.hold = True
    run.programs.emit("process.exec", 5)
    await until(lambda: sink.account.pending == 5)
    begun, clock.rate = clock.now, 1
    clock.due.append((begun + 30, sink.release))
    run.service.stop()
    assert (await run.outcome()).undelivered == ""
    assert len(run.of("process.exec")) == 5
    assert 30 <= clock.now - begun < 32
    assert run.notes[-1].ended == "delivered"
    run.check()


async def test_what_is_in_the_rings_is_read_as_soon_as_there_is_room(
    runs: Runs, clock: Clock
) -> None:
    sink = Stuck(budget_bytes=2000)
    run = runs(sink, settings=Settings(grace_seconds=100))
    await full_with_more_in_the_rings(run, sink)

    def release() -> None:
        sink.hold = False
        sink.release()

    clock.due.append((clock.now + 20, release))
    clock.rate = 1
    run.service.stop()
    assert (await run.outcome()).undelivered == ""
    assert len(run.of("process.exec")) == 60
    run.check()


async def test_what_finds_no_room_in_half_of_the_grace_is_told_as_not_read(
    runs: Runs, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of it is untold: what waits, what is in the rings, and what found no room there."""
    sink = Stuck(budget_bytes=2000)
    run = runs(sink, settings=Settings(grace_seconds=80))
    await full_with_more_in_the_rings(run, sink)
    begun, clock.rate = clock.now, 1
    run.service.stop()
    await run.outcome()
    counts = Counter[str]()
    for loss in run.of("stream.loss"):
        counts[loss.stage] += loss.count
    assert counts == {"sink": 30, "stop": 30}
    assert sink.grace >= 10
    assert clock.now - begun < 80
    assert "stop" not in {loss.stage for loss in run.service.fanout.untold(sink)}
    assert "not read" not in caplog.text  # on purpose: no news for the log


async def full_with_more_in_the_rings(run: Run, sink: MemorySink) -> None:
    await run.start()
    sink.hold = True
    run.programs.emit("process.exec", 30)
    await until(lambda: run.service.reader.paused)
    run.programs.emit("process.exec", 30)
    assert sink.account.pending == 30


async def test_the_manifest_comes_every_hour(runs: Runs, clock: Clock) -> None:
    """Whoever begins to read a topic later needs it as well."""
    run = runs()
    clock.rate = 30
    await run.start()
    await until(lambda: clock.now > 2.5 * 3600)
    assert len(run.of("stream.manifest")) == 3
    assert len({manifest.id for manifest in run.of("stream.manifest")}) == 3
    assert clock.now < 3 * 3600
    await run.stop()


async def test_an_interface_that_comes_and_goes_all_the_time_is_no_flood_of_manifests(
    runs: Runs, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first change is told at once, later ones together, the last one in any case."""
    run = runs()
    await run.start()
    begun, asked = clock.now, 0

    def follow() -> bool:
        nonlocal asked
        asked += 1
        return clock.now - begun < 300

    monkeypatch.setattr(run.kernel, "follow_interfaces", follow)
    await until(lambda: len(run.of("stream.manifest")) == 2 and asked > 10)
    asked, clock.rate = 0, 1
    await until(lambda: clock.now - begun > 400)
    assert 30 <= len(run.of("stream.manifest")) <= 2 + 310 / 10 < asked
    await run.stop()


async def test_a_note_is_left_before_the_end_and_at_the_end(runs: Runs) -> None:
    """Killed, as long as nothing else is known."""
    run = runs()
    await run.start()
    assert [note.ended for note in run.notes] == ["killed"]
    await run.stop()
    assert [note.ended for note in run.notes] == ["killed", "delivered"]
    manifest = run.of("stream.manifest")[0]
    assert manifest.previous is None
    for note in run.notes:
        assert (note.run_id, note.boot_id, note.untold) == (manifest.run_id, manifest.boot_id, [])


async def test_a_run_that_did_not_begin_leaves_no_note(
    runs: Runs, caplog: pytest.LogCaptureFixture
) -> None:
    run = runs(Unstartable("broken"), MemorySink("other"))
    await run.start()
    with pytest.raises(ConfigError):
        await run.end()
    assert run.notes == []
    assert "is closed" not in caplog.text  # the reason is said once


async def test_an_end_that_is_broken_off_is_noted_as_killed(runs: Runs) -> None:
    sink = Stuck()
    run = runs(sink)
    await run.start()
    sink.hold = True
    run.programs.emit("process.exec", 5)
    await until(lambda: sink.account.pending == 5)
    run.service.stop()
    await until(lambda: run.programs.attached == set())
    assert run.task is not None
    run.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run.task
    assert run.notes[-1].ended == "killed"
    assert [(one.sink, one.count) for one in run.notes[-1].untold] == [("memory:", 5)]


async def test_what_a_sink_was_never_told_is_in_the_note(runs: Runs, seconds_fly: None) -> None:
    good, deaf = MemorySink("good"), Deaf("deaf")
    run = runs(good, deaf)
    await run.start()
    run.programs.emit("process.exec", 5)
    await until(lambda: len(run.events(good)) == 5)
    run.service.stop()
    outcome = await run.outcome()
    (untold,) = run.notes[-1].untold
    assert (untold.sink, untold.stage, untold.count) == ("deaf", "sink", 5)
    assert (untold.kinds, untold.reason) == ({"process.exec": 5}, "refused")
    assert [(one.ring, one.seq_from, one.seq_to) for one in untold.ranges] == [("critical", 1, 5)]
    assert untold.run_id == run.notes[-1].run_id == run.of("stream.manifest")[0].run_id
    assert run.notes[-1].ended == "undelivered"
    assert outcome.undelivered == "5 lost events not told to deaf"


class Deaf(MemorySink):
    """Refuses everything at once."""

    hears = False

    def submit(self, batch: Batch) -> None:
        if self.hears:
            super().submit(batch)
            return
        size = len(batch.lines("json"))
        self._take(batch.kinds, size)
        self._dropped(batch.kinds, size, "refused", batch.spans)


def before(ended: Any, *sinks: str) -> PreviousRun:
    untold = [UntoldLoss("old", sink, "sink", 3, {}, "refused", []) for sink in sinks]
    return PreviousRun("old", "boot", "1.0", 1, ended, untold)


async def test_what_the_run_before_could_not_tell_is_told_or_handed_on(runs: Runs) -> None:
    """To each sink its own; of one that is not there any more, to any that is reached."""
    run = runs(
        MemorySink("good"),
        Deaf("deaf"),
        previous=before("undelivered", "good", "deaf", "gone"),
        settings=Settings(grace_seconds=0.2),
    )
    await run.start()
    await run.stop()
    assert run.of("stream.manifest")[0].previous == run.service._previous
    for note in run.notes[1:]:
        assert [one.sink for one in note.untold if one.run_id == "old"] == ["deaf"]


@pytest.mark.parametrize("ended", ["killed", "delivered"])
@pytest.mark.parametrize("reached", ["none", "pipe", "file"])
async def test_that_a_run_was_killed_is_handed_on_until_it_is_told(
    runs: Runs, ended: str, reached: str
) -> None:
    """By a sink that stays: what a terminal or a pipe was told is gone with its reader."""
    sink = Deaf("deaf") if reached == "none" else MemorySink("sink")
    sink.ends_quietly = reached == "pipe"
    run = runs(sink, previous=before(ended, "gone"), settings=Settings(grace_seconds=0.2))
    run.task = asyncio.create_task(run.service.run())
    await until(lambda: sink.account.received["stream.manifest"] == 1)
    await run.stop()
    said = [(one.sink, one.count) for one in run.notes[-1].untold if one.run_id == "old"]
    killed = [("", 0)] if ended == "killed" else []
    assert said == ([] if reached == "file" else [("gone", 3), *killed])
    if said and killed:
        assert "was killed" in run.notes[-1].untold[1].reason


async def test_a_reader_that_went_away_is_a_quiet_end_and_owed_nothing(runs: Runs) -> None:
    pipe = MemorySink("pipe")
    pipe.ends_quietly = True
    run = runs(pipe)
    await run.start()
    pipe.hold = True
    run.programs.emit("process.exec", 5)
    await until(lambda: pipe.account.pending == 5)
    await pipe.stop(0)
    assert await run.outcome() == Outcome("", "")
    assert run.notes[-1].untold == []


async def test_the_end_is_not_quiet_where_another_sink_went_on(runs: Runs) -> None:
    file, pipe = MemorySink("file"), MemorySink("pipe")
    pipe.ends_quietly = True
    run = runs(file, pipe)
    await run.start()
    await pipe.stop(0)
    run.programs.emit("process.exec", 5)
    await until(lambda: len(run.of("process.exec")) == 5)
    assert "file 5 delivered, 0 dropped" in await run.stop()


async def test_the_end_is_not_quiet_where_another_sink_failed(runs: Runs) -> None:
    pipe = MemorySink("pipe")
    pipe.ends_quietly = True
    run = runs(pipe, Failing("bad"))
    await run.start()
    await pipe.stop(0)
    with pytest.raises(SinkError, match="no sink is left: bad: ValueError: a defect"):
        await run.outcome()


async def test_events_have_the_time_as_text_if_that_is_asked_for(runs: Runs) -> None:
    run = runs(settings=Settings(rfc3339_time=True))
    await run.start()
    run.programs.emit("process.exec")
    await run.stop()
    for event in run.sink.events:
        assert event.time.endswith("Z")  # type: ignore[attr-defined]


class Unstartable(MemorySink):
    async def start(self) -> None:
        raise ConfigError("no such certificate")


class NeverStarts(MemorySink):
    starting = False

    async def start(self) -> None:
        self.starting = True
        await asyncio.Event().wait()


class Failing(MemorySink):
    tried = 0

    def submit(self, batch: Batch) -> None:
        self.tried += 1
        raise ValueError("a defect")


class SlowToStop(MemorySink):
    grace = 0.0

    async def stop(self, grace: float) -> None:
        self.grace = grace
        await super().stop(grace)


class FailsHalfway(MemorySink):
    """Takes the manifest, and of the first events those of a kind."""

    taken = 0

    def submit(self, batch: Batch) -> None:
        if "stream.manifest" in batch.kinds:
            super().submit(batch)
            return
        kind, count = next(iter(batch.kinds.items()))
        self.taken = min(2, count)
        self._take({kind: self.taken}, 100)
        raise ValueError("a defect")


class Dropping(MemorySink):
    def submit(self, batch: Batch) -> None:
        self.hold = True
        super().submit(batch)
        held, self._held = self._held, []
        for one in held:
            size = len(one.lines("json"))
            extra = [one.spans] if hasattr(one, "spans") else []
            self._dropped(one.kinds, size, "too large", *extra)


class CannotReopen(MemorySink):
    def reopen(self) -> None:
        raise ValueError("a defect")


class Reopening(MemorySink):
    reopened = 0

    def reopen(self) -> None:
        self.reopened += 1


# ---------------------------------------------------------------- the kernel side


def test_kinds_that_are_not_asked_for_are_off() -> None:
    programs = MemoryPrograms()
    kernel = MemoryKernel(Settings(), frozenset({"process.exec"}), programs)
    assert [kind for kind in KINDS if programs.enabled(kind)] == ["process.exec"]
    assert kernel.sensors == ["process"]
    kernel.close()
    programs.release()


def test_filters_that_change_leave_only_the_new_ones() -> None:
    programs = MemoryPrograms()
    kernel = MemoryKernel(Settings(filters=Filters(uids=(1, 2))), ALL, programs)
    kernel.set_filters(Filters(uids=(2,), exclude_pids=(7,)))
    generation = programs.memory("settings")[GENERATION_AT]
    in_force = {key: v for key, v in programs.filters.items() if key[1][8] == generation}
    assert in_force == {
        ("filter_uids", struct.pack("<QQ", 2, generation)): b"\x01",
        ("filter_pids", struct.pack("<QQ", 7, generation)): b"\x02",
    }
    kernel.close()
    programs.release()


async def test_the_manifest_comes_again_where_a_topic_was_made_anew() -> None:
    """To that sink, and once."""
    one, other = MemorySink(), MemorySink()
    run = Run(one, other)
    await run.start()
    one.listener.sink_anew(one)
    one.listener.sink_anew(one)
    await until(lambda: len(run.of("stream.manifest", one)) == 2)
    await asyncio.sleep(1.2)
    await run.stop()
    first, second = run.of("stream.manifest", one)
    assert first.coverage == second.coverage
    assert first.seq != second.seq
    assert len(run.of("stream.manifest", other)) == 1
