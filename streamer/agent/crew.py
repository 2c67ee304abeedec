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
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

import msgspec

from streamer import errors
from streamer.agent.crew_messages import (
    Begin,
    Done,
    End,
    Failed,
    Gone,
    LogFrom,
    Progress,
    Read,
    Ready,
    Said,
    Seen,
    SinkProgress,
    ToWorker,
    Watched,
    brief,
    from_worker,
    numbers_of,
    packed,
)
from streamer.agent.losses import MOST_REASON, MOST_REASONS, Lost
from streamer.agent.ring_account import Marks
from streamer.errors import KernelError, StreamerError, WorkerGone
from streamer.events.kinds import KINDS
from streamer.events.stream import ReaderCounts, SeqRange
from streamer.kernel import bulk_rings
from streamer.kernel.state import KernelState
from streamer.operation.activity import joined
from streamer.operation.look import Activity
from streamer.privilege.channel import Channel, MessageError
from streamer.privilege.split import socketpair
from streamer.ring.reader import RingSource, Source
from streamer.sinks.base import Sink
from streamer.terminal.log import traceback_of

START_SECONDS = 60.0
"""How long a further worker may take until it reads: an emulated machine is slow."""
SILENT_SECONDS = 10.0
"""Without a word from one, it is not ready."""
MOST_HEARD = 64
"""Messages of one that are taken before everything else has its turn again."""

_log = logging.getLogger("streamer")

Serve = Callable[[int, Channel], int]
"""What a further worker does, given its number and its end of the channel. Its exit code."""


Told = Mapping[tuple[str, int], int]
"""How many were lost, of each ring and CPU."""


