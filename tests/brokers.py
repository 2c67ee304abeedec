"""Real brokers for the tests: a private Kafka and Mosquitto, each a process of this one.

Both listen on a loopback port of their own and keep their data in a directory of the test, so
that one killed with SIGKILL can be started again on the same port and data. Every method
blocks; a test that goes on meanwhile uses `asyncio.to_thread`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

ROOT = Path(__file__).resolve().parent.parent
COMMON = ROOT / "tools" / "kafka.properties"
# Quick to start and small: a test's broker does not live long enough for a better compiler.
JAVA_OPTIONS = ("-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")
MOSQUITTO_LOGS = ("error", "warning", "notice", "information", "subscribe")
_PARTITION = re.compile(r" *partition (\d+), leader (-?\d+), replicas: ([\d,]*), isrs: ([\d,]*)")
FORMAT = ("kafka.tools.StorageTool", "format", "-t", "c3RyZWFtZXItdGVzdHMtMQ")


def _ports() -> Iterator[int]:
    """None twice, and others than the other process of the tests has: some listen only later."""
    first = 26000 if os.environ.get("PYTEST_XDIST_WORKER") == "gw1" else 20000
    return itertools.cycle(random.sample(range(first, first + 6000), 6000))


_PORTS = _ports()


def free_port() -> int:
    """A loopback port that nothing listens on.

    It lies below the kernel's ephemeral range: a client that keeps connecting to a dead
    ephemeral port can be given that very port as its own, and then the broker cannot bind.
    """
    while True:
        port = next(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def kafka_class_path() -> str:
    """The class path of the Kafka that `tools/brokers.sh setup` fetched.

    Raises:
        FileNotFoundError: it has not been fetched; the message names the command.
    """
    cache = Path(os.environ.get("STREAMER_CACHE", ROOT / ".cache"))
    if not list((cache / "kafka").glob("kafka_2.13-*.jar")):
        raise FileNotFoundError(f"no Kafka in {cache}/kafka: run tools/brokers.sh setup")
    return f"{cache}/kafka/*"


TOOLS = "org.apache.kafka.tools"


def kafka_tool(name: str, *arguments: str) -> str:
    """What one of Kafka's own tools prints: `name` is its class, of Java.

    Raises:
        RuntimeError: it failed; with what it printed.
    """
    command = ["java", "-cp", kafka_class_path(), *JAVA_OPTIONS, name]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments)}: {done.stdout}{done.stderr}")
    return done.stdout


class Broker(ABC):
    """A broker process: started, killed, started again on the same port and data, stopped."""

    def __init__(self, directory: Path) -> None:
        """`directory` holds configuration, data and log; it is made when it does not exist."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """`host:port` of the plain listener."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Process id. Raises RuntimeError when it is not running."""
        if self._process is None:
            raise RuntimeError("the broker is not running")
        return self._process.pid

    @property
    def log(self) -> str:
        """What the broker has written so far, over all its starts."""
        path = self.directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self, timeout: float = 180.0) -> None:
        """Start and wait until it answers.

        Raises:
            RuntimeError: it ended, or did not answer within `timeout` seconds; with its log.
        """
        command = self._prepare()
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.directory, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + timeout
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                text = self.log
                wrong = re.findall(".*(?:ERROR|FATAL|Exception).*", text)[:10]
                said = "\n".join([*wrong, "...", text[-4000:]])
                raise RuntimeError(f"{command[0]} did not come up:\n{said}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL; harmless when it is not running."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL after 10 seconds; harmless when it is not running."""
        self._end(signal.SIGTERM)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def _end(self, signum: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signum)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @abstractmethod
    def _prepare(self) -> Sequence[str]:
        """Write the configuration; the command that runs the broker in the foreground."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether it serves clients by now."""


class MosquittoBroker(Broker):
    """Mosquitto with anonymous access on its port, unless `config` says otherwise.

    `config` are lines of mosquitto.conf; those after a `listener` line apply to that listener.
    """

    def __init__(
        self, directory: Path, config: Iterable[str] = (), *, anonymous: bool = True
    ) -> None:
        """`anonymous` False leaves `allow_anonymous` to be false."""
        super().__init__(directory)
        self.config = tuple(config)
        self.anonymous = anonymous

    def _prepare(self) -> Sequence[str]:
        path = self.directory / "mosquitto.conf"
        lines = [
            # Started by root, Mosquitto would change to a user that cannot read the directory.
            "user root",
            "persistence true",
            f"persistence_location {self.directory}/",
            f"allow_anonymous {str(self.anonymous).lower()}",
            *(f"log_type {kind}" for kind in MOSQUITTO_LOGS),
            f"listener {self.port} 127.0.0.1",
            *self.config,
        ]
        path.write_text("\n".join(lines) + "\n")
        return ["mosquitto", "-c", str(path)]

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True


@contextlib.contextmanager
def subscribed(broker: MosquittoBroker, topic: str, output: Path, *options: str) -> Iterator[None]:
    """mosquitto_sub meanwhile writes what is published to `output`: all from the beginning on.

    At QoS 1, unless `options` say something else.
    """
    name = f"witness-{time.monotonic_ns()}"
    command = ["mosquitto_sub", "-V", "mqttv5", "-h", "127.0.0.1", "-p", str(broker.port)]
    command += ["-q", "1", "-i", name, "-t", topic, *options]
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file)
    try:
        deadline = time.monotonic() + 30
        while not any(f"{name} {qos} " in broker.log for qos in (0, 1)):  # and the topic
            assert process.poll() is None, "mosquitto_sub ended"
            assert time.monotonic() < deadline, broker.log
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(10)


