"""A network that delays, loses, doubles and disorders packets: netem, which is not everywhere."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from tests.brokers import MosquittoBroker, free_port
from tests.faults.conftest import Faults
from tests.faults.table import Row

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.kernel, pytest.mark.mqtt]

NAME, NEAR, FAR = "faults", "faults0", "faults1"
NEAR_ADDRESS, FAR_ADDRESS = "10.213.7.1", "10.213.7.2"
NETEM = "delay 200ms 50ms loss 5% duplicate 1% reorder 25%"
SECONDS = 20.0
_NETEM_DROPPED = re.compile(r"qdisc netem .*?\(dropped (\d+)", re.DOTALL)


def run(command: str) -> str:
    return subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout


@pytest.fixture
def network() -> Iterator[None]:
    """Two interfaces, of which the far one is in a network of its own: the agent's."""
    run(f"ip netns add {NAME}")
    try:
        run(f"ip link add {NEAR} type veth peer name {FAR} netns {NAME}")
        run(f"ip address add {NEAR_ADDRESS}/24 dev {NEAR}")
        run(f"ip -n {NAME} address add {FAR_ADDRESS}/24 dev {FAR}")
        run(f"ip link set {NEAR} up")
        run(f"ip -n {NAME} link set {FAR} up")
        yield
    finally:
        run(f"ip netns delete {NAME}")  # and the interfaces with it


@pytest.fixture
def port(mosquitto: MosquittoBroker, network: None) -> int:
    """Where the broker listens in that network as well."""
    mosquitto.stop()
    port = free_port()
    mosquitto.config += (f"listener {port} {NEAR_ADDRESS}",)
    mosquitto.start()
    return port


def test_netem(mqtt_fault: Faults, port: int, record: Callable[[Row], None]) -> None:
    """On both ways. Who counts reads from the broker by loopback."""
    with mqtt_fault(
        f"netem both ways: {NETEM}", host=NEAR_ADDRESS, port=port,
        prefix=("nsenter", f"--net=/run/netns/{NAME}"),
    ) as experiment:  # fmt: skip
        experiment.steady()
        ways = (f"tc qdisc %s dev {NEAR} root", f"tc -n {NAME} qdisc %s dev {FAR} root")
        for way in ways:
            run(f"{way % 'add'} netem {NETEM}")
        time.sleep(SECONDS)
        shown = run(f"tc -s qdisc show dev {NEAR}"), run(f"tc -n {NAME} -s qdisc show dev {FAR}")
        dropped = [int(found) for one in shown for found in _NETEM_DROPPED.findall(one)]
        for way in ways:
            run(way % "delete")
        experiment.heal()
        row = experiment.finish()
        assert len(dropped) == 2
        assert sum(dropped) > 0, "no packet was lost"
        assert row.accounted == 0
        record(row)
