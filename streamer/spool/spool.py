"""The spool of an agent: one place, one writer, and the sinks that use it."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable
from itertools import count

import msgspec

from streamer.config.settings import SpoolSection
from streamer.events.stream import PreviousRun, RunMark, SeqRange, UntoldLoss
from streamer.sinks.base import Sink
from streamer.spool.place import Place, open_place
from streamer.spool.records import named_if_possible
from streamer.spool.rows import UNDECODABLE
from streamer.spool.sink import MADE_WAY, Mode, SpooledSink
from streamer.spool.store import Found, GivenUp, Mark, SpoolError
from streamer.spool.writer import Writer

SHARE = 4
"""A sink with a spool has one of so many parts of the budget itself.

As much again is for what goes to disk at the end, and the rest for what is on its way there.
"""

CLOSE_SECONDS = 5.0

_log = logging.getLogger("streamer")


class Before:
    """What the runs before left, as it is told by this one."""

    def __init__(self) -> None:
        """Nothing."""
        self.run: PreviousRun | None = None
        self.marks: list[Mark] = []
        self.untold: list[UntoldLoss] = []
        self.spoiled = ""

    def told_by(self, note: PreviousRun | None) -> PreviousRun | None:
        """The run before, as its note says, with what the spool knows of it beside.

        Without a note, or with one of another run, as the spool has it.
        """
        run = note
        if self.run is not None and (run is None or self.run.started_ns > run.started_ns):
            run = self.run
        if run is None:
            return None
        untold = [*run.untold, *self.untold]
        if self.spoiled:
            untold.append(UntoldLoss(run.run_id, "", "sink", 0, {}, self.spoiled, []))
        marks: list[RunMark] = []
        if self.run is not None and self.run.run_id == run.run_id:
            marks = [RunMark(*mark) for mark in self.marks]
        return msgspec.structs.replace(run, untold=untold, marks=marks)


class Spool:
    """What there is on disk, and the thread that writes to it."""

    def __init__(self, place: Place) -> None:
        """Opened while there were privileges."""
        self.before = Before()
        self.before.spoiled = place.spoiled and (
            f"the spool could not be read, and what it held is lost: {place.spoiled}"
        )
        self._place = place
        self._store = place.store
        self._sinks: dict[str, SpooledSink] = {}
        self._found: dict[str, Found] = {}
        self._last = 0
        self._writer: Writer | None = None
        self._run_id = ""
        self._state = b""

    @classmethod
    def open(cls, settings: SpoolSection, give_up: Callable[[], None]) -> Spool | None:
        """The spool; None, and a line in the log, where there can be none.

        Events then wait in memory, as without one. `give_up` gives up all privileges.
        """
        try:
            return cls(open_place(settings.directory, settings.max_bytes, give_up))
        except SpoolError as error:
            _log.warning("there is no spool, and events wait in memory alone: %s: %s",
                         settings.directory, error.reason)  # fmt: skip
            return None

    def use(self) -> bool:
        """Read what the runs before left, without privileges. Whether it can be used."""
        try:
            self._store.use()
            self._found = self._store.found()
            self._last = self._store.last()
            self.before.marks = self._store.marks()
            self.before.untold = [_untold(one) for one in self._store.given_up()]
            state = self._store.state()
        except SpoolError as error:
            _log.warning("there is no spool, and events wait in memory alone: %s", error.reason)
            self.before.marks, self.before.untold = [], []
            self.before.spoiled = (
                f"the spool could not be read, and what it held is lost: {error.reason}"
            )
            return False
        try:
            run = msgspec.json.decode(state, type=PreviousRun) if state else None
            msgspec.msgpack.encode(run)  # what cannot be published says nothing
            self.before.run = run
        except UNDECODABLE:
            _log.warning("the spool does not say which run wrote it")
        return True

    def in_front_of(self, inner: Sink, mode: Mode, budget_bytes: int) -> SpooledSink:
        """`inner` with this spool. Both together are to hold at most `budget_bytes`."""
        sink = SpooledSink(inner, mode, budget_bytes // 2)
        self._sinks[sink.name] = sink
        return sink

    def begin(self, note: PreviousRun) -> None:
        """Work for the run that says this of itself; on its event loop."""
        self._run_id = note.run_id
        self._state = msgspec.json.encode(note)
        try:
            self._store.begin(self._state)
        except SpoolError as error:
            _log.warning("the spool cannot be written to for now: %s", error.reason)
        self._writer = Writer(self._store, note.run_id)
        self._writer.gave_up = self._gave_up
        numbers = count(self._last + 1)
        for name, sink in self._sinks.items():
            found = self._found.get(name, Found(0, Counter(), 0))
            sink.attach(self._writer, found, self._last, numbers)
            if found.number:
                _log.info("%s: %s events of earlier runs are in the spool", name,
                          f"{found.number:,}")  # fmt: skip
        for name in self._found.keys() - self._sinks.keys():
            _log.warning("the spool has %s events for %s, which is no sink with a spool any more",
                         f"{self._found[name].number:,}", name)  # fmt: skip

    def note(self, note: PreviousRun | None = None) -> None:
        """Keep how far the sinks have come; and what the run says of itself, if that is new."""
        marks = [mark for sink in self._sinks.values() for mark in sink.marks()]
        if note is not None:
            self._state = msgspec.json.encode(note)
        if self._writer is not None and (marks or note is not None):
            self._writer.note(self._state, marks)

    async def close(self) -> None:
        """Write what was asked for, and let go of the files."""
        if self._writer is not None and not await self._writer.close(CLOSE_SECONDS):
            _log.warning("the disk does not answer: the spool was not closed")
        elif self._writer is None:
            self._store.close()
        os.close(self._place.lock)

    def _gave_up(self, victim: GivenUp) -> None:
        sink = self._sinks.get(victim.sink)
        if sink is not None:
            sink.gave_up(victim, named_if_possible(victim.spans, victim.run, self._run_id))
        else:
            _log.warning("%s events for %s, which is no sink any more, made way in the spool",
                         f"{sum(victim.kinds.values()):,}", victim.sink)  # fmt: skip


def _untold(one: GivenUp) -> UntoldLoss:
    ranges = [
        SeqRange(place[0], place[1], span.first, span.last, kinds=dict(span.kinds))
        for place, span in one.spans.items()
        if place[0] != "stream"
    ]
    kinds = {kind: n for kind, n in one.kinds.items() if not kind.startswith("stream.")}
    return UntoldLoss(one.run, one.sink, "sink", sum(kinds.values()), kinds, MADE_WAY, ranges)
