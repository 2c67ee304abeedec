"""What observes a host: nothing, the streamer, bpftrace, auditd; each records to a file.

Each is told to record the load alone: the streamer by its cgroup, the others by its user.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from benchmarks.audit import Audit, UnavailableError, auditctl, parsed
from benchmarks.runs import ROOT
from tests.kernel.scope import Scope

_START_SECONDS = 60.0
_STOP_SECONDS = 60.0
_SETTLED_SECONDS = 0.25
_SCRIPT = ROOT / "benchmarks" / "host.bt"
_ENTER = 'echo $$ >"$0" && exec "$@"'

_AUDITD = """\
local_events = yes
write_logs = yes
log_file = {directory}/audit.log
log_group = root
log_format = ENRICHED
flush = INCREMENTAL_ASYNC
freq = 50
max_log_file = 8
max_log_file_action = IGNORE
priority_boost = 4
name_format = NONE
space_left = 2
space_left_action = IGNORE
admin_space_left = 1
admin_space_left_action = IGNORE
disk_full_action = IGNORE
disk_error_action = IGNORE
q_depth = 2000
overflow_action = IGNORE
max_restarts = 10
plugin_dir = {directory}/plugins.d
end_of_event_timeout = 2
"""


class Place(NamedTuple):
    """Where an observer works: what it watches, where it runs, and a directory in memory.

    `audit` is not there when the host's cannot be taken.
    """

    watched: Scope
    uid: int
    own: Scope
    directory: Path
    audit: Audit | None = None


class Record(NamedTuple):
    """What each operation of the load leaves so many of, known by `marker`."""

    operation: str
    marker: bytes
    each: int = 1


class IncompleteError(Exception):
    """Not all that was done has been recorded; the message says how much."""


class Observer:
    """Nothing that observes, and what all others share: a process that writes a file."""

    name = "nothing"
    operations: Sequence[str] = ("exec", "open", "connect")
    """What is measured with it, beside the unrelated calls."""
    records: Sequence[Record] = ()
    tolerance = 0.0
    """The share of records that may be missing."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._stack = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._directory = place.directory / "observer"
        self.output = self._directory / "output"
        self.errors = self._directory / "errors"

    def __enter__(self) -> Self:
        self._directory.mkdir()
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        shutil.rmtree(self._directory)

    def stop(self, done: Mapping[str, int]) -> None:
        """End it, and see that it has recorded what was done, so much of each operation.

        Raises:
            IncompleteError: it has not.
        """
        self._stack.close()
        output = self.output.read_bytes() if self.records else b""
        for operation, marker, each in self.records:
            found, expected = output.count(marker), done.get(operation, 0) * each
            if not expected * (1 - self.tolerance) <= found <= expected:
                raise IncompleteError(f"{found:,} records of {operation}, not {expected:,}")

    def settle(self) -> None:
        """Wait until nothing more is written: all has been read, and its cost is paid."""
        size, since = self._size(), time.monotonic()
        while time.monotonic() - since < _SETTLED_SECONDS:
            time.sleep(_SETTLED_SECONDS / 5)
            if (now := self._size()) != size:
                size, since = now, time.monotonic()

    def _size(self) -> int:
        return self.output.stat().st_size if self.output.exists() else 0

    def _start(self) -> None:
        """Nothing to start."""

    def _run(self, *command: str, environment: Mapping[str, str] | None = None) -> None:
        """Start a process in the cgroup of observers; it ends with the stack."""
        entry = str(self._place.own.path / "cgroup.procs")
        with self.errors.open("wb") as errors:
            self._process = subprocess.Popen(
                ["sh", "-c", _ENTER, entry, *command],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # sessions are what the scheduler shares a CPU among
            )
        self._stack.callback(self._end, self._process, signal.SIGTERM)

    def _end(self, process: subprocess.Popen[bytes], number: signal.Signals) -> None:
        process.send_signal(number)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _wait_for(self, ready: Callable[[], bool]) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_SECONDS
        while not ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise UnavailableError(self._reason())
            time.sleep(0.02)

    def _reason(self) -> str:
        """Why it did not start: the last error that it told."""
        told = self.errors.read_text(errors="replace").splitlines()
        wrong = [line for line in told if line.strip() and "RLIMIT_MEMLOCK" not in line]
        return wrong[-1].strip() if wrong else f"{self.name} did not start"


