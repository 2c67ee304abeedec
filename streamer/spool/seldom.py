"""What is said of one thing once in a while only, and of each thing apart."""

from __future__ import annotations

from collections.abc import Hashable

MOST = 16
"""Things that are remembered: the one that was said first is forgotten for another."""


class Seldom:
    """So that what fails again and again fills no log, and hides nothing else that fails."""

    def __init__(self, seconds: float) -> None:
        """How long each is not said again."""
        self._seconds = seconds
        self._said: dict[Hashable, float] = {}

    def may(self, what: Hashable, now: float) -> bool:
        """Whether it is to be said now; then it is taken as said."""
        if now < self._said.get(what, now):
            return False
        self._said.pop(what, None)
        while len(self._said) >= MOST:
            del self._said[next(iter(self._said))]
        self._said[what] = now + self._seconds
        return True
