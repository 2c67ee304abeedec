"""Records in Kafka: all partitions of the topics of a sink's URL, with its TLS and SASL.

The consumer is aiokafka's, without a group: nothing is committed, and no consumer disturbed.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition  # type: ignore[import-untyped]
from aiokafka.errors import KafkaError  # type: ignore[import-untyped]

from streamer.config.settings import KafkaSink as Settings
from streamer.errors import SinkError
from streamer.sinks.credentials import ssl_context
from streamer.sinks.kafka.client import check_topic, connection_options, silence_aiokafka
from streamer.verify.fetched import Batch, UnreadableRecords, give_batches
from streamer.verify.records import Chunk
from streamer.verify.start import Start

START_SECONDS = 30.0
ASK_SECONDS = 30.0
POLL_MS = 200
SILENT_SECONDS = 60.0
"""So long nothing of what is still to be read may come."""

STOP_SECONDS = 5.0
MOST_NAMED = 10
"""Partitions."""

FETCH_BYTES = 4 << 20
"""Of each partition: with less, a topic of large batches is read a batch at a time."""

ANSWER_BYTES = 16 << 20
"""Of all partitions of a broker, as they are compressed. Two such answers of each broker are held:
one is read, one comes."""


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
        """Per partition, up to where it was read, and where it ended at the start; of what is
        followed where it ended when that was over, or none if nobody said so.
        """
        self._silent: list[Any] = []
        self._following = False
        self._stopping = False
        tls = settings.tls
        context: ssl.SSLContext | None = ssl_context(tls) if tls is not None else None
        self._options = connection_options(settings, context)

    @property
    def complete(self) -> bool:
        """Whether every partition was read to its end, as it was at the start, or later."""
        return bool(self._ends) and not self._unfinished

    @property
    def _unfinished(self) -> list[Any]:
        return [one for one, end in self._ends.items() if self._read.get(one, 0) < end]

    @property
    def remarks(self) -> Iterator[str]:
        """What there is to say of the reading itself."""
        if self._silent:
            names = _named(self._silent)
            yield f"{self.name}: nothing more came for {SILENT_SECONDS:.0f} s of {names}"

    def stop(self) -> bool:
        """Follow no longer than up to the end as it is now. False: it does not follow yet."""
        self._stopping = self._following and bool(self._read)
        return self._stopping

    async def read(self, start: Start, *, follow: bool) -> AsyncIterator[Chunk]:
        """The records: up to the end as it is now, or, if it follows, as it is at the stop.

        Raises:
            SinkError: there is no reading them.
        """
        self._following = follow
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
            async for chunk in self._chunks(consumer):
                yield chunk
        except (KafkaError, OSError, TimeoutError, ssl.SSLError) as error:
            reason = str(error) or type(error).__name__
            raise SinkError(f"{self.name}: cannot be read: {reason}") from None
        finally:
            if self._following:
                await self._renew_ends(consumer)
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
        first = await self._offsets(consumer.beginning_offsets, partitions)
        self._ends = await self._offsets(consumer.end_offsets, partitions)
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

    async def _offsets(
        self, ask: Callable[[Sequence[Any]], Awaitable[dict[Any, int]]], partitions: Sequence[Any]
    ) -> dict[Any, int]:
        """One for each partition. Raises SinkError: the answer leaves one out."""
        found = await ask(partitions)
        if missing := [one for one in partitions if one not in found]:
            raise SinkError(f"{self.name}: no broker tells the offsets of {_named(missing)}")
        return {one: found[one] for one in partitions}

    async def _renew_ends(self, consumer: Any) -> None:
        """Following is over. Partitions of which nothing was fetched may have got records."""
        partitions, self._ends, self._following = [*self._ends], {}, False
        if partitions:
            asked = self._offsets(consumer.end_offsets, partitions)
            with suppress(SinkError, KafkaError, OSError, TimeoutError):
                self._ends = await asyncio.wait_for(asked, STOP_SECONDS)

    async def _chunks(self, consumer: Any) -> AsyncIterator[Chunk]:
        came = time.monotonic()
        while self._following or (self._unfinished and not self._silent):
            if self._following and self._stopping:
                await self._renew_ends(consumer)
                came = time.monotonic()
                continue
            before = self._read.copy()
            got = await consumer.getmany(timeout_ms=POLL_MS)
            for partition, batches in got.items():
                for batch in batches:
                    # What has come since then is not read: elsewhere it is not either.
                    if not self._following and batch.offset >= self._ends[partition]:
                        break
                    await asyncio.sleep(0)  # the next answer is asked for, and comes
                    deleted = self._go_to(partition, batch.offset)
                    for chunk in _chunks_of(partition, batch, deleted):
                        yield chunk
                    self._read[partition] = batch.next_offset
            if self._read == before:
                for chunk in await self._look(consumer):
                    yield chunk
            if self._read != before:
                came = time.monotonic()
            elif not self._following and time.monotonic() - came >= SILENT_SECONDS:
                self._silent = self._unfinished

    async def _look(self, consumer: Any) -> list[Chunk]:
        """Where a broker has deleted all that was to come, no batch says so."""
        found = []
        for one in [*self._ends] if self._following else self._unfinished:
            # One whose leader cannot be asked where it begins by now has no position for so long.
            with suppress(TimeoutError):
                async with asyncio.timeout(0):
                    at = await consumer.position(one)
                    if not self._following:  # what is behind the end is there, or was not asked for
                        at = min(at, self._ends[one])
                    if deleted := self._go_to(one, at):
                        found.append(Chunk(_named([one]), [], deleted=deleted))
        return found

    def _go_to(self, partition: Any, offset: int) -> int:
        """Note that the next record is there. How many offsets before it were deleted meanwhile."""
        before, self._read[partition] = self._read[partition], offset
        return max(offset - before, 0)


def _named(partitions: Sequence[Any]) -> str:
    names = [f"{one.topic}, partition {one.partition}" for one in partitions]
    more = len(names) - MOST_NAMED
    return "; ".join(names[:MOST_NAMED] + ([f"{more} more"] if more > 0 else []))


def _chunks_of(partition: Any, batch: Batch, deleted: int = 0) -> Iterator[Chunk]:
    """The values of a batch, before which so many offsets were deleted.

    One that cannot be read, or what is left of it, is malformed, and costs no other.
    """
    lane = _named([partition])
    where = f"{lane}, from offset {batch.offset}"
    if deleted := deleted + batch.deleted:
        yield Chunk(lane, [], where, deleted=deleted)
    try:
        for values in batch.values():
            if values:
                yield Chunk(lane, values, where)
    except UnreadableRecords as error:
        yield Chunk(lane, [], where, str(error))


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
