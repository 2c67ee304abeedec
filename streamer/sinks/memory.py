"""Keeps events in memory, for ever: for tests. No configuration can ask for it."""

from __future__ import annotations

from streamer.events.batch import Batch, Event
from streamer.sinks.base import Sink


class MemorySink(Sink):
    """Delivers at once into `events`, or, while `hold` is set, only when `release` is called."""

    def __init__(self, name: str = "memory:", budget_bytes: int = 1 << 25) -> None:
        """See `Sink`."""
        super().__init__(name, budget_bytes)
        self.events: list[Event] = []
        self.hold = False
        self._held: list[Batch] = []
        self._tickets: list[int] = []

    async def start(self) -> None:
        """Nothing to open."""
        self._set_status("up")

    def submit(self, batch: Batch) -> None:
        """Take a batch; its size is that of its NDJSON."""
        self._held.append(batch)
        self._tickets.append(self.ticket)
        self._take(batch.kinds, len(batch.lines("json")))
        if not self.hold:
            self.release()

    def release(self) -> None:
        """Deliver everything held."""
        held, self._held, self._tickets = self._held, [], []
        for batch in held:
            self.events.extend(batch.events)
            size = len(batch.lines("json"))
            self._delivered(batch.kinds, size, size)

    def oldest(self) -> int | None:
        """See `Sink`."""
        return self._tickets[0] if self._held else None

    async def stop(self, grace: float) -> None:
        """Deliver the rest, unless it is to be held, in which case it is dropped."""
        if not self.hold:
            self.release()
        self.discard("stopped")
        self._set_status("closed")

    def discard(self, reason: str) -> None:
        """Drop everything held."""
        held, self._held, self._tickets = self._held, [], []
        for batch in held:
            self._dropped(batch.kinds, len(batch.lines("json")), reason, batch.counted())
