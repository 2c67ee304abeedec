"""How events become MQTT messages: messages, topics, properties and verdicts, without a broker."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from streamer.events.batch import Batch
from streamer.sinks.encoded import Extent
from streamer.sinks.mqtt.connection import (
    PackedProperties,
    code_name,
    content_properties,
    packet_size,
    user_property,
)
from streamer.sinks.mqtt.encoded import encode, first_and_last
from streamer.sinks.mqtt.outbox import Outbox
from streamer.sinks.mqtt.sink import MAX_TRIES, retry_delay, verdict
from streamer.sinks.mqtt.window import Message, Window


class Exec(msgspec.Struct, tag_field="event", tag="process.exec"):
    id: str
    pad: str = ""


class Open(msgspec.Struct, tag_field="event", tag="file.open"):
    id: str
    path: str = "/a\nb\r\u2028c"


ENCODINGS = pytest.mark.parametrize("encoding", ["json", "msgpack"])


def events(kinds: list[type]) -> list[Any]:
    return [kind(f"b-{n}") for n, kind in enumerate(kinds)]


# ---------------------------------------------------------------- messages


def outbox(max_events: int, linger: float, growth: int = 1) -> Outbox:
    return Outbox(Extent(10**6, max_events), linger, growth)


def put(box: Outbox, batch: Batch, now: float, encoding: Any = "json") -> None:
    box.put("t", encode(batch, encoding), now)


def pop(box: Outbox, now: float) -> Message | None:
    return box.pop(now, 10**6, places=1)


@ENCODINGS
@given(
    sizes=st.lists(st.lists(st.sampled_from([Exec, Open]), min_size=1, max_size=30), max_size=20),
    max_events=st.integers(min_value=1, max_value=40),
    pops=st.integers(min_value=0, max_value=3),
)
def test_messages_are_the_batches_in_order_whatever_their_sizes(
    encoding: Any, sizes: list[list[type]], max_events: int, pops: int
) -> None:
    box = outbox(max_events, linger=1.0)
    messages: list[Message] = []
    expected = b""
    kinds: Counter[str] = Counter()
    for n, kinds_of_batch in enumerate(sizes):
        batch = Batch(events(kinds_of_batch))
        put(box, batch, float(n), encoding)
        expected += batch.lines(encoding)
        kinds.update(batch.kinds)
        messages += filter(None, (pop(box, float(n)) for _ in range(pops)))
    box.hurry()
    while (message := pop(box, 100.0)) is not None:
        messages.append(message)
    assert b"".join(message.batch.payload for message in messages) == expected
    assert sum((Counter(message.batch.kinds) for message in messages), Counter()) == kinds
    assert all(1 <= message.batch.number <= max_events for message in messages)
    assert not box


def test_a_message_with_room_waits_for_its_linger_and_a_full_one_does_not() -> None:
    box = outbox(3, linger=0.5)
    put(box, Batch([Exec("1"), Exec("2")]), 10.0)
    assert pop(box, 10.4) is None
    assert box.due_at() == 10.5
    assert box.lacks("t") == 1
    put(box, Batch([Exec("3")]), 10.4)
    put(box, Batch([Exec("4")]), 10.4)
    full = pop(box, 10.4)
    assert full is not None
    assert (full.batch.number, first_and_last(full.batch)) == (3, ("1", "3"))
    assert pop(box, 10.8) is None
    assert box.due_at() == 10.9
    rest = pop(box, 10.9)
    assert rest is not None
    assert (rest.batch.number, first_and_last(rest.batch)) == (1, ("4", "4"))
    assert box.due_at() is None
    assert not box


def test_messages_put_back_come_first_and_in_order() -> None:
    box = outbox(1, linger=0.0)
    put(box, Batch([Exec(str(n)) for n in range(4)]), 0.0)
    first, second = pop(box, 0.0), pop(box, 0.0)
    assert first is not None
    assert second is not None
    box.push_front([first, second])
    found = [message.batch.marks for message in box.clear()]
    assert found == [["0"], ["1"], ["2"], ["3"]]


def test_what_is_due_first_goes_first_whatever_its_topic() -> None:
    box = outbox(10, linger=0.5)
    for n, topic in enumerate("abc"):
        box.put(topic, encode(Batch([Exec(str(n))]), "json"), 10.0 - n)
    found = [box.pop(20.0, 10**6, places=1) for _ in range(3)]
    assert [message and message.topic for message in found] == ["c", "b", "a"]


def test_a_batch_that_fits_is_encoded_once_for_all_sinks() -> None:
    batch = Batch([Exec("1"), Exec("2")])
    lines = batch.lines("json")
    box = outbox(100, linger=0.0)
    put(box, batch, 0.0)
    message = pop(box, 0.0)
    assert message is not None
    assert message.batch.payload is lines


@ENCODINGS
@given(
    kinds=st.lists(st.sampled_from([Exec, Open]), min_size=1, max_size=50),
    most=st.integers(min_value=1, max_value=500),
)
def test_a_message_is_cut_between_events_and_only_a_single_event_is_too_large(
    encoding: Any, kinds: list[type], most: int
) -> None:
    batch = Batch(events(kinds))
    message = Message("t", encode(batch, encoding))
    pieces = message.cut(most)
    assert b"".join(piece.batch.payload for piece in pieces) == batch.lines(encoding)
    assert sum((Counter(piece.batch.kinds) for piece in pieces), Counter()) == batch.kinds
    ids = [str(mark) for piece in pieces for mark in piece.batch.marks]
    assert ids == [event.id for event in batch.events]
    assert all(piece.size <= most or piece.batch.number == 1 for piece in pieces)
    if message.size > most and message.batch.number > 1:
        assert len(pieces) > 1


# ---------------------------------------------------------------- topics, properties, codes


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
    messages = [
        Message(topic, encode(Batch([Exec(str(n))]), "json")) for n, topic in enumerate(topics)
    ]
    for mid, message in enumerate(messages):
        window.put(mid, message)
    waiting: set[str] = set()
    expected: list[Message] = []
    for mid, message in enumerate(messages):
        if mid >= answered:
            expected.append(message)
            continue
        found = window.pop(mid)
        assert found is not None
        if codes[mid]:
            assert window.keep(*found) == (message.topic in waiting)
        else:
            window.again(*found, [message])
            waiting.add(message.topic)
        if message.topic in waiting:
            expected.append(message)
    assert window.running_empty == bool(waiting)
    assert window.take_back() == expected
    assert not window
