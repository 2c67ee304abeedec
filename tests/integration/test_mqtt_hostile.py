"""A broker that means harm to the MQTT sink, or was taken over: what it sends costs no memory."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from pathlib import Path

import msgspec
import pytest

from streamer.config import settings
from streamer.sinks.mqtt.connection import MOST_RECEIVED
from streamer.sinks.mqtt.sink import MqttSink
from tests.brokers import free_port
from tests.integration.test_mqtt import account, execs, until
from tests.recorder import Recorder

pytestmark = pytest.mark.mqtt

CONNACK = b"\x20\x03\x00\x00\x00"
LARGEST = b"\xff\xff\xff\x7f"  # 268,435,455: the most that a length can say
CHUNK = bytes(1 << 20)
FLOOD_BYTES = 200 << 20
ALLOWED_GROWTH = 30 << 20
ATTACKS = {
    "a message that is as large as any": (b"\x30" + LARGEST, CHUNK),
    "an answer that is as large as any": (b"\x40" + LARGEST, CHUNK),
    "messages that nobody subscribed to": (b"", b"\x30\x83\x08\x00\x01t\x00" + bytes(1023)),
    "messages that want an answer": (b"", b"\x32\x07\x00\x01t\x00\x01\x00x" * 4096),
    "releases of what was never sent": (b"", b"\x62\x02\x00\x01" * 65536),
    "receipts of what was never sent": (b"", b"\x50\x02\x00\x01" * 65536),
    "pings that want an answer": (b"", b"\xc0\x00" * 65536),
    "a packet of no type": (b"\x00\x00", b""),
    "a message of which the length never ends": (b"\x30" + b"\xff" * 100, b""),
}


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Hostile:
    """Takes every connection, says what it should once, and then what it should not, for ever.

    From the `patience`-th connection on it is an orderly broker.
    """

    def __init__(self, head: bytes, body: bytes, patience: int = 3) -> None:
        self.port = free_port()
        self.connections = 0
        self.sent = 0
        self._head, self._body, self._patience = head, body, patience
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Hostile:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await self._read_packet(reader)
            writer.write(CONNACK)
            if self.connections >= self._patience:
                await self._acknowledge(reader, writer)
            writer.write(self._head)
            while self._body and self.sent < FLOOD_BYTES * self.connections:
                writer.write(self._body)
                await writer.drain()
                self.sent += len(self._body)
            await reader.read()  # until the sink has gone
        writer.close()

    async def _acknowledge(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while True:
            kind, body = await self._read_packet(reader)
            if kind == 3:
                at = 2 + int.from_bytes(body[:2], "big")
                writer.write(b"\x40\x03" + struct.pack(">2sB", body[at : at + 2], 0))

    async def _read_packet(self, reader: asyncio.StreamReader) -> tuple[int, bytes]:
        kind = (await reader.readexactly(1))[0] >> 4
        size = shift = 0
        while True:
            byte = (await reader.readexactly(1))[0]
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return kind, await reader.readexactly(size)


@pytest.mark.parametrize("attack", ATTACKS)
async def test_what_a_broker_may_not_send_ends_the_connection(attack: str) -> None:
    """Nothing of it is kept, and the events are delivered when the broker is in order again."""
    async with Hostile(*ATTACKS[attack]) as broker:
        options = {"type": "mqtt", "host": "127.0.0.1", "port": broker.port, "linger_ms": 5}
        sink = MqttSink(msgspec.convert(options, settings.MqttSink), host="web1")
        sink.listener = Recorder()
        before = most = resident()
        await asyncio.wait_for(sink.start(), 1.0)
        sink.submit(execs(10))

        def delivered() -> bool:
            nonlocal most
            most = max(most, resident())
            return account(sink) == (10, 0, 0)

        await until(delivered)
        await sink.stop(0)
    assert broker.connections >= 3
    assert most - before < ALLOWED_GROWTH


def test_what_a_broker_has_to_say_is_short() -> None:
    assert MOST_RECEIVED <= 1 << 16
