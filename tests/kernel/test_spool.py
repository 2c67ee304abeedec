"""The disk spool under the real agent, with a real Kafka: outages, kills, a full disk, old times.

A file sink beside it has what was read; what is in Kafka is compared with it, and with what the
test itself did.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamer.events.stream import StreamLoss, StreamManifest
from tests.brokers import KafkaBroker
from tests.kernel.agent import Agent, decoded, kind_of
from tests.kernel.pace import seconds
from tests.kernel.scope import Scope
from tests.kernel.spooling import (
    FLOOD,
    KILLS,
    TOPIC,
    agent_with,
    check_order,
    numbered,
    open_until,
    plain,
    spooled_after_kill,
    wait_until_empty,
)
from tests.kernel.system import open_missing

pytestmark = [pytest.mark.kernel, pytest.mark.kafka]


@pytest.fixture
def kafka(tmp_path: Path) -> Iterator[KafkaBroker]:
    with KafkaBroker(tmp_path / "kafka") as broker:
        yield broker


def agent(
    tmp_path: Path,
    scope: Scope,
    kafka: KafkaBroker,
    name: str,
    mode: str,
    *,
    events: str = "file.open",
    budget: int = 1 << 20,
    spool: Path | None = None,
    most: int = 1 << 28,
) -> Agent:
    """With a file sink, and one for Kafka that has a spool."""
    sink = f"""[[sinks]]
