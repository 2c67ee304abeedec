"""The Kafka sink against a real Apache Kafka, read back with kcat, an independent client.

Two brokers: one for the whole file, which stays up and also has listeners with TLS and SASL;
and one that is killed and started again, without automatic creation of topics.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition  # type: ignore[import-untyped]

from streamer.agent.service import Service
from streamer.config.settings import KafkaSink as Settings
from streamer.config.settings import Limits, Sasl, Tls
from streamer.config.settings import Settings as AgentSettings
from streamer.errors import ConfigError
from streamer.events.batch import Batch
from streamer.sinks.batching import SizeLimit
from streamer.sinks.kafka import client
from streamer.sinks.kafka import sink as kafka_sink
from streamer.sinks.kafka.client import partition_of
from streamer.sinks.kafka.encoded import encode
from streamer.sinks.kafka.sink import KafkaSink
from streamer.sinks.kafka.window import SEQUENCES, Window
from streamer.verify import kafka as verify_kafka
from streamer.verify.kafka import KafkaSource
from streamer.verify.records import Chunk
from streamer.verify.start import BEGINNING
from tests.brokers import KafkaBroker, free_port, kafka_tool
from tests.kafka_helpers import (
    HOST,
    NOW_NS,
    FileOpen,
    NetClose,
    add_partitions,
    allow_writing,
    alter,
    create,
    delete,
    delete_before,
    expected,
    ids,
    make,
    opens,
    read_back,
    started,
    topics,
    until,
)
from tests.memory_kernel import MemoryKernel

pytestmark = pytest.mark.kafka

PASSWORD = "correct-horse-battery"
SASL_LINES = (
    "sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
    "listener.name.sasl.plain.sasl.jaas.config="
    "org.apache.kafka.common.security.plain.PlainLoginModule required"
    f' user_writer="{PASSWORD}" user_stranger="{PASSWORD}";',
    "listener.name.sasl.scram-sha-256.sasl.jaas.config="
    "org.apache.kafka.common.security.scram.ScramLoginModule required;",
    "listener.name.sasl.scram-sha-512.sasl.jaas.config="
    "org.apache.kafka.common.security.scram.ScramLoginModule required;",
    # `stranger` may log in, and do nothing unless a test allows it.
    "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "super.users=User:ANONYMOUS;User:writer;User:CN=client",
)

# ---------------------------------------------------------------- brokers


@pytest.fixture(autouse=True)
def nothing_goes_unnoticed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """asyncio logs tasks that were left behind, and exceptions that nobody looked at."""
    yield
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ca.pem`, `other-ca.pem`; `server.pem` and `client.pem`, each with its key."""
    directory = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(("openssl", *arguments), cwd=directory, check=True, capture_output=True)

    for ca in ("ca", "other-ca"):
        openssl(*f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 "
                f"-subj /CN={ca} -keyout {ca}.key -out {ca}.pem".split())  # fmt: skip
    (directory / "san").write_text("subjectAltName=IP:127.0.0.1")
    for name in ("server", "client"):
        openssl(*f"req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} "
                f"-keyout {name}.key -out {name}.csr".split())  # fmt: skip
        openssl(*f"x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 "
                f"-extfile san -out {name}.crt".split())  # fmt: skip
        text = (directory / f"{name}.key").read_text() + (directory / f"{name}.crt").read_text()
        (directory / f"{name}.pem").write_text(text)
    return directory


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[KafkaBroker]:
    tls = (
        "ssl.keystore.type=PEM",
        f"ssl.keystore.location={certificates}/server.pem",
        "ssl.truststore.type=PEM",
        f"ssl.truststore.location={certificates}/ca.pem",
        "listener.name.mtls.ssl.client.auth=required",
    )
    listeners = {"TLS": "SSL", "MTLS": "SSL", "SASL": "SASL_PLAINTEXT"}
    with KafkaBroker(
        tmp_path_factory.mktemp("kafka"),
        (*tls, *SASL_LINES),
        listeners,
        scram_users={"writer": PASSWORD, "nobody": PASSWORD},
    ) as running:
        yield running


@pytest.fixture(scope="session")
def mortal_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    with KafkaBroker(
        tmp_path_factory.mktemp("mortal-kafka"), ["auto.create.topics.enable=false"]
    ) as running:
        yield running


@pytest.fixture
async def mortal(mortal_once: KafkaBroker) -> KafkaBroker:
    """A broker to be killed, up and answering at the beginning of every test."""
    try:
        os.kill(mortal_once.pid, 0)
    except RuntimeError:
        await asyncio.to_thread(mortal_once.start)
    return mortal_once


def closes(start: int, count: int) -> list[NetClose]:
    return [NetClose(f"net-{number}", NOW_NS, number) for number in range(start, start + count)]


def count_requests(sink: KafkaSink) -> Counter[str]:
    """Counts, from now on, what the sink asks for."""
    client, counts = sink._client, Counter[str]()
    assert client is not None
    refresh, produce = client.refresh, client.produce

    async def counted_refresh(topic: str | None = None) -> None:
        counts["metadata"] += 1
        await refresh(topic)

    def counted_produce(*arguments: Any) -> Any:
        counts["produce"] += 1
        return produce(*arguments)

    client.refresh = counted_refresh  # type: ignore[method-assign]
    client.produce = counted_produce  # type: ignore[assignment, method-assign]
    return counts


