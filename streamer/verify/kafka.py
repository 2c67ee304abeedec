"""Records in Kafka: all partitions of the topics of a sink's URL, with its TLS and SASL.

The consumer is aiokafka's, without a group: nothing is committed, and no consumer disturbed.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition  # type: ignore[import-untyped]
from aiokafka.errors import KafkaError  # type: ignore[import-untyped]

from streamer.config.settings import KafkaSink as Settings
from streamer.errors import SinkError
from streamer.sinks.credentials import ssl_context
from streamer.sinks.kafka.client import check_topic, connection_options, silence_aiokafka
from streamer.verify.fetched import give_batches
from streamer.verify.records import Chunk
from streamer.verify.start import Start

START_SECONDS = 30.0
ASK_SECONDS = 30.0
POLL_MS = 200
FETCH_BYTES = 4 << 20
"""Of each partition: with less, a topic of large batches is read a batch at a time."""

ANSWER_BYTES = 16 << 20
"""Of all partitions, as they are compressed. Two such answers are held: one is read, one comes."""


class KafkaSource:
    """The topics of a URL."""

    def __init__(self, settings: Settings) -> None:
        """Raise ConfigError for a file, variable or topic that cannot be used."""
        check_topic(settings.topic)
        silence_aiokafka()
        self.settings = settings
        self.name = f"kafka://{','.join(settings.bootstrap)}/{settings.topic}"
        self.trimmed = False
        """Whether the brokers have removed records from the beginning."""
        self._read: dict[Any, int] = {}
        self._ends: dict[Any, int] = {}
        """Per partition, up to where it was read, and where it ended, as far as is known."""
        tls = settings.tls
        context: ssl.SSLContext | None = ssl_context(tls) if tls is not None else None
        self._options = connection_options(settings, context)

    @property
    def complete(self) -> bool:
        """Whether every partition was read to its end, as it was at the start, or later."""
        ends = self._ends.items()
        return bool(ends) and all(self._read[partition] >= end for partition, end in ends)

    async def read(self, start: Start, *, follow: bool) -> AsyncIterator[Chunk]:
        """The records: up to the end as it is now, or for ever.

        Raises:
            SinkError: there is no reading them.
        """
        consumer = AIOKafkaConsumer(
            bootstrap_servers=list(self.settings.bootstrap),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            max_partition_fetch_bytes=FETCH_BYTES,
            fetch_max_bytes=ANSWER_BYTES,
            **self._options,
        )
        try:
            async with asyncio.timeout(START_SECONDS):
                await consumer.start()
            give_batches(consumer)
            async with asyncio.timeout(ASK_SECONDS):
                await self._begin(consumer, start)
            async for chunk in self._chunks(consumer, follow=follow):
                yield chunk
        except (KafkaError, OSError, TimeoutError, ssl.SSLError) as error:
            reason = str(error) or type(error).__name__
            raise SinkError(f"{self.name}: cannot be read: {reason}") from None
        finally:
            await asyncio.wait({asyncio.ensure_future(consumer.stop())}, timeout=5)

    async def _begin(self, consumer: Any, start: Start) -> None:
        """Assign the partitions and seek."""
        known = await consumer.topics()
        pattern = re.escape(self.settings.topic).replace(re.escape("{category}"), "[a-z_]+")
        topics = [name for name in known if re.fullmatch(pattern, name)]
        if not topics:
            raise SinkError(f"{self.name}: there is no such topic")
        partitions = [
            TopicPartition(topic, number)
            for topic in sorted(topics)
            for number in sorted(await self._numbers(consumer, topic))
        ]
        consumer.assign(partitions)
        first = await consumer.beginning_offsets(partitions)
        self._ends = await consumer.end_offsets(partitions)
        self.trimmed = any(first.values())
        self._read = await _places(consumer, start, first, self._ends)
        for partition, at in self._read.items():
            consumer.seek(partition, at)

    async def _numbers(self, consumer: Any, topic: str) -> set[int]:
        # Metadata of a topic that nobody subscribes to comes with the next update.
        while not (found := consumer.partitions_for_topic(topic)):
            await consumer._client.force_metadata_update()
            await asyncio.sleep(0.05)
        return set(found)

    async def _chunks(self, consumer: Any, *, follow: bool) -> AsyncIterator[Chunk]:
        while follow or not self.complete:
            got = await consumer.getmany(timeout_ms=POLL_MS)
            if not got:  # where a broker has removed all that was to come, no batch says so
                self._read = {one: await consumer.position(one) for one in self._ends}
            for partition, batches in got.items():
                where = f"{partition.topic}, partition {partition.partition}"
                if follow:
                    self._ends[partition] = consumer.highwater(partition)
                for batch in batches:
                    # What has come since the start is not read: elsewhere it is not either.
                    if not follow and batch.offset >= self._ends[partition]:
                        break
                    await asyncio.sleep(0)  # the next answer is asked for, and comes
                    if values := batch.values():
                        yield Chunk(where, values, f"{where}, from offset {batch.offset}")
                    self._read[partition] = batch.next_offset


async def _places(
    consumer: Any, start: Start, first: dict[Any, int], ends: dict[Any, int]
) -> dict[Any, int]:
    if start.end:
        return ends
    if start.offset is not None:
        return {p: min(max(start.offset, first[p]), ends[p]) for p in first}
    if start.time_ns is None:
        return first
    asked = dict.fromkeys(first, start.time_ns // 1_000_000)
    found = await consumer.offsets_for_times(asked)
    return {p: found[p].offset if found.get(p) is not None else ends[p] for p in first}
