"""Does a few things of every kind on the kernel that runs, and compares what the agent saw.

    python tests/vm/smoke.py

Prints one line of JSON: the kernel, what `streamer check` says of it, how many events of each
kind were compared, and in `wrong` every difference between what was done and what was recorded.
Exit 0 when there is none. Needs root and nothing but the packages of streamer itself, so that it
runs in a virtual machine on a kernel of its own: see tools/kernels.sh.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
STREAMER = [sys.executable, "-m", "streamer"]
LINE_LEN = 4096  # of the arguments, in `cmdline`
SECONDS = 120  # an emulated machine is slow
AT_FDCWD = -100
KINDS = "process.*,file.*,net.connect,net.accept,net.close"
OPEN = {"x86_64": 2}.get(platform.machine())  # newer architectures do without
OPENAT = {"x86_64": 257, "aarch64": 56}[platform.machine()]
OPENAT2 = 437
# Latencies of opens are kept with the task, since 5.11.
LATENCIES = b"BPF_FUNC_task_storage_get" in Path("/sys/kernel/btf/vmlinux").read_bytes()
REQUEST, ANSWER = b"q" * 1234, b"a" * 56_789

Event = dict[str, Any]
Expected = dict[str, list[Event]]


class Doer:
    """Does things, and keeps what the events about them are to say."""

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)
        self.expected: Expected = {}
        self.children: set[int] = set()
        self._any: Event = {"uid": os.getuid(), "gid": os.getgid(), "truncated": [], "weight": 1}
        self._any |= {"incomplete": False, "pidns": os.stat("/proc/self/ns/pid").st_ino}
        self._me = self._any | {"pid": os.getpid(), "tid": os.getpid(), "ppid": os.getppid()}
        self._me |= {"comm": _comm(), "ns_pid": os.getpid()}

    def _expect(self, kind: str, fields: Event) -> None:
        self.expected.setdefault(kind, []).append(fields)

    # ------------------------------------------------------------ processes

    def execute(self, argv: list[str]) -> None:
        """Run a program in the directory: a fork, an exec and an exit."""
        os.chdir(self.directory)
        pid = os.posix_spawn(argv[0], argv, {})
        status = os.waitpid(pid, 0)[1]
        self.children.add(pid)
        self._expect("process.fork", self._me | {"child_pid": pid})
        child = self._any | {"pid": pid, "tid": pid, "ppid": os.getpid(), "ns_pid": pid}
        child |= {"comm": os.path.basename(argv[0])}
        self._expect("process.exec", child | self._execution(argv))
        self._expect("process.exit", child | _end(status))

    def _execution(self, argv: list[str]) -> Event:
        area = b"".join(argument.encode() + b"\0" for argument in argv)
        line = area[:LINE_LEN].decode(errors="ignore")
        return {
            "exe": os.path.realpath(argv[0]),
            "filename": argv[0],
            "interp": "",
            "argv": argv,
            "argc": len(argv),
            "cmdline": line.removesuffix("\0").replace("\0", " "),
            "truncated": ["cmdline"] if len(area) > LINE_LEN else [],
            "cwd": self.directory,
            "parent_comm": _comm(),
            "parent_exe": os.readlink("/proc/self/exe"),
            "euid": os.geteuid(),
            "auid": _auid(),
            "cgroup_id": _cgroup_id(),
            "exe_mntns_initial": True,
            "exe_deleted": False,
            "exe_memfd": False,
        }

    # ------------------------------------------------------------ files

    def open_files(self) -> None:
        """By each call: a file that is there, one that is not, one that is made; and no name."""
        os.chdir(self.directory)
        os.mknod("there")
        dirfd = os.open(".", os.O_DIRECTORY)
        flags = os.O_DIRECTORY | os.O_CLOEXEC  # which Python adds
        directory = {"path": self.directory, "flags": flags, "mode": 0, "fd": dirfd, "errno": 0}
        self._expect("file.open", self._me | directory)
        for name, flags, mode in (
            ("there", os.O_RDONLY, 0),
            ("absent", os.O_RDWR, 0),
            ("made", os.O_WRONLY | os.O_CREAT, 0o640),
        ):
            if OPEN is not None:
                self._open(name, flags, mode, OPEN, name.encode(), flags, mode)
            self._open(name, flags, mode, OPENAT, AT_FDCWD, name.encode(), flags, mode)
            self._open(name, flags, mode, OPENAT, dirfd, name.encode(), flags, mode)
            whole = f"{self.directory}/{name}".encode()
            self._open(name, flags, mode, OPENAT, dirfd, whole, flags, mode)
            how = (ctypes.c_uint64 * 3)(flags, mode, 0)
            size = ctypes.sizeof(how)
            self._open(name, flags, mode, OPENAT2, dirfd, name.encode(), how, size)
        self._syscall(OPENAT, dirfd, b"", 0, 0)  # no name at all
        nothing = directory | {"flags": 0, "fd": -1, "errno": errno.ENOENT}
        self._expect("file.open", self._me | nothing)
        os.close(dirfd)

    def _open(self, name: str, flags: int, mode: int, *call: Any) -> None:
        result = self._syscall(*call)
        error = ctypes.get_errno() if result < 0 else 0
        path = f"{self.directory}/{name}"
        fields = {"path": path, "flags": flags, "mode": mode, "fd": result, "errno": error}
        self._expect("file.open", self._me | fields)
        if result >= 0:
            os.close(result)

    @staticmethod
    def _syscall(*call: Any) -> int:
        words = [ctypes.c_long(word) if isinstance(word, int) else word for word in call]
        libc = ctypes.CDLL(None, use_errno=True)
        return int(libc.syscall(*words))

    # ------------------------------------------------------------ connections

    def connect(self, family: socket.AddressFamily, address: str) -> None:
        """A connection to this very process, with bytes each way, closed by the client."""
        with socket.create_server((address, 0), family=family) as server:
            client = socket.create_connection(server.getsockname()[:2])
            accepted, _ = server.accept()
            near, far = client.getsockname()[:2], accepted.getsockname()[:2]
            fd = accepted.fileno()
            _exchange(client, accepted)
        self._expect("net.connect", self._socket(near, far, family, "outbound") | {"errno": 0})
        self._expect("net.accept", self._socket(far, near, family, "inbound") | {"fd": fd})
        sent = {"bytes_sent": len(REQUEST), "bytes_received": len(ANSWER), "errno": 0}
        got = {"bytes_sent": len(ANSWER), "bytes_received": len(REQUEST), "errno": 0}
        self._expect("net.close", self._socket(near, far, family, "outbound") | sent)
        self._expect("net.close", self._socket(far, near, family, "inbound") | got)

    def be_refused(self, family: socket.AddressFamily, address: str) -> None:
        """A connection to a port that nobody listens at."""
        with socket.socket(family) as bound, socket.socket(family) as client:
            bound.bind((address, 0))  # not listening, so nobody else gets the port either
            client.bind((address, 0))
            near, far = client.getsockname()[:2], bound.getsockname()[:2]
            error = client.connect_ex(far)
        fields = self._socket(near, far, family, "outbound") | {"errno": error}
        self._expect("net.connect", fields)

    def _socket(
        self, local: tuple[str, int], remote: tuple[str, int], family: int, direction: str
    ) -> Event:
        return self._me | {
            "local_addr": local[0],
            "local_port": local[1],
            "remote_addr": remote[0],
            "remote_port": remote[1],
            "owner_known": True,
            "ip_version": 4 if family == socket.AF_INET else 6,
            "direction": direction,
            "netns": os.stat("/proc/self/ns/net").st_ino,
        }


def _exchange(client: socket.socket, accepted: socket.socket) -> None:
    client.sendall(REQUEST)
    accepted.recv(len(REQUEST), socket.MSG_WAITALL)
    accepted.sendall(ANSWER)
    client.recv(len(ANSWER), socket.MSG_WAITALL)
    client.close()
    assert accepted.recv(1) == b""  # its end came
    accepted.close()


def _comm() -> str:
    return Path("/proc/self/comm").read_text().removesuffix("\n")


def _auid() -> int:
    kept = Path("/proc/self/loginuid")
    return int(kept.read_text()) if kept.exists() else 0xFFFFFFFF


def _cgroup_id() -> int:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    inside = next(line.split(":", 2)[2] for line in lines if line.startswith("0::"))
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    (mount, *_) = [place for _, place, kind, *_ in mounts if kind == "cgroup2"]
    return os.stat(f"{mount}/{inside}").st_ino


def _end(status: int) -> Event:
    return {
        "exit_code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0,
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        "core_dumped": os.WCOREDUMP(status),
    }


def do_all(directory: Path) -> Doer:
    """Everything, once."""
    doer = Doer(directory)
    doer.execute(["/bin/true"])
    doer.execute(["/bin/true", "", "two words", "ünï©ode", "x" * 7000])
    doer.execute(["/bin/sh", "-c", "exit 7"])
    doer.execute(["/bin/sh", "-c", "kill -TERM $$"])
    doer.execute(["/bin/sh", "-c", "kill -KILL $$"])
    doer.open_files()
    doer.connect(socket.AF_INET, "127.0.0.1")
    doer.connect(socket.AF_INET6, "::1")
    doer.be_refused(socket.AF_INET, "127.0.0.1")
    doer.be_refused(socket.AF_INET6, "::1")
    return doer


# ---------------------------------------------------------------- what the agent says


def check() -> Event:
    """`streamer check --json`, for every kind."""
    command = [*STREAMER, "check", "--json", "--events", KINDS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=SECONDS)
    if not done.stdout:
        raise SystemExit(f"streamer check: {done.stderr.decode()}")
    found: Event = json.loads(done.stdout)
    return found


def record(directory: Path) -> tuple[Doer, list[Event], str]:
    """What was done, every event of the machine meanwhile, and the line the agent ended with."""
    output = directory / "events.ndjson"
    done_in = directory / "done in here"
    done_in.mkdir()
    config = directory / "streamer.toml"
    config.write_text("[kernel]\nopen_latency = true\n")
    command = [*STREAMER, "run", "--events", KINDS, "--no-status", "--sink", f"file:{output}"]
    command += ["--config", str(config)]
    with (directory / "stderr").open("w+") as stderr:
        agent = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=stderr)
        try:
            _wait_for_manifest(agent, output, Path(stderr.name))
            doer = do_all(done_in)
            time.sleep(1)
            agent.send_signal(signal.SIGTERM)
            agent.wait(SECONDS)
        finally:
            agent.kill()
            agent.wait()
        stderr.seek(0)
        account = stderr.read().splitlines()[-1]
    return doer, [json.loads(line) for line in output.read_bytes().splitlines()], account


def _wait_for_manifest(agent: subprocess.Popen[bytes], output: Path, stderr: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not output.exists() or b'"stream.manifest"' not in output.read_bytes():
        if agent.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"streamer run did not start: {stderr.read_text()}")
        time.sleep(0.1)


def mine(doer: Doer, events: Iterable[Event]) -> Expected:
    """The events about what was done, by kind; Python's own opens are not among them."""
    pids = doer.children | {os.getpid()}
    found: Expected = {kind: [] for kind in doer.expected}
    for event in events:
        if event.get("pid") not in pids:
            continue
        if event["event"] == "file.open" and not event["path"].startswith(doer.directory):
            continue
        found.setdefault(event["event"], []).append(event)
    return found