class Run(Protocol):
    """The run that they are part of."""

    def lose(self, lost: list[Lost]) -> None:
        """Events were lost in the kernel, or nobody has read them: every sink is to be told."""

    def give_up(self, sink: Sink, lost: Lost) -> None:
        """A sink of theirs has lost events."""

    def take_over(
        self, sources: Sequence[Source], reason: str, unsettled: Sequence[SeqRange], told: Told
    ) -> None:
        """One has ended: read what is left in its rings.

        What it had passed has `unsettled` numbers, and of all it had `told` so many as lost in the
        kernel.
        """

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
        self.given_up: list[tuple[int, Lost]] = []
        """Losses of its sinks, by index, that its next progress has in their accounts."""
        self.read: defaultdict[int, Counter[str]] = defaultdict(Counter)
        """What it had read by its last progress, by CPU and kind."""
        self.reading: dict[tuple[int, str], int] = {}
        """What the next one has, where that is different."""
        self.told: Counter[tuple[str, int]] = Counter()
        """What it has told as lost on the way to it, of each ring and CPU."""
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
            member.channel.settimeout(START_SECONDS)
            with suppress(OSError):  # one that has ended is heard of, and why
                member.channel.send(
                    packed(begin), [*(kernel.ring_fds[name] for name in rings), *maps]
                )
            member.channel.settimeout(0)
            loop.add_reader(member.channel.fileno(), self._hear, member)
        for member in self.members:
            try:
                await asyncio.wait_for(member.ready.wait(), START_SECONDS)
            except TimeoutError:
                raise WorkerGone(f"{member.name} does not begin") from None

    # ------------------------------------------------------------ what they say

    def _hear(self, member: Member) -> None:
        """Take what there is, and no more at once than is fair."""
        for _ in range(MOST_HEARD):
            if member.ended.is_set():
                return
            try:
                received = member.channel.receive()
            except (BlockingIOError, InterruptedError):
                return
            except (OSError, MessageError) as error:
                self._lose_member(member, f"cannot be understood: {error}")
                return
            if received is None:
                self._lose_member(member, how_it_ended(member.pid))
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
            case Read(cells):
                self._check_cells(member, cells)
                member.reading.update({(cpu, kind): count for cpu, kind, count in cells})
            case Progress():
                self._advance(member, message)
            case Seen(activity):
                member.activity = activity
            case Gone(lost, index):
                self._check_lost(member, lost, index)
                if index is not None:  # with what it is in: that is told once, or not at all
                    member.given_up.append((index, lost))
                    return
                if lost.ring is not None and lost.cpu is not None:
                    member.told[lost.ring, lost.cpu] += lost.count
                run.lose([lost])
            case Said(level, text):
                _log.log(level, "%s: %s", member.name, text)
            case Failed(kind, text):
                member.ready.set()
                run.fail(_error(kind, f"{member.name}: {text}"))
            case Done() if self._ending:
                member.done = True
                self._part(member)
            case Done():
                self._lose_member(member, "ended by itself")

    @property
    def _joined(self) -> Run:
        assert self._run is not None, "a worker speaks before the run has begun"
        return self._run

    def _advance(self, member: Member, now: Progress) -> None:
        """Add what is new to the accounts."""
        before = member.progress or self._nothing()
        self._check(member, now, before)
        member.progress = now
        for (cpu, kind), count in member.reading.items():
            self._read[kind] += count - member.read[cpu][kind]
            member.read[cpu][kind] = count
        member.reading = {}
        for sink, one, past in zip(self._sinks, now.sinks, before.sinks, strict=True):
            account = sink.account
            _add(account.received, one.received, past.received)
            _add(account.delivered, one.delivered, past.delivered)
            _add(account.dropped, one.dropped, past.dropped)
            sink.delivered_bytes += one.delivered_bytes - past.delivered_bytes
            latency = zip(one.latency, past.latency, strict=True)
            for index, (count, known) in enumerate(latency):
                sink.latency.counts[index] += count - known
            sink.latency.sum_seconds += one.latency_seconds - past.latency_seconds
        given_up, member.given_up = member.given_up, []
        for index, lost in given_up:
            self._joined.give_up(self._sinks[index], lost)

    def _nothing(self) -> Progress:
        """How far one has come that has not begun."""
        sinks = [
            SinkProgress({}, {}, {}, 0, 0, 0.0, "starting", 0.0, [0] * len(one.latency.counts), 0.0)
            for one in self._sinks
        ]
        return Progress([], [], sinks, ReaderCounts(0, 0, 0, 0, 0, 0), False)

    def _check(self, member: Member, now: Progress, before: Progress) -> None:
        """What is added up for ever is of what there is. Raises msgspec.ValidationError."""
        if len(now.sinks) != len(self._sinks):
            raise msgspec.ValidationError(f"{len(now.sinks)} sinks of {len(self._sinks)}")
        pairs: list[tuple[Mapping[str, int], Mapping[str, int]]] = []
        for one, past in zip(now.sinks, before.sinks, strict=True):
            pairs += (
                (one.received, past.received),
                (one.delivered, past.delivered),
                (one.dropped, past.dropped),
                (_by_index(one.latency), _by_index(past.latency)),
                ({"bytes": one.delivered_bytes}, {"bytes": past.delivered_bytes}),
            )
            if len(one.latency) != len(past.latency):
                raise msgspec.ValidationError(f"{len(one.latency)} latencies")
            _check_kinds(one.received, one.delivered, one.dropped)
        for counts, earlier in pairs:
            if any(counts.get(what, 0) < count for what, count in earlier.items()):
                raise msgspec.ValidationError("a count that has become less")
        _check_places(member, ((ring, cpu) for ring, cpu, _ in (*now.passed, *now.settled)))

    def _check_cells(self, member: Member, cells: Sequence[tuple[int, str, int]]) -> None:
        """The same, of what was read by CPU and kind."""
        _check_kinds({kind: count for _, kind, count in cells})
        _check_places(member, ((KINDS[kind].ring, cpu) for cpu, kind, _ in cells))
        if any(count < member.read[cpu][kind] for cpu, kind, count in cells):
            raise msgspec.ValidationError("a count that has become less")

    def _check_lost(self, member: Member, lost: Lost, index: int | None) -> None:
        """The same, of a loss."""
        if index is not None and index >= len(self._sinks):
            raise msgspec.ValidationError(f"no sink {index}")
        if len(member.given_up) >= (MOST_REASONS + 1) * len(self._sinks):
            raise msgspec.ValidationError("losses without an account")
        _check_kinds(lost.kinds)
        if not 0 <= sum(lost.kinds.values()) <= lost.count < 1 << 53:
            raise msgspec.ValidationError(f"{lost.count} lost")
        if min(lost.kinds.values(), default=0) < 0 or len(lost.reason) > MOST_REASON:
            raise msgspec.ValidationError("no loss of ours")
        if (lost.stage == "sink") != (index is not None):
            raise msgspec.ValidationError("a loss in another place than where it is told")
        if any(one.run_id is not msgspec.UNSET for one in lost.ranges):
            raise msgspec.ValidationError("numbers of another run")
        kinds = Counter(lost.kinds)
        for one in lost.ranges:
            _check_kinds(one.kinds)
            kinds.subtract(one.kinds)
        if min(kinds.values(), default=0) < 0:
            raise msgspec.ValidationError("more in ranges than were lost")
        places = [(one.ring, one.cpu) for one in lost.ranges]
        if lost.ring is not None or lost.cpu is not None:
            places.append((str(lost.ring), -1 if lost.cpu is None else lost.cpu))
            if not lost.ranges:
                raise msgspec.ValidationError("a loss in the kernel without numbers")
        _check_places(member, places)

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
        run.take_over(member.sources, reason, ranges, member.told)
        run.fail(WorkerGone(f"{member.name} {how}: what it read is not observed any more"))

    # ------------------------------------------------------------ for the run

    def read_of(self, cpu: int) -> Counter[str]:
        """What they have read of a CPU, per kind, those included that have ended."""
        return sum((member.read[cpu] for member in self.members), Counter())

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

    def of_sink(self, sink: Sink) -> list[SinkProgress]:
        """How far theirs of that sink have come. They have none that came with a reload."""
        if sink not in self._sinks:
            return []
        index = self._sinks.index(sink)
        return [progress.sinks[index] for progress in self._heard]

    def held(self, sink: Sink) -> int:
        """Bytes that they hold for a sink."""
        return sum(one.held for one in self.of_sink(sink))

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
            _tell(member, Watched())
            if member.activity is not None:
                seen.append(member.activity)
        return joined(seen) if len(seen) > 1 else own

    def end(self, grace_seconds: float) -> None:
        """Nothing is produced any more: have them deliver the rest."""
        self._ending = True
        for member in self.members:
            if not member.ended.is_set():
                _tell(member, End(grace_seconds))

    def log_from(self, level: str) -> None:
        """Have them say what is at least so severe."""
        for member in self.members:
            if not member.ended.is_set():
                _tell(member, LogFrom(level))

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


