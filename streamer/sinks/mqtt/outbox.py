"""What waits to be sent, in order for each topic. No MQTT here, and no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from streamer.sinks.batching import TopicQueue
from streamer.sinks.encoded import EncodedBatch, Extent, joined
from streamer.sinks.mqtt.window import Message


class Outbox:
    """A queue for each topic; and what is a message already, which goes ahead of them."""

    def __init__(self, full: Extent, linger: float, growth: int) -> None:
        """As for a `TopicQueue`."""
        self._full = full
        self._linger = linger
        self._growth = growth
        self._messages: deque[Message] = deque()
        self._queues: dict[str, TopicQueue] = {}

    def __bool__(self) -> bool:
        """Whether anything waits."""
        return bool(self._messages) or any(self._queues.values())

    def put(self, topic: str, batch: EncodedBatch, now: float) -> None:
        """Queue a batch behind the others of its topic."""
        self._queue(topic).put(batch, now)

    def lacks(self, topic: str) -> int:
        """How many events more fill a message: batches of so many need not be cut."""
        return self._full.events - self._queue(topic).number % self._full.events

    def _queue(self, topic: str) -> TopicQueue:
        queue = self._queues.get(topic)
        if queue is None:
            queue = TopicQueue(self._full, self._linger, self._growth)
            self._queues[topic] = queue
        return queue

    def pop(self, now: float, most: int, places: int) -> Message | None:
        """What is due first, in a message of at most `most` bytes of records; None: nothing is.

        `places` are how many messages could be sent now, for all topics together.
        """
        if self._messages:
            return self._messages.popleft()
        due = [
            (at, topic)
            for topic, queue in self._queues.items()
            if (at := queue.due_at()) is not None and at <= now
        ]
        if not due:
            return None
        _, topic = min(due)
        taken = self._queues[topic].take(most, now, max(1, places // len(due)))
        return Message(topic, joined(taken))

    def push_front(self, messages: Iterable[Message]) -> None:
        """Put messages before everything else, in the order given."""
        self._messages.extendleft(reversed(list(messages)))

    def first(self) -> Iterator[EncodedBatch]:
        """What waits, of which the oldest is a part: messages, and of each queue its first."""
        yield from (message.batch for message in self._messages)
        yield from filter(None, (queue.first for queue in self._queues.values()))

    def hurry(self) -> None:
        """Let nothing wait for more events, from now on."""
        self._linger = 0.0
        for queue in self._queues.values():
            queue.linger = 0.0

    def clear(self) -> list[Message]:
        """Take everything out, in order of each topic. Nothing is joined: it can be the budget."""
        messages = list(self._messages)
        self._messages.clear()
        for topic, queue in self._queues.items():
            messages += [Message(topic, batch) for batch in queue.clear()]
        return messages

    def due_at(self) -> float | None:
        """When the first is due that waits for more events; None when there is none."""
        times = (queue.due_at() for queue in self._queues.values())
        return min((at for at in times if at is not None), default=None)