def differences(expected: Expected, found: Expected) -> list[str]:
    """Expected and found events are to be the same, whatever their order, in the fields given."""
    wrong = []
    for kind, events in sorted(found.items()):
        fields = {name for event in expected.get(kind, []) for name in event}
        want = Counter(_line(event, fields) for event in expected.get(kind, []))
        have = Counter(_line(event, fields) for event in events)
        wrong += [f"{kind}: not recorded: {line}" for line in (want - have).elements()]
        wrong += [f"{kind}: not done: {line}" for line in (have - want).elements()]
    return wrong


def _line(event: Event, fields: Iterable[str]) -> str:
    return json.dumps({name: event.get(name) for name in sorted(fields)}, ensure_ascii=False)


def implausible(events: Iterable[Event], before_ns: int, after_ns: int) -> list[str]:
    """Times that cannot be: outside the run, or durations beyond it."""
    wrong = []
    for event in events:
        times = {name: value for name, value in event.items() if name.endswith("time_ns")}
        wrong += [
            f"{event['event']}: {name} is {value}, outside {before_ns} to {after_ns}"
            for name, value in times.items()
            if not before_ns <= value <= after_ns
        ]
        lasts = {name: event[name] for name in ("latency_ns", "duration_ns") if name in event}
        if not LATENCIES and lasts.get("latency_ns") == 0 and event["event"] == "file.open":
            del lasts["latency_ns"]
        wrong += [
            f"{event['event']}: {name} is {value}"
            for name, value in lasts.items()
            if not 0 < value <= after_ns - before_ns
        ]
    return wrong


