"""Where the records of a host are: partitions and topics, of which one may be behind the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamer.verify.run import Run

SETTLED_NS = 10_000_000_000
"""So long after a heartbeat, all that was lost before it is told, unless the run has ended."""


class Lanes:
    """The lanes of a host, over all of its runs."""

    def __init__(self, runs: Sequence[Run]) -> None:
        """How each run ended has to be known."""
        self.names = frozenset[str]().union(*(one.lanes for one in runs))
        self._ended = max((one.number for one in runs if one.end == "ended"), default=-1)
        self._gone_on: dict[str, int] = {}
        """The newest run that has gone on for a while in it, by its number."""
        for one in runs:
            for lane, newest_ns in one.lanes.items():
                if newest_ns - one.first_boot_ns > SETTLED_NS:
                    self._gone_on[lane] = max(self._gone_on.get(lane, -1), one.number)

    @property
    def is_one(self) -> bool:
        """Whether all is in one, in order."""
        return len(self.names) <= 1

    def has_replayed(self, teller: Run) -> bool:
        """Whether all that there was in the spool of the run before the `teller` has come.

        It comes before what the teller has to say, in each lane. So it has where that one, or one
        after it, has gone on for a while; or ended in order, if there is but one lane.
        """
        if self.is_one and self._ended >= teller.number:
            return True
        return all(self._gone_on.get(lane, -1) >= teller.number for lane in self.names)
