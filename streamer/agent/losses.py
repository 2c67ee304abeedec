"""Losses that were not told yet: merged, so that they take bounded memory however many they are.

Pure bookkeeping: time is handed in.
"""

from __future__ import annotations

import zlib
from collections import Counter, deque
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import msgspec
from msgspec import UNSET

from streamer.events.spans import OWN_RECORDS, Spans, sum_of
from streamer.events.stream import SeqRange

Stage = Literal["kernel", "decode", "sink", "stop"]

MOST_RANGES = 64
"""Ranges of one loss, unless it has more rings and CPUs: 6 to 13 kB of a record, by their kinds."""

MOST_REASONS = 32
"""Losses that are not of one ring and CPU. A reason can quote a broker, and never be the same."""

MOST_BACKOFF = 64
"""Seconds between two attempts to tell a sink that gives up what it is told."""

MOST_REASON = 300
"""Characters of a reason."""

OTHER_REASONS = "further reasons"

LOG_SECONDS = 60.0
"""How often losses that go on are logged."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Events that were lost in one place for one reason. `ring` and `cpu`: if in the kernel."""

    stage: Stage
    reason: str
    count: int
    kinds: Mapping[str, int]
    ranges: tuple[SeqRange, ...] = ()
    ring: str | None = None
    cpu: int | None = None

    @classmethod
    def of_sink(cls, kinds: Mapping[str, int], reason: str, spans: Spans) -> Lost:
        """What a sink gave up."""
        ranges = tuple(
            SeqRange(
                place[0],
                place[1],
                span.first,
                span.last,
                place[2] if len(place) == 3 else UNSET,
                dict(span.kinds),
            )
            for place, span in spans.items()
            if place[:2] != OWN_RECORDS
        )
        return cls("sink", reason[:MOST_REASON], sum(kinds.values()), kinds, ranges)

    def cells(self) -> Counter[tuple[str, int, str]]:
        """How many of each ring, CPU and kind that this run had read, as far as it is known."""
        found: Counter[tuple[str, int, str]] = Counter()
        for one in self.ranges:
            if one.run_id is UNSET:
                for kind, count in one.kinds.items():
                    found[one.ring, one.cpu, kind] += count
        return found


@dataclass(slots=True)
class _Entry:
    count: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    ranges: list[SeqRange] = field(default_factory=list)


_Key = tuple[Stage, str | None, int | None, str]


class LossBook:
    """Adds up losses by place and reason until they are taken."""

    def __init__(self) -> None:
        """Empty."""
        self._entries: dict[_Key, _Entry] = {}
        self._reasons = 0

    def __bool__(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self._entries)

    def add(self, lost: Lost) -> None:
        """Merge a loss with those before."""
        key = self._key(lost)
        entry = self._entries.setdefault(key, _Entry())
        entry.count += lost.count
        entry.kinds.update(lost.kinds)
        entry.ranges += lost.ranges
        if len(entry.ranges) > 2 * MOST_RANGES:
            entry.ranges = merged(entry.ranges)

    def take(self) -> list[Lost]:
        """All of them; the book is empty afterwards."""
        entries, self._entries, self._reasons = self._entries, {}, 0
        return [
            Lost(stage, reason, entry.count, entry.kinds, tuple(merged(entry.ranges)), ring, cpu)
            for (stage, ring, cpu, reason), entry in entries.items()
        ]

    def _key(self, lost: Lost) -> _Key:
        key = lost.stage, lost.ring, lost.cpu, lost.reason
        if lost.ring is None and key not in self._entries:
            if self._reasons >= MOST_REASONS:
                return lost.stage, None, None, OTHER_REASONS
            self._reasons += 1
        return key


class Owed:
    """What one sink has to be told, and what it was told and has not delivered yet.

    `refused`: it has dropped a loss record since it was last asked to take what is owed. It is
    asked again later and later.
    """

    def __init__(self) -> None:
        """Nothing."""
        self.refused = False
        self._seconds: int = 0
        self._backoff: int = 1
        self._book = LossBook()
        # Packed: a spool holds the records of an outage of days, of 1 to 17 kB for each second.
        self._told: deque[tuple[int, bytes]] = deque()

    def __bool__(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self._book)

    def add(self, lost: Lost) -> None:
        """It has to be told this as well."""
        self._book.add(lost)

    def tick(self) -> bool:
        """Called every second: whether it is to be told now."""
        self._seconds = max(self._seconds - 1, 0)
        return not self._seconds

    def take(self) -> list[Lost]:
        """What it is to be told now."""
        self.refused = False
        return self._book.take()

    def told(self, seqs: Iterable[int], lost: Iterable[Lost], under_way: int) -> None:
        """It is told these, in records of these numbers.

        Of those before, `under_way` are neither delivered nor dropped.
        """
        self._settle(under_way)
        self._told.extend(zip(seqs, map(_pack, lost), strict=True))

    def dropped(self, count: int, first: int, last: int) -> None:
        """It gave up so many loss records, with numbers from `first` to `last`: tell it again.

        Where others of these numbers are under way, the newest are taken for the ones.
        """
        self.refused = True
        self._seconds = self._backoff + 1
        self._backoff = min(2 * self._backoff, MOST_BACKOFF)
        gone = [told for told in self._told if first <= told[0] <= last][-count:]
        for told in gone:
            self._told.remove(told)
            self._book.add(_unpacked(told[1]))

    def untold(self, under_way: int) -> list[Lost]:
        """What it was never told, or never delivered; nothing is owed afterwards."""
        self._settle(under_way)
        while self._told:
            self._book.add(_unpacked(self._told.popleft()[1]))
        return self._book.take()

    def _settle(self, under_way: int) -> None:
        # What was dropped has been taken out, and the rest is delivered in order.
        while len(self._told) > under_way:
            self._told.popleft()
            self._backoff = 1


