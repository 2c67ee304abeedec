"""Whatever sinks can take: every event is delivered, told as lost, or noted for the next run."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from streamer.agent.run_file import newest
from streamer.events.stream import PreviousRun
from tests.brokers import free_port
from tests.kernel.agent import ROOT, Agent, Recording, decoded, kind_of
from tests.kernel.pace import repetitions, seconds
from tests.kernel.scope import Scope
from tests.kernel.system import open_missing

pytestmark = pytest.mark.kernel

STREAMER = (sys.executable, "-m", "streamer", "run", "--no-status", "--events", "file.open")
FLOOD = repetitions(20_000, 2_000)
SMALL = "budget_bytes = 65536\n"


def open_some(count: int) -> None:
    open_missing("/no/", count)


def flood() -> None:
    """In small portions, so that a reader that is awake finds many gaps and not one."""
    for _ in range(FLOOD // 100):
        open_missing("/no/", 100)
        time.sleep(0.0005)


def test_a_sink_that_is_always_full_is_told_every_loss(scope: Scope, tmp_path: Path) -> None:
    """Losses in the kernel while it has no room even for being told."""
    config = f"[rings]\nbulk_bytes = 4096\n[[sinks]]\ntype = 'stdout'\n{SMALL}"
    (tmp_path / "streamer.toml").write_text(f'state_file = "{tmp_path}/run"\n{config}')
    command = [*STREAMER, *scope.options, "--config", str(tmp_path / "streamer.toml")]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [process.stdout.readline()]  # the manifest; the pipe is 64 KiB, and then full
        scope.act(flood)
        lines += read_slowly(process.stdout, 50)
        scope.act(flood)
        reader = threading.Thread(target=lines.extend, args=(process.stdout,))
        reader.start()
        time.sleep(seconds(2))
        process.send_signal(signal.SIGTERM)
        reader.join(seconds(30))
        stderr = process.stderr.read().decode()
    recording = Recording(b"".join(lines), stderr, process.returncode)
    recording.check()
    lost = sum(loss.count for loss in recording.losses)
    assert len(recording.events) + lost == 2 * FLOOD
    assert lost > FLOOD // 2
    # Merged: a record for each CPU that lost any, and not one for each gap.
    ticks = len({loss.time_ns // 100_000_000 for loss in recording.losses})
    assert len(recording.losses) <= ticks * 2 * len(os.sched_getaffinity(0))
    assert process.returncode == 0
    assert stderr.count("events lost in the kernel of bulk: no room in the kernel") == 1


def read_slowly(pipe: Any, count: int) -> list[bytes]:
    lines = []
    for _ in range(count):
        lines.append(pipe.readline())
        time.sleep(0.01)
    return lines


def test_a_dead_sink_beside_another(scope: Scope, tmp_path: Path) -> None:
    """The other has every event; what the dead one lost is in the note, to the last one."""
    dead = f"kafka://127.0.0.1:{free_port()}/events"
    config = f"""grace_seconds = 1
