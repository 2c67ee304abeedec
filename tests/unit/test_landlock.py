"""Landlock alone, without the system-call filter in front of it: each thing that it refuses."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

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
restricted = landlock.restrict()
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
print(json.dumps([restricted, leaked, version, results]))
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
    restricted, leaked, version, results = json.loads(done.stdout)
    require(version > 0, "this kernel has no Landlock")
    assert restricted
    assert not leaked
    allowed = {name for name, result in results.items() if result == "done"}
    assert allowed == ALWAYS | {name for name, first in FROM.items() if version < first}, results
    assert (tmp_path / "file").read_text() == "content"
