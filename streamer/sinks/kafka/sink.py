"""Events in Kafka: one record per event, keyed by host, idempotent, acknowledged by all replicas.

All events of a topic go to the one partition that Kafka's default partitioner gives for the
host, so they arrive in the order in which they were submitted. Up to five record batches of a
topic are under way at once. Each is written exactly once for as long as the broker knows the
producer's numbers: they are repeated until the broker has them (`window.py`). Only when it does
not know them are the unacknowledged batches sent under new ones, which can duplicate what was
written and not acknowledged. Such copies have the same `id`: a consumer that needs to can drop
them.

A broker forgets the numbers of a producer whose newest record bears a time of more than a day
ago (`producer.id.expiration.ms`, 24 hours), whenever it was written, and would then store a
repetition as well. So records of events older than half of that bear the time of their sending
(`encoded.sendable`); and so do those whose times the broker refuses.

Each topic has its own queue, window and task, and its trouble is its own: where others go on, it
holds no more than its share of the budget, and what comes on top is dropped with the reason.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import time
from collections.abc import Awaitable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from streamer.config.settings import KafkaSink as Settings
from streamer.events.batch import Batch
from streamer.privilege.files import DIRECT, Opener
from streamer.sinks.base import Sink
from streamer.sinks.batching import SizeLimit, TopicQueue
from streamer.sinks.encoded import EncodedBatch, Extent, counted, held_of, kinds_of
from streamer.sinks.kafka.client import (
    LEADER_SECONDS,
    Client,
    Connection,
    Leader,
    silence_aiokafka,
)
from streamer.sinks.kafka.codecs import CODECS
from streamer.sinks.kafka.encoded import encode, sendable
from streamer.sinks.kafka.errors import (
    NETWORK,
    TIMED_OUT,
    TOO_LARGE,
    DeliveryError,
    Verdict,
    delivery_error_of,
    verdict_of,
)
from streamer.sinks.kafka.record_batch import Payload, compress, lay_out, record_batch
from streamer.sinks.kafka.window import Answer, Numbered, Outcome, Window, backoff
from streamer.sinks.silence import LOOK_SECONDS, Silence
from streamer.sinks.sockets import REPLACE_SECONDS, UNHEARD_SECONDS

STALL_SECONDS = 3.0
"""How long an ack may take before the brokers are asked whether they are there."""

METADATA_SECONDS = 300.0
"""How often the brokers are asked who leads, also when nothing fails."""

RECORD_MOST = 1_000_000
"""The largest record, unless `batch_bytes` is more: Kafka's default limit is 1,048,588 bytes."""

GROWTH = 4
"""With a backlog, a record batch has up to so many times `batch_bytes`."""

SHARES = 8
"""A topic in trouble holds at most one of so many parts of the budget.

There are four categories: with three of them in trouble the budget is less than half full, which
is when reading goes on.
"""

THREAD_BYTES = 64 << 10
"""Records from this size on are compressed in a thread: a smaller batch is done in that time."""

FIRST_RATIO = 4.0
"""What the first record batch is taken to shrink by."""

_log = logging.getLogger(__name__)


class _Topic:
    """All that is known of one topic, and what is held for it."""

    def __init__(self, name: str, settings: Settings, record_most: int) -> None:
        """Nothing is held, and nobody has been asked about the topic."""
        self.name = name
        self.queue = TopicQueue(Extent(settings.batch_bytes), settings.linger_ms / 1000, GROWTH)
        self.window = Window(random.random)
        self.silence = Silence()
        self.limit = SizeLimit(record_most)
        self.ratio = FIRST_RATIO if settings.compression != "none" else 1.0
        self.woken = asyncio.Event()
        self.connection: Connection | None = None
        self.partition: int | None = None
        self.stale = True
        self.failing_since: float | None = None
        self.error: DeliveryError | None = None
        self.error_at = 0.0
        self.acked_at = float("-inf")
        self.held = 0
        self.payloads = 0

    def __bool__(self) -> bool:
        """Whether anything is held."""
        return bool(self.queue or self.window)

    def oldest(self) -> Iterator[int]:
        """Tickets, of which the least is the oldest that is held."""
        if (first := self.queue.first) is not None:
            yield first.ticket
        for entry in self.window.entries:
            yield from (batch.ticket for batch in entry.batches)

    @property
    def begun(self) -> int | None:
        """The partition where what goes next was sent before, and may be written already."""
        following = self.window.next()
        return self.partition if following is not None and following.tries else None


