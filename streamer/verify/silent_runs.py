"""Which runs have said nothing for longer than they would, while others of their host went on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamer.verify.run import Run

SILENT_NS = 60_000_000_000
"""A run that says nothing for so long, or three times as long as ever before, has ended."""

_TIMES = 3
_NEVER = float("-inf")


class SilentRuns:
    """How far the runs of a host have come: each is looked at once, and not for each other."""

    def __init__(self, runs: Sequence[Run]) -> None:
        """All records have come."""
        self._in_boot: dict[str, int] = {}
        """Per boot, the newest of its records, in ns since boot."""
        self._later: dict[str, float] = {}
        """Per run, the newest time of a run that was met after it, of another boot, if any."""
        # Of the runs met later: the newest time, and the newest of another boot than that one's.
        newest: tuple[str, float] = ("", _NEVER)
        other = newest
        for run in sorted(runs, key=lambda run: run.number, reverse=True):
            boot, last_ns = run.boot_id, run.last_ns
            known = self._in_boot.get(boot, run.last_boot_ns)
            self._in_boot[boot] = max(known, run.last_boot_ns)
            self._later[run.run_id] = other[1] if newest[0] == boot else newest[1]
            if last_ns > newest[1]:
                newest, other = (boot, last_ns), (other if newest[0] == boot else newest)
            elif boot != newest[0] and last_ns > other[1]:
                other = boot, last_ns

    def has(self, run: Run) -> bool:
        """Whether others have gone on, and the run has said nothing for longer than it would.

        Across boots the wall clock is asked, and only of runs that were met later: a boot ends
        before the next, whatever the clock said then.
        """
        after = max(
            self._in_boot[run.boot_id] - run.last_boot_ns,
            self._later[run.run_id] - (run.last_boot_ns + run.offset),
        )
        return after > max(SILENT_NS, _TIMES * run.longest_ns)
