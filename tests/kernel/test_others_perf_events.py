"""Whoever else has opened the perf event of a tracepoint goes on being told what happens there."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from streamer.config.settings import Kernel, Settings
from streamer.kernel import loader, perf_event
from streamer.kernel.loader import TRACEFS, Loader, ensure_tracefs, online_cpus
from tests.conftest import Require
from tests.kernel.live import Live
from tests.kernel.scope import Scope
from tests.kernel.system import kernel_knows, preempts_tracepoints

pytestmark = [pytest.mark.kernel, pytest.mark.every_kernel]

TIMES = 10
PROCESSES = [f"sched/sched_process_{what}" for what in ("exec", "fork", "exit")]
CALLS = ("enter_openat", "exit_openat", "exit_bind", "exit_listen", "exit_connect", "exit_accept4")
SYSTEM_CALLS = [f"syscalls/sys_{call}" for call in CALLS]
KINDS = {"file.open", "net.connect", "net.accept", "net.bind", "net.listen"}
OPEN_LATENCY = Settings(kernel=Kernel(open_latency=True))


@contextmanager
def counted(tracepoint: str) -> Iterator[list[int]]:
    """How often it was met in the block, on all CPUs, as the list's only entry behind it."""
    (place,) = [one for one in TRACEFS if os.path.isdir(f"{one}/events/{tracepoint}")][:1]
    number = int(Path(f"{place}/events/{tracepoint}/id").read_text())
    attributes = struct.pack("<IIQQQQQIIQ", 2, 64, number, 0, 0, 0, 0, 0, 0, 0)
    events = [perf_event._open(cpu, attributes) for cpu in online_cpus()]
    count: list[int] = []
    try:
        yield count
        count.append(sum(int.from_bytes(os.read(one, 8), "little") for one in events))
    finally:
        for one in events:
            os.close(one)


def assert_told(scope: Scope, tracepoints: list[str], act: Callable[[], None]) -> None:
    for tracepoint in tracepoints:
        with counted(tracepoint) as count:
            scope.act(act)
        assert count[0] >= TIMES, tracepoint


def run_some() -> None:
    for _ in range(TIMES):
        os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)


def call_some() -> None:
    for _ in range(TIMES):
        os.close(os.open("/dev/null", os.O_RDONLY))
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            socket.create_connection(listener.getsockname()),
        ):
            listener.accept()[0].close()


def test_of_processes(
    scope: Scope, monkeypatch: pytest.MonkeyPatch, require_kernel: Require
) -> None:
    """Of which programs are at perf events from 7.0 on; here, too, where the kernel has it all."""
    there = kernel_knows("btf_trace_sched_prepare_exec") and kernel_knows("bpf_task_from_pid")
    tells = preempts_tracepoints() or not kernel_knows("srcu_free_old_probes")
    require_kernel(there and tells, "this kernel has raw tracepoints alone for it")
    monkeypatch.setattr(loader, "variables_of", set)
    with Live(scope, {"process.exec", "process.fork", "process.exit"}) as live:
        ways = {one.way for one in live.state.statuses if one.status == "attached"}
        assert ways >= {f"tracepoint/{one}" for one in PROCESSES}
        assert_told(scope, PROCESSES, run_some)


def test_of_system_calls(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which programs are at perf events where none load at functions."""
    assert not ensure_tracefs()
    monkeypatch.setattr(Loader, "_try_function", lambda self: "not wanted")
    with Live(scope, KINDS, OPEN_LATENCY) as live:
        ways = {one.way for one in live.state.statuses if one.status == "attached"}
        used = [one for one in SYSTEM_CALLS if f"tracepoint/{one}" in ways]
        assert set(SYSTEM_CALLS) - set(used) <= {"syscalls/sys_enter_openat"}  # from 5.11 on
        assert_told(scope, used, call_some)
