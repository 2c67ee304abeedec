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
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from streamer import settings
from streamer.batch import Batch
from streamer.errors import ConfigError
from streamer.sinks.base import Listener, Sink, Status
from streamer.sinks.mqtt import MqttSink
from tests.brokers import MosquittoBroker, free_port

pytestmark = pytest.mark.mqtt

WAIT = 20.0
GRACE = 10.0
PASSWORD = "correct horse battery staple"


class Exec(msgspec.Struct, tag_field="event", tag="process.exec"):
    id: str
    pad: str = ""


class Exit(msgspec.Struct, tag_field="event", tag="process.exit"):
    id: str


class Open(msgspec.Struct, tag_field="event", tag="file.open"):
    id: str


def execs(count: int, start: int = 0, pad: int = 0) -> Batch:
    return Batch([Exec(f"b-{n:08}", "x" * pad) for n in range(start, start + count)])


def ids(ndjson: bytes) -> list[str]:
    return [msgspec.json.decode(line)["id"] for line in ndjson.splitlines()]


class Recorder(Listener):
    """Keeps what a sink tells its owner."""

    def __init__(self) -> None:
        self.marks: list[str] = []
        self.statuses: list[tuple[Status, str]] = []
        self.reasons: set[str] = set()

    def sink_full(self, sink: Sink) -> None:
        self.marks.append("full")

    def sink_room(self, sink: Sink) -> None:
        self.marks.append("room")

    def sink_status(self, sink: Sink, status: Status, reason: str) -> None:
        self.statuses.append((status, reason))

    def sink_dropped(self, sink: Sink, kinds: Mapping[str, int], reason: str) -> None:
        self.reasons.add(reason)


async def until(condition: Callable[[], object]) -> None:
    """Wait until `condition` holds."""
    async with asyncio.timeout(WAIT):
        while not condition():  # noqa: ASYNC110 - other processes have no event to wait for
            await asyncio.sleep(0.01)


class Witness:
    """mosquitto_sub, writing what it receives to a file."""

    def __init__(self, broker: MosquittoBroker, topic: str, *options: str, name: str) -> None:
        self._output = broker.directory / f"{name}.out"
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                ["mosquitto_sub", "-V", "mqttv5", "-h", "127.0.0.1", "-p", str(broker.port)]
                + ["-i", name, "-t", topic, *options],
                stdout=output,
                stderr=subprocess.DEVNULL,
            )

    @property
    def data(self) -> bytes:
        return self._output.read_bytes()

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
        options = {"host": "127.0.0.1", "linger_ms": 5} | options
        sink = MqttSink(settings.MqttSink(port=port, **options), host="web1")
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
    await until(lambda: witness.data.count(b"\n") == 2)
    head = "kernel/web1/process 1 application/x-ndjson host:web1"
    assert witness.data.decode().splitlines() == [
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
    await until(lambda: witness.data.count(b"\n") == 3)
    lines = [line.split(" ") for line in witness.data.decode().splitlines()]
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
    await until(lambda: witness.data.count(b"\n") == 1)
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
    assert recorder.reasons.pop().startswith("larger than the broker accepts (30")
    assert [status for status, _ in recorder.statuses] == ["up", "closed"]
    expected = small.lines(encoding)
    await until(lambda: len(bytes.fromhex(witness.data.decode())) >= len(expected))
    assert bytes.fromhex(witness.data.decode()) == expected


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
    start_sink: StartSink, tmp_path: Path, watch: Watch
) -> None:
    """The budget fills up to its exact mark meanwhile, and the trouble is told once."""
    broker = MosquittoBroker(tmp_path / "mosquitto", ["log_type all"])
    batch = execs(10, pad=100)
    size = len(batch.lines("json"))
    sink, recorder = await start_sink(broker.port, budget_bytes=20 * size)
    await until(lambda: sink.status == "down")
    for n in range(20):
        assert recorder.marks == []
        sink.submit(execs(10, start=10 * n, pad=100))
    assert recorder.marks == ["full"]
    assert sink.watermarks.held == 20 * size
    await asyncio.sleep(0.5)
    assert recorder.statuses == [("down", "Connection refused")]
    broker.config = (*broker.config, "queue_qos0_messages true")
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
    await sink.stop(GRACE)
    assert account(sink) == (produced, 0, 0)
    expected = ids(execs(produced).lines("json"))

    def messages() -> list[list[str]]:
        return [ids(bytes.fromhex(line)) for line in witness.data.decode().splitlines()]

    def distinct() -> list[str]:
        return list(dict.fromkeys(itertools.chain.from_iterable(messages())))

    await until(lambda: len(distinct()) == produced)
    assert distinct() == expected
    by_first_id = {message[0]: message for message in messages()}
    assert all(message == by_first_id[message[0]] for message in messages())
    assert len(messages()) - len(by_first_id) <= 2 * 20
    statuses = [status for status, _ in recorder.statuses]
    assert statuses == ["up", "down", "up", "down", "up", "closed"]
