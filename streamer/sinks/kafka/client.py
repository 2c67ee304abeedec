"""The brokers: connections, who leads which partition, producer ids, produce requests.

Connections, SASL, TLS and the protocol's messages are aiokafka's. Its exceptions become
`DeliveryError` here, and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import ssl
import struct
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from functools import cached_property
from typing import Any, NamedTuple, Self

from aiokafka.conn import AIOKafkaConnection, collect_hosts  # type: ignore[import-untyped]
from aiokafka.partitioner import murmur2  # type: ignore[import-untyped]
from aiokafka.protocol.api import Request  # type: ignore[import-untyped]
from aiokafka.protocol.metadata import MetadataRequest  # type: ignore[import-untyped]
from aiokafka.protocol.produce import (  # type: ignore[import-untyped]
    ProduceRequest_v3,
    ProduceRequest_v5,
    ProduceRequest_v7,
    ProduceRequest_v8,
)
from aiokafka.protocol.transaction import (  # type: ignore[import-untyped]
    InitProducerIdRequest,
)

from streamer.config.settings import KafkaSink as Settings
from streamer.errors import ConfigError
from streamer.privilege.files import DIRECT, Opener
from streamer.sinks.credentials import read_secret, ssl_context
from streamer.sinks.kafka.errors import (
    NOT_AUTHORISED,
    UNKNOWN_TOPIC,
    DeliveryError,
    delivery_error_of,
    error_of_code,
    reason_of_code,
)
from streamer.sinks.kafka.window import Answer
from streamer.sinks.sockets import REPLACE_SECONDS, UNHEARD_SECONDS, unheard_seconds

CONNECT_SECONDS = 10.0
TOPIC_SECONDS = 5.0
"""How long a topic may be missing before it is told: a broker that creates it needs a while."""

LOADING_SECONDS = 10.0
"""How long a broker that has just started may give no producer id, untold."""

LEADER_SECONDS = 3.0
"""How long a partition may be without a leader, or it without a connection, untold."""

ANSWER_MOST = 16 << 20
"""Bytes of the largest answer that is read: those to what is asked here are small."""

_ALL_REPLICAS = -1
_SIZE = struct.Struct(">i")
_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,249}")

Address = tuple[str, int]


class _Parts:
    """A produce request of one record batch in parts: they are put together once.

    The schema's way copies the batch, the last field of all versions, for each level around it.
    """

    def __init__(self, before: bytes, batch: Sequence[bytes]) -> None:
        self._parts = (before, *batch)

    def encode(self) -> bytes:
        return b"".join(self._parts)


class _V3(_Parts, ProduceRequest_v3):  # type: ignore[misc]
    pass


class _V5(_Parts, ProduceRequest_v5):  # type: ignore[misc]
    pass


class _V7(_Parts, ProduceRequest_v7):  # type: ignore[misc]
    pass


class _V8(_Parts, ProduceRequest_v8):  # type: ignore[misc]
    pass


class Produce(Request[_V3 | _V5 | _V7 | _V8]):  # type: ignore[misc]
    """A produce request; from version 8 on the answer names the records that are not taken.

    aiokafka's own, which stops at version 7, reads the versions as from this base class.
    """

    API_KEY = 0

    def __init__(self, topic: str, partition: int, batch: Sequence[bytes], timeout_ms: int) -> None:
        """One record batch, for all in-sync replicas to have within `timeout_ms`."""
        about = [(topic, [(partition, b"")])]
        empty: bytes = ProduceRequest_v3(None, _ALL_REPLICAS, timeout_ms, about).encode()
        size = sum(map(len, batch))
        self._before = empty[: -_SIZE.size] + _SIZE.pack(size)
        self._batch = batch

    def build(self, version: Any) -> Any:
        """The request in the version that both sides know."""
        return version(self._before, self._batch)


class Leader(NamedTuple):
    """Where the events of a topic go."""

    partition: int
    node: int
    address: Address


class _Topic(NamedTuple):
    """What the cluster says of a topic: an error code, or the leader of each partition."""

    code: int
    leaders: dict[int, int]


class _Metadata(NamedTuple):
    """What the cluster says of itself."""

    brokers: dict[int, Address]
    topics: dict[str, _Topic]


def partition_of(key: bytes, count: int) -> int:
    """The partition that Kafka's default partitioner (murmur2) gives to `key`."""
    return int(murmur2(key) & 0x7FFFFFFF) % count


