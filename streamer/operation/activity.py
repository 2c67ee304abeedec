"""Who the events come from, for `streamer top`: counted only while somebody looks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

from streamer.events.batch import Batch, Event
from streamer.events.kinds import TaskEvent
from streamer.operation.look import Activity, Actor

WATCHED_SECONDS = 5.0
"""How long after a look events are still counted."""
MOST_EVENTS = 20_000
"""Events of a window that are looked at: so that a look costs a hundredth of a CPU, not more."""
MOST_ACTORS = 100

Key = tuple[int, str, int]
_NOTHING = Activity(0, 0.0, 0, 0, {}, [], {})


class Watch:
    """Windows of a second each, of which the last whole one is told."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` in seconds."""
        self._clock = clock
        self._until = float("-inf")
        self._last = _NOTHING
        self._number = 0
        self._begin()

    @property
    def watched(self) -> bool:
        """Whether somebody looks."""
        return self._clock() < self._until

    def look(self) -> Activity:
        """The last whole window. Events are counted from now on, for a while."""
        if not self.watched:
            self._begin()
            self._last = _NOTHING
        self._until = self._clock() + WATCHED_SECONDS
        return self._last

    @property
    def last(self) -> Activity:
        """The same, without anybody's looking on for it."""
        return self._last

    def count(self, batch: Batch) -> None:
        """Events were read."""
        self._kinds.update(batch.kinds)
        room = MOST_EVENTS - self._looked_at
        if room <= 0:
            return
        events = batch.events[:room]
        self._looked_at += len(events)
        self._actors.update(filter(None, map(_key, events)))

    def roll(self) -> None:
        """A second is over."""
        if not self.watched:
            return
        self._number += 1
        cgroups = Counter[str]()
        for (_, _, cgroup), count in self._actors.items():
            cgroups[str(cgroup)] += count
        self._last = Activity(
            number=self._number,
            seconds=round(self._clock() - self._since, 3),
            read=self._kinds.total(),
            looked_at=self._looked_at,
            kinds=dict(self._kinds),
            processes=[Actor(*key, count) for key, count in self._actors.most_common(MOST_ACTORS)],
            cgroups=dict(cgroups.most_common(MOST_ACTORS)),
        )
        self._begin()

    def _begin(self) -> None:
        self._since = self._clock()
        self._kinds = Counter[str]()
        self._actors = Counter[Key]()
        self._looked_at = 0


def joined(parts: Sequence[Activity]) -> Activity:
    """What several have seen in windows of about the same time; the first numbers them."""
    first = parts[0]
    kinds, actors, cgroups = Counter[str](), Counter[Key](), Counter[str]()
    for part in parts:
        kinds.update(part.kinds)
        cgroups.update(part.cgroups)
        for one in part.processes:
            actors[one.pid, one.comm, one.cgroup_id] += one.events
    return Activity(
        number=first.number,
        seconds=first.seconds,
        read=sum(part.read for part in parts),
        looked_at=sum(part.looked_at for part in parts),
        kinds=dict(kinds),
        processes=[Actor(*key, count) for key, count in actors.most_common(MOST_ACTORS)],
        cgroups=dict(cgroups.most_common(MOST_ACTORS)),
    )


def _key(event: Event) -> Key | None:
    """Who made it; None for an event that has no task."""
    if isinstance(event, TaskEvent):
        return event.pid, event.comm, event.cgroup_id
    return None
