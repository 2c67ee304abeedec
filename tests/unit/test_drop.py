"""Giving up everything, done for real by a process of its own."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from streamer.errors import PrivilegeError
from streamer.kernel import capabilities
from streamer.privilege import drop, landlock
from tests.conftest import Require

ROOT = Path(__file__).resolve().parents[2]
ENDS = """
import ctypes, json, os, sys, threading
from streamer.errors import PrivilegeError
from streamer.privilege.drop import account_of, drop_privileges
"""
DROPPED = (
    ENDS
    + """
before = os.listdir("/proc/self/fd")
if sys.argv[1] == "unprivileged":
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, as it is after an exec
drop_privileges(account_of("nobody") if sys.argv[1] == "nobody" else None)
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines())
links = {name: os.readlink(f"/proc/self/{name}") for name in ("cwd", "fd/0")}
leaked = os.listdir("/proc/self/fd") != before
own = {"leaked": leaked, "stdin": os.read(0, 9).decode(), "write": "done"}
try:
    os.open(sys.argv[2], os.O_WRONLY)
except OSError as error:
    own["write"] = error.strerror
own["owner"] = os.stat("/proc/self/stat").st_uid
print(json.dumps(status | links | own))
"""
)
THREADED = (
    ENDS
    + """
go = threading.Event()
thread = threading.Thread(target=go.wait); thread.start()
try:
    drop_privileges(None)
except PrivilegeError as error:
    print(error, os.getcwd())
go.set()
"""
)
CAPABILITIES = ("CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd")


@pytest.fixture
def public() -> Iterator[str]:
    """A file that everybody may write to, in a directory that everybody may enter."""
    with tempfile.NamedTemporaryFile() as file:
        os.fchmod(file.fileno(), 0o666)
        yield file.name


def after_dropping(
    account: str, public: str, groups: Sequence[int] | None = None
) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", DROPPED, account, public],
        cwd=ROOT,
        extra_groups=groups,
        input="a secret",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check_closed(found: dict[str, Any], *, was_root: bool) -> None:
    """What holds whoever it becomes."""
    assert (found["NoNewPrivs"], found["Seccomp"], found["leaked"]) == ("1", "2", False)
    assert (found["cwd"], found["fd/0"], found["stdin"]) == ("/", "/dev/null", "")
    assert found["owner"] == 0  # as of processes that are not dumpable
    if landlock._call("landlock_create_ruleset", None, 0, 1) > 0:
        assert found["write"] == "Permission denied"
    held = {name: int(found[name], 16) for name in CAPABILITIES}
    if not was_root:  # only who has CAP_SETPCAP can empty it
        del held["CapBnd"]
    assert not any(held.values()), held


def test_root_becomes_another_user(public: str, require: Require) -> None:
    """What is on its standard input is nobody's who takes it over, nor is where it was started."""
    require(os.geteuid() == 0, "to become another user needs root")
    found = after_dropping("nobody", public, groups=[4, 6])  # adm and disk
    check_closed(found, was_root=True)
    assert set(found["Uid"].split() + found["Gid"].split()) == {"65534"}
    assert found["Groups"].split() == []


def test_who_cannot_change_users_gives_up_the_rest(public: str, require: Require) -> None:
    check_closed(after_dropping("itself", public), was_root=os.geteuid() == 0)
    require(os.geteuid() == 0, "to be another user needs root")
    check_closed(after_dropping("unprivileged", public), was_root=False)


def test_a_second_thread_would_keep_everything() -> None:
    done = subprocess.run(
        [sys.executable, "-c", THREADED], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"privileges cannot be given up by several threads {ROOT}\n"


def test_who_cannot_become_another_user_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(groups: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "setgroups", refuse)
    with pytest.raises(PrivilegeError, match="cannot become other: Operation not permitted"):
        drop._become(drop.Account("other", os.getuid(), os.getgid()))


@pytest.mark.parametrize(("held", "can"), [((6, 7), True), ((6,), False), ((7,), False)])
def test_both_capabilities_are_needed(
    held: tuple[int, ...], can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CAP_SETGID and CAP_SETUID, as a container may have one of them."""
    monkeypatch.setattr(capabilities, "effective", lambda: frozenset(held))
    assert drop.can_change_user() == can


# ---------------------------------------------------------------- capabilities

REGAIN = """
from streamer.errors import PrivilegeError
from streamer.kernel import capabilities
capabilities.limit_to(())
try:
    capabilities._capset({21}, {21})
except PrivilegeError as error:
    print(error)
"""
EVERY = frozenset(range(41))


def test_what_the_kernel_refuses_is_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REGAIN], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "cannot drop capabilities: Operation not permitted\n"
    with pytest.raises(PrivilegeError, match="cannot try: Invalid argument"):
        capabilities._prctl("try", 1 << 20, 0)


def test_what_the_helper_keeps() -> None:
    """Of root's only BPF, perf events, and what opens files and /proc of others."""
    needed = capabilities.needed_by_helper
    reads = {2, 19, 38, 39}  # CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE, CAP_PERFMON, CAP_BPF
    assert needed(EVERY, writes=False, filters_packets=False) == reads
    assert needed(EVERY, writes=True, filters_packets=False) == reads | {1}  # CAP_DAC_OVERRIDE
    assert needed(EVERY, writes=False, filters_packets=True) == reads | {12}  # CAP_NET_ADMIN
    profiles = needed(EVERY, writes=False, filters_packets=False, profiles=True)
    assert profiles == reads | {40}  # CAP_CHECKPOINT_RESTORE
    for lacking in ({38}, {39}, {38, 39}):  # CAP_SYS_ADMIN stands for both
        have = EVERY - lacking
        assert needed(have, writes=False, filters_packets=False) == reads - lacking | {21}
    assert needed({38, 39}, writes=True, filters_packets=True) == {38, 39}


@pytest.mark.parametrize(
    ("held", "lacking"),
    [
        (("CAP_BPF", "CAP_PERFMON"), ""),
        (("CAP_SYS_ADMIN",), ""),
        (("CAP_BPF",), "CAP_PERFMON"),
        (("CAP_PERFMON",), "CAP_BPF"),
        ((), "CAP_BPF, CAP_PERFMON"),
    ],
)
def test_what_is_missing_is_named(
    held: tuple[str, ...], lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("CAP_SYS_ADMIN", "CAP_PERFMON", "CAP_BPF")
    monkeypatch.setattr(capabilities, "held", lambda: {name: name in held for name in names})
    if not lacking:
        capabilities.require()
        return
    with pytest.raises(PrivilegeError, match=f"missing {lacking}: run it as root"):
        capabilities.require()
