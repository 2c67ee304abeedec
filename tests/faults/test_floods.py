"""More than can be delivered: opens as fast as they go, a fork bomb, users who only spawn."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from tests.faults.conftest import Cluster, Faults
from tests.faults.table import Row
from tests.kernel.unprivileged import UID

pytestmark = [pytest.mark.faults, pytest.mark.kernel, pytest.mark.kafka]

slow = pytest.mark.slow
SLOW_RATE = 200
"""Opens a second of the steady load where the broker is slow."""
Record = Callable[[Row], None]


@slow
def test_a_million_a_second(kafka_fault: Faults, record: Record) -> None:
    """For 30 s as many opens as this machine makes: by a user on each CPU, who goes before all
    others, the agent and the brokers included.
    """
    with kafka_fault("1 M events/s for 30 s", spool="off") as experiment:
        experiment.steady()
        floods = [
            experiment.load("opens", f"/no/flood-{number}/", "0", uid=UID, nice=-8)
            for number in range(len(os.sched_getaffinity(0)))
        ]
        time.sleep(30)
        for flood in floods:
            flood.stop()
        experiment.heal()
        rate = sum(flood.done / flood.seconds for flood in floods)
        note = f"as many as this machine makes: {rate:,.0f} a second"
        record(experiment.finish(flooder=UID, note=note))


def test_fork_bomb(kafka_fault: Faults, record: Record) -> None:
    with kafka_fault("fork bomb of 20,000 processes") as experiment:
        experiment.steady()
        bomb = experiment.load("bomb", "20000", uid=UID)
        assert bomb.wait(60) == 20_000
        experiment.heal()
        record(experiment.finish(flooder=UID))


@slow
@pytest.mark.parametrize(("count", "size"), [(4, 16_000), (6, 0)])
def test_unprivileged_flood(kafka_fault: Faults, record: Record, count: int, size: int) -> None:
    of = f"spawn with {size // 1000} KB of arguments" if size else "only spawn"
    with kafka_fault(f"flood by a user: {count} that {of}, 10 s") as experiment:
        experiment.steady()
        floods = [experiment.load("spawns", "flood", f"{size}", "0", uid=UID) for _ in range(count)]
        time.sleep(10)
        for flood in floods:
            flood.stop()
        experiment.heal()
        record(experiment.finish(flooder=UID))


@slow
@pytest.mark.parametrize("drops", [False, True], ids=["pause", "drop"])
@pytest.mark.parametrize(("count", "size"), [(4, 16_000), (6, 0)])
def test_unprivileged_flood_of_a_slow_broker(
    cluster: Cluster, kafka_fault: Faults, record: Record, count: int, size: int, drops: bool
) -> None:
    """More than the broker takes. Rings fill up, and who floods is refused, he alone; or the sink
    drops, as one of several does, and the last of its room is root's.
    """
    of = f"spawn with {size // 1000} KB of arguments" if size else "only spawn"
    fault = f"flood by a user: {count} that {of}, 10 s, and a broker that takes 100 kB/s"
    fault += ", whose sink drops" if drops else ""
    sink = 'on_full = "drop"\n' if drops else ""
    with kafka_fault(fault, proxied=True, spool="off", rate=SLOW_RATE, sink=sink) as experiment:
        experiment.steady()
        for proxy in cluster.proxies:
            proxy.bytes_per_second = 100_000
        floods = [experiment.load("spawns", "flood", f"{size}", "0", uid=UID) for _ in range(count)]
        time.sleep(10)
        for flood in floods:
            flood.stop()
        for proxy in cluster.proxies:
            proxy.heal()
        experiment.heal()
        row = experiment.finish(flooder=UID, drops=drops)
        assert row.accounted, "nothing was refused: it was no flood"
        record(row)
