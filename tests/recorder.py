"""What a sink tells its owner, for the tests of all sinks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from streamer.events.spans import Place, Spans, without_kinds
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


class SpanRecorder(Recorder):
    """Keeps the spans of what was dropped, too: the numbers alone, and with their kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[Spans] = []
        self.counted: list[Spans] = []

    def sink_dropped(self, sink: Sink, kinds: Mapping[str, int], reason: str, spans: Spans) -> None:
        super().sink_dropped(sink, kinds, reason, spans)
        self.spans.append(without_kinds(spans))
        self.counted.append(spans)

    def kinds(self) -> dict[Place, Counter[str]]:
        """How many of each kind were dropped, per place, as far as that was told."""
        found: defaultdict[Place, Counter[str]] = defaultdict(Counter)
        for spans in self.counted:
            for place, span in spans.items():
                found[place].update(span.kinds)
        return dict(found)

    def numbers(self) -> list[int]:
        """All that are within them, in order."""
        ranges = (span for spans in self.spans for span in spans.values())
        return sorted(n for one in ranges for n in range(one.first, one.last + 1))
