"""A cgroup of the test's own, and actors: processes that do something inside it.

An actor enters the cgroup, calls one function and leaves again, so that what the cgroup has seen
is that function's doing and nothing else. Results are pickled.
"""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from tests.kernel.pace import seconds

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
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        deadline = time.monotonic() + seconds(10)
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
    """A process that calls one function within a cgroup: a fork of the test's own."""

    def __init__(
        self, scope: Scope, function: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> None:
        to_actor, self._to = os.pipe()
        self._from, to_test = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _play(scope.path, to_actor, to_test, function, arguments)
        os.close(to_actor)
        os.close(to_test)

    def _receive(self) -> tuple[bytes, Any]:
        what = os.read(self._from, 1)
        assert what, "the actor died"
        return what, pickle.loads(_read_message(self._from))

    def reached(self) -> Any:
        """Wait until the function calls `checkpoint`. What it gave there."""
        what, value = self._receive()
        assert what == REACHED, value
        return value

    def proceed(self) -> None:
        """Let the function go on after its `checkpoint`."""
        os.write(self._to, GO)

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
            os.kill(self.pid, signal.SIGKILL)
        os.close(self._to)
        os.close(self._from)
        deadline = time.monotonic() + seconds(30)
        while os.waitpid(self.pid, os.WNOHANG)[0] == 0:
            assert time.monotonic() < deadline, "the actor does not end"
            time.sleep(0.005)


def _read_message(fd: int) -> bytes:
    """What `_answer` has written: its size, and that many bytes."""
    return _read_exactly(fd, int.from_bytes(_read_exactly(fd, 4), "little"))


def _read_exactly(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = os.read(fd, size - len(data))
        assert part, "the actor died"
        data += part
    return data


# ---------------------------------------------------------------- in the actor

_ends: tuple[int, int] | None = None
"""In an actor: where to read from the test, and where to write to it."""


def checkpoint(value: Any = None) -> None:
    """Tell the test that this point is reached, and wait until it says `proceed`."""
    assert _ends is not None
    from_test, to_test = _ends
    _answer(to_test, REACHED, value)
    if os.read(from_test, 1) != GO:
        raise SystemExit("the test has gone")


def _answer(to_test: int, what: bytes, value: Any) -> None:
    data = pickle.dumps(value)
    message = what + len(data).to_bytes(4, "little") + data
    while message:
        message = message[os.write(to_test, message) :]


def _play(
    inside: Path,
    from_test: int,
    to_test: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> NoReturn:
    """Call the function within the cgroup, and end the process. Returns to nobody."""
    global _ends
    code = 1
    try:
        gc.freeze()  # what the test holds is not this process's to finalise
        os.setsid()
        _ends = from_test, to_test
        Path("/proc/self/comm").write_text("actor")
        enter = os.open(f"{inside}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        leave = os.open(f"{inside.parent}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        os.write(enter, b"0")
        try:
            answer = DONE, function(*arguments)
        except Exception as error:  # told to the test, which fails
            answer = FAILED, f"{type(error).__name__}: {error}"
        finally:
            os.write(leave, b"0")
        _answer(to_test, *answer)
        code = 0
    finally:
        os._exit(code)
