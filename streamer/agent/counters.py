"""The account: what the kernel produced, and what became of it."""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from streamer.events.kinds import KINDS, RECORDS
from streamer.kernel.objects import CONTRACT, KIND_END
from streamer.kernel.state import size_of
from streamer.kernel.tags import RINGS

_AT = {name: offset for name, offset, _ in CONTRACT["cpu_counters"]}
_CPU_BYTES = size_of("cpu_counters")
_PER_KIND = struct.Struct("<4Q")  # struct kind_counters
_OF_CPU = struct.Struct(f"<{4 * KIND_END}Q")
_FIELDS = tuple(name for name, _, _ in CONTRACT["kind_counters"])
assert _FIELDS == ("produced", "filtered", "shed", "lost")
_PER_RING = ("seq", "skipped")
_SHED, _LOST = _FIELDS.index("shed"), _FIELDS.index("lost")
_FAULTS = tuple(
    name.removeprefix("FAULT_").lower()
    for name, _, _ in CONTRACT["enum fault"]
    if name != "FAULT_END"
)
_RING_OF = {kind: RINGS.index(info.ring) for kind, info in KINDS.items()}
_ATTEMPTS = 50
"""Looks at the counters of a CPU, of which a program is changing them: two or three do."""


class CpuCounts(NamedTuple):
    """The counters of one CPU, of one moment."""

    kinds: dict[str, tuple[int, int, int, int]]
    """Produced, filtered, shed and lost of each kind that was produced."""
    seqs: tuple[int, ...]
    """Per ring, as the next."""
    skipped: tuple[int, ...]

    @property
    def closes(self) -> bool:
        """Whether every event that was neither filtered nor shed has a number of its ring."""
        numbered = [0] * len(RINGS)
        for kind, (produced, filtered, shed, _) in self.kinds.items():
            numbered[_RING_OF[kind]] += produced - filtered - shed
        numbers = zip(self.seqs, self.skipped, strict=True)
        return numbered == [seq - skipped for seq, skipped in numbers]


NOTHING = CpuCounts({}, (0,) * len(RINGS), (0,) * len(RINGS))
"""Before programs run."""


class KernelCounters:
    """Reads the counters of every CPU and kind from the mapped arrays."""

    def __init__(self, counters: mmap.mmap, kind_counters: mmap.mmap, cpus: int) -> None:
        """`counters` holds a `struct cpu_counters` per CPU, `kind_counters` a
        `struct kind_counters` per kind and CPU.
        """
        self._counters = counters
        self._kind_counters = kind_counters
        self.cpus = cpus

    def of_kind(self, number: int) -> tuple[int, ...]:
        """Produced, filtered, shed and lost of a kind, on all CPUs."""
        rows = [self._row(cpu, number) for cpu in range(self.cpus)]
        return tuple(map(sum, zip(*rows, strict=True)))

    def of_kinds(self) -> dict[str, tuple[int, ...]]:
        """The same of every kind that was produced."""
        rows = ((layout.kind, self.of_kind(n)) for n, layout in RECORDS.items())
        return {kind: row for kind, row in rows if any(row)}

    def lost(self, cpu: int) -> dict[str, int]:
        """Lost on one CPU, per kind that lost any."""
        rows = ((layout.kind, self._row(cpu, n)[_LOST]) for n, layout in RECORDS.items())
        return {kind: lost for kind, lost in rows if lost}

    def shed(self) -> dict[str, int]:
        """Kept back by sampling on all CPUs, per kind of which any was."""
        return {kind: row[_SHED] for kind, row in self.of_kinds().items() if row[_SHED]}

    def of_cpu(self, cpu: int) -> CpuCounts:
        """All of one CPU: of a moment at which they close, if there is one in so many looks."""
        for _ in range(_ATTEMPTS):
            found = self._of_cpu(cpu)
            if found.closes:
                break
        return found

    def _of_cpu(self, cpu: int) -> CpuCounts:
        # Copied at once, and one right after the other: programs go on counting.
        at, own = cpu * _OF_CPU.size, cpu * _CPU_BYTES
        kinds = self._kind_counters[at : at + _OF_CPU.size]
        rings = self._counters[own : own + _CPU_BYTES]
        counts = _OF_CPU.unpack(kinds)
        rows = ((layout.kind, counts[4 * n : 4 * n + 4]) for n, layout in RECORDS.items())
        return CpuCounts(
            {kind: row for kind, row in rows if any(row)},
            *(struct.unpack_from(f"<{len(RINGS)}Q", rings, _AT[name]) for name in _PER_RING),
        )

    def seqs(self) -> dict[str, list[int]]:
        """Per ring, the last sequence number taken on each CPU."""
        rows = [self._rings(cpu, "seq") for cpu in range(self.cpus)]
        return {ring: [row[i] for row in rows] for i, ring in enumerate(RINGS)}

    def _row(self, cpu: int, number: int) -> tuple[int, ...]:
        at = (cpu * KIND_END + number) * _PER_KIND.size
        return _PER_KIND.unpack_from(self._kind_counters, at)

    def _rings(self, cpu: int, name: str) -> tuple[int, ...]:
        at = cpu * _CPU_BYTES + _AT[name]
        return struct.unpack_from(f"<{len(RINGS)}Q", self._counters, at)


def faults(counters: mmap.mmap) -> dict[str, int]:
    """What went wrong in the kernel apart from numbered losses, by name, if it ever did."""
    counts = struct.unpack_from(f"<{len(_FAULTS)}Q", counters)
    return {name: count for name, count in zip(_FAULTS, counts, strict=True) if count}


class LossLedger:
    """Tells which kinds a gap was made of, from the kernel's counters of failed reserves."""

    def __init__(self, counters: KernelCounters, rings: Mapping[str, str]) -> None:
        """`rings`: the ring that each kind travels in."""
        self._counters = counters
        self._rings = rings
        self._told: dict[int, Counter[str]] = {}

    def kinds(self, ring: str, cpu: int, count: int) -> dict[str, int]:
        """Counts per kind for so many lost, as far as they are known; they add up to at most that.

        Each failed reserve that the kernel counted is attributed to one loss only.
        """
        told = self._told.setdefault(cpu, Counter())
        found: dict[str, int] = {}
        room = count
        for kind, lost in self._counters.lost(cpu).items():
            if self._rings[kind] == ring and room:
                part = min(lost - told[kind], room)
                if part > 0:
                    found[kind] = part
                    told[kind] += part
                    room -= part
        return found
