"""Encoded events that stay together, and how they are cut. No Kafka here, and no time."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from operator import attrgetter
from typing import NamedTuple

from streamer.events.batch import Batch, Encoding, Event, Spans, join_spans
from streamer.sinks.kafka.record_batch import Records

BYTES_PER_EVENT = 16
"""What an event takes beside its record: its time and its type."""

BYTES_PER_RECORD = 41
"""What a `bytes` object in a list takes beside its bytes, where records are kept one by one."""

_time_ns = attrgetter("time_ns")


class EncodedBatch(NamedTuple):
    """Encoded events in order: a drained batch, or a part of one.

    The events themselves are not kept: while a broker is away they would hold several times
    the memory of their records. Their types are, for the counts of the parts. `spans` are those
    of the drained batch, also in its parts.
    """

    data: Records
    times_ns: array[int]
    types: list[type[Event]]
    kinds: Mapping[str, int]
    size: int
    spans: Spans

    @classmethod
    def of(cls, batch: Batch, encoding: Encoding) -> EncodedBatch:
        """A whole batch; `size` is the bytes of its records."""
        times_ns = array("q", map(_time_ns, batch.events))
        types = list(map(type, batch.events))
        if encoding == "json":  # as one piece, which costs least, and other sinks share it
            lines = batch.lines("json")
            size = len(lines) - len(batch)
            return cls(lines, times_ns, types, batch.kinds, size, batch.spans)
        records = batch.records(encoding)
        size = sum(map(len, records))
        return cls(records, times_ns, types, batch.kinds, size, batch.spans)

    @property
    def number(self) -> int:
        """How many events."""
        return len(self.times_ns)

    @property
    def held(self) -> int:
        """Bytes of memory that it takes, about; parts take together what the whole does.

        What it takes as a whole is left out: of small ones, few are kept (`TopicQueue.put`).
        """
        if isinstance(self.data, bytes):
            return len(self.data) + BYTES_PER_EVENT * self.number
        return self.size + (BYTES_PER_RECORD + BYTES_PER_EVENT) * self.number

    def with_next(self, other: EncodedBatch) -> EncodedBatch:
        """One batch of this and the one that follows it; both are of one encoding."""
        data: Records
        if isinstance(self.data, bytes):
            assert isinstance(other.data, bytes)
            data = self.data + other.data
        else:
            data = [*self.data, *other.data]
        kinds = Counter(self.kinds) + Counter(other.kinds)
        times_ns, types = self.times_ns + other.times_ns, self.types + other.types
        spans = join_spans(self.spans, other.spans)
        return EncodedBatch(data, times_ns, types, kinds, self.size + other.size, spans)

    def cut(self, most: int) -> Iterator[EncodedBatch]:
        """In order, parts of at most `most` bytes of records, or of one larger event."""
        if self.size <= most or self.number == 1:
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

    def _of_part(self, data: Records, start: int, stop: int) -> EncodedBatch:
        types = self.types[start:stop]
        counts = Counter(types)
        kinds = {str(cls.__struct_config__.tag): n for cls, n in counts.items()}
        size = len(data) - len(types) if isinstance(data, bytes) else sum(map(len, data))
        return EncodedBatch(data, self.times_ns[start:stop], types, kinds, size, self.spans)


def _cut_lines(lines: bytes, most: int) -> Iterator[bytes]:
    """Cut at line ends, which are searched for where a part has to end, and not one by one."""
    start = 0
    while start < len(lines):
        end = lines.rfind(b"\n", start, start + most) + 1 or lines.index(b"\n", start) + 1
        yield lines[start:end]
        start = end


def _cut_list(records: list[bytes], most: int) -> Iterator[list[bytes]]:
    start = size = 0
    for index, record in enumerate(records):
        if index > start and size + len(record) > most:
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


def halves(batches: list[EncodedBatch]) -> tuple[list[EncodedBatch], list[EncodedBatch]]:
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
    start, rest = 0, batches
    for index in sorted(indices):
        before, rest = split_at(rest, index - start)
        (event, *_), rest = split_at(rest, 1)
        left += before
        out[index] = event
        start = index + 1
    return [*left, *rest], out
