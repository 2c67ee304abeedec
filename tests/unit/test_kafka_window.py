"""The window of a partition against a model of a broker: order, exactly once, refusals.

The model keeps what Kafka's brokers keep of a producer: epoch, last number, and the numbers of
the last five batches; and it takes any number of a producer that it has nothing of.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamer.events.batch import Batch
from streamer.sinks.encoded import EncodedBatch
from streamer.sinks.kafka import window as window_module
from streamer.sinks.kafka.client import partition_of
from streamer.sinks.kafka.encoded import encode, timed
from streamer.sinks.kafka.window import (
    LAST_EPOCH,
    MOST_IN_FLIGHT,
    PAUSE_SECONDS,
    SEQUENCES,
    Answer,
    Numbered,
    Window,
    backoff,
)

LARGE, TIME, SEQUENCE, EPOCH, NOT_LEADER, REPLICAS = 10, 32, 45, 47, 6, 20


class Event(msgspec.Struct, tag_field="event", tag="file.open"):
    time_ns: int


def events(start: int, count: int) -> list[EncodedBatch]:
    return [encode(Batch([Event(n) for n in range(start, start + count)]), "json")]


def numbers(batches: list[EncodedBatch]) -> list[int]:
    return [number for batch in batches for number in timed(batch)[1]]


class State(NamedTuple):
    epoch: int
    last: int
    recent: tuple[tuple[int, int], ...]


class Request(NamedTuple):
    """As it was written to a connection."""

    producer: int
    epoch: int
    sequence: int
    content: list[int]


class Broker:
    """A partition's leader. `bad` are events that it never takes, `limit` events to a batch."""

    def __init__(self, bad: frozenset[int] = frozenset(), limit: int = 10**9) -> None:
        self.bad = bad
        self.limit = limit
        self.names_bad = False
        self.log: list[int] = []
        self.states: dict[int, State] = {}

    def produce(self, producer: int, epoch: int, entry: Numbered) -> Answer:
        return self.take(Request(producer, epoch, entry.sequence, numbers(entry.batches)))

    def take(self, request: Request) -> Answer:
        producer, epoch, sequence, content = request
        if len(content) > self.limit:
            return Answer.of_code(LARGE)
        refused = {i: f"no {n}" for i, n in enumerate(content) if n in self.bad}
        if refused:
            return Answer.of_code(TIME, "the broker's own words", refused if self.names_bad else {})
        first, last = sequence, (sequence + len(content) - 1) % SEQUENCES
        state = self.states.get(producer)
        if state is not None:
            if epoch < state.epoch:
                return Answer.of_code(EPOCH)
            if epoch == state.epoch and (first, last) in state.recent:
                return Answer(0)
            expected = (state.last + 1) % SEQUENCES if epoch == state.epoch else 0
            if first != expected:
                return Answer.of_code(SEQUENCE)
        recent = state.recent if state is not None and state.epoch == epoch else ()
        kept = (*recent, (first, last))[-MOST_IN_FLIGHT:]
        self.states[producer] = State(epoch, last, kept)
        self.log += content
        return Answer(0)


