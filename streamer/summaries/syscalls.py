"""`syscall.latency`: durations by system call, out of `bpf/kprobe_syscall_latency.bpf.c`."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import NamedTuple

from streamer.errors import HelperGone
from streamer.events.envelope import Envelope
from streamer.events.summaries import SyscallLatency
from streamer.events.timing import Timing
from streamer.kernel.objects import CONTRACT
from streamer.kernel.state import KernelState, size_of, syscall_places
from streamer.summaries.tables import CounterTable, entries_of

_ALL = 0
_COUNTS = size_of("syscall_counts")
_WORDS = entries_of("syscall_counts")
_AT = {name: (offset // 8, size // 8) for name, offset, size in CONTRACT["syscall_counts"]}
_SETTINGS = {name: offset for name, offset, _ in CONTRACT["syscall_settings"]}
_CGROUP = struct.Struct("<QII")
_PERCENTILES = (0.5, 0.9, 0.99)
_ENTRY = struct.Struct(f"<Q{_WORDS}Q")
_NOTHING = (0,) * _WORDS


class Counted(NamedTuple):
    """What came of calls. `buckets` are by the highest bit of the nanoseconds."""

    calls: int = 0
    errors: int = 0
    total_ns: int = 0
    missed: int = 0
    max_ns: int = 0
    buckets: tuple[int, ...] = ()

    def and_also(self, other: Counted) -> Counted:
        """Both together."""
        longest = zip_longest(self.buckets, other.buckets, fillvalue=0)
        return Counted(
            self.calls + other.calls,
            self.errors + other.errors,
            self.total_ns + other.total_ns,
            self.missed + other.missed,
            max(self.max_ns, other.max_ns),
            tuple(map(sum, longest)),
        )


def between(before: Sequence[int], now: Sequence[int], period: int) -> Counted:
    """What was counted between two looks at a `struct syscall_counts`, as words.

    `period` has just ended. The longest call of the one before is told now if it was written so
    late that nobody has seen it.
    """
    grown = [new - old for old, new in zip(before, now, strict=True)]
    at, size = _AT["buckets"]
    buckets = grown[at : at + size]
    while buckets and not buckets[-1]:
        buckets.pop()
    return Counted(
        calls=grown[_AT["count"][0]],
        errors=grown[_AT["errors"][0]],
        total_ns=grown[_AT["total_ns"][0]],
        missed=grown[_AT["missed"][0]],
        # One that is being counted has its bucket first.
        max_ns=max(_longest(before, now, period), 1 << len(buckets) >> 1),
        buckets=tuple(buckets),
    )


def _longest(before: Sequence[int], now: Sequence[int], period: int) -> int:
    at, _ = _AT["longest"]
    found = 0
    for place in (at, at + 2):
        that_period, ns = now[place : place + 2]
        late = that_period == period - 1 and now[place : place + 2] != before[place : place + 2]
        if that_period == period or late:
            found = max(found, ns)
    return found


def coarse(counted: Counted, timing: Timing, cgroup: int) -> Counted:
    """The same with nothing about durations below the resolution."""
    short, rest = counted.buckets[: timing.least_bit + 1], counted.buckets[timing.least_bit + 1 :]
    longest = timing.duration(counted.max_ns, cgroup)
    return counted._replace(
        # No less than the longest, which the mean of it and of others that took 0 can be.
        total_ns=max(timing.total(counted.total_ns, counted.calls, cgroup), longest),
        max_ns=longest,
        buckets=(*[0] * timing.least_bit, sum(short), *rest) if short else (),
    )


def percentile(counted: Counted, share: float) -> int:
    """The nanoseconds that so large a share of the calls took at most: the end of a bucket."""
    left = share * sum(counted.buckets)
    for bit, count in enumerate(counted.buckets):
        left -= count
        if count and left <= 0:
            return min((2 << bit) - 1, counted.max_ns)
    return 0


class Total(NamedTuple):
    """What has come together."""

    calls: int = 0
    errors: int = 0
    total_ns: int = 0

    def plus(self, counted: Counted) -> Total:
        """With what has come since."""
        return Total(
            self.calls + counted.calls,
            self.errors + counted.errors,
            self.total_ns + counted.total_ns,
        )


class _CgroupTable:
    """What was counted by cgroup and call, in a table of which the oldest entries make way."""

    def __init__(
        self, kernel: KernelState, settings: mmap.mmap, coarse: Callable[[Counted, int], Counted]
    ) -> None:
        self._kernel = kernel
        self._coarse = coarse
        self._settings = settings
        self._held: list[tuple[bytes, bytes]] | None = None
        self._before: dict[bytes, tuple[int, ...]] = {}
        self._totals: dict[bytes, Total] = {}
        self._evicted = 0
        self.changed: dict[tuple[int, int], tuple[Counted, Total]] = {}
        """By cgroup and number of the call, what the last `read` found."""

    def hold(self) -> None:
        """Keep for the next `read` what there is now. Nothing, if the helper has ended."""
        self._held = []
        with suppress(HelperGone):
            self._held = self._kernel.read("syscall_cgroup_table")

    def read(self, ended: int) -> int:
        """Find what has changed. How many entries have made way for others since the last time."""
        (made,) = struct.unpack_from("<Q", self._settings, _SETTINGS["cgroup_entries"])
        found = self._held
        if found is None:
            found = self._kernel.read("syscall_cgroup_table")
        entries = {key: _ENTRY.unpack(value) for key, value in found}
        self.changed = {}
        for key, entry in entries.items():
            self._look_at(key, entry, ended)
        self._before = entries
        self._totals = {key: total for key, total in self._totals.items() if key in entries}
        evicted = max(made - len(entries), self._evicted)
        since: int = evicted - self._evicted
        self._evicted = evicted
        return since

    def _look_at(self, key: bytes, entry: tuple[int, ...], ended: int) -> None:
        since, now = entry[0], entry[1:]
        before = self._before.get(key)
        if before is None or before[0] != since:  # another one than before, of the same key
            before = (since, *_NOTHING)
            self._totals.pop(key, None)
        cgroup, number, _ = _CGROUP.unpack(key)
        counted = self._coarse(between(before[1:], now, ended), cgroup)
        if counted.calls:
            self._totals[key] = total = self._totals.get(key, Total()).plus(counted)
            self.changed[cgroup, number] = counted, total


class SyscallSummary:
    """Makes a record for each call that was made, and one for each cgroup that made it."""

    kind = "syscall.latency"

    def __init__(self, kernel: KernelState, envelope: Envelope) -> None:
        """Tells the programs what to count.

        Raises:
            KeyError: the sensor is not loaded.
            OSError: a table cannot be mapped.
        """
        self._envelope = envelope
        self._kernel = kernel
        self._cpus = kernel.cpus
        self._places = syscall_places(kernel.kernel_settings)
        size = -(-_COUNTS * kernel.cpus * len(self._places) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._table = CounterTable(kernel.table("syscalls", size), size, _WORDS)
        self._totals: dict[int, Total] = {}
        self._period = 1
        settings = kernel.table("syscall_settings", size_of("syscall_settings"), writable=True)
        self._settings = settings
        wanted = kernel.kernel_settings.syscall_cgroups
        self._cgroups = _CgroupTable(kernel, settings, self._coarse) if wanted else None
        self._count_in(self._period)

    def _count_in(self, period: int) -> None:
        struct.pack_into("<Q", self._settings, _SETTINGS["period"], period)

    def hold(self) -> None:
        """Read now what cannot be read any more once the programs are unloaded."""
        if self._cgroups is not None:
            self._cgroups.hold()

    def collect(self, period_ns: int) -> Iterator[SyscallLatency]:
        """The records of a period, in nanoseconds, that ends now."""
        ended, self._period = self._period, self._period + 1
        self._count_in(self._period)
        found: dict[int, Counted] = {}
        for index, before, now in self._table.changes():
            place = index // self._cpus
            found[place] = found.get(place, Counted()).and_also(between(before, now, ended))
        for place in sorted(found):
            counted = self._coarse(found[place], _ALL)
            self._totals[place] = total = self._totals.get(place, Total()).plus(counted)
            if counted.calls or counted.missed:
                yield self._record(place, _ALL, counted, total, period_ns, 0)
        if self._cgroups is not None:
            yield from self._of_cgroups(self._cgroups, ended, period_ns)

    def _coarse(self, counted: Counted, cgroup: int) -> Counted:
        timing = self._envelope.timing
        return counted if timing is None else coarse(counted, timing, cgroup)

    def _of_cgroups(
        self, table: _CgroupTable, ended: int, period_ns: int
    ) -> Iterator[SyscallLatency]:
        by_number = {place.number: index for index, place in enumerate(self._places)}
        evicted = table.read(ended)
        for (cgroup, number), (counted, total) in sorted(table.changed.items()):
            yield self._record(by_number[number], cgroup, counted, total, period_ns, evicted)

    def _record(
        self, index: int, cgroup: int, counted: Counted, total: Total, period_ns: int, evicted: int
    ) -> SyscallLatency:
        place = self._places[index]
        p50, p90, p99 = (percentile(counted, share) for share in _PERCENTILES)
        return self._envelope.record(
            SyscallLatency,
            period_ns=period_ns,
            syscall=place.name,
            number=place.number,
            cgroup_id=cgroup,
            count=counted.calls,
            errors=counted.errors,
            duration_sum_ns=counted.total_ns,
            p50_ns=p50,
            p90_ns=p90,
            p99_ns=p99,
            max_ns=counted.max_ns,
            buckets=counted.buckets,
            unreturned=counted.missed,
            count_total=total.calls,
            errors_total=total.errors,
            duration_total_ns=total.total_ns,
            cgroups_evicted=evicted,
        )