class KafkaSink(Sink):
    """Delivers to Kafka, in record batches of about `batch_bytes`. See the module."""

    def __init__(self, settings: Settings, *, host: str, opener: Opener = DIRECT) -> None:
        """`host` is the key of every record; `opener` opens certificates and secrets."""
        super().__init__(settings.name, settings.budget)
        self._settings = settings
        self._opener = opener
        self._key = host.encode()
        self._codec = CODECS[settings.compression]
        self._record_most = max(RECORD_MOST, settings.batch_bytes)
        self._share = settings.budget // SHARES
        self._topics: dict[str, _Topic] = {}
        self._client: Client | None = None
        self._compressor: ThreadPoolExecutor | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        self._problems: dict[str, DeliveryError] = {}

    async def start(self) -> None:
        """Connect in the background, and go on trying for as long as it takes.

        Raises:
            ConfigError: an address, topic, certificate or password that cannot be used.
        """
        client = self._client = Client(self._settings, self._opener)
        silence_aiokafka()
        if len(os.sched_getaffinity(0)) > 1:
            # One thread: batches of a topic are compressed in order, and the lock is let go.
            self._compressor = ThreadPoolExecutor(1, "kafka-compress")
        self._spawn(self._connect(client))
        self._spawn(self._watch(client))
        self._spawn(self._watch_connections(client))
        self._spawn(self._watch_leaders(client))
        self._spawn(self._watch_silence(client))
        for topic in self._topics.values():
            self._spawn(self._deliver(topic, client))

    def submit(self, batch: Batch) -> None:
        """Encode and queue. Records over the size limit are dropped, and counted, at once."""
        for name, part in self._parts(batch):
            encoded = encode(part, self._settings.encoding, self.ticket)
            self._take(encoded.kinds, encoded.held)
            if self.status == "closed":
                self._dropped(encoded.kinds, encoded.held, "closed", encoded.counted())
            else:
                self._enqueue(self._topic(name), encoded)

    def discard(self, reason: str) -> None:
        """Drop what was never sent."""
        for topic in self._topics.values():
            batches = topic.window.clear_unsent() + topic.queue.clear()
            self._count_payloads(topic)
            self._drop(topic, batches, self._with_error(topic, reason))

    @property
    def reachable(self) -> bool:
        """See `Sink`."""
        return self.status == "up" or (self.status == "down" and not self._problems)

    def oldest(self) -> int | None:
        """See `Sink`."""
        held = (first for topic in self._topics.values() for first in topic.oldest())
        return min(held, default=None)

    async def stop(self, grace: float) -> None:
        """Flush for up to `grace` seconds, drop the rest, and release everything.

        What is dropped here while it was being sent may have been written all the same.
        """
        try:
            if self._tasks:
                await self._flush(grace)
        finally:
            try:
                await _to_the_end(self._release_all())
            finally:
                self._drop_rest(f"not acknowledged within {grace:g} s")
                self._set_status("closed")

    # Taking in

    def _parts(self, batch: Batch) -> Iterable[tuple[str, Batch]]:
        topic = self._settings.topic
        if "{category}" not in topic:
            return ((topic, batch),) if batch.events else ()
        return (
            (topic.replace("{category}", category), part)
            for category, part in batch.by_category().items()
        )

    def _topic(self, name: str) -> _Topic:
        topic = self._topics.get(name)
        if topic is None:
            topic = self._topics[name] = _Topic(name, self._settings, self._record_most)
            if self._client is not None:
                self._spawn(self._deliver(topic, self._client))
        return topic

    def _enqueue(self, topic: _Topic, encoded: EncodedBatch) -> None:
        topic.held += encoded.held
        now = asyncio.get_running_loop().time()
        was_empty = not topic.queue
        for part in encoded.cut(Extent(self._record_most)):
            if part.size > self._record_most and part.number == 1:
                self._drop(topic, [part], "a record is larger than the limit")
            else:
                topic.queue.put(part, now)
        self._keep_to_share(topic)
        due = topic.queue.due_at()
        if was_empty or (due is not None and due <= now):
            topic.woken.set()

    def _keep_to_share(self, topic: _Topic) -> None:
        """Drop the newest that a topic in trouble holds over its share, if the others go on.

        The only topic keeps the budget for itself.
        """
        error = self._problems.get(topic.name)
        if error is None or topic.held <= self._share or "{category}" not in self._settings.topic:
            return
        since = topic.failing_since or 0.0
        if error.own or any(other.acked_at > since for other in self._topics.values()):
            self._drop(topic, topic.queue.trim(self._share), error.reason)

    # Delivering

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        _keep(self._tasks, asyncio.ensure_future(work))

    async def _connect(self, client: Client) -> None:
        """Find a broker and a producer id, so that what is wrong is known before an event."""
        loop = asyncio.get_running_loop()
        attempt, there_since = 0, math.inf
        while True:
            try:
                await client.refresh()
                there_since = min(there_since, loop.time())
                await client.producer_id(None)
            except DeliveryError as error:
                if not error.grace:  # it is away: the next one may load for as long
                    there_since = math.inf
                if not error.grace or loop.time() - there_since >= error.grace:
                    self._problem("", error)
                wait = backoff(attempt, permanent=error.permanent, jitter=random.random())
                await asyncio.sleep(wait)
                attempt += 1
            else:
                self._mended("")
                return

    async def _deliver(self, topic: _Topic, client: Client) -> None:
        """Send what is due of one topic, for as long as the sink lives."""
        loop = asyncio.get_running_loop()
        while True:
            topic.woken.clear()
            try:
                until = await self._step(topic, client)
            except Exception as error:
                if not isinstance(error, DeliveryError):
                    _log.error("topic %s: it is tried again after an error", topic.name,
                               exc_info=error)  # fmt: skip
                until = self._failed(topic, delivery_error_of(error, f"topic {topic.name}"))
            if until is None or until > loop.time():
                await _wait(topic.woken, until)

    async def _step(self, topic: _Topic, client: Client) -> float | None:
        """Send one record batch, if one is due. When to look again; None: when woken."""
        window, loop = topic.window, asyncio.get_running_loop()
        now = loop.time()
        if not window.may_send(now):
            return window.retry_at if now < window.retry_at else None
        if window.next() is None:
            due = topic.queue.due_at()
            if due is None or due > now:
                return due
        # Numbered only when there is where to send it: the rest can be cut, joined or dropped.
        connection = await self._place(topic, client)
        if connection is None:
            return None
        entry = window.next()
        if entry is None:
            if not topic.queue:
                return None
            window.add(topic.queue.take(self._most(topic, now), now))
            return now
        if entry.payload is None:
            entry.payload = await self._compress(entry)
            topic.ratio = max(1.0, entry.size / entry.payload.size)
            self._count_payloads(topic)
        now = loop.time()
        if window.next() is not entry or not window.may_send(now):
            return now
        if entry.count > 1 and entry.payload.size > topic.limit.now(now):
            window.split(entry)
            self._count_payloads(topic)
            return now
        self._send(topic, entry, client, connection)
        return now

    def _most(self, topic: _Topic, now: float) -> int:
        """How many bytes of records go into a record batch: about what the limit lets through."""
        through = int(topic.limit.now(now) * topic.ratio * 0.8)
        return max(1, min(through, self._share))

    async def _place(self, topic: _Topic, client: Client) -> Connection | None:
        """Where to send; None while what is under way elsewhere has to be answered first.

        Raises:
            DeliveryError: there is no such place at the moment.
        """
        window = topic.window
        leader = None if topic.stale else client.leader(topic.name, self._key, topic.begun)
        if leader is None:
            leader = await self._find_leader(topic, client)
        connection = await self._to_leader(leader, topic, client)
        if window.in_flight and (connection, leader.partition) != (
            topic.connection,
            topic.partition,
        ):
            return None
        if topic.partition not in (None, leader.partition):
            window.move()
        topic.connection, topic.partition = connection, leader.partition
        if window.producer_id is None:
            if window.in_flight:
                return None
            window.identify(await client.producer_id(window.last_producer_id))
        return connection

    async def _find_leader(self, topic: _Topic, client: Client) -> Leader:
        try:
            await client.refresh(topic.name)
        except DeliveryError as error:
            self._problem("", error)
            raise
        if "" in self._problems:  # what lasts longer than it should begins only now
            topic.failing_since = None
        self._mended("")
        leader = client.leader(topic.name, self._key, topic.begun)
        if leader is None:
            reason = f"topic {topic.name}: the brokers say nothing about it"
            raise DeliveryError(reason, grace=LEADER_SECONDS)
        topic.stale = False
        return leader

    async def _to_leader(self, leader: Leader, topic: _Topic, client: Client) -> Connection:
        try:
            return await client.connection(leader.address)
        except DeliveryError as error:
            # Another may lead soon, or this one be elsewhere; but it may be a mistake, too.
            topic.stale = True
            reason = f"broker {leader.node}, as the cluster names it, {error.reason}"
            raise DeliveryError(reason, grace=LEADER_SECONDS) from None

    async def _compress(self, entry: Numbered) -> Payload:
        now_ns = time.time_ns()
        pieces = [sendable(batch, now_ns, as_now=entry.as_now) for batch in entry.batches]
        laid = lay_out(pieces, self._key)
        if self._compressor is None or len(laid[0]) < THREAD_BYTES:
            return compress(laid, self._codec)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._compressor, compress, laid, self._codec)

    def _send(self, topic: _Topic, entry: Numbered, client: Client, connection: Connection) -> None:
        window = topic.window
        assert entry.payload is not None
        assert window.producer_id is not None
        assert topic.partition is not None
        numbers = (window.producer_id, window.epoch, entry.sequence)
        batch = record_batch(entry.payload, numbers)
        try:
            sending = client.produce(connection, topic.name, topic.partition, batch)
        except Exception as error:  # it was closed in this moment
            topic.stale = True
            raise DeliveryError(delivery_error_of(error).reason, grace=LEADER_SECONDS) from None
        now = asyncio.get_running_loop().time()
        window.sent(entry, now)
        topic.silence.sent(now)
        answering = client.produced(sending, connection, topic.name, topic.partition)
        work = self._await_answer(topic, entry, answering)
        _keep(self._answers, asyncio.ensure_future(work))

    async def _await_answer(
        self, topic: _Topic, entry: Numbered, answering: Awaitable[Answer]
    ) -> None:
        answer = await answering
        now = asyncio.get_running_loop().time()
        size = entry.payload.size if entry.payload is not None else 0
        outcome = topic.window.answered(entry, answer, now)
        self._account_for(topic, outcome, now)
        if answer.code in TOO_LARGE and entry.count > 1 and outcome.divided:
            topic.limit.refused(size, now)
        topic.woken.set()

    def _account_for(self, topic: _Topic, outcome: Outcome, now: float) -> None:
        topic.stale = topic.stale or outcome.elsewhere
        if outcome.anew:
            self.listener.sink_anew(self)
        if outcome.delivered or outcome.dropped or outcome.divided:
            # What is behind it, the broker may have asked not to be sent for a while.
            waits = max(now, topic.window.retry_at) if topic.window else None
            topic.silence.answered(now, waits)
            self._mended()
        if outcome.delivered:
            topic.acked_at = now
            for batch in outcome.delivered:
                topic.held -= batch.held
                self._delivered(batch.kinds, batch.held, batch.size)
            topic.failing_since = topic.error = None
            self._mended("", topic.name)
            for name in list(self._problems):
                if name:
                    self._keep_to_share(self._topics[name])
        for batch, reason in outcome.dropped:
            self._drop(topic, [batch], reason)
        self._count_payloads(topic)
        if outcome.failed is not None:
            self._note(topic, _error_of(topic, outcome.failed))
        self._check_empty()

    def _count_payloads(self, topic: _Topic) -> None:
        """Count what is compressed against the budget, beside what it was made from."""
        size = sum(entry.payload.size for entry in topic.window.entries if entry.payload)
        more, topic.payloads = size - topic.payloads, size
        if more > 0:
            self._take({}, more)
        elif more < 0:
            self._release(-more)

    def _drop(self, topic: _Topic, batches: list[EncodedBatch], reason: str) -> None:
        if not batches:
            return
        held = held_of(batches)
        topic.held -= held
        self._dropped(kinds_of(batches), held, reason, counted(batches))
        self._check_empty()

    def _with_error(self, topic: _Topic, reason: str) -> str:
        """A reason together with what keeps the topic from being written to."""
        error = self._problems.get("") or topic.error
        return f"{reason}: {error.reason}" if error and error.reason not in reason else reason

    # Trouble

    def _failed(self, topic: _Topic, error: DeliveryError) -> float:
        """Note that a topic could not be sent to; when to try again."""
        now = asyncio.get_running_loop().time()
        topic.stale = True
        topic.window.fail(error.permanent, now)
        self._note(topic, error)
        return topic.window.retry_at

    def _note(self, topic: _Topic, error: DeliveryError) -> None:
        now = asyncio.get_running_loop().time()
        if topic.failing_since is None:
            topic.failing_since = now
        topic.error, topic.error_at = error, now
        lasted = now - topic.failing_since
        if "" not in self._problems and (error.permanent or lasted >= error.grace):
            self._problem(topic.name, error)
            self._keep_to_share(topic)

    def _problem(self, where: str, error: DeliveryError) -> None:
        """Note what keeps a topic, or all of them (""), from being delivered.

        The status is reported when it changes, and again when the reason becomes one that
        waiting does not mend.
        """
        before = self._problems.get(where)
        self._problems[where] = error
        if self.status != "down":
            self._set_down(error)
        elif self._unexplained and not error.vague:
            self._explain(error.reason)
        elif error.permanent and (before is None or before.reason != error.reason):
            self.listener.sink_status(self, "down", error.reason)

    def _mended(self, *wheres: str) -> None:
        for where in wheres:
            self._problems.pop(where, None)
        if not self._problems and self._silent() is None:
            self._set_status("up")

    def _set_down(self, error: DeliveryError) -> None:
        if error.vague:
            self._set_silent(error.reason)
        self._set_status("down", error.reason)

    def _silent(self) -> _Topic | None:
        """A topic of which nothing is acknowledged, though it is sent."""
        now = asyncio.get_running_loop().time()
        return next((one for one in self._topics.values() if one.silence.lasts(now)), None)

    async def _watch_silence(self, client: Client) -> None:
        """Say that nothing is acknowledged. It costs no event: the topic keeps what it holds."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            topic = self._silent()
            if topic is None or self.status != "up":
                continue
            error, since = topic.error, topic.silence.since or 0.0
            if error is not None and not error.vague and topic.error_at >= since:
                self._set_status("down", error.reason)
                continue
            lacking = await self._lacking(topic, client)
            if topic.silence.lasts(loop.time()):
                reason = f"topic {topic.name}: {topic.silence.reason(loop.time())}"
                self._set_silent(f"{reason}; {lacking}" if lacking else reason)

    async def _lacking(self, topic: _Topic, client: Client) -> str:
        """What its leader says of the replicas, in words, while it acknowledges nothing."""
        try:
            leader = client.leader(topic.name, self._key, topic.partition)
        except DeliveryError:
            return ""
        return await client.lacking(leader, topic.name, REPLACE_SECONDS) if leader else ""

    async def _watch(self, client: Client) -> None:
        """Ask whether brokers are there when an answer is late, and now and then who leads."""
        loop = asyncio.get_running_loop()
        asked_at = loop.time()
        while True:
            await asyncio.sleep(STALL_SECONDS / 2)
            sent = [topic.window.oldest_sent() for topic in self._topics.values()]
            oldest = min((at for at in sent if at is not None), default=loop.time())
            try:
                if loop.time() - oldest >= STALL_SECONDS:
                    await client.probe()
                elif loop.time() - asked_at >= METADATA_SECONDS:
                    asked_at = loop.time()
                    await client.refresh()
                else:
                    continue
            except DeliveryError as error:
                self._problem("", error)
            else:
                self._mended("")

    async def _watch_connections(self, client: Client) -> None:
        """Look for connections that nothing comes through, beside `_watch`, which may wait."""
        while True:
            await asyncio.sleep(UNHEARD_SECONDS / 4)
            await client.replace_unheard(UNHEARD_SECONDS)

    async def _watch_leaders(self, client: Client) -> None:
        """Look for those that cannot be replaced, of brokers that lead nothing any more.

        By itself: where nobody answers, asking takes long.
        """
        while True:
            await asyncio.sleep(UNHEARD_SECONDS / 2)
            await client.leave_unheard(UNHEARD_SECONDS)

    # Stopping

    async def _flush(self, grace: float) -> None:
        for topic in self._topics.values():
            topic.queue.linger = 0.0
            topic.woken.set()
        self._empty.clear()
        self._check_empty()
        try:
            async with asyncio.timeout(grace):
                await self._empty.wait()
        except TimeoutError:
            pass

    def _check_empty(self) -> None:
        if not any(self._topics.values()):
            self._empty.set()

    async def _release_all(self) -> None:
        # First those that send: whoever is to wait for an answer has then begun to.
        for tasks in (self._tasks, self._answers):
            for task in tuple(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        client, self._client = self._client, None
        if client is not None:
            await client.close()
        if self._compressor is not None:
            self._compressor.shutdown(wait=False, cancel_futures=True)

    def _drop_rest(self, reason: str) -> None:
        for topic in self._topics.values():
            batches = topic.window.clear() + topic.queue.clear()
            self._count_payloads(topic)
            self._drop(topic, batches, self._with_error(topic, reason))


def _keep(tasks: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
    """Keep a task until it is done: the loop itself does not."""
    tasks.add(task)
    task.add_done_callback(tasks.discard)


async def _to_the_end(work: Coroutine[None, None, None]) -> None:
    """Wait for short work, also when cancelled meanwhile, and be cancelled after it."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


async def _wait(woken: asyncio.Event, until: float | None) -> None:
    try:
        async with asyncio.timeout_at(until):
            await woken.wait()
    except TimeoutError:
        pass


def _error_of(topic: _Topic, answer: Answer) -> DeliveryError:
    """What keeps a topic from being written to, after a broker's answer."""
    if verdict_of(answer.code) is Verdict.DENIED:
        return DeliveryError(f"topic {topic.name}: {answer.reason}", permanent=True, own=True)
    vague = answer.code in (TIMED_OUT, NETWORK)
    return DeliveryError(f"topic {topic.name}: {answer.reason}", grace=STALL_SECONDS, vague=vague)
