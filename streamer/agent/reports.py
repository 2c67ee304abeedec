"""The agent's own records: what is observed, the account so far, and every loss."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import msgspec

from streamer import __version__
from streamer.agent.cells import CpuAccount, CpuAccounts, by_kind, marks, unread
from streamer.agent.counters import KernelCounters, faults
from streamer.agent.crew import Crew
from streamer.agent.losses import Lost
from streamer.agent.payers import Payers
from streamer.agent.ring_account import Marks, RingAccount
from streamer.agent.watermarks import Watermarks
from streamer.config.settings import Filters
from streamer.events.catalogue import SELECTABLE
from streamer.events.envelope import Envelope
from streamer.events.kinds import TaskEvent
from streamer.events.stream import (
    CpuMark,
    Dropped,
    KindCounts,
    KindReport,
    PreviousRun,
    ProgramReport,
    ReaderCounts,
    SinkCounts,
    StreamHeartbeat,
    StreamLoss,
    StreamManifest,
)
from streamer.events.summaries import SUMMARIES
from streamer.kernel.bulk_rings import BULK
from streamer.kernel.cgroups import what_is_unseen as cgroups_unseen
from streamer.kernel.grace_period import wait_for_programs
from streamer.kernel.state import KernelState
from streamer.ring.reader import RingReader
from streamer.sinks.base import Cell, Sink, SinkAccount


class Reporter:
    """Makes the records of the stream from the state of kernel, reader and sinks."""

    def __init__(
        self,
        envelope: Envelope,
        kernel: KernelState,
        reader: RingReader,
        filters: Filters,
        crew: Crew,
    ) -> None:
        """`filters` are named in the manifest; `crew` are the further workers."""
        self._envelope = envelope
        self._kernel = kernel
        self._crew = crew
        self._filters = filters
        self._since_ns = 0
        self._counters = KernelCounters(kernel.counters, kernel.kind_counters, kernel.cpus)
        self.account = RingAccount(reader, self._counters)
        """Of what this process reads."""
        self._cells = CpuAccounts(self._counters, self._read_of, self._passed)
        self._left_read: dict[int, Counter[str]] = {}
        self._payers = Payers(kernel)
        self.watermarks = Watermarks(self.seqs, wait_for_programs)
        self._missed_told: Counter[str] = Counter()
        self._started = time.monotonic()

    @property
    def uptime(self) -> float:
        """Seconds since the reporter was made."""
        return time.monotonic() - self._started

    def configured(self, filters: Filters, boot_ns: int) -> None:
        """What `manifest` tells as in force, and since when, in nanoseconds since boot."""
        timing = self._envelope.timing
        self._filters = filters
        self._since_ns = boot_ns if timing is None else timing.moment(boot_ns)

    def counts(self, made: Mapping[str, int]) -> dict[str, KindCounts]:
        """The counts per kind. `made` has those of the summaries, one as good as the other."""
        return _counts(self._cells.look(), made)

    def _read_of(self, cpu: int) -> Mapping[str, int]:
        """Of all workers, and what one had read that has ended."""
        left = self._left_read.get(cpu, Counter())
        return self.account.read(cpu) + self._crew.read_of(cpu) + left

    def _passed(self) -> Marks:
        return self.account.passed() | self._crew.passed

    def left_behind(self, reason: str) -> Lost:
        """When all is read: what a worker that ended had read, and never said what became of it.

        It counts as read from then on.
        """
        self._left_read = left = unread(self._cells.look(final=True), BULK)
        return self.account.left_behind(sum(left.values(), Counter()), reason)

    @property
    def missed_runs(self) -> int:
        """Runs of programs that the kernel left out, as far as they were told."""
        return self._missed_told.total()

    @property
    def missed_by_program(self) -> dict[str, int]:
        """The same, per program."""
        return dict(self._missed_told)

    @property
    def closes(self) -> bool:
        """Whether all that was counted has its number, or was kept back."""
        return self._cells.closes

    def lost_in_kernel(self) -> int:
        """Events that found no room in the kernel since the start."""
        return sum(lost for *_, lost in self._counters.of_kinds().values())

    def shed(self) -> dict[str, int]:
        """Events kept back by sampling since the start, per kind of which there were any."""
        return self._counters.shed()

    def faults(self) -> dict[str, int]:
        """What went wrong in the kernel apart from numbered losses."""
        return faults(self._kernel.faults)

    def counts_and_marks(
        self, made: Mapping[str, int], *, final: bool = False
    ) -> tuple[dict[str, KindCounts], list[CpuMark]]:
        """`counts`, and the same of each ring and CPU with how far its sequence has come.

        `final`: nothing is counted any more.
        """
        cells = self._cells.look(final=final)
        return _counts(cells, made), marks(cells, self._watermark)

    def _watermark(self, ring: str, cpu: int) -> int:
        exact, timing = self.watermarks.of(ring, cpu), self._envelope.timing
        return exact if timing is None else timing.moment(exact)

    def programs(self) -> list[ProgramReport]:
        """What became of each program."""
        return [
            ProgramReport(p.name, p.sensor, p.hook, p.way, p.kinds, p.status, p.reason)
            for p in self._kernel.statuses
        ]

    def manifest(
        self,
        kinds: Iterable[str],
        sinks: Iterable[Sink],
        previous: PreviousRun | None,
        changes: Sequence[str] = (),
    ) -> StreamManifest:
        """What is observed of `kinds`, and how; the run before; what has just been changed."""
        system, timing = os.uname(), self._envelope.timing
        return self._envelope.record(
            StreamManifest,
            agent=__version__,
            agent_pid=self._kernel.identity.pids[0],
            initial_mntns=self._kernel.identity.initial_mntns,
            kernel=system.release,
            machine=system.machine,
            cpu_count=self._kernel.cpus,
            ring_bytes=dict(self._kernel.ring_bytes),
            transport="perf" if self._kernel.transport.name == "perf" else "ring",
            transport_reason=self._kernel.transport.reason,
            resolution_ns=timing.resolution_ns if timing is not None else 0,
            coverage={
                kind: KindReport(state.status, state.reason, unseen_of(kind))
                for kind, state in self._kernel.coverage(frozenset(kinds)).items()
            },
            programs=self.programs(),
            filters=filters_in_force(self._filters),
            sinks=[sink.name for sink in sinks],
            previous=previous,
            kernel_types=self._kernel.types.words,
            shedding=self._kernel.shedding,
            workers=len(self._crew.members) + 1,
            since_boot_ns=self._since_ns,
            changes=list(changes),
        )

    def heartbeat(
        self, made: Mapping[str, int], sinks: Iterable[Sink], *, final: bool = False
    ) -> StreamHeartbeat:
        """The account so far; `final`: nothing follows it. `made` is as of `counts`."""
        counts, by_cpu = self.counts_and_marks(made, final=final)
        return self._envelope.record(
            StreamHeartbeat,
            uptime_seconds=round(self.uptime, 3),
            counts=counts,
            marks=by_cpu,
            sink_counts=counts_by_name(sinks, self._crew.held),
            reader=self.reader_counts(),
            faults=self.faults(),
            missed=self._kernel.missed(),
            final=final,
            refused=self._payers.refused(),
        )

    def complete(self) -> Marks:
        """Per ring and CPU, the number up to which each event was read or is known to be lost.

        Of what further workers read, up to which all were delivered, or are told as lost: they do
        not wait for what is published here.
        """
        return self.account.complete() | self._crew.settled

    def seqs(self) -> dict[str, list[int]]:
        """Per ring, the last sequence number taken on each CPU."""
        return self._counters.seqs()

    def missed(self) -> list[Lost]:
        """Runs of programs that the kernel left out since the last time."""
        now = Counter(self._kernel.missed())
        new, self._missed_told = now - self._missed_told, now
        return [
            Lost(
                stage="kernel",
                count=runs,
                kinds={},
                reason=f"{name} was not run, its CPU was running a program already: "
                "each may have been an event, or something of one",
            )
            for name, runs in new.items()
        ]

    def loss_record(self, lost: Lost, sink: Sink) -> StreamLoss:
        """A loss as the sink is told it."""
        in_kernel = lost.ring is not None
        return self._envelope.record(
            StreamLoss,
            stage=lost.stage,
            count=lost.count,
            kinds=dict(lost.kinds),
            ring=lost.ring,
            cpu=lost.cpu,
            seq_from=lost.ranges[0].seq_from if in_kernel else None,
            seq_to=lost.ranges[-1].seq_to if in_kernel else None,
            sink=sink.name if lost.stage == "sink" else None,
            reason=lost.reason,
            ranges=list(lost.ranges),
        )

    def reader_counts(self) -> ReaderCounts:
        """What the readers met."""
        return self._crew.reader_counts(self.account.reader_counts())


def _counts(cells: Mapping[int, CpuAccount], made: Mapping[str, int]) -> dict[str, KindCounts]:
    summaries = {
        kind: KindCounts(produced=n, filtered=0, shed=0, lost=0, read=n)
        for kind in SUMMARIES
        if (n := made.get(kind, 0))
    }
    return by_kind(cells.values()) | summaries


def unseen_of(kind: str) -> tuple[str, ...]:
    """What is never observed of a kind, on this host."""
    info, cgroups = SELECTABLE[kind], cgroups_unseen()
    return (
        (*info.unseen, cgroups) if cgroups and issubclass(info.struct, TaskEvent) else info.unseen
    )


def filters_in_force(filters: Filters) -> dict[str, list[str]]:
    """The filters that are set, as strings."""
    return {
        name: [str(value) for value in values]
        for name, values in msgspec.structs.asdict(filters).items()
        if values
    }


def sink_counts(sink: Sink, elsewhere: int = 0) -> SinkCounts:
    """A sink's account in totals; `elsewhere`, by other workers, so many bytes are held for it."""
    account = sink.account
    return SinkCounts(
        received=account.received.total(),
        delivered=account.delivered.total(),
        dropped=account.dropped.total(),
        pending=account.pending,
        pending_bytes=sink.watermarks.held + elsewhere,
        status=sink.status,
        spooled=sink.spooled,
        recovered=sink.recovered,
        kinds={
            kind: (n, account.delivered[kind], account.dropped[kind])
            for kind, n in account.received.items()
        },
        dropped_of=dropped_of(account.cells),
    )


