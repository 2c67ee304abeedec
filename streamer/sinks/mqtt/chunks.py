"""Events gathered into messages: how the MQTT sink cuts and joins what the drains bring.

A drained batch may hold thousands of events or a single one; a message holds up to a number of
events. Events are encoded when they arrive, so what waits is bytes, and a chunk knows its
events only by their count per kind.
"""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from streamer.events.batch import NO_SPANS, Batch, Encoding, Event, Spans, count_kinds, join_spans

TIMER_SLACK = 0.001
"""Seconds: event loops round timers to milliseconds, and may be early by that."""


class Chunk:
    """The payload of one message. Its first and last id name it: a replay has the same bytes."""

    __slots__ = (
        "closings",
        "count",
        "first_id",
        "kinds",
        "last_id",
        "payload",
        "sent_at",
        "spans",
        "taken",
        "topic",
        "tries",
    )

    def __init__(
        self,
        topic: str,
        payload: bytes,
        kinds: Mapping[str, int],
        first_id: str,
        last_id: str,
        spans: Spans = NO_SPANS,
    ) -> None:
        """`kinds` are the events in `payload`, counted per kind; `spans` those of their batches."""
        self.topic = topic
        self.payload = payload
        self.kinds = kinds
        self.count = sum(kinds.values())
        self.first_id = first_id
        self.last_id = last_id
        self.spans = spans
        self.sent_at = 0.0
        self.tries = 0  # that were refused
        self.closings = 0  # of the connection, while nothing else was in flight
        self.taken = False  # by the broker, at least once


class _Open:
    """A chunk that still takes events. `due` is when it is to be sent even if it has room."""

    __slots__ = ("count", "due", "first_id", "kinds", "last_id", "parts", "spans")

    def __init__(self, due: float) -> None:
        self.due = due
        self.parts: list[bytes] = []
        self.kinds: Counter[str] = Counter()
        self.count = 0
        self.first_id = ""
        self.last_id = ""
        self.spans: Spans = NO_SPANS

    def add(self, batch: Batch, encoding: Encoding) -> int:
        """Take all of `batch`; its size in bytes."""
        data = batch.lines(encoding)
        if not self.parts:
            self.first_id = _id_of(batch.events[0])
        self.last_id = _id_of(batch.events[-1])
        self.parts.append(data)
        self.kinds.update(batch.kinds)
        self.count += len(batch)
        if batch.spans is not self.spans:  # of one drain, cut up, they are the same
            self.spans = join_spans(self.spans, batch.spans)
        return len(data)

    def seal(self, topic: str) -> Chunk:
        payload = b"".join(self.parts)
        return Chunk(topic, payload, self.kinds, self.first_id, self.last_id, self.spans)


class ChunkQueue:
    """What waits to be sent, in order for each topic."""

    def __init__(self, encoding: Encoding, max_events: int, linger: float) -> None:
        """`max_events` to a chunk; `linger`, in seconds, is how long one with room may wait."""
        self._encoding = encoding
        self._max_events = max_events
        self._linger = linger
        self._sealed: deque[Chunk] = deque()
        self._open: dict[str, _Open] = {}

    def __bool__(self) -> bool:
        return bool(self._sealed or self._open)

    def add(self, topic: str, batch: Batch, now: float) -> int:
        """Take `batch` at the time `now` in seconds; its size in bytes."""
        size = start = 0
        while start < len(batch):
            waiting = self._open.get(topic)
            if waiting is None:
                waiting = self._open[topic] = _Open(now + self._linger)
            stop = start + self._max_events - waiting.count
            size += waiting.add(_piece(batch, start, stop), self._encoding)
            if waiting.count == self._max_events:
                self._sealed.append(self._open.pop(topic).seal(topic))
            start = stop
        return size

    def pop(self, now: float) -> Chunk | None:
        """The next chunk that is full, or due at `now`; None when there is none."""
        if self._sealed:
            return self._sealed.popleft()
        for topic, waiting in self._open.items():
            if waiting.due <= now + TIMER_SLACK:
                del self._open[topic]
                return waiting.seal(topic)
        return None

    def push_front(self, chunks: Iterable[Chunk]) -> None:
        """Put chunks back, before everything else, in the order given."""
        self._sealed.extendleft(reversed(list(chunks)))

    def seal(self) -> None:
        """Let nothing wait for more events."""
        for topic, waiting in self._open.items():
            self._sealed.append(waiting.seal(topic))
        self._open.clear()

    def clear(self) -> list[Chunk]:
        """Take everything out."""
        self.seal()
        chunks = list(self._sealed)
        self._sealed.clear()
        return chunks

    @property
    def due(self) -> float | None:
        """When the first chunk that still has room is due; None when there is none."""
        return min((waiting.due for waiting in self._open.values()), default=None)


