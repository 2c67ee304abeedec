"""What waits to be sent to one topic: what goes together, how much of it, and when it is due.

No Kafka here, and no clock: time is handed in, in seconds.
"""

from __future__ import annotations

from collections import deque

from streamer.sinks.kafka.encoded import EncodedBatch, size_of

BACKLOG_BATCHES = 8
MERGED_EVENTS = 256
GROWTH = 4


class TopicQueue:
    """Encoded events of one topic in order, until a record batch is made of them.

    A record batch is due when `batch_bytes` are there, or `linger` seconds after the first event
    came or the record batch before was taken. It takes what is there by then, up to GROWTH times
    `batch_bytes`: with more on each way, a far broker keeps up with a backlog.
    """

    def __init__(self, batch_bytes: int, linger: float) -> None:
        """`batch_bytes` of records, `linger` in seconds."""
        self.batch_bytes = batch_bytes
        self.linger = linger
        self._batches: deque[EncodedBatch] = deque()
        self._size = 0
        self._since = 0.0

    def __bool__(self) -> bool:
        """Whether anything is held."""
        return bool(self._batches)

    def put(self, batch: EncodedBatch, now: float) -> None:
        """Queue a batch behind the others.

        In a backlog small ones become one: each costs more memory than a small event.
        """
        if not self._batches:
            self._since = now
        self._size += batch.size
        if len(self._batches) > BACKLOG_BATCHES and self._goes_with(self._batches[-1], batch):
            batch = self._batches.pop().with_next(batch)
        self._batches.append(batch)

    def _goes_with(self, last: EncodedBatch, batch: EncodedBatch) -> bool:
        few = last.number + batch.number <= MERGED_EVENTS
        return few and last.size + batch.size <= self.batch_bytes

    def due_at(self) -> float | None:
        """When the next record batch is due; None when there is nothing."""
        if not self._batches:
            return None
        full = self._size >= self.batch_bytes
        return self._since + (0.0 if full else self.linger)

    def take(self, most: int, now: float) -> list[EncodedBatch]:
        """The events of a record batch: up to `most` bytes of records, or one larger event."""
        most = min(most, GROWTH * self.batch_bytes)
        taken: list[EncodedBatch] = []
        room = most
        while self._batches and (not taken or self._batches[0].size <= room):
            first = self._batches.popleft()
            if first.size > most and first.number > 1:
                first, *rest = first.cut(most)
                self._batches.extendleft(reversed(rest))
            room -= first.size
            taken.append(first)
        self._size -= most - room
        self._since = now
        return taken

    def trim(self, most: int) -> list[EncodedBatch]:
        """Let go of the newest batches until at most `most` bytes are held; those, in order."""
        out: deque[EncodedBatch] = deque()
        while self._batches and self.held > most:
            out.appendleft(self._batches.pop())
        self._size = size_of(self._batches)
        return list(out)

    @property
    def held(self) -> int:
        """Bytes of memory that all of them take, about."""
        return sum(batch.held for batch in self._batches)

    def clear(self) -> list[EncodedBatch]:
        """Let go of everything, and return it."""
        batches = list(self._batches)
        self._batches.clear()
        self._size = 0
        return batches


class SizeLimit:
    """The most bytes of a record batch that are tried, learned from what was refused.

    A refusal halves it. It doubles again after a wait, which doubles with every refusal: a
    topic's limit can be raised, and small batches cost a multiple of the CPU time.
    """

    FIRST_WAIT = 30.0
    LONGEST_WAIT = 3600.0
    LEAST = 1024

    def __init__(self, most: int) -> None:
        """`most` bytes are tried at first."""
        self._most = most
        self._limit = most
        self._wait = self.FIRST_WAIT
        self._grows_at = 0.0

    def now(self, now: float) -> int:
        """The most bytes that a record batch should have."""
        while self._limit < self._most and now >= self._grows_at:
            self._limit = min(self._most, 2 * self._limit)
            self._grows_at += self._wait
        return self._limit

    def refused(self, size: int, now: float) -> None:
        """A record batch of so many bytes was too large."""
        if size > self._limit < self._most:
            return  # it was made before the limit was known
        self._limit = max(self.LEAST, min(self._limit, size) // 2)
        self._grows_at = now + self._wait
        self._wait = min(self.LONGEST_WAIT, 2 * self._wait)
