"""What waits to be sent to one topic: what goes together, how much of it, and when it is due.

For every sink that sends batches. No format here, and no clock: time is handed in, in seconds.
"""

from __future__ import annotations

from collections import deque

from streamer.sinks.encoded import EncodedBatch, Extent, held_of, joined

BACKLOG_BATCHES = 8
MERGED_EVENTS = 64


class TopicQueue:
    """Encoded events of one topic in order, until they are sent.

    They are due when `full` is reached, or `linger` seconds after the first event came or some
    were taken before. What is taken by then grows with a backlog, up to `growth` times `full`:
    with more on each way, a far broker keeps up.
    """

    def __init__(self, full: Extent, linger: float, growth: int) -> None:
        """`full` is bytes of records, and events; `linger` is in seconds."""
        self.linger = linger
        self._full = full
        self._growth = growth
        self._batches: deque[EncodedBatch] = deque()
        self._size = 0
        self._number = 0
        self._since = 0.0

    def __bool__(self) -> bool:
        """Whether anything is held."""
        return bool(self._batches)

    @property
    def first(self) -> EncodedBatch | None:
        """What is taken next, or None."""
        return self._batches[0] if self._batches else None

    @property
    def number(self) -> int:
        """How many events are held."""
        return self._number

    def put(self, batch: EncodedBatch, now: float) -> None:
        """Queue a batch behind the others.

        In a backlog small ones become one: each costs more memory than a small event.
        """
        if not self._batches:
            self._since = now
        self._count(batch, 1)
        if len(self._batches) > BACKLOG_BATCHES and self._goes_with(self._batches[-1], batch):
            batch = joined([self._batches.pop(), batch])
        self._batches.append(batch)

    def _goes_with(self, last: EncodedBatch, batch: EncodedBatch) -> bool:
        few = last.number + batch.number <= MERGED_EVENTS
        return few and last.size + batch.size <= self._full.bytes

    def due_at(self) -> float | None:
        """When the next are due; None when there is nothing."""
        if not self._batches:
            return None
        full = self._size >= self._full.bytes or self._number >= self._full.events
        return self._since + (0.0 if full else self.linger)

    def take(self, most: int, now: float, places: int = 1) -> list[EncodedBatch]:
        """What is sent next: up to `most` bytes of records, or one larger event.

        `places` are how many times something could be taken now: a backlog is shared among them.
        """
        limit = self._limit(most, places)
        room = limit
        taken: list[EncodedBatch] = []
        while self._batches and (not taken or self._batches[0].extent.fits(room)):
            first = self._batches.popleft()
            if first.number > 1 and not first.extent.fits(limit):
                first, *rest = first.cut(limit)
                self._batches.extendleft(reversed(rest))
            self._count(first, -1)
            room = Extent(room.bytes - first.size, room.events - first.number)
            taken.append(first)
        self._since = now
        return taken

    def _limit(self, most: int, places: int) -> Extent:
        full, growth = self._full, self._growth
        size = min(growth * full.bytes, max(full.bytes, self._size // places + 1))
        events = min(growth * full.events, max(full.events, self._number // places + 1))
        return Extent(min(most, size), events)

    def _count(self, batch: EncodedBatch, sign: int) -> None:
        self._size += sign * batch.size
        self._number += sign * batch.number

    def trim(self, most: int) -> list[EncodedBatch]:
        """Let go of the newest batches until at most `most` bytes are held; those, in order."""
        out: deque[EncodedBatch] = deque()
        held = self.held
        while self._batches and held > most:
            last = self._batches.pop()
            self._count(last, -1)
            held -= last.held
            out.appendleft(last)
        return list(out)

    @property
    def held(self) -> int:
        """Bytes of memory that all of them take, about."""
        return held_of(self._batches)

    def clear(self) -> list[EncodedBatch]:
        """Let go of everything, and return it."""
        batches = list(self._batches)
        self._batches.clear()
        self._size = self._number = 0
        return batches


class SizeLimit:
    """The most bytes of a batch, as it is sent, that are tried, learned from what was refused.

    A refusal halves it. It doubles again after a wait, which doubles with every refusal: a
    limit can be raised, and small batches cost a multiple of the CPU time.
    """

    FIRST_WAIT = 30.0
    LONGEST_WAIT = 3600.0
    LEAST = 256

    def __init__(self, most: int) -> None:
        """`most` bytes are tried at first."""
        self._most = most
        self._limit = most
        self._wait = self.FIRST_WAIT
        self._grows_at = 0.0

    def now(self, now: float) -> int:
        """The most bytes that a batch should have."""
        while self._limit < self._most and now >= self._grows_at:
            self._limit = min(self._most, 2 * self._limit)
            self._grows_at += self._wait
        return self._limit

    def refused(self, size: int, now: float) -> None:
        """A batch of so many bytes was too large."""
        if size > self._limit < self._most:
            return  # it was made before the limit was known
        self._limit = max(self.LEAST, min(self._limit, size) // 2)
        self._grows_at = now + self._wait
        self._wait = min(self.LONGEST_WAIT, 2 * self._wait)