def _piece(batch: Batch, start: int, stop: int) -> Batch:
    """A batch of some of its events: itself when that is all, so that its encoding is shared."""
    if start == 0 and stop >= len(batch):
        return batch
    events = batch.events[start:stop]
    if len(batch.kinds) == 1:
        return Batch(events, dict.fromkeys(batch.kinds, len(events)), batch.spans)
    return Batch(events, count_kinds(events), batch.spans)


def _id_of(event: Event) -> str:
    return str(getattr(event, "id", ""))


# ---------------------------------------------------------------- too large for the broker


class _Tagged(msgspec.Struct):
    """The part of an encoded event that tells what it is."""

    event: str
    id: str = ""


_JSON = msgspec.json.Decoder(_Tagged)
_MSGPACK = msgspec.msgpack.Decoder(_Tagged)
_MSGPACK_MAPS = msgspec.msgpack.Decoder(list[msgspec.Raw])


def cut(chunk: Chunk, encoding: Encoding, max_bytes: int) -> list[Chunk]:
    """The chunk in pieces of at most `max_bytes` of payload; a larger event is a piece by itself.

    Slow, because the events are decoded again: for the few that exceed a broker's limit.
    """
    pieces: list[list[bytes]] = []
    room = 0
    for record in _records(chunk, encoding):
        if len(record) > room:
            pieces.append([])
            room = max_bytes
        pieces[-1].append(record)
        room -= len(record)
    return [_rejoin(chunk, piece, encoding) for piece in pieces]


def _records(chunk: Chunk, encoding: Encoding) -> Iterator[bytes]:
    """The encoded events, NDJSON with its line ends."""
    if encoding == "json":
        return iter(chunk.payload.splitlines(keepends=True))
    # As an array of that many maps, the payload can be taken apart by msgspec.
    array = b"\xdd" + struct.pack(">I", chunk.count) + chunk.payload
    return map(bytes, _MSGPACK_MAPS.decode(array))


def _rejoin(whole: Chunk, records: list[bytes], encoding: Encoding) -> Chunk:
    decoder = _JSON if encoding == "json" else _MSGPACK
    tags = [decoder.decode(record) for record in records]
    kinds = Counter(tag.event for tag in tags)
    payload = b"".join(records)
    piece = Chunk(whole.topic, payload, kinds, tags[0].id, tags[-1].id, whole.spans)
    piece.taken = whole.taken
    return piece


class SizeLimit:
    """The most bytes of payload that are tried, learned from what was refused.

    It doubles again after a wait, which doubles with every refusal: a limit can be raised, and
    small messages cost a multiple of the CPU time. An event by itself is tried at any size.
    """

    FIRST_WAIT = 60.0
    LONGEST_WAIT = 3600.0

    def __init__(self) -> None:
        self._limit = 0  # none is known
        self._most = 0
        self._wait = self.FIRST_WAIT
        self._grows_at = 0.0

    def now(self, now: float) -> int:
        """The most bytes of payload that a message should have; 0 where no limit is known."""
        while self._limit and now >= self._grows_at:
            self._limit *= 2
            self._grows_at += self._wait
            if self._limit >= self._most:
                self._limit = 0
        return self._limit

    def refused(self, size: int, now: float) -> int:
        """A payload of `size` bytes was too large; how much of it to try at once instead."""
        if self._limit and size > self._limit:
            return self._limit  # it was sent before the limit was known
        self._most = max(self._most, size)
        self._limit = max(1, size // 2)
        self._grows_at = now + self._wait
        self._wait = min(self.LONGEST_WAIT, 2 * self._wait)
        return self._limit
