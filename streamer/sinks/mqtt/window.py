"""What is in flight, and in which order it has to be sent again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from streamer.sinks.encoded import EncodedBatch, Extent, halves


class Message:
    """Events in one message. Its first and last id name it: a replay has the same bytes."""

    __slots__ = ("batch", "closings", "sent_at", "taken", "topic", "tries")

    def __init__(self, topic: str, batch: EncodedBatch, *, taken: bool = False) -> None:
        """`taken` by the broker, at least once."""
        self.topic = topic
        self.batch = batch
        self.taken = taken
        self.sent_at = 0.0
        self.tries = 0  # that were refused
        self.closings = 0  # of the connection, while nothing else was in flight

    @property
    def size(self) -> int:
        """Bytes of the payload."""
        return self.batch.length

    def cut(self, most: int) -> list[Message]:
        """In messages of a `size` of at most `most`, or of one larger event."""
        return self._parts(self.batch.cut(Extent(most)))

    def halve(self) -> list[Message]:
        """In two, for one of two or more events."""
        one, other = halves([self.batch])
        return self._parts([*one, *other])

    def _parts(self, batches: Iterable[EncodedBatch]) -> list[Message]:
        return [Message(self.topic, batch, taken=self.taken) for batch in batches]


class Window:
    """Messages that were sent and are not accounted for.

    A broker answers in the order in which it was sent to. Behind a message that it did not take,
    it may have taken others, of the same topic, which then are ahead of it. Those are not
    finished: they follow it once more when all that is in flight was answered, so that the last
    copies of all events are in order.
    """

    def __init__(self) -> None:
        """Empty. `size` is the bytes that are in flight."""
        self.size = 0
        self._next = 0
        self._sent: dict[int, tuple[int, Message]] = {}
        # By the position in which it was sent: what has to be sent in place of it.
        self._again: dict[int, list[Message]] = {}
        self._waiting_topics: set[str] = set()

    def __len__(self) -> int:
        """How many messages are in flight."""
        return len(self._sent)

    def __bool__(self) -> bool:
        """Whether anything is not accounted for."""
        return bool(self._sent or self._again)

    @property
    def running_empty(self) -> bool:
        """Nothing may be sent before all was answered: it would be ahead of what comes again."""
        return bool(self._again)

    @property
    def oldest(self) -> Message | None:
        """The message in flight that waits longest for its answer."""
        return next(iter(self._sent.values()))[1] if self._sent else None

    def held(self) -> Iterator[EncodedBatch]:
        """All that is not accounted for."""
        yield from (message.batch for _, message in self._sent.values())
        yield from (message.batch for again in self._again.values() for message in again)

    def lone(self) -> tuple[int, int, Message] | None:
        """The only message in flight: its number, position and content."""
        if len(self._sent) != 1:
            return None
        ((mid, (position, message)),) = self._sent.items()
        return mid, position, message

    def put(self, mid: int, message: Message) -> None:
        """`message` was sent as message `mid`."""
        self._sent[mid] = (self._next, message)
        self.size += message.size
        self._next += 1

    def pop(self, mid: int) -> tuple[int, Message] | None:
        """Message `mid` was answered: its position and content; None for one that is unknown."""
        found = self._sent.pop(mid, None)
        if found is not None:
            self.size -= found[1].size
        return found

    def keep(self, position: int, message: Message) -> bool:
        """The broker took `message`: whether it has to come again, behind one that it did not."""
        message.taken = True
        if message.topic not in self._waiting_topics:
            return False
        self._again[position] = [message]
        return True

    def again(self, position: int, message: Message, pieces: list[Message]) -> None:
        """The broker did not take `message`: `pieces`, all of its events, come in its place."""
        self._again[position] = pieces
        self._waiting_topics.add(message.topic)

    def take_back(self) -> list[Message]:
        """Let go of everything; what is to be sent, in order."""
        messages = self._again | {position: [message] for position, message in self._sent.values()}
        self._sent.clear()
        self.size = 0
        self._again.clear()
        self._waiting_topics.clear()
        return [message for position in sorted(messages) for message in messages[position]]