class Run:
    """Moves batches between a window and a broker, over connections that fail as it is told."""

    def __init__(self, broker: Broker, first_sequence: int = 0) -> None:
        self.broker = broker
        self.window = Window(lambda: 1.0)
        self.ids = iter(range(100, 10**6))
        self.window.identify(next(self.ids))
        self.window._next = first_sequence
        self.way: deque[tuple[Numbered, int, int]] = deque()
        self.left_behind: deque[Request] = deque()
        self.now = 0.0
        self.delivered: list[int] = []
        self.dropped: list[tuple[int, str]] = []
        self.sent = 0

    def send(self) -> None:
        """All that may be sent."""
        window = self.window
        tried = [bool(entry.tries) for entry in window.entries]
        assert tried == sorted(tried, reverse=True)  # what was never sent is behind what was
        while window.may_send(self.now) and (entry := window.next()) is not None:
            if window.producer_id is None:
                assert not window.in_flight
                window.identify(next(self.ids))
            assert window.producer_id is not None
            window.sent(entry, self.now)
            self.sent += 1
            assert window.in_flight <= MOST_IN_FLIGHT
            self.way.append((entry, window.producer_id, window.epoch))

    def answer(self, code: int | None = None, lost: bool = False) -> None:
        """The broker handles the first request under way, or answers with an error code."""
        entry, producer, epoch = self.way.popleft()
        said = self.broker.produce(producer, epoch, entry) if code is None else Answer.of_code(code)
        self.take(entry, Answer.lost("gone") if lost else said)

    def take(self, entry: Numbered, said: Answer) -> None:
        outcome = self.window.answered(entry, said, self.now)
        self.delivered += numbers(outcome.delivered)
        for batch, reason in outcome.dropped:
            self.dropped += [(number, reason) for number in timed(batch)[1]]

    def break_connection(self, handled: int, *, late: bool = False) -> None:
        """The broker still handles so many requests; no answer of any arrives.

        `late`: it comes to the others much later, when what follows is written already.
        """
        for index, (entry, producer, epoch) in enumerate(self.way):
            if index < handled:
                self.broker.produce(producer, epoch, entry)
            elif late:
                content = numbers(entry.batches)
                self.left_behind.append(Request(producer, epoch, entry.sequence, content))
        lost, self.way = list(self.way), deque()
        for entry, _, _ in lost:
            self.take(entry, Answer.lost("gone"))

    def settle(self) -> None:
        """Until all is done, without further faults."""
        for _ in range(100_000):
            self.send()
            if self.way:
                self.answer()
            elif self.window:
                self.now = max(self.now, self.window.retry_at)
            else:
                return
        raise AssertionError("it never ends")


# ---------------------------------------------------------------- any sequence of faults

FAULTS = ("add", "send", "answer", "error", "lost", "break", "late", "come", "wait")
steps = st.lists(st.tuples(st.sampled_from(FAULTS), st.integers(0, 6)), max_size=120)


def play(
    run: Run,
    plan: list[tuple[str, int]],
    on_break: Callable[[], None] = lambda: None,
    *,
    late: bool = True,
) -> int:
    """Carry out a plan; how many events were submitted."""
    submitted = 0
    for what, number in plan:
        if what == "add" and len(run.window.entries) < 3 * MOST_IN_FLIGHT:
            run.window.add(events(submitted, number + 1))
            submitted += number + 1
        elif what == "send":
            run.send()
        elif what == "answer" and run.way:
            run.answer()
        elif what == "error" and run.way:
            run.answer(code=(NOT_LEADER, 19, 7, 56, 29)[number % 5])
        elif what == "lost" and run.way:
            run.answer(lost=True)
            run.break_connection(0)
        elif what == "break" and run.way:
            run.break_connection(number)
            on_break()
        elif what == "late" and late and run.way:
            run.break_connection(number, late=True)
        elif what == "come" and run.left_behind:
            run.broker.take(run.left_behind.popleft())
        elif what == "wait":
            run.now += number
    run.settle()
    return submitted


@settings(max_examples=400)
@given(
    steps,
    st.frozensets(st.integers(0, 60), max_size=6),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([0, SEQUENCES - 1, SEQUENCES - 7]),
)
def test_whatever_happens_each_good_event_is_there_once_and_in_order(
    plan: list[tuple[str, int]], bad: frozenset[int], limit: int, names_bad: bool, first: int
) -> None:
    broker = Broker(bad, limit)
    broker.names_bad = names_bad
    run = Run(broker, first)
    submitted = play(run, plan)
    good = [number for number in range(submitted) if number not in bad]
    assert broker.log == good
    assert sorted(run.delivered) == good
    assert sorted(number for number, _ in run.dropped) == sorted(bad & set(range(submitted)))
    assert all("own words" in reason or reason.startswith("no ") for _, reason in run.dropped)


@settings(max_examples=400)
@given(steps, st.frozensets(st.integers(0, 60), max_size=4))
def test_a_broker_that_forgets_the_producer_costs_repetitions_at_most(
    plan: list[tuple[str, int]], bad: frozenset[int]
) -> None:
    """With each broken connection the leader is another, which has nothing of the producer."""
    broker = Broker(bad)
    run = Run(broker)
    submitted = play(run, plan, broker.states.clear, late=False)
    good = [number for number in range(submitted) if number not in bad]
    assert list(dict.fromkeys(broker.log)) == good
    assert Counter(run.delivered) == Counter(good)


ANOTHERS = -1


