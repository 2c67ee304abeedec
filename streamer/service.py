"""Wires the line together: rings, reader, sinks, and the records about the stream itself."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress

import msgspec
import uvloop

from streamer import __version__
from streamer.account import KernelCounters, LossLedger, missed_runs
from streamer.batch import Batch
from streamer.envelope import Envelope
from streamer.errors import KernelError
from streamer.events import KINDS
from streamer.fanout import Fanout, policy_of
from streamer.kernel import capabilities, loader
from streamer.kernel.loader import KernelState
from streamer.render import Rates, Renderer, StatusLine, same_terminal, status_text, wants_color
from streamer.ringbuf_reader import RingReader, RingSource, kernel_seqs
from streamer.settings import Filters, Limits, Settings, StdoutSink
from streamer.sinks.base import Sink
from streamer.sinks.factory import make_sink
from streamer.stream_events import (
    KindCounts,
    KindReport,
    ProgramReport,
    ReaderCounts,
    SinkCounts,
    StreamHeartbeat,
    StreamLoss,
    StreamManifest,
    StreamRecord,
)

INTERRUPTED = 130
_log = logging.getLogger("streamer")


class Service:
    """One run of the agent, from attach to the final account."""

    def __init__(
        self,
        settings: Settings,
        kinds: frozenset[str],
        limits: Limits,
        sinks: list[Sink],
        kernel: KernelState,
        *,
        status_line: StatusLine | None = None,
    ) -> None:
        """`kernel` is loaded and not attached; `sinks` are in the order of `settings.sinks`."""
        self._settings = settings
        self._kinds = kinds
        self._limits = limits
        self._kernel = kernel
        self._status_line = status_line
        self._stop = asyncio.Event()
        self._started = time.monotonic()
        self._read: Counter[str] = Counter()
        self._untold = 0
        self._error: Exception | None = None
        self.envelope = Envelope(settings.host)
        self.counters = KernelCounters(kernel.counters, kernel.cpus)
        self._ledger = LossLedger(self.counters, {k: info.stream for k, info in KINDS.items()})
        self.reader = RingReader(
            [
                RingSource(name, fd, kernel.ring_bytes[name], self.envelope)
                for name, fd in kernel.ring_fds.items()
            ],
            kernel.reader_state,
            on_batch=self._on_batch,
            on_error=self._on_error,
            poll_interval_ms=settings.rings.poll_interval_ms,
            drain_records=settings.rings.drain_records,
        )
        chosen = settings.sinks
        self.fanout = Fanout(
            [
                (sink, policy_of(one.on_full, len(chosen)))
                for sink, one in zip(sinks, chosen, strict=True)
            ],
            pause=self.reader.pause,
            resume=self.reader.resume,
            closed=self.stop,
        )

    def stop(self) -> None:
        """Ask the service to end; it drains, flushes and reports first."""
        self._stop.set()

    async def run(self) -> str:
        """Stream until stopped. Returns the account in one line.

        Raises:
            KernelError: nothing could be attached.
            SinkError: a sink that no retry can mend.
        """
        try:
            for sink in self.fanout.sinks:
                await sink.start()
            self._attach()
            self.reader.start()
            await self._stream()
            if self._error is not None:
                raise KernelError(f"the events cannot be read: {self._error}") from self._error
        finally:
            self._kernel.detach()
            self.reader.stop()
            line = await self._finish()
        return line

    def _attach(self) -> None:
        self._kernel.attach()
        coverage = self._kernel.coverage(self._kinds)
        for kind, state in coverage.items():
            if state.status != "full":
                how = "observed in part" if state.status == "partial" else "not observed"
                _log.warning("%s is %s: %s", kind, how, state.reason)
        if all(state.status == "missing" for state in coverage.values()):
            raise KernelError("none of the events asked for can be observed on this kernel")
        if self._settings.drop_capabilities:
            capabilities.drop_all()
        self._started = time.monotonic()
        self._submit(self._manifest())

    async def _stream(self) -> None:
        tasks: list[asyncio.Task[object]] = [asyncio.create_task(self._every_second())]
        if self._status_line is not None:
            tasks.append(asyncio.create_task(self._draw_status(self._status_line)))
        waiting: asyncio.Task[object] = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait(
                [waiting, *tasks],
                timeout=self._limits.duration_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in tasks:
                if task.done():
                    task.result()  # a defect: let it be seen
        finally:
            for task in (waiting, *tasks):
                task.cancel()
            await asyncio.gather(waiting, *tasks, return_exceptions=True)
            if self._status_line is not None:
                self._status_line.close()

    async def _every_second(self) -> None:
        next_heartbeat = time.monotonic() + self._settings.heartbeat_seconds
        while True:
            await asyncio.sleep(1)
            self.reader.refresh_clock()
            self._look_for_losses()
            if time.monotonic() >= next_heartbeat:
                next_heartbeat += self._settings.heartbeat_seconds
                # A sink that takes nothing must not fill up with heartbeats.
                if not self.fanout.blocked:
                    self._submit(self._heartbeat())

    async def _draw_status(self, line: StatusLine) -> None:
        before, then = 0, time.monotonic()
        rate = 0.0
        while True:
            await asyncio.sleep(0.25)
            now, total = time.monotonic(), self._read.total()
            if now - then >= 1:
                rate, before, then = (total - before) / (now - then), total, now
            delivered = max(s.account.delivered.total() for s in self.fanout.sinks)
            lost = sum(counts.lost for counts in self.counters.kinds({}).values())
            note = "paused" if self.reader.paused else ""
            line.draw(status_text(Rates(rate, delivered, self.fanout.filled, lost, note)))

    def _on_batch(self, batch: Batch) -> None:
        limit = self._limits.max_events
        if limit is not None:
            room = limit - self._read.total()
            if len(batch) >= room:
                batch = Batch(batch.events[:room])
                self.stop()
            if not batch.events:
                return
        self._read.update(batch.kinds)
        self.fanout.submit(batch)

    def _on_error(self, error: Exception) -> None:
        self._error = error
        self.stop()

    def _submit(self, record: StreamRecord) -> None:
        self.fanout.submit(Batch([record]))

    def _look_for_losses(self, *, final: bool = False) -> None:
        seqs = kernel_seqs(self._kernel.counters, self._kernel.cpus)
        if not self.reader.paused and not self.reader.drain_once():
            self.reader.look_for_tails(seqs)
        for ring, loss in self.reader.losses(final=final):
            record = self.envelope.record(
                StreamLoss,
                stage="kernel",
                count=loss.count,
                kinds=self._ledger.kinds(ring, loss),
                ring=ring,
                cpu=loss.cpu,
                seq_from=loss.first,
                seq_to=loss.last,
                reason="no room in the ring",
            )
            self._submit(record)
        self._tell_undecodable()
        self._tell_dropped()

    def _tell_undecodable(self) -> None:
        counts = self._reader_counts()
        refused = counts.unknown_kind + counts.short_record
        if refused > self._untold:
            count, self._untold = refused - self._untold, refused
            reason = (
                f"so far {counts.unknown_kind} of unknown kind, {counts.short_record} too short"
            )
            self._submit(
                self.envelope.record(
                    StreamLoss, stage="decode", count=count, kinds={}, reason=reason
                )
            )

    def _tell_dropped(self) -> None:
        for sink, reason, kinds in self.fanout.take_dropped():
            record = self.envelope.record(
                StreamLoss,
                stage="sink",
                count=sum(kinds.values()),
                kinds=kinds,
                sink=sink.name,
                reason=reason,
            )
            sink.submit(Batch([record]))

    def _manifest(self) -> StreamManifest:
        kernel = os.uname()
        return self.envelope.record(
            StreamManifest,
            agent=__version__,
            agent_pid=os.getpid(),
            kernel=kernel.release,
            machine=kernel.machine,
            cpus=self._kernel.cpus,
            rings=dict(self._kernel.ring_bytes),
            kinds={
                kind: KindReport(state.status, state.reason)
                for kind, state in self._kernel.coverage(self._kinds).items()
            },
            programs=[
                ProgramReport(p.name, p.hook, p.kinds, p.status, p.reason)
                for p in self._kernel.statuses
            ],
            filters=filters_in_force(self._settings.filters),
            sinks=[sink.name for sink in self.fanout.sinks],
        )

    def _heartbeat(self) -> StreamHeartbeat:
        passed = {
            (source.name, cpu): source.ring.next_seq(cpu) - 1
            for source in self.reader.sources
            for cpu in range(self._kernel.cpus)
        }
        return self.envelope.record(
            StreamHeartbeat,
            uptime_seconds=round(time.monotonic() - self._started, 3),
            kinds=self.counters.kinds(self._read),
            cpus=self.counters.marks(passed),
            sinks={sink.name: sink_counts(sink) for sink in self.fanout.sinks},
            reader=self._reader_counts(),
            missed=missed_runs(self._kernel.program_fds),
        )

    def _reader_counts(self) -> ReaderCounts:
        decoders = [source.decoder for source in self.reader.sources]
        return ReaderCounts(
            unknown_kind=sum(d.unknown_kind for d in decoders),
            short_record=sum(d.short_record for d in decoders),
            invalid_utf8=sum(d.invalid_utf8 for d in decoders),
            truncated=sum(d.truncated for d in decoders),
            pauses=self.reader.pauses,
        )

    async def _finish(self) -> str:
        """Drain what the detached programs left, flush the sinks; the account in one line."""
        deadline = time.monotonic() + self._settings.grace_seconds
        await self._drain_rest(deadline)
        self._look_for_losses(final=True)
        self._submit(self._heartbeat())
        grace = max(deadline - time.monotonic(), 0.1)
        self.fanout.stopping = True
        await asyncio.gather(*(sink.stop(grace) for sink in self.fanout.sinks))
        counts = self.counters.kinds(self._read)
        return account_line(counts, self.fanout.sinks, time.monotonic() - self._started)

    async def _drain_rest(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            more = self.reader.drain_once()
            if self._error is not None or not (more or self.reader.paused):
                return
            await asyncio.sleep(0.01 if self.reader.paused else 0)


def filters_in_force(filters: Filters) -> dict[str, list[str]]:
    """The filters that are set, as strings."""
    return {
        name: [str(value) for value in values]
        for name, values in msgspec.structs.asdict(filters).items()
        if values
    }


def sink_counts(sink: Sink) -> SinkCounts:
    """A sink's account in totals."""
    account = sink.account
    return SinkCounts(
        received=account.received.total(),
        delivered=account.delivered.total(),
        dropped=account.dropped.total(),
        pending=account.pending,
        pending_bytes=sink.watermarks.held,
        status=sink.status,
    )


