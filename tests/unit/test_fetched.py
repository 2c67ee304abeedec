"""Record batches as `streamer verify` reads them, against those that aiokafka builds."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from aiokafka.errors import CorruptRecordException  # type: ignore[import-untyped]
from aiokafka.record.default_records import (  # type: ignore[import-untyped]
    DefaultRecordBatchBuilder,
)
from aiokafka.record.legacy_records import (  # type: ignore[import-untyped]
    LegacyRecordBatchBuilder,
)

from streamer.sinks.kafka.codecs import CODECS
from streamer.sinks.kafka.record_batch import crc32c
from streamer.verify.fetched import Batch, _Answer

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