class Streamer(Observer):
    """`streamer run` with a file sink."""

    name = "streamer"
    events = "process.exec,net.connect,net.accept,net.close,file.open"
    records: Sequence[Record] = (
        Record("exec", b'"event":"process.exec"'),
        Record("open", b'"event":"file.open"'),
        # Not those of connections from before it, which it cannot tell to be others'.
        Record("connect", b'"owner_known":true', 4),
    )

    def _start(self) -> None:
        config = self._directory / "streamer.toml"
        config.write_text("")  # the defaults, whatever this host has configured
        self._run(
            sys.executable, "-m", "streamer", "run", "--no-status",
            "--config", str(config),
            "--events", self.events,
            *self._place.watched.options,
            "--sink", f"file:{self.output}",
        )  # fmt: skip
        self._wait_for(self._manifest_written)

    def _manifest_written(self) -> bool:
        return self.output.exists() and b'"event":"stream.manifest"' in self.output.read_bytes()

    def stop(self, done: Mapping[str, int]) -> None:
        super().stop(done)
        account = self.errors.read_text().splitlines()[-1]
        if not account.endswith(" 0 lost"):
            raise IncompleteError(account)


class StreamerDefault(Streamer):
    """With the default events: of an exec, the fork and the exit too."""

    name = "streamer, default events"
    events = "default"
    operations = ("exec",)
    records = (Record("exec", b'"event":"process.exec"'),)


class StreamerOpens(Streamer):
    """With the default events and opens: for what that costs other calls."""

    name = "streamer, file.open too"
    events = "default,file.open"
    operations = ()
    records = ()


class Bpftrace(Observer):
    """A script of bpftrace, of tracepoints alone."""

    name = "bpftrace"
    # A softirq that is late changes the state of a connection in whatever task runs by then, and to
    # bpftrace that is another user's.
    tolerance = 0.01
    records = (
        Record("exec", b"\nexec "),
        Record("open", b"\nopen "),
        Record("connect", b"\ntcp ", 4),
    )

    def _start(self) -> None:
        if shutil.which("bpftrace") is None:
            raise UnavailableError("bpftrace is not installed")
        self._run(
            "bpftrace", "-o", str(self.output), str(_SCRIPT), str(self._place.uid),
            environment={
                "BPFTRACE_PERF_RB_PAGES": "4096",  # or it loses most of a burst
                # bpftrace's tests know by this when it has attached.
                "__BPFTRACE_NOTIFY_PROBES_ATTACHED": "1",
            },
        )  # fmt: skip
        self._wait_for(lambda: b"PROBES_ATTACHED" in self.errors.read_bytes())


class Auditd(Observer):
    """auditd as Debian configures it, but for the place and the size of its log."""

    name = "auditd"
    records = (
        Record("exec", b" SYSCALL=execve "),
        Record("open", b" SYSCALL=openat "),
        Record("connect", b" SYSCALL=connect "),
        Record("connect", b" SYSCALL=accept4 "),
    )

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.output = self._directory / "audit.log"

    def _start(self) -> None:
        if self._place.audit is None:
            raise UnavailableError("audit is not there")
        if shutil.which("auditd") is None:
            raise UnavailableError("auditd is not installed")
        (self._directory / "plugins.d").mkdir()
        (self._directory / "auditd.conf").write_text(_AUDITD.format(directory=self._directory))
        self._run("auditd", "-n", "-s", "enable", "-c", str(self._directory))
        self._wait_for(self._registered)
        self._stack.enter_context(self._place.audit.observing())

    def _registered(self) -> bool:
        assert self._process is not None
        return parsed(auditctl("-s")).get("pid") == self._process.pid
