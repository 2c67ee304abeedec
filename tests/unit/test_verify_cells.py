"""`streamer verify`: the account of each ring, CPU and kind, in a stream that the test makes."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest

from streamer.events.summaries import SUMMARIES
from streamer.verify.cells import GivenUp
from streamer.verify.ledger import Ledger
from streamer.verify.records import Chunk, Loss, Range
from streamer.verify.report import Cell, Run
from streamer.verify.run import MOST_BEATS
from tests.unit.test_verify import Record, Stream, lines, only_run, verified

Cells = dict[str, list[int]]
OPEN, CLOSE = "file.open", "net.close"


def mark(cpu: int, seq: int, kinds: Cells, skipped: int = 0) -> Record:
    return {"ring": "bulk", "cpu": cpu, "seq": seq, "read": seq, "skipped": skipped, "kinds": kinds}


def beat(stream: Stream, *marks: Record, final: bool = False, **more: Any) -> Record:
    """With the sums of the marks, unless `more` says otherwise."""
    names = ("produced", "filtered", "shed", "lost", "read")
    counts: dict[str, Record] = {}
    for one in marks:
        for kind, cell in one["kinds"].items():
            sums = counts.setdefault(kind, dict.fromkeys(names, 0))
            for name, count in zip(names, cell, strict=True):
                sums[name] += count
    fields: Record = {"counts": counts, "marks": list(marks), "sink_counts": {}, "final": final}
    return stream.stream("heartbeat", **(fields | more))


def two_cpus(stream: Stream, *, swapped: bool = False) -> list[Record]:
    """Three and two opens on two CPUs, and two closes on the first; `swapped`: one as the other."""
    opens = [stream.event(n, cpu=0) for n in (1, 2, 3)] + [stream.event(n, cpu=1) for n in (1, 2)]
    closes = [stream.event(n, cpu=0, kind=CLOSE) for n in (4, 5)]
    if swapped:
        closes[0], opens[3] = stream.event(4, cpu=0), stream.event(1, cpu=1, kind=CLOSE)
    return opens + closes


FINAL = (
    mark(0, 5, {OPEN: [7, 3, 1, 0, 3], CLOSE: [2, 0, 0, 0, 2]}),
    mark(1, 2, {OPEN: [2, 0, 0, 0, 2]}),
)


def run_of(*records: Record) -> Run:
    return only_run(verified(records))


def test_what_is_there_of_each() -> None:
    stream = Stream()
    run = run_of(stream.manifest(), *two_cpus(stream), beat(stream, *FINAL, final=True))
    assert run.problems == []
    assert [place.kinds for place in run.places] == [
        {OPEN: Cell(7, 3, 1, 0, 3, 3, 0), CLOSE: Cell(2, 0, 0, 0, 2, 2, 0)},
        {OPEN: Cell(2, 0, 0, 0, 2, 2, 0)},
    ]


def test_another_kind_than_was_read_there() -> None:
    """Each number is there, and of each kind as many as were read: but not where they were."""
    stream = Stream()
    events = two_cpus(stream, swapped=True)
    run = run_of(stream.manifest(), *events, beat(stream, *FINAL, final=True))
    assert run.problems == [
        "bulk cpu 0, file.open: 4 are there, of 3 that were read",
        "bulk cpu 1, net.close: 1 are there, of 0 that were read",
        "bulk cpu 0, net.close: 1 are not there, 0 were given up",
        "bulk cpu 1, file.open: 1 are not there, 0 were given up",
    ]


def test_where_the_sink_gave_up() -> None:
    stream = Stream()
    events = [one for one in two_cpus(stream) if one["id"][-4:] not in ("-0-2", "-1-2")]
    loss = stream.loss("sink", 2, ("bulk", 0, 2, 2), ("bulk", 1, 2, 2), kinds={OPEN: 2})
    run = run_of(stream.manifest(), *events, loss, beat(stream, *FINAL, final=True))
    assert run.problems == []
    assert [place.kinds[OPEN].not_there for place in run.places] == [1, 1]


def given_up(stream: Stream, first: int, second: int) -> Run:
    """Two opens are away, one of each CPU: it is told that so many were given up there."""
    events = [one for one in two_cpus(stream) if one["id"][-4:] not in ("-0-2", "-1-2")]
    places = ("bulk", 0, 1, 5, {OPEN: first}), ("bulk", 1, 1, 2, {OPEN: second})
    loss = stream.loss("sink", 2, *places, kinds={OPEN: 2})
    return run_of(stream.manifest(), *events, loss, beat(stream, *FINAL, final=True))


def test_what_the_sink_gave_up_of_each() -> None:
    """Of each ring, CPU and kind: what was read is there, or was given up."""
    run = given_up(Stream(), 1, 1)
    assert (run.problems, run.unexplained) == ([], 0)
    assert [place.kinds[OPEN] for place in run.places] == [
        Cell(7, 3, 1, 0, 3, 2, 1, 1),
        Cell(2, 0, 0, 0, 2, 1, 1, 1),
    ]


def test_what_is_away_elsewhere_than_it_was_given_up() -> None:
    """As many numbers are missing as were told, and on no CPU as many."""
    run = given_up(Stream(), 2, 0)
    assert run.unexplained == 1
    assert run.problems == ["1 missing and unexplained"]


def test_another_kind_is_away_than_was_given_up() -> None:
    stream = Stream()
    events = two_cpus(stream)
    events.pop(0)
    loss = stream.loss("sink", 1, ("bulk", 0, 1, 1, {CLOSE: 1}), kinds={CLOSE: 1})
    run = run_of(stream.manifest(), *events, loss, beat(stream, *FINAL, final=True))
    assert "bulk cpu 0, file.open: 1 are not there, 0 were given up" in run.problems


def test_what_a_broker_deleted_need_not_be_given_up() -> None:
    stream = Stream()
    records = [stream.manifest(), *two_cpus(stream), beat(stream, *FINAL, final=True)]
    ledger = Ledger()
    for chunk in (
        Chunk("topic, partition 0", lines(records[:2])),
        Chunk("topic, partition 0", lines(records[3:]), deleted=1),
    ):
        ledger.feed(chunk)
    run = only_run(ledger.reported(["kafka://b/topic"]))
    assert run.places[0].kinds[OPEN].not_there == 1
    assert run.problems == []


def test_where_it_is_not_said_of_all_that_was_given_up() -> None:
    """Of one it is not known on which CPU it was read: that may be either."""
    stream = Stream()
    events = [one for one in two_cpus(stream) if one["id"][-4:] not in ("-0-2", "-1-2")]
    places = ("bulk", 0, 1, 5, {OPEN: 1}), ("bulk", 1, 1, 2)
    loss = stream.loss("sink", 2, *places, kinds={OPEN: 2})
    run = run_of(stream.manifest(), *events, loss, beat(stream, *FINAL, final=True))
    assert (run.problems, run.unexplained) == ([], 0)
    assert [place.kinds[OPEN].given_up for place in run.places] == [1, 0]


def test_what_a_loss_says_of_each_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does not say, or says of more than it has, may be of any."""
    monkeypatch.setattr("streamer.verify.cells.MOST_PLACES", 1)
    told = GivenUp()

    def take(count: int, cpu: int, there: int) -> None:
        told.take(Loss("sink", count, {OPEN: count}, [Range("bulk", cpu, 1, 9, "", {OPEN: there})]))

    take(3, 0, 2)
    assert (told.at(("bulk", 0)), told.elsewhere) == ({OPEN: 2}, {OPEN: 1})
    take(4, 0, 5)
    assert (told.at(("bulk", 0)), told.elsewhere) == ({OPEN: 2}, {OPEN: 5})
    take(7, 1, 7)
    assert (told.at(("bulk", 1)), told.elsewhere) == ({}, {OPEN: 12})
    take(1, 0, 1)
    assert (told.at(("bulk", 0)), told.elsewhere) == ({OPEN: 3}, {OPEN: 12})


