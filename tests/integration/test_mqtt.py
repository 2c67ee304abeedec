"""The MQTT sink against a real Mosquitto, with mosquitto_sub as the witness.

Answers that Mosquitto does not give come from `ScriptedBroker`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from streamer.config import settings
from streamer.errors import ConfigError
from streamer.events.batch import Batch
from streamer.events.spans import Span
from streamer.sinks import silence
from streamer.sinks.base import Sink
from streamer.sinks.mqtt import sink as mqtt_sink
from streamer.sinks.mqtt.encoded import encode
from streamer.sinks.mqtt.sink import MAX_TRIES, MqttSink
from tests.brokers import MosquittoBroker, free_port
from tests.recorder import Recorder, SpanRecorder

pytestmark = pytest.mark.mqtt

WAIT = 20.0
GRACE = 10.0
PASSWORD = "correct horse battery staple"


class Exec(msgspec.Struct, tag_field="event", tag="process.exec"):
    id: str
    pad: str = ""


class Numbered(msgspec.Struct, tag_field="event", tag="process.exec"):
    """One of the critical ring of CPU 0."""

    id: str
    cpu: int = 0


class Exit(msgspec.Struct, tag_field="event", tag="process.exit"):
    id: str


class Open(msgspec.Struct, tag_field="event", tag="file.open"):
    id: str


def execs(count: int, start: int = 0, pad: int = 0) -> Batch:
    return Batch([Exec(f"b-{n:08}", "x" * pad) for n in range(start, start + count)])


def ids(ndjson: bytes) -> list[str]:
    return [msgspec.json.decode(line)["id"] for line in ndjson.splitlines()]


async def until(condition: Callable[[], object]) -> None:
    """Wait until `condition` holds."""
    async with asyncio.timeout(WAIT):
        while not condition():  # noqa: ASYNC110 - other processes have no event to wait for
            await asyncio.sleep(0.01)


class Witness:
    """mosquitto_sub, writing what it receives to a file."""

    def __init__(self, broker: MosquittoBroker, topic: str, *options: str, name: str) -> None:
        self._output = broker.directory / f"{name}.out"
        named = ["-i", name, "-t", topic, *options]
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [
                    "mosquitto_sub",
                    "-V",
                    "mqttv5",
                    "-h",
                    "127.0.0.1",
                    "-p",
                    str(broker.port),
                    *named,
                ],
                stdout=output,
                stderr=subprocess.DEVNULL,
            )

    @property
    def data(self) -> bytes:
        return self._output.read_bytes()

    @property
    def lines(self) -> list[str]:
        """The lines it has finished: it writes in blocks, which end in the middle of one."""
        return self.data.decode().split("\n")[:-1]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


Watch = Callable[..., Any]


@pytest.fixture
def watch() -> Iterator[Watch]:
    """`await watch(broker, topic, *options)`: a witness that has subscribed.

    Without options it writes the bare payloads, one after the other.
    """
    witnesses: list[Witness] = []

    async def start(broker: MosquittoBroker, topic: str, *options: str) -> Witness:
        name = f"witness{len(witnesses)}"
        witnesses.append(Witness(broker, topic, *(options or ("-q", "1", "-N")), name=name))
        await until(lambda: f"Sending SUBACK to {name}" in broker.log)
        return witnesses[-1]

    yield start
    for witness in witnesses:
        witness.close()


StartBroker = Callable[..., MosquittoBroker]


@pytest.fixture
def start_broker(tmp_path: Path) -> Iterator[StartBroker]:
    """`start_broker(*config)`: a running Mosquitto of the test's own."""
    with contextlib.ExitStack() as stack:

        def start(*config: str, anonymous: bool = True) -> MosquittoBroker:
            broker = MosquittoBroker(
                tmp_path / "mosquitto", ["log_type all", *config], anonymous=anonymous
            )
            return stack.enter_context(broker)

        yield start


StartSink = Callable[..., Any]


@pytest.fixture
async def start_sink() -> AsyncIterator[StartSink]:
    """`await start_sink(port, **settings)`: a started sink and what it tells its owner."""
    sinks: list[MqttSink] = []

    async def start(port: int, **options: Any) -> tuple[MqttSink, Recorder]:
        options = {"type": "mqtt", "host": "127.0.0.1", "port": port, "linger_ms": 5} | options
        sink = MqttSink(msgspec.convert(options, settings.MqttSink), host="web1")
        sinks.append(sink)
        recorder = Recorder()
        sink.listener = recorder
        await asyncio.wait_for(sink.start(), 1.0)
        return sink, recorder

    yield start
    for sink in sinks:
        await sink.stop(0)


def account(sink: Sink) -> tuple[int, int, int]:
    """Events delivered, dropped and pending."""
    found = sink.account
    return found.delivered.total(), found.dropped.total(), found.pending


# ---------------------------------------------------------------- what arrives


async def test_what_arrives_is_exactly_what_was_sent_in_order_per_topic(
    start_broker: StartBroker, watch: Watch, start_sink: StartSink
) -> None:
    """Batches from 1 to 1,000 events, of two categories: each topic has its own, in order."""
    broker = start_broker()
    process = await watch(broker, "kernel/web1/process")
    files = await watch(broker, "kernel/web1/file")
    sink, _ = await start_sink(broker.port, batch_events=64)
    made = 0
    expected = {"process": b"", "file": b""}
    for size in (1, 2, 63, 64, 65, 1, 1000, 128, 7):
        events: list[Any] = []
        for _ in range(size):
            made += 1
            events.append((Exec, Exit, Open)[made % 3](f"b-{made}"))
        batch = Batch(events)
        for category, part in batch.by_category().items():
            expected[category] += part.lines("json")
        sink.submit(batch)
        await asyncio.sleep(0.002)
    await sink.stop(GRACE)
    await until(lambda: len(process.data) >= len(expected["process"]))
    await until(lambda: len(files.data) >= len(expected["file"]))
    assert process.data == expected["process"]
    assert files.data == expected["file"]
    assert sink.account.delivered == sink.account.received
    assert sink.account.delivered.total() == made
    assert sink.watermarks.held == 0


async def test_one_topic_for_all_keeps_the_order_of_all(
    start_broker: StartBroker, watch: Watch, start_sink: StartSink
) -> None:
    broker = start_broker()
    witness = await watch(broker, "events")
    sink, _ = await start_sink(broker.port, topic="events")
    batch = Batch([(Exec, Open)[n % 2](f"b-{n}") for n in range(500)])
    sink.submit(batch)
    await sink.stop(GRACE)
    expected = batch.lines("json")
    await until(lambda: len(witness.data) >= len(expected))
    assert witness.data == expected


