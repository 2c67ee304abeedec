"""For functions that act: forked processes with names of their own, and sockets in namespaces."""

from __future__ import annotations

import ctypes
import fcntl
import os
import pickle
import socket
import struct
import subprocess
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamer.kernel.cgroups import cgroup_root

CLONE_NEWNET = 0x40000000
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000
SIOCSIFFLAGS, IFF_UP = 0x8914, 1


class Role:
    """A forked process that calls one function."""

    def __init__(self, name: str, function: Callable[..., Any], *arguments: Any) -> None:
        """`name` becomes the comm of the process."""
        self._from, to = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._play(to, name, function, arguments)
        os.close(to)

    def _play(
        self, to: int, name: str, function: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> None:
        code = 1
        try:
            Path("/proc/self/comm").write_text(name)
            result = pickle.dumps(function(*arguments))
            while result:
                result = result[os.write(to, result) :]
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def result(self) -> Any:
        """Wait for the end of the process. What the function returned."""
        with os.fdopen(self._from, "rb") as pipe:
            data = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        assert status == 0, f"a role failed: {status}"
        return pickle.loads(data)


def netns_inode() -> int:
    return os.stat("/proc/self/ns/net").st_ino


def enter_netns(name: str) -> None:
    """Move the calling thread into a network namespace made by `ip netns add`."""
    fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(fd)


def leave_network() -> None:
    """Move the calling thread into a network namespace of its own, which has no route."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")


def in_own_network(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function in a network namespace with nothing but a loopback device.

    There no packet is handed to another CPU, where it would interrupt processes that are not the
    test's.
    """
    leave_network()
    bring_up_loopback()
    return function(*arguments)


def leave_mounts() -> None:
    """Move the calling thread into a mount namespace of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    for failed in (
        libc.unshare(CLONE_NEWNS),
        libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None),
    ):
        assert not failed, os.strerror(ctypes.get_errno())


def show_network() -> None:
    """Have /sys show the thread's network namespace, and the cgroups where they were."""
    root = Path(cgroup_root() or "/sys/fs/cgroup")
    _mount("/sys", "sysfs")
    if root != Path("/sys/fs/cgroup") and root.is_relative_to("/sys"):
        _mount("/sys/fs/cgroup", "tmpfs")
        root.mkdir(parents=True)
    if root.is_relative_to("/sys"):
        _mount(str(root), "cgroup2")


def _mount(place: str, kind: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mount(b"none", place.encode(), kind.encode(), 0, None)
    assert not failed, os.strerror(ctypes.get_errno())


def bring_up_loopback() -> None:
    """In a network namespace that was just made it is down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


@contextmanager
def two_namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a veth pair between them.

    The first has the addresses 192.0.2.1 and 2001:db8::1, the second .2 and ::2.
    """
    names = f"streamer-test-{os.getpid()}-1", f"streamer-test-{os.getpid()}-2"
    first, second = names
    try:
        for name in names:
            _ip("netns", "add", name)
        pair = ["veth1", "netns", first, "type", "veth", "peer", "name", "veth2", "netns", second]
        _ip("link", "add", *pair)
        for number, name in enumerate(names, 1):
            device = f"veth{number}"
            _ip("-n", name, "address", "add", f"192.0.2.{number}/24", "dev", device)
            address = f"2001:db8::{number}/64"
            _ip("-n", name, "address", "add", address, "dev", device, "nodad")
            for up in ("lo", device):
                _ip("-n", name, "link", "set", up, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
