"""How encoded events wait, go together and are cut, for every sink. No broker, no clock."""

from __future__ import annotations

from collections import Counter

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from streamer.events.batch import Batch, Encoding
from streamer.events.spans import Span, Spans
from streamer.sinks.batching import SizeLimit, TopicQueue
from streamer.sinks.encoded import (
    EncodedBatch,
    Extent,
    counted,
    halves,
    joined,
    kinds_of,
    number_of,
    split_at,
    take_out,
)
from streamer.sinks.kafka.encoded import encode
from streamer.sinks.kafka.record_batch import split_lines
from tests.unit.spooled import batch as real
from tests.unit.spooled import event as real_event


class FileOpen(msgspec.Struct, tag_field="event", tag="file.open"):
    time_ns: int
    path: str


class NetClose(msgspec.Struct, tag_field="event", tag="net.close"):
    time_ns: int
    port: int


encodings = st.sampled_from(["json", "msgpack"])
lengths = st.lists(st.integers(0, 500), min_size=1, max_size=60)


def encoded(*lengths: int, encoding: Encoding = "json") -> EncodedBatch:
    """One event per length; every other one is a `net.close`, which has no path."""
    events = [
        NetClose(index, 1) if index % 2 else FileOpen(index, "x" * length)
        for index, length in enumerate(lengths)
    ]
    return encode(Batch(events), encoding)


def records(*batches: EncodedBatch) -> list[bytes]:
    found: list[bytes] = []
    for batch in batches:
        found += split_lines(batch.data) if isinstance(batch.data, bytes) else batch.data
    return found


def assert_same(parts: list[EncodedBatch], whole: EncodedBatch) -> None:
    """The parts are the whole: in order, and in all that is counted."""
    assert records(*parts) == records(whole)
    assert [time for part in parts for time in part.marks] == list(whole.marks)
    assert [cls for part in parts for cls in part.types] == whole.types
    assert sum((Counter(part.kinds) for part in parts), Counter()) == Counter(whole.kinds)
    assert sum(part.held for part in parts) == whole.held
    for part in parts:
        assert part.number == len(part.types) == len(records(part)) > 0
        assert part.size == sum(map(len, records(part)))


# ---------------------------------------------------------------- cutting


@given(lengths, st.integers(1, 2000), encodings)
def test_cutting_loses_nothing_and_keeps_order(
    lengths: list[int], most: int, encoding: Encoding
) -> None:
    whole = encoded(*lengths, encoding=encoding)
    parts = list(whole.cut(Extent(most)))
    assert_same(parts, whole)
    for part in parts:
        assert part.size <= most or part.number == 1


@given(st.lists(lengths, min_size=1, max_size=4), encodings, st.data())
def test_batches_are_divided_at_any_event(
    many: list[list[int]], encoding: Encoding, data: st.DataObject
) -> None:
    batches = [encoded(*lengths, encoding=encoding) for lengths in many]
    total = number_of(batches)
    index = data.draw(st.integers(0, total))
    before, behind = split_at(batches, index)
    assert number_of(before) == index
    assert records(*before, *behind) == records(*batches)
    if total > 1:
        first, second = halves(batches)
        assert first
        assert second
        assert records(*first, *second) == records(*batches)
    out = data.draw(st.sets(st.integers(0, total - 1)))
    left, taken = take_out(batches, out)
    everything = records(*batches)
    assert {index: records(one) for index, one in taken.items()} == {
        index: [everything[index]] for index in out
    }
    assert records(*left) == [each for i, each in enumerate(everything) if i not in out]


@given(st.lists(lengths, min_size=2, max_size=5), encodings)
def test_batches_that_are_joined_stay_what_they_were(
    many: list[list[int]], encoding: Encoding
) -> None:
    batches = [encoded(*lengths, encoding=encoding) for lengths in many]
    assert_same(batches, joined(batches))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), encodings, st.data())
def test_of_what_is_divided_and_joined_each_part_says_which_events_it_has(
    sizes: list[int], encoding: Encoding, data: st.DataObject
) -> None:
    """Its numbers, and how many of each kind: of several drains, cut anywhere."""
    batches, first = [], 1
    for size in sizes:
        events = [real_event(("file.open", "net.close")[n % 2], first + n) for n in range(size)]
        spans: Spans = {("bulk", 0): Span(first, first + size - 1)}
        batches.append(encode(Batch(events, spans=spans), encoding))
        first += size
    index = data.draw(st.integers(0, first - 1))
    for part, last in zip(split_at(batches, index), (index, first - 1), strict=True):
        kinds = kinds_of(part)
        if kinds:
            right = {("bulk", 0): Span(last - kinds.total() + 1, last, kinds)}
            assert counted(part) == joined(part).counted() == right
        else:
            assert counted(part) == {}


def test_joined_batches_of_two_rings_have_the_spans_of_both() -> None:
    batches = [encode(real(kind, 1, 2), "json") for kind in ("file.open", "process.exec")]
    assert joined(batches).counted() == {
        ("bulk", 0): Span(1, 2, {"file.open": 2}),
        ("critical", 0): Span(1, 2, {"process.exec": 2}),
    }


# ---------------------------------------------------------------- the queue of a topic


GROWTH = 4


def topic_queue(batch_bytes: int, linger: float) -> TopicQueue:
    return TopicQueue(Extent(batch_bytes), linger, GROWTH)


