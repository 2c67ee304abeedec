"""Several processes that read and publish: one run, one account, nothing twice and nothing missing.

A subscriber of Mosquitto is the witness: what it was sent is held against the account, the numbers
and the watermarks in it, and against what the test itself did.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.brokers import MosquittoBroker
from tests.kernel.agent import ROOT, Agent, Recording
from tests.kernel.pace import repetitions, seconds
from tests.kernel.roles import Role
from tests.kernel.scope import Scope, checkpoint
from tests.kernel.system import open_missing
from tests.kernel.test_bulk_rings import open_on, opens_by_cpu, two_cpus
from tests.kernel.test_spool_mqtt import KEEPS

pytestmark = [pytest.mark.kernel, pytest.mark.mqtt]

OPENS = repetitions(20_000, 2_000)
FLOWS = 50
FINAL = b'"final":true'
GONE = 3
ENTER = ("sh", "-ec", 'echo $$ >"$0"/cgroup.procs; exec "$@"')


@pytest.fixture
def mqtt(tmp_path: Path) -> Iterator[MosquittoBroker]:
    with MosquittoBroker(tmp_path / "mqtt", KEEPS) as broker:
        yield broker


@pytest.fixture
def witness(mqtt: MosquittoBroker, tmp_path: Path) -> Iterator[Path]:
    """The file that has what was published, line by line."""
    path = tmp_path / "witness.ndjson"
    command = ["stdbuf", "-oL", "mosquitto_sub", "-p", str(mqtt.port), "-V", "mqttv5", "-q", "1"]
    command += ["-i", "witness", "-N", "-c", "-x", "3600", "-t", "kernel/#"]
    with path.open("wb") as file:
        process = subprocess.Popen(command, stdout=file)
    try:
        deadline = time.monotonic() + seconds(30)
        while not (mqtt.directory / "mosquitto.db").exists():  # with what is subscribed to
            assert process.poll() is None
            assert time.monotonic() < deadline, mqtt.log
            time.sleep(0.05)
        yield path
    finally:
        process.terminate()
        process.wait(10)


class Crew(Agent):
    """An agent of two workers, whose output is what the witness was sent."""

    def __init__(
        self,
        tmp_path: Path,
        scope: Scope,
        mqtt: MosquittoBroker,
        witness: Path,
        *,
        events: str = "file.open",
        grace: int = 30,
        more: str = "",
        sink: dict[str, int] | None = None,
        prefix: tuple[str, ...] = (),
        arguments: tuple[str, ...] = (),
    ) -> None:
        config = f"""workers = 2
