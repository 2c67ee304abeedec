"""Whom the Kafka client asks, and which connections it leaves, when nothing comes through."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import (  # type: ignore[import-untyped]
    KafkaConnectionError,
    SaslAuthenticationFailed,
)

from streamer.config.settings import KafkaSink as Settings
from streamer.sinks.kafka import client
from streamer.sinks.kafka.client import Address, Client, _Metadata, _Topic
from streamer.sinks.kafka.errors import DeliveryError, delivery_error_of

FIRST, SECOND, THIRD = (("host", port) for port in (1, 2, 3))
BROKERS = {1: FIRST, 2: SECOND, 3: THIRD}


class Line:
    """A connection that has been open for long; `unheard_seconds` as `Connection` has it."""

    open_still = True

    def __init__(self, unheard_seconds: float = 0.0) -> None:
        self.unheard_seconds = unheard_seconds
        self.aborted = False

    async def abort(self) -> None:
        self.aborted = True


class Asked(Line):
    """Answers after a while, or fails; if it has no answer, nothing is heard from then on."""

    def __init__(self, answer: Any = None) -> None:
        super().__init__()
        self.answer = answer
        self.given_up = False

    async def send(self, _: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is None:
            self.unheard_seconds = 3.0
            try:
                await asyncio.Event().wait()
            finally:
                self.given_up = True
        await asyncio.sleep(0.05)
        return self.answer


class Cluster(Client):
    """A client that is told who leads by the test: None is by nobody."""

    def __init__(self, leaders: dict[int, int] | None, brokers: dict[int, Address]) -> None:
        super().__init__(Settings(bootstrap=("host:1", "host:9"), topic="events"))
        self.leaders, self.brokers = leaders, brokers
        self._brokers = dict(BROKERS)

    async def _metadata(self) -> _Metadata:
        if self.leaders is None:
            raise DeliveryError("nobody is there")
        return _Metadata(self.brokers, {"events": _Topic(0, self.leaders)})

    def with_lines(self, **lines: Any) -> Cluster:
        self._connections = {BROKERS[int(name[1:])]: line for name, line in lines.items()}
        return self


async def left(cluster: Cluster, unheard_seconds: float = 3.0) -> bool:
    """Whether it leaves the first broker, and that one alone."""
    silent, sound = Line(unheard_seconds), Line()
    await cluster.with_lines(b1=silent, b2=sound).leave_unheard(2.0)
    assert not sound.aborted
    assert (FIRST in cluster._connections) is not silent.aborted
    return silent.aborted


async def test_where_nobody_leads_any_more_is_left() -> None:
    """It is gone, or leads nothing, or is somewhere else."""
    assert await left(Cluster({0: 2, 1: 3}, {2: SECOND, 3: THIRD}))
    assert await left(Cluster({0: 2, 1: -1}, BROKERS))
    assert await left(Cluster({0: 1}, {1: THIRD, 2: SECOND}))


async def test_where_somebody_leads_or_nobody_knows_is_not_left() -> None:
    assert not await left(Cluster({0: 2, 1: 1}, BROKERS))
    assert not await left(Cluster(None, BROKERS))
    assert not await left(Cluster({0: 2}, BROKERS), unheard_seconds=1.0)


async def test_what_took_the_place_of_one_that_is_left_meanwhile_stays() -> None:
    """While the first ends, the second is replaced, and the third ends by itself."""
    cluster = Cluster({0: 9}, {9: ("host", 8)})
    silent = {f"b{node}": Line(3.0) for node in BROKERS}
    new: Any = Line()

    async def meanwhile() -> None:
        cluster._connections[SECOND] = new
        del cluster._connections[THIRD]

    silent["b1"].abort = meanwhile  # type: ignore[method-assign]
    await cluster.with_lines(**silent).leave_unheard(2.0)
    assert list(cluster._connections.values()) == [new]
    assert not new.aborted


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "UNHEARD_SECONDS", 0.02)


PRODUCER = SimpleNamespace(error_code=0, producer_id=7)


@pytest.mark.usefixtures("soon")
async def test_an_answer_is_waited_for_as_long_as_something_comes_through() -> None:
    line = Asked(PRODUCER)
    assert await Cluster(None, BROKERS).with_lines(b1=line)._ask(FIRST, None) is PRODUCER
    assert not line.aborted


@pytest.mark.usefixtures("soon")
async def test_where_nothing_is_heard_no_answer_is_waited_for_and_another_is_asked() -> None:
    """The connection stays: what is under way there may still come through."""
    silent, sound = Asked(), Asked(PRODUCER)
    cluster = Cluster(None, BROKERS).with_lines(b1=silent, b2=sound)
    with pytest.raises(DeliveryError, match="host:1: nothing is heard of it"):
        await cluster._ask(FIRST, None)
    await asyncio.sleep(0)
    assert silent.given_up
    silent.unheard_seconds = 0.0
    assert await cluster.producer_id(None) == 7
    assert not silent.aborted
    assert list(cluster._connections) == [FIRST, SECOND]


@pytest.mark.parametrize("error", [KafkaConnectionError("reset"), TimeoutError(), ValueError("?")])
async def test_a_connection_that_fails_an_answer_is_aborted_and_another_is_asked(
    error: Exception,
) -> None:
    broken, sound = Asked(error), Asked(PRODUCER)
    cluster = Cluster(None, BROKERS).with_lines(b1=broken, b2=sound)
    with pytest.raises(DeliveryError, match="host:1"):
        await cluster._ask(FIRST, None)
    assert broken.aborted
    assert await cluster.producer_id(None) == 7
    assert not sound.aborted


@pytest.mark.parametrize("silent", [1, 2, 3])
def test_who_is_not_heard_is_asked_last(silent: int) -> None:
    lines = {f"b{node}": Line(0.5 if node == silent else 0.0) for node in BROKERS}
    asked = Cluster(None, BROKERS).with_lines(**lines)._addresses()
    assert asked[-1] == BROKERS[silent]
    assert asked[-2] == ("host", 9)  # the other bootstrap server
    assert sorted(asked) == [FIRST, SECOND, THIRD, ("host", 9)]


def test_why_a_login_failed_is_a_printable_line_of_bounded_length() -> None:
    """A broker says it; `/readyz` and the log repeat it."""
    said = SaslAuthenticationFailed("no\x1b[2J\n" + 1000 * "x")
    reason = delivery_error_of(said).reason
    assert reason.startswith("SASL authentication failed: no?[2J?xx")
    assert len(reason) < 350
