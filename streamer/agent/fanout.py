"""Hands every batch to every sink, and decides when reading must wait for them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from streamer.events.batch import Batch
from streamer.events.stream import StreamRecord
from streamer.sinks.base import Listener, Sink, Status

Policy = Literal["pause", "drop"]
_log = logging.getLogger("streamer")


def policy_of(on_full: str, sinks: int) -> Policy:
    """What a full sink does, given its `on_full` and how many sinks there are."""
    if on_full == "auto":
        return "pause" if sinks == 1 else "drop"
    return "pause" if on_full == "pause" else "drop"


class Fanout(Listener):
    """All sinks of a service. A full sink either pauses the reading or loses its own copy."""

    def __init__(
        self,
        sinks: Sequence[tuple[Sink, Policy]],
        *,
        pause: Callable[[], None],
        resume: Callable[[], None],
        closed: Callable[[], None],
    ) -> None:
        """`pause` and `resume` act on the reader; `closed` is called when no sink is left."""
        self.sinks = [sink for sink, _ in sinks]
        self.stopping = False
        self.failures: list[str] = []
        self._policies = dict(sinks)
        self._pause = pause
        self._resume = resume
        self._closed = closed
        self._down: set[Sink] = set()
        self._broken: set[Sink] = set()
        self._owed: dict[Sink, dict[str, Counter[str]]] = {}
        for sink in self.sinks:
            sink.listener = self

    def submit(self, batch: Batch) -> None:
        """Give the batch to every sink that is open; one that may drop and is full loses it."""
        for sink in self.sinks:
            if sink.watermarks.full and self._policies[sink] == "drop":
                self._refuse(sink, batch.kinds, f"no room, sink {sink.status}")
            else:
                self._give(sink, batch)

    def tell(self, records: Sequence[StreamRecord]) -> None:
        """Give the agent's own records to every sink, also to one that is full.

        They say what a consumer has not got, so they may take a sink to twice its budget.
        """
        for sink in self.sinks if records else ():
            self.tell_one(sink, records)

    def tell_one(self, sink: Sink, records: Sequence[StreamRecord]) -> None:
        """The same for one sink."""
        batch = Batch(list(records))
        if sink.watermarks.held > 2 * sink.watermarks.high:
            self._refuse(sink, batch.kinds, "no room")
        else:
            self._give(sink, batch)

    def tell_ready(self, record: StreamRecord) -> None:
        """Give a record that can wait, such as a heartbeat, to the sinks that are not full."""
        for sink in self.sinks:
            if not sink.watermarks.full:
                self.tell_one(sink, [record])

    def is_open(self, sink: Sink) -> bool:
        """Whether the sink still takes events."""
        return sink.status != "closed" and sink not in self._broken

    def _give(self, sink: Sink, batch: Batch) -> None:
        if not self.is_open(sink):
            self._refuse(sink, batch.kinds, "closed")
            return
        before = sink.account.received.copy()
        try:
            sink.submit(batch)
        except Exception as error:  # a defect of this sink must not cost the others their events
            _log.exception("%s failed and gets no more events", sink.name)
            self._broken.add(sink)
            taken = sink.account.received - before
            self._refuse(sink, Counter(batch.kinds) - taken, "failed")
            self._fail(sink, f"{type(error).__name__}: {error}")

    def _refuse(self, sink: Sink, kinds: Mapping[str, int], reason: str) -> None:
        sink.account.received.update(kinds)
        sink.account.dropped.update(kinds)
        self.sink_dropped(sink, kinds, reason)

    def _fail(self, sink: Sink, reason: str) -> None:
        if not sink.ends_quietly or sink in self._broken:
            self.failures.append(f"{sink.name}: {reason}")
        if not any(map(self.is_open, self.sinks)):
            self._closed()
        self.sink_room(sink)

    @property
    def blocked(self) -> bool:
        """Whether reading has to wait for a full sink."""
        return any(map(self._blocks, self.sinks))

    def _blocks(self, sink: Sink) -> bool:
        full = sink.watermarks.full and self.is_open(sink)
        return full and self._policies[sink] == "pause"

    @property
    def filled(self) -> float:
        """The share of its budget that the fullest sink holds."""
        return max((s.watermarks.held / s.watermarks.high for s in self.sinks), default=0.0)

    def sink_full(self, sink: Sink) -> None:
        """See `Listener`."""
        if self._blocks(sink):
            self._pause()

    def sink_room(self, sink: Sink) -> None:
        """See `Listener`."""
        if not self.stopping and not self.blocked:
            self._resume()

    def sink_status(self, sink: Sink, status: Status, reason: str) -> None:
        """See `Listener`."""
        if self.stopping:
            return
        quiet = status == "closed" and sink.ends_quietly
        level = logging.DEBUG if quiet else self._level(sink, status)
        _log.log(level, "%s is %s%s", sink.name, status, f": {reason}" if reason else "")
        if status == "closed":
            self._fail(sink, reason)

    def _level(self, sink: Sink, status: Status) -> int:
        """Trouble is told, and its end; that a sink came up as expected is not."""
        if status in ("down", "closed"):
            self._down.add(sink)
            return logging.WARNING
        recovered = sink in self._down
        self._down.discard(sink)
        return logging.INFO if recovered else logging.DEBUG

    def sink_dropped(self, sink: Sink, kinds: Mapping[str, int], reason: str) -> None:
        """See `Listener`."""
        # A lost loss record must not make another one, for ever; the heartbeat counts it.
        events = {kind: n for kind, n in kinds.items() if not kind.startswith("stream.")}
        if events:
            self._owed.setdefault(sink, {}).setdefault(reason, Counter()).update(events)

    def take_dropped(self, *, final: bool = False) -> Iterator[tuple[Sink, str, dict[str, int]]]:
        """Sink, reason and counts of drops not told yet, for sinks with room to be told.

        With `final`, for all that are open.
        """
        for sink in [s for s in self._owed if self.is_open(s)]:
            if final or not sink.watermarks.full:
                for reason, kinds in self._owed.pop(sink).items():
                    yield sink, reason, dict(kinds)
