"""Which numbers events have, and how many of each kind: of events, and of what was encoded."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.events.batch import Batch, Encoding
from streamer.events.spans import (
    OWN_RECORDS,
    Place,
    Span,
    Spans,
    join_spans,
    spans_of_records,
    without_kinds,
)

RUN, OTHER = "0123456789abcdef", "fedcba9876543210"


class Open(msgspec.Struct, tag_field="event", tag="file.open"):
    id: str
    seq: int
    cpu: int
    path: str = '{"event":"process.exec","id":"x-critical-9-9"}\n'


class Close(msgspec.Struct, tag_field="event", tag="net.close"):
    id: str
    seq: int
    cpu: int


class Exec(msgspec.Struct, tag_field="event", tag="process.exec"):
    id: str
    seq: int
    cpu: int


class Beat(msgspec.Struct, tag_field="event", tag="stream.heartbeat"):
    id: str
    seq: int


RINGS: dict[Any, str] = {Open: "bulk", Close: "bulk", Exec: "critical"}


def event(kind: Any, cpu: int, seq: int, run: str = RUN) -> Any:
    if kind is Beat:
        return Beat(f"{run}-stream-{seq}", seq)
    return kind(f"{run}-{RINGS[kind]}-{cpu}-{seq}", seq, cpu)


EVENTS = st.lists(
    st.builds(
        event, st.sampled_from((Open, Close, Exec, Beat)), st.integers(0, 3), st.integers(1, 50)
    ),
    min_size=1,
)


def place_of(one: Any, *run: str) -> Any:
    return (*(OWN_RECORDS if isinstance(one, Beat) else (RINGS[type(one)], one.cpu)), *run)


def expected(events: list[Any], *run: str) -> Spans:
    found: dict[Place, tuple[list[int], Counter[str]]] = {}
    for one in events:
        numbers, kinds = found.setdefault(place_of(one, *run), ([], Counter()))
        numbers.append(one.seq)
        kinds[type(one).__struct_config__.tag] += 1
    return {p: Span(min(numbers), max(numbers), kinds) for p, (numbers, kinds) in found.items()}


@given(EVENTS, st.sampled_from(((), (OTHER,))), st.sampled_from(("json", "msgpack")))
def test_events_and_their_records_say_the_same(
    events: list[Any], run: tuple[str, ...], encoding: Encoding
) -> None:
    """Of this run and of another; what a path says of other events is none of it."""
    made = [
        event(type(one), getattr(one, "cpu", 0), one.seq, run[0] if run else RUN) for one in events
    ]
    right = expected(made, *run)
    batch = Batch(made, spans=without_kinds(right))
    assert batch.counted() == right
    assert spans_of_records(batch.records(encoding), batch.spans) == right
    for piece in (1, 100, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("streamer.events.spans.PIECE_BYTES", piece)
            assert spans_of_records(batch.lines("json"), batch.spans) == right


def test_many_small_records_take_little_room() -> None:
    """A spool may have a batch of 64 MiB, of which heads would take six times as much."""
    records = b'{"event":"file.open","id":"r-bulk-0-1"}\n' * 100_000
    spans: Spans = {("bulk", 0): Span(1, 1)}
    tracemalloc.start()
    found = spans_of_records(records, spans)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == {("bulk", 0): Span(1, 1, {"file.open": 100_000})}
    assert peak < 10 << 20


def test_a_part_of_a_drain_is_within_the_spans_of_all() -> None:
    made = [event(Open, 0, 5), event(Close, 0, 7), event(Open, 1, 2)]
    drained: Spans = {("bulk", 0): Span(1, 9), ("bulk", 1): Span(2, 4), ("critical", 0): Span(1, 1)}
    part = Batch(made, spans=drained).only({"file.open"})
    assert part.counted() == {
        ("bulk", 0): Span(1, 9, {"file.open": 1}),
        ("bulk", 1): Span(2, 4, {"file.open": 1}),
    }


@pytest.mark.parametrize(
    "record",
    [
        b"10:00 file.open /etc",
        b"\xff\xfe",
        b'{"event":"x","id":"x"}',
        b'{"event":"file.open","id":"r-bulk-0-%d"}' % (1 << 63),
        b'{"event":"file.open","id":"r-bulk-0-' + b"9" * 5000 + b'"}',
        b'{"event":"file.open","id":"r-bulk-1-5"}',
        b"\n".join(b'{"event":"kind.%d","id":"r-bulk-0-5"}' % n for n in range(257)),
        b'{"event":"file.open","id":"r-bulk-0-5","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=["text", "bytes", "id", "number", "digits", "place", "kinds", "depth"],
)
def test_what_no_run_has_encoded_has_the_numbers_alone(record: bytes) -> None:
    """A spool may have any: a loss is told of it, and that has to be possible."""
    spans: Spans = {("bulk", 0): Span(1, 9, {"file.open": 3})}
    for records in (record + b"\n", record.split(b"\n")):
        assert spans_of_records(records, spans) == {("bulk", 0): Span(1, 9)}


def test_records_of_the_stream_need_no_spans() -> None:
    """A sink joins a heartbeat, or a summary, with events that come with it."""
    made = [event(Open, 0, 5), event(Beat, 0, 7), event(Open, 0, 6)]
    spans: Spans = {("bulk", 0): Span(1, 9)}
    found = spans_of_records(Batch(made).lines("json"), spans)
    assert found == {
        ("bulk", 0): Span(5, 6, {"file.open": 2}),
        OWN_RECORDS: Span(7, 7, {"stream.heartbeat": 1}),
    }


def test_a_cpu_is_one_however_it_is_written() -> None:
    records = [
        b'{"event":"file.open","id":"r-bulk-%s-%d"}' % one for one in ((b"0", 3), (b"00", 1))
    ]
    spans: Spans = {("bulk", 0): Span(1, 9)}
    assert spans_of_records(records, spans) == {("bulk", 0): Span(1, 3, {"file.open": 2})}


def test_two_together() -> None:
    one: Spans = {("bulk", 0): Span(3, 5, {"file.open": 2}), ("bulk", 1): Span(1, 1)}
    other: Spans = {("bulk", 0): Span(1, 4, {"file.open": 1, "net.close": 1})}
    assert join_spans(one, other) == {
        ("bulk", 0): Span(1, 5, {"file.open": 3, "net.close": 1}),
        ("bulk", 1): Span(1, 1),
    }
