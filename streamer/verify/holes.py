"""What a broker deleted before it could be read, and which numbers of a run those may have been.

Retention, compaction or a request to delete can overtake a reader. How many offsets that took is
known, and of which partition; what was there is not. Where all of a run goes by in one partition,
in order, its missing numbers can be there only if they were not settled before the hole, nor
taken well behind it. Else they may be any of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from streamer.verify.lanes import SETTLED_NS
from streamer.verify.numbers import MOST, Span
from streamer.verify.told import Place

DELETED = "deleted"
"""The stage of missing numbers that may have been there, or been told there."""

MOST_HOLES = 100
"""Holes of a run that are told apart; those behind them widen the last."""


class Hole:
    """So many offsets, between two records of a run or behind its last.

    Up to `floor` all numbers of a place were settled before it; numbers behind `ceiling` were
    taken when `SETTLED_NS` had gone by since. No ceiling: that is not known to have been.
    """

    __slots__ = ("ceiling", "floor", "lane", "offsets", "since_ns")

    def __init__(self, lane: str, offsets: int, floor: Mapping[Place, int]) -> None:
        """Just met."""
        self.lane = lane
        self.offsets = offsets
        self.floor = floor
        self.ceiling: Mapping[Place, int] | None = None
        self.since_ns: int | None = None
        """When the first heartbeat behind it was made, since boot."""

    def span_of(self, place: Place) -> Span | None:
        """Which numbers of a place may have been there, if any."""
        first = self.floor.get(place, 0) + 1
        last = MOST - 1 if self.ceiling is None else self.ceiling.get(place, 0)
        return (first, last) if first <= last else None


class Holes:
    """Those that one run has met."""

    def __init__(self) -> None:
        """None yet."""
        self._holes: list[Hole] = []
        self._passed: dict[str, int] = {}
        """Per lane, how many offsets were deleted in it by the last record of the run there."""

    def pass_by(
        self, lane: str, deleted: int, floor: Callable[[], Mapping[Place, int]] | None
    ) -> None:
        """A record of the run comes in a lane of which so many offsets were deleted by then.

        `floor` tells up to where the numbers of each place are settled; None: it is its first.
        """
        more = deleted - self._passed.get(lane, 0)
        self._passed[lane] = deleted
        if more > 0 and floor is not None:
            self._meet(lane, more, floor)

    def _meet(self, lane: str, offsets: int, floor: Callable[[], Mapping[Place, int]]) -> None:
        before = next((one for one in reversed(self._holes) if one.lane == lane), None)
        if before is None or (before.ceiling is not None and len(self._holes) < MOST_HOLES):
            self._holes.append(Hole(lane, offsets, floor()))
        else:
            before.offsets += offsets
            before.ceiling = before.since_ns = None

    def hear(self, lane: str, boot_ns: int, taken: Callable[[], Mapping[Place, int]]) -> None:
        """A heartbeat comes. `taken` tells the highest number of each place that is known."""
        for one in self._holes:
            if one.lane != lane or one.ceiling is not None:
                continue
            if one.since_ns is None:
                one.since_ns = boot_ns
            elif boot_ns - one.since_ns > SETTLED_NS:
                one.ceiling = taken()

    def is_behind(self, lane: str, deleted: int) -> bool:
        """Whether some were deleted in a lane, of so many, behind the last record of the run."""
        return deleted > self._passed.get(lane, 0)

    def between(self, lane: str) -> list[Hole]:
        """Those between two of its records."""
        return [one for one in self._holes if one.lane == lane]

    def behind(self, lane: str, deleted: int, floor: Mapping[Place, int]) -> Hole:
        """The one behind its last."""
        return Hole(lane, deleted - self._passed.get(lane, 0), floor)


def concerning(names: Iterable[str], deleted: Mapping[str, int]) -> dict[str, int]:
    """Of the lanes in which offsets were deleted those that records of a host may have been in.

    `names` are the lanes where it has any. All of a host in a topic is in one partition: where it
    has nothing in a topic, all may have been deleted, of any partition.
    """
    if not deleted:
        return {}
    lanes = frozenset(names)
    topics = {topic_of(lane) for lane in lanes}
    return {
        lane: offsets
        for lane, offsets in deleted.items()
        if lane in lanes or topic_of(lane) not in topics
    }


def topic_of(lane: str) -> str:
    """The topic of a lane that is a partition."""
    return lane.rpartition(", partition ")[0]
