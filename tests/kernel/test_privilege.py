"""Two processes: what each has, what becomes of one without the other, files that are root's."""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from streamer.errors import KernelError
from streamer.kernel.cgroups import cgroup_root
from streamer.kernel.loader import Loader
from streamer.kernel.objects import SENSORS
from streamer.privilege.client import HelperClient, RemoteLoader
from streamer.privilege.split import start_helper
from tests.brokers import free_port
from tests.kernel.agent import ROOT, UNDELIVERED, Agent, Recording
from tests.kernel.pace import seconds
from tests.kernel.scope import Scope
from tests.kernel.system import open_missing

pytestmark = pytest.mark.kernel

NOBODY = 65534
BY_CPU = (5, 6, 10, 21)  # BPF_MAP_TYPE_PERCPU_HASH and so on
OPENS = 50
ALLOWED_TO_HELPER = 1 << 1 | 1 << 2 | 1 << 19 | 1 << 38 | 1 << 39
CAP_SYS_ADMIN = 1 << 21
PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
if int(PARANOID.read_text()) > 2:  # a level of Debian's, which some kernels let no other one pass
    ALLOWED_TO_HELPER |= CAP_SYS_ADMIN
CAP_NET_ADMIN = 1 << 12
ORPHANED = "streamer: the worker ended without a word; its programs are detached"
HAS_LANDLOCK = ctypes.CDLL(None).syscall(444, None, ctypes.c_long(0), ctypes.c_long(1)) > 0


def open_some(count: int = OPENS) -> None:
    open_missing("/no/", count)


def open_for(duration: float) -> int:
    """Open missing files until the time, in seconds, is over. How many."""
    deadline = time.monotonic() + duration
    for count in itertools.count():
        if time.monotonic() > deadline:
            return count
        open_missing(f"/no/{count}-", 1)
        time.sleep(0.0005)
    raise AssertionError


def functions_load() -> bool:
    """Whether programs at functions (fentry, fexit) load here."""
    loader = Loader()
    loader.load_core({"critical": 4096, "bulk": 4096}, None)
    loader.close()
    return not loader.no_functions


def status_of(task: Path) -> dict[str, str]:
    lines = (task / "status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines)


def await_end_of(pid: int) -> None:
    """Wait for a process that is not a child of this one."""
    deadline = time.monotonic() + seconds(20)
    while Path(f"/proc/{pid}/stat").exists():
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.02)


# ---------------------------------------------------------------- what each has


