"""The Kafka sink on a real cluster of three nodes, whose leaders move, die and come back."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest

from streamer.events.batch import Batch
from streamer.sinks.kafka.client import partition_of
from streamer.sinks.kafka.sink import KafkaSink
from tests.brokers import KafkaCluster
from tests.kafka_helpers import (
    HOST,
    create,
    expected,
    ids,
    make,
    opens,
    read_back,
    started,
    topics,
    until,
)

pytestmark = pytest.mark.kafka

PARTITION = partition_of(HOST.encode(), 3)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:
    with KafkaCluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


class Producing:
    """Submits ten events every few milliseconds until it is ended."""

    def __init__(self, sink: KafkaSink) -> None:
        self.sink = sink
        self._going = True
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> int:
        for start in itertools.count(0, 10):
            if not self._going:
                return start
            self.sink.submit(Batch(opens(start, 10)))
            await asyncio.sleep(0.004)
        raise AssertionError

    async def end(self) -> int:
        """How many events were submitted."""
        self._going = False
        return await self._task

    async def more(self, count: int) -> None:
        """Wait until so many more were delivered."""
        goal = self.sink.account.delivered.total() + count
        await until(partial(self._reached, goal), 60)

    def _reached(self, goal: int) -> bool:
        return self.sink.account.delivered.total() >= goal


async def test_leaders_that_die_cost_no_event_no_repetition_and_no_order(
    cluster: KafkaCluster,
) -> None:
    """The leader of the partition is killed, three times; the killed node is started again."""
    topic = next(topics)
    await create(cluster, topic, 3)
    sink, heard = make(cluster.address, topic, linger_ms=1, batch_bytes=2048)
    async with started(sink):
        producing = Producing(sink)
        for _ in range(3):
            await producing.more(1000)
            number = await asyncio.to_thread(cluster.leader, topic, PARTITION)
            node = cluster.nodes[number - 1]
            node.kill()
            await producing.more(1000)
            assert await asyncio.to_thread(cluster.leader, topic, PARTITION) != number
            await asyncio.to_thread(node.start)
        total = await producing.end()
        await until(lambda: not sink.account.pending)
        assert sink._topics[topic].window.epoch == 0
    assert ids(await read_back(cluster, topic)) == expected(0, total)
    assert sink.account.delivered == Counter({"file.open": total})
    assert heard.drops == []


async def test_leaders_that_are_moved_cost_no_event_no_repetition_and_no_order(
    cluster: KafkaCluster,
) -> None:
    """By Kafka's own tools: to a node that gets the partition, and to one that is preferred."""
    topic = next(topics)
    await create(cluster, topic, 2)
    sink, heard = make(cluster.address, topic, linger_ms=1, batch_bytes=2048)
    async with started(sink):
        producing = Producing(sink)
        await producing.more(1000)
        before = (await asyncio.to_thread(cluster.partitions, topic))[PARTITION]
        (other,) = set(before.replicas) - {before.leader}
        (free,) = {1, 2, 3} - set(before.replicas)
        await asyncio.to_thread(cluster.reassign, topic, PARTITION, (free, other))
        await producing.more(1000)
        moved = await asyncio.to_thread(cluster.leader, topic, PARTITION)
        assert moved != before.leader
        await asyncio.to_thread(cluster.reassign, topic, PARTITION, (free + other - moved, moved))
        await asyncio.to_thread(cluster.elect, topic, PARTITION)
        await producing.more(1000)
        assert await asyncio.to_thread(cluster.leader, topic, PARTITION) == free + other - moved
        total = await producing.end()
        await until(lambda: not sink.account.pending)
        assert sink._topics[topic].window.epoch == 0
    assert ids(await read_back(cluster, topic)) == expected(0, total)
    assert sink.account.delivered == Counter({"file.open": total})
    assert heard.drops == []


async def test_several_requests_are_under_way_at_once(cluster: KafkaCluster) -> None:
    topic = next(topics)
    await create(cluster, topic, 3)
    sink, _ = make(cluster.address, topic, linger_ms=0, batch_bytes=2048, compression="none")
    most = 0
    async with started(sink):
        sink.submit(Batch(opens(0, 100)))
        await until(lambda: not sink.account.pending)
        for start in range(100, 20_000, 100):
            sink.submit(Batch(opens(start, 100)))
            await asyncio.sleep(0.0005)
            most = max(most, sink._topics[topic].window.in_flight)
        await until(lambda: not sink.account.pending)
    assert most == 5
    assert ids(await read_back(cluster, topic)) == expected(0, 20_000)
