"""Several ring buffers for bulk: each CPU keeps to one, and a flood on one costs no other."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from streamer.events.kinds import FileOpen
from tests.kernel.agent import Agent, Recording
from tests.kernel.pace import repetitions
from tests.kernel.roles import Role
from tests.kernel.scope import Scope, checkpoint
from tests.kernel.system import open_missing
from tests.kernel.test_loss import stop_reading

pytestmark = pytest.mark.kernel

OPENS = repetitions(2000, 300)
FLOOD = 1500  # of 150 bytes at least
FEW = 50
EACH = 1 << 16
CONFIG = "[rings]\nbulk_rings = 2\nbulk_bytes = {total}\n"


def open_on(cpu: int, opens: int) -> None:
    os.sched_setaffinity(0, {cpu})
    open_missing(f"/no/{cpu}/", opens)


def two_cpus() -> tuple[int, int]:
    """Two that have ring buffers of their own: an even and an odd one of a machine that has two."""
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        pytest.fail("this takes two CPUs")
    return first, others[-1]


def open_everywhere() -> None:
    roles = [Role("opens", open_on, cpu, OPENS) for cpu in two_cpus()]
    for role in roles:
        role.result()


def flood_one(many: int, few: int) -> None:
    """On one CPU more than its ring buffer has room for, on the other less, while nobody reads."""
    checkpoint()
    for cpu, opens in ((many, FLOOD), (few, FEW)):
        Role("opens", open_on, cpu, opens).result()


def opens_by_cpu(recording: Recording) -> Counter[str]:
    """Of the paths that were asked for, by the CPU that they name."""
    found: Counter[str] = Counter()
    for event in recording.of("file.open"):
        assert isinstance(event, FileOpen)
        if event.path.startswith("/no/"):
            found[event.path.split("/")[2]] += 1
    return found


@pytest.mark.parametrize(
    "transport", [pytest.param("auto", marks=pytest.mark.every_kernel), "perf"]
)
def test_each_cpu_has_its_own(scope: Scope, tmp_path: Path, transport: str) -> None:
    """Perf buffers are each CPU's anyway, and hold what the ring buffers would have together."""
    config = CONFIG.format(total=8 << 20) + f'transport = "{transport}"\n'
    with Agent(tmp_path, *scope.options, events="file.open", config=config) as agent:
        with scope.start(open_everywhere) as actor:
            actor.result()
        recording = agent.stop()  # numbers, account, watermarks
    assert opens_by_cpu(recording) == {str(cpu): OPENS for cpu in two_cpus()}
    if transport == "auto":
        assert recording.manifest.ring_bytes["bulk"] == 8 << 20
    seqs: dict[int, int] = {}
    for event in recording.of("file.open"):
        assert event.seq > seqs.get(event.cpu, 0)
        seqs[event.cpu] = event.seq
        if event.path.startswith("/no/"):
            assert event.cpu == int(event.path.split("/")[2])


@pytest.mark.parametrize("rings", [1, 2])
def test_a_flood_on_one_cpu_costs_the_other_nothing(
    scope: Scope, tmp_path: Path, rings: int
) -> None:
    """With a ring buffer for both it does, as the same user pays."""
    many, few = two_cpus()
    config = f"[rings]\nbulk_rings = {rings}\nbulk_bytes = {2 * EACH}\n"
    with Agent(tmp_path, *scope.options, events="file.open", config=config) as agent:
        with scope.start(flood_one, many, few) as actor:
            actor.reached()
            stop_reading(agent)
            actor.proceed()
            actor.result()
        agent.send(signal.SIGCONT)
        recording = agent.stop(check=False)
    recording.check_sequence()
    recording.check_watermarks()
    losers = {loss.cpu for loss in recording.losses}
    assert losers == ({many} if rings == 2 else {many, few})
    assert (opens_by_cpu(recording)[str(few)] == FEW) == (rings == 2)
