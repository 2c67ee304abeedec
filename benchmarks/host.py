"""What a host pays for being observed: CPU per exec, open and connection, and per other call.

The streamer, bpftrace and auditd take turns. Before each, the same is done with nothing observing:
the difference is what the observer adds.
"""

from __future__ import annotations

import os
import pwd
import shutil
import statistics
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self

import msgspec

from benchmarks.audit import Audit, UnavailableError
from benchmarks.cpu import Reading, Sample
from benchmarks.kernel import OPENED
from benchmarks.observers import (
    Auditd,
    Bpftrace,
    IncompleteError,
    Observer,
    Place,
    Streamer,
    StreamerDefault,
    StreamerOpens,
)
from benchmarks.runs import ROOT, Machine, compile_c, show
from tests.kernel.scope import Scope, cgroup_mount

USER = "games"
"""Of the load. Every Debian has it and nothing runs as it, so what is told of it is the load's. A
user without a name would do, but auditd looks the name up for each event, the slower in vain."""
PROGRAM = ROOT / "build" / "bench_host_load"
_LOG_MEBIBYTES = 2048
_UNRELATED_CALLS = 1_000_000


class Operation(NamedTuple):
    """What the load does, so often in one go; `target` is what the streamer may add, in ns."""

    name: str
    what: str
    times: int
    arguments: tuple[str, ...] = ()
    target: float = 0


OPERATIONS = (
    Operation("exec", "exec", 1500),
    *(
        Operation(f"open and close, {path}", "open", 20_000, (path,), 1200)
        for path in (OPENED[0], OPENED[2])
        if Path(path).exists()
    ),
    Operation("TCP connection", "connect", 4000, (), 15_000),
)


class Observed(NamedTuple):
    """What each operation cost, and nanoseconds of an unrelated call."""

    samples: dict[str, Sample]
    unrelated_ns: float


class Pair(NamedTuple):
    """A turn of an observer, and the one with nothing before it."""

    alone: Observed
    observed: Observed


