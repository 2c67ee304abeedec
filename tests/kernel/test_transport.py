"""Perf buffers where ring buffers are refused, or not wanted: the same events, as well counted."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from streamer.config.settings import Rings, Settings
from streamer.kernel import loader, state
from streamer.ring.reader import PerfSource, RingReader
from tests.conftest import Require
from tests.kernel.agent import ROOT, Agent, Recording
from tests.kernel.live import Live
from tests.kernel.pace import SLOWNESS, repetitions, seconds
from tests.kernel.scope import Scope
from tests.kernel.system import open_missing

pytestmark = pytest.mark.kernel

WITHOUT_RINGS = (sys.executable, "-m", "tests.kernel.without_rings")
PERF = '[rings]\ntransport = "perf"\n'
FLOOD = repetitions(2000, 300)


def opens_on(cpu: int, name: str, count: int) -> None:
    os.sched_setaffinity(0, {cpu})
    open_missing(f"/no/{name}/", count)


def check(prefix: tuple[str, ...] = (), *arguments: str) -> dict[str, object]:
    command = [*prefix, sys.executable, "-m", "streamer", "check", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=seconds(60), check=False)
    found: dict[str, object] = json.loads(done.stdout)
    return found


# ---------------------------------------------------------------- which one is used, and why


@pytest.mark.every_kernel
def test_where_ring_buffers_are_refused_nothing_else_is_missing() -> None:
    usual, refused = check(), check(WITHOUT_RINGS)
    assert usual["kinds"] == refused["kinds"]
    assert usual["transport"] in ("ring buffers", refused["transport"])
    said = str(refused["transport"])
    assert said.startswith("perf buffers: ring buffers are refused: Invalid argument")


def test_the_manifest_says_how_events_come_and_why(scope: Scope, tmp_path: Path) -> None:
    for name, prefix, config, reason in (
        ("refused", WITHOUT_RINGS, "", "ring buffers are refused: Invalid argument"),
        ("forced", (), PERF, ""),
    ):
        config += "[rings]\n" if not config else ""
        config += "critical_bytes = 1048576\nbulk_bytes = 65536\n"
        options = scope.options
        with Agent(tmp_path / name, *options, config=config, prefix=prefix) as agent:
            recording = agent.stop()
        manifest = recording.manifest
        assert (manifest.transport, manifest.transport_reason) == ("perf", reason)
        # What all CPUs have together keeps to what was asked for.
        each = 1048576 // len(loader.present_cpus())
        assert manifest.ring_bytes["critical"] <= 1048576
        assert manifest.ring_bytes["critical"] > each * len(loader.online_cpus()) // 2
        assert set(manifest.coverage[kind].status for kind in ("file.open",)) == {"full"}


def test_ring_buffers_are_used_where_they_can_be(scope: Scope, require: Require) -> None:
    with Live(scope, {"file.open"}) as live:
        if live.state.transport.reason.startswith("ring buffers are refused"):
            assert live.state.transport.name == "perf"
        else:
            assert live.state.transport.name == "ring"
            assert not live.state.buffers


# ---------------------------------------------------------------- what comes


def run_with_much(program: str, first: int, count: int) -> None:
    for i in range(first, first + count):
        argv = [b"much", *(f"{i}:{j}:".encode() + b"x" * 3000 for j in range(i % 6))]
        os.waitpid(os.posix_spawn(program, argv, {}), 0)


def test_large_records_come_whole_however_they_lie(scope: Scope, subject: Path) -> None:
    """Also those that go round the end of a buffer, of which there are many here."""
    rounds, each = repetitions(60, 20), 3
    rings = Rings(transport="perf", critical_bytes=1 << 16 << len(loader.present_cpus()) // 2)
    with Live(scope, {"process.exec"}, Settings(rings=rings)) as live:
        for i in range(rounds):
            scope.act(run_with_much, str(subject), i * each, each)
            live.read()
        events = live.events
        live.check()
        assert [len(event.argv) for event in events] == [1 + i % 6 for i in range(rounds * each)]
        for i, event in enumerate(events):
            assert event.argv[1:] == [f"{i}:{j}:" + "x" * 3000 for j in range(i % 6)]


def test_the_order_of_each_cpu_is_kept(scope: Scope, tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    with Live(scope, {"file.open"}, Settings(rings=Rings(transport="perf"))) as live:
        for i in range(20):
            for cpu in cpus:
                scope.act(opens_on, cpu, f"{i}-{cpu}", 3)
        events = live.read()
        for cpu in cpus:
            mine = [event for event in events if event.cpu == cpu]
            assert [event.seq for event in mine] == list(range(1, len(mine) + 1))
        # Of all CPUs the oldest comes first, as in one ring.
        assert [event.path for event in events if event.path.startswith("/no/")] == [
            f"/no/{i}-{cpu}/{j}" for i in range(20) for cpu in cpus for j in range(3)
        ]
        live.check()


# ---------------------------------------------------------------- what is lost


def lost_of(live: Live) -> int:
    """What the kernel says in the buffers themselves."""
    return sum(source.buffers.lost for source in perf_sources(live))


def perf_sources(live: Live) -> Iterable[PerfSource]:
    for source in live.opened:
        assert isinstance(source, PerfSource)
        yield source


def test_the_kernel_counts_the_same_losses(scope: Scope) -> None:
    """What found no room is counted by the programs and, apart from them, by the kernel."""
    cpus = sorted(os.sched_getaffinity(0))
    rings = Rings(transport="perf", bulk_bytes=4096 * len(cpus))
    with Live(scope, {"file.open"}, Settings(rings=rings)) as live:
        for _ in range(3):
            for cpu in cpus:
                scope.act(opens_on, cpu, "flood", FLOOD)
            live.read()
        for cpu in cpus:
            scope.act(opens_on, cpu, "after", 1)  # the kernel tells with the next record
        counts = live.counts("file.open")
        live.check()
        assert counts.lost > 2 * FLOOD * len(cpus)
        assert lost_of(live) == counts.lost
        assert counts.produced == counts.read + counts.filtered + counts.lost


def test_a_cpu_that_comes_up_later(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its events are lost, and counted, until it has its buffers; the others' are not."""
    first, *rest = sorted(os.sched_getaffinity(0))
    late = rest[-1]
    up = [cpu for cpu in loader.online_cpus() if cpu != late]
    for module in (state, loader):
        monkeypatch.setattr(module, "online_cpus", lambda: up)
    with Live(scope, {"file.open"}, Settings(rings=Rings(transport="perf"))) as live:
        scope.act(opens_on, late, "early", 30)
        scope.act(opens_on, first, "elsewhere", 7)
        before = live.counts("file.open")
        assert before.produced == before.read + before.filtered + before.lost
        assert before.lost >= 30
        assert before.read >= 7
        up.append(late)
        came = live.state.open_buffers()
        assert came.keys() == {late}
        for source in perf_sources(live):
            source.add(late, came[late][source.name])
        scope.act(opens_on, late, "late", 11)
        after = live.counts("file.open")
        live.check()
        assert [e.path for e in live.events if e.path.startswith("/no/late/")] == [
            f"/no/late/{i}" for i in range(11)
        ]
        assert not [e for e in live.events if e.path.startswith("/no/early/")]
        assert after.produced == after.read + after.filtered + after.lost
        assert after.lost == before.lost
        assert lost_of(live) == 0  # the kernel does not count what has no buffer


