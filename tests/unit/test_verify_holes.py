"""`streamer verify` where a broker deleted records before they could be read.

Nothing that may have been there is a false alarm, and nothing else is excused by it.
"""

from __future__ import annotations

from typing import Any

import pytest

from streamer.events.summaries import SUMMARIES
from streamer.verify.holes import MOST_HOLES
from streamer.verify.ledger import Ledger
from streamer.verify.records import Chunk
from streamer.verify.report import Deleted, VerifyReport
from streamer.verify.text import report_text
from tests.unit.test_verify import SECOND, Record, Stream, lines, mark, only_run, whole_run

LANE = "events, partition 0"


def hole(offsets: int, lane: str = LANE) -> Chunk:
    return Chunk(lane, [], deleted=offsets)


def read(*parts: list[Record] | Chunk, lane: str = LANE) -> Ledger:
    """Records in one partition; chunks may be of others."""
    ledger = Ledger()
    for part in parts:
        ledger.feed(part if isinstance(part, Chunk) else Chunk(lane, lines(part)))
    return ledger


def verdict(report: VerifyReport) -> tuple[dict[str, int], int, bool]:
    return report.explained, report.unexplained, report.ok


def beats(stream: Stream, events: list[int], every: int = 5) -> list[Record]:
    """Events with these numbers, and after each a heartbeat that knows it, `every` seconds."""
    records = []
    for number in events:
        records.append(stream.event(number))
        records.append(stream.heartbeat(("bulk", 0, number, number)))
        stream.boot_ns += every * SECOND
    return records


def end(stream: Stream, seq: int, read: dict[str, int] | None = None) -> list[Record]:
    return [stream.heartbeat(("bulk", 0, seq, seq), read=read or {"file.open": seq}, final=True)]


def test_what_was_in_a_hole_is_told_and_no_alarm() -> None:
    records = whole_run(20)
    report = read(records[:8], hole(6), records[14:]).reported(["kafka://b/events"])
    assert verdict(report) == ({"deleted": 6}, 0, True)
    assert report.deleted == [Deleted(LANE, 6)]
    assert only_run(report).kinds["file.open"].missing == 0
    text = report_text(report)
    assert "  deleted by the broker before they were read: 6 offsets of events, partition 0" in text
    assert "6 cannot be verified, as the broker deleted records; 0 unexplained" in text
    assert text.endswith(": all that was read is explained")
    assert "lost" not in text


def test_without_a_hole_the_same_is_wrong() -> None:
    records = whole_run(20)
    report = read(records[:8], records[14:]).reported()
    assert verdict(report) == ({}, 6, False)
    assert report.deleted == []


def test_more_than_there_were_offsets_is_wrong() -> None:
    """Where no record of the stream itself is missing: no loss can have been told there."""
    records = whole_run(20)
    report = read(records[:8], hole(5), records[14:]).reported()
    assert verdict(report) == ({"deleted": 5}, 1, False)
    assert only_run(report).kinds["file.open"].missing == 1


def test_a_loss_may_have_been_told_in_a_hole() -> None:
    """A number of the stream's own records is missing as well."""
    stream = Stream()
    records = [stream.manifest(), stream.event(1)]
    stream.loss("kernel", 100, ("bulk", 0, 2, 101))
    records += [stream.event(102), *end(stream, 102)]
    report = read(records[:2], hole(1), records[2:]).reported()
    assert report.explained == {"deleted": 100}
    assert report.unexplained == 0


def test_what_is_missing_long_before_a_hole_or_long_after_it_is_wrong() -> None:
    stream = Stream()
    before = [stream.manifest(), *beats(stream, [1, 3, 4, 5, 6, 7])]
    lost = beats(stream, [8, 9])
    after = beats(stream, [10, 11, 12, 13, 14, 16]) + end(stream, 16, {"file.open": 16})
    report = read(before, hole(len(lost)), after).reported()
    assert verdict(report) == ({"deleted": 2}, 2, False)
    (place,) = only_run(report).places
    assert [gap.seq_from for gap in place.gaps] == [2, 15]
    assert only_run(report).kinds["file.open"].missing == 2


