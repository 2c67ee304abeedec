"""aiokafka, as the Kafka sink uses it. Its exceptions become `Trouble` here, and nowhere else."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import ssl
from collections.abc import Iterable
from typing import Any

import aiokafka.errors as errors  # type: ignore[import-untyped]
from aiokafka import AIOKafkaProducer
from aiokafka.conn import collect_hosts, create_conn  # type: ignore[import-untyped]
from aiokafka.partitioner import murmur2  # type: ignore[import-untyped]
from aiokafka.producer.message_accumulator import BatchBuilder  # type: ignore[import-untyped]
from aiokafka.protocol.metadata import MetadataRequest  # type: ignore[import-untyped]

from streamer.config.settings import KafkaSink as Settings
from streamer.errors import ConfigError
from streamer.privilege.files import DIRECT, Opener
from streamer.sinks.credentials import read_secret, ssl_context
from streamer.sinks.kafka.queue import Piece
from streamer.sinks.kafka.record_batch import Laid, lay_out, record_batch

CONNECT_SECONDS = 10.0
TOPIC_SECONDS = 5.0
RETRY_MS = 200

_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,249}")


class Trouble(Exception):
    """Why nothing is delivered at the moment, in one line that never contains a secret.

    `permanent` is what waiting does not mend, such as a wrong password; `too_large` is a record
    batch that the broker's limit refused.
    """

    def __init__(self, reason: str, *, permanent: bool = False, too_large: bool = False) -> None:
        """See the class."""
        super().__init__(reason)
        self.reason = reason
        self.permanent = permanent
        self.too_large = too_large


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

    While a broker is away it logs several lines for every attempt, five times a second, and
    about a wrong password no more than an attempt that failed. What it has to say comes out of
    the sink as a status, once for each change.
    """
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


class Client:
    """How to reach the brokers. Certificates and the password are read once, when it is made."""

    def __init__(self, settings: Settings, opener: Opener = DIRECT) -> None:
        """Raise ConfigError for a file, variable, address or topic that cannot be used."""
        check_topic(settings.topic)
        self._settings = settings
        self._hosts = _hosts(settings.bootstrap)
        sasl = settings.sasl
        protocol = "SSL" if settings.tls else "PLAINTEXT"
        self._connection: dict[str, Any] = {
            "client_id": settings.client_id,
            "request_timeout_ms": int(settings.request_timeout_seconds * 1000),
            "ssl_context": ssl_context(settings.tls, opener) if settings.tls else None,
            "security_protocol": f"SASL_{protocol}" if sasl else protocol,
        }
        if sasl:
            password = read_secret("sasl.password", sasl.password_env, sasl.password_file, opener)
            if password is None:
                raise ConfigError("sasl: set password_env or password_file")
            self._connection["sasl_mechanism"] = sasl.mechanism
            self._connection["sasl_plain_username"] = sasl.username
            self._connection["sasl_plain_password"] = password

    async def probe(self) -> None:
        """Ask the bootstrap servers, one after the other, until one answers.

        aiokafka only logs why it could not connect. This asks the same, and knows why.

        Raises:
            Trouble: none answers.
        """
        troubles = []
        for host, port in self._hosts:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    await self._ask(host, port)
                return
            # What answers may be no Kafka at all, and aiokafka then fails in any way.
            except Exception as error:
                troubles.append(trouble_of(error, f"{host}:{port}"))
        raise Trouble(
            "; ".join(trouble.reason for trouble in troubles),
            permanent=all(trouble.permanent for trouble in troubles),
        )

    async def _ask(self, host: str, port: int) -> None:
        connection = await create_conn(host, port, **self._connection)
        try:
            await connection.send(MetadataRequest([]))
        finally:
            # Bounded, because over TLS a peer that hangs would have to agree to the closing.
            await asyncio.wait({connection.close()}, timeout=1)

    async def open(self) -> Producer:
        """Connect.

        Raises:
            Trouble: no broker can be used; the reason is known.
        """
        await self.probe()
        settings = self._settings
        producer = Producer(
            AIOKafkaProducer(
                bootstrap_servers=[f"{host}:{port}" for host, port in self._hosts],
                acks="all",
                enable_idempotence=True,
                retry_backoff_ms=RETRY_MS,
                **self._connection,
            ),
            settings.compression,
        )
        try:
            await producer.start()
        except BaseException:
            await producer.abandon()
            raise
        return producer


