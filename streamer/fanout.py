"""Hands every batch to every sink, and decides when reading must wait for them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from streamer.batch import Batch
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
        self._policies = dict(sinks)
        self._pause = pause
        self._resume = resume
        self._closed = closed
        self.stopping = False
        self._down: set[Sink] = set()
        self._owed: dict[Sink, dict[str, Counter[str]]] = {}
        for sink in self.sinks:
            sink.listener = self

    def submit(self, batch: Batch) -> None:
        """Give the batch to every sink that is open; one that may drop and is full loses it."""
        for sink in self.sinks:
            if sink.status == "closed" or self._refuses(sink):
                sink.account.received.update(batch.kinds)
                sink.account.dropped.update(batch.kinds)
                self.sink_dropped(sink, batch.kinds, f"sink {sink.status}, no room")
            else:
                sink.submit(batch)

    def _refuses(self, sink: Sink) -> bool:
        return sink.watermarks.full and self._policies[sink] == "drop"

    @property
    def blocked(self) -> bool:
        """Whether reading has to wait for a full sink."""
        return any(self._blocks(sink) for sink in self.sinks)

    def _blocks(self, sink: Sink) -> bool:
        open_and_full = sink.watermarks.full and sink.status != "closed"
        return open_and_full and self._policies[sink] == "pause"

    @property
    def filled(self) -> float:
        """The share of its budget that the fullest sink holds."""
        return max((s.watermarks.held / s.watermarks.high for s in self.sinks), default=0.0)

    def sink_full(self, sink: Sink) -> None:
        """See `Listener`."""
        if self._policies[sink] == "pause":
            self._pause()

    def sink_room(self, sink: Sink) -> None:
        """See `Listener`."""
        if not self.blocked:
            self._resume()

    def sink_status(self, sink: Sink, status: Status, reason: str) -> None:
        """See `Listener`."""
        if not self.stopping:
            _log.log(
                self._level(sink, status),
                "%s is %s%s",
                sink.name,
                status,
                f": {reason}" if reason else "",
            )
        if status == "closed":
            if all(other.status == "closed" for other in self.sinks):
                self._closed()
            self.sink_room(sink)

    def _level(self, sink: Sink, status: Status) -> int:
        """Trouble is told, and its end; that a sink came up as expected is not."""
        if status == "down":
            self._down.add(sink)
            return logging.WARNING
        recovered = sink in self._down
        self._down.discard(sink)
        return logging.INFO if recovered or status == "closed" else logging.DEBUG

    def sink_dropped(self, sink: Sink, kinds: Mapping[str, int], reason: str) -> None:
        """See `Listener`."""
        self._owed.setdefault(sink, {}).setdefault(reason, Counter()).update(kinds)

    def take_dropped(self) -> Iterator[tuple[Sink, str, dict[str, int]]]:
        """Sink, reason and counts of drops not told yet, for sinks with room to be told."""
        for sink in [s for s in self._owed if not s.watermarks.full and s.status != "closed"]:
            for reason, kinds in self._owed.pop(sink).items():
                yield sink, reason, dict(kinds)