@pytest.mark.parametrize(("number", "wrong"), [(5, 1), (6, 0), (12, 0), (13, 1)])
def test_what_is_missing_within_ten_seconds_of_a_hole_may_have_been_there(
    number: int, wrong: int
) -> None:
    """As what was late by an interrupt, or what another worker had read."""
    stream = Stream()
    before = [stream.manifest(), *beats(stream, [1, 2, 3, 4, 5, 6, 7])]
    lost = beats(stream, [8, 9])
    after = beats(stream, [10, 11, 12, 13, 14, 15]) + end(stream, 15, {"file.open": 15})
    gone = f"{stream.run_id}-bulk-0-{number}"
    kept = [[one for one in part if one["id"] != gone] for part in (before, after)]
    report = read(kept[0], hole(len(lost) + 1), kept[1]).reported()
    assert verdict(report) == ({"deleted": 3 - wrong}, wrong, not wrong)


def goes_on(host: str = "node-1", lane: str = LANE) -> Chunk:
    """Another run of the host, minutes later."""
    other = Stream("fedcba9876543210", host)
    other.boot_ns += 600 * SECOND
    return Chunk(lane, lines([other.manifest(), other.heartbeat()]))


def problems_of(ledger: Ledger, run_id: str = Stream().run_id, **options: Any) -> list[str]:
    found = [run for host in ledger.reported(**options).hosts.values() for run in host.runs]
    (run,) = [run for run in found if run.run_id == run_id]
    return run.problems


NO_END = ["it has no end, and nobody says what became of it"]


def test_an_end_may_have_been_in_a_hole() -> None:
    begin = whole_run(5)[:-1]
    assert problems_of(read(begin, goes_on())) == NO_END
    assert problems_of(read(begin, hole(3), goes_on())) == []
    assert problems_of(read(begin[:-2], hole(3), goes_on())) == []
    assert problems_of(read(begin, hole(3)), ended=True) == []
    assert problems_of(read(begin[:4], hole(3), begin[4:], goes_on())) == NO_END
    assert problems_of(read(begin, hole(3, "events, partition 1"), goes_on())) == NO_END


def test_a_run_that_had_ended_or_had_not_begun_is_judged_as_ever() -> None:
    ended = [one for one in whole_run(5) if not one["id"].endswith("bulk-0-5")]
    later = Stream("fedcba9876543210")
    later.boot_ns += 600 * SECOND
    begun = [one for one in whole_run(5, later) if not one["id"].endswith("bulk-0-1")]
    report = read(ended, hole(100), begun).reported()
    runs = report.hosts["node-1"].runs
    assert [run.unexplained for run in runs] == [1, 1]
    assert [run.kinds["file.open"].missing for run in runs] == [1, 1]


def test_a_hole_in_the_partition_of_another_host_excuses_nothing() -> None:
    records = whole_run(20)
    del records[8:10]
    other = Chunk("events, partition 1", lines(whole_run(3, Stream("a" * 16, "node-2"))))
    report = read(records, other, hole(9, "events, partition 1")).reported()
    assert report.unexplained == 2


@pytest.mark.parametrize("final", [True, False])
def test_a_hole_beside_a_run_excuses_it_where_it_may_have_been_moved(final: bool) -> None:
    """Another run of its host is there; and so it may have been itself, by a topic that grew."""
    records = whole_run(20)
    del records[8:10]
    beside = "events, partition 1"
    parts = records if final else records[:-1]
    report = read(parts, goes_on(lane=beside), hole(9, beside)).reported(ended=True)
    assert report.unexplained == (2 if final else 0)


TOPICS = "stream, partition 2", "file, partition 2"


