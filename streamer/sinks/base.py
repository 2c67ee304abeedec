"""What every sink promises, and the accounting and backpressure that all of them share.

A sink takes batches at once (`submit` never waits) and delivers them in the background.
What it holds is counted in bytes against a budget; at the high mark it asks for a pause,
at the low mark it says that there is room. Every event that it took ends up in exactly one
of `delivered` and `dropped`, or is still `pending`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import Literal

import msgspec

from streamer.events.batch import Batch
from streamer.events.spans import NO_SPANS, Spans
from streamer.sinks.latency import LatencySamples

Status = Literal["starting", "up", "down", "closed"]


class Watermarks:
    """Bytes held against a budget, with hysteresis: full at `high`, free again at `low`.

    The budget can be overrun by one batch, because an event that was drained from its ring
    must go somewhere; the reader pauses before the next drain.
    """

    __slots__ = ("full", "held", "high", "low")

    def __init__(self, high: int, low: int | None = None) -> None:
        """`high` and `low` in bytes; `low` is half of `high` unless given."""
        self.high = high
        self.low = high // 2 if low is None else low
        self.held = 0
        self.full = False

    def add(self, size: int) -> bool:
        """Hold `size` bytes more. True when this made it full."""
        self.held += size
        if self.full or self.held < self.high:
            return False
        self.full = True
        return True

    def remove(self, size: int) -> bool:
        """Let go of `size` bytes. True when this made room again."""
        self.held -= size
        if not self.full or self.held > self.low:
            return False
        self.full = False
        return True


def size_beside(batch: Batch) -> int:
    """Bytes of memory, about, that a sink holds beside the encoded events of a batch.

    These are the object around the bytes, its place in queues, and counts and spans. For a batch
    of one event, as at low rates, it is more than the event.
    """
    return 400 + 50 * len(batch.kinds) + 220 * len(batch.spans)


Cell = tuple[str, int, str]
"""A ring, a CPU and a kind."""


class SinkAccount(msgspec.Struct):
    """Events of one sink, in numbers per kind. `received = delivered + dropped + pending`."""

    received: Counter[str] = msgspec.field(default_factory=Counter)
    delivered: Counter[str] = msgspec.field(default_factory=Counter)
    dropped: Counter[str] = msgspec.field(default_factory=Counter)
    cells: Counter[Cell] = msgspec.field(default_factory=Counter)
    """Of those dropped, which this run had read: per ring, CPU and kind, as far as it is known."""

    @property
    def pending(self) -> int:
        """Events taken and neither delivered nor dropped yet."""
        return self.received.total() - self.delivered.total() - self.dropped.total()

    def drop_of(self, cells: Mapping[Cell, int]) -> None:
        """Say of what is `dropped` in which cells it was counted when it was read."""
        self.cells.update(cells)


class Listener:
    """What a sink tells its owner. The service overrides these; each default does nothing."""

    def sink_full(self, sink: Sink) -> None:
        """The sink reached its high mark."""

    def sink_room(self, sink: Sink) -> None:
        """The sink is below its low mark again."""

    def sink_status(self, sink: Sink, status: Status, reason: str) -> None:
        """The sink came up, went down or closed for good; called on changes only."""

    def sink_anew(self, sink: Sink) -> None:
        """What is written from now on lies where nothing before it lies: a topic was made anew."""

    def sink_dropped(self, sink: Sink, kinds: Mapping[str, int], reason: str, spans: Spans) -> None:
        """Events were given up, counted per kind; `spans` say which, as far as that is known."""


class Sink(ABC):
    """Where events go. Subclasses deliver; accounting and budget are here.

    `ends_quietly`: that its reader goes away is how such a sink is meant to end.
    """

    ends_quietly = False

    def __init__(self, name: str, budget_bytes: int) -> None:
        """`name` is the sink's URL without any secret; `budget_bytes` bounds what it holds."""
        self.name = name
        self.account = SinkAccount()
        self.watermarks = Watermarks(budget_bytes)
        self.latency = LatencySamples()
        self.delivered_bytes = 0
        """Of encoded events."""
        self.listener = Listener()
        self.status: Status = "starting"
        self.ticket = 0
        """A number for what is submitted next: see `oldest`."""
        self.recovered = 0
        """Events of earlier runs that it had when it started: they are `received`, too."""
        self._unexplained = False  # it is down, and nobody has said why

    @abstractmethod
    async def start(self) -> None:
        """Begin delivering in the background.

        Returns at once also while a broker is absent.

        Raises:
            SinkError: what no retry can mend, such as a file that cannot be opened.
        """

    @abstractmethod
    def submit(self, batch: Batch) -> None:
        """Take a batch. Never waits; calls `_take` with the size of what is then held."""

    @abstractmethod
    async def stop(self, grace: float) -> None:
        """Deliver what is held within `grace` seconds, drop the rest, release everything.

        Never hangs and never raises; calling it twice is harmless.
        """

    def checkpoint(  # noqa: B027 - only a spool remembers
        self, complete: Mapping[tuple[str, int], int], taken: Mapping[tuple[str, int], int]
    ) -> None:
        """Each number up to `complete`, of a ring and CPU, was submitted, or told as lost.

        `taken` are the last that are known to have been taken in the kernel.
        """

    @property
    def waiting(self) -> int:
        """Events that the end has to wait for: those `pending` that are nowhere else."""
        return self.account.pending

    @property
    def reachable(self) -> bool:
        """Whether it may deliver what it holds: it is up, or only nothing is acknowledged yet."""
        return self.status == "up"

    @property
    def spooled(self) -> int:
        """Of those `pending`, the events that are on disk and wait."""
        return 0

    @property
    def spool_filled(self) -> float:
        """The share of the room on disk that is used, 0 to 1."""
        return 0.0

    @property
    def kept(self) -> Mapping[str, int]:
        """Of those `pending` when it has stopped, what the next run will deliver."""
        return {}

    def oldest(self) -> int | None:
        """The least `ticket` of what is held, at which everything before is accounted for.

        None: nothing is held. A sink that does not tell its batches apart has all of them, or none.
        """
        return 0 if self.account.pending else None

    def discard(self, reason: str) -> None:  # noqa: B027 - what is delivered at once never waits
        """Drop what waits and has not begun to be delivered: there is no time left for it.

        What is submitted next, the account that names it, then has the rest of the time.
        """

    def set_budget(self, budget_bytes: int) -> None:
        """Hold at most so much from now on."""
        self.watermarks.high, self.watermarks.low = budget_bytes, budget_bytes // 2

    def reopen(self) -> None:  # noqa: B027 - most sinks have nothing to open
        """Open anew what was opened by name: whoever rotates files asks for it."""

    def _take(self, kinds: Mapping[str, int], size: int) -> None:
        self.account.received.update(kinds)
        self.latency.taken(sum(kinds.values()))
        if self.watermarks.add(size):
            self.listener.sink_full(self)

    def _delivered(self, kinds: Mapping[str, int], size: int, encoded: int) -> None:
        """`size` bytes are no longer held for events whose encodings have `encoded` bytes."""
        self.account.delivered.update(kinds)
        self.delivered_bytes += encoded
        self.latency.settled(sum(kinds.values()))
        self._release(size)

    def _dropped(
        self, kinds: Mapping[str, int], size: int, reason: str, spans: Spans = NO_SPANS
    ) -> None:
        self.account.dropped.update(kinds)
        self.latency.settled(sum(kinds.values()))
        self.listener.sink_dropped(self, kinds, reason, spans)
        self._release(size)

    def _release(self, size: int) -> None:
        if self.watermarks.remove(size):
            self.listener.sink_room(self)

    def _set_status(self, status: Status, reason: str = "") -> None:
        if status != self.status:
            self.status = status
            self._unexplained = False
            self.listener.sink_status(self, status, reason)

    def _set_silent(self, reason: str) -> None:
        """It is down, because nothing is acknowledged. Why that is, is told when it is known."""
        if self.status == "up":
            self._set_status("down", reason)
            self._unexplained = True

    def _explain(self, reason: str) -> None:
        """Tell, once, why nothing is acknowledged, if that has not been said."""
        if self._unexplained:
            self._unexplained = False
            self.listener.sink_status(self, "down", reason)
