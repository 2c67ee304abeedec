"""The disk spool in front of MQTT, under the real agent and with a real Mosquitto.

A file sink beside it has what was read. A witness subscribes, as any consumer does, and what it was
sent is compared with that, and with what the test itself did.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from streamer.events.stream import StreamLoss, StreamManifest
from tests.brokers import MosquittoBroker, subscribed
from tests.kernel.agent import Agent, decoded
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

pytestmark = [pytest.mark.kernel, pytest.mark.mqtt]

# What is subscribed to, and what is queued for whoever is away, outlives a SIGKILL of the broker.
KEEPS = ("autosave_interval 1", "autosave_on_changes true", "queue_qos0_messages true",
         "max_queued_messages 0")  # fmt: skip

END = b"that is all"


@pytest.fixture
def mqtt(tmp_path: Path) -> Iterator[MosquittoBroker]:
    with MosquittoBroker(tmp_path / "mqtt", KEEPS) as broker:
        yield broker


class Witness:
    """What a subscriber was sent, in order."""

    def __init__(self, mqtt: MosquittoBroker, output: Path) -> None:
        self._mqtt = mqtt
        self._output = output

    def wait(self) -> None:
        """Until it has all that was published so far: it is sent in order. It writes in blocks."""
        command = ["mosquitto_pub", "-p", str(self._mqtt.port), "-t", TOPIC, "-q", "1", "-l"]
        subprocess.run(command, input=(END + b"\n") * 1000, check=True)
        deadline = time.monotonic() + seconds(60)
        while END.hex() not in self._output.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.2)

    @property
    def events(self) -> list[Any]:
        data = bytes.fromhex(self._output.read_text().replace("\n", ""))
        return [decoded(line) for line in data.partition(END)[0].splitlines()]


@contextmanager
def witness(mqtt: MosquittoBroker, output: Path) -> Iterator[Witness]:
    """At QoS 0, so that it has all that a dying broker wrote; with a session that is kept."""
    options = ("-q", "0", "-c", "-x", "86400", "-F", "%x")
    with subscribed(mqtt, TOPIC, output, *options):
        deadline = time.monotonic() + seconds(30)
        while not (mqtt.directory / "mosquitto.db").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield Witness(mqtt, output)


def agent(
    tmp_path: Path, scope: Scope, mqtt: MosquittoBroker, name: str, mode: str, budget: int = 1 << 20
) -> Agent:
    """With a file sink, and one for MQTT that has a spool."""
    sink = f"""[[sinks]]
