"""What `stream.shed` tells of a run: when events were sampled, and how many were left out.

What is left out has no number, so nothing is missing for it; the last heartbeat has to count as
many at least.
"""

from __future__ import annotations

from collections import Counter

from streamer.verify import report
from streamer.verify.records import Shed

MOST_PERIODS = 100
"""Periods that are reported for a run."""


class Shedding:
    """The records of one run, in the order in which they were made."""

    def __init__(self) -> None:
        """None yet."""
        self.periods: list[report.ShedPeriod] = []
        self.total = 0
        self.shed: Counter[str] = Counter()
        """Told as left out, per kind."""
        self._open: report.ShedPeriod | None = None

    def take(self, record: Shed) -> None:
        """Take in the next."""
        told = record.kinds
        self.shed.update(told)
        before = self._open
        if before is None:
            if record.level == 0 and not told:
                return
            self.total += 1
            # If it is over, it had begun before what is there.
            reason = record.reason if record.level else ""
            before = report.ShedPeriod(record.since_ns, 0, 0, reason, {})
        kinds = dict(Counter(before.kinds) + Counter(told))
        level = max(before.level, record.level)
        to_ns = 0 if record.level else record.since_ns
        period = report.ShedPeriod(before.from_ns, to_ns, level, before.reason, kinds)
        if self._open is not None and self.periods and self.periods[-1] is self._open:
            self.periods.pop()
        if len(self.periods) < MOST_PERIODS:
            self.periods.append(period)
        self._open = period if record.level else None
