"""Events in Kafka: one record per event, keyed by host, idempotent, acknowledged by all replicas.

All events of a topic go to the one partition that Kafka's default partitioner gives for the
host, so they arrive in the order in which they were submitted. A record batch is delivered
exactly once for as long as one producer lives: it numbers its batches and repeats them until
the broker has them. Only when the producer has to be replaced (the broker lost or refused its
numbers, or nothing is acknowledged although the bootstrap servers answer) are the
unacknowledged batches sent again by the next one, which can duplicate what was written and
not acknowledged. Such copies have the same `id`: a consumer that needs to can drop them.

A broker forgets the numbers of a producer whose newest record bears a time of more than a day
ago (`producer.id.expiration.ms`, 24 hours), whenever it was written. A broker that is killed
while it is sent events as old as that can therefore store the repetition as well.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Coroutine, Iterable
from functools import partial

from streamer.config.settings import KafkaSink as Settings
from streamer.events.batch import Batch
from streamer.privilege.files import DIRECT, Opener
from streamer.sinks.base import Sink
from streamer.sinks.kafka.client import (
    Client,
    Producer,
    Trouble,
    partition_of,
    silence_aiokafka,
    trouble_of,
)
from streamer.sinks.kafka.queue import Lane, Piece, Sent, split

STALL_SECONDS = 3.0
"""How long an ack may take before the bootstrap servers are asked whether they are there."""

PATIENCE_MOST = 600.0
"""The longest time without an ack, from servers that answer, before the producer is replaced."""

SETTLE_SECONDS = 2.0
"""How long a producer that is replaced may still be acknowledged what it has sent."""

RECORD_MOST = 1_000_000
"""The largest record, unless `batch_bytes` is more: Kafka's default limit is 1,048,588 bytes."""

_log = logging.getLogger(__name__)


def backoff(attempt: int, *, permanent: bool, luck: float) -> float:
    """Seconds before the attempt after `attempt` (from 0) failed ones; `luck` is from 0 to 1."""
    first, most = (5.0, 60.0) if permanent else (0.1, 5.0)
    return min(most, first * 2.0 ** min(attempt, 16)) * (0.5 + 0.5 * luck)


