"""The account: what the kernel produced, and what became of it."""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from streamer.events import RECORDS
from streamer.gaps import Loss
from streamer.kernel.loader import STREAMS, counters_stride
from streamer.kernel.objects import CONTRACT
from streamer.stream_events import CpuMark, KindCounts

_AT = {name: offset for name, offset, _ in CONTRACT["cpu_counters"]}
_PER_KIND = struct.Struct("<3Q")  # struct kind_counters: produced, filtered, lost
_FIELDS = tuple(name for name, _, _ in CONTRACT["kind_counters"])
assert _FIELDS == ("produced", "filtered", "lost")


class KernelCounters:
    """Reads `struct cpu_counters` of every CPU from the mapped array."""

    def __init__(self, counters: mmap.mmap, cpus: int) -> None:
        """`counters` holds one struct per CPU."""
        self._counters = counters
        self.cpus = cpus
        self._stride = counters_stride()

    def of_kind(self, number: int) -> tuple[int, int, int]:
        """Produced, filtered and lost of a kind, on all CPUs."""
        rows = [self._row(cpu, number) for cpu in range(self.cpus)]
        return sum(r[0] for r in rows), sum(r[1] for r in rows), sum(r[2] for r in rows)

    def lost(self, cpu: int) -> dict[str, int]:
        """Lost on one CPU, per kind that lost any."""
        rows = ((layout.kind, self._row(cpu, n)[2]) for n, layout in RECORDS.items())
        return {kind: lost for kind, lost in rows if lost}

    def kinds(self, read: Mapping[str, int]) -> dict[str, KindCounts]:
        """The counts of every kind that was produced; `read` is what came out of the rings."""
        found = {}
        for number, layout in RECORDS.items():
            counts = self.of_kind(number)
            if any(counts):
                found[layout.kind] = KindCounts(*counts, read.get(layout.kind, 0))
        return found

    def marks(self, passed: Mapping[tuple[str, int], int]) -> list[CpuMark]:
        """Sequence per ring and CPU that has any; `passed` is the reader's."""
        marks = []
        for cpu in range(self.cpus):
            seqs, skipped = self._streams(cpu, "seq"), self._streams(cpu, "skipped")
            for i, ring in enumerate(STREAMS):
                if seqs[i]:
                    read = passed.get((ring, cpu), 0)
                    marks.append(CpuMark(ring, cpu, seqs[i], read, skipped[i]))
        return marks

    def _row(self, cpu: int, number: int) -> tuple[int, int, int]:
        at = cpu * self._stride + _AT["kinds"] + number * _PER_KIND.size
        produced, filtered, lost = _PER_KIND.unpack_from(self._counters, at)
        return produced, filtered, lost

    def _streams(self, cpu: int, name: str) -> tuple[int, ...]:
        at = cpu * self._stride + _AT[name]
        return struct.unpack_from(f"<{len(STREAMS)}Q", self._counters, at)


class LossLedger:
    """Tells which kinds a gap was made of, from the kernel's counters of failed reserves."""

    def __init__(self, counters: KernelCounters, rings: Mapping[str, str]) -> None:
        """`rings`: the ring that each kind travels in."""
        self._counters = counters
        self._rings = rings
        self._told: dict[int, Counter[str]] = {}

    def kinds(self, ring: str, loss: Loss) -> dict[str, int]:
        """Counts per kind for a loss, as far as they are known; they add up to at most its count.

        Each failed reserve that the kernel counted is attributed to one loss only.
        """
        told = self._told.setdefault(loss.cpu, Counter())
        found: dict[str, int] = {}
        room = loss.count
        for kind, lost in self._counters.lost(loss.cpu).items():
            if self._rings[kind] == ring and room:
                part = min(lost - told[kind], room)
                if part > 0:
                    found[kind] = part
                    told[kind] += part
                    room -= part
        return found


def missed_runs(program_fds: Mapping[str, int]) -> dict[str, int]:
    """Runs that the kernel left out because a program was running on that CPU already.

    From `recursion_misses` in the program's fdinfo (kernel 5.12 and newer).
    """
    missed = {}
    for name, fd in program_fds.items():
        with suppress(OSError):
            for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
                key, _, value = line.partition(":")
                if key == "recursion_misses" and int(value):
                    missed[name] = int(value)
    return missed
