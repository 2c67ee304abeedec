"""Executions, forks and exits, against what the test itself did."""

from __future__ import annotations

import codecs
import ctypes
import os
import resource
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.kernel.agent import Agent, Recording
from tests.kernel.pace import repetitions
from tests.kernel.scope import Scope
from tests.kernel.system import kernel_is

pytestmark = pytest.mark.kernel

EXECS = repetitions(1000, 100)
ARGV_LEN, PATH_LEN, LINE_LEN = 16384, 4096, 4096  # of events.h
DEPTH, STEPS = 90, 80  # a directory that is deeper than a path is followed: MOST_STEPS
NOBODY = 65534


class Run(NamedTuple):
    """A process that was run: what it was given, and what wait() said of it."""

    pid: int
    argv: list[bytes]
    cwd: str
    exe: str
    status: int = 0
    uid: int = 0
    euid: int = 0
    gid: int = 0


def arguments_of(i: int) -> list[bytes]:
    """Arguments that no other `i` has, of every sort."""
    unique = f"unique-{i}".encode()
    sorts: list[list[bytes]] = [
        [unique],
        [unique, b""],
        [unique, b"", b"", b"last"],
        [unique, "prüfung ☃ 日本語".encode(), b"two words"],
        [unique, b"line\nbreak\n", b"\ttab", b'quote"\\'],
        [unique, b"x" * 7000],
        [unique, b"\xff\xfe broken \xc3"],
        [unique, "🦀".encode()[:3]],
        [b" ", unique],
        [unique, *(str(n).encode() for n in range(200))],
    ]
    return sorts[i % len(sorts)]


def run_many(program: str, directories: list[str], count: int) -> list[Run]:
    """Run the program `count` times, with arguments and working directory of its own each."""
    runs = []
    for i in range(count):
        argv, cwd = arguments_of(i), directories[i % len(directories)]
        os.chdir(cwd)
        pid = os.posix_spawn(program, argv, {})
        runs.append(Run(pid, argv, cwd, program, os.waitpid(pid, 0)[1]))
    return runs


def text(raw: bytes) -> str:
    return raw.decode(errors="replace")


def assert_exit(event: Any, status: int) -> None:
    """The event says what wait() said."""
    assert event.exit_code == (os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0)
    assert event.signal == (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)
    assert event.core_dumped == os.WCOREDUMP(status)


def shortened(raw: bytes) -> str:
    """The line of arguments of which not all is in it."""
    part = codecs.utf_8_decode(raw[:LINE_LEN], "replace", False)[0]
    return part.removesuffix("\0").replace("\0", " ")


def assert_exec(event: Any, run: Run) -> None:
    argv = [text(argument) for argument in run.argv]
    assert event.argv == argv
    raw = b"".join(argument + b"\0" for argument in run.argv)
    long = len(raw) > LINE_LEN
    assert event.cmdline == (shortened(raw) if long else " ".join(argv))
    assert event.argc == len(argv)
    assert event.invalid_utf8 == (argv != [os.fsdecode(argument) for argument in run.argv])
    assert (event.cwd, event.exe) == (run.cwd, run.exe)
    assert event.truncated == (("cmdline",) if long else ())
    assert (event.filename, event.interp, event.incomplete) == (run.exe, "", False)
    assert event.comm == os.path.basename(run.exe)[:15]
    assert event.tid == event.pid == run.pid
    assert (event.uid, event.euid, event.gid) == (run.uid, run.euid, run.gid)


def test_every_exec_fork_and_exit_of_a_thousand(
    scope: Scope, subject: Path, open_directory: Path, tmp_path: Path
) -> None:
    """Exactly one of each per process, with every field as it was."""
    directories = [str(open_directory), "/", str(tmp_path / "wörk dir")]
    os.mkdir(directories[-1])
    before = time.time_ns()
    with Agent(tmp_path / "agent", *scope.options) as agent:
        with scope.start(run_many, str(subject), directories, EXECS) as actor:
            runs = actor.result()
        recording = agent.stop()
    after = time.time_ns()
    execs = {event.pid: event for event in recording.of("process.exec")}
    exits = {event.pid: event for event in recording.of("process.exit")}
    forks = {event.child_pid: event for event in recording.of("process.fork")}
    assert len(runs) == EXECS
    for found, kind in ((execs, "exec"), (exits, "exit"), (forks, "fork")):
        assert len(recording.of(f"process.{kind}")) == EXECS
        assert found.keys() == {run.pid for run in runs}
    for run in runs:
        assert_exec(execs[run.pid], run)
        assert_exit(exits[run.pid], run.status)
        assert_lifetime(forks[run.pid], execs[run.pid], exits[run.pid])
    assert_parents(recording, actor.pid)
    assert {event.cgroup_id for event in recording.events} == {scope_id(recording)}
    assert all(before < event.time_ns < after for event in recording.events)
    assert recording.losses == []


