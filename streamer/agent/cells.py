"""The account of each ring, CPU and kind, all of one CPU of a moment at which it closes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from streamer.agent.counters import NOTHING, CpuCounts, KernelCounters
from streamer.events.kinds import KINDS
from streamer.events.stream import CellCounts, CpuMark, KindCounts
from streamer.kernel.tags import RINGS


class CpuAccount(NamedTuple):
    """What the kernel counted on one CPU, and what was read of it by then."""

    counts: CpuCounts
    read: Mapping[str, int]
    passed: Mapping[str, int]
    """The last number of each ring that the readers had passed."""

    def cells(self, ring: str | None = None) -> Iterator[tuple[str, CellCounts]]:
        """The kinds of a ring, or of all."""
        for kind, row in self.counts.kinds.items():
            if ring is None or KINDS[kind].ring == ring:
                yield kind, (*row, self.read.get(kind, 0))


class CpuAccounts:
    """Looks at the account of every CPU."""

    def __init__(
        self,
        counters: KernelCounters,
        read: Callable[[int], Mapping[str, int]],
        passed: Callable[[], Mapping[tuple[str, int], int]],
    ) -> None:
        """Before anything is counted. `read` says how many events of a CPU were read so far, per
        kind; `passed` up to which number, per ring and CPU.
        """
        self._counters = counters
        self._read = read
        self._passed = passed
        self._last = {cpu: CpuAccount(NOTHING, {}, {}) for cpu in range(counters.cpus)}

    @property
    def closes(self) -> bool:
        """Whether the account of every CPU does now."""
        return all(self._counters.of_cpu(cpu).closes for cpu in self._last)

    def look(self, *, final: bool = False) -> Mapping[int, CpuAccount]:
        """By CPU.

        Programs count while one looks. Of a CPU whose account did not close in many looks it is
        that of the time before; unless it is `final`, when nothing is counted any more.
        """
        passed = self._passed()
        for cpu in self._last:
            counts = self._counters.of_cpu(cpu)
            if counts.closes or final:
                numbers = {ring: passed.get((ring, cpu), 0) for ring in RINGS}
                self._last[cpu] = CpuAccount(counts, self._read(cpu), numbers)
        return dict(self._last)


def by_kind(accounts: Iterable[CpuAccount]) -> dict[str, KindCounts]:
    """The sums over all CPUs, in the order of the kinds."""
    found: dict[str, KindCounts] = {}
    for account in accounts:
        for kind, cell in account.cells():
            before = found.get(kind)
            sums = cell if before is None else map(sum, zip(_row(before), cell, strict=True))
            found[kind] = KindCounts(*sums)
    return {kind: found[kind] for kind in KINDS if kind in found}


def unread(accounts: Mapping[int, CpuAccount], ring: str) -> dict[int, Counter[str]]:
    """What nobody has read of a ring, and did not get lost, by the account."""
    found = {}
    for cpu, account in accounts.items():
        left: Counter[str] = Counter()
        for kind, (produced, filtered, shed, lost, read) in account.cells(ring):
            left[kind] = produced - filtered - shed - lost - read
        found[cpu] = +left
    return found


def marks(
    accounts: Mapping[int, CpuAccount], watermark: Callable[[str, int], int]
) -> list[CpuMark]:
    """Of each ring and CPU that was used.

    `watermark` gives the time that nothing older follows of a ring and CPU, or 0.
    """
    found = []
    for cpu, account in accounts.items():
        for ring, seq, skipped in zip(RINGS, *account.counts[1:], strict=True):
            kinds = dict(account.cells(ring))
            if seq or kinds:
                read = account.passed[ring]
                found.append(CpuMark(ring, cpu, seq, read, skipped, watermark(ring, cpu), kinds))
    return found


def _row(counts: KindCounts) -> CellCounts:
    return counts.produced, counts.filtered, counts.shed, counts.lost, counts.read
