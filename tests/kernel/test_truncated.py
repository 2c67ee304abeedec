"""Which strings are cut, and only those: at the last byte, and at the last part, that has room."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.kernel.agent import Agent, Recording
from tests.kernel.scope import Scope
from tests.kernel.system import AT_FDCWD, OPENAT, system_call

pytestmark = pytest.mark.kernel

PATH_LEN, ARGV_LEN, MOST_PARTS = 4096, 16384, 80  # of the kernel programs
LEAF = "leaf"
SNOWMAN = "☃"  # three bytes


def words(size: int, *last: str) -> list[str]:
    """Arguments that take `size` bytes, each with its NUL; the given ones are the last."""
    rest = size - sum(len(word.encode()) + 1 for word in last)
    return ["a" * (rest // 2 - 1), "b" * (rest - rest // 2 - 1), *last]


class Argv(NamedTuple):
    """Arguments, what is to be told of them, and whether that is less."""

    given: list[str]
    told: list[str]
    cut: bool


def whole(given: list[str]) -> Argv:
    return Argv(given, given, False)


ARGVS = {
    "to the last byte": whole(words(ARGV_LEN)),
    "an empty one last": whole(words(ARGV_LEN, "")),
    # The last NUL alone has no room: it ends nothing but what the end of the data ends too.
    "but for a NUL": whole(words(ARGV_LEN + 1)),
    "but for an empty one": Argv(words(ARGV_LEN + 1, ""), words(ARGV_LEN), True),
    "but for two of them": Argv(words(ARGV_LEN + 2, "", ""), words(ARGV_LEN), True),
    "but for a byte": Argv(words(ARGV_LEN + 2, "last"), words(ARGV_LEN + 1, "las"), True),
    "but for two bytes of a snowman": Argv(words(ARGV_LEN + 3, SNOWMAN), words(ARGV_LEN, ""), True),
    "but for a byte of a snowman": Argv(
        words(ARGV_LEN + 2, SNOWMAN), words(ARGV_LEN - 1, ""), True
    ),
    "of which the last is whole": whole(words(ARGV_LEN + 1, SNOWMAN)),
}


class Done(NamedTuple):
    """The process of each case by its name, and the paths that were opened, in order."""

    argvs: dict[str, int]
    strings: dict[str, int]
    paths: list[str]


def run_everything(program: str, directory: str) -> Done:
    argvs = {name: run(program, argv.given) for name, argv in ARGVS.items()}
    return Done(argvs, cut_each_string(program, directory), open_deep_down(directory))


def run(program: str, argv: list[str]) -> int:
    pid = os.posix_spawn(program, [word.encode() for word in argv], {})
    os.waitpid(pid, 0)
    return pid


# ---------------------------------------------------------------- directories of many levels


@contextmanager
def deep_down(directory: str, levels: int) -> Iterator[None]:
    """In a directory whose path has so many parts, below `directory`."""
    here = os.getcwd()
    os.chdir(directory)
    for level in range(parts_of(directory), levels):
        os.makedirs(name_of(level), exist_ok=True)
        os.chdir(name_of(level))
    try:
        yield
    finally:
        os.chdir(here)


def parts_of(directory: str) -> int:
    return len(Path(directory).parts) - 1


def name_of(level: int) -> str:
    return f"level-{level:02}"


def expected(directory: str, levels: int, *names: str) -> str:
    """A path of so many parts and names, of the first ones as many missing as are too many."""
    parts = [*Path(directory).parts[1:]]
    parts += [*(name_of(level) for level in range(parts_of(directory), levels)), *names]
    return "".join(f"/{part}" for part in parts[-MOST_PARTS:])


# One part less than can be walked, as many, and one more.
AROUND = {"less": MOST_PARTS - 1, "most": MOST_PARTS, "more": MOST_PARTS + 1}


# ---------------------------------------------------------------- strings of an exec


def cut_each_string(program: str, directory: str) -> dict[str, int]:
    """Executions of which one string is cut, or none."""
    pids = {}
    for name, levels in AROUND.items():
        with deep_down(directory, levels):
            pids[f"cwd {name}"] = run(program, ["in here"])
        with deep_down(directory, levels - 1):
            os.link(program, LEAF)
            here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
            pids[f"exe {name}"] = run_from(here, LEAF, directory)
            os.close(here)
    with deep_down(directory, MOST_PARTS):
        shutil.copy("/bin/sh", "shell")
        here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        command = f"cd {directory}; {program} child; exit 0"
        pids["the parent"] = run_from(here, "shell", directory, "-c", command)
        os.close(here)
    return pids


def run_from(directory_fd: int, name: str, cwd: str, *arguments: str) -> int:
    """Run a file in a directory, in the working directory `cwd`."""
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(cwd)
            os.execve(f"/proc/self/fd/{directory_fd}/{name}", [name, *arguments], {})
        finally:
            os._exit(101)
    assert os.waitpid(pid, 0)[1] >> 8 != 101
    return pid


# ---------------------------------------------------------------- paths of opens


def open_deep_down(directory: str) -> list[str]:
    """Files at each of the levels, a name that is longer than any, and one cut in a character."""
    paths = []
    for levels in AROUND.values():
        with deep_down(directory, levels - 1):
            attempt(LEAF.encode(), os.O_RDONLY | os.O_NOCTTY)
            paths.append(expected(directory, levels - 1, LEAF))
    for name in (b"/" + b"n" * (PATH_LEN - 2), b"/" + b"n" * PATH_LEN):
        attempt(name)
        paths.append(name[: PATH_LEN - 1].decode())
    for before in (PATH_LEN - 2, PATH_LEN - 3):
        attempt(b"/" + b"n" * (before - 1) + SNOWMAN.encode())
        paths.append("/" + "n" * (before - 1))
    attempt(b"/" + b"n" * (PATH_LEN - 5) + SNOWMAN.encode())
    paths.append("/" + "n" * (PATH_LEN - 5) + SNOWMAN)
    return paths


def attempt(name: bytes, flags: int = 0) -> None:
    fd, _, _ = system_call(OPENAT, AT_FDCWD, name, flags, 0o600)
    if fd >= 0:
        os.close(fd)


OPENED_CUT = [False, False, True, False, True, True, True, False]


# ---------------------------------------------------------------- what was recorded


class Watched(NamedTuple):
    recording: Recording
    done: Done
    directory: str

    def exec_of(self, pid: int) -> Any:
        (found,) = (e for e in self.recording.of("process.exec") if e.pid == pid)
        return found


@pytest.fixture(scope="module")
def watched(
    cgroups: Path, subject: Path, open_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Watched:
    directory = open_directory / "truncated"
    directory.mkdir()
    with (
        Scope(cgroups) as scope,
        Agent(tmp_path_factory.mktemp("agent"), *scope.options) as agent,
    ):
        done = scope.act(run_everything, str(subject), str(directory))
        return Watched(agent.stop(), done, str(directory))


@pytest.mark.parametrize("name", ARGVS)
def test_arguments(watched: Watched, name: str) -> None:
    """16,384 bytes have room, 4,096 of them in `cmdline`.

    A character that is cut is left out, and is no bad one.
    """
    event, argv = watched.exec_of(watched.done.argvs[name]), ARGVS[name]
    assert event.argv == argv.told
    assert event.truncated == (("argv", "cmdline") if argv.cut else ("cmdline",))
    assert (event.argc, event.invalid_utf8, event.incomplete) == (len(argv.given), False, False)


def test_a_working_directory(watched: Watched) -> None:
    """80 parts, whatever mounts they are in: here on those of / at least."""
    for name, levels in AROUND.items():
        event = watched.exec_of(watched.done.strings[f"cwd {name}"])
        assert event.truncated == (("cwd",) if name == "more" else ())
        assert event.cwd == expected(watched.directory, levels)


def test_an_executable(watched: Watched) -> None:
    for name, levels in AROUND.items():
        event = watched.exec_of(watched.done.strings[f"exe {name}"])
        assert event.truncated == (("exe",) if name == "more" else ())
        assert event.exe == expected(watched.directory, levels - 1, LEAF)
        assert event.cwd == watched.directory


def test_an_executable_of_the_parent(watched: Watched) -> None:
    shell = watched.exec_of(watched.done.strings["the parent"])
    (child,) = (e for e in watched.recording.of("process.exec") if e.ppid == shell.pid)
    assert (shell.truncated, child.truncated) == (("exe",), ("parent_exe",))
    assert child.parent_exe == shell.exe


def test_opens(watched: Watched) -> None:
    """By what was opened and by what was asked for."""
    made = [
        event
        for event in watched.recording.of("file.open")
        if event.path.startswith("/nn") or (event.flags == os.O_NOCTTY and LEAF in event.path)
    ]
    assert [event.path for event in made] == watched.done.paths
    assert [bool(event.truncated) for event in made] == OPENED_CUT
    assert not any(event.invalid_utf8 or event.incomplete for event in made)
