"""Events in MQTT v5 at QoS 1, several to a message.

What is not acknowledged is kept in a window and sent again, in order and byte for byte, on the
next connection: at least once. A broker that dies after it took a message and before it
answered has passed it on already, so then a whole message comes twice; its user properties
`first_id` and `last_id`, or the ids of its events, let a consumer drop the second.

A message that the broker cannot take for now, or only in pieces, may have others of its topic
behind it that were taken. Nothing more is sent until the window is empty; then it comes again,
and all of its topic that was behind it too, with the same ids. So the last copies of the events
of a topic are always in order, and an event counts as delivered when its last copy was taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import ssl
from typing import Literal

from streamer.config import settings as config
from streamer.errors import ConfigError
from streamer.events.batch import Batch
from streamer.privilege.files import DIRECT, Opener
from streamer.sinks.base import Sink, Status
from streamer.sinks.credentials import read_secret, ssl_context
from streamer.sinks.mqtt.chunks import Chunk, ChunkQueue, SizeLimit, cut
from streamer.sinks.mqtt.connection import (
    Connection,
    PackedProperties,
    Refused,
    code_name,
    content_properties,
    packet_size,
    user_property,
)
from streamer.sinks.mqtt.window import Window

CONTENT_TYPES = {"json": "application/x-ndjson", "msgpack": "application/vnd.msgpack"}
"""NDJSON has no registered type, this one is common; MessagePack's is registered with IANA."""

RETRY_FIRST, RETRY_MOST, RETRY_LASTING = 0.1, 5.0, 30.0
"""Seconds between attempts to connect: at first, at most, and when trying is likely in vain."""
RETRY_STOPPING = 0.5
"""At most, between attempts within the grace period of `stop`."""
QUOTA_FIRST, QUOTA_MOST = 0.1, 5.0
"""Seconds without sending after the broker answered that it cannot take more for now."""

REFUSED_TOPIC = 10.0
"""Seconds for which nothing is sent to a topic that the broker refused: it is dropped at once."""

MAX_TRIES = 10
"""How often a message is sent that the broker answers with an error that may pass."""

TOO_LARGE = "larger than the broker accepts"

Verdict = Literal["delivered", "later", "cut", "dropped"]
_PASSING = frozenset({0x80, 0x83, 0x91})
_OF_THE_TOPIC = frozenset({0x87, 0x90})
_OF_THE_MESSAGE = _OF_THE_TOPIC | {0x95, 0x99}
_PACKET_TOO_LARGE, _QUOTA_EXCEEDED = 0x95, 0x97


def verdict(code: int, tries: int) -> Verdict:
    """What a PUBACK reason code means for a message sent `tries` times (MQTT 5.0, 3.4.2.1).

    0x10, no matching subscribers, is a success. An exceeded quota passes some time.
    Unspecified and implementation specific errors, and an identifier in use, may pass. Others,
    such as not authorized, do not.
    """
    if code < 0x80:
        return "delivered"
    if code == _QUOTA_EXCEEDED or (code in _PASSING and tries < MAX_TRIES):
        return "later"
    return "cut" if code == _PACKET_TOO_LARGE else "dropped"


def expand_topic(template: str, host: str, category: str) -> str:
    """The topic for a category, such as `kernel/web1/process` for `kernel/{host}/{category}`.

    Raises:
        ConfigError: the result is no topic name that one can publish to.
    """
    topic = template.replace("{host}", host).replace("{category}", category)
    if not topic or len(topic.encode()) > 65535:
        raise ConfigError("mqtt topic: must have 1 to 65535 bytes")
    for forbidden, what in (("+", "wildcard +"), ("#", "wildcard #"), ("\0", "a NUL"), ("{", "{")):
        if forbidden in topic:
            raise ConfigError(
                f"mqtt topic {topic!r}: contains {what}; "
                "allowed are names, /, {host} and {category}"
            )
    return topic


def retry_delay(failures: int, first: float, most: float) -> float:
    """Seconds to wait after so many failures in a row, without the jitter."""
    return min(most, first * 2.0 ** min(failures - 1, 30))


