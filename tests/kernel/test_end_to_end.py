"""From the kernel to the brokers: what independent clients read is what the programs did."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from streamer.sinks.base import Cell
from tests.brokers import KafkaBroker, MosquittoBroker, subscribed
from tests.kernel.agent import Agent, cells_dropped, decoded, kind_of
from tests.kernel.pace import seconds
from tests.kernel.scope import Scope
from tests.kernel.system import open_missing

pytestmark = [pytest.mark.kernel, pytest.mark.kafka, pytest.mark.mqtt]

EXECS = 200
TOPIC = "kernel-events"
BACKLOG = 60_000


def run_programs(first: int, count: int) -> list[list[str]]:
    """Execute programs with arguments of their own. The arguments."""
    commands = [["true", f"argument {i}", "é", ""] for i in range(first, first + count)]
    for command in commands:
        subprocess.run(command, check=True, executable="/bin/true")
    return commands


def by_kcat(broker: KafkaBroker) -> list[bytes]:
    """All values of the topic, in order."""
    command = ["kcat", "-C", "-b", broker.address, "-t", TOPIC, "-o", "beginning", "-e", "-q"]
    return subprocess.run(command, capture_output=True, check=True).stdout.splitlines()


def received(output: Path, marker: bytes) -> list[bytes]:
    """What mosquitto_sub wrote, once the marker is among it."""
    deadline = time.monotonic() + 30
    while marker not in output.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [line for line in output.read_bytes().splitlines() if line]


def test_kafka_and_mqtt_get_what_was_done(scope: Scope, tmp_path: Path) -> None:
    """The same stream in a file, a topic of Kafka and one of MQTT, byte for byte and in order."""
    with KafkaBroker(tmp_path / "kafka") as kafka, MosquittoBroker(tmp_path / "mqtt") as mqtt:
        output = tmp_path / "mqtt.out"
        with subscribed(mqtt, TOPIC, output):
            sinks = (f"kafka://{kafka.address}/{TOPIC}", f"mqtt://{mqtt.address}/{TOPIC}")
            with Agent(tmp_path / "a", *scope.options, events="process.exec", sinks=sinks) as agent:
                commands = scope.act(run_programs, 0, EXECS)
                recording = agent.stop()
            lines = agent.output.read_bytes().splitlines()
            assert received(output, lines[-1]) == lines
        assert by_kcat(kafka) == lines
    assert [event.argv for event in recording.events] == commands
    assert {sink.dropped for sink in recording.heartbeat.sink_counts.values()} == {0}


def test_a_killed_kafka_costs_no_event(scope: Scope, tmp_path: Path) -> None:
    """SIGKILL in mid-stream, events while it is away, and a new start on the same data."""
    with KafkaBroker(tmp_path / "kafka") as kafka:
        sinks = (f"kafka://{kafka.address}/{TOPIC}",)
        with Agent(
            tmp_path / "a",
            *scope.options,
            events="process.exec",
            config="grace_seconds = 60",
            sinks=sinks,
        ) as agent:
            commands = scope.act(run_programs, 0, EXECS)
            kafka.kill()
            commands += scope.act(run_programs, EXECS, EXECS)
            kafka.start()
            commands += scope.act(run_programs, 2 * EXECS, EXECS)
            recording = agent.stop()
        values = by_kcat(kafka)
    events = [decoded(value) for value in values]
    assert len({event.id for event in events}) == len(events)
    assert [event.argv for event in events if hasattr(event, "argv")] == commands
    assert values == agent.output.read_bytes().splitlines()
    assert recording.returncode == 0


def test_a_backlog_that_cannot_be_delivered_is_told(scope: Scope, tmp_path: Path) -> None:
    """The last losses and the last heartbeat do not wait behind it: they name it, to the last one.

    The broker stands still until the agent has given up what waits, and goes on with what it was
    sent before.
    """
    grace = seconds(16)
    with KafkaBroker(tmp_path / "kafka") as kafka:
        with Agent(
            tmp_path / "a",
            *scope.options,
            events="file.open",
            config=f"grace_seconds = {grace}\n",
            sinks=(f"kafka://{kafka.address}/{TOPIC}",),
        ) as agent:
            scope.act(open_missing, "/no/", 10)
            wait_for_topic(kafka, 11)
            os.kill(kafka.pid, signal.SIGSTOP)
            try:
                scope.act(open_missing, "/no/", BACKLOG)
                agent.wait_for(b'"event":"file.open"', BACKLOG + 10)
                agent.send(signal.SIGTERM)
                time.sleep(grace * 0.85)
            finally:
                os.kill(kafka.pid, signal.SIGCONT)
            recording = agent.wait()
        values = [decoded(value) for value in by_kcat(kafka)]
    assert recording.returncode == 5
    opens = [event for event in values if kind_of(event) == "file.open"]
    losses = [event for event in values if kind_of(event) == "stream.loss"]
    lost = sum(loss.count for loss in losses)
    assert lost > BACKLOG // 10
    assert len(opens) + lost == BACKLOG + 10
    assert {loss.stage for loss in losses} == {"sink"}
    assert sum(loss.kinds["file.open"] for loss in losses) == lost
    # Which they are: what is not there, and nothing else.
    there = {(event.ring, event.cpu, event.seq) for event in opens}
    told = [
        (one.ring, one.cpu, seq)
        for loss in losses
        for one in loss.ranges
        for seq in range(one.seq_from, one.seq_to + 1)
    ]
    missing = {(e.ring, e.cpu, e.seq) for e in recording.events} - there
    assert missing <= set(told)
    # Of each CPU and kind as many as are not there: by the losses, and by the last account.
    name = f"kafka://{kafka.address}/{TOPIC}"
    gone = Counter((e.ring, e.cpu, "file.open") for e in recording.events)
    gone.subtract((e.ring, e.cpu, "file.open") for e in opens)
    given_up = Counter[Cell]()
    for one in (one for loss in losses for one in loss.ranges):
        given_up.update({(one.ring, one.cpu, kind): n for kind, n in one.kinds.items()})
    assert given_up == +gone == cells_dropped(values[-1].sink_counts[name])
    assert kind_of(values[-1]) == "stream.heartbeat"
    assert values[-1].sink_counts[name].dropped == lost
    (said,) = re.findall("not delivered: (.*)", recording.stderr)
    counts = re.findall("([0-9,]+) events to kafka://", said)
    at_the_end = sum(loss.count for loss in losses if "when the agent stopped" in loss.reason)
    assert sum(int(count.replace(",", "")) for count in counts) == at_the_end > 0


def wait_for_topic(kafka: KafkaBroker, count: int) -> None:
    deadline = time.monotonic() + seconds(30)
    while time.monotonic() < deadline:
        with contextlib.suppress(subprocess.CalledProcessError):  # it is not there yet
            if len(by_kcat(kafka)) >= count:
                return
        time.sleep(0.1)
    raise AssertionError("nothing came")
