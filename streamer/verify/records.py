"""What is read of a record: a few fields of every one, and more of the stream's own.

Fields that are not named here are skipped, so that records of any release can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta, Struct, field

from streamer.verify.numbers import MOST

Number = Annotated[int, Meta(ge=0, lt=MOST)]
Cpu = Annotated[int, Meta(ge=0, le=65535)]
_NOT_RECORDS = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError)
"""What msgspec raises for bytes that are no record."""
_QUOTED = 60
"""Bytes of a malformed record that are repeated."""
MOST_BYTES = 4 << 20
MOST_VALUES = 1 << 14
"""That are decoded at once: so many bytes of lines, up to the end of one, or so many values."""
_TOLD_APART = 100
"""Malformed records of a chunk: far more than are quoted. Those of millions would take room."""


class Line(Struct, gc=False):
    """What is read of every record."""

    event: str
    id: str
    time_ns: int
    boot_ns: int
    host: str


class Counts(Struct, gc=False):
    """See `KindCounts`."""

    produced: Number
    filtered: Number
    shed: Number
    lost: Number
    read: Number


class Cell(Counts, array_like=True, gc=False):
    """See `streamer.events.stream.CellCounts`. What other releases add behind it is skipped."""


class Mark(Struct, gc=False):
    """How far the numbers of a ring and CPU have come; see `CpuMark`."""

    ring: str
    cpu: Cpu
    seq: Number
    read: Number
    skipped: Number = 0
    watermark_ns: Number = 0
    """No event of the ring and CPU that follows is older, in ns since boot; 0: not known."""
    kinds: dict[str, Cell] = field(default_factory=dict)


class SinkCell(Struct, array_like=True, gc=False):
    """See `streamer.events.stream.SinkKindCounts`."""

    received: Number
    delivered: Number
    dropped: Number


class Dropped(Struct, gc=False):
    """See `streamer.events.stream.Dropped`."""

    ring: str
    cpu: int
    kinds: dict[str, Number]


class SinkTotals(Struct, gc=False):
    """See `SinkCounts`."""

    received: Number
    delivered: Number
    dropped: Number
    pending: Number
    kinds: dict[str, SinkCell] = field(default_factory=dict)
    dropped_of: list[Dropped] = field(default_factory=list)


class Heartbeat(Struct, gc=False):
    """See `StreamHeartbeat`."""

    counts: dict[str, Counts]
    marks: list[Mark]
    sink_counts: dict[str, SinkTotals]
    final: bool = False


class Range(Struct, gc=False):
    """See `SeqRange`."""

    ring: str
    cpu: int
    seq_from: Number
    seq_to: Number
    run_id: str = ""
    kinds: dict[str, Number] = field(default_factory=dict)


class Loss(Struct, gc=False):
    """See `StreamLoss`; of an earlier run `UntoldLoss`."""

    stage: str
    count: Number
    kinds: dict[str, Number] = field(default_factory=dict)
    ranges: list[Range] = field(default_factory=list)
    sink: str | None = None
    run_id: str = ""


class Shed(Struct, gc=False):
    """See `StreamShed`."""

    level: Number
    since_ns: int
    reason: str = ""
    kinds: dict[str, Number] = field(default_factory=dict)


class RunMark(Struct, gc=False):
    """See `streamer.events.stream.RunMark`."""

    sink: str
    ring: str
    cpu: int
    seq: Number
    taken: Number


class Previous(Struct, gc=False):
    """See `PreviousRun`."""

    run_id: str
    ended: str
    untold: list[Loss] = field(default_factory=list)
    marks: list[RunMark] = field(default_factory=list)


class Manifest(Struct, gc=False):
    """See `StreamManifest`."""

    agent: str
    sinks: list[str] = field(default_factory=list)
    workers: Number = 1
    previous: Previous | None = None


class Own(Struct, gc=False):
    """What is read of a record of the stream itself beside its own fields."""

    boot_id: str = ""


OWN: dict[str, type[Struct]] = {
    "stream.manifest": Manifest,
    "stream.heartbeat": Heartbeat,
    "stream.loss": Loss,
    "stream.shed": Shed,
}
"""The records that more is read of, by kind."""


class Chunk(NamedTuple):
    """Some records as they were read, in order.

    `data` are whole lines of NDJSON, or one `bytes` for each record. `lane` is where they are in
    order: a file, a partition, a topic. `where` is the place of the first, for people. `unreadable`
    says why there are none of those that were together there. `deleted`: so many offsets before
    the first of them were deleted by their broker before they could be read.
    """

    lane: str
    data: bytes | list[bytes]
    where: str = ""
    unreadable: str = ""
    deleted: int = 0


def pieces(chunk: Chunk) -> Iterator[Chunk]:
    """A chunk, in parts that are not too large to be decoded at once; as a rule it is one."""
    data = chunk.data
    if len(data) <= (MOST_BYTES if isinstance(data, bytes) else MOST_VALUES):
        yield chunk
        return
    start = 0
    while start < len(data):
        if isinstance(data, bytes):
            end = data.find(b"\n", start + MOST_BYTES) + 1 or len(data)
        else:
            end = start + MOST_VALUES
        where = f"{chunk.where}, behind {start} of what was read there" if start else chunk.where
        yield chunk._replace(data=data[start:end], where=where)
        start = end


class Malformed(NamedTuple):
    """A record that is none."""

    where: str
    reason: str


class Decoded(NamedTuple):
    """The records of a chunk; `raw(i)` are the bytes of one of them."""

    lines: list[Line]
    raw: Callable[[int], bytes]
    malformed: list[Malformed]


_json: Any = msgspec.json
_msgpack: Any = msgspec.msgpack
_JSON = _json.Decoder(Line)
_MSGPACK = _msgpack.Decoder(Line)


def decode(chunk: Chunk) -> Decoded:
    """The records of a chunk: all at once, or, if one of them is none, one by one."""
    if chunk.unreadable:
        return Decoded([], _Raw(b""), [Malformed(chunk.where, chunk.unreadable)])
    data = chunk.data if isinstance(chunk.data, bytes) else b"\n".join(chunk.data)
    try:
        lines: list[Line] = _JSON.decode_lines(data)
    except _NOT_RECORDS:
        return _one_by_one(chunk)
    return Decoded(lines, _Raw(data), [])


def decode_own(kind: str, raw: bytes) -> tuple[Own, Any]:
    """What is read of a record of the stream itself. None in place of what nothing is read of.

    Raises:
        ValueError: it is none.
    """
    codec = _json if is_json(raw) else _msgpack
    try:
        own: Own = codec.decode(raw, type=Own)
        return own, codec.decode(raw, type=OWN[kind]) if kind in OWN else None
    except _NOT_RECORDS as error:
        raise ValueError(reason_of(error)) from None


def is_json(raw: bytes) -> bool:
    """Whether it is JSON and not MessagePack, if it is a record at all."""
    return not raw or raw[0] < 0x80


def reason_of(error: Exception) -> str:
    """Why bytes are no record, in a few words."""
    return str(error) or type(error).__name__


class _Raw:
    """The lines of a chunk, which is cut into lines when one is asked for."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._lines: list[bytes] | None = None

    def __call__(self, index: int) -> bytes:
        if self._lines is None:
            self._lines = [line for line in self._data.split(b"\n") if line.strip()]
        return self._lines[index]