# ---------------------------------------------------------------- what arrives


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_records_read_back_equal_those_submitted(broker: KafkaBroker, encoding: str) -> None:
    """Every event once and in order, with the host as key and the event's time."""
    topic = next(topics)
    sink, heard = make(broker.address, topic, encoding=encoding, linger_ms=5)
    events = opens(0, 5000, "/var/lib/ünïcode\n\t\x00")
    async with started(sink):
        sizes = itertools.cycle([1, 700, 3, 1024, 50])
        for start in range(0, 5000, 500):
            rest = events[start : start + 500]
            while rest:
                size = next(sizes)
                sink.submit(Batch(rest[:size]))
                rest = rest[size:]
            await asyncio.sleep(0.01)
    codec: Any = msgspec.json if encoding == "json" else msgspec.msgpack
    records = await read_back(broker, topic)
    assert [codec.decode(record.value, type=FileOpen) for record in records] == events
    assert [record.time_ms for record in records] == [e.time_ns // 1_000_000 for e in events]
    assert {record.key for record in records} == {HOST}
    assert len({record.partition for record in records}) == 1
    assert sink.account.delivered == Counter({"file.open": 5000})
    assert heard.statuses == [("up", ""), ("closed", "")]
    assert heard.drops == []


async def test_partition_is_that_of_other_producers(broker: KafkaBroker) -> None:
    """Another client that hashes as Kafka's own does puts the same key in the same place."""
    topic = next(topics)
    sink, _ = make(broker.address, topic)
    async with started(sink):
        sink.submit(Batch(opens(0, 1)))
    arguments = ["-P", "-b", broker.address, "-t", topic, "-k", HOST]
    await asyncio.to_thread(
        subprocess.run,
        ["kcat", *arguments, "-X", "topic.partitioner=murmur2_random"],
        input=b"by kcat",
        check=True,
    )
    ours, theirs = await read_back(broker, topic)
    assert theirs.value == b"by kcat"
    assert (theirs.partition, theirs.key) == (ours.partition, ours.key)


@pytest.mark.parametrize("compression", ["none", "gzip", "snappy", "lz4", "zstd"])
async def test_every_codec_can_be_read(broker: KafkaBroker, compression: str) -> None:
    topic = next(topics)
    sink, _ = make(broker.address, topic, compression=compression)
    async with started(sink):
        sink.submit(Batch(opens(0, 300)))
    assert ids(await read_back(broker, topic)) == expected(0, 300)


async def test_topic_per_category(broker: KafkaBroker) -> None:
    topic = next(topics)
    sink, _ = make(broker.address, topic + ".{category}")
    closes = [NetClose(f"net-{number}", NOW_NS, number) for number in range(9)]
    mixed = [event for pair in zip(opens(0, 9), closes, strict=True) for event in pair]
    async with started(sink):
        sink.submit(Batch(mixed))
        sink.submit(Batch(opens(9, 5)))
    assert ids(await read_back(broker, f"{topic}.file")) == expected(0, 14)
    assert ids(await read_back(broker, f"{topic}.net")) == [event.id for event in closes]
    assert sink.account.delivered == Counter({"file.open": 14, "net.close": 9})


async def test_small_batches_are_sent_together_and_large_ones_split(broker: KafkaBroker) -> None:
    """Within `linger_ms` events are coalesced; what exceeds `batch_bytes` goes in parts."""
    topic = next(topics)
    sink, _ = make(broker.address, topic, batch_bytes=4096, linger_ms=200)
    async with started(sink):
        for number in range(10):
            sink.submit(Batch(opens(number, 1)))
        await until(lambda: not sink.account.pending)
        sink.submit(Batch(opens(10, 1000)))
    assert ids(await read_back(broker, topic)) == expected(0, 1010)


# ---------------------------------------------------------------- what `streamer verify` reads


async def test_what_the_broker_deletes_while_it_is_read(
    broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by retention. What was there is not waited for, and how many there were is told."""
    monkeypatch.setattr(verify_kafka, "FETCH_BYTES", 1)  # a batch at a time
    topic = next(topics)
    sink, _ = make(broker.address, topic, linger_ms=0)
    async with started(sink):
        for start in range(0, 100, 10):
            sink.submit(Batch(opens(start, 10)))
            await until(lambda: not sink.account.pending)
    partition = (await read_back(broker, topic))[0].partition
    source = KafkaSource(Settings(bootstrap=(broker.address,), topic=topic))
    found: list[Chunk] = []
    json: Any = msgspec.json
    async for chunk in source.read(BEGINNING, follow=False):
        if not found:
            await delete_before(broker, topic, partition, 85)
        found.append(chunk)
    assert source.complete
    there = [json.decode(value)["id"] for chunk in found for value in chunk.data]
    before = len(there) - 15
    assert there == [*expected(0, before), *expected(85, 15)]
    assert before in (10, 20), "one batch was on its way"
    (hole,) = [chunk for chunk in found if chunk.deleted]
    assert (hole.lane, hole.deleted) == (f"{topic}, partition {partition}", 85 - before)


async def test_a_topic_that_goes_on_is_read_to_its_end_at_the_stop(broker: KafkaBroker) -> None:
    topic = next(topics)
    sink, _ = make(broker.address, topic, linger_ms=0)
    source = KafkaSource(Settings(bootstrap=(broker.address,), topic=topic))
    sent = read = at_stop = 0

    async def go_on() -> None:
        nonlocal sent
        while True:
            sink.submit(Batch(opens(sent, 10)))
            sent += 10
            await asyncio.sleep(0.005)

    async with started(sink):
        going = asyncio.create_task(go_on())
        await until(lambda: sink.account.delivered["file.open"] > 0)
        async with asyncio.timeout(30):
            async for chunk in source.read(BEGINNING, follow=True):
                read += len(chunk.data)
                if read > 500 and not at_stop:
                    at_stop = sink.account.delivered["file.open"]
                    assert source.stop()
        assert source.complete
        assert 0 < at_stop <= read
        await until(lambda: sink.account.delivered["file.open"] > read)
        going.cancel()


# ---------------------------------------------------------------- what cannot be sent


async def test_oversized_record_is_dropped_and_the_rest_delivered(broker: KafkaBroker) -> None:
    topic = next(topics)
    sink, heard = make(broker.address, topic)
    huge = FileOpen("huge", NOW_NS, "x" * 1_000_001)
    async with started(sink):
        sink.submit(Batch([*opens(0, 10), huge, *opens(10, 10)]))
        assert heard.drops[0][0] == {"file.open": 1}
        assert "larger" in heard.drops[0][1]
    assert ids(await read_back(broker, topic)) == expected(0, 20)
    assert sink.account.delivered == Counter({"file.open": 20})
    assert sink.account.dropped == Counter({"file.open": 1})


async def test_a_smaller_limit_of_the_topic_is_found_out(broker: KafkaBroker) -> None:
    """Refused record batches are split and sent again; only what is too large alone is lost."""
    topic = next(topics)
    await create(broker, topic, config={"max.message.bytes": "6000"})
    sink, heard = make(broker.address, topic, compression="none", linger_ms=0)
    large = FileOpen("large", NOW_NS, "x" * 7000)
    async with started(sink):
        sink.submit(Batch(opens(0, 500)))
        sink.submit(Batch([*opens(500, 5), large, *opens(505, 5)]))
        for start in range(510, 1010, 100):
            sink.submit(Batch(opens(start, 100)))
        await until(lambda: not sink.account.pending)
    assert ids(await read_back(broker, topic)) == expected(0, 1010)
    assert heard.drops == [({"file.open": 1}, "the broker refused a record as too large")]
    assert heard.statuses == [("up", ""), ("closed", "")]


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_an_event_whose_time_is_refused_keeps_its_place(
    broker: KafkaBroker, encoding: str
) -> None:
    """Kafka takes no record that lies more than an hour ahead of the broker's clock."""
    topic = next(topics)
    sink, heard = make(broker.address, topic, linger_ms=0, encoding=encoding)
    ahead = FileOpen("ahead", NOW_NS + 7_200 * 10**9, "/")
    async with started(sink):
        sink.submit(Batch([*opens(0, 500), ahead, *opens(500, 500)]))
        for start in range(1000, 1100, 10):
            sink.submit(Batch(opens(start, 10)))
            await asyncio.sleep(0.001)
        await until(lambda: not sink.account.pending)
    codec: Any = msgspec.json if encoding == "json" else msgspec.msgpack
    records = await read_back(broker, topic)
    assert [codec.decode(record.value)["id"] for record in records] == [
        *expected(0, 500),
        "ahead",
        *expected(500, 1100 - 500),
    ]
    assert heard.drops == []
    assert heard.statuses == [("up", ""), ("closed", "")]


async def test_times_that_a_broker_refuses_one_by_one(broker: KafkaBroker) -> None:
    """Many of them, between others: each event arrives once, where it was."""
    topic = next(topics)
    sink, heard = make(broker.address, topic, linger_ms=0)
    ahead = [FileOpen("ahead", NOW_NS + 7_200 * 10**9, "/") for _ in range(200)]
    mixed = [event for pair in zip(opens(0, 200), ahead, strict=True) for event in pair]
    async with started(sink):
        sink.submit(Batch(mixed))
        await until(lambda: not sink.account.pending)
    assert ids(await read_back(broker, topic)) == [event.id for event in mixed]
    assert sink.account.dropped == {}
    assert heard.drops == []


async def test_small_batches_behind_a_refused_one_stay_behind(broker: KafkaBroker) -> None:
    """A broker that has nothing of a producer would take the second batch first."""
    topic = next(topics)
    await create(broker, topic, config={"max.message.bytes": "3000"})
    sink, _ = make(broker.address, topic, compression="none", linger_ms=0)
    async with started(sink):
        sink.submit(Batch(opens(0, 500)))
        await asyncio.sleep(0)
        sink.submit(Batch(opens(500, 5)))
    assert ids(await read_back(broker, topic)) == expected(0, 505)


async def test_the_limit_that_was_learned_is_tried_again(
    broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SizeLimit, "FIRST_WAIT", 0.2)
    topic = next(topics)
    await create(broker, topic, config={"max.message.bytes": "6000"})
    sink, _ = make(broker.address, topic, compression="none", linger_ms=0)
    async with started(sink):
        sink.submit(Batch(opens(0, 500)))
        await until(lambda: not sink.account.pending)
        small = sink._topics[topic].limit._limit
        assert small < 6000
        await alter(broker, topic, **{"max.message.bytes": "1000000"})
        loop = asyncio.get_running_loop()
        await until(lambda: sink._topics[topic].limit.now(loop.time()) > 100_000)
        sink.submit(Batch(opens(500, 500)))
        await until(lambda: not sink.account.pending)
        assert sink._topics[topic].limit.now(loop.time()) > 100_000
    assert ids(await read_back(broker, topic)) == expected(0, 1000)


async def test_missing_topic_is_named_and_waited_for(
    mortal: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "TOPIC_SECONDS", 0.5)
    topic = next(topics)
    sink, heard = make(mortal.address, topic)
    async with started(sink):
        sink.submit(Batch(opens(0, 10)))
        await until(lambda: sink.status == "down")
        await create(mortal, topic)
        await until(lambda: sink.status == "up")
        await until(lambda: not sink.account.pending)
    assert heard.statuses == [
        ("up", ""),
        ("down", f"topic {topic} does not exist, and the broker does not create it"),
        ("up", ""),
        ("closed", ""),
    ]
    assert ids(await read_back(mortal, topic)) == expected(0, 10)


# ---------------------------------------------------------------- brokers that go away


async def test_killed_broker_costs_no_event_and_no_duplicate(
    mortal: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in mid-stream, twice, and a new start on the same data."""
    monkeypatch.setattr(kafka_sink, "STALL_SECONDS", 0.5)
    topic = next(topics)
    await create(mortal, topic)
    sink, heard = make(mortal.address, topic, batch_bytes=16384, linger_ms=2)
    submitted = itertools.count(0, 100)
    going = True

    async def produce() -> int:
        while going:
            sink.submit(Batch(opens(next(submitted), 100)))
            await asyncio.sleep(0.02)
        return next(submitted)

    def reached(goal: int) -> bool:
        return sink.account.delivered.total() >= goal

    async with started(sink):
        producing = asyncio.create_task(produce())
        for _ in range(2):
            goal = sink.account.delivered.total() + 1000
            await until(partial(reached, goal))
            mortal.kill()
            await until(lambda: sink.status == "down")
            await asyncio.to_thread(mortal.start)
            await until(lambda: sink.status == "up")
        going = False
        total = await producing
    assert ids(await read_back(mortal, topic)) == expected(0, total)
    assert sink.account.delivered == Counter({"file.open": total})
    *statuses, closed = (status for status, _ in heard.statuses)
    downs = statuses.count("down")
    assert downs >= 2  # more, where a slow broker takes longer than STALL_SECONDS
    assert [*statuses, closed] == ["up", "down"] * downs + ["up", "closed"]


async def test_absent_broker_at_start(mortal: KafkaBroker) -> None:
    """Everything queued is delivered when it comes, and its absence was reported once."""
    topic = next(topics)
    await create(mortal, topic)
    mortal.kill()
    sink, heard = make(mortal.address, topic)
    async with started(sink):
        for start in range(0, 1000, 100):
            sink.submit(Batch(opens(start, 100)))
        await until(lambda: sink.status == "down")
        await asyncio.sleep(1)
        await asyncio.to_thread(mortal.start)
        await until(lambda: not sink.account.pending)
    refused = f"{mortal.address}: Connection refused"
    assert heard.statuses == [("down", refused), ("up", ""), ("closed", "")]
    assert ids(await read_back(mortal, topic)) == expected(0, 1000)


async def test_budget_bounds_what_is_held_while_the_broker_is_away(mortal: KafkaBroker) -> None:
    topic = next(topics)
    await create(mortal, topic)
    mortal.kill()
    sink, heard = make(mortal.address, topic, budget_bytes=1 << 16)
    batch = Batch(opens(0, 50))
    size = encode(batch, "json").held
    async with started(sink):
        count = 0
        while not sink.watermarks.full:
            assert sink.watermarks.held == count * size
            sink.submit(batch)
            count += 1
        assert count == -(-(1 << 16) // size)
        assert heard.marks == ["full"]
        assert sink.account.pending == count * 50
        await asyncio.to_thread(mortal.start)
        await until(lambda: "room" in heard.marks)
        await until(lambda: not sink.account.pending)
    assert heard.marks == ["full", "room"]
    assert len(await read_back(mortal, topic)) == count * 50


async def test_cluster_that_moved_is_found_through_the_bootstrap_servers(
    mortal: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A producer knows only the brokers it met: when all have moved it is replaced."""
    monkeypatch.setattr(kafka_sink, "STALL_SECONDS", 0.5)
    topic, before, after = next(topics), mortal.port, free_port()
    await create(mortal, topic)
    sink, heard = make(f"127.0.0.1:{before},127.0.0.1:{after}", topic, request_timeout_seconds=1)
    async with started(sink):
        sink.submit(Batch(opens(0, 100)))
        await until(lambda: not sink.account.pending)
        mortal.kill()
        sink.submit(Batch(opens(100, 100)))
        mortal.port = after
        await asyncio.to_thread(mortal.start)
        await until(lambda: not sink.account.pending)
    assert ids(await read_back(mortal, topic)) == expected(0, 200)
    assert [status for status, _ in heard.statuses][-2:] == ["up", "closed"]


async def test_a_quota_is_kept_and_costs_no_event(broker: KafkaBroker) -> None:
    """Of 20 kB/s, over ten seconds: what exceeds it the broker takes, and names a time of rest."""
    topic, rate = next(topics), 20_000
    await create(broker, topic)
    quota = ("--alter", "--add-config", f"producer_byte_rate={rate}")
    whose = ("--entity-type", "clients", "--entity-name", "throttled")
    where = ("--bootstrap-server", broker.address)
    await asyncio.to_thread(kafka_tool, "kafka.admin.ConfigCommand", *where, *quota, *whose)
    sink, heard = make(
        broker.address, topic, client_id="throttled", compression="none", batch_bytes=8192
    )
    async with started(sink):
        sent, rests = note_throttling(sink)
        for start in range(0, 2600, 100):
            sink.submit(Batch(opens(start, 100)))
            await asyncio.sleep(0.01)
        await until(lambda: not sink.account.pending)
    assert rests
    for at, seconds in rests:
        assert not [moment for moment in sent if at < moment < at + seconds - 0.01]
    assert ids(await read_back(broker, topic)) == expected(0, 2600)
    assert heard.statuses == [("up", ""), ("closed", "")]


def note_throttling(sink: KafkaSink) -> tuple[list[float], list[tuple[float, float]]]:
    """When produce requests are sent from now on, and when an answer asks for how long a rest."""
    client, loop = sink._client, asyncio.get_running_loop()
    assert client is not None
    produce, produced = client.produce, client.produced
    sent: list[float] = []
    rests: list[tuple[float, float]] = []

    def noted_produce(*arguments: Any) -> Any:
        sent.append(loop.time())
        return produce(*arguments)

    async def noted_produced(*arguments: Any) -> Any:
        answer = await produced(*arguments)
        if answer.throttle:
            rests.append((loop.time(), answer.throttle))
        return answer

    client.produce = noted_produce  # type: ignore[assignment, method-assign]
    client.produced = noted_produced  # type: ignore[assignment, method-assign]
    return sent, rests


# ---------------------------------------------------------------- numbers


async def test_numbers_wrap(broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that has nothing of a producer takes any number first, such as one of the last."""
    identify = Window.identify

    def near_the_end(window: Window, producer_id: int) -> None:
        identify(window, producer_id)
        window._begin_at(SEQUENCES - 195)

    monkeypatch.setattr(Window, "identify", near_the_end)
    topic = next(topics)
    sink, _ = make(broker.address, topic, linger_ms=0)
    async with started(sink):
        for start in range(0, 1000, 10):
            sink.submit(Batch(opens(start, 10)))
            await asyncio.sleep(0.001)
        await until(lambda: not sink.account.pending)
        window = sink._topics[topic].window
        assert (window.epoch, window._next) == (0, 1000 - 195)
    assert ids(await read_back(broker, topic)) == expected(0, 1000)


async def test_a_broker_that_does_not_know_the_numbers_gets_new_ones(broker: KafkaBroker) -> None:
    """Twice: with the next epoch, which it takes."""
    topic = next(topics)
    sink, heard = make(broker.address, topic, linger_ms=0)
    async with started(sink):
        for start in range(0, 300, 100):
            sink.submit(Batch(opens(start, 100)))
            await until(lambda: not sink.account.pending)
            window = sink._topics[topic].window
            assert window.epoch == start // 100
            window._next += 7
    assert ids(await read_back(broker, topic)) == expected(0, 300)
    assert heard.statuses == [("up", ""), ("closed", "")]


async def test_who_is_fenced_becomes_another_producer(broker: KafkaBroker) -> None:
    """Somebody writes with the id of this one in a later epoch, and the same numbers.

    In that epoch the next batch would count as the other's, and as written.
    """
    topic = next(topics)
    sink, heard = make(broker.address, topic, linger_ms=0)
    async with started(sink):
        sink.submit(Batch(opens(0, 100)))
        await until(lambda: not sink.account.pending)
        window, partition = sink._topics[topic].window, sink._topics[topic].partition
        known = window.producer_id
        assert known is not None
        assert partition is not None
        await write_as(broker.address, TopicPartition(topic, partition), known, window.epoch + 1)
        for start in range(100, 103):
            sink.submit(Batch(opens(start, 1)))
            await until(lambda: not sink.account.pending)
        assert window.producer_id not in (None, known)
        assert window.epoch == 0
    there = await read_back(broker, topic)
    assert ids([one for one in there if one.value != b"another's"]) == expected(0, 103)
    assert len(there) == 104
    assert heard.statuses == [("up", ""), ("closed", "")]


async def write_as(address: str, place: TopicPartition, producer_id: int, epoch: int) -> None:
    """One record, by another client that takes that id and epoch for its own."""
    producer = AIOKafkaProducer(bootstrap_servers=address, enable_idempotence=True)
    producer._txn_manager.set_pid_and_epoch(producer_id, epoch)
    await producer.start()
    try:
        await producer.send_and_wait(place.topic, b"another's", b"key", place.partition)
    finally:
        await producer.stop()


async def test_topic_deleted_while_it_is_written_to(mortal: KafkaBroker) -> None:
    """It is named and waited for, seldom asked about, and the other topics go on."""
    topic = next(topics)
    await create(mortal, f"{topic}.file")
    await create(mortal, f"{topic}.net")
    sink, heard = make(mortal.address, topic + ".{category}", linger_ms=1)
    async with started(sink):
        sink.submit(Batch([*opens(0, 100), *closes(0, 100)]))
        await until(lambda: not sink.account.pending)
        await delete(mortal, f"{topic}.net")
        asked = count_requests(sink)
        for number in range(100):
            sink.submit(Batch([*opens(100 + number, 1), *closes(100 + number, 1)]))
            await asyncio.sleep(0.07)
        await until(lambda: sink.status == "down" and sink.account.delivered["file.open"] == 200)
        assert sink.account.delivered == Counter({"file.open": 200, "net.close": 100})
        assert asked["metadata"] < 50
        assert asked["produce"] < 250
        await create(mortal, f"{topic}.net")
        await until(lambda: not sink.account.pending)
    reason = f"topic {topic}.net does not exist, and the broker does not create it"
    assert heard.statuses == [("up", ""), ("down", reason), ("up", ""), ("closed", "")]
    assert ids(await read_back(mortal, f"{topic}.file")) == expected(0, 200)
    # Those before were deleted with the topic.
    assert ids(await read_back(mortal, f"{topic}.net")) == [f"net-{n}" for n in range(100, 200)]


async def test_a_topic_that_was_made_anew_is_noticed(mortal: KafkaBroker) -> None:
    """Also if nothing was sent while it was away: its offsets begin again."""
    topic = next(topics)
    await create(mortal, topic)
    sink, heard = make(mortal.address, topic, linger_ms=1)
    async with started(sink):
        for start in range(0, 300, 100):
            sink.submit(Batch(opens(start, 100)))
            await until(lambda: not sink.account.pending)
        assert heard.anew == 0
        await delete(mortal, topic)
        await asyncio.sleep(0.5)
        await create(mortal, topic)
        sink.submit(Batch(opens(300, 100)))
        await until(lambda: not sink.account.pending)
        assert heard.anew == 1
        sink.submit(Batch(opens(400, 100)))
    assert heard.anew == 1
    assert ids(await read_back(mortal, topic)) == expected(300, 200)


async def test_the_manifest_comes_again_after_a_topic_was_made_anew(mortal: KafkaBroker) -> None:
    """A whole service: who reads the new topic finds what is observed there."""
    topic = next(topics)
    await create(mortal, topic)
    sink, _ = make(mortal.address, topic, linger_ms=1)
    kinds = frozenset({"process.exec"})
    kept = AgentSettings(sinks=(sink._settings,), heartbeat_seconds=1)
    service = Service(kept, kinds, Limits(), [sink], MemoryKernel(kept, kinds, None))
    running = asyncio.create_task(service.run())
    manifests = partial(sink.account.delivered.get, "stream.manifest", 0)
    await until(lambda: manifests() == 1 and sink.account.delivered["stream.heartbeat"] > 1)
    await delete(mortal, topic)
    await create(mortal, topic)
    await until(lambda: manifests() == 2)
    await asyncio.sleep(2)
    service.stop()
    await running
    found = [msgspec.json.decode(one.value)["event"] for one in await read_back(mortal, topic)]
    assert found.count("stream.manifest") == 1
    assert manifests() == 2


async def test_partitions_that_are_added_move_the_key(
    broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While events flow: each once and in order, the later ones in the other partition."""
    monkeypatch.setattr(kafka_sink, "METADATA_SECONDS", 0.5)
    topic, before, after = next(topics), 3, 7
    assert partition_of(HOST.encode(), before) != partition_of(HOST.encode(), after)
    await create(broker, topic)
    sink, heard = make(broker.address, topic, linger_ms=1, batch_bytes=2048)
    async with started(sink):
        for start in range(0, 40_000, 20):
            sink.submit(Batch(opens(start, 20)))
            await asyncio.sleep(0.002)
            if start == 8_000:
                await add_partitions(broker, topic, after)
        await until(lambda: not sink.account.pending)
    records = await read_back(broker, topic)
    old, new = (
        [one for one in records if one.partition == partition_of(HOST.encode(), count)]
        for count in (before, after)
    )
    assert old
    assert new
    assert ids(old) + ids(new) == expected(0, 40_000)
    assert heard.drops == []
    assert heard.anew == 1


async def test_why_nothing_was_delivered_is_said_at_the_end(mortal: KafkaBroker) -> None:
    topic = next(topics)
    sink, heard = make(mortal.address, topic)
    async with started(sink, grace=1):
        sink.submit(Batch(opens(0, 3)))
    reason = f"topic {topic} does not exist, and the broker does not create it"
    assert heard.drops == [({"file.open": 3}, f"not acknowledged within 1 s: {reason}")]


async def test_what_was_never_sent_is_discarded_with_its_reason(mortal: KafkaBroker) -> None:
    topic = next(topics)
    sink, heard = make(mortal.address, topic)
    async with started(sink, grace=1):
        sink.submit(Batch(opens(0, 3)))
        await until(lambda: sink._topics[topic].error)
        sink.discard("no time")
        sink.discard("no time")
        assert sink.account.pending == 0
    reason = f"topic {topic} does not exist, and the broker does not create it"
    assert heard.drops == [({"file.open": 3}, f"no time: {reason}")]


# ---------------------------------------------------------------- stopping


async def test_stop_with_a_broker_that_hangs(mortal: KafkaBroker) -> None:
    """The connection is open, and nothing is read from it."""
    topic = next(topics)
    await create(mortal, topic)
    sink, heard = make(mortal.address, topic, linger_ms=1, compression="none")
    async with started(sink, grace=0.5):
        sink.submit(Batch(opens(0, 100)))
        await until(lambda: not sink.account.pending)
        os.kill(mortal.pid, signal.SIGSTOP)
        for start in range(0, 10):
            sink.submit(Batch(opens(start, 1, "x" * 500_000)))
            await asyncio.sleep(0.02)
        begun = time.monotonic()
    assert time.monotonic() - begun < 0.5 + 4
    os.kill(mortal.pid, signal.SIGCONT)
    assert heard.drops == [({"file.open": 10}, "not acknowledged within 0.5 s")]


async def test_stop_with_a_dead_broker_drops_and_counts(mortal: KafkaBroker) -> None:
    topic = next(topics)
    await create(mortal, topic)
    sink, heard = make(mortal.address, topic, linger_ms=1)
    async with started(sink, grace=1):
        sink.submit(Batch(opens(0, 100)))
        await until(lambda: not sink.account.pending)
        mortal.kill()
        for start in range(100, 1000, 100):
            sink.submit(Batch(opens(start, 100)))
            await asyncio.sleep(0.01)
        begun = time.monotonic()
    assert time.monotonic() - begun < 1 + 4
    assert sink.account.delivered == Counter({"file.open": 100})
    why = f"not acknowledged within 1 s: {mortal.address}: Connection refused"
    assert heard.drops == [({"file.open": 900}, why)]
    sink.submit(Batch(opens(0, 7)))
    assert heard.drops[1] == ({"file.open": 7}, "closed")
    await sink.stop(1)


async def test_cancelling_stop_still_accounts_and_releases() -> None:
    address = f"127.0.0.1:{free_port()}"
    sink, heard = make(address, "t")
    async with started(sink):
        sink.submit(Batch(opens(0, 100)))
        await until(lambda: sink.status == "down")
        stopping = asyncio.create_task(sink.stop(60))
        await asyncio.sleep(0.2)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert sink.status == "closed"
    why = f"not acknowledged within 60 s: {address}: Connection refused"
    assert heard.drops == [({"file.open": 100}, why)]


async def test_stop_before_start_drops() -> None:
    sink, heard = make("127.0.0.1:1", "t")
    sink.submit(Batch(opens(0, 3)))
    await sink.stop(1)
    assert heard.drops == [({"file.open": 3}, "not acknowledged within 1 s")]
    assert sink.status == "closed"


# ---------------------------------------------------------------- TLS, SASL, mistakes


async def test_tls(broker: KafkaBroker, certificates: Path) -> None:
    topic = next(topics)
    tls = Tls(ca_file=f"{certificates}/ca.pem")
    sink, _ = make(broker.addresses["TLS"], topic, tls=tls)
    async with started(sink):
        sink.submit(Batch(opens(0, 10)))
    assert ids(await read_back(broker, topic)) == expected(0, 10)


async def test_tls_with_a_client_certificate(broker: KafkaBroker, certificates: Path) -> None:
    tls = Tls(
        ca_file=f"{certificates}/ca.pem",
        cert_file=f"{certificates}/client.crt",
        key_file=f"{certificates}/client.key",
    )
    topic = next(topics)
    sink, _ = make(broker.addresses["MTLS"], topic, tls=tls)
    async with started(sink):
        sink.submit(Batch(opens(0, 10)))
    assert ids(await read_back(broker, topic)) == expected(0, 10)


async def test_tls_without_the_client_certificate(broker: KafkaBroker, certificates: Path) -> None:
    sink, heard = make(broker.addresses["MTLS"], "t", tls=Tls(ca_file=f"{certificates}/ca.pem"))
    async with started(sink):
        await until(lambda: sink.status == "down")
    assert "certificate" in heard.statuses[0][1]


async def test_tls_with_an_unknown_authority(broker: KafkaBroker, certificates: Path) -> None:
    tls = Tls(ca_file=f"{certificates}/other-ca.pem")
    sink, heard = make(broker.addresses["TLS"], "t", tls=tls)
    async with started(sink):
        await until(lambda: sink.status == "down")
    assert "TLS: unable to get local issuer certificate" in heard.statuses[0][1]


@pytest.mark.parametrize("listener", ["TLS", "SASL"])
async def test_plain_client_of_a_secured_listener(broker: KafkaBroker, listener: str) -> None:
    sink, heard = make(broker.addresses[listener], "t")
    async with started(sink):
        await until(lambda: sink.status == "down")
    assert "does its listener expect TLS" in heard.statuses[0][1]


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
async def test_sasl(broker: KafkaBroker, mechanism: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_PASSWORD", PASSWORD)
    topic = next(topics)
    sasl = Sasl(
        mechanism=mechanism,
        username="writer",
        password_env="KAFKA_PASSWORD",
        allow_cleartext=True,
    )
    sink, _ = make(broker.addresses["SASL"], topic, sasl=sasl)
    async with started(sink):
        sink.submit(Batch(opens(0, 10)))
    assert ids(await read_back(broker, topic)) == expected(0, 10)


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
async def test_wrong_password_is_named_and_not_shown(
    broker: KafkaBroker, mechanism: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "wrong-horse-battery"
    (tmp_path / "password").write_text(secret + "\n")
    sasl = Sasl(
        mechanism=mechanism,
        username="writer",
        password_file=f"{tmp_path}/password",
        allow_cleartext=True,
    )
    sink, heard = make(broker.addresses["SASL"], "t", sasl=sasl)
    async with started(sink, grace=0.2):
        sink.submit(Batch(opens(0, 10)))
        await until(lambda: sink.status == "down")
        assert "SASL authentication failed" in heard.statuses[0][1]
        said = caplog.text + repr(vars(sink)) + repr(sink.name) + repr(heard.statuses)
        assert secret not in said
        assert "aiokafka" not in caplog.text
    assert len(heard.statuses) == 2


async def test_unauthorised_topic_is_named_and_others_go_on(
    broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAFKA_PASSWORD", PASSWORD)
    topic = next(topics)
    await create(broker, f"{topic}.file")
    await create(broker, f"{topic}.net")
    await allow_writing(broker, f"{topic}.file", "stranger")
    sasl = Sasl(
        mechanism="PLAIN",
        username="stranger",
        password_env="KAFKA_PASSWORD",
        allow_cleartext=True,
    )
    sink, heard = make(broker.addresses["SASL"], topic + ".{category}", sasl=sasl)
    async with started(sink, grace=1):
        sink.submit(Batch([*opens(0, 10), *closes(0, 1)]))
        await until(lambda: sink.status == "down")
        sink.submit(Batch([*opens(10, 10), *closes(1, 1)]))
    reason = f"not authorised to write to topic {topic}.net"
    assert heard.statuses == [("up", ""), ("down", reason), ("closed", "")]
    assert heard.drops == [({"net.close": 2}, f"not acknowledged within 1 s: {reason}")]
    assert ids(await read_back(broker, f"{topic}.file")) == expected(0, 20)


async def test_a_denied_topic_leaves_the_budget_to_the_others(
    broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several budgets of both: all of one topic arrives; the other holds no more than its share."""
    monkeypatch.setenv("KAFKA_PASSWORD", PASSWORD)
    topic = next(topics)
    await create(broker, f"{topic}.file")
    await create(broker, f"{topic}.net")
    await allow_writing(broker, f"{topic}.file", "stranger")
    sasl = Sasl(
        mechanism="PLAIN",
        username="stranger",
        password_env="KAFKA_PASSWORD",
        allow_cleartext=True,
    )
    budget = 1 << 20
    sink, heard = make(
        broker.addresses["SASL"], topic + ".{category}", sasl=sasl, budget_bytes=budget, linger_ms=5
    )
    async with started(sink, grace=1):
        for start in range(0, 40_000, 200):
            await until(lambda: not sink.watermarks.full)  # as the service does: reading pauses
            sink.submit(Batch([*opens(start, 200), *closes(start, 200)]))
            await asyncio.sleep(0)
        await until(lambda: sink.account.delivered["file.open"] == 40_000)
        assert sink.account.dropped["net.close"] > 30_000
        assert sink._topics[f"{topic}.net"].held <= budget // 8
    assert sink.account.dropped.total() == 40_000
    denied = f"not authorised to write to topic {topic}.net"
    assert heard.reasons == {denied, f"not acknowledged within 1 s: {denied}"}
    assert ids(await read_back(broker, f"{topic}.file")) == expected(0, 40_000)


async def test_credentials_are_read_again_at_each_connect(
    broker: KafkaBroker, tmp_path: Path
) -> None:
    """A password that was corrected is used without a new start."""
    password = tmp_path / "password"
    password.write_text("wrong")
    sasl = Sasl(mechanism="SCRAM-SHA-512", username="writer", password_file=str(password))
    topic = next(topics)
    sink, heard = make(broker.addresses["SASL"], topic, sasl=sasl, linger_ms=0)
    async with started(sink):
        sink.submit(Batch(opens(0, 10)))
        await until(lambda: sink.status == "down")
        password.write_text(PASSWORD)
        await until(lambda: not sink.account.pending)
    assert [status for status, _ in heard.statuses] == ["down", "up", "closed"]
    assert ids(await read_back(broker, topic)) == expected(0, 10)


async def test_a_password_file_that_is_gone_is_named(broker: KafkaBroker, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("wrong")
    sasl = Sasl(mechanism="SCRAM-SHA-512", username="writer", password_file=str(password))
    sink, heard = make(broker.addresses["SASL"], "t", sasl=sasl)
    async with started(sink, grace=0.1):
        await until(lambda: sink.status == "down")
        password.unlink()
        await until(lambda: len(heard.statuses) > 1)
    assert "cannot read" in heard.statuses[1][1]
    assert str(password) in heard.statuses[1][1]


async def test_user_without_any_right_is_told(
    broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAFKA_PASSWORD", PASSWORD)
    sasl = Sasl(mechanism="SCRAM-SHA-256", username="nobody", password_env="KAFKA_PASSWORD")
    sink, heard = make(broker.addresses["SASL"], "t", sasl=sasl)
    async with started(sink):
        await until(lambda: sink.status == "down")
    assert heard.statuses[0] == ("down", "not authorised: WRITE is needed on the topic")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topic": "a b"}, "topic: 'a b' is no Kafka topic"),
        ({"topic": ".."}, "topic: '..' is no Kafka topic"),
        ({"bootstrap": ("localhost:x",)}, "bootstrap: 'localhost:x': allowed is host:port"),
        ({"sasl": Sasl(username="u")}, "sasl: set password_env or password_file"),
        (
            {"sasl": Sasl(mechanism="PLAIN", username="u", password_env="HOME")},
            "PLAIN sends the password in clear text without TLS",
        ),
        ({"sasl": Sasl(username="u", password_env="NOT_SET")}, "NOT_SET is not set"),
        ({"tls": Tls(ca_file="/nonexistent")}, "tls.ca_file: cannot use /nonexistent"),
    ],
)
async def test_mistakes_are_told_at_start(settings: dict[str, Any], message: str) -> None:
    sink = KafkaSink(Settings(**{"bootstrap": ("127.0.0.1:1",), **settings}), host=HOST)
    with pytest.raises(ConfigError) as caught:
        await sink.start()
    assert message in str(caught.value)
    await sink.stop(0)
