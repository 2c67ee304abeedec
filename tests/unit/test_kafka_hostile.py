"""The Kafka sink and a broker that answers wrongly, shortly, late, or not at all.

Whatever it says, nothing is counted as delivered that was not said to be, the sink goes on once
the broker behaves, and stops in time.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import re
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgspec
import pytest
from aiokafka.protocol.metadata import MetadataResponse_v5  # type: ignore[import-untyped]

from streamer.events.batch import Batch
from streamer.sinks import silence
from streamer.sinks.kafka import client as kafka_client
from streamer.sinks.kafka import sink as kafka_sink
from streamer.sinks.kafka import window
from streamer.sinks.kafka.client import partition_of
from streamer.sinks.kafka.sink import KafkaSink
from tests.hostile_kafka import (
    HANG_UP,
    METADATA,
    PRODUCE,
    PRODUCER_ID,
    SILENCE,
    HostileBroker,
    Produced,
    encoded,
)
from tests.kafka_helpers import (
    HOST,
    NOW_NS,
    NetClose,
    expected,
    make,
    opens,
    sinks_tasks,
    started,
    until,
)

TOPIC = "t"
COORDINATOR_LOADS = 14


@pytest.fixture
async def broker() -> AsyncIterator[HostileBroker]:
    async with HostileBroker().listening() as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_goes_unnoticed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """asyncio logs tasks that were left behind, and exceptions that nobody looked at."""
    yield
    gc.collect()
    assert not [record.getMessage() for record in caplog.records]


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    backoff = window.backoff

    def soon(attempt: int, *, permanent: bool, jitter: float) -> float:
        return backoff(attempt, permanent=False, jitter=jitter) / 20

    monkeypatch.setattr(window, "backoff", soon)
    monkeypatch.setattr(kafka_sink, "backoff", soon)
    monkeypatch.setattr(kafka_sink, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(kafka_client, "LEADER_SECONDS", 0.1)


def ids(broker: HostileBroker) -> list[str]:
    return [msgspec.json.decode(value)["id"] for value in broker.log]


def once(broker: HostileBroker, wrong: Callable[[Produced], bytes | None], times: int = 1) -> None:
    """The first record batches are answered by `wrong`, the others as they should be."""
    count = 0

    def produce(sent: Produced) -> bytes | None:
        nonlocal count
        count += 1
        return wrong(sent) if count <= times else broker.take(sent)

    broker.produce = produce


async def all_there(broker: HostileBroker, sink: KafkaSink, count: int) -> None:
    await until(lambda: not sink.account.pending, 10)
    assert sink.account.delivered.total() == count
    assert ids(broker) == expected(0, count)


def wrong_answers() -> dict[str, Callable[[HostileBroker, Produced], bytes | None]]:
    return {
        "another topic": lambda b, s: b.answer(s, 0, topic="other"),
        "another partition": lambda b, s: b.answer(s, 0, partition=9),
        "no topic": lambda b, s: b.answer(s, 0, times=0),
        "twice": lambda b, s: b.answer(s, 0, times=2),
        "short": lambda b, s: b.answer(s, 0)[:-7],
        "nothing in it": lambda b, s: b"",
        "a count of elements that are not there": lambda b, s: struct.pack(">i", 1 << 30),
        "no list at all": lambda b, s: struct.pack(">ii", -1, 0),
        "hangs up": lambda b, s: HANG_UP,
        "silence": lambda b, s: SILENCE,
    }


@pytest.mark.parametrize("what", wrong_answers())
async def test_a_wrong_answer_to_a_batch_is_none(broker: HostileBroker, what: str) -> None:
    """It is sent again, on another connection, and counted once it was answered."""
    wrong = wrong_answers()[what]
    once(broker, lambda sent: wrong(broker, sent))
    sink, heard = make(broker.address, TOPIC, linger_ms=0, request_timeout_seconds=1)
    async with started(sink):
        sink.submit(Batch(opens(0, 5)))
        await all_there(broker, sink, 5)
        first, second = broker.produced
        assert first == second  # the same numbers: a broker knows it again
    assert heard.drops == []


async def test_a_wrong_correlation_ends_the_connection(broker: HostileBroker) -> None:
    sink, _ = make(broker.address, TOPIC, linger_ms=0)
    async with started(sink):
        sink.submit(Batch(opens(0, 5)))
        await until(lambda: not sink.account.pending)
        broker.correlate = lambda number: number + 1
        once(broker, lambda sent: broker.answer(sent, 0))
        sink.submit(Batch(opens(5, 5)))
        await until(lambda: broker.asked.count(METADATA) > 3, 10)
        assert sink.account.pending == 5
        broker.correlate = lambda number: number
        await all_there(broker, sink, 10)


async def test_an_answer_of_two_gigabytes_is_not_waited_for(broker: HostileBroker) -> None:
    sink, heard = make(broker.address, TOPIC, linger_ms=0)
    async with started(sink):
        await until(lambda: sink.status == "up")
        broker.frame = lambda body: struct.pack(">i", (1 << 31) - 1) + body
        sink.submit(Batch(opens(0, 5)))
        await until(lambda: sink.status == "down", 10)
        assert "announces an answer of 2147483647 bytes" in heard.statuses[-1][1]
        broker.frame = lambda body: struct.pack(">i", len(body)) + body
        await all_there(broker, sink, 5)


def wrong_metadata() -> dict[str, Callable[[HostileBroker], bytes | None]]:
    return {
        "no lists": lambda b: struct.pack(">iihiii", 0, -1, -1, 1, -1, 0),
        "nothing in it": lambda b: b"",
        "short": lambda b: b.metadata_of([TOPIC])[:-9],
        "no broker": lambda b: struct.pack(">iihii", 0, 0, -1, 1, 0),
        "a leader that is no broker": lambda b: b.metadata_of([TOPIC], leader=99),
        "nothing about the topic": lambda b: b.metadata_of([]),
        "only about others": lambda b: b.metadata_of([f"x{n}" for n in range(1000)]),
        "silence": lambda b: SILENCE,
        "hangs up": lambda b: HANG_UP,
    }


@pytest.mark.parametrize("what", wrong_metadata())
async def test_wrong_metadata_is_asked_for_again(broker: HostileBroker, what: str) -> None:
    """At the start, and when the leader is looked for: no task of the sink's dies of it."""
    wrong = wrong_metadata()[what]
    broker.metadata = lambda topics: wrong(broker)
    sink, _ = make(broker.address, TOPIC, linger_ms=0, request_timeout_seconds=1)
    async with started(sink):
        sink.submit(Batch(opens(0, 5)))
        await until(lambda: broker.asked.count(METADATA) >= 3, 15)
        assert sink._client is not None
        assert set(sink._client._topics) <= {TOPIC}  # what was not asked for is not kept
        broker.metadata = broker.metadata_of
        await all_there(broker, sink, 5)
        await until(lambda: sink.status == "up", 10)