class MqttSink(Sink):
    """Publishes chunks of events, a limited number in flight, and accounts by PUBACK."""

    def __init__(self, settings: config.MqttSink, *, host: str, opener: Opener = DIRECT) -> None:
        """`host` is this host's name, for topics and user properties.

        `opener` opens certificates and secrets, now and before each attempt to connect.

        Raises:
            ConfigError: the topic cannot be published to, or a secret or certificate cannot
                be read.
        """
        scheme = "mqtts" if settings.tls else "mqtt"
        name = f"{scheme}://{settings.host}:{settings.port}/{settings.topic}"
        super().__init__(name, settings.budget)
        expand_topic(settings.topic, host, "category")
        self._settings = settings
        self._opener = opener
        # Read now as well: one that is wrong from the start is the configuration's mistake.
        self._password, self._tls = self._credentials()
        self._host = host
        self._topics: dict[str, str] = {}
        self._by_category = "{category}" in settings.topic
        # One name for all connections: the broker ends what is left of the previous one
        # before it accepts the next, so that messages cannot overtake each other.
        self._client_id = settings.client_id or f"streamer-{host}-{secrets.token_hex(4)}"
        self._properties = content_properties(
            CONTENT_TYPES[settings.encoding], text=settings.encoding == "json"
        ) + user_property("host", host)
        self._queue = ChunkQueue(
            settings.encoding, settings.batch_events, settings.linger_ms / 1000
        )
        self._window = Window()
        self._limit = 0
        self._allowed = 0  # of `_limit`: one after a refusal, and one more with each that is taken
        self._size_limit = SizeLimit()
        self._suspicious = False
        # Until when nothing is sent to a topic, and why.
        self._refused_topics: dict[str, tuple[float, str]] = {}
        self._connection: Connection | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._held_back: asyncio.TimerHandle | None = None
        self._connect_failures = 0
        self._publish_failures = 0
        self._told: set[str] = set()
        self._stopping = asyncio.Event()
        self._drained = asyncio.Event()
        self._over = False

    async def start(self) -> None:
        """Begin connecting in the background."""
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run())
        self._task.add_done_callback(self._on_run_ended)

    def submit(self, batch: Batch) -> None:
        """Take a batch; its size is that of its encoded events."""
        if self._over or self._loop is None:
            self._take(batch.kinds, 0)
            reason = "stopped" if self._over else "not started"
            self._dropped(batch.kinds, 0, reason, batch.spans)
            return
        now = self._loop.time()
        parts = batch.by_category() if self._by_category else {"": batch}
        size = sum(
            self._queue.add(self._topic(category), part, now) for category, part in parts.items()
        )
        self._take(batch.kinds, size)
        self._pump()

    def discard(self, reason: str) -> None:
        """Drop what waits and is not in flight; what was answered with "later" stays meanwhile."""
        for chunk in self._queue.clear():
            self._finish(chunk, reason)
        self._settle()

    async def stop(self, grace: float) -> None:
        """Publish what is held within `grace` seconds, drop the rest, disconnect.

        While the broker is away, it is tried until the grace ends.
        """
        self._stopping.set()
        self._queue.seal()
        self._pump()
        self._settle()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    await self._drained.wait()
        finally:
            self._end("stopped before the broker acknowledged it")
            if self._task is not None:
                self._task.cancel()
        if self._task is not None:
            await asyncio.wait({self._task})

    # -------------------------------------------------------------- connecting

    async def _run(self) -> None:
        """Connect, publish until the connection ends, and so on. Ends by being cancelled."""
        while True:
            connection = await self._connect()
            self._told.clear()
            self._set_status("up")
            try:
                reason = await self._serve(connection)
            finally:
                self._connection = None
                self._suspect(connection)
                self._queue.push_front(self._window.take_back())
                await connection.close()
            self._set_status("down", reason)
            self._connect_failures += 1
            await self._pause(retry_delay(self._connect_failures, RETRY_FIRST, RETRY_MOST))

    async def _connect(self) -> Connection:
        while True:
            try:
                return await self._open()
            except Refused as refused:
                self._connect_failures += 1
                delay = retry_delay(self._connect_failures, RETRY_FIRST, RETRY_MOST)
                if refused.lasting:
                    delay = RETRY_LASTING
                    self._tell_once("down", str(refused))
                self._set_status("down", str(refused))
            await self._pause(delay)

    async def _open(self) -> Connection:
        """Raises Refused."""
        # A renewed secret is used; one that became unreadable leaves the last good one.
        with contextlib.suppress(ConfigError):
            self._password, self._tls = self._credentials()
        connection = Connection(
            self._settings,
            client_id=self._client_id,
            password=self._password,
            tls=self._tls,
            acknowledged=self._acknowledged,
        )
        try:
            await connection.open()
        except BaseException:
            await connection.close()
            raise
        return connection

    def _credentials(self) -> tuple[str | None, ssl.SSLContext | None]:
        """Password and TLS as they are now. Raises ConfigError."""
        settings = self._settings
        password = read_secret(
            "mqtt.password", settings.password_env, settings.password_file, self._opener
        )
        return password, ssl_context(settings.tls, self._opener) if settings.tls else None

    async def _serve(self, connection: Connection) -> str:
        """Publish until the connection ends; why it did."""
        self._limit = min(self._settings.max_inflight, connection.receive_maximum)
        # One, where the last connection ended while messages were in flight: should it be one
        # of them over which the broker closes the connection, it shows itself.
        self._allowed = 1 if self._suspicious else self._limit
        self._connection = connection
        self._pump()
        check = min(1.0, self._settings.timeout_seconds / 4)
        while True:
            reason = await connection.lost(check) or self._overdue()
            if reason:
                return reason

    def _overdue(self) -> str:
        """Why a connection that looks alive is not: an acknowledgement is missing too long."""
        assert self._loop is not None
        oldest = self._window.oldest
        timeout = self._settings.timeout_seconds
        if oldest is None or self._loop.time() - oldest.sent_at < timeout:
            return ""
        return f"no acknowledgement within {timeout:g} s"

    async def _pause(self, delay: float) -> None:
        """Wait before the next attempt, with jitter: a thousand hosts lose a broker at once.

        A stop cuts the wait short, so that there is an attempt within the grace.
        """
        delay *= random.uniform(0.5, 1.0)
        if self._stopping.is_set():
            await asyncio.sleep(min(delay, RETRY_STOPPING))
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._stopping.wait()

    # -------------------------------------------------------------- publishing

    def _topic(self, category: str) -> str:
        topic = self._topics.get(category)
        if topic is None:
            topic = expand_topic(self._settings.topic, self._host, category)
            self._topics[category] = topic
        return topic

    def _pump(self) -> None:
        """Publish what is ready, as far as the window allows."""
        if self._connection is None or self._held_back is not None or self._loop is None:
            return
        if self._window.running_empty:
            return
        now = self._loop.time()
        while len(self._window) < self._allowed:
            chunk = self._queue.pop(now)
            if chunk is None:
                self._await_linger()
                return
            if not self._publish(self._connection, chunk, now):
                return

    def _publish(self, connection: Connection, chunk: Chunk, now: float) -> bool:
        """False when the connection is gone."""
        if self._refused_topics and (refusal := self._refusal_of(chunk.topic, now)):
            self._give_up(chunk, refusal)
            return True
        properties = self._properties_of(chunk)
        excess = packet_size(chunk.topic, properties, chunk.payload)
        excess -= connection.maximum_packet_size
        if excess > 0:
            self._cut(chunk, len(chunk.payload) - excess)
            return True
        most = self._size_limit.now(now)
        if chunk.count > 1 and 0 < most < len(chunk.payload):
            self._cut(chunk, most)
            return True
        mid = connection.publish_nowait(chunk.topic, chunk.payload, properties)
        if mid is None:
            self._queue.push_front([chunk])
            return False
        chunk.sent_at = now
        self._window.put(mid, chunk)
        return True

    def _refusal_of(self, topic: str, now: float) -> str:
        """Why nothing is sent to the topic for now; empty when something is."""
        until, reason = self._refused_topics.get(topic, (0.0, ""))
        if reason and now >= until:
            del self._refused_topics[topic]
            return ""
        return reason

    def _properties_of(self, chunk: Chunk) -> PackedProperties:
        return PackedProperties(
            self._properties
            + user_property("events", str(chunk.count))
            + user_property("first_id", chunk.first_id)
            + user_property("last_id", chunk.last_id)
        )

    def _cut(self, chunk: Chunk, max_bytes: int) -> None:
        if chunk.count == 1:
            self._give_up(chunk, TOO_LARGE)
        else:
            self._queue.push_front(cut(chunk, self._settings.encoding, max_bytes))

    def _await_linger(self) -> None:
        due = self._queue.due
        if due is not None and self._linger is None and self._loop is not None:
            self._linger = self._loop.call_at(due, self._on_linger)

    def _on_linger(self) -> None:
        self._linger = None
        self._pump()

    # -------------------------------------------------------------- acknowledgements

    def _acknowledged(self, mid: int, code: int) -> None:
        found = self._window.pop(mid)
        if found is None:
            return
        position, chunk = found
        if code >= 0x80:
            self._refused(position, chunk, code)
        else:
            self._allowed = min(self._limit, self._allowed + 1)
            if not self._window.keep(position, chunk):
                self._connect_failures = self._publish_failures = 0
                self._delivered(chunk.kinds, len(chunk.payload))
        if self._window.running_empty and not len(self._window):
            self._queue.push_front(self._window.take_back())
            self._allowed = 1
        self._pump()
        self._settle()

    def _refused(self, position: int, chunk: Chunk, code: int) -> None:
        chunk.tries += 1
        match verdict(code, chunk.tries):
            case "later":
                self._window.again(position, chunk, [chunk])
                self._hold_back()
            case "cut" if chunk.count > 1:
                self._cut_in_flight(position, chunk)
            case "cut":
                self._give_up(chunk, TOO_LARGE)
            case _:
                reason = f"publishing to {chunk.topic} refused: {code_name(code)}"
                self._tell_once(self.status, reason)
                if code in _OF_THE_TOPIC and self._loop is not None:
                    until = self._loop.time() + REFUSED_TOPIC
                    self._refused_topics[chunk.topic] = (until, reason)
                self._give_up(chunk, reason)

    def _cut_in_flight(self, position: int, chunk: Chunk) -> None:
        assert self._loop is not None
        most = self._size_limit.refused(len(chunk.payload), self._loop.time())
        self._window.again(position, chunk, cut(chunk, self._settings.encoding, most))

    def _suspect(self, connection: Connection) -> None:
        """The connection ended: perhaps over the only message that was in flight.

        A DISCONNECT that says why is the answer to that message. Without one it may be a
        broker that was restarted: the second time the message is cut, because small ones may
        get through, and an event by itself is given up after as many times as others.
        """
        self._suspicious = connection.closed_by_broker and len(self._window) > 0
        lone = self._window.lone() if connection.closed_by_broker else None
        if lone is None:
            return
        mid, position, chunk = lone
        chunk.closings += 1
        if connection.closing_code in _OF_THE_MESSAGE:
            self._window.pop(mid)
            self._refused(position, chunk, connection.closing_code)
        elif chunk.count > 1 and chunk.closings > 1:
            self._window.pop(mid)
            self._cut_in_flight(position, chunk)
        elif chunk.closings >= MAX_TRIES:
            self._window.pop(mid)
            self._give_up(chunk, f"the broker closes the connection over it, {MAX_TRIES} times")

    def _hold_back(self) -> None:
        """Send nothing for a while, because the broker cannot take more."""
        if self._held_back is None and self._loop is not None:
            self._publish_failures += 1
            delay = retry_delay(self._publish_failures, QUOTA_FIRST, QUOTA_MOST)
            self._held_back = self._loop.call_later(delay, self._on_held_back)

    def _on_held_back(self) -> None:
        self._held_back = None
        self._pump()

    def _give_up(self, chunk: Chunk, reason: str) -> None:
        self._finish(chunk, reason)
        self._settle()

    def _finish(self, chunk: Chunk, reason: str) -> None:
        """Account for what will not be sent again: lost, unless an earlier copy was taken."""
        if chunk.taken:
            self._delivered(chunk.kinds, len(chunk.payload))
        else:
            self._dropped(chunk.kinds, len(chunk.payload), reason, chunk.spans)

    def _tell_once(self, status: Status, reason: str) -> None:
        """Tell the owner about trouble that the status alone does not show, once per connection."""
        if reason in self._told:
            return
        self._told.add(reason)
        if status == self.status:
            self.listener.sink_status(self, status, reason)

    def _settle(self) -> None:
        if self._stopping.is_set() and not self._window and not self._queue:
            self._drained.set()

    # -------------------------------------------------------------- the end

    def _on_run_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._end(f"ended by an unexpected error: {error!r}")

    def _end(self, reason: str) -> None:
        """Drop what is held and close for good; only the first call counts."""
        if self._over:
            return
        self._over = True
        self._connection = None
        for timer in (self._linger, self._held_back):
            if timer is not None:
                timer.cancel()
        for chunk in [*self._window.take_back(), *self._queue.clear()]:
            self._finish(chunk, reason)
        self._drained.set()
        self._set_status("closed", reason)
