"""`streamer status` and `streamer top` ask the agent that runs, and load nothing."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import free_port
from tests.kernel.agent import ROOT, Agent
from tests.kernel.pace import seconds
from tests.kernel.scope import Scope
from tests.kernel.spooling import agent_with
from tests.kernel.system import open_missing
from tests.kernel.test_metrics import get, run_programs

pytestmark = pytest.mark.kernel

EXECS = 60
OPENS = 2000


def command(agent: Agent, name: str, *options: str) -> list[str]:
    config = str(agent.output.parent / "streamer.toml")
    return [sys.executable, "-m", "streamer", name, "-c", config, *options]


def status(agent: Agent, code: int = 0) -> Any:
    """`code`: 1 where the agent is not ready."""
    done = subprocess.run(command(agent, "status", "--json"), cwd=ROOT, capture_output=True)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def programs(pid: int) -> list[str]:
    """The BPF programs and links that a process holds."""
    links = (os.readlink(one) for one in Path(f"/proc/{pid}/fd").iterdir())
    return sorted(one for one in links if "bpf-prog" in one or "bpf_link" in one)


def test_status_is_the_account(scope: Scope, tmp_path: Path) -> None:
    with Agent(tmp_path, *scope.options, events="process.*") as agent:
        scope.act(run_programs, EXECS)
        agent.wait_for(b'{"event":"process.exit"', EXECS)
        found = status(agent)
        text = subprocess.run(command(agent, "status"), cwd=ROOT, capture_output=True, check=True)
        recording = agent.stop()
    for kind in ("process.exec", "process.fork", "process.exit"):
        last = recording.heartbeat.counts[kind]
        assert (found["counts"][kind]["read"], found["counts"][kind]["lost"]) == (last.read, 0)
    sink = found["sinks"][f"file:{agent.output}"]
    assert sink["delivered"]["process.exec"] == EXECS
    assert found["phase"] == "streaming"
    assert found["not_ready"] == []
    assert found["pid"] == agent.pid
    assert re.search(r"^process.exec .* full$", text.stdout.decode(), re.M)


def open_at_a_pace() -> None:
    """So that no drain has more than the small budget takes."""
    for turn in range(0, OPENS, 100):
        open_missing(f"/no/{turn}/", 100)
        time.sleep(seconds(0.02))


def test_what_waits_on_disk_is_said(scope: Scope, tmp_path: Path) -> None:
    """By `status`, and by the metrics: of a broker that is away, whose budget is small."""
    address, port = f"127.0.0.1:{free_port()}", free_port()
    sinks = f"""[[sinks]]
type = "kafka"
bootstrap = ["{address}"]
topic = "kernel-events"
budget_bytes = 262144
on_full = "pause"
spool = "spill"
[metrics]
listen = "127.0.0.1:{port}"
"""
    with agent_with(tmp_path, scope, sinks, "run", most=1 << 22) as agent:
        scope.act(open_at_a_pace)
        agent.wait_for(b'{"event":"file.open"', OPENS)
        name = f"kafka://{address}/kernel-events"
        deadline = time.monotonic() + seconds(20)
        while (one := status(agent, 1)["sinks"][name])["spooled"] < OPENS // 2:
            assert time.monotonic() < deadline, one
            time.sleep(0.1)
        assert one["received"]["file.open"] == OPENS
        assert OPENS <= one["pending"] < OPENS + 100
        assert one["held_bytes"] < 2 * 262144
        assert 0.01 < one["spool_filled"] < 0.9
        text = subprocess.run(
            command(agent, "status"), cwd=ROOT, capture_output=True, text=True
        ).stdout
        found = get(port, "/metrics")[1]
        agent.stop(check=False)
    assert re.search(rf"{re.escape(name)} is .* [\d,]+ on disk, spool \d+% full", text)
    for metric, least in (("spooled_events", OPENS // 2), ("spool_filled_ratio", 0.01)):
        (value,) = re.findall(rf'streamer_sink_{metric}{{sink="{name}"}} (.*)', found)
        assert float(value) >= least


def test_nobody_else_may_ask(tmp_path: Path) -> None:
    with Agent(tmp_path, events="process.exec") as agent:
        asked = command(agent, "status", "--socket", str(tmp_path / "control.sock"))
        del asked[4:6]
        done = subprocess.run(
            ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", *asked],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0
        assert "process.exec" not in done.stdout
        agent.stop()


def test_top_on_a_terminal(scope: Scope, tmp_path: Path) -> None:
    """It shows a process of ours by its name, and no program is loaded for it."""
    with Agent(tmp_path, *scope.options, events="process.*") as agent:
        before = programs(agent.helper_pid)
        assert before
        pid, terminal = pty.fork()
        if not pid:
            os.chdir(ROOT)
            os.environ |= {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
            arguments = command(agent, "top")
            os.execv(arguments[0], arguments)
        shown = b""
        deadline = time.monotonic() + 30
        with scope.start(run_programs, 600):
            while b"true" not in shown or b"process.exec" not in shown:
                assert time.monotonic() < deadline, shown[-2000:]
                if select.select([terminal], [], [], 0.2)[0]:
                    shown += os.read(terminal, 65536)
            assert programs(agent.helper_pid) == before
            assert programs(pid) == []
            os.write(terminal, b"q")
            while True:
                try:
                    if not os.read(terminal, 65536):
                        break
                except OSError:
                    break
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        os.close(terminal)
        agent.stop()