def test_a_loss_of_many_cpus_takes_no_longer_for_each() -> None:
    """It has a range for each, every second: there may be thousands."""
    stream, count = Stream(), 20_000
    places = [("bulk", cpu, 1, 1, {OPEN: 1}) for cpu in range(count)]
    records = lines([stream.manifest(), stream.loss("sink", count, *places, kinds={OPEN: count})])
    begun = time.process_time()
    Ledger().feed(Chunk("file", records))
    assert time.process_time() - begun < 5


def test_what_is_not_at_its_end_is_not_asked_for() -> None:
    stream = Stream()
    run = run_of(stream.manifest(), *two_cpus(stream)[:3], beat(stream, *FINAL))
    assert run.problems == []
    assert [place.kinds[OPEN].not_there for place in run.places] == [0, 0]


@pytest.mark.parametrize(
    ("marks", "more", "what"),
    [
        ([mark(0, 5, {OPEN: [4, 0, 0, 0, 4]})], {},
         "bulk cpu 0: the kinds are not as many as the numbers"),
        ([mark(0, 5, {OPEN: [6, 0, 0, 0, 5]})], {},
         "bulk cpu 0: the kinds are not as many as the numbers"),
        ([mark(0, 5, {OPEN: [5, 0, 0, 0, 5]}, skipped=1)], {},
         "bulk cpu 0: the kinds are not as many as the numbers"),
        ([mark(0, 5, {OPEN: [5, 0, 0, 1, 5], CLOSE: [0, 0, 0, 0, 0]})], {},
         "bulk cpu 0, file.open: more filtered, shed, lost and read than was produced"),
        (FINAL, {"counts": {}},
         "file.open: the CPUs together are not what it counts in all"),
        ([], {"sink_counts": {"file:x": {"received": 3, "delivered": 2, "dropped": 0, "pending": 1,
                                         "kinds": {OPEN: [2, 2, 0]}}}},
         "file:x: its kinds are not what it counts in all"),
        ([], {"sink_counts": {"file:x": {"received": 3, "delivered": 2, "dropped": 1, "pending": 0,
                                         "kinds": {OPEN: [2, 2, 1], CLOSE: [1, 0, 0]}}}},
         "file:x: more of file.open delivered and dropped than received"),
        ([], {"sink_counts": {"file:x": {
            "received": 2, "delivered": 1, "dropped": 1, "pending": 0, "kinds": {OPEN: [2, 1, 1]},
            "dropped_of": [{"ring": "bulk", "cpu": n, "kinds": {OPEN: 1}} for n in (0, 1)]}}},
         "file:x: more of file.open dropped on the CPUs than in all"),
        ([], {"sink_counts": {"file:x": {
            "received": 2, "delivered": 2, "dropped": 0, "pending": 0, "kinds": {OPEN: [2, 2, 0]},
            "dropped_of": [{"ring": "bulk", "cpu": 0, "kinds": {CLOSE: 1}}]}}},
         "file:x: more of net.close dropped on the CPUs than in all"),
    ],
)  # fmt: skip
def test_a_heartbeat_that_contradicts_itself(
    marks: list[Record], more: dict[str, Any], what: str
) -> None:
    stream = Stream()
    run = run_of(stream.manifest(), beat(stream, *marks, **more))
    assert f"in 1 heartbeats: {what}" in run.problems