@pytest.mark.every_kernel
def test_what_the_worker_has(scope: Scope, tmp_path: Path) -> None:
    """Every thread of it, whatever the sinks: nobody's rights and a filter. And all goes on."""
    sinks = f"kafka://127.0.0.1:{free_port()}/events", f"mqtt://127.0.0.1:{free_port()}/events"
    config = "grace_seconds = 0.5\n"
    with Agent(tmp_path, *scope.options, config=config, sinks=sinks, events="file.open") as agent:
        scope.act(open_some)
        agent.wait_for(b'{"event":"file.open"', OPENS)
        statuses = []
        for task in Path(f"/proc/{agent.pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # threads come and go
                statuses.append(status_of(task))
        assert len(statuses) > 1
        for status in statuses:
            held = [status[f"Cap{name}"] for name in ("Eff", "Prm", "Inh", "Amb", "Bnd")]
            assert [int(value, 16) for value in held] == [0] * 5, status["Name"]
            assert status["Uid"].split() == status["Gid"].split() == [str(NOBODY)] * 4
            assert status["Groups"].split() == []
            assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2"), status["Name"]
        assert os.readlink(f"/proc/{agent.pid}/cwd") == "/"
        assert os.readlink(f"/proc/{agent.pid}/fd/0") == "/dev/null"
        assert os.stat(f"/proc/{agent.pid}/stat").st_uid == 0  # as of processes not dumpable
        scope.act(open_some)
        recording = agent.stop(check=False, code=UNDELIVERED)
    assert len(recording.events) == 2 * OPENS


@pytest.mark.every_kernel
@pytest.mark.parametrize("events", ["file.open", "net.udp", "net.dns"])
def test_what_the_helper_has(scope: Scope, tmp_path: Path, events: str) -> None:
    with Agent(tmp_path, *scope.options, events=events) as agent:
        directory = Path(f"/proc/{agent.helper_pid}")
        status = status_of(directory)
        links = [os.readlink(fd) for fd in (directory / "fd").iterdir()]
        agent.stop()
    # A program at a cgroup sees UDP sockets being closed where none at a function does, and DNS.
    at_cgroup = {"net.dns": True, "net.udp": not functions_load()}.get(events, False)
    cgroup = CAP_NET_ADMIN if at_cgroup and cgroup_root() else 0
    assert int(status["CapPrm"], 16) & ~(ALLOWED_TO_HELPER | cgroup) == 0
    assert int(status["CapPrm"], 16) & CAP_NET_ADMIN == cgroup
    assert [int(status[f"Cap{name}"], 16) for name in ("Inh", "Amb", "Bnd")] == [0] * 3
    assert (status["NoNewPrivs"], status["Seccomp"], status["Threads"]) == ("1", "2", "1")
    assert [link.startswith("socket:") for link in links].count(True) == 1
    assert links.count("/dev/null") == 2
    await_end_of(int(status["Pid"]))


def test_another_user(scope: Scope, tmp_path: Path) -> None:
    with Agent(tmp_path, *scope.options, config='user = "daemon"\n', events="file.open") as agent:
        status = status_of(Path(f"/proc/{agent.pid}"))
        agent.stop()
    assert status["Uid"].split() == ["1"] * 4


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ("nosuchuser", "user: found 'nosuchuser', allowed: a user of this system"),
        ("root", "user: found 'root', allowed: a user other than root"),
    ],
)
def test_a_user_that_cannot_be(tmp_path: Path, user: str, message: str) -> None:
    (tmp_path / "streamer.toml").write_text(f'user = "{user}"\n')
    command = [sys.executable, "-m", "streamer", "run", "-c", str(tmp_path / "streamer.toml")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds(60))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"streamer: {tmp_path}/streamer.toml: {message}\n"


def test_root_that_may_not_change_users(scope: Scope, tmp_path: Path) -> None:
    """As in a container with these two capabilities: it says so, and drops all the same."""
    bare = ("setpriv", "--bounding-set", "-all,+bpf,+perfmon", "--inh-caps=-all")
    with Agent(tmp_path, *scope.options, events="file.open", prefix=bare) as agent:
        worker, helper = status_of(Path(f"/proc/{agent.pid}")), agent.helper_pid
        held = int(status_of(Path(f"/proc/{helper}"))["CapPrm"], 16)
        scope.act(open_some)
        recording = agent.stop()
    assert worker["Uid"].split() == ["0"] * 4
    assert [int(worker[f"Cap{name}"], 16) for name in ("Eff", "Prm", "Inh", "Amb")] == [0] * 4
    assert (worker["NoNewPrivs"], worker["Seccomp"]) == ("1", "2")
    assert held == 1 << 38 | 1 << 39
    assert "without CAP_SETUID and CAP_SETGID the worker remains root's process" in agent.stderr
    assert len(recording.events) == OPENS


def test_a_user_with_two_capabilities(
    scope: Scope, open_directory: Path, public_copy: tuple[str, ...]
) -> None:
    """Without root: both processes are that user's, and the worker cannot touch the helper."""
    directory = open_directory / "users"
    directory.mkdir()
    os.chown(directory, NOBODY, NOBODY)
    who = ("--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups")
    both = "+bpf,+perfmon"
    prefix = ("setpriv", *who, "--inh-caps", both, "--ambient-caps", both)
    with Agent(
        directory,
        *scope.options,
        events="process.exec",
        prefix=prefix,
        python=os.path.realpath(sys.executable),  # the environment may be below /root
        program=public_copy,
    ) as agent:
        helper = agent.helper_pid
        statuses = [status_of(Path(f"/proc/{pid}")) for pid in (agent.pid, helper)]
        assert os.stat(f"/proc/{helper}/mem").st_uid == 0  # of a process that is not dumpable
        scope.act(subprocess.run, ["/bin/true"])
        agent.wait_for(b'{"event":"process.exec"')
        recording = agent.stop()
    assert [status["Uid"].split() for status in statuses] == [[str(NOBODY)] * 4] * 2
    assert [int(status["CapPrm"], 16) for status in statuses] == [0, 1 << 38 | 1 << 39]
    assert [status["Seccomp"] for status in statuses] == ["2", "2"]
    assert [event.exe for event in recording.events] == [os.path.realpath("/bin/true")]