@settings(max_examples=300)
@given(steps, st.integers(1, 7), st.integers(1, 3))
def test_a_producer_that_is_fenced_loses_nothing(
    plan: list[tuple[str, int]], count: int, ahead: int
) -> None:
    """With each broken connection another writes with its id, from number 0 of a later epoch."""
    broker = Broker()
    run = Run(broker)

    def write() -> None:
        window = run.window
        if window.producer_id is not None:
            epoch = window.epoch + ahead
            broker.take(Request(window.producer_id, epoch, 0, [ANOTHERS] * count))

    submitted = play(run, plan, write, late=False)
    own = [number for number in broker.log if number != ANOTHERS]
    assert list(dict.fromkeys(own)) == list(range(submitted))
    assert Counter(run.delivered) == Counter(range(submitted))


# ---------------------------------------------------------------- single rules


def test_the_first_batch_of_a_producer_goes_alone_and_then_five() -> None:
    run = Run(Broker())
    for number in range(10):
        run.window.add(events(number, 1))
    run.send()
    assert len(run.way) == 1
    run.answer()
    run.send()
    assert len(run.way) == MOST_IN_FLIGHT


def test_after_a_pause_a_batch_goes_alone() -> None:
    """The broker may have forgotten the producer, and would take a later batch first."""
    run = Run(Broker())
    run.window.add(events(0, 1))
    run.settle()
    run.now += PAUSE_SECONDS
    run.broker.states.clear()
    for number in range(1, 4):
        run.window.add(events(number, 1))
    run.send()
    assert len(run.way) == 1


def test_small_batches_behind_a_refused_one_do_not_go_ahead() -> None:
    run = Run(Broker(limit=100))
    run.window.add(events(0, 500))
    run.window.add(events(500, 5))
    run.settle()
    assert run.broker.log == list(range(505))


def test_one_event_that_is_not_taken_costs_no_other() -> None:
    run = Run(Broker(bad=frozenset({700})))
    run.window.add(events(0, 1000))
    run.window.add(events(1000, 3))
    run.settle()
    assert run.broker.log == [number for number in range(1003) if number != 700]
    ((number, reason),) = run.dropped
    assert number == 700
    assert reason == (
        "the broker refuses the times of the events: is a clock wrong? (the broker's own words)"
    )
    assert run.sent < 45  # two for each halving, and the way down


def test_refused_times_are_replaced_once_in_all_that_is_on_its_way() -> None:
    """And not what they are times of: nothing is dropped for it."""
    window = Window(lambda: 1.0)
    window.identify(1)
    window.add(events(0, 10))
    entry = window.entries[0]
    entry.payload = object()  # type: ignore[assignment]
    window.sent(entry, 1.0)
    outcome = window.answered(entry, Answer.of_code(TIME), 2.0)
    assert (outcome.dropped, outcome.divided, outcome.failed) == ([], None, None)
    assert (entry.as_now, entry.payload, entry.sequence) == (True, None, 0)
    assert window.may_send(2.0)
    window.sent(entry, 2.0)
    outcome = window.answered(entry, Answer.of_code(TIME), 3.0)
    assert outcome.divided is entry
    assert all(part.as_now for part in window.entries)


def test_events_that_the_broker_names_are_dropped_at_once() -> None:
    broker = Broker(bad=frozenset(range(0, 1000, 2)))
    broker.names_bad = True
    run = Run(broker)
    run.window.add(events(0, 1000))
    run.settle()
    assert broker.log == list(range(1, 1000, 2))
    assert run.sent == 3  # once with the time of sending, which is not why here
    assert run.dropped == [(number, f"no {number}") for number in range(0, 1000, 2)]


def test_indices_that_are_none_are_not_believed() -> None:
    run = Run(Broker())
    run.window.add(events(0, 4))
    run.send()
    entry, _, _ = run.way.popleft()
    run.take(entry, Answer.of_code(TIME, None, {-1: "", 4: "", 99: ""}))
    run.settle()
    assert run.broker.log == [0, 1, 2, 3]


def test_numbers_wrap_after_the_last() -> None:
    run = Run(Broker(), SEQUENCES - 5)
    for number in range(4):
        run.window.add(events(3 * number, 3))
    assert [entry.sequence for entry in run.window.entries] == [
        SEQUENCES - 5, SEQUENCES - 2, 1, 4,
    ]  # fmt: skip
    run.settle()
    assert run.broker.log == list(range(12))


