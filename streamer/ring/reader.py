"""Drains the rings on the event loop.

A timer looks at every ring; a wake-up from the kernel, which comes only when a ring is filling
fast or the reader sleeps, is answered sooner. Each callback drains a bounded number of records
and goes back to the loop, so that the sinks get their turn. A paused reader leaves the records
in the rings, where the kernel counts what no longer fits. The bulk ring is paused first.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import select
import struct
from abc import ABC, abstractmethod
from bisect import bisect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter

from streamer.events.batch import Batch, Event
from streamer.events.clock import clock_offset_ns
from streamer.events.envelope import Envelope
from streamer.events.kinds import HEADER, RECORDS
from streamer.events.layout import with_time
from streamer.events.parsed import hiding
from streamer.events.spans import Place, Span, Spans, join_spans
from streamer.kernel import bulk_rings
from streamer.kernel.loader import Transport
from streamer.kernel.objects import CONTRACT
from streamer.kernel.tags import RINGS
from streamer.ring.gaps import GapTracker, Loss
from streamer.ring.records import Decoder, Gap, PerfBuffers, Ring

LOOKS_IN_VAIN = 5
"""Looks at empty rings before the reader goes to sleep: at moderate rates it had better not."""

AGAIN = 1 << 16
"""Of a ring buffer's data, so much is mapped again behind it, for the record at its end: more than
any record has. All of it would count as resident memory twice.
"""

_WAKE = {name: number for name, number, _ in CONTRACT["enum wake"]}
_WAKE_WORD = struct.Struct("<I")  # struct reader_state is one for each ring buffer
_FOREVER = 1 << 64
_FEW = 16
_CRITICAL = "critical"
_boot_ns = attrgetter("boot_ns")
_POSITION = struct.Struct("<Q")


class Source(ABC):
    """A ring, or one of its ring buffers: its consumer, its decoder and its gaps."""

    size: int
    """Bytes of the data area of each of its buffers."""

    def __init__(
        self,
        name: str,
        fd: int,
        ring: Ring | PerfBuffers,
        envelope: Envelope,
        cpus: int,
        *,
        own: Collection[int] | None = None,
        wake_index: int | None = None,
        buffer: str | None = None,
    ) -> None:
        """`fd` is readable when there are records and the reader is to be woken for them.

        `name` is the ring's, `buffer` that of the ring buffer, the same unless given; `own` are
        those of `cpus` that write here, all unless given, and `wake_index` is the place in
        `struct reader_state`, the ring's unless given.
        """
        self.name = name
        self.buffer = buffer or name
        self.fd = fd
        self.cpus = range(cpus) if own is None else own
        self.wake_index = RINGS.index(name) if wake_index is None else wake_index
        self.ring = ring
        constants, prefix = envelope.constants(name), envelope.id_prefix(name)
        layouts = with_time(RECORDS) if envelope.rfc3339_time else RECORDS
        if envelope.hidden_names:
            layouts = hiding(layouts, envelope.hidden_names)
        self.decoder = Decoder(HEADER, layouts, constants, prefix, envelope.timing)
        self.decoder.clock_offset_ns = clock_offset_ns()
        self.gaps = GapTracker()
        self.more = False
        self._next = [1] * cpus

    def passed(self, gaps: Iterable[Gap]) -> Spans:
        """The numbers of what was drained since the last time; `gaps` came with it."""
        spans: dict[Place, Span] = {}
        for cpu, before in enumerate(self._next):
            after = self.ring.next_seq(cpu)
            if after > before:
                spans[self.name, cpu] = Span(before, after - 1)
                self._next[cpu] = after
        for what, cpu, seq, _ in gaps:
            if what == "late":
                spans = dict(join_spans(spans, {(self.name, cpu): Span(seq, seq)}))
        return spans

    @abstractmethod
    def produced(self, cpu: int) -> int:
        """Bytes that were ever written where that CPU writes."""

    @abstractmethod
    def consumed(self, cpu: int) -> int:
        """Bytes that were ever read there."""

    @abstractmethod
    def places(self) -> Collection[int]:
        """CPUs, one for each buffer that there is now."""

    @property
    def used_bytes(self) -> int:
        """Bytes that are there and were not read."""
        return sum(self.produced(cpu) - self.consumed(cpu) for cpu in self.places())

    @property
    def filled(self) -> float:
        """The share of the fullest buffer that was not read."""
        used = (self.produced(cpu) - self.consumed(cpu) for cpu in self.places())
        return max(used, default=0) / self.size

    @property
    def read_bytes(self) -> int:
        """Bytes that were ever read, from the buffers that there are now."""
        return sum(map(self.consumed, self.places()))


class RingSource(Source):
    """A ring buffer, which CPUs share."""

    def __init__(
        self, name: str, fd: int, transport: Transport, envelope: Envelope, cpus: int
    ) -> None:
        """Map the ring buffer `fd` that `transport` has by that name; there can be `cpus`."""
        self.size = size = transport.sizes[name]
        page = mmap.PAGESIZE
        self._consumer = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        mapped = page + size + min(size, AGAIN)
        self._producer = mmap.mmap(fd, mapped, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        ring = Ring(self._consumer, self._producer, page)
        own = bulk_rings.cpus_of(name, transport.bulk_rings, transport.bulk_shift, cpus)
        super().__init__(
            bulk_rings.ring_of(name),
            fd,
            ring,
            envelope,
            cpus,
            own=own,
            wake_index=bulk_rings.wake_index(name),
            buffer=name,
        )
        self._ring = ring

    def go_on(self, cpu: int, seq: int) -> None:
        """Another reader has left it, and had passed what is before `seq` of a CPU."""
        self._ring.expect(cpu, seq)
        self._next[cpu] = seq

    def produced(self, cpu: int) -> int:
        """See `Source`."""
        return int(_POSITION.unpack_from(self._producer)[0])

    def consumed(self, cpu: int) -> int:
        """See `Source`."""
        return int(_POSITION.unpack_from(self._consumer)[0])

    def places(self) -> Collection[int]:
        """See `Source`."""
        return (0,)


class PerfSource(Source):
    """The perf buffers of all CPUs, which take the place of one ring buffer."""

    def __init__(self, name: str, size: int, envelope: Envelope, cpus: int) -> None:
        """`size` is that of a buffer's data area in bytes; `add` brings the buffers."""
        self.size = size
        self._epoll = select.epoll()
        self._registered: dict[int, int] = {}
        self._seen: dict[int, tuple[int, int]] = {}
        self._told: dict[int, int] = {}
        self.buffers = PerfBuffers()
        super().__init__(name, self._epoll.fileno(), self.buffers, envelope, cpus)

    def add(self, cpu: int, fd: int) -> None:
        """Map and read the buffer of a CPU, in place of any that it had. Raises OSError."""
        memory = mmap.mmap(fd, mmap.PAGESIZE + self.size)
        self.buffers.add(cpu, memory, mmap.PAGESIZE)
        self.forget(cpu)
        self._registered[cpu] = own = os.dup(fd)
        self._epoll.register(own, select.EPOLLIN)

    def forget(self, cpu: int) -> None:
        """Nothing is written there any more; what is there is read all the same."""
        own = self._registered.pop(cpu, None)
        if own is not None:
            self._epoll.unregister(own)
            os.close(own)
        self._seen.pop(cpu, None)

    def mute(self, taken: Sequence[int]) -> list[int]:
        """CPUs for which nothing was written since the last call, although numbers were out then.

        `taken` is the last of each CPU. Such a CPU may have been down in between, and its events
        went with it; or they found no room, and nothing has followed. Told once for each number.
        """
        found = []
        for cpu in self._registered:
            passed, produced = self.ring.next_seq(cpu) - 1, self.produced(cpu)
            before = self._seen.get(cpu)
            self._seen[cpu] = (taken[cpu], produced)
            if before is None or self.consumed(cpu) != produced or before[1] != produced:
                continue
            if before[0] > max(passed, self._told.get(cpu, 0)):
                self._told[cpu] = taken[cpu]
                found.append(cpu)
        return found

    def produced(self, cpu: int) -> int:
        """See `Source`."""
        return self.buffers.produced(cpu)

    def consumed(self, cpu: int) -> int:
        """See `Source`."""
        return self.buffers.consumed(cpu)

    def places(self) -> Collection[int]:
        """See `Source`."""
        return self._registered


