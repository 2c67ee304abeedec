"""What an event costs in the kernel: emitting it, and what the program that is observed pays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.load import Load, Ring
from streamer.config.settings import Filters, Kernel, Rings, Settings
from streamer.kernel import state
from streamer.kernel.loader import Loader, present_cpus
from streamer.kernel.targets import targets_of
from streamer.ring.reader import Source

_EVENTS = 8192
_OPENS = 10_000

_EMITTED = {"an event of fixed size": "close", "file.open, copied": "open"}

OPENED = ("/etc/passwd", "/usr/share/doc/libc6/copyright")
"""Paths of two and of five parts."""


class Cost(NamedTuple):
    """Nanoseconds for one event."""

    what: str
    ns: float


def emission(rounds: int) -> list[Cost]:
    """What emitting costs, the loop around it taken off; the best of some rounds."""
    load = Load()
    try:
        empty = _best(load, rounds, "nothing")
        found = [
            Cost("an event of fixed size, identity included", _best(load, rounds, "close") - empty),
            Cost("file.open, copied", _best(load, rounds, "open") - empty),
        ]
        for path in (path for path in OPENED if Path(path).exists()):
            with _opened(path) as fd:
                cost = _best(load, rounds, "hook", fd) - empty
            found.append(Cost(f"the hook of openat(), {path}", cost))
    finally:
        load.close()
    return found


def _best(load: Load, rounds: int, program: str, fd: int = 0) -> float:
    times = []
    for _ in range(rounds):
        load.discard("bulk")
        start = time.perf_counter_ns()
        load.run(program, _EVENTS, fd)
        times.append((time.perf_counter_ns() - start) / _EVENTS)
    if load.lost():
        raise RuntimeError("the ring overflowed, so the cost is not that of an event")
    return min(times)


def transports(rounds: int) -> list[Cost]:
    """What an event costs by ring buffer and by perf buffer: written, and read.

    They take turns. The rings are large enough for a run of events on one CPU.
    """
    size = _EVENTS * 256 * 2
    rings = {
        "ring buffer": Rings(bulk_bytes=size),
        "perf buffer": Rings(transport="perf", bulk_bytes=_of_all_cpus(size)),
    }
    loads = {name: Load(one) for name, one in rings.items()}
    try:
        sources = {name: load.sources()[1] for name, load in loads.items()}
        best: dict[tuple[str, str], float] = {}

        def take(what: str, name: str, ns: float) -> None:
            best[what, name] = min(best.get((what, name), float("inf")), ns)

        for _ in range(rounds):
            for name, load in loads.items():
                take("nothing", name, _best(load, 1, "nothing"))
                for what, program in _EMITTED.items():
                    take(f"{what}, into a", name, _best(load, 1, program))
                    take(f"{what}, read and decoded from a", name, _read(sources[name]))
    finally:
        for load in loads.values():
            load.close()
    return [
        Cost(f"{what} {name}", ns - (best["nothing", name] if what.endswith("into a") else 0))
        for (what, name), ns in sorted(best.items())
        if what != "nothing"
    ]


def contention(rounds: int) -> list[Cost]:
    """What an event costs on one CPU, on two that share a ring buffer, and on two with one each.

    They take turns; the median of all. The loop around it is taken off.
    """
    size = _EVENTS * 8 * 256 * 2
    shared, apart = (Load(Rings(bulk_rings=rings, bulk_bytes=2 * size)) for rings in (1, 2))
    cpus = sorted(os.sched_getaffinity(0))[:2]
    setups = {
        "on one CPU": (shared, cpus[:1]),
        "on two CPUs, into one ring buffer": (shared, cpus),
        "on two CPUs, into one each": (apart, cpus),
    }
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    try:
        for _ in range(rounds):
            for where, (load, used) in setups.items():
                for what in ("nothing", *_EMITTED.values()):
                    times[what, where] += _at_once(load, what, used)
    finally:
        shared.close()
        apart.close()
    return [
        Cost(f"{what}, {where}", median(times[program, where]) - median(times["nothing", where]))
        for what, program in _EMITTED.items()
        for where in setups
    ]


def _at_once(load: Load, program: str, cpus: list[int]) -> list[float]:
    """Nanoseconds for each event, on each of the CPUs, which begin together."""
    for name in load.rings:
        load.discard(name)
    began = threading.Barrier(len(cpus))

    def emit(cpu: int) -> float:
        os.sched_setaffinity(0, {cpu})  # of this thread
        began.wait()
        start = time.perf_counter_ns()
        load.run(program, _EVENTS * 8)
        return (time.perf_counter_ns() - start) / (_EVENTS * 8)

    with ThreadPoolExecutor(len(cpus)) as pool:
        times = list(pool.map(emit, cpus))
    if load.lost():
        raise RuntimeError("a ring overflowed, so the cost is not that of an event")
    return times


def _of_all_cpus(size: int) -> int:
    """Bytes of which each CPU's share is `size` at least."""
    return size << (len(present_cpus()) - 1).bit_length()


