"""What a user without privileges can do to the agent, and to what it tells. See also
docs/security_review.md.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from streamer.events.kinds import KINDS
from streamer.events.summaries import SUMMARIES
from tests.addresses import in_lines, in_text
from tests.conftest import Require
from tests.kernel import dns
from tests.kernel.agent import ROOT, Agent
from tests.kernel.bpf_maps import maps_of
from tests.kernel.hostile import attach, read_memory, seize, system_call
from tests.kernel.pace import repetitions, seconds
from tests.kernel.roles import Role, in_own_network
from tests.kernel.scope import Scope, checkpoint
from tests.kernel.system import OPENAT, open_missing
from tests.kernel.system import system_call as call
from tests.kernel.unprivileged import UID, become

pytestmark = pytest.mark.kernel

BPF_PROG_GET_FD_BY_ID, BPF_MAP_GET_FD_BY_ID = 13, 14
NOBODY = 65534

# ---------------------------------------------------------------- the two processes

AS_ITS_USER = {"signal", "kill", "nice", "affinity", "limits", "see its limits"}
"""What goes by the user alone."""


def attempts(pid: int, maps: list[int]) -> Mapping[str, Callable[[], object]]:
    """What could end or starve a process, or show what it holds."""
    proc = f"/proc/{pid}"
    tries: dict[str, Callable[[], object]] = {
        "signal": partial(os.kill, pid, 0),
        "kill": partial(os.kill, pid, 9),
        "nice": partial(os.setpriority, os.PRIO_PROCESS, pid, 19),
        "affinity": partial(os.sched_setaffinity, pid, {0}),
        "limits": partial(resource.prlimit, pid, resource.RLIMIT_AS, (4096, 4096)),
        "see its limits": partial(resource.prlimit, pid, resource.RLIMIT_AS),
        "oom score": partial(write, f"{proc}/oom_score_adj", b"1000"),
        "seize": partial(seize, pid),
        "attach": partial(attach, pid),
        "memory": partial(read_memory, pid),
        "its end of a pipe": partial(os.open, f"{proc}/fd/0", os.O_RDONLY),
        "a perf event": partial(perf_event, pid),
    }
    for name in ("mem", "environ", "maps", "stack", "auxv", "syscall"):
        tries[name] = partial(read, f"{proc}/{name}")
    for number in maps:
        attributes = ctypes.create_string_buffer(number.to_bytes(4, "little"), 128)
        get = partial(system_call, "bpf", BPF_MAP_GET_FD_BY_ID, attributes, 128)
        tries[f"map {number}"] = get
    return tries


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(1)


def write(path: str, data: bytes) -> None:
    with open(path, "wb", buffering=0) as file:
        file.write(data)


def perf_event(pid: int) -> None:
    """Count its system calls."""
    attributes = ctypes.create_string_buffer(b"\x01\0\0\0\x70\0\0\0\x08", 112)
    os.close(system_call("perf_event_open", attributes, pid, -1, -1, 0))


def try_all(uid: int, pids: list[int], maps: list[int]) -> dict[str, str]:
    """What became of each attempt, as that user."""
    become(uid)
    results = {}
    for pid in pids:
        for name, action in attempts(pid, maps).items():
            try:
                action()
                results[f"{name} of {pid}"] = "done"
            except OSError as error:
                results[f"{name} of {pid}"] = errno.errorcode[error.errno or 0]
    return results


def test_another_user_can_do_nothing_to_the_agent(scope: Scope, tmp_path: Path) -> None:
    """Neither end it nor slow it down, look into it, or take its maps."""
    with Agent(tmp_path, *scope.options, events="file.open") as agent:
        pids = [agent.pid, agent.helper_pid]
        maps = [one.id for one in maps_of(*pids)][:8]
        results = Role("attacker", try_all, UID, pids, maps).result()
        scope.act(open_missing, "/no/such-", 10)
        recording = agent.stop()
    assert len(maps) == 8
    wrong = {name: result for name, result in results.items() if result not in ("EPERM", "EACCES")}
    assert not wrong
    assert len(recording.of("file.open")) == 10


def test_who_is_nobody_too_can_end_the_worker_and_look_into_nothing(
    scope: Scope, tmp_path: Path
) -> None:
    """So `user` had better be one of its own: signals go by the user, and so do niceness and
    limits, which are not tried here, because they would be done.
    """
    with Agent(tmp_path, *scope.options, events="file.open") as agent:
        pids = [agent.pid, agent.helper_pid]
        results = Role("attacker", try_without_kill, NOBODY, pids).result()
        agent.stop()
    done = {name for name, result in results.items() if result == "done"}
    assert done == {f"signal of {pids[0]}"}


def try_without_kill(uid: int, pids: list[int]) -> dict[str, str]:
    become(uid)
    results = {}
    for pid in pids:
        for name, action in attempts(pid, []).items():
            if name in AS_ITS_USER and name != "signal":
                continue  # it would be done
            try:
                action()
                results[f"{name} of {pid}"] = "done"
            except OSError as error:
                results[f"{name} of {pid}"] = errno.errorcode[error.errno or 0]
    return results


# ---------------------------------------------------------------- what it tells


def change_while_opening(one: str, other: str, count: int) -> dict[str, tuple[int, int]]:
    """Open what some memory says, while another process changes it all the time, `count` times
    and until it was in time for both.

    How often each was opened, by inode, and how often the memory then said something else.
    """
    size = len(one) + 1
    shared = mmap.mmap(-1, mmap.PAGESIZE)
    memory = ctypes.c_char.from_buffer(shared)
    shared[:size] = one.encode() + b"\0"
    changer = os.fork()
    if changer == 0:
        while os.getppid() != 1:
            for path in (other, one) * 500:
                shared[:size] = path.encode() + b"\0"
        os._exit(0)
    names = {os.stat(path).st_ino: path for path in (one, other)}
    opened, differed = Counter[str](), Counter[str]()
    try:
        for done in itertools.count():
            if done >= count and all(differed[path] for path in (one, other)):
                break
            fd, _, _ = call(OPENAT, -100, ctypes.byref(memory), os.O_RDONLY, 0)
            shown = shared[: size - 1].decode()
            if fd < 0:  # it was read half changed
                continue
            path = names[os.fstat(fd).st_ino]
            opened[path] += 1
            differed[path] += shown != path
            os.close(fd)
    finally:
        os.kill(changer, signal.SIGKILL)
        os.waitpid(changer, 0)
    return {path: (opened[path], differed[path]) for path in (one, other)}


def as_user(function: Callable[..., Any], *arguments: Any) -> Any:
    become(UID)
    return function(*arguments)


def test_a_path_that_changes_in_memory_is_told_as_it_was_opened(
    scope: Scope, tmp_path: Path, open_directory: Path
) -> None:
    """Of what was opened path and inode are the kernel's, whatever the process shows afterwards."""
    paths = [str(open_directory / name) for name in ("shown", "asked")]
    for path in paths:
        Path(path).write_text("")
    count = repetitions(3000, 500)
    with Agent(tmp_path, *scope.options, events="file.open") as agent:
        did = scope.act(as_user, change_while_opening, *paths, count)
        recording = agent.stop()
    events = [
        event for event in recording.of("file.open") if event.path in paths and not event.errno
    ]
    inodes = {os.stat(path).st_ino: path for path in paths}
    assert all(event.path == inodes[event.inode] for event in events)
    assert Counter(event.path for event in events) == {path: did[path][0] for path in paths}


