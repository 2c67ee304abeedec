"""Record batches as `streamer verify` reads them, against those that aiokafka builds."""

from __future__ import annotations

import inspect
import struct
from typing import Any

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
from streamer.sinks.kafka.codecs import CODECS
from streamer.sinks.kafka.record_batch import crc32c
from streamer.verify.fetched import Batch, _Answer
from streamer.verify.kafka import KafkaSource

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


@pytest.mark.parametrize("codec", CODECS)
def test_of_every_codec(codec: str) -> None:
    batch = Batch(BASE, built(codec))
    assert batch.next_offset == BASE + len(VALUES) + 1
    assert batch.values() == VALUES


def test_what_is_before_the_offset_that_was_asked_for_is_left_out() -> None:
    assert Batch(BASE + 123, built()).values() == VALUES[123:]


def test_a_batch_of_before_kafka_0_11() -> None:
    """Its offset is that of its last record, where it is compressed."""
    last = BASE + len(VALUES)
    batch = Batch(BASE + 123, built("gzip", last, LegacyRecordBatchBuilder))
    assert batch.next_offset == last + 1
    assert batch.values() == VALUES[123:]


@pytest.mark.parametrize("builder", [DefaultRecordBatchBuilder, LegacyRecordBatchBuilder])
def test_a_batch_whose_checksum_is_wrong(builder: Any) -> None:
    data = bytearray(built(builder=builder))
    data[-1] ^= 1
    with pytest.raises(CorruptRecordException, match="at offset 7: its checksum is wrong"):
        Batch(7, bytes(data)).values()


def changed(data: bytes, attributes: int = 0, count: int = 0) -> bytes:
    """With other attributes and another number of records, and the checksum of that."""
    body = bytearray(data[21:])
    struct.pack_into(">h", body, 0, struct.unpack_from(">h", body)[0] ^ attributes)
    struct.pack_into(">i", body, 36, struct.unpack_from(">i", body, 36)[0] + count)
    return data[:17] + struct.pack(">I", crc32c(bytes(body))) + bytes(body)


def test_a_control_batch_has_no_records_of_the_stream() -> None:
    assert Batch(BASE, changed(built(), attributes=0x20)).values() == []


@pytest.mark.parametrize("change", [{"count": 1}, {"count": -1}, {"attributes": 2}])
def test_what_does_not_fit_its_checksum_s_batch_is_corrupt(change: dict[str, int]) -> None:
    """A producer's mistake: other numbers of records, or another codec, than it says."""
    with pytest.raises(CorruptRecordException, match="at offset 1000: "):
        Batch(BASE, changed(built(), **change)).values()


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
        self.end = 0

    async def getmany(self, **_: Any) -> dict[Any, list[Batch]]:
        return self.answers.pop(0) if self.answers else {}

    async def position(self, _: Any) -> int:
        return self.end

    def highwater(self, _: Any) -> int:
        return self.end


EACH = len(VALUES) + 1
OWN, FILES = TopicPartition("stream", 0), TopicPartition("file", 0)


def source_of(ends: dict[Any, int]) -> KafkaSource:
    source = KafkaSource(KafkaSink(bootstrap=("127.0.0.1:1",), topic="{category}"))
    source._ends, source._read = ends, dict.fromkeys(ends, 0)
    return source


def batches(*numbers: int) -> list[Batch]:
    return [Batch(EACH * number, built(base=EACH * number)) for number in numbers]


async def test_each_partition_is_read_up_to_its_end_of_the_start() -> None:
    """What has come meanwhile in one may tell of what has in another, which is not read."""
    source = source_of({OWN: EACH, FILES: 3 * EACH})
    consumer = Consumer(
        {OWN: batches(0, 1), FILES: batches(0)}, {OWN: batches(2)}, {FILES: batches(1, 2, 3)}
    )
    read = [chunk.where async for chunk in source._chunks(consumer, follow=False)]
    assert read == [
        "stream, partition 0, from offset 0",
        *(f"file, partition 0, from offset {EACH * number}" for number in range(3)),
    ]
    assert source.complete


async def test_what_is_followed_is_complete_when_it_is_at_its_end() -> None:
    source = source_of({OWN: EACH})
    consumer = Consumer({OWN: batches(0, 1)}, {OWN: batches(2)})
    consumer.end = 2 * EACH
    reading = source._chunks(consumer, follow=True)
    seen = []
    async for _ in reading:
        seen.append(source.complete)
        consumer.end = 3 * EACH
        if len(seen) == 3:
            break
    assert seen == [False, False, False]
    assert source._read[OWN] == 2 * EACH
    await reading.aclose()  # type: ignore[attr-defined]
    assert not source.complete
    source._read[OWN] = 3 * EACH
    assert source.complete


async def test_what_a_broker_has_removed_meanwhile_is_not_waited_for() -> None:
    source = source_of({OWN: 5 * EACH})
    consumer = Consumer({OWN: batches(0)})
    consumer.end = 5 * EACH
    assert len([one async for one in source._chunks(consumer, follow=False)]) == 1
    assert source.complete
