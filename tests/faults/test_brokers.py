"""Brokers that are killed and that are stopped: one, two, or all three of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.brokers import KafkaBroker
from tests.faults.conftest import Cluster, Faults
from tests.faults.table import Row

pytestmark = [pytest.mark.faults, pytest.mark.kernel, pytest.mark.kafka]

SECONDS = 6.0
NAMES = {1: "the leader", 2: "two of three brokers", 3: "all three brokers"}
slow = pytest.mark.slow


def chosen(cluster: Cluster, topic: str, count: int) -> list[KafkaBroker]:
    """So many nodes: the one that has the events first."""
    leader = cluster.busy(topic) - 1
    return [cluster.nodes[(leader + i) % 3] for i in range(count)]


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
            list(pool.map(KafkaBroker.start, nodes))
        cluster.wait_until_whole(experiment.topic)
        experiment.heal()
        record(experiment.finish())


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=slow), pytest.param(3, marks=slow)])
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
        cluster.wait_until_whole(experiment.topic)
        experiment.heal()
        record(experiment.finish())
