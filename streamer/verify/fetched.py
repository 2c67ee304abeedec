"""Record batches as a broker sends them: cut from its answer at once, opened when their turn comes.

So the next answer is under way while this one is read, and no object is made around each record.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from aiokafka.consumer import fetcher  # type: ignore[import-untyped]
from aiokafka.errors import CorruptRecordException  # type: ignore[import-untyped]
from aiokafka.record.legacy_records import (  # type: ignore[import-untyped]
    LegacyRecordBatch,
)
from aiokafka.record.memory_records import MemoryRecords  # type: ignore[import-untyped]

from streamer.sinks.kafka.codecs import decompress
from streamer.sinks.kafka.record_batch import crc32c, read_values, record_end
from streamer.verify.records import MOST_BYTES, MOST_VALUES

_HEAD = struct.Struct(">qiib")  # first offset, length of what is behind it, leader epoch, magic
_V2 = struct.Struct(">qiibIhi")  # then checksum, attributes, last offset less the first
_RECORDS = 61
"""Where the records of a batch of version 2 begin; their number is in the four bytes before."""

_LEAST = 26
"""Bytes of a batch of a version before, at least."""

_BEFORE_LENGTH = 12
_CHECKED = 21
"""From where on the checksum covers it."""

_CODEC, _CONTROL = 0x07, 0x20
_VERSION = 16
_NEWEST = 2


# What aiokafka unpacks batches of before Kafka 0.11 with has no bound.
vars(sys.modules[LegacyRecordBatch.__module__]).update(
    gzip_decode=partial(decompress, 1),
    snappy_decode=partial(decompress, 2),
    lz4_decode=partial(decompress, 3),
)

_LONG_SECONDS = 3600.0
"""Until what was not taken is asked for no longer: it is taken always."""


class UnreadableRecords(ValueError):
    """They came as they were written, and cannot be read, or not in bounded memory."""


class Batch(NamedTuple):
    """A record batch, of which the records from an offset on are wanted."""

    offset: int
    data: bytes

    @property
    def next_offset(self) -> int:
        """The offset behind its last record: known without opening it."""
        first, _, _, version = _HEAD.unpack_from(self.data)
        last: int = _V2.unpack_from(self.data)[6] if version >= _NEWEST else 0
        return int(first) + last + 1

    @property
    def deleted(self) -> int:
        """How many offsets up to its end no record has: they were deleted, as by compaction.

        A broker takes no batch that is not numbered throughout.
        """
        if self.data[_VERSION] < _NEWEST:
            return 0
        first: int = _HEAD.unpack_from(self.data)[0]
        return max(first - self.offset, 0) + max(self.next_offset - first - self._count, 0)

    @property
    def _count(self) -> int:
        return int.from_bytes(self.data[_RECORDS - 4 : _RECORDS], "big", signed=True)

    def values(self) -> Iterator[list[bytes]]:
        """Its values, some at a time.

        Raises:
            UnreadableRecords: no other batch is touched by that.
            CorruptRecordException: the checksum is wrong, and so may be where the next batch is.
        """
        try:
            yield from self._values() if self.data[_VERSION] >= _NEWEST else self._older()
        except CorruptRecordException:
            raise
        except Exception as error:  # of each codec another
            raise UnreadableRecords(str(error) or type(error).__name__) from None

    def _values(self) -> Iterator[list[bytes]]:
        first, _, _, _, checksum, attributes, _ = _V2.unpack_from(self.data)
        if crc32c(self.data[_CHECKED:]) != checksum:
            raise CorruptRecordException(f"at offset {self.offset}: its checksum is wrong")
        if attributes & _CONTROL:
            return
        records = decompress(attributes & _CODEC, self.data[_RECORDS:])
        for piece, count in _pieces(records, self._count):
            yield read_values(piece, count, self.offset - first)

    def _older(self) -> Iterator[list[bytes]]:
        """Of a topic from before Kafka 0.11, which can be asked for still."""
        batch = MemoryRecords(self.data).next_batch()
        if not batch.validate_crc():
            raise CorruptRecordException(f"at offset {self.offset}: its checksum is wrong")
        values = (one.value for one in batch if one.offset >= self.offset)
        kept = (value for value in values if value is not None)
        while some := list(islice(kept, MOST_VALUES)):
            yield some


def _pieces(records: bytes, count: int) -> Iterator[tuple[bytes, int]]:
    """The records of a batch in pieces, and how many are in each; as a rule it is one."""
    start = at = taken = 0
    while len(records) - start > MOST_BYTES or count > MOST_VALUES:
        while taken < min(count, MOST_VALUES) and at - start < MOST_BYTES:
            at = record_end(records, at)
            taken += 1
        if not taken:  # there is more than the records
            break
        yield records[start:at], taken
        count -= taken
        start, taken = at, 0
    if start == 0:
        yield records, count
    elif count or start < len(records):
        yield records[start:], count


class _Answer:
    """What came of a partition: whole batches, and at its end perhaps a part of one."""

    def __init__(self, data: bytes | None) -> None:
        self._data = data or b""
        self._at = 0

    def size_in_bytes(self) -> int:
        return len(self._data)

    def has_next(self) -> bool:
        return self._end() <= len(self._data)

    def next_batch(self) -> bytes:
        data = self._data[self._at : max(self._end(), self._at)]
        if len(data) <= _VERSION or len(data) < (_RECORDS if data[_VERSION] >= _NEWEST else _LEAST):
            raise CorruptRecordException("a record batch is shorter than its head")
        self._at += len(data)
        return data

    def _end(self) -> int:
        if len(self._data) - self._at < _HEAD.size:
            return len(self._data) + 1
        return self._at + _BEFORE_LENGTH + int(_HEAD.unpack_from(self._data, self._at)[1])


class _Batches(fetcher.PartitionRecords):  # type: ignore[misc]
    """Batches in place of records."""

    next_fetch_offset: int

    def _unpack_records(self) -> Iterator[Batch]:
        while self._records.has_next():
            batch = Batch(self.next_fetch_offset, self._records.next_batch())
            self.next_fetch_offset = batch.next_offset
            yield batch


def give_batches(consumer: Any) -> None:
    """Have a consumer that was started give a `Batch` wherever it would give a record.

    It asks for more when all that has come is taken, and not sooner: asked meanwhile for the
    partitions that have no more, a broker waits for them, and all others with it.
    """
    fetcher.PartitionRecords, fetcher.MemoryRecords = _Batches, _Answer
    consumer._fetcher._prefetch_backoff = _LONG_SECONDS
