"""The level of pressure: what says it, what holds it, and how it rises and falls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import pytest

from streamer.agent.pressure import (
    HOLD,
    LAG_FROM,
    LOOK_SECONDS,
    RISE_SECONDS,
    STEP_SECONDS,
    Cause,
    Pressure,
    SinkState,
    Thresholds,
    causes,
)
from streamer.config.settings import LEVELS, SHED_BY_DEFAULT, SheddingSection
from streamer.events.kinds import KINDS

THRESHOLDS = Thresholds.of(SheddingSection())
FULL = 1.0
RECOVERED = 5.0
"""Seconds after the end of the pressure, by when nothing is shed any more."""


def budget(value: float) -> list[Cause]:
    return [THRESHOLDS.cause("budget", "kafka", value)]


def levels(values: Iterable[float], pressure: Pressure, start: float = 0.0) -> list[int]:
    """The level after each look, where a sink holds so much of its budget."""
    found = []
    for number, value in enumerate(values):
        pressure.look(start + number * LOOK_SECONDS, budget(value))
        found.append(pressure.level)
    return found


def says(sinks: Sequence[SinkState], rings: dict[str, float] | None = None) -> int:
    return max((one.says for one in causes(THRESHOLDS, sinks, rings or {})), default=0)


def test_it_rises_in_one_go_once_it_was_said_for_half_a_second() -> None:
    looks = round(RISE_SECONDS / LOOK_SECONDS)
    assert levels([FULL] * (looks + 1), Pressure()) == [0] * looks + [LEVELS]


def test_a_burst_that_is_over_sooner_is_none() -> None:
    looks = round(RISE_SECONDS / LOOK_SECONDS)
    burst = [FULL] * looks + [0.0]
    assert set(levels(burst * 20, Pressure())) == {0}


def test_each_level_has_its_value() -> None:
    for level, value in enumerate(THRESHOLDS.budget, 1):
        assert levels([value] * 10, Pressure())[-1] == level
        assert levels([value - 0.001] * 10, Pressure())[-1] == level - 1


def test_it_holds_until_four_fifths_of_its_value() -> None:
    pressure = Pressure()
    top = THRESHOLDS.budget[-1]
    levels([top] * 4, pressure)
    assert set(levels([HOLD * top] * 100, pressure, 10)) == {LEVELS}
    assert levels([HOLD * top - 0.001] * 100, pressure, 100)[-1] == LEVELS - 1


def test_it_falls_step_by_step() -> None:
    pressure = Pressure()
    levels([FULL] * 10, pressure)
    found = levels([0.0] * 30, pressure, 10 * LOOK_SECONDS)
    assert sorted(found, reverse=True) == found
    assert set(found) == {3, 2, 1, 0}
    steps = [found.count(level) * LOOK_SECONDS for level in (2, 1)]
    assert all(STEP_SECONDS <= step < STEP_SECONDS + 2 * LOOK_SECONDS for step in steps)


@pytest.mark.parametrize("late", [0.0, 0.03, LOOK_SECONDS - 0.001])
def test_nothing_is_shed_five_seconds_after_the_end(late: float) -> None:
    """However the looks lie, each up to so much late."""
    pressure = Pressure()
    levels([FULL] * 10, pressure)
    now = end = 10 * LOOK_SECONDS
    while pressure.level:
        now += LOOK_SECONDS + late / 4
        pressure.look(now, budget(0.0))
    assert now - end < RECOVERED


def test_what_comes_back_while_it_falls_raises_it_again() -> None:
    pressure = Pressure()
    levels([FULL] * 10, pressure)
    assert levels([0.0] * 5, pressure, 10 * LOOK_SECONDS)[-1] == 2
    assert levels([FULL] * 3, pressure, 15 * LOOK_SECONDS) == [2, 2, 3]


def test_it_says_when_it_changes() -> None:
    pressure = Pressure()
    changes = [pressure.look(i * LOOK_SECONDS, budget(FULL)) for i in range(10)]
    assert changes.count(True) == 1


def test_each_measure_counts() -> None:
    quiet = SinkState("kafka", True, 0.2)
    assert says([quiet]) == 0
    assert says([quiet._replace(budget=0.6)]) == 1
    assert says([quiet._replace(spool=0.75)]) == 2
    assert says([quiet._replace(lag_seconds=16)]) == 2
    assert says([quiet], {"bulk": 0.9, "critical": 0.0}) == 3
    assert says([quiet], {"critical": 0.55}) == 1


def test_a_broker_that_is_away_from_a_quiet_host_is_no_pressure() -> None:
    assert says([SinkState("kafka", True, 0.1, lag_seconds=3600)]) == 0
    assert says([SinkState("kafka", True, LAG_FROM, lag_seconds=3600)]) == 3


def test_a_sink_that_drops_counts_as_far_as_all_are_pressed() -> None:
    """Or the fast one would get less for the sake of the slow one."""
    slow, fast = SinkState("kafka", False, 1.0), SinkState("file", False, 0.0)
    assert says([slow, fast]) == 0
    assert says([slow, fast._replace(budget=0.55)]) == 1
    assert says([slow, fast._replace(budget=0.75)]) == 2
    assert says([slow]) == 3


def test_a_sink_that_drops_holds_no_level_once_a_fast_one_takes_all_again() -> None:
    slow, fast = SinkState("kafka", False, 1.0), SinkState("file", False, 1.0)
    assert [one.holds for one in causes(THRESHOLDS, [slow, fast], {})] == [3, 3]
    assert causes(THRESHOLDS, [slow, fast._replace(budget=0.0)], {}) == []
    (held, other) = causes(THRESHOLDS, [slow, fast._replace(budget=0.45)], {})
    assert (held.says, held.holds, other.says, other.holds) == (0, 1, 0, 1)


def test_one_that_pauses_counts_alone() -> None:
    slow, fast = SinkState("kafka", True, 1.0), SinkState("file", False, 0.0)
    assert says([slow, fast]) == 3
    assert says([slow._replace(budget=0.0), fast._replace(budget=1.0)]) == 0


def test_nothing_presses_where_there_is_no_sink() -> None:
    assert causes(THRESHOLDS, [], {}) == []


def test_the_worst_cause_comes_first() -> None:
    sinks = [SinkState("kafka", True, 0.6, lag_seconds=31), SinkState("mqtt", True, 0.75)]
    found = causes(THRESHOLDS, sinks, {"bulk": 0.45})
    assert [(one.measure, one.where, one.says, one.holds) for one in found] == [
        ("lag", "kafka", 3, 3),
        ("budget", "mqtt", 2, 3),
        ("budget", "kafka", 1, 2),
        ("ring", "bulk", 0, 1),
    ]
    nearly = SinkState("mqtt", True, 0.69)
    found = causes(THRESHOLDS, [nearly, SinkState("kafka", True, 0.2, lag_seconds=16)], {})
    assert [(one.measure, one.says, one.holds) for one in found] == [
        ("lag", 2, 2),
        ("budget", 1, 3),
    ], "what says a level before what only holds one"


def test_a_sink_of_several_workers_is_named_once_with_the_worst() -> None:
    for values in ((0.6, 0.9), (0.9, 0.95), (0.95, 0.9)):
        found = causes(THRESHOLDS, [SinkState("mqtt", True, value) for value in values], {})
        assert found == [THRESHOLDS.cause("budget", "mqtt", max(values))]


def test_every_kind_of_the_bulk_ring_has_rates_and_no_other() -> None:
    """A new kind has to say what becomes of it under pressure."""
    assert SHED_BY_DEFAULT.keys() == {k for k, info in KINDS.items() if info.ring == "bulk"}
    assert all(list(rates) == sorted(rates) for rates in SHED_BY_DEFAULT.values())


def test_every_kind_that_can_be_shed_has_a_weight() -> None:
    for kind in SHED_BY_DEFAULT:
        assert "weight" in {field.name for field in msgspec.structs.fields(KINDS[kind].struct)}


def test_rates_are_off_unless_asked_for_and_can_be_taken_back() -> None:
    assert SheddingSection().rates_in_force == {}
    given = SheddingSection(enabled=True, rates={"file.open": (1, 1, 1), "net.bind": (1, 2, 4)})
    rates = given.rates_in_force
    assert "file.open" not in rates
    assert rates["net.bind"] == (1, 2, 4)
    assert "net.listen" not in rates
    assert rates["net.close"] == SHED_BY_DEFAULT["net.close"]
