"""Opens by every system call, against what the test itself did."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import Require
from tests.kernel.agent import Agent
from tests.kernel.pace import repetitions
from tests.kernel.scope import Scope
from tests.kernel.system import (
    AT_FDCWD,
    OPEN,
    OPENAT,
    OPENAT2,
    WITHOUT_BTF,
    kernel_knows,
    open_missing,
    system_call,
)

pytestmark = pytest.mark.kernel

PATH_LEN = 4096  # of events.h
NOBODY = 65534
LATENCY_NEEDS = "BPF_FUNC_task_storage_get"  # since 5.11
BAD_ADDRESS = 8  # in the first page, which nobody has


class Call(NamedTuple):
    """A call that was made, what came of it, and how long it took at most."""

    path: str
    flags: int
    mode: int
    fd: int
    errno: int
    most_ns: int
    truncated: bool = False
    uid: int = 0


class OpenHow(ctypes.Structure):
    """`struct open_how` of linux/openat2.h."""

    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


class Opener:
    """Makes system calls and notes them. `path` is what the event is to say."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def open(self, name: bytes, path: str, flags: int = 0, mode: int = 0) -> int:
        assert OPEN is not None
        return self._note(path, flags, mode, system_call(OPEN, name, flags, mode))

    def openat(
        self, dirfd: int, name: bytes | int, path: str, flags: int = 0, mode: int = 0, **more: Any
    ) -> int:
        made = system_call(OPENAT, dirfd, name, flags, mode)
        return self._note(path, flags, mode, made, **more)

    def openat2(
        self, dirfd: int, name: bytes, path: str, flags: int = 0, mode: int = 0, resolve: int = 0
    ) -> int:
        how = OpenHow(flags, mode, resolve)
        made = system_call(OPENAT2, dirfd, name, ctypes.byref(how), ctypes.sizeof(how))
        return self._note(path, flags, mode, made)

    def _note(
        self, path: str, flags: int, mode: int, made: tuple[int, int, int], **more: Any
    ) -> int:
        fd, error, most_ns = made
        mode = mode if flags & (os.O_CREAT | O_TMPFILE_BIT) else 0  # not used, so not reported
        self.calls.append(Call(path, flags, mode, fd, error, most_ns, **more))
        if fd >= 0:
            os.close(fd)
        return fd


def assert_calls(events: list[Any], calls: list[Call], pid: int) -> None:
    """One event per call, in order, with every field as it was."""
    assert [(e.path, e.errno) for e in events] == [(c.path, c.errno) for c in calls]
    low = 1 if not WITHOUT_BTF and kernel_knows(LATENCY_NEEDS) else 0
    for event, call in zip(events, calls, strict=True):
        found = (event.fd, event.flags, event.mode, event.truncated, event.uid)
        cut = ("path",) if call.truncated else ()
        assert found == (call.fd, call.flags, call.mode, cut, call.uid), call
        assert low <= event.latency_ns <= (call.most_ns if low else 0)
        assert (event.pid, event.tid, event.comm, event.ppid) == (pid, pid, "actor", os.getpid())
        assert event.invalid_utf8 == ("\ufffd" in call.path)


def streamed(scope: Scope, directory: Path, function: Callable[..., Any], *given: Any) -> None:
    """Let the function make its calls, and compare the events with what it says it did."""
    config = "[kernel]\nopen_latency = true\n"
    with Agent(directory / "agent", *scope.options, events="file.open", config=config) as agent:
        with scope.start(function, *given) as actor:
            calls = actor.result()
        recording = agent.stop()
    assert recording.losses == []
    assert_calls(recording.events, calls, actor.pid)


# ---------------------------------------------------------------- ways to succeed

