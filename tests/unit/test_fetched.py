"""Record batches as `streamer verify` reads them, against those that aiokafka builds."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import struct
import tracemalloc
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import cramjam
import pytest
from aiokafka import TopicPartition  # type: ignore[import-untyped]
from aiokafka.consumer import fetcher  # type: ignore[import-untyped]
from aiokafka.errors import CorruptRecordException  # type: ignore[import-untyped]
from aiokafka.record.default_records import (  # type: ignore[import-untyped]
    DefaultRecordBatchBuilder,
)
from aiokafka.record.legacy_records import (  # type: ignore[import-untyped]
    LegacyRecordBatchBuilder,
)

from streamer.config.settings import KafkaSink
from streamer.errors import SinkError
from streamer.sinks.kafka import codecs
from streamer.sinks.kafka.codecs import CODECS, decompress
from streamer.sinks.kafka.record_batch import crc32c
from streamer.verify import command, fetched, kafka
from streamer.verify.fetched import Batch, UnreadableRecords, _Answer
from streamer.verify.kafka import KafkaSource, _chunks_of
from streamer.verify.ledger import Ledger
from streamer.verify.records import Chunk, decode
from streamer.verify.start import BEGINNING, Start

VALUES = [b'{"seq":%d}' % i for i in range(500)]
BASE = 1000
"""The offset that the broker gives the first of them."""


def built(codec: str = "gzip", base: int = BASE, builder: Any = DefaultRecordBatchBuilder) -> bytes:
    """A batch with a key and, every third time, a header; its last value is null."""
    number = CODECS[codec].number
    older = builder is LegacyRecordBatchBuilder
    made = builder(1, number, 1 << 30) if older else builder(2, number, 0, 1, 0, 0, 1 << 30)
    for i, value in enumerate([*VALUES, None]):
        made.append(i, i, b"host", value, [] if older or i % 3 else [("name", b"x")])
    data = bytes(made.build())
    return struct.pack(">q", base) + data[8:]


def values(batch: Batch) -> list[bytes]:
    return [value for some in batch.values() for value in some]


@pytest.mark.parametrize("codec", CODECS)
def test_of_every_codec(codec: str) -> None:
    batch = Batch(BASE, built(codec))
    assert batch.next_offset == BASE + len(VALUES) + 1
    assert values(batch) == VALUES
    assert batch.deleted == 0


def test_what_is_before_the_offset_that_was_asked_for_is_left_out() -> None:
    assert values(Batch(BASE + 123, built())) == VALUES[123:]
    assert Batch(BASE + 123, built()).deleted == 0


def test_a_batch_of_before_kafka_0_11() -> None:
    """Its offset is that of its last record, where it is compressed."""
    last = BASE + len(VALUES)
    batch = Batch(BASE + 123, built("gzip", last, LegacyRecordBatchBuilder))
    assert batch.next_offset == last + 1
    assert values(batch) == VALUES[123:]
    assert batch.deleted == 0


@pytest.mark.parametrize("builder", [DefaultRecordBatchBuilder, LegacyRecordBatchBuilder])
def test_a_batch_whose_checksum_is_wrong(builder: Any) -> None:
    data = bytearray(built(builder=builder))
    data[-1] ^= 1
    with pytest.raises(CorruptRecordException, match="at offset 7: its checksum is wrong"):
        values(Batch(7, bytes(data)))


def changed(data: bytes, attributes: int = 0, count: int = 0) -> bytes:
    """With other attributes and another number of records, and the checksum of that."""
    body = bytearray(data[21:])
    struct.pack_into(">h", body, 0, struct.unpack_from(">h", body)[0] ^ attributes)
    struct.pack_into(">i", body, 36, struct.unpack_from(">i", body, 36)[0] + count)
    return data[:17] + struct.pack(">I", crc32c(bytes(body))) + bytes(body)


def test_a_control_batch_has_no_records_of_the_stream() -> None:
    assert values(Batch(BASE, changed(built(), attributes=0x20))) == []


def test_offsets_that_no_record_has_were_deleted() -> None:
    """As by compaction: before a batch, within it, and all of one."""
    data = bytearray(built())
    last = struct.unpack_from(">i", data, 23)[0]
    struct.pack_into(">i", data, 23, last + 4)
    batch = Batch(BASE - 3, changed(bytes(data)))
    assert (batch.deleted, batch.next_offset) == (3 + 4, BASE + last + 4 + 1)
    assert values(batch) == VALUES
    struct.pack_into(">i", data, 57, 0)
    emptied = Batch(BASE, bytes(data[:61]))
    assert emptied.deleted == last + 4 + 1
    source = source_of({OWN: batch.next_offset})
    source._read[OWN] = BASE - 3
    found = [chunk.deleted for chunk in _chunks_of(OWN, batch, 10)]
    assert found == [10 + 3 + 4, 0]


@pytest.mark.parametrize("most", [{"MOST_VALUES": 7}, {"MOST_BYTES": 100}, {"MOST_BYTES": 1}])
@pytest.mark.parametrize("count", [0, 1, -1])
def test_a_large_batch_is_taken_out_of_piece_by_piece(
    monkeypatch: pytest.MonkeyPatch, most: dict[str, int], count: int
) -> None:
    """Also one that cannot be read to its end."""
    ((name, number),) = most.items()
    monkeypatch.setattr(fetched, name, number)
    found: list[list[bytes]] = []
    reading = Batch(BASE + 3, changed(built(), count=count)).values()
    with pytest.raises(UnreadableRecords) if count else nullcontext():
        found.extend(reading)
    there = [value for some in found for value in some]
    assert there == VALUES[3:][: len(there)]
    assert len(there) >= len(VALUES) - 3 - 7
    assert max(map(len, found)) <= 10


def test_memory_is_not_taken_by_many_small_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of a batch is a fraction of it, over what it unpacks to."""
    monkeypatch.setattr(fetched, "MOST_VALUES", 1000)
    record = b"\x10\0\0\0\1\4[]\0"
    count = 40_000
    data = bytearray(built("none")[:61]) + record * count
    struct.pack_into(">i", data, 23, count - 1)
    struct.pack_into(">i", data, 57, count)
    batch = Batch(BASE, changed(bytes(data)))
    tracemalloc.start()
    taken = sum(map(len, batch.values()))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken == count
    # Its copies, unpacked and for the checksum, and no object for each record.
    assert most < 3 * len(batch.data)


