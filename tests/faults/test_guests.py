"""Faults of the whole machine: a virtual one is started for each, and ends with it.

It is emulated and some ten times as slow, and so is what is offered there (`tests/kernel/pace.py`).
"""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.faults import consumers
from tests.faults.experiment import MINE, MOST_MB, missing, verify
from tests.faults.guest.suspended import EVENTS, RESULT, TIMES, TRACEBACK, Result
from tests.faults.load import build
from tests.faults.table import Row
from tests.kernel.agent import ROOT

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.kernel]

SUITE = "bookworm"
NOTE = "in a virtual machine with Linux 6.1, emulated"
PYTEST = (
    *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"),
    *("-o", "faulthandler_timeout=900"),
)
SECONDS = 1500
"""A guest's at most; it takes two to five minutes of a machine that has nothing else to do."""
Record = Callable[[Row], None]


def in_guest(directory: Path, *arguments: str) -> None:
    """Python with these arguments there; what it writes to /.out is in `directory` then."""
    build()  # there it would take long
    command = [str(ROOT / "tools" / "kernels.sh"), "run", SUITE, "--"]
    command += ["env", "CI=true", "STREAMER_TEST_SLOWNESS=10", ".venv/bin/python", *arguments]
    environ = os.environ | {"KERNEL_OUT": str(directory), "KERNEL_SECONDS": str(SECONDS)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    said = directory / TRACEBACK
    more = said.read_text() if said.exists() else ""
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}\n{more}"


@pytest.mark.mqtt
@pytest.mark.parametrize("test", ["test_clock.py", "test_netem.py"])
def test_in_guest(tmp_path: Path, record: Record, test: str) -> None:
    """The tests of a file that take Mosquitto: what they demand is what all faults do."""
    rows = ["--rows", "/.out/rows"]
    in_guest(tmp_path, *PYTEST, f"tests/faults/guest/{test}", "-m", "mqtt", *rows)
    (line,) = (tmp_path / "rows").read_bytes().splitlines()
    record(msgspec.structs.replace(msgspec.json.decode(line, type=Row), note=NOTE))


def test_suspended(tmp_path: Path, record: Record) -> None:
    """Twice, for five seconds: they are in the times since boot, and are no step of the clock."""
    in_guest(tmp_path, "-m", "tests.faults.guest.suspended")
    result = msgspec.json.decode((tmp_path / RESULT).read_bytes(), type=Result)
    path = tmp_path / EVENTS
    found = consumers.count(path.read_bytes().splitlines(), [MINE])
    report = verify(str(path), found.records)
    assert len(result.slept) == TIMES
    assert all(slept >= 3 for slept in result.slept), result.slept
    skipped = missing(found, Counter(result.offered))
    assert len(found.named[MINE]) == result.spawned - skipped["process.exec"]
    assert (report.ok, report.unexplained, report.events) == (True, 0, found.delivered.total())
    ((run,),) = (host.runs for host in report.hosts.values())
    assert run.clock_steps_total == 0
    row = Row(
        f"machine suspended, {TIMES} times",
        Counter(result.offered).total(),
        found.delivered.total(),
        found.duplicates,
        Counter(result.offered).total() - found.delivered.total(),
        report.unexplained,
        result.peak_mb,
        None,
        f"by the kernel's own test of it, {NOTE}",
    )
    print(row.line)
    assert (row.accounted, row.duplicates) == (0, 0)
    assert row.peak_mb <= MOST_MB
    record(row)