def account_line(kinds: Mapping[str, KindCounts], sinks: Iterable[Sink], seconds: float) -> str:
    """What was produced and what became of it, in one line. Stream records are not counted."""
    produced, filtered, lost, read = (
        sum(getattr(counts, name) for counts in kinds.values())
        for name in ("produced", "filtered", "lost", "read")
    )
    parts = [f"{produced:,} events in {seconds:.1f} s"]
    for sink in sinks:
        delivered, dropped = (
            sum(n for kind, n in counter.items() if not kind.startswith("stream."))
            for counter in (sink.account.delivered, sink.account.dropped)
        )
        parts.append(f"{sink.name} {delivered:,} delivered, {dropped:,} dropped")
    parts.append(f"{filtered:,} filtered, {lost:,} lost")
    unread = produced - filtered - lost - read
    if unread:
        parts.append(f"{unread:,} not read")
    return "; ".join(parts)


class _LogHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to stderr, taking the status line away first."""

    def __init__(self, line: StatusLine | None) -> None:
        super().__init__(sys.stderr)
        self._line = line
        self.setFormatter(logging.Formatter("streamer: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if self._line is not None:
            self._line.clear()
        super().emit(record)


def run_service(settings: Settings, kinds: frozenset[str], limits: Limits) -> int:
    """Stream `kinds` as `settings` say until a signal, a limit or a closed pipe. The exit code.

    Raises:
        StreamerError: what kept it from starting.
    """
    if not settings.sinks:
        settings = msgspec.structs.replace(settings, sinks=(StdoutSink(),))
    line = StatusLine() if limits.status and os.isatty(2) else None
    _log.setLevel(settings.log_level.upper())
    _log.addHandler(handler := _LogHandler(line))
    try:
        account = uvloop.run(_run(settings, kinds, limits, line))
    finally:
        _log.removeHandler(handler)
    # A reader that closed the pipe may have closed stderr with it.
    with suppress(OSError):
        print(f"streamer: {account}", file=sys.stderr, flush=True)
    return 0


async def _run(
    settings: Settings, kinds: frozenset[str], limits: Limits, line: StatusLine | None
) -> str:
    host = settings.host or os.uname().nodename
    renderer = _renderer(settings, line)
    sinks = [make_sink(one, host, renderer) for one in settings.sinks]
    kernel = loader.load(settings, kinds)
    try:
        service = Service(settings, kinds, limits, sinks, kernel, status_line=line)
        _handle_signals(service)
        targets = ", ".join(sink.name for sink in sinks)
        _log.info("streaming %s to %s; Ctrl-C ends it", ", ".join(sorted(kinds)), targets)
        return await service.run()
    finally:
        kernel.close()


def _renderer(settings: Settings, line: StatusLine | None) -> Renderer | None:
    """What makes readable lines for a terminal on stdout; None where there is none."""
    chosen = next((one for one in settings.sinks if isinstance(one, StdoutSink)), None)
    if chosen is None or not os.isatty(1):
        return None
    color = wants_color(chosen.color, True, os.environ)
    renderer = Renderer(color, _columns(), line if same_terminal(1, 2) else None)

    def resize() -> None:
        renderer.width = _columns()

    asyncio.get_running_loop().add_signal_handler(signal.SIGWINCH, resize)
    return renderer


def _columns() -> int:
    return os.get_terminal_size(1).columns


def _handle_signals(service: Service) -> None:
    loop = asyncio.get_running_loop()
    asked = False

    def on_signal() -> None:
        nonlocal asked
        if asked:
            os._exit(INTERRUPTED)  # asked twice: at once, without draining
        asked = True
        service.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
