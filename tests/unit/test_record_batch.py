"""Kafka record batches: the compiled layout against its twin and against aiokafka's reader."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest
from aiokafka.record.memory_records import MemoryRecords  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from streamer.sinks.encoded import Records
from streamer.sinks.kafka import _record_batch
from streamer.sinks.kafka.codecs import CODECS
from streamer.sinks.kafka.record_batch import (
    compress,
    crc32c,
    crc32c_py,
    lay_out,
    lay_out_py,
    read_values,
    read_values_py,
    record_batch,
)

# From before 1970 to as far as 64 bits of nanoseconds go.
times = st.integers(-(1 << 62), (1 << 63) - 1)
values = st.binary(max_size=300)
# What differs in size as a varint: lengths and offsets around 64 and 8192.
events = st.lists(st.tuples(values, times), max_size=80)


def piece(records: list[tuple[bytes, int]], lines: bool) -> tuple[Records, array[int]]:
    data = [value.replace(b"\n", b" ") for value, _ in records]
    when = array("q", [time for _, time in records])
    return (b"".join(value + b"\n" for value in data), when) if lines else (data, when)


pieces = st.lists(st.builds(piece, events, st.booleans()), max_size=4)


@given(pieces, st.binary(max_size=80))
def test_compiled_layout_equals_its_twin(
    given_pieces: list[tuple[Records, array[int]]], key: bytes
) -> None:
    assert lay_out(given_pieces, key) == lay_out_py(given_pieces, key)


def record(offset: int, key: bytes | None, value: bytes | None, behind: bytes) -> bytes:
    """A record as any client may write it: `behind` are its headers."""

    def field(data: bytes | None) -> bytes:
        return varint(-1) if data is None else varint(len(data)) + data

    return field(b"\0" + varint(17) + varint(offset) + field(key) + field(value) + behind)


def varint(value: int) -> bytes:
    rest, encoded = value << 1 ^ value >> 63, b""
    while rest >= 0x80:
        encoded, rest = encoded + bytes([rest & 0x7F | 0x80]), rest >> 7
    return encoded + bytes([rest])


fields = st.none() | st.binary(max_size=200)


@given(st.lists(st.tuples(fields, fields, st.binary(max_size=20)), max_size=150), st.integers(0, 9))
def test_values_are_read_from_an_offset_on(
    given_records: list[tuple[bytes | None, bytes | None, bytes]], first: int
) -> None:
    data = b"".join(record(i, *one) for i, one in enumerate(given_records))
    expected = [value for _, value, _ in given_records[first:] if value is not None]
    for function in (read_values, read_values_py):
        assert function(data, len(given_records), first) == expected


@given(st.binary(max_size=60) | pieces.map(lambda some: lay_out(some, b"k")[0]), st.data())
def test_corrupt_records_are_refused_by_both_alike(data: bytes, draw: st.DataObject) -> None:
    """Cut, changed, or of another number: the same values, or none."""
    if data:
        at = draw.draw(st.integers(0, len(data) - 1))
        data = data[:at] + draw.draw(st.binary(max_size=12)) + data[at + 1 :]
    count = draw.draw(st.integers(-1, 90))

    def read(function: Callable[[bytes, int, int], list[bytes]]) -> list[bytes] | None:
        try:
            return function(data, count, 0)
        except ValueError:
            return None

    assert read(read_values) == read(read_values_py)


@pytest.mark.parametrize("function", [read_values, read_values_py])
def test_records_of_another_number_are_corrupt(
    function: Callable[[bytes, int, int], list[bytes]],
) -> None:
    data = record(0, None, b"a", b"\0") + record(1, None, b"b", b"\0")
    assert function(data, 2, 0) == [b"a", b"b"]
    for count in (0, 1, 3):
        with pytest.raises(ValueError, match="corrupt"):
            function(data, count, 0)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("lines", [True, False])
def test_batch_reads_back(codec: str, lines: bool) -> None:
    records = [(b'{"seq":%d}' % i, 1_700_000_000_123_456_789 + i * 1_000_000) for i in range(9000)]
    laid = lay_out([piece(records[:100], lines), piece(records[100:], lines)], b"host")
    batches = MemoryRecords(b"".join(record_batch(compress(laid, CODECS[codec]), (4711, 3, 17))))
    batch = batches.next_batch()
    assert batch.validate_crc()
    assert (batch.producer_id, batch.producer_epoch, batch.base_sequence) == (4711, 3, 17)
    read = [(one.offset, one.key, one.value, one.timestamp, one.headers) for one in batch]
    assert read == [
        (i, b"host", value, time // 1_000_000, []) for i, (value, time) in enumerate(records)
    ]
    assert batch.max_timestamp == records[-1][1] // 1_000_000
    assert batches.next_batch() is None


def test_records_that_compress_badly_are_sent_as_they_are() -> None:
    payload = compress(lay_out([([b"x"], array("q", [0]))], b"k"), CODECS["gzip"])
    batch = MemoryRecords(b"".join(record_batch(payload, (1, 0, 0)))).next_batch()
    assert [one.value for one in batch] == [b"x"]


@pytest.mark.parametrize(
    "bad",
    [
        (b"a\nb\n", array("q", [1])),
        (b"a\n", array("q", [1, 2])),
        (b"a\nb", array("q", [1, 2])),
        ([b"a"], array("q", [1, 2])),
        ([b"a", b"b"], array("q", [1])),
    ],
)
def test_a_piece_with_other_numbers_of_records_and_times_is_refused(
    bad: tuple[Records, array[int]],
) -> None:
    for function in (lay_out, lay_out_py):
        with pytest.raises(ValueError, match="as many records as times"):
            function([bad], b"k")


@given(st.lists(st.binary(max_size=100), max_size=5), st.binary(max_size=5000))
def test_checksums_are_those_of_the_oracle(parts: list[bytes], last: bytes) -> None:
    """Whatever the processor offers, of any length and cut anywhere."""
    expected = crc32c_py(*parts, last)
    assert crc32c(*parts, last) == expected
    assert _record_batch.crc32c_tables(*parts, last) == expected


def test_the_checksum_of_the_standard() -> None:
    """RFC 3720, appendix B.4."""
    for function in (crc32c, crc32c_py, _record_batch.crc32c_tables):
        assert function(bytes(32)) == 0x8A9136AA
        assert function(b"\xff" * 32) == 0x62A8AB43
        assert function(bytes(range(16)), bytes(range(16, 32))) == 0x46DD794E
        assert function() == 0


def test_a_checksum_is_that_of_bytes() -> None:
    with pytest.raises(TypeError):
        crc32c(b"", "text")  # type: ignore[arg-type]
