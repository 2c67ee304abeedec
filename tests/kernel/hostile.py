"""The agent, taken over: `python -m tests.kernel.hostile REPORT PARAMETERS ARGUMENTS...`.

Once it streams, code that means harm runs inside the worker, as an exploited defect would let
it, and tries everything. What became of each attempt is written to the descriptor REPORT as
JSON: "done", or the name of the error. Then the agent goes on with what it was doing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import platform
import random
import socket
import struct
import sys
import termios
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from streamer import cli
from streamer.agent.service import Service
from streamer.events.batch import Batch

_SYSTEM_CALLS: Mapping[str, Mapping[str, int]] = {
    "x86_64": {
        "ptrace": 101,
        "process_vm_readv": 310,
        "perf_event_open": 298,
        "bpf": 321,
        "unshare": 272,
        "setns": 308,
        "keyctl": 250,
        "tkill": 200,
        "init_module": 175,
    },
    "aarch64": {
        "ptrace": 117,
        "process_vm_readv": 270,
        "perf_event_open": 241,
        "bpf": 280,
        "unshare": 97,
        "setns": 268,
        "keyctl": 219,
        "tkill": 130,
        "init_module": 105,
    },
}
NUMBERS = {
    **_SYSTEM_CALLS[platform.machine()],
    "io_uring_setup": 425,
    "pidfd_open": 434,
    "clone3": 435,
    "openat2": 437,
}
PTRACE_SEIZE, PTRACE_ATTACH = 0x4206, 16
BPF_MAP_CREATE, BPF_PROG_LOAD = 0, 5
CLONE_NEWUSER = 0x10000000
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38
CAPABILITY_VERSION_3 = 0x20080522
SO_ATTACH_FILTER = 26
NETLINK_AUDIT = 9


def system_call(name: str, *arguments: Any) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result: int = libc.syscall(ctypes.c_long(NUMBERS[name]), *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


class Attempts:
    """What is tried. `parameters`: paths and pids that the test has prepared."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self.p = parameters
        self.results: dict[str, str] = {}

    def attempt(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
            self.results[name] = "done"
        except OSError as error:
            self.results[name] = errno.errorcode.get(error.errno or 0, str(error))
        except Exception as error:
            self.results[name] = type(error).__name__

    def run(self) -> dict[str, str]:
        for group in (self.files, self.kernel, self.processes, self.sockets, self.identity):
            group()
        with socket.socket(fileno=os.dup(helper_socket())) as channel:
            channel.settimeout(20)
            self.helper(channel)
        return self.results

    def files(self) -> None:
        p = self.p
        self.attempt("read root's", lambda: os.open(p["secret"], os.O_RDONLY))
        self.attempt("read shadow", lambda: os.open("/etc/shadow", os.O_RDONLY))
        self.attempt("write everybody's", lambda: os.open(p["public"], os.O_WRONLY))
        self.attempt("append everybody's", lambda: os.open(p["public"], os.O_RDWR | os.O_APPEND))
        self.attempt("make a file", lambda: os.open(p["new"], os.O_CREAT | os.O_WRONLY))
        self.attempt("make a nameless file", lambda: os.open(p["directory"], os.O_TMPFILE | 2))
        self.attempt("truncate", lambda: os.truncate(p["public"], 0))
        self.attempt("remove", lambda: os.unlink(p["public"]))
        self.attempt("rename", lambda: os.rename(p["public"], p["new"]))
        self.attempt("link", lambda: os.symlink("/etc/shadow", p["new"]))
        self.attempt("chmod", lambda: os.chmod(p["public"], 0o777))
        self.attempt("helper's descriptors", lambda: os.listdir(f"/proc/{p['helper']}/fd"))
        self.attempt("where it was started", lambda: os.open("README.md", os.O_RDONLY))

    def kernel(self) -> None:
        attributes = struct.pack("<IIIII", 1, 4, 4, 1, 0).ljust(128, b"\0")
        self.attempt("make a map", lambda: system_call("bpf", BPF_MAP_CREATE, attributes, 128))
        instructions = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)
        buffer = ctypes.create_string_buffer(instructions, len(instructions))
        text = ctypes.create_string_buffer(b"GPL")
        load = struct.pack("<IIQQ", 1, 2, ctypes.addressof(buffer), ctypes.addressof(text))
        load = load.ljust(128, b"\0")
        self.attempt("load a program", lambda: system_call("bpf", BPF_PROG_LOAD, load, 128))
        self.attempt("perf event", lambda: system_call("perf_event_open", bytes(128), 0, -1, -1, 0))
        self.attempt("io_uring", lambda: system_call("io_uring_setup", 4, bytes(120)))
        self.attempt("module", lambda: system_call("init_module", bytes(8), 8, b""))
        self.attempt("keys", lambda: system_call("keyctl", 0, -3, 0))
        self.attempt("user namespace", lambda: system_call("unshare", CLONE_NEWUSER))
        self.attempt("another's namespace", enter_namespace)
        self.attempt("openat2", lambda: system_call("openat2", -100, b"/", bytes(24), 24))
        self.attempt("another CPU", lambda: os.sched_setaffinity(0, {0}))

    def processes(self) -> None:
        p = self.p
        for who in ("helper", "parent", "same"):
            pid = p[who]
            self.attempt(f"signal {who}", partial(os.kill, pid, 0))
            self.attempt(f"signal a thread of {who}", partial(tgkill, pid))
            self.attempt(f"trace {who}", partial(seize, pid))
            self.attempt(f"attach to {who}", partial(attach, pid))
            self.attempt(f"memory of {who}", partial(read_memory, pid))
            self.attempt(f"read {who}'s memory", partial(os.open, f"/proc/{pid}/mem", 0))
            self.attempt(f"write {who}'s memory", partial(os.open, f"/proc/{pid}/mem", 2))
            environment = f"/proc/{pid}/environ"
            self.attempt(f"environment of {who}", partial(os.open, environment, 0))
            self.attempt(f"pidfd of {who}", partial(os.pidfd_open, pid))
        self.attempt("signal its group", lambda: os.kill(0, 0))
        self.attempt("signal all", lambda: os.kill(-1, 0))
        self.attempt("tkill", lambda: system_call("tkill", p["same"], 0))
        self.attempt("exec", lambda: os.execv("/bin/true", ["true"]))
        self.attempt("exec from memory", exec_from_memory)
        self.attempt("fork", fork)
        self.attempt("spawn", lambda: os.posix_spawn("/bin/true", ["true"], {}))
        self.attempt("clone3", lambda: system_call("clone3", bytes(88), 88))
        self.attempt("type into the terminal", type_into_terminal)

    def sockets(self) -> None:
        for name, arguments in {
            "raw socket": (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
            "ping": (socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP),
            "packet socket": (socket.AF_PACKET, socket.SOCK_RAW, 0),
            "audit": (socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_AUDIT),
            "cipher": (socket.AF_ALG, socket.SOCK_SEQPACKET, 0),
            "vsock": (socket.AF_VSOCK, socket.SOCK_STREAM, 0),
        }.items():
            self.attempt(name, partial(socket.socket, *arguments))
        with socket.socket() as plain:
            self.attempt(
                "socket filter",
                lambda: plain.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, bytes(16)),
            )
            plain.bind(("127.0.0.1", 0))
            self.attempt("listen", lambda: plain.listen())

    def identity(self) -> None:
        self.attempt("become root", lambda: os.setuid(0))
        self.attempt("become root's effective", lambda: os.setresuid(-1, 0, -1))
        self.attempt("root's group", lambda: os.setgid(0))
        self.attempt("groups", lambda: os.setgroups([0]))
        self.attempt("dumpable", lambda: prctl(PR_SET_DUMPABLE, 1))
        self.attempt("privileges again", lambda: prctl(PR_SET_NO_NEW_PRIVS, 0))
        self.attempt("capabilities", regain_capabilities)
        self.attempt("chroot", lambda: os.chroot("/"))

    # ------------------------------------------------------------ through the helper

    def helper(self, channel: socket.socket) -> None:
        for name, message in {
            "by path": {"request": "open", "id": 1, "path": self.p["secret"]},
            "index 99": {"request": "open", "id": 1, "index": 99},
            "index -1": {"request": "open", "id": 1, "index": -1},
            "environ": {"request": "proc", "id": 1, "pid": self.p["parent"], "name": "environ"},
            "mem": {"request": "proc", "id": 1, "pid": self.p["parent"], "name": "mem"},
            "escape": {"request": "proc", "id": 1, "pid": 1, "name": "../../etc/shadow"},
            "sensor": {"request": "load", "id": 1, "sensor": "../../evil", "options": {}},
            "core again": {"request": "load_core", "id": 1, "rings": {}, "btf": self.p["secret"]},
            "exec": {"request": "exec", "id": 1, "argv": ["/bin/sh"]},
            "files again": {"files": [[self.p["secret"], "read", 0]]},
        }.items():
            self.results[f"helper: {name}"] = asked(channel, json.dumps(message).encode())
        self.fuzz(channel)
        # The one file that the configuration names is its sink's: it can be written, not read.
        fds = named(channel, 0)
        self.attempt("read the sink's target", lambda: os.read(fds[0], 1))
        # The configuration itself, for a reload: it can be read, and not written. There is no more.
        fds = named(channel, 1)
        self.attempt("read the configuration", lambda: os.read(fds[0], 1))
        self.attempt("write the configuration", lambda: os.write(fds[0], b"x"))
        self.attempt("cut the configuration", lambda: os.ftruncate(fds[0], 0))
        rotate = {"request": "rotate", "id": 1, "index": 1, "keep": 1}
        self.results["helper: rotate the configuration"] = asked(
            channel, json.dumps(rotate).encode()
        )
        third = {"request": "open", "id": 1, "index": 2}
        self.results["helper: a third file"] = asked(channel, json.dumps(third).encode())
        alive = {"request": "proc", "id": 2, "pid": os.getpid(), "name": "comm"}
        self.results["helper: alive"] = asked(channel, json.dumps(alive).encode())

    def fuzz(self, channel: socket.socket) -> None:
        luck = random.Random(20)
        for _ in range(300):
            size = luck.choice([0, 1, 30, 3000, 100_000])
            asked(channel, luck.randbytes(size))
        for size in (130_000, 140_000, 180_000):
            asked(channel, b"[" * size)
        socket.send_fds(channel, [b"{}"], [0] * 100)
        channel.recv(1 << 17)


