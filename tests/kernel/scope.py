"""A cgroup of the test's own, and actors: processes that do something inside it.

An actor imports the test's module, enters the cgroup, calls one function and leaves again, so
that what the cgroup has seen is that function's doing and nothing else. Functions that act are
plain module-level functions; their arguments and results are pickled.
"""

from __future__ import annotations

import importlib
import itertools
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent.parent
GO = b"g"
REACHED, DONE, FAILED = b"r", b"d", b"f"
_numbers = itertools.count()


def cgroup_mount() -> Path | None:
    """Where the unified (v2) hierarchy is mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    return None


class Scope:
    """A cgroup: made at the start, and removed at the end together with what still runs there."""

    def __init__(self, mount: Path) -> None:
        self.path = mount / f"streamer-test-{os.getpid()}-{next(_numbers)}"
        self._mount = mount

    @property
    def id(self) -> int:
        return self.path.stat().st_ino

    @property
    def options(self) -> tuple[str, str]:
        """The command line options that narrow the agent down to it."""
        return "--cgroup", str(self.path)

    def start(self, function: Callable[..., Any], *arguments: Any) -> Actor:
        """Call the function in a process within the cgroup; `Actor.result` waits for it."""
        return Actor(self, function, arguments)

    def act(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the function in a process within the cgroup. Its result."""
        with self.start(function, *arguments) as actor:
            return actor.result()

    def __enter__(self) -> Self:
        self.path.mkdir()
        return self

    def __exit__(self, *exc: object) -> None:
        for pid in (self.path / "cgroup.procs").read_text().split():
            os.kill(int(pid), 9)
        deadline = time.monotonic() + 10
        while True:
            try:
                self.path.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return


class Actor:
    """A process that calls one function within a cgroup."""

    def __init__(
        self, scope: Scope, function: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kernel.scope", str(scope.path), str(scope.path.parent)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._send(pickle.dumps((function.__module__, function.__qualname__, arguments)))

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(len(data).to_bytes(4, "little") + data)
        self._process.stdin.flush()

    def _receive(self) -> tuple[bytes, Any]:
        assert self._process.stdout is not None
        what = self._process.stdout.read(1)
        assert what, "the actor died"
        size = int.from_bytes(self._process.stdout.read(4), "little")
        return what, pickle.loads(self._process.stdout.read(size))

    def reached(self) -> Any:
        """Wait until the function calls `checkpoint`. What it gave there."""
        what, value = self._receive()
        assert what == REACHED, value
        return value

    def proceed(self) -> None:
        """Let the function go on after its `checkpoint`."""
        self._send(GO)

    def result(self) -> Any:
        """Wait until the function returns. Its result."""
        what, value = self._receive()
        assert what == DONE, value
        return value

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait(30)


# ---------------------------------------------------------------- in the actor

_TO_TEST = 3


def checkpoint(value: Any = None) -> None:
    """Tell the test that this point is reached, and wait until it says `proceed`."""
    _answer(REACHED, value)
    _read_message()


def _answer(what: bytes, value: Any) -> None:
    data = pickle.dumps(value)
    message = what + len(data).to_bytes(4, "little") + data
    while message:
        message = message[os.write(_TO_TEST, message) :]


def _read_message() -> bytes:
    size = int.from_bytes(_read_exactly(4), "little")
    return _read_exactly(size)


def _read_exactly(size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part:
            raise SystemExit("the test has gone")
        data += part
    return data


def main(inside: str, outside: str) -> None:
    os.dup2(1, _TO_TEST, inheritable=False)
    os.dup2(2, 1)
    module, name, arguments = pickle.loads(_read_message())
    function = getattr(importlib.import_module(module), name)
    Path("/proc/self/comm").write_text("actor")
    enter = os.open(f"{inside}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
    leave = os.open(f"{outside}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
    os.write(enter, b"0")
    try:
        answer = DONE, function(*arguments)
    except BaseException as error:  # told to the test, which fails
        answer = FAILED, f"{type(error).__name__}: {error}"
        if not isinstance(error, Exception):
            raise
    finally:
        os.write(leave, b"0")
    _answer(*answer)


if __name__ == "__main__":
    # As the module that the acting functions import, so that they share its state.
    importlib.import_module("tests.kernel.scope").main(*sys.argv[1:])
