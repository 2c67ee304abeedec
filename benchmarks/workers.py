"""What a second process that reads brings: `python -m benchmarks.workers`, as root.

The ring buffers are filled while the agent is stopped, from each CPU its own, and then read to a
real Kafka as fast as it goes, by one worker and by two in turns, all in one run; the median of
several. On a machine with as many CPUs as workers the broker takes its part of the same CPUs.
Prints the table of docs/scaling.md.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import msgspec

from benchmarks.report import as_markdown
from streamer.errors import NoAnswer
from streamer.operation.control import ask
from streamer.operation.look import Look
from tests.brokers import KafkaBroker
from tests.kernel.scope import Scope, cgroup_mount

OPENS = 200_000
"""On each CPU: what its ring buffer holds."""
RING_BYTES = 256 << 20
TURNS = 5
CPUS = sorted(os.sched_getaffinity(0))
_TICKS = os.sysconf("SC_CLK_TCK")


class Turn(NamedTuple):
    """Seconds from the first read to the last acknowledgement; CPU seconds of all that read."""

    events: int
    seconds: float
    cpu_seconds: float


def configured(directory: Path, broker: KafkaBroker, scope: Scope, workers: int) -> Path:
    """The configuration of an agent that observes opens in `scope`."""
    path = directory / f"{workers}.toml"
    path.write_text(f"""events = ["file.open"]
workers = {workers}
state_file = ""
control = {{ socket = "{directory / "control.sock"}" }}
[rings]
bulk_bytes = {RING_BYTES}
bulk_rings = 2
[filters]
cgroups = [{scope.id}]
[[sinks]]
type = "kafka"
bootstrap = ["{broker.address}"]
topic = "workers"
""")
    return path


def open_all(opens: int) -> None:
    """On every CPU at once."""
    children = []
    for cpu in CPUS:
        pid = os.fork()
        if pid == 0:
            os.sched_setaffinity(0, {cpu})
            for number in range(opens):
                try:
                    os.open(f"/no/such/directory/{cpu}/{number}", os.O_RDONLY)
                except OSError:
                    continue
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)


def look_at(directory: Path) -> Look:
    """How the agent is."""
    return msgspec.json.decode(ask(str(directory / "control.sock"), "status"), type=Look)


def cpu_seconds(pids: list[int]) -> float:
    """Of these processes."""
    fields = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids)
    return sum(int(one[11]) + int(one[12]) for one in fields) / _TICKS


def turn(directory: Path, broker: KafkaBroker, scope: Scope, workers: int) -> Turn:
    """Fill the rings, read them. Raises AssertionError: something was lost."""
    config = configured(directory, broker, scope, workers)
    command = [sys.executable, "-m", "streamer", "run", "--no-status", "--config", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as agent:
        try:
            pids = _when_ready(directory, agent, workers)
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            scope.act(open_all, OPENS)
            before = cpu_seconds(pids)
            begun = time.monotonic()
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            events = _until_delivered(directory, OPENS * len(CPUS))
            found = Turn(events, time.monotonic() - begun, cpu_seconds(pids) - before)
        finally:
            agent.send_signal(signal.SIGTERM)
            _, said = agent.communicate(timeout=60)
    assert agent.returncode == 0, said
    assert b" 0 lost" in said, said
    return found


def _when_ready(directory: Path, agent: subprocess.Popen[bytes], workers: int) -> list[int]:
    while True:
        assert agent.poll() is None
        time.sleep(0.2)
        try:
            look = look_at(directory)
        except NoAnswer:  # not yet
            continue
        if not look.not_ready and look.phase == "streaming":
            assert len(look.workers) == workers
            return look.workers


def _until_delivered(directory: Path, wanted: int) -> int:
    while True:
        time.sleep(0.05)
        (sink,) = look_at(directory).sinks.values()
        if sink.delivered.get("file.open", 0) >= wanted:
            return sink.delivered["file.open"]


def main() -> int:
    """Print the table."""
    mount = cgroup_mount()
    assert mount is not None
    found: dict[int, list[Turn]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name, Scope(mount) as scope:
        directory = Path(name)
        with KafkaBroker(directory / "kafka") as broker:
            for _ in range(TURNS):
                for workers, turns in found.items():
                    turns.append(turn(directory, broker, scope, workers))
                    print(json.dumps([workers, *turns[-1]]), file=sys.stderr)
    rows = [("workers", "events/s", "CPU of the agent, us per event")]
    for workers, turns in found.items():
        rate = statistics.median(one.events / one.seconds for one in turns)
        cost = statistics.median(one.cpu_seconds / one.events for one in turns)
        rows.append((str(workers), f"{rate:,.0f}", f"{cost * 1e6:.2f}"))
    print(as_markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
