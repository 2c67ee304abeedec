"""One run of the agent: attach, stream, and end with everything accounted for."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

from streamer import __version__
from streamer.agent.crew import Crew
from streamer.agent.fanout import Fanout, Policy, policy_of
from streamer.agent.looks import Looks
from streamer.agent.losses import Lost
from streamer.agent.reports import Reporter, account_line, settled
from streamer.agent.run_file import bounded
from streamer.agent.shedding import Shedding
from streamer.config.settings import Limits, Settings, spool_mode, with_budgets
from streamer.errors import ConfigError, KernelError, SinkError, StreamerError
from streamer.events.batch import Batch
from streamer.events.envelope import Envelope
from streamer.events.stream import (
    PreviousRun,
    SeqRange,
    StreamHeartbeat,
    StreamManifest,
    UntoldLoss,
)
from streamer.events.timing import Timing
from streamer.kernel.flows import KIND, FlowWalk
from streamer.kernel.grace_period import wait_for_programs
from streamer.kernel.loader import Attached, Loaded
from streamer.kernel.state import KernelState, KindStatus
from streamer.operation.activity import Watch
from streamer.operation.look import Look, Phase, TopLook
from streamer.ring.reader import PerfSource, RingReader, RingSource, Source, open_sources
from streamer.sinks.base import Sink
from streamer.spool.spool import Spool
from streamer.summaries.period import Summaries
from streamer.terminal.lines import Rates, StatusLine, status_text

_log = logging.getLogger("streamer")

_MANIFEST_SECONDS = 3600.0
"""How often the manifest is repeated: whoever begins to read a topic later needs it as well."""

_INTERFACES_SECONDS = 10.0
"""How often at most a manifest and the log tell of interfaces that come and go all the time."""

_FULL = KindStatus("full")

_KILLED = "this run was killed, and what it held is lost"

_WALK_SECONDS = 1.0
"""How often flows are looked at that may be due."""
_ROOM_SECONDS = 0.02
_SETTLE_SECONDS = 0.02
"""A packet may still be counted that came before the programs were detached."""
_UNREPORTED = "flows that were not reported when the agent stopped"

_CLOSING = 10
"""Looks at an account that does not close yet, `_SETTLE_SECONDS` apart."""

_PROGRAMS = 3 / 8
"""Of the grace period, by when programs that ran when they were detached are to have ended."""
_CREWS = 0.85
"""Of the grace period, what further workers have to come to their end."""
_DELIVERING = 0.75
"""Of the grace period, for delivering what is held; the rest is for telling what was not."""


class Change(NamedTuple):
    """Another configuration for a run, with all that can fail done already.

    `sinks` are in the order of its settings. `sensors` were loaded and attached; `unneeded` are
    those that nothing asks for any more. `prepared` says whether other filters wait to be used.
    """

    settings: Settings
    kinds: frozenset[str]
    sinks: list[Sink]
    changes: tuple[str, ...]
    prepared: bool = False
    sensors: Mapping[str, tuple[Loaded, Attached] | KernelError] = MappingProxyType({})
    unneeded: tuple[str, ...] = ()


class _Due:
    """Whether it is time again; the time that is lost in between is not made up for."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def again(self, every: float) -> bool:
        now = time.monotonic()
        if now < self._last + every:
            return False
        self._last = max(self._last + every, now - every)
        return True


class Outcome(NamedTuple):
    """How a run ended: its account in one line, and what was not delivered, if anything."""

    account: str
    undelivered: str