class RecordBatch(BatchBuilder):  # type: ignore[misc]
    """A closed batch of many records, built in one go: a tenth of the cost of `append` for each."""

    def __init__(self, pieces: Iterable[Piece], key: bytes, codec: str) -> None:
        """Lay out the records of all pieces, all under one `key`."""
        super().__init__(0, 0)
        self._laid: Laid = lay_out([piece[:2] for piece in pieces], key)
        self._codec = codec
        self._relative_offset = self._laid[1]
        self._producer = (-1, -1, 0)
        self._built: bytes | None = None
        self.close()  # an open batch would linger

    def _set_producer_state(
        self, producer_id: int, producer_epoch: int, base_sequence: int
    ) -> None:
        self._producer = (producer_id, producer_epoch, base_sequence)

    def _build(self) -> bytes:
        if self._built is None:
            self._built = record_batch(self._laid, self._codec, self._producer)
            del self._laid
        return self._built

    def size(self) -> int:
        """Bytes; before it was built, those of the records uncompressed."""
        return len(self._laid[0] if self._built is None else self._built)


class Producer:
    """An idempotent producer with acks=all, which takes whole record batches."""

    def __init__(self, producer: Any, compression: str) -> None:
        """`producer` is an AIOKafkaProducer that was not started."""
        self._producer = producer
        self._codec = compression
        self._requests: set[asyncio.Task[None]] = set()
        self._track_requests()

    async def start(self) -> None:
        """Connect, and get a producer id.

        Raises:
            Trouble: a broker refuses, or those that the cluster names cannot be reached.
        """
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._producer.start()
        except TimeoutError:
            # The bootstrap server answered the probe: it is its advertised address that fails.
            brokers = self._producer.client.cluster.brokers()
            named = ", ".join(f"{broker.host}:{broker.port}" for broker in brokers) or "none"
            raise Trouble(f"no broker of those that the cluster names answers: {named}") from None
        except Exception as error:
            raise trouble_of(error) from None

    async def partitions(self, topic: str) -> int:
        """How many partitions `topic` has. Asking makes a broker create it, where it does that.

        Raises:
            Trouble: it does not exist, or may not be used. Without brokers it seems not to
                exist: `probe` tells.
        """
        try:
            async with asyncio.timeout(TOPIC_SECONDS):
                return len(await self._producer.partitions_for(topic))
        except (TimeoutError, errors.UnknownTopicOrPartitionError):
            raise Trouble(
                f"topic {topic} does not exist, and the broker does not create it"
            ) from None
        except Exception as error:
            raise trouble_of(error) from None

    def build(self, pieces: Iterable[Piece], key: bytes) -> Any:
        """One record batch of all pieces. A batch can be sent only once: replay builds anew."""
        return RecordBatch(pieces, key, self._codec)

    async def send(self, batch: Any, topic: str, partition: int) -> asyncio.Future[object]:
        """Queue a batch, once the one before it was sent; the future is done with its ack.

        Only one caller per partition: aiokafka's time limit goes wrong with several.

        Raises:
            Trouble: the producer cannot go on.
        """
        while True:
            try:
                future: asyncio.Future[object] = await self._producer.send_batch(
                    batch, topic, partition=partition
                )
                return future
            except errors.KafkaTimeoutError:
                continue  # it was not queued
            except Exception as error:
                raise trouble_of(error, f"topic {topic}") from None

    async def abandon(self) -> None:
        """Release everything within about two seconds, whatever has not been acknowledged.

        aiokafka's own `stop()` waits until all is delivered, with a dead broker for ever; and
        a cancelled sender waits for its requests, which wait for metadata that never comes.
        """
        producer, client = self._producer, self._producer.client
        producer._closed = True  # else its finaliser warns
        sender = producer._sender.sender_task
        for task in (*self._requests, *([sender] if sender else [])):
            task.cancel()
            await asyncio.wait({task}, timeout=0.5)
        connections = list(client._conns.values())
        transports = [conn._writer.transport for conn in connections if conn.connected()]
        closing = asyncio.ensure_future(client.close())
        await asyncio.wait({closing}, timeout=1)
        # A transport closes when all is written, which a broker that hangs never reads.
        for transport in transports:
            transport.abort()
        await asyncio.wait({closing}, timeout=0.5)
        closing.cancel()

    def _track_requests(self) -> None:
        # The sender keeps its requests to itself, and leaves all but one behind when cancelled.
        sender = self._producer._sender
        send = sender._send_produce_req

        async def tracked(node_id: int, batches: object) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._requests.add(task)
            try:
                await send(node_id, batches)
            finally:
                self._requests.discard(task)

        sender._send_produce_req = tracked


