"""Takes records in and says what is missing: pure, no I/O, time is in the records.

Memory grows with hosts, runs, CPUs, gaps and losses told, and not with events.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from streamer import __version__
from streamer.verify import report
from streamer.verify.holes import concerning
from streamer.verify.lanes import Lanes
from streamer.verify.place import LAST, OUT_OF_RANGE, OWN, Track
from streamer.verify.records import (
    Chunk,
    Heartbeat,
    Line,
    Loss,
    Malformed,
    Manifest,
    Previous,
    Range,
    Shed,
    decode,
    decode_own,
    pieces,
)
from streamer.verify.run import Run, is_unnumbered, previous_of
from streamer.verify.silent_runs import SilentRuns

MOST_BAD = 10
"""Malformed records that are quoted."""

MOST_RUNS = 100_000
"""Runs, by far more than a topic of thousands of hosts holds: whoever writes more is no agent."""

_CPUS = 65536
_MOST_NAME = 255
"""Characters of an id, or of a host's name: what is kept of each run and place."""


def by_run(loss: Loss) -> Iterator[tuple[str, Loss]]:
    """A loss, of each run whose numbers it names; "" is the one that tells it.

    Out of its spool a run can lose what one before it had read. Where it names several runs and
    does not say how many were lost of which, each may have been as many as it has numbers.
    """
    runs: defaultdict[str, list[Range]] = defaultdict(list)
    for one in loss.ranges:
        runs[one.run_id].append(one)
    if len(runs) < 2:
        yield next(iter(runs), ""), loss
        return
    numbered = Counter({kind: n for kind, n in loss.kinds.items() if not is_unnumbered(kind)})
    known = numbered.total() > 0 and _kinds_of(loss.ranges) == numbered
    for run_id, ranges in sorted(runs.items()):
        kinds = _kinds_of(ranges) if known else numbered
        numbers = sum(one.seq_to - one.seq_from + 1 for one in ranges)
        count = kinds.total() if known else min(numbered.total() or loss.count, numbers)
        yield run_id, Loss(loss.stage, count, kinds, ranges, loss.sink)


def _kinds_of(ranges: Iterable[Range]) -> Counter[str]:
    found = Counter[str]()
    for one in ranges:
        found.update(one.kinds)
    return found


