"""Drains the rings on the event loop.

A timer looks at every ring; a wake-up from the kernel, which comes only when a ring is filling
fast or the reader sleeps, is answered sooner. Each callback drains a bounded number of records
and goes back to the loop, so that the sinks get their turn. A paused reader leaves the records
in the rings, where the kernel counts what no longer fits.
"""

from __future__ import annotations

import asyncio
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping

from streamer.batch import Batch
from streamer.envelope import Envelope, clock_offset_ns
from streamer.events import CONTRACT, HEADER, RECORDS
from streamer.gaps import GapTracker, Loss
from streamer.kernel.loader import STREAMS, counters_stride
from streamer.records import Decoder, Ring

LOOKS_IN_VAIN = 5
"""Looks at empty rings before the reader goes to sleep: at moderate rates it had better not."""

_WAITING = struct.Struct(f"<{len(STREAMS)}I")  # struct reader_state
_SEQ_AT = {name: offset for name, offset, _ in CONTRACT["cpu_counters"]}["seq"]


class RingSource:
    """One ring: its mapping, its decoder and its gaps."""

    def __init__(self, name: str, fd: int, size: int, envelope: Envelope) -> None:
        """Map the ring `fd` with a data area of `size` bytes."""
        self.name = name
        self.fd = fd
        page = mmap.PAGESIZE
        self._consumer = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._producer = mmap.mmap(
            fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
        )
        self.ring = Ring(self._consumer, self._producer, page)
        constants, prefix = envelope.constants(name), envelope.id_prefix(name)
        self.decoder = Decoder(HEADER, RECORDS, constants, prefix)
        self.decoder.clock_offset_ns = clock_offset_ns()
        self.gaps = GapTracker()
        self.more = False


class RingReader:
    """Drains all rings, the most important first, and hands on what it reads.

    Awake, it looks every `poll_interval_ms`. After some looks in vain it tells the programs that
    it sleeps, and the next event wakes it.
    """

    def __init__(
        self,
        sources: list[RingSource],
        state: mmap.mmap,
        *,
        on_batch: Callable[[Batch], None],
        on_error: Callable[[Exception], None],
        poll_interval_ms: int,
        drain_records: int,
    ) -> None:
        """`state` is the mapped `struct reader_state`.

        `on_batch` gets the events of each drain, and may call `pause`. `on_error` gets what
        makes further reading impossible, and is called once.
        """
        self.sources = sources
        self.paused = False
        self.pauses = 0
        self._state = state
        self._on_batch = on_batch
        self._on_error = on_error
        self._interval = poll_interval_ms / 1000
        self._drain_records = drain_records
        self._looks_in_vain = 0
        self._armed: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._soon: asyncio.Handle | None = None
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Begin reading."""
        self._wake()

    def stop(self) -> None:
        """Stop reading; `drain_once` still works."""
        for handle in (self._timer, self._soon):
            if handle is not None:
                handle.cancel()
        self._timer = self._soon = None
        self._disarm()

    def pause(self) -> None:
        """Leave the records in the rings until `resume`."""
        if not self.paused:
            self.paused = True
            self.pauses += 1
            self.stop()

    def resume(self) -> None:
        """Read on."""
        if self.paused:
            self.paused = False
            self._wake()

    def drain_once(self) -> bool:
        """One bounded drain of each ring that has records. Whether any has more."""
        for source in self.sources:
            if self.paused:
                return False
            self._drain(source)
        return any(source.more for source in self.sources)

    def _drain(self, source: RingSource) -> None:
        events, kinds, gaps, more, _ = source.ring.drain(source.decoder, self._drain_records)
        source.more = more
        if gaps:
            source.gaps.feed(gaps, self._now_ns())
        if events:
            self._looks_in_vain = 0
            self._on_batch(Batch(events, kinds))

    def _now_ns(self) -> int:
        return int(self._loop.time() * 1e9)

    def _wake(self) -> None:
        self._looks_in_vain = 0
        self._drain_soon()
        if self._timer is None:
            self._timer = self._loop.call_later(self._interval, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._looks_in_vain += 1
        self._continue()
        if self.paused:
            return
        self._arm()
        if self._looks_in_vain == LOOKS_IN_VAIN:
            self._set_waiting(1)
        # One look more after the programs were told: one of them may just have missed it.
        if self._looks_in_vain <= LOOKS_IN_VAIN or len(self._armed) < len(self.sources):
            self._timer = self._loop.call_later(self._interval, self._tick)

    def _continue(self) -> None:
        self._soon = None
        try:
            more = self.drain_once()
        except Exception as error:  # whatever it is: it would come again at every look
            self.paused = True
            self.stop()
            self._on_error(error)
            return
        if more:
            self._drain_soon()

    def _drain_soon(self) -> None:
        if self._soon is None:
            self._soon = self._loop.call_soon(self._continue)

    def _arm(self) -> None:
        """Ask to be woken for rings that are empty now.

        Epoll reports a ring for as long as it holds anything: a ring that is written all the time,
        or whose first record is not finished, would keep the loop spinning. So after each wake-up
        the timer alone looks, until it finds the ring empty.
        """
        for source in self.sources:
            if source.fd not in self._armed and not source.ring.pending:
                self._armed.add(source.fd)
                self._loop.add_reader(source.fd, self._woken, source.fd)

    def _woken(self, fd: int) -> None:
        self._armed.discard(fd)
        self._loop.remove_reader(fd)
        self._set_waiting(0)
        self._wake()

    def _disarm(self) -> None:
        self._set_waiting(0)
        for fd in self._armed:
            self._loop.remove_reader(fd)
        self._armed.clear()

    def _set_waiting(self, waiting: int) -> None:
        _WAITING.pack_into(self._state, 0, *[waiting] * len(STREAMS))

    def refresh_clock(self) -> None:
        """Use the offset between the clocks as it is now."""
        offset = clock_offset_ns()
        for source in self.sources:
            source.decoder.clock_offset_ns = offset

    def look_for_tails(self, kernel_seqs: Mapping[str, list[int]]) -> None:
        """Note records that were numbered before the rings were found empty, and did not come.

        `kernel_seqs`: per ring, the last number taken on each CPU, read before the last drain.
        """
        now = self._now_ns()
        for source in self.sources:
            if source.ring.pending:
                continue
            for cpu, taken in enumerate(kernel_seqs[source.name]):
                expected = source.ring.next_seq(cpu)
                if expected <= taken:
                    source.gaps.tail(cpu, expected, taken, now)

    def losses(self, *, final: bool = False) -> Iterator[tuple[str, Loss]]:
        """Ring and range of every loss that is certain now; with `final`, of every open gap."""
        now = 1 << 63 if final else self._now_ns()
        for source in self.sources:
            for loss in source.gaps.expire(now, source.ring.next_seq):
                yield source.name, loss


def kernel_seqs(counters: mmap.mmap, cpus: int) -> dict[str, list[int]]:
    """Per ring, the last sequence number taken on each CPU."""
    stride = counters_stride()
    rows = [
        struct.unpack_from(f"<{len(STREAMS)}Q", counters, cpu * stride + _SEQ_AT)
        for cpu in range(cpus)
    ]
    return {name: [row[i] for row in rows] for i, name in enumerate(STREAMS)}
