"""What unit tests have in common."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.conftest import Require

# Slow examples tell of a busy machine, not of a defect.
settings.register_profile("streamer", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("streamer")

CAP_SYS_ADMIN, CAP_CHECKPOINT_RESTORE = 21, 40


@pytest.fixture
def opens_mappings(require: Require) -> None:
    """What opening a file by its mapping (/proc/PID/map_files) takes."""
    status = Path("/proc/self/status").read_text()
    have = int(status.split("CapEff:")[1].split()[0], 16)
    enough = have >> CAP_CHECKPOINT_RESTORE & 1 or have >> CAP_SYS_ADMIN & 1
    require(enough, "opening a mapping needs root (CAP_CHECKPOINT_RESTORE)")
