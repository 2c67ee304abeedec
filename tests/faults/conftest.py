"""What the tests of faults share: a cluster behind proxies, and the table that they make."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from streamer.sinks.kafka.client import partition_of
from tests.brokers import KafkaCluster, MosquittoBroker, Partition, free_port
from tests.faults import table
from tests.faults.consumers import (
    QUICK,
    FileFollower,
    KafkaFollower,
    MosquittoFollower,
    by_kcat,
    by_mosquitto,
)
from tests.faults.experiment import RATE, Experiment, Faulty, configured
from tests.faults.proxy import Proxy
from tests.faults.table import Row
from tests.kafka_helpers import create
from tests.kernel.pace import seconds
from tests.kernel.scope import Scope, cgroup_mount

PROBED = "probed"
"""A topic with a partition led by each node, when all is well."""
OF_HOST = partition_of(os.uname().nodename.encode(), 3)
"""The partition of this host's events: all topics have three."""
ROWS = pytest.StashKey[dict[str, Row]]()
_topics = (f"faults-{number}" for number in itertools.count())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write", action="store_true", help="put what came of it into the table")
    parser.addoption("--rows", type=Path, help="write what came of it there, JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = {}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    rows = config.stash[ROWS]
    terminalreporter.section("what came of the faults")
    for line in ("| " + " | ".join(table.HEAD) + " |", *(row.line for row in rows.values())):
        terminalreporter.line(line)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Keeps what came of a fault, in the page if that is asked for."""
    rows = request.config.stash[ROWS]

    def keep(row: Row) -> None:
        rows[row.fault] = row
        if place := request.config.getoption("--rows"):
            with place.open("ab") as file:
                file.write(msgspec.json.encode(row) + b"\n")
        if request.config.getoption("--write"):
            table.PAGE.write_text(table.written(table.PAGE.read_text(), {row.fault: row}))

    return keep


@pytest.fixture
def scope() -> Iterator[Scope]:
    mount = cgroup_mount()
    assert mount is not None, "no cgroup v2 hierarchy is mounted"
    with Scope(mount) as made:
        yield made


class Cluster(KafkaCluster):
    """Three nodes; each can also be reached through a proxy of its own."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, {"PROXIED": "PLAINTEXT"})
        self.proxies = []
        for node in self.nodes:
            proxy = Proxy(free_port(), int(node.addresses["PROXIED"].rpartition(":")[2]))
            advertised = f"PLAINTEXT://{node.address},PROXIED://{proxy.address}"
            node.config += (f"advertised.listeners={advertised}",)
            self.proxies.append(proxy)

    @property
    def proxied(self) -> str:
        """The proxies of all nodes."""
        return ",".join(proxy.address for proxy in self.proxies)

    def of_host(self, topic: str) -> Partition:
        """Who has the partition of this host's events: see `OF_HOST`."""
        return self.partitions(topic)[OF_HOST]

    def wait_for(
        self, topic: str, wanted: Callable[[Partition], bool], limit: float = 180
    ) -> Partition:
        """Until the partition of this host's events is as it is wanted; as it is then."""
        deadline = time.monotonic() + seconds(limit)
        while not wanted(found := self.of_host(topic)):
            assert time.monotonic() < deadline, f"{topic}: {found}"
            time.sleep(0.05)
        return found

    def wait_until_writable(self, timeout: float = 180) -> None:
        """Until kcat can write to each node, with two replicas at least: there a fault ends.

        Not what a broker says of itself: one that has no controller says what was true before.
        """
        deadline = time.monotonic() + timeout
        for partition in range(len(self.nodes)):
            command = ["kcat", "-P", "-b", self.address, "-t", PROBED, "-p", str(partition), *QUICK]
            command += ["-X", "acks=all", "-X", "message.timeout.ms=2000"]
            while subprocess.run(command, input=b"x", stderr=subprocess.DEVNULL).returncode:
                assert time.monotonic() < deadline, "the cluster does not come back"

    def create(self, topic: str, replicas: int = 3) -> None:
        """A topic of three partitions, which every node knows by then."""
        asyncio.run(create(self, topic, replicas))
        for node in self.nodes:
            command = ["kcat", "-L", "-b", node.address, "-t", topic]
            while subprocess.run(command, capture_output=True).stdout.count(b"isrs: ") < 3:
                time.sleep(0.1)

    def revive(self) -> None:
        """Start what does not run, and continue what was stopped."""
        for node in self.nodes:
            try:
                os.kill(node.pid, signal.SIGCONT)
            except RuntimeError:
                node.start()


@pytest.fixture(scope="session")
def cluster_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as stack:
        cluster = Cluster(tmp_path_factory.mktemp("cluster"))
        for proxy in cluster.proxies:
            stack.enter_context(proxy)
        stack.enter_context(cluster)
        cluster.create(PROBED)
        yield cluster


@pytest.fixture
def cluster(cluster_once: Cluster) -> Iterator[Cluster]:
    """Whole at the beginning of each test, whatever the one before left."""
    yield cluster_once
    for proxy in cluster_once.proxies:
        proxy.heal()
    cluster_once.revive()


Faults = Callable[..., Experiment]


@pytest.fixture
def kafka_fault(cluster: Cluster, scope: Scope, tmp_path: Path) -> Faults:
    """Makes an experiment with the cluster; `proxied`: the agent reaches it by the proxies."""

    def make(
        fault: str,
        *,
        proxied: bool = False,
        rate: int = RATE,
        replicas: int = 3,
        sink: str = "",
        **options: Any,
    ) -> Experiment:
        topic = next(_topics)
        cluster.create(topic, replicas)
        lines = kafka_sink(cluster.proxied if proxied else cluster.address, topic) + sink
        agent = configured(scope, tmp_path / "agent", lines, **options)
        return with_kafka(fault, agent, scope, cluster.address, topic, tmp_path, rate)

    return make


def kafka_sink(bootstrap: str, topic: str) -> str:
    """The settings of a sink, for addresses with commas between them."""
    servers = ", ".join(f'"{one}"' for one in bootstrap.split(","))
    return f'type = "kafka"\nbootstrap = [{servers}]\ntopic = "{topic}"\n'


def with_kafka(
    fault: str,
    agent: Faulty,
    scope: Scope,
    address: str,
    topic: str,
    directory: Path,
    rate: int = RATE,
) -> Experiment:
    """An experiment with an agent that writes a topic; at `address` the test itself reads it."""
    made = Experiment(
        fault,
        agent,
        scope,
        lambda: KafkaFollower(address, topic, directory),
        lambda: by_kcat(address, topic),
        lambda: f"kafka://{address}/{topic}",
        rate=rate,
    )
    made.topic = topic
    return made


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[MosquittoBroker]:
    """One that keeps what it was given for a subscriber that is away, also when it is killed."""
    config = (
        *("autosave_interval 1", "autosave_on_changes true"),
        *("queue_qos0_messages true", "max_queued_messages 0"),
    )
    with MosquittoBroker(tmp_path / "mosquitto", config) as broker:
        yield broker


@pytest.fixture
def mqtt_fault(mosquitto: MosquittoBroker, scope: Scope, tmp_path: Path) -> Faults:
    """Makes an experiment with Mosquitto; the agent may be given another address for it."""

    def make(
        fault: str,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        sink: str = "",
        **options: Any,
    ) -> Experiment:
        port = port or mosquitto.port
        lines = f'type = "mqtt"\nhost = "{host}"\nport = {port}\ntopic = "kernel"\n{sink}'
        agent = configured(scope, tmp_path / "agent", lines, **options)
        return Experiment(
            fault,
            agent,
            scope,
            lambda: MosquittoFollower(mosquitto, "kernel", tmp_path),
            lambda: by_mosquitto(tmp_path / "arrived"),
            lambda: str(tmp_path / "arrived"),
        )

    return make


@pytest.fixture
def file_fault(scope: Scope, tmp_path: Path) -> Faults:
    """Makes an experiment with a file."""

    def make(fault: str, **options: Any) -> Experiment:
        path = tmp_path / "arrived"
        path.touch()
        sink = f'type = "file"\npath = "{path}"'
        agent = configured(scope, tmp_path / "agent", sink, spool=None, **options)
        return Experiment(
            fault,
            agent,
            scope,
            lambda: FileFollower(path),
            lambda: path.read_bytes().splitlines(),
            lambda: str(path),
        )

    return make
