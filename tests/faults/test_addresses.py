"""A broker that is somewhere else afterwards: at another address under its name, or another port.

The agent has a file of names of its own, in a mount namespace, which the test changes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.brokers import KafkaBroker, MosquittoBroker, free_port
from tests.faults.conftest import Faults, kafka_sink, with_kafka
from tests.faults.experiment import Experiment, configured
from tests.faults.table import Row
from tests.kafka_helpers import create
from tests.kernel.scope import Scope

pytestmark = [pytest.mark.faults, pytest.mark.kernel]

SECONDS = 3.0
NAME = "broker.test"
BEFORE, AFTER = "127.0.0.2", "127.0.0.3"
BIND = 'mount --bind "$0" /etc/hosts; exec "$@"'
slow = pytest.mark.slow


class Names:
    """What stands in /etc/hosts for a program that is started with `prefix`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.point_to(BEFORE)

    def point_to(self, address: str) -> None:
        """From now on this is the address of NAME."""
        self._path.write_text(f"127.0.0.1 localhost\n{address} {NAME}\n")

    @property
    def prefix(self) -> tuple[str, ...]:
        alone = ("unshare", "--mount", "--propagation", "private")
        return (*alone, "sh", "-ec", BIND, str(self._path))


@pytest.fixture
def names(tmp_path: Path) -> Names:
    return Names(tmp_path / "hosts")


class NamedKafka(KafkaBroker):
    """One node that calls itself NAME to the agent, and has a listener for the test beside it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.move(BEFORE, free_port())

    @property
    def named(self) -> str:
        return f"{NAME}:{self.named_port}"

    def move(self, host: str, port: int) -> None:
        """Where it is from its next start on, for the agent."""
        self.named_port = port
        plain = f"PLAINTEXT://{self.address}"
        self.config = (
            f"listeners={plain},NAMED://{host}:{port},CONTROLLER://{self.controller}",
            f"advertised.listeners={plain},NAMED://{self.named}",
            "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,NAMED:PLAINTEXT,"
            "CONTROLLER:PLAINTEXT",
        )


@pytest.fixture
def kafka(tmp_path: Path) -> Iterator[NamedKafka]:
    with NamedKafka(tmp_path / "kafka") as broker:
        yield broker


def writing(fault: str, kafka: NamedKafka, scope: Scope, names: Names, place: Path) -> Experiment:
    """An experiment whose agent knows two places of the broker, of which one is the first."""
    topic = "moved"
    asyncio.run(create(kafka, topic))
    sink = kafka_sink(kafka.named, topic)
    agent = configured(scope, place / "agent", sink, prefix=names.prefix)
    return with_kafka(fault, agent, scope, kafka.address, topic, place)


@slow
@pytest.mark.kafka
def test_kafka_at_another_address(
    kafka: NamedKafka, scope: Scope, names: Names, tmp_path: Path, record: Callable[[Row], None]
) -> None:
    fault = "Kafka killed, and back at another address under its name"
    with writing(fault, kafka, scope, names, tmp_path) as experiment:
        experiment.steady()
        kafka.kill()
        kafka.move(AFTER, kafka.named_port)
        time.sleep(SECONDS)
        names.point_to(AFTER)
        kafka.start()
        experiment.heal()
        row = experiment.finish()
        assert (row.duplicates, row.accounted) == (0, 0)
        record(row)


@pytest.mark.mqtt
def test_mosquitto_at_another_address(
    mosquitto: MosquittoBroker,
    mqtt_fault: Faults,
    names: Names,
    record: Callable[[Row], None],
) -> None:
    """It listens there beside the address that the test itself uses."""
    config, port = mosquitto.config, free_port()

    def move(host: str) -> None:
        mosquitto.kill()
        mosquitto.config = (*config, f"listener {port} {host}")

    move(BEFORE)
    mosquitto.start()
    fault = "Mosquitto killed, and back at another address under its name"
    with mqtt_fault(fault, host=NAME, port=port, prefix=names.prefix) as experiment:
        experiment.steady()
        move(AFTER)
        time.sleep(SECONDS)
        names.point_to(AFTER)
        mosquitto.start()
        experiment.heal()
        row = experiment.finish()
        assert row.accounted == 0
        record(row)
