"""What a sink tells its owner, for the tests of all sinks."""

from __future__ import annotations

from collections.abc import Mapping

from streamer.events.batch import Spans
from streamer.sinks.base import Listener, Sink, Status


class Recorder(Listener):
    """Keeps what a sink said, in order."""

    def __init__(self) -> None:
        self.marks: list[str] = []
        self.statuses: list[tuple[Status, str]] = []
        self.drops: list[tuple[dict[str, int], str]] = []
        self.anew = 0

    @property
    def reasons(self) -> set[str]:
        """Why events were dropped."""
        return {reason for _, reason in self.drops}

    def sink_full(self, sink: Sink) -> None:
        self.marks.append("full")

    def sink_room(self, sink: Sink) -> None:
        self.marks.append("room")

    def sink_status(self, sink: Sink, status: Status, reason: str) -> None:
        self.statuses.append((status, reason))

    def sink_anew(self, sink: Sink) -> None:
        self.anew += 1

    def sink_dropped(self, sink: Sink, kinds: Mapping[str, int], reason: str, spans: Spans) -> None:
        self.drops.append((dict(kinds), reason))
