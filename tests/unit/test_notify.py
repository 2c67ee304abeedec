"""What the service manager is told, over its real protocol, and the log as journald wants it."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from streamer.agent.announcing import MOST_SECONDS, announcing, is_alive
from streamer.operation.notify import Notifier
from streamer.terminal.log import FORMAT, JournalFormatter, LogFormatter, is_journal
from tests.unit.test_run import PROGRAM, configuration
from tests.unit.test_service import Run, until


class Manager:
    """A service manager's socket."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.setblocking(False)
        self.told: list[str] = []

    def hear(self) -> list[str]:
        """All that was told so far."""
        while True:
            try:
                self.told.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return self.told

    def without_status(self) -> list[str]:
        return [one for one in self.hear() if not one.startswith("STATUS=")]

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path)
    yield made
    made.close()


@pytest.fixture
async def run() -> Iterator[Run]:  # type: ignore[misc]
    made = Run()
    yield made
    made.kernel.close()
    made.programs.release()


def test_what_the_environment_names(manager: Manager) -> None:
    environment = {
        "NOTIFY_SOCKET": manager.path,
        "WATCHDOG_USEC": "3000000",
        "WATCHDOG_PID": str(os.getpid()),
        "HOME": "/",
    }
    notifier = Notifier.of(environment)
    assert notifier is not None
    assert notifier.watchdog_seconds == 3.0
    assert environment == {"HOME": "/"}  # a program started by this one must not speak for it
    notifier.status("one\nREADY=1\nSTATUS=two")
    assert manager.hear() == ["STATUS=one READY=1 STATUS=two"]
    notifier.close()
    notifier.alive()  # nothing comes of it


@pytest.mark.parametrize(
    "environment",
    [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2"}, {"NOTIFY_SOCKET": "/not/there"}],
)
def test_where_nobody_is_to_be_told(environment: dict[str, str]) -> None:
    assert Notifier.of(environment) is None


def test_a_watchdog_of_another_process_is_not_ours(manager: Manager) -> None:
    environment = {
        "NOTIFY_SOCKET": manager.path,
        "WATCHDOG_USEC": "3000000",
        "WATCHDOG_PID": "1",
    }
    notifier = Notifier.of(environment)
    assert notifier is not None
    assert notifier.watchdog_seconds is None
    notifier.close()


def test_an_abstract_name() -> None:
    name = f"@streamer-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(f"\0{name[1:]}")
        notifier = Notifier(name)
        notifier.ready()
        assert heard.recv(100) == b"READY=1"
        notifier.close()


async def test_a_run_is_announced(manager: Manager, run: Run) -> None:
    """Ready when it has attached and not before, alive all the time, and stopping once."""
    # So long that too seldom would be too late for `until`.
    notifier = Notifier(manager.path, watchdog_seconds=3.0)
    async with announcing(run.service, notifier):
        await until(lambda: len(manager.without_status()) >= 2)
        assert set(manager.without_status()) == {"WATCHDOG=1"}
        assert "STATUS=starting" in manager.told
        await run.start()
        await until(lambda: manager.without_status().count("WATCHDOG=1") >= 6)
        await run.stop()
        await asyncio.sleep(0.2)
    said = manager.without_status()
    assert [one for one in said if one != "WATCHDOG=1"] == ["READY=1", "STOPPING=1"]
    notifier.close()


async def test_a_run_that_does_nothing_any_more_is_not_alive(run: Run) -> None:
    await run.start()
    service = run.service
    assert is_alive(service, time.monotonic())
    assert not is_alive(service, service.ticked + MOST_SECONDS)
    await run.stop()
    assert is_alive(service, service.ticked + MOST_SECONDS)


async def test_a_manager_that_hangs_holds_nothing_up(manager: Manager) -> None:
    notifier = Notifier(manager.path)
    before = time.monotonic()
    for _ in range(5000):  # more than its socket takes
        notifier.alive()
    assert time.monotonic() - before < 30
    notifier.close()


# ---------------------------------------------------------------- the log


def record(level: int, text: str) -> logging.LogRecord:
    made = logging.LogRecord("streamer", level, "f", 1, text, (), None)
    made.created = 1795366046.847
    return made


def test_a_line_has_time_and_level() -> None:
    line = LogFormatter(FORMAT).format(record(logging.WARNING, "mind\nthis"))
    when = datetime.fromtimestamp(1795366046, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    assert line == f"{when}.847Z warning streamer: mind\\nthis"


@pytest.mark.parametrize(
    ("level", "number"),
    [
        (logging.DEBUG, 7),
        (logging.INFO, 6),
        (logging.WARNING, 4),
        (logging.ERROR, 3),
        (logging.CRITICAL, 2),
    ],
)
def test_priorities_of_the_journal(level: int, number: int) -> None:
    assert JournalFormatter("%(message)s").format(record(level, "x")) == f"<{number}>x"


def test_every_line_of_a_traceback_has_its_priority() -> None:
    made = record(logging.ERROR, "broken")
    try:
        raise ValueError("<0>panic")
    except ValueError as error:
        made.exc_info = (ValueError, error, error.__traceback__)
    lines = JournalFormatter("%(message)s").format(made).split("\n")
    assert len(lines) > 2
    assert all(line.startswith("<3>") for line in lines)


def test_the_journal_is_known_by_its_stream(tmp_path: Path) -> None:
    with (tmp_path / "x").open("w") as file:
        status = os.fstat(file.fileno())
        stream = f"{status.st_dev}:{status.st_ino}"
        assert is_journal(file.fileno(), stream)
        assert not is_journal(file.fileno(), f"{stream}1")
        assert not is_journal(file.fileno(), "")
    assert not is_journal(9999, stream)


def test_a_process_says_so_in_the_journal(tmp_path: Path, manager: Manager) -> None:
    """The whole process, with the environment that systemd would give it."""
    log = tmp_path / "log"
    with log.open("wb") as file:
        status = os.fstat(file.fileno())
        done = subprocess.run(
            [
                *(sys.executable, str(PROGRAM), "5", "run", "--no-status", "--duration", "1s"),
                *("--config", configuration(tmp_path), "--sink", f"file:{tmp_path}/out"),
            ],
            stderr=file,
            env=os.environ
            | {
                "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}",
                "NOTIFY_SOCKET": manager.path,
            },
            timeout=30,
        )
    assert done.returncode == 0
    assert re.search(r"^<6>streaming .* Ctrl-C ends it$", log.read_text(), re.M)
    assert manager.without_status()[0] == "READY=1"


def test_what_ends_a_process_is_an_error_in_the_journal(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        status = os.fstat(file.fileno())
        done = subprocess.run(
            [sys.executable, "-m", "streamer", "run", "--config", str(tmp_path / "none.toml")],
            stderr=file,
            env=os.environ | {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"},
            timeout=30,
        )
    assert done.returncode == 2
    assert log.read_text().startswith("<3>streamer: ")