def private_bytes(pid: int) -> int:
    """Memory that is a process's own."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


def test_memory(scope: Scope, tmp_path: Path) -> None:
    """What the second process costs, with everything loaded, and both together."""
    sinks = f"kafka://127.0.0.1:{free_port()}/events", f"mqtt://127.0.0.1:{free_port()}/events"
    config = "grace_seconds = 0.5\n"
    with Agent(tmp_path, *scope.options, config=config, sinks=sinks) as agent:
        scope.act(open_some)
        agent.wait_for(b'{"event":"file.open"', OPENS)
        worker, helper = private_bytes(agent.pid), private_bytes(agent.helper_pid)
        agent.stop(check=False, code=UNDELIVERED)
    assert helper < 15 << 20
    assert worker + helper < 150 << 20


# ---------------------------------------------------------------- life and death


def test_the_helper_is_killed(scope: Scope, tmp_path: Path) -> None:
    """What was produced until then is delivered and in the account; exit code 3 and why."""
    with Agent(tmp_path, *scope.options, events="file.open") as agent:
        helper = agent.helper_pid
        with scope.start(open_for, seconds(3)) as actor:
            agent.wait_for(b'{"event":"file.open"', OPENS)
            os.kill(helper, signal.SIGKILL)
            recording = agent.wait()
            opened = actor.result()
    assert recording.returncode == 3
    logged, last = recording.stderr.splitlines()[-2:]
    account = re.sub(r"^\S+Z info ", "", logged)
    assert last == (
        "streamer: the privileged helper was ended by SIGKILL: nothing is observed any more"
    )
    assert OPENS <= len(recording.events) < opened
    assert [event.path for event in recording.events] == [
        f"/no/{i}-0" for i in range(len(recording.events))
    ]
    Recording(agent.output.read_bytes(), account + "\n", 3).check()


def test_the_worker_is_killed(scope: Scope, tmp_path: Path) -> None:
    """The helper says so and ends, and what it held goes with it."""
    with Agent(tmp_path, *scope.options, events="file.open") as agent:
        helper = agent.helper_pid
        with scope.start(open_for, seconds(1)):
            agent.wait_for(b'{"event":"file.open"', OPENS)
            agent.send(signal.SIGKILL)
            agent.process.wait(seconds(10))
            await_end_of(helper)
    assert agent.stderr.splitlines()[-1] == ORPHANED


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_both(scope: Scope, tmp_path: Path, number: signal.Signals) -> None:
    """As a terminal or a service manager sends it: the worker decides, and nothing is lost."""
    with Agent(tmp_path, *scope.options, events="file.open") as agent:
        helper = agent.helper_pid
        scope.act(open_some)
        os.kill(helper, number)
        recording = agent.stop(number)
        await_end_of(helper)
    assert len(recording.events) == OPENS


def test_a_hangup_of_no_terminal_ends_neither(scope: Scope, tmp_path: Path) -> None:
    """A service manager sends it for files to be opened anew."""
    with Agent(tmp_path, *scope.options, events="file.open") as agent:
        for pid in (agent.helper_pid, agent.pid):
            os.kill(pid, signal.SIGHUP)
            os.kill(pid, signal.SIGHUP)
        scope.act(open_some)
        recording = agent.stop()
    assert len(recording.events) == OPENS


def test_an_end_without_draining(scope: Scope, tmp_path: Path) -> None:
    """Of a second signal the helper is told: it has nothing to complain about."""
    config = "grace_seconds = 60\n"
    sink = f"kafka://127.0.0.1:{free_port()}/events"
    with Agent(tmp_path, *scope.options, config=config, sinks=(sink,)) as agent:
        helper = agent.helper_pid
        agent.send(signal.SIGINT)
        time.sleep(0.5)
        agent.send(signal.SIGINT)
        assert agent.process.wait(seconds(20)) == 130
        await_end_of(helper)
    assert ORPHANED not in agent.stderr


# ---------------------------------------------------------------- the kernel through the helper


@pytest.fixture
def client() -> Iterator[HelperClient]:
    """The real helper, asked by this process."""
    made = start_helper()
    made.set_up([])
    yield made
    made.close()


def about(fd: int) -> dict[str, int]:
    """What the kernel says of a map: its type, the sizes of keys and values."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    pairs = (line.split(":\t") for line in lines if line.startswith("map_") or "_size" in line)
    return {name: int(value, 0) for name, value in pairs}


