"""What happens to the agent itself: killed, stopped, on a full disk, without its brokers for long,
and with too little memory, CPU time or descriptors.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from streamer.events.stream import PreviousRun, SeqRange
from tests.faults.conftest import Cluster, Faults
from tests.faults.consumers import KafkaFollower, by_kcat
from tests.faults.experiment import (
    FURTHER_MB,
    LEAST_RATE,
    MOST_MB,
    MOST_RECOVERY,
    Experiment,
    Memory,
    configured,
    verify,
)
from tests.faults.limits import limited
from tests.faults.load import Counts, Load, build
from tests.faults.table import Row
from tests.kernel.scope import Scope

pytestmark = [pytest.mark.faults, pytest.mark.kernel, pytest.mark.kafka]

slow = pytest.mark.slow
Record = Callable[[Row], None]
KILLS = 50
OUTAGE_SECONDS = float(os.environ.get("STREAMER_FAULTS_OUTAGE", "60"))
"""Of the ten minutes; STREAMER_FAULTS_OUTAGE=600 is all of them."""


def outage(cluster: Cluster, experiment: Experiment, seconds: float) -> None:
    """No broker can be reached, for so long."""
    for proxy in cluster.proxies:
        proxy.cut()
    time.sleep(seconds)
    for proxy in cluster.proxies:
        proxy.heal()
    experiment.heal()


@slow
def test_stopped(kafka_fault: Faults, record: Record) -> None:
    """What finds no room in the rings meanwhile is told: of what is critical nothing."""
    with kafka_fault("SIGSTOP of the agent for 20 s", rate=20_000) as experiment:
        experiment.steady()
        experiment.agent.send(signal.SIGSTOP)
        time.sleep(20)
        experiment.agent.send(signal.SIGCONT)
        experiment.heal()
        row = experiment.finish()
        assert row.accounted > 0
        record(row)


@slow
def test_long_outage(cluster: Cluster, kafka_fault: Faults, record: Record) -> None:
    """All of it goes to disk, and comes from there."""
    factor = 600 / OUTAGE_SECONDS
    note = f"compressed to {OUTAGE_SECONDS:.0f} s" if factor > 1 else ""
    name = "outage of ten minutes at 20,000 events/s"
    with kafka_fault(name, proxied=True, rate=20_000) as experiment:
        experiment.steady()
        outage(cluster, experiment, OUTAGE_SECONDS)
        row = experiment.finish(note=note)
        assert row.accounted == 0
        record(row)


@slow
def test_outage_of_two_workers(cluster: Cluster, kafka_fault: Faults, record: Record) -> None:
    """Without a spool, which they cannot have: each holds its own part, then rings fill up, and
    what finds no room is told for both.
    """
    with kafka_fault(
        "all brokers away for 8 s, two workers without a spool",
        proxied=True, rate=20_000, spool="off", top="workers = 2",
    ) as experiment:  # fmt: skip
        experiment.steady()
        assert len(experiment.agent.look().workers) == 2
        outage(cluster, experiment, 8)
        row = experiment.finish(most_mb=MOST_MB + FURTHER_MB)
        assert row.duplicates == 0
        assert row.accounted > 0
        record(row)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    options = "size=1m,mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "spool", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


@slow
def test_full_disk(cluster: Cluster, kafka_fault: Faults, record: Record, small_disk: Path) -> None:
    """Under the spool, while no broker can be reached: back to memory, and then to the rings."""
    with kafka_fault(
        "disk full under the spool, brokers away",
        proxied=True, rate=20_000, place=small_disk / "spool",
    ) as experiment:  # fmt: skip
        experiment.steady()
        outage(cluster, experiment, 8)
        row = experiment.finish()
        assert experiment.agent.stderr.count("the spool is not used for now") == 1
        assert row.accounted > 0
        record(row)


@slow
def test_little_memory(cluster: Cluster, kafka_fault: Faults, record: Record) -> None:
    """A cgroup of 150 MiB, rings and page cache included, while no broker can be reached."""
    with limited("memory") as limit:
        limit.memory(150 << 20)
        with kafka_fault(
            "memory limit of 150 MiB (cgroup), brokers away",
            proxied=True, rate=20_000, prefix=limit.prefix,
        ) as experiment:  # fmt: skip
            experiment.steady()
            outage(cluster, experiment, 8)
            row = experiment.finish()
            assert limit.killed == 0
            record(row)


@slow
def test_little_cpu(kafka_fault: Faults, record: Record) -> None:
    with (
        limited("cpu") as limit,
        kafka_fault(
            "a twentieth of a CPU (cgroup) for 10 s", rate=20_000, prefix=limit.prefix
        ) as experiment,
    ):
        experiment.steady()
        limit.cpu(0.05)
        time.sleep(10)
        limit.cpu(None)
        experiment.heal()
        record(experiment.finish())


@slow
def test_few_descriptors(cluster: Cluster, kafka_fault: Faults, record: Record) -> None:
    """None is left while connections are lost, and for a while after that."""
    with kafka_fault("no descriptor left, connections lost", proxied=True) as experiment:
        experiment.steady()
        limit_descriptors(experiment.agent.pid, "3:")
        for proxy in cluster.proxies:
            proxy.cut()
            proxy.heal()
        time.sleep(6)
        limit_descriptors(experiment.agent.pid, "1024:")
        experiment.heal()
        record(experiment.finish())


def limit_descriptors(pid: int, limit: str) -> None:
    """The soft limit of the worker's: by its own user, as nobody else may."""
    user = str(os.stat(f"/proc/{pid}").st_uid)
    command = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", "prlimit"]
    subprocess.run([*command, "--pid", str(pid), f"--nofile={limit}"], check=True)


