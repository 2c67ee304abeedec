"""A running process that is asked to read its configuration anew, over a kernel in memory."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_run import PROGRAM, Start, configuration, kinds_in, start, wait_until

__all__ = ["start"]

STAYS = "the configuration stays as it was: "


def manifests(path: Path) -> list[Any]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [one for one in found if one["event"] == "stream.manifest"]


def test_what_the_command_line_says_wins_still(start: Start, tmp_path: Path) -> None:
    """The same is laid over the file each time."""
    output = tmp_path / "events"
    arguments = ("--events", "process.*", "--exclude-pid", "7", "--sink", f"file:{output}")
    agent = start(*arguments)
    agent.streams()
    more = 'events = ["net.*"]\nfilters = { uids = [5], exclude_pids = [9] }\n'
    configuration(tmp_path, f'{more}[[sinks]]\ntype = "stdout"\n')
    agent.process.send_signal(signal.SIGHUP)
    agent.wait_for(lambda: "was read anew: filters.uids\n" in agent.stderr)
    agent.process.terminate()
    assert agent.end() == 0
    told = manifests(output)
    assert [one["filters"] for one in told] == [
        {"exclude_pids": ["7"]},
        {"exclude_pids": ["7"], "uids": ["5"]},
    ]
    assert told[0]["coverage"].keys() == told[1]["coverage"].keys()
    assert (told[0]["changes"], told[1]["changes"]) == ([], ["filters.uids"])
    assert told[0]["since_boot_ns"] == 0 < told[1]["since_boot_ns"] <= told[1]["boot_ns"]


def test_nothing_has_changed(start: Start, tmp_path: Path) -> None:
    """Files are opened anew all the same, and nothing is told in the stream."""
    output = tmp_path / "events"
    agent = start("--sink", f"file:{output}")
    agent.streams()
    wait_until(lambda: output.exists() and "process.exec" in output.read_text())
    output.rename(tmp_path / "before")
    agent.process.send_signal(signal.SIGHUP)
    agent.wait_for(lambda: "nothing has changed" in agent.stderr)
    wait_until(output.exists)
    agent.process.terminate()
    assert agent.end() == 0
    assert "stream.manifest" not in kinds_in(output)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_without_a_file_only_sinks_are_asked(tmp_path: Path, number: signal.Signals) -> None:
    """A pipe, too, can be read once: what it says the second time is nothing."""
    output = tmp_path / "events"
    text = Path(configuration(tmp_path, "filters = { exclude_pids = [9] }")).read_text()
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    command = [sys.executable, str(PROGRAM), "10", "run", "--no-status"]
    command += ["--config", f"/dev/fd/{reading}", "--sink", f"file:{output}"]
    with subprocess.Popen(
        command, pass_fds=(reading,), stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(reading)
        wait_until(lambda: output.exists() and "process.exec" in output.read_text())
        output.rename(tmp_path / "before")
        process.send_signal(number)
        wait_until(output.exists)
        process.terminate()
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(30) == 0
    assert "anew" not in said
    assert STAYS not in said


@pytest.mark.parametrize("what", ["missing", "fifo", "directory", "not UTF-8"])
def test_a_file_that_is_none_any_more(start: Start, tmp_path: Path, what: str) -> None:
    agent = start("--events", "process.*", "--sink", f"file:{tmp_path}/events")
    agent.streams()
    path = tmp_path / "streamer.toml"
    path.unlink()
    match what:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "not UTF-8":
            path.write_bytes(b"# \xff\n")
    agent.process.send_signal(signal.SIGHUP)
    agent.wait_for(lambda: STAYS in agent.stderr)
    (line,) = [one for one in agent.stderr.splitlines() if STAYS in one]
    assert f"{STAYS}{path}: " in line
    agent.process.terminate()
    assert agent.end() == 0


def test_the_service_manager_waits_until_it_is_done(tmp_path: Path) -> None:
    """Also for a configuration that is refused."""
    output = tmp_path / "events"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(f"{tmp_path}/notify")
        heard.settimeout(30)

        def told() -> str:
            while (said := heard.recv(4096).decode()).startswith("STATUS="):
                pass
            return said

        command = [sys.executable, str(PROGRAM), "10", "run", "--no-status"]
        command += ["--config", configuration(tmp_path), "--sink", f"file:{output}"]
        environment = os.environ | {"NOTIFY_SOCKET": f"{tmp_path}/notify"}
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            assert told() == "READY=1"
            for more in ("heartbeat_seconds = 5", "heartbeat_seconds = 0"):
                configuration(tmp_path, more)
                process.send_signal(signal.SIGHUP)
                name, _, microseconds = told().partition("\nMONOTONIC_USEC=")
                assert name == "RELOADING=1"
                assert int(microseconds) > 0
                assert told() == "READY=1"
            process.terminate()
            assert process.wait(30) == 0
