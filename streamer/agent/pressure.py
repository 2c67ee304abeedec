"""How hard it is pressed: pure, from what is measured to a level from 0 to 3, with hysteresis.

A measure says a level once it has reached that level's value, and goes on to hold it until it is
below four fifths of that. What is said for half a second becomes the level, in one go. Once nothing
holds it any more it falls, a step at a time, so that what comes in then is not shed at the full
rate for much longer, and the next flood is not let in all at once either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from streamer.config.settings import LEVELS, SheddingSection

LOOK_SECONDS = 0.25
"""How often one looks."""
RISE_SECONDS = 0.5
"""For so long a level has to be said: a burst that is read at once is none."""
STEP_SECONDS = 0.8
"""For so long each level holds when nothing says it any more.

Three of them, each up to one look late, leave two of five seconds for what waits to be sent.
"""
HOLD = 0.8
"""The share of a level's value from which on it is held."""
LAG_FROM = 1 / 8
"""The share of its budget that a sink holds, if its lag is to count: a broker that is away from a
quiet host is no pressure."""

Measure = Literal["budget", "spool", "lag", "ring"]


class SinkState(NamedTuple):
    """What is measured of a sink. `pauses`: reading waits when it is full."""

    name: str
    pauses: bool
    budget: float
    """The share of its budget that it holds."""
    spool: float = 0.0
    """The share of its spool that is used."""
    lag_seconds: float = 0.0
    """How long a batch has been under way."""


class Cause(NamedTuple):
    """A measure, where it was taken, and the levels that it says and holds."""

    measure: Measure
    where: str
    """Name of the sink, or of the ring."""
    value: float
    says: int
    holds: int


class Thresholds(NamedTuple):
    """Of each measure, the values of the levels 1, 2 and 3."""

    budget: Sequence[float]
    spool: Sequence[float]
    lag: Sequence[float]
    ring: Sequence[float]

    @classmethod
    def of(cls, settings: SheddingSection) -> Thresholds:
        """As configured."""
        return cls(settings.budget, settings.spool, settings.lag_seconds, settings.ring)

    def cause(self, measure: Measure, where: str, value: float) -> Cause:
        """What a value says."""
        levels: Sequence[float] = getattr(self, measure)
        says = sum(value >= level for level in levels)
        holds = sum(value >= HOLD * level for level in levels)
        return Cause(measure, where, value, says, holds)


def causes(
    thresholds: Thresholds, sinks: Iterable[SinkState], rings: Mapping[str, float]
) -> list[Cause]:
    """All that says or holds a level, the worst first; of a sink of several workers, its worst.

    A sink that drops what it has no room for makes nothing wait: it counts only as far as all
    sinks are pressed. Nothing is left out of what a fast one would take for the sake of a slow one.
    `rings` has the share of each that is full.
    """
    by_sink = [(sink.pauses, list(_of_sink(thresholds, sink))) for sink in sinks]
    least_said = min((max(one.says for one in found) for _, found in by_sink), default=0)
    least_held = min((max(one.holds for one in found) for _, found in by_sink), default=0)
    found = [thresholds.cause("ring", ring, share) for ring, share in rings.items()]
    for pauses, own in by_sink:
        found += own if pauses else [_at_most(one, least_said, least_held) for one in own]
    pressing = [one for one in found if one.holds]  # what says a level holds it, too
    pressing.sort(key=lambda one: (-one.says, -one.holds, one.measure, one.where, -one.value))
    worst: dict[tuple[str, str], Cause] = {}
    for one in pressing:
        worst.setdefault((one.measure, one.where), one)
    return list(worst.values())


def _of_sink(thresholds: Thresholds, sink: SinkState) -> Iterator[Cause]:
    yield thresholds.cause("budget", sink.name, sink.budget)
    yield thresholds.cause("spool", sink.name, sink.spool)
    lag = sink.lag_seconds if sink.budget >= LAG_FROM else 0.0
    yield thresholds.cause("lag", sink.name, lag)


def _at_most(cause: Cause, says: int, holds: int) -> Cause:
    return cause._replace(says=min(cause.says, says), holds=min(cause.holds, holds))


class Pressure:
    """The level, from one look to the next."""

    def __init__(self) -> None:
        """None yet."""
        self.level = 0
        self._said_since: list[float | None] = [None] * LEVELS
        self._held_at = 0.0

    def look(self, now: float, found: Iterable[Cause]) -> bool:
        """Take in what is measured at `now`, in seconds. Whether the level has changed."""
        says = holds = 0
        for one in found:
            says, holds = max(says, one.says), max(holds, one.holds)
        before = self.level
        reached = self._reached(now, says)
        if reached > before or holds >= before:
            self.level, self._held_at = max(reached, before), now
        elif now - self._held_at >= STEP_SECONDS:
            self.level, self._held_at = before - 1, now
        return self.level != before

    def _reached(self, now: float, says: int) -> int:
        """The highest level that was said for long enough."""
        reached = 0
        for index in range(LEVELS):
            since = self._said_since[index]
            if says <= index:
                self._said_since[index] = None
            elif since is None:
                self._said_since[index] = now
            elif now - since >= RISE_SECONDS:
                reached = index + 1
        return reached
