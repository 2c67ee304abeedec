"""What one process read out of its rings, and what was lost on the way to it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

from streamer.agent.counters import KernelCounters, LossLedger
from streamer.agent.losses import Lost
from streamer.events.kinds import KINDS
from streamer.events.stream import ReaderCounts, SeqRange
from streamer.ring.gaps import Loss
from streamer.ring.reader import RingReader, Source

_UNREAD = "not read when the agent stopped; those in kinds found no room in the kernel"

Marks = dict[tuple[str, int], int]
"""A number of each ring and CPU."""


class RingAccount:
    """Tells how far the reading has come, and every loss once."""

    def __init__(self, reader: RingReader, counters: KernelCounters) -> None:
        """`counters` are the kernel's."""
        self._reader = reader
        self._counters = counters
        self._ledger = LossLedger(counters, {k: info.ring for k, info in KINDS.items()})
        self._undecodable_told = 0
        self._taken_over: set[tuple[str, int]] = set()
        self._told_before: Counter[tuple[str, int]] = Counter()
        self._unsettled: list[SeqRange] = []
        self._left: list[SeqRange] = []
        self._left_count = 0

    def seqs(self) -> dict[str, list[int]]:
        """Per ring, the last sequence number taken on each CPU."""
        return self._counters.seqs()

    def read(self, cpu: int) -> Counter[str]:
        """How many events of a CPU were read, per kind."""
        found: Counter[str] = Counter()
        for source in self._reader.sources:
            if cpu in source.cpus:
                found.update(source.decoder.drained(cpu))
        return found

    def passed(self) -> Marks:
        """The last number that came out of each ring, of each CPU."""
        return {
            (source.name, cpu): source.ring.next_seq(cpu) - 1
            for source in self._reader.sources
            for cpu in source.cpus
        }

    def complete(self) -> Marks:
        """Per ring and CPU, the number up to which each event was read or is known to be lost."""
        found = {}
        for source in self._reader.sources:
            for cpu in source.cpus:
                number = source.gaps.complete(cpu, source.ring.next_seq(cpu) - 1)
                if number:
                    found[source.name, cpu] = number
        return found

    def take_over(
        self,
        sources: Iterable[Source],
        unsettled: Iterable[SeqRange],
        told: Mapping[tuple[str, int], int],
    ) -> None:
        """Another reader has left these: what it read last cannot be told from losses here.

        What it had passed has `unsettled` numbers: among them may be some of which it knew, or was
        about to find out, that they had found no room in the kernel. Of those it had `told` so
        many, per ring and CPU.
        """
        for source in sources:
            self._taken_over |= {(source.name, cpu) for cpu in source.cpus}
        self._unsettled += unsettled
        self._told_before.update(told)

    def left_behind(self, unread: Mapping[str, int], reason: str) -> Lost:
        """What was found missing where another reader has left, when all is read.

        So many of each kind are `unread` by the account: it had read them, and did not say what
        became of them. Others among these numbers found no room in the kernel.
        """
        kinds = {kind: n for kind, n in unread.items() if n > 0}
        untold = sum(max(self._lost(*one) - self._told_before[one], 0) for one in self._taken_over)
        count = max(self._left_count, sum(kinds.values()) + untold)
        # Behind what was passed all is known; before it only that some was lost.
        ranges = [*self._left, *(self._unsettled if untold else ())]
        return Lost("sink", reason, count, kinds, tuple(ranges))

    def _lost(self, ring: str, cpu: int) -> int:
        """What found no room in the kernel since the start."""
        lost = self._counters.lost(cpu).items()
        return sum(count for kind, count in lost if KINDS[kind].ring == ring)

    def losses(self, *, final: bool = False) -> list[Lost]:
        """What was lost in the kernel or in the decoder since the last time.

        With `final`, also what is still in the rings: nobody will read it.
        """
        unread = {source.name for source in self._reader.sources if final and source.ring.pending}
        return [*self._kernel_losses(unread, final=final), *self._undecodable()]

    def reader_counts(self) -> ReaderCounts:
        """What the reader met."""
        decoders = [source.decoder for source in self._reader.sources]
        return ReaderCounts(
            unknown_kind=sum(d.unknown_kind for d in decoders),
            short_record=sum(d.short_record for d in decoders),
            invalid_utf8=sum(d.invalid_utf8 for d in decoders),
            truncated=sum(d.truncated for d in decoders),
            incomplete=sum(d.incomplete for d in decoders),
            pauses=self._reader.pauses,
        )

    def _kernel_losses(self, unread: set[str], *, final: bool) -> Iterator[Lost]:
        found: dict[tuple[str, int], list[Loss]] = defaultdict(list)
        for ring, loss in self._reader.losses(final=final):
            found[ring, loss.cpu].append(loss)
        for (ring, cpu), losses in found.items():
            count = sum(loss.count for loss in losses)
            ranges = tuple(SeqRange(ring, cpu, loss.first, loss.last) for loss in losses)
            if (ring, cpu) in self._taken_over:
                self._left += ranges
                self._left_count += count
                continue
            kinds = self._ledger.kinds(ring, cpu, count)
            stopped = ring in unread and sum(kinds.values()) < count
            yield Lost(
                stage="stop" if stopped else "kernel",
                reason=_UNREAD if stopped else "no room in the kernel",
                count=count,
                kinds=kinds,
                ranges=ranges,
                ring=ring,
                cpu=cpu,
            )

    def _undecodable(self) -> Iterator[Lost]:
        counts = self.reader_counts()
        refused = counts.unknown_kind + counts.short_record
        if refused > self._undecodable_told:
            count, self._undecodable_told = refused - self._undecodable_told, refused
            yield Lost(
                stage="decode",
                count=count,
                kinds={},
                reason="records of unknown kind, or shorter than their kind",
            )
