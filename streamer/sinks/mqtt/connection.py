"""One connection to an MQTT v5 broker: aiomqtt, and paho beneath it, with what they leave out.

aiomqtt ties paho's socket to the event loop. Its `publish` is not used: it waits with a task
per message and takes every PUBACK for a success. Here a message is queued without waiting and
each PUBACK is handed on with its reason code.

Exceptions of both libraries are translated here into `Refused`, and a lost connection into the
text of its reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from threading import Thread, get_ident
from typing import Any, Literal, cast

import aiomqtt
from aiomqtt.exceptions import MqttConnectError
from paho.mqtt import client as paho
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from streamer.config import settings as config
from streamer.sinks.sockets import REPLACE_SECONDS, unheard_seconds

ALL_PACKETS = 268_435_460
"""The most bytes that any MQTT packet can have."""
NO_LIMIT = 65535
"""Receive Maximum of a broker that names none."""
CONNECT_TIMEOUT = 5.0
"""The most seconds for one address of the broker to answer, handshake included."""

MOST_RECEIVED = 1 << 16
"""Bytes of a packet of the broker's: it has answers to give, and nothing else."""

_ANSWERS = frozenset({2, 4, 13, 14})
"""Types of packets that a broker may send to who subscribes to nothing, at QoS 1: CONNACK, PUBACK,
PINGRESP, DISCONNECT."""
_KEEP_ALIVE = 0x8D
# Of no use to try again soon: the settings or the broker's have to change first.
_LASTING = frozenset({0x84, 0x85, 0x86, 0x87, 0x8A, 0x8C, 0x90, 0x95, 0x9B, 0x9C, 0x9D})


class Refused(Exception):
    """No connection. `lasting` when only a change of settings can help; the text says why."""

    def __init__(self, reason: str, *, lasting: bool = False) -> None:
        super().__init__(reason)
        self.lasting = lasting


def code_name(code: int) -> str:
    """A reason code as the standard names it, with its number: `Not authorized (0x87)`."""
    names = ReasonCode.names.get(code)
    return f"{next(iter(names))} (0x{code:02X})" if names else f"reason code 0x{code:02X}"


# ---------------------------------------------------------------- properties of a message


class PackedProperties:
    """Message properties as bytes, for paho, which asks for nothing but `pack`.

    paho's own class takes 35 µs to build and pack what is 2 µs here, a tenth of the cost of a
    whole message.
    """

    __slots__ = ("_packed",)

    def __init__(self, body: bytes) -> None:
        """`body` are the properties, one after the other, without their length."""
        self._packed = _variable_int(len(body)) + body

    def __len__(self) -> int:
        return len(self._packed)

    def pack(self) -> bytes:
        """The length of the properties and the properties (MQTT 5.0, 2.2.2)."""
        return self._packed


def content_properties(content_type: str, *, text: bool) -> bytes:
    """Content type, and the payload format indicator when the payload is UTF-8 text."""
    return (b"\x01\x01" if text else b"") + b"\x03" + _string(content_type)


def user_property(name: str, value: str) -> bytes:
    """One user property."""
    return b"\x26" + _string(name) + _string(value)


def packet_size(topic: str, properties: PackedProperties, payload: bytes) -> int:
    """Bytes of a PUBLISH packet at QoS 1 (MQTT 5.0, 3.3)."""
    remaining = 2 + len(topic.encode()) + 2 + len(properties) + len(payload)
    return 1 + len(_variable_int(remaining)) + remaining


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">H", len(data)) + data


