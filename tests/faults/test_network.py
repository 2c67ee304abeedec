"""A network that is cut, silent, slow or forgetful, between the agent and its broker."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from streamer.config.settings import LEVELS, SHED_BY_DEFAULT
from tests.brokers import MosquittoBroker, free_port
from tests.faults.conftest import Cluster, Faults
from tests.faults.consumers import Found
from tests.faults.proxy import Proxy
from tests.faults.table import Row
from tests.kernel.pace import seconds

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
        leader = cluster.of_host(experiment.topic).leader - 1
        proxies = [cluster.proxies[(leader + i) % 3] for i in range(count)]
        for proxy in proxies:
            proxy.silence()
        time.sleep(7)
        for proxy in proxies:
            proxy.heal()
        experiment.heal()
        record(experiment.finish())


@pytest.mark.kafka
def test_leader_gone(cluster: Cluster, kafka_fault: Faults, record: Callable[[Row], None]) -> None:
    """With its machine: nobody is told, and another leads soon. It does not come back."""
    with kafka_fault("the leader's machine gone, another leads", proxied=True) as experiment:
        experiment.steady()
        gone = cluster.of_host(experiment.topic).leader
        cluster.proxies[gone - 1].silence()
        cluster.nodes[gone - 1].kill()
        cluster.wait_for(experiment.topic, lambda now: now.leader not in (gone, -1))
        experiment.heal()
        row = experiment.finish(after=10)
        assert (row.duplicates, row.accounted) == (0, 0)
        record(row)


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
@pytest.mark.kafka
def test_slow_with_shedding(
    cluster: Cluster, kafka_fault: Faults, record: Callable[[Row], None]
) -> None:
    """Opens are sampled while the brokers take less than is offered, and not after that."""
    with kafka_fault(
        "network slow: 20 kB/s, with shedding",
        proxied=True, spool="off", sink="budget_bytes = 4194304",
        more="[shedding]\nenabled = true",
    ) as experiment:  # fmt: skip
        experiment.steady()
        for proxy in cluster.proxies:
            proxy.bytes_per_second = 20_000
        time.sleep(SECONDS + 9)
        for proxy in cluster.proxies:
            proxy.heal()
        experiment.heal()
        row = experiment.finish(note="a budget of 4 MiB; accounted: shed")
        found = experiment.found
        assert found is not None
        assert found.shed.keys() == {"file.open"}
        assert found.shed.total() == row.accounted
        assert row.duplicates == 0
        check_levels(found.levels, experiment.healed_boot_ns)
        check_weights(found, row.offered)
        record(row)


def check_levels(levels: list[tuple[int, int]], healed_boot_ns: int) -> None:
    """From nothing up to all that there is, and to nothing again within five seconds of the end."""
    assert max(level for _, level in levels) == LEVELS
    over_boot_ns, last = levels[-1]
    assert last == 0
    assert 0 < (over_boot_ns - healed_boot_ns) / 1e9 < seconds(5.0)


def check_weights(found: Found, offered: int) -> None:
    """Of the opens: the rates of levels, and in sum what was offered, within six standard
    deviations: of n events, one in r, it has a variance of n(r - 1).
    """
    weights = {weight: count for (_, weight), count in found.weights.items()}
    assert weights.keys() <= {*SHED_BY_DEFAULT["file.open"]}
    assert weights[SHED_BY_DEFAULT["file.open"][-1]] > 0
    more = sum((weight - 1) * count for weight, count in weights.items())
    variance = sum(weight * (weight - 1) * count for weight, count in weights.items())
    assert abs(found.delivered.total() + more - offered) < 6 * variance**0.5


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