class Service:
    """Wires rings, reader, sinks and reports together, and sees them through a run."""

    def __init__(
        self,
        settings: Settings,
        kinds: frozenset[str],
        limits: Limits,
        sinks: list[Sink],
        kernel: KernelState,
        *,
        status_line: StatusLine | None = None,
        timing: Timing | None = None,
        previous: PreviousRun | None = None,
        leave_note: Callable[[PreviousRun], None] = lambda note: None,
        spool: Spool | None = None,
        crew: Crew | None = None,
    ) -> None:
        """`kernel` is loaded and not attached; `sinks` are in the order of `settings.sinks`.

        `timing` makes times coarse. `previous` is the run before, for the manifest; `leave_note`
        keeps a note for the next. `spool` is what some of the sinks use. `crew` are the further
        workers, which were started.

        Raises:
            OSError: a ring or a table cannot be mapped.
        """
        self._settings = settings
        self._kinds = kinds
        self._limits = limits
        self._kernel = kernel
        self._status_line = status_line
        self._stop = asyncio.Event()
        self._read: Counter[str] = Counter()
        self._error: StreamerError | None = None
        self._previous = previous
        self._leave_note = leave_note
        self._spool = spool
        self._untold: list[UntoldLoss] = []
        self._started_ns = time.time_ns()
        self._finished = False
        self._coverage: dict[str, KindStatus] = {}
        self._interfaces_changed = False
        self._no_buffers = ""
        self._interfaces_told = -_INTERFACES_SECONDS
        self.envelope = envelope = Envelope(
            settings.host,
            rfc3339_time=settings.rfc3339_time,
            timing=timing,
            hidden_names=settings.kernel.dns_redact,
        )
        self._crew = crew = Crew() if crew is None else crew
        sources = open_sources(
            kernel.transport, kernel.ring_fds, kernel.buffers, envelope, kernel.cpus
        )
        whose = crew.share(kernel.ring_fds)
        self._others = [one for one in sources if whose[one.buffer] and isinstance(one, RingSource)]
        self.reader = RingReader(
            [one for one in sources if not whose[one.buffer]],
            kernel.reader_state,
            on_batch=self._on_batch,
            on_error=self._on_error,
            poll_interval_ms=settings.poll_interval_ms,
            sleeps=timing is None,
            drain_records=settings.rings.drain_records,
            max_events=limits.max_events,
        )
        self._summaries = Summaries(kernel, envelope, kinds)
        self._summary: asyncio.Task[None] | None = None
        self._reporter = Reporter(envelope, kernel, self.reader, settings.filters, crew)
        self.fanout = Fanout(
            _with_policies(sinks, settings),
            pause=self.reader.pause,
            resume=self.reader.resume,
            closed=self.stop,
            loss_record=self._reporter.loss_record,
        )
        self.phase: Phase = "starting"
        """Programs are attached while it is `streaming`."""
        self.ticked = time.monotonic()
        """When it last did what is done every second, by the monotonic clock."""
        self._left_by = ""  # how a worker has ended, and left its rings
        self._partings: set[asyncio.Task[None]] = set()
        self.changing: asyncio.Task[None] | None = None
        """What reads the configuration anew, while it does."""
        self.loading = False
        """Whether the helper is kept busy: what is asked of it every second is left out then."""
        self._watch = Watch()
        self.shedding = Shedding(
            settings.shedding, envelope, kernel, sources, self._reporter, self.fanout, crew
        )
        self._looks = Looks(
            *(envelope, kernel, self.reader, self._reporter, self.fanout, self._read),
            *(self.shedding, crew, sources),
        )
        crew.join(self, sinks, self._read)

    def look(self) -> Look:
        """How things are now, as long as it runs."""
        return self._looks.look(self.phase, self._coverage)

    def top(self) -> TopLook:
        """The same, and who the events come from."""
        return TopLook(self.look(), self._crew.look(self._watch.look()))

    @property
    def ended_quietly(self) -> bool:
        """Whether it ended because whoever read stdout went away, if no sink failed."""
        return all(sink.status == "closed" for sink in self.fanout.sinks)

    @property
    def summarises(self) -> bool:
        """Whether a summary is being made."""
        return self._summary is not None and not self._summary.done()

    def stop(self) -> None:
        """Ask the service to end; it drains, flushes and reports first."""
        self._stop.set()

    def fail(self, error: StreamerError) -> None:
        """End the service, in order as far as that is possible; `run` then raises `error`."""
        if self._error is None:
            self._error = error
        self.stop()

    # ------------------------------------------------------------ further workers

    def lose(self, lost: list[Lost]) -> None:
        """See `crew.Run`."""
        self._lose(lost)

    def give_up(self, sink: Sink, lost: Lost) -> None:
        """See `crew.Run`."""
        self.fanout.note_dropped(sink, lost)

    def take_over(
        self,
        sources: Sequence[Source],
        reason: str,
        unsettled: Sequence[SeqRange],
        told: Mapping[tuple[str, int], int],
    ) -> None:
        """See `crew.Run`."""
        self._left_by = f"{self._left_by}; {reason}" if self._left_by else reason
        self._reporter.account.take_over(sources, unsettled, told)
        self.reader.take_over(sources)

    def _tell_left_behind(self) -> None:
        """When all is read: what a worker that ended had read, and never said what became of it."""
        if not self._left_by:
            return
        left = self._reporter.left_behind(self._left_by)
        self._read.update(left.kinds)
        for sink in self.fanout.sinks if left.count else ():
            sink.account.received.update(left.kinds)
            sink.account.dropped.update(left.kinds)
            self.fanout.note_dropped(sink, left)

    # ------------------------------------------------------------ from outside

    def reopen(self) -> None:
        """Let every sink open anew what it opened by name."""
        for sink in self.fanout.sinks:
            try:
                sink.reopen()
            except Exception:  # a defect of this sink must not keep the others from it
                _log.exception("%s could not be opened anew", sink.name)

    # ------------------------------------------------------------ another configuration

    @property
    def settings(self) -> Settings:
        """What it goes by now."""
        return self._settings

    @property
    def kinds(self) -> frozenset[str]:
        """What it observes now."""
        return self._kinds

    @property
    def kernel(self) -> KernelState:
        """What it observes with."""
        return self._kernel

    async def see_off_all(self) -> None:
        """Wait until every sink that was taken out has ended: for the grace period at most."""
        if self._partings:
            await asyncio.wait(self._partings)

    def adopt(self, change: Change) -> None:
        """Go by another configuration from now on. Nothing is waited for, and nothing can fail."""
        self._adopt_in_kernel(change)
        self._settings, self._kinds = change.settings, change.kinds
        for one, sink in zip(with_budgets(change.settings.sinks), change.sinks, strict=True):
            if spool_mode(one) == "off":
                sink.set_budget(one.budget // (len(self._crew.members) + 1))
        _log.setLevel(change.settings.log_level.upper())
        self._crew.log_from(change.settings.log_level)
        self._reporter.configured(
            change.settings.filters, time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        )
        manifest = self._reporter.manifest(
            self._kinds, change.sinks, self._previous, change.changes
        )
        self._part(change, manifest)
        self.fanout.publish(manifest)
        self._log_coverage()

    def _adopt_in_kernel(self, change: Change) -> None:
        kernel = self._kernel
        for sensor, outcome in change.sensors.items():
            if isinstance(outcome, KernelError):
                kernel.note_failure(sensor, outcome)
                continue
            loaded, attached = outcome
            kernel.take_loaded(sensor, loaded, change.kinds)
            kernel.take_attached(sensor, attached)
        if change.prepared:
            kernel.use_filters()
        kernel.want(change.kinds)
        kernel.enable(change.kinds)
        kernel.set_sample(change.settings.kernel.sample)
        for sensor in change.unneeded:
            kernel.put_away(sensor)

    def _part(self, change: Change, manifest: StreamManifest) -> None:
        """Exchange the sinks. Those that are none any more have the grace period to deliver."""
        fanout, names = self.fanout, {sink.name for sink in change.sinks}
        for sink in fanout.sinks:
            if sink.name not in names and fanout.is_open(sink):
                fanout.tell(sink, manifest, self._reporter.heartbeat(self._read, fanout.sinks))
        for sink in fanout.change(_with_policies(change.sinks, change.settings)):
            heir = next((one for one in change.sinks if one.name == sink.name), None)
            parting = asyncio.ensure_future(self._see_off(sink, heir))
            self._partings.add(parting)
            parting.add_done_callback(self._partings.discard)

    async def _see_off(self, sink: Sink, heir: Sink | None) -> None:
        """Let a sink deliver what it has, then begin with its heir; also if this is cancelled."""
        try:
            await sink.stop(self._settings.grace_seconds)
        finally:
            self.fanout.left(sink)
            if heir is not None:
                await self._begin(heir)
            else:
                counted = [*self.fanout.leaving, *self.fanout.sinks, sink]
                self.fanout.publish(self._reporter.heartbeat(self._read, counted))
                _log.info("%s is taken out: %s", sink.name, settled(sink.account))

    async def _begin(self, sink: Sink) -> None:
        try:
            await sink.start()
        except StreamerError as error:
            _log.error("%s cannot be started: %s", sink.name, error)
            self.fanout.broke(sink, str(error))
        else:
            self.fanout.begin(sink)

    async def _end_changes(self, seconds: float) -> None:
        """At the end: give up what is being changed, and let sinks that leave do so."""
        if self.changing is not None:
            self.changing.cancel()
            await asyncio.wait({self.changing})
        if self._partings:
            _, late = await asyncio.wait(self._partings, timeout=seconds)
            for parting in late:
                parting.cancel()
            if late:
                await asyncio.wait(late)

    # ------------------------------------------------------------ a run

    async def run(self) -> Outcome:
        """Stream until stopped.

        Raises:
            KernelError: nothing could be attached, or the rings cannot be read.
            SinkError: a sink that no retry can mend, or no sink is left.
            StreamerError: what `fail` was told.
        """
        try:
            await self._start()
        except BaseException:
            self._kernel.detach()
            self._kernel.release()
            self.fanout.stopping = True
            await self._stop_sinks(0)
            raise
        self._keep_note()  # true if it is killed
        self.phase, self.ticked = "streaming", time.monotonic()
        try:
            await self._stream()
            quiet = self.ended_quietly
        finally:
            self.phase = "stopping"
            self._end_observation()
            try:
                await self._finish()
            finally:
                self._untold = self._found_untold()
                self._keep_note()
        if self._error is not None:
            _log.info(self._account())
            raise self._error
        if self.fanout.failures and self.fanout.deserted:
            raise SinkError("no sink is left: " + "; ".join(self.fanout.failures))
        if quiet:
            return Outcome("", "")
        return Outcome(self._account(), self._undelivered())

    def _end_observation(self) -> None:
        """Nothing happens, nor is counted, after this, but that flows are told that were seen."""
        self.shedding.hold()
        self._kernel.enable(self._kinds & {KIND} if self._kernel.flows else ())
        try:
            self._summaries.hold()
        finally:
            self._kernel.detach()

    def _undelivered(self) -> str:
        """What was given up at the end, or never told; empty if nothing."""
        untold: Counter[str] = Counter()
        for one in self._untold:
            untold[one.sink] += one.count
        told = [f"{count:,} lost events not told to {sink}" for sink, count in untold.items()]
        return "; ".join(filter(None, (self.fanout.undelivered(), *told)))

    def _found_untold(self) -> list[UntoldLoss]:
        found = [
            (sink.name, one)
            for sink in self.fanout.sinks
            if not self.fanout.ended_as_it_should(sink)
            for one in self.fanout.untold(sink)
        ]
        return [
            UntoldLoss(
                self.envelope.run_id,
                name,
                one.stage,
                one.count,
                dict(one.kinds),
                one.reason,
                list(one.ranges),
            )
            for name, one in (*self.fanout.never_told, *found)
        ]

    def _note(self) -> PreviousRun:
        """For the run that comes after this one, which has ended or may be killed."""
        ended: Literal["delivered", "undelivered", "killed"] = "killed"
        if self._finished:
            ended = "undelivered" if self._undelivered() else "delivered"
        return PreviousRun(
            run_id=self.envelope.run_id,
            boot_id=self.envelope.boot_id,
            agent=__version__,
            started_ns=self._started_ns,
            ended=ended,
            untold=bounded([*self._still_untold(), *self._untold]),
        )

    def _still_untold(self) -> list[UntoldLoss]:
        """What the manifest tells of earlier runs, for sinks that it has not reached.

        A sink that is not there any more is told by any other, but not by a terminal or a pipe.
        """
        before = self._previous
        if before is None:
            return []
        reached = {
            sink.name: sink.account.delivered["stream.manifest"] > 0 for sink in self.fanout.sinks
        }
        anywhere = any(reached[sink.name] for sink in self.fanout.sinks if not sink.ends_quietly)
        earlier = list(before.untold)
        if before.ended == "killed":
            earlier.append(UntoldLoss(before.run_id, "", "stop", 0, {}, _KILLED, []))
        return [one for one in earlier if not reached.get(one.sink, anywhere)]

    def _account(self) -> str:
        reporter = self._reporter
        counts = reporter.counts(self._read)
        return account_line(
            counts, self.fanout.sinks, reporter.uptime, reporter.missed_runs, self.fanout.gone
        )

    def _keep_note(self) -> None:
        note = self._note()
        self._leave_note(note)
        if self._spool is not None:
            self._spool.note(note)

    async def _start(self) -> None:
        if self._spool is not None:
            note = self._note()
            self._leave_note(note)  # first, because it has what the spool then forgets
            self._spool.begin(note)
        for sink in self.fanout.sinks:
            try:
                await sink.start()
            except ConfigError as error:
                raise ConfigError(f"{sink.name}: {error}") from None
        await self._crew.begin(self._kernel, self.envelope.run_id, self._others)
        if self._error is not None:
            raise self._error
        self._attach()
        names = ", ".join(sink.name for sink in self.fanout.sinks)
        kinds = [kind for kind in sorted(self._kinds) if self._coverage[kind].status != "missing"]
        _log.info("streaming %s to %s; Ctrl-C ends it", ", ".join(kinds), names)
        self.fanout.publish(self._manifest())
        self.reader.start()

    def _manifest(self) -> StreamManifest:
        return self._reporter.manifest(self._kinds, self.fanout.sinks, self._previous)

    def _attach(self) -> None:
        self._kernel.attach()
        self._log_coverage()
        coverage = self._kernel.coverage(self._kinds)
        if all(state.status == "missing" for state in coverage.values()):
            raise KernelError("none of the events asked for can be observed on this kernel")

    def _log_coverage(self) -> None:
        """Say what is not observed fully, if that has changed."""
        coverage = self._kernel.coverage(self._kinds)
        for kind, state in coverage.items():
            if state == self._coverage.get(kind, _FULL):
                continue
            how = {"partial": "observed in part", "missing": "not observed", "full": "observed"}
            reason = f": {state.reason}" if state.reason else " again"
            _log.warning("%s is %s%s", kind, how[state.status], reason)
        self._coverage = coverage

    async def _stream(self) -> None:
        """Until asked to stop, the time is over, or a defect ends one of the tasks."""
        work: list[Awaitable[object]] = [self._stop.wait(), self._every_second()]
        if self._kernel.flows is not None:
            work.append(self._walk_flows(self._kernel.flows))
        if self.shedding.enabled:
            work.append(self.shedding.run())
        if self._status_line is not None:
            work.append(self._draw_status(self._status_line))
        tasks = [asyncio.ensure_future(one) for one in work]
        try:
            limit = self._limits.duration_seconds
            done, _ = await asyncio.wait(tasks, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # a defect: let it be seen
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._status_line is not None:
                self._status_line.close()

    async def _every_second(self) -> None:
        heartbeat, manifest, summary = _Due(), _Due(), _Due()
        while True:
            await asyncio.sleep(1)
            self.ticked = time.monotonic()
            self._looks.tick()
            self._watch.roll()
            self.reader.refresh_clock()
            if not self.loading:
                self._run_timed()
            taken = self._reporter.seqs()
            self._find_losses()
            complete = self._reporter.complete()
            self._reporter.watermarks.advance(complete)
            self._reporter.watermarks.tick()
            self.fanout.publish_owed()
            self._checkpoint(complete, taken)
            self._log_troubles()
            if not self.loading:
                self._follow_interfaces()
                self._follow_cpus()
            # What a sink has no room for stays in the tables: the period is longer then.
            if not self.fanout.blocked and summary.again(self._settings.summary_seconds):
                self._begin_summary()
            if heartbeat.again(self._settings.heartbeat_seconds):
                self.shedding.repeat()
                self.fanout.publish_newest(self._heartbeat())
            if manifest.again(_MANIFEST_SECONDS):
                self.fanout.publish(self._manifest())
            self.fanout.publish_anew(self._manifest)

    def _heartbeat(self, *, final: bool = False) -> StreamHeartbeat:
        counted = [*self.fanout.leaving, *self.fanout.sinks]
        return self._reporter.heartbeat(self._read, counted, final=final)

    def _run_timed(self) -> None:
        try:
            self._kernel.run_timed()
        except OSError as error:
            self.fail(KernelError(f"what is run every second cannot be: {error}"))

    def _checkpoint(
        self, complete: dict[tuple[str, int], int], taken: dict[str, list[int]]
    ) -> None:
        """Have the spool remember how far this run has come."""
        if self._spool is None:
            return
        last = {(ring, cpu): n for ring, row in taken.items() for cpu, n in enumerate(row) if n}
        self.fanout.checkpoint(complete, last)
        self._spool.note()

    async def _walk_flows(self, flows: FlowWalk) -> None:
        while True:
            try:
                over = flows.step()
            except OSError as error:
                self.fail(KernelError(f"the flows cannot be looked at: {error}"))
                return
            # If it is not over, the table is large, or the ring is full of other records.
            await asyncio.sleep(_WALK_SECONDS if over else _ROOM_SECONDS)

    async def _draw_status(self, line: StatusLine) -> None:
        before, then = 0, time.monotonic()
        rate = 0.0
        while True:
            await asyncio.sleep(0.25)
            now, total = time.monotonic(), self._read.total()
            if now - then >= 1:
                rate, before, then = (total - before) / (now - then), total, now
            delivered = max(s.account.delivered.total() for s in self.fanout.sinks)
            lost = self._reporter.lost_in_kernel()
            level = self.shedding.pressure.level
            notes = ["paused"] if self.reader.paused else []
            note = "  ".join([*notes, *([f"shedding, level {level}"] if level else [])])
            line.draw(status_text(Rates(rate, delivered, self.fanout.filled, lost, note)))

    def _on_batch(self, batch: Batch) -> None:
        self._read.update(batch.kinds)
        if self._watch.watched:
            self._watch.count(batch)
        self.fanout.submit(batch)
        if self.reader.done:
            self.stop()

    def _follow_interfaces(self) -> None:
        """An interface that has gone or come changes what is observed: say so, if not too often."""
        self._interfaces_changed |= self._kernel.follow_interfaces()
        now = time.monotonic()
        if self._interfaces_changed and now >= self._interfaces_told + _INTERFACES_SECONDS:
            self._interfaces_changed, self._interfaces_told = False, now
            self._log_coverage()
            self.fanout.publish(self._manifest())

    def _begin_summary(self) -> None:
        """Unless the one before is not ready: then the next has its period too."""
        if self.summarises:
            return
        if self._summary is not None:
            self._summary.result()  # a defect: let it be seen
        self._summary = asyncio.ensure_future(self._summarise())

    async def _last_summary(self, seconds: float) -> None:
        """What has been counted since, if it can be had in time."""
        last = asyncio.ensure_future(self._summarise())
        asked = [one for one in (self._summary, last) if one is not None]
        done, late = await asyncio.wait(asked, timeout=seconds)
        for task in late:
            task.cancel()
        if late:
            reason = "summaries were not ready when the agent stopped"
            self._lose([Lost(stage="stop", count=len(late), kinds={}, reason=reason)])
            _log.warning("the last summaries are not ready after %.1f s, and are lost", seconds)
        for task in done:
            task.result()

    async def _summarise(self) -> None:
        """Publish what the programs counted in the period that ends now.

        In a thread: some of it is asked of the helper, and names of functions are in large files.
        """
        records = await asyncio.to_thread(self._summaries.collect)
        if records:
            self._on_batch(Batch(records))

    def _follow_cpus(self) -> None:
        """Perf buffers are of CPUs, which go down and come up, be it within a second."""
        perf = [one for one in self.reader.sources if isinstance(one, PerfSource)]
        if not perf:
            return
        seqs = self._reporter.seqs()
        mute = {cpu for source in perf for cpu in source.mute(seqs[source.name])}
        gone = self._kernel.gone_cpus()
        for source in perf:
            for cpu in gone:
                source.forget(cpu)
        try:
            came = self._kernel.open_buffers(mute)
        except KernelError as error:  # what happens there is lost, and told: the rest goes on
            if str(error) != self._no_buffers:
                _log.warning("%s", error)
            self._no_buffers = str(error)
            return
        for cpu, fds in came.items():
            for source in perf:
                source.add(cpu, fds[source.name])

    def _on_error(self, error: Exception) -> None:
        self.fail(KernelError(f"the events cannot be read: {error}"))

    def _find_losses(self, *, final: bool = False) -> None:
        """Find out what was lost since the last time."""
        seqs = self._reporter.seqs()  # before the drain: what was numbered by then is in the rings
        more = self.reader.drain_once()
        if final or not (more or self.reader.paused or self.reader.done):
            self.reader.look_for_tails(seqs, final=final)
        self._lose(self._reporter.account.losses(final=final))
        self._tell(self._reporter.missed())  # how many events these were is not known

    def _lose(self, lost: list[Lost]) -> None:
        for one in lost:
            self.fanout.lost.add(one)
        self._tell(lost)

    def _tell(self, lost: list[Lost]) -> None:
        """Every sink is owed these. What was left unread on purpose is no news for the log."""
        self.fanout.lose(lost)
        self.fanout.log.add(one for one in lost if one.stage != "stop")

    def _log_troubles(self) -> None:
        now = time.monotonic()
        for line in (*self.fanout.log.lines(now), *self.fanout.still_down(now)):
            _log.warning(line)

    async def _finish(self) -> None:
        """Drain what the detached programs left, deliver, and tell what could not be delivered."""
        grace = self._settings.grace_seconds
        begun = time.monotonic()
        self.fanout.ending = True
        self.reader.stop()
        try:
            if any(sink.waiting and sink.status != "up" for sink in self.fanout.sinks):
                _log.warning("stopping within %g s; Ctrl-C again stops at once", grace)
            await self._end_changes(grace / 4)
            # Half for reading what is left, so that there is time to deliver it.
            await self._flush_flows(begun + grace / 4)
            await self._wait_for_programs(begun + grace * _PROGRAMS)
            # Only now: flows are written into the ring of whatever CPU reports them.
            self._crew.end(max(begun + grace * _CREWS - time.monotonic(), 0))
            await self._drain_rest(begun + grace / 2)
            await self._last_summary(grace / 2)
            await self._crew.ended(begun + grace * _CREWS)
            await self._drain_rest(begun + grace * _CREWS)  # what one of them has left
            self._find_losses(final=True)
            self._tell_left_behind()
            complete = self._reporter.complete()
            self.reader.close()
            await self._deliver(begun + grace * _DELIVERING)
            self.fanout.discard("not delivered when the agent stopped")
            self.fanout.publish_owed(final=True)
            self.shedding.end()
            self._reporter.watermarks.end(complete)
            self.fanout.publish(self._heartbeat(final=True))
            self._finished = True
        finally:
            self.reader.close()
            self.fanout.stopping = True
            await self._stop_sinks(max(begun + grace - time.monotonic(), 0.1))
            self._log_troubles()

    async def _deliver(self, deadline: float) -> None:
        """Wait for the sinks. What they cannot deliver by then is told in the rest of the grace.

        Otherwise the last losses would queue behind a backlog, and be dropped with it.
        """
        while self.fanout.pending and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def _flush_flows(self, deadline: float) -> None:
        """Have the flows that are left reported; what does not come to that is lost."""
        flows = self._kernel.flows
        if flows is None:
            return
        await asyncio.sleep(_SETTLE_SECONDS)
        try:
            while flows.live and time.monotonic() < deadline and not self.reader.done:
                flows.flush()
                self.reader.drain_once()
                await asyncio.sleep(0.01 if self.reader.paused else 0)
        except (OSError, StreamerError) as error:
            _log.warning("the flows cannot be reported: %s", error)
        self._kernel.release()
        self._kernel.enable(())
        if flows.live:
            kinds = {KIND: flows.live}
            self._lose([Lost("stop", _UNREPORTED, flows.live, kinds)])

    async def _wait_for_programs(self, deadline: float) -> None:
        """Until those have ended that were running when they were detached.

        One that is interrupted, or preempted, may have counted an event and not written it yet.
        """
        left = max(deadline - time.monotonic(), 0)
        try:
            await asyncio.wait_for(asyncio.to_thread(wait_for_programs), left)
        except (OSError, RuntimeError, TimeoutError) as error:
            _log.debug("whether programs still run is not known: %s", error)
        for _ in range(_CLOSING):
            if self._reporter.closes:
                break
            await asyncio.sleep(_SETTLE_SECONDS)

    async def _drain_rest(self, deadline: float) -> None:
        while time.monotonic() < deadline and not self.reader.done:
            if not self.reader.drain_once() and not self.reader.paused:
                return
            await asyncio.sleep(0.01 if self.reader.paused else 0)

    async def _stop_sinks(self, grace: float) -> None:
        await asyncio.gather(*(sink.stop(grace) for sink in self.fanout.sinks))


def _with_policies(sinks: list[Sink], settings: Settings) -> list[tuple[Sink, Policy]]:
    chosen = settings.sinks
    return [
        (sink, policy_of(one.on_full, len(chosen))) for sink, one in zip(sinks, chosen, strict=True)
    ]
