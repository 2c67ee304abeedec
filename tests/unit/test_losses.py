"""Losses that are merged: few records, bounded memory, and no number that is not there."""

from __future__ import annotations

import tracemalloc
from collections import defaultdict
from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from streamer.agent.losses import (
    LOG_SECONDS,
    MOST_BACKOFF,
    MOST_RANGES,
    MOST_REASONS,
    OTHER_REASONS,
    LossBook,
    LossLog,
    LossTotals,
    Lost,
    Owed,
    merged,
)
from streamer.events.spans import Span, Spans
from streamer.events.stream import SeqRange
from tests.unit.bounds import bounded_memory

RANGES = st.lists(
    st.builds(
        lambda ring, cpu, first, width: SeqRange(ring, cpu, first, first + width),
        st.sampled_from(["critical", "bulk"]),
        st.integers(0, 2),
        st.integers(1, 300),
        st.integers(0, 9),
    ),
    max_size=60,
)


def numbers(ranges: list[SeqRange]) -> dict[tuple[str, int], set[int]]:
    found: dict[tuple[str, int], set[int]] = defaultdict(set)
    for one in ranges:
        found[one.ring, one.cpu] |= set(range(one.seq_from, one.seq_to + 1))
    return found


@given(RANGES)
@example([SeqRange("bulk", 0, 1, 1), SeqRange("bulk", 0, 3, 3)])
@example([SeqRange("bulk", 0, 1, 9), SeqRange("bulk", 0, 2, 3), SeqRange("bulk", 0, 10, 10)])
def test_merged_ranges_have_the_same_numbers(ranges: list[SeqRange]) -> None:
    joined = merged(ranges, most=1000)
    assert numbers(joined) == numbers(ranges)
    assert sum(one.seq_to - one.seq_from + 1 for one in joined) == sum(
        map(len, numbers(ranges).values())
    )
    for one, other in pairwise(joined):  # what touches is one range
        assert (one.ring, one.cpu) != (other.ring, other.cpu) or one.seq_to + 1 < other.seq_from


@given(RANGES, st.integers(1, 20))
def test_too_many_ranges_are_joined_where_least_is_between(
    ranges: list[SeqRange], most: int
) -> None:
    joined = merged(ranges, most)
    exact = numbers(ranges)
    assert len(joined) <= max(most, len(exact))
    found = numbers(joined)
    assert all(exact[place] <= found[place] for place in exact)
    # The ends are never moved outwards.
    for place, seqs in found.items():
        assert (min(seqs), max(seqs)) == (min(exact[place]), max(exact[place]))


def test_a_loss_in_the_kernel_is_merged_by_ring_and_cpu() -> None:
    book = LossBook()
    assert not book
    for seq in range(1, 3001):
        for ring, cpu in (("bulk", 0), ("bulk", 1), ("critical", 0)):
            where = (SeqRange(ring, cpu, 2 * seq, 2 * seq),)
            book.add(Lost("kernel", "no room", 1, {"file.open": 1}, where, ring, cpu))
    assert book
    taken = book.take()
    assert {(lost.ring, lost.cpu): lost.count for lost in taken} == {
        ("bulk", 0): 3000,
        ("bulk", 1): 3000,
        ("critical", 0): 3000,
    }
    for lost in taken:
        assert lost.kinds == {"file.open": 3000}
        assert len(lost.ranges) <= MOST_RANGES
        assert (lost.ranges[0].seq_from, lost.ranges[-1].seq_to) == (2, 6000)
    assert not book
    assert book.take() == []


def test_reasons_without_end_take_bounded_room() -> None:
    """Each may quote a broker. What does not get its own line is counted all the same."""
    book = LossBook()
    for number in range(1000):
        book.add(Lost("sink", f"refused: {number}", 2, {"file.open": 2}))
    taken = book.take()
    assert len(taken) == MOST_REASONS + 1
    assert sum(lost.count for lost in taken) == 2000
    assert taken[-1].reason == OTHER_REASONS
    for number in range(MOST_REASONS):  # and all have room again
        book.add(Lost("sink", f"again: {number}", 1, {}))
    assert OTHER_REASONS not in {lost.reason for lost in book.take()}