class _Session:
    """The life of one producer: the tasks that use it, and what ends it."""

    def __init__(self, client: Client, producer: Producer) -> None:
        self.client = client
        self.producer = producer
        self.unreachable_at = 0.0
        self._failed: asyncio.Future[tuple[str, Trouble]]
        self._failed = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, topic: str, work: Coroutine[None, None, None]) -> None:
        """Run `work` until the session ends; what it raises ends the session, as of `topic`."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, topic))

    def fail(self, topic: str, trouble: Trouble) -> None:
        """End the session; the first trouble is the one that counts."""
        if not self._failed.done():
            self._failed.set_result((topic, trouble))

    async def failure(self) -> tuple[str, Trouble]:
        """Wait until it ends: the topic, and its trouble."""
        return await self._failed

    async def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, topic: str, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        if not isinstance(error, Trouble):
            _log.error("the Kafka sink starts again after an error", exc_info=error)
        self.fail(topic, trouble_of(error))


class KafkaSink(Sink):
    """Delivers to Kafka, in record batches of about `batch_bytes`. See the module."""

    def __init__(self, settings: Settings, *, host: str, opener: Opener = DIRECT) -> None:
        """`host` is the key of every record; `opener` opens certificates and secrets."""
        scheme = "kafkas" if settings.tls else "kafka"
        name = f"{scheme}://{','.join(settings.bootstrap)}/{settings.topic}"
        super().__init__(name, settings.budget_bytes)
        self._settings = settings
        self._opener = opener
        self._key = host.encode()
        self._record_most = max(RECORD_MOST, settings.batch_bytes)
        self._lanes: dict[str, Lane] = {}
        self._session: _Session | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._empty = asyncio.Event()
        self._problems: dict[str, Trouble] = {}
        self._failures = 0
        self._patience = settings.request_timeout_seconds

    async def start(self) -> None:
        """Connect in the background, and go on trying for as long as it takes.

        Raises:
            ConfigError: an address, topic, certificate or password that cannot be used.
        """
        client = Client(self._settings, self._opener)
        silence_aiokafka()
        self._supervisor = asyncio.create_task(self._run(client))
        self._supervisor.add_done_callback(self._supervised)

    def submit(self, batch: Batch) -> None:
        """Encode and queue. Records over the size limit are dropped, and counted, at once."""
        for topic, part in self._topics(batch):
            piece = Piece.of(part, self._settings.encoding)
            self._take(piece.kinds, piece.size)
            if self.status == "closed":
                self._dropped(piece.kinds, piece.size, "closed")
            else:
                self._enqueue(self._lane(topic), piece)

    async def stop(self, grace: float) -> None:
        """Flush for up to `grace` seconds, drop the rest, and release everything.

        What is dropped here while it was being sent may have been written all the same.
        """
        try:
            if self._supervisor is not None and not self._supervisor.done():
                await self._flush(grace)
        finally:
            try:
                await self._end_supervisor()
            finally:
                self._drop_rest(f"not acknowledged within {grace:g} s")
                self._set_status("closed")

    # Taking in

    def _topics(self, batch: Batch) -> Iterable[tuple[str, Batch]]:
        topic = self._settings.topic
        if "{category}" not in topic:
            return ((topic, batch),) if batch.events else ()
        return (
            (topic.replace("{category}", category), part)
            for category, part in batch.by_category().items()
        )

    def _lane(self, topic: str) -> Lane:
        lane = self._lanes.get(topic)
        if lane is None:
            linger = self._settings.linger_ms / 1000
            lane = self._lanes[topic] = Lane(topic, self._settings.batch_bytes, linger)
            if self._session is not None:
                self._session.spawn(topic, self._publish(lane, self._session))
        return lane

    def _enqueue(self, lane: Lane, piece: Piece) -> None:
        for part in split(piece, lane.most):
            if part.size > self._record_most and part.number == 1:
                self._dropped(part.kinds, part.size, "a record is larger than the limit")
            else:
                lane.put(part)

    # Delivering

    async def _run(self, client: Client) -> None:
        while True:
            producer = await self._connect(client)
            try:
                topic, trouble = await self._serve(client, producer)
                await self._settle()
            finally:
                await producer.abandon()
                for lane in self._lanes.values():
                    lane.rewind()
            if not trouble.too_large:
                self._problem(topic, trouble)
                await self._pause(trouble)

    def _supervised(self, supervisor: asyncio.Task[None]) -> None:
        error = None if supervisor.cancelled() else supervisor.exception()
        if error is not None:
            _log.error("the Kafka sink cannot go on after an error", exc_info=error)
            reason = trouble_of(error).reason
            self._drop_rest(reason)
            self._set_status("closed", reason)

    async def _connect(self, client: Client) -> Producer:
        while True:
            try:
                producer = await client.open()
            except Trouble as trouble:
                self._problem("", trouble)
                await self._pause(trouble)
            else:
                self._mended("")
                return producer

    async def _pause(self, trouble: Trouble) -> None:
        seconds = backoff(self._failures, permanent=trouble.permanent, luck=random.random())
        self._failures += 1
        await asyncio.sleep(seconds)

    async def _serve(self, client: Client, producer: Producer) -> tuple[str, Trouble]:
        session = self._session = _Session(client, producer)
        session.spawn("", self._watch(session))
        for lane in self._lanes.values():
            session.spawn(lane.topic, self._publish(lane, session))
        try:
            return await session.failure()
        finally:
            self._session = None
            await session.cancel()

    async def _publish(self, lane: Lane, session: _Session) -> None:
        """Send the record batches of one topic, each when the one before is on its way."""
        producer = session.producer
        while True:
            sent = await lane.take()
            partition = partition_of(self._key, await self._partitions(lane, session))
            batch = producer.build(sent.pieces, self._key)
            future = await producer.send(batch, lane.topic, partition)
            sent.future, sent.since = future, asyncio.get_running_loop().time()
            future.add_done_callback(partial(self._answered, lane, sent, session))

    async def _partitions(self, lane: Lane, session: _Session) -> int:
        """How many partitions the topic has, once it exists and may be written to."""
        attempt = 0
        while True:
            try:
                count = await session.producer.partitions(lane.topic)
            except Trouble as trouble:
                await self._probe_before(session, lane.topic, trouble)
                wait = backoff(attempt, permanent=trouble.permanent, luck=random.random())
                await asyncio.sleep(wait)
                attempt += 1
            else:
                if attempt:
                    self._mended("", lane.topic)
                return count

    async def _probe_before(self, session: _Session, topic: str, trouble: Trouble) -> None:
        """Blame the topic only when the brokers are there."""
        try:
            await session.client.probe()
        except Trouble as absent:
            self._problem("", absent)
        else:
            self._problem(topic, trouble)

    def _answered(
        self, lane: Lane, sent: Sent, session: _Session, future: asyncio.Future[object]
    ) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is not None:
            self._refused(lane, sent, session, trouble_of(error, f"topic {lane.topic}"))
        elif lane.acknowledge(sent, asyncio.get_running_loop().time()):
            for piece in sent.pieces:
                self._delivered(piece.kinds, piece.size)
            self._failures = 0
            self._patience = self._settings.request_timeout_seconds
            self._mended("", lane.topic)
            self._check_empty()

    def _refused(self, lane: Lane, sent: Sent, session: _Session, trouble: Trouble) -> None:
        # The producer has counted the refused batch, so the broker would refuse all that follow.
        if trouble.too_large and sent.single and lane.acknowledge(sent, 0.0):
            (piece,) = sent.pieces
            self._dropped(piece.kinds, piece.size, "the broker refused a record as too large")
            self._check_empty()
        elif trouble.too_large:
            lane.shrink(sent.size // 2)
        session.fail(lane.topic, trouble)

    async def _settle(self) -> None:
        """Let other topics have their acks before the producer goes: they need no replay then."""
        futures = {s.future for lane in self._lanes.values() for s in lane.window if s.future}
        if futures:
            await asyncio.wait(futures, timeout=SETTLE_SECONDS)
            await asyncio.sleep(0)  # their callbacks

    # Watching

    async def _watch(self, session: _Session) -> None:
        """Ask the bootstrap servers when an ack is late: aiokafka tells nobody that it waits."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(STALL_SECONDS / 2)
            owed = self._longest_owed()
            if owed is None or loop.time() - owed[0] < STALL_SECONDS:
                continue
            try:
                await session.client.probe()
            except Trouble as trouble:
                session.unreachable_at = loop.time()
                self._problem("", trouble)
                continue
            since, topic = self._longest_owed() or (loop.time(), "")
            waited = loop.time() - max(since, session.unreachable_at)
            if waited > self._patience:
                self._patience = min(PATIENCE_MOST, 2 * self._patience)
                # The producer never asks the bootstrap servers again: a new one does.
                reason = f"topic {topic}: the brokers answer, but nothing was acknowledged"
                session.fail(topic, Trouble(f"{reason} for {waited:.0f} s"))

    def _longest_owed(self) -> tuple[float, str] | None:
        owed = ((lane.stalled_since(), lane.topic) for lane in self._lanes.values())
        return min(((since, topic) for since, topic in owed if since is not None), default=None)

    def _problem(self, where: str, trouble: Trouble) -> None:
        """Note what keeps a topic, or all of them (""), from being delivered.

        The status is reported when it changes, and again when the reason becomes one that
        waiting does not mend.
        """
        before = self._problems.get(where)
        self._problems[where] = trouble
        if self.status != "down":
            self._set_status("down", trouble.reason)
        elif trouble.permanent and (before is None or before.reason != trouble.reason):
            self.listener.sink_status(self, "down", trouble.reason)

    def _mended(self, *wheres: str) -> None:
        for where in wheres:
            self._problems.pop(where, None)
        if not self._problems:
            self._set_status("up")

    # Stopping

    async def _flush(self, grace: float) -> None:
        for lane in self._lanes.values():
            lane.flush()
        self._empty.clear()
        self._check_empty()
        try:
            async with asyncio.timeout(grace):
                await self._empty.wait()
        except TimeoutError:
            pass

    def _check_empty(self) -> None:
        if not any(self._lanes.values()):
            self._empty.set()

    async def _end_supervisor(self) -> None:
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)

    def _drop_rest(self, reason: str) -> None:
        pieces = [piece for lane in self._lanes.values() for piece in lane.clear()]
        kinds: Counter[str] = Counter()
        for piece in pieces:
            kinds.update(piece.kinds)
        if pieces:
            self._dropped(kinds, sum(piece.size for piece in pieces), reason)
