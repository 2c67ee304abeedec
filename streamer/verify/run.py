"""One run of the agent, as far as its records are there, and what there is to say of it."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from itertools import chain

from msgspec import structs

from streamer.events.summaries import SUMMARIES
from streamer.verify import cells, report
from streamer.verify.holes import DELETED, Hole, Holes, topic_of
from streamer.verify.lanes import SETTLED_NS, Lanes
from streamer.verify.numbers import MOST, Span
from streamer.verify.place import OWN, Outcome, Track
from streamer.verify.records import (
    Heartbeat,
    Line,
    Loss,
    Manifest,
    Mark,
    Previous,
    RunMark,
    SinkCell,
    SinkTotals,
)
from streamer.verify.shedding import Shedding
from streamer.verify.told import Place, Segment, Told, Vague, assign, cut, edges_of

MOST_BEATS = 16
"""Heartbeats that are kept until it is known how far the slowest lane has come."""

_NOTHING = SinkCell(0, 0, 0)

STEP_NS = 100_000_000
"""By so much at least the clock was set; by less a clock is slewed, and measured."""

MOST_BASES = 100
"""Heartbeats among which one is looked for that is ahead of all that is there."""

MOST_TRACKS = 1 << 18
"""Rings and CPUs of a run: there are two rings, and no more than 65,536 CPUs."""

MOST_WRONG = 100
"""Contradictions of heartbeats, and of them and what is there, that are told apart."""

MOST_STEPS = 100
"""Clock steps that are reported for a run."""

STALE_NS = 5_000_000_000
"""So long after the clock was set events may still go by how it was before: an agent looks once a
second, a slow one later. Its own records do not."""


class Run:
    """A run. Records of other releases may lack what is asked for here."""

    def __init__(self, run_id: str, line: Line, number: int = 0) -> None:
        """`line` is the first of its records; `number` says which of all runs was met first."""
        self.number = number
        self.run_id = run_id
        self.host = line.host
        self.boot_id = self.agent = ""
        self.tracks: dict[Place, Track] = {}
        self.offset = line.time_ns - line.boot_ns
        self.steps: list[report.ClockStep] = []
        self.steps_total = 0
        self._clocks = deque([(line.boot_ns, self.offset)], maxlen=MOST_STEPS)
        self.first_ns = self.last_ns = line.time_ns
        self.first_boot_ns = self.last_boot_ns = line.boot_ns
        self.lanes: dict[str, int] = {}
        """The newest of its records in each, in ns since boot."""
        self.told = Told()
        self.given_up_of = cells.GivenUp()
        self.given_up: Counter[str] = Counter()
        self.sinks: list[str] = []
        self.end: report.End = "open"
        self.silent = False
        self.heartbeats = 0
        self.longest_ns = 0
        self.last: Heartbeat | None = None
        self.wrong: Counter[str] = Counter()
        self.shedding = Shedding()
        self._base: tuple[Heartbeat, dict[str, int], Counter[str]] | None = None
        self._beats: list[tuple[int, Heartbeat]] = []
        self._ours: tuple[str, ...] = ()
        self._beat_ns = 0
        self._left: dict[Place, RunMark] = {}
        self._holes = Holes()

    @property
    def kinds(self) -> dict[str, int]:
        """How many there are of each kind."""
        found: defaultdict[str, int] = defaultdict(int)
        for track in self.tracks.values():
            for kind, count in track.kinds.items():
                found[kind] += count
        return found

    # ---------------------------------------------------------------- what comes

    def saw(self, line: Line) -> None:
        """Note the time of a record; not called for each."""
        self.first_ns = min(self.first_ns, line.time_ns)
        self.last_ns = max(self.last_ns, line.time_ns)
        self.first_boot_ns = min(self.first_boot_ns, line.boot_ns)
        self.last_boot_ns = max(self.last_boot_ns, line.boot_ns)

    def heard(self, line: Line, lane: str) -> None:
        """Note the time of a record, and where it was."""
        self.saw(line)
        self.lanes[lane] = max(self.lanes.get(lane, 0), line.boot_ns)

    def pass_holes(self, lane: str, deleted: int) -> None:
        """A record has come in a lane of which so many offsets were deleted by then."""
        met = lane in self.lanes
        self._holes.pass_by(lane, deleted, (lambda: self._settled_in(lane)) if met else None)

    def _settled_in(self, lane: str) -> dict[Place, int]:
        """Per place, up to which number all had come or was told, by its last record in a lane."""
        for boot_ns, beat in reversed(self._beats):
            if boot_ns + SETTLED_NS <= self.lanes[lane]:
                return {(mark.ring, mark.cpu): mark.read for mark in beat.marks}
        return {}

    def set_clock(self, line: Line) -> None:
        """The wall clock is another than before: it was set, or slewed."""
        offset = line.time_ns - line.boot_ns
        self.saw(line)
        if self._by_an_older_clock(line.boot_ns, offset):
            return
        step = offset - self.offset
        self.offset = offset
        if abs(step) >= STEP_NS:
            self._clocks.append((line.boot_ns, offset))
            self.steps_total += 1
            if len(self.steps) < MOST_STEPS:
                self.steps.append(report.ClockStep(line.boot_ns, line.time_ns, step))
        else:
            self._clocks[-1] = (self._clocks[-1][0], offset)

    def _by_an_older_clock(self, boot_ns: int, offset: int) -> bool:
        """Whether it was in force when that happened, or a moment before, and is no longer: the
        record has come late, or once more, or the agent had not looked yet.
        """
        until = [since for since, _ in self._clocks][1:]
        return any(
            boot_ns < ended + STALE_NS and abs(offset - known) < STEP_NS
            for (_, known), ended in zip(self._clocks, until, strict=False)
        )

    def take_manifest(self, manifest: Manifest, ours: tuple[str, ...] = ()) -> None:
        """What the run says of itself. `ours`: how the names of sinks end that are read.

        After a reload of its configuration it may have none of these any more, or have one again.
        """
        had, has = (
            any(one.endswith(ours) for one in sinks) for sinks in (self.sinks, manifest.sinks)
        )
        if ours and had and not has and self.end == "open":
            self.end = "left"
        elif has and self.end == "left":
            self.end = "open"
        self.agent = manifest.agent
        self._workers = manifest.workers
        self.sinks = manifest.sinks
        self._ours = ours

    def take_loss(self, loss: Loss) -> None:
        """What was lost. Kinds that have no number in a ring explain none."""
        numbered = loss.count
        if loss.stage == "sink":
            self.given_up.update(loss.kinds)
            numbered -= sum(n for kind, n in loss.kinds.items() if is_unnumbered(kind))
            self.given_up_of.take(loss)
        spans: defaultdict[Place, list[tuple[Place, Span]]] = defaultdict(list)
        counts = Counter[Place]()
        for one in loss.ranges:
            place = one.ring, one.cpu
            spans[place].append((place, (one.seq_from, one.seq_to)))
            counts[place] += sum(one.kinds.values())
        if spans and counts.total() == numbered:
            for place, ranges in spans.items():
                self.told.add(loss.stage, counts[place], ranges)
        elif spans:
            self.told.add(loss.stage, numbered, chain.from_iterable(spans.values()))
        elif loss.stage == "decode":
            self.told.add_anywhere(loss.stage, numbered)
        else:  # runs of programs that were left out, flows, summaries: they have no numbers
            self.told.counts[loss.stage] += loss.count

    def take_marks(self, marks: Iterable[RunMark]) -> None:
        """The run after it says how far it had come when it was killed, where it had a spool."""
        for one in marks:
            self._left[one.ring, one.cpu] = one

    def take_heartbeat(self, beat: Heartbeat, boot_ns: int, lane: str) -> None:
        """The account so far."""
        self.heartbeats += 1
        if self._beat_ns:
            self.longest_ns = max(self.longest_ns, boot_ns - self._beat_ns)
        self._beat_ns = max(self._beat_ns, boot_ns)
        self._check(beat)
        if self.last is not None and self.last.final and not beat.final:
            return  # from another lane, and older
        self.last = beat
        for mark in beat.marks:
            self._track(mark, lane).pass_mark(mark, lane)
        self._holes.hear(lane, boot_ns, self._all_numbers)
        if self._base is None and self.heartbeats <= MOST_BASES and self._is_ahead(beat):
            self._base = beat, self.kinds, self.given_up.copy()
        if beat.final and self.end == "open":
            self.end = "ended"
        self._beats.append((boot_ns, beat))
        if len(self._beats) > MOST_BEATS:
            del self._beats[self._least_missed()]

    def _is_ahead(self, beat: Heartbeat) -> bool:
        """Whether all that is there was read by then. What other workers have read, and the CPUs
        of which the account does not close, a heartbeat may know as of some time before.
        """
        read = {(mark.ring, mark.cpu): mark.read for mark in beat.marks}
        return all(
            track.own or track.seen.last <= read.get(place, 0)
            for place, track in self.tracks.items()
        )

    def _track(self, mark: Mark, lane: str) -> Track:
        place = mark.ring, mark.cpu
        if place not in self.tracks:
            if len(self.tracks) >= MOST_TRACKS:
                raise ValueError("there are too many rings and CPUs")
            self.tracks[place] = Track(self, place, lane)
        return self.tracks[place]

    def _least_missed(self) -> int:
        """Which heartbeat leaves the least gap, by its age: the older, the fewer are kept."""
        times = [boot_ns for boot_ns, _ in self._beats]
        gaps = [
            (after - before) / max(times[-1] - at, 1)
            for before, at, after in zip(times, times[1:], times[2:], strict=False)
        ]
        return 1 + gaps.index(min(gaps))

    def _settled(self, lanes: Lanes, *, complete: bool) -> Heartbeat | None:
        """The newest heartbeat all before which has come, or was told as lost.

        A heartbeat may be far ahead of events that go elsewhere. Those have come where each lane of
        the host has gone on for long enough; or where the heartbeat says that none is on its way,
        and all was read.
        """
        newest = {lane: self.lanes.get(lane, 0) for lane in lanes.names}
        reach = self.last_boot_ns if lanes.is_one else min(newest.values())
        for boot_ns, beat in reversed(self._beats):
            until = boot_ns + SETTLED_NS
            if until <= reach or (
                complete and until <= self.last_boot_ns and self._has_delivered(beat)
            ):
                return beat
        return None

    def _has_delivered(self, beat: Heartbeat) -> bool:
        """Whether the sink that is read has delivered, or given up, all that it had been given."""
        names = [name for name in beat.sink_counts if name.endswith(self._ours or ("",))]
        return bool(names) and all(
            self._has_settled(name, beat.sink_counts[name]) for name in names
        )

    def _has_settled(self, name: str, then: SinkTotals) -> bool:
        """By then; or by now: what delivers each kind in order (Kafka, by a single worker) has
        delivered as much of each as it had.
        """
        now = self.last.sink_counts.get(name) if self.last is not None else None
        if not then.pending or (now is not None and not now.pending):
            return True
        if now is None or not then.kinds or self._workers != 1:
            return False
        return all(
            now.kinds.get(kind, _NOTHING).delivered >= one.received - one.dropped
            for kind, one in then.kinds.items()
        )

    def _check(self, beat: Heartbeat) -> None:
        for what in cells.violations(beat):
            known = what in self.wrong or len(self.wrong) < MOST_WRONG
            self.wrong[what if known else "more contradictions"] += 1
        for name, sink in beat.sink_counts.items():
            sink.dropped_of = []
            if not (sink.pending and name.startswith("kafka")):  # see _has_settled
                sink.kinds = {}

    # ---------------------------------------------------------------- what there is to say

    def reported(
        self, lanes: Lanes, deleted: Mapping[str, int], *, whole: bool, complete: bool
    ) -> report.Run:
        """All of it, with the lanes of its host, and how many offsets were deleted in some.

        `whole`: nothing of the sources was left out at their beginning, and `complete`: at their
        end. Where it was, and there are several lanes, that a run has ended asks for nothing.
        """
        own = self.tracks.get((OWN, 0))
        linear = len(self.lanes) <= 1
        begun = own is not None and 1 in own.seen and (whole or linear)
        certain = complete or lanes.is_one
        over = certain and self.end in ("ended", "undelivered", "left")
        beat = self.last if over else self._settled(lanes, complete=complete)
        silent = certain and self.silent
        settled = self._all_numbers() if silent else self._marks(beat, linear)
        gone = list(self._gone(deleted, begun, linear))
        outcomes = self._explained(settled, gone, begun, linear)
        whole_account = begun and self._is_final
        places = [
            one.reported(self._cells(place, whole_account and over), killed=self.end == "killed")
            for place, one in outcomes.items()
        ]
        kinds = self._accounts(over, begun, linear)
        _excuse(kinds, outcomes.values(), sum(one.most for one in gone))
        return report.Run(
            run_id=self.run_id,
            boot_id=self.boot_id,
            agent=self.agent,
            whole=begun,
            end=self.end,
            first_ns=self.first_ns,
            last_ns=self.last_ns,
            events=sum(place.events for place in places),
            own=own.seen.total if own else 0,
            duplicates=sum(track.duplicates for track in self.tracks.values()),
            own_missing=_missing_of_own(own, begun),
            heartbeats=self.heartbeats,
            unexplained=sum(place.unexplained for place in places),
            pending=sum(place.pending for place in places),
            told={stage: n for stage, n in sorted(self.told.counts.items()) if n},
            places=places,
            kinds=kinds,
            clock_steps=self.steps,
            clock_steps_total=self.steps_total,
            shed_periods=self.shedding.periods,
            shed_periods_total=self.shedding.total,
            problems=list(self._problems(places, kinds, deleted, whole_account)),
        )

    def _cells(self, place: Place, complete: bool) -> dict[str, report.Cell]:
        track = self.tracks.get(place)
        if track is None:
            return {}
        return cells.of_place(track, self.given_up_of.at(place), complete=complete)

    @property
    def _is_final(self) -> bool:
        return self.last is not None and self.last.final

    def _explained(
        self,
        settled: Mapping[Place, int],
        gone: Iterable[Vague],
        begun: bool,
        linear: bool,
    ) -> dict[Place, Outcome]:
        outcomes: dict[Place, Outcome] = {}
        rest: dict[Place, list[tuple[int, int]]] = {}
        vague = list(self.told.vague)
        for place, track in sorted(self._tracks(begun).items()):
            if track.own:
                continue
            first = 1 if begun else _first(track, linear)
            taken = self._left[place].taken if place in self._left else 0
            outcome = outcomes[place] = Outcome(track, first, settled.get(place, 0), taken)
            rest[place] = outcome.explain(self.told)
            if unused := outcome.unused():
                vague.append(Vague("unused", unused, {place: ((first, outcome.last),)}))
        # Those that may be anywhere explain last what no other does.
        vague.sort(key=lambda one: one.spans is None)
        vague += gone
        segments: list[Segment] = []
        edges = edges_of(vague)
        for place, outcome in outcomes.items():
            cuts = edges.get(place, ())
            outcome.segments = list(cut(place, rest[place], cuts, outcome.settled))
            segments += outcome.segments
        for place, counts in assign(segments, vague).items():
            outcomes[place].explained.update(counts)
        return outcomes

    def _gone(self, deleted: Mapping[str, int], begun: bool, linear: bool) -> Iterable[Vague]:
        """What may have been in holes: as many as there were offsets.

        Or more, where a loss may have been told in one: how many numbers that explained is unknown.
        """
        places = [place for place, track in self._tracks(begun).items() if not track.own]
        for lane, offsets in deleted.items():
            if linear and self._has_ended_beside(lane):
                continue
            untold = self._may_lack_own(lane, offsets, begun)
            if not linear or lane not in self.lanes:
                yield Vague(DELETED, MOST if untold else offsets, None)
                continue
            for hole in self._holes_in(lane, offsets):
                spans = {place: (span,) for place in places if (span := hole.span_of(place))}
                yield Vague(DELETED, MOST if untold else hole.offsets, spans)

    def _has_ended_beside(self, lane: str) -> bool:
        """Whether its last is in another partition of that topic. A host is moved to one that is
        new, where a topic gets more, and not back.
        """
        topics = map(topic_of, self.lanes)
        return self._is_final and lane not in self.lanes and topic_of(lane) in topics

    def _holes_in(self, lane: str, deleted: int) -> list[Hole]:
        holes = self._holes.between(lane)
        if self._goes_on_behind(lane, deleted):
            holes.append(self._holes.behind(lane, deleted, self._settled_in(lane)))
        return holes

    def _goes_on_behind(self, lane: str, deleted: int) -> bool:
        """Whether more of it may have been in a lane behind its last record there."""
        return not self._is_final and self._holes.is_behind(lane, deleted)

    def _may_lack_own(self, lane: str, deleted: int, begun: bool) -> bool:
        """Whether a record of the stream itself may have been among what was deleted in a lane."""
        own = self.tracks.get((OWN, 0))
        if own is None or not self._is_of_own(lane):
            return own is None
        return self._goes_on_behind(lane, deleted) or _missing_of_own(own, begun) > 0

    def _is_of_own(self, lane: str) -> bool:
        """Whether records of the stream itself may be in a lane."""
        own = self.tracks.get((OWN, 0))
        return own is None or own.split or lane == own.lane

    def _may_lack_end(self, deleted: Mapping[str, int]) -> bool:
        """Whether its end, or what the run after it says of it, may have been deleted."""
        return any(
            self._is_of_own(lane) and self._holes.is_behind(lane, offsets)
            for lane, offsets in deleted.items()
        )

    def _tracks(self, begun: bool) -> dict[Place, Track]:
        """Also those of which nothing came before it was killed, if its beginning is there."""
        unseen = [place for place in self._left if place not in self.tracks] if begun else ()
        return self.tracks | {place: Track(self, place, "") for place in unseen}

    def _all_numbers(self) -> dict[Place, int]:
        return {place: _most(track) for place, track in self.tracks.items()}

    def _marks(self, beat: Heartbeat | None, linear: bool) -> dict[Place, int]:
        """Per place, up to which number all is told: as that heartbeat says, or the next run."""
        safe: dict[Place, int] = {}
        if self.last is not None:
            # Behind the last heartbeat nobody knows how many numbers were given up unused.
            read = {(m.ring, m.cpu): m.read for m in self.last.marks}
            safe = {place: min(one.seq, read.get(place, 0)) for place, one in self._left.items()}
        if beat is None:
            return safe
        told = {(m.ring, m.cpu): m.seq if beat.final else m.read for m in beat.marks}
        if not linear:  # a heartbeat is ahead of events that wait for another topic or partition
            return told | safe
        return {place: max(told.get(place, 0), safe.get(place, 0)) for place in told | safe}

    def _accounts(self, over: bool, begun: bool, linear: bool) -> dict[str, report.Account]:
        counts = self.last.counts if self.last is not None else {}
        found: dict[str, report.Account] = {}
        events = {k: n for k, n in self.kinds.items() if not k.startswith("stream.")}
        for kind in sorted(counts.keys() | events.keys()):
            one = counts.get(kind)
            there, given_up = events.get(kind, 0), self.given_up[kind]
            missing = 0
            if one is not None and over and self._is_final:
                missing = self._missing_of_kind(kind, one.read, there, begun, linear)
            found[kind] = report.Account(
                produced=one.produced if one else 0,
                filtered=one.filtered if one else 0,
                shed=one.shed if one else 0,
                lost=one.lost if one else 0,
                read=one.read if one else 0,
                there=there,
                given_up=given_up,
                missing=max(missing, 0),
            )
        return found

    def _missing_of_kind(self, kind: str, read: int, there: int, begun: bool, linear: bool) -> int:
        given_up = self.given_up[kind]
        if begun:
            return read - there - given_up
        if self._base is None or not linear:
            return 0
        beat, then, given_up_then = self._base
        before = beat.counts[kind].read if kind in beat.counts else 0
        since = there - then.get(kind, 0)
        return read - before - since - (given_up - given_up_then[kind])

    def _problems(
        self,
        places: Iterable[report.Place],
        kinds: dict[str, report.Account],
        deleted: Mapping[str, int],
        complete: bool,
    ) -> Iterable[str]:
        unexplained = sum(one.unexplained for one in places)
        if unexplained:
            yield f"{unexplained:,} missing and unexplained"
        for kind, account in kinds.items():
            if account.missing:
                yield f"{kind}: {account.missing:,} were read, and are neither there nor given up"
            if complete and account.there > account.read:
                yield f"{kind}: {account.there:,} are there, of {account.read:,} that were read"
        if complete and self.last is not None and cells.tells(self.last):
            wrong = [what for place in places for what in cells.in_excess(place)]
            if not deleted:
                unknown = self.given_up_of.elsewhere
                wrong += [what for place in places for what in cells.not_given_up(place, unknown)]
            yield from wrong[:MOST_WRONG]
            if len(wrong) > MOST_WRONG:
                yield f"so it is of {len(wrong) - MOST_WRONG:,} more of a ring, CPU and kind"
        for kind, told in self.shedding.shed.items() if complete else ():
            counted = kinds[kind].shed if kind in kinds else 0
            if told > counted:
                yield f"{kind}: {told:,} are told as shed, of {counted:,} that were counted"
        if there := sum(one.lost_but_there for one in places):
            yield f"{there:,} are there, and were told as lost in the kernel"
        if older := sum(one.older_than_watermark for one in places):
            yield f"{older:,} are older than a watermark before them"
        for what, beats in self.wrong.items():
            yield f"in {beats:,} heartbeats: {what}"
        if self.end == "open" and self.silent and not self._may_lack_end(deleted):
            yield "it has no end, and nobody says what became of it"


def _excuse(kinds: dict[str, report.Account], outcomes: Iterable[Outcome], offsets: int) -> None:
    """What may have been in holes is not missing of a kind: no more than there are numbers missing
    for it, or, of what has no number of a ring, than there were `offsets`.
    """
    room = {True: offsets, False: sum(one.explained[DELETED] for one in outcomes)}
    for kind, account in kinds.items():
        unnumbered = is_unnumbered(kind)
        excused = min(account.missing, room[unnumbered])
        room[unnumbered] -= excused
        kinds[kind] = structs.replace(account, missing=account.missing - excused)


def is_unnumbered(kind: str) -> bool:
    """Whether events of the kind have no number of a ring: the agent makes them."""
    return kind in SUMMARIES or kind.startswith("stream.")


def _first(track: Track, linear: bool) -> int:
    """Of a run whose beginning is not there: the first number that has to be there."""
    track.sync()
    seen = track.seen.first
    if track.first_mark is None or not (linear and track.ahead):
        return seen or (track.mark.seq + 1 if track.mark else 1)
    # Not from `read` on: what was lost behind it may have been told before the heartbeat.
    return min(seen or track.first_mark.seq + 1, track.first_mark.seq + 1)


def _most(track: Track) -> int:
    track.sync()
    return max(track.seen.last, track.mark.seq if track.mark else 0)


def _missing_of_own(own: Track | None, begun: bool) -> int:
    if own is None:
        return 0
    first = 1 if begun else own.seen.first
    return own.seen.last - first + 1 - own.seen.total


def previous_of(runs: Mapping[str, Run], previous: Previous) -> None:
    """Note, of the run that a manifest tells of, how it ended."""
    before = runs.get(previous.run_id)
    if before is not None and before.end == "left":
        return
    if before is not None and previous.ended in ("undelivered", "killed"):
        before.end = "killed" if previous.ended == "killed" else "undelivered"
    elif before is not None and before.end == "open" and previous.ended == "delivered":
        before.end = "ended"
