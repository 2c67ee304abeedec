"""The agent with CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN and nothing else, as the services have it.

Each time by two users: root without the rest, as in a container, and one of no privilege, as by
systemd. What is missing for want of a capability is said, and nothing else goes missing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from streamer.kernel.capabilities import CAP_SYS_RESOURCE, effective
from tests.conftest import Require
from tests.kernel.agent import Agent, Recording, kind_of
from tests.kernel.dns import PORT, query, question, response, serve
from tests.kernel.pace import seconds
from tests.kernel.roles import Role, enter_netns, two_namespaces
from tests.kernel.scope import Scope
from tests.kernel.system import kernel_is, open_missing, preempts_tracepoints
from tests.kernel.test_privilege import PARANOID, functions_load, status_of

pytestmark = pytest.mark.kernel

NOBODY = 65534
BITS = {"bpf": 1 << 39, "perfmon": 1 << 38, "net_admin": 1 << 12}
LOADS, ALL_THREE = ("bpf", "perfmon"), ("bpf", "perfmon", "net_admin")
RUNS, OPENS, CONNECTS = 5, 50, 10
KINDS = "process.*,file.open,net.connect,net.accept,net.close,syscall.latency"
NO_TRACEFS = "tracefs is root's alone: reading it takes root's user id or CAP_DAC_READ_SEARCH"
MEMLOCK = ("prlimit", "--memlock=unlimited:unlimited")
"""What a service manager gives for kernels before 5.11: of the agent's own it has no right to."""


def with_only(user: str, names: tuple[str, ...], *, memlock: bool = True) -> tuple[str, ...]:
    """What to put before a command that is to have only these capabilities."""
    listed = ",".join(f"+{name}" for name in names)
    sets = ("--bounding-set", f"-all,{listed}", "--inh-caps", f"-all,{listed}")
    who: tuple[str, ...] = ()
    if user != "root":
        number = str(NOBODY)
        who = ("--reuid", number, "--regid", number, "--clear-groups")
        who += ("--ambient-caps", f"-all,{listed}")
    needs_room = memlock and not kernel_is(5, 11)
    return (*(MEMLOCK if needs_room else ()), "setpriv", *who, *sets)


Start = Callable[..., Agent]