WRITE_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
O_TMPFILE_BIT = os.O_TMPFILE & ~os.O_DIRECTORY
RESOLVE_IN_ROOT = 0x10


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with some files to open."""
    made = tmp_path.resolve() / "tree"
    (made / "sub").mkdir(parents=True)
    for name in ("file", "sub/inner", "prüfung ☃"):
        (made / name).write_text("content")
    (made / "link").symlink_to("sub/inner")
    Path(os.fsdecode(bytes(made) + b"/not \xff utf-8")).write_text("content")
    return made


def open_by_open(directory: str) -> list[Call]:
    opener = Opener()
    os.chdir(directory)
    opener.open(f"{directory}/file".encode(), f"{directory}/file")
    opener.open(b"file", f"{directory}/file", os.O_RDWR | os.O_APPEND)
    opener.open(b"made by open", f"{directory}/made by open", WRITE_NEW, 0o640)
    opener.open(b"nothing", f"{directory}/nothing", os.O_RDONLY, 0o777)
    return opener.calls


def test_open(scope: Scope, tree: Path, require: Require) -> None:
    require(OPEN is not None, f"{platform.machine()} has no system call open()")
    streamed(scope, tree, open_by_open, str(tree))


def open_by_openat(directory: str) -> list[Call]:
    """Relative to all that a path can be relative to."""
    opener = Opener()
    os.chdir(directory)
    opener.openat(AT_FDCWD, b"sub", f"{directory}/sub", os.O_PATH | os.O_DIRECTORY)
    dirfd = checked_dirfd(opener, f"{directory}/sub")
    opener.openat(AT_FDCWD, f"{directory}/file".encode(), f"{directory}/file")
    opener.openat(AT_FDCWD, b"file", f"{directory}/file", os.O_RDONLY, 0o777)
    opener.openat(dirfd, b"inner", f"{directory}/sub/inner")
    opener.openat(dirfd, b"../file", f"{directory}/file")
    opener.openat(dirfd, f"{directory}/file".encode(), f"{directory}/file")
    opener.openat(AT_FDCWD, b"sub/../sub/./inner", f"{directory}/sub/inner")
    opener.openat(AT_FDCWD, b"link", f"{directory}/sub/inner")
    opener.openat(AT_FDCWD, b"made", f"{directory}/made", WRITE_NEW | os.O_CLOEXEC, 0o4755)
    opener.openat(AT_FDCWD, "prüfung ☃".encode(), f"{directory}/prüfung ☃")
    opener.openat(AT_FDCWD, b"not \xff utf-8", f"{directory}/not \ufffd utf-8")
    opener.openat(AT_FDCWD, b"/", "/", os.O_RDONLY | os.O_DIRECTORY)
    opener.openat(AT_FDCWD, b"/dev/null", "/dev/null", os.O_RDWR)
    return opener.calls


@pytest.mark.every_kernel
def test_openat(scope: Scope, tree: Path) -> None:
    streamed(scope, tree, open_by_openat, str(tree))


def open_by_openat2(directory: str) -> list[Call]:
    opener = Opener()
    dirfd = checked_dirfd(opener, f"{directory}/sub")
    opener.openat2(dirfd, b"inner", f"{directory}/sub/inner", os.O_RDONLY | os.O_NOFOLLOW)
    opener.openat2(dirfd, b"/inner", f"{directory}/sub/inner", resolve=RESOLVE_IN_ROOT)
    opener.openat2(dirfd, b"made", f"{directory}/sub/made", WRITE_NEW, 0o600)
    opener.openat2(dirfd, b"missing", f"{directory}/sub/missing")
    opener.openat2(dirfd, b"inner", f"{directory}/sub/inner", os.O_RDONLY, 0o600)  # EINVAL
    return opener.calls


def checked_dirfd(opener: Opener, directory: str) -> int:
    """A descriptor of the directory, the opening of which is noted."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    opener.calls.append(Call(directory, flags, 0, fd, 0, 1 << 60))
    return fd


def test_openat2(scope: Scope, tree: Path) -> None:
    streamed(scope, tree, open_by_openat2, str(tree))


# ---------------------------------------------------------------- ways to fail


def fail_in_every_way(directory: str) -> list[Call]:
    opener = Opener()
    os.chdir(directory)
    dirfd = checked_dirfd(opener, f"{directory}/sub")
    opener.openat(AT_FDCWD, b"missing/x", f"{directory}/missing/x")
    opener.openat(AT_FDCWD, b"../x", f"{directory}/../x")
    opener.openat(dirfd, b"missing", f"{directory}/sub/missing", WRITE_NEW & ~os.O_CREAT, 0o600)
    opener.openat(dirfd, b"/nowhere/at/all", "/nowhere/at/all")
    opener.openat(dirfd, b"", f"{directory}/sub")
    opener.openat(AT_FDCWD, b"file", f"{directory}/file", WRITE_NEW, 0o640)
    opener.openat(AT_FDCWD, b"file/x", f"{directory}/file/x")
    opener.openat(AT_FDCWD, b"sub", f"{directory}/sub", os.O_WRONLY)
    opener.openat(AT_FDCWD, b"link", f"{directory}/link", os.O_NOFOLLOW)
    opener.openat(AT_FDCWD, b"gone \xff", f"{directory}/gone \ufffd")
    opener.openat(AT_FDCWD, BAD_ADDRESS, directory, truncated=True)
    opener.openat(999, b"of no directory", "of no directory", truncated=True)
    opener.openat(999, b"/absolute", "/absolute")
    longest = b"/" + b"d/" * 2047  # with its NUL, the most that the kernel takes
    opener.openat(AT_FDCWD, longest, longest.decode())
    opener.openat(AT_FDCWD, longest + b"d", longest.decode(), truncated=True)
    opener.openat(AT_FDCWD, b"n" * 4095, f"{directory}/{'n' * 4095}")
    os.chdir("/")
    opener.openat(AT_FDCWD, b"missing", "/missing")
    os.setresuid(NOBODY, NOBODY, 0)
    opener.openat(AT_FDCWD, f"{directory}/file".encode(), f"{directory}/file", uid=NOBODY)
    os.setresuid(0, 0, 0)
    return opener.calls


def test_opens_that_fail(scope: Scope, tree: Path) -> None:
    tree.chmod(0o700)
    streamed(scope, tree, fail_in_every_way, str(tree))


