"""How events become MQTT messages: chunks, topics, properties and verdicts, without a broker."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from streamer.errors import ConfigError
from streamer.events.batch import Batch
from streamer.sinks.mqtt.chunks import Chunk, ChunkQueue, SizeLimit, cut
from streamer.sinks.mqtt.connection import (
    PackedProperties,
    code_name,
    content_properties,
    packet_size,
    user_property,
)
from streamer.sinks.mqtt.sink import MAX_TRIES, expand_topic, retry_delay, verdict
from streamer.sinks.mqtt.window import Window


class Exec(msgspec.Struct, tag_field="event", tag="process.exec"):
    id: str
    pad: str = ""


class Open(msgspec.Struct, tag_field="event", tag="file.open"):
    id: str
    path: str = "/a\nb\r\u2028c"


ENCODINGS = pytest.mark.parametrize("encoding", ["json", "msgpack"])


def events(kinds: list[type]) -> list[Any]:
    return [kind(f"b-{n}") for n, kind in enumerate(kinds)]


# ---------------------------------------------------------------- chunks


@ENCODINGS
@given(
    sizes=st.lists(st.lists(st.sampled_from([Exec, Open]), min_size=1, max_size=30), max_size=20),
    max_events=st.integers(min_value=1, max_value=40),
    pops=st.integers(min_value=0, max_value=3),
)
def test_chunks_are_the_batches_in_order_whatever_their_sizes(
    encoding: Any, sizes: list[list[type]], max_events: int, pops: int
) -> None:
    queue = ChunkQueue(encoding, max_events, linger=1.0)
    chunks: list[Chunk] = []
    expected, held = b"", 0
    kinds: Counter[str] = Counter()
    for n, kinds_of_batch in enumerate(sizes):
        batch = Batch(events(kinds_of_batch))
        held += queue.add("t", batch, now=float(n))
        expected += batch.lines(encoding)
        kinds.update(batch.kinds)
        chunks += filter(None, (queue.pop(float(n)) for _ in range(pops)))
    chunks += queue.clear()
    assert b"".join(chunk.payload for chunk in chunks) == expected
    assert held == len(expected)
    assert sum((Counter(chunk.kinds) for chunk in chunks), Counter()) == kinds
    assert all(1 <= chunk.count <= max_events for chunk in chunks)
    assert not queue


def test_a_chunk_with_room_waits_for_its_linger_and_a_full_one_does_not() -> None:
    queue = ChunkQueue("json", 3, linger=0.5)
    queue.add("t", Batch([Exec("1"), Exec("2")]), now=10.0)
    assert queue.pop(10.4) is None
    assert queue.due == 10.5
    queue.add("t", Batch([Exec("3"), Exec("4")]), now=10.4)
    full = queue.pop(10.4)
    assert full is not None
    assert (full.count, full.first_id, full.last_id) == (3, "1", "3")
    assert queue.pop(10.8) is None
    assert queue.due == 10.9
    rest = queue.pop(10.9)
    assert rest is not None
    assert (rest.count, rest.first_id, rest.last_id) == (1, "4", "4")
    assert queue.due is None


def test_chunks_put_back_come_first_and_in_order() -> None:
    queue = ChunkQueue("json", 1, linger=0.0)
    queue.add("t", Batch([Exec(str(n)) for n in range(4)]), now=0.0)
    first, second = queue.pop(0.0), queue.pop(0.0)
    assert first is not None
    assert second is not None
    queue.push_front([first, second])
    assert [chunk.first_id for chunk in queue.clear()] == ["0", "1", "2", "3"]


def test_a_batch_that_fits_is_encoded_once_for_all_sinks() -> None:
    batch = Batch([Exec("1"), Exec("2")])
    encoded = batch.lines("json")
    queue = ChunkQueue("json", 100, linger=0.0)
    queue.add("t", batch, now=0.0)
    chunk = queue.pop(0.0)
    assert chunk is not None
    assert chunk.payload is encoded


@ENCODINGS
@given(
    kinds=st.lists(st.sampled_from([Exec, Open]), min_size=1, max_size=50),
    max_bytes=st.integers(min_value=1, max_value=500),
)
def test_a_chunk_is_cut_between_events_and_only_a_single_event_is_too_large(
    encoding: Any, kinds: list[type], max_bytes: int
) -> None:
    queue = ChunkQueue(encoding, 1000, linger=0.0)
    batch = Batch(events(kinds))
    queue.add("t", batch, now=0.0)
    chunk = queue.pop(0.0)
    assert chunk is not None
    pieces = cut(chunk, encoding, max_bytes)
    assert b"".join(piece.payload for piece in pieces) == batch.lines(encoding)
    assert sum((Counter(piece.kinds) for piece in pieces), Counter()) == batch.kinds
    assert all(len(piece.payload) <= max_bytes or piece.count == 1 for piece in pieces)
    assert (pieces[0].first_id, pieces[-1].last_id) == (chunk.first_id, chunk.last_id)
    if len(chunk.payload) > max_bytes and chunk.count > 1:
        assert len(pieces) > 1


# ---------------------------------------------------------------- topics, properties, codes


def test_a_topic_is_made_of_host_and_category() -> None:
    assert expand_topic("kernel/{host}/{category}", "web1", "file") == "kernel/web1/file"
    assert expand_topic("events", "web1", "file") == "events"


@pytest.mark.parametrize(
    ("template", "host"),
    [
        ("k/+/e", "h"),
        ("k/#", "h"),
        ("k/{host}", "a+b"),
        ("k/{host}", "#"),
        ("k/{kind}", "h"),
        ("", "h"),
        ("k/\0", "h"),
        ("x" * 65536, "h"),
    ],
)
def test_a_topic_that_cannot_be_published_to_is_refused(template: str, host: str) -> None:
    with pytest.raises(ConfigError, match=r"^mqtt topic"):
        expand_topic(template, host, "process")


def test_packed_properties_are_what_paho_reads() -> None:
    packed = PackedProperties(
        content_properties("application/x-ndjson", text=True)
        + user_property("host", "w\u00e9b1")
        + user_property("first_id", "x" * 200)
    )
    properties: Any = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    _, length = properties.unpack(packed.pack())
    assert length == len(packed)
    assert properties.ContentType == "application/x-ndjson"
    assert properties.PayloadFormatIndicator == 1
    assert properties.UserProperty == [("host", "w\u00e9b1"), ("first_id", "x" * 200)]


@pytest.mark.parametrize("payload", [0, 1, 100, 127, 128, 16_383, 16_384, 3_000_000])
def test_packet_size_counts_every_byte(payload: int) -> None:
    """Fixed header of 1 byte and the length of the length, as in MQTT 5.0, 2.1.4."""
    properties = PackedProperties(user_property("host", "web1"))
    remaining = 2 + 3 + 2 + len(properties.pack()) + payload
    digits = 1 + (remaining > 127) + (remaining > 16_383) + (remaining > 2_097_151)
    assert packet_size("a/b", properties, bytes(payload)) == 1 + digits + remaining


@pytest.mark.parametrize(
    ("code", "first", "last"),
    [
        (0x00, "delivered", "delivered"),
        (0x10, "delivered", "delivered"),
        (0x80, "later", "dropped"),
        (0x83, "later", "dropped"),
        (0x87, "dropped", "dropped"),
        (0x90, "dropped", "dropped"),
        (0x91, "later", "dropped"),
        (0x95, "cut", "cut"),
        (0x97, "later", "later"),
        (0x99, "dropped", "dropped"),
        (0xFE, "dropped", "dropped"),
    ],
)
def test_what_a_reason_code_means(code: int, first: str, last: str) -> None:
    assert verdict(code, 1) == first
    assert verdict(code, MAX_TRIES) == last


def test_a_reason_code_has_the_standards_name() -> None:
    assert code_name(0x87) == "Not authorized (0x87)"
    assert code_name(0xFE) == "reason code 0xFE"


def test_retries_slow_down_to_a_limit() -> None:
    assert [retry_delay(n, 0.1, 1.0) for n in (1, 2, 3, 4, 5, 10_000)] == [
        0.1,
        0.2,
        0.4,
        0.8,
        1.0,
        1.0,
    ]


# ---------------------------------------------------------------- what was refused


def test_a_size_limit_is_learned_once_for_all_that_were_in_flight_and_grows_back() -> None:
    limit = SizeLimit()
    assert limit.now(0.0) == 0
    assert limit.refused(1000, 0.0) == 500
    assert limit.refused(900, 0.0) == 500, "sent before the limit was known"
    assert limit.refused(400, 1.0) == 200, "and that was too much still"
    assert limit.now(120.0) == 200
    assert limit.now(121.0) == 400
    assert limit.now(361.0) == 800
    assert limit.now(601.0) == 0, "as large as what was refused first: nothing is known"


@given(
    topics=st.lists(st.sampled_from("ab"), max_size=12),
    codes=st.lists(st.booleans(), min_size=12, max_size=12),
    answered=st.integers(min_value=0, max_value=12),
)
def test_what_comes_again_is_each_topic_from_its_first_refusal_on(
    topics: list[str], codes: list[bool], answered: int
) -> None:
    """And all that has no answer, in the order in which it was sent."""
    window = Window()
    chunks = [Chunk(topic, b"", {}, str(n), str(n)) for n, topic in enumerate(topics)]
    for mid, chunk in enumerate(chunks):
        window.put(mid, chunk)
    waiting: set[str] = set()
    expected: list[Chunk] = []
    for mid, chunk in enumerate(chunks):
        if mid >= answered:
            expected.append(chunk)
            continue
        found = window.pop(mid)
        assert found is not None
        if codes[mid]:
            assert window.keep(*found) == (chunk.topic in waiting)
        else:
            window.again(*found, [chunk])
            waiting.add(chunk.topic)
        if chunk.topic in waiting:
            expected.append(chunk)
    assert window.running_empty == bool(waiting)
    assert window.take_back() == expected
    assert not window
