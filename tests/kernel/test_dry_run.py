"""`streamer run --dry-run` says what a run would do, and leaves nothing behind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernel.agent import ROOT, Agent
from tests.kernel.scope import Scope
from tests.kernel.test_status import programs

pytestmark = pytest.mark.kernel

CONFIG = """
state_file = "{directory}/run.json"
control = {{ socket = "{directory}/control.sock" }}
[filters]
exclude_comms = ["\\u001b[31mred"]
[kernel.sample]
"process.fork" = 10
[[sinks]]
type = "file"
path = "{directory}/events"
[[sinks]]
type = "kafka"
bootstrap = ["127.0.0.1:9"]
tls = {{ ca_file = "/nowhere/ca.pem" }}
[[sinks]]
type = "mqtt"
host = "127.0.0.1"
username = "streamer"
password_file = "/nowhere/password"
"""


def dry_run(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (directory / "dry.toml").write_text(CONFIG.format(directory=directory))
    command = [sys.executable, "-m", "streamer", "run", "--dry-run"]
    return subprocess.run(
        [*command, "-c", str(directory / "dry.toml"), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_it_says_what_a_run_attaches_and_does_nothing(tmp_path: Path) -> None:
    """The same ways as the manifest of a run says; an agent beside it notices nothing."""
    with Agent(tmp_path / "a", events="process.*") as agent:
        before = programs(agent.helper_pid)
        done = dry_run(tmp_path, "--events", "process.*")
        assert programs(agent.helper_pid) == before
        recording = agent.stop()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for kind in ("process.exec", "process.exit", "process.fork"):
        (line,) = (one for one in lines if one.startswith(kind))
        ways = {
            program.way
            for program in recording.manifest.programs
            if program.status == "attached" and kind in program.kinds
        }
        _, observed, attached = re.split(r"  +", line)
        assert (observed, set(attached.split(", "))) == ("full", ways)
    events = tmp_path / "events"
    assert any(
        one.startswith(f"would be published to file:{events} (") and "would be made" in one
        for one in lines
    )
    assert any(one.startswith("would be published to kafkas://127.0.0.1:9/") for one in lines)
    assert "filter exclude_comms: \\x1b[31mred" in lines
    assert "of process.fork one in 10" in lines
    authority, password = (one for one in lines if one.startswith("note: "))
    assert ": tls.ca_file: cannot use /nowhere/ca.pem: No such file or directory" in authority
    assert ": mqtt.password_file: cannot read /nowhere/password: No such file" in password
    assert not events.exists()
    assert not (tmp_path / "run.json").exists()
    assert not (tmp_path / "control.sock").exists()


def test_nothing_is_left_that_holds_a_program(scope: Scope, tmp_path: Path) -> None:
    """Programs go with the processes that hold them, and the kernel is through with both."""
    done = scope.act(dry_run, tmp_path, "--events", "process.*")
    assert done.returncode == 0
    assert (scope.path / "cgroup.procs").read_text() == ""


def test_a_mistake_is_that_of_a_run(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "--events", "process.*", "--exclude-exe", "/nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert "command line: filters.exclude_exes" in done.stderr
    done = dry_run(tmp_path, "--sink", f"file:{tmp_path}/x", "--sink", f"file:{tmp_path}/./x")
    assert (done.returncode, done.stdout) == (2, "")
    assert "command line: sinks[1]: found file" in done.stderr
    nowhere = f"file:{tmp_path}/nowhere/x"
    done = dry_run(tmp_path, "--sink", nowhere)
    assert (done.returncode, done.stdout) == (4, "")
    assert f"{nowhere}: cannot open: No such file or directory" in done.stderr
