"""A network that is cut, silent, slow or forgetful, between the agent and its broker."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.brokers import MosquittoBroker, free_port
from tests.faults.conftest import Cluster, Faults
from tests.faults.proxy import Proxy
from tests.faults.table import Row

pytestmark = [pytest.mark.faults, pytest.mark.kernel]

SECONDS = 6.0
slow = pytest.mark.slow


@pytest.mark.kafka
def test_cut(cluster: Cluster, kafka_fault: Faults, record: Callable[[Row], None]) -> None:
    """Connections are reset, and new ones refused."""
    with kafka_fault("network cut: resets, and refusals", proxied=True) as experiment:
        experiment.steady()
        for proxy in cluster.proxies:
            proxy.cut()
        time.sleep(SECONDS)
        for proxy in cluster.proxies:
            proxy.heal()
        experiment.heal()
        record(experiment.finish())


@slow
@pytest.mark.kafka
@pytest.mark.parametrize("count", [1, 3])
def test_partition(
    cluster: Cluster, kafka_fault: Faults, record: Callable[[Row], None], count: int
) -> None:
    """Nothing comes through for a while, and nobody is told.

    For 7 s: TCP alone would try again after 6 s the last time, and then after 12 s.
    """
    of = {1: "the leader", 3: "all brokers"}[count]
    with kafka_fault(f"network silent towards {of}", proxied=True) as experiment:
        experiment.steady()
        leader = cluster.of_host(experiment.topic)[0] - 1
        proxies = [cluster.proxies[(leader + i) % 3] for i in range(count)]
        for proxy in proxies:
            proxy.silence()
        time.sleep(7)
        for proxy in proxies:
            proxy.heal()
        experiment.heal()
        record(experiment.finish())


@pytest.mark.kafka
def test_forgotten(cluster: Cluster, kafka_fault: Faults, record: Callable[[Row], None]) -> None:
    """Connections that were there carry nothing any more, for good; new ones do."""
    name = "connections to Kafka that a firewall has forgotten"
    with kafka_fault(name, proxied=True) as experiment:
        experiment.steady()
        for proxy in cluster.proxies:
            proxy.forget()
        experiment.heal()
        record(experiment.finish(after=10))


@slow
@pytest.mark.kafka
def test_half_closed(cluster: Cluster, kafka_fault: Faults, record: Callable[[Row], None]) -> None:
    with kafka_fault("connections half-closed by the network", proxied=True) as experiment:
        experiment.steady()
        for proxy in cluster.proxies:
            proxy.half_close()
        experiment.heal()
        record(experiment.finish())


@slow
@pytest.mark.kafka
def test_slow(cluster: Cluster, kafka_fault: Faults, record: Callable[[Row], None]) -> None:
    """It takes 200 ms there and 200 ms back, and lets less through than is offered."""
    with kafka_fault("network slow: 0.4 s there and back, 50 kB/s", proxied=True) as experiment:
        experiment.steady()
        for proxy in cluster.proxies:
            proxy.delay, proxy.bytes_per_second = 0.2, 50_000
        time.sleep(SECONDS + 4)
        for proxy in cluster.proxies:
            proxy.heal()
        experiment.heal()
        record(experiment.finish())


@slow
@pytest.mark.mqtt
def test_forgotten_by_mosquitto(
    mosquitto: MosquittoBroker, mqtt_fault: Faults, record: Callable[[Row], None]
) -> None:
    with (
        Proxy(free_port(), mosquitto.port) as proxy,
        mqtt_fault(
            "connection to Mosquitto that a firewall has forgotten", port=proxy.port
        ) as experiment,
    ):
        experiment.steady()
        proxy.forget()
        experiment.heal()
        record(experiment.finish(after=10))