def dropped_of(cells: Mapping[Cell, int]) -> list[Dropped]:
    """What was dropped per ring, CPU and kind, by ring and CPU."""
    found: dict[tuple[str, int], dict[str, int]] = {}
    for (ring, cpu, kind), count in sorted(cells.items()):
        found.setdefault((ring, cpu), {})[kind] = count
    return [Dropped(*place, kinds) for place, kinds in found.items()]


def counts_by_name(
    sinks: Iterable[Sink], elsewhere: Callable[[Sink], int]
) -> dict[str, SinkCounts]:
    """The accounts of sinks. Of two of one name, of which the later replaces the other, the sum."""
    found: dict[str, SinkCounts] = {}
    cells: defaultdict[str, Counter[Cell]] = defaultdict(Counter)
    for sink in sinks:
        counts = sink_counts(sink, elsewhere(sink))
        cells[sink.name].update(sink.account.cells)
        if (before := found.get(sink.name)) is not None:
            counts.dropped_of = dropped_of(cells[sink.name])
            for name in SinkCounts.__struct_fields__:
                if name not in ("status", "kinds", "dropped_of"):
                    setattr(counts, name, getattr(counts, name) + getattr(before, name))
            for kind, row in before.kinds.items():
                received, delivered, dropped = counts.kinds.get(kind, (0, 0, 0))
                counts.kinds[kind] = received + row[0], delivered + row[1], dropped + row[2]
        found[sink.name] = counts
    return found