def check_topic(topic: str) -> None:
    """Raise ConfigError when `topic` cannot be one; it may contain `{category}`."""
    name = topic.replace("{category}", "x")
    if not _TOPIC.fullmatch(name) or name in (".", ".."):
        raise ConfigError(
            f"topic: {topic!r} is no Kafka topic: allowed are up to 249 of"
            " a-z A-Z 0-9 . _ - and {category}"
        )


def silence_aiokafka() -> None:
    """Let aiokafka log nothing below CRITICAL.

    While a broker is away it logs several lines for every attempt, and about a wrong password
    no more than an attempt that failed. What it has to say comes out of the sink as a status,
    once for each change.
    """
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


def connection_options(
    settings: Settings, context: ssl.SSLContext | None, opener: Opener = DIRECT
) -> dict[str, Any]:
    """What aiokafka is to be told of client, TLS and SASL; the password is read now.

    Raises:
        ConfigError: there is none, or it would be sent in clear text.
    """
    sasl = settings.sasl
    protocol = "SSL" if settings.tls else "PLAINTEXT"
    options: dict[str, Any] = {
        "client_id": settings.client_id,
        "request_timeout_ms": int(settings.request_timeout_seconds * 1000),
        "ssl_context": context,
        "security_protocol": f"SASL_{protocol}" if sasl else protocol,
    }
    if sasl:
        if sasl.mechanism == "PLAIN" and not settings.tls and not sasl.allow_cleartext:
            raise ConfigError(
                "sasl.mechanism: PLAIN sends the password in clear text without TLS:"
                " use tls or SCRAM, or set sasl.allow_cleartext"
            )
        password = read_secret("sasl.password", sasl.password_env, sasl.password_file, opener)
        if password is None:
            raise ConfigError("sasl: set password_env or password_file")
        options["sasl_mechanism"] = sasl.mechanism
        options["sasl_plain_username"] = sasl.username
        options["sasl_plain_password"] = password
    return options


class Connection:
    """A connection to one broker, past TLS and SASL. Its requests are answered in order."""

    def __init__(self, connection: Any, transport: asyncio.WriteTransport) -> None:
        """See `open`."""
        self._connection = connection
        self._transport = transport

    @classmethod
    async def open(
        cls, address: Address, options: dict[str, Any], seconds: float = CONNECT_SECONDS
    ) -> Self:
        """Connect within `seconds`. Raises what aiokafka, a socket or TLS raises."""
        connection = AIOKafkaConnection(*address, **options)
        async with asyncio.timeout(seconds):
            reader, writer = await connection.connect()
        reader.readexactly = _bounded(reader.readexactly)
        return cls(connection, writer.transport)

    @property
    def open_still(self) -> bool:
        """Whether requests can be sent."""
        return bool(self._connection.connected())

    @property
    def unheard_seconds(self) -> float:
        """How long the broker's kernel has confirmed nothing of what it was sent: see `sockets`."""
        return unheard_seconds(self._transport.get_extra_info("socket"))

    def send(self, request: Any) -> Awaitable[Any]:
        """Send at once, and wait for the answer. Raises KafkaError, or TimeoutError."""
        answer: Awaitable[Any] = self._connection.send(request)
        return answer

    async def abort(self) -> None:
        """Close without waiting for the peer, which may never read what is written."""
        closed = self._connection.close()
        self._transport.abort()
        await asyncio.wait({closed}, timeout=1)