async def test_a_message_says_what_it_holds(
    start_broker: StartBroker, watch: Watch, start_sink: StartSink
) -> None:
    broker = start_broker()
    witness = await watch(broker, "kernel/#", "-q", "1", "-F", "%t %q %C %P")
    sink, _ = await start_sink(broker.port, batch_events=200)
    sink.submit(execs(300))
    await sink.stop(GRACE)
    await until(lambda: len(witness.lines) == 2)
    head = "kernel/web1/process 1 application/x-ndjson host:web1"
    assert witness.lines == [
        f"{head} events:200 first_id:b-00000000 last_id:b-00000199",
        f"{head} events:100 first_id:b-00000200 last_id:b-00000299",
    ]


async def test_msgpack_arrives_as_maps_one_after_the_other(
    start_broker: StartBroker, watch: Watch, start_sink: StartSink
) -> None:
    broker = start_broker()
    witness = await watch(broker, "kernel/#", "-q", "1", "-F", "%C %x")
    sink, _ = await start_sink(broker.port, encoding="msgpack", batch_events=100)
    batch = execs(250)
    sink.submit(batch)
    await sink.stop(GRACE)
    await until(lambda: len(witness.lines) == 3)
    lines = [line.split(" ") for line in witness.lines]
    assert {line[0] for line in lines} == {"application/vnd.msgpack"}
    assert bytes.fromhex("".join(line[1] for line in lines)) == batch.lines("msgpack")


async def test_single_events_share_a_message_within_the_linger(
    start_broker: StartBroker, watch: Watch, start_sink: StartSink
) -> None:
    broker = start_broker()
    witness = await watch(broker, "kernel/#", "-q", "1", "-F", "%P")
    sink, _ = await start_sink(broker.port, linger_ms=300)
    await until(lambda: sink.status == "up")
    for n in range(10):
        sink.submit(execs(1, n))
        await asyncio.sleep(0.001)
    await until(lambda: account(sink) == (10, 0, 0))
    await until(lambda: len(witness.lines) == 1)
    assert b"events:10 " in witness.data


# ---------------------------------------------------------------- what the broker refuses


async def test_a_publish_that_the_acl_denies_is_dropped_and_not_delivered(
    start_broker: StartBroker, watch: Watch, start_sink: StartSink, tmp_path: Path
) -> None:
    """PUBACK 0x87, which aiomqtt takes for a success."""
    acl = tmp_path / "acl"
    acl.write_text("topic readwrite kernel/web1/process\n")
    acl.chmod(0o600)
    broker = start_broker(f"acl_file {acl}")
    witness = await watch(broker, "kernel/web1/process")
    sink, recorder = await start_sink(broker.port, batch_events=10)
    batch = Batch([(Exec, Open)[n % 2](f"b-{n}") for n in range(100)])
    sink.submit(batch)
    await sink.stop(GRACE)
    assert sink.account.delivered == {"process.exec": 50}
    assert sink.account.dropped == {"file.open": 50}
    assert sink.watermarks.held == 0
    expected = batch.by_category()["process"].lines("json")
    await until(lambda: len(witness.data) >= len(expected))
    assert witness.data == expected
    reason = "publishing to kernel/web1/file refused: Not authorized (0x87)"
    assert recorder.reasons == {reason}
    assert recorder.statuses[:-1] == [("up", ""), ("up", reason)]


async def test_no_subscriber_is_a_delivery(
    start_broker: StartBroker, start_sink: StartSink
) -> None:
    """PUBACK 0x10."""
    sink, recorder = await start_sink(start_broker().port)
    sink.submit(execs(10))
    await sink.stop(GRACE)
    assert account(sink) == (10, 0, 0)
    assert [status for status, _ in recorder.statuses] == ["up", "closed"]


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_chunks_are_cut_to_the_brokers_maximum_packet_size(
    start_broker: StartBroker, watch: Watch, start_sink: StartSink, encoding: Any
) -> None:
    """CONNACK's Maximum Packet Size; an event that exceeds it alone is dropped and counted."""
    broker = start_broker("max_packet_size 2000")
    witness = await watch(broker, "kernel/#", "-q", "1", "-F", "%x")
    sink, recorder = await start_sink(broker.port, encoding=encoding)
    small, large = execs(100, pad=50), execs(1, start=100, pad=3000)
    sink.submit(Batch([*small.events[:50], *large.events, *small.events[50:]]))
    await sink.stop(GRACE)
    assert account(sink) == (100, 1, 0)
    assert len(recorder.reasons) == 1
    assert recorder.reasons.pop().startswith("larger than the broker accepts")
    assert [status for status, _ in recorder.statuses] == ["up", "closed"]
    expected = small.lines(encoding)
    await until(lambda: len(bytes.fromhex("".join(witness.lines))) >= len(expected))
    assert bytes.fromhex("".join(witness.lines)) == expected


async def test_chunks_are_cut_when_the_broker_answers_too_large(
    start_broker: StartBroker, watch: Watch, start_sink: StartSink
) -> None:
    """PUBACK 0x95, over which paho would end the connection."""
    broker = start_broker("message_size_limit 1000")
    witness = await watch(broker, "kernel/#")
    sink, recorder = await start_sink(broker.port, max_inflight=1)
    small, large = execs(100, pad=50), execs(1, start=100, pad=3000)
    sink.submit(Batch([*small.events, *large.events]))
    await sink.stop(GRACE)
    assert account(sink) == (100, 1, 0)
    assert [status for status, _ in recorder.statuses] == ["up", "closed"]
    expected = small.lines("json")
    await until(lambda: len(witness.data) >= len(expected))
    assert witness.data == expected


# ---------------------------------------------------------------- a broker that is away


async def test_a_broker_absent_at_start_gets_everything_when_it_comes(
    start_sink: StartSink, tmp_path: Path
) -> None:
    """The budget fills up to its exact mark meanwhile, and the trouble is told once."""
    broker = MosquittoBroker(tmp_path / "mosquitto", ["log_type all"])
    batch = execs(10, pad=400)
    size = encode(batch, "json").held
    sink, recorder = await start_sink(broker.port, budget_bytes=20 * size)
    await until(lambda: sink.status == "down")
    for n in range(20):
        assert recorder.marks == []
        sink.submit(execs(10, start=10 * n, pad=400))
    assert recorder.marks == ["full"]
    assert sink.watermarks.held == 20 * size
    await asyncio.sleep(0.5)
    assert recorder.statuses == [("down", "Connection refused")]
    with broker:
        await until(lambda: account(sink) == (200, 0, 0))
        await sink.stop(GRACE)
    assert recorder.marks == ["full", "room"]
    assert [status for status, _ in recorder.statuses] == ["down", "up", "closed"]


