"""Giving up everything, done for real by a process of its own."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from streamer.errors import PrivilegeError
from streamer.kernel import capabilities
from streamer.privilege import drop
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
own = {"leaked": leaked, "stdin": os.read(0, 9).decode()}
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


def after_dropping(account: str, groups: Sequence[int] | None = None) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", DROPPED, account],
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
    held = {name: int(found[name], 16) for name in CAPABILITIES}
    if not was_root:  # only who has CAP_SETPCAP can empty it
        del held["CapBnd"]
    assert not any(held.values()), held


def test_root_becomes_another_user(require: Require) -> None:
    """What is on its standard input is nobody's who takes it over, nor is where it was started."""
    require(os.geteuid() == 0, "to become another user needs root")
    found = after_dropping("nobody", groups=[4, 6])  # adm and disk
    check_closed(found, was_root=True)
    assert set(found["Uid"].split() + found["Gid"].split()) == {"65534"}
    assert found["Groups"].split() == []


def test_who_cannot_change_users_gives_up_the_rest(require: Require) -> None:
    check_closed(after_dropping("itself"), was_root=os.geteuid() == 0)
    require(os.geteuid() == 0, "to be another user needs root")
    check_closed(after_dropping("unprivileged"), was_root=False)


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
