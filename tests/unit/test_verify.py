"""`streamer verify`: what is missing in a stream, and what explains it, against known streams."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamer.cli import main
from streamer.events.clock import rfc3339
from streamer.events.summaries import SUMMARIES
from streamer.verify import files, mqtt
from streamer.verify import ledger as ledger_module
from streamer.verify import records as records_module
from streamer.verify import run as run_module
from streamer.verify.lanes import Lanes
from streamer.verify.ledger import Ledger
from streamer.verify.numbers import Numbers
from streamer.verify.records import Chunk, Line, split_msgpack
from streamer.verify.report import Place, Run, VerifyReport
from streamer.verify.run import Run as RunState
from streamer.verify.silent_runs import SilentRuns
from streamer.verify.start import parse_start
from streamer.verify.text import report_text
from streamer.verify.told import Segment, Vague, assign, cut, edges_of

SECOND = 1_000_000_000
EPOCH_NS = 1_800_000_000 * SECOND
Record = dict[str, Any]

# ---------------------------------------------------------------- a stream, as an agent makes it


class Stream:
    """Makes the records of one run; `boot_ns` goes on by a millisecond with each."""

    def __init__(self, run_id: str = "0123456789abcdef", host: str = "node-1") -> None:
        self.run_id, self.host = run_id, host
        self.boot_ns = 1000 * SECOND
        self.offset = EPOCH_NS
        self.own = 0

    def event(self, seq: int, ring: str = "bulk", cpu: int = 0, kind: str = "file.open") -> Record:
        return self._record(kind, f"{ring}-{cpu}-{seq}", ring=ring, cpu=cpu, seq=seq, weight=1)

    def manifest(self, **more: Any) -> Record:
        fields = {"agent": "0.1.0", "sinks": ["file:x"], "previous": None}
        return self.stream("manifest", **(fields | more))

    def loss(
        self,
        stage: str,
        count: int,
        *ranges: tuple[str, int, int, int] | tuple[str, int, int, int, dict[str, int]],
        **more: Any,
    ) -> Record:
        """Ranges are ring, CPU, first, last and, if any, kinds."""
        names = ("ring", "cpu", "seq_from", "seq_to", "kinds")
        told = [dict(zip(names, one, strict=False)) for one in ranges]
        return self.stream(
            "loss", **{"stage": stage, "count": count, "kinds": {}, "ranges": told} | more
        )

    def heartbeat(
        self,
        *marks: tuple[str, int, int, int] | tuple[str, int, int, int, int],
        read: dict[str, int] | None = None,
        final: bool = False,
        **more: Any,
    ) -> Record:
        """Marks are ring, CPU, seq, read and, if any, skipped."""
        names = ("ring", "cpu", "seq", "read", "skipped")
        counts = {
            kind: {"produced": n, "filtered": 0, "shed": 0, "lost": 0, "read": n}
            for kind, n in (read or {}).items()
        }
        told = [dict(zip(names, (*one, 0), strict=False)) for one in marks]
        fields = {"counts": counts, "marks": told, "sink_counts": {}, "final": final}
        return self.stream("heartbeat", **(fields | more))

    def stream(self, kind: str, **fields: Any) -> Record:
        self.own += 1
        return self._record(
            f"stream.{kind}", f"stream-{self.own}", seq=self.own, run_id=self.run_id, **fields
        )

    def _record(self, event: str, rest: str, **fields: Any) -> Record:
        self.boot_ns += 1_000_000
        return {
            "event": event,
            "id": f"{self.run_id}-{rest}",
            "time_ns": self.boot_ns + self.offset,
            "boot_ns": self.boot_ns,
            "host": self.host,
            "boot_id": "b",
        } | fields


def lines(records: Iterable[Record]) -> bytes:
    return b"".join(msgspec.json.encode(one) + b"\n" for one in records)


def verified(records: Iterable[Record], **options: Any) -> VerifyReport:
    ledger = Ledger()
    ledger.feed(Chunk("file", lines(records)))
    return ledger.reported(["file"], **options)


def only_run(report: VerifyReport) -> Run:
    ((run,),) = [host.runs for host in report.hosts.values()]
    return run


def only_place(report: VerifyReport) -> Place:
    (place,) = only_run(report).places
    return place


def whole_run(count: int = 20, stream: Stream | None = None) -> list[Record]:
    stream = stream or Stream()
    manifest = stream.manifest()
    events = [stream.event(n) for n in range(1, count + 1)]
    end = stream.heartbeat(("bulk", 0, count, count), read={"file.open": count}, final=True)
    return [manifest, *events, end]


# ---------------------------------------------------------------- numbers

spans = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 8)))


@given(spans, st.lists(st.integers(1, 70)), st.integers(1, 70), st.integers(0, 70))
def test_numbers_are_a_set(
    some: list[tuple[int, int]], single: list[int], first: int, more: int
) -> None:
    numbers, expected = Numbers(), set[int]()
    for start, length in some:
        numbers.add_span(start, start + length)
        expected |= set(range(start, start + length + 1))
    for number in single:
        assert numbers.add(number) == (number not in expected)
        expected.add(number)
    assert [n for a, b in numbers for n in range(a, b + 1)] == sorted(expected)
    assert all(b + 1 < c for (_, b), (c, _) in zip(numbers, list(numbers)[1:], strict=False))
    assert numbers.total == len(expected)
    assert (numbers.first, numbers.last) == (min(expected, default=0), max(expected, default=0))
    asked = range(first, first + more + 1)
    missing = [n for a, b in numbers.missing(asked[0], asked[-1]) for n in range(a, b + 1)]
    common = [n for a, b in numbers.common(asked[0], asked[-1]) for n in range(a, b + 1)]
    assert missing == [n for n in asked if n not in expected]
    assert common == [n for n in asked if n in expected]


# ---------------------------------------------------------------- which losses explain what

PLACES = (("bulk", 0), ("bulk", 1))
place_numbers = st.sets(st.tuples(st.sampled_from(PLACES), st.integers(1, 12)), max_size=14)
vague_losses = st.lists(
    st.tuples(
        st.integers(1, 5),
        st.lists(
            st.tuples(st.sampled_from(PLACES), st.integers(1, 12), st.integers(0, 6)),
            min_size=1,
            max_size=3,
        ),
    ),
    max_size=5,
)


def as_vague(loss: tuple[int, list[tuple[tuple[str, int], int, int]]]) -> Vague:
    by_place: dict[tuple[str, int], Numbers] = {}
    for place, first, more in loss[1]:
        by_place.setdefault(place, Numbers()).add_span(first, first + more)
    return Vague("sink", loss[0], {place: tuple(numbers) for place, numbers in by_place.items()})


def most_matched(missing: set[tuple[tuple[str, int], int]], losses: list[Vague]) -> int:
    """The largest matching of numbers and losses, number by number: slow and simple."""
    slots = [loss for loss in losses for _ in range(loss.most)]
    owner: dict[int, Any] = {}

    def placed(number: Any, tried: set[int]) -> bool:
        place, value = number
        for i, loss in enumerate(slots):
            within = any(a <= value <= b for a, b in (loss.spans or {}).get(place, ()))
            if not within or i in tried:
                continue
            tried.add(i)
            if i not in owner or placed(owner[i], tried):
                owner[i] = number
                return True
        return False

    return sum(placed(number, set()) for number in sorted(missing))


@given(place_numbers, vague_losses)
@example(  # the first takes what the second alone can explain
    {(PLACES[0], 1), (PLACES[0], 2)}, [(1, [(PLACES[0], 1, 1)]), (1, [(PLACES[0], 1, 0)])]
)
def test_losses_explain_as_much_as_they_can(missing: set[Any], told: list[Any]) -> None:
    losses = [as_vague(loss) for loss in told]
    segments: list[Segment] = []
    for place in PLACES:
        numbers = Numbers((n, n) for p, n in missing if p == place)
        segments += cut(place, numbers, edges_of(losses).get(place, ()), 6)
    assert sum(one.left for one in segments) == len(missing)
    assert not any(one.first <= 6 < one.last for one in segments)
    counts = assign(segments, losses)
    left = sum(one.left for one in segments)
    assert len(missing) - left == most_matched(missing, losses)
    assert sum(sum(c.values()) for c in counts.values()) == len(missing) - left
    assert all(one.left >= 0 for one in segments)


# ---------------------------------------------------------------- streams with known gaps


@settings(deadline=None)
@given(st.data())
def test_known_gaps_are_found(data: st.DataObject) -> None:
    """Per ring and CPU: lost and told, lost and untold, twice; in any order."""
    stream = Stream()
    out = [stream.manifest()]
    expected: dict[tuple[str, int], Counter[str]] = {}
    untold: dict[tuple[str, int], list[int]] = {}
    marks, read = [], 0
    for place in (("bulk", 0), ("bulk", 3), ("critical", 1)):
        fates = data.draw(
            st.lists(st.sampled_from(("there", "there", "kernel", "untold", "twice")))
        )
        expected[place] = Counter(fates)
        untold[place] = [n for n, fate in enumerate(fates, 1) if fate == "untold"]
        if fates:
            marks.append((*place, len(fates), len(fates)))
        for number, fate in enumerate(fates, 1):
            if fate == "kernel":
                out.append(stream.loss("kernel", 1, (*place, number, number)))
            else:
                read += 1
            if fate in ("there", "twice"):
                event = stream.event(number, *place)
                out += [event] * (2 if fate == "twice" else 1)
    body = out[1:]
    random.Random(data.draw(st.integers())).shuffle(body)
    end = stream.heartbeat(*marks, read={"file.open": read}, final=True)
    report = verified([out[0], *body, end])
    run = only_run(report)
    assert {(p.ring, p.cpu) for p in run.places} == {m[:2] for m in marks}
    for found in run.places:
        known = expected[found.ring, found.cpu]
        assert found.events == known["there"] + known["twice"]
        assert found.duplicates == known["twice"]
        assert found.explained == ({"kernel": known["kernel"]} if known["kernel"] else {})
        assert found.unexplained == known["untold"]
        gaps = [n for gap in found.gaps for n in range(gap.seq_from, gap.seq_to + 1)]
        assert gaps == untold[found.ring, found.cpu]
    lost = sum(fates["untold"] for fates in expected.values())
    assert (report.unexplained, report.ok) == (lost, not lost)
    if read:
        assert run.kinds["file.open"].missing == lost


def test_one_that_is_behind_is_out_of_order() -> None:
    records = whole_run()
    records.insert(15, records.pop(3))  # number 3, behind number 15
    place = only_place(verified(records))
    assert (place.out_of_order, place.late, place.duplicates, place.unexplained) == (1, 0, 0, 0)


def test_one_behind_a_heartbeat_is_late() -> None:
    stream = Stream()
    events = [stream.event(n) for n in range(1, 6)]
    beat = stream.heartbeat(("bulk", 0, 5, 5))
    place = only_place(verified([*events[:4], beat, events[4], stream.event(6)]))
    assert (place.late, place.out_of_order) == (1, 0)


def test_ranges_that_were_joined_explain_as_many_as_were_lost() -> None:
    stream = Stream()
    out = [stream.manifest(), *(stream.event(n) for n in (1, 2, 5, 6, 9))]
    out.append(stream.loss("sink", 3, ("bulk", 0, 2, 8), kinds={"file.open": 3}))
    out.append(stream.heartbeat(("bulk", 0, 9, 9), read={"file.open": 9}, final=True))
    report = verified(out)
    assert only_place(report).explained == {"sink": 3}
    assert report.unexplained == 1
    assert only_run(report).kinds["file.open"].missing == 1


def test_what_has_no_number_explains_none() -> None:
    """A summary that a sink gave up, and runs of programs that the kernel left out."""
    stream = Stream()
    out = [stream.manifest(), stream.event(1), stream.event(3)]
    out.append(stream.loss("sink", 1, ("bulk", 0, 1, 3), kinds={"xdp.counters": 1}))
    out.append(stream.loss("kernel", 7))
    out.append(stream.heartbeat(("bulk", 0, 3, 3), final=True))
    assert verified(out).unexplained == 1


def test_numbers_given_up_and_undecodable_records_are_explained() -> None:
    stream = Stream()
    out = [stream.manifest(), stream.event(1), stream.event(5), stream.loss("decode", 1)]
    out.append(stream.heartbeat(("bulk", 0, 5, 5, 2), final=True))
    place = only_place(verified(out))
    assert (place.explained, place.unexplained) == ({"unused": 2, "decode": 1}, 0)


def test_a_summary_that_is_missing_is_known_by_its_count() -> None:
    stream = Stream()
    out = [stream.manifest(), stream.heartbeat(read={"xdp.counters": 1}, final=True)]
    report = verified(out)
    assert only_run(report).kinds["xdp.counters"].missing == 1
    assert not report.ok


def test_the_end_of_a_run_is_to_come_too() -> None:
    """The last events, of which no later number tells."""
    report = verified(whole_run(20)[:19] + whole_run(20)[-1:])
    assert [(g.seq_from, g.seq_to) for g in only_place(report).gaps] == [(19, 20)]


# ---------------------------------------------------------------- begin and end


def test_a_start_in_the_middle_asks_for_nothing_before_it() -> None:
    report = verified(whole_run()[10:])
    run = only_run(report)
    assert report.ok
    assert (run.whole, only_place(report).first, only_place(report).events) == (False, 10, 11)
    assert run.kinds["file.open"].missing == 0


def test_after_a_heartbeat_all_is_asked_for() -> None:
    """Of a CPU that was idle: what it lost before its first event that is there."""
    stream = Stream()
    stream.own = 7
    records = [
        stream.heartbeat(("bulk", 0, 7, 7)),
        stream.event(10),
        stream.heartbeat(("bulk", 0, 10, 10), final=True),
    ]
    assert [(g.seq_from, g.seq_to) for g in only_place(verified(records)).gaps] == [(8, 9)]


def test_after_a_heartbeat_all_is_asked_for_of_a_cpu_of_which_nothing_had_come() -> None:
    stream = Stream()
    stream.own = 7
    records = [
        stream.heartbeat(("bulk", 0, 0, 0)),
        stream.event(3),
        stream.heartbeat(("bulk", 0, 3, 3), final=True),
    ]
    assert [(g.seq_from, g.seq_to) for g in only_place(verified(records)).gaps] == [(1, 2)]


def test_a_loss_that_was_told_before_the_start_is_not_asked_for() -> None:
    """Behind what the reader had passed: no event came after it."""
    stream = Stream()
    stream.own = 7
    assert verified([stream.heartbeat(("bulk", 0, 2000, 390), final=True)]).ok


def test_a_gap_at_the_end_of_a_live_stream_is_no_verdict() -> None:
    stream = Stream()
    records = [
        stream.manifest(),
        stream.event(1),
        stream.event(3),
        stream.heartbeat(("bulk", 0, 3, 3)),
    ]
    report = verified(records)
    assert (report.pending, report.unexplained, report.ok) == (1, 0, True)
    assert verified(records, ended=True).unexplained == 1
    stream.boot_ns += 11 * SECOND
    report = verified([*records, stream.heartbeat(("bulk", 0, 3, 3))])
    assert (report.pending, report.unexplained, report.ok) == (0, 1, False)


@pytest.mark.parametrize("told", [True, False])
def test_a_run_that_was_killed(told: bool) -> None:
    """What it held is explained if the next run says that it was killed; and not otherwise."""
    killed, after = Stream(), Stream("fedcba9876543210")
    records = [killed.manifest(), killed.event(1), killed.event(3)]
    after.boot_ns += 3600 * SECOND
    previous = {"run_id": killed.run_id, "ended": "killed", "untold": []}
    records.append(after.manifest(previous=previous if told else None))
    report = verified(records)
    (host,) = report.hosts.values()
    assert (host.restarts, [run.end for run in host.runs]) == (
        1,
        ["killed" if told else "open", "open"],
    )
    assert report.explained == ({"killed": 1} if told else {})
    assert report.ok == told


def test_a_run_that_was_killed_and_so_was_the_next_before_it_said_so() -> None:
    killed, later = Stream(), Stream("fedcba9876543210")
    records = [killed.manifest(), killed.event(1), killed.event(3)]
    later.boot_ns += 3600 * SECOND
    told = {"run_id": killed.run_id, "sink": "", "stage": "stop", "count": 0, "kinds": {}}
    told |= {"reason": "this run was killed, and what it held is lost", "ranges": []}
    between = {"run_id": "0011223344556677", "ended": "killed", "untold": [told]}
    records.append(later.manifest(previous=between))
    report = verified(records)
    assert [run.end for run in report.hosts["node-1"].runs] == ["killed", "open"]
    assert (report.explained, report.ok) == ({"killed": 1}, True)


@pytest.mark.parametrize(
    ("sink", "stage", "explained"),
    [("kafka://b/events", "sink", True), ("", "stop", True), ("mqtt://b/other", "sink", False)],
)
def test_what_the_next_run_tells_is_of_the_sink_that_is_read_or_of_all(
    sink: str, stage: str, explained: bool
) -> None:
    first, after = Stream(), Stream("fedcba9876543210")
    records = whole_run(9, first)
    del records[4:6]  # numbers 4 and 5
    after.boot_ns += 5 * SECOND
    untold = {"run_id": first.run_id, "sink": sink, "stage": stage, "count": 2}
    untold |= {"kinds": {"file.open": 2}, "reason": "x"}
    untold |= {"ranges": [{"ring": "bulk", "cpu": 0, "seq_from": 4, "seq_to": 5}]}
    previous = {"run_id": first.run_id, "ended": "undelivered", "untold": [untold]}
    records.append(after.manifest(sinks=["kafka://b/events", "mqtt://b/other"], previous=previous))
    ledger = Ledger(["/events"])
    ledger.feed(Chunk("a", lines(records)))
    report = ledger.reported()
    assert report.explained == ({stage: 2} if explained else {})
    assert report.hosts["node-1"].runs[0].told == ({stage: 2} if explained else {})


def test_a_loss_that_two_runs_tell_explains_once() -> None:
    """The second does not know that the first has."""
    first = Stream()
    records = whole_run(9, first)
    del records[4:6]  # numbers 4 and 5
    untold = {"run_id": first.run_id, "sink": "file:x", "stage": "sink", "count": 1}
    untold |= {"kinds": {"file.open": 1}}
    untold |= {"ranges": [{"ring": "bulk", "cpu": 0, "seq_from": 4, "seq_to": 5}]}
    for number, run_id in enumerate(("1" * 16, "2" * 16), 1):
        after = Stream(run_id)
        after.boot_ns += 5 * number * SECOND
        previous = {"run_id": first.run_id, "ended": "undelivered", "untold": [untold]}
        records.append(after.manifest(previous=previous))
    report = verified(records)
    assert (report.explained, report.unexplained) == ({"sink": 1}, 1)
    assert report.hosts["node-1"].runs[0].kinds["file.open"].missing == 1


def test_a_run_of_which_a_loss_at_its_stop_is_told_was_not_killed_for_that() -> None:
    """So no more is explained than that."""
    first, later = Stream(), Stream("fedcba9876543210")
    records = [first.manifest(), first.event(1), first.event(5)]
    later.boot_ns += 3600 * SECOND
    told = {"run_id": first.run_id, "sink": "", "stage": "stop", "count": 2, "kinds": {}}
    told |= {"ranges": [{"ring": "bulk", "cpu": 0, "seq_from": 2, "seq_to": 3}]}
    between = {"run_id": "0011223344556677", "ended": "undelivered", "untold": [told]}
    records.append(later.manifest(previous=between))
    report = verified(records)
    assert report.hosts["node-1"].runs[0].end == "open"
    assert (report.explained, report.unexplained) == ({"stop": 2}, 1)


def test_a_loss_of_several_runs_is_told_of_each_up_to_its_numbers() -> None:
    """Out of a spool a run loses what one before it had read, too."""
    first, after = Stream(), Stream("fedcba9876543210")
    records = whole_run(9, first)
    del records[4:6]
    after.boot_ns += 5 * SECOND
    records += [after.manifest(), after.event(1), after.event(5)]
    names = ("ring", "cpu", "seq_from", "seq_to", "run_id")
    places = (("bulk", 0, 4, 5, first.run_id), ("bulk", 0, 2, 4, after.run_id))
    ranges = [dict(zip(names, one, strict=True)) for one in places]
    records.append(after.loss("sink", 5, ranges=ranges))
    records.append(after.heartbeat(("bulk", 0, 5, 5), final=True))
    report = verified(records)
    assert [run.told for run in report.hosts["node-1"].runs] == [{"sink": 2}, {"sink": 3}]
    assert (report.explained, report.unexplained) == ({"sink": 5}, 0)


@pytest.mark.parametrize("known", [True, False])
def test_a_loss_of_several_runs_is_given_up_of_each(known: bool) -> None:
    """As many of a kind as its ranges say; where they say nothing, as many as there can be."""
    first, after = Stream(), Stream("fedcba9876543210")
    records = whole_run(9, first)
    del records[4:6]
    after.boot_ns += 5 * SECOND
    later = whole_run(6, after)
    del later[2:5]
    here, there = ({"file.open": 3}, {"file.open": 2}) if known else ({}, {})
    loss = after.loss("sink", 7, ("bulk", 0, 1, 9, there), ("bulk", 0, 2, 6, here))
    loss["ranges"][0]["run_id"] = first.run_id
    loss["kinds"] = {"file.open": 5, next(iter(SUMMARIES)): 2}
    report = verified([*records, *later[:-1], loss, later[-1]])
    runs = report.hosts["node-1"].runs
    assert [run.told["sink"] for run in runs] == ([2, 3] if known else [5, 5])
    assert [run.problems for run in runs] == [[], []]


def test_what_a_run_did_not_tell_may_be_of_one_before_it() -> None:
    """It gave that up out of its spool, and the next one tells it."""
    runs = first, second, third = Stream("1" * 16), Stream("2" * 16), Stream("3" * 16)
    for number, stream in enumerate(runs):
        stream.boot_ns += 5 * number * SECOND
    records = whole_run(9, first)
    del records[4:6]
    records += whole_run(4, second)
    loss = third.loss("sink", 2, ("bulk", 0, 4, 5, {"file.open": 2}), kinds={"file.open": 2})
    loss["ranges"][0]["run_id"] = first.run_id
    untold = loss | {"run_id": second.run_id, "sink": "file:x"}
    previous = {"run_id": second.run_id, "ended": "undelivered", "untold": [untold]}
    records.append(third.manifest(previous=previous))
    report = verified(records)
    assert [run.told for run in report.hosts["node-1"].runs] == [{"sink": 2}, {}, {}]
    assert (report.explained, report.unexplained) == ({"sink": 2}, 0)
    assert [run.problems for run in report.hosts["node-1"].runs] == [[], [], []]


def mark(seq: int, taken: int, cpu: int = 0, sink: str = "file:x") -> Record:
    return {"sink": sink, "ring": "bulk", "cpu": cpu, "seq": seq, "last": seq, "taken": taken}


def killed_run(
    marks: list[Record], seconds: int, *numbers: int, ended: str = "killed", **more: Any
) -> list[Record]:
    """A run with these numbers, 4 of which a heartbeat had read; and one after it for so long.

    `more` is in the manifest of that one.
    """
    killed, after = Stream(), Stream("fedcba9876543210")
    records = [killed.manifest(), *map(killed.event, numbers), killed.heartbeat(("bulk", 0, 4, 4))]
    after.boot_ns += 5 * SECOND
    previous = {"run_id": killed.run_id, "ended": ended, "untold": [], "marks": marks}
    records.append(after.manifest(previous=previous, **more))
    after.boot_ns += seconds * SECOND
    return [*records, after.heartbeat()]


def test_how_much_a_run_with_a_spool_lost_is_known() -> None:
    """What comes after its last event, and of a CPU that nothing came from; not what came."""
    report = verified(killed_run([mark(5, 9), mark(0, 3, cpu=1)], 11, 1, 2, 3, 4, 5, 7))
    assert (report.explained, report.unexplained, report.ok) == ({"killed": 6}, 0, True)
    run = report.hosts["node-1"].runs[0]
    assert [(place.cpu, place.last, place.missing) for place in run.places] == [
        (0, 9, 3),
        (1, 3, 3),
    ]


def test_what_was_safe_behind_the_last_heartbeat_is_not_asked_for() -> None:
    """How many of these numbers were given up unused nobody knows."""
    report = verified(killed_run([mark(6, 9)], 11, 1, 2, 3, 4))
    assert (report.explained, report.unexplained, report.ok) == ({"killed": 5}, 0, True)


def test_what_was_safe_when_a_run_was_killed_is_to_come() -> None:
    """Until a while after the next has begun, which has what was in the spool delivered first."""
    missing = killed_run([mark(4, 5)], 11, 1, 3, 4)
    report = verified(missing)
    assert (report.explained, report.unexplained, report.ok) == ({"killed": 1}, 1, False)
    early = killed_run([mark(4, 5)], 9, 1, 3, 4)
    assert verified(early).explained == {"killed": 1}
    assert verified(early).ok
    assert not verified(early, ended=True).ok
    assert verified(killed_run([mark(4, 5)], 9, 1, 3, 4, sinks=["file:x", "file:y"])).ok


@pytest.mark.parametrize("sinks", [["file:x", "file:y"], ["file:y"]])
def test_what_is_safe_in_another_sink_is_not_asked_for(sinks: list[str]) -> None:
    assert verified(killed_run([mark(4, 5)], 11, 1, 3, 4, sinks=sinks)).ok


@pytest.mark.parametrize("final", [True, False])
def test_what_a_later_run_has_is_in_each_place_where_the_killed_one_was(final: bool) -> None:
    """Of several topics or partitions one may be behind the others."""
    killed, after = Stream(), Stream("fedcba9876543210")
    one = [killed.manifest(), killed.event(1), killed.heartbeat(("bulk", 0, 4, 4))]
    other = [killed.event(3), killed.event(4)]
    after.boot_ns += 5 * SECOND
    previous = {"run_id": killed.run_id, "ended": "killed", "untold": [], "marks": [mark(4, 5)]}
    one.append(after.manifest(previous=previous))
    early = after.event(1)
    after.boot_ns += 11 * SECOND
    one.append(after.heartbeat(read={"file.open": 1}, final=final))
    ledger = Ledger()
    ledger.feed(Chunk("a", lines(one)))
    ledger.feed(Chunk("b", lines([*other, early])))
    assert ledger.reported(["a", "b"]).ok
    if not final:
        ledger.feed(Chunk("b", lines([after.event(2)])))
    assert not ledger.reported(["a", "b"], ended=final).ok


def test_a_topic_that_has_nothing_of_a_killed_run_yet_is_waited_for() -> None:
    killed, after = Stream(), Stream("fedcba9876543210")
    first = [killed.manifest(), killed.heartbeat(("bulk", 0, 4, 4))]
    after.boot_ns += 5 * SECOND
    previous = {"run_id": killed.run_id, "ended": "killed", "untold": [], "marks": [mark(4, 5)]}
    first.append(after.manifest(previous=previous))
    replayed = [killed.event(n) for n in range(1, 5)]
    other = Stream("0000000000000001")
    earlier = whole_run(1, other)
    after.boot_ns += 11 * SECOND
    first.append(after.heartbeat())
    ledger = Ledger()
    ledger.feed(Chunk("a", lines([earlier[0], earlier[-1], *first])))
    ledger.feed(Chunk("b", lines([earlier[1]])))
    assert ledger.reported(["a", "b"]).ok
    ledger.feed(Chunk("b", lines([*replayed, after.event(1)])))
    assert ledger.reported(["a", "b"]).ok


def next_run(killed: Stream, *marks: Record) -> tuple[Stream, list[Record]]:
    """A second later: its manifest, which has the marks, and a heartbeat when all is settled."""
    after = Stream("fedcba9876543210")
    after.boot_ns = killed.boot_ns + SECOND
    previous = {"run_id": killed.run_id, "ended": "killed", "untold": [], "marks": list(marks)}
    manifest = after.manifest(previous=previous)
    after.boot_ns += 11 * SECOND
    return after, [manifest, after.heartbeat()]


def test_a_heartbeat_ahead_of_events_in_another_topic_asks_for_no_more_than_marks() -> None:
    killed = Stream()
    own = [killed.manifest(), killed.heartbeat(("bulk", 0, 9, 9))]
    events = [killed.event(1), killed.event(2)]
    killed.boot_ns += 11 * SECOND
    own.append(killed.heartbeat(("bulk", 0, 9, 9)))
    after, told = next_run(killed, mark(2, 9))
    own += told
    ledger = Ledger()
    ledger.feed(Chunk("stream", lines(own)))
    ledger.feed(Chunk("file", lines([*events, after.event(1)])))
    report = ledger.reported(["stream", "file"])
    assert (report.explained, report.unexplained, report.ok) == ({"killed": 7}, 0, True)


def lagging(pending: int, *, seconds: int = 60) -> tuple[Stream, Ledger]:
    """Of 5 opens that were read 2 have come, number 1 and 3; then heartbeats for so long.

    They go to a topic of their own, as do the executions, of which one is the newest of all.
    """
    stream = Stream()
    own = [stream.manifest(sinks=["kafka://b/{category}"])]
    events = [stream.event(1), stream.event(3)]
    executions = [stream.event(1, ring="critical", kind="process.exec")]
    account = {"received": 6, "delivered": 6 - pending, "dropped": 0, "pending": pending}
    marks = ("bulk", 0, 5, 5), ("critical", 0, 1, 1)
    for _ in range(seconds // 10):
        own.append(stream.heartbeat(*marks, sink_counts={"kafka://b/{category}": account}))
        stream.boot_ns += 10 * SECOND
    executions.append(stream.event(2, ring="critical", kind="process.exec"))
    own.append(stream.heartbeat(*marks, sink_counts={"kafka://b/{category}": account}))
    ledger = Ledger(["/{category}"])
    for topic, records in (("stream", own), ("file", events), ("process", executions)):
        ledger.feed(Chunk(topic, lines(records)))
    return stream, ledger


def missing_of(ledger: Ledger, **options: Any) -> tuple[int, int, bool]:
    report = ledger.reported(["a", "b"], **options)
    return report.pending, report.unexplained, report.ok


def test_a_topic_that_lags_behind_its_heartbeats_is_waited_for() -> None:
    """As long as it has nothing newer, and the heartbeats say that events are on their way."""
    stream, ledger = lagging(pending=3)
    assert missing_of(ledger) == (1, 0, True)  # number 2; of those behind 3 nothing is known
    ledger.feed(Chunk("file", lines([stream.event(4), stream.event(5)])))
    assert missing_of(ledger) == (0, 1, False)  # it is ahead now, and 2 has not come
    late = stream.event(2) | {"time_ns": EPOCH_NS, "boot_ns": 0}
    ledger.feed(Chunk("file", lines([late])))
    assert missing_of(ledger) == (0, 0, True)


def test_a_topic_that_is_silent_has_all_that_a_heartbeat_says_is_delivered() -> None:
    _, ledger = lagging(pending=0)
    assert missing_of(ledger) == (0, 3, False)  # 2, 4 and 5
    assert missing_of(ledger, complete=False) == (1, 0, True)  # they may be where it was not read
    assert missing_of(lagging(pending=0, seconds=0)[1]) == (1, 0, True)


@pytest.mark.parametrize(
    ("delivered", "sink", "workers", "expected"),
    [
        ((4, 1), "kafka", 1, (0, 3, False)),
        ((3, 2), "kafka", 1, (1, 0, True)),  # an event that was on its way may still be
        ((4, 0), "kafka", 1, (1, 0, True)),
        ((4, 1), "kafka", 2, (1, 0, True)),  # what one has delivered may be newer than what waits
        ((4, 1), "mqtt", 1, (1, 0, True)),
    ],
)
def test_where_something_is_always_on_its_way(
    delivered: tuple[int, int], sink: str, workers: int, expected: tuple[int, int, bool]
) -> None:
    """A topic is silent, and the others are not: it had all of what the heartbeat before knew."""
    stream, ledger = Stream(), Ledger(["/{category}"])
    name = f"{sink}://b/{{category}}"

    def beat(opens: int, execs: tuple[int, int]) -> Record:
        kinds = {"file.open": [5, opens, 1], "process.exec": [*execs, 0]}
        received, done = 5 + execs[0], opens + execs[1]
        account = {"received": received, "delivered": done, "dropped": 1, "kinds": kinds}
        account["pending"] = received - 1 - done
        return stream.heartbeat(("bulk", 0, 5, 5), sink_counts={name: account})

    own = [stream.manifest(sinks=[name], workers=workers), beat(1, (1, 0))]
    events = [stream.event(1), stream.event(3)]
    stream.boot_ns += 20 * SECOND
    own.append(beat(delivered[0], (2, delivered[1])))
    for topic, records in (("stream", own), ("file", events)):
        ledger.feed(Chunk(topic, lines(records)))
    assert missing_of(ledger) == expected


def test_what_another_sink_holds_is_not_on_its_way_to_this_one() -> None:
    _, ledger = lagging(pending=0)
    stream, both = lagging(pending=3)
    accounts = {
        name: {"received": n, "delivered": 0, "dropped": n - pending, "pending": pending}
        for name, n, pending in (("kafka://b/{category}", 6, 0), ("mqtt://b/other", 9, 9))
    }
    told = [stream.heartbeat(("bulk", 0, 5, 5), sink_counts=accounts)]
    stream.boot_ns += 10 * SECOND
    told.append(stream.heartbeat(("bulk", 0, 5, 5)))
    both.feed(Chunk("stream", lines(told)))
    assert missing_of(both) == missing_of(ledger) == (0, 3, False)


def test_a_topic_that_the_run_before_had_may_be_behind_too() -> None:
    """Nothing of this run has come there yet."""
    stream, ledger = Stream("fedcba9876543210"), Ledger()
    ledger.feed(Chunk("file", lines(whole_run(3))))
    own = [stream.manifest(), stream.heartbeat(("bulk", 0, 5, 5))]
    stream.boot_ns += 30 * SECOND
    own.append(stream.heartbeat(("bulk", 0, 5, 5)))
    ledger.feed(Chunk("stream", lines(own)))
    ledger.feed(Chunk("process", lines([stream.event(2)])))
    assert missing_of(ledger) == (1, 0, True)
    ledger.feed(Chunk("file", lines([stream.event(5)])))
    stream.boot_ns += 30 * SECOND
    ledger.feed(Chunk("process", lines([stream.event(6)])))
    ledger.feed(Chunk("stream", lines([stream.heartbeat(("bulk", 0, 6, 6))])))
    assert missing_of(ledger) == (0, 3, False)  # 1, 3 and 4, by the heartbeat of then


def test_a_run_that_has_ended_is_judged_where_all_was_read() -> None:
    """Stopped before, one topic may have been read to its end, and another not."""
    records = whole_run(5)
    ledger = Ledger()
    ledger.feed(Chunk("stream", lines([records[0], records[-1]])))
    ledger.feed(Chunk("file", lines(records[1:4])))
    assert missing_of(ledger, complete=False) == (0, 0, True)
    told = report_text(ledger.reported(["a", "b"], complete=False))
    assert told.endswith("; not read to the end; 0 unexplained: all is explained")
    assert missing_of(ledger) == (0, 2, False)
    one = Ledger()
    one.feed(Chunk("all", lines([*records[:2], *records[3:]])))
    assert missing_of(one, complete=False) == missing_of(one) == (0, 1, False)


@pytest.mark.parametrize("ended", ["killed", "undelivered", "delivered"])
def test_a_run_that_left_has_left_whatever_became_of_it(ended: str) -> None:
    """A reload took the sink away that is read: what it had read for it until then was to come."""
    stream, after = Stream(), Stream("fedcba9876543210")
    records = [stream.manifest(sinks=["kafka://b/events"]), stream.event(1)]
    records.append(stream.heartbeat(("bulk", 0, 2, 2)))
    records.append(stream.manifest(sinks=["file:x"]))
    after.boot_ns += 5 * SECOND
    previous = {"run_id": stream.run_id, "ended": ended, "untold": []}
    records.append(after.manifest(sinks=["kafka://b/events"], previous=previous))
    ledger = Ledger(["/events"])
    ledger.feed(Chunk("a", lines(records)))
    report = ledger.reported()
    assert [run.end for run in report.hosts["node-1"].runs] == ["left", "open"]
    assert (report.explained, report.unexplained) == ({}, 1)
    back = stream.manifest(sinks=["kafka://b/events"])
    ledger.feed(Chunk("a", lines([back])))
    assert ledger.reported().hosts["node-1"].runs[0].end != "left", "another reload brought it back"


def test_a_heartbeat_that_is_read_behind_the_last_account_takes_nothing_back() -> None:
    """It comes out of another partition."""
    stream = Stream()
    begin, events = stream.manifest(), [stream.event(n) for n in (1, 2, 3, 4)]
    before = stream.heartbeat(("bulk", 0, 3, 3), read={"file.open": 3})
    last = stream.heartbeat(("bulk", 0, 5, 5), read={"file.open": 5}, final=True)
    ledger = Ledger()
    ledger.feed(Chunk("a", lines([begin, *events, last])))
    ledger.feed(Chunk("b", lines([before])))
    report = ledger.reported()
    assert report.unexplained == 1
    assert only_run(report).kinds["file.open"].missing == 1


def test_of_many_heartbeats_an_old_one_is_known_still() -> None:
    """A topic that is minutes behind: what was to come before its newest is judged."""
    stream, ledger = Stream(), Ledger()
    own, events = [stream.manifest()], [stream.event(1)]
    for n in range(2, 200):
        own.append(stream.heartbeat(("bulk", 0, n, n)))
        stream.boot_ns += 10 * SECOND
        if n < 100 and n != 7:
            events.append(stream.event(n))
    ledger.feed(Chunk("stream", lines(own)))
    ledger.feed(Chunk("file", lines(events)))
    assert missing_of(ledger) == (0, 1, False)


def replayed_by_all(teller: RunState, runs: list[RunState]) -> bool:
    """What `Lanes.has_replayed` means, by asking every run."""
    lanes = set().union(*(one.lanes for one in runs))
    later = [one for one in runs if one.number >= teller.number]
    if len(lanes) == 1 and any(one.end == "ended" for one in later):
        return True
    return all(
        any(one.lanes.get(lane, 0) - one.first_boot_ns > 10 * SECOND for one in later)
        for lane in lanes
    )


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["open", "ended", "killed"]),
            st.dictionaries(st.sampled_from("abc"), st.integers(0, 20), min_size=1),
        ),
        min_size=1,
        max_size=6,
    )
)
@example([("ended", {"a": 0})])
def test_who_has_replayed_is_the_same_as_by_asking_every_run(drawn: list[Any]) -> None:
    runs = []
    for number, (end, lanes) in enumerate(drawn):
        line = Line("file.open", "x", EPOCH_NS, 1000 * SECOND, "node-1")
        run = RunState(str(number), line, number)
        run.end = end
        run.lanes = {lane: (1000 + seconds) * SECOND for lane, seconds in lanes.items()}
        runs.append(run)
    expected = [replayed_by_all(run, runs) for run in runs]
    found = Lanes(runs)
    asked = [*runs]
    runs.clear()  # of thousands of runs each is looked at once, and not for each other
    assert [found.has_replayed(run) for run in asked] == expected


def silent_by_all(run: RunState, runs: list[RunState]) -> bool:
    """What `Silence.has` means, by asking every other run."""
    after = [0]
    for other in runs:
        if other.boot_id == run.boot_id:
            after.append(other.last_boot_ns - run.last_boot_ns)
        elif other.number > run.number:
            after.append(other.last_ns - (run.last_boot_ns + run.offset))
    return max(after) > max(60 * SECOND, 3 * run.longest_ns)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "a", "b"]),
            st.sampled_from([0, 20 * SECOND, 21 * SECOND, 60 * SECOND]),
            st.sampled_from([0, 1, 60, 61, 63, 64, 200]),
            st.sampled_from([0, 1, 60, 61, 63, 64, 200]),
        ),
        max_size=6,
    )
)
def test_who_is_silent_is_the_same_as_by_asking_every_run(drawn: list[Any]) -> None:
    runs = []
    for number, (boot_id, longest_ns, boot_seconds, seconds) in enumerate(drawn):
        line = Line("file.open", "x", seconds * SECOND, boot_seconds * SECOND, "node-1")
        run = RunState(str(number), line, number)
        run.boot_id, run.longest_ns = boot_id, longest_ns
        runs.append(run)
    silent = SilentRuns(runs[::-1])
    assert [silent.has(run) for run in runs] == [silent_by_all(run, runs) for run in runs]


@pytest.mark.parametrize(
    ("beats", "later", "silent"),
    [
        ([0, 1], 59, False),
        ([0, 1], 62, True),
        ([0, 100, 101], 299, False),  # three times as long as ever
        ([0, 100, 101], 302, True),
        ([0, 30, 60, 1, 61], 91, True),  # one that comes late, of another partition
    ],
)
def test_a_run_without_an_end_is_waited_for(beats: list[int], later: int, silent: bool) -> None:
    stream, other = Stream(), Stream("fedcba9876543210")
    begin, records = stream.boot_ns, [stream.manifest()]
    for seconds in beats:
        stream.boot_ns = begin + seconds * SECOND
        records.append(stream.heartbeat())
    other.boot_ns = begin + (max(beats) + later) * SECOND
    run = verified([*records, other.manifest()]).hosts["node-1"].runs[0]
    assert bool(run.problems) is silent


def test_a_host_that_was_killed_often() -> None:
    """It left marks each time."""
    times = 500
    records, before = [], None
    for number in range(times):
        stream = Stream(f"{number:016x}")
        stream.boot_ns = (1000 + 20 * number) * SECOND
        previous = None
        if before is not None:
            previous = {"run_id": before, "ended": "killed", "untold": [], "marks": [mark(1, 3)]}
        records += [stream.manifest(previous=previous), stream.event(1)]
        records.append(stream.heartbeat(("bulk", 0, 1, 1)))
        stream.boot_ns += 15 * SECOND
        records.append(stream.event(2))
        before = stream.run_id
    ledger = Ledger()
    ledger.feed(Chunk("file", lines(records)))
    report = ledger.reported(["file"])
    assert (report.events, report.explained, report.ok) == (2 * times, {"killed": times - 1}, True)


def test_a_run_that_died_with_its_clock_ahead_has_no_end() -> None:
    dead, now = Stream(), Stream("fedcba9876543210")
    ahead = [dead.manifest(), dead.event(1)]
    dead.offset -= 7200 * SECOND
    dead.boot_ns += SECOND
    records = [*ahead, dead.event(2)]
    now.offset = dead.offset + dead.boot_ns
    now.boot_ns = SECOND
    later = [now.manifest(), now.event(1)]
    now.boot_ns += 3600 * SECOND
    later.append(now.event(2))
    report = verified([*records, *(one | {"boot_id": "later"} for one in later)])
    problems = {one.run_id: one.problems for one in report.hosts["node-1"].runs}
    assert problems[dead.run_id] == ["it has no end, and nobody says what became of it"]
    assert problems[now.run_id] == []


def test_marks_of_a_run_that_ended_explain_nothing() -> None:
    """Its final account asks for more."""
    first, after = Stream(), Stream("fedcba9876543210")
    records = [first.manifest(), *map(first.event, (1, 2, 3, 4))]
    records.append(first.heartbeat(("bulk", 0, 6, 4), read={"file.open": 4}, final=True))
    after.boot_ns += 5 * SECOND
    previous = {"run_id": first.run_id, "ended": "delivered", "untold": [], "marks": [mark(4, 4)]}
    records.append(after.manifest(previous=previous))
    after.boot_ns += 11 * SECOND
    report = verified([*records, after.heartbeat()])
    assert (report.unexplained, report.pending) == (2, 0)


def test_marks_from_long_before_ask_for_no_less() -> None:
    """As where a disk was full for hours: what a heartbeat had passed has to be there."""
    killed = Stream()
    records = [killed.manifest(), *map(killed.event, (1, 2, 4, 5))]
    records.append(killed.heartbeat(("bulk", 0, 5, 5)))
    killed.boot_ns += 11 * SECOND
    records.append(killed.heartbeat(("bulk", 0, 5, 5)))
    report = verified([*records, *next_run(killed, mark(1, 9))[1]])
    assert (report.unexplained, report.explained) == (1, {"killed": 4})


def test_a_clock_that_was_never_set_makes_no_run_silent() -> None:
    """Of a boot that came after: its clock says 1970."""
    before, now = Stream(), Stream("fedcba9876543210")
    records = whole_run(3, before)
    now.offset, now.boot_ns = 0, SECOND
    manifest = now.manifest() | {"boot_id": "later"}
    assert verified([*records, manifest]).ok


def test_the_next_run_tells_what_a_run_could_not() -> None:
    first, after = Stream(), Stream("fedcba9876543210")
    records = whole_run(9, first)
    del records[4:6]  # numbers 4 and 5
    after.boot_ns += 5 * SECOND
    untold = {"run_id": first.run_id, "sink": "file:x", "stage": "sink", "count": 2}
    untold |= {"kinds": {"file.open": 2}, "reason": "full"}
    untold |= {"ranges": [{"ring": "bulk", "cpu": 0, "seq_from": 4, "seq_to": 5}]}
    previous = {"run_id": first.run_id, "ended": "undelivered", "untold": [untold]}
    assert verified(records).unexplained == 2
    report = verified(
        [*records, after.manifest(previous=previous), after.manifest(previous=previous)]
    )
    assert (report.ok, report.explained) == (True, {"sink": 2})


def test_the_clock_is_set() -> None:
    stream = Stream()
    records = [stream.manifest(), stream.event(1)]
    stream.offset += 3600 * SECOND
    records += [stream.event(2), stream.event(3)]
    stream.offset += 1000  # slewed
    records.append(stream.event(4))
    run = only_run(verified(records))
    assert [step.step_ns for step in run.clock_steps] == [3600 * SECOND]
    assert run.clock_steps_total == 1


@pytest.mark.parametrize(("less", "steps"), [(0, 1), (1, 0)])
def test_from_a_tenth_of_a_second_on_the_clock_is_set(less: int, steps: int) -> None:
    stream = Stream()
    records = [stream.manifest(), stream.event(1)]
    stream.offset += SECOND // 10 - less
    run = only_run(verified([*records, stream.event(2)]))
    assert (len(run.clock_steps), run.clock_steps_total) == (steps, steps)


def test_the_clock_is_set_and_some_come_by_the_old_one() -> None:
    """The agent's own records go by the new one at once, events a second later, or are late."""
    stream = Stream()
    records = [stream.manifest(), stream.event(1)]
    stream.offset += 3600 * SECOND
    records.append(stream.heartbeat())
    stream.offset -= 3600 * SECOND
    records.append(stream.event(2))
    stream.offset += 3600 * SECOND
    records.append(stream.event(3))
    stream.boot_ns += 10 * SECOND
    stream.offset -= 7200 * SECOND
    records += [stream.event(4), records[1]]
    stream.boot_ns += 10 * SECOND
    stream.offset += 3600 * SECOND
    records += [stream.event(5), records[-2]]
    run = only_run(verified(records))
    assert [step.step_ns // SECOND for step in run.clock_steps] == [3600, -7200, 3600]
    assert run.clock_steps_total == 3


# ---------------------------------------------------------------- what does not add up


def test_a_loss_in_the_kernel_that_is_there_is_wrong() -> None:
    stream = Stream()
    records = whole_run(5, stream)
    records.insert(-1, stream.loss("kernel", 1, ("bulk", 0, 3, 3)))
    report = verified(records)
    assert (only_place(report).lost_but_there, report.ok) == (1, False)


def test_what_a_sink_gave_up_may_be_there() -> None:
    """The broker had it, and its answer was lost."""
    stream = Stream()
    records = whole_run(5, stream)
    records.insert(-1, stream.loss("sink", 1, ("bulk", 0, 3, 3), kinds={"file.open": 1}))
    report = verified(records)
    assert (only_place(report).given_up_but_there, report.ok) == (1, True)


def test_an_account_that_does_not_add_up_is_wrong() -> None:
    stream = Stream()
    counts = {"file.open": {"produced": 5, "filtered": 1, "shed": 1, "lost": 1, "read": 3}}
    sinks = {"file:x": {"received": 5, "delivered": 3, "dropped": 1, "pending": 0}}
    report = verified([stream.heartbeat(counts=counts, sink_counts=sinks)])
    assert len(only_run(report).problems) == 2
    assert not report.ok


def shed_run(counted: int = 30, levels: tuple[int, ...] = (1, 3, 0, 2, 0)) -> list[Record]:
    """Two times of pressure; with each record but the first of a time ten opens are left out."""
    stream = Stream()
    records = [stream.manifest(), stream.event(1)]
    before = 0
    for level in levels:
        records.append(
            stream.stream(
                "shed",
                level=level,
                before=before,
                since_ns=stream.boot_ns + stream.offset,
                reason=f"level {level}",
                kinds={"file.open": 10} if before else {},
            )
        )
        before = level
    counts = {"produced": 1 + counted, "filtered": 0, "shed": counted, "lost": 0, "read": 1}
    end = stream.heartbeat(("bulk", 0, 1, 1), counts={"file.open": counts}, final=True)
    return [*records, end]


def test_what_was_shed_is_no_gap_and_is_said() -> None:
    report = verified(shed_run())
    assert report.ok
    first, second = only_run(report).shed_periods
    assert (first.level, first.reason, first.kinds) == (3, "level 1", {"file.open": 20})
    assert (second.level, second.reason, second.kinds) == (2, "level 2", {"file.open": 10})
    assert 0 < first.from_ns < first.to_ns < second.from_ns < second.to_ns
    text = report_text(report)
    assert "shed under pressure (up to level 3, because level 1)" in text
    assert text.count("10 file.open") == 1


def test_more_told_as_shed_than_was_counted_is_wrong() -> None:
    assert verified(shed_run(counted=31)).ok  # what was left out otherwise
    (problem,) = only_run(verified(shed_run(counted=29))).problems
    assert problem == "file.open: 30 are told as shed, of 29 that were counted"


def test_a_time_of_pressure_without_its_end_or_beginning() -> None:
    (still,) = only_run(verified(shed_run(counted=10, levels=(1, 2)))).shed_periods
    assert (still.to_ns, still.level) == (0, 2)
    records = shed_run()
    (late,) = only_run(verified([records[0], *records[4:5], records[-1]])).shed_periods
    assert (late.level, late.reason, late.kinds) == (0, "", {"file.open": 10})


def test_that_it_is_over_and_nothing_was_left_out_is_no_time_of_pressure() -> None:
    """As where a stream is read from its middle on."""
    run = only_run(verified(shed_run(counted=0, levels=(0,))))
    assert (run.shed_periods, run.shed_periods_total) == ([], 0)


def test_a_copy_of_a_record_of_shedding_counts_once() -> None:
    records = shed_run()
    assert verified([record for record in records for _ in range(2)]).ok


def test_of_many_times_of_pressure_the_first_are_kept() -> None:
    levels = (1, 0) * 150
    run = only_run(verified(shed_run(counted=1500, levels=levels)))
    assert (len(run.shed_periods), run.shed_periods_total) == (100, 150)


def test_an_event_older_than_its_watermark_is_wrong() -> None:
    stream = Stream()
    marks = [
        {"ring": "bulk", "cpu": 0, "seq": 1, "read": 1, "watermark_ns": stream.boot_ns + 10**9}
    ]
    unknown = [marks[0] | {"watermark_ns": 0}]
    first, beat = stream.event(1), stream.heartbeat(marks=marks)
    report = verified([first, beat, stream.heartbeat(marks=unknown), stream.event(2)])
    place = only_place(report)
    assert (place.older_than_watermark, report.ok) == (1, False)
    assert place.watermark_ns == marks[0]["watermark_ns"], "one that does not know takes none back"
    on_time = stream.event(2) | {"boot_ns": place.watermark_ns}
    assert verified([first, beat, on_time]).ok


def test_a_watermark_binds_its_own_lane_alone() -> None:
    """Elsewhere what was before it may come later."""
    for lanes, older in (("aaa", 1), ("aba", 0), ("aab", 0), ("baa", 0), ("abb", 0)):
        stream = Stream()
        begin = stream.event(1)
        bound = {"ring": "bulk", "cpu": 0, "seq": 2, "read": 2, "watermark_ns": 10**13}
        records = [begin, stream.heartbeat(marks=[bound]), stream.event(2)]
        ledger = Ledger()
        for lane, one in zip(lanes, records, strict=True):
            ledger.feed(Chunk(lane, lines([one])))
        assert only_place(ledger.reported()).older_than_watermark == older, lanes


BAD = (b"{", b"nonsense", b"\xff\xfe", b"[]", b'{"event":"x"}', b'{"id":"a-b-0-1"}', b"[" * 5000)


@pytest.mark.parametrize("bad", BAD)
def test_a_malformed_record_costs_no_other(bad: bytes) -> None:
    records = whole_run()
    data = lines(records[:10]) + bad + b"\n" + lines(records[10:])
    ledger = Ledger()
    ledger.feed(Chunk("file", data, "file, byte 0"))
    report = ledger.reported()
    assert (report.malformed, len(report.malformed_first), report.ok) == (1, 1, True)
    assert (report.events, report.records) == (20, 23)


IDS = ("", "x", "a-bulk-0-x", "a-bulk-x-1", "a--1-1", "a-bulk-0-0", "a-bulk-0-99999999999999999999")


@pytest.mark.parametrize("id", [*IDS, "a-bulk-65536-1", "-bulk-0-1"])
def test_an_id_that_is_none_is_malformed(id: str) -> None:
    records = whole_run()
    records.insert(5, records[5] | {"id": id})
    report = verified(records)
    assert (report.malformed, report.events, report.ok) == (1, 20, True)


@pytest.mark.parametrize("name", ["id", "host"])
def test_names_that_are_longer_than_any_take_no_room(name: str) -> None:
    """Of each run they would be kept: whoever writes to a topic may give things longer ones."""
    records = whole_run()
    text = {"id": "a" * 255 + "-bulk-0-1", "host": "h" * 256}[name]
    records.insert(5, records[5] | {"id": f"{'b' * 16}-bulk-0-1"} | {name: text})
    report = verified(records)
    assert (report.malformed, len(report.hosts), report.ok) == (1, 1, True)
    records[5] |= {"id": "b-bulk-0-1"} | {name: text[-255:]}
    assert verified(records).malformed == 0


def test_a_duplicate_of_a_loss_explains_nothing_more() -> None:
    stream = Stream()
    out = [stream.manifest(), stream.event(1), stream.event(5)]
    loss = stream.loss("sink", 1, ("bulk", 0, 1, 5))
    out += [loss, loss, stream.heartbeat(("bulk", 0, 5, 5), final=True)]
    report = verified(out)
    assert (report.unexplained, report.duplicates) == (2, 1)


@pytest.mark.parametrize("name", ["MOST_BYTES", "MOST_VALUES"])
def test_a_large_chunk_is_decoded_piece_by_piece(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As a message of MQTT can be: each record once, and where a malformed one is is said."""
    records = whole_run(100)
    each = [msgspec.json.encode(one) for one in records]
    each.insert(60, b"nonsense")
    data: Any = b"\n".join(each) if name == "MOST_BYTES" else each
    monkeypatch.setattr(records_module, name, 1000 if name == "MOST_BYTES" else 7)
    ledger = Ledger()
    ledger.feed(Chunk("x", data, "topic"))
    report = ledger.reported()
    assert (report.records, report.events, report.duplicates, report.ok) == (103, 100, 0, True)
    (bad,) = report.malformed_first
    assert re.match(r"topic, behind \d+ of what was read there, record \d+ of", bad.where)
    assert report.bytes >= sum(map(len, each))


def test_a_message_of_mqtt_is_taken_apart_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [msgspec.msgpack.encode({"n": n}) for n in range(20)]
    monkeypatch.setattr(mqtt, "MOST_VALUES", 8)
    found = [chunk.data for chunk in mqtt._chunks("t", b"".join(values) + b"\xa5abc")]
    assert found == [values[:8], values[8:16], [*values[16:], b"\xa5abc"]]
    assert [chunk.data for chunk in mqtt._chunks("t", b'{"a":1}')] == [b'{"a":1}']


def test_hosts_runs_and_partitions_are_kept_apart() -> None:
    """Two hosts in one partition, and a run whose events are in two, one read after the other."""
    records = whole_run(200)
    other = whole_run(50, Stream("aaaaaaaaaaaaaaaa", "node-2"))
    ledger = Ledger()
    ledger.feed(Chunk("t, partition 1", lines(records[100:] + other)))
    ledger.feed(Chunk("t, partition 0", lines(records[:100])))
    report = ledger.reported()
    assert report.ok
    assert [host.runs[0].events for host in report.hosts.values()] == [200, 50]
    assert report.hosts["node-1"].runs[0].places[0].out_of_order == 0


def test_more_runs_or_cpus_than_any_host_has_are_malformed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MOST_RUNS", 3)
    runs = [Stream(f"{n:016x}").event(1) for n in range(5)]
    report = verified(runs + runs)
    assert (len(report.hosts["node-1"].runs), report.malformed) == (3, 4)
    assert "there are too many runs" in report.malformed_first[0].reason
    monkeypatch.setattr(run_module, "MOST_TRACKS", 3)
    marks = [("bulk", cpu, 1, 1) for cpu in range(4)]
    report = verified([Stream().heartbeat(*marks)])
    assert (len(only_run(report).places), report.malformed) == (2, 1), "and its own"


def test_memory_is_for_gaps_and_not_for_events() -> None:
    stream = Stream()
    ledger = Ledger()
    for start in range(1, 100_001, 1000):
        ledger.feed(Chunk("f", lines(stream.event(n) for n in range(start, start + 1000))))
    (track,) = ledger._tracks.values()
    track.sync()
    assert (len(track.seen), track.seen.total) == (1, 100_000)


# ---------------------------------------------------------------- files and the command


def test_messagepack_is_cut_into_records() -> None:
    values = [{"a": [1, -1, 2**40, 1.5, None, True], "b" * 40: "x" * 300, "c": b"y"}, [], "z", {}]
    encoded = [msgspec.msgpack.encode(one) for one in values]
    data = b"".join(encoded)
    assert split_msgpack(data) == (encoded, len(data))
    whole, end = split_msgpack(data[:-3])
    assert (whole, end) == (encoded[:1] + encoded[1:2], len(encoded[0]) + 1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_a_file_with_those_that_it_was_rotated_to(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], encoding: str, packed: bool
) -> None:
    records = whole_run(3000)
    codec: Any = msgspec.json if encoding == "json" else msgspec.msgpack
    end = b"\n" if encoding == "json" else b""
    parts = [records[:1000], records[1000:2500], records[2500:]]
    old, before, now = (b"".join(codec.encode(r) + end for r in part) for part in parts)
    path = tmp_path / "e.ndjson"
    path.write_bytes(now)
    (tmp_path / "e.ndjson.1").write_bytes(before)
    (tmp_path / ("e.ndjson.2" + ".gz" * packed)).write_bytes(gzip.compress(old) if packed else old)
    (tmp_path / "e.ndjson.old").write_bytes(b"nothing of ours")
    assert main(["verify", str(path), str(tmp_path / "e.ndjson.1"), "--json"]) == 0
    report = msgspec.json.decode(capfd.readouterr().out, type=VerifyReport)
    assert (report.events, report.duplicates, report.malformed) == (3000, 0, 0)
    assert len(report.sources) == 3
    assert only_place(report).out_of_order == 0


def test_exit_codes_and_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "e.ndjson"
    records = whole_run()
    path.write_bytes(lines(records))
    assert main(["verify", str(path)]) == 0
    assert capfd.readouterr().out.endswith("0 unexplained: all is explained\n")
    del records[7]
    path.write_bytes(lines(records))
    assert main(["verify", str(path)]) == 1
    out = capfd.readouterr().out
    assert "unexplained: 7\n" in out
    assert "WRONG: 1 missing and unexplained\n" in out
    assert main(["verify", str(tmp_path / "none")]) == 2
    assert main(["verify", "--from", "nowhere", str(path)]) == 2
    assert main(["verify", "kafka://127.0.0.1:1/x"]) == 2
    assert main(["verify", "mqtt://127.0.0.1:1/x"]) == 2


def test_a_compressed_file_that_is_torn_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "e.gz"
    path.write_bytes(gzip.compress(lines(whole_run()))[:-20])
    assert main(["verify", str(path)]) == 2


def test_the_last_line_may_have_no_end_or_be_torn(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "e.ndjson"
    data = lines(whole_run())
    for less, malformed in ((1, 0), (20, 1)):
        path.write_bytes(data[:-less])
        assert main(["verify", str(path), "--json"]) == 0
        report = json.loads(capfd.readouterr().out)
        assert (report["records"], report["malformed"]) == (22, malformed)


def test_what_is_no_stream_is_not_said_to_be_whole(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.log"
    path.write_bytes(b"a line\nanother\n")
    assert main(["verify", str(path)]) == 1
    assert "2 malformed; 0 unexplained: THIS IS NO STREAM OF EVENTS" in capfd.readouterr().out
    path.write_bytes(b"")
    assert main(["verify", str(path)]) == 0


def test_a_line_without_an_end_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It takes no more room than a record may have."""
    monkeypatch.setattr(files, "_MOST_LINE", 1000)
    path = tmp_path / "e.ndjson"
    path.write_bytes(b"x" * (2 * files.CHUNK_BYTES + 10) + b"\n" + lines(whole_run()))
    assert main(["verify", str(path), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["malformed"], report["events"]) == (3, 20)


def test_from_an_offset_and_a_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    records = whole_run()
    path = tmp_path / "e.ndjson"
    path.write_bytes(lines(records))
    offset = len(lines(records[:5]))
    for text, events in ((str(offset), 16), (str(offset + 1), 15), ("end", 0), ("0", 20)):
        assert main(["verify", str(path), "--from", text, "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["events"] == events
    moment = rfc3339(records[5]["time_ns"])
    assert main(["verify", str(path), "--from", moment, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["events"] == 16, "what was at that time, too"
    start = parse_start("2030-01-01T00:00:00Z")
    assert start.time_ns == 1_893_456_000 * SECOND
    with pytest.raises(Exception, match="without a zone"):
        parse_start("2030-01-01T00:00:00")