def test_a_cpu_that_takes_numbers_and_writes_nothing_is_noticed(scope: Scope) -> None:
    """Its buffer is as if it had been down for a moment; one that is full is not."""
    cpu = max(os.sched_getaffinity(0))
    settings = Settings(rings=Rings(transport="perf", bulk_bytes=4096))
    with Live(scope, {"file.open"}, settings) as live:
        _, bulk = perf_sources(live)

        def mute_after(opens: int, *, read: bool = True) -> list[int]:
            scope.act(opens_on, cpu, "some", opens)
            if read:
                live.read()
            return bulk.mute(live.seqs()["bulk"])

        assert mute_after(1) == mute_after(1) == mute_after(0) == []
        assert mute_after(FLOOD, read=False) == mute_after(FLOOD, read=False) == []
        live.read()
        assert mute_after(1) == mute_after(0) == []
        for index in (2 * cpu, 2 * cpu + 1):
            live.remove("bulk", index.to_bytes(4, "little"))
        assert mute_after(1) == []  # it may have come a moment later
        assert mute_after(0) == [cpu]
        assert mute_after(0) == []
        assert mute_after(1) == []
        assert mute_after(0) == [cpu]
        live.check()


def test_nobody_is_given_more_buffers_than_there_are_cpus() -> None:
    """However often the unprivileged process asks, and for whatever: each takes locked memory."""
    made = loader.Loader()
    made.load_core({"critical": 1 << 16, "bulk": 1 << 16}, None, "perf")
    try:
        cpus = loader.online_cpus()
        for cpu in cpus:
            first = made.open_buffers(cpu)
            assert first.keys() == {"critical", "bulk"}
            for fd in first.values():
                os.close(fd)
        for _ in range(3):
            for cpu in (*cpus, max(loader.present_cpus()) + 1, 65535):
                assert made.open_buffers(cpu) == {}
    finally:
        made.close()


