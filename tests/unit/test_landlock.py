"""Landlock alone, without the system-call filter in front of it: each thing that it refuses."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from streamer.errors import PrivilegeError
from streamer.privilege import landlock
from tests.conftest import Require

ROOT = Path(__file__).resolve().parents[2]

ATTEMPTS = """
import ctypes, errno, json, os, socket, stat, sys
from streamer.kernel import capabilities
from streamer.privilege import landlock
directory, parent, address = sys.argv[1], int(sys.argv[2]), sys.argv[3]
os.chdir(directory)
capabilities.forgo_gains()
held = os.listdir("/proc/self/fd")
landlock.restrict()
leaked = os.listdir("/proc/self/fd") != held
def device(kind):
    os.mknod("new", kind | 0o600, os.makedev(1, 3))
def connect():
    with socket.socket(socket.AF_UNIX) as other:
        other.connect("\\0" + address)
attempts = {
    "execute": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "write": lambda: os.open("file", os.O_WRONLY),
    "append": lambda: os.open("file", os.O_WRONLY | os.O_APPEND),
    "truncate": lambda: os.truncate("file", 0),
    "remove a directory": lambda: os.rmdir("empty"),
    "remove a file": lambda: os.unlink("file"),
    "make a device": lambda: device(stat.S_IFCHR),
    "make a disk": lambda: device(stat.S_IFBLK),
    "make a directory": lambda: os.mkdir("new"),
    "make a file": lambda: os.mknod("new", stat.S_IFREG | 0o600),
    "make a socket": lambda: os.mknod("new", stat.S_IFSOCK | 0o600),
    "make a FIFO": lambda: os.mkfifo("new"),
    "make a link": lambda: os.symlink("file", "new"),
    "make a name": lambda: os.link("file", "new"),
    "rename": lambda: os.rename("file", "new"),
    "move": lambda: os.rename("file", "empty/file"),
    "read memory": lambda: os.open(f"/proc/{parent}/mem", os.O_RDONLY),
    "signal": lambda: os.kill(parent, 0),
    "connect": connect,
    "read": lambda: os.open("file", os.O_RDONLY),
    "list": lambda: os.listdir("."),
    "write nothing": lambda: os.open("/dev/null", os.O_WRONLY),
}
def outcome(attempt):
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"
results = {name: outcome(attempt) for name, attempt in attempts.items()}
version = landlock._call("landlock_create_ruleset", None, 0, 1)
print(json.dumps([leaked, version, results]))
"""
ALWAYS = {"read", "list", "write nothing"}
FROM = {"truncate": 3, "signal": 6, "connect": 6}
"""The version of Landlock that is the first to refuse it."""


def test_what_it_refuses(tmp_path: Path, require: Require) -> None:
    """Root's own process: only Landlock is between it and the files."""
    (tmp_path / "file").write_text("content")
    (tmp_path / "empty").mkdir()
    address = f"streamer-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener, subprocess.Popen(["sleep", "60"]) as other:
        listener.bind(f"\0{address}")
        listener.listen()
        command = [sys.executable, "-c", ATTEMPTS, str(tmp_path), str(other.pid), address]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        finally:
            other.kill()
    assert done.stderr == ""
    leaked, version, results = json.loads(done.stdout)
    require(version > 0, "this kernel has no Landlock")
    assert not leaked
    allowed = {name for name, result in results.items() if result == "done"}
    assert allowed == ALWAYS | {name for name, first in FROM.items() if version < first}, results
    assert (tmp_path / "file").read_text() == "content"


@pytest.mark.parametrize("version", range(1, 9))
def test_an_older_kernel_is_asked_for_what_it_knows(
    version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses what it does not know, and then nothing would start."""
    made: list[tuple[int, ...]] = []

    def call(name: str, *arguments: int | bytes | None) -> int:
        if name != "landlock_create_ruleset":
            return 0
        attributes, size, _ = arguments
        if attributes is None:
            return version
        assert isinstance(attributes, bytes)
        made.append((size, *struct.unpack("<QQQ", attributes)))  # type: ignore[arg-type]
        return os.open(os.devnull, os.O_RDONLY)

    monkeypatch.setattr(landlock, "_call", call)
    landlock.restrict()
    files = 0x1FF3 | (1 << 14 if version >= 3 else 0)
    assert made == [(24, files, 0, 3) if version >= 6 else (8, files, 0, 0)]


@pytest.mark.parametrize("refused", ["create_ruleset", "add_rule", "restrict_self"])
def test_what_the_kernel_refuses_is_an_error(refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody goes on without what was to protect him."""

    def call(name: str, *arguments: int | bytes | None) -> int:
        if arguments[0] is None:
            return 7
        if name.endswith(refused):
            return -errno.EPERM
        return os.open(os.devnull, os.O_RDONLY) if name.endswith("create_ruleset") else 0

    monkeypatch.setattr(landlock, "_call", call)
    with pytest.raises(PrivilegeError, match=f"landlock_{refused}: Operation not permitted"):
        landlock.restrict()


def test_a_kernel_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "_call", lambda *_: -errno.ENOSYS)
    landlock.restrict()
