"""What nobody reads, and what nobody answers: neither stops the line, nor keeps it from ending."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.kernel.agent import ROOT, Agent
from tests.kernel.pace import seconds
from tests.kernel.scope import Scope
from tests.kernel.system import open_missing

pytestmark = pytest.mark.kernel

OPENS = 50
GRACE = 2


def open_some() -> None:
    open_missing("/no/", OPENS)


def ended(process: subprocess.Popen[bytes], limit: float) -> int:
    """The exit code, within so many seconds."""
    try:
        return process.wait(seconds(limit))
    finally:
        process.kill()


def start(output: Path, scope: Scope, *options: str, stderr: int) -> subprocess.Popen[bytes]:
    """An agent that has something to log all the time: a broker that is not there."""
    command = [sys.executable, "-m", "streamer", "run", "--log-level", "debug", *options]
    command += ["--sink", f"file:{output}", "--events", "file.open", *scope.options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr)
    deadline = time.monotonic() + seconds(30)
    while not output.exists() or b"stream.manifest" not in output.read_bytes():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def await_opens(output: Path) -> None:
    deadline = time.monotonic() + seconds(10)
    while output.read_bytes().count(b'"event":"file.open"') < OPENS:
        assert time.monotonic() < deadline, "the line is blocked"
        time.sleep(0.02)


def test_a_full_pipe_on_standard_error(scope: Scope, tmp_path: Path) -> None:
    output = tmp_path / "events"
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, b"x" * 4096)
    with start(output, scope, stderr=writer) as process:
        moved = output.with_suffix(".moved")
        output.rename(moved)
        output.mkdir()
        scope.act(open_some)
        time.sleep(seconds(1.2))  # it looks once a second whether its file is still there
        scope.act(open_some)  # and has something to say now
        await_opens(moved)
        process.send_signal(signal.SIGTERM)
        assert ended(process, 9) == 0
    assert moved.read_bytes().count(b'"event":"file.open"') == 2 * OPENS
    os.close(reader)
    os.close(writer)


def test_a_stopped_terminal(scope: Scope, tmp_path: Path) -> None:
    """With a status line, as after Ctrl-S; what is still in the queue is shown after Ctrl-Q."""
    output = tmp_path / "events"
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    with start(output, scope, stderr=terminal) as process:
        termios.tcflow(terminal, termios.TCOOFF)
        moved = output.with_suffix(".moved")
        output.rename(moved)
        output.mkdir()
        scope.act(open_some)
        time.sleep(seconds(1.2))
        scope.act(open_some)
        await_opens(moved)
        termios.tcflow(terminal, termios.TCOON)
        shown = b""
        deadline = time.monotonic() + seconds(10)
        while b"cannot be opened again" not in shown:
            assert time.monotonic() < deadline
            shown += os.read(master, 1 << 16)
        termios.tcflow(terminal, termios.TCOOFF)
        process.send_signal(signal.SIGTERM)
        assert ended(process, 9) == 0
    os.close(master)
    os.close(terminal)


# A name server that never answers, in a network of its own; then the command that follows.
SILENT = """
import os, socket, subprocess, sys
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
subprocess.run(["mount", "--bind", sys.argv[1], "/etc/resolv.conf"], check=True)
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
os.set_inheritable(server.fileno(), True)
os.execvp(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.parametrize("url", ["kafka://broker.example:9092/t", "mqtt://broker.example/t"])
def test_a_name_that_is_not_resolved(scope: Scope, tmp_path: Path, url: str) -> None:
    """The agent ends within its grace, though the C library goes on asking for minutes."""
    resolver = tmp_path / "resolv.conf"
    resolver.write_text("nameserver 127.0.0.1\noptions timeout:30 attempts:5\n")
    prefix = ("unshare", "--net", "--mount", sys.executable, "-c", SILENT, str(resolver))
    config = f"grace_seconds = {GRACE}\n"
    started = Agent(
        tmp_path, *scope.options, events="file.open", config=config, sinks=(url,), prefix=prefix
    )
    with started as agent:
        scope.act(open_some)
        agent.wait_for(b'"event":"file.open"', OPENS)
        begun = time.monotonic()
        agent.send(signal.SIGTERM)
        agent.process.wait(seconds(30))
        assert time.monotonic() - begun < seconds(GRACE + 8)
        assert f" {OPENS} delivered" in agent.stderr
        assert "dropped" in agent.stderr