def test_an_account_that_holds() -> None:
    """Also where all was filtered, numbers were given up unused, and some is in the ring."""
    stream = Stream()
    sink = {"received": 3, "delivered": 1, "dropped": 1, "pending": 1, "kinds": {OPEN: [3, 1, 1]}}
    marks = mark(0, 0, {OPEN: [9, 9, 0, 0, 0]}), mark(1, 7, {OPEN: [9, 2, 1, 1, 3]}, skipped=1)
    run = run_of(stream.manifest(), beat(stream, *marks, sink_counts={"file:x": sink}))
    assert run.problems == []


def test_what_comes_behind_the_last_account_is_not_in_it() -> None:
    stream = Stream()
    events = [stream.event(n) for n in (1, 2, 3, 4, 5)]
    middle = beat(stream, mark(0, 3, {OPEN: [3, 0, 0, 0, 3]}))
    run = run_of(stream.manifest(), *events[:3], middle, *events[3:])
    assert (run.problems, run.places[0].kinds) == ([], {OPEN: Cell(3, 0, 0, 0, 3, 5, 0)})


def test_nothing_is_away_where_all_is_not_there_yet() -> None:
    """Another partition may have it."""
    stream = Stream()
    ledger = Ledger()
    events, end = two_cpus(stream), beat(stream, *FINAL, final=True)
    ledger.feed(Chunk("0", lines([stream.manifest(), *events[:3], end])))
    ledger.feed(Chunk("1", lines(events[4:5])))
    away = {
        complete: [
            cell.not_there
            for place in only_run(ledger.reported(complete=complete)).places
            for cell in place.kinds.values()
        ]
        for complete in (False, True)
    }
    assert away == {False: [0, 0, 0], True: [0, 2, 1]}


