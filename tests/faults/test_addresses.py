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
from tests.faults.proxy import Proxy
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


class MovingKafka(KafkaBroker):
    """One node, with a listener of its own for the agent beside the test's."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.agents_port = free_port()

    def move(self, host: str, advertised: str) -> None:
        """From its next start on, it listens there for the agent, and says that it is there."""
        plain = f"PLAINTEXT://{self.address}"
        agents = f"AGENTS://{host}:{self.agents_port}"
        self.config = (
            f"listeners={plain},{agents},CONTROLLER://{self.controller}",
            f"advertised.listeners={plain},AGENTS://{advertised}",
            "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,AGENTS:PLAINTEXT,"
            "CONTROLLER:PLAINTEXT",
        )


@pytest.fixture
def kafka(tmp_path: Path) -> Iterator[MovingKafka]:
    """Not started yet."""
    broker = MovingKafka(tmp_path / "kafka")
    yield broker
    broker.kill()


def writing(
    fault: str, kafka: MovingKafka, host: str, scope: Scope, names: Names, place: Path
) -> Experiment:
    """An experiment whose agent begins at this host."""
    topic = "moved"
    asyncio.run(create(kafka, topic))
    sink = kafka_sink(f"{host}:{kafka.agents_port}", topic)
    agent = configured(scope, place / "agent", sink, prefix=names.prefix)
    return with_kafka(fault, agent, scope, kafka.address, topic, place)


@slow
@pytest.mark.kafka
def test_kafka_at_another_address(
    kafka: MovingKafka, scope: Scope, names: Names, tmp_path: Path, record: Callable[[Row], None]
) -> None:
    fault = "Kafka killed, and back at another address under its name"
    advertised = f"{NAME}:{kafka.agents_port}"
    kafka.move(BEFORE, advertised)
    kafka.start()
    with writing(fault, kafka, NAME, scope, names, tmp_path) as experiment:
        experiment.steady()
        kafka.kill()
        kafka.move(AFTER, advertised)
        time.sleep(SECONDS)
        names.point_to(AFTER)
        kafka.start()
        experiment.heal()
        row = experiment.finish()
        assert (row.duplicates, row.accounted) == (0, 0)
        record(row)


@slow
@pytest.mark.kafka
def test_kafka_that_calls_itself_something_else(
    kafka: MovingKafka, scope: Scope, names: Names, tmp_path: Path, record: Callable[[Row], None]
) -> None:
    """Packets to where it was before are lost; where the agent first asked it is as ever."""
    fault = "Kafka gone, and back under another advertised port"
    with (
        Proxy(free_port(), kafka.agents_port) as before,
        Proxy(free_port(), kafka.agents_port) as after,
    ):
        kafka.move("127.0.0.1", before.address)
        kafka.start()
        with writing(fault, kafka, "127.0.0.1", scope, names, tmp_path) as experiment:
            experiment.steady()
            before.silence()
            kafka.kill()
            kafka.move("127.0.0.1", after.address)
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


@slow
@pytest.mark.mqtt
def test_mosquitto_gone_from_its_address(
    mosquitto: MosquittoBroker,
    mqtt_fault: Faults,
    names: Names,
    record: Callable[[Row], None],
) -> None:
    """Packets to where it was are lost, and nobody is told; the name says where it is."""
    fault = "Mosquitto gone, and at once at another address under its name"
    port = free_port()
    with (
        Proxy(port, mosquitto.port, BEFORE) as before,
        Proxy(port, mosquitto.port, AFTER),
        mqtt_fault(fault, host=NAME, port=port, prefix=names.prefix) as experiment,
    ):
        experiment.steady()
        before.silence()
        names.point_to(AFTER)
        experiment.heal()
        row = experiment.finish(after=10)
        assert row.accounted == 0
        record(row)