def other_starts(events: Iterable[Event]) -> list[str]:
    """A process started once: every event of it, and its parent's fork, must say the same."""
    starts: dict[int, set[int]] = {}
    for event in events:
        starts.setdefault(event["pid"], set()).add(event["start_boot_ns"])
        if event["event"] == "process.fork":
            starts.setdefault(event["child_pid"], set()).add(event["child_start_boot_ns"])
    return [f"{pid} has started at {sorted(when)}" for pid, when in starts.items() if len(when) > 1]


def main() -> int:
    checked = check()
    with tempfile.TemporaryDirectory() as name:
        before_ns = time.time_ns()
        doer, events, account = record(Path(name).resolve())
        after_ns = time.time_ns()
    found = mine(doer, events)
    wrong = differences(doer.expected, found)
    events_found = [event for of_kind in found.values() for event in of_kind]
    wrong += implausible(events_found, before_ns, after_ns)
    wrong += other_starts(events_found)
    wrong += [f"stream.loss: {event}" for event in events if event["event"] == "stream.loss"]
    wrong += [
        f"check: {kind} is {state['status']}: {state['reason']}"
        for kind, state in checked["kinds"].items()
        if state["status"] != "full"
    ]
    result = {
        "kernel": checked["kernel"],
        "ok": not wrong,
        "attached": sum(bool(hook["used"]) for hook in checked["hooks"]),
        "compared": {kind: len(of_kind) for kind, of_kind in sorted(doer.expected.items())},
        "account": account,
        "wrong": wrong,
    }
    print(json.dumps(result, ensure_ascii=False))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