class KafkaBroker(Broker):
    """Apache Kafka, one KRaft node, with a plain listener on its port.

    `config` are further lines of server.properties, which win over the common ones.
    `listeners` are further listeners, name to security protocol (`SSL`, `SASL_PLAINTEXT` …);
    their addresses are `addresses[name]`.
    """

    def __init__(
        self,
        directory: Path,
        config: Iterable[str] = (),
        listeners: Mapping[str, str] | None = None,
        scram_users: Mapping[str, str] | None = None,
        node: int = 1,
    ) -> None:
        """`scram_users` are names and passwords known to SCRAM-SHA-256 and SCRAM-SHA-512."""
        super().__init__(directory)
        self.config = tuple(config)
        self.node = node
        self.scram_users = dict(scram_users or {})
        self.protocols = dict(listeners or {})
        self.addresses = {name: f"127.0.0.1:{free_port()}" for name in self.protocols}
        self.controller = f"127.0.0.1:{free_port()}"
        self.voters = f"{node}@{self.controller}"

    def _prepare(self) -> Sequence[str]:
        properties = self.directory / "server.properties"
        data = self.directory / "data"
        properties.write_text("\n".join((COMMON.read_text(), *self._own_lines(data))) + "\n")
        java = ["java", "-cp", kafka_class_path(), *JAVA_OPTIONS]
        if not (data / "meta.properties").exists():
            subprocess.run(
                [*java, *FORMAT, "-c", str(properties), *self._scram_arguments()],
                check=True,
                capture_output=True,
                text=True,
            )
        return [*java, "kafka.Kafka", str(properties)]

    def _own_lines(self, data: Path) -> list[str]:
        addresses = {"PLAINTEXT": self.address, **self.addresses}
        protocols = {"PLAINTEXT": "PLAINTEXT", "CONTROLLER": "PLAINTEXT", **self.protocols}
        advertised = [f"{name}://{address}" for name, address in addresses.items()]
        return [
            f"listeners={','.join([*advertised, f'CONTROLLER://{self.controller}'])}",
            f"advertised.listeners={','.join(advertised)}",
            "listener.security.protocol.map="
            + ",".join(f"{name}:{protocol}" for name, protocol in protocols.items()),
            f"node.id={self.node}",
            f"controller.quorum.voters={self.voters}",
            f"log.dirs={data}",
            # After a SIGKILL a broker may not register again before its old session is over.
            "broker.session.timeout.ms=2000",
            "broker.heartbeat.interval.ms=500",
            *self.config,
        ]

    def _scram_arguments(self) -> list[str]:
        return [
            argument
            for name, password in self.scram_users.items()
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
            for argument in ("--add-scram", f"{mechanism}=[name={name},password={password}]")
        ]

    def _answers(self) -> bool:
        asked = subprocess.run(
            ["kcat", "-b", self.address, "-L", "-m", "2"], capture_output=True, text=True
        )
        return asked.returncode == 0 and f"broker {self.node} at" in asked.stdout


