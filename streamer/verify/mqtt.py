"""Records in MQTT, as they are published: of what came before nothing is kept by a broker."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from itertools import islice
from typing import Any

import aiomqtt

from streamer.config.settings import MqttSink as Settings
from streamer.errors import SinkError
from streamer.sinks.credentials import read_secret, ssl_context
from streamer.verify.records import MOST_VALUES, Chunk, is_json, msgpack_records


class MqttSource:
    """The topic of a URL; placeholders stand for any level."""

    def __init__(self, settings: Settings) -> None:
        """Raise ConfigError for a file or variable that cannot be used."""
        self.settings = settings
        self.name = f"mqtt://{settings.host}:{settings.port}/{settings.topic}"
        self.topic = "/".join("+" if "{" in level else level for level in settings.topic.split("/"))
        self.ready = asyncio.Event()
        """Set when the broker has taken the subscription."""
        self._password = read_secret("password", settings.password_env, settings.password_file)
        self._tls = ssl_context(settings.tls) if settings.tls else None

    async def read(self) -> AsyncIterator[Chunk]:
        """The records, for ever.

        Raises:
            SinkError: there is no reading them, or the connection has ended.
        """
        settings = self.settings
        client = aiomqtt.Client(
            settings.host,
            settings.port,
            username=settings.username,
            password=self._password,
            tls_context=self._tls,
            identifier=f"streamer-verify-{secrets.token_hex(4)}",
            protocol=aiomqtt.ProtocolVersion.V5,
            keepalive=settings.keepalive_seconds,
            timeout=settings.timeout_seconds,
        )
        try:
            async with client:
                granted = await client.subscribe(self.topic, qos=1)
                self._check(granted)
                self.ready.set()
                async for message in client.messages:
                    for chunk in _chunks(str(message.topic), message.payload):
                        yield chunk
        except (aiomqtt.MqttError, OSError) as error:
            raise SinkError(f"{self.name}: cannot be read: {error}") from None

    def _check(self, granted: Any) -> None:
        for code in granted:
            if getattr(code, "is_failure", False):
                raise SinkError(f"{self.name}: the broker refuses the subscription: {code}")


def _chunks(topic: str, payload: Any) -> Iterator[Chunk]:
    data = bytes(payload or b"")
    if is_json(data):
        yield Chunk(topic, data, topic)
        return
    records = msgpack_records(data)
    while some := list(islice(records, MOST_VALUES)):
        yield Chunk(topic, some, topic)
