"""What the Kafka sink decides by itself: sizes, order, partitions, waiting. No broker."""

from __future__ import annotations

import asyncio
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.events.batch import Batch
from streamer.sinks.kafka.client import partition_of
from streamer.sinks.kafka.queue import Lane, Piece, split
from streamer.sinks.kafka.sink import backoff


class FileOpen(msgspec.Struct, tag_field="event", tag="file.open"):
    time_ns: int
    path: str


class NetClose(msgspec.Struct, tag_field="event", tag="net.close"):
    time_ns: int
    port: int


def piece(*lengths: int) -> Piece:
    """One event per length; every other one is a `net.close`, which has no path."""
    events = [
        NetClose(index, 1) if index % 2 else FileOpen(index, "x" * length)
        for index, length in enumerate(lengths)
    ]
    return Piece.of(Batch(events), "json")


@given(st.lists(st.integers(0, 500), min_size=1, max_size=60), st.integers(1, 2000))
def test_splitting_loses_nothing_and_keeps_order(lengths: list[int], most: int) -> None:
    whole = piece(*lengths)
    parts = list(split(whole, most))
    assert [record for part in parts for record in part.records] == whole.records
    assert [time for part in parts for time in part.times_ns] == whole.times_ns
    assert sum((Counter(part.kinds) for part in parts), Counter()) == Counter(whole.kinds)
    for part in parts:
        assert part.size == sum(map(len, part.records))
        assert part.size <= most or len(part.records) == 1


async def test_a_backlog_of_single_events_becomes_few_pieces() -> None:
    lane = Lane("t", limit=10_000_000, linger=60)
    events = [piece(length % 500) for length in range(1000)]
    for one in events:
        lane.put(one)
    held = lane.clear()
    assert len(held) < 20
    assert [record for part in held for record in part.records] == [
        record for one in events for record in one.records
    ]
    assert sum((Counter(part.kinds) for part in held), Counter()) == {"file.open": 1000}
    assert all(part.size == sum(map(len, part.records)) for part in held)


async def test_pieces_are_coalesced_up_to_the_limit() -> None:
    lane = Lane("t", limit=1000, linger=60)
    size = piece(300).size
    for _ in range(2):
        lane.put(piece(300))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(lane.take(), 0.02)
    lane.put(piece(300))
    sent = await lane.take()
    assert [part.size for part in sent.pieces] == [size] * 3


async def test_piece_over_the_limit_stays_whole() -> None:
    """A drained batch is one record batch, up to half as much again as the limit."""
    lane = Lane("t", limit=1000, linger=0)
    lane.put(piece(1300))
    lane.put(piece(100))
    assert len((await lane.take()).pieces) == 1
    assert len((await lane.take()).pieces) == 1


async def test_linger_is_an_upper_bound() -> None:
    lane = Lane("t", limit=1000, linger=0.01)
    lane.put(piece(1))
    assert len((await asyncio.wait_for(lane.take(), 5)).pieces) == 1


async def test_rewinding_restores_order_and_applies_a_smaller_limit() -> None:
    lane = Lane("t", limit=1000, linger=0)
    pieces = [piece(900, 0, 1), piece(800, 1), piece(3)]
    for one in pieces:
        lane.put(one)
    first, second = await lane.take(), await lane.take()
    assert lane.window == {first: None, second: None}
    lane.shrink(100)
    lane.rewind()
    assert not lane.window
    records = [record for one in lane.clear() for record in one.records]
    assert records == [record for one in pieces for record in one.records]
    assert not lane


async def test_acknowledged_batches_are_not_sent_again() -> None:
    lane = Lane("t", limit=1, linger=0)
    lane.put(piece(1))
    lane.put(piece(2))
    first, second = await lane.take(), await lane.take()
    assert lane.acknowledge(first, 1.0)
    assert not lane.acknowledge(first, 1.0)
    lane.rewind()
    assert lane.clear() == second.pieces


async def test_stalled_since_counts_from_the_last_progress() -> None:
    lane = Lane("t", limit=1, linger=0)
    lane.put(piece(1))
    lane.put(piece(2))
    first, second = await lane.take(), await lane.take()
    assert lane.stalled_since() is None
    first.since, second.since = 5.0, 6.0
    assert lane.stalled_since() == 5.0
    lane.acknowledge(first, 9.0)
    assert lane.stalled_since() == 9.0


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
    waits = [backoff(attempt, permanent=False, luck=1.0) for attempt in range(40)]
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (0.1, 5.0)
    assert backoff(3, permanent=False, luck=0.0) == waits[3] / 2
    assert backoff(0, permanent=True, luck=1.0) == 5.0
    assert backoff(10_000, permanent=True, luck=1.0) == 60.0