@pytest.fixture(params=["root", "nobody"])
def user(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def start(user: str, open_directory: Path, public_copy: tuple[str, ...]) -> Iterator[Start]:
    """Makes an agent of that user with the capabilities given, code and files that it may read."""
    directory = open_directory / f"{user}-{os.urandom(4).hex()}"
    directory.mkdir()
    if user != "root":
        os.chown(directory, NOBODY, NOBODY)

    def make(
        names: tuple[str, ...],
        *options: str,
        events: str = KINDS,
        before: tuple[str, ...] = (),
        config: str = CONFIG,
    ) -> Agent:
        return Agent(
            directory,
            *options,
            events=events,
            config=config,
            prefix=(*before, *with_only(user, names)),
            python=os.path.realpath(sys.executable),
            program=public_copy,
        )

    yield make
    shutil.rmtree(directory)


CONFIG = """
summary_seconds = 1
[kernel]
syscalls = ["getpriority"]
"""


def act(port: int) -> None:
    """So many of each; the opens are of names of their own, since what is run opens more."""
    for _ in range(RUNS):
        subprocess.run(["/bin/true"], check=True)
    open_missing("/no/", OPENS)
    for _ in range(CONNECTS):
        socket.create_connection(("127.0.0.1", port)).close()
    for _ in range(OPENS):
        os.getpriority(os.PRIO_PROCESS, 0)


def serve_and_act() -> None:
    """The listener is this process's, too: its accepts are seen."""
    with socket.create_server(("127.0.0.1", 0), backlog=CONNECTS) as listener:
        act(listener.getsockname()[1])
        for _ in range(CONNECTS):
            listener.accept()[0].close()


def counted(recording: Recording) -> Counter[str]:
    """Events by kind, of opens those of the names that are the test's own."""
    return Counter(
        kind_of(event)
        for event in recording.events
        if kind_of(event) != "file.open" or event.path.startswith("/no/")
    )


def calls(recording: Recording) -> int:
    return sum(one.count for one in recording.of("syscall.latency"))


@pytest.mark.every_kernel
def test_all_kinds_with_exactly_these(start: Start, user: str, scope: Scope) -> None:
    with start(ALL_THREE, *scope.options) as agent:
        worker, helper = (status_of(Path(f"/proc/{pid}")) for pid in (agent.pid, agent.helper_pid))
        scope.act(serve_and_act)
        recording = agent.stop()
    uid = "0" if user == "root" else str(NOBODY)
    assert worker["Uid"].split() == helper["Uid"].split() == [uid] * 4
    assert int(worker["CapPrm"], 16) == 0
    assert int(helper["CapPrm"], 16) & ~sum(BITS.values()) == 0
    unread = user != "root" and not functions_load()  # then only tracefs names system calls
    coverage = recording.manifest.coverage
    lost = {"file.open", "net.accept"} if unread else set[str]()
    assert {kind for kind, one in coverage.items() if one.status == "missing"} == lost
    assert all(NO_TRACEFS in coverage[kind].reason for kind in lost)
    found = counted(recording)
    assert found["process.exec"] == RUNS
    assert found["process.exit"] == found["process.fork"] == RUNS
    assert found["net.connect"] == CONNECTS
    assert found["file.open"] == (0 if unread else OPENS)
    assert found["net.accept"] == (0 if unread else CONNECTS)
    assert found["net.close"] == 2 * CONNECTS
    assert calls(recording) == OPENS


OTHERS = "net.bind,net.listen,net.udp,net.drop,net.dns,net.flow,profile.sample,syscall.slow"
CONFIG_OF_OTHERS = """
summary_seconds = 1
[kernel]
interfaces = ["veth1"]
profile_hz = 97
syscalls = ["nanosleep", "clock_nanosleep"]
syscall_slow_ms = 100
flow_idle_seconds = 1
"""


def use_network(near: str) -> None:
    """There: a listener, datagrams that nobody takes, a DNS exchange, a slow call, and work."""
    enter_netns(near)
    with (
        socket.create_server(("127.0.0.1", 0)),
        serve(lambda asked: [response(asked)]),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        sender.settimeout(seconds(10))
        sender.sendto(query(7, question(b"example.org")), ("127.0.0.1", PORT))
        assert sender.recv(512)
        for _ in range(FRAMES):
            sender.sendto(b"x", ("192.0.2.2", 9))
            with suppress(ConnectionRefusedError):
                sender.sendto(b"x", ("127.0.0.1", 9))
    time.sleep(0.3)
    end = time.monotonic() + 1
    while time.monotonic() < end:
        pass


def test_all_other_kinds_with_exactly_these(
    start: Start, user: str, scope: Scope, require: Require
) -> None:
    """Each is observed, unless it says that tracefs or a perf event is not for this user."""
    require(shutil.which("ip"), "ip (iproute2) is not installed")
    with two_namespaces() as (near, _):
        # That has a /sys of its own, where cgroups are elsewhere: the scope is given by its number.
        mounted = "mount -t tracefs none /sys/kernel/tracing;"
        mounted += ' mount -t cgroup2 none /sys/fs/cgroup; exec "$@"'
        enter = ("ip", "netns", "exec", near, "sh", "-ec", mounted, "sh")
        options = ("--cgroup", str(scope.id))
        with start(
            ALL_THREE, *options, events=OTHERS, before=enter, config=CONFIG_OF_OTHERS
        ) as agent:
            scope.act(use_network, near)
            recording = agent.stop()
    coverage = recording.manifest.coverage
    missing = {kind: one.reason for kind, one in coverage.items() if one.status == "missing"}
    for kind, reason in missing.items():
        assert NO_TRACEFS in reason or "asks for CAP_SYS_ADMIN" in reason, (kind, reason)
    if user == "root":
        assert missing.keys() <= {"profile.sample"}, missing
    found = Counter(kind_of(event) for event in recording.all)
    silent = {kind for kind in OTHERS.split(",") if not found[kind]}
    assert silent == missing.keys()


def test_without_the_one_for_networks(start: Start, scope: Scope) -> None:
    """What needs it says so, by name; the rest is as it was."""
    kinds = "process.exec,xdp.counters"
    with start(LOADS, *scope.options, *ON_LO, events=kinds) as agent:
        scope.act(subprocess.run, ["/bin/true"])
        recording = agent.stop()
    missing = recording.manifest.coverage["xdp.counters"]
    assert missing.status == "missing"
    assert missing.reason.endswith("does not load: CAP_NET_ADMIN is missing")
    assert recording.manifest.coverage["process.exec"].status == "full" or preempts_tracepoints()
    assert counted(recording) == {"process.exec": 1}


ON_LO = ("--interface", "lo")
FRAMES = 100


def send(name: str) -> None:
    """UDP datagrams from the far end, each a packet at the near one."""
    enter_netns(name)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(("192.0.2.1", 9))
        sender.send(b"x")  # the first has the address resolved
        for _ in range(FRAMES - 1):
            try:
                sender.send(b"x")
            except ConnectionRefusedError:  # an earlier one came, and nobody listens
                sender.send(b"x")


def test_packets_of_an_interface(start: Start, require: Require) -> None:
    require(shutil.which("ip"), "ip (iproute2) is not installed")
    with two_namespaces() as (near, far):
        enter = ("ip", "netns", "exec", near)
        options = ("--interface", "veth1")
        with start(ALL_THREE, *options, events="xdp.counters", before=enter) as agent:
            Role("sender", send, far).result()
            recording = agent.stop()
    (program,) = (one for one in recording.manifest.programs if one.sensor == "xdp_counter")
    assert (program.status, program.reason) == ("attached", "")
    datagrams = [one for one in recording.of("xdp.counters") if one.transport == "udp"]
    assert sum(one.packets for one in datagrams) == FRAMES


@pytest.mark.every_kernel
def test_memory_that_a_kernel_before_5_11_does_not_give(
    user: str, require_kernel: Require, public_copy: tuple[str, ...]
) -> None:
    """There rings and tables count against a limit that only CAP_SYS_RESOURCE raises."""
    require_kernel(not kernel_is(5, 11), "maps do not count against RLIMIT_MEMLOCK")
    limit = ("prlimit", "--memlock=65536:65536", *with_only(user, LOADS, memlock=False))
    python = os.path.realpath(sys.executable)
    command = [*limit, python, *public_copy, "run", "--no-status", "--duration", "1s"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds(60))
    assert ended.returncode == 3
    assert ended.stderr.splitlines()[-1] == (
        "streamer: not permitted to load BPF programs: lockdown, or RLIMIT_MEMLOCK, which is "
        "65,536 bytes: before Linux 5.11 maps and programs have to fit into it"
    )


def test_check_says_what_a_profile_lacks(user: str, public_copy: tuple[str, ...]) -> None:
    """Names of functions: of other users' processes, and of the kernel."""
    python = os.path.realpath(sys.executable)
    options = ("--json", "--events", "profile.sample", "--profile-hz", "49")
    command = [*with_only(user, LOADS), python, *public_copy, "check", *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds(60))
    found = json.loads(ended.stdout)["kinds"]["profile.sample"]
    if found["status"] == "unavailable":  # Debian lets no other sample
        assert found["reason"].endswith("which asks for CAP_SYS_ADMIN")
        assert int(PARANOID.read_text()) > 2
        return
    assert found["status"] == "degraded"
    assert "CAP_SYS_PTRACE is missing" in found["reason"]
    assert "CAP_SYSLOG is missing" in found["reason"]


# ---------------------------------------------------------------- what others can do to it

HOGS = """
import os, time
for _ in range(60):
    if not os.fork():
        room = b"x" * (16 << 20)
        time.sleep(120)
time.sleep(120)
"""
"""Together three times what there is; each has less than the agent."""
KILLS = 20


@pytest.mark.every_kernel
@pytest.mark.parametrize("protected", [True, False])
def test_memory_taken_by_a_flood_of_small_processes(
    scope: Scope, require_kernel: Require, tmp_path: Path, protected: bool
) -> None:
    """The largest is ended first, and that is the agent, unless it has made itself smaller."""
    require_kernel(CAP_SYS_RESOURCE in effective(), "CAP_SYS_RESOURCE is missing here")
    mount = scope.path.parent
    controllers = (mount / "cgroup.controllers").read_text().split()
    require_kernel("memory" in controllers, "there is no memory controller of cgroup v2")
    (mount / "cgroup.subtree_control").write_text("+memory")
    (scope.path / "memory.max").write_text(str(300 << 20))
    config = "" if protected else "oom_score_adj = 0\n"
    enter = ("sh", "-c", f'echo $$ >{scope.path}/cgroup.procs; exec "$@"', "sh")
    hogs = (*enter, "setpriv", "--reuid", str(NOBODY), "--clear-groups", "/usr/bin/python3")
    with Agent(tmp_path, events="process.exec", config=config, prefix=enter) as agent:
        pids = agent.pid, agent.helper_pid
        scores = [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in pids]
        nice = [os.getpriority(os.PRIO_PROCESS, pid) for pid in pids]
        with subprocess.Popen([*hogs, "-c", HOGS], stderr=subprocess.DEVNULL) as flood:
            deadline = time.monotonic() + seconds(60)
            while kills(scope) < KILLS and agent.process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            lived = agent.process.poll() is None
            end_others(scope, pids)
            flood.wait()
        if lived:
            agent.stop()
    assert lived == protected
    assert (scores, nice) == ([-900 if protected else 0] * 2, [-4] * 2)


def kills(scope: Scope) -> int:
    events = (scope.path / "memory.events").read_text().splitlines()
    return int(dict(line.split() for line in events)["oom_kill"])


def end_others(scope: Scope, but: tuple[int, int]) -> None:
    for pid in (scope.path / "cgroup.procs").read_text().split():
        if int(pid) not in but:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


OUTSIDER = """
import ctypes, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def tried(function):
    try:
        function()
    except OSError as error:
        return error.strerror
    return "done"
def trace(pid):
    if libc.ptrace(16, pid, None, None):  # PTRACE_ATTACH
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def take(pid):
    fd = os.pidfd_open(pid)
    if libc.syscall(438, fd, 3, 0) < 0:  # pidfd_getfd
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
print(json.dumps([{
    "trace": tried(lambda: trace(pid)),
    "take a descriptor": tried(lambda: take(pid)),
    "memory": tried(lambda: open(f"/proc/{pid}/mem")),
    "environment": tried(lambda: open(f"/proc/{pid}/environ").read()),
    "descriptors": tried(lambda: os.listdir(f"/proc/{pid}/fd")),
    "signal": tried(lambda: os.kill(pid, 0)),
} for pid in map(int, sys.argv[1:])]))
"""


def test_another_process_of_the_workers_user(scope: Scope, tmp_path: Path) -> None:
    """It can send signals to the worker, which is why that should have a user of its own."""
    with Agent(tmp_path, *scope.options, events="process.exec") as agent:
        pids = [str(agent.pid), str(agent.helper_pid)]
        command = ["/usr/bin/python3", "-c", OUTSIDER, *pids]
        done = subprocess.run(
            command, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, check=True
        )
        agent.stop()
    worker, helper = json.loads(done.stdout)
    denied = "Operation not permitted"
    assert (worker.pop("signal"), helper.pop("signal")) == ("done", denied)
    for found in (worker, helper):
        assert {found.pop("trace"), found.pop("take a descriptor")} == {denied}
        assert set(found.values()) == {"Permission denied"}


def test_a_crash_leaves_no_memory_in_a_file(scope: Scope, tmp_path: Path) -> None:
    """Even where every other process's would."""
    with Agent(
        tmp_path, *scope.options, events="process.exec", prefix=("prlimit", "--core=unlimited")
    ) as agent:
        limits = [Path(f"/proc/{pid}/limits").read_text() for pid in (agent.pid, agent.helper_pid)]
        agent.send(signal.SIGSEGV)
        ended = os.waitid(os.P_PID, agent.pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    assert (ended.si_code, ended.si_status) == (os.CLD_KILLED, signal.SIGSEGV)
    for text in limits:
        (line,) = (one for one in text.splitlines() if one.startswith("Max core file size"))
        assert line.split()[4:6] == ["0", "0"]
