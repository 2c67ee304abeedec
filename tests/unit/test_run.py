"""The process around a service, without privileges: exit codes, signals, and what it escapes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from streamer.agent.run import ascii_lines
from streamer.events.batch import Batch

PROGRAM = Path(__file__).parent / "memory_agent.py"
SECONDS = 30
HOSTILE = "\x1b]0;owned\x07\x9b2J\u202e"


class Agent:
    """The agent as a process of its own."""

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        events: int = 100,
        config: str = "",
        prefix: Sequence[str] = (),
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        self._stderr = directory / "stderr"
        command = [*prefix, sys.executable, str(PROGRAM), str(events), "run", "--no-status"]
        command += ["--config", configuration(directory, config), *arguments]
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                command, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr
            )

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self.process.poll() is None, self.stderr
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.01)

    def streams(self) -> None:
        self.wait_for(lambda: "Ctrl-C ends it" in self.stderr)

    def end(self) -> int:
        return self.process.wait(SECONDS)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def configuration(directory: Path, more: str = "") -> str:
    """Its note of the run is its own, and not that of this host."""
    path = directory / "streamer.toml"
    gate = directory / "gate"
    slow = f'btf = "{gate}"\n' if gate.exists() else ""
    own = f'state_file = "{directory}/run.json"\ncontrol = {{ socket = "{directory}/s" }}\n'
    path.write_text(f"{own}{slow}{more}\n")
    return str(path)


class Gate:
    """Makes an agent that is started afterwards wait within its loading."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "gate"
        os.mkfifo(self._path)

    @contextmanager
    def while_it_loads(self) -> Iterator[None]:
        with self._path.open("wb"):  # as soon as the agent reads
            yield


Start = Callable[..., Agent]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    made: list[Agent] = []

    def run(*arguments: str, **options: Any) -> Agent:
        made.append(Agent(tmp_path, *arguments, **options))
        return made[-1]

    yield run
    for agent in made:
        agent.process.kill()
        agent.process.wait()
        assert agent.process.stdout is not None
        agent.process.stdout.close()