def test_nothing_is_away_by_an_account_that_is_not_the_last() -> None:
    stream, after = Stream(), Stream("fedcba9876543210")
    after.boot_ns = stream.boot_ns + 20 * 1_000_000_000
    events = [stream.event(n) for n in (1, 2)]
    records = [stream.manifest(), *events, beat(stream, mark(0, 3, {OPEN: [3, 0, 0, 0, 3]}))]
    previous = {"run_id": stream.run_id, "ended": "undelivered", "untold": []}
    (host,) = verified([*records, after.manifest(previous=previous)]).hosts.values()
    assert host.runs[0].end == "undelivered"
    assert host.runs[0].places[0].kinds == {OPEN: Cell(3, 0, 0, 0, 3, 2, 0)}


def test_what_the_agent_makes_is_there_without_a_ring() -> None:
    stream, kind = Stream(), min(SUMMARIES)
    summary = stream.stream("") | {"event": kind}
    made = {kind: {"produced": 1, "filtered": 0, "shed": 0, "lost": 0, "read": 1}}
    counts = beat(stream, *FINAL)["counts"] | made
    end = beat(stream, *FINAL, counts=counts, final=True)
    run = run_of(stream.manifest(), *two_cpus(stream), summary, end)
    assert (run.problems, run.kinds[kind].there) == ([], 1)


def test_memory_does_not_grow_with_heartbeats() -> None:
    """Of many CPUs: the account of each is kept of the last heartbeat alone."""
    stream, ledger = Stream(), Ledger()
    kinds = [f"kind.{n}" for n in range(20)]

    def feed(turn: int) -> None:
        numbers = range(10_000 * turn, 10_000 * turn + 20)
        rows = {kind: [n, 0, 0, 0, n] for kind, n in zip(kinds, numbers, strict=True)}
        marks = [mark(cpu, sum(numbers), rows) for cpu in range(200)]
        total = sum(numbers)
        sink: Record = {"received": total, "delivered": total, "dropped": 0, "pending": 0}
        sink["kinds"] = {kind: [n, n, 0] for kind, n in zip(kinds, numbers, strict=True)}
        sinks = {f"file:{n}": sink for n in range(200)}
        none = dict.fromkeys(kinds, 0)
        dropped = [{"ring": "bulk", "cpu": cpu, "kinds": none} for cpu in range(200)]
        sinks["file:0"] = sink | {"dropped_of": dropped}
        ledger.feed(Chunk("file", lines([beat(stream, *marks, sink_counts=sinks)])))

    for turn in (1, 2):
        feed(turn)
    tracemalloc.start()
    for turn in range(3, 3 + MOST_BEATS):
        feed(turn)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 3_000_000


def test_what_another_release_counts_besides() -> None:
    stream = Stream()
    sink = {
        "received": 3,
        "delivered": 3,
        "dropped": 0,
        "pending": 0,
        "kinds": {OPEN: [3, 3, 0, 9]},
    }
    one = mark(0, 5, {OPEN: [5, 0, 0, 0, 5]})
    told = beat(stream, one, sink_counts={"file:x": sink})
    one["kinds"][OPEN].append(9)
    run = run_of(stream.manifest(), told)
    assert (run.heartbeats, run.problems) == (1, [])


def test_long_names_are_cut() -> None:
    stream, name = Stream(), "x" * 100_000
    one = mark(0, 1, {"y" * 100_000: [1, 0, 0, 0, 5]}) | {"ring": name}
    sink = {"received": 1, "delivered": 2, "dropped": 0, "pending": 0, "kinds": {name: [1, 2, 0]}}
    run = run_of(stream.manifest(), beat(stream, one, sink_counts={name: sink}))
    assert len(run.problems) == 4
    assert max(map(len, run.problems)) < 300


def test_a_cpu_that_is_none() -> None:
    stream = Stream()
    report = verified([stream.manifest(), beat(stream, mark(65536, 1, {}))])
    assert (report.malformed, only_run(report).heartbeats) == (1, 0), "no kernel has such a CPU"


