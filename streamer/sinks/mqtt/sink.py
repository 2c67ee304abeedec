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
from streamer.sinks.batching import SizeLimit
from streamer.sinks.credentials import read_secret, ssl_context
from streamer.sinks.encoded import Extent
from streamer.sinks.mqtt.connection import (
    ALL_PACKETS,
    Connection,
    PackedProperties,
    Refused,
    code_name,
    content_properties,
    packet_size,
    user_property,
)
from streamer.sinks.mqtt.encoded import encode, first_and_last, piece
from streamer.sinks.mqtt.outbox import Outbox
from streamer.sinks.mqtt.window import Message, Window
from streamer.sinks.silence import LOOK_SECONDS, Silence
from streamer.sinks.sockets import UNHEARD_SECONDS

CONTENT_TYPES = {"json": "application/x-ndjson", "msgpack": "application/vnd.msgpack"}
"""NDJSON has no registered type, this one is common; MessagePack's is registered with IANA."""

RETRY_FIRST, RETRY_MOST, RETRY_LASTING = 0.1, 3.0, 30.0
"""Seconds between attempts to connect: at first, at most, and when trying is likely in vain."""
RETRY_STOPPING = 0.5
"""At most, between attempts within the grace period of `stop`."""
QUOTA_FIRST, QUOTA_MOST = 0.1, 5.0
"""Seconds without sending after the broker answered that it cannot take more for now."""

REFUSED_TOPIC = 10.0
"""Seconds for which nothing is sent to a topic that the broker refused: it is dropped at once."""
REFUSED_SIZE = 30.0
"""Seconds for which no event as large as one that was too large by itself is sent: some brokers,
Mosquitto 2.0 among them, close the connection over each."""

MAX_TRIES = 10
"""How often a message is sent that the broker answers with an error that may pass."""

MESSAGE_BYTES = 256 << 10
"""Bytes of events at which a message is sent, also if they are few."""
MESSAGE_MOST = 1 << 20
"""Bytes of events that are never exceeded by several, however long the backlog."""
GROWTH = 8
"""With a backlog, a message has up to so many times `batch_events`."""
SHARES = 16
"""A message has at most one of so many parts of the budget."""
TIMER_SLACK = 0.001
"""Seconds: event loops round timers to milliseconds, and may be early by that."""
HEAD_BYTES = 512
"""What a packet has at most beside its topic, content properties and payload, as a rule."""

TOO_LARGE = "larger than the broker accepts"

Verdict = Literal["delivered", "later", "cut", "dropped"]
_PASSING = frozenset({0x80, 0x83, 0x91})
_OF_THE_TOPIC = frozenset({0x87, 0x90})
_OF_THE_MESSAGE = _OF_THE_TOPIC | {0x95, 0x99}
_OF_NO_MESSAGE = frozenset({0x89, 0x8B, 0x8D, 0x8E, 0x96, 0x97, 0x98, 0x9C, 0x9D, 0x9F, 0xA0})
"""Busy, shutting down, keep alive, taken over, rate, quota, an administrator, another server,
moved, connections, their time: MQTT 5.0, 3.14.2.1."""
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


def retry_delay(failures: int, first: float, most: float) -> float:
    """Seconds to wait after so many failures in a row, without the jitter."""
    return min(most, first * 2.0 ** min(failures - 1, 30))


