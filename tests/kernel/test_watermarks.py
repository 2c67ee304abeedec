"""`watermark_ns` in the heartbeats: nothing that is older follows, and it does go on."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from pathlib import Path

import pytest

from streamer.events.stream import StreamHeartbeat, StreamRecord
from tests.kernel.agent import Agent, Recording
from tests.kernel.roles import Role
from tests.kernel.scope import Scope, checkpoint
from tests.kernel.system import open_missing

pytestmark = pytest.mark.kernel

BEATS = 5
MARK = b'{"event":"stream.heartbeat"'


def open_until(stop: Path, cpu: int) -> None:
    """No more than a sink takes on a slow machine: heartbeats would wait behind the backlog."""
    os.sched_setaffinity(0, {cpu})
    while not stop.exists():
        open_missing("/no/such/", 20)
        time.sleep(0.002)


def open_on_all_cpus(stop: Path) -> None:
    """Opens on every CPU, two at a time on each, so that they preempt one another."""
    cpus = sorted(os.sched_getaffinity(0))
    roles = [Role("opens", open_until, stop, cpu) for cpu in cpus * 2]
    checkpoint()
    for role in roles:
        role.result()


def marks_of(recording: Recording) -> dict[tuple[str, int], list[int]]:
    """The watermarks of each ring and CPU, in order."""
    found: dict[tuple[str, int], list[int]] = defaultdict(list)
    for beat in recording.of("stream.heartbeat"):
        for mark in beat.marks:
            found[mark.ring, mark.cpu].append(mark.watermark_ns)
    return found


@pytest.mark.parametrize(
    "transport", [pytest.param("auto", marks=pytest.mark.every_kernel), "perf"]
)
def test_nothing_older_follows(scope: Scope, tmp_path: Path, transport: str) -> None:
    config = f'heartbeat_seconds = 1\n[rings]\ntransport = "{transport}"\n'
    stop = tmp_path / "stop"
    with Agent(tmp_path, *scope.options, events="file.open,process.*", config=config) as agent:
        with scope.start(open_on_all_cpus, stop) as actor:
            actor.reached()
            agent.wait_for(MARK, BEATS)
            stop.touch()
            actor.proceed()
            actor.result()
        recording = agent.stop()  # checks that none that follows a watermark is older
    marks = marks_of(recording)
    cpus = os.sched_getaffinity(0)
    for cpu in cpus:
        times = marks["bulk", cpu]
        assert times == sorted(times)
        assert len(set(times)) >= BEATS - 2  # those of the first seconds may not be known yet
    last = {(m.ring, m.cpu): m.watermark_ns for m in recording.heartbeat.marks}
    for event in recording.events:
        assert isinstance(event, StreamRecord) or event.boot_ns < last[event.ring, event.cpu]


def test_what_is_lost_holds_nothing_back(scope: Scope, tmp_path: Path) -> None:
    """Of a ring that overflowed while nothing was read, and that nothing follows."""
    config = "heartbeat_seconds = 1\n[rings]\nbulk_bytes = 4096\n"
    stop = tmp_path / "stop"
    with Agent(tmp_path, *scope.options, events="file.open", config=config) as agent:
        with scope.start(open_on_all_cpus, stop) as actor:
            actor.reached()
            agent.send(signal.SIGSTOP)
            stop.touch()
            actor.proceed()
            actor.result()
        agent.send(signal.SIGCONT)
        agent.wait_for(b'{"event":"stream.loss"')
        beats = agent.output.read_bytes().count(MARK)
        agent.wait_for(MARK, beats + 4)
        recording = agent.stop(check=False)
    recording.check_watermarks()
    assert recording.losses
    beats_seen = recording.of("stream.heartbeat")
    newest = max(event.boot_ns for event in recording.events)
    before_the_end = beats_seen[-2]
    assert isinstance(before_the_end, StreamHeartbeat)
    assert not before_the_end.final
    assert all(mark.watermark_ns > newest for mark in before_the_end.marks if mark.ring == "bulk")
