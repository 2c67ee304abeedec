"""Filters in the kernel: what passes, and how many did not."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import free_port
from tests.conftest import Require
from tests.kernel.agent import TCP_KINDS, Agent, Recording
from tests.kernel.roles import Role, in_own_network
from tests.kernel.scope import Scope, cgroup_mount, checkpoint
from tests.kernel.system import open_missing

pytestmark = pytest.mark.kernel

# Of this run alone: another on the same machine must not be taken for it.
UID = 1_000_000 + os.getpid()
COMM = f"test-{os.getpid()}"
EACH = 25
CLONE_NEWNS = 0x00020000


@pytest.fixture
def other_scope(require: Require) -> Iterator[Scope]:
    mount = cgroup_mount()
    require(mount is not None, "no cgroup v2 hierarchy is mounted")
    assert mount is not None
    with Scope(mount) as made:
        yield made


def become(uid: int) -> None:
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def open_as(prefix: str, uid: int) -> None:
    become(uid)
    open_missing(prefix, EACH)


def connect_on(port: int, count: int) -> None:
    """Connect to ourselves at that port: twice two ends each time."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        for _ in range(count):
            with socket.create_connection(("127.0.0.1", port)):
                listener.accept()[0].close()


# ---------------------------------------------------------------- leaving out


def do_what_is_left_out(base: str, comm: str, uid: int, port: int) -> None:
    """By name, by user, by path, by port."""
    Role(comm, open_missing, f"{base}/comm/", EACH).result()
    Role("other", open_as, f"{base}/uid/", uid).result()
    open_missing(f"{base}/left/out/", EACH)
    open_missing(f"{base}/left/outer/", EACH)  # kept: the prefix ends in a slash
    connect_on(port, EACH)


def open_when_told(base: str) -> None:
    checkpoint()
    open_missing(f"{base}/pid/", EACH)
    checkpoint()


def open_here(base: str) -> None:
    open_missing(base, EACH)


def test_what_is_left_out_is_counted(scope: Scope, other_scope: Scope, tmp_path: Path) -> None:
    """Exactly: with nothing but exclusions, nobody else's events are kept back."""
    base, port = str(tmp_path), free_port()
    with scope.start(open_when_told, base) as by_pid:
        by_pid.reached()
        exclusions = (
            *("--exclude-pid", str(by_pid.pid)),
            *("--exclude-uid", str(UID)),
            *("--exclude-comm", COMM),
            *("--exclude-cgroup", str(other_scope.path)),
            *("--exclude-port", str(port)),
            *("--exclude-path", f"{base}/left/out/"),
        )
        with Agent(tmp_path / "agent", *exclusions, events=f"file.*,{TCP_KINDS}") as agent:
            by_pid.proceed()
            by_pid.reached()
            scope.act(in_own_network, do_what_is_left_out, base, COMM, UID, port)
            other_scope.act(open_here, f"{base}/cgroup/")
            recording = agent.stop()
            agent.output.unlink()  # it holds what others on this machine did
        by_pid.proceed()
        by_pid.result()
    assert recording.filtered("file.open") == 5 * EACH  # pid, uid, comm, cgroup, path
    assert recording.filtered("net.connect") == EACH
    assert recording.filtered("net.accept") == EACH
    assert recording.filtered("net.close") == 2 * EACH
    mine = [event.path for event in recording.of("file.open") if event.path.startswith(base)]
    kept = [path for path in mine if not path.startswith(f"{base}/agent")]
    assert kept == [f"{base}/left/outer/{i}" for i in range(EACH)]
    assert not [event for event in net_events(recording) if port in ports_of(event)]


def net_events(recording: Recording) -> list[Any]:
    return [event for event in recording.events if hasattr(event, "local_port")]


def ports_of(event: Any) -> tuple[int, int]:
    return event.local_port, event.remote_port


# ---------------------------------------------------------------- keeping


def do_everything(base: str, name: str, user: int, kept: int, others: int) -> None:
    """Every combination of name, user, path and port, of which one passes all filters."""
    for comm in (name, "other"):
        for uid in (user, user + 1):
            for place in ("kept/", "kept/secret/", "elsewhere/"):
                Role(comm, open_as, f"{base}/{place}{comm}-{uid}-", uid).result()
            for port in (kept, others):
                Role(comm, connect_as, port, uid).result()


def connect_as(port: int, uid: int) -> None:
    become(uid)
    connect_on(port, EACH)