def scope_id(recording: Recording) -> int:
    (value,) = recording.manifest.filters["cgroups"]
    return int(value)


def assert_lifetime(fork: Any, execution: Any, end: Any) -> None:
    """The three agree on the start, and the exit on how long it lasted."""
    assert fork.boot_ns < execution.boot_ns < end.boot_ns
    started_boot_ns = end.boot_ns - end.duration_ns
    # The kernel notes the start of a child shortly before it reports the fork.
    assert 0 <= fork.boot_ns - started_boot_ns < 1_000_000_000
    for event, start in (
        (fork, fork.child_start_time_ns),
        (execution, execution.start_time_ns),
        (end, end.start_time_ns),
    ):
        assert start - (event.time_ns - event.boot_ns) == started_boot_ns


def assert_parents(recording: Recording, parent: int) -> None:
    python = os.readlink("/proc/self/exe")
    auid = int(Path("/proc/self/loginuid").read_text()) if has_auid() else NO_AUID
    for event in recording.of("process.fork"):
        assert (event.pid, event.tid, event.comm, event.ppid) == (
            parent,
            parent,
            "actor",
            os.getpid(),
        )
    for event in recording.of("process.exit"):
        assert (event.ppid, event.comm) == (parent, "subject")
    for event in recording.of("process.exec"):
        assert (event.ppid, event.parent_comm, event.parent_exe) == (parent, "actor", python)
        assert event.auid == auid


NO_AUID = (1 << 32) - 1


def has_auid() -> bool:
    return Path("/proc/self/loginuid").exists()


# ---------------------------------------------------------------- ways to end


class Case(NamedTuple):
    """A way to run the subject: `mode` goes to SUBJECT, `sent` is a signal sent to it."""

    mode: str
    sent: int = 0


CASES = (
    Case("group"),
    Case("leaderless"),
    Case("raw"),
    Case("crowd"),
    Case("exec"),
    Case("wait", signal.SIGKILL),
    Case("wait", signal.SIGTERM),
    Case("wait", signal.SIGQUIT),
    Case("wait", signal.SIGSEGV),
)


def run_cases(program: str, cores: str) -> list[tuple[int, int]]:
    """Run every case: pid and what wait() said. Cores, where they go to a file, go to `cores`."""
    os.chdir(cores)
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ends = []
    for case in CASES:
        environment = {"SUBJECT": case.mode, "SUBJECT_NEXT": program}
        pid = os.posix_spawn(program, [b"subject"], environment)
        if case.sent:
            wait_until_it_waits(pid)
            os.kill(pid, case.sent)
        ends.append((pid, os.waitpid(pid, 0)[1]))
    return ends


def wait_until_it_waits(pid: int) -> None:
    """Until it has left its startup behind, and sleeps."""
    while "S (sleeping)" not in Path(f"/proc/{pid}/status").read_text():
        time.sleep(0.005)
    time.sleep(0.02)


def test_one_exit_per_process_however_it_ends(scope: Scope, subject: Path, tmp_path: Path) -> None:
    """Threads end by themselves, all at once, or are killed: one exit, as wait() tells it."""
    (tmp_path / "cores").mkdir()
    with Agent(tmp_path, *scope.options) as agent:
        ends = scope.act(run_cases, str(subject), str(tmp_path / "cores"))
        recording = agent.stop()
    exits = recording.of("process.exit")
    assert Counter(event.pid for event in exits) == Counter(pid for pid, _ in ends)
    found = {event.pid: event for event in exits}
    for pid, status in ends:
        assert_exit(found[pid], status)
    # Where all threads end by themselves, older kernels tell what the leader ended with.
    raw = 4 if kernel_is(6, 1) else 3
    expected = [(7, 0), (9, 0), (raw, 0), (0, 0), (1, 0), (0, 9), (0, 15), (0, 3), (0, 11)]
    assert [(found[pid].exit_code, found[pid].signal) for pid, _ in ends] == expected
    cored = [pid for pid, status in ends if os.WCOREDUMP(status)]
    assert [pid for pid, _ in ends if found[pid].core_dumped] == cored
    # Every thread that exec replaced is gone without an exit of its own.
    execs = Counter(event.pid for event in recording.of("process.exec"))
    by_thread = ends[CASES.index(Case("exec"))][0]
    assert execs == Counter({pid: 2 if pid == by_thread else 1 for pid, _ in ends})
    (event,) = [e for e in recording.of("process.exec") if e.argv == ["from a thread"]]
    assert event.pid == event.tid == by_thread