def account_line(
    kinds: Mapping[str, KindCounts],
    sinks: Iterable[Sink],
    seconds: float,
    missed: int = 0,
    gone: Mapping[str, SinkAccount] = MappingProxyType({}),
) -> str:
    """What was produced and what became of it, in one line. Stream records are not counted.

    `missed` are runs of programs that the kernel left out, `gone` the accounts of sinks that the
    run has no more.
    """
    produced, filtered, shed, lost, read = (
        sum(getattr(counts, name) for counts in kinds.values())
        for name in ("produced", "filtered", "shed", "lost", "read")
    )
    parts = [f"{produced:,} events in {seconds:.1f} s"]
    for name, account in gone.items():
        parts.append(f"{name} {settled(account)} until it was taken out")
    for sink in sinks:
        kept = sum(n for kind, n in sink.kept.items() if not kind.startswith("stream."))
        spooled = f", {kept:,} in the spool" if kept else ""
        parts.append(f"{sink.name} {settled(sink.account)}{spooled}")
    parts.append(f"{filtered:,} filtered, {lost:,} lost")
    if shed:
        parts.append(f"{shed:,} shed")
    unread = produced - filtered - shed - lost - read
    if unread:
        parts.append(f"{unread:,} not read")
    if missed:
        parts.append(f"{missed:,} times a program was not run")
    return "; ".join(parts)


def settled(account: SinkAccount) -> str:
    """What a sink delivered and dropped, without the records of the stream itself."""
    delivered, dropped = (
        sum(n for kind, n in counter.items() if not kind.startswith("stream."))
        for counter in (account.delivered, account.dropped)
    )
    return f"{delivered:,} delivered, {dropped:,} dropped"
