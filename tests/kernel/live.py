"""The kernel side in the test's own process, and what comes out of its rings.

The test's process is then the agent, which is left out; what its actors do is observed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection
from typing import Any, Self

import msgspec

from streamer.agent.counters import KernelCounters
from streamer.config.settings import Filters, Settings
from streamer.events.envelope import Envelope
from streamer.events.stream import KindCounts
from streamer.kernel import state
from streamer.kernel.loader import OBJECTS
from streamer.ring.reader import open_sources
from tests.kernel.agent import kind_of
from tests.kernel.bpf_maps import HeldMap, maps_of
from tests.kernel.pace import seconds
from tests.kernel.scope import Scope

DRAIN = 4096


class Live:
    """A loaded kernel state, narrowed down to a scope if there is one; attached in its block."""

    def __init__(
        self,
        scope: Scope | None,
        kinds: Collection[str],
        settings: Settings | None = None,
        directory: str = OBJECTS,
    ) -> None:
        self.scope = scope
        self._before = {one.id for one in maps_of()}
        self.settings = settings or Settings()
        filters = self.within(self.settings.filters)
        wanted = msgspec.structs.replace(self.settings, filters=filters)
        self.state = state.load(wanted, kinds, directory=directory)
        envelope = Envelope()
        self.opened = open_sources(
            self.state.transport,
            self.state.ring_fds,
            self.state.buffers,
            envelope,
            self.state.cpus,
        )
        self._counters = KernelCounters(
            self.state.counters, self.state.kind_counters, self.state.cpus
        )
        self.events: list[Any] = []
        self._gaps: list[Any] = []

    def within(self, filters: Filters) -> Filters:
        """The filters, and that of the scope."""
        if self.scope is None:
            return filters
        return msgspec.structs.replace(filters, cgroups=(self.scope.id,))

    def maps(self) -> list[HeldMap]:
        """The maps that were made since, and are held by this process."""
        return [one for one in maps_of() if one.id not in self._before]

    def read(self) -> list[Any]:
        """What the rings hold, which is all that has happened so far."""
        read: list[Any] = []
        for source in self.opened:
            more = True
            while more:
                events, _, gaps, more, _ = source.ring.drain(source.decoder, DRAIN)
                read += events
                self._gaps += [gap for gap in gaps if gap[0] == "missing"]
        self.events += read
        return read

    def seqs(self) -> dict[str, list[int]]:
        """Per ring, the last number taken on each CPU."""
        return self._counters.seqs()

    def remove(self, map: str, key: bytes) -> None:
        """An element of a map."""
        self.state._loader.delete(map, key)

    def counts(self, kind: str) -> KindCounts:
        """The counts of a kind, which is read first."""
        self.read()
        read = Counter(kind_of(event) for event in self.events)
        nothing = KindCounts(produced=0, filtered=0, shed=0, lost=0, read=0)
        return self._by_kind(read).get(kind, nothing)

    def _by_kind(self, read: Counter[str]) -> dict[str, KindCounts]:
        found = {}
        for kind, (produced, filtered, shed, lost) in self._counters.of_kinds().items():
            found[kind] = KindCounts(produced, filtered, shed, lost, read[kind])
        return found

    def _is_accounted(self) -> bool:
        read = Counter(kind_of(event) for event in self.events)
        return all(
            counts.produced == counts.read + counts.filtered + counts.shed + counts.lost
            for counts in self._by_kind(read).values()
        )

    def check(self) -> None:
        """Detach; every event that was produced is in the account, and no number is missing."""
        self.state.detach()
        # One that was preempted in the middle finishes its record a moment later.
        deadline = time.monotonic() + seconds(2)
        while self.read() or (not self._is_accounted() and time.monotonic() < deadline):
            time.sleep(0.01)
        read = Counter(kind_of(event) for event in self.events)
        for kind, counts in self._by_kind(read).items():
            accounted = counts.read + counts.filtered + counts.shed + counts.lost
            assert counts.produced == accounted, f"{kind}: {counts}"
            if not counts.lost:
                assert not self._gaps

    def __enter__(self) -> Self:
        try:
            self.state.attach()
        except BaseException:
            self.state.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.state.close()