def kinds_in(path: Path) -> Counter[str]:
    return Counter(json.loads(line)["event"] for line in path.read_text().splitlines())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_when_all_is_delivered(
    start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "events"
    agent = start("--events", "*", "--sink", f"file:{output}")
    agent.streams()
    agent.process.send_signal(number)
    assert agent.end() == 0
    assert kinds_in(output) == {
        "stream.manifest": 1,
        "process.exec": 100,
        "file.open": 100,
        "stream.heartbeat": 1,
    }
    assert f"file:{output} 200 delivered, 0 dropped; 0 filtered, 0 lost" in agent.stderr


def test_a_second_signal_does_not_wait_for_who_does_not_read(start: Start) -> None:
    """Its standard output is a full pipe, and the grace is ten seconds."""
    agent = start("--events", "*", events=2000)
    agent.streams()
    agent.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert agent.process.poll() is None  # it waits for the grace
    begun = time.monotonic()
    agent.process.send_signal(signal.SIGTERM)
    assert agent.end() == 130
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_for_files_while_it_loads(
    start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    """As logrotate sends it: it ends nothing, and the file is opened anew once there is one."""
    output, gate = tmp_path / "events", Gate(tmp_path)
    agent = start("--events", "*", "--sink", f"file:{output}")
    with gate.while_it_loads():
        for _ in range(2):
            agent.process.send_signal(number)
        time.sleep(0.1)
        assert agent.process.poll() is None
    agent.streams()
    output.rename(tmp_path / "older")
    agent.process.send_signal(number)
    agent.wait_for(output.exists)
    agent.process.send_signal(signal.SIGTERM)
    assert agent.end() == 0
    counts = kinds_in(output) + kinds_in(tmp_path / "older")
    assert counts["process.exec"] == counts["file.open"] == 100


def test_a_terminal_that_is_closed_while_it_loads(start: Start, tmp_path: Path) -> None:
    """It ends in order as soon as it can, and does not stay behind without a terminal."""
    output, gate = tmp_path / "events", Gate(tmp_path)
    own, terminal = os.openpty()
    agent = start("--sink", f"file:{output}", prefix=("setsid", "--ctty"), stdin=terminal)
    os.close(terminal)
    with gate.while_it_loads():
        os.close(own)  # which sends SIGHUP
    assert agent.end() == 0
    assert kinds_in(output)["stream.heartbeat"] == 1
    assert kinds_in(output)["process.exec"] == 100


def test_a_reader_that_goes_away_is_a_quiet_end(start: Start) -> None:
    agent = start("--events", "*", events=2000)
    agent.streams()
    assert agent.process.stdout is not None
    agent.process.stdout.close()
    assert agent.end() == 0
    assert len(agent.stderr.splitlines()) == 1  # what it streams, and no account nor complaint


def test_a_terminal_that_hangs_up_ends_it_and_any_other_sighup_opens_files_anew(
    tmp_path: Path,
) -> None:
    ours, its = os.openpty()
    output = tmp_path / "events"
    command = ["setsid", "--ctty", sys.executable, str(PROGRAM), "100", "run", "--no-status"]
    command += ["--config", configuration(tmp_path), "--events", "*", "--sink", f"file:{output}"]
    with subprocess.Popen(
        command, stdin=its, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        os.close(its)
        wait_until(lambda: output.exists() and output.read_bytes().count(b"\n") == 201)
        for number in (signal.SIGHUP, signal.SIGUSR1):
            output.rename(tmp_path / f"before-{number.name}")
            process.send_signal(number)
            wait_until(output.exists)
        os.close(ours)
        for _ in range(3):
            process.send_signal(signal.SIGHUP)
        assert process.wait(SECONDS) == 0
    assert kinds_in(output)["stream.heartbeat"] == 1
    assert kinds_in(tmp_path / "before-SIGHUP")["process.exec"] == 100


def test_signals_that_are_ignored_from_the_start_stay_so(tmp_path: Path) -> None:
    """As nohup and the background of a shell have it: its terminal may go."""
    ours, its = os.openpty()
    output = tmp_path / "events"
    ignoring = "import os, signal, sys; [signal.signal(n, signal.SIG_IGN) for n in (1, 2)]; "
    ignoring += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = ["setsid", "--ctty", sys.executable, "-c", ignoring, str(PROGRAM), "100"]
    command += ["run", "--no-status", "--config", configuration(tmp_path), "--events", "*"]
    command += ["--sink", f"file:{output}"]
    with subprocess.Popen(
        command, stdin=its, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        os.close(its)
        wait_until(lambda: output.exists() and output.read_bytes().count(b"\n") == 201)
        os.close(ours)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGINT):
            process.send_signal(number)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
    assert kinds_in(output)["stream.heartbeat"] == 1


def test_what_is_not_delivered_is_said_with_an_exit_code_of_its_own(start: Start) -> None:
    """Nobody listens there."""
    agent = start(
        "--events", "*", "--sink", "kafka://127.0.0.1:1/topic", config="grace_seconds = 0.3"
    )
    agent.streams()
    agent.process.send_signal(signal.SIGTERM)
    assert agent.end() == 5
    assert "not delivered: 200 events to kafka://127.0.0.1:1/topic: " in agent.stderr
    assert "0 delivered, 200 dropped" in agent.stderr.splitlines()[-1]


def test_the_same_sink_twice_is_refused(start: Start) -> None:
    """Everything would be in it twice."""
    sink = "kafka://127.0.0.1:1/topic"
    agent = start("--sink", sink, "--sink", f"{sink}?client_id=another")
    assert agent.end() == 2
    assert "sinks: found the same one twice among kafka:" in agent.stderr
    assert "Ctrl-C ends it" not in agent.stderr


class Named(msgspec.Struct, tag_field="event", tag="test.named"):
    name: str


@pytest.mark.parametrize(
    "name",
    [HOSTILE, "\x00\x1f\x7f\x80\x9f", "é 中 \U0001f600", '"\\\n\r\t', os.fsdecode(b"plain")],
)
def test_json_for_a_terminal_is_printable_ascii_and_the_same(name: str) -> None:
    """A terminal acts upon C1 and bidirectional characters too, which JSON does not escape."""
    lines = ascii_lines(Batch([Named(name), Named("next")]))
    assert all(byte == 0x0A or 0x20 <= byte < 0x7F for byte in lines)
    assert [json.loads(line)["name"] for line in lines.splitlines()] == [name, "next"]


def test_a_terminal_gets_no_control_characters(tmp_path: Path) -> None:
    own, terminal = os.openpty()
    command = [sys.executable, str(PROGRAM), "5", "run", "--no-status", "--duration", "0.2s"]
    command += ["--config", configuration(tmp_path), "--encoding", "json", "--events", "*"]
    with (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=terminal, stderr=stderr
        )
    os.close(terminal)
    shown = b""
    with suppress(OSError):  # when nobody has the terminal open any more
        while part := os.read(own, 1 << 16):
            shown += part
    os.close(own)
    assert process.wait(SECONDS) == 0, (tmp_path / "stderr").read_text()
    assert shown.count(b'"event":"process.exec"') == 5
    assert all(byte in b"\r\n" or 0x20 <= byte < 0x7F for byte in shown)