class MqttSink(Sink):
    """Publishes messages of events, a limited number in flight, and accounts by PUBACK."""

    def __init__(self, settings: config.MqttSink, *, host: str, opener: Opener = DIRECT) -> None:
        """`host` is this host's name, for topics and user properties.

        `opener` opens certificates and secrets, now and before each attempt to connect.

        Raises:
            ConfigError: a secret or certificate cannot be read.
        """
        super().__init__(settings.name, settings.budget)
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
        # One event to a message is a format that consumers may depend on.
        growth = 1 if settings.batch_events == 1 else GROWTH
        full = Extent(MESSAGE_BYTES, settings.batch_events)
        self._outbox = Outbox(full, settings.linger_ms / 1000, growth)
        self._most = max(1, min(MESSAGE_MOST, settings.budget // SHARES))
        self._head = HEAD_BYTES + len(self._properties) + len(host) + len(settings.topic.encode())
        self._window = Window()
        self._copies = 0  # bytes of what is in flight, counted against the budget
        self._limit = 0
        self._allowed = 0  # of `_limit`: one after a refusal, and one more with each that is taken
        self._size_limit = SizeLimit(self._most)
        # The least payload of one event that was too large, and until when it counts as that.
        self._too_large = (ALL_PACKETS, 0.0)
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
        self._silence = Silence()
        self._put_off = ""  # why the broker did not take for now what it was sent last
        self._stopping = asyncio.Event()
        self._drained = asyncio.Event()
        self._over = False

    async def start(self) -> None:
        """Begin connecting in the background."""
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run())
        self._task.add_done_callback(self._on_run_ended)

    def submit(self, batch: Batch) -> None:
        """Encode and queue."""
        if self._over or self._loop is None:
            self._take(batch.kinds, 0)
            reason = "stopped" if self._over else "not started"
            self._dropped(batch.kinds, 0, reason, batch.counted())
            return
        now = self._loop.time()
        parts = batch.by_category() if self._by_category else {"": batch}
        for category, part in parts.items():
            self._enqueue(self._topic(category), part, now)
        self._pump()

    def _enqueue(self, topic: str, batch: Batch, now: float) -> None:
        """Encode, in pieces that end where a message is full."""
        start = 0
        while start < len(batch):
            stop = start + self._outbox.lacks(topic)
            encoded = encode(piece(batch, start, stop), self._settings.encoding, self.ticket)
            self._outbox.put(topic, encoded, now)
            self._take(encoded.kinds, encoded.held)
            start = stop

    def discard(self, reason: str) -> None:
        """Drop what waits and is not in flight; what was answered with "later" stays meanwhile."""
        for message in self._outbox.clear():
            self._finish(message, reason)
        self._settle()

    @property
    def reachable(self) -> bool:
        """See `Sink`."""
        return self.status == "up" or self._connection is not None

    def oldest(self) -> int | None:
        """See `Sink`."""
        held = (*self._window.held(), *self._outbox.first())
        return min((batch.ticket for batch in held), default=None)

    async def stop(self, grace: float) -> None:
        """Publish what is held within `grace` seconds, drop the rest, disconnect.

        While the broker is away, it is tried until the grace ends.
        """
        self._stopping.set()
        self._outbox.hurry()
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
            if not self._is_silent():
                self._set_status("up")
            try:
                reason = await self._serve(connection)
            finally:
                self._connection = None
                self._suspect(connection)
                self._take_back()
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
                self._explain(str(refused))
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
        check = min(LOOK_SECONDS, UNHEARD_SECONDS / 4, self._settings.timeout_seconds / 4)
        while True:
            if lost := await connection.lost(check):
                self._explain(lost)
                return lost
            if reason := self._overdue() or await _unheard(connection):
                return reason
            if self._is_silent():
                self._tell_silence()

    def _overdue(self) -> str:
        """Why a connection that looks alive is not: an acknowledgement is missing too long."""
        assert self._loop is not None
        oldest = self._window.oldest
        timeout = self._settings.timeout_seconds
        if oldest is None or self._loop.time() - oldest.sent_at < timeout:
            return ""
        return f"no acknowledgement within {timeout:g} s"

    def _is_silent(self) -> bool:
        """Whether something that was sent waits, and nothing is acknowledged."""
        assert self._loop is not None
        if not self._window and not self._outbox:
            self._silence.forget()
        return self._silence.lasts(self._loop.time())

    def _tell_silence(self) -> None:
        """Say that nothing is acknowledged. It costs no event."""
        assert self._loop is not None
        if self._put_off:
            self._explain(self._put_off)
            self._set_status("down", self._put_off)
        else:
            self._set_silent(self._silence.reason(self._loop.time()))

    def _heard(self) -> None:
        """The broker took something, or refused it for good."""
        assert self._loop is not None
        now = self._loop.time()
        self._silence.answered(now, now if self._window else None)
        self._put_off = ""
        if self._connection is not None and not self._over:
            self._set_status("up")

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
            topic = self._settings.topic.replace("{host}", self._host)
            topic = topic.replace("{category}", category)
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
            places = self._limit - len(self._window)
            most = self._most_now(self._connection, now)
            message = self._outbox.pop(now + TIMER_SLACK, most, places)
            if message is None:
                self._await_linger()
                break
            if not self._publish(self._connection, message, now):
                break
        self._count_copies()

    def _most_now(self, connection: Connection, now: float) -> int:
        """Bytes of records that go into a message."""
        broker = connection.maximum_packet_size - self._head
        return max(1, min(self._size_limit.now(now), broker))

    def _publish(self, connection: Connection, message: Message, now: float) -> bool:
        """False when the connection is gone."""
        if self._refused_topics and (refusal := self._refusal_of(message.topic, now)):
            self._give_up(message, refusal)
            return True
        properties, payload = self._properties_of(message), message.batch.payload
        excess = packet_size(message.topic, properties, payload)
        excess -= connection.maximum_packet_size
        if excess > 0:
            self._cut(message, len(payload) - excess)
            return True
        if message.batch.number > 1 and len(payload) > self._size_limit.now(now):
            self._cut(message, self._size_limit.now(now))
            return True
        if message.batch.number == 1 and self._is_too_large(len(payload), now):
            self._give_up(message, TOO_LARGE)
            return True
        mid = connection.publish_nowait(message.topic, payload, properties)
        if mid is None:
            self._outbox.push_front([message])
            return False
        message.sent_at = now
        self._silence.sent(now)
        self._window.put(mid, message)
        return True

    def _is_too_large(self, size: int, now: float) -> bool:
        """Whether one event of so many bytes was refused already, not long ago."""
        least, until = self._too_large
        return size >= least and now < until

    def _refusal_of(self, topic: str, now: float) -> str:
        """Why nothing is sent to the topic for now; empty when something is."""
        until, reason = self._refused_topics.get(topic, (0.0, ""))
        if reason and now >= until:
            del self._refused_topics[topic]
            return ""
        return reason

    def _properties_of(self, message: Message) -> PackedProperties:
        first_id, last_id = first_and_last(message.batch)
        return PackedProperties(
            self._properties
            + user_property("events", str(message.batch.number))
            + user_property("first_id", first_id)
            + user_property("last_id", last_id)
        )

    def _cut(self, message: Message, most: int) -> None:
        if message.batch.number == 1:
            self._give_up(message, TOO_LARGE)
        else:
            self._outbox.push_front(message.cut(max(1, most)))

    def _count_copies(self) -> None:
        """Count what is in flight once more: the library has each message as a packet, too."""
        size = self._window.size
        more, self._copies = size - self._copies, size
        if more > 0:
            self._take({}, more)
        elif more < 0:
            self._release(-more)

    def _await_linger(self) -> None:
        due = self._outbox.due_at()
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
        position, message = found
        if code >= 0x80:
            self._refused(position, message, code)
        else:
            self._heard()
            self._allowed = min(self._limit, self._allowed + 1)
            if not self._window.keep(position, message):
                self._connect_failures = self._publish_failures = 0
                self._delivered(message.batch.kinds, message.batch.held, message.batch.size)
        if self._window.running_empty and not len(self._window):
            self._take_back()
            self._allowed = 1
        self._pump()
        self._settle()

    def _take_back(self) -> None:
        self._outbox.push_front(self._window.take_back())
        self._count_copies()

    def _refused(self, position: int, message: Message, code: int) -> None:
        message.tries += 1
        said = verdict(code, message.tries)
        if said != "later":
            self._heard()
        match said:
            case "later":
                self._put_off = f"publishing to {message.topic} put off: {code_name(code)}"
                self._window.again(position, message, [message])
                self._hold_back()
            case "cut" if message.batch.number > 1:
                self._cut_in_flight(position, message)
            case "cut":
                self._learn_too_large(message.size)
                self._give_up(message, TOO_LARGE)
            case _:
                reason = f"publishing to {message.topic} refused: {code_name(code)}"
                self._tell_once(self.status, reason)
                if code in _OF_THE_TOPIC and self._loop is not None:
                    until = self._loop.time() + REFUSED_TOPIC
                    self._refused_topics[message.topic] = (until, reason)
                self._give_up(message, reason)

    def _learn_too_large(self, size: int) -> None:
        assert self._loop is not None
        now = self._loop.time()
        least, until = self._too_large
        self._too_large = (min(least, size) if now < until else size, now + REFUSED_SIZE)

    def _cut_in_flight(self, position: int, message: Message) -> None:
        assert self._loop is not None
        now = self._loop.time()
        self._size_limit.refused(message.size, now)
        pieces = message.cut(self._size_limit.now(now))
        self._window.again(position, message, pieces if len(pieces) > 1 else message.halve())

    def _suspect(self, connection: Connection) -> None:
        """The connection ended: perhaps over the only message that was in flight.

        A DISCONNECT that says why is the answer to that message, unless it is about something
        else. Without one it may be a broker that was restarted: the second time the message is
        cut, because small ones may get through, and an event by itself is given up after as many
        times as others.
        """
        if connection.closing_code in _OF_NO_MESSAGE:
            return
        self._suspicious = connection.closed_by_broker and len(self._window) > 0
        lone = self._window.lone() if connection.closed_by_broker else None
        if lone is None:
            return
        mid, position, message = lone
        message.closings += 1
        if connection.closing_code in _OF_THE_MESSAGE:
            self._window.pop(mid)
            self._refused(position, message, connection.closing_code)
        elif message.batch.number > 1 and message.closings > 1:
            self._window.pop(mid)
            self._cut_in_flight(position, message)
        elif message.closings >= MAX_TRIES:
            self._window.pop(mid)
            self._give_up(message, f"the broker closes the connection over it, {MAX_TRIES} times")

    def _hold_back(self) -> None:
        """Send nothing for a while, because the broker cannot take more."""
        if self._held_back is None and self._loop is not None:
            self._publish_failures += 1
            delay = retry_delay(self._publish_failures, QUOTA_FIRST, QUOTA_MOST)
            self._held_back = self._loop.call_later(delay, self._on_held_back)

    def _on_held_back(self) -> None:
        self._held_back = None
        self._pump()

    def _give_up(self, message: Message, reason: str) -> None:
        self._finish(message, reason)
        self._settle()

    def _finish(self, message: Message, reason: str) -> None:
        """Account for what will not be sent again: lost, unless an earlier copy was taken."""
        batch = message.batch
        if message.taken:
            self._delivered(batch.kinds, batch.held, batch.size)
        else:
            self._dropped(batch.kinds, batch.held, reason, batch.counted())

    def _tell_once(self, status: Status, reason: str) -> None:
        """Tell the owner about trouble that the status alone does not show, once per connection."""
        if reason in self._told:
            return
        self._told.add(reason)
        if status == self.status:
            self.listener.sink_status(self, status, reason)

    def _settle(self) -> None:
        if self._stopping.is_set() and not self._window and not self._outbox:
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
        self._take_back()
        for message in self._outbox.clear():
            self._finish(message, reason)
        self._drained.set()
        self._set_status("closed", reason)


async def _unheard(connection: Connection) -> str:
    """Why a connection is given up of which nothing was confirmed, though another can be made."""
    seconds = connection.unheard_seconds
    if seconds < UNHEARD_SECONDS or not await connection.another_can_be_made():
        return ""
    return f"connection lost: nothing of what was sent was confirmed within {seconds:.0f} s"
