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
    Operation("exec", "exec", 3000),
    *(
        Operation(f"open and close, {path}", "open", 20_000, (path,), 1200)
        for path in OPENED
        if Path(path).exists()
    ),
    Operation("TCP connection", "connect", 4000, (), 15_000),
)

OBSERVERS = (Streamer, StreamerDefault, StreamerOpens, Bpftrace, Auditd)


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
    """What an observer adds to an operation, and the medians of its parts.

    Of an `observer` without a name, nothing, it is what the operation costs alone.
    """

    operation: str
    observer: str
    total: Spread
    parts: Sample
    target: float = 0


class Unrelated(msgspec.Struct, frozen=True):
    """What an observer adds to a system call that it does not observe; without a name as above."""

    observer: str
    ns: Spread


class HostCost(msgspec.Struct, frozen=True):
    """All of it; `reasons` says by name why there is nothing of an observer."""

    operations: list[Added]
    unrelated: list[Unrelated]
    reasons: dict[str, str]


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

    def __init__(self, cpu: int, scale: float, kinds: Sequence[type[Observer]] = OBSERVERS) -> None:
        """The load runs on `cpu`, and does `scale` of the usual number of operations."""
        self._cpu = cpu
        self._scale = scale
        self._kinds = kinds
        self._stack = ExitStack()
        self.reasons: dict[str, str] = {}
        """Why an observer cannot run here."""
        self.incomplete: dict[str, str] = {}
        """What is missing of the records of one that can; such a turn gives no number."""

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
            if Auditd in self._kinds:
                self._take_audit(stack, uid)
            self._stack = stack.pop_all()
        return self

    def _take_audit(self, stack: ExitStack, uid: int) -> None:
        audit = Audit(uid)
        try:
            stack.enter_context(audit.taken())
            self._place = self._place._replace(audit=audit)
        except UnavailableError as error:
            self.reasons[Auditd.name] = str(error)

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def directory(self) -> Path:
        """In memory, and gone at the end."""
        return self._place.directory

    def observers(self) -> list[type[Observer]]:
        """All that can run here, as far as is known."""
        return [kind for kind in self._kinds if kind.name not in self.reasons]

    def pair(self, kind: type[Observer]) -> Pair | None:
        """A turn with nothing, and one of an observer. None if it could not run, or lost records.

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
            show(f"this turn of {kind.name} does not count: {error}")
            self.incomplete[kind.name] = str(error)
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
            kinds = bench.observers()
            first = number % len(kinds)
            for kind in kinds[first:] + kinds[:first]:
                show(f"what a host pays: {kind.name} {number + 1}/{rounds}")
                if pair := bench.pair(kind):
                    found.setdefault(kind.name, []).append(pair)
    return compared(found, bench.incomplete | bench.reasons)


def compared(found: Mapping[str, Sequence[Pair]], reasons: Mapping[str, str]) -> HostCost:
    """What the pairs of each observer say, and why others have none."""
    operations = [row for each in OPERATIONS for row in operation_rows(each, found)]
    alone = [pair.alone.unrelated_ns for pairs in found.values() for pair in pairs]
    unrelated = [Unrelated("", Spread.of(alone))]
    for name, pairs in found.items():
        added = [pair.observed.unrelated_ns - pair.alone.unrelated_ns for pair in pairs]
        unrelated.append(Unrelated(name, Spread.of(added)))
    left_out = {name: reason for name, reason in reasons.items() if name not in found}
    return HostCost(operations, unrelated, left_out)


def operation_rows(operation: Operation, found: Mapping[str, Sequence[Pair]]) -> Iterator[Added]:
    """First what it costs alone, then what each observer adds with which it was measured."""
    name = operation.name
    measured = {
        observer: [(pair.alone.samples[name], pair.observed.samples[name]) for pair in pairs]
        for observer, pairs in found.items()
        if all(name in pair.observed.samples for pair in pairs)
    }
    yield middle(name, "", [alone for pairs in measured.values() for alone, _ in pairs])
    for observer, pairs in measured.items():
        target = operation.target if observer == Streamer.name else 0
        yield middle(name, observer, [observed.less(alone) for alone, observed in pairs], target)


def middle(operation: str, observer: str, samples: Sequence[Sample], target: float = 0) -> Added:
    """The median of some samples, each part by itself."""
    parts = Sample(*(statistics.median(part) for part in zip(*samples, strict=True)))
    total = Spread.of([sample.total for sample in samples])
    return Added(operation, observer, total, parts, target)


def build_load() -> None:
    """Compile the load.

    Raises:
        CalledProcessError: it cannot be compiled.
    """
    compile_c("host_load.c", PROGRAM, "-static")
