"""Whether a broker acknowledges what it is sent: one rule for all, pure, with the time handed in.

That a broker can be reached says little: one whose partition has too few replicas in sync, or that
hangs, takes requests and acknowledges nothing. So a sink is down when something it has sent waits,
and nothing was acknowledged, for `SILENT_SECONDS`, and up again with the next acknowledgement.

A broker that is merely slow would be down and up with each. So each silence that was told doubles
the time until the next one is, up to `SLOW_MOST`, until there was none for `CALM_SECONDS`.
"""

from __future__ import annotations

SILENT_SECONDS = 6.0
"""A broker that takes 5 s for each answer is slow, and not told to be down."""
SLOW_MOST = 30.0
"""The longest that a silence is not told; and one that is longer comes of no slowness."""
CALM_SECONDS = 60.0
LOOK_SECONDS = 0.5
"""How often one looks."""


class Silence:
    """How long what was sent waits without any acknowledgement. All times are in seconds."""

    def __init__(self) -> None:
        """Nothing was sent."""
        self.since: float | None = None
        """Since when something waits; None: nothing does."""
        self._limit = SILENT_SECONDS
        self._slow_at = float("-inf")

    def sent(self, now: float) -> None:
        """Something is sent."""
        if self.since is None:
            self.since = now

    def answered(self, now: float, since: float | None) -> None:
        """Something was acknowledged, or refused for good. What else was sent waits `since` then.

        None: nothing else was.
        """
        took = now - self.since if self.since is not None else 0.0
        if took >= SILENT_SECONDS:
            self._slow_at = now
            if self._limit <= took < SLOW_MOST:
                self._limit = min(2 * self._limit, SLOW_MOST)
        elif now - self._slow_at >= CALM_SECONDS:
            self._limit = SILENT_SECONDS
        self.since = since

    def forget(self) -> None:
        """Nothing waits any more."""
        self.since = None

    def lasts(self, now: float) -> bool:
        """Whether the broker is silent."""
        return self.since is not None and now - self.since >= self._limit

    def reason(self, now: float) -> str:
        """What is said of it, while it lasts."""
        waited = now - self.since if self.since is not None else 0.0
        return f"the broker has acknowledged nothing for {waited:.0f} s"
