"""What the tests of the spool share: real events, a spool in a directory, and a sink behind it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec

from streamer.config.settings import SpoolSection
from streamer.events.batch import Batch, Event
from streamer.events.kinds import KINDS
from streamer.events.spans import Place, Span
from streamer.events.stream import PreviousRun
from streamer.sinks.memory import MemorySink
from streamer.spool.sink import Mode, SpooledSink
from streamer.spool.spool import SHARE, Spool
from tests.golden.cases import load
from tests.recorder import SpanRecorder

WAIT = 20.0
RUN = "0123456789abcdef"
SAMPLES = {case.event["event"]: case.event for case in load()}
RING = {kind: info.ring for kind, info in KINDS.items()}


def event(kind: str, seq: int, run: str = RUN, **fields: object) -> Event:
    """An event as the decoder makes it, of CPU 0."""
    ring = RING[kind]
    own = {"id": f"{run}-{ring}-0-{seq}", "seq": seq, "cpu": 0, "ring": ring}
    made: Event = msgspec.convert(SAMPLES[kind] | own | fields, KINDS[kind].struct)
    return made


def batch(kind: str, first: int, count: int, run: str = RUN, **fields: object) -> Batch:
    """Events of a kind, with the numbers from `first` on."""
    events = [event(kind, seq, run, **fields) for seq in range(first, first + count)]
    place: Place = RING[kind], 0
    return Batch(events, spans={place: Span(first, first + count - 1)})


class Run:
    """A run of an agent, as far as the spool knows it: in this process, and so without a kill."""

    def __init__(
        self,
        directory: Path,
        mode: Mode = "spill",
        budget: int = 1 << 20,
        most: int = 1 << 26,
        run: str = RUN,
    ) -> None:
        spool = Spool.open(SpoolSection(directory=str(directory), max_bytes=most), lambda: None)
        assert spool is not None
        assert spool.use()
        self.spool = spool
        self.inner = MemorySink("memory:", budget // SHARE)
        self.sink: SpooledSink = spool.in_front_of(self.inner, mode, budget)
        self.recorder = SpanRecorder()
        self.sink.listener = self.recorder
        self.note = PreviousRun(run, "boot", "0", 1, "killed", [])

    async def start(self, *, hold: bool = False) -> None:
        self.inner.hold = hold
        self.spool.begin(self.note)
        await self.sink.start()

    async def stop(self) -> None:
        await self.sink.stop(0.2)
        self.spool.note(self.note)
        await self.spool.close()

    def another(self, name: str, mode: Mode, budget: int = 1 << 20) -> SpooledSink:
        """A further sink with the same spool, before it is started."""
        made = self.spool.in_front_of(MemorySink(name, budget // SHARE), mode, budget)
        made.listener = self.recorder
        return made

    @property
    def delivered(self) -> list[str]:
        return self.delivered_to(self.sink)

    @staticmethod
    def delivered_to(sink: SpooledSink) -> list[str]:
        assert isinstance(sink.inner, MemorySink)
        return [one.id for one in sink.inner.events]  # type: ignore[attr-defined]

    def check(self) -> None:
        """received = delivered + dropped + pending, for each kind."""
        account = self.sink.account
        left = Counter(account.received)
        left.subtract(account.delivered)
        left.subtract(account.dropped)
        assert min(left.values(), default=0) >= 0
        assert left.total() == account.pending
        assert self.sink.spooled <= account.pending

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until `condition` holds, with the account right all the time."""
        async with asyncio.timeout(WAIT):
            while not condition():
                self.check()
                await asyncio.sleep(0.002)
        self.check()


def ids(*batches: Batch) -> list[str]:
    return [one.id for made in batches for one in made.events]
