"""Without `-c` the default configuration is read: in a mount namespace with an /etc of the test's.

Nothing of the machine's own is changed, or asked.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamer.cli import DEFAULT_CONFIG
from tests.kernel.agent import ROOT, Recording
from tests.kernel.pace import seconds
from tests.kernel.scope import Scope
from tests.kernel.system import open_missing
from tests.kernel.test_capabilities import RUNS, serve_and_act

pytestmark = pytest.mark.kernel

STREAMER = (sys.executable, "-m", "streamer")


class Etc:
    """A copy of /etc, and commands that find it there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "etc"
        shutil.copytree("/etc", self.directory, symlinks=True)
        shutil.rmtree(self.directory / "streamer", ignore_errors=True)
        self.config = self.directory / DEFAULT_CONFIG.relative_to("/etc")

    def start(self, *command: str) -> subprocess.Popen[str]:
        bound = 'mount --bind "$0" /etc; exec "$@"'
        apart = ("unshare", "--mount", "--propagation", "private", "sh", "-ec", bound)
        return subprocess.Popen(
            [*apart, str(self.directory), *command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        with self.start(*command) as process:
            output, error = process.communicate(timeout=seconds(60))
        return process.returncode, output, error


@pytest.fixture
def etc(tmp_path: Path) -> Iterator[Etc]:
    before = _seen(DEFAULT_CONFIG)
    yield Etc(tmp_path)
    assert _seen(DEFAULT_CONFIG) == before


def _seen(path: Path) -> tuple[int, int] | None:
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def configure(etc: Etc, directory: Path, scope: Scope, events: str) -> None:
    etc.config.parent.mkdir(exist_ok=True)
    etc.config.write_text(f"""
        events = [{events}]
        state_file = "{directory}/run.json"
        control = {{ socket = "{directory}/control.sock" }}
        [filters]
        cgroups = [{scope.id}]
        [[sinks]]
        type = "file"
        path = "{directory}/events"
        """)


def wait_for(process: subprocess.Popen[str], output: Path, marker: bytes, count: int) -> None:
    deadline = time.monotonic() + seconds(60)
    while not output.exists() or output.read_bytes().count(marker) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_goes_by_it_and_reads_it_again(etc: Etc, scope: Scope, tmp_path: Path) -> None:
    """Events, filter and sink are those of the file, and after a SIGHUP those that it has then."""
    output = tmp_path / "events"
    configure(etc, tmp_path, scope, '"process.exec"')
    with etc.start(*STREAMER, "run", "--no-status") as process:
        wait_for(process, output, b'{"event":"stream.manifest"', 1)
        scope.act(serve_and_act)
        scope.act(open_missing, "/no/before/", 10)
        wait_for(process, output, b'{"event":"process.exec"', RUNS)
        code, shown, _ = etc.run(*STREAMER, "status")  # finds the socket by the same file
        assert code == 0
        assert "process.exec" in shown
        configure(etc, tmp_path, scope, '"file.open"')
        process.send_signal(signal.SIGHUP)
        wait_for(process, output, b'{"event":"stream.manifest"', 2)
        scope.act(open_missing, "/no/after/", 20)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=seconds(60))
    assert process.returncode == 0, stderr
    recording = Recording(output.read_bytes(), stderr, process.returncode)
    opened = [event.path for event in recording.of("file.open")]
    assert sorted(path for path in opened if path.startswith("/no/")) == sorted(
        f"/no/after/{i}" for i in range(20)
    )
    assert len(recording.of("process.exec")) == RUNS
    assert [list(one.coverage) for one in recording.of("stream.manifest")] == [
        ["process.exec"],
        ["file.open"],
    ]


COMMANDS = [("run",), ("run", "--dry-run"), ("check",), ("status",)]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_mistake_in_it_is_said_with_its_name(etc: Etc, command: tuple[str, ...]) -> None:
    etc.config.parent.mkdir()
    etc.config.write_text("nothing_of_this_name = 1\n")
    code, _, stderr = etc.run(*STREAMER, *command)
    assert code == 2
    assert stderr.startswith(f"streamer: {DEFAULT_CONFIG}: nothing_of_this_name: ")


def test_another_one_that_is_named_goes_before_it(etc: Etc, tmp_path: Path) -> None:
    etc.config.parent.mkdir()
    etc.config.write_text("nothing_of_this_name = 1\n")
    other = tmp_path / "other.toml"
    other.write_text('events = ["process.exit"]\n')
    code, shown, stderr = etc.run(*STREAMER, "run", "--dry-run", "-c", str(other))
    assert code == 0, stderr
    assert "process.exit" in shown


def test_without_it_there_are_defaults(etc: Etc) -> None:
    assert not os.path.lexists(etc.config)
    code, shown, stderr = etc.run(*STREAMER, "run", "--dry-run", "--events", "process.exec")
    assert code == 0, stderr
    assert "process.exec" in shown