# ---------------------------------------------------------------- killed


class Numbered(msgspec.Struct):
    """Of a record what says which one it was of those that the load made, and how far runs came."""

    event: str
    id: str
    path: str = ""
    argv: list[str] = []
    previous: PreviousRun | None = None
    run_id: str = ""
    ranges: list[SeqRange] = []


Numbers = dict[tuple[str, int], set[int]]
"""Of a run: those of its events that are there, or told as lost, by ring and CPU."""


def check_marks(
    runs: Mapping[str, Numbers], before: Mapping[str, PreviousRun], offered: Mapping[str, Counts]
) -> int:
    """Of each run `before` all is there up to the number that the next manifest names, and nothing
    more, so that what was lost is what comes after it. `offered` is what its loads made, by ring:
    nobody can have numbered more. How many runs were compared.
    """
    compared = 0
    for run, numbers in runs.items():
        if run not in before:  # the next was killed before its manifest was on disk
            assert any(one.run_id == run for last in before.values() for one in last.untold), run
            continue
        marks = {(mark.ring, mark.cpu): mark for mark in before[run].marks}
        assert before[run].ended == "killed"
        assert numbers.keys() <= marks.keys()
        for place, mark in marks.items():
            assert numbers.get(place, set()) == set(range(1, mark.last + 1)), f"{run} {mark}"
            assert mark.seq <= mark.last, f"{run} {mark}"
        for ring, made in offered[run].items():
            taken = sum(max(mark.taken, mark.last) for mark in marks.values() if mark.ring == ring)
            assert taken <= made, f"{run}: {taken} of {made} in {ring}: {before[run].marks}"
        compared += 1
    return compared


