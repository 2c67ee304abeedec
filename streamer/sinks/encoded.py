"""Encoded events that stay together, and how they are cut: by offset, never by decoding."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import reduce
from itertools import chain, pairwise
from typing import NamedTuple, TypeAlias

from streamer.events.batch import Batch, Encoding, Event
from streamer.events.spans import NO_SPANS, Spans, join_spans, spans_of_records

Records = bytes | list[bytes]
"""Encoded events: NDJSON, each line with its end, or one `bytes` for each."""

TYPE_BYTES = 8
"""What an event takes beside its record and its mark."""

ID_BYTES = 96
"""What a mark takes that is a string as long as an id."""

BYTES_PER_RECORD = 41
"""What a `bytes` object in a list takes beside its bytes, where records are kept one by one."""

Marks: TypeAlias = "array[int] | list[str]"
"""What a format needs of each event by itself: their times for Kafka, their ids for MQTT."""


class Extent(NamedTuple):
    """How much: bytes of records and events."""

    bytes: int
    events: int = 1 << 62

    def fits(self, most: Extent) -> bool:
        """Whether it is no more than `most`."""
        return self.bytes <= most.bytes and self.events <= most.events


class EncodedBatch(NamedTuple):
    """Encoded events in order: a drained batch, a part of one, or several in one.

    The events themselves are not kept: while a broker is away they would hold several times
    the memory of their records. Their types are, for the counts of the parts. `size` is the bytes
    of the records, without line ends. `spans` are those of the drained batch, also in its parts;
    `ticket` is its number to whoever submitted it, and of several in one that of the first.
    """

    data: Records
    marks: Marks
    types: list[type[Event]]
    kinds: Mapping[str, int]
    size: int
    spans: Spans
    ticket: int = 0

    @classmethod
    def of(cls, batch: Batch, encoding: Encoding, marks: Marks, ticket: int = 0) -> EncodedBatch:
        """A whole batch, with what the format needs of each event."""
        types = list(map(type, batch.events))
        if encoding == "json":  # as one piece, which costs least, and other sinks share it
            lines = batch.lines("json")
            size = len(lines) - len(batch)
            return EncodedBatch(lines, marks, types, batch.kinds, size, batch.spans, ticket)
        records = batch.records(encoding)
        size = sum(map(len, records))
        return EncodedBatch(records, marks, types, batch.kinds, size, batch.spans, ticket)

    @property
    def number(self) -> int:
        """How many events."""
        return len(self.types)

    @property
    def extent(self) -> Extent:
        """How much it is."""
        return Extent(self.size, len(self.types))

    @property
    def length(self) -> int:
        """Bytes of the records in one piece, with the line ends that they may have."""
        return len(self.data) if isinstance(self.data, bytes) else self.size

    @property
    def payload(self) -> bytes:
        """The records in one piece."""
        return self.data if isinstance(self.data, bytes) else b"".join(self.data)

    @property
    def held(self) -> int:
        """Bytes of memory that it takes, about; parts take together what the whole does.

        What it takes as a whole is left out: of small ones, few are kept (`TopicQueue.put`).
        """
        marks = self.marks
        per_event = TYPE_BYTES + (marks.itemsize if isinstance(marks, array) else ID_BYTES)
        if isinstance(self.data, bytes):
            return len(self.data) + per_event * self.number
        return self.size + (BYTES_PER_RECORD + per_event) * self.number

    def counted(self) -> Spans:
        """The spans of just these events, with how many of each kind. They are decoded for it."""
        return spans_of_records(self.data, self.spans)

    def cut(self, most: Extent) -> Iterator[EncodedBatch]:
        """In order, parts whose `length` is at most `most`, or of one larger event."""
        if Extent(self.length, self.number).fits(most) or self.number == 1:
            yield self
            return
        data = self.data
        start = 0
        for part in _cut_lines(data, most) if isinstance(data, bytes) else _cut_list(data, most):
            number = part.count(b"\n") if isinstance(part, bytes) else len(part)
            yield self._of_part(part, start, start + number)
            start += number

    def part(self, start: int, stop: int) -> EncodedBatch:
        """The events from `start` up to `stop`, at least one."""
        if not isinstance(self.data, bytes):
            return self._of_part(self.data[start:stop], start, stop)
        first = _offset_of_line(self.data, 0, start)
        last = _offset_of_line(self.data, first, stop - start)
        return self._of_part(self.data[first:last], start, stop)

    def parts(self, places: Collection[int]) -> Iterator[tuple[int, EncodedBatch]]:
        """Cut before the events at `places`: parts in order, each with the place of its first."""
        bounds = sorted({0, *places, self.number})
        if len(bounds) == 2:
            yield 0, self
            return
        end = 0
        for start, stop in pairwise(bounds):
            if isinstance(self.data, bytes):
                begin, end = end, _offset_of_line(self.data, end, stop - start)
                yield start, self._of_part(self.data[begin:end], start, stop)
            else:
                yield start, self._of_part(self.data[start:stop], start, stop)

    def _of_part(self, data: Records, start: int, stop: int) -> EncodedBatch:
        types = self.types[start:stop]
        counts = Counter(types)
        kinds = {str(cls.__struct_config__.tag): n for cls, n in counts.items()}
        size = len(data) - len(types) if isinstance(data, bytes) else sum(map(len, data))
        marks = self.marks[start:stop]
        return EncodedBatch(data, marks, types, kinds, size, self.spans, self.ticket)


def joined(batches: list[EncodedBatch]) -> EncodedBatch:
    """One batch of several that follow each other, all of one format."""
    first = batches[0]
    if len(batches) == 1:
        return first
    types: list[type[Event]] = []
    for batch in batches:
        types += batch.types
    marks = _join_marks([batch.marks for batch in batches])
    data: Records
    if isinstance(first.data, bytes):
        data = b"".join([batch.data for batch in batches if isinstance(batch.data, bytes)])
    else:
        data = list(chain.from_iterable(b.data for b in batches if isinstance(b.data, list)))
    kinds, spans = kinds_of(batches), spans_of(batches)
    return EncodedBatch(data, marks, types, kinds, size_of(batches), spans, first.ticket)


def _join_marks(parts: list[Marks]) -> Marks:
    if isinstance(parts[0], array):
        times = array("q")
        for part in parts:
            assert isinstance(part, array)
            times += part
        return times
    ids: list[str] = []
    for part in parts:
        assert isinstance(part, list)
        ids += part
    return ids


def _cut_lines(lines: bytes, most: Extent) -> Iterator[bytes]:
    """Cut at line ends, which are searched for where a part has to end, and not one by one."""
    start = 0
    while start < len(lines):
        end = lines.rfind(b"\n", start, start + most.bytes) + 1 or lines.index(b"\n", start) + 1
        if lines.count(b"\n", start, end) > most.events:
            end = _offset_of_line(lines, start, most.events)
        yield lines[start:end]
        start = end


def _cut_list(records: list[bytes], most: Extent) -> Iterator[list[bytes]]:
    start = size = 0
    for index, record in enumerate(records):
        full = size + len(record) > most.bytes or index - start == most.events
        if index > start and full:
            yield records[start:index]
            start, size = index, 0
        size += len(record)
    yield records[start:]


def _offset_of_line(lines: bytes, start: int, number: int) -> int:
    """Where the line begins that comes `number` lines after the one at `start`."""
    for _ in range(number):
        start = lines.index(b"\n", start) + 1
    return start


def number_of(batches: Iterable[EncodedBatch]) -> int:
    """How many events there are in all."""
    return sum(batch.number for batch in batches)


def size_of(batches: Iterable[EncodedBatch]) -> int:
    """Bytes of all records."""
    return sum(batch.size for batch in batches)


def held_of(batches: Iterable[EncodedBatch]) -> int:
    """Bytes of memory that all take, about."""
    return sum(batch.held for batch in batches)


def kinds_of(batches: Iterable[EncodedBatch]) -> Counter[str]:
    """How many events there are of each kind."""
    kinds: Counter[str] = Counter()
    for batch in batches:
        kinds.update(batch.kinds)
    return kinds


def spans_of(batches: Iterable[EncodedBatch]) -> Spans:
    """What covers the spans of all; those of one drain, cut up, are the same."""
    found = {id(batch.spans): batch.spans for batch in batches}
    return reduce(join_spans, found.values())


def counted(batches: Iterable[EncodedBatch]) -> Spans:
    """The spans of just these events, with how many of each kind."""
    return reduce(join_spans, (batch.counted() for batch in batches), NO_SPANS)


def halves(
    batches: list[EncodedBatch],
) -> tuple[list[EncodedBatch], list[EncodedBatch]]:
    """Two parts in order, each of at least one event; for batches of two or more events."""
    return split_at(batches, number_of(batches) // 2)


def split_at(
    batches: list[EncodedBatch], index: int
) -> tuple[list[EncodedBatch], list[EncodedBatch]]:
    """The events before `index`, and those from it on."""
    before: list[EncodedBatch] = []
    for place, batch in enumerate(batches):
        if index < batch.number:
            behind = batches[place + 1 :]
            if index == 0:
                return before, [batch, *behind]
            return [*before, batch.part(0, index)], [batch.part(index, batch.number), *behind]
        before.append(batch)
        index -= batch.number
    return before, []


def take_out(
    batches: list[EncodedBatch], indices: Collection[int]
) -> tuple[list[EncodedBatch], dict[int, EncodedBatch]]:
    """What is left without the events at `indices`, and those, one by one, by their index."""
    left: list[EncodedBatch] = []
    out: dict[int, EncodedBatch] = {}
    wanted = sorted(indices)
    start = at = 0
    for batch in batches:
        stop = start + batch.number
        behind = bisect_left(wanted, stop, at)
        own, at = wanted[at:behind], behind
        for first, part in batch.parts({place - start for i in own for place in (i, i + 1)}):
            if start + first in indices:
                out[start + first] = part
            else:
                left.append(part)
        start = stop
    return left, out
