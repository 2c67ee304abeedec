"""How long a sink takes, by samples: one batch at a time is followed, so that it costs nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

BOUNDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the buckets, in seconds; above the last is one more."""


class LatencySamples:
    """Notes when a batch is taken, and when as many events as then were taken are settled.

    Settled is delivered or dropped. Where parts of a sink overtake each other, as topics do, a
    sample is that of some batch taken at about that time. While one is followed, others are not.
    """

    __slots__ = ("_clock", "_goal", "_settled", "_since", "_taken", "counts", "sum_seconds")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` in seconds."""
        self.counts = [0] * (len(BOUNDS) + 1)
        """Samples in each bucket."""
        self.sum_seconds = 0.0
        """All samples together."""
        self._clock = clock
        self._taken = self._settled = 0
        self._goal = 0  # of settled events, for the batch that is followed; 0: none is
        self._since = 0.0

    def taken(self, events: int) -> None:
        """So many events were taken at once."""
        self._taken += events
        if not self._goal and events:
            self._goal, self._since = self._taken, self._clock()

    def settled(self, events: int) -> None:
        """So many were delivered or dropped at once."""
        self._settled += events
        if self._goal and self._settled >= self._goal:
            seconds = self._clock() - self._since
            self._goal = 0
            self.sum_seconds += seconds
            self.counts[sum(bound < seconds for bound in BOUNDS)] += 1

    @property
    def lag_seconds(self) -> float:
        """How long the batch that is followed has been under way; 0 if none is."""
        return self._clock() - self._since if self._goal else 0.0
