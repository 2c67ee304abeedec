"""Of a kind that is sampled, one in so many events is reported, and every other one is counted."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import NamedTuple

import pytest

from streamer.events.stream import KindCounts
from tests.kernel.agent import Agent, Recording
from tests.kernel.scope import Scope, checkpoint
from tests.kernel.system import open_missing

pytestmark = pytest.mark.kernel

RATE, OPENS, RUNS = 10, 20_000, 50
CONFIG = f"""
[kernel]
sample = {{"file.open" = {RATE}, "process.exec" = 1}}

[rings]
bulk_bytes = 65536
"""


def act(program: str) -> None:
    """Opens, of which some find no room, and executions."""
    open_missing("/no/before/", OPENS // 4)
    for i in range(RUNS):
        os.waitpid(os.posix_spawn(program, [b"run", str(i).encode()], {}), 0)
    checkpoint()
    open_missing("/no/meanwhile/", OPENS // 2)
    checkpoint()
    open_missing("/no/after/", OPENS // 4)


class Sampled(NamedTuple):
    recording: Recording

    def counts(self, kind: str) -> KindCounts:
        return self.recording.heartbeat.counts[kind]


@pytest.fixture(scope="module")
def sampled(cgroups: Path, subject: Path, tmp_path_factory: pytest.TempPathFactory) -> Sampled:
    directory = tmp_path_factory.mktemp("sampling")
    with (
        Scope(cgroups) as scope,
        Agent(directory, *scope.options, config=CONFIG) as agent,
        scope.start(act, str(subject)) as actor,
    ):
        actor.reached()
        agent.send(signal.SIGSTOP)
        actor.proceed()
        actor.reached()
        agent.send(signal.SIGCONT)
        agent.wait_for(b'{"event":"stream.loss"')
        actor.proceed()
        actor.result()
        return Sampled(agent.stop())


def test_every_event_is_in_the_account(sampled: Sampled) -> None:
    """Reported, kept back by sampling, or lost; what a filter keeps back is not among them."""
    found = sampled.counts("file.open")
    assert found.read + found.shed + found.lost == OPENS
    assert found.produced == OPENS + found.filtered
    assert found.read == len(sampled.recording.of("file.open"))
    assert found.lost == sum(loss.count for loss in sampled.recording.losses) > 0


def test_one_in_so_many_is_reported(sampled: Sampled) -> None:
    """As exactly as chance allows: within six standard deviations."""
    found = sampled.counts("file.open")
    fair = OPENS / RATE
    assert abs(found.read + found.lost - fair) < 6 * math.sqrt(fair * (1 - 1 / RATE))


def test_each_stands_for_so_many(sampled: Sampled) -> None:
    assert {event.weight for event in sampled.recording.of("file.open")} == {RATE}


def test_other_kinds_are_not_sampled(sampled: Sampled) -> None:
    """Nor is one of which one in one is asked for."""
    for kind in ("process.exec", "process.fork", "process.exit"):
        found = sampled.counts(kind)
        assert (found.read, found.shed, found.lost) == (RUNS, 0, 0)
        assert {event.weight for event in sampled.recording.of(kind)} == {1}