async def test_a_broker_killed_in_mid_stream_and_restarted_misses_nothing(
    start_broker: StartBroker, start_sink: StartSink, watch: Watch
) -> None:
    """Every event arrives, in order; what arrives twice is a whole message, and has its ids.

    Mosquitto acknowledges a message after it has passed it on to a connected subscriber, and
    before it saves it for an absent one: so each kill comes while the witness is connected. It
    subscribes at QoS 0, to read all that the dying broker had written instead of failing on an
    acknowledgement of its own. While it is away, its session keeps what is published.
    """
    broker = start_broker(
        "autosave_interval 1",
        "autosave_on_changes true",
        "queue_qos0_messages true",
        "max_queued_messages 0",
    )
    witness = await watch(broker, "kernel/#", "-q", "0", "-c", "-x", "86400", "-F", "%x")
    sink, recorder = await start_sink(broker.port, batch_events=20)
    await until(lambda: (broker.directory / "mosquitto.db").exists())
    produced = 0

    async def produce(count: int) -> None:
        nonlocal produced
        for _ in range(count):
            sink.submit(execs(50, produced, pad=50))
            produced += 50
            await asyncio.sleep(0.001)

    for kills in (1, 2):
        producing = asyncio.create_task(produce(120))
        await until(lambda: produced > (kills - 1) * 11000 + 5000)  # noqa: B023
        await asyncio.to_thread(broker.kill)
        await producing
        await asyncio.to_thread(broker.start)
        await produce(100)
        await until(lambda: broker.log.count("Sending SUBACK to witness") == 1 + kills)  # noqa: B023
    await sink.stop(60)
    assert account(sink) == (produced, 0, 0)
    expected = ids(execs(produced).lines("json"))

    def messages() -> list[list[str]]:
        return [ids(bytes.fromhex(line)) for line in witness.lines]

    def distinct() -> list[str]:
        return list(dict.fromkeys(itertools.chain.from_iterable(messages())))

    await until(lambda: len(distinct()) == produced)
    assert distinct() == expected
    by_first_id = {message[0]: message for message in messages()}
    assert all(message == by_first_id[message[0]] for message in messages())
    assert len(messages()) - len(by_first_id) <= 2 * 20
    statuses = [status for status, _ in recorder.statuses]
    assert statuses == ["up", "down", "up", "down", "up", "closed"]


async def test_a_broker_that_stops_answering_is_replaced_and_the_window_replayed(
    start_sink: StartSink,
) -> None:
    """A connection that looks alive: no PUBACK within the timeout."""
    async with ScriptedBroker(lambda n: None) as broker:
        sink, recorder = await start_sink(broker.port, batch_events=10, timeout_seconds=0.5)
        sink.submit(execs(30))
        await until(lambda: broker.connections == 2)
        broker.answer = lambda n: 0
        await until(lambda: account(sink) == (30, 0, 0))
        await sink.stop(GRACE)
    expected = [execs(10, start).lines("json") for start in (0, 10, 20)]
    assert broker.payloads[:3] == expected
    assert broker.payloads[-3:] == expected
    assert ("down", "no acknowledgement within 0.5 s") in recorder.statuses


