"""`make bench` goes on to work as what it measures changes: no figure is judged here."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import Require
from tests.kernel.system import IN_GUEST
from tests.vm.suite import ROOT

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("section", ["decoded", "ndjson"])
def test_a_short_run_of_a_section(section: str, require_kernel: Require) -> None:
    require_kernel(not IN_GUEST, "nothing is measured in a virtual machine")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", section]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ratio" in done.stdout
