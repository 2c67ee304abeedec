"""What the stream told as lost, and which missing numbers that explains.

A loss that names as many numbers as were lost explains just these. One that names more (ranges
that were joined, or a batch of which a part was given up) explains so many of them, and which
is not known: they are assigned so that as few as possible remain, which is a flow problem.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from streamer.verify.numbers import Numbers, Span

Place = tuple[str, int]
"""A ring and a CPU."""


class Vague(NamedTuple):
    """So many of these numbers were lost. Without `spans` they may be any of the run."""

    stage: str
    most: int
    spans: Mapping[Place, tuple[Span, ...]] | None


class Segment:
    """Missing numbers of one place; `left` of them are not explained."""

    __slots__ = ("first", "last", "left", "place")

    def __init__(self, place: Place, first: int, last: int) -> None:
        """None is explained yet."""
        self.place = place
        self.first = first
        self.last = last
        self.left = last - first + 1


class Told:
    """All that was told of one run."""

    def __init__(self) -> None:
        """Nothing."""
        self.exact: dict[str, dict[Place, Numbers]] = {}
        """Per stage and place, numbers that were lost for certain."""
        self.vague: list[Vague] = []
        self.counts: Counter[str] = Counter()
        """How many were told lost, per stage."""

    def add(self, stage: str, count: int, spans: Iterable[tuple[Place, Span]]) -> None:
        """So many numbers of these ranges were lost: all of them, if they are no more."""
        self.counts[stage] += count
        by_place: dict[Place, Numbers] = {}
        for place, (first, last) in spans:
            if first <= last:
                by_place.setdefault(place, Numbers()).add_span(first, last)
        if not by_place or count <= 0:
            return
        if sum(numbers.total for numbers in by_place.values()) <= count:
            known = self.exact.setdefault(stage, {})
            for place, numbers in by_place.items():
                ours = known.setdefault(place, Numbers())
                for span in numbers:
                    ours.add_span(*span)
        else:
            self.vague.append(Vague(stage, count, {p: tuple(n) for p, n in by_place.items()}))

    def add_anywhere(self, stage: str, count: int) -> None:
        """So many numbers of the run were lost, and nobody knows which."""
        self.counts[stage] += count
        self.vague.append(Vague(stage, count, None))


def edges_of(vague: Iterable[Vague]) -> Mapping[Place, set[int]]:
    """Per place, where ranges of these begin, and where they have ended."""
    found: defaultdict[Place, set[int]] = defaultdict(set)
    for one in vague:
        for place, spans in (one.spans or {}).items():
            for first, last in spans:
                found[place] |= {first, last + 1}
    return found


def cut(place: Place, spans: Iterable[Span], edges: Iterable[int], at: int) -> Iterator[Segment]:
    """Missing numbers in segments, cut at these edges: see `edges_of`.

    And on one side of `at`: up to it, or above.
    """
    ordered = deque(sorted({*edges, at + 1}))
    for first, last in spans:
        while ordered and ordered[0] <= first:
            ordered.popleft()
        while ordered and ordered[0] <= last:
            yield Segment(place, first, ordered[0] - 1)
            first = ordered.popleft()
        yield Segment(place, first, last)


def assign(segments: list[Segment], vague: list[Vague]) -> dict[Place, Counter[str]]:
    """Explain as many missing numbers as can be: lowers `left`. How many, per place and stage.

    In the order of `vague` each takes the lowest numbers that it can, which leaves none as a
    rule; for what is left, others are assigned anew.
    """
    flow = _Flow(segments, vague)
    flow.take_in_order()
    flow.augment()
    found: dict[Place, Counter[str]] = {}
    for (loss, segment), count in flow.given.items():
        if count:
            place = segments[segment].place
            found.setdefault(place, Counter())[vague[loss].stage] += count
    return found


class _Flow:
    """From losses, each of which can explain so many, to the segments that it may explain."""

    def __init__(self, segments: list[Segment], vague: list[Vague]) -> None:
        self.segments = segments
        self.room = [one.most for one in vague]
        self.given: Counter[tuple[int, int]] = Counter()
        self._takes: list[list[int]] = [[] for _ in vague]
        self._givers: list[list[int]] = [[] for _ in segments]
        by_place: dict[Place, list[int]] = {}
        for i, segment in enumerate(segments):
            by_place.setdefault(segment.place, []).append(i)
        for loss, one in enumerate(vague):
            for i in _within(one, by_place, segments):
                self._takes[loss].append(i)
                self._givers[i].append(loss)

    def take_in_order(self) -> None:
        for loss, takes in enumerate(self._takes):
            for i in takes:
                if not self.room[loss]:
                    break
                self._give(loss, i, min(self.room[loss], self.segments[i].left))

    def augment(self) -> None:
        for i, segment in enumerate(self.segments):
            while segment.left and self._find_path(i):
                pass

    def _give(self, loss: int, segment: int, count: int) -> None:
        self.given[loss, segment] += count
        self.room[loss] -= count
        self.segments[segment].left -= count

    def _find_path(self, target: int) -> bool:
        """Have another loss explain what the one that could explain `target` explains now."""
        came: dict[int, tuple[int, int]] = {}  # of a segment: for which one, by which loss
        queue, seen = deque([target]), {target}
        asked: set[int] = set()
        while queue:
            segment = queue.popleft()
            for loss in self._givers[segment]:
                if self.room[loss]:
                    self._shift(target, segment, loss, came)
                    return True
                if loss in asked:
                    continue
                asked.add(loss)
                for other in self._takes[loss]:
                    if self.given[loss, other] and other not in seen:
                        seen.add(other)
                        came[other] = segment, loss
                        queue.append(other)
        return False

    def _shift(self, target: int, end: int, spare: int, came: dict[int, tuple[int, int]]) -> None:
        steps = []
        segment = end
        while segment != target:
            before, loss = came[segment]
            steps.append((segment, before, loss))
            segment = before
        count = min(
            self.room[spare],
            self.segments[target].left,
            *(self.given[loss, segment] for segment, _, loss in steps),
        )
        for segment, before, loss in steps:
            self.given[loss, segment] -= count
            self.given[loss, before] += count
        self.given[spare, end] += count
        self.room[spare] -= count
        self.segments[target].left -= count


def _within(
    loss: Vague, by_place: Mapping[Place, list[int]], segments: list[Segment]
) -> Iterator[int]:
    """The segments that a loss may explain, ascending in each place."""
    if loss.spans is None:
        for found in by_place.values():
            yield from found
        return
    for place, spans in loss.spans.items():
        own = by_place.get(place, [])
        at = 0
        for first, last in spans:
            while at < len(own) and segments[own[at]].last < first:
                at += 1
            while at < len(own) and segments[own[at]].last <= last:
                yield own[at]
                at += 1