class Client:
    """The brokers of a cluster. Certificates and secrets are read anew for each connection."""

    def __init__(self, settings: Settings, opener: Opener = DIRECT) -> None:
        """Raise ConfigError for a file, variable, address or topic that cannot be used."""
        check_topic(settings.topic)
        self._settings = settings
        self._opener = opener
        self._bootstrap = _hosts(settings.bootstrap)
        self._connections: dict[Address, Connection] = {}
        self._connecting: dict[Address, asyncio.Lock] = {}
        self._refreshing = asyncio.Lock()
        self._refreshed_at = float("-inf")
        self._wanted: set[str] = set()
        self._brokers: dict[int, Address] = {}
        self._topics: dict[str, _Topic] = {}
        self._producer_id: int | None = None
        self._options()

    # Connections

    def _options(self) -> dict[str, Any]:
        return connection_options(self._settings, self._ssl_context(), self._opener)

    def _ssl_context(self) -> ssl.SSLContext | None:
        tls = self._settings.tls
        if tls is None:
            return None
        if tls.ca_file is None and tls.cert_file is None:
            return self._system_context  # the system's certificates take 20 ms to read
        return ssl_context(tls, self._opener)

    @cached_property
    def _system_context(self) -> ssl.SSLContext:
        assert self._settings.tls is not None
        return ssl_context(self._settings.tls, self._opener)

    async def connection(self, address: Address) -> Connection:
        """A connection to this address: the one that is open, or a new one.

        Raises:
            DeliveryError: there is no connecting.
        """
        async with self._connecting.setdefault(address, asyncio.Lock()):
            found = self._connections.get(address)
            if found is not None and found.open_still:
                return found
            if found is not None:
                del self._connections[address]
                await found.abort()
            connection = await self._open(address)
            self._connections[address] = connection
            return connection

    async def _open(self, address: Address) -> Connection:
        try:
            return await Connection.open(address, self._options())
        # What answers may be no Kafka at all, and aiokafka then fails in any way.
        except Exception as error:
            raise delivery_error_of(error, _name(address)) from None

    async def replace_unheard(self, seconds: float) -> None:
        """Give up connections of which nothing was confirmed for so long, if new ones can be made.

        Where packets were lost for a while, TCP waits for as long again before it sends the next;
        and what a firewall has forgotten never comes through. A broker that is slow, or does not
        read, has its kernel confirm what it gets: it is not meant.
        """
        await asyncio.gather(*(self._replace(*one) for one in self._unheard(seconds).items()))

    async def leave_unheard(self, seconds: float) -> None:
        """Give up such connections where, as those say who can be asked, nobody leads any more.

        The machine is gone, or the broker has another address. Where it leads still, what is under
        way is waited for: it comes through as soon as the network is back.
        """
        if not self._unheard(seconds):
            return
        try:
            await self.refresh()
        except DeliveryError:
            return
        nodes = {node for topic in self._topics.values() for node in topic.leaders.values()}
        leading = {self._brokers.get(node) for node in nodes}
        for address, connection in self._unheard(seconds).items():
            if address not in leading and self._connections.get(address) is connection:
                del self._connections[address]
                await connection.abort()

    def _unheard(self, seconds: float) -> dict[Address, Connection]:
        return {
            address: connection
            for address, connection in self._connections.items()
            if connection.open_still and connection.unheard_seconds >= seconds
        }

    async def _replace(self, address: Address, old: Connection) -> None:
        try:
            new = await Connection.open(address, self._options(), REPLACE_SECONDS)
        except Exception:  # then it is not for the connection that nothing comes through
            return
        if self._connections.get(address) is old:
            self._connections[address] = new
        else:
            await new.abort()
        await old.abort()

    async def close(self) -> None:
        """Release all connections, whatever has not been answered."""
        connections = list(self._connections.values())
        self._connections.clear()
        await asyncio.gather(*(connection.abort() for connection in connections))

    # The cluster

    async def refresh(self, topic: str | None = None) -> None:
        """Ask who the brokers are and who leads the partitions of all topics asked for so far.

        Asking makes a broker create a topic, where it does that. Whoever asks meanwhile gets
        the same answer.

        Raises:
            DeliveryError: nobody answers, of the known brokers and the bootstrap servers.
        """
        loop = asyncio.get_running_loop()
        asked_at = loop.time()
        if topic is not None:
            self._wanted.add(topic)
        async with self._refreshing:
            if self._refreshed_at >= asked_at:
                return
            begun = loop.time()
            self._brokers, topics = await self._metadata()
            self._topics.update(topics)
            self._refreshed_at = begun

    async def _metadata(self) -> _Metadata:
        request = MetadataRequest(sorted(self._wanted))
        errors: list[DeliveryError] = []
        for address in self._addresses():
            try:
                found = _metadata_of(await self._ask(address, request), self._wanted)
            except DeliveryError as error:
                errors.append(error)
            except Exception as error:  # it has another form than the protocol says
                errors.append(_nonsense(address, "about the cluster", error))
            else:
                if found.brokers:
                    return found
                errors.append(DeliveryError(f"{_name(address)}: names no broker"))
        raise _together(errors)

    async def _ask(self, address: Address, request: Any) -> Any:
        connection = await self.connection(address)
        try:
            return await self._answer(address, connection, request)
        except DeliveryError:  # what is under way there may still come through
            raise
        except Exception as error:
            await connection.abort()
            raise delivery_error_of(error, _name(address)) from None

    async def _answer(self, address: Address, connection: Connection, request: Any) -> Any:
        """Wait for it only as long as something comes through: another may be asked."""
        asked = asyncio.ensure_future(connection.send(request))
        try:
            while not (await asyncio.wait({asked}, timeout=UNHEARD_SECONDS / 4))[0]:
                if connection.unheard_seconds >= UNHEARD_SECONDS:
                    raise DeliveryError(f"{_name(address)}: nothing is heard of it")
            return asked.result()
        finally:
            asked.cancel()

    def _addresses(self) -> list[Address]:
        """Whom to ask, each once: first who is connected, the bootstrap servers behind those that
        are known, and last of all where nothing comes through.
        """
        known = list(self._brokers.values())
        random.shuffle(known)
        silent = self._unheard(sys.float_info.min)  # more than none at all
        connected = [at for at, one in self._connections.items() if one.open_still]
        order = dict.fromkeys((*connected, *known, *self._bootstrap))
        return sorted(order, key=silent.__contains__)

    def leader(self, topic: str, key: bytes, begun: int | None = None) -> Leader | None:
        """Who takes the events of `key`; None when nobody has been asked about the topic.

        `begun`: the partition in which they were begun to be written, and have to be ended. It
        is another than that of the key after the topic has got more partitions.

        Raises:
            DeliveryError: the topic is not there, or may not be written to, or has no leader.
        """
        found = self._topics.get(topic)
        if found is None:
            return None
        if found.code == NOT_AUTHORISED:
            reason = f"not authorised to write to topic {topic}"
            raise DeliveryError(reason, permanent=True, own=True)
        if found.code == UNKNOWN_TOPIC:
            reason = f"topic {topic} does not exist, and the broker does not create it"
            raise DeliveryError(reason, grace=TOPIC_SECONDS, own=True)
        partition = partition_of(key, len(found.leaders)) if found.leaders else -1
        if begun in found.leaders:
            partition = begun
        node = found.leaders.get(partition, -1)
        if node not in self._brokers:
            said = f": {reason_of_code(found.code)}" if found.code else ""
            reason = f"topic {topic}: partition {partition} has no leader{said}"
            raise DeliveryError(reason, grace=LEADER_SECONDS)
        return Leader(partition, node, self._brokers[node])

    async def probe(self) -> None:
        """Ask whether somebody answers, on connections of their own.

        Raises:
            DeliveryError: nobody does.
        """
        errors = []
        for address in dict.fromkeys((*self._brokers.values(), *self._bootstrap)):
            try:
                connection = await self._open(address)
            except DeliveryError as error:
                errors.append(error)
            else:
                await connection.abort()
                return
        raise _together(errors)

    async def lacking(self, leader: Leader, topic: str, seconds: float) -> str:
        """Which replicas are not in sync, in words, as its leader says within so many seconds.

        Asked on a connection of its own: on the others a broker answers in order, and it is asked
        because it does not. Empty where all are, or nothing is said.
        """
        connection: Connection | None = None
        try:
            async with asyncio.timeout(seconds):
                connection = await self._open(leader.address)
                said = (await connection.send(MetadataRequest([topic]))).to_object()
            (found,) = (
                part
                for one in said["topics"]
                if one["topic"] == topic
                for part in one["partitions"]
                if part["partition"] == leader.partition
            )
            replicas = set(found["replicas"])
            in_sync = replicas & set(found["isr"])
        except Exception:  # it is not needed, and may have any form
            return ""
        finally:
            if connection is not None:
                await connection.abort()
        return f"{len(in_sync)} of {len(replicas)} replicas in sync" if replicas > in_sync else ""

    # Producing

    async def producer_id(self, but: int | None) -> int:
        """A producer id, other than `but`.

        Raises:
            DeliveryError: no broker gives one.
        """
        async with self._refreshing:
            if self._producer_id is None or self._producer_id == but:
                self._producer_id = await self._new_producer_id()
            return self._producer_id

    async def _new_producer_id(self) -> int:
        errors = []
        for address in self._addresses():
            try:
                answer = await self._ask(address, InitProducerIdRequest(None, 0))
            except DeliveryError as error:
                errors.append(error)
                continue
            if answer.error_code != 0:
                raise _refusal(answer.error_code)
            if answer.producer_id >= 0:
                return int(answer.producer_id)
            errors.append(_nonsense(address, "for a producer id"))
        raise _together(errors)

    async def produced(
        self, sending: Awaitable[Any], connection: Connection, topic: str, partition: int
    ) -> Answer:
        """The answer to a produce request; one that never comes ends the connection.

        So does one about anything else than what was sent.
        """
        try:
            return _answer_of((await sending).to_object(), topic, partition)
        except Exception as error:
            await connection.abort()
            return Answer.lost(delivery_error_of(error).reason)

    def produce(
        self, connection: Connection, topic: str, partition: int, batch: Sequence[bytes]
    ) -> Awaitable[Any]:
        """Send a record batch; see `produced` for the answer. Raises KafkaError."""
        timeout_ms = int(self._settings.request_timeout_seconds * 800)
        return connection.send(Produce(topic, partition, batch, timeout_ms))


