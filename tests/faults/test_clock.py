"""The clock is set: in a virtual machine, never on a host.

tools/kernels.sh run sid -- .venv/bin/python -m pytest tests/faults/test_clock.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Require
from tests.faults.experiment import verify
from tests.faults.load import Load, build
from tests.kernel.agent import Agent
from tests.kernel.pace import repetitions
from tests.kernel.scope import Scope
from tests.kernel.system import IN_GUEST

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.kernel]

RATE = repetitions(2000, 100)
HOUR = 3600


def step(seconds: float) -> None:
    """Set the clock."""
    time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)


def ran(scope: Scope, directory: Path, meanwhile: Callable[[], None]) -> tuple[Agent, int]:
    """An agent and a load, and what happens to both. How many opens there were."""
    with Agent(directory, *scope.options, events="process.*,file.open") as agent:
        with Load(build(), scope, "opens", "/no/", str(RATE)) as load:
            time.sleep(3)
            meanwhile()
            time.sleep(3)
            load.stop()
        recording = agent.stop()
    assert len(recording.of("file.open")) == load.done
    return agent, len(recording.all)


def test_clock_is_stepped(scope: Scope, tmp_path: Path, require: Require) -> None:
    require(IN_GUEST, "the clock is set in virtual machines alone")

    def there_and_back() -> None:
        step(HOUR)
        time.sleep(3)
        step(-2 * HOUR)

    agent, records = ran(scope, tmp_path, there_and_back)
    report = verify(str(agent.output), records)
    assert (report.ok, report.unexplained, report.duplicates) == (True, 0, 0)
    ((run,),) = (host.runs for host in report.hosts.values())
    assert [round(one.step_ns / 1e9 / HOUR) for one in run.clock_steps] == [1, -2]
