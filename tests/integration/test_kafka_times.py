"""Times that a real Kafka refuses, or that would make it forget the producer: no event is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import pytest

from streamer.events.batch import Batch
from tests.brokers import KafkaBroker
from tests.kafka_helpers import FileOpen, create, make, read_back, started, until

pytestmark = pytest.mark.kafka

HOUR_NS = 3600 * 10**9


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    with KafkaBroker(tmp_path_factory.mktemp("kafka")) as made:
        yield made


async def sent(
    broker: KafkaBroker, topic: str, hours: list[float], config: dict[str, str]
) -> list[tuple[int, int]]:
    """Events of so many hours ago, one by one: their own time and the record's, in seconds."""
    await create(broker, topic, config=config)
    now = time.time_ns()
    sink, heard = make(broker.address, topic, linger_ms=0)
    events = [FileOpen(str(n), now - int(h * HOUR_NS), "/x") for n, h in enumerate(hours)]
    async with started(sink):
        for event in events:
            sink.submit(Batch([event]))
        await until(lambda: not sink.account.pending)
    assert heard.drops == []
    records = await read_back(broker, topic)
    got = [msgspec.json.decode(record.value) for record in records]
    assert [one["id"] for one in got] == [event.id for event in events]
    assert [one["time_ns"] for one in got] == [event.time_ns for event in events]
    return [
        (one["time_ns"] // 10**9, r.time_ms // 1000) for one, r in zip(got, records, strict=True)
    ]


async def test_too_old_and_too_new(broker: KafkaBroker) -> None:
    """A topic that takes an hour on either side: what it refuses bears the time of sending."""
    hours = [0, 2, 0.1, -2, 5, 0]
    config = {
        "message.timestamp.before.max.ms": "3600000",
        "message.timestamp.after.max.ms": "3600000",
    }
    now = time.time()
    for own, record in await sent(broker, "refused", hours, config):
        assert abs(record - now) < 3700
        assert record == own or abs(record - now) < 60


async def test_what_is_older_than_a_producer_may_be(broker: KafkaBroker) -> None:
    """Of a topic that takes any time: two days ago is sent as of now, two hours as of then."""
    (old, at), (young, then) = await sent(broker, "old", [48, 2], {})
    assert at - old > 47 * 3600
    assert young == then
