"""A further worker: a process that reads some of the ring buffers for bulk, and publishes.

The first worker starts it before privileges are given up, has the run's only voice, and is told
everything: how far this one has come, and each loss. See docs/adr/0025-further-workers.md.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import mmap
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from streamer.agent.counters import KernelCounters
from streamer.agent.crew_messages import (
    Begin,
    Done,
    End,
    Failed,
    FromWorker,
    LogFrom,
    Progress,
    Ready,
    Said,
    Seen,
    SinkProgress,
    Watched,
    brief,
    gone,
    marks_of,
    packed,
    reads_of,
    to_worker,
)
from streamer.agent.fanout import Fanout, Policy
from streamer.agent.loop import run_loop
from streamer.agent.losses import LossBook, Lost
from streamer.agent.ring_account import Marks, RingAccount
from streamer.config.settings import Settings
from streamer.errors import KernelError, SinkError, StreamerError
from streamer.events.batch import Batch
from streamer.events.envelope import Envelope
from streamer.events.stream import StreamLoss
from streamer.events.timing import Timing
from streamer.kernel.loader import Transport
from streamer.kernel.objects import KIND_END
from streamer.kernel.state import size_of
from streamer.operation.activity import Watch
from streamer.privilege.channel import Channel, MessageError
from streamer.ring.reader import RingReader, open_sources
from streamer.sinks.base import Sink
from streamer.terminal.log import traceback_of

TICK_SECONDS = 0.25
"""How often the first worker is told how far this one has come."""
_TICKS_OF_A_SECOND = round(1 / TICK_SECONDS)
_DELIVERING = 0.75
"""Of the grace period, as in `service.py`."""
_MOST_MARKS = 256
_MOST_SAID = 100
"""Lines of the log that wait."""
_IGNORED = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE),
)
_PR_SET_NAME = 15

_log = logging.getLogger("streamer")


class Maps(msgspec.Struct):
    """Maps of the kernel that a worker looks at."""

    counters: mmap.mmap
    kind_counters: mmap.mmap
    reader: mmap.mmap

    @classmethod
    def of(cls, descriptors: Sequence[int], cpus: int) -> Maps:
        """Mapped. Raises OSError, ValueError."""
        counters, kind_counters, reader = descriptors
        return cls(
            mmap.mmap(counters, size_of("cpu_counters") * cpus, prot=mmap.PROT_READ),
            mmap.mmap(
                kind_counters, size_of("kind_counters") * cpus * KIND_END, prot=mmap.PROT_READ
            ),
            mmap.mmap(reader, size_of("reader_state")),
        )


class _Fanout(Fanout):
    """Notes what sinks give up, for the first worker, which tells it in the stream."""

    def __init__(
        self,
        sinks: Sequence[tuple[Sink, Policy]],
        reader: RingReader,
        closed: Callable[[], None],
    ) -> None:
        super().__init__(
            sinks, pause=reader.pause, resume=reader.resume, closed=closed, loss_record=_nobody
        )
        self.given_up = [LossBook() for _ in sinks]

    def note_dropped(self, sink: Sink, lost: Lost) -> None:
        self.given_up[self.sinks.index(sink)].add(lost)


def _nobody(lost: Lost, sink: Sink) -> StreamLoss:
    raise AssertionError(f"{sink.name} is owed {lost}, which the first worker tells")


class Worker:
    """Reads, publishes, and says so."""

    def __init__(
        self,
        settings: Settings,
        begin: Begin,
        descriptors: Sequence[int],
        sinks: Sequence[tuple[Sink, Policy]],
        channel: Channel,
        timing: Timing | None,
    ) -> None:
        """`descriptors` as `Begin` says. Raises OSError: one of them cannot be mapped."""
        envelope = Envelope(
            settings.host,
            rfc3339_time=settings.rfc3339_time,
            timing=timing,
            hidden_names=settings.kernel.dns_redact,
            run=begin.run_id,
        )
        rings = dict(zip(begin.rings, descriptors, strict=False))
        maps = Maps.of(descriptors[len(rings) :], begin.cpus)
        transport = Transport("ring", begin.sizes, bulk_shift=begin.bulk_shift)
        self._reader = RingReader(
            open_sources(transport, rings, {}, envelope, begin.cpus),
            maps.reader,
            on_batch=self._on_batch,
            on_error=self._on_error,
            poll_interval_ms=settings.poll_interval_ms,
            sleeps=timing is None,
            drain_records=settings.rings.drain_records,
        )
        self._account = RingAccount(
            self._reader, KernelCounters(maps.counters, maps.kind_counters, begin.cpus)
        )
        self._fanout = _Fanout(sinks, self._reader, self._deserted)
        self._channel = channel
        self._outbox: deque[FromWorker] = deque()
        self._lost = LossBook()
        self._cpus = sorted({cpu for source in self._reader.sources for cpu in source.cpus})
        self._cells: dict[tuple[int, str], int] = {}
        self._watch = Watch()
        self._ticks = 0
        self._complete: deque[tuple[int, Marks]] = deque()
        self._ended = asyncio.Event()
        self._grace = settings.grace_seconds
        self._failed = False

    def say(self, level: int, text: str) -> None:
        """Have the first worker log a line."""
        if len(self._outbox) < _MOST_SAID:
            self._outbox.append(Said(level, brief(text)))

    async def run(self) -> None:
        """Until the first worker says that it is the end, or has gone."""
        loop = asyncio.get_running_loop()
        self._channel.settimeout(0)
        loop.add_reader(self._channel.fileno(), self._hear)
        for sink in self._fanout.sinks:
            try:
                await sink.start()
            except StreamerError as error:
                self._fail(error)
        self._outbox.append(Ready())
        self._tick()
        self._reader.start()
        while not self._ended.is_set():
            try:
                await asyncio.wait_for(self._ended.wait(), TICK_SECONDS)
            except TimeoutError:
                self._tick()
        await self._finish()

    def _hear(self) -> None:
        try:
            received = self._channel.receive()
        except (BlockingIOError, InterruptedError):
            return
        if received is None:
            os._exit(0)  # nobody is left to tell anything to
        message = to_worker(received[0])
        if isinstance(message, End):
            self._grace = message.grace_seconds
            self._ended.set()
        elif isinstance(message, Watched):
            self._watch.look()
        elif isinstance(message, LogFrom):
            _log.setLevel(message.level.upper())

    # ------------------------------------------------------------ reading

    def _on_batch(self, batch: Batch) -> None:
        if self._watch.watched:
            self._watch.count(batch)
        self._fanout.submit(batch)

    def _on_error(self, error: Exception) -> None:
        self._fail(KernelError(f"the events cannot be read: {error}"))

    def _deserted(self) -> None:
        self._fail(SinkError("no sink is left: " + "; ".join(self._fanout.failures)))

    def _fail(self, error: StreamerError) -> None:
        if not self._failed:
            self._failed = True
            self._outbox.append(Failed(type(error).__name__, brief(str(error))))

    def _find_losses(self, *, final: bool = False) -> None:
        """As `Service` does."""
        seqs = self._account.seqs()
        more = self._reader.drain_once()
        if final or not (more or self._reader.paused):
            self._reader.look_for_tails(seqs, final=final)
        for lost in self._account.losses(final=final):
            self._lost.add(lost)

    # ------------------------------------------------------------ telling

    def _tick(self) -> None:
        self._reader.refresh_clock()
        self._find_losses()
        self._mark()
        self._report()
        if self._watch.watched and self._ticks % _TICKS_OF_A_SECOND == 0:
            self._watch.roll()
            self._outbox.append(Seen(self._watch.last))

    def _mark(self) -> None:
        """What is submitted from now on has a later ticket than all up to these numbers."""
        self._ticks += 1
        if len(self._complete) >= _MOST_MARKS:  # an outage lasts: rather coarser than more of them
            self._complete = deque(list(self._complete)[::2])
        self._complete.append((self._ticks, self._account.complete()))
        for sink in self._fanout.sinks:
            sink.ticket = self._ticks

    def _settled(self) -> Marks:
        """Up to where everything is accounted for: what is held has later tickets."""
        held = [sink.oldest() for sink in self._fanout.sinks]
        oldest = min((ticket for ticket in held if ticket is not None), default=self._ticks)
        while len(self._complete) > 1 and self._complete[1][0] <= oldest:
            self._complete.popleft()
        first, found = self._complete[0]
        return found if first <= oldest else {}

    def _report(self) -> None:
        """What was lost goes first: what it explains is settled then."""
        self._flush()
        if not self._outbox:  # else the first worker does not listen, and what is new is added up
            self._note()
            self._flush()

    def _note(self) -> None:
        settled = self._settled()
        self._outbox.extend(gone(lost) for lost in self._lost.take())
        for index, book in enumerate(self._fanout.given_up):
            self._outbox.extend(gone(lost, index) for lost in book.take())
        self._outbox.extend(reads_of(self._changed_cells()))
        self._outbox.append(
            Progress(
                passed=marks_of(self._account.passed()),
                settled=marks_of(settled),
                sinks=[_progress_of(sink) for sink in self._fanout.sinks],
                reader=self._account.reader_counts(),
                paused=self._reader.paused,
            )
        )

    def _changed_cells(self) -> list[tuple[int, str, int]]:
        """What was read by CPU and kind, where that is not what was said before."""
        cells = {
            (cpu, kind): n for cpu in self._cpus for kind, n in self._account.read(cpu).items()
        }
        changed = [(*cell, n) for cell, n in cells.items() if n != self._cells.get(cell)]
        self._cells = cells
        return changed

    def _flush(self) -> None:
        while self._outbox:
            try:
                self._channel.send(packed(self._outbox[0]))
            except (BlockingIOError, InterruptedError):
                return
            except (OSError, MessageError):
                os._exit(1)  # nobody is left to tell anything to
            self._outbox.popleft()

    # ------------------------------------------------------------ the end

    async def _finish(self) -> None:
        """Drain what the detached programs left, deliver, and tell what could not be delivered."""
        begun, grace = time.monotonic(), self._grace
        self._reader.stop()
        while time.monotonic() < begun + grace / 2:
            if not self._reader.drain_once() and not self._reader.paused:
                break
            await asyncio.sleep(0.01 if self._reader.paused else 0)
        self._find_losses(final=True)
        self._reader.close()
        self._mark()
        while self._fanout.pending and time.monotonic() < begun + grace * _DELIVERING:
            await asyncio.sleep(0.01)
            self._report()
        self._fanout.discard("not delivered when the agent stopped")
        self._fanout.stopping = True
        left = max(begun + grace * _DELIVERING + grace / 8 - time.monotonic(), 0.1)
        await asyncio.gather(*(sink.stop(left) for sink in self._fanout.sinks))
        self._note()
        self._outbox.append(Done())
        self._flush()
        while self._outbox and time.monotonic() < begun + grace:
            await asyncio.sleep(0.01)
            self._flush()


def _progress_of(sink: Sink) -> SinkProgress:
    account, held = sink.account, max(sink.watermarks.held, 0)
    return SinkProgress(
        received=dict(account.received),
        delivered=dict(account.delivered),
        dropped=dict(account.dropped),
        delivered_bytes=sink.delivered_bytes,
        held=held,
        full=held / sink.watermarks.high,
        status=sink.status,
        lag_seconds=sink.latency.lag_seconds,
        latency=list(sink.latency.counts),
        latency_seconds=sink.latency.sum_seconds,
    )


# ---------------------------------------------------------------- the process


class _Forwarding(logging.Handler):
    """Has the first worker log what is logged here."""

    def __init__(self, say: Callable[[int, str], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text = f"{text}: {traceback_of(record.exc_info[1])}"
        self._say(record.levelno, text)


def ignore_signals() -> None:
    """The first worker decides when all end: what reaches all is for it."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def serve(
    channel: Channel,
    settings: Settings,
    timing: Timing | None,
    make_sinks: Callable[[], Sequence[tuple[Sink, Policy]]],
) -> int:
    """Be a further worker, in its own process, which has no privileges any more. The exit code.

    `make_sinks` makes those of the settings, and may raise StreamerError.
    """
    ctypes.CDLL(None).prctl(_PR_SET_NAME, b"streamer-worker", 0, 0, 0)
    channel.settimeout(None)
    received = channel.receive()
    if received is None:
        return 0
    begin = to_worker(received[0])
    if not isinstance(begin, Begin):
        return 1
    return run_loop(_serve(channel, settings, timing, make_sinks, begin, received[1]))


async def _serve(
    channel: Channel,
    settings: Settings,
    timing: Timing | None,
    make_sinks: Callable[[], Sequence[tuple[Sink, Policy]]],
    begin: Begin,
    descriptors: Sequence[int],
) -> int:
    try:
        worker = Worker(settings, begin, descriptors, make_sinks(), channel, timing)
    except (OSError, StreamerError) as error:
        kind = type(error).__name__ if isinstance(error, StreamerError) else "KernelError"
        channel.send(packed(Failed(kind, brief(str(error)))))
        return 1
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    root.addHandler(_Forwarding(worker.say))
    await worker.run()
    return 0
