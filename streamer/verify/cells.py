"""The account of each ring, CPU and kind as heartbeats tell it: does it hold, and is that there?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from streamer.verify import report
from streamer.verify.place import Track
from streamer.verify.records import Cell, Heartbeat, Mark

_NONE: Cell = (0, 0, 0, 0, 0)


def tells(beat: Heartbeat) -> bool:
    """Whether it has that account: those of other releases may not."""
    return any(mark.kinds for mark in beat.marks)


def violations(beat: Heartbeat) -> Iterator[str]:
    """What in a heartbeat contradicts itself, in words without numbers."""
    for kind, one in beat.counts.items():
        if one.produced < one.filtered + one.shed + one.lost + one.read:
            yield f"{kind}: more filtered, shed, lost and read than was produced"
    for name, sink in beat.sink_counts.items():
        totals = sink.received, sink.delivered, sink.dropped
        if sink.received != sink.delivered + sink.dropped + sink.pending:
            yield f"{name}: received is not delivered + dropped + pending"
        if sink.kinds and tuple(map(sum, zip(*sink.kinds.values(), strict=True))) != totals:
            yield f"{name}: its kinds are not what it counts in all"
        for kind, (received, delivered, dropped) in sink.kinds.items():
            if received < delivered + dropped:
                yield f"{name}: more of {kind} delivered and dropped than received"
    if tells(beat):
        for mark in beat.marks:
            yield from _violations(mark)
        yield from _sums(beat)


def _violations(mark: Mark) -> Iterator[str]:
    place = f"{mark.ring} cpu {mark.cpu}"
    numbered = 0
    for kind, (produced, filtered, shed, lost, read) in mark.kinds.items():
        numbered += produced - filtered - shed
        if produced < filtered + shed + lost + read:
            yield f"{place}, {kind}: more filtered, shed, lost and read than was produced"
    if numbered != mark.seq - mark.skipped:
        yield f"{place}: the kinds are not as many as the numbers"


def _sums(beat: Heartbeat) -> Iterator[str]:
    found: dict[str, Cell] = {}
    for mark in beat.marks:
        for kind, cell in mark.kinds.items():
            a, b, c, d, e = found.get(kind, _NONE)
            found[kind] = a + cell[0], b + cell[1], c + cell[2], d + cell[3], e + cell[4]
    for kind, cell in found.items():
        one = beat.counts.get(kind)
        if one is None or cell != (one.produced, one.filtered, one.shed, one.lost, one.read):
            yield f"{kind}: the CPUs together are not what it counts in all"


def of_place(track: Track, *, complete: bool) -> dict[str, report.Cell]:
    """Each kind of a ring and CPU, by the last heartbeat and by what is there.

    `complete`: all that was read of them has to be there, or was given up.
    """
    cells: Mapping[str, Cell] = track.mark.kinds if track.mark is not None else {}
    return {
        kind: _cell(cells.get(kind, _NONE), track.kinds.get(kind, 0), complete)
        for kind in sorted(cells.keys() | track.kinds.keys())
    }


def _cell(counts: Cell, there: int, complete: bool) -> report.Cell:
    gone = max(counts[4] - there, 0) if complete else 0
    return report.Cell(*counts, there=there, given_up=gone)


def in_excess(place: report.Place) -> Iterator[str]:
    """Where more is there than was read, of a run that is there from its beginning to its end."""
    for kind, cell in place.kinds.items():
        if cell.there > cell.read:
            read = f"of {cell.read:,} that were read"
            yield f"{place.ring} cpu {place.cpu}, {kind}: {cell.there:,} are there, {read}"
