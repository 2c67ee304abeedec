"""Kafka record batches, built in one go from events that are encoded already.

The format is version 2 of Kafka's documentation ("Message Format", "Record Batch"). The records
are laid out by a compiled module, or by its twin here where that was not compiled.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import cramjam
from aiokafka.codec import (  # type: ignore[import-untyped]
    gzip_encode,
    lz4_encode,
    snappy_encode,
)
from aiokafka.record.util import calc_crc32c  # type: ignore[import-untyped]

Records = bytes | list[bytes]
"""Encoded events: NDJSON, each line with its end, or one `bytes` for each."""

Laid = tuple[bytes, int, int, int]
"""Records laid out: their bytes, their number, the first and the latest time in milliseconds."""

_HEAD = struct.Struct(">qiibI")  # base offset, length, leader epoch, magic, checksum
_BODY = struct.Struct(">hiqqqhii")  # what the checksum covers, before the records
_MAGIC = 2
_BEFORE_LENGTH = 12
_NS_PER_MS = 1_000_000


def _zstd(data: bytes) -> bytes:
    # Level 1 takes a fifth less time than aiokafka's 3, and events do not get larger by it.
    return bytes(cramjam.zstd.compress(data, level=1))


CODECS: dict[str, tuple[int, Callable[[bytes], bytes]]] = {
    "none": (0, bytes),
    "gzip": (1, gzip_encode),
    "snappy": (2, snappy_encode),
    "lz4": (3, lz4_encode),
    "zstd": (4, _zstd),
}
"""Per name, its number in the attributes of a batch, and what compresses."""


def lay_out_py(pieces: list[tuple[Records, list[int]]], key: bytes) -> Laid:
    """The records of all pieces, as the compiled `records` lays them out, only slower.

    Each piece begins with its records and their times in nanoseconds.

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


def _varint(value: int) -> bytes:
    """A zigzag varint, as Kafka writes lengths and differences."""
    rest = value << 1 ^ value >> 63
    encoded = bytearray()
    while rest >= 0x80:
        encoded.append(rest & 0x7F | 0x80)
        rest >>= 7
    encoded.append(rest)
    return bytes(encoded)


if TYPE_CHECKING:
    lay_out = lay_out_py
else:
    try:
        from streamer.sinks.kafka._record_batch import records as lay_out
    # Only an absent module: one that is there and does not load is a mistake to be seen.
    except ModuleNotFoundError:
        lay_out = lay_out_py


def record_batch(laid: Laid, codec: str, producer: tuple[int, int, int]) -> bytes:
    """A record batch. `producer` is its id, epoch and the sequence number of the first record.

    Records that do not get smaller are sent as they are.
    """
    records, count, first_ms, latest_ms = laid
    attributes, compress = CODECS[codec]
    payload = compress(records)
    if len(payload) >= len(records):
        attributes, payload = 0, records
    producer_id, epoch, sequence = producer
    body = _BODY.pack(
        attributes, count - 1, first_ms, latest_ms, producer_id, epoch, sequence, count
    )
    length = _HEAD.size - _BEFORE_LENGTH + len(body) + len(payload)
    checked = body + payload
    return _HEAD.pack(0, length, -1, _MAGIC, calc_crc32c(checked)) + checked