[[sinks]]
type = "file"
path = "{tmp_path}/events.ndjson"
[[sinks]]
type = "kafka"
bootstrap = ["{dead.removeprefix("kafka://").removesuffix("/events")}"]
topic = "events"
{SMALL}"""
    with Agent(tmp_path, *scope.options, events="file.open", config=config, sinks=None) as agent:
        scope.act(open_some, FLOOD)
        agent.send(signal.SIGTERM)
        recording = agent.wait()
    assert recording.returncode == 5
    assert f"events to {dead}: " in recording.stderr
    assert "not delivered" in recording.stderr
    recording.check_sequence()
    delivered = len(recording.events)
    lost = sum(loss.count for loss in recording.losses)
    assert delivered + lost == FLOOD
    note = note_of(tmp_path)
    assert (note.run_id, note.ended) == (recording.manifest.run_id, "undelivered")
    assert {one.sink for one in note.untold} == {dead}
    given_up = Counter[str]()
    for one in note.untold:
        if one.stage == "sink":
            given_up.update(one.kinds)
    assert given_up == {"file.open": delivered}


def note_of(directory: Path) -> PreviousRun:
    found = newest((directory / "run.json").read_bytes())
    assert found is not None
    return found.note


def test_the_next_run_tells_of_the_one_before(scope: Scope, tmp_path: Path) -> None:
    """That there was none, how it ended, and what it could not tell."""
    with Agent(tmp_path, *scope.options, events="file.open") as agent:
        first = agent.stop().manifest
    assert first.previous is None
    (tmp_path / "events.ndjson").unlink()
    with Agent(tmp_path, *scope.options, events="file.open") as agent:
        assert note_of(tmp_path).ended == "killed"
        agent.kill()
        second = decoded((tmp_path / "events.ndjson").read_bytes().splitlines()[0])
    assert second.previous.run_id == first.run_id
    assert (second.previous.ended, second.previous.untold) == ("delivered", [])
    (tmp_path / "events.ndjson").unlink()
    with Agent(tmp_path, *scope.options, events="file.open") as agent:
        third = agent.stop().manifest
    assert third.previous is not None
    assert (third.previous.run_id, third.previous.ended) == (second.run_id, "killed")


def test_that_one_was_killed_is_handed_on(scope: Scope, tmp_path: Path) -> None:
    """Over a run that cannot begin, and over one that reaches nobody."""
    with Agent(tmp_path, *scope.options, events="file.open") as agent:
        agent.kill()
        first = decoded((tmp_path / "events.ndjson").read_bytes().splitlines()[0])
    config = f'state_file = "{tmp_path}/run.json"\ngrace_seconds = 0.3\n'
    (tmp_path / "own.toml").write_text(config)
    command = [*STREAMER, *scope.options, "--config", str(tmp_path / "own.toml")]
    for sink, code in (("file:/no/such/file", 4), (f"mqtt://127.0.0.1:{free_port()}/x", 0)):
        ended = subprocess.run(
            [*command, "--sink", sink, "--duration", "300ms"],
            cwd=ROOT,
            capture_output=True,
            timeout=seconds(60),
        )
        assert ended.returncode == code
    (tmp_path / "events.ndjson").unlink()
    with Agent(tmp_path, *scope.options, events="file.open") as agent:
        last = agent.stop().manifest
    assert last.previous is not None
    assert last.previous.ended != "killed"
    (killed,) = last.previous.untold
    assert (killed.run_id, killed.count) == (first.run_id, 0)
    assert "was killed" in killed.reason


@pytest.mark.parametrize("note", [b"", b"{}", b"\xff", b'{"run_id":' + b"1" * 2_000_000])
def test_a_note_that_makes_no_sense_is_none(scope: Scope, tmp_path: Path, note: bytes) -> None:
    (tmp_path / "run.json").touch(0o600)
    (tmp_path / "run.json").write_bytes(note)
    with Agent(tmp_path, *scope.options, events="file.open") as agent:
        recording = agent.stop()
    assert recording.manifest.previous is None
    assert note_of(tmp_path).ended == "delivered"


def test_of_two_agents_the_first_leaves_a_note(scope: Scope, tmp_path: Path) -> None:
    with Agent(tmp_path, *scope.options, events="file.open") as agent:
        config = f'state_file = "{tmp_path}/run.json"\n'
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "own.toml").write_text(config)
        command = [*STREAMER, *scope.options, "--duration", "200ms"]
        other = subprocess.run(
            [*command, "--config", str(tmp_path / "other" / "own.toml")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=seconds(60),
        )
        assert other.returncode == 0
        assert "another agent on this host has it" in other.stderr
        recording = agent.stop()
    assert note_of(tmp_path).run_id == recording.manifest.run_id


def test_what_could_not_be_told_is_handed_on(scope: Scope, tmp_path: Path) -> None:
    """Through runs that reach nobody, until one does."""
    port = free_port()
    config = f"""grace_seconds = 0.3
[[sinks]]
type = "kafka"
bootstrap = ["127.0.0.1:{port}"]
topic = "events"
"""
    (tmp_path / "dead.toml").write_text(f'state_file = "{tmp_path}/run.json"\n{config}')
    command = [*STREAMER, *scope.options, "--config", str(tmp_path / "dead.toml")]
    for count in (1, 2):
        with (
            (tmp_path / "stderr").open("wb") as stderr,
            subprocess.Popen(command, cwd=ROOT, stderr=stderr) as ended,
        ):
            wait_for(tmp_path / "stderr", b"streaming")
            scope.act(open_some, count)
            ended.send_signal(signal.SIGTERM)
            assert ended.wait(seconds(60)) == 5
    with Agent(tmp_path, *scope.options, events="file.open") as agent:
        manifest = agent.stop().manifest
    assert manifest.previous is not None
    lost = [one for one in manifest.previous.untold if one.stage == "sink"]
    assert [one.count for one in lost] == [1, 2]
    assert len({one.run_id for one in lost}) == 2
    assert lost[-1].run_id == manifest.previous.run_id
    assert note_of(tmp_path).untold == []


def test_a_full_disk(scope: Scope, tmp_path: Path) -> None:
    """Nothing can be told there: the exit code and the next run say so."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], check=True)
    try:
        config = "grace_seconds = 1\n"
        with Agent(
            tmp_path, *scope.options, events="file.open", config=config, output=disk / "events"
        ) as agent:
            scope.act(open_some, 2000)
            agent.send(signal.SIGTERM)
            recording = wait(agent)
        whole = (disk / "events").read_bytes().rpartition(b"\n")[0].splitlines()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert recording == 5
    written = [decoded(line) for line in whole if line.startswith(b'{"event":"file.open"')]
    note = note_of(tmp_path)
    assert note.ended == "undelivered"
    given_up = sum(one.count for one in note.untold if one.stage == "sink")
    # The write that failed was cut: what is there of its batch is given up as a whole.
    assert 2000 - len(written) <= given_up <= 2000
    assert "No space left on device" in agent.stderr


def wait(agent: Agent) -> int:
    """Its exit code; what it wrote last may be the part of a line."""
    return agent.process.wait(seconds(60))


# ---------------------------------------------------------------- the terminal that is closed


def test_a_closed_terminal_ends_it_in_order(scope: Scope, tmp_path: Path) -> None:
    """It sends SIGHUP to all, twice to some; what was read is delivered all the same."""
    ours, its = pty.openpty()
    (tmp_path / "streamer.toml").write_text(f'state_file = "{tmp_path}/run.json"\n')
    command = ["setsid", "--ctty", *STREAMER, *scope.options]
    command += ["--config", str(tmp_path / "streamer.toml"), "--sink", f"file:{tmp_path}/events"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=its, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        os.close(its)
        wait_for(tmp_path / "events", b"stream.manifest")
        os.kill(process.pid, signal.SIGHUP)  # the terminal is there: this opens the file anew
        scope.act(open_some, 500)
        os.close(ours)
        for _ in range(3):
            process.send_signal(signal.SIGHUP)
        assert process.wait(seconds(30)) == 0
    events = [decoded(line) for line in (tmp_path / "events").read_bytes().splitlines()]
    assert Counter(map(kind_of, events))["file.open"] == 500
    assert kind_of(events[-1]) == "stream.heartbeat"
    assert note_of(tmp_path).ended == "delivered"


def wait_for(path: Path, marker: bytes) -> None:
    deadline = time.monotonic() + seconds(60)
    while not path.exists() or marker not in path.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.02)