def _one_by_one(chunk: Chunk) -> Decoded:
    values = chunk.data.split(b"\n") if isinstance(chunk.data, bytes) else chunk.data
    lines: list[Line] = []
    raws: list[bytes] = []
    malformed: list[Malformed] = []
    for number, value in enumerate(values):
        if not value.strip():
            continue
        try:
            lines.append((_JSON if is_json(value) else _MSGPACK).decode(value))
        except _NOT_RECORDS as error:
            if len(malformed) >= _TOLD_APART:
                malformed.append(malformed[-1])
                continue
            start = value[:_QUOTED].decode("ascii", "backslashreplace")
            place = f"{chunk.where}, record {number + 1} of those read there"
            malformed.append(Malformed(place, f"{reason_of(error)}: {start}"))
        else:
            raws.append(value)
    return Decoded(lines, raws.__getitem__, malformed)


def split_msgpack(data: bytes) -> tuple[list[bytes], int]:
    """MessagePack maps that follow one another, and where what is not whole begins."""
    found: list[bytes] = []
    start = 0
    while start < len(data):
        end = _skip(data, start)
        if end is None:
            break
        found.append(data[start:end])
        start = end
    return found, start


_FIXED = {0xC0: 1, 0xC2: 1, 0xC3: 1, 0xCA: 5, 0xCB: 9, 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9}
_FIXED |= {0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9, 0xD4: 3, 0xD5: 4, 0xD6: 6, 0xD7: 10, 0xD8: 18}
_SIZED = {0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0), 0xC7: (1, 1), 0xC8: (2, 1), 0xC9: (4, 1)}
_SIZED |= {0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0)}
_NESTED = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}


def _skip(data: bytes, at: int) -> int | None:
    """Where a MessagePack value that begins at `at` ends; None if it is not whole."""
    values = 1  # that are still to come
    while values:
        if at >= len(data):
            return None
        code = data[at]
        values -= 1
        if code < 0x80 or code >= 0xE0:
            at += 1
        elif code < 0x90:
            values += 2 * (code & 0x0F)
            at += 1
        elif code < 0xA0:
            values += code & 0x0F
            at += 1
        elif code < 0xC0:
            at += 1 + (code & 0x1F)
        elif code in _FIXED:
            at += _FIXED[code]
        elif code in _SIZED:
            width, more = _SIZED[code]
            at += 1 + width + more + int.from_bytes(data[at + 1 : at + 1 + width], "big")
        elif code in _NESTED:
            width, each = _NESTED[code]
            values += each * int.from_bytes(data[at + 1 : at + 1 + width], "big")
            at += 1 + width
        else:  # 0xC1, which nothing begins with: as a value of its own it is found to be malformed
            at += 1
    return at if at <= len(data) else None


def msgpack_records(data: bytes) -> Iterator[bytes]:
    """The records of a whole message; what is not whole at its end is one of them."""
    start = 0
    while start < len(data):
        end = _skip(data, start) or len(data)
        yield data[start:end]
        start = end