def _read(source: Source) -> float:
    """Nanoseconds for each event that is there."""
    start, count, more = time.perf_counter_ns(), 0, True
    while more:
        events, _, _, more, _ = source.ring.drain(source.decoder, Rings().drain_records)
        count += len(events)
    if count != _EVENTS:
        raise RuntimeError(f"{count} events came, and not {_EVENTS}")
    return (time.perf_counter_ns() - start) / count


@contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def observed(rounds: int, path: str = OPENED[0]) -> tuple[float, float]:
    """Nanoseconds that open() and close() of `path` take a program, unobserved and observed.

    The best of some rounds each, which alternate.
    """
    command = [sys.executable, "-m", "benchmarks.opens", path, str(_OPENS)]
    root = Path(__file__).parent.parent
    with subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        stdin, stdout = child.stdin, child.stdout

        def one_round() -> float:
            print(file=stdin, flush=True)
            return float(stdout.readline())

        try:
            one_round()
            pairs = [(one_round(), _attached(child.pid, one_round)) for _ in range(rounds)]
        finally:
            stdin.close()
    return min(alone for alone, _ in pairs), min(watched for _, watched in pairs)


def _attached(pid: int, one_round: Callable[[], float]) -> float:
    rings = Rings()
    settings = Settings(rings=rings, filters=Filters(pids=(pid,)))
    loaded = state.load(settings, {"file.open"})
    try:
        loaded.attach()
        cost = one_round()
        if Ring(loaded.ring_fds["bulk"], rings.bulk_bytes).pending < _OPENS * 64:
            raise RuntimeError("the opens were not observed")
        return cost
    finally:
        loaded.close()


_SAMPLING_HZ = 997
_STATISTICS = Path("/proc/sys/kernel/bpf_stats_enabled")
_BPFTRACE = "profile:hz:997 { @[pid, comm, kstack, ustack] = count(); }"


def samples(seconds: float) -> list[Cost]:
    """What a sample costs, with both stacks of a busy Python, and bpftrace's of the same.

    As the kernel measures its programs itself, one after the other.
    """
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with statistics():
            found = [Cost("a sample of profile.sample", _own_sample(seconds))]
            if shutil.which("bpftrace"):
                found.append(Cost("the same by bpftrace", _sample_of_bpftrace(seconds)))
            return found
    finally:
        busy.kill()
        busy.wait()


@contextmanager
def statistics() -> Iterator[None]:
    """The kernel measures its programs until the block ends."""
    before = _STATISTICS.read_text()
    _STATISTICS.write_text("1")
    try:
        yield
    finally:
        _STATISTICS.write_text(before)


def _own_sample(seconds: float) -> float:
    settings = Settings(kernel=Kernel(profile_hz=_SAMPLING_HZ))
    kernel = state.load(settings, {"profile.sample"}, Loader(targets=targets_of(settings.kernel)))
    try:
        kernel.attach()
        time.sleep(seconds)
        return cost_of_runs(Path(f"/proc/self/fdinfo/{kernel.program_fds['on_clock']}"))
    finally:
        kernel.close()


def _sample_of_bpftrace(seconds: float) -> float:
    command = ["bpftrace", "-e", _BPFTRACE]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # that it attaches
            time.sleep(seconds + 1)
            infos = Path(f"/proc/{process.pid}/fdinfo").iterdir()
            (program,) = (one for one in infos if "run_cnt" in one.read_text())
            return cost_of_runs(program)
        finally:
            process.kill()


def cost_of_runs(info: Path) -> float:
    """Nanoseconds for one run of a program, by what the kernel shows of its descriptor."""
    shown = dict(line.split(":", 1) for line in info.read_text().splitlines())
    runs = int(shown["run_cnt"])
    if not runs:
        raise RuntimeError("the program has not run")
    return int(shown["run_time_ns"]) / runs