def test_maps_through_the_helper(client: HelperClient) -> None:
    """Every map can be asked for, whatever it is, and sizes are checked where it matters."""
    loader = RemoteLoader(client, [])
    maps = loader.load_core({"critical": 1 << 16, "bulk": 1 << 16}, None)
    assert maps.keys() >= {"critical", "bulk", "settings", "filter_pids", "counters"}
    sensors = [name for name in SENSORS if name != "core"]
    for sensor in sensors:
        loaded = loader.load(sensor, {"connections": 1024})
        assert {program.status for program in loaded.programs} <= {"loaded", "failed"}
        maps = loaded.maps | maps  # of two sensors' maps of one name the first is found
    read = 0
    for name, fd in maps.items():
        found = about(fd)
        size = found["value_size"]
        if found["map_type"] in BY_CPU:  # the kernel copies the values of all of them
            size = -(-size // 8) * 8 * loader.cpus
        with suppress(KernelError):  # elements too large for a message
            for key, value in loader.read(name):
                assert (len(key), len(value)) == (found["key_size"], size), name
                read += 1
        for wrong in {0, 1, size // loader.cpus, size + 1} - {size}:
            with pytest.raises(OSError, match=r"Invalid argument|bytes") as caught:
                loader.update(name, bytes(found["key_size"]), bytes(wrong))
            assert caught.value.errno == errno.EINVAL
    assert read > 10
    for sensor in sensors:
        loader.unload(sensor)


def test_elements_of_a_map(client: HelperClient) -> None:
    loader = RemoteLoader(client, [])
    loader.load_core({"critical": 1 << 16, "bulk": 1 << 16}, None)
    for number in (1, 2):
        loader.update("filter_pids", number.to_bytes(16, "little"), bytes([number]))
    assert sorted(loader.read("filter_pids")) == [
        (b"\1".ljust(16, b"\0"), b"\1"),
        (b"\2".ljust(16, b"\0"), b"\2"),
    ]
    loader.delete("filter_pids", b"\1".ljust(16, b"\0"))
    with pytest.raises(FileNotFoundError):
        loader.delete("filter_pids", b"\1".ljust(16, b"\0"))
    assert loader.read("filter_pids") == [(b"\2".ljust(16, b"\0"), b"\2")]


# ---------------------------------------------------------------- files of root's


def test_a_file_in_a_directory_of_roots(scope: Scope, tmp_path: Path) -> None:
    """Its mode is what the settings say, and it can be rotated while events come."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    output = private / "events.ndjson"
    opened = 0
    parts: list[bytes] = []
    with Agent(tmp_path, *scope.options, events="file.open", output=output) as agent:
        assert output.stat().st_mode & 0o7777 == 0o640
        with scope.start(open_for, seconds(3)) as actor:
            for number in range(1, 6):
                agent.wait_for(b'{"event":"file.open"', 20)
                rotated = private / f"events.{number}"
                output.rename(rotated)
                agent.send(signal.SIGUSR1)
                agent.wait_for(b'{"event":"file.open"')
                parts.append(rotated.read_bytes())
            opened = actor.result()
        recording = agent.stop(check=False)
    for part in parts:
        assert part.endswith(b"\n")
    whole = Recording(b"".join(parts) + output.read_bytes(), recording.stderr, 0)
    whole.check()
    assert [event.path for event in whole.events] == [f"/no/{i}-0" for i in range(opened)]


def test_a_file_below_the_directory_that_it_was_started_in(tmp_path: Path) -> None:
    """The process that asks for it is in another one by then."""
    command = [sys.executable, "-m", "streamer", "run", "--no-status", "--comm", "nobody"]
    command += ["--duration", "1s", "--sink", "file:./events"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert b'"event":"stream.heartbeat"' in (tmp_path / "events").read_bytes()


def test_a_signal_to_open_anew_without_files(scope: Scope) -> None:
    """Standard output has nothing to open anew, and goes on."""
    command = [sys.executable, "-m", "streamer", "run", "--no-status", "--events", "file.open"]
    with subprocess.Popen(
        [*command, *scope.options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert b"stream.manifest" in process.stdout.readline()
        os.kill(process.pid, signal.SIGUSR1)
        scope.act(open_some, 3)
        process.terminate()
        assert process.stdout.read().count(b'"file.open"') > 3  # its heartbeat counts them too
        assert process.wait(seconds(20)) == 0


# ---------------------------------------------------------------- below a directory of root's


@pytest.mark.parametrize("sink", ["file", "kafka", "kafkas", "mqtt", "mqtts"])
def test_code_that_only_root_can_read(
    scope: Scope, tmp_path: Path, private_copy: tuple[str, ...], sink: str
) -> None:
    """Whatever the sink, and although its broker is not there."""
    url = f"{sink}://localhost:{free_port()}/events"
    config = "grace_seconds = 0.5\n"
    with Agent(
        tmp_path,
        *scope.options,
        config=config,
        events="file.open",
        sinks=(url,) if sink != "file" else (),
        program=private_copy,
    ) as agent:
        scope.act(open_some)
        agent.wait_for(b'{"event":"file.open"', OPENS)
        recording = agent.stop(check=False, code=UNDELIVERED if sink != "file" else 0)
    assert len(recording.events) == OPENS
    unexpected = [
        line
        for line in recording.stderr.splitlines()
        if not re.match(r"  |(\S+Z (info|warning) )?streamer: ", line)
    ]  # fmt: skip
    assert not unexpected
    assert "Traceback" not in recording.stderr


# ---------------------------------------------------------------- taken over


@pytest.fixture
def other_process() -> Iterator[int]:
    """A process of the worker's own user, which has nothing to do with it."""
    with subprocess.Popen(["sleep", "120"], user=NOBODY, group=NOBODY, extra_groups=[]) as process:
        yield process.pid
        process.kill()


EACCES = ("read root's", "read shadow", "helper's descriptors")
LANDLOCKED = (
    *("write everybody's", "append everybody's"),
    *("read same's memory", "write same's memory", "environment of same"),
)
ELSEWHERE = ("memory", "environment")


def expected_of(attempt: str) -> set[str]:
    """What an attempt has to end with."""
    if attempt in ("helper: alive", "read the configuration"):
        return {"done"}
    if attempt.startswith("helper: "):
        return {"Refused"}
    if attempt in ("read the sink's target", "write the configuration"):
        return {"EBADF"}
    if attempt == "cut the configuration":
        return {"EINVAL"}
    if attempt == "where it was started":
        return {"ENOENT"}
    if attempt == "clone3":
        return {"ENOSYS"}
    if attempt in LANDLOCKED:
        return {"EACCES"} if HAS_LANDLOCK else {"EACCES", "done"}
    paths = ("read helper", "read parent", "write helper", "write parent", "environment of")
    return {"EACCES"} if attempt in EACCES or attempt.startswith(paths) else {"EPERM"}


@pytest.mark.every_kernel
def test_a_worker_that_was_taken_over(
    scope: Scope, tmp_path: Path, open_directory: Path, other_process: int
) -> None:
    """Nothing that it tries succeeds, and the helper is still there for what is in order."""
    secret, public = open_directory / "secret", open_directory / "public"
    secret.write_text("root's")
    secret.chmod(0o600)
    public.write_text("everybody's")
    public.chmod(0o666)
    reading, writing = os.pipe()
    parameters: dict[str, Any] = {
        "secret": str(secret),
        "public": str(public),
        "new": str(open_directory / "new"),
        "directory": str(open_directory),
        "parent": os.getpid(),
        "same": other_process,
    }
    hostile = ("-m", "tests.kernel.hostile", str(writing), json.dumps(parameters))
    with Agent(
        tmp_path, *scope.options, events="file.open", program=hostile, pass_fds=(writing,)
    ) as agent:
        os.close(writing)
        scope.act(open_some)
        with os.fdopen(reading, "rb") as report:
            results: dict[str, str] = json.loads(report.readline())
        agent.wait_for(b'{"event":"file.open"', OPENS)
        recording = agent.stop()
    wrong = {
        name: result for name, result in results.items() if result not in expected_of(name)
    }  # fmt: skip
    assert not wrong
    assert len(results) > 80
    assert public.read_text() == "everybody's"
    assert not (open_directory / "new").exists()
    assert len(recording.events) == OPENS