def test_written_and_acknowledged_late_is_not_written_again() -> None:
    """The first was appended although it failed, so that the second could be acknowledged."""
    run = Run(Broker())
    run.window.add(events(0, 1))
    run.settle()
    run.window.add(events(1, 2))
    run.window.add(events(3, 2))
    run.send()
    (first, producer, epoch), _ = run.way
    run.broker.produce(producer, epoch, first)
    run.answer(code=REPLICAS)
    run.answer()
    assert run.delivered == [0, 3, 4]
    run.settle()
    assert run.broker.log == list(range(5))
    assert sorted(run.delivered) == list(range(5))


def test_a_batch_that_was_overtaken_goes_alone() -> None:
    """With five more behind the one that overtook it, the broker would not know it again."""
    run = Run(Broker())
    run.window.add(events(0, 1))
    run.settle()
    for number in range(1, 12):
        run.window.add(events(number, 1))
    run.send()
    first, producer, epoch = run.way[0]
    run.broker.produce(producer, epoch, first)
    run.answer(code=REPLICAS)
    run.answer()
    run.break_connection(3)
    for _ in range(3):
        run.now = max(run.now, run.window.retry_at)
        run.send()
        assert len(run.way) == 1
        run.break_connection(1)
    run.settle()
    assert run.broker.log == list(range(12))
    assert run.window.epoch == 0


def test_what_lies_before_a_broker_from_an_old_connection_takes_no_number_of_another() -> None:
    """The numbers of batches behind a refused one are given anew, and those would fit later."""
    run = Run(Broker(bad=frozenset({1})))
    run.window.add(events(0, 1))
    run.settle()
    for number in range(1, 4):
        run.window.add(events(number, 1))
    run.send()
    run.break_connection(0, late=True)
    run.now = run.window.retry_at
    run.send()
    run.answer()  # 1 is refused, and 2 has its number now
    run.send()
    run.answer()
    while run.left_behind:
        run.broker.take(run.left_behind.popleft())
    run.settle()
    assert run.broker.log == [0, 2, 3]
    assert run.delivered == [0, 2, 3]


@pytest.mark.parametrize("code", [SEQUENCE, EPOCH, 59, 90])
def test_a_broker_that_never_knows_the_numbers_is_not_asked_all_the_time(code: int) -> None:
    run = Run(Broker())
    run.window.add(events(0, 3))
    while run.now < 60:
        run.send()
        while run.way:
            run.answer(code=code)
        if not run.window.may_send(run.now):
            run.now = run.window.retry_at
    assert run.sent < 30
    run.settle()
    assert run.broker.log == [0, 1, 2]


def test_a_broker_that_wants_nothing_for_a_while_gets_nothing() -> None:
    run = Run(Broker())
    run.window.add(events(0, 1))
    run.send()
    entry, _, _ = run.way.popleft()
    run.take(entry, Answer(0, throttle=7.5))
    run.window.add(events(1, 1))
    assert not run.window.may_send(7.4)
    assert run.window.may_send(7.5)


def test_a_broker_cannot_ask_to_be_left_alone_for_ever() -> None:
    run = Run(Broker())
    run.window.add(events(0, 1))
    run.send()
    entry, _, _ = run.way.popleft()
    run.take(entry, Answer(19, throttle=2**31 / 1000))
    assert run.window.may_send(run.now + window_module.MOST_THROTTLE_SECONDS)


def test_what_was_refused_in_part_is_discarded_with_what_is_behind_it() -> None:
    """Else a number would be missing between those that are left."""
    run = Run(Broker(bad=frozenset({0})))
    run.broker.names_bad = True
    run.window.add(events(0, 5))
    run.window.add(events(5, 5))
    run.send()
    run.answer()
    assert not run.window.clear_unsent() or run.window.entries[0].tries
    run.window.add(events(10, 2))
    run.settle()
    assert run.window.epoch == 0


def test_unknown_numbers_raise_the_epoch_and_then_the_producer_id_is_changed() -> None:
    run = Run(Broker())
    run.window.add(events(0, 3))
    before = run.window.producer_id
    run.send()
    run.answer(code=SEQUENCE)
    assert (run.window.producer_id, run.window.epoch) == (before, 1)
    run.send()
    run.answer(code=59)
    assert run.window.producer_id is None
    run.settle()
    assert run.broker.log == [0, 1, 2]
    assert run.window.producer_id not in (None, before)


