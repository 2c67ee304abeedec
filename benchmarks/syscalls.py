"""What timing system calls costs those that are timed, and those that nobody asked about.

    python -m benchmarks.syscalls [ROUNDS]

A program makes getppid() while nothing, the streamer or bpftrace looks on; they take turns.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from benchmarks.kernel import Cost
from benchmarks.runs import ROOT, compile_c, show
from streamer.config.settings import Kernel, Settings
from streamer.events.calls import ALL
from streamer.events.envelope import Envelope
from streamer.kernel import state
from streamer.summaries.period import Summaries

PROGRAM = ROOT / "build" / "bench_calls"
_KINDS = ("syscall.latency", "syscall.slow")
_CALLS = 1_000_000
_START_SECONDS = 60.0

# What `syscall.latency` counts, as far as bpftrace can: durations by call, in powers of two.
_LATENCY = """
{enter} {{ @start[tid] = nsecs; }}
{exit} /@start[tid]/ {{ @ns[{number}] = hist(nsecs - @start[tid]); delete(@start[tid]); }}
"""
_ALL = {
    "enter": "tracepoint:raw_syscalls:sys_enter",
    "exit": "tracepoint:raw_syscalls:sys_exit",
    "number": "args->id",
}
_ONE = {
    "enter": "tracepoint:syscalls:sys_enter_getppid",
    "exit": "tracepoint:syscalls:sys_exit_getppid",
    "number": "0",
}
_OTHER = {
    "enter": "tracepoint:syscalls:sys_enter_fsync",
    "exit": "tracepoint:syscalls:sys_exit_fsync",
    "number": "0",
}


@contextmanager
def streamer(*names: str, cgroups: int = 0, way: list[str]) -> Iterator[None]:
    """Times the calls named, in this process; `way` gets where."""
    settings = Settings(kernel=Kernel(syscalls=names, syscall_cgroups=cgroups))
    kernel = state.load(settings, _KINDS)
    try:
        Summaries(kernel, Envelope(), _KINDS)
        kernel.attach()
        way[:] = [one.way for one in kernel.statuses if one.status == "attached"]
        yield
    finally:
        kernel.close()


@contextmanager
def bpftrace(script: dict[str, str]) -> Iterator[None]:
    """Does the same for a script."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            ["bpftrace", "-e", _LATENCY.format(**script)],
            stdout=output,
            stderr=output,
            env={**os.environ, "__BPFTRACE_NOTIFY_PROBES_ATTACHED": "1"},
        )
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not _has_attached(output.fileno()):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("bpftrace did not start")
                time.sleep(0.02)
            yield
        finally:
            process.terminate()
            process.wait()


def _has_attached(output: int) -> bool:
    return b"PROBES_ATTACHED" in os.pread(output, 1 << 16, 0)


@contextmanager
def nothing() -> Iterator[None]:
    """Nobody looks on."""
    yield


def taxes(rounds: int) -> list[Cost]:
    """What getppid() takes, and how much more with each observer; the best of some rounds."""
    compile_c("calls.c", PROGRAM, "-static")
    ways: dict[str, list[str]] = {}

    def observing(
        what: str, *names: str, cgroups: int = 0
    ) -> Callable[[], AbstractContextManager[None]]:
        return partial(streamer, *names, cgroups=cgroups, way=ways.setdefault(what, []))

    fsync, getppid = "syscalls = fsync", "syscalls = getppid"
    observers: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "nothing": nothing,
        fsync: observing(fsync, "fsync"),
        getppid: observing(getppid, "getppid"),
        "syscalls = *": observing("syscalls = *", ALL),
        "syscalls = *, by cgroup": observing("by cgroup", ALL, cgroups=4096),
    }
    if shutil.which("bpftrace"):
        observers |= {
            "bpftrace, histogram of fsync": partial(bpftrace, _OTHER),
            "bpftrace, histogram of getppid": partial(bpftrace, _ONE),
            "bpftrace, histogram of all": partial(bpftrace, _ALL),
        }
    found = dict.fromkeys(observers, float("inf"))
    command = [str(PROGRAM), str(_CALLS)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for number in range(rounds):
            for what, observer in observers.items():
                show(f"getppid(), {what}: {number + 1}/{rounds}")
                with observer():
                    print(file=child.stdin, flush=True)
                    found[what] = min(found[what], float(child.stdout.readline()))
        child.stdin.close()
    alone = found.pop("nothing")
    named = {fsync: _kind(ways[fsync]), getppid: _kind(ways[getppid])}
    rows = [
        Cost(f"more with {what}{named.get(what, '')}", ns - alone) for what, ns in found.items()
    ]
    return [Cost("getppid() of a program", alone), *rows]


def _kind(ways: list[str]) -> str:
    """By what calls that are named are observed here."""
    return f" ({ways[0].replace('/', ' ').split()[0]})" if ways else ""


def main() -> None:
    """Print the costs."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    for cost in taxes(rounds):
        print(f"{cost.ns:8.1f} ns  {cost.what}")


if __name__ == "__main__":
    main()
