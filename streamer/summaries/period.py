"""All summaries of a run, made together at the end of each period."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from threading import Lock
from typing import Protocol, runtime_checkable

from streamer.events.envelope import Envelope
from streamer.events.summaries import Summary
from streamer.kernel.state import KernelState
from streamer.summaries.profile import ProfileSummary
from streamer.summaries.syscalls import SyscallSummary
from streamer.summaries.xdp import XdpSummary


class Source(Protocol):
    """Makes the records of one kind."""

    def collect(self, period_ns: int) -> Iterable[Summary]:
        """The records of a period, in nanoseconds, that ends now."""


@runtime_checkable
class Holding(Protocol):
    """A source that reads what goes with the programs."""

    def hold(self) -> None:
        """Read now what cannot be read any more once the programs are unloaded."""


_SOURCES: Mapping[str, Callable[[KernelState, Envelope], Source]] = {
    XdpSummary.kind: XdpSummary,
    SyscallSummary.kind: SyscallSummary,
    ProfileSummary.kind: ProfileSummary,
}


class Summaries:
    """The summaries of the kinds that are wanted, as far as their sensors are loaded."""

    def __init__(self, kernel: KernelState, envelope: Envelope, kinds: Collection[str]) -> None:
        """Raises OSError: a table cannot be mapped."""
        self._sources: list[Source] = []
        self._lock = Lock()  # the last period's may be asked for while another thread makes one's
        self._begun = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        for kind, make in _SOURCES.items():
            if kind in kinds:
                with suppress(KeyError):  # it is not loaded, which its coverage says
                    self._sources.append(make(kernel, envelope))

    def hold(self) -> None:
        """To be called when nothing is counted any more, and before the programs are unloaded."""
        for source in self._sources:
            if isinstance(source, Holding):
                source.hold()

    def collect(self) -> list[Summary]:
        """The records of the period that ends now; the next one begins. In any thread."""
        with self._lock:
            now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            period, self._begun = now - self._begun, now
            return [record for source in self._sources for record in source.collect(period)]
