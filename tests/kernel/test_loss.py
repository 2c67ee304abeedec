"""Rings that overflow: every event is delivered or in a `stream.loss`, exactly."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.agent import Agent, Recording
from tests.kernel.pace import repetitions
from tests.kernel.roles import Role
from tests.kernel.scope import Scope, checkpoint
from tests.kernel.system import open_missing

pytestmark = pytest.mark.kernel

FLOOD = repetitions(3000, 300)
RUNS = 20
TRANSPORTS = ("auto", "perf")


def flood(name: str, cpu: int) -> None:
    os.sched_setaffinity(0, {cpu})
    open_missing(f"/no/{name}/", FLOOD)


def flood_everywhere(name: str) -> int:
    """From a process on each CPU. How many opens that makes."""
    cpus = sorted(os.sched_getaffinity(0))
    roles = [Role("flood", flood, f"{name}-{cpu}", cpu) for cpu in cpus]
    for role in roles:
        role.result()
    return FLOOD * len(cpus) + len(cpus)  # each opens /proc/self/comm to take its name


def run_often(program: str) -> None:
    for i in range(RUNS):
        os.waitpid(os.posix_spawn(program, [b"run", str(i).encode()], {}), 0)


def overflow(program: str) -> int:
    """Two floods while nothing is read, with a little in between, and nothing after them."""
    checkpoint("before")
    opens = flood_everywhere("first")
    run_often(program)
    checkpoint("flooded")
    open_missing("/no/between/", 10)
    checkpoint("between")
    return opens + 10 + flood_everywhere("second")


def stop_reading(agent: Agent) -> None:
    agent.send(signal.SIGSTOP)
    status = Path(f"/proc/{agent.pid}/status")
    while "State:\tT" not in status.read_text():
        time.sleep(0.01)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_delivered_and_lost_are_what_was_done(
    scope: Scope, subject: Path, tmp_path: Path, transport: str
) -> None:
    """Of floods into a tiny ring, also of one that nothing follows. Other rings lose nothing."""
    config = f'[rings]\nbulk_bytes = 4096\ntransport = "{transport}"\n'
    with Agent(tmp_path, *scope.options, config=config) as agent:
        with scope.start(overflow, str(subject)) as actor:
            actor.reached()
            stop_reading(agent)
            actor.proceed()
            actor.reached()
            agent.send(signal.SIGCONT)
            agent.wait_for(b'{"event":"stream.loss"')  # told while it runs: nothing follows yet
            actor.proceed()
            actor.reached()
            agent.wait_for(b'"path":"/no/between/9"')
            stop_reading(agent)
            actor.proceed()
            opens = actor.result()
        agent.send(signal.SIGTERM)
        agent.send(signal.SIGCONT)
        recording = agent.wait()
    recording.check()
    assert_all_accounted(recording, opens)
    assert len(recording.of("process.exec")) == RUNS
    assert {loss.ring for loss in recording.losses} == {"bulk"}


def assert_all_accounted(recording: Recording, opens: int) -> None:
    delivered = recording.of("file.open")
    lost = sum(loss.count for loss in recording.losses)
    assert len(delivered) + lost == opens
    assert lost > opens // 2
    assert len({event.path for event in delivered if event.path.startswith("/no/")}) == len(
        [event for event in delivered if event.path.startswith("/no/")]
    )
    for loss in recording.losses:
        assert loss.kinds == {"file.open": loss.count}
        assert (loss.stage, loss.reason) == ("kernel", "no room in the kernel")
    assert recording.heartbeat.counts["file.open"].lost == lost
    assert len({loss.cpu for loss in recording.losses}) == len(os.sched_getaffinity(0))


def flood_all(name: str) -> int:
    return flood_everywhere(name)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_reader_that_keeps_up_loses_nothing(scope: Scope, tmp_path: Path, transport: str) -> None:
    """The same flood, with a ring for it: the reader is woken in time."""
    config = f'[rings]\ntransport = "{transport}"\n'
    with Agent(tmp_path, *scope.options, events="file.open", config=config) as agent:
        opens: Any = scope.act(flood_all, "kept")
        recording = agent.stop()
    assert len(recording.events) == opens
    assert recording.losses == []
