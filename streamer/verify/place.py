"""The numbers of one ring and CPU of a run, as they come."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from streamer.verify import report
from streamer.verify.numbers import MOST, Numbers
from streamer.verify.records import Mark
from streamer.verify.told import Segment, Told

if TYPE_CHECKING:
    from streamer.verify.run import Run

OWN = "stream"
"""Stands for the ring of the stream's own records, in their ids."""

MOST_GAPS = 100
"""Ranges of unexplained numbers that are reported for each place."""

_KERNEL = ("kernel", "stop", "decode")
LAST = MOST - 1
"""Numbers are less."""

OUT_OF_RANGE = "its number is out of range"


class Track:
    """What is there of a ring and CPU.

    `next` is the number that is taken without a call: the one behind all others. It is -1 where
    every number has to be looked at: of the stream's own records, and behind a heartbeat.
    `ahead` is whether no number behind that of the first mark was there before it: an agent that
    finds no moment at which the account of a CPU closes tells one of before.
    """

    __slots__ = (
        "_end",
        "ahead",
        "bound_ns",
        "duplicates",
        "first_mark",
        "kinds",
        "lane",
        "late",
        "mark",
        "next",
        "older",
        "out_of_order",
        "own",
        "passed",
        "place",
        "run",
        "seen",
        "split",
        "watermark_ns",
    )

    def __init__(self, run: Run, place: tuple[str, int], lane: str) -> None:
        """`run` is whose it is; `lane` is where it was met first."""
        self.run = run
        self.place = place
        self.lane = lane
        self.own = place[0] == OWN
        self.split = False
        self.seen = Numbers()
        self.kinds: defaultdict[str, int] = defaultdict(int)
        self.next = -1
        self.duplicates = self.out_of_order = self.late = self.older = 0
        self.passed = 0
        self.watermark_ns = 0
        self.bound_ns = 0
        self.first_mark: Mark | None = None
        self.ahead = True
        self.mark: Mark | None = None

    def take(self, number: int, lane: str) -> bool:
        """Take a number that is not `next`. False: it was there. Raises ValueError: it is none."""
        if not 1 <= number < LAST:
            raise ValueError(OUT_OF_RANGE)
        self.sync()
        highest = self.seen.last
        if not self.seen.add(number):
            self.duplicates += 1
            return False
        if lane != self.lane:
            self.split = True  # no order is promised across partitions and topics
            self.bound_ns = 0
        if not self.split:
            self.out_of_order += number < highest
            self.late += number <= self.passed
        self._follow()
        return True

    def sync(self) -> None:
        """Note the numbers that were taken by `next` alone."""
        if self.next > 0:
            self.seen.extend_to(self.next)

    def pass_mark(self, mark: Mark, lane: str) -> None:
        """A heartbeat says how far this ring and CPU have come.

        Its watermark binds what follows in the same lane alone.
        """
        self.sync()
        if self.first_mark is None:
            self.first_mark, self.ahead = mark, self.seen.last <= mark.seq
        if self.mark is not None:
            self.mark.kinds = {}  # the last heartbeat's are asked for
        self.mark = mark
        self.passed = mark.read
        self.watermark_ns = max(self.watermark_ns, mark.watermark_ns)
        if lane == self.lane and not self.split:
            self.bound_ns = self.watermark_ns
        self._follow()

    def _follow(self) -> None:
        end = self.seen.last + 1
        self.next = end if len(self.seen) and end > self.passed and not self.own else -1


class Outcome:
    """What there is to say of a ring and CPU: its missing numbers, and what explains them."""

    def __init__(self, track: Track, first: int, settled: int, taken: int = 0) -> None:
        """Numbers from `first` on were to come; up to `settled` all is told that will be. Up to
        `taken` they were given to events, as the run after it says.
        """
        track.sync()
        self._track = track
        self._first = first
        self.settled = settled
        self.last = max(track.seen.last, settled, taken, first - 1)
        self.explained: Counter[str] = Counter()
        self.segments: list[Segment] = []
        self._contradicted: Counter[bool] = Counter()

    @property
    def missing(self) -> list[tuple[int, int]]:
        """The ranges that are not there."""
        return list(self._track.seen.missing(self._first, self.last))

    def explain(self, told: Told) -> list[tuple[int, int]]:
        """What is missing and not told exactly. Counts what is told exactly."""
        rest = Numbers(self.missing)
        for stage, places in told.exact.items():
            lost = places.get(self._track.place)
            if lost is None:
                continue
            for span in lost:
                for first, last in self._track.seen.common(*span):
                    self._contradicted[stage in _KERNEL] += last - first + 1
            left = Numbers()
            for span in rest:
                for one in lost.missing(*span):
                    left.add_span(*one)
            self.explained[stage] += rest.total - left.total
            rest = left
        return list(rest)

    def unused(self) -> int:
        """Numbers that were given up unused, as far as it is known."""
        mark, first = self._track.mark, self._track.first_mark
        if mark is None or first is None:
            return 0
        return mark.skipped - (first.skipped if self._first > 1 else 0)

    def reported(self, kinds: dict[str, report.Cell], *, killed: bool) -> report.Place:
        """All of it, with its `kinds`.

        What is not settled of a run that was `killed` is explained by that.
        """
        track = self._track
        recent = sum(s.left for s in self.segments if s.first > self.settled)
        open_ = [s for s in self.segments if s.left and s.first <= self.settled]
        if killed and recent:
            self.explained["killed"] += recent
        return report.Place(
            ring=track.place[0],
            cpu=track.place[1],
            first=self._first,
            last=self.last,
            events=track.seen.total,
            duplicates=track.duplicates,
            missing=sum(last - first + 1 for first, last in self.missing),
            explained={stage: n for stage, n in self.explained.items() if n},
            pending=0 if killed else recent,
            unexplained=sum(s.left for s in open_),
            gaps=[report.Span(s.first, s.last, s.left) for s in open_[:MOST_GAPS]],
            out_of_order=track.out_of_order,
            late=track.late,
            watermark_ns=track.watermark_ns,
            older_than_watermark=track.older,
            lost_but_there=self._contradicted[True],
            given_up_but_there=self._contradicted[False],
            kinds=kinds,
        )