def test_losses_that_nobody_takes_need_bounded_memory() -> None:
    """A sink that is away for days has as many gaps as there were."""
    book = LossBook()
    with bounded_memory():
        for seq in range(5000):
            where = (SeqRange("bulk", 0, 2 * seq, 2 * seq),)
            book.add(Lost("kernel", "no room", 1, {"file.open": 1}, where, "bulk", 0))


def test_what_was_delivered_is_forgotten() -> None:
    owed = Owed()
    with bounded_memory():
        for seq in range(2000):
            owed.add(Lost("kernel", "no room", 1, {"file.open": 1}))
            owed.told([seq], owed.take(), under_way=0)
    assert len(owed.untold(under_way=0)) == 0


def loss(count: int) -> Lost:
    return Lost("kernel", f"reason {count}", count, {"file.open": count})


def counts(lost: list[Lost]) -> list[int]:
    return [one.count for one in lost]


def test_what_a_sink_gave_up_names_no_numbers_of_the_stream_s_own_records() -> None:
    """They are of no ring: a reader would look for them among events."""
    spans: Spans = {
        ("stream", 0): Span(1, 9),
        ("bulk", 1): Span(2, 3, {"file.open": 2}),
        ("bulk", 1, "before"): Span(4, 5, {"file.open": 1}),
        ("stream", 0, "before"): Span(1, 1),
    }
    lost = Lost.of_sink({"file.open": 4}, "x" * 1000, spans)
    assert lost.ranges == (
        SeqRange("bulk", 1, 2, 3, kinds={"file.open": 2}),
        SeqRange("bulk", 1, 4, 5, "before", {"file.open": 1}),
    )
    assert (lost.count, len(lost.reason)) == (4, 300)
    assert lost.cells() == {("bulk", 1, "file.open"): 2}


def test_ranges_that_are_joined_have_as_many_of_each_kind_as_both() -> None:
    opens, both = {"file.open": 2}, {"file.open": 1, "net.close": 3}
    ranges = [SeqRange("bulk", 1, 1, 4, kinds=opens), SeqRange("bulk", 1, 5, 9, kinds=both)]
    assert merged(ranges) == [SeqRange("bulk", 1, 1, 9, kinds={"file.open": 3, "net.close": 3})]
    apart = [ranges[0], SeqRange("bulk", 1, 6, 9, kinds=both)]
    assert Lost("sink", "refused", 6, {}, tuple(apart)).cells() == {
        ("bulk", 1, "file.open"): 3,
        ("bulk", 1, "net.close"): 3,
    }
    assert merged(apart, 1)[0].kinds == {"file.open": 3, "net.close": 3}


def test_what_was_told_and_given_up_is_owed_again() -> None:
    """Of several on their way the newest; what was delivered is not owed any more."""
    owed = Owed()
    owed.told([1, 2, 3, 4], map(loss, (1, 2, 3, 4)), under_way=0)
    owed.dropped(2, 1, 3)
    refused = owed.refused
    assert counts(owed.take()) == [2, 3]
    assert (refused, owed.refused) == (True, False)
    owed.told([5, 6], map(loss, (2, 3)), under_way=1)  # the first was delivered
    assert counts(owed.untold(under_way=3)) == [4, 2, 3]
    assert owed.untold(under_way=0) == []


def test_what_is_told_again_is_all_that_was_told() -> None:
    ranges = SeqRange("bulk", 1, 2, 3), SeqRange("bulk", 1, 4, 5, "before")
    told = [
        Lost("sink", "refused", 4, {"file.open": 4}, ranges),
        Lost("kernel", "no room", 2, {"file.open": 1}, ranges[:1], "bulk", 1),
    ]
    owed = Owed()
    owed.told([1, 2], told, under_way=0)
    assert owed.untold(under_way=2) == told


def test_what_was_told_takes_little_room_while_a_spool_holds_it() -> None:
    """For days, with one a second."""
    owed, seconds = Owed(), 300
    tracemalloc.start()
    for second in range(seconds):
        for cpu in range(MOST_RANGES):
            first = 10**12 + 7919 * cpu * second
            spans: Spans = {("bulk", cpu): Span(first, first + 11, {"file.open": 12})}
            owed.add(Lost.of_sink({"file.open": 12}, "full", spans))
        owed.told([second], owed.take(), under_way=second)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < seconds * 1500


