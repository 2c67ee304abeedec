"""A batch: the events of one drain, encoded at most once per encoding."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from itertools import filterfalse
from typing import Any, Literal

import msgspec

from streamer.events.spans import NO_SPANS, Spans, spans_of_events

Encoding = Literal["json", "msgpack"]
Event = msgspec.Struct

TRIMMED_BYTES = 64 << 10

_JSON = msgspec.json.Encoder()
_MSGPACK = msgspec.msgpack.Encoder()

# UTF-8 by its first byte, with which no other character's bytes can be confused: DEL, C1, the
# Arabic letter mark, the marks and overrides of direction with the separators of lines.
_ACTIVE = (
    (b"\x7f", re.compile(rb"\x7f")),
    (b"\xc2", re.compile(rb"\xc2[\x80-\x9f]")),
    (b"\xd8", re.compile(rb"\xd8\x9c")),
    (b"\xe2", re.compile(rb"\xe2(?:\x80[\x8e\x8f\xa8-\xae]|\x81[\xa6-\xa9])")),
)


def inert(data: bytes) -> bytes:
    r"""JSON with what terminals and editors act upon as `\u009b`, which means the same.

    JSON itself has C0 escaped only. Whoever is observed chooses these characters, and events are
    looked at with `cat`, `kcat` and `mosquitto_sub`.
    """
    for first, pattern in _ACTIVE:
        if first in data:  # one look at each byte; the rest pays for the pattern
            data = pattern.sub(_escaped, data)
    return data


def _escaped(match: re.Match[bytes]) -> bytes:
    return b"\\u%04x" % ord(match[0].decode())


def trimmed(data: bytes) -> bytes:
    """`data` in no more memory than it takes, if it is small.

    msgspec encodes into a buffer of a KiB or more and keeps all of it. Of a small batch that is
    more than the events; of a large one it is a share, and copying would cost its events time.
    """
    return bytes(memoryview(data)) if len(data) < TRIMMED_BYTES else data


def kind_of(event: Event) -> str:
    """The dotted kind of an event, such as `process.exec`."""
    return str(type(event).__struct_config__.tag)


def category_of(kind: str) -> str:
    """The part of a kind before the dot: `process` of `process.exec`."""
    return kind.partition(".")[0]


class Batch:
    """Some events in order, with their count per kind.

    Every sink gets the same batch, so sinks that take it whole pay for an encoding once.
    A batch is never changed after it was made.
    """

    __slots__ = ("_counted", "_lines", "_parts", "_records", "events", "kinds", "spans")

    def __init__(
        self,
        events: list[Any],
        kinds: dict[str, int] | None = None,
        spans: Spans = NO_SPANS,
    ) -> None:
        """Wrap `events`; `kinds` is their count per dotted kind, counted here when not given.

        `spans` say which numbers they may have; `counted` says it exactly, of what is given up.
        """
        self.events = events
        self.spans = spans
        self.kinds: dict[str, int] = count_kinds(events) if kinds is None else kinds
        self._records: dict[Encoding, list[bytes]] = {}
        self._lines: dict[Encoding, bytes] = {}
        self._parts: dict[str, Batch] | None = None
        self._counted: Spans | None = None

    def __len__(self) -> int:
        return len(self.events)

    def counted(self) -> Spans:
        """The spans in which these events are, with how many of each kind."""
        if self._counted is None:
            self._counted = spans_of_events(self.events, self.kinds, self.spans)
        return self._counted

    def records(self, encoding: Encoding) -> list[bytes]:
        """One encoded record per event, without a line end."""
        found = self._records.get(encoding)
        if found is None:
            if encoding == "json":
                found = [inert(_JSON.encode(event)) for event in self.events]
            else:
                found = list(map(_MSGPACK.encode, self.events))
            self._records[encoding] = found
        return found

    def lines(self, encoding: Encoding) -> bytes:
        """All events in one piece: NDJSON, or MessagePack maps one after the other."""
        found = self._lines.get(encoding)
        if found is None:
            if encoding == "json":
                found = trimmed(inert(_JSON.encode_lines(self.events)))
            else:
                found = b"".join(map(_MSGPACK.encode, self.events))
            self._lines[encoding] = found
        return found

    def encoded_as(self, lines: bytes) -> None:
        """Take `lines`, of which the events were decoded, for what they are as NDJSON."""
        self._lines["json"] = lines

    def by_category(self) -> dict[str, Batch]:
        """The batch split by category, each part in order; itself where it has only one."""
        if self._parts is None:
            self._parts = self._split()
        return self._parts

    def _split(self) -> dict[str, Batch]:
        categories = {category_of(kind) for kind in self.kinds}
        if len(categories) == 1:
            return {categories.pop(): self}
        parts: dict[str, list[Event]] = {category: [] for category in sorted(categories)}
        # Looked up by type, because asking each event for its tag costs three times as much.
        part_of: dict[type, list[Event]] = {}
        for event in self.events:
            cls = type(event)
            if cls not in part_of:
                part_of[cls] = parts[category_of(kind_of(event))]
            part_of[cls].append(event)
        return {category: Batch(events, spans=self.spans) for category, events in parts.items()}

    def pieces(self, most: int) -> Iterator[Batch]:
        """In order, of `most` events at most; itself where it has no more."""
        if len(self) <= most:
            yield self
            return
        for at in range(0, len(self), most):
            yield Batch(self.events[at : at + most], spans=self.spans)

    def divided(self, wanted: Callable[[Any], bool]) -> tuple[Batch, list[Event]]:
        """The events of which that holds, itself where it holds of all; and the others."""
        others = list(filterfalse(wanted, self.events))
        if not others:
            return self, others
        return Batch(list(filter(wanted, self.events)), spans=self.spans), others

    def only(self, kinds: Container[str]) -> Batch:
        """The events of these kinds, in order; itself where it has no others."""
        wanted = {kind: count for kind, count in self.kinds.items() if kind in kinds}
        if len(wanted) == len(self.kinds):
            return self
        chosen: dict[type, bool] = {}
        events: list[Event] = []
        for event in self.events if wanted else ():
            cls = type(event)
            if cls not in chosen:
                chosen[cls] = kind_of(event) in kinds
            if chosen[cls]:
                events.append(event)
        return Batch(events, wanted, self.spans)


def count_kinds(events: Iterable[Event]) -> dict[str, int]:
    """How many events there are of each dotted kind."""
    classes: Counter[type[Event]] = Counter(map(type, events))
    return {str(cls.__struct_config__.tag): count for cls, count in classes.items()}