type = "mqtt"
host = "127.0.0.1"
port = {mqtt.port}
topic = "{TOPIC}"
on_full = "pause"
budget_bytes = {budget}
spool = "{mode}"
"""
    return agent_with(tmp_path, scope, sink, name)


def check_copies(got: list[Any]) -> dict[str, Any]:
    """Each event by its id; copies of it are the same, but for whether it was replayed."""
    first: dict[str, Any] = {}
    for event in got:
        known = first.setdefault(event.id, event)
        assert plain(known) == plain(event), event.id
    return first


def counts_of(recording: Any) -> Any:
    (counts,) = (c for n, c in recording.heartbeat.sink_counts.items() if n.startswith("mqtt"))
    return counts


@pytest.mark.parametrize("mode", ["spill", "wal"])
def test_an_outage_costs_nothing_and_what_comes_late_says_so(
    scope: Scope, tmp_path: Path, mqtt: MosquittoBroker, mode: str
) -> None:
    with witness(mqtt, tmp_path / "got") as seen:
        with agent(tmp_path, scope, mqtt, "a", mode, budget=8 << 20) as running:
            scope.act(open_missing, "/before/", 1000)
            wait_until_empty(running)
            mqtt.kill()
            scope.act(open_missing, "/during/", FLOOD)
            running.wait_for(b"/during/", FLOOD)
            mqtt.start()
            wait_until_empty(running)
            scope.act(open_missing, "/after/", 1000)
            wait_until_empty(running)
            recording = running.stop(check=False)
        seen.wait()
    got = seen.events
    check_order(got)
    first = check_copies(numbered(got))
    read = {event.id: event for event in numbered(recording.all)}
    assert len(read) == FLOOD + 2000
    assert (len(read.keys() - first.keys()), len(first.keys() - read.keys())) == (0, 0)
    there = [plain(first[id]) == plain(event) for id, event in read.items()]
    assert all(there)
    replayed = Counter(
        event.path.split("/")[1] for event in numbered(got) if event.replayed is True
    )
    assert replayed["during"] > FLOOD // 2
    assert replayed["before"] == replayed["after"] == 0
    counts = counts_of(recording)
    assert (counts.dropped, counts.spooled) == (0, 0)
    assert running.stderr.count("the spool") == 0


def test_what_is_spooled_at_the_end_is_the_next_runs(
    scope: Scope, tmp_path: Path, mqtt: MosquittoBroker
) -> None:
    """The broker is away when the agent stops, and there again with the next run."""
    with witness(mqtt, tmp_path / "got") as seen:
        with agent(tmp_path, scope, mqtt, "a", "spill") as running:
            scope.act(open_missing, "/before/", 100)
            wait_until_empty(running)
            mqtt.kill()
            scope.act(open_missing, "/during/", FLOOD)
            running.wait_for(b"/during/", FLOOD)
            first = running.stop(check=False)
        assert "in the spool" in first.account
        mqtt.start()
        with agent(tmp_path, scope, mqtt, "b", "spill") as running:
            wait_until_empty(running)
            second = running.stop(check=False)
        seen.wait()
    got = seen.events
    check_order(got)
    assert check_copies(numbered(got)).keys() == {event.id for event in numbered(first.all)}
    assert len(numbered(first.all)) == FLOOD + 100
    assert counts_of(second).recovered > FLOOD // 2
    assert second.manifest.previous is not None
    assert second.manifest.previous.ended == "delivered"
    assert [event for event in got if isinstance(event, StreamLoss)] == []


@pytest.mark.parametrize("mode", ["wal", "spill"])
def test_a_killed_agent_loses_what_the_next_manifest_says_and_no_more(
    scope: Scope, tmp_path: Path, mqtt: MosquittoBroker, mode: str
) -> None:
    """SIGKILL at random moments, while the broker answers and while it does not."""
    chance = random.Random(9)
    runs: list[str] = []
    on_disk: set[str] = set()
    with witness(mqtt, tmp_path / "got") as seen:
        for number in range(KILLS):
            flag = tmp_path / f"flag-{number}"
            with agent(tmp_path, scope, mqtt, f"run-{number}", mode, budget=1 << 18) as running:
                (manifest, *_) = running.output.read_bytes().splitlines()
                runs.append(decoded(manifest).run_id)
                if number % 2:
                    os.kill(mqtt.pid, signal.SIGSTOP)
                try:
                    with scope.start(open_until, str(flag), f"/{number}/") as actor:
                        time.sleep(chance.uniform(0.5, 3.0))
                        running.kill()
                        flag.touch()
                        actor.result()
                finally:
                    os.kill(mqtt.pid, signal.SIGCONT)
                on_disk |= {event.id for event in numbered(spooled_after_kill(tmp_path))}
        with agent(tmp_path, scope, mqtt, "last", mode) as running:
            wait_until_empty(running)
            running.stop(check=False)
        seen.wait()
    got = seen.events
    check_order(got)
    events = check_copies(numbered(got))
    assert on_disk
    assert on_disk <= events.keys()
    manifests = {
        event.previous.run_id: event.previous
        for event in got
        if isinstance(event, StreamManifest) and event.previous is not None
    }
    name = f"mqtt://{mqtt.address}/{TOPIC}"
    for run in runs:
        if run not in manifests:  # the next was killed before its own was delivered
            assert mode == "spill"
            assert any(one.run_id == run for last in manifests.values() for one in last.untold)
            continue
        previous = manifests[run]
        assert previous.ended == "killed"
        seqs = {event.seq for event in events.values() if event.id.startswith(run)}
        marks = [mark for mark in previous.marks if (mark.sink, mark.ring) == (name, "bulk")]
        if not marks:
            assert mode == "spill" or not seqs
            continue
        (mark,) = marks
        # Nothing up to the mark is missing, and nothing comes after the last.
        assert set(range(1, mark.seq + 1)) <= seqs
        if mode == "wal":
            assert max(seqs, default=0) == mark.last


LIMIT = 4000
DEEP = "/" + "x" * 200


def open_some_that_are_too_large() -> None:
    open_missing("/before/", 300)
    open_missing(DEEP * 19 + "/large/", 5)
    open_missing("/behind/", 300)


def test_what_a_broker_never_takes_is_lost_once_and_holds_nothing_up(
    scope: Scope, tmp_path: Path
) -> None:
    """It was on disk when the agent was killed; the run after the next one knows nothing of it."""
    mqtt = MosquittoBroker(tmp_path / "mqtt", [*KEEPS, f"message_size_limit {LIMIT}"])
    with mqtt, witness(mqtt, tmp_path / "got") as seen:
        with agent(tmp_path, scope, mqtt, "a", "wal") as running:
            mqtt.kill()
            scope.act(open_some_that_are_too_large)
            running.wait_for(b"/behind/", 300)
            time.sleep(seconds(3))
            running.send(signal.SIGKILL)
            running.process.wait()
        spooled = numbered(spooled_after_kill(tmp_path))
        assert len(spooled) == 605
        mqtt.start()
        with agent(tmp_path, scope, mqtt, "b", "wal") as running:
            wait_until_empty(running)
            second = running.stop(check=False)
        with agent(tmp_path, scope, mqtt, "c", "wal") as running:
            wait_until_empty(running)
            third = running.stop(check=False)
        seen.wait()
    got = seen.events
    check_order(got)
    large = {event.seq for event in spooled if "/large/" in event.path}
    assert len(large) == 5
    # It closes the connection at each: what was under way is sent again.
    assert check_copies(numbered(got)).keys() == {
        event.id for event in spooled if event.seq not in large
    }
    counts = counts_of(second)
    assert (counts.dropped, counts.spooled, counts.pending) == (5, 0, 0)
    assert counts.received == counts.delivered + 5
    assert counts_of(third).recovered == 0
    losses = [event for event in got if isinstance(event, StreamLoss) and event.stage == "sink"]
    assert [(loss.count, loss.kinds) for loss in losses] == [(5, {"file.open": 5})]
    missing = {n for loss in losses for span in loss.ranges or () if span.run_id
               for n in range(span.seq_from, span.seq_to + 1)}  # fmt: skip
    assert large <= missing
