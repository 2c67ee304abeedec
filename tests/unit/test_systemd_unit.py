"""The unit of `deploy/systemd`, as systemd judges it. That it works is in `tests/kernel`."""

from __future__ import annotations

import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from tests.conftest import SET_UP, Require

DEPLOY = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
UNIT = DEPLOY / "streamer.service"
MOST_EXPOSED = 3.0


@pytest.fixture(autouse=True)
def _analyses(require: Require) -> None:
    require(shutil.which("systemd-analyze"), f"systemd is not installed: {SET_UP}")


def analyze(*words: object) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def options() -> dict[str, list[str]]:
    """Every option and its values, in order."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in UNIT.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found[name].append(value)
    return found


def test_its_exposure_is_below_three() -> None:
    threshold = round(10 * MOST_EXPOSED) - 1
    judged = analyze("security", "--offline=yes", f"--threshold={threshold}", UNIT)
    assert judged.returncode == 0, judged.stdout


def test_a_unit_without_its_options_would_not_be(tmp_path: Path) -> None:
    """So that the test above can fail."""
    bare = tmp_path / "bare.service"
    bare.write_text("[Service]\nExecStart=/bin/true\n")
    assert analyze("security", "--offline=yes", "--threshold=29", bare).returncode != 0


def test_systemd_understands_every_line(tmp_path: Path) -> None:
    """With a program in the place of ours, which is not there."""
    text = UNIT.read_text().replace("/opt/streamer/bin/streamer", "/bin/true")
    unit = tmp_path / "streamer.service"
    unit.write_text(text)
    said = analyze("verify", unit)
    assert [line for line in said.stderr.splitlines() if str(unit) in line] == []
    unit.write_text(text.replace("RemoveIPC=", "RemoveEverything="))
    assert "RemoveEverything" in analyze("verify", unit).stderr


def test_it_has_exactly_these_capabilities() -> None:
    found = options()
    for name in ("AmbientCapabilities", "CapabilityBoundingSet"):
        (value,) = found[name]
        assert value.split() == ["CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"]
    assert found["NoNewPrivileges"] == ["yes"]
    assert found["User"] == ["streamer"]