# ---------------------------------------------------------------- between fork and exec

ENDS = repetitions(100, 20)


def end_between(directory: str) -> dict[str, list[tuple[int, int]]]:
    """Processes that never come to run a program, by how they end; and what wait() said."""
    broken, text = f"{directory}/broken", f"{directory}/text"
    Path(broken).write_bytes(loads_nowhere())
    Path(text).write_text("nothing\n")
    for file in (broken, text):
        os.chmod(file, 0o755)
    ways: dict[str, Callable[[], None]] = {
        "at once": lambda: os._exit(3),
        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "no such program": lambda: os.execv(f"{directory}/missing", [b"missing"]),
        "not a program": lambda: os.execv(text, [b"text"]),
        "a program that is broken": lambda: os.execv(broken, [b"broken"]),
    }
    return {name: [ended(way) for _ in range(ENDS)] for name, way in ways.items()}


def loads_nowhere() -> bytes:
    """A program with a segment where no process has memory: by then the old one has gone."""
    with open("/proc/self/exe", "rb") as file:
        header = bytearray(file.read(64))
    struct.pack_into("<H", header, 16, 2)  # ET_EXEC
    struct.pack_into("<Q", header, 32, 64)  # where its only segment is described
    struct.pack_into("<H", header, 56, 1)
    nowhere = 0xFFFF_F000_0000_0000
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, nowhere, nowhere, 4096, 4096, 4096)
    return (bytes(header) + segment).ljust(4096, b"\0")


def ended(way: Callable[[], None]) -> tuple[int, int]:
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            way()
        os._exit(101)
    return pid, os.waitpid(pid, 0)[1]


@pytest.mark.every_kernel
def test_processes_that_die_between_fork_and_exec(scope: Scope, tmp_path: Path) -> None:
    """Each has its fork and its exit, as wait() tells it, and no exec."""
    directory = tmp_path / "programs"
    directory.mkdir()
    with Agent(tmp_path / "agent", *scope.options) as agent:
        found = scope.act(end_between, str(directory))
        recording = agent.stop()
    statuses = dict(one for ends in found.values() for one in ends)
    assert len(statuses) == ENDS * len(found)
    assert recording.of("process.exec") == []
    assert Counter(e.child_pid for e in recording.of("process.fork")) == Counter(statuses.keys())
    assert Counter(e.pid for e in recording.of("process.exit")) == Counter(statuses.keys())
    for event in recording.of("process.exit"):
        assert_exit(event, statuses[event.pid])
    assert {name: {status for _, status in ends} for name, ends in found.items()} == {
        "at once": {3 << 8},
        "killed": {signal.SIGKILL},
        "no such program": {101 << 8},
        "not a program": {101 << 8},
        "a program that is broken": {signal.SIGSEGV},
    }
    assert recording.losses == []


# ---------------------------------------------------------------- unusual executions


LONG_NAMES = kernel_is(6, 1)
"""Whether a program runs whose name, with that of the directory, is longer than a path can be."""


def run_unusual(program: str, directory: str, jail: str) -> dict[str, int]:
    """Run it as another user, as a script, from deep down, in a chroot, and with much argv."""
    script = f"{directory}/script"
    Path(script).write_text(f"#!{program} option\n")
    os.chmod(script, 0o755)
    os.symlink(program, f"{directory}/a-link-with-a-long-name")
    deep = make_deep(directory)
    os.link(program, f"{jail}/inside")
    pids = {}
    os.chdir(directory)
    pids["user"] = fork_and(lambda: run_as_user(program))
    pids["script"] = fork_and(lambda: os.execv(script, [b"shown", b"given"]))
    pids["link"] = fork_and(lambda: os.execv("a-link-with-a-long-name", [b"linked"]))
    pids["much"] = fork_and(lambda: os.execv(program, [b"much", *[b"y" * 999] * 30]))
    pids["none"] = fork_and(lambda: execv_empty(program))
    pids["chroot"] = fork_and(lambda: run_in_jail(jail))
    pids["full"] = fork_and(lambda: exec_below(program, PATH_LEN - 1))
    if LONG_NAMES:
        pids["long"] = fork_and(lambda: exec_below(program, PATH_LEN))
    os.chdir(deep)
    pids["deep"] = fork_and(lambda: os.execv(program, [b"deep"]))
    return pids