def every_kind(directory: str) -> None:
    """Something of each kind, for a while."""
    checkpoint()
    loop = "import os,time\nend=time.time()+3\nwhile time.time()<end: os.stat('/')\n"
    subprocess.run([sys.executable, "-c", loop], check=True)
    open_missing(f"{directory}/no-", 20)
    program = (
        "import socket;s=socket.create_server(('127.0.0.1',0));"
        "c=socket.create_connection(s.getsockname());p,_=s.accept();c.send(b'x');p.recv(1);"
        "u=socket.socket(socket.AF_INET,socket.SOCK_DGRAM);u.bind(('127.0.0.1',0));"
        "u.sendto(b'x',u.getsockname());u.recv(1)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    time.sleep(0.05)
    Role("asks", in_own_network, ask).result()


def ask() -> None:
    """A datagram that is dropped, and a DNS query with its response."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver,
    ):
        resolver.settimeout(seconds(10))
        client.sendto(b"x", ("127.0.0.1", 9))  # where nobody listens
        resolver.bind(("127.0.0.1", dns.PORT))
        client.sendto(dns.query(1, dns.question(b"a.test")), resolver.getsockname())
        asked, who = resolver.recvfrom(512)
        resolver.sendto(dns.response(asked), who)


@contextmanager
def kptr_restrict(value: str) -> Iterator[None]:
    """As a host has it that hides nothing from root."""
    setting = Path("/proc/sys/kernel/kptr_restrict")
    before = setting.read_text()
    setting.write_text(value)
    try:
        yield
    finally:
        setting.write_text(before)


def test_no_address_of_the_kernel_is_told(scope: Scope, tmp_path: Path) -> None:
    """By any kind, the stream's own records, the log, the note, or `check`: all that is said."""
    config = 'log_level = "debug"\nsummary_seconds = 1\nheartbeat_seconds = 1\n'
    config += '[kernel]\nsyscalls = ["*", "read", "nanosleep", "mmap"]\nsyscall_cgroups = 64\n'
    config += "syscall_slow_ms = 1\nopen_latency = true\nprofile_hz = 199\n"
    options = (*scope.options, "--interface", "lo")
    with kptr_restrict("0"), Agent(tmp_path, *options, events="*", config=config) as agent:
        with scope.start(every_kind, str(tmp_path)) as actor:
            actor.reached()
            actor.proceed()
            actor.result()
        recording = agent.stop(check=False)
        check = subprocess.run(
            [sys.executable, "-m", "streamer", "check", "--json", "--events", "*"],
            capture_output=True,
            cwd=ROOT,
            check=False,
        )
    kinds = {str(type(event).__struct_config__.tag) for event in recording.all}
    # Those of `net.retransmit` are looked through where some are made: test_tracepoint_net.py.
    assert kinds >= {*KINDS, *SUMMARIES, "stream.manifest", "stream.heartbeat"} - {"net.retransmit"}
    assert any(
        "[kernel]`" in frame for one in recording.of("profile.sample") for frame in one.frames
    )
    run = recording.manifest.run_id
    assert not in_lines(agent.output.read_bytes(), run)
    note = (tmp_path / "run.json").read_bytes().decode("utf-8", "replace")
    for text in (recording.stderr, note, check.stdout.decode(), check.stderr.decode()):
        assert not in_text(text.replace(run, ""))


# ---------------------------------------------------------------- what passes unseen

IO_URING_SETUP, IO_URING_ENTER = 425, 426
IORING_OP_OPENAT, IORING_ENTER_GETEVENTS, IORING_OFF_SQES = 18, 1, 0x10000000
AT_TAIL, AT_ARRAY, AT_CQES = 44, 64, 100
"""In struct io_uring_params: of the submissions, tail and array; where the completions are."""


def open_through_io_uring(path: str) -> int:
    """What the kernel gave for it: a descriptor, or less than 0; -ENOSYS without io_uring."""
    parameters = ctypes.create_string_buffer(120)
    ring, error, _ = call(IO_URING_SETUP, 4, parameters)
    if ring < 0:
        return -error
    tail, array, completions = (
        int.from_bytes(parameters.raw[at : at + 4], "little") for at in (AT_TAIL, AT_ARRAY, AT_CQES)
    )
    queues = mmap.mmap(ring, mmap.PAGESIZE)  # both, in one mapping, since 5.4
    entries = mmap.mmap(ring, 4 * 64, offset=IORING_OFF_SQES)
    name = ctypes.create_string_buffer(path.encode())
    entry = struct.pack(
        "<BBHiQQIIQ24x", IORING_OP_OPENAT, 0, 0, -100, 0, ctypes.addressof(name), 0, 0, 7
    )
    entries[:64] = entry
    queues[array : array + 4] = bytes(4)
    queues[tail : tail + 4] = (1).to_bytes(4, "little")
    done, error, _ = call(IO_URING_ENTER, ring, 1, 1, IORING_ENTER_GETEVENTS, None, 0)
    if done != 1:
        return -error
    mark, result = struct.unpack_from("<Qi", queues, completions)
    assert mark == 7
    return int(result)


def open_both_ways(directory: str) -> int:
    fd = open_through_io_uring(f"{directory}/unseen")
    open_missing(f"{directory}/seen-", 1)
    return fd


def test_an_open_through_io_uring_is_unseen_and_the_manifest_says_so(
    scope: Scope, tmp_path: Path, require_kernel: Require
) -> None:
    """Known, and not mended: a test that fails once it is."""
    (tmp_path / "unseen").write_text("")
    with Agent(tmp_path, *scope.options, events="file.open") as agent:
        fd = scope.act(open_both_ways, str(tmp_path))
        recording = agent.stop()
    require_kernel(fd not in (-errno.ENOSYS, -errno.EPERM), "this kernel has no io_uring for users")
    assert fd > 2
    paths = {event.path for event in recording.of("file.open")}
    assert f"{tmp_path}/seen-0" in paths
    assert f"{tmp_path}/unseen" not in paths
    assert "opens through io_uring" in recording.manifest.coverage["file.open"].unseen
