"""The further workers, as the first one sees them: their part of the account, their losses.

Each reads some of the ring buffers for bulk and publishes on its own (`worker.py`). What the stream
says of the run says the first worker alone, for all of them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import msgspec

from streamer import errors
from streamer.agent.crew_messages import (
    Begin,
    Done,
    End,
    Failed,
    Gone,
    Progress,
    Ready,
    Said,
    Seen,
    SinkProgress,
    Watched,
    from_worker,
    numbers_of,
    packed,
)
from streamer.agent.losses import Lost
from streamer.agent.ring_account import Marks
from streamer.errors import KernelError, StreamerError, WorkerGone
from streamer.events.stream import ReaderCounts, SeqRange
from streamer.kernel import bulk_rings
from streamer.kernel.state import KernelState
from streamer.operation.activity import joined
from streamer.operation.look import Activity
from streamer.privilege.channel import Channel, MessageError
from streamer.privilege.split import socketpair
from streamer.ring.reader import RingSource, Source
from streamer.sinks.base import Sink

START_SECONDS = 60.0
"""How long a further worker may take until it reads: an emulated machine is slow."""
SILENT_SECONDS = 10.0
"""Without a word from one, it is not ready."""

_log = logging.getLogger("streamer")

Serve = Callable[[int, Channel], int]
"""What a further worker does, given its number and its end of the channel. Its exit code."""


class Run(Protocol):
    """The run that they are part of."""

    def lose(self, lost: list[Lost]) -> None:
        """Events were lost in the kernel, or nobody has read them: every sink is to be told."""

    def give_up(self, sink: Sink, lost: Lost) -> None:
        """A sink of theirs has lost events."""

    def take_over(self, sources: Sequence[Source], reason: str) -> None:
        """One has ended: read what is left in its rings."""

    def fail(self, error: StreamerError) -> None:
        """The run cannot go on."""


class Member:
    """One further worker."""

    def __init__(self, number: int, pid: int, channel: Channel) -> None:
        """`number` counts from 1, as the first worker is 0."""
        self.number = number
        self.pid = pid
        self.channel = channel
        self.sources: list[RingSource] = []
        """Its ring buffers, mapped here too, and not read."""
        self.progress: Progress | None = None
        self.activity: Activity | None = None
        self.heard = time.monotonic()
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()
        self.done = False

    @property
    def name(self) -> str:
        """For people."""
        return f"worker {self.number}"


class Crew:
    """All further workers; of a run that has none, empty."""

    def __init__(self, members: Sequence[Member] = ()) -> None:
        """Of processes that have been started."""
        self.members = [*members]
        self._run: Run | None = None
        self._sinks: Sequence[Sink] = ()
        self._read: Counter[str] = Counter()
        self._ending = False

    @classmethod
    def start(cls, count: int, serve: Serve) -> Crew:
        """Start so many, each of which is a copy of this process that does `serve`."""
        members: list[Member] = []
        for number in range(1, count + 1):
            own, other = socketpair()
            pid = os.fork()
            if pid == 0:
                own.close()
                for member in members:
                    member.channel.close()
                _be_one(number, other, serve)
            other.close()
            members.append(Member(number, pid, Channel(own, 0)))
        return cls(members)

    def share(self, names: Iterable[str]) -> dict[str, int]:
        """Whose each ring buffer is: 0 is the first worker."""
        workers = len(self.members) + 1
        return {
            name: bulk_rings.number_of(name) % workers
            if bulk_rings.ring_of(name) == bulk_rings.BULK
            else 0
            for name in names
        }

    def dismiss(self) -> None:
        """Let all end: there is nothing that they could read."""
        for member in self.members:
            member.channel.close()
        self.members = []

    def join(self, run: Run, sinks: Sequence[Sink], read: Counter[str]) -> None:
        """Add what they do to the accounts of `sinks`, and to `read`, from now on."""
        self._run, self._sinks, self._read = run, sinks, read

    async def begin(self, kernel: KernelState, run_id: str, sources: Iterable[RingSource]) -> None:
        """Have them read, and wait until they do. `sources` are those that are theirs.

        Raises:
            StreamerError: one cannot.
        """
        loop = asyncio.get_running_loop()
        whose = self.share(kernel.ring_fds)
        by_ring = {source.buffer: source for source in sources}
        for member in self.members:
            rings = [name for name, number in whose.items() if number == member.number]
            member.sources = [by_ring[name] for name in rings]
            made = kernel.transport
            begin = Begin(run_id, rings, dict(made.sizes), made.bulk_shift, kernel.cpus)
            maps = (kernel.map_fds[name] for name in ("counters", "kind_counters", "reader"))
            try:
                member.channel.settimeout(START_SECONDS)
                member.channel.send(
                    packed(begin), [*(kernel.ring_fds[name] for name in rings), *maps]
                )
            except (OSError, MessageError) as error:
                raise WorkerGone(f"{member.name} cannot be told to begin: {error}") from error
            member.channel.settimeout(0)
            loop.add_reader(member.channel.fileno(), self._hear, member)
        for member in self.members:
            try:
                await asyncio.wait_for(member.ready.wait(), START_SECONDS)
            except TimeoutError:
                raise WorkerGone(f"{member.name} does not begin") from None

    # ------------------------------------------------------------ what they say

    def _hear(self, member: Member) -> None:
        """Take all that there is."""
        while not member.ended.is_set():
            try:
                received = member.channel.receive()
            except (BlockingIOError, InterruptedError):
                return
            except (OSError, MessageError) as error:
                self._lose_member(member, f"cannot be understood: {error}")
                return
            if received is None:
                self._lose_member(member, _how_it_ended(member.pid))
                return
            member.heard = time.monotonic()
            try:
                self._take(member, from_worker(received[0]))
            except msgspec.ValidationError as error:
                self._lose_member(member, f"cannot be understood: {error}")

    def _take(self, member: Member, message: object) -> None:
        run = self._joined
        match message:
            case Ready():
                member.ready.set()
            case Progress():
                self._advance(member, message)
            case Seen(activity):
                member.activity = activity
            case Gone(lost, None):
                run.lose([lost])
            case Gone(lost, index) if index is not None and index < len(self._sinks):
                run.give_up(self._sinks[index], lost)
            case Said(level, text):
                _log.log(level, "%s: %s", member.name, text)
            case Failed(kind, text):
                member.ready.set()
                run.fail(_error(kind, f"{member.name}: {text}"))
            case Done():
                member.done = True
                self._part(member)

    @property
    def _joined(self) -> Run:
        assert self._run is not None, "a worker speaks before the run has begun"
        return self._run

    def _advance(self, member: Member, now: Progress) -> None:
        """Add what is new to the accounts."""
        before, member.progress = member.progress, now
        if len(now.sinks) != len(self._sinks):
            raise msgspec.ValidationError(f"{len(now.sinks)} sinks of {len(self._sinks)}")
        _add(self._read, now.read, before.read if before is not None else {})
        earlier = before.sinks if before is not None else [NOTHING] * len(now.sinks)
        for sink, one, past in zip(self._sinks, now.sinks, earlier, strict=True):
            account = sink.account
            _add(account.received, one.received, past.received)
            _add(account.delivered, one.delivered, past.delivered)
            _add(account.dropped, one.dropped, past.dropped)
            sink.delivered_bytes += one.delivered_bytes - past.delivered_bytes
            latency = zip(one.latency, past.latency or [0] * len(one.latency), strict=True)
            for index, (count, known) in enumerate(latency):
                sink.latency.counts[index] += count - known
            sink.latency.sum_seconds += one.latency_seconds - past.latency_seconds

    def _part(self, member: Member) -> None:
        asyncio.get_running_loop().remove_reader(member.channel.fileno())
        member.channel.close()
        member.ended.set()
        member.ready.set()

    # ------------------------------------------------------------ one has ended

    def _lose_member(self, member: Member, how: str) -> None:
        """What it held is lost, unless it was delivered untold; what it had not read is there."""
        self._part(member)
        run, reason = self._joined, f"{member.name} {how}, with what it held"
        progress = member.progress
        passed = numbers_of(progress.passed) if progress is not None else {}
        settled = numbers_of(progress.settled) if progress is not None else {}
        ranges = tuple(
            SeqRange(ring, cpu, settled.get((ring, cpu), 0) + 1, last)
            for (ring, cpu), last in passed.items()
            if last > settled.get((ring, cpu), 0)
        )
        for sink, one in zip(self._sinks, progress.sinks if progress else (), strict=False):
            held = Counter(one.received) - Counter(one.delivered) - Counter(one.dropped)
            sink.account.dropped.update(held)
            if held:
                run.give_up(sink, Lost("sink", reason, held.total(), dict(held), ranges))
        for source in member.sources:
            for cpu in source.cpus:
                source.go_on(cpu, passed.get((source.name, cpu), 0) + 1)
        run.take_over(member.sources, reason)
        if not self._ending or not member.done:
            run.fail(WorkerGone(f"{member.name} {how}: what it read is not observed any more"))

    # ------------------------------------------------------------ for the run

    @property
    def passed(self) -> Marks:
        """The last numbers that came out of their rings."""
        return self._numbers(lambda progress: numbers_of(progress.passed))

    @property
    def settled(self) -> Marks:
        """Numbers up to which everything of their rings was delivered, or is told as lost."""
        return self._numbers(lambda progress: numbers_of(progress.settled))

    def _numbers(self, of: Callable[[Progress], Marks]) -> Marks:
        found: Marks = {}
        for progress in self._heard:
            found |= of(progress)
        return found

    @property
    def _heard(self) -> Iterator[Progress]:
        """Of those whose rings nobody else reads by now."""
        for member in self.members:
            if member.progress is not None and (member.done or not member.ended.is_set()):
                yield member.progress

    def reader_counts(self, own: ReaderCounts) -> ReaderCounts:
        """What all readers met, with the `own` of the first worker."""
        every = [own, *(member.progress.reader for member in self.members if member.progress)]
        names = ReaderCounts.__struct_fields__
        return ReaderCounts(**{n: sum(getattr(one, n) for one in every) for n in names})

    def of_sink(self, index: int) -> list[SinkProgress]:
        """How far each of their sinks of that index has come."""
        return [progress.sinks[index] for progress in self._heard]

    def held(self, sink: Sink) -> int:
        """Bytes that they hold for a sink."""
        if sink not in self._sinks:
            return 0
        return sum(one.held for one in self.of_sink(self._sinks.index(sink)))

    @property
    def paused(self) -> bool:
        """Whether one of them waits for its sinks."""
        return any(progress.paused for progress in self._heard)

    def not_ready(self) -> Iterator[str]:
        """What is wrong with them."""
        now = time.monotonic()
        for member in self.members:
            if now - member.heard > SILENT_SECONDS and not member.done:
                yield f"{member.name} has said nothing for {now - member.heard:.0f} s"
            for sink, one in zip(
                self._sinks, member.progress.sinks if member.progress else (), strict=False
            ):
                if one.status != "up":
                    yield f"{sink.name} is {one.status} for {member.name}"

    def look(self, own: Activity) -> Activity:
        """Who made the events that all have read, with the `own` of the first worker.

        They look as well from now on, for a while.
        """
        seen = [own]
        for member in self.members:
            if member.ended.is_set():
                continue
            try:
                member.channel.send(packed(Watched()))
            except OSError as error:  # it has no time for that now
                _log.debug("%s cannot be asked: %s", member.name, error)
            if member.activity is not None:
                seen.append(member.activity)
        return joined(seen) if len(seen) > 1 else own

    def end(self, grace_seconds: float) -> None:
        """Nothing is produced any more: have them deliver the rest."""
        self._ending = True
        for member in self.members:
            if not member.ended.is_set():
                try:
                    member.channel.send(packed(End(grace_seconds)))
                except OSError as error:  # it is heard of that it has ended, too
                    _log.debug("%s cannot be told to end: %s", member.name, error)

    async def ended(self, deadline: float) -> None:
        """Wait until all have, or `deadline`, in seconds of the monotonic clock."""
        for member in self.members:
            try:
                await asyncio.wait_for(member.ended.wait(), max(deadline - time.monotonic(), 0.001))
            except TimeoutError:
                self._lose_member(member, "did not end in time")

    def close(self) -> None:
        """Let go of all; those that still run end."""
        for member in self.members:
            member.channel.close()


NOTHING = SinkProgress({}, {}, {}, 0, 0, 0.0, "starting", 0.0, [], 0.0)


def _add(account: Counter[str], now: Mapping[str, int], before: Mapping[str, int]) -> None:
    for kind, count in now.items():
        if new := count - before.get(kind, 0):
            account[kind] += new


def _how_it_ended(pid: int) -> str:
    """In words, and reaped."""
    for _ in range(100):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            if code < 0:
                return f"was ended by {signal.Signals(-code).name}"
            return f"ended with exit code {code}"
        time.sleep(0.001)
    return "closed the connection"


def _error(kind: str, text: str) -> StreamerError:
    found = getattr(errors, kind, KernelError)
    known = isinstance(found, type) and issubclass(found, StreamerError)
    return found(text) if known else KernelError(text)


def _be_one(number: int, end: socket.socket, serve: Serve) -> None:
    """In the new process. Never returns: what the other one was about to do is not its own."""
    code = 1
    try:
        code = serve(number, Channel(end, 64 + 3))
    except StreamerError as error:
        os.write(2, f"streamer: worker {number}: {error}\n".encode())
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)
