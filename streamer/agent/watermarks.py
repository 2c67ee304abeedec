"""Before which time nothing more will come, for each ring and CPU.

An event gets its time first and its number after that, and its program can be interrupted between
the two, or before its record is in the ring. So a number that the reader has passed says nothing
about the times of those behind it. But every program that had a time by some moment has ended when
a grace period of the kernel has passed since then (`kernel/grace_period.py`), and has taken its
number. So: note the time, wait for a grace period, read how many numbers were taken; once all of
these were read or are known to be lost, nothing older than that time is left. No event pays.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Place = tuple[str, int]
"""A ring, and a CPU."""

_MOST_NOTED = 64

_log = logging.getLogger("streamer")


class _Noted(NamedTuple):
    boot_ns: int
    taken: Mapping[str, Sequence[int]]


class Watermarks:
    """Notes times, and finds out which of them nothing can be older than."""

    def __init__(
        self, taken: Callable[[], Mapping[str, Sequence[int]]], wait: Callable[[], None]
    ) -> None:
        """`taken` has, per ring, the last number that each CPU has taken; `wait` waits for
        programs that run to end, and raises OSError where that is not possible.
        """
        self._taken = taken
        self._wait = wait
        self._noted: list[_Noted] = []
        self._marks: dict[Place, int] = {}
        self._waiting: asyncio.Task[None] | None = None
        self._impossible = False

    @property
    def noting(self) -> bool:
        """Whether a time is being noted."""
        return self._waiting is not None and not self._waiting.done()

    def tick(self) -> None:
        """Begin to note the time of now, unless one is being noted."""
        if not self._impossible and not self.noting:
            self._waiting = asyncio.ensure_future(self._note())

    async def _note(self) -> None:
        boot_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        try:
            await asyncio.to_thread(self._wait)
        except OSError as error:
            self._impossible = True
            what = errno.errorcode.get(error.errno or 0, error)
            _log.warning("no watermarks: the kernel does not tell when programs ended: %s", what)
            return
        if len(self._noted) >= _MOST_NOTED:
            # Not the oldest goes, which comes first: while what is read is older than all of them,
            # no time would ever be known.
            self._noted = self._noted[::2]
        self._noted.append(_Noted(boot_ns, self._taken()))

    def advance(self, complete: Mapping[Place, int]) -> None:
        """Take the times that everything was told of.

        `complete` is, per ring and CPU, the number up to which each event was handed on or is known
        to be lost; none, or 0, where there was none.
        """
        left: list[_Noted] = []
        for noted in self._noted:
            behind = False
            for ring, numbers in noted.taken.items():
                for cpu, number in enumerate(numbers):
                    if complete.get((ring, cpu), 0) >= number:
                        self._marks[ring, cpu] = noted.boot_ns
                    else:
                        behind = True
            if behind:
                left.append(noted)
        self._noted = left

    def end(self, complete: Mapping[Place, int]) -> None:
        """The programs are detached and the rings read: all that there is has come."""
        now = _Noted(time.clock_gettime_ns(time.CLOCK_BOOTTIME), self._taken())
        self._noted.append(now)
        self.advance(complete)

    def of(self, ring: str, cpu: int) -> int:
        """Nothing that is older than this, in nanoseconds since boot, will follow; 0: not known."""
        return self._marks.get((ring, cpu), 0)