def turn(cpu: int, on: bool) -> None:
    Path(f"/sys/devices/system/cpu/cpu{cpu}/online").write_text(str(int(on)))


def await_buffers(cpu: int) -> None:
    """Until the agent has made new ones: it looks every second."""
    time.sleep(seconds(1))


@pytest.mark.every_kernel
def test_cpus_that_go_down_and_come_up(
    scope: Scope, tmp_path: Path, require_kernel: Require
) -> None:
    """For real: one that is down at the start, and then away for so short that nobody sees it."""
    cpu = max(loader.present_cpus())
    switch = Path(f"/sys/devices/system/cpu/cpu{cpu}/online")
    require_kernel(SLOWNESS > 1 and switch.exists(), "a machine that others use keeps its CPUs")
    done = 0
    turn(cpu, False)
    try:
        with Agent(tmp_path, *scope.options, events="file.open", config=PERF) as agent:
            for away in (True, False):
                turn(cpu, True)
                scope.act(opens_on, cpu, "unseen", 50)
                await_buffers(cpu)
                scope.act(opens_on, cpu, "seen", 50)
                agent.wait_for(b'"path":"/no/seen/49"', 1 if away else 2)
                turn(cpu, False)
                done += 100
            turn(cpu, True)
            recording = agent.stop()
    finally:
        turn(cpu, True)
    recording.check()
    assert_accounted(recording, done)


def assert_accounted(recording: Recording, done: int) -> None:
    delivered = [event for event in recording.of("file.open") if event.path.startswith("/no/")]
    assert len([event for event in delivered if event.path.startswith("/no/seen/")]) == done // 2
    counts = recording.heartbeat.counts["file.open"]
    lost = sum(loss.count for loss in recording.losses)
    assert counts.produced == counts.read + counts.filtered + counts.lost
    assert counts.lost == lost >= 50


# ---------------------------------------------------------------- waking


@pytest.mark.parametrize("transport", ["auto", "perf"])
async def test_a_sleeping_reader_is_woken_by_the_next_event(scope: Scope, transport: str) -> None:
    """Of whichever CPU, time and again. Nothing else looks at the rings here."""
    cpus = sorted(os.sched_getaffinity(0))
    settings = Settings(rings=Rings(transport=transport))  # type: ignore[arg-type]
    with Live(scope, {"file.open"}, settings) as live:
        paths: list[str] = []
        errors: list[Exception] = []
        reader = RingReader(
            live.opened,
            live.state.reader_state,
            on_batch=lambda batch: paths.extend(event.path for event in batch.events),
            on_error=errors.append,
            poll_interval_ms=2,
            drain_records=100,
        )
        reader.start()
        try:
            for i in range(4):
                for cpu in cpus:
                    await until(lambda: reader._timer is None)  # it sleeps
                    scope.act(opens_on, cpu, f"{i}-{cpu}", 2)
                    await until(lambda path=f"/no/{i}-{cpu}/1": path in paths)  # type: ignore[misc]
        finally:
            reader.close()
        assert errors == []


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(seconds(20)):
        while not condition():  # noqa: ASYNC110 - nothing announces what is waited for
            await asyncio.sleep(0.005)