@slow
def test_killed(cluster: Cluster, scope: Scope, tmp_path: Path, record: Record) -> None:
    """SIGKILL at 50 random moments, some of them while it starts; what was read is not lost.

    Each run has a load of its own: the numbers of those that are there have no hole, so that only
    the newest are missing, and the next manifest says from where on. What is offered while no
    agent runs is nobody's.
    """
    topic = "faults-kills"
    cluster.create(topic)
    bootstrap = ", ".join(f'"{one}"' for one in cluster.address.split(","))
    sink = f'type = "kafka"\nbootstrap = [{bootstrap}]\ntopic = "{topic}"'
    chance = random.Random(8)
    peak, offered, done = 0.0, Counts(), {}
    offered_in: dict[int, Counts] = {}
    with ExitStack() as stack:
        follower = stack.enter_context(KafkaFollower(cluster.address, topic, tmp_path))
        for run in range(KILLS):
            agent = configured(scope, tmp_path / "agent", sink, spool="wal")
            stack.callback(agent.kill)
            starting = run % 5 == 4
            if not starting:
                agent.start()
                memory = Memory((agent.pid, agent.helper_pid))
            with (
                Load(build(), scope, "opens", f"/no/{run}/", "5000") as opens,
                Load(build(), scope, "spawns", f"run-{run}", "0", "20") as spawns,
            ):
                if starting:
                    agent.launch()
                time.sleep(chance.uniform(0.0, 1.5))
                agent.kill()
                done[run] = opens.stop(), spawns.stop()
                both = opens.expected + spawns.expected
                offered += both
                bulk = both["file.open"]
                offered_in[run] = Counts({"bulk": bulk, "critical": both.total() - bulk})
            if not starting:
                peak = max(peak, memory.end())
        agent = configured(scope, tmp_path / "agent", sink, spool="wal")
        with Load(build(), scope, "opens", "/no/last/", "5000") as opens, agent:
            started = time.monotonic()
            time.sleep(4)
            opens.stop()
            offered += opens.expected
            agent.drain()
            agent.process.terminate()
            assert agent.process.wait(60) == 0, agent.stderr
    recovery = follower.arrivals.at_rate_after(started, LEAST_RATE * 5000)
    decode = msgspec.json.Decoder(Numbered).decode
    records, known = 0, set[str]()
    numbers: dict[str, list[int]] = defaultdict(list)
    runs: dict[str, Numbers] = defaultdict(lambda: defaultdict(set))
    before: dict[str, PreviousRun] = {}
    number_of: dict[str, int] = {}
    for line in by_kcat(cluster.address, topic):
        seen = decode(line)
        records += 1
        if seen.previous is not None:
            before[seen.previous.run_id] = seen.previous
        for one in seen.ranges:
            runs[seen.run_id][one.ring, one.cpu].update(range(one.seq_from, one.seq_to + 1))
        if seen.event.startswith("stream.") or seen.id in known:
            continue
        known.add(seen.id)
        run_id, ring, cpu, seq = seen.id.rsplit("-", 3)
        runs[run_id][ring, int(cpu)].add(int(seq))
        if seen.path:
            _, _, run_name, number = seen.path.split("/")
            numbers[run_name].append(int(number))
            if run_name != "last":
                number_of[run_id] = int(run_name)
        elif seen.event == "process.exec" and seen.argv[0].startswith("run-"):
            numbers[seen.argv[0]].append(int(seen.argv[1]))
    for name, found in numbers.items():
        found.sort()
        assert found == list(range(found[0], found[-1] + 1)), f"{name} has a hole"
    for run, (opened, spawned) in done.items():
        assert numbers[f"{run}"][-1:] < [opened]
        assert numbers[f"run-{run}"][-1:] < [spawned]
    killed = {run: found for run, found in runs.items() if run in number_of}
    made = {run: offered_in[number] for run, number in number_of.items()}
    assert check_marks(killed, before, made) >= KILLS // 2
    report = verify(f"kafka://{cluster.address}/{topic}", records)
    assert report.ok, [run for host in report.hosts.values() for run in host.runs if run.problems]
    assert report.events == len(known)
    told = {one.run_id: one for host in report.hosts.values() for one in host.runs}
    for run_id in killed.keys() & before.keys():
        for place in told[run_id].places:
            there = len(killed[run_id][place.ring, place.cpu])
            marks = [
                one.taken
                for one in before[run_id].marks
                if (one.ring, one.cpu) == (place.ring, place.cpu)
            ]
            assert place.last == max([there, *marks]), (place, marks)
    row = Row(
        f"SIGKILL of the agent, {KILLS} times",
        offered.total(),
        report.events,
        report.duplicates,
        sum(report.explained.values()),
        report.unexplained,
        peak,
        recovery,
        "the rest was in the rings, or offered while none ran",
    )
    print(row.line)
    assert peak <= MOST_MB
    assert recovery is not None
    assert recovery <= MOST_RECOVERY
    record(row)