def test_without_it_nothing_is_asked() -> None:
    """As in the heartbeats of other releases."""
    stream = Stream()
    counts = {OPEN: {"produced": 2, "filtered": 0, "shed": 0, "lost": 0, "read": 2}}
    events = [stream.event(n) for n in (1, 2, 3)]
    end = beat(stream, mark(0, 3, {}), counts=counts, final=True)
    run = run_of(stream.manifest(), *events, end)
    assert run.problems == ["file.open: 3 are there, of 2 that were read"]
    assert run.places[0].kinds == {OPEN: Cell(0, 0, 0, 0, 0, 3, 0)}


def test_duplicates_in_several_partitions() -> None:
    """Each event is there once, whatever else its broker has of it."""
    stream = Stream()
    begin, events, end = stream.manifest(), two_cpus(stream), beat(stream, *FINAL, final=True)
    ledger = Ledger()
    for lane, records in (
        ("0", [begin, *events[:4], end]),
        ("1", [*events[3:], *events[:2]]),
        ("2", [end, *events[::-1], begin]),
    ):
        ledger.feed(Chunk(lane, lines(records)))
    run = only_run(ledger.reported())
    assert (run.problems, run.duplicates) == ([], 12)
    assert [place.kinds[OPEN].there for place in run.places] == [3, 2]


def late(stream: Stream, *marks: Record) -> list[Record]:
    """What is there of a run from 121 on, with its first heartbeat behind 150, and its end."""
    events = [stream.event(n) for n in range(121, 161)]
    end = beat(stream, mark(0, 160, {OPEN: [160, 0, 0, 0, 160]}), final=True)
    return [*events[:30], beat(stream, *marks), *events[30:], end]


@pytest.mark.parametrize(
    "marks",
    [
        [mark(0, 150, {OPEN: [150, 0, 0, 0, 150]})],
        [mark(0, 100, {OPEN: [100, 0, 0, 0, 100]})],
        [mark(0, 150, {OPEN: [150, 0, 0, 0, 130]}) | {"read": 130}],
        [],
    ],
    ids=["now", "before", "another worker's", "never"],
)
def test_an_account_of_some_time_before(marks: list[Record]) -> None:
    """As an agent tells it of a CPU of which it does not close, or before it has heard of what
    another worker has read and published. Nothing is missing that came before the beginning.
    """
    stream = Stream()
    stream.manifest()
    run = run_of(*late(stream, *marks))
    assert (run.whole, run.problems) == (False, [])


def test_what_is_missing_behind_the_first_account() -> None:
    """Its number is explained by a loss of another kind."""
    stream = Stream()
    stream.manifest()
    first, last = ({OPEN: [n, 0, 0, 0, n], CLOSE: [9, 0, 0, 0, 9]} for n in (141, 151))
    events = [stream.event(n) for n in (149, 150)]
    before = stream.loss("sink", 1, ("bulk", 0, 148, 148), kinds={OPEN: 1})
    loss = stream.loss("sink", 1, ("bulk", 0, 151, 151), kinds={CLOSE: 1})
    end = beat(stream, mark(0, 160, last), final=True)
    more = [stream.event(n) for n in range(152, 161)]
    run = run_of(before, *events, beat(stream, mark(0, 150, first)), loss, *more, end)
    assert run.problems == ["file.open: 1 were read, and are neither there nor given up"]


def test_more_than_was_read_without_end() -> None:
    stream = Stream()
    events = [stream.event(1, cpu=cpu, kind=CLOSE) for cpu in range(150)]
    marks = [mark(cpu, 1, {OPEN: [1, 0, 0, 0, 1]}) for cpu in range(150)]
    run = run_of(stream.manifest(), *events, beat(stream, *marks, final=True))
    assert sum("cpu" in one for one in run.problems) == 100
    assert run.problems[-1] == "so it is of 200 more of a ring, CPU and kind"


def test_contradictions_without_end() -> None:
    stream = Stream()
    marks = [mark(cpu, 5, {OPEN: [4, 0, 0, 0, 4]}) for cpu in range(150)]
    run = run_of(stream.manifest(), beat(stream, *marks), beat(stream, *marks))
    assert len(run.problems) == 101
    assert (
        run.problems[0] == "in 2 heartbeats: bulk cpu 0: the kinds are not as many as the numbers"
    )
    assert run.problems[-1] == "in 100 heartbeats: more contradictions"