def test_what_is_kept_passes_every_filter(
    scope: Scope, other_scope: Scope, open_directory: Path, tmp_path: Path
) -> None:
    """Filters of several sorts must all let an event pass; of one sort, one entry is enough."""
    base, kept, others = str(open_directory), free_port(), free_port()
    filters = (
        *scope.options,
        *("--uid", str(UID), "--uid", str(UID + 2)),
        *("--comm", COMM, "--comm", "nobody"),
        *("--port", str(kept)),
        *("--path", f"{base}/kept", "--exclude-path", f"{base}/kept/secret"),
    )
    with Agent(tmp_path / "agent", *filters, events=f"file.*,{TCP_KINDS}") as agent:
        scope.act(in_own_network, do_everything, base, COMM, UID, kept, others)
        other_scope.act(in_own_network, do_everything, base, COMM, UID, kept, others)
        recording = agent.stop()
    opened = [event.path for event in recording.of("file.open")]
    assert opened == [f"{base}/kept/{COMM}-{UID}-{i}" for i in range(EACH)]
    assert {(e.comm, e.uid, e.cgroup_id) for e in recording.events} == {(COMM, UID, scope.id)}
    assert Counter(type(event).__name__ for event in net_events(recording)) == {
        "NetConnect": EACH,
        "NetAccept": EACH,
        "NetClose": 2 * EACH,
    }
    assert all(kept in ports_of(event) for event in net_events(recording))
    # In the other cgroup all; here, the uid or the name of some, the path or the port of others.
    assert recording.filtered("file.open") >= 12 * EACH + 11 * EACH


def run_as_told(base: str) -> None:
    checkpoint()
    Role("child", open_missing, f"{base}/child/", EACH).result()
    open_missing(f"{base}/own/", EACH)


def test_one_process_alone(scope: Scope, tmp_path: Path) -> None:
    """`--pid` keeps a process and not its children, and of its children the fork."""
    with scope.start(run_as_told, str(tmp_path)) as actor:
        actor.reached()
        with Agent(tmp_path / "agent", "--pid", str(actor.pid)) as agent:
            actor.proceed()
            actor.result()
            recording = agent.stop()
    assert {event.pid for event in recording.events} == {actor.pid}
    assert len(recording.of("process.fork")) == 1
    own = [event.path for event in recording.of("file.open") if event.path.startswith("/tmp")]
    found = [path for path in own if path.startswith(f"{tmp_path}/")]
    assert found == [f"{tmp_path}/own/{i}" for i in range(EACH)]


def open_around(base: str) -> None:
    for place in ("a/x", "a/b/x", "a/b/c/x", "z/x"):
        open_missing(f"{base}/{place}", 1)


@pytest.mark.parametrize(
    ("keep", "leave_out", "expected"),
    [
        (["a"], [], ["a/x", "a/b/x", "a/b/c/x"]),
        (["a", "z"], ["a/b"], ["a/x", "z/x"]),
        (["a/b/c"], ["a/b"], []),
        ([], ["a/b"], ["a/x", "z/x"]),
    ],
)
def test_path_prefixes_within_each_other(
    scope: Scope, tmp_path: Path, keep: list[str], leave_out: list[str], expected: list[str]
) -> None:
    """What is left out is left out, however much longer a prefix to keep is."""
    base = str(tmp_path)
    filters = [word for prefix in keep for word in ("--path", f"{base}/{prefix}")]
    filters += [word for prefix in leave_out for word in ("--exclude-path", f"{base}/{prefix}")]
    with Agent(tmp_path / "agent", *scope.options, *filters, events="file.open") as agent:
        scope.act(open_around, base)
        recording = agent.stop()
    assert [event.path for event in recording.events] == [f"{base}/{p}0" for p in expected]


def run_subject(program: str, others: int) -> None:
    subprocess.run([program], check=False)
    for _ in range(others):
        subprocess.run(["/bin/true"], check=True)


def test_what_an_executable_does(scope: Scope, subject: Path, tmp_path: Path) -> None:
    """From its exec to its exit, at which kernels before 6.16 have let go of the file."""
    filters = (*scope.options, "--exe", str(subject))
    with Agent(tmp_path, *filters, events="process.*") as agent:
        scope.act(run_subject, str(subject), 2)
        recording = agent.stop()
    (started,) = recording.of("process.exec")
    ends = [event for event in recording.of("process.exit") if event.pid == started.pid]
    assert started.comm == subject.name
    assert [event.exit_code for event in ends] == [1]


LAYERS = """
mount -t tmpfs none {base}
mkdir {base}/lower {base}/upper {base}/work {base}/whole
mount -t tmpfs none {base}/lower
cp {program} {base}/lower/program
layers=lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work
mount -t overlay -o $layers none {base}/whole
"""


def run_from_layers(program: str, base: str) -> None:
    """In a mount namespace of our own, whose number is that of the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNS) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    script = LAYERS.format(program=program, base=base)
    subprocess.run(["sh", "-ec", script], check=True)
    checkpoint(os.getpid())
    subprocess.run([f"{base}/whole/program"], check=False)
    subprocess.run(["/bin/true"], check=True)


def test_an_executable_of_an_overlay(scope: Scope, subject: Path, tmp_path: Path) -> None:
    """There stat() shows another device than the kernel has for the file."""
    base = tmp_path / "base"
    base.mkdir()
    with scope.start(run_from_layers, str(subject), str(base)) as actor:
        pid = actor.reached()
        filters = (*scope.options, "--exe", f"{base}/whole/program")
        prefix = ("nsenter", f"--mount=/proc/{pid}/ns/mnt")
        with Agent(tmp_path / "agent", *filters, events="process.exec", prefix=prefix) as agent:
            actor.proceed()
            actor.result()
            recording = agent.stop()
    assert [event.exe for event in recording.events] == [f"{base}/whole/program"]
