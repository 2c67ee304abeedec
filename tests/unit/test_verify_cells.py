"""`streamer verify`: the account of each ring, CPU and kind, in a stream that the test makes."""

from __future__ import annotations

from typing import Any

import pytest

from streamer.verify.report import Cell, Run
from tests.unit.test_verify import Record, Stream, only_run, verified

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
    ]


def test_where_the_sink_gave_up() -> None:
    stream = Stream()
    events = [one for one in two_cpus(stream) if one["id"][-4:] not in ("-0-2", "-1-2")]
    loss = stream.loss("sink", 2, ("bulk", 0, 2, 2), ("bulk", 1, 2, 2), kinds={OPEN: 2})
    run = run_of(stream.manifest(), *events, loss, beat(stream, *FINAL, final=True))
    assert run.problems == []
    assert [place.kinds[OPEN].given_up for place in run.places] == [1, 1]


def test_what_is_not_at_its_end_is_not_asked_for() -> None:
    stream = Stream()
    run = run_of(stream.manifest(), *two_cpus(stream)[:3], beat(stream, *FINAL))
    assert run.problems == []
    assert [place.kinds[OPEN].given_up for place in run.places] == [0, 0]


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


def test_contradictions_without_end() -> None:
    stream = Stream()
    marks = [mark(cpu, 5, {OPEN: [4, 0, 0, 0, 4]}) for cpu in range(150)]
    run = run_of(stream.manifest(), beat(stream, *marks))
    assert len(run.problems) == 101
    assert run.problems[-1] == "in 50 heartbeats: more contradictions"
