"""What the tests of the Kafka sink share: topics, events, sinks, and kcat as the witness."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple

import msgspec
from aiokafka import TopicPartition  # type: ignore[import-untyped]
from aiokafka.admin import (  # type: ignore[import-untyped]
    AIOKafkaAdminClient,
    NewPartitions,
    NewTopic,
    RecordsToDelete,
)
from aiokafka.admin.config_resource import (  # type: ignore[import-untyped]
    ConfigResource,
    ConfigResourceType,
)
from aiokafka.protocol.admin import (  # type: ignore[import-untyped]
    CreateAclsRequest,
    DescribeAclsRequest,
)

from streamer.config.settings import KafkaSink as Settings
from streamer.sinks.kafka.sink import KafkaSink
from tests.brokers import KafkaBroker, KafkaCluster
from tests.hostile_kafka import HostileBroker
from tests.recorder import Recorder

HOST = "node-17.example"

# Of today: a broker forgets the sequence numbers of a producer whose records are a day old.
NOW_NS = time.time_ns()

topics = (f"topic-{number}" for number in itertools.count())


class FileOpen(msgspec.Struct, tag_field="event", tag="file.open"):
    id: str
    time_ns: int
    path: str


class NetClose(msgspec.Struct, tag_field="event", tag="net.close"):
    id: str
    time_ns: int
    port: int


class Record(NamedTuple):
    partition: int
    time_ms: int
    key: str
    value: bytes


# ---------------------------------------------------------------- topics


async def create(
    broker: KafkaBroker | KafkaCluster,
    topic: str,
    replicas: int = 1,
    config: Mapping[str, str] | None = None,
) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.address)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, 3, replicas, topic_configs=dict(config or {}))])
    finally:
        await admin.close()


async def delete_before(broker: KafkaBroker, topic: str, partition: int, offset: int) -> None:
    """Have its first records deleted."""
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.address)
    await admin.start()
    try:
        which = {TopicPartition(topic, partition): RecordsToDelete(offset)}
        await admin.delete_records(which)
    finally:
        await admin.close()


async def alter(broker: KafkaBroker, topic: str, **config: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.address)
    await admin.start()
    try:
        resource = ConfigResource(ConfigResourceType.TOPIC, topic, configs=config)
        await admin.alter_configs([resource])
    finally:
        await admin.close()


async def add_partitions(broker: KafkaBroker, topic: str, count: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.address)
    await admin.start()
    try:
        await admin.create_partitions({topic: NewPartitions(count)})
    finally:
        await admin.close()


async def delete(broker: KafkaBroker, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.address)
    await admin.start()
    try:
        await admin.delete_topics([topic])
    finally:
        await admin.close()


async def allow_writing(broker: KafkaBroker, topic: str, user: str) -> None:
    """The controller says that it is allowed before the broker knows: it is asked, too."""
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.address)
    await admin.start()
    is_topic, literal, write, allow = 2, 3, 4, 3
    rule = is_topic, topic, literal, f"User:{user}", "*", write, allow
    try:
        await admin._send_request(CreateAclsRequest(*rule))
        while not (await admin._send_request(DescribeAclsRequest(*rule))).resources:  # noqa: ASYNC110 - a broker tells nobody
            await asyncio.sleep(0.05)
    finally:
        await admin.close()


async def read_back(broker: KafkaBroker | KafkaCluster, topic: str) -> list[Record]:
    """All records of a topic, by kcat: per partition in order."""
    arguments = ["-C", "-b", broker.address, "-t", topic, "-o", "beginning", "-e", "-q"]
    form = r"%p %T %k %S\n%s"
    done = await asyncio.to_thread(
        subprocess.run, ["kcat", *arguments, "-f", form], capture_output=True, check=True
    )
    text = io.BytesIO(done.stdout)
    records = []
    while head := text.readline():
        partition, time_ms, key, size = head.decode().split()
        records.append(Record(int(partition), int(time_ms), key, text.read(int(size))))
    return records


def ids(records: list[Record]) -> list[str]:
    return [msgspec.json.decode(record.value)["id"] for record in records]


def expected(start: int, count: int) -> list[str]:
    return [event.id for event in opens(start, count)]


# ---------------------------------------------------------------- sinks and events


def opens(start: int, count: int, path: str = "/etc/hosts") -> list[FileOpen]:
    return [
        FileOpen(f"boot-{number}", NOW_NS + number * 1_000_003, path)
        for number in range(start, start + count)
    ]


def make(address: str, topic: str, **settings: Any) -> tuple[KafkaSink, Recorder]:
    sink = KafkaSink(
        Settings(bootstrap=tuple(address.split(",")), topic=topic, **settings), host=HOST
    )
    sink.listener = heard = Recorder()
    return sink, heard


@contextlib.asynccontextmanager
async def started(sink: KafkaSink, grace: float = 20.0) -> AsyncIterator[None]:
    """The sink from start to stop; afterwards nothing of it may be left."""
    before = asyncio.all_tasks()
    await sink.start()
    try:
        yield
    finally:
        await sink.stop(grace)
    await asyncio.sleep(0)
    assert not sinks_tasks() - before
    assert sink.status == "closed"
    assert sink.account.pending == 0
    assert sink.watermarks.held == 0


def sinks_tasks() -> set[asyncio.Task[Any]]:
    """All but those of a broker in this process, which end when they are told of it."""
    broker = HostileBroker._accept.__qualname__
    return {task for task in asyncio.all_tasks() if qualname_of(task) != broker}


def qualname_of(task: asyncio.Task[Any]) -> str:
    return getattr(task.get_coro(), "__qualname__", "")


async def until(condition: Callable[[], object], seconds: float = 40.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for is not ours to signal
            await asyncio.sleep(0.02)
