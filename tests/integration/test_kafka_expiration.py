"""A real Kafka that forgets producers soon: whoever has been idle for longer is taken as before.

By `producer.id.expiration.ms`: a day by default and six seconds here, as for a host on which
nothing happens for days. What counts is the time that the newest record bears.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from streamer.events.batch import Batch
from streamer.sinks.kafka.client import partition_of
from tests.brokers import TOOLS, KafkaBroker, kafka_tool
from tests.kafka_helpers import (
    HOST,
    FileOpen,
    create,
    expected,
    ids,
    make,
    read_back,
    started,
    until,
)

pytestmark = pytest.mark.kafka

EXPIRES = ("producer.id.expiration.ms=6000", "producer.id.expiration.check.interval.ms=100")
PARTITION = partition_of(HOST.encode(), 3)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    with KafkaBroker(tmp_path_factory.mktemp("kafka"), EXPIRES) as made:
        yield made


async def known(broker: KafkaBroker, topic: str) -> list[tuple[int, int]]:
    """Producers of the partition that the broker knows, each with its newest sequence number."""
    where = ("describe-producers", "--topic", topic, "--partition", f"{PARTITION}")
    said = await asyncio.to_thread(
        kafka_tool, f"{TOOLS}.TransactionsCommand", "--bootstrap-server", broker.address, *where
    )
    head, *lines = (line.split() for line in said.splitlines() if line)
    assert head[:4] == ["ProducerId", "ProducerEpoch", "LatestCoordinatorEpoch", "LastSequence"]
    return [(int(line[0]), int(line[3])) for line in lines]


def of_time(time_ns: int, start: int, count: int) -> list[FileOpen]:
    return [FileOpen(f"boot-{n}", time_ns + n, "/x") for n in range(start, start + count)]


async def test_an_idle_producer_that_is_forgotten_loses_and_repeats_nothing(
    broker: KafkaBroker,
) -> None:
    """When it goes on, several batches are under way at once."""
    topic, each = "idle", 2000
    await create(broker, topic)
    sink, heard = make(broker.address, topic, linger_ms=0, batch_bytes=2048)
    async with started(sink):
        for turn in range(2):
            for start in range(turn * each, (turn + 1) * each, 100):
                sink.submit(Batch(of_time(time.time_ns(), start, 100)))
                await asyncio.sleep(0.001)
            await until(lambda: not sink.account.pending)
            window = sink._topics[topic].window
            assert window.epoch == 0
            if turn == 0:
                async with asyncio.timeout(60):
                    while found := await known(broker, topic):
                        assert found == [(window.producer_id, each - 1)]
    assert ids(await read_back(broker, topic)) == expected(0, 2 * each)
    assert sink.account.delivered == Counter({"file.open": 2 * each})
    assert heard.drops == []
    assert heard.statuses == [("up", ""), ("closed", "")]


async def test_events_older_than_that_are_forgotten_at_once_and_there_once(
    broker: KafkaBroker,
) -> None:
    """As what waited in a spool for longer: their times have the broker forget who sent them."""
    topic, count = "old", 3000
    await create(broker, topic)
    sink, heard = make(broker.address, topic, linger_ms=0, batch_bytes=2048)
    async with started(sink):
        for start in range(0, count, 50):
            sink.submit(Batch(of_time(time.time_ns() - 3600 * 10**9, start, 50)))
            await asyncio.sleep(0.02)
        await until(lambda: not sink.account.pending)
        assert await known(broker, topic) == []
    assert ids(await read_back(broker, topic)) == expected(0, count)
    assert heard.drops == []
    assert heard.statuses == [("up", ""), ("closed", "")]