def test_what_was_delivered_by_the_end_is_not_told_to_the_next_run() -> None:
    owed = Owed()
    owed.told([1, 2, 3], map(loss, (1, 2, 3)), under_way=0)
    owed.add(loss(7))
    assert counts(owed.untold(under_way=1)) == [7, 3]


def seconds_until_told(owed: Owed) -> int:
    return next(n for n in range(1, 1000) if owed.tick())


def test_a_sink_that_gives_up_what_it_is_told_is_asked_later_and_later() -> None:
    """A whole second at least; and at once again when it has taken one."""
    owed = Owed()
    assert seconds_until_told(owed) == 1
    waits = []
    for seq in range(1, 10):
        owed.told([seq], [loss(1)], under_way=0)
        owed.dropped(1, seq, seq)
        waits.append(seconds_until_told(owed))
    assert waits == [2, 3, 5, 9, 17, 33, *[MOST_BACKOFF + 1] * 3]
    owed.told([10], owed.take(), under_way=0)
    owed.told([11], [loss(1)], under_way=0)  # the one before was delivered
    owed.dropped(1, 11, 11)
    assert seconds_until_told(owed) == 2


def test_totals_have_what_has_no_kind() -> None:
    totals = LossTotals()
    totals.add(Lost("sink", "full", 5, {"file.open": 3}), "kafka://one")
    totals.add(Lost("decode", "short", 2, {}))
    assert totals.counts == {
        ("sink", "kafka://one", "file.open"): 3,
        ("sink", "kafka://one", ""): 2,
        ("decode", "", ""): 2,
    }


def test_a_reason_that_comes_again_is_one_reason() -> None:
    """And many CPUs are no reasons: each keeps its own numbers."""
    book = LossBook()
    for _ in range(2 * MOST_REASONS):
        book.add(Lost("sink", "refused", 1, {}))
    for cpu in range(4 * MOST_REASONS):
        book.add(Lost("kernel", "no room", 1, {}, (SeqRange("bulk", cpu, 1, 1),), "bulk", cpu))
    book.add(Lost("sink", "another", 1, {}))
    reasons = [lost.reason for lost in book.take()]
    assert reasons == ["refused", *["no room"] * (4 * MOST_REASONS), "another"]


def test_losses_are_logged_at_once_and_then_as_a_rate() -> None:
    log = LossLog()
    lost = Lost("kernel", "no room", 10, {}, ring="bulk", cpu=0)
    log.add([lost])
    assert log.lines(100.0) == ["10 events lost in the kernel of bulk: no room"]
    for second in range(int(LOG_SECONDS) - 1):
        log.add([lost])
        assert log.lines(101.0 + second) == []
    log.add([lost])
    assert log.lines(100.0 + LOG_SECONDS) == [
        "600 events, 10.0/s, lost in the kernel of bulk: no room"
    ]
    assert log.lines(300.0) == []
    log.add([Lost("sink", "refused", 1, {})], "kafka://one")
    log.add([lost])
    assert log.lines(1000.0) == [
        "1 events lost in kafka://one: refused",
        "10 events lost in the kernel of bulk: no room",
    ]


def test_a_loss_that_began_anew_has_no_rate() -> None:
    """Of the time in which there was none."""
    log = LossLog()
    lost = Lost("kernel", "no room", 10, {}, ring="bulk", cpu=0)
    for now, rate in ((100.0, ""), (100.0 + 2 * LOG_SECONDS, ""), (100.0 + 3.5 * LOG_SECONDS, "x")):
        log.add([lost])
        (line,) = log.lines(now)
        assert ("/s," in line) is bool(rate)


def test_a_place_that_ended_as_it_should_is_not_spoken_of() -> None:
    log = LossLog()
    log.add([Lost("sink", "refused", 1, {})], "one")
    log.add([Lost("sink", "refused", 1, {})], "one more")
    log.forget("one")
    assert log.lines(1.0) == ["1 events lost in one more: refused"]


def test_reasons_without_end_fill_no_log() -> None:
    log = LossLog()
    for number in range(1000):
        log.add([Lost("sink", str(number), 1, {})], "one")
    lines = log.lines(1.0)
    assert len(lines) <= 2 * MOST_REASONS + 1
    assert sum(int(line.split()[0]) for line in lines) == 1000
