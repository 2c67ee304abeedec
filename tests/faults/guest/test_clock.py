"""The clock is set, forward and back, while events go to a file or to Mosquitto."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.faults.table import Row
from tests.kernel.system import IN_GUEST

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.kernel]

HOUR = 3600


def step(seconds: float) -> None:
    """Set the clock."""
    assert IN_GUEST, "the clock is set in virtual machines alone"
    time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)


@pytest.mark.parametrize("sink", ["file", pytest.param("mqtt", marks=pytest.mark.mqtt)])
def test_clock_is_stepped(
    request: pytest.FixtureRequest, record: Callable[[Row], None], sink: str
) -> None:
    fault = request.getfixturevalue(f"{sink}_fault")
    with fault("clock set forward by an hour, and back by two") as experiment:
        experiment.steady()
        step(HOUR)
        time.sleep(3)
        step(-2 * HOUR)
        experiment.heal()
        row = experiment.finish()
        ((run,),) = (host.runs for host in experiment.report.hosts.values())
        assert [round(one.step_ns / 1e9 / HOUR) for one in run.clock_steps] == [1, -2]
        assert (run.clock_steps_total, row.duplicates) == (2, 0)
        record(row)