async def test_the_watch_outlives_wrong_metadata(
    broker: HostileBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_sink, "METADATA_SECONDS", 0.1)
    sink, _ = make(broker.address, TOPIC)
    async with started(sink):
        await until(lambda: sink.status == "up")
        broker.metadata = lambda topics: struct.pack(">iihiii", 0, -1, -1, 1, -1, 0)
        await until(lambda: sink.status == "down", 10)
        broker.metadata = broker.metadata_of
        await until(lambda: sink.status == "up", 10)


@pytest.mark.parametrize("number", [-1, -(1 << 63)])
async def test_a_producer_id_that_is_none_is_not_used(broker: HostileBroker, number: int) -> None:
    """With it, numbers would mean nothing, and the broker refuse the events."""
    broker.producer_id = lambda: broker.id_of(number)
    sink, heard = make(broker.address, TOPIC, linger_ms=0)
    async with started(sink):
        sink.submit(Batch(opens(0, 5)))
        await until(lambda: sink.status == "down", 10)
        assert "asked for a producer id it answers nonsense" in heard.statuses[-1][1]
        assert not broker.produced
        broker.producer_id = lambda: broker.id_of(7)
        await all_there(broker, sink, 5)


async def test_a_broker_that_comes_late_may_load_like_any_other(
    broker: HostileBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it has no producer id yet, as after any start, is not told as another absence."""
    monkeypatch.setattr(kafka_client, "LOADING_SECONDS", 4.0)
    broker.metadata = lambda topics: HANG_UP
    refused = 0

    def load() -> bytes:
        nonlocal refused
        refused += 1
        return broker.id_of(-1, COORDINATOR_LOADS)

    sink, heard = make(broker.address, TOPIC, linger_ms=0)
    async with started(sink):
        sink.submit(Batch(opens(0, 5)))
        await asyncio.sleep(4.1)
        broker.producer_id = load
        broker.metadata = broker.metadata_of
        await until(lambda: refused >= 3)
        broker.producer_id = lambda: broker.id_of(7)
        await all_there(broker, sink, 5)
    assert [status for status, _ in heard.statuses] == ["down", "up", "closed"]


# ---------------------------------------------------------------- error codes

WAITED_FOR = [
    2,
    3,
    5,
    6,
    7,
    8,
    9,
    13,
    17,
    19,
    20,
    29,
    31,
    45,
    47,
    54,
    56,
    59,
    74,
    75,
    89,
    90,
    -1,
    77,
]
REFUSALS = [10, 18, 32, 87]


@pytest.mark.parametrize("code", WAITED_FOR)
async def test_what_may_pass_costs_no_event(broker: HostileBroker, code: int) -> None:
    once(broker, lambda sent: broker.answer(sent, code), times=3)
    sink, heard = make(broker.address, TOPIC, linger_ms=0)
    async with started(sink):
        sink.submit(Batch(opens(0, 5)))
        await all_there(broker, sink, 5)
    assert heard.drops == []


async def test_a_batch_that_the_broker_has_already_is_delivered(broker: HostileBroker) -> None:
    """Of one that is more than five batches back it knows no offset, but that it was there."""

    def written_before(sent: Produced) -> bytes:
        broker.take(sent)
        return broker.answer(sent, 46)

    once(broker, written_before)
    sink, heard = make(broker.address, TOPIC, linger_ms=0)
    async with started(sink):
        sink.submit(Batch(opens(0, 5)))
        await until(lambda: not sink.account.pending)
        sink.submit(Batch(opens(5, 5)))
        await all_there(broker, sink, 10)
    assert len(broker.produced) == 2
    assert heard.anew == 0


@pytest.mark.parametrize("code", REFUSALS)
async def test_a_refusal_costs_only_the_event_that_is_why(broker: HostileBroker, code: int) -> None:
    def produce(sent: Produced) -> bytes:
        bad = any(b'"boot-3"' in value for value in sent.values)
        return broker.answer(sent, code) if bad else broker.take(sent)

    broker.produce = produce
    sink, heard = make(broker.address, TOPIC, linger_ms=0)
    async with started(sink):
        sink.submit(Batch(opens(0, 10)))
        await until(lambda: not sink.account.pending, 10)
    assert ids(broker) == [name for name in expected(0, 10) if name != "boot-3"]
    ((kinds, _),) = heard.drops
    assert kinds == {"file.open": 1}


async def test_numbers_that_are_never_known_do_not_make_it_spin(broker: HostileBroker) -> None:
    broker.produce = lambda sent: broker.answer(sent, 59)
    sink, heard = make(broker.address, TOPIC, linger_ms=0)
    async with started(sink, grace=0.1):
        sink.submit(Batch(opens(0, 5)))
        await asyncio.sleep(1.5)
        assert broker.asked.count(PRODUCE) < 60
        assert broker.asked.count(PRODUCER_ID) < 40
    assert heard.drops[0][0] == {"file.open": 5}


async def test_a_throttled_producer_waits(broker: HostileBroker) -> None:
    """The broker would not read before; it then looks as if it were dead."""
    times: list[float] = []

    def produce(sent: Produced) -> bytes:
        times.append(time.monotonic())
        offset = len(broker.log)
        broker.log += sent.values
        return broker.answer(sent, 0, offset, throttle=600 if offset == 0 else 0)

    broker.produce = produce
    sink, _ = make(broker.address, TOPIC, linger_ms=0)
    async with started(sink):
        sink.submit(Batch(opens(0, 5)))
        await until(lambda: len(times) == 1)
        sink.submit(Batch(opens(5, 5)))
        await all_there(broker, sink, 10)
    assert times[1] - times[0] >= 0.59


# ---------------------------------------------------------------- nothing is acknowledged


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "SILENT_SECONDS", 0.6)
    monkeypatch.setattr(kafka_sink, "LOOK_SECONDS", 0.05)


@pytest.mark.usefixtures("impatient")
async def test_a_broker_that_takes_requests_and_answers_none_is_down_until_it_does(
    broker: HostileBroker,
) -> None:
    """It can be reached, and says who leads, all the time; and no event is given up for it."""
    broker.produce = lambda sent: SILENCE
    sink, heard = make(broker.address, TOPIC, linger_ms=0, request_timeout_seconds=1.5)
    async with started(sink):
        sink.submit(Batch(opens(0, 5)))
        await until(lambda: sink.status == "down", 10)
        assert sink.reachable  # so a spool goes on waiting for it at the end
        await until(lambda: len(broker.produced) == 2, 15)  # the first was given up
        (_, reason) = heard.statuses[1]
        assert re.fullmatch("topic t: the broker has acknowledged nothing for [0-9]+ s", reason)
        assert heard.statuses == [("up", ""), ("down", reason)]
        broker.produce = broker.take
        await all_there(broker, sink, 5)
        assert heard.statuses[2:] == [("up", "")]
    assert heard.drops == []


@pytest.mark.usefixtures("impatient")
async def test_what_the_broker_says_of_it_is_told_once(broker: HostileBroker) -> None:
    """A leader with too few replicas in sync waits for them, and then says so, again and again."""
    codes = itertools.chain([7, 7], itertools.repeat(20))
    broker.produce = lambda sent: SILENCE
    sink, heard = make(broker.address, TOPIC, linger_ms=0, request_timeout_seconds=1.5)
    async with started(sink):
        sink.submit(Batch(opens(0, 5)))
        await until(lambda: sink.status == "down", 10)
        broker.produce = lambda sent: broker.answer(sent, next(codes))
        await until(lambda: len(heard.statuses) == 3, 10)
        told_at = len(broker.produced)
        await until(lambda: len(broker.produced) > told_at + 3, 10)
        assert heard.statuses[2:] == [("down", "topic t: too few replicas are in sync")]
        broker.produce = broker.take
        await all_there(broker, sink, 5)
    assert [status for status, _ in heard.statuses] == ["up", "down", "down", "up", "closed"]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("in_sync", [[1], [1, 7, 8, 9]])
async def test_the_leader_is_asked_for_the_replicas_meanwhile(
    broker: HostileBroker, in_sync: list[int]
) -> None:
    """It says nothing of them itself before a request's time is over. Others than there are, count
    for nothing.
    """
    broker.produce = lambda sent: SILENCE
    broker.in_sync = in_sync
    sink, heard = make(broker.address, TOPIC, linger_ms=0)
    async with started(sink, grace=0.1):
        sink.submit(Batch(opens(0, 5)))
        await until(lambda: sink.status == "down", 10)
    (_, reason) = heard.statuses[1]
    assert reason.startswith("topic t: the broker has acknowledged nothing for ")
    assert reason.endswith(" s; 1 of 3 replicas in sync")
    assert heard.statuses == [("up", ""), ("down", reason), ("closed", "")]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("what", ["no lists", "nothing about the topic", "silence", "hangs up"])
async def test_what_is_said_of_the_replicas_may_be_anything(
    broker: HostileBroker, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(kafka_sink, "REPLACE_SECONDS", 0.2)
    wrong = wrong_metadata()[what]
    sink, heard = make(broker.address, TOPIC, linger_ms=0)
    async with started(sink, grace=0.1):
        broker.produce = lambda sent: SILENCE
        sink.submit(Batch(opens(0, 5)))
        await until(lambda: broker.produced)
        broker.metadata = lambda topics: wrong(broker)
        await until(lambda: sink.status == "down", 10)
    assert heard.statuses[1][1].startswith("topic t: the broker has acknowledged nothing for ")


@pytest.mark.usefixtures("impatient")
async def test_a_topic_of_which_nothing_is_acknowledged_keeps_what_it_holds(
    broker: HostileBroker,
) -> None:
    """Others, which another broker leads, go on meanwhile, and do not make the sink be up."""
    budget = 1 << 20
    async with HostileBroker().listening() as other:

        def metadata(topics: list[str]) -> bytes:
            both = [(1, "127.0.0.1", broker.port, None), (2, "127.0.0.1", other.port, None)]
            leaders = {topic: 2 if topic == "file" else 1 for topic in topics}
            said: list[Any] = [(0, topic, False, [(0, 0, leader, [1, 2], [1, 2], [])])
                               for topic, leader in leaders.items()]  # fmt: skip
            return encoded(MetadataResponse_v5(0, both, "c", 1, said))

        broker.metadata = other.metadata = metadata
        other.produce = lambda sent: SILENCE
        sink, heard = make(broker.address, "{category}", linger_ms=0, budget_bytes=budget)
        async with started(sink, grace=0.1):
            sink.submit(Batch(opens(0, 3000)))
            assert sink.watermarks.held > budget / kafka_sink.SHARES
            await until(lambda: sink.status == "down", 10)
            sink.submit(Batch([NetClose(f"net-{number}", NOW_NS, 443) for number in range(5)]))
            await until(lambda: sink.account.delivered["net.close"] == 5, 10)
            sink.submit(Batch(opens(3000, 5)))
            assert sink.status == "down"
            assert sink.account.pending == 3005
            assert heard.drops == []
    assert [status for status, _ in heard.statuses] == ["up", "down", "closed"]


@pytest.mark.usefixtures("impatient")
async def test_a_broker_that_refuses_for_good_is_not_silent(
    broker: HostileBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was, until then; and nothing waits any more that it could acknowledge."""
    monkeypatch.setattr(kafka_sink, "STALL_SECONDS", 60.0)
    answers = asyncio.Event()
    broker.produce = lambda sent: broker.answer(sent, 87) if answers.is_set() else SILENCE
    sink, heard = make(broker.address, TOPIC, linger_ms=0, request_timeout_seconds=1.5)
    async with started(sink):
        sink.submit(Batch(opens(0, 1)))
        await until(lambda: sink.status == "down", 10)
        answers.set()
        await until(lambda: not sink.account.pending, 10)
        assert sink.status == "up"
    assert heard.reasons == {"the broker refused a record as invalid"}


# ---------------------------------------------------------------- leaders and partitions


async def test_a_leader_that_flips_is_followed_with_pauses(broker: HostileBroker) -> None:
    """Each of two says that the other leads."""
    async with HostileBroker().listening() as other:
        flip = [0]

        def metadata(topics: list[str]) -> bytes:
            flip[0] += 1
            both = [(1, "127.0.0.1", broker.port, None), (2, "127.0.0.1", other.port, None)]
            parts: list[Any] = [(0, 0, 1 + flip[0] % 2, [1, 2], [1, 2], [])]
            said = [(0, topic, False, parts) for topic in topics]
            return encoded(MetadataResponse_v5(0, both, "c", 1, said))

        for one in (broker, other):
            one.metadata = metadata
            one.produce = lambda sent: broker.answer(sent, 6)
        sink, _ = make(broker.address, TOPIC, linger_ms=0)
        async with started(sink):
            sink.submit(Batch(opens(0, 5)))
            await asyncio.sleep(1)
            assert 2 <= len(broker.produced) + len(other.produced) < 40
            assert sink.account.pending == 5
            for one in (broker, other):
                one.produce = broker.take
            await all_there(broker, sink, 5)


async def test_more_partitions_move_the_key_and_what_was_begun_is_ended_where_it_was(
    broker: HostileBroker,
) -> None:
    """A batch that may be written is not written again in another partition."""
    sink, _ = make(broker.address, TOPIC, linger_ms=0, batch_bytes=4096)
    answered = asyncio.Event()
    async with started(sink):
        sink.submit(Batch(opens(0, 5)))
        await until(lambda: not sink.account.pending)
        once(broker, lambda sent: HANG_UP if answered.is_set() else SILENCE, times=1)
        answered.set()
        broker.partitions = 5
        sink.submit(Batch(opens(5, 5)))
        await until(lambda: not sink.account.pending, 10)
        assert [sent.partition for sent in broker.produced] == [0, 0, 0]
        assert broker.produced[1] == broker.produced[2]
        sink.submit(Batch(opens(10, 5)))
        await all_there(broker, sink, 15)
        last = broker.produced[-1]
        assert last.partition == partition_of(HOST.encode(), 5) != 0
        assert (last.sequence, last.epoch) == (0, 1)


# ---------------------------------------------------------------- stopping, being cancelled


@pytest.mark.parametrize("turns", range(24))
async def test_stopping_at_any_moment_leaves_nothing_behind(
    broker: HostileBroker, turns: int
) -> None:
    """After so many turns of the loop: before it connects, while it sends, while it waits."""
    broker.produce = lambda sent: SILENCE
    sink, heard = make(broker.address, TOPIC, linger_ms=0)
    await sink.start()
    sink.submit(Batch(opens(0, 5)))
    if turns >= 12:
        await until(lambda: sink.status == "up")
        sink.submit(Batch(opens(5, 5)))
    for _ in range(turns % 12):
        await asyncio.sleep(0)
    await sink.stop(0)
    assert sink.account.dropped.total() == (10 if turns >= 12 else 5)
    assert sink.account.pending == sink.watermarks.held == 0
    assert heard.statuses[-1] == ("closed", "")
    await asyncio.sleep(0)
    assert sinks_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("turns", range(12))
async def test_stopping_that_is_cancelled_at_any_moment_still_closes(
    broker: HostileBroker, turns: int
) -> None:
    broker.produce = lambda sent: SILENCE
    sink, _ = make(broker.address, TOPIC, linger_ms=0)
    await sink.start()
    sink.submit(Batch(opens(0, 5)))
    await until(lambda: len(broker.produced) == 1)
    assert sink._client is not None
    connections = list(sink._client._connections.values())
    stopping = asyncio.create_task(sink.stop(0))
    for _ in range(turns):
        await asyncio.sleep(0)
    stopping.cancel()
    await asyncio.wait({stopping})
    if turns:  # else it never began
        assert sink.account.pending == sink.watermarks.held == 0
        assert sink.status == "closed"
        assert connections
        assert not any(connection.open_still for connection in connections)
    await sink.stop(0)
    await until(lambda: not broker._connections)