async def test_a_broker_that_acknowledges_nothing_is_down_until_it_does(
    start_sink: StartSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is connected all the time, and again: that alone does not make it be up."""
    monkeypatch.setattr(silence, "SILENT_SECONDS", 0.6)
    async with ScriptedBroker(lambda n: None) as broker:
        sink, recorder = await start_sink(broker.port, batch_events=10, timeout_seconds=2)
        sink.submit(execs(30))
        await until(lambda: sink.status == "down")
        assert sink.reachable  # so a spool goes on waiting for it at the end
        await until(lambda: broker.connections == 2 and len(broker.payloads) == 6)
        assert sink.status == "down"
        broker.answer = lambda n: 0
        await until(lambda: account(sink) == (30, 0, 0))
        await sink.stop(GRACE)
    (_, reason) = recorder.statuses[1]
    assert reason.startswith("the broker has acknowledged nothing for ")
    said = [("up", ""), ("down", reason), ("up", "")]
    assert recorder.statuses == [*said, ("closed", "stopped before the broker acknowledged it")]


async def test_a_broker_that_takes_nothing_for_now_is_down_for_that_reason(
    start_sink: StartSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silence, "SILENT_SECONDS", 0.6)
    monkeypatch.setattr(mqtt_sink, "QUOTA_MOST", 0.2)
    async with ScriptedBroker(lambda n: 0x97) as broker:
        sink, recorder = await start_sink(broker.port)
        sink.submit(execs(10))
        await until(lambda: sink.status == "down")
        broker.answer = lambda n: 0
        await until(lambda: account(sink) == (10, 0, 0))
        await sink.stop(GRACE)
    reason = f"publishing to {broker.topics[0]} put off: Quota exceeded (0x97)"
    assert recorder.statuses[:3] == [("up", ""), ("down", reason), ("up", "")]


async def test_a_broker_that_closes_at_once_is_a_reason_and_not_a_timeout(
    start_sink: StartSink,
) -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        sink, recorder = await start_sink(server.sockets[0].getsockname()[1])
        await until(lambda: sink.status == "down")
        await sink.stop(0)
    assert recorder.statuses[0] == ("down", "the broker closed the connection")


# ---------------------------------------------------------------- limits and answers, scripted


class ScriptedBroker:
    """Speaks just enough MQTT v5 to give the answers that Mosquitto does not give.

    `answer(n)` is the reason code for the n-th PUBLISH, or None for no answer.
    """

    def __init__(
        self, answer: Callable[[int], int | None], connack: bytes = b"", *, silent: bool = False
    ) -> None:
        """`connack` are properties of the CONNACK; `silent` gives none at all."""
        self.answer = answer
        self.connack = connack
        self.silent = silent
        self.connections = 0
        self.payloads: list[bytes] = []
        self.topics: list[str] = []
        self.closes: Callable[[str, bytes], bool] = lambda topic, payload: False
        self.goodbye = b""
        self.unanswered: list[tuple[asyncio.StreamWriter, int]] = []
        self.port = free_port()
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> ScriptedBroker:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.close()
        await self._server.wait_closed()

    def answer_all(self) -> int:
        """Acknowledge what was not answered; how many messages that were."""
        unanswered, self.unanswered = self.unanswered, []
        for writer, mid in unanswered:
            self._puback(writer, mid, 0)
        return len(unanswered)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                kind = (await reader.readexactly(1))[0] >> 4
                body = await reader.readexactly(await self._length(reader))
                if kind == 1 and not self.silent:
                    rest = bytes([0, 0, len(self.connack)]) + self.connack
                    writer.write(bytes([0x20, len(rest)]) + rest)
                elif kind == 3:
                    self._on_publish(writer, body)
                elif kind == 12:
                    writer.write(b"\xd0\x00")
        writer.close()

    async def _length(self, reader: asyncio.StreamReader) -> int:
        value = shift = 0
        while True:
            byte = (await reader.readexactly(1))[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def _on_publish(self, writer: asyncio.StreamWriter, body: bytes) -> None:
        at = 2 + int.from_bytes(body[:2], "big")
        mid = int.from_bytes(body[at : at + 2], "big")
        assert body[at + 2] < 0x80, "properties of less than 128 bytes"
        self.payloads.append(body[at + 3 + body[at + 2] :])
        self.topics.append(body[2:at].decode())
        if self.closes(self.topics[-1], self.payloads[-1]):
            writer.write(self.goodbye)
            writer.close()
            return
        code = self.answer(len(self.payloads) - 1)
        if code is None:
            self.unanswered.append((writer, mid))
        else:
            self._puback(writer, mid, code)

    def _puback(self, writer: asyncio.StreamWriter, mid: int, code: int) -> None:
        writer.write(b"\x40\x03" + struct.pack(">HB", mid, code))


async def test_no_more_are_in_flight_than_the_broker_receives(start_sink: StartSink) -> None:
    """CONNACK's Receive Maximum of 3, below the 20 of the settings."""
    async with ScriptedBroker(lambda n: None, b"\x21\x00\x03") as broker:
        sink, _ = await start_sink(broker.port, batch_events=1, max_inflight=20)
        sink.submit(execs(10))
        seen: list[int] = []
        while not seen or account(sink)[2]:
            await until(lambda: broker.unanswered)
            await asyncio.sleep(0.05)
            seen.append(broker.answer_all())
            await asyncio.sleep(0.05)
        await sink.stop(GRACE)
    assert seen == [3, 3, 3, 1]
    assert b"".join(broker.payloads) == execs(10).lines("json")


class CountingRelay:
    """Passes MQTT on to a real broker, and counts what it has not acknowledged yet.

    Answers take a while, so that a window is used up.
    """

    def __init__(self, target: int) -> None:
        """`target` is the broker's port of 127.0.0.1."""
        self.target = target
        self.port = free_port()
        self.in_flight = self.most = self.acknowledged = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> CountingRelay:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        await asyncio.gather(*self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        source, target = await asyncio.open_connection("127.0.0.1", self.target)
        await asyncio.gather(
            self._pass(reader, target, self._published), self._pass(source, writer, self._answered)
        )

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        count: Callable[[int], Awaitable[None]],
    ) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                packet = await reader.readexactly(2)
                while packet[-1] & 0x80:
                    packet += await reader.readexactly(1)
                length = sum((byte & 0x7F) << 7 * at for at, byte in enumerate(packet[1:]))
                packet += await reader.readexactly(length)
                await count(packet[0] >> 4)
                writer.write(packet)
        writer.close()

    async def _published(self, kind: int) -> None:
        self.in_flight += kind == 3
        self.most = max(self.most, self.in_flight)

    async def _answered(self, kind: int) -> None:
        if kind == 4:
            await asyncio.sleep(0.01)
            self.in_flight -= 1
            self.acknowledged += 1


async def test_no_more_are_in_flight_than_mosquitto_receives(
    start_broker: StartBroker, start_sink: StartSink, watch: Watch
) -> None:
    """By the Receive Maximum of its CONNACK, which it has from `max_inflight_messages`."""
    broker = start_broker("max_inflight_messages 3")
    witness = await watch(broker, "kernel/#")
    async with CountingRelay(broker.port) as relay:
        sink, recorder = await start_sink(relay.port, batch_events=1, max_inflight=20)
        sink.submit(execs(100))
        await until(lambda: account(sink) == (100, 0, 0))
        await sink.stop(GRACE)
    assert (relay.most, relay.acknowledged) == (3, 100)
    await until(lambda: len(ids(witness.data)) == 100)
    assert witness.data == execs(100).lines("json")
    assert [status for status, _ in recorder.statuses] == ["up", "closed"]


async def test_no_more_are_in_flight_than_the_settings_allow(start_sink: StartSink) -> None:
    async with ScriptedBroker(lambda n: None) as broker:
        sink, _ = await start_sink(broker.port, batch_events=1, max_inflight=5)
        sink.submit(execs(10))
        await until(lambda: len(broker.unanswered) == 5)
        await asyncio.sleep(0.05)
        assert len(broker.unanswered) == 5
        broker.answer = lambda n: 0
        broker.answer_all()
        await sink.stop(GRACE)
    assert account(sink) == (10, 0, 0)


async def test_an_exceeded_quota_is_waited_for(start_sink: StartSink) -> None:
    """PUBACK 0x97 twice, then success: the same message again, nothing dropped, in order."""
    async with ScriptedBroker(lambda n: 0x97 if n in (1, 2) else 0) as broker:
        sink, recorder = await start_sink(broker.port, batch_events=1, max_inflight=1)
        sink.submit(execs(3))
        await sink.stop(GRACE)
    first, second, third = (execs(1, start).lines("json") for start in (0, 1, 2))
    assert broker.payloads == [first, second, second, second, third]
    assert account(sink) == (3, 0, 0)
    assert [status for status, _ in recorder.statuses] == ["up", "closed"]


def delivered_for_good(payloads: list[bytes], codes: list[int]) -> list[str]:
    """Ids in the order in which a consumer has each for the last time."""
    taken = b"".join(payload for payload, code in zip(payloads, codes, strict=True) if code < 0x80)
    return list(dict.fromkeys(reversed(ids(taken))))[::-1]


class Answers:
    """Answers by number, 0 otherwise, and keeps them."""

    def __init__(self, codes: dict[int, int]) -> None:
        self.codes = codes
        self.given: list[int] = []

    def __call__(self, n: int) -> int:
        self.given.append(self.codes.get(n, 0))
        return self.given[-1]


@pytest.mark.parametrize("code", [0x80, 0x83, 0x91, 0x97])
async def test_one_refused_for_now_in_the_middle_of_a_window_keeps_the_order(
    start_sink: StartSink, code: int
) -> None:
    """At the default number in flight: what was taken behind it comes once more, behind it."""
    answers = Answers({1: code})
    async with ScriptedBroker(answers) as broker:
        sink, recorder = await start_sink(broker.port, batch_events=10)
        sink.submit(execs(50))
        await sink.stop(GRACE)
    chunks = [execs(10, start).lines("json") for start in (0, 10, 20, 30, 40)]
    assert broker.payloads == chunks + chunks[1:]
    assert delivered_for_good(broker.payloads, answers.given) == ids(execs(50).lines("json"))
    assert account(sink) == (50, 0, 0)
    assert sink.watermarks.held == 0
    assert [status for status, _ in recorder.statuses] == ["up", "closed"]


async def test_several_refused_for_now_are_sent_again_in_their_order(
    start_sink: StartSink,
) -> None:
    """Then one at a time until one is taken: what is refused again has nothing behind it."""
    answers = Answers(dict.fromkeys((1, 2, 3, 5), 0x97))
    async with ScriptedBroker(answers) as broker:
        sink, _ = await start_sink(broker.port, batch_events=10)
        sink.submit(execs(50))
        await sink.stop(GRACE)
    chunks = [execs(10, start).lines("json") for start in (0, 10, 20, 30, 40)]
    assert broker.payloads == [*chunks, chunks[1], *chunks[1:]]
    assert delivered_for_good(broker.payloads, answers.given) == ids(execs(50).lines("json"))
    assert account(sink) == (50, 0, 0)


async def test_another_topic_is_not_repeated_for_one_that_is_refused_for_now(
    start_sink: StartSink,
) -> None:
    """What was taken of it is delivered; both have all, in order, and are accounted once."""
    answers = Answers({0: 0x97})
    async with ScriptedBroker(answers) as broker:
        sink, _ = await start_sink(broker.port, batch_events=10)
        batch = Batch([(Exec, Open)[n % 2](f"b-{n}") for n in range(40)])
        sink.submit(batch)
        await sink.stop(GRACE)
    parts = [part.lines("json") for part in batch.by_category().values()]
    for part in parts:
        seen = delivered_for_good(broker.payloads, answers.given)
        assert [name for name in seen if name in ids(part)] == ids(part)
    assert len(broker.payloads) == 4 + 2
    assert account(sink) == (40, 0, 0)


async def test_what_was_refused_for_now_keeps_the_order_over_a_reconnect(
    start_sink: StartSink,
) -> None:
    """The connection ends while the window runs empty."""
    codes: dict[int, int | None] = {1: 0x97, 3: None, 4: None}
    async with ScriptedBroker(lambda n: codes.get(n, 0)) as broker:
        sink, _ = await start_sink(broker.port, batch_events=10, timeout_seconds=0.5)
        sink.submit(execs(50))
        await sink.stop(GRACE)
    chunks = [execs(10, start).lines("json") for start in (0, 10, 20, 30, 40)]
    assert broker.connections == 2
    assert broker.payloads == chunks + chunks[1:]
    assert account(sink) == (50, 0, 0)


async def test_what_was_taken_behind_a_refused_one_is_no_loss_at_the_end(
    start_sink: StartSink,
) -> None:
    """The grace ends before the refused one is taken: it alone is lost, and all is in order."""
    async with ScriptedBroker(lambda n: 0x97 if n == 1 or n > 2 else 0) as broker:
        sink, recorder = await start_sink(broker.port, batch_events=10)
        sink.submit(execs(30))
        await sink.stop(0.5)
    assert account(sink) == (20, 10, 0)
    assert recorder.reasons == {"stopped before the broker acknowledged it"}
    assert sink.watermarks.held == 0


async def test_one_that_is_too_large_in_the_middle_of_a_window_keeps_the_order(
    start_sink: StartSink,
) -> None:
    """PUBACK 0x95: its pieces, then what was behind it once more."""
    answers = Answers({1: 0x95})
    async with ScriptedBroker(answers) as broker:
        sink, _ = await start_sink(broker.port, batch_events=10)
        sink.submit(execs(50))
        await sink.stop(GRACE)
    assert delivered_for_good(broker.payloads, answers.given) == ids(execs(50).lines("json"))
    assert broker.payloads[5] == execs(5, 10).lines("json")
    assert account(sink) == (50, 0, 0)
    assert sink.watermarks.held == 0


async def test_a_refused_topic_is_remembered_and_the_others_go_on(start_sink: StartSink) -> None:
    """Once 0x87 was answered for one message, the others of the topic are not sent."""
    async with ScriptedBroker(lambda n: 0) as broker:
        broker.answer = lambda n: 0x87 if broker.topics[n].endswith("file") else 0
        sink, recorder = await start_sink(broker.port, batch_events=1, max_inflight=1)
        sink.submit(Batch([(Exec, Open)[n % 2](f"b-{n}") for n in range(40)]))
        await sink.stop(GRACE)
    assert broker.topics.count("kernel/web1/file") == 1
    assert sink.account.delivered == {"process.exec": 20}
    assert sink.account.dropped == {"file.open": 20}
    assert recorder.reasons == {"publishing to kernel/web1/file refused: Not authorized (0x87)"}


@pytest.mark.parametrize("goodbye", [b"", b"\xe0\x02\x95\x00"], ids=["silent", "0x95"])
async def test_a_broker_that_closes_the_connection_over_a_large_message_gets_smaller_ones(
    start_sink: StartSink, goodbye: bytes
) -> None:
    """The limit is found once: what follows costs no connection."""
    async with ScriptedBroker(lambda n: 0) as broker:
        broker.closes, broker.goodbye = lambda topic, payload: len(payload) > 2000, goodbye
        sink, _ = await start_sink(broker.port, batch_events=100)
        sink.submit(execs(100))
        await until(lambda: account(sink) == (100, 0, 0))
        connections = broker.connections
        assert connections < 10
        sink.submit(execs(900, 100))
        await sink.stop(GRACE)
        assert broker.connections == connections
        taken = b"".join(payload for payload in broker.payloads if len(payload) <= 2000)
    assert taken == execs(1000).lines("json")
    assert account(sink) == (1000, 0, 0)


async def test_a_broker_that_closes_the_connection_over_a_topic_gets_the_others(
    start_sink: StartSink,
) -> None:
    """DISCONNECT 0x87: once the message is alone in flight, its topic is known, and dropped."""
    async with ScriptedBroker(lambda n: 0) as broker:
        broker.closes = lambda topic, payload: topic.endswith("file")
        broker.goodbye = b"\xe0\x02\x87\x00"
        sink, recorder = await start_sink(broker.port, batch_events=1)
        sink.submit(Batch([(Exec, Open)[n % 2](f"b-{n}") for n in range(200)]))
        await sink.stop(GRACE)
        assert broker.connections <= 4
    assert sink.account.delivered == {"process.exec": 100}
    assert sink.account.dropped == {"file.open": 100}
    assert recorder.reasons == {"publishing to kernel/web1/file refused: Not authorized (0x87)"}


@pytest.mark.parametrize("code", [0x8B, 0x8E, 0x98])
async def test_a_connection_that_ends_for_another_reason_is_not_held_against_the_message(
    start_sink: StartSink, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shutting down, taken over, an administrator's doing, more often than a message is tried."""
    monkeypatch.setattr(mqtt_sink, "RETRY_MOST", 0.05)
    async with ScriptedBroker(lambda n: 0) as broker:
        ends = MAX_TRIES + 2

        def ended(topic: str, payload: bytes) -> bool:
            return broker.connections <= ends

        broker.closes, broker.goodbye = ended, bytes([0xE0, 2, code, 0])
        sink, recorder = await start_sink(broker.port)
        sink.submit(execs(100))
        await until(lambda: account(sink) == (100, 0, 0))
        assert broker.connections == ends + 1
        assert {len(ids(payload)) for payload in broker.payloads} == {100}
        await sink.stop(GRACE)
    assert recorder.reasons == set()


async def test_a_session_that_is_taken_over_again_and_again_loses_nothing(
    start_broker: StartBroker,
    start_sink: StartSink,
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By somebody of the same identifier: another agent of that configuration, or a thief."""
    monkeypatch.setattr(mqtt_sink, "RETRY_MOST", 0.05)
    broker = start_broker()
    witness = await watch(broker, "kernel/#")
    sink, recorder = await start_sink(broker.port, client_id="agent")
    thief = Witness(broker, "none", name="agent")  # comes back every time
    try:
        for turn in range(3):
            await until(lambda: broker.log.count("Sending SUBACK to agent") > turn)  # noqa: B023
            sink.submit(execs(100, 100 * turn))
    finally:
        thief.close()
    await sink.stop(GRACE)
    assert account(sink) == (300, 0, 0)
    await until(lambda: len(set(ids(witness.data))) == 300)
    assert ("down", "connection lost") in recorder.statuses  # this Mosquitto does not say why


async def test_a_broker_without_qos_1_is_a_clear_reason(start_sink: StartSink) -> None:
    async with ScriptedBroker(lambda n: 0, b"\x24\x00") as broker:
        sink, recorder = await start_sink(broker.port)
        await until(lambda: sink.status == "down")
        await sink.stop(0)
    assert recorder.statuses[0] == ("down", "connection refused: QoS not supported (0x9B)")


# ---------------------------------------------------------------- who we are, and who they are


async def test_a_wrong_password_is_a_clear_reason_and_no_secret_is_shown(
    start_broker: StartBroker,
    start_sink: StartSink,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = start_broker(*password_file(tmp_path), anonymous=False)
    monkeypatch.setenv("MQTT_PASSWORD", "wrong horse")
    with caplog.at_level(0):
        sink, recorder = await start_sink(
            broker.port, username="agent", password_env="MQTT_PASSWORD"
        )
        await until(lambda: sink.status == "down")
        await sink.stop(0)
    assert recorder.statuses[0] == ("down", "connection refused: Not authorized (0x87)")
    shown = f"{sink.name} {sink!r} {recorder.statuses} {caplog.text}"
    assert "horse" not in shown
    assert caplog.text == ""


@pytest.mark.parametrize("source", ["env", "file"])
async def test_a_password_comes_from_the_environment_or_a_file(
    start_broker: StartBroker,
    start_sink: StartSink,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
) -> None:
    broker = start_broker(*password_file(tmp_path), anonymous=False)
    monkeypatch.setenv("MQTT_PASSWORD", PASSWORD)
    (tmp_path / "secret").write_text(f"{PASSWORD}\n")
    where = {"env": "MQTT_PASSWORD", "file": str(tmp_path / "secret")}[source]
    sink, _ = await start_sink(broker.port, username="agent", **{f"password_{source}": where})
    sink.submit(execs(5))
    await sink.stop(GRACE)
    assert account(sink) == (5, 0, 0)


def password_file(directory: Path) -> list[str]:
    """Configuration of a broker that knows the user `agent`."""
    path = directory / "passwords"
    run("mosquitto_passwd", "-c", "-b", path, "agent", PASSWORD)
    return [f"password_file {path}"]


def run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


class Certificates:
    """A certificate authority, and what it signed, made by openssl."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self.ca = directory / "ca.pem"
        self._ca_key = directory / "ca.key"
        run(
            *("openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=test authority"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-keyout", self._ca_key, "-out", self.ca),
        )

    def sign(self, name: str) -> tuple[Path, Path]:
        """Certificate and key of `name`, valid for 127.0.0.1."""
        key, request = self._directory / f"{name}.key", self._directory / f"{name}.csr"
        certificate, extensions = self._directory / f"{name}.pem", self._directory / "san"
        extensions.write_text("subjectAltName=IP:127.0.0.1")
        run(
            *("openssl", "req", "-nodes", "-subj", f"/CN={name}"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-keyout", key, "-out", request),
        )
        run(
            *("openssl", "x509", "-req", "-days", "2", "-in", request, "-extfile", extensions),
            *("-CA", self.ca, "-CAkey", self._ca_key, "-CAcreateserial", "-out", certificate),
        )
        return certificate, key


async def test_tls_with_certificates_on_both_sides(
    start_broker: StartBroker, watch: Watch, start_sink: StartSink, tmp_path: Path
) -> None:
    authority = Certificates(tmp_path / "authority")
    certificate, key = authority.sign("broker")
    broker = start_broker(
        *(f"cafile {authority.ca}", f"certfile {certificate}", f"keyfile {key}"),
        "require_certificate true",
    )
    own_certificate, own_key = authority.sign("agent")
    own = ("--cafile", authority.ca, "--cert", own_certificate, "--key", own_key)
    witness = await watch(broker, "kernel/#", "-q", "1", "-N", *map(str, own))
    tls = {"ca_file": str(authority.ca), "cert_file": str(own_certificate)}
    sink, _ = await start_sink(broker.port, tls=tls | {"key_file": str(own_key)})
    batch = execs(5000, pad=200)
    sink.submit(batch)
    await sink.stop(GRACE)
    assert account(sink) == (5000, 0, 0)
    expected = batch.lines("json")
    await until(lambda: len(witness.data) >= len(expected))
    assert witness.data == expected


async def test_a_broker_of_another_authority_is_refused(
    start_broker: StartBroker, start_sink: StartSink, tmp_path: Path
) -> None:
    certificate, key = Certificates(tmp_path / "theirs").sign("broker")
    other = Certificates(tmp_path / "ours")
    broker = start_broker(f"certfile {certificate}", f"keyfile {key}")
    sink, recorder = await start_sink(broker.port, tls={"ca_file": str(other.ca)})
    await until(lambda: sink.status == "down")
    await sink.stop(0)
    assert recorder.statuses[0][1].startswith("TLS: unable to get local issuer certificate")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"username": "agent", "password_env": "NOT_SET_1"}, "NOT_SET_1 is not set"),
        ({"tls": {"ca_file": "/does/not/exist"}}, "cannot use /does/not/exist"),
    ],
)
async def test_settings_that_cannot_work_are_refused_before_anything_starts(
    start_sink: StartSink, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        await start_sink(1883, **options)


# ---------------------------------------------------------------- stopping


async def test_stop_gives_up_on_a_broker_that_hangs(
    start_broker: StartBroker, start_sink: StartSink
) -> None:
    broker = start_broker()
    sink, recorder = await start_sink(broker.port)
    sink.submit(execs(10))
    await until(lambda: account(sink) == (10, 0, 0))
    os.kill(broker.pid, signal.SIGSTOP)
    for n in range(100):
        sink.submit(execs(1000, start=1000 * n, pad=100))
    await asyncio.wait_for(sink.stop(0.2), WAIT)
    assert account(sink) == (10, 100_000, 0)
    assert sink.watermarks.held == 0
    reason = "stopped before the broker acknowledged it"
    assert recorder.reasons == {reason}
    assert recorder.statuses[-1] == ("closed", reason)


async def test_stop_within_the_grace_delivers_to_a_broker_that_comes_back(
    start_broker: StartBroker, start_sink: StartSink
) -> None:
    broker = start_broker()
    sink, _ = await start_sink(broker.port)
    await until(lambda: sink.status == "up")
    broker.kill()
    await until(lambda: sink.status == "down")
    sink.submit(execs(10))
    stopping = asyncio.create_task(sink.stop(GRACE))
    await asyncio.sleep(0.05)
    await asyncio.to_thread(broker.start)
    await stopping
    assert account(sink) == (10, 0, 0)


async def test_stop_while_the_broker_is_away_drops_and_counts(start_sink: StartSink) -> None:
    sink, _ = await start_sink(free_port())
    sink.submit(execs(10))
    await asyncio.wait_for(sink.stop(0.1), WAIT)
    assert account(sink) == (0, 10, 0)
    sink.submit(execs(5))
    await sink.stop(0.1)
    assert account(sink) == (0, 15, 0)


async def test_stop_does_not_wait_for_a_connection_that_hangs(start_sink: StartSink) -> None:
    """Neither for a host whose backlog is full nor for a CONNACK that does not come."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        blocked = [socket.socket() for _ in range(3)]
        for sock in blocked:
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
        sink, _ = await start_sink(port)
        sink.submit(execs(10))
        await asyncio.sleep(0.05)
        before = time.monotonic()
        await sink.stop(0.05)
        assert time.monotonic() - before < 4, "the limit for one connection is 5 s"
        for sock in blocked:
            sock.close()
    assert account(sink) == (0, 10, 0)
    async with ScriptedBroker(lambda n: 0, silent=True) as broker:
        sink, recorder = await start_sink(broker.port, timeout_seconds=0.2)
        await until(lambda: sink.status == "down")
        await asyncio.wait_for(sink.stop(0), WAIT)
        assert recorder.statuses[0] == ("down", "no answer within 0.2 s")


CRITICAL = "critical", 0


def numbered(count: int, start: int) -> Batch:
    events = [Numbered(f"b-critical-0-{n:08}") for n in range(start, start + count)]
    return Batch(events, spans={CRITICAL: Span(start, start + count - 1)})


async def test_discard_drops_what_waits_and_says_which_and_what_comes_next_is_delivered(
    start_sink: StartSink,
) -> None:
    """Two of ten in flight: the other eight are lost, with their numbers, and no more."""
    async with ScriptedBroker(lambda n: None) as broker:
        sink, _ = await start_sink(broker.port, batch_events=10, max_inflight=2)
        await until(lambda: sink.status == "up")
        recorder = sink.listener = SpanRecorder()
        for start in range(0, 100, 10):
            sink.submit(numbered(10, start))
        await until(lambda: len(broker.unanswered) == 2)
        sink.discard("no time left")
        assert account(sink) == (0, 80, 20)
        assert recorder.reasons == {"no time left"}
        assert recorder.numbers() == list(range(20, 100))
        assert recorder.kinds() == {CRITICAL: {"process.exec": 80}}
        sink.submit(numbered(5, 100))
        broker.answer = lambda n: 0
        broker.answer_all()
        await sink.stop(GRACE)
    assert b"".join(broker.payloads) == b"".join(
        (numbered(20, 0).lines("json"), numbered(5, 100).lines("json"))
    )
    assert account(sink) == (25, 80, 0)
    assert sink.watermarks.held == 0


async def test_every_loss_says_which_numbers_it_may_have(start_sink: StartSink) -> None:
    """Refused, too large by itself, and given up at the end; a message of two drains has both."""
    codes = {0: 0x99, 1: 0x95, 2: 0}
    async with ScriptedBroker(lambda n: codes.get(n)) as broker:
        sink, _ = await start_sink(broker.port, batch_events=2, max_inflight=1, linger_ms=1000)
        await until(lambda: sink.status == "up")
        recorder = sink.listener = SpanRecorder()
        for n in range(8):
            sink.submit(numbered(1, n))
            if n % 2:  # one message at a time: with more, they would be in one
                await until(lambda: len(broker.payloads) > n // 2)  # noqa: B023
        await until(lambda: len(broker.payloads) >= 3)
        await sink.stop(0)
        sink.submit(numbered(1, 8))
    assert recorder.spans[0] == {CRITICAL: Span(0, 1)}
    # Of the message that was too large the first event was sent alone, and taken.
    assert recorder.numbers() == [0, 1, *range(3, 9)]
    assert recorder.kinds() == {CRITICAL: {"process.exec": 8}}
    assert all(last - first < 2 for one in recorder.spans for first, last, _ in one.values())
    assert recorder.spans[-1] == {CRITICAL: Span(8, 8)}
    assert account(sink)[2] == 0


async def test_a_size_limit_that_a_refusal_taught_outlives_the_connection(
    start_broker: StartBroker, start_sink: StartSink
) -> None:
    """Mosquitto's 0x95 for what is over its `message_size_limit`: once, not once a connection."""
    broker = start_broker("message_size_limit 1000")
    sink, _ = await start_sink(broker.port)
    sink.submit(execs(200, pad=50))
    await until(lambda: account(sink) == (200, 0, 0))
    limit = sink._size_limit.now(asyncio.get_running_loop().time())
    assert 0 < limit <= 1000
    broker.kill()
    await until(lambda: sink.status == "down")
    broker.start()
    sink.submit(execs(200, 200, pad=50))
    await sink.stop(GRACE)
    assert account(sink) == (400, 0, 0)
    assert sink._size_limit.now(asyncio.get_running_loop().time()) == limit


async def test_a_cancelled_stop_still_gives_the_account(start_sink: StartSink) -> None:
    sink, _ = await start_sink(free_port())
    sink.submit(execs(10))
    stopping = asyncio.create_task(sink.stop(GRACE))
    await asyncio.sleep(0.01)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert sink.status == "closed"
    assert account(sink) == (0, 10, 0)


# ---------------------------------------------------------------- a backlog, and what is too large


async def test_messages_grow_with_a_backlog_and_only_with_one(start_sink: StartSink) -> None:
    """Nothing is answered at first: what waits then goes in up to eight times as much."""
    async with ScriptedBroker(lambda n: None) as broker:
        sink, _ = await start_sink(broker.port, batch_events=10, max_inflight=4)
        await until(lambda: sink.status == "up")
        sink.submit(execs(40))
        await until(lambda: len(broker.unanswered) == 4)
        for start in range(40, 1040, 25):
            sink.submit(execs(25, start))
        broker.answer = lambda n: 0
        broker.answer_all()
        await sink.stop(GRACE)
    sizes = [len(ids(payload)) for payload in broker.payloads]
    assert sizes[:4] == [10] * 4
    assert max(sizes) <= 80
    assert len(sizes) < 4 + 1000 / 40
    assert ids(b"".join(broker.payloads)) == ids(execs(1040).lines("json"))
    assert account(sink) == (1040, 0, 0)
    assert sink.watermarks.held == 0


async def test_one_event_to_a_message_stays_so_with_a_backlog(start_sink: StartSink) -> None:
    async with ScriptedBroker(lambda n: 0) as broker:
        sink, _ = await start_sink(broker.port, batch_events=1, max_inflight=1)
        sink.submit(execs(300))
        await sink.stop(GRACE)
    assert broker.payloads == execs(300).lines("json").splitlines(keepends=True)


async def test_what_is_held_is_counted_until_it_is_delivered(start_sink: StartSink) -> None:
    """Ids and types too; and what is in flight twice, since the library has it as a packet."""
    async with ScriptedBroker(lambda n: None) as broker:
        sink, _ = await start_sink(broker.port, batch_events=100, max_inflight=1)
        await until(lambda: sink.status == "up")
        sink.submit(execs(100))
        await until(lambda: broker.unanswered)
        one = execs(100)
        sent = encode(one, "json").held + len(one.lines("json"))
        assert sink.watermarks.held == sent
        sink.submit(execs(100, 100))
        assert sink.watermarks.held == sent + encode(execs(100, 100), "json").held
        broker.answer = lambda n: 0
        broker.answer_all()
        await sink.stop(GRACE)
    assert sink.watermarks.held == 0


@pytest.mark.parametrize("config", ["message_size_limit 4000", "max_packet_size 4000"])
@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_a_real_broker_with_a_small_limit_gets_every_event_that_it_takes(
    start_broker: StartBroker, watch: Watch, start_sink: StartSink, config: str, encoding: Any
) -> None:
    """60,032 events, every 1,000th larger than the limit by itself; counted by mosquitto_sub.

    Mosquitto 2.0 closes the connection over each message that exceeds its `message_size_limit`,
    which it does not announce: what was too large once is not tried again.
    """
    broker = start_broker(config, "max_queued_messages 0")
    witness = await watch(broker, "kernel/#", "-q", "1", "-F", "%P %x")
    sink, recorder = await start_sink(broker.port, encoding=encoding)
    await until(lambda: sink.status == "up")
    total, large = 60_032, 61
    for start in range(0, total, 512):
        numbers = range(start, min(total, start + 512))
        sink.submit(Batch([_of_some_kind(n) for n in numbers]))
        while sink.watermarks.full:  # noqa: ASYNC110 - as the reader pauses
            await asyncio.sleep(0.01)
    await sink.stop(60)
    assert account(sink) == (total - large, large, 0)
    assert recorder.reasons == {"larger than the broker accepts"}
    expected = {f"b-{n}" for n in range(total) if n % 1000}
    # As a set: what a broker had acknowledged when it closed the connection can come twice.
    await until(lambda: {name for line in witness.lines for name in ids_of(line)} >= expected)
    assert {name for line in witness.lines for name in ids_of(line)} == expected
    assert recorder.statuses[-1] == ("closed", "stopped before the broker acknowledged it")
    connected = broker.log.count("New client connected") - 1  # the witness's
    assert connected == 1 if config.startswith("max_packet_size") else connected < 8


def _of_some_kind(number: int) -> Any:
    if number % 1000 == 0:
        return Exec(f"b-{number}", "x" * 5000)
    return (Exec, Open)[number % 2](f"b-{number}")


def ids_of(line: str) -> list[str]:
    """The ids in a message of either encoding, written as its user properties and in hex."""
    properties, payload = line.rsplit(" ", 1)
    data = bytes.fromhex(payload)
    if data.startswith(b"{"):
        return ids(data)
    count = int(properties.partition("events:")[2].split()[0])
    found = msgspec.msgpack.decode(b"\xdd" + struct.pack(">I", count) + data)
    return [event["id"] for event in found]


@pytest.mark.parametrize("config", ["message_size_limit 3000", "max_packet_size 3000"])
async def test_a_limit_that_is_new_after_a_restart_costs_no_event(
    start_broker: StartBroker, start_sink: StartSink, config: str
) -> None:
    """What was made and in flight under the old limit is cut, not given up."""
    broker = start_broker("max_queued_messages 0")
    sink, recorder = await start_sink(broker.port)
    sink.submit(execs(200, pad=50))
    await until(lambda: account(sink) == (200, 0, 0))
    os.kill(broker.pid, signal.SIGSTOP)
    for start in range(200, 5200, 200):
        sink.submit(execs(200, start, pad=50))
    await asyncio.sleep(0.1)
    broker.kill()
    broker.config = (*broker.config, config)
    await asyncio.to_thread(broker.start)
    await sink.stop(GRACE * 2)
    assert account(sink) == (5200, 0, 0)
    assert recorder.reasons == set()