def drain(queue: TopicQueue, most: int = 10**9) -> list[list[EncodedBatch]]:
    taken = []
    while queue:
        taken.append(queue.take(most, 0.0))
    return taken


def test_a_backlog_of_single_events_becomes_few_batches() -> None:
    queue = topic_queue(10_000_000, linger=60)
    events = [encoded(length % 500) for length in range(1000)]
    for one in events:
        queue.put(one, 0.0)
    held = queue.clear()
    assert len(held) < 30
    assert records(*held) == records(*events)
    assert sum((Counter(part.kinds) for part in held), Counter()) == {"file.open": 1000}


def test_a_record_batch_is_due_when_it_is_full_or_after_lingering() -> None:
    queue = topic_queue(1000, linger=5)
    assert queue.due_at() is None
    queue.put(encoded(300), 10.0)
    queue.put(encoded(300), 12.0)
    assert queue.due_at() == 15.0
    queue.put(encoded(600), 13.0)
    assert queue.due_at() is not None
    assert queue.due_at() <= 13.0  # type: ignore[operator]
    assert len(queue.take(10**9, 13.0)) == 3
    assert queue.due_at() is None
    queue.put(encoded(1), 20.0)
    assert queue.due_at() == 25.0


def test_what_is_left_lingers_from_when_the_record_batch_before_was_taken() -> None:
    queue = topic_queue(1000, linger=5)
    for _ in range(6):
        queue.put(encoded(700), 10.0)
    queue.take(10**9, 11.0)
    assert queue
    assert queue.due_at() == 11.0 + 5


@given(st.lists(lengths, min_size=1, max_size=12), st.integers(1, 4000), st.integers(1, 9000))
def test_record_batches_have_at_most_the_size_that_goes(
    many: list[list[int]], batch_bytes: int, most: int
) -> None:
    queue = topic_queue(batch_bytes, linger=0)
    batches = [encoded(*lengths) for lengths in many]
    for one in batches:
        queue.put(one, 0.0)
    taken = drain(queue, most)
    assert records(*(part for parts in taken for part in parts)) == records(*batches)
    for parts in taken:
        size = sum(part.size for part in parts)
        assert size <= min(most, GROWTH * batch_bytes) or number_of(parts) == 1
    assert queue.due_at() is None


def test_a_backlog_goes_in_larger_record_batches() -> None:
    queue = topic_queue(1000, linger=0)
    for _ in range(100):
        queue.put(encoded(300), 0.0)
    sizes = [sum(part.size for part in parts) for parts in drain(queue)]
    assert max(sizes) > 0.8 * GROWTH * 1000


def test_a_backlog_is_shared_among_the_places_that_there_are() -> None:
    """Without one nothing grows, however much came at once; with one, up to the limit."""
    for batches, places, expected in ((5, 5, 10), (5, 20, 10), (10, 5, 20), (100, 5, 80)):
        queue = TopicQueue(Extent(10_000, 10), linger=0, growth=8)
        for _ in range(batches):
            queue.put(encoded(*[1] * 10), 0.0)
        assert number_of(queue.take(10**9, 0.0, places)) == expected


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=40),
    st.integers(1, 40),
    st.integers(1, 9),
    encodings,
)
def test_no_batch_has_more_events_than_a_backlog_allows(
    many: list[int], full: int, growth: int, encoding: Encoding
) -> None:
    queue = TopicQueue(Extent(10**9, full), linger=0, growth=growth)
    batches = [encoded(*([20] * number), encoding=encoding) for number in many]
    for one in batches:
        queue.put(one, 0.0)
    taken = drain(queue)
    assert records(*(part for parts in taken for part in parts)) == records(*batches)
    assert all(0 < number_of(parts) <= growth * full for parts in taken)
    assert queue.number == 0


def test_trimming_lets_the_newest_go() -> None:
    queue = topic_queue(1000, linger=0)
    batches = [encoded(300, number) for number in range(8)]
    for one in batches:
        queue.put(one, 0.0)
    held = queue.held
    out = queue.trim(held // 2)
    assert queue.held <= held // 2
    assert records(*queue.clear(), *out) == records(*batches)


# ---------------------------------------------------------------- the size that a broker takes


def test_a_limit_that_was_learned_grows_back() -> None:
    limit = SizeLimit(1_000_000)
    limit.refused(800_000, 0.0)
    assert limit.now(0.0) == 400_000
    assert limit.now(limit.FIRST_WAIT - 0.1) == 400_000
    assert limit.now(limit.FIRST_WAIT) == 800_000
    assert limit.now(10 * limit.FIRST_WAIT) == 1_000_000


def test_a_limit_that_is_refused_again_and_again_is_tried_less_often() -> None:
    limit, now, refusals = SizeLimit(1_000_000), 0.0, 0
    real = 6000
    while now < 86400:
        if limit.now(now) > real:
            limit.refused(limit.now(now), now)
            refusals += 1
        now += 1.0
    assert limit.now(now) > real / 4
    assert refusals < 50


def test_a_batch_made_before_the_limit_was_known_does_not_lower_it_again() -> None:
    limit = SizeLimit(1_000_000)
    for _ in range(5):  # all that was under way
        limit.refused(800_000, 0.0)
    assert limit.now(0.0) == 400_000