def make_deep(directory: str) -> str:
    """A directory of many levels. The path, which is too long to be given in one piece, is not."""
    here = os.getcwd()
    os.chdir(directory)
    for level in range(DEPTH):
        os.mkdir(f"level-{level:02}")
        os.chdir(f"level-{level:02}")
    deep = os.getcwd()
    os.chdir(here)
    return deep


def run_as_user(program: str) -> None:
    os.setresgid(1234, 1234, 1234)
    os.setresuid(1001, 1002, 1002)
    os.execv(program, [b"user"])


def run_in_jail(jail: str) -> None:
    os.chroot(jail)
    os.chdir("/")
    os.execv("/inside", [b"jailed"])


def execv_empty(program: str) -> None:
    """With one argument, which is empty: Python's own exec refuses that."""
    argv = (ctypes.c_char_p * 2)(b"", None)
    ctypes.CDLL(None).execv(program.encode(), argv)


def exec_below(program: str, length: int) -> None:
    """By a path below a directory that is open, so that the kernel's name for it has `length`."""
    directory, name = os.path.split(program)
    fd = os.open(directory, os.O_PATH)
    pairs, odd = divmod(length - len(f"/dev/fd/{fd}/{name}"), 2)
    path = "./" * pairs + "/" * odd + name
    argv, environment = (ctypes.c_char_p * 2)(b"below", None), (ctypes.c_char_p * 1)(None)
    ctypes.CDLL(None).execveat(fd, path.encode(), argv, environment, 0)


def fork_and(execute: Any) -> int:
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            execute()
        os._exit(101)
    os.waitpid(pid, 0)
    return pid


@pytest.mark.every_kernel
def test_unusual_executions(
    scope: Scope, subject: Path, open_directory: Path, tmp_path: Path
) -> None:
    directory = open_directory / "unusual"
    jail = directory / "jail"
    jail.mkdir(parents=True)
    directory.chmod(0o755)
    with Agent(tmp_path, *scope.options) as agent:
        pids = scope.act(run_unusual, str(subject), str(directory), str(jail))
        recording = agent.stop()
    found = {event.pid: event for event in recording.of("process.exec")}
    assert found.keys() == set(pids.values())
    events = {name: found[pid] for name, pid in pids.items()}

    user = events["user"]
    assert (user.uid, user.euid, user.gid, user.argv) == (1001, 1002, 1234, ["user"])
    script = events["script"]
    assert script.argv == [str(subject), "option", f"{directory}/script", "given"]
    assert (script.exe, script.argc, script.comm) == (str(subject), 4, "script")
    assert (script.filename, script.interp) == (f"{directory}/script", str(subject))
    link = events["link"]
    assert (link.exe, link.argv, link.comm) == (str(subject), ["linked"], "a-link-with-a-l")
    assert (events["none"].argv, events["none"].argc, events["none"].cmdline) == ([""], 1, "")
    jailed = events["chroot"]
    assert (jailed.exe, jailed.cwd) == (f"{jail}/inside", str(jail))

    much = events["much"]
    assert (much.truncated, much.argc) == (("argv", "cmdline"), 31)
    whole = b"much\0" + b"\0".join([b"y" * 999] * 30)
    assert much.argv == whole[:ARGV_LEN].decode().split("\0")
    deep = events["deep"]
    assert deep.truncated == ("cwd",)
    assert deep.exe == str(subject)
    assert deep.cwd == "".join(f"/level-{level:02}" for level in range(DEPTH - STEPS, DEPTH))
    assert len(events["full"].filename) == PATH_LEN - 1
    assert events["full"].filename.endswith("/subject")
    if LONG_NAMES:
        assert len(events["long"].filename) == PATH_LEN - 1
        assert events["long"].truncated == ("filename",)
    for name, event in events.items():
        assert bool(event.truncated) == (name in ("much", "deep", "long")), name
    exits = {event.pid: event.exit_code for event in recording.of("process.exit")}
    assert exits == {pid: found[pid].argc for pid in pids.values()}
