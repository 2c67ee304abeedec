"""From the kernel to the brokers: what independent clients read is what the programs did."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.brokers import KafkaBroker, MosquittoBroker, subscribed
from tests.kernel.agent import Agent, decoded
from tests.kernel.scope import Scope

pytestmark = [pytest.mark.kernel, pytest.mark.kafka, pytest.mark.mqtt]

EXECS = 200
TOPIC = "kernel-events"


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
