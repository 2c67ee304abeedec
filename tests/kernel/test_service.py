"""The unit of `deploy/systemd`, run by a real systemd: as it is, with all that keeps it in."""

from __future__ import annotations

import os
import pwd
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SET_UP, Require
from tests.kernel.pace import seconds
from tests.kernel.scope import Scope
from tests.kernel.systemd import DEPLOY, SYSTEMD, UNIT, Systemd, can_protect
from tests.kernel.test_capabilities import (
    BITS,
    CONNECTS,
    NO_TRACEFS,
    OPENS,
    RUNS,
    serve_and_act,
)
from tests.kernel.test_privilege import functions_load, status_of

pytestmark = pytest.mark.kernel

EVENTS = 'events = ["process.*", "file.open", "net.connect", "net.accept"]\n'
STOP_SECONDS = 30
"""TimeoutStopSec of the unit."""


@pytest.fixture
def systemd(cgroups: Path, tmp_path: Path, scope: Scope, require: Require) -> Iterator[Systemd]:
    """With a configuration that is the shipped one, for what happens in `scope`."""
    require(os.path.exists(SYSTEMD), f"systemd is not installed: {SET_UP}")
    shipped = (DEPLOY / "streamer.toml").read_text()
    config = f"{EVENTS}{shipped}\n[filters]\ncgroups = [{scope.id}]\n"
    with Scope(cgroups) as own, Systemd(tmp_path / "system", own, config) as started:
        yield started


@pytest.mark.every_kernel
def test_the_service(systemd: Systemd, scope: Scope) -> None:
    """It starts, streams, is restarted, comes back after a crash, and stops in time."""
    systemd.ctl("start", UNIT)
    systemd.wait_for("stream.manifest", 1)
    main = systemd.main_pid
    (helper,) = map(int, Path(f"/proc/{main}/task/{main}/children").read_text().split())
    check_processes(systemd, main, helper)
    scope.act(serve_and_act)
    systemd.wait_for("process.exit", RUNS)
    systemd.ctl("reload", UNIT)
    systemd.ctl("restart", UNIT)
    systemd.wait_for("stream.manifest", 2)
    check_events(systemd)
    crash_helper(systemd)
    before = time.monotonic()
    systemd.ctl("stop", UNIT)
    assert time.monotonic() - before < seconds(STOP_SECONDS)
    assert (systemd.shown("Result"), systemd.shown("ExecMainStatus")) == ("success", "0")
    check_files(systemd)


def check_processes(systemd: Systemd, main: int, helper: int) -> None:
    statuses = [status_of(Path(f"/proc/{pid}")) for pid in (main, helper)]
    uid = user_of(systemd)
    assert [status["Uid"].split() for status in statuses] == [[str(uid)] * 4] * 2
    assert [int(status["CapBnd"], 16) for status in statuses] == [sum(BITS.values())] * 2
    worker, kept = (int(status["CapPrm"], 16) for status in statuses)
    assert worker == 0
    assert kept & ~BITS["net_admin"] == BITS["bpf"] | BITS["perfmon"]
    for pid, status in zip((main, helper), statuses, strict=True):
        assert status["NoNewPrivs"] == "1"
        assert os.getpriority(os.PRIO_PROCESS, pid) == -4
        score = int(Path(f"/proc/{pid}/oom_score_adj").read_text())
        assert score == (-900 if can_protect() else 0)


def user_of(systemd: Systemd) -> int:
    """The number that systemd-sysusers has given to the service's user."""
    lines = systemd.path("/etc/passwd").read_text().splitlines()
    (line,) = (one for one in lines if one.startswith("streamer:"))
    uid = int(line.split(":")[2])
    assert uid not in {one.pw_uid for one in pwd.getpwall()}
    return uid


def check_events(systemd: Systemd) -> None:
    """Exactly what was done; what keeps the service in hides nothing from it."""
    manifest = systemd.of("stream.manifest")[0]
    unread = not functions_load()
    lost = {"file.open", "net.accept"} if unread else set()
    assert {kind for kind, one in manifest.coverage.items() if one.status == "missing"} == lost
    assert all(NO_TRACEFS in manifest.coverage[kind].reason for kind in lost)
    assert len(systemd.of("process.exec")) == len(systemd.of("process.exit")) == RUNS
    assert {event.exe_mntns_initial for event in systemd.of("process.exec")} == {True}
    assert len(systemd.of("net.connect")) == CONNECTS
    assert len(systemd.of("net.accept")) == (0 if unread else CONNECTS)
    opens = [event for event in systemd.of("file.open") if event.path.startswith("/no/")]
    assert len(opens) == (0 if unread else OPENS)
    previous = systemd.of("stream.manifest")[1].previous
    assert (previous.run_id, previous.ended) == (manifest.run_id, "delivered")


def crash_helper(systemd: Systemd) -> None:
    """systemd starts it anew."""
    main = systemd.main_pid
    (helper,) = map(int, Path(f"/proc/{main}/task/{main}/children").read_text().split())
    os.kill(helper, signal.SIGKILL)
    systemd.wait_for("stream.manifest", 3)
    assert systemd.shown("NRestarts") == "1"


def check_files(systemd: Systemd) -> None:
    uid = user_of(systemd)
    found = {}
    for name in ("/var/lib/streamer/run.json", "/var/log/streamer/events.ndjson"):
        status = systemd.path(name).stat()
        assert status.st_uid == uid
        found[name] = stat.S_IMODE(status.st_mode)
    assert [*found.values()] == [0o600, 0o640]


def test_a_mistake_in_the_configuration(systemd: Systemd) -> None:
    """It is said once, and not tried again and again."""
    systemd.configure('events = ["nothing.of.this.name"]\n')
    systemd.ctl("start", UNIT, check=False)
    deadline = time.monotonic() + seconds(30)
    while systemd.shown("ActiveState") != "failed":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (systemd.shown("ExecMainStatus"), systemd.shown("NRestarts")) == ("2", "0")
    (said,) = systemd.said.splitlines()
    assert "nothing.of.this.name" in said


def test_systemd_is_told(systemd: Systemd) -> None:
    """It is active when it streams, says how it is, and is started anew when it hangs."""
    place = systemd.path(f"/run/systemd/system/{UNIT}.d/quick.conf")
    place.write_text("[Service]\nWatchdogSec=3\nRestartSec=0\n")
    systemd.ctl("daemon-reload")
    systemd.ctl("start", UNIT)
    assert systemd.of("stream.manifest")  # by then, because it waits for READY=1
    assert systemd.shown("ActiveState") == "active"
    time.sleep(seconds(6))  # twice the watchdog's time
    assert systemd.shown("NRestarts") == "0"
    assert systemd.shown("StatusText").startswith("ready; ")
    os.kill(systemd.main_pid, signal.SIGSTOP)
    systemd.wait_for("stream.manifest", 2)
    assert systemd.shown("NRestarts") == "1"
    assert systemd.of("stream.manifest")[1].previous.ended == "killed"
    systemd.ctl("stop", UNIT)
    assert systemd.shown("Result") == "success"