@pytest.mark.parametrize("code", [EPOCH, 90])
def test_who_is_fenced_becomes_another_producer_at_once(code: int) -> None:
    """The first time; where the next is fenced too, after a pause, and it is not the same again."""
    run = Run(Broker())
    run.window.add(events(0, 3))
    known = set()
    for at_once in (True, True, False):
        assert run.window.may_send(run.now) is at_once
        run.now = max(run.now, run.window.retry_at)
        run.send()
        known.add((run.window.producer_id, run.window.epoch))
        run.answer(code=code)
        assert run.window.producer_id is None
    assert known == {(100, 0), (101, 0), (102, 0)}
    run.settle()
    assert run.broker.log == [0, 1, 2]


def test_after_the_last_epoch_comes_another_producer_id() -> None:
    run = Run(Broker())
    run.window.epoch = LAST_EPOCH
    run.window.add(events(0, 3))
    run.send()
    run.answer(code=SEQUENCE)
    assert run.window.producer_id is None
    run.settle()
    assert run.broker.log == [0, 1, 2]


def test_an_error_without_a_meaning_is_no_refusal_at_first() -> None:
    run = Run(Broker())
    run.window.add(events(0, 1))
    for _ in range(window_module.UNKNOWN_TRIES - 1):
        run.now = max(run.now, run.window.retry_at)
        run.send()
        run.answer(code=-1)
        assert not run.dropped
    run.now = run.window.retry_at
    run.send()
    run.answer(code=-1)
    assert run.dropped == [(0, "the broker says unknown")]


@pytest.mark.parametrize("code", [29, 31, 17])
def test_a_topic_that_is_denied_is_waited_for_and_loses_nothing(code: int) -> None:
    run = Run(Broker())
    run.window.add(events(0, 5))
    run.send()
    run.answer(code=code)
    assert not run.window.may_send(run.now + 1)
    run.settle()
    assert run.broker.log == [0, 1, 2, 3, 4]


def anew(run: Run, offset: int, move: bool = False) -> bool:
    """Write one event, which the broker says to have at this offset."""
    if move:
        run.window.move()
    run.window.add(events(0, 1))
    run.send()
    entry, _, _ = run.way.popleft()
    return run.window.answered(entry, Answer(0, offset=offset), run.now).anew


def test_a_partition_whose_offsets_begin_again_was_made_anew() -> None:
    run = Run(Broker())
    offsets = [5, 6, -1, 9, 0, 1, 1]
    assert [anew(run, offset) for offset in offsets] == [
        False, False, False, False, True, False, True,
    ]  # fmt: skip
    assert anew(run, 100, move=True)
    assert not anew(run, 101)


def test_a_repetition_that_was_written_before_says_nothing_of_the_partition() -> None:
    run = Run(Broker())
    run.window.add(events(0, 1))
    run.settle()
    run.window.add(events(1, 1))
    run.window.add(events(2, 1))
    run.send()
    (first, _, _), (second, _, _) = run.way
    run.way.clear()
    run.take(first, Answer.of_code(REPLICAS))
    run.take(second, Answer(0, offset=8))
    run.now = run.window.retry_at
    run.send()
    run.way.clear()
    assert not run.window.answered(first, Answer(0, offset=7), run.now).anew


def test_random_long_runs() -> None:
    """Longer than Hypothesis draws, with all faults at once."""
    for seed in range(30):
        chance = random.Random(seed)
        bad = frozenset(chance.sample(range(3000), 10))
        plan = [(chance.choice(FAULTS), chance.randrange(7)) for _ in range(3000)]
        broker = Broker(bad, chance.choice([3, 5, 100]))
        run = Run(broker)
        submitted = play(run, plan)
        assert broker.log == [number for number in range(submitted) if number not in bad]


# ---------------------------------------------------------------- partitions and waiting


@pytest.mark.parametrize(
    ("key", "murmur2"),
    # The values of Kafka's own test of its hash, UtilsTest.testMurmur2.
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_partitions_are_those_of_kafka(key: bytes, murmur2: int) -> None:
    assert partition_of(key, 1 << 31) == murmur2 & 0x7FFFFFFF
    assert partition_of(key, 7) == (murmur2 & 0x7FFFFFFF) % 7


def test_backoff_grows_to_its_cap() -> None:
    waits = [backoff(attempt, permanent=False, jitter=1.0) for attempt in range(40)]
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (0.1, 3.0)
    assert backoff(3, permanent=False, jitter=0.0) == waits[3] / 2
    assert backoff(0, permanent=True, jitter=1.0) == 5.0
    assert backoff(10_000, permanent=True, jitter=1.0) == 60.0