def open_sources(
    transport: Transport,
    ring_fds: Mapping[str, int],
    buffers: Mapping[int, Mapping[str, int]],
    envelope: Envelope,
    cpus: int,
) -> list[Source]:
    """The rings of a `KernelState`, mapped: `buffers` are perf buffers, by CPU and ring.

    Raises:
        OSError: one cannot be mapped.
    """
    if transport.name == "ring":
        return [RingSource(name, fd, transport, envelope, cpus) for name, fd in ring_fds.items()]
    sources = [PerfSource(name, transport.sizes[name], envelope, cpus) for name in ring_fds]
    for cpu, fds in buffers.items():
        for source in sources:
            source.add(cpu, fds[source.name])
    return [*sources]


class RingReader:
    """Drains all rings, the most important first, and hands on what it reads.

    Awake, it looks every `poll_interval_ms`. After some looks in vain it tells the programs that
    it sleeps, and the next event wakes it.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        state: mmap.mmap,
        *,
        on_batch: Callable[[Batch], None],
        on_error: Callable[[Exception], None],
        poll_interval_ms: int,
        drain_records: int,
        sleeps: bool = True,
        max_events: int | None = None,
    ) -> None:
        """`state` is the mapped `struct reader_state`.

        Unless it `sleeps`, it looks every `poll_interval_ms` whatever happens, so that an event's
        coming does not tell when it happened, unless a ring fills.

        `on_batch` gets the events of each drain, and may call `pause`. `on_error` gets what
        makes further reading impossible, and is called once. After `max_events` the reader
        is `done`, and what is left stays in the rings.
        """
        self.sources = sources
        self.paused = False
        """Whether any ring has to wait: the bulk one, or both."""
        self.pauses = 0
        self.done = max_events == 0
        self._left = max_events
        self._state = state
        self._on_batch = on_batch
        self._on_error = on_error
        self._interval = poll_interval_ms / 1000
        self._sleeps = sleeps
        self._drain_records = drain_records
        self._looks_in_vain = 0
        self._looks = False
        self._reading: Sequence[Source] = sources
        self._armed: set[Source] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._soon: asyncio.Handle | None = None
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Begin reading."""
        self._looks = True
        self._wake()

    def take_over(self, sources: Sequence[Source]) -> None:
        """Read these as well from now on: nobody else does any more."""
        self.sources = [*self.sources, *sources]
        if not self.paused:
            self.resume()

    def stop(self) -> None:
        """Stop looking by itself; `drain_once` still works, until `close`."""
        self._looks = False
        self._halt()

    def close(self) -> None:
        """Never read again, whatever a sink may still ask for."""
        self.done = True
        self.stop()

    def pause(self, critical: bool = True) -> None:
        """Leave the records in the rings until `resume`; unless `critical`, not in that one."""
        self.pauses += not self.paused
        self.paused = True
        reading = [] if critical else [one for one in self._reading if one.name == _CRITICAL]
        for source in self._reading:
            if source not in reading:
                self._disarm(source)
        self._reading = reading
        if not reading:
            self._halt()

    def resume(self) -> None:
        """Read on, everything."""
        self.paused = False
        self._reading = self.sources
        self._wake()

    def drain_once(self) -> bool:
        """One bounded drain of each ring that has records. Whether any has more."""
        try:
            return self._drain_each()
        except Exception as error:  # whatever it is: it would come again at every look
            self.close()
            self._on_error(error)
            return False

    def _drain_each(self) -> bool:
        if self.done:
            return False
        read = False
        found: list[Batch] = []
        try:
            for source in self._reading:
                read |= self._drain(source, found)
        finally:  # what was drained is handed on, also if another ring cannot be
            if found:
                self._looks_in_vain = 0
                self._on_batch(in_time_order(found))
        more = any(source.more for source in self._reading)
        # Who drains by the way may have taken the record that would have woken the reader.
        if (read or more) and self._timer is None:
            self._wake()
        return more

    def _drain(self, source: Source, found: list[Batch]) -> bool:
        """One drain of one ring, which adds to `found`. Whether there was any record."""
        if self.done:
            return False
        before = source.ring.records
        most = self._drain_records if self._left is None else min(self._drain_records, self._left)
        events, kinds, gaps, more, _ = source.ring.drain(source.decoder, most)
        source.more = more
        if self._left is not None:
            self._left -= len(events)
            self.done = self._left == 0
        if gaps:
            source.gaps.feed(gaps, self._now_ns())
        if events:
            found.append(Batch(events, kinds, source.passed(gaps)))
        return source.ring.records != before

    def _now_ns(self) -> int:
        return int(self._loop.time() * 1e9)

    def _wake(self) -> None:
        if not self._reading or self.done or not self._looks:
            return
        self._looks_in_vain = 0
        self._drain_soon()
        if self._timer is None:
            self._timer = self._loop.call_later(self._interval, self._tick)

    def _halt(self) -> None:
        for handle in (self._timer, self._soon):
            if handle is not None:
                handle.cancel()
        self._timer = self._soon = None
        for source in self.sources:
            self._disarm(source)

    def _tick(self) -> None:
        this = self._timer
        self._looks_in_vain += 1
        if self._soon is None:  # else the next drain is on its way
            self._continue()
        if self._timer is not this:  # halted in the meantime, and perhaps woken again
            return
        # One look more after the programs were asked to wake it: one may just have missed that.
        tired = self._sleeps and self._looks_in_vain >= LOOKS_IN_VAIN
        sleeps = tired and self._looks_in_vain > LOOKS_IN_VAIN and self._all_armed
        self._timer = None if sleeps else self._loop.call_later(self._interval, self._tick)
        self._arm(_WAKE["WAKE_ANY" if tired else "WAKE_FULL"])

    @property
    def _all_armed(self) -> bool:
        return len(self._armed) == len(self._reading)

    def _continue(self) -> None:
        self._soon = None
        if self.drain_once() and self._looks:
            self._drain_soon()

    def _drain_soon(self) -> None:
        if self._soon is None:
            self._soon = self._loop.call_soon(self._continue)

    def _arm(self, wake: int) -> None:
        """Ask to be woken for rings that are empty now.

        Epoll reports a ring for as long as it holds anything: a ring that is written all the time,
        or whose first record is not finished, would keep the loop spinning. So after each wake-up
        the timer alone looks, until it finds the ring empty.
        """
        for source in self._reading:
            if source in self._armed:
                self._ask(source, wake)
            elif not source.ring.pending:
                self._armed.add(source)
                self._ask(source, wake)
                self._loop.add_reader(source.fd, self._woken, source)

    def _woken(self, source: Source) -> None:
        self._disarm(source)
        self._wake()

    def _disarm(self, source: Source) -> None:
        if source in self._armed:
            self._armed.discard(source)
            self._ask(source, _WAKE["WAKE_NEVER"])
            self._loop.remove_reader(source.fd)

    def _ask(self, source: Source, wake: int) -> None:
        _WAKE_WORD.pack_into(self._state, _WAKE_WORD.size * source.wake_index, wake)

    def refresh_clock(self) -> None:
        """Use the offset between the clocks as it is now."""
        offset = clock_offset_ns()
        for source in self.sources:
            source.decoder.clock_offset_ns = offset

    def look_for_tails(self, kernel_seqs: Mapping[str, list[int]], *, final: bool = False) -> None:
        """Note records that were numbered before the rings were found empty, and did not come.

        `kernel_seqs`: per ring, the last number taken on each CPU, read before the last drain.
        With `final`, what is still in the rings will not come either.
        """
        now = self._now_ns()
        for source in self.sources:
            if source.ring.pending and not final:
                continue
            numbers = kernel_seqs[source.name]
            for cpu in source.cpus:
                taken = numbers[cpu]
                expected = source.ring.next_seq(cpu)
                if expected <= taken:
                    source.gaps.tail(cpu, expected, taken, now)

    def losses(self, *, final: bool = False) -> Iterator[tuple[str, Loss]]:
        """Ring and range of every loss that is certain now; with `final`, of every open gap."""
        for source in self.sources:
            losses = source.gaps.expire(
                _FOREVER if final else self._now_ns(),
                source.ring.next_seq,
                source.produced,
                _everything if final else source.consumed,
            )
            for loss in losses:
                yield source.name, loss