heartbeat_seconds = 1
grace_seconds = {grace}
{more}
[[sinks]]
type = "mqtt"
host = "127.0.0.1"
port = {mqtt.port}
topic = "kernel/{{category}}"
client_id = "crew"
"""
        config += "".join(f"{key} = {value}\n" for key, value in (sink or {}).items())
        super().__init__(
            tmp_path / "agent",
            *scope.options,
            *arguments,
            events=events,
            config=config,
            sinks=None,
            prefix=prefix,
            output=witness,
        )

    @property
    def further(self) -> int:
        """The process id of the further worker."""
        return self.child("streamer-worker")

    def child(self, wanted: str) -> int:
        """The process id of the child of that name."""
        names = {
            pid: Path(f"/proc/{pid}/comm").read_text().strip()
            for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        }
        (found,) = (int(pid) for pid, name in names.items() if name == wanted)
        return found

    def ended(self, code: int = 0) -> Recording:
        """What the witness was sent, when it has the last record of the run."""
        assert self.process.wait(seconds(60)) == code, self.stderr
        deadline = time.monotonic() + seconds(60)
        while FINAL not in self.output.read_bytes():
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.1)
        return Recording(self.output.read_bytes(), self.stderr, code)


def open_everywhere(opens: int) -> None:
    roles = [Role("opens", open_on, cpu, opens) for cpu in two_cpus()]
    for role in roles:
        role.result()


def verified(witness: Path) -> dict[str, int]:
    """What `streamer verify` counts, which finds nothing unexplained."""
    command = [sys.executable, "-m", "streamer", "verify", "--json", str(witness)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    totals: dict[str, int] = json.loads(done.stdout)
    return totals


def test_one_account_over_all(
    scope: Scope, tmp_path: Path, mqtt: MosquittoBroker, witness: Path
) -> None:
    """Every event is there once, in the order of its CPU, and no watermark is before its time."""
    with Crew(tmp_path, scope, mqtt, witness) as agent:
        pids = [agent.pid, agent.further]
        scope.act(open_everywhere, OPENS)
        command = [sys.executable, "-m", "streamer", "status", "--json"]
        command += ["--config", str(tmp_path / "agent" / "streamer.toml")]
        look = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
        agent.send(signal.SIGTERM)
        recording = agent.ended()
    recording.check()
    assert opens_by_cpu(recording) == {str(cpu): OPENS for cpu in two_cpus()}
    assert recording.losses == []
    assert recording.manifest.workers == 2
    assert look["workers"] == pids
    seqs: dict[int, int] = {}
    for event in recording.of("file.open"):
        assert event.seq > seqs.get(event.cpu, 0)
        seqs[event.cpu] = event.seq
    verified(witness)
    connected = {line.split(" as ")[1].split()[0] for line in mqtt.log.splitlines()
                 if "connected from" in line and " as " in line}  # fmt: skip
    assert {"crew", "crew-1"} <= connected


def test_none_of_them_is_observed(
    scope: Scope, tmp_path: Path, mqtt: MosquittoBroker, witness: Path
) -> None:
    """In the very cgroup that is observed: what they do is not there, what others do is."""
    wanted = "net.connect,file.open,process.exit,syscall.slow"
    prefix = (*ENTER, str(scope.path))
    # Each of them sleeps longer than that.
    slow = '[kernel]\nsyscalls = ["epoll_pwait"]\nsyscall_slow_ms = 1\n'
    with Crew(tmp_path, scope, mqtt, witness, events=wanted, more=slow, prefix=prefix) as agent:
        own = {agent.pid, agent.further}
        mqtt.kill()
        mqtt.start()  # both connect again
        scope.act(open_missing, "/no/", 10)
        agent.wait_for(b'"event":"file.open"', 10)
        agent.send(signal.SIGTERM)
        recording = agent.ended()
    assert recording.manifest.coverage["syscall.slow"].status == "full"
    assert len([one for one in recording.of("file.open") if one.path.startswith("/no/")]) == 10
    assert not own & {one.pid for one in recording.events if hasattr(one, "pid")}


def open_for(cpu: int, how_long: float) -> int:
    os.sched_setaffinity(0, {cpu})
    until, count = time.monotonic() + how_long, 0
    while time.monotonic() < until:
        open_missing(f"/no/{cpu}/{count}/", 100)
        count += 100
        time.sleep(0.001)
    return count


def flood(how_long: float) -> int:
    """On two CPUs. How many opens there were."""
    checkpoint()
    roles = [Role("opens", open_for, cpu, how_long) for cpu in two_cpus()]
    return sum(role.result() for role in roles)


def test_one_of_them_is_killed(
    scope: Scope, tmp_path: Path, mqtt: MosquittoBroker, witness: Path
) -> None:
    """The run ends, and says which numbers nobody has: no gap is left unexplained."""
    with Crew(tmp_path, scope, mqtt, witness) as agent, scope.start(flood, 3.0) as actor:
        actor.reached()
        actor.proceed()
        agent.wait_for(f'"path":"/no/{two_cpus()[1]}/'.encode(), 500)  # what it reads
        os.kill(agent.further, signal.SIGKILL)
        recording = agent.ended(GONE)
        opened = actor.result()
    assert "worker 1 was ended by SIGKILL" in recording.stderr
    assert [loss for loss in recording.losses if "worker 1" in loss.reason], "it held something"
    counts = recording.heartbeat.counts["file.open"]
    assert counts.produced == counts.read + counts.filtered + counts.shed + counts.lost
    assert len(recording.of("file.open")) < opened
    verified(witness)


def test_one_of_them_stands_still(
    scope: Scope, tmp_path: Path, mqtt: MosquittoBroker, witness: Path
) -> None:
    """It does not end in time, and what it has not read is told; then it goes on, and ends."""
    more = "[rings]\nbulk_bytes = 131072\n"
    with Crew(tmp_path, scope, mqtt, witness, grace=10, more=more) as agent:
        scope.act(open_everywhere, 100)
        agent.wait_for(b'"event":"file.open"', 200)
        further = agent.further
        os.kill(further, signal.SIGSTOP)
        try:
            scope.act(open_everywhere, OPENS)
            agent.send(signal.SIGTERM)
            recording = agent.ended(GONE)
        finally:
            os.kill(further, signal.SIGCONT)
    counts = recording.heartbeat.counts["file.open"]
    assert counts.produced == counts.read + counts.filtered + counts.shed + counts.lost
    assert counts.lost > 0
    assert "worker 1 did not end in time" in recording.stderr
    deadline = time.monotonic() + seconds(10)
    while Path(f"/proc/{further}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    verified(witness)


def test_a_broker_that_stands_still(
    scope: Scope, tmp_path: Path, mqtt: MosquittoBroker, witness: Path
) -> None:
    """Both wait, and what then finds no room in the kernel is told, with its numbers."""
    rings = "[rings]\nbulk_bytes = 131072\n"
    with Crew(tmp_path, scope, mqtt, witness, more=rings) as agent:
        budget = agent.stderr
        os.kill(mqtt.pid, signal.SIGSTOP)
        try:
            scope.act(open_everywhere, OPENS)
        finally:
            os.kill(mqtt.pid, signal.SIGCONT)
        agent.send(signal.SIGTERM)
        recording = agent.ended()
    recording.check()
    assert {loss.cpu for loss in recording.losses} <= set(two_cpus()), budget
    verified(witness)


def send_datagrams(count: int) -> None:
    """Of so many flows."""
    for _ in range(count):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"flow", ("127.0.0.1", 9))


def test_flows_that_are_reported_at_the_end(
    scope: Scope, tmp_path: Path, mqtt: MosquittoBroker, witness: Path
) -> None:
    """They are written into the ring of whatever CPU reports them, and somebody still reads it."""
    more = "[kernel]\nflow_idle_seconds = 1000\nflow_active_seconds = 1000\n"
    arguments = ("--interface", "lo")
    with Crew(
        tmp_path, scope, mqtt, witness, events="net.flow", more=more, arguments=arguments
    ) as agent:
        # Reporting is the helper's: on the CPU whose ring is not the first worker's.
        os.sched_setaffinity(agent.child("streamer-helper"), {two_cpus()[1]})
        scope.act(send_datagrams, FLOWS)
        time.sleep(seconds(0.3))
        agent.send(signal.SIGTERM)
        recording = agent.ended()
    recording.check()
    counts = recording.heartbeat.counts["net.flow"]
    assert counts.read >= FLOWS
    assert counts.produced == counts.read + counts.filtered + counts.lost
    assert "not read" not in recording.stderr
    verified(witness)


def test_a_child_from_before(
    scope: Scope, tmp_path: Path, mqtt: MosquittoBroker, witness: Path
) -> None:
    """A script started it, and then became the agent: it is none of the workers, and observed."""
    beside = f"while :; do test -e /no/child; sleep 0.05; done & echo $! >{tmp_path}/beside"
    prefix = (*ENTER, str(scope.path), "sh", "-c", f'{beside}; exec "$@"', "sh")
    wanted = "file.open,process.exit"
    with Crew(tmp_path, scope, mqtt, witness, events=wanted, prefix=prefix) as agent:
        own = {agent.pid, agent.further}
        beside_it = int((tmp_path / "beside").read_text())
        try:
            agent.wait_for(b'"event":"process.exit"', 5)  # of its sleeps
        finally:
            os.kill(beside_it, signal.SIGKILL)
        agent.send(signal.SIGTERM)
        recording = agent.ended()
    assert beside_it in {one.ppid for one in recording.of("process.exit")}
    assert not own & {one.pid for one in recording.events if hasattr(one, "pid")}


def open_now_and_then(cpu: int) -> None:
    """Heartbeats are published every three seconds: at every phase of that, in steps of 0.8."""
    for _ in range(4):
        open_on(cpu, 10)
        time.sleep(3.8)


def test_watermarks_wait_for_delivery(
    scope: Scope, tmp_path: Path, mqtt: MosquittoBroker, witness: Path
) -> None:
    """What one holds back for long is not passed by what the other says of its CPU."""
    slow = {"linger_ms": 2500}
    with Crew(tmp_path, scope, mqtt, witness, sink=slow) as agent:
        scope.act(open_now_and_then, two_cpus()[1])
        agent.send(signal.SIGTERM)
        recording = agent.ended()
    recording.check()
    assert len(recording.of("file.open")) == 40
    place = "bulk", two_cpus()[1]
    beats = recording.of("stream.heartbeat")
    marks = [m.watermark_ns for beat in beats for m in beat.marks if (m.ring, m.cpu) == place]
    assert len(set(marks)) > 2, "they go on meanwhile"


def test_another_configuration(
    scope: Scope, tmp_path: Path, mqtt: MosquittoBroker, witness: Path
) -> None:
    """Filters change for all of them; what each of them has of its own stays."""
    with Crew(
        tmp_path, scope, mqtt, witness, more='[filters]\npath_prefixes = ["/no/"]\n'
    ) as agent:
        path = tmp_path / "agent" / "streamer.toml"
        text = path.read_text()
        path.write_text(text.replace('topic = "kernel', 'topic = "kernel/other'))
        agent.send(signal.SIGHUP)
        deadline = time.monotonic() + seconds(30)
        while "several workers have it" not in agent.stderr:
            assert time.monotonic() < deadline, agent.stderr
            time.sleep(0.05)
        path.write_text(text.replace('"/no/"', '"/yes/"'))
        agent.send(signal.SIGHUP)
        agent.wait_for(b'"event":"stream.manifest"', 2)
        scope.act(open_both)
        agent.send(signal.SIGTERM)
        recording = agent.ended()
    assert [one.path for one in recording.of("file.open")] == [f"/yes/{i}" for i in range(7)]


def open_both() -> None:
    open_missing("/no/", 5)
    open_missing("/yes/", 7)
