"""What is in flight, and in which order it has to be sent again."""

from __future__ import annotations

from streamer.sinks.mqtt.chunks import Chunk


class Window:
    """Messages that were sent and are not accounted for.

    A broker answers in the order in which it was sent to. Behind a message that it did not take,
    it may have taken others, of the same topic, which then are ahead of it. Those are not
    finished: they follow it once more when all that is in flight was answered, so that the last
    copies of all events are in order.
    """

    def __init__(self) -> None:
        self._next = 0
        self._sent: dict[int, tuple[int, Chunk]] = {}
        # By the position in which it was sent: what has to be sent in place of it.
        self._again: dict[int, list[Chunk]] = {}
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
    def oldest(self) -> Chunk | None:
        """The message in flight that waits longest for its answer."""
        return next(iter(self._sent.values()))[1] if self._sent else None

    def lone(self) -> tuple[int, int, Chunk] | None:
        """The only message in flight: its number, position and content."""
        if len(self._sent) != 1:
            return None
        ((mid, (position, chunk)),) = self._sent.items()
        return mid, position, chunk

    def put(self, mid: int, chunk: Chunk) -> None:
        """`chunk` was sent as message `mid`."""
        self._sent[mid] = (self._next, chunk)
        self._next += 1

    def pop(self, mid: int) -> tuple[int, Chunk] | None:
        """Message `mid` was answered: its position and content; None for one that is unknown."""
        return self._sent.pop(mid, None)

    def keep(self, position: int, chunk: Chunk) -> bool:
        """The broker took `chunk`: whether it has to come again, behind one that it did not."""
        chunk.taken = True
        if chunk.topic not in self._waiting_topics:
            return False
        self._again[position] = [chunk]
        return True

    def again(self, position: int, chunk: Chunk, pieces: list[Chunk]) -> None:
        """The broker did not take `chunk`: `pieces`, all of its events, come in its place."""
        self._again[position] = pieces
        self._waiting_topics.add(chunk.topic)

    def take_back(self) -> list[Chunk]:
        """Let go of everything; what is to be sent, in order."""
        chunks = self._again | {position: [chunk] for position, chunk in self._sent.values()}
        self._sent.clear()
        self._again.clear()
        self._waiting_topics.clear()
        return [chunk for position in sorted(chunks) for chunk in chunks[position]]
