"""Brokers that are killed, stopped or started anew: of three of Kafka one, two or all, and one of
Mosquitto.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.brokers import KafkaBroker, MosquittoBroker, Partition
from tests.faults.conftest import OF_HOST, Cluster, Faults
from tests.faults.table import Row

pytestmark = [pytest.mark.faults, pytest.mark.kernel]

SECONDS = 6.0
NAMES = {1: "the leader", 2: "two of three brokers", 3: "all three brokers"}
slow = pytest.mark.slow


def chosen(cluster: Cluster, topic: str, count: int) -> list[KafkaBroker]:
    """So many nodes: the one that has the events first."""
    leader = cluster.of_host(topic).leader - 1
    return [cluster.nodes[(leader + i) % 3] for i in range(count)]


def led_by(node: int) -> Callable[[Partition], bool]:
    return lambda now: now.leader == node


@pytest.mark.kafka
@pytest.mark.parametrize("count", [pytest.param(1, marks=slow), pytest.param(2, marks=slow), 3])
def test_killed(
    cluster: Cluster, kafka_fault: Faults, record: Callable[[Row], None], count: int
) -> None:
    with kafka_fault(f"SIGKILL of {NAMES[count]}") as experiment:
        experiment.steady()
        nodes = chosen(cluster, experiment.topic, count)
        for node in nodes:
            node.kill()
        time.sleep(SECONDS)
        with ThreadPoolExecutor(count) as pool:
            starting = [pool.submit(node.start) for node in nodes]
            cluster.wait_until_writable()
            experiment.heal()
            for one in starting:
                one.result()
        record(experiment.finish())


@pytest.mark.kafka
@slow
@pytest.mark.parametrize("count", [1, 2, 3])
def test_stopped(
    cluster: Cluster, kafka_fault: Faults, record: Callable[[Row], None], count: int
) -> None:
    with kafka_fault(f"SIGSTOP of {NAMES[count]}") as experiment:
        experiment.steady()
        nodes = chosen(cluster, experiment.topic, count)
        for node in nodes:
            os.kill(node.pid, signal.SIGSTOP)
        time.sleep(SECONDS)
        for node in nodes:
            os.kill(node.pid, signal.SIGCONT)
        cluster.wait_until_writable()
        experiment.heal()
        record(experiment.finish())


@pytest.mark.kafka
def test_too_few_replicas(
    cluster: Cluster, kafka_fault: Faults, record: Callable[[Row], None]
) -> None:
    """Of two replicas, both of which have to confirm, the follower is killed. What the leader has
    just written it confirms no more, until the request's time is over; then the same is refused.
    """
    with kafka_fault(
        "SIGKILL of the follower: too few replicas", replicas=2, sink="request_timeout_seconds = 5"
    ) as experiment:
        experiment.steady()
        before = cluster.of_host(experiment.topic)
        (follower,) = set(before.replicas) - {before.leader}
        cluster.nodes[follower - 1].kill()
        alone = before._replace(in_sync=(before.leader,))
        cluster.wait_for(experiment.topic, alone.__eq__)
        time.sleep(SECONDS + 2)  # more than requests have
        cluster.nodes[follower - 1].start()
        cluster.wait_for(experiment.topic, lambda now: len(now.in_sync) == 2)
        experiment.heal()
        row = experiment.finish(note="requests have 5 s")
        assert "too few replicas are in sync" in experiment.agent.stderr
        assert (row.duplicates, row.accounted) == (0, 0)
        record(row)


@slow
@pytest.mark.kafka
def test_leader_moved(cluster: Cluster, kafka_fault: Faults, record: Callable[[Row], None]) -> None:
    """By Kafka's own tools, while it is written to: the partition is given to another pair of
    nodes without its leader, and then the second of them is made the preferred one, and elected.
    """
    fault = "leader moved by reassignment and election, 4 times"
    with kafka_fault(fault, replicas=2) as experiment:
        experiment.steady()
        for _ in range(2):
            before = cluster.of_host(experiment.topic)
            (other,) = set(before.replicas) - {before.leader}
            (free,) = {1, 2, 3} - set(before.replicas)
            cluster.reassign(experiment.topic, OF_HOST, (free, other))
            moved = cluster.of_host(experiment.topic).leader
            assert moved != before.leader
            follower = free + other - moved
            cluster.reassign(experiment.topic, OF_HOST, (follower, moved))
            assert cluster.of_host(experiment.topic).leader == moved
            cluster.elect(experiment.topic, OF_HOST)
            cluster.wait_for(experiment.topic, led_by(follower))
        experiment.heal()
        row = experiment.finish()
        assert (row.duplicates, row.accounted) == (0, 0)
        record(row)


@slow
@pytest.mark.mqtt
def test_mosquitto_killed(
    mosquitto: MosquittoBroker, mqtt_fault: Faults, record: Callable[[Row], None]
) -> None:
    with mqtt_fault("SIGKILL of Mosquitto") as experiment:
        experiment.steady()
        mosquitto.kill()
        time.sleep(SECONDS)
        mosquitto.start()
        experiment.heal()
        record(experiment.finish())


@slow
@pytest.mark.mqtt
def test_mosquitto_stopped(
    mosquitto: MosquittoBroker, mqtt_fault: Faults, record: Callable[[Row], None]
) -> None:
    with mqtt_fault("SIGSTOP of Mosquitto") as experiment:
        experiment.steady()
        os.kill(mosquitto.pid, signal.SIGSTOP)
        time.sleep(SECONDS)
        os.kill(mosquitto.pid, signal.SIGCONT)
        experiment.heal()
        record(experiment.finish())


@slow
@pytest.mark.mqtt
def test_mosquitto_restarted(
    mosquitto: MosquittoBroker, mqtt_fault: Faults, record: Callable[[Row], None]
) -> None:
    with mqtt_fault("Mosquitto stopped and started") as experiment:
        experiment.steady()
        mosquitto.stop()
        mosquitto.start()
        experiment.heal()
        record(experiment.finish())


@slow
@pytest.mark.mqtt
def test_session_taken_over(
    mosquitto: MosquittoBroker, mqtt_fault: Faults, record: Callable[[Row], None]
) -> None:
    """By somebody of the same identifier, who is there for a moment, again and again."""
    fault = "MQTT session taken over, 5 times"
    with mqtt_fault(fault, sink='client_id = "agent"') as experiment:
        experiment.steady()
        thief = ["mosquitto_sub", "-V", "mqttv5", "-p", str(mosquitto.port), "-i", "agent", "-E"]
        for _ in range(5):
            subprocess.run([*thief, "-t", "none"], check=True, timeout=30)
            time.sleep(1)
        experiment.heal()
        row = experiment.finish()
        assert mosquitto.log.count("agent already connected, closing old connection") >= 5
        assert row.accounted == 0
        record(row)
