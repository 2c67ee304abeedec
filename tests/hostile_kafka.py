"""A broker that says what a test wants: wrong, short, late, or nothing at all.

It speaks as much of Kafka's protocol as a producer asks for, in one version of each message, and
keeps what it was sent. What a real broker says is tested with real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from aiokafka.protocol.admin import ApiVersionResponse_v0  # type: ignore[import-untyped]
from aiokafka.protocol.metadata import MetadataResponse_v5  # type: ignore[import-untyped]
from aiokafka.protocol.produce import (  # type: ignore[import-untyped]
    ProduceRequest_v8,
    ProduceResponse_v8,
)
from aiokafka.protocol.transaction import (  # type: ignore[import-untyped]
    InitProducerIdResponse_v0,
)
from aiokafka.record.memory_records import MemoryRecords  # type: ignore[import-untyped]

PRODUCE, METADATA, VERSIONS, PRODUCER_ID = 0, 3, 18, 22
_ANSWERED = [(PRODUCE, 8, 8), (METADATA, 5, 5), (VERSIONS, 0, 0), (PRODUCER_ID, 0, 0)]

SILENCE = None
HANG_UP = b"hang up"


class Produced(NamedTuple):
    """A record batch that was sent here."""

    topic: str
    partition: int
    producer: int
    epoch: int
    sequence: int
    values: list[bytes]


class HostileBroker:
    """Listens on loopback; each answer is a method's, which a test may put another in place of.

    An answer is the bytes behind the correlation id, SILENCE, or HANG_UP. `correlate` makes the
    correlation id that is sent of the one that was asked with; `frame` makes the bytes to send.
    """

    def __init__(self) -> None:
        """As it is, it takes everything, in one partition of any topic."""
        self.port = 0
        self.partitions = 1
        self.in_sync = [1, 2, 3]
        self.log: list[bytes] = []
        self.produced: list[Produced] = []
        self.asked: list[int] = []
        self.metadata: Callable[[list[str]], bytes | None] = self.metadata_of
        self.producer_id: Callable[[], bytes | None] = lambda: self.id_of(7)
        self.produce: Callable[[Produced], bytes | None] = self.take
        self.correlate: Callable[[int], int] = lambda number: number
        self.frame: Callable[[bytes], bytes] = lambda body: struct.pack(">i", len(body)) + body
        self._numbers: dict[int, tuple[int, int]] = {}
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """`host:port`."""
        return f"127.0.0.1:{self.port}"

    # What it says

    def metadata_of(self, topics: list[str], code: int = 0, leader: int = 1) -> bytes:
        """One broker, this one, which leads all partitions."""
        parts: list[Any] = [
            (0, number, leader, [1, 2, 3], self.in_sync, []) for number in range(self.partitions)
        ]
        brokers = [(1, "127.0.0.1", self.port, None)]
        said = [(code, topic, False, [] if code else parts) for topic in topics]
        return encoded(MetadataResponse_v5(0, brokers, "cluster", 1, said))

    def id_of(self, number: int, code: int = 0) -> bytes:
        """A producer id."""
        return encoded(InitProducerIdResponse_v0(0, code, number, 0))

    def take(self, sent: Produced) -> bytes:
        """Keep it, if it has the number that follows, or is the first."""
        epoch, following = self._numbers.get(sent.producer, (sent.epoch, sent.sequence))
        if sent.sequence != (following if sent.epoch == epoch else 0):
            return self.answer(sent, 45)
        self._numbers[sent.producer] = (sent.epoch, sent.sequence + len(sent.values))
        offset = len(self.log)
        self.log += sent.values
        return self.answer(sent, 0, offset)

    def answer(self, sent: Produced, code: int, offset: int = -1, **other: Any) -> bytes:
        """What is said about a record batch; `topic`, `partition` and `throttle` can be others."""
        partition = other.get("partition", sent.partition)
        about: list[Any] = [(partition, code, offset, -1, 0, [], None)]
        topics = [(other.get("topic", sent.topic), about)] * other.get("times", 1)
        return encoded(ProduceResponse_v8(topics, other.get("throttle", 0)))

    # What it does

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[HostileBroker]:
        """Until the end of the block, which closes all connections."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in self._connections:
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
                while await self._one(reader, writer):
                    pass
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        (size,) = struct.unpack(">i", await reader.readexactly(4))
        request = io.BytesIO(await reader.readexactly(size))
        key, _, number, client = struct.unpack(">hhih", request.read(10))
        request.read(client)
        self.asked.append(key)
        answer = self._answer(key, request)
        if answer == HANG_UP:
            return False
        if answer is not SILENCE:
            if key != VERSIONS:
                number = self.correlate(number)
            body = struct.pack(">i", number) + answer
            plain = struct.pack(">i", len(body)) + body
            writer.write(plain if key == VERSIONS else self.frame(body))
        return True

    def _answer(self, key: int, request: io.BytesIO) -> bytes | None:
        if key == VERSIONS:
            return encoded(ApiVersionResponse_v0(0, _ANSWERED))
        if key == PRODUCER_ID:
            return self.producer_id()
        if key == METADATA:
            (count,) = struct.unpack(">i", request.read(4))
            names = []
            for _ in range(count):
                (length,) = struct.unpack(">h", request.read(2))
                names.append(request.read(length).decode())
            return self.metadata(names)
        asked = ProduceRequest_v8.decode(request)
        ((topic, ((partition, data),)),) = asked.topics
        batch = MemoryRecords(data).next_batch()
        values = [record.value for record in batch]
        sent = Produced(topic, partition, batch.producer_id, batch.producer_epoch,
                        batch.base_sequence, values)  # fmt: skip
        self.produced.append(sent)
        return self.produce(sent)


def encoded(response: Any) -> bytes:
    """The bytes of a response."""
    data: bytes = response.encode()
    return data
