"""The account of each ring, CPU and kind as heartbeats tell it: does it hold, and is that there?"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from msgspec.structs import asdict, astuple

from streamer.verify import report
from streamer.verify.place import Track
from streamer.verify.records import Cell, Counts, Heartbeat, Loss, Mark, SinkTotals
from streamer.verify.told import Place

MOST_NAME = 64
"""Characters of a name in words: whoever writes to a topic may give things longer ones."""

MOST_PLACES = 1 << 17
"""Rings and CPUs, each of which a topic can have."""

_NONE = Cell(0, 0, 0, 0, 0)


def tells(beat: Heartbeat) -> bool:
    """Whether it has that account: those of other releases may not."""
    return any(mark.kinds for mark in beat.marks)


def violations(beat: Heartbeat) -> Iterator[str]:
    """What in a heartbeat contradicts itself, in words without numbers."""
    for kind, one in beat.counts.items():
        if _is_overfull(one):
            yield f"{brief(kind)}: more filtered, shed, lost and read than was produced"
    for name, sink in beat.sink_counts.items():
        if sink.received != sink.delivered + sink.dropped + sink.pending:
            yield f"{brief(name)}: received is not delivered + dropped + pending"
        yield from _of_sink(brief(name), sink)
    if tells(beat):
        for mark in beat.marks:
            yield from _of_mark(mark)
        yield from _sums(beat)


def _of_sink(name: str, sink: SinkTotals) -> Iterator[str]:
    for kind, one in sink.kinds.items():
        if one.received < one.delivered + one.dropped:
            yield f"{name}: more of {brief(kind)} delivered and dropped than received"
    dropped: Counter[str] = Counter()
    for place in sink.dropped_of:
        dropped.update(place.kinds)
    for kind, count in dropped.items():
        if kind not in sink.kinds or count > sink.kinds[kind].dropped:
            yield f"{name}: more of {brief(kind)} dropped on the CPUs than in all"
    found = (sum(every) for every in zip(*map(astuple, sink.kinds.values()), strict=True))
    if sink.kinds and tuple(found) != (sink.received, sink.delivered, sink.dropped):
        yield f"{name}: its kinds are not what it counts in all"


def _of_mark(mark: Mark) -> Iterator[str]:
    place = f"{brief(mark.ring)} cpu {mark.cpu}"
    numbered = 0
    for kind, one in mark.kinds.items():
        numbered += one.produced - one.filtered - one.shed
        if _is_overfull(one):
            yield f"{place}, {brief(kind)}: more filtered, shed, lost and read than was produced"
    if numbered != mark.seq - mark.skipped:
        yield f"{place}: the kinds are not as many as the numbers"


def brief(name: str) -> str:
    """As much of a name as is repeated."""
    return name[:MOST_NAME]


def _is_overfull(one: Counts) -> bool:
    return one.produced < one.filtered + one.shed + one.lost + one.read


def _sums(beat: Heartbeat) -> Iterator[str]:
    found: defaultdict[str, list[Cell]] = defaultdict(list)
    for mark in beat.marks:
        for kind, cell in mark.kinds.items():
            found[kind].append(cell)
    for kind, cells in found.items():
        sums = tuple(sum(every) for every in zip(*map(astuple, cells), strict=True))
        if kind not in beat.counts or sums != astuple(beat.counts[kind]):
            yield f"{brief(kind)}: the CPUs together are not what it counts in all"


class GivenUp:
    """What a run told as given up by a sink, per ring, CPU and kind."""

    def __init__(self) -> None:
        """Nothing."""
        self.elsewhere: Counter[str] = Counter()
        """Per kind, that of which it was not said where it was read."""
        self._at: dict[Place, Counter[str]] = {}

    def take(self, loss: Loss) -> None:
        """A loss of the stage `sink`. What it says of more than it has in all is not taken."""
        left = Counter(loss.kinds)
        for one in loss.ranges:
            left.subtract(one.kinds)
        if min(left.values(), default=0) < 0:
            self.elsewhere.update(loss.kinds)
            return
        self.elsewhere.update(+left)
        for one in loss.ranges:
            place = one.ring, one.cpu
            if place in self._at or len(self._at) < MOST_PLACES:
                self._at.setdefault(place, Counter()).update(one.kinds)
            else:
                self.elsewhere.update(one.kinds)

    def at(self, place: Place) -> Mapping[str, int]:
        """Per kind, of a ring and CPU."""
        return self._at.get(place, {})


def of_place(
    track: Track, given_up: Mapping[str, int], *, complete: bool
) -> dict[str, report.Cell]:
    """Each kind of a ring and CPU, by the last heartbeat and by what is there.

    `complete`: all that was read of them is there, was given up, or is missing.
    """
    cells: Mapping[str, Cell] = track.mark.kinds if track.mark is not None else {}
    found = {}
    for kind in sorted(cells.keys() | track.kinds.keys()):
        counts, there = cells.get(kind, _NONE), track.kinds.get(kind, 0)
        gone = max(counts.read - there, 0) if complete else 0
        found[kind] = report.Cell(
            **asdict(counts), there=there, not_there=gone, given_up=given_up.get(kind, 0)
        )
    return found


def in_excess(place: report.Place) -> Iterator[str]:
    """Where more is there than was read, of a run that is there from its beginning to its end."""
    for kind, cell in place.kinds.items():
        if cell.there > cell.read:
            read = f"of {cell.read:,} that were read"
            where = f"{brief(place.ring)} cpu {place.cpu}, {brief(kind)}"
            yield f"{where}: {cell.there:,} are there, {read}"


def not_given_up(place: report.Place, elsewhere: Mapping[str, int]) -> Iterator[str]:
    """Where more is away than was told as given up there, of such a run.

    `elsewhere`: of that many of a kind it was not said where they were given up. Less may be away:
    a broker can have had what a sink gave up.
    """
    for kind, cell in place.kinds.items():
        away = cell.not_there - cell.given_up
        if away > elsewhere.get(kind, 0) and not place.unexplained:
            where = f"{brief(place.ring)} cpu {place.cpu}, {brief(kind)}"
            yield f"{where}: {cell.not_there:,} are not there, {cell.given_up:,} were given up"