def _add(account: Counter[str], now: Mapping[str, int], before: Mapping[str, int]) -> None:
    for kind, count in now.items():
        if new := count - before.get(kind, 0):
            account[kind] += new


def how_it_ended(pid: int) -> str:
    """In words, and reaped."""
    with suppress(ChildProcessError):  # where SIGCHLD is ignored, nobody is told
        for _ in range(100):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                code = os.waitstatus_to_exitcode(status)
                if code < 0:
                    return f"was ended by {_signal(-code)}"
                return f"ended with exit code {code}"
            time.sleep(0.001)
    return "closed the connection"


def _signal(number: int) -> str:
    """Its name. Those between SIGRTMIN and SIGRTMAX have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _by_index(counts: Sequence[int]) -> Mapping[str, int]:
    return {str(index): count for index, count in enumerate(counts)}


def _check_kinds(*counts: Mapping[str, int]) -> None:
    for kinds in counts:
        if not kinds.keys() <= KINDS.keys():
            raise msgspec.ValidationError("a kind that is none")


def _check_places(member: Member, places: Iterable[tuple[str, int]]) -> None:
    own = {(source.name, cpu) for source in member.sources for cpu in source.cpus}
    if not own.issuperset(places):
        raise msgspec.ValidationError("a ring and CPU that are not its own")


def _error(kind: str, text: str) -> StreamerError:
    found = getattr(errors, kind, KernelError)
    known = isinstance(found, type) and issubclass(found, StreamerError)
    return found(text) if known else KernelError(text)


def _be_one(number: int, end: socket.socket, serve: Serve) -> None:
    """In the new process. Never returns: what the other one was about to do is not its own."""
    code, channel = 1, Channel(end, 64 + 3)
    try:
        try:
            code = serve(number, channel)
        except StreamerError as error:
            _last_words(channel, Failed(type(error).__name__, brief(str(error))))
        except BaseException as error:
            _last_words(channel, Said(logging.ERROR, brief(traceback_of(error))))
    finally:
        os._exit(code)


def _tell(member: Member, message: ToWorker) -> None:
    try:
        member.channel.send(packed(message))
    except OSError as error:  # it has no time for that now, or has ended, which is heard of too
        lasting = logging.WARNING if isinstance(message, LogFrom) else logging.DEBUG
        _log.log(lasting, "%s cannot be told %s: %s", member.name, message, error)


def _last_words(channel: Channel, message: Failed | Said) -> None:
    """To the first worker. Not on standard error: a pipe that nobody reads would hold it there."""
    with suppress(OSError, MessageError):
        channel.settimeout(1)
        channel.send(packed(message))
