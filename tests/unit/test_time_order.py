"""Several rings in one look: in the order of time, and each ring in its own."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from streamer.events.batch import Batch
from streamer.events.spans import Span
from streamer.ring.reader import in_time_order


class Exec(msgspec.Struct, tag_field="event", tag="process.exec"):
    boot_ns: int
    number: int


class Open(msgspec.Struct, tag_field="event", tag="file.open"):
    boot_ns: int
    number: int


TIMES = st.lists(st.integers(0, 50), max_size=40)


@given(TIMES, TIMES)
def test_two_rings_are_merged_by_time(one: list[int], other: list[int]) -> None:
    execs = [Exec(time, number) for number, time in enumerate(sorted(one))]
    opens = [Open(time, number) for number, time in enumerate(sorted(other))]
    merged = in_time_order(
        [
            Batch(execs, {"process.exec": len(execs)}, {("critical", 0): Span(1, 9)}),
            Batch(opens, {"file.open": len(opens)}, {("bulk", 0): Span(5, 7)}),
        ]
    )
    times = [event.boot_ns for event in merged.events]
    assert times == sorted(one + other)
    assert [event for event in merged.events if isinstance(event, Exec)] == execs
    assert [event for event in merged.events if isinstance(event, Open)] == opens
    assert merged.kinds == {"process.exec": len(execs), "file.open": len(opens)}
    assert merged.spans == {("critical", 0): Span(1, 9), ("bulk", 0): Span(5, 7)}


@given(TIMES, TIMES, TIMES)
def test_ring_buffers_of_one_ring_have_kinds_in_common(
    one: list[int], other: list[int], third: list[int]
) -> None:
    batches = []
    for cpu, times in enumerate((one, other, third)):
        opens = [Open(time, number) for number, time in enumerate(sorted(times))]
        batches.append(Batch(opens, {"file.open": len(opens)}, {("bulk", cpu): Span(1, 7)}))
    merged = in_time_order(batches)
    assert [event.boot_ns for event in merged.events] == sorted(one + other + third)
    assert merged.kinds == {"file.open": len(merged.events)}
    assert merged.spans == {("bulk", cpu): Span(1, 7) for cpu in range(3)}


@given(TIMES, TIMES)
def test_a_ring_keeps_its_order_also_where_times_do_not_rise(
    one: list[int], other: list[int]
) -> None:
    """A program that was interrupted has its time from before, and its number as well."""
    execs = [Exec(time, number) for number, time in enumerate(one)]
    opens = [Open(time, number) for number, time in enumerate(other)]
    merged = in_time_order([Batch(execs), Batch(opens)]).events
    assert [event for event in merged if isinstance(event, Exec)] == execs
    assert [event for event in merged if isinstance(event, Open)] == opens


def test_what_one_ring_had_is_not_copied() -> None:
    batch = Batch([Open(1, 1)])
    assert in_time_order([batch]) is batch