class Ledger:
    """What has come so far, by host and run."""

    def __init__(self, sinks: Iterable[str] = ()) -> None:
        """`sinks`: how the names end that the agents have for the sinks that are read."""
        self.records = self.bytes = self.malformed = 0
        self._sinks = tuple(sinks)
        self._runs: dict[str, Run] = {}
        self._tracks: dict[str, Track] = {}
        self._bad: list[report.Bad] = []
        self._previous: dict[str, tuple[Previous, set[str]]] = {}
        self._untold: list[tuple[str, Loss]] = []
        self._untold_known: set[str] = set()
        self._deleted: dict[str, int] = {}
        """Per lane, offsets that were deleted before they could be read, so far."""

    @property
    def events(self) -> int:
        """Events that are there, each counted once."""
        return sum(sum(run.kinds.values()) for run in self._runs.values())

    def feed(self, chunk: Chunk) -> None:
        """Take records in. One that is none is counted."""
        if chunk.deleted:
            self._deleted[chunk.lane] = self._deleted.get(chunk.lane, 0) + chunk.deleted
        for piece in pieces(chunk):
            self._feed(piece)

    def _feed(self, chunk: Chunk) -> None:
        lines, raw, malformed = decode(chunk)
        self.records += len(lines) + len(malformed)
        self.bytes += (
            len(chunk.data) if isinstance(chunk.data, bytes) else sum(map(len, chunk.data))
        )
        for bad in malformed:
            self._refuse(bad)
        lane, tracks = chunk.lane, self._tracks
        deleted = self._deleted.get(lane, 0)
        last: Run | None = None
        newest = None
        # Half a million events a second are to come through here.
        for index, line in enumerate(lines):
            key, _, number = line.id.rpartition("-")
            try:
                seq = int(number)
                track = tracks.get(key) or self._track(key, seq, line, lane)
                if seq == track.next:
                    track.next = seq + 1
                elif track.own:
                    self._take_own(track, seq, line, raw(index), lane)
                    continue
                elif not track.take(seq, lane):
                    continue
            except ValueError as error:
                self._refuse(Malformed(chunk.where, f"{error}: {line.event[:60]} {line.id[:60]}"))
                continue
            run = track.run
            track.kinds[line.event] += 1
            if line.time_ns - line.boot_ns != run.offset:
                run.set_clock(line)
            if line.boot_ns < track.bound_ns:
                track.older += 1
            if run is not last:
                if last is not None and newest is not None:
                    last.heard(newest, lane)
                if deleted:
                    run.pass_holes(lane, deleted)
                run.heard(line, lane)
                last = run
            newest = line
        if last is not None and newest is not None:
            last.heard(newest, lane)

    def _refuse(self, bad: Malformed) -> None:
        self.malformed += 1
        if len(self._bad) < MOST_BAD:
            self._bad.append(report.Bad(bad.where, bad.reason))

    def _track(self, key: str, seq: int, line: Line, lane: str) -> Track:
        if not 1 <= seq < LAST:
            raise ValueError(OUT_OF_RANGE)
        if max(len(line.host), len(key)) > _MOST_NAME:
            raise ValueError("it has a longer name than any")
        run_id, _, rest = key.partition("-")
        ring, _, cpu = (rest, "", "0") if rest == OWN else rest.rpartition("-")
        if not (run_id and ring and cpu.isascii() and cpu.isdecimal() and int(cpu) < _CPUS):
            raise ValueError("its id is none of an event")
        run = self._runs.get(run_id)
        if run is None:
            if len(self._runs) >= MOST_RUNS:
                raise ValueError("there are too many runs")
            run = self._runs[run_id] = Run(run_id, line, len(self._runs))
        place = ring, int(cpu)
        track = run.tracks.get(place)
        if track is None:
            track = run.tracks[place] = Track(run, place, lane)
        self._tracks[key] = track
        return track

    def _take_own(self, track: Track, seq: int, line: Line, raw: bytes, lane: str) -> None:
        """A record of the stream itself. Raises ValueError: it is none."""
        own, record = decode_own(line.event, raw)
        if not track.take(seq, lane):
            return
        run = track.run
        run.boot_id = own.boot_id or run.boot_id
        track.kinds[line.event] += 1
        if line.time_ns - line.boot_ns != run.offset:
            run.set_clock(line)
        if deleted := self._deleted.get(lane, 0):
            run.pass_holes(lane, deleted)
        run.heard(line, lane)
        if isinstance(record, Manifest):
            run.take_manifest(record, self._sinks)
            if record.previous is not None:
                self._take_previous(run, record.previous)
        elif isinstance(record, Heartbeat):
            run.take_heartbeat(record, line.boot_ns, lane)
        elif isinstance(record, Shed):
            run.shedding.take(record)
        elif isinstance(record, Loss):
            for run_id, part in by_run(record):
                if run_id:
                    self._untold.append((run_id, part))
                else:
                    run.take_loss(part)

    def _take_previous(self, run: Run, previous: Previous) -> None:
        ours = self._sinks_of(run)
        self._previous.setdefault(run.run_id, (previous, ours or {*run.sinks}))
        for one in previous.untold:
            known = repr(one)
            if known not in self._untold_known and (not ours or one.sink in ours | {""}):
                self._untold_known.add(known)
                self._untold += ((run_id or one.run_id, part) for run_id, part in by_run(one))

    def _sinks_of(self, run: Run) -> set[str]:
        """Which of its sinks are read, as far as that is known."""
        return {name for name in run.sinks if name.endswith(self._sinks)} if self._sinks else set()

    def reported(
        self,
        sources: Iterable[str] = (),
        *,
        whole: bool = True,
        complete: bool = True,
        ended: bool = False,
    ) -> report.VerifyReport:
        """What there is to say. `sources` are named in it.

        `whole`: nothing was left out at the beginning of any. `complete`: nor at the end, as it was
        when reading began, or later. `ended`: no agent runs any more, so that what is missing will
        not be explained.
        """
        self._tell_untold()
        hosts: dict[str, list[Run]] = {}
        for run in sorted(self._runs.values(), key=lambda run: run.first_ns):
            hosts.setdefault(run.host, []).append(run)
        for previous, _ in self._previous.values():
            previous_of(self._runs, previous)
        lanes = {host: Lanes(runs) for host, runs in hosts.items()}  # once all ends are known
        deleted = {host: concerning(one.names, self._deleted) for host, one in lanes.items()}
        for run_id, (previous, sinks) in self._previous.items():
            before, teller = self._runs.get(previous.run_id), self._runs[run_id]
            if before is None or previous.ended != "killed" or not previous.marks:
                continue
            if len(sinks) != 1:  # of several nobody knows which it is
                continue
            if ended or lanes[teller.host].has_replayed(teller):
                before.take_marks(one for one in previous.marks if one.sink in sinks)
        for runs in hosts.values():
            silent = SilentRuns(runs)
            for run in runs:
                run.silent = run.end == "open" and (ended or silent.has(run))
        told = {
            host: report.Host(
                len(runs) - 1,
                [
                    run.reported(lanes[host], deleted[host], whole=whole, complete=complete)
                    for run in runs
                ],
            )
            for host, runs in sorted(hosts.items())
        }
        return self._summed(told, list(sources), complete)

    def _tell_untold(self) -> None:
        rest = []
        for run_id, loss in self._untold:
            run = self._runs.get(run_id)
            if run is not None:
                run.take_loss(loss)
                # Nothing lost: that is said of a run that was killed, and so was the one after it,
                # before it could say so.
                if loss.stage == "stop" and not loss.count and run.end == "open":
                    run.end = "killed"
            else:
                rest.append((run_id, loss))
        self._untold = rest

    def _summed(
        self, hosts: dict[str, report.Host], sources: list[str], complete: bool
    ) -> report.VerifyReport:
        runs = [run for host in hosts.values() for run in host.runs]
        explained: Counter[str] = Counter()
        for run in runs:
            for place in run.places:
                explained.update(place.explained)
        return report.VerifyReport(
            version=report.VERSION,
            agent=__version__,
            sources=sources,
            complete=complete,
            ok=not any(run.problems for run in runs) and bool(runs or not self.malformed),
            records=self.records,
            bytes=self.bytes,
            events=sum(run.events for run in runs),
            duplicates=sum(run.duplicates for run in runs),
            explained=dict(explained),
            pending=sum(run.pending for run in runs),
            unexplained=sum(run.unexplained for run in runs),
            malformed=self.malformed,
            malformed_first=self._bad,
            deleted=[report.Deleted(*one) for one in sorted(self._deleted.items())],
            hosts=hosts,
        )