def helper_socket() -> int:
    """The descriptor of the socketpair, found as an intruder would."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as found:
                    if found.type == socket.SOCK_SEQPACKET:
                        return int(name)
    raise AssertionError("no socketpair")


def asked(channel: socket.socket, message: bytes) -> str:
    """What the helper answers: "done", or what is wrong."""
    try:
        channel.send(message)
    except OSError as error:  # more than the kernel sends at once
        return errno.errorcode[error.errno or 0]
    answer = json.loads(channel.recv(1 << 17))
    return answer["error"]["kind"] if "error" in answer else "done"


def named(channel: socket.socket, index: int) -> list[int]:
    channel.send(json.dumps({"request": "open", "id": 1, "index": index}).encode())
    _, fds, _, _ = socket.recv_fds(channel, 1 << 17, 4)
    return fds


def enter_namespace() -> None:
    system_call("setns", os.open("/proc/self/ns/net", os.O_RDONLY), 0)


def seize(pid: int) -> None:
    system_call("ptrace", PTRACE_SEIZE, pid, 0, 0)


def attach(pid: int) -> None:
    system_call("ptrace", PTRACE_ATTACH, pid, 0, 0)


def exec_from_memory() -> None:
    fd = os.memfd_create("x", 0)
    os.write(fd, b"#!/bin/sh\n")
    os.execve(fd, ["x"], {})


def prctl(option: int, argument: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, argument, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def regain_capabilities() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)(1, 1)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def tgkill(pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.tgkill(pid, pid, 0):
        raise OSError(ctypes.get_errno(), "tgkill")


def read_memory(pid: int) -> None:
    there = ctypes.create_string_buffer(8)
    one = struct.pack("<QQ", ctypes.addressof(there), 8)
    buffer = ctypes.create_string_buffer(one, 16)
    system_call("process_vm_readv", pid, buffer, 1, buffer, 1, 0)


def fork() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def type_into_terminal() -> None:
    fcntl.ioctl(2, termios.TIOCSTI, b"x")


def main(report: int, parameters: dict[str, Any], arguments: list[str]) -> int:
    original = Service._on_batch
    done = False

    def taken_over(self: Service, batch: Batch) -> None:
        nonlocal done
        if not done:
            done = True
            results = Attempts(parameters | {"helper": helper_pid()}).run()
            os.write(report, json.dumps(results).encode() + b"\n")
        original(self, batch)

    Service._on_batch = taken_over  # type: ignore[method-assign]
    return cli.main(arguments)


def helper_pid() -> int:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return int(file.read().split()[0])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]))
