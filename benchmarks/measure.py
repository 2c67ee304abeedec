"""What a measured process is told, and what it answers.

A measured process inherits the rings of the load, is pinned to a CPU of its own, and speaks with
the benchmark in lines on its standard streams: it prints `ready` when it can take events, `warm`
when it has delivered the first few, and, when it has delivered them all, a `Result`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer
from typing import IO

import msgspec

WARM_EVENTS = 20_000
"""Events before the measurement begins: caches fill, imports and connections are done."""


class Shared(msgspec.Struct, frozen=True):
    """The maps of the load. `rings` are descriptors and data sizes in bytes, by name."""

    rings: dict[str, tuple[int, int]]
    counters_fd: int
    kind_counters_fd: int
    faults_fd: int
    reader_fd: int
    cpus: int

    @property
    def descriptors(self) -> list[int]:
        """All of them."""
        maps = [self.counters_fd, self.kind_counters_fd, self.faults_fd, self.reader_fd]
        return [*maps, *(fd for fd, _ in self.rings.values())]


class Task(msgspec.Struct, frozen=True):
    """What to measure, and on which CPU."""

    path: str
    events: int
    shared: Shared
    cpu: int
    kafka: str = ""
    mqtt_port: int = 0
    topic: str = "bench"
    out_fd: int = 1
    seconds: float = 0.0
    warm: int = WARM_EVENTS


class Result(msgspec.Struct, frozen=True):
    """What was measured: the CPU time of the process, user and system, all threads."""

    events: int
    cpu_seconds: float
    wall_seconds: float
    resident_bytes: int
    peak_bytes: int

    @property
    def ns_per_event(self) -> float:
        """CPU time per event."""
        return 1e9 * self.cpu_seconds / self.events if self.events else 0.0

    @property
    def per_second(self) -> float:
        """Events per second of CPU time: what one core would do."""
        return self.events / self.cpu_seconds if self.cpu_seconds else 0.0


class Stopwatch:
    """CPU and wall time of this process since `start`."""

    def __init__(self) -> None:
        """It runs at once; `start` sets it back."""
        self.start()

    def start(self) -> None:
        """Begin now."""
        self._cpu, self._wall = time.process_time(), time.monotonic()

    def result(self, events: int) -> Result:
        """What was used until now, for so many events."""
        cpu, wall = time.process_time() - self._cpu, time.monotonic() - self._wall
        return Result(events, cpu, wall, resident_bytes("VmRSS"), resident_bytes("VmHWM"))


def resident_bytes(what: str) -> int:
    """`VmRSS` or `VmHWM` of this process. Pages of the rings count, once for each mapping."""
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == what:
            return int(value.split()[0]) * 1024
    return 0


def say(word: str) -> None:
    """Tell the benchmark something, in one line."""
    print(word, flush=True)


def answer(result: Result) -> None:
    """Print the result, which ends the measurement."""
    say(msgspec.json.encode(result).decode())


class Subject:
    """A measured process, as the benchmark sees it."""

    def __init__(
        self, command: list[str], shared: Shared, *, output: int | None = None, timeout: float = 60
    ) -> None:
        """Start `command`, which inherits the maps, and `output` where it is to write to one.

        It is killed after `timeout` seconds.
        """
        descriptors = [*shared.descriptors, *([] if output is None else [output])]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            pass_fds=descriptors,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        # One that hangs is ended, and then the benchmark says so.
        self._watchdog = Timer(timeout, self._process.kill)
        self._watchdog.start()
        assert self._process.stdout is not None
        self._answers: IO[str] = self._process.stdout

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def expect(self, word: str) -> None:
        """Wait for a line.

        Raises:
            RuntimeError: it said something else, or ended.
        """
        line = self._answers.readline().strip()
        if line != word:
            raise RuntimeError(f"the measured process said {line!r} instead of {word!r}")

    def result(self) -> Result:
        """Wait for the result, and for the end of the process.

        Raises:
            RuntimeError: it failed.
        """
        line = self._answers.readline()
        code = self._process.wait()
        self.kill()
        if code != 0 or not line:
            raise RuntimeError("the measured process failed")
        return msgspec.json.decode(line, type=Result)

    def kill(self) -> None:
        """End it if it still runs."""
        self._watchdog.cancel()
        if self.alive():
            self._process.kill()
            self._process.wait()
        self._answers.close()


def python_command(module: str, task: Task) -> list[str]:
    """The command that runs a module of this package as the measured process."""
    argument = msgspec.json.encode(task).decode()
    return [sys.executable, "-m", f"benchmarks.{module}", argument]


def task_of_argument() -> Task:
    """The task of this measured process, which is pinned to its CPU from here on."""
    task = msgspec.json.decode(sys.argv[-1], type=Task)
    os.sched_setaffinity(0, {task.cpu})
    return task
