"""Kafka record batches, built in one go from events that are encoded already, and read back.

The format is version 2 of Kafka's documentation ("Message Format", "Record Batch"). The records
are laid out and read, and the checksum is made, by a compiled module, or by its twin here where
that was not compiled.
"""

from __future__ import annotations

import struct
from array import array
from typing import TYPE_CHECKING, NamedTuple

from aiokafka.record.util import calc_crc32c  # type: ignore[import-untyped]

from streamer.sinks.encoded import Records
from streamer.sinks.kafka.codecs import Codec

Laid = tuple[bytes, int, int, int]
"""Records laid out: their bytes, their number, the first and the latest time in milliseconds."""

_HEAD = struct.Struct(">qiibI")  # base offset, length, leader epoch, magic, checksum
_BODY = struct.Struct(">hiqqqhii")  # what the checksum covers, before the records
_MAGIC = 2
_BEFORE_LENGTH = 12
_NS_PER_MS = 1_000_000
_VARINT_MOST = 10
_MOST = (1 << 64) - 1
_CORRUPT = "the records of a batch are corrupt"


def lay_out_py(pieces: list[tuple[Records, array[int]]], key: bytes) -> Laid:
    """The records of all pieces, as the compiled `records` lays them out, only slower.

    Each piece begins with its records and their times in nanoseconds, an `array("q")`.

    Raises:
        ValueError: a piece has not as many records as times.
    """
    laid = bytearray()
    times_ms = [ns // _NS_PER_MS for piece in pieces for ns in piece[1]]
    values = [value for piece in pieces for value in _values(piece[0], len(piece[1]))]
    keyed = _varint(len(key)) + key
    first = times_ms[0] if times_ms else 0
    for offset, (time_ms, value) in enumerate(zip(times_ms, values, strict=True)):
        record = b"\0%b%b%b%b%b\0" % (
            _varint(time_ms - first),
            _varint(offset),
            keyed,
            _varint(len(value)),
            value,
        )
        laid += _varint(len(record)) + record
    return bytes(laid), len(values), first, max(times_ms, default=0)


def _values(records: Records, count: int) -> list[bytes]:
    values = split_lines(records) if isinstance(records, bytes) else records
    if len(values) != count or (isinstance(records, bytes) and not ends_in_line_end(records)):
        raise ValueError("a piece has not as many records as times")
    return values


def split_lines(lines: bytes) -> list[bytes]:
    """The lines of NDJSON without their ends."""
    return lines.removesuffix(b"\n").split(b"\n") if lines else []


def ends_in_line_end(lines: bytes) -> bool:
    """Whether the last line has its end; no lines need none."""
    return not lines or lines.endswith(b"\n")


def read_values_py(records: bytes, count: int, first: int) -> list[bytes]:
    """The values of all `count` records of a batch whose offset in it is `first` or higher.

    Those that are null are left out.

    Raises:
        ValueError: they are no such records.
    """
    found = []
    rest = memoryview(records)
    for _ in range(count):
        record, rest = _field(rest)
        if not record:
            raise ValueError(_CORRUPT)
        _, record = _number(record[1:])  # behind the attributes, its time
        offset, record = _number(record)
        _, record = _field(record)
        value, _ = _field(record)
        if value is not None and offset >= first:
            found.append(bytes(value))
    if rest:
        raise ValueError(_CORRUPT)
    return found


def record_end(records: bytes, at: int) -> int:
    """Where a record that begins at `at` ends. Raises ValueError: it is none."""
    size = shift = 0
    for byte in records[at : at + _VARINT_MOST]:
        at += 1
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            if size & 1 or not size or at + (size >> 1) > len(records):
                break
            return at + (size >> 1)
    raise ValueError(_CORRUPT)


def _number(data: memoryview) -> tuple[int, memoryview]:
    """A zigzag varint, and what is behind it."""
    zigzagged = 0
    for i, byte in enumerate(data[:_VARINT_MOST]):
        zigzagged |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            zigzagged &= _MOST
            return zigzagged >> 1 ^ -(zigzagged & 1), data[i + 1 :]
    raise ValueError(_CORRUPT)


def _field(data: memoryview) -> tuple[memoryview | None, memoryview]:
    """A field of so many bytes as its length says, None for null, and what is behind it."""
    size, rest = _number(data)
    if size > len(rest):
        raise ValueError(_CORRUPT)
    return (rest[:size], rest[size:]) if size >= 0 else (None, rest)


def _varint(value: int) -> bytes:
    """A zigzag varint, as Kafka writes lengths and differences."""
    rest = value << 1 ^ value >> 63
    encoded = bytearray()
    while rest >= 0x80:
        encoded.append(rest & 0x7F | 0x80)
        rest >>= 7
    encoded.append(rest)
    return bytes(encoded)


def crc32c_py(*parts: bytes) -> int:
    """CRC-32C of all parts, one behind the other."""
    return int(calc_crc32c(b"".join(parts)))


if TYPE_CHECKING:
    lay_out = lay_out_py
    read_values = read_values_py
    crc32c = crc32c_py
else:
    try:
        from streamer.sinks.kafka._record_batch import crc32c
        from streamer.sinks.kafka._record_batch import records as lay_out
        from streamer.sinks.kafka._record_batch import values as read_values
    # Only an absent module: one that is there and does not load is a mistake to be seen.
    except ModuleNotFoundError:
        lay_out, read_values, crc32c = lay_out_py, read_values_py, crc32c_py


class Payload(NamedTuple):
    """The records of a batch as they are sent, and what the batch's head says of them.

    The head itself, with the numbers of the producer, is made at each sending: the numbers can
    change, and compressing again would cost a hundred times as much.
    """

    codec: int
    number: int
    first_ms: int
    latest_ms: int
    records: bytes

    @property
    def size(self) -> int:
        """Bytes of the whole record batch, which is what the broker's limit is about."""
        return _HEAD.size + _BODY.size + len(self.records)


def compress(laid: Laid, codec: Codec) -> Payload:
    """The records compressed; as they are where that makes them no smaller."""
    records, count, first_ms, latest_ms = laid
    attributes, smaller = codec.number, codec.compress(records)
    if len(smaller) >= len(records):
        attributes, smaller = 0, records
    return Payload(attributes, count, first_ms, latest_ms, smaller)


def record_batch(payload: Payload, producer: tuple[int, int, int]) -> tuple[bytes, ...]:
    """A record batch, in parts that follow each other.

    `producer` is its id, epoch and the sequence number of the first record.
    """
    codec, count, first_ms, latest_ms, records = payload
    body = _BODY.pack(codec, count - 1, first_ms, latest_ms, *producer, count)
    length = _HEAD.size - _BEFORE_LENGTH + len(body) + len(records)
    checksum = crc32c(body, records)
    return _HEAD.pack(0, length, -1, _MAGIC, checksum), body, records