def _hosts(bootstrap: tuple[str, ...]) -> list[tuple[str, int]]:
    try:
        return [(host, port) for host, port, _ in collect_hosts(list(bootstrap), randomize=False)]
    except ValueError:
        raise ConfigError(
            f"bootstrap: {', '.join(bootstrap)!r}: allowed is host:port for each"
        ) from None


def trouble_of(error: BaseException, where: str = "") -> Trouble:
    """What an exception of aiokafka, a socket or TLS means, as `where: reason`."""
    if isinstance(error, Trouble):
        return error
    reason, permanent = _reason(error)
    too_large = isinstance(error, errors.MessageSizeTooLargeError | errors.RecordListTooLargeError)
    return Trouble(
        f"{where}: {reason}" if where else reason, permanent=permanent, too_large=too_large
    )


def _reason(error: BaseException) -> tuple[str, bool]:
    match error:
        case errors.SaslAuthenticationFailed():
            return f"SASL authentication failed: {_first(error)}", True
        case errors.UnsupportedSaslMechanismError():
            return "the listener does not offer this SASL mechanism", True
        case errors.IllegalSaslStateError():
            return "the listener does not use SASL", True
        case errors.TopicAuthorizationFailedError():
            return f"not authorised to write to topic {_first(error)}", True
        case errors.ClusterAuthorizationFailedError():
            # Brokers before 2.8 ask for IDEMPOTENT_WRITE on the cluster as well.
            return "not authorised: WRITE is needed on the topic", True
        case errors.InvalidTimestampError():
            return "the broker refuses the times of the events: is a clock wrong?", True
        case errors.InvalidTopicError():
            return "invalid topic", True
        case errors.KafkaConnectionError(__cause__=ssl.SSLError() as cause):
            return _reason(cause)
        case errors.KafkaConnectionError(__cause__=None | EOFError() | ConnectionError()):
            expects = "TLS, a client certificate or SASL"
            return f"the broker closed the connection; does its listener expect {expects}?", False
        case errors.KafkaError():
            return _first(error) or type(error).__name__, False
        case ssl.SSLCertVerificationError():
            return f"TLS: {error.verify_message}", True
        case ssl.SSLError():
            return f"TLS: {(error.reason or 'handshake failed').replace('_', ' ').lower()}", True
        case TimeoutError():
            return "no answer in time", False
        case OSError(errno=int() as number) if number > 0:
            return os.strerror(number), False
        case OSError():
            return error.strerror or type(error).__name__, False
        case _:
            # Nothing is known about its text, which might quote a setting.
            return f"unexpected {type(error).__name__}", False


def _first(error: BaseException) -> str:
    return str(error.args[0]) if error.args else str(error)
