"""CPU time as the scheduler counts it, in nanoseconds: of cgroups, of the kernel's own threads.

`/proc/stat` counts ticks, and whatever else the machine does. A cgroup's `cpu.stat` is the sum of
what its tasks ran, those included that have ended, and so is a thread's CPU clock. Both contain
the system calls, the programs attached to them, and the softirqs and interrupts that come on top
of a task.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple, Self

_KTHREADD = 2
_SCHEDULED = 2  # CPUCLOCK_SCHED in the kernel's include/linux/posix-timers.h


class Reading(NamedTuple):
    """What was used until now; `threads` are those of the kernel, by pid."""

    caller: int
    observer: int
    threads: dict[int, int]

    @classmethod
    def take(cls, caller: Path, observer: Path) -> Self:
        """Read it, for the processes in these two cgroups."""
        return cls(cgroup_ns(caller), cgroup_ns(observer), kernel_threads())


class Sample(NamedTuple):
    """CPU nanoseconds of one operation, by who used them."""

    caller: float
    observer: float
    kernel: float

    @property
    def total(self) -> float:
        """What the host paid, what others on it did in the meantime left out."""
        return self.caller + self.observer + self.kernel

    @classmethod
    def between(cls, before: Reading, after: Reading, operations: int) -> Self:
        """What was used from one reading to the other, for each operation."""
        kernel = sum(ns - before.threads.get(pid, 0) for pid, ns in after.threads.items())
        return cls(
            (after.caller - before.caller) / operations,
            (after.observer - before.observer) / operations,
            kernel / operations,
        )

    def less(self, other: Sample) -> Sample:
        """What this has more than the other."""
        return Sample(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))


def cgroup_ns(directory: Path) -> int:
    """What all tasks of a cgroup (v2) have used."""
    fields = dict(line.split() for line in (directory / "cpu.stat").read_text().splitlines())
    return int(fields["usage_usec"]) * 1000


def kernel_threads() -> dict[int, int]:
    """What each thread of the kernel has used: softirqs, work queues, the audit queue."""
    used = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        pid = int(entry.name)
        try:
            # The command in brackets may contain anything, blanks too.
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if _KTHREADD in (pid, parent):
                used[pid] = time.clock_gettime_ns(~pid << 3 | _SCHEDULED)
        except OSError:  # it has ended
            continue
    return used