@pytest.mark.parametrize(("offsets", "unexplained"), [(3, 0), (2, 1)])
@pytest.mark.parametrize("none", [True, False])
def test_of_a_topic_of_its_own_as_many_as_there_were_offsets(
    offsets: int, unexplained: int, none: bool
) -> None:
    """Its losses are elsewhere, and all there; also where all that was in it was deleted."""
    records = whole_run(6 if not none else 3)
    own, events = [records[0], records[-1]], records[1:4]
    ledger = read(Chunk(TOPICS[0], lines(own)))
    if not none:
        ledger.feed(Chunk(TOPICS[1], lines(events)))
    ledger.feed(hole(offsets, TOPICS[1]))
    report = ledger.reported()
    assert verdict(report) == ({"deleted": offsets}, unexplained, not unexplained)
    assert only_run(report).kinds["file.open"].missing == unexplained


def test_a_hole_in_the_topic_of_the_stream_s_own_records() -> None:
    """Any loss may have been told there; but not if all of its numbers are there."""
    for gone in (True, False):
        stream = Stream()
        own = [stream.manifest()]
        loss = stream.loss("sink", 2, ("bulk", 0, 4, 5), kinds={"file.open": 2}) if gone else None
        events = [stream.event(n) for n in (1, 2, 3, 6)]
        last = end(stream, 6)
        ledger = read(Chunk(TOPICS[1], lines(events)), Chunk(TOPICS[0], lines(own)))
        ledger.feed(hole(1, TOPICS[0]))
        ledger.feed(Chunk(TOPICS[0], lines(last)))
        report = ledger.reported()
        expected = ({"deleted": 2}, 0, True) if loss else ({"deleted": 1}, 1, False)
        assert verdict(report) == expected


def test_summaries_have_no_numbers_and_may_have_been_there() -> None:
    kind, stream = min(SUMMARIES), Stream()
    records = [stream.manifest(), stream.event(1)]
    last = end(stream, 1, {"file.open": 1, kind: 3})
    for offsets, missing in ((3, 0), (2, 1)):
        run = only_run(read(records, hole(offsets), last).reported())
        assert run.kinds[kind].missing == missing
        assert bool(run.problems) is bool(missing)


def test_what_was_safe_in_the_spool_of_a_killed_run_may_have_been_there() -> None:
    killed, after = Stream(), Stream("fedcba9876543210")
    records = [killed.manifest(), killed.event(1), killed.heartbeat(("bulk", 0, 4, 4))]
    after.boot_ns += 5 * SECOND
    previous = {"run_id": killed.run_id, "ended": "killed", "untold": [], "marks": [mark(4, 5)]}
    later = [after.manifest(previous=previous)]
    after.boot_ns += 11 * SECOND
    later.append(after.heartbeat())
    assert not read(records, later).reported().ok
    report = read(records, hole(3), later).reported()
    assert report.ok
    assert report.explained.get("deleted") == 4


def test_of_many_holes_the_last_is_widened() -> None:
    """Nothing that was in one is an alarm, and room is taken for so many."""
    stream, ledger = Stream(), Ledger()
    ledger.feed(Chunk(LANE, lines([stream.manifest()])))
    for first in range(1, 21 * MOST_HOLES, 7):
        there = [first, first + 1, first + 2, first + 4, first + 5]
        ledger.feed(Chunk(LANE, lines(beats(stream, there, every=11))))
        stream.heartbeat()  # of these, and of events, one is missing
        ledger.feed(hole(2))
    last = first + 7
    ledger.feed(Chunk(LANE, lines([*beats(stream, [last]), *end(stream, last)])))
    (run,) = ledger._runs.values()
    assert len(run._holes.between(LANE)) == MOST_HOLES
    report = ledger.reported()
    assert report.deleted == [Deleted(LANE, 6 * MOST_HOLES)]
    assert report.unexplained == MOST_HOLES, "between two holes that are told apart"
    assert report.explained == {"deleted": 5 * MOST_HOLES}


def test_many_partitions_are_named_up_to_ten() -> None:
    ledger = read(*(hole(1, f"t, partition {n}") for n in range(12)))
    text = report_text(ledger.reported(["x"]))
    assert text.count("1 offset of t, partition ") == 10
    assert "  so it is of 2 more partitions\n" in text
