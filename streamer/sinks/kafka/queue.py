"""What a Kafka sink holds for one topic: events that wait, and events that await their ack.

No Kafka here: only what goes together, how big it may be, and when it is due.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

from streamer.events.batch import Batch, Encoding, Event
from streamer.sinks.kafka.record_batch import Records, split_lines

BACKLOG_PIECES = 8
MERGED_EVENTS = 256

_time_ns = attrgetter("time_ns")


class Piece(NamedTuple):
    """Encoded events that stay together: a drained batch, or a part of one that was too big.

    The events themselves are not kept: while a broker is away they would hold several times
    the memory of their records. Their types are, for the counts of the parts.
    """

    data: Records
    times_ns: list[int]
    types: list[type[Event]]
    kinds: Mapping[str, int]
    size: int

    @classmethod
    def of(cls, batch: Batch, encoding: Encoding) -> Piece:
        """A whole batch; `size` is the bytes of its records."""
        times_ns = list(map(_time_ns, batch.events))
        types = list(map(type, batch.events))
        if encoding == "json":  # as one piece, which costs least, and other sinks share it
            lines = batch.lines("json")
            return cls(lines, times_ns, types, batch.kinds, len(lines) - len(batch))
        records = batch.records(encoding)
        return cls(records, times_ns, types, batch.kinds, sum(map(len, records)))

    @property
    def number(self) -> int:
        """How many events."""
        return len(self.times_ns)

    @property
    def records(self) -> list[bytes]:
        """The encoded events one by one."""
        return split_lines(self.data) if isinstance(self.data, bytes) else self.data

    def with_next(self, other: Piece) -> Piece:
        """One piece of this and the one that follows it."""
        data: Records
        if isinstance(self.data, bytes) and isinstance(other.data, bytes):
            data = self.data + other.data
        else:
            data = self.records + other.records
        kinds = Counter(self.kinds) + Counter(other.kinds)
        times_ns, types = self.times_ns + other.times_ns, self.types + other.types
        return Piece(data, times_ns, types, kinds, self.size + other.size)

    def halves(self) -> tuple[Piece, Piece]:
        """Two parts in order, each of at least one event; for a piece of two or more."""
        middle = self.number // 2
        return self._part(slice(middle)), self._part(slice(middle, None))

    def _part(self, where: slice) -> Piece:
        records, types = self.records[where], self.types[where]
        data: Records = records
        if isinstance(self.data, bytes):
            data = b"".join(record + b"\n" for record in records)
        counts = Counter(types)
        kinds = {str(cls.__struct_config__.tag): n for cls, n in counts.items()}
        return Piece(data, self.times_ns[where], types, kinds, sum(map(len, records)))


def split(piece: Piece, most: int) -> Iterator[Piece]:
    """The piece in order, halved until each part has at most `most` bytes or a single event."""
    if piece.size <= most or piece.number == 1:
        yield piece
        return
    for half in piece.halves():
        yield from split(half, most)


class Sent:
    """The pieces of one Kafka record batch, in the window until the broker acknowledges it."""

    __slots__ = ("future", "pieces", "since")

    def __init__(self, pieces: list[Piece]) -> None:
        """`future` and `since` (loop time) are set when the producer has accepted the batch."""
        self.pieces = pieces
        self.future: asyncio.Future[object] | None = None
        self.since: float | None = None

    @property
    def size(self) -> int:
        """Bytes of all records."""
        return sum(piece.size for piece in self.pieces)

    @property
    def single(self) -> bool:
        """Whether there is only one record, so that nothing can be split."""
        return sum(piece.number for piece in self.pieces) == 1


class Lane:
    """The queue of one topic, and the window of what was sent and is not acknowledged yet.

    A record batch is due when `limit` bytes are there, or `linger` seconds after the first piece
    came or the batch before was taken. It takes pieces until `limit` is reached, and a piece that
    overruns it is kept whole up to half as much again: a drained batch is one record batch where
    it can be.
    """

    def __init__(self, topic: str, limit: int, linger: float) -> None:
        """`limit` in bytes of records, `linger` in seconds."""
        self.topic = topic
        self.limit = limit
        self.linger = linger
        self.window: dict[Sent, None] = {}
        self.acked_at = 0.0
        self._queue: deque[Piece] = deque()
        self._queued = 0
        self._due = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    def __bool__(self) -> bool:
        """Whether anything is held."""
        return bool(self._queue or self.window)

    @property
    def most(self) -> int:
        """The bytes that a record batch has at most, unless a single record has more."""
        return self.limit * 3 // 2

    def put(self, piece: Piece) -> None:
        """Queue a piece of at most `most` bytes.

        In a backlog small pieces become one: each costs more memory than a small event.
        """
        self._queued += piece.size
        if len(self._queue) > BACKLOG_PIECES and self._goes_with(self._queue[-1], piece):
            piece = self._queue.pop().with_next(piece)
        self._queue.append(piece)
        self._arm()

    def _goes_with(self, last: Piece, piece: Piece) -> bool:
        few = last.number + piece.number <= MERGED_EVENTS
        return few and last.size + piece.size <= self.most

    async def take(self) -> Sent:
        """Wait until a record batch is due, and move its pieces into the window."""
        await self._due.wait()
        pieces = [self._queue.popleft()]
        size = pieces[0].size
        while self._queue and size < self.limit and size + self._queue[0].size <= self.most:
            size += self._queue[0].size
            pieces.append(self._queue.popleft())
        self._queued -= size
        sent = Sent(pieces)
        self.window[sent] = None
        self._disarm()
        self._arm()
        return sent

    def acknowledge(self, sent: Sent, now: float) -> bool:
        """Let go of a record batch. False when it is not in the window (any more)."""
        if sent not in self.window:
            return False
        del self.window[sent]
        self.acked_at = now
        return True

    def shrink(self, limit: int) -> None:
        """Make record batches smaller from now on, because the broker refused one as too large."""
        self.limit = max(1, min(self.limit, limit))

    def rewind(self) -> None:
        """Put the window back in front of the queue, in order and in pieces of the right size."""
        pieces = [piece for sent in self.window for piece in sent.pieces]
        self.window.clear()
        self._queue = deque(
            part for piece in chain(pieces, self._queue) for part in split(piece, self.most)
        )
        self._queued = sum(piece.size for piece in self._queue)
        self._disarm()
        self._arm()

    def clear(self) -> list[Piece]:
        """Let go of everything, and return it."""
        self.rewind()
        pieces = list(self._queue)
        self._queue.clear()
        self._queued = 0
        self._disarm()
        return pieces

    def flush(self) -> None:
        """Make everything due at once, from now on."""
        self.linger = 0.0
        self._disarm()
        self._arm()

    def stalled_since(self) -> float | None:
        """The loop time since when the producer owes an ack; None when it owes none."""
        oldest = next(iter(self.window), None)
        if oldest is None or oldest.since is None:
            return None
        return max(oldest.since, self.acked_at)

    def _arm(self) -> None:
        if not self._queue:
            return
        if self._queued >= self.limit or self.linger <= 0:
            self._due.set()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self.linger, self._due.set)

    def _disarm(self) -> None:
        self._due.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