def _bounded(read: Callable[[int], Awaitable[bytes]]) -> Callable[[int], Awaitable[bytes]]:
    """Read as `read` does, but not what a length of up to 2 GiB promises."""

    async def bounded(size: int) -> bytes:
        if size > ANSWER_MOST:
            raise DeliveryError(f"the broker announces an answer of {size} bytes")
        return await read(size)

    return bounded


def _metadata_of(answer: Any, wanted: Set[str]) -> _Metadata:
    """What an answer says of the brokers, and of the topics that were asked for."""
    said = answer.to_object()
    brokers = {one["node_id"]: (str(one["host"]), one["port"]) for one in said["brokers"]}
    topics = {}
    for one in said["topics"]:
        if one["topic"] in wanted:
            leaders = {each["partition"]: each["leader"] for each in one["partitions"]}
            topics[one["topic"]] = _Topic(one["error_code"], leaders)
    return _Metadata(brokers, topics)


def _answer_of(response: Mapping[str, Any], topic: str, partition: int) -> Answer:
    """What a response says of the one record batch that was sent."""
    (about,) = response["topics"]
    (said,) = about["partitions"]
    if (about["topic"], said["partition"]) != (topic, partition):
        raise DeliveryError("the broker answers about what it was not sent")
    code, message = said["error_code"], said.get("error_message")
    bad = {
        each["batch_index"]: reason_of_code(code, each["batch_index_error_message"])
        for each in said.get("record_errors") or ()
    }
    throttle = response["throttle_time_ms"] / 1000
    return Answer(code, reason_of_code(code, message), bad, said["offset"], throttle)


def _nonsense(address: Address, asked: str, error: Exception | None = None) -> DeliveryError:
    how = f" ({type(error).__name__})" if error else ""
    return DeliveryError(f"{_name(address)}: asked {asked} it answers nonsense{how}")


def _refusal(code: int) -> DeliveryError:
    """Why there is no producer id; a broker that has just started gives none at first."""
    error = error_of_code(code)
    if getattr(error, "retriable", False):
        return DeliveryError(reason_of_code(code), grace=LOADING_SECONDS)
    return delivery_error_of(error)


def _together(errors: list[DeliveryError]) -> DeliveryError:
    reason = "; ".join(error.reason for error in errors)
    return DeliveryError(reason, permanent=all(error.permanent for error in errors))


def _name(address: Address) -> str:
    host, port = address
    return f"{host}:{port}"


def _hosts(bootstrap: tuple[str, ...]) -> list[Address]:
    try:
        return [(host, port) for host, port, _ in collect_hosts(list(bootstrap), randomize=False)]
    except ValueError:
        raise ConfigError(
            f"bootstrap: {', '.join(bootstrap)!r}: allowed is host:port for each"
        ) from None