def fail_in_a_jail(directory: str) -> list[Call]:
    opener = Opener()
    os.chroot(directory)
    os.chdir("/sub")
    opener.openat(AT_FDCWD, b"/gone", f"{directory}/gone")
    opener.openat(AT_FDCWD, b"gone", f"{directory}/sub/gone")
    opener.openat(AT_FDCWD, b"/file", f"{directory}/file")
    return opener.calls


def test_opens_in_a_chroot(scope: Scope, tree: Path) -> None:
    """Paths begin at the root of the mount namespace, not of the process."""
    streamed(scope, tree, fail_in_a_jail, str(tree))


def be_interrupted(directory: str) -> list[Call]:
    """Wait for a writer of a FIFO until a signal comes."""
    opener = Opener()
    os.mkfifo(f"{directory}/fifo")
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)  # it may come before the call does
    opener.openat(AT_FDCWD, f"{directory}/fifo".encode(), f"{directory}/fifo")
    signal.setitimer(signal.ITIMER_REAL, 0)
    return opener.calls


def test_an_open_that_a_signal_interrupts(scope: Scope, tree: Path) -> None:
    """EINTR, as the caller sees it, and not the number that the kernel uses inside."""
    streamed(scope, tree, be_interrupted, str(tree))


# ---------------------------------------------------------------- files without a path


def open_what_has_no_path(directory: str) -> list[Call]:
    opener = Opener()
    pipe, _ = os.pipe()
    memory = os.memfd_create("scratch")
    for fd, path in ((memory, "/memfd:scratch"), (pipe, f"/proc/self/fd/{pipe}")):
        opener.openat(AT_FDCWD, f"/proc/self/fd/{fd}".encode(), path)
    fd, error, most_ns = system_call(
        OPENAT, AT_FDCWD, directory.encode(), os.O_TMPFILE | os.O_RDWR, 0o600
    )
    path = os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")
    opener.calls.append(Call(path, os.O_TMPFILE | os.O_RDWR, 0o600, fd, error, most_ns))
    return opener.calls


def test_files_without_a_path(scope: Scope, tree: Path) -> None:
    """A memory file, a pipe and a temporary file: the kernel's name, or what was asked for."""
    streamed(scope, tree, open_what_has_no_path, str(tree))


def open_deep_down(directory: str) -> list[Call]:
    """Directories in directories, until the path is longer than a path can be."""
    opener = Opener()
    os.chdir(directory)
    path, part = directory, "d" * 250
    for _ in range((PATH_LEN - len(directory) - 2) // 251):
        os.mkdir(part)
        os.chdir(part)
        path += f"/{part}"
    rest = PATH_LEN - len(path) - 1
    opener.openat(AT_FDCWD, b"f" * rest, f"{path}/{'f' * rest}", WRITE_NEW, 0o600)
    longer = end_of(f"{path}/{'f' * (rest + 1)}")
    opener.openat(AT_FDCWD, b"f" * (rest + 1), longer, WRITE_NEW, 0o600, truncated=True)
    opener.openat(AT_FDCWD, b"gone", f"{path}/gone")
    return opener.calls


def end_of(path: str) -> str:
    """The path without its first parts, as many as needed to fit."""
    while len(path) > PATH_LEN:
        path = path[path.index("/", 1) :]
    return path


def test_the_longest_path(scope: Scope, tree: Path) -> None:
    """4,096 bytes are whole; of a longer path the end is kept, and the event says so."""
    streamed(scope, tree, open_deep_down, str(tree))


# ---------------------------------------------------------------- many at once

THREADS, PROCESSES, OPENS = 4, 2, repetitions(500, 50)


def open_from_many(directory: str) -> None:
    children = []
    for process in range(PROCESSES):
        children.append(os.fork())
        if children[-1] == 0:
            open_from_threads(f"{directory}/{process}")
            os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * PROCESSES


def open_from_threads(prefix: str) -> None:
    threads = [
        threading.Thread(target=open_missing, args=(f"{prefix}-{n}-", OPENS))
        for n in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_every_open_of_many_threads_and_processes(scope: Scope, tmp_path: Path) -> None:
    numbered = ("--path", f"{tmp_path}/")
    with Agent(tmp_path / "agent", *scope.options, *numbered, events="file.open") as agent:
        scope.act(open_from_many, str(tmp_path))
        recording = agent.stop()
    found = Counter(event.path for event in recording.events)
    done = Counter(
        f"{tmp_path}/{process}-{thread}-{i}"
        for process in range(PROCESSES)
        for thread in range(THREADS)
        for i in range(OPENS)
    )
    assert not found - done
    # A kernel that preempts its own code runs no program in one thread while another's waits.
    assert (done - found).total() <= recording.skipped
    by_thread = Counter((event.pid, event.tid) for event in recording.events)
    assert len({pid for pid, _ in by_thread}) == PROCESSES
    assert len(by_thread) == PROCESSES * THREADS
    assert max(by_thread.values()) <= OPENS
    assert recording.losses == []
