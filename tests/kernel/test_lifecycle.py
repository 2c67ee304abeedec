"""Starting, stopping and limits of the real command."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from streamer.events.clock import rfc3339
from streamer.kernel.cgroups import IN_ROOT, what_is_unseen
from tests.brokers import free_port
from tests.kernel.agent import ROOT, Agent, decoded
from tests.kernel.pace import seconds
from tests.kernel.scope import Scope
from tests.kernel.system import open_missing

pytestmark = pytest.mark.kernel

STREAMER = (sys.executable, "-m", "streamer")
OPENS = 50


def run(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The command `streamer`, run to its end."""
    command = [*prefix, *STREAMER, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds(60))


def open_some(count: int = OPENS) -> None:
    open_missing("/no/", count)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_reports(scope: Scope, tmp_path: Path, number: signal.Signals) -> None:
    """What happened just before the signal is delivered; the last line is the account."""
    with Agent(tmp_path, *scope.options, events="file.open") as agent:
        scope.act(open_some)
        recording = agent.stop(number)
    assert len(recording.events) == OPENS
    (sink,) = recording.heartbeat.sink_counts.values()
    assert (sink.dropped, sink.status) == (0, "up")
    produced = recording.heartbeat.counts["file.open"].produced
    assert recording.account.startswith(f"streamer: {produced:,} events in ")
    assert f"; file:{agent.output} {OPENS} delivered, 0 dropped; " in recording.account
    assert recording.account.endswith(f"{produced - OPENS:,} filtered, 0 lost")


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """While a sink whose broker is not there is given its grace."""
    config = "grace_seconds = 60\n"
    sink = f"kafka://127.0.0.1:{free_port()}/events"
    with Agent(tmp_path, "--comm", "nobody", config=config, sinks=(sink,)) as agent:
        agent.send(signal.SIGINT)
        time.sleep(1)
        assert agent.process.poll() is None
        agent.send(signal.SIGINT)
        assert agent.process.wait(seconds(20)) == 130


def test_a_closed_pipe_ends_it_quietly(scope: Scope, tmp_path: Path) -> None:
    """As in `streamer run | head -1`."""
    (tmp_path / "streamer.toml").write_text(f'state_file = "{tmp_path}/run.json"\n')
    command = [*STREAMER, "run", "--no-status", "--events", "file.open", *scope.options]
    command += ["--config", str(tmp_path / "streamer.toml")]
    with subprocess.Popen(
        [*command, "--log-level", "warning"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.readline()
        process.stdout.close()
        scope.act(open_some)
        assert process.wait(seconds(30)) == 0
        assert process.stderr.read() == b""
    assert decoded(first.rstrip()).agent_pid == process.pid


def test_a_limit_of_events_is_exact(scope: Scope, tmp_path: Path) -> None:
    with Agent(tmp_path, *scope.options, "--max-events", "7", events="file.open") as agent:
        scope.act(open_some)
        recording = agent.wait()
    assert recording.returncode == 0
    assert [event.path for event in recording.events] == [f"/no/{i}" for i in range(7)]
    assert recording.heartbeat.counts["file.open"].read == 7
    assert " 7 delivered, 0 dropped; " in recording.account


def test_a_limit_of_time(scope: Scope, tmp_path: Path) -> None:
    with Agent(tmp_path, *scope.options, "--duration", "500ms", events="file.open") as agent:
        recording = agent.wait()
    assert recording.returncode == 0
    assert recording.heartbeat.uptime_seconds >= 0.5
    recording.check()


def test_heartbeats_while_it_runs(scope: Scope, tmp_path: Path) -> None:
    """Each has the account so far; only the last counts what came after it."""
    config = "heartbeat_seconds = 1\n"
    with Agent(tmp_path, *scope.options, events="file.open", config=config) as agent:
        scope.act(open_some)
        heartbeat = b'{"event":"stream.heartbeat"'
        agent.wait_for(heartbeat, agent.output.read_bytes().count(heartbeat) + 2)
        recording = agent.stop()
    beats = recording.of("stream.heartbeat")
    assert len(beats) >= 3
    assert beats[-2].counts["file.open"].read == OPENS
    assert [beat.boot_ns for beat in beats] == sorted(beat.boot_ns for beat in beats)


# ---------------------------------------------------------------- privileges


def test_without_capabilities(tmp_path: Path) -> None:
    """One line that names them and the command to use."""
    bare = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    ended = run("run", "--sink", f"file:{tmp_path}/events", prefix=bare)
    assert (ended.returncode, ended.stdout) == (3, "")
    (line,) = ended.stderr.splitlines()
    assert line == (
        "streamer: missing CAP_BPF, CAP_PERFMON: run it as root, as in `sudo streamer run`"
    )


# ---------------------------------------------------------------- a configuration that is wrong


def test_an_unknown_key(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[rings]\nbulk_byte = 1\n")
    ended = run("run", "--config", str(tmp_path / "bad.toml"))
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert f"{tmp_path}/bad.toml" in line
    assert "bulk_byte" in line


def test_in_a_pid_namespace_the_agent_has_the_pid_that_events_would_carry(
    scope: Scope, tmp_path: Path
) -> None:
    """What the host calls it, and not what it is called within."""
    inside = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    with Agent(tmp_path, *scope.options, events="process.exec", prefix=inside) as agent:
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        (pid,) = map(int, children)  # of unshare
        os.kill(pid, signal.SIGTERM)
        recording = agent.wait()
    assert (recording.returncode, recording.manifest.agent_pid) == (0, pid)
    recording.check()


def test_the_manifest_says_where_cgroup_ids_say_nothing(tmp_path: Path) -> None:
    """Where it does, a process that is put nowhere has the id of the root."""
    program = tmp_path / "nowhere"
    shutil.copy("/bin/true", program)
    options = ("--comm", program.name)
    with Agent(tmp_path / "agent", *options, events="process.exec") as agent:
        subprocess.run([program], check=True)
        agent.wait_for(b'{"event":"process.exec"')
        recording = agent.stop(check=False)
    said = any(IN_ROOT in report.unseen for report in recording.manifest.coverage.values())
    assert said == bool(what_is_unseen())
    (event,) = recording.of("process.exec")
    assert event.cgroup_id == 1 or not said


def test_times_in_words(scope: Scope, tmp_path: Path) -> None:
    """Of every record, the agent's own too, and otherwise nobody pays for them."""
    config = "rfc3339_time = true"
    with Agent(tmp_path / "a", *scope.options, events="file.open", config=config) as agent:
        scope.act(open_some)
        recording = agent.stop()
    assert len(recording.of("file.open")) == OPENS
    assert all(record.time == rfc3339(record.time_ns) for record in recording.all)
    with Agent(tmp_path / "b", *scope.options, events="file.open") as agent:
        recording = agent.stop()
    assert {record.time for record in recording.all} == {msgspec.UNSET}