type = "kafka"
bootstrap = ["{kafka.address}"]
topic = "{TOPIC}"
on_full = "pause"
budget_bytes = {budget}
spool = "{mode}"
"""
    return agent_with(tmp_path, scope, sink, name, events=events, spool=spool, most=most)


def by_kcat(kafka: KafkaBroker) -> list[Any]:
    """All events of the topic, in order."""
    command = ["kcat", "-C", "-b", kafka.address, "-t", TOPIC, "-o", "beginning", "-e", "-q"]
    output = subprocess.run(command, capture_output=True, check=True).stdout
    return [decoded(line) for line in output.splitlines()]


@pytest.mark.parametrize("mode", ["spill", "wal"])
def test_an_outage_costs_nothing_and_what_comes_late_says_so(
    scope: Scope, tmp_path: Path, kafka: KafkaBroker, mode: str
) -> None:
    with agent(tmp_path, scope, kafka, "a", mode, budget=8 << 20) as running:
        scope.act(open_missing, "/before/", 1000)
        wait_until_empty(running)
        kafka.kill()
        scope.act(open_missing, "/during/", FLOOD)
        running.wait_for(b"/during/", FLOOD)
        kafka.start()
        wait_until_empty(running)
        scope.act(open_missing, "/after/", 1000)
        wait_until_empty(running)
        recording = running.stop(check=False)
        got = by_kcat(kafka)
    check_order(got)
    first = {event.id: plain(event) for event in reversed(numbered(got))}
    there = [first.get(event.id) == plain(event) for event in numbered(recording.all)]
    assert all(there)  # not as lists: what is said of a difference would take minutes
    assert len(numbered(recording.all)) == FLOOD + 2000
    replayed = Counter(
        event.path.split("/")[1] for event in numbered(got) if event.replayed is True
    )
    assert replayed["during"] > FLOOD // 2
    assert replayed["before"] == replayed["after"] == 0
    (counts,) = (c for n, c in recording.heartbeat.sink_counts.items() if n.startswith("kafka"))
    assert (counts.dropped, counts.spooled) == (0, 0)
    assert running.stderr.count("the spool") == 0


def test_what_is_spooled_at_the_end_is_the_next_runs(
    scope: Scope, tmp_path: Path, kafka: KafkaBroker
) -> None:
    """The broker is away when the agent stops, and there again with the next run."""
    with agent(tmp_path, scope, kafka, "a", "spill") as running:
        scope.act(open_missing, "/before/", 100)
        wait_until_empty(running)
        kafka.kill()
        scope.act(open_missing, "/during/", FLOOD)
        running.wait_for(b"/during/", FLOOD)
        first = running.stop(check=False)
    assert "in the spool" in first.account
    kafka.start()
    with agent(tmp_path, scope, kafka, "b", "spill") as running:
        wait_until_empty(running)
        second = running.stop(check=False)
        got = by_kcat(kafka)
    check_order(got)
    assert {event.id for event in numbered(got)} == {event.id for event in numbered(first.all)}
    assert second.manifest.previous is not None
    assert second.manifest.previous.ended == "delivered"
    losses = [event for event in got if isinstance(event, StreamLoss)]
    assert losses == []


@pytest.mark.parametrize("mode", ["wal", "spill"])
def test_a_killed_agent_loses_what_the_next_manifest_says_and_no_more(
    scope: Scope, tmp_path: Path, kafka: KafkaBroker, mode: str
) -> None:
    """SIGKILL at random moments, with the broker there and not there."""
    chance = random.Random(8)
    done: list[int] = []
    runs: list[str] = []
    on_disk: set[str] = set()
    for number in range(KILLS):
        flag = tmp_path / f"flag-{number}"
        with agent(tmp_path, scope, kafka, f"run-{number}", mode, budget=1 << 18) as running:
            (manifest, *_) = running.output.read_bytes().splitlines()
            runs.append(decoded(manifest).run_id)
            if number % 2:
                os.kill(kafka.pid, signal.SIGSTOP)
            try:
                with scope.start(open_until, str(flag), f"/{number}/") as actor:
                    time.sleep(chance.uniform(0.1, 3.0))
                    running.kill()
                    flag.touch()
                    done.append(actor.result())
            finally:
                os.kill(kafka.pid, signal.SIGCONT)
            on_disk |= {event.id for event in numbered(spooled_after_kill(tmp_path))}
    with agent(tmp_path, scope, kafka, "last", mode) as running:
        wait_until_empty(running)
        running.stop(check=False)
        got = by_kcat(kafka)
    check_order(got)
    events = {event.id: event for event in numbered(got)}
    assert on_disk <= events.keys()
    manifests = {
        event.previous.run_id: event.previous
        for event in got
        if isinstance(event, StreamManifest) and event.previous is not None
    }
    name = f"kafka://{kafka.address}/{TOPIC}"
    for number, run in enumerate(runs):
        if run not in manifests:  # the next was killed before its own was delivered
            assert mode == "spill"
            assert any(one.run_id == run for last in manifests.values() for one in last.untold)
            continue
        previous = manifests[run]
        assert previous.ended == "killed"
        own = [event for event in events.values() if event.id.startswith(run)]
        seqs = {event.seq for event in own}
        told = {
            seq
            for event in got
            if isinstance(event, StreamLoss) and event.run_id == run
            for one in event.ranges
            for seq in range(one.seq_from, one.seq_to + 1)
        }
        marks = [mark for mark in previous.marks if (mark.sink, mark.ring) == (name, "bulk")]
        if not marks:
            assert mode == "spill" or not own
            continue
        (mark,) = marks
        # Nothing up to the mark is missing, and nothing comes after the last.
        assert set(range(1, mark.seq + 1)) <= seqs | told
        assert mark.seq <= max(mark.last, mark.taken)
        if mode == "wal":
            assert max(seqs, default=0) == mark.last
        assert mark.taken <= done[number]
        # The n-th that was numbered is the n-th that the actor opened.
        for event in own:
            assert event.path.split("/")[1] == str(number)
        order = [int(event.path.split("/")[2]) for event in sorted(own, key=lambda e: e.seq)]
        assert order == sorted(order)
        if not told:
            assert all(event.seq == int(event.path.split("/")[2]) + 1 for event in own)


def test_a_full_disk_costs_nothing_while_memory_does(
    scope: Scope, tmp_path: Path, kafka: KafkaBroker
) -> None:
    """A small tmpfs under the spool: back to memory with one warning, and then reading pauses."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "spool", str(place)], check=True
    )
    try:
        with agent(
            tmp_path, scope, kafka, "a", "spill", spool=place / "spool", budget=1 << 18
        ) as running:
            scope.act(open_missing, "/before/", 100)
            wait_until_empty(running)
            filler = place / "filler"
            kafka.kill()
            filler.write_bytes(bytes((1 << 20) - (400 << 10)))
            scope.act(open_missing, "/during/", FLOOD * 3)
            deadline = time.monotonic() + seconds(30)
            while "the spool is not used for now" not in running.stderr:
                assert time.monotonic() < deadline, running.stderr
                time.sleep(0.1)
            filler.unlink()
            kafka.start()
            wait_until_empty(running)
            recording = running.stop(check=False)
            got = by_kcat(kafka)
    finally:
        subprocess.run(["umount", str(place)], check=True)
    check_order(got)
    ids = {event.id for event in numbered(got)}
    read = {event.id for event in numbered(recording.all)}
    assert (len(read - ids), len(ids - read)) == (0, 0)
    lost = sum(event.count for event in recording.all if isinstance(event, StreamLoss))
    counts = recording.heartbeat.counts["file.open"]
    assert counts.read + counts.lost == 100 + 3 * FLOOD == len(ids) + lost
    assert running.stderr.count("the spool is not used for now") == 1


def test_the_cap_is_an_exact_loss(scope: Scope, tmp_path: Path, kafka: KafkaBroker) -> None:
    """The oldest opens make way, and no exec."""
    with agent(
        tmp_path, scope, kafka, "a", "spill", events="file.open,process.exec", budget=1 << 18,
        most=1 << 20,
    ) as running:  # fmt: skip
        scope.act(open_missing, "/before/", 100)
        wait_until_empty(running)
        kafka.kill()
        for part in range(5):
            scope.act(open_missing, f"/during/{part}/", FLOOD)
            running.wait_for(f"/during/{part}/".encode(), FLOOD)
            scope.act(subprocess.run, ["/bin/true", str(part)])
        kafka.start()
        wait_until_empty(running)
        recording = running.stop(check=False)
        got = by_kcat(kafka)
    check_order(got)
    read = Counter(kind_of(event) for event in numbered(recording.all))
    there = Counter(kind_of(event) for event in {e.id: e for e in numbered(got)}.values())
    lost: Counter[str] = Counter()
    for event in got:
        if isinstance(event, StreamLoss) and event.stage == "sink":
            assert event.reason == "the spool was full, and this was the oldest"
            lost.update(event.kinds)
    assert there + lost == read
    assert set(lost) == {"file.open"}
    assert there["process.exec"] == read["process.exec"]