@pytest.mark.parametrize("change", [{"count": 1}, {"count": -1}, {"attributes": 2}])
def test_what_does_not_fit_its_checksum_s_batch_is_corrupt(change: dict[str, int]) -> None:
    """A producer's mistake: other numbers of records, or another codec, than it says."""
    with pytest.raises(UnreadableRecords):
        values(Batch(BASE, changed(built(), **change)))


def bomb(codec: str, size: int) -> bytes:
    """A batch with a checksum that is right, of so many bytes that are no records."""
    batch = built(codec)
    body = batch[21:61] + CODECS[codec].compress(bytes(size))
    return batch[:17] + struct.pack(">I", crc32c(body)) + body


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
def test_what_unpacks_to_more_than_a_batch_may_have_is_not_unpacked(
    monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """At the limit they are unpacked, and found to be no records."""
    most = 1 << 20
    monkeypatch.setattr(codecs, "UNPACKED_MOST", most)
    for size, why in ((most, "the records of a batch are corrupt"), (most + 1, f"{most} bytes")):
        with pytest.raises(UnreadableRecords, match=why):
            values(Batch(BASE, bomb(codec, size)))
    monkeypatch.undo()
    assert decompress(CODECS[codec].number, CODECS[codec].compress(bytes(2 * most))) == bytes(
        2 * most
    )


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4"])
def test_a_batch_of_before_kafka_0_11_has_that_limit(
    monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    batch = Batch(BASE, built(codec, BASE + len(VALUES), LegacyRecordBatchBuilder))
    assert values(batch) == VALUES
    monkeypatch.setattr(codecs, "UNPACKED_MOST", 4096)
    with pytest.raises(UnreadableRecords, match="4096 bytes"):
        values(batch)


def test_snappy_as_it_is_and_what_is_cut_off() -> None:
    data = b"".join(VALUES)
    raw, framed = bytes(cramjam.snappy.compress_raw(data)), CODECS["snappy"].compress(data)
    assert decompress(2, raw) == decompress(2, framed) == data
    with pytest.raises(ValueError, match="a block of its snappy is cut off"):
        decompress(2, framed[:-1])
    with pytest.raises(ValueError, match="a block of its snappy is cut off"):
        decompress(2, framed[:16] + struct.pack(">i", -4) + framed[20:])
    with pytest.raises(ValueError, match="its gzip is cut off"):
        decompress(1, CODECS["gzip"].compress(data)[:-9])


def test_an_answer_is_cut_into_batches() -> None:
    """A broker cuts it where it was asked to, in the middle of a batch."""
    batches = [built(), built("none"), built("zstd")]
    whole = b"".join(batches)
    for end in (len(whole), len(whole) - 1, len(whole) - len(batches[2]) + 3):
        answer, found = _Answer(whole[:end]), []
        assert answer.size_in_bytes() == end
        while answer.has_next():
            found.append(answer.next_batch())
        assert found == batches[: 3 if end == len(whole) else 2]
    assert not _Answer(None).has_next()


@pytest.mark.parametrize("length", [-13, -1, 0, 4, 13, 48])
def test_a_batch_that_is_shorter_than_its_head_is_corrupt(length: int) -> None:
    data = built()
    answer = _Answer(data[:8] + struct.pack(">i", length) + data[12:])
    assert answer.has_next()
    with pytest.raises(CorruptRecordException, match="shorter than its head"):
        answer.next_batch()


def test_what_is_replaced_of_aiokafka_is_used_by_it() -> None:
    """These are no part of its interface: another version may name them otherwise."""
    source = inspect.getsource(fetcher.Fetcher)
    for name in ("= MemoryRecords(", "= PartitionRecords(", "backoff=self._prefetch_backoff"):
        assert name in source


class Consumer:
    """Gives what it was made with, an answer each time; and then nothing."""

    def __init__(self, *answers: dict[Any, list[Batch]]) -> None:
        self.answers = list(answers)
        self.places: dict[Any, int] = {}
        """Where the next record of a partition is: of others no broker says so."""
        self.ends: dict[Any, int] = {}
        self.now = self.takes = 0.0
        """Seconds: what the clock says, and how long an answer takes."""

    async def getmany(self, **_: Any) -> dict[Any, list[Batch]]:
        self.now += self.takes
        return self.answers.pop(0) if self.answers else {}

    async def position(self, partition: Any) -> int:
        if partition not in self.places:
            await asyncio.Event().wait()
        return self.places[partition]

    async def end_offsets(self, _: Any) -> dict[Any, int]:
        if not self.ends:
            await asyncio.Event().wait()
        return self.ends


EACH = len(VALUES) + 1
OWN, FILES = TopicPartition("stream", 0), TopicPartition("file", 0)
SECOND = TopicPartition("file", 1)


def source_of(ends: dict[Any, int]) -> KafkaSource:
    source = KafkaSource(KafkaSink(bootstrap=("127.0.0.1:1",), topic="{category}"))
    source._ends, source._read = ends, dict.fromkeys(ends, 0)
    return source


def batches(*numbers: int) -> list[Batch]:
    return [Batch(EACH * number, built(base=EACH * number)) for number in numbers]


async def chunks(source: KafkaSource, consumer: Consumer) -> list[Chunk]:
    return [chunk async for chunk in source._chunks(consumer)]


async def test_each_partition_is_read_up_to_its_end_of_the_start() -> None:
    """What has come meanwhile in one may tell of what has in another, which is not read."""
    source = source_of({OWN: EACH, FILES: 3 * EACH})
    consumer = Consumer(
        {OWN: batches(0, 1), FILES: batches(0)}, {OWN: batches(2)}, {FILES: batches(1, 2, 3)}
    )
    assert [chunk.where for chunk in await chunks(source, consumer)] == [
        "stream, partition 0, from offset 0",
        *(f"file, partition 0, from offset {EACH * number}" for number in range(3)),
    ]
    assert source.complete
    assert not source.trimmed
    assert not [*source.remarks]


async def test_what_is_deleted_behind_the_end_of_the_start_is_no_hole() -> None:
    """It was not to be read, and so is what comes behind it and is there."""
    source = source_of({OWN: 2 * EACH})
    consumer = Consumer({OWN: batches(0)}, {OWN: batches(9)})
    consumer.places = {OWN: EACH}
    reading = source._chunks(consumer)
    await anext(reading)
    consumer.places = {OWN: 10 * EACH}
    assert [chunk.deleted async for chunk in reading] == [EACH]
    assert source.complete


async def test_what_is_followed_is_complete_when_it_is_at_its_end_of_the_stop() -> None:
    """Also of a partition of which nothing has come, and nobody was told that it has more."""
    source = source_of({OWN: EACH, FILES: 0})
    consumer = Consumer({OWN: batches(0, 1)})
    source._following = True
    reading = source._chunks(consumer)
    async for chunk in reading:
        if chunk.where.endswith(f"from offset {EACH}"):
            break
    await reading.aclose()  # type: ignore[attr-defined]
    source._read[OWN] = 2 * EACH
    for more, complete in ((0, True), (1, False)):
        consumer.ends = {OWN: 2 * EACH, FILES: more}
        await source._renew_ends(consumer)
        assert source.complete is complete


async def test_what_is_followed_is_read_to_its_end_of_the_stop() -> None:
    """And no further, where it goes on."""
    source = source_of({OWN: 0, FILES: 0})
    assert not source.stop(), "nothing is followed"
    source._following = True
    consumer = Consumer({OWN: batches(0)}, {OWN: batches(1), FILES: batches(0)}, {OWN: batches(2)})
    consumer.ends = {OWN: 2 * EACH, FILES: EACH}
    consumer.places = dict.fromkeys((OWN, FILES), 0)
    found = []
    async for chunk in source._chunks(consumer):
        found.append(chunk.where)
        assert source.stop() is (len(found) == 1)
    assert found == [
        "stream, partition 0, from offset 0",
        f"stream, partition 0, from offset {EACH}",
        "file, partition 0, from offset 0",
    ]
    assert source.complete
    assert len(consumer.answers) == 1


async def test_before_a_topic_is_read_there_is_nothing_to_read_on() -> None:
    source = source_of({})
    source._following = True
    assert not source.stop()
    source._ends = {OWN: 1}
    assert not source.complete, "asked between its ends and its beginning"


async def test_what_is_followed_is_not_complete_where_nobody_says_where_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kafka, "STOP_SECONDS", 0.05)
    for ends in ({}, {FILES: 0}):
        source, consumer = source_of({OWN: 0}), Consumer()
        assert source.complete
        consumer.ends = ends
        await source._renew_ends(consumer)
        assert not source.complete


async def test_what_a_broker_has_deleted_meanwhile_is_told_and_not_waited_for() -> None:
    """Neither at the end nor before it."""
    source = source_of({OWN: 5 * EACH, FILES: 3 * EACH})
    consumer = Consumer({OWN: batches(0), FILES: batches(0)}, {FILES: batches(2)})
    consumer.places = {OWN: 5 * EACH}
    found = [(one.lane, one.deleted, len(one.data)) for one in await chunks(source, consumer)]
    assert found == [
        ("stream, partition 0", 0, len(VALUES)),
        ("file, partition 0", 0, len(VALUES)),
        ("file, partition 0", EACH, 0),
        ("file, partition 0", 0, len(VALUES)),
        ("stream, partition 0", 4 * EACH, 0),
    ]
    assert source.complete
    assert not source.trimmed
    assert not [*source.remarks]


async def test_a_partition_of_which_nothing_comes_ends_the_reading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not while others go on; and one that waits for a broker to say where it is stops none. What
    goes on and was read to its end does not count.
    """

    class Live(Consumer):
        async def position(self, partition: Any) -> int:
            if source._read[FILES] < 3 * EACH:
                return source._read[partition]
            if partition == FILES:
                self.places[FILES] += 1
            return await super().position(partition)

    source = source_of({OWN: 2 * EACH, FILES: 3 * EACH})
    each = ({FILES: batches(number)} for number in range(3))
    consumer = Live({OWN: batches(0)}, next(each), {}, next(each), {}, next(each))
    consumer.takes = 25.0
    consumer.places = {FILES: 3 * EACH}
    monkeypatch.setattr(kafka, "time", SimpleNamespace(monotonic=lambda: consumer.now))
    read = await asyncio.wait_for(chunks(source, consumer), 10)
    assert len(read) == 4
    assert consumer.now == (6 + 3) * consumer.takes
    assert source._read == {OWN: EACH, FILES: 3 * EACH}
    assert not source.complete
    assert not source.trimmed
    (remark,) = source.remarks
    assert remark.endswith("nothing more came for 60 s of stream, partition 0")


async def test_a_batch_that_cannot_be_read_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "UNPACKED_MOST", 1 << 20)
    bad = Batch(EACH, struct.pack(">q", EACH) + bomb("gzip", 2 << 20)[8:])
    source, ledger = source_of({OWN: 3 * EACH}), Ledger()
    read = await chunks(source, Consumer({OWN: [*batches(0), bad, *batches(2)]}))
    assert [len(chunk.data) for chunk in read] == [len(VALUES), 0, len(VALUES)]
    ledger.feed(read[1])
    report = ledger.reported()
    assert (report.records, report.malformed) == (1, 1)
    assert report.malformed_first[0].where == f"stream, partition 0, from offset {EACH}"
    assert "longer than 1048576 bytes" in report.malformed_first[0].reason


def test_millions_of_malformed_records_are_counted_and_take_no_room() -> None:
    found = decode(Chunk("x", [b"?"] * 1000, "x")).malformed
    assert len(found) == 1000
    assert len({id(one) for one in found}) == 100


@pytest.mark.parametrize("lacks", ["beginning", "end"])
async def test_an_answer_that_leaves_out_a_partition(lacks: str) -> None:
    class Short(Consumer):
        async def topics(self) -> set[str]:
            return {"file"}

        def partitions_for_topic(self, _: str) -> set[int]:
            return {0, 1}

        def assign(self, _: Any) -> None:
            pass

        async def beginning_offsets(self, asked: list[Any]) -> dict[Any, int]:
            return dict.fromkeys(asked[: 1 if lacks == "beginning" else 2], 0)

        async def end_offsets(self, asked: list[Any]) -> dict[Any, int]:
            return dict.fromkeys(asked[: 1 if lacks == "end" else 2], 0)

    with pytest.raises(SinkError, match="no broker tells the offsets of file, partition 1"):
        await source_of({})._begin(Short(), BEGINNING)


class Topic(Consumer):
    """Of two partitions, of which one has nothing any more of what was first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = {FILES: 0, SECOND: 10}, {FILES: 5, SECOND: 20}

    async def topics(self) -> set[str]:
        return {"file"}

    def partitions_for_topic(self, _: str) -> set[int]:
        return {0, 1}

    def assign(self, partitions: list[Any]) -> None:
        assert partitions == [FILES, SECOND]

    async def beginning_offsets(self, _: Any) -> dict[Any, int]:
        return self.first

    async def end_offsets(self, _: Any) -> dict[Any, int]:
        return self.last

    async def offsets_for_times(self, asked: dict[Any, int]) -> dict[Any, Any]:
        """Nothing is as new as that in the second."""
        assert set(asked.values()) == {1_000_001}
        return {FILES: SimpleNamespace(offset=3), SECOND: None}

    def seek(self, partition: Any, offset: int) -> None:
        self.places[partition] = offset


@pytest.mark.parametrize(
    ("start", "places"),
    [
        (BEGINNING, (0, 10)),
        (Start(end=True), (5, 20)),
        (Start(offset=3), (3, 10)),
        (Start(offset=12), (5, 12)),
        (Start(offset=99), (5, 20)),
        (Start(time_ns=1_000_001_999_999), (3, 20)),
    ],
)
async def test_from_where_a_topic_is_read(start: Start, places: tuple[int, int]) -> None:
    """Within what is there of each partition: else it would be read from its beginning."""
    source, consumer = source_of({}), Topic()
    await source._begin(consumer, start)
    assert consumer.places == source._read == {FILES: places[0], SECOND: places[1]}
    assert source.trimmed
    consumer.first = dict.fromkeys(consumer.first, 0)
    await source._begin(consumer, start)
    assert not source.trimmed


class Followed:
    """A topic that is followed until it is stopped, and then read on for so many seconds."""

    def __init__(self, follows: bool, rest: float) -> None:
        self.follows, self.rest = follows, rest
        self.stopped = asyncio.Event()
        self.read_on = False

    def stop(self) -> bool:
        self.stopped.set()
        return self.follows

    async def read(self) -> None:
        await self.stopped.wait()
        await asyncio.sleep(self.rest)
        self.read_on = True


@pytest.mark.parametrize(
    ("follows", "rest", "signals", "read_on"),
    [(True, 0.1, 1, True), (True, 60, 1, False), (True, 60, 2, False), (False, 0.1, 1, False)],
)
async def test_at_the_end_what_is_followed_is_read_on_for_a_while_or_until_another_signal(
    monkeypatch: pytest.MonkeyPatch, follows: bool, rest: float, signals: int, read_on: bool
) -> None:
    monkeypatch.setattr(command, "LAST_SECONDS", 60 if signals > 1 else 0.5)
    topic: Any = Followed(follows, rest)
    other = asyncio.create_task(asyncio.Event().wait())  # as a file that is followed
    readers: Any = {asyncio.create_task(topic.read()): topic, other: None}

    async def interrupt() -> None:
        for _ in range(signals):
            await asyncio.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)

    async with asyncio.timeout(20):
        interrupting = asyncio.create_task(interrupt())
        await command._until(readers, None)
        await interrupting
    assert topic.read_on is read_on
    assert all(one.done() for one in readers)
