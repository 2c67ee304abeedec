"""Which process it was: its start, the same in all of its events, and its pid namespace."""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.kernel.agent import Agent, Recording
from tests.kernel.roles import in_own_network
from tests.kernel.scope import Scope
from tests.kernel.system import open_missing
from tests.kernel.unprivileged import CLONE_NEWPID, UID, become, in_child, own_namespaces, unshare

pytestmark = pytest.mark.kernel

TICKS = os.sysconf("SC_CLK_TCK")
CLONE = {"x86_64": 56, "aarch64": 220}[platform.machine()]
CLONE_PARENT, SIGCHLD = 0x00008000, 17
INITIAL_PIDNS = 0xEFFFFFFC  # PROC_PID_INIT_INO
STARTED = 21  # what proc_pid_stat(5) calls field 22
ALL_KINDS = {
    *("process.exec", "process.exit", "file.open"),
    *("net.bind", "net.listen", "net.connect", "net.accept", "net.close"),
}


class Lives(NamedTuple):
    """What the processes were."""

    whole: int  # does something of every kind, from a thread too
    ticks: int  # when it started, as /proc says
    executor: int  # executes from a thread that is not its first
    namespaces: list[Namespaced]
    adopted: Adopted


class Namespaced(NamedTuple):
    """A process: its id outside, the inode number of its pid namespace, its id inside."""

    outside: int
    pidns: int
    inside: int


class Adopted(NamedTuple):
    """A process, who made it, and whose child it is."""

    child: int
    maker: int
    parent: int


def live(subject: str) -> Lives:
    whole, ticks = live_a_whole_life(subject)
    environment = {"SUBJECT": "exec", "SUBJECT_NEXT": subject}
    executor = os.posix_spawn(subject, [b"subject"], environment)
    os.waitpid(executor, 0)
    return Lives(whole, ticks, executor, be_in_namespaces(), be_adopted())


# ---------------------------------------------------------------- starts


def live_a_whole_life(subject: str) -> tuple[int, int]:
    go, wait = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(wait)
        os.read(go, 1)
        do_everything(subject)
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    os.close(wait)
    os.close(go)
    assert os.waitpid(pid, 0)[1] == 0
    return pid, int(fields[STARTED - 2])


def do_everything(subject: str) -> None:
    """Open, from a thread too, which started later, connect, fork, execute and end."""
    try:
        open_missing("/no/leader/", 1)
        thread = threading.Thread(target=open_missing, args=("/no/thread/", 1))
        thread.start()
        thread.join()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            server, _ = listener.accept()
            client.close()
            server.close()
        in_child(open_missing, "/no/child/", 1)
        os.execve("/bin/sh", ["sh", "-c", "exit 0"], {})
    finally:
        os._exit(1)


# ---------------------------------------------------------------- pid namespaces