class Spread(NamedTuple):
    """Nanoseconds: the median, and between which half of all rounds lie."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)


class Added(msgspec.Struct, frozen=True):
    """What an observer adds to an operation, and the medians of its parts; or why it is unknown.

    Of an `observer` without a name, nothing, it is what the operation costs alone.
    """

    operation: str
    observer: str
    total: Spread | None = None
    parts: Sample | None = None
    target: float = 0
    reason: str = ""


class HostCost(msgspec.Struct, frozen=True):
    """All of it; an unrelated call has no parts."""

    operations: list[Added]
    unrelated: list[Added]
    rounds: int


class Load:
    """A process that waits to do an operation."""

    def __init__(self, program: Path, place: Place, cpu: int, operation: Operation) -> None:
        """Raises RuntimeError if it does not start."""
        command = ["taskset", "-c", cpu, program, place.watched.path, place.uid]
        command += [operation.what, operation.times, *operation.arguments]
        self._process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input: IO[str] = self._process.stdin
        self._answers: IO[str] = self._process.stdout
        self._expect_line()

    def run(self) -> str:
        """Do it, and wait; what it says at the end."""
        print(file=self._input, flush=True)
        return self._expect_line()

    def _expect_line(self) -> str:
        line = self._answers.readline().strip()
        if not line:
            raise RuntimeError("the load failed")
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        self._input.close()
        self._answers.close()
        if self._process.wait(60) != 0 and kind is None:
            raise RuntimeError("the load failed")


class Bench:
    """The room for it: two cgroups, a directory in memory, the program, and audit where it is."""

    def __init__(self, cpu: int, scale: float) -> None:
        self._cpu = cpu
        self._scale = scale
        self._stack = ExitStack()
        self.reasons: dict[str, str] = {}
        """Why an observer is left out."""

    def __enter__(self) -> Self:
        mount = cgroup_mount()
        if mount is None:
            raise RuntimeError(
                "the host's costs are told apart by cgroups, and no cgroup2 is mounted"
            )
        with ExitStack() as stack:
            directory = stack.enter_context(memory_directory())
            self._program = Path(shutil.copy(PROGRAM, directory))
            uid = pwd.getpwnam(USER).pw_uid
            self._place = Place(
                stack.enter_context(Scope(mount)), uid, stack.enter_context(Scope(mount)), directory
            )
            audit = Audit(uid)
            try:
                stack.enter_context(audit.taken())
                self._place = self._place._replace(audit=audit)
            except UnavailableError as error:
                self.reasons[Auditd.name] = str(error)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def observers(self) -> list[type[Observer]]:
        """All that can run here, as far as is known."""
        kinds = (Streamer, StreamerDefault, StreamerOpens, Bpftrace, Auditd)
        return [kind for kind in kinds if kind.name not in self.reasons]

    def pair(self, kind: type[Observer]) -> Pair | None:
        """A turn with nothing, and one of an observer. None if it recorded too little.

        Raises:
            IncompleteError: the streamer did.
        """
        alone = self._turn(Observer(self._place), kind.operations)
        try:
            return Pair(alone, self._turn(kind(self._place), kind.operations))
        except UnavailableError as error:
            self.reasons[kind.name] = str(error)
        except IncompleteError as error:
            if issubclass(kind, Streamer):
                raise
            self.reasons[kind.name] = f"it lost records: {error}"
        return None

    def _turn(self, observer: Observer, wanted: Sequence[str]) -> Observed:
        done: Counter[str] = Counter()
        samples = {}
        with observer:
            for operation in OPERATIONS:
                if operation.what in wanted:
                    count = max(int(operation.times * self._scale), 10)
                    samples[operation.name] = self._sample(observer, operation, count)
                    done[operation.what] += count
            with self._load(Operation("", "getppid", _UNRELATED_CALLS), _UNRELATED_CALLS) as load:
                unrelated_ns = float(load.run())
            observer.stop(done)
        return Observed(samples, unrelated_ns)

    def _sample(self, observer: Observer, operation: Operation, count: int) -> Sample:
        groups = self._place.watched.path, self._place.own.path
        with self._load(operation, count) as load:
            observer.settle()
            before = Reading.take(*groups)
            load.run()
            observer.settle()
            return Sample.between(before, Reading.take(*groups), count)

    def _load(self, operation: Operation, count: int) -> Load:
        return Load(self._program, self._place, self._cpu, operation._replace(times=count))


@contextmanager
def memory_directory() -> Iterator[Path]:
    """A directory that everybody may look into, in memory until it is left."""
    directory = tempfile.mkdtemp(prefix="streamer-bench-")
    options = f"size={_LOG_MEBIBYTES}m,mode=755"
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], check=True)
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", directory], check=True)
    finally:
        os.rmdir(directory)


def measure(rounds: int, scale: float, machine: Machine) -> HostCost:
    """All observers, `scale` of the usual number of operations in each turn.

    Raises:
        RuntimeError: the load failed, or no cgroup2 is mounted.
        IncompleteError: the streamer lost records.
    """
    found: dict[str, list[Pair]] = {}
    with Bench(machine.subject, scale) as bench:
        for number in range(rounds):
            turns = bench.observers()
            first = number % len(turns)
            for kind in turns[first:] + turns[:first]:
                show(f"what a host pays: {kind.name} {number + 1}/{rounds}")
                if pair := bench.pair(kind):
                    found.setdefault(kind.name, []).append(pair)
    return compared(found, bench.reasons, rounds)


def compared(
    found: Mapping[str, Sequence[Pair]], reasons: Mapping[str, str], rounds: int
) -> HostCost:
    """What the pairs of each observer say, which may be left out for a reason."""
    operations = [
        row for operation in OPERATIONS for row in operation_rows(operation, found, reasons)
    ]
    alone = [pair.alone.unrelated_ns for pairs in found.values() for pair in pairs]
    unrelated = [Added("getppid", "", Spread.of(alone))]
    for name, pairs in found.items():
        added = [pair.observed.unrelated_ns - pair.alone.unrelated_ns for pair in pairs]
        unrelated.append(Added("getppid", name, Spread.of(added)))
    unrelated += [Added("getppid", name, reason=reason) for name, reason in reasons.items()]
    return HostCost(operations, unrelated, rounds)


def operation_rows(
    operation: Operation, found: Mapping[str, Sequence[Pair]], reasons: Mapping[str, str]
) -> Iterator[Added]:
    """First what it costs alone."""
    name = operation.name
    measured = {
        observer: [(pair.alone.samples[name], pair.observed.samples[name]) for pair in pairs]
        for observer, pairs in found.items()
        if all(name in pair.observed.samples for pair in pairs)
    }
    yield added(name, "", [alone for pairs in measured.values() for alone, _ in pairs])
    for observer, pairs in measured.items():
        target = operation.target if observer == Streamer.name else 0
        yield added(name, observer, [then.less(alone) for alone, then in pairs], target)
    for observer, reason in reasons.items():
        yield Added(name, observer, reason=reason)


def added(operation: str, observer: str, samples: Sequence[Sample], target: float = 0) -> Added:
    """The middle of some samples, each part by itself."""
    parts = Sample(*(statistics.median(part) for part in zip(*samples, strict=True)))
    total = Spread.of([sample.total for sample in samples])
    return Added(operation, observer, total, parts, target)


def build_load() -> None:
    """Compile the load.

    Raises:
        CalledProcessError: it cannot be compiled.
    """
    compile_c("host_load.c", PROGRAM, "-static")