def _variable_int(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


# ---------------------------------------------------------------- the connection


class Connection(aiomqtt.Client):
    """A connection that is opened once, used, and closed; every reconnect is a new one.

    New, because paho would send what it still holds of the old one once more by itself.
    """

    def __init__(
        self,
        settings: config.MqttSink,
        *,
        client_id: str,
        password: str | None,
        tls: ssl.SSLContext | None,
        acknowledged: Callable[[int, int], None],
    ) -> None:
        """`acknowledged(mid, code)` is called for each PUBACK with its reason code."""
        super().__init__(
            settings.host,
            settings.port,
            username=settings.username,
            password=password,
            logger=_silent(),
            identifier=client_id,
            protocol=aiomqtt.ProtocolVersion.V5,
            timeout=settings.timeout_seconds,
            keepalive=settings.keepalive_seconds,
            # No session is kept: what is not acknowledged is sent again by the sink, which
            # also has it after the broker lost everything. The broker would not recognise a
            # repetition anyway, because QoS 1 has no state that could tell.
            clean_start=True,
        )
        self.receive_maximum = NO_LIMIT
        self.maximum_packet_size = ALL_PACKETS
        self.closed_by_broker = False
        self.closing_code = 0  # of the broker's DISCONNECT, where it sent one
        self._acknowledged = acknowledged
        self._loop_thread = get_ident()
        self._abandoned = False
        self._ending = ""
        self._tls = tls
        self._connect_timeout = min(settings.timeout_seconds, CONNECT_TIMEOUT)
        # paho's own leaves the socket open when the TLS handshake fails.
        self._client._create_socket = self._create_socket  # type: ignore[method-assign]
        self._client.max_inflight_messages_set(0)  # counted by the sink, without walking a list
        # paho would take a packet of any size into memory, and answer or keep what is none of ours.
        self._receive, self._handle = self._client._sock_recv, self._client._packet_handle
        self._client._sock_recv = self._sock_recv  # type: ignore[method-assign]
        self._client._packet_handle = self._packet_handle  # type: ignore[method-assign]
        # Below on_publish, because paho ends the connection over a PUBACK with a code that its
        # table does not allow there, such as Mosquitto's 0x95 for a message over its limit.
        self._client._handle_pubackcomp = self._handle_puback  # type: ignore[method-assign]

    async def open(self) -> None:
        """Connect and wait for the CONNACK.

        Raises:
            Refused: there is no connection; `close` is to be called all the same.
        """
        try:
            await _in_daemon_thread(self._client_connect)
            await asyncio.wait({self._connected}, timeout=self.timeout)
            if not self._connected.done():
                raise Refused(f"no answer within {self.timeout:g} s")
            self._connected.result()
        except MqttConnectError as error:
            raise _refusal(error.rc) from None
        except aiomqtt.MqttError as error:
            raise Refused(str(error)) from None
        except ssl.SSLError as error:
            raise Refused(f"TLS: {_tls_reason(error)}", lasting=True) from None
        except (OSError, ValueError) as error:
            raise Refused(getattr(error, "strerror", None) or str(error)) from None

    async def lost(self, within: float) -> str | None:
        """Wait up to `within` seconds for the connection to end; why it did, or None."""
        await asyncio.wait({self._disconnected}, timeout=within)
        if not self._disconnected.done():
            return None
        error = self._disconnected.exception()
        return self._ending or f"connection lost: {error}"

    @property
    def unheard_seconds(self) -> float:
        """How long the broker's kernel has confirmed nothing of what it was sent: see `sockets`."""
        return unheard_seconds(cast("socket.socket | None", self._client.socket()))

    async def another_can_be_made(self) -> bool:
        """Whether somebody accepts a connection where this one leads to."""

        def connect() -> None:
            socket.create_connection((self._hostname, self._port), REPLACE_SECONDS).close()

        try:
            await _in_daemon_thread(connect)
        except OSError:
            return False
        return True

    def publish_nowait(
        self, topic: str, payload: bytes, properties: PackedProperties
    ) -> int | None:
        """Queue a message at QoS 1; its packet identifier, or None without a connection."""
        # paho would keep the message and count it, but nothing would ever send it.
        if self._client.socket() is None:
            return None
        packed = cast(Properties, properties)
        return self._client.publish(topic, payload, 1, properties=packed).mid

    async def close(self) -> None:
        """Say goodbye where that takes no waiting, and release everything.

        Harmless at any time, also while `open` was cancelled and its thread still connects.
        """
        self._abandoned = True
        with contextlib.suppress(OSError, ValueError):
            self._client.disconnect()
            self._client.loop_write()
        self._client._sock_close()
        misc, self._misc_task = self._misc_task, None
        if misc is not None:
            misc.cancel()
            await asyncio.wait({misc})
        for future in (self._connected, self._disconnected):
            if future.done():
                future.exception()  # read, so that asyncio does not complain about it

    # -------------------------------------------------------------- on the connecting thread

    def _create_socket(self) -> socket.socket:
        """A connected socket, after the TLS handshake. Raises OSError, and leaves nothing open."""
        sock = socket.create_connection((self._hostname, self._port), self._connect_timeout)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is None:
                return sock
            return self._tls.wrap_socket(sock, server_hostname=self._hostname)
        except BaseException:
            sock.close()
            raise

    def _on_socket_open(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        self._loop.call_soon_threadsafe(self._attach)

    def _on_socket_register_write(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        if get_ident() == self._loop_thread:
            self._want_write()
        else:
            self._loop.call_soon_threadsafe(self._want_write)

    # -------------------------------------------------------------- on the loop
    #
    # A descriptor is looked up when it is used: between a thread's call and the loop's turn the
    # socket may be closed, and its number belong to somebody else.

    def _attach(self) -> None:
        sock = self._client.socket()
        if self._abandoned:
            self._client._sock_close()
        elif sock is not None:
            self._loop.add_reader(sock.fileno(), self._read)
            self._misc_task = self._loop.create_task(self._misc_loop())

    def _want_write(self) -> None:
        sock = self._client.socket()
        if sock is not None:
            self._loop.add_writer(sock.fileno(), self._write)

    def _read(self) -> None:
        with self._ended_by_errors():
            self._client.loop_read()
            # What TLS has decoded already would not wake the loop.
            while (pending := getattr(self._client.socket(), "pending", None)) and pending():
                self._client.loop_read()

    def _write(self) -> None:
        with self._ended_by_errors():
            rc = self._client._packet_write()
            if rc > 0:
                # The broker has died. What it acknowledged before is still to be read, and
                # would otherwise be sent twice.
                while self._client._packet_read() == MQTTErrorCode.MQTT_ERR_SUCCESS:
                    pass
                self._client._loop_rc_handle(rc)
            elif not self._client.want_write():
                self._client._call_socket_unregister_write()

    @contextlib.contextmanager
    def _ended_by_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._disconnected.done():
                self._disconnected.set_exception(error)

    def _on_socket_close(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        if not self._loop.is_closed():
            super()._on_socket_close(client, userdata, sock)

    def _sock_recv(self, bufsize: int) -> bytes:
        """Bytes of the broker's. Raises OSError for a packet that is longer than any answer."""
        if bufsize > MOST_RECEIVED:
            self._ending = f"connection lost: the broker sent a packet of {bufsize:,} bytes"
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        return self._receive(bufsize)

    def _packet_handle(self) -> MQTTErrorCode:
        kind = self._client._in_packet["command"] >> 4
        if kind not in _ANSWERS:
            self._ending = f"connection lost: the broker sent a packet of type {kind}"
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        return self._handle()

    def _handle_puback(self, cmd: Literal["PUBACK", "PUBCOMP"]) -> MQTTErrorCode:
        packet = self._client._in_packet["packet"]
        if len(packet) < 2:
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        mid = int.from_bytes(packet[:2], "big")
        if self._client._out_messages.pop(mid, None) is not None:
            self._acknowledged(mid, packet[2] if len(packet) > 2 else 0)
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _on_connect(
        self,
        client: paho.Client,
        userdata: Any,
        flags: paho.ConnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        self.receive_maximum = getattr(properties, "ReceiveMaximum", NO_LIMIT)
        self.maximum_packet_size = getattr(properties, "MaximumPacketSize", ALL_PACKETS)
        if not reason_code.is_failure and getattr(properties, "MaximumQoS", 2) < 1:
            reason_code = ReasonCode(reason_code.packetType, "QoS not supported")
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_disconnect(
        self,
        client: paho.Client,
        userdata: Any,
        flags: paho.DisconnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        if self._ending:
            pass  # paho may call again while it closes: the first reason is the one
        elif flags.is_disconnect_packet_from_server or reason_code.value == _KEEP_ALIVE:
            self.closed_by_broker = flags.is_disconnect_packet_from_server
            self.closing_code = reason_code.value if self.closed_by_broker else 0
            self._ending = f"connection lost: {code_name(reason_code.value)}"
        else:
            self.closed_by_broker = not self._abandoned
            self._ending = "connection lost"  # all that paho says is "Unspecified error"
        if not self._connected.done():  # aiomqtt would let `open` wait until its timeout
            self._connected.set_exception(aiomqtt.MqttError("the broker closed the connection"))
        super()._on_disconnect(client, userdata, flags, reason_code, properties)


def _silent() -> logging.Logger:
    """A logger that says nothing and that nobody else has: what matters is the sink's status."""
    return logging.Logger("mqtt", level=logging.CRITICAL + 1)


def _refusal(code: int | ReasonCode | None) -> Refused:
    value = code.value if isinstance(code, ReasonCode) else code or 0
    return Refused(f"connection refused: {code_name(value)}", lasting=value in _LASTING)


def _tls_reason(error: ssl.SSLError) -> str:
    return getattr(error, "verify_message", "") or error.reason or str(error)


async def _in_daemon_thread(function: Callable[[], None]) -> None:
    """Run a function that blocks, without anybody ever having to wait for it.

    The loop's executor would be joined at the end of the program, and resolving a name or
    connecting to a host that does not answer takes long.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish(error: Exception | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        outcome: Exception | None = None
        try:
            function()
        except Exception as error:
            outcome = error
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            loop.call_soon_threadsafe(finish, outcome)

    Thread(target=run, name="streamer-mqtt-connect", daemon=True).start()
    await done
