"""A few things of every kind, as a program of its own that needs no pytest: tests/vm/smoke.py."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.kernel.agent import ROOT
from tests.kernel.pace import seconds

pytestmark = [pytest.mark.kernel, pytest.mark.every_kernel]


def test_what_was_done_is_what_was_recorded() -> None:
    command = [sys.executable, "tests/vm/smoke.py"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds(120))
    assert ended.stdout, ended.stderr
    assert json.loads(ended.stdout)["wrong"] == []
    assert ended.returncode == 0