def be_in_namespaces() -> list[Namespaced]:
    """In the initial namespace, in one within, and in one within that, made by a user."""
    reader, writer = os.pipe()
    outermost = os.fork()
    if outermost == 0:
        try:
            become(UID)
            own_namespaces(CLONE_NEWPID)  # for its children: it stays where it is
            note(writer)
            open_missing("/no/outermost/", 1)
            inner = os.fork()
            if inner == 0:
                be_the_first(writer)
            os.waitpid(inner, 0)
            os._exit(0)
        finally:
            os._exit(1)
    os.waitpid(outermost, 0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        return [Namespaced(*map(int, line.split())) for line in lines]


def be_the_first(writer: int) -> None:
    try:
        note(writer)
        open_missing("/no/first/", 1)
        unshare(CLONE_NEWPID)
        innermost = os.fork()
        if innermost == 0:
            note(writer)
            open_missing("/no/innermost/", 1)
            os._exit(0)
        os.waitpid(innermost, 0)
        os._exit(0)
    finally:
        os._exit(1)


def note(writer: int) -> None:
    """Who the process is; the /proc here is still that of the initial pid namespace."""
    outside = int(os.readlink("/proc/self"))
    pidns = os.stat("/proc/self/ns/pid").st_ino
    os.write(writer, f"{outside} {pidns} {os.getpid()}\n".encode())


# ---------------------------------------------------------------- parents


def be_adopted() -> Adopted:
    """A child that makes a sister, by a clone with CLONE_PARENT."""
    reader, writer = os.pipe()
    maker = os.fork()
    if maker == 0:
        # Without the lock of the interpreter being let go: nothing else runs in the sister.
        sister = ctypes.PyDLL(None).syscall(CLONE, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0)
        if sister:
            os.write(writer, str(sister).encode())
        else:
            open_missing("/no/sister/", 1)
        os._exit(0 if sister >= 0 else 1)
    assert os.waitpid(maker, 0)[1] == 0
    sister = int(os.read(reader, 20))
    assert os.waitpid(sister, 0)[1] == 0
    return Adopted(sister, maker, os.getpid())


# ---------------------------------------------------------------- what was recorded


class Watched(NamedTuple):
    recording: Recording
    lives: Lives

    def of(self, pid: int) -> list[Any]:
        """Its events, the fork that made it not among them."""
        return [event for event in self.recording.events if event.pid == pid]

    def fork_of(self, pid: int) -> Any:
        (fork,) = (f for f in self.recording.of("process.fork") if f.child_pid == pid)
        return fork


@pytest.fixture(scope="module")
def watched(cgroups: Path, subject: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    directory = tmp_path_factory.mktemp("starts")
    with Scope(cgroups) as scope, Agent(directory, *scope.options) as agent:
        lives = scope.act(in_own_network, live, str(subject))
        agent.wait_for(b'{"event":"net.close"', 2)
        return Watched(agent.stop(), lives)


def test_one_start_in_all_events_of_a_process(watched: Watched) -> None:
    """Of every kind, before and after the exec, and of a thread that started later."""
    events = watched.of(watched.lives.whole)
    fork = watched.fork_of(watched.lives.whole)
    assert {event.__struct_config__.tag for event in events} == ALL_KINDS | {"process.fork"}
    assert any(event.tid != event.pid for event in events)
    assert {event.start_boot_ns for event in events} == {fork.child_start_boot_ns}
    assert fork.child_start_boot_ns * TICKS // 1_000_000_000 == watched.lives.ticks


def test_one_start_when_another_thread_executes(watched: Watched) -> None:
    """It takes the place of the first, and its start as well."""
    events = watched.of(watched.lives.executor)
    execs = [event for event in events if hasattr(event, "argv")]
    assert [event.argv for event in execs] == [["subject"], ["from a thread"]]
    (start,) = {event.start_boot_ns for event in events}
    assert watched.fork_of(watched.lives.executor).child_start_boot_ns == start
    (end,) = (event for event in events if hasattr(event, "exit_code"))
    assert end.boot_ns - end.duration_ns == start


def test_starts_tell_processes_apart(watched: Watched) -> None:
    """Each pid of one start, and no two processes of one pid and start."""
    forks = watched.recording.of("process.fork")
    made = {(fork.child_pid, fork.child_start_boot_ns) for fork in forks}
    assert len(made) == len(forks)
    ends = watched.recording.of("process.exit")
    assert {(event.pid, event.start_boot_ns) for event in ends} == made


def test_pid_namespaces(watched: Watched) -> None:
    """The one that a process is in, and not the one that its children will be in."""
    outermost, first, innermost = watched.lives.namespaces
    assert (outermost.pidns, outermost.inside) == (INITIAL_PIDNS, outermost.outside)
    assert first.inside == innermost.inside == 1
    assert len({outermost.pidns, first.pidns, innermost.pidns}) == 3
    for one in (outermost, first, innermost):
        fork = watched.fork_of(one.outside)
        assert (fork.child_pidns, fork.child_ns_pid) == (one.pidns, one.inside)
        events = watched.of(one.outside)
        assert {event.__struct_config__.tag for event in events} >= {"file.open", "process.exit"}
        assert {(event.pidns, event.ns_pid) for event in events} == {(one.pidns, one.inside)}


def test_the_parent_of_a_clone_with_clone_parent(watched: Watched) -> None:
    """Whose child it is, beside who made it; and its own events say the same."""
    child, maker, parent = watched.lives.adopted
    fork = watched.fork_of(child)
    assert (fork.pid, fork.child_ppid) == (maker, parent)
    assert {event.ppid for event in watched.of(child)} == {parent}
    assert watched.fork_of(maker).child_ppid == parent