_LOST = msgspec.msgpack.Decoder(Lost)


def _pack(lost: Lost) -> bytes:
    return zlib.compress(msgspec.msgpack.encode(lost), 1)


def _unpacked(packed: bytes) -> Lost:
    return _LOST.decode(zlib.decompress(packed))


def merged(ranges: Iterable[SeqRange], most: int = MOST_RANGES) -> list[SeqRange]:
    """The same numbers in few ranges, in order; where they are too many, with what is between.

    At most `most` of them, or one for each ring and CPU if these are more.
    """
    joined: list[SeqRange] = []
    for one in sorted(ranges, key=lambda r: (*_place(r), r.seq_from)):
        if joined and _gap(joined[-1], one) <= 0:
            joined[-1] = _cover(joined[-1], one)
        else:
            joined.append(one)
    if len(joined) <= most:
        return joined
    gaps = sorted(
        (gap, i) for i, pair in enumerate(pairwise(joined), 1) if (gap := _gap(*pair)) < _ELSEWHERE
    )
    return _bridge(joined, {i for _, i in gaps[: len(joined) - most]})


_ELSEWHERE = float("inf")


def _gap(one: SeqRange, other: SeqRange) -> float:
    """How many numbers are between a range and a later one of the same ring and CPU."""
    if _place(one) != _place(other):
        return _ELSEWHERE
    return other.seq_from - one.seq_to - 1


def _cover(one: SeqRange, other: SeqRange) -> SeqRange:
    last, kinds = max(one.seq_to, other.seq_to), sum_of(one.kinds, other.kinds)
    return SeqRange(one.ring, one.cpu, one.seq_from, last, one.run_id, kinds)


def _place(one: SeqRange) -> tuple[str, int, str]:
    return one.ring, one.cpu, "" if one.run_id is UNSET else one.run_id


def _bridge(ranges: list[SeqRange], where: Container[int]) -> list[SeqRange]:
    """Join those at these places with the ones before them."""
    joined = ranges[:1]
    for i, one in enumerate(ranges[1:], 1):
        if i in where:
            joined[-1] = _cover(joined[-1], one)
        else:
            joined.append(one)
    return joined


class LossTotals:
    """All that was lost since the start, by stage, sink and kind.

    The kind is empty where it is not known, and the sink where it was not at one.
    """

    def __init__(self) -> None:
        """Nothing was lost yet."""
        self.counts: Counter[tuple[Stage, str, str]] = Counter()

    def add(self, lost: Lost, sink: str = "") -> None:
        """Count a loss."""
        for kind, count in lost.kinds.items():
            self.counts[lost.stage, sink, kind] += count
        if unknown := lost.count - sum(lost.kinds.values()):
            self.counts[lost.stage, sink, ""] += unknown


class LossLog:
    """Turns losses into few lines of a log: the first at once, then what came since, as a rate."""

    def __init__(self) -> None:
        """Nothing was logged yet."""
        self._since: dict[str, float] = {}
        self._counts: Counter[str] = Counter()

    def add(self, lost: Iterable[Lost], where: str = "") -> None:
        """Count losses; `where` is the name of the sink that had them."""
        for one in lost:
            ring = f" of {one.ring}" if one.ring else ""
            place = where or {"kernel": f"the kernel{ring}", "decode": "the decoder"}.get(
                one.stage, "the rings"
            )
            what = f"lost in {place}: {one.reason}"
            known = what in self._counts or what in self._since
            if not known and len(self._counts.keys() | self._since.keys()) >= MOST_REASONS:
                what = f"lost: {OTHER_REASONS}"
            self._counts[what] += one.count

    def forget(self, where: str) -> None:
        """Nothing is to be said of a place any more: it ended as it should."""
        for what in [what for what in self._counts if what.startswith(f"lost in {where}: ")]:
            del self._counts[what]

    def lines(self, now: float) -> list[str]:
        """What is to be logged at `now`, in seconds."""
        found = []
        for what, count in list(self._counts.items()):
            since = self._since.get(what)
            if since is not None and now - since < LOG_SECONDS:
                continue
            goes_on = since is not None and now - since < 2 * LOG_SECONDS
            rate = f", {count / (now - since):,.1f}/s," if since is not None and goes_on else ""
            found.append(f"{count:,} events{rate} {what}")
            self._since[what] = now
            del self._counts[what]
        self._since = {w: t for w, t in self._since.items() if now - t < 2 * LOG_SECONDS}
        return found