def _everything(cpu: int) -> int:
    """A position behind all others."""
    return _FOREVER


def in_time_order(batches: list[Batch]) -> Batch:
    """One batch of what was found in one look at all rings, by the time of the events.

    Those of one ring buffer stay in their order, which is that of their numbers on each CPU.
    """
    first, *others = batches
    for other in others:
        kinds = dict(first.kinds)
        for kind, count in other.kinds.items():
            kinds[kind] = kinds.get(kind, 0) + count
        events = _merge(first.events, other.events)
        first = Batch(events, kinds, join_spans(first.spans, other.spans))
    return first


def _merge(one: list[Event], other: list[Event]) -> list[Event]:
    few, many = sorted((one, other), key=len)
    if len(few) * _FEW > len(many) and _in_order(few) and _in_order(many):
        return sorted(few + many, key=_boot_ns)  # of two runs in order: few comparisons
    # Two of one ring whose times are not in order have to keep theirs.
    merged: list[Event] = []
    at = 0
    for event in few:
        here = bisect(many, _boot_ns(event), at, key=_boot_ns)
        merged += many[at:here]
        merged.append(event)
        at = here
    return merged + many[at:]


def _in_order(events: list[Event]) -> bool:
    times = list(map(_boot_ns, events))
    return times == sorted(times)