class Partition(NamedTuple):
    """Nodes by their numbers, as a broker names them. `leader` -1: there is none."""

    leader: int
    replicas: tuple[int, ...]
    in_sync: tuple[int, ...]


class KafkaCluster:
    """Three nodes of Apache Kafka, each broker and controller. Topics have three replicas."""

    def __init__(self, directory: Path, listeners: Mapping[str, str] | None = None) -> None:
        """`directory` holds a directory for each node; `listeners`: see `KafkaBroker`."""
        config = (
            "default.replication.factor=3",
            "min.insync.replicas=2",
            "offsets.topic.replication.factor=3",
            "transaction.state.log.replication.factor=3",
        )
        self.nodes = [
            KafkaBroker(directory / f"node-{number}", config, listeners, node=number)
            for number in (1, 2, 3)
        ]
        voters = ",".join(node.voters for node in self.nodes)
        for node in self.nodes:
            node.voters = voters

    @property
    def address(self) -> str:
        """The plain listeners of all nodes."""
        return ",".join(node.address for node in self.nodes)

    def leader(self, topic: str, partition: int) -> int:
        """The number of the node that leads a partition; -1: none does."""
        return self.partitions(topic)[partition].leader

    def elect(self, topic: str, partition: int) -> None:
        """Have the first of a partition's replicas lead it, if it does not."""
        where = ("--topic", topic, "--partition", f"{partition}")
        how = ("--election-type", "preferred")
        kafka_tool(
            f"{TOOLS}.LeaderElectionCommand", "--bootstrap-server", self.address, *how, *where
        )

    def reassign(
        self, topic: str, partition: int, replicas: Sequence[int], timeout: float = 180.0
    ) -> None:
        """Have these nodes, the first preferred, keep a partition; returns when they all do.

        Raises:
            RuntimeError: they do not within `timeout` seconds.
        """
        one = {"topic": topic, "partition": partition, "replicas": list(replicas)}
        plan = self.nodes[0].directory / "reassignment.json"
        plan.write_text(json.dumps({"version": 1, "partitions": [one]}))
        arguments = ("--bootstrap-server", self.address, "--reassignment-json-file", str(plan))
        kafka_tool(f"{TOOLS}.reassign.ReassignPartitionsCommand", *arguments, "--execute")
        deadline = time.monotonic() + timeout
        while (found := self.partitions(topic)[partition]).replicas != tuple(replicas) or (
            set(found.in_sync) != set(replicas)
        ):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{topic} {partition}: {found} in place of {replicas}")
            time.sleep(0.1)

    def partitions(self, topic: str) -> dict[int, Partition]:
        """What a broker says of each partition of a topic."""
        asked = subprocess.run(
            ["kcat", "-b", self.address, "-L", "-t", topic, "-m", "10"],
            capture_output=True,
            text=True,
            check=True,
        )
        found = {}
        for line in asked.stdout.splitlines():
            if match := _PARTITION.match(line):
                number, leader, *nodes = match.groups()
                replicas, in_sync = (
                    tuple(int(node) for node in some.split(",") if node) for some in nodes
                )
                found[int(number)] = Partition(int(leader), replicas, in_sync)
        if not found:
            raise RuntimeError(f"no partitions of {topic}: {asked.stdout}")
        return found

    def __enter__(self) -> Self:
        # All at once: one alone has no majority, and answers nobody.
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            list(pool.map(KafkaBroker.start, self.nodes))
        return self

    def __exit__(self, *exc: object) -> None:
        for node in self.nodes:
            node.kill()
