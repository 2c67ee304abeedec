"""A spool in front of a sink: to everybody else it is that sink, with room on disk.

`spill`: batches go straight to the sink while it has room, and to the disk once it has none, until
all that is on disk has been sent. `wal`: every batch is on disk before the sink gets it.

The sink gets batches in the order in which they were submitted, each with its number (`ticket`).
What it has accounted for (`Sink.oldest`) is forgotten on disk. When the agent stops, what is not
delivered is written to the disk as well, and delivered by the next run.

When the disk does not take a batch, this and all after it wait in memory, as without a spool: the
budget is full, then, and reading pauses or events are dropped. The disk is tried again now and
then.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Literal

from msgspec import UNSET

from streamer.events.batch import Batch
from streamer.events.spans import NO_SPANS, Spans, join_spans, spans_of_records
from streamer.sinks.base import Listener, Sink, Status
from streamer.spool.records import CRITICAL, batch_of, run_of
from streamer.spool.seldom import Seldom
from streamer.spool.store import ROW_BYTES, Found, GivenUp, Item, Mark, SpoolError
from streamer.spool.writer import TRANSACTION_BYTES, TRIES, Fed, Writer

Mode = Literal["spill", "wal"]
Numbers = Mapping[tuple[str, int], int]
"""A sequence number for each ring and CPU."""

MADE_WAY = "the spool was full, and this was the oldest"
READ_BYTES = 1 << 20
"""Bytes of batches that are read at once."""
RETRY_SECONDS = 5.0
"""How long the disk is left alone after it did not take something."""
WARN_SECONDS = 600.0
"""How often at most it is said that the disk fails, for the same reason."""
TICK_SECONDS = 0.02
"""How often one looks at what the sink has delivered."""
FORGET_SECONDS = 0.5
"""How often at most what was delivered is forgotten on disk; with what is written, at once."""
STRUCT_FACTOR = 4
"""How many times its JSON an event takes as a Struct, about."""
_END_SECONDS = 0.2

_log = logging.getLogger("streamer")


class _Held:
    """A batch that is not on disk, or that is and waits for the word that it is."""

    __slots__ = ("batch", "item", "size", "told")

    def __init__(self, item: Item, batch: Batch | None, told: tuple[int, ...]) -> None:
        """`batch` is kept where it is to be given to the sink as soon as it is on disk.

        `told`: the lost batches of which it tells, by their n.
        """
        self.item = item
        self.batch = batch
        self.told = told
        factor = STRUCT_FACTOR if batch is not None else 1
        self.size = ROW_BYTES + factor * len(item.data)


class SpooledSink(Sink, Listener):
    """A sink with a spool. Its account has what is on disk as `pending`."""

    def __init__(self, inner: Sink, mode: Mode, budget_bytes: int) -> None:
        """`inner` has a budget of its own, and implements `oldest`. `attach` comes before use."""
        super().__init__(inner.name, budget_bytes)
        self.inner = inner
        self.mode = mode
        self.ends_quietly = inner.ends_quietly
        inner.listener = self
        self.account.delivered = inner.account.delivered
        self.latency = inner.latency  # of the sink itself: what waits on disk is late anyway
        self._writer: Writer | None = None
        self._most = TRANSACTION_BYTES
        self._numbers: Iterator[int] = iter(())
        self._n = 0  # of the last batch
        self._writing: deque[_Held] = deque()  # in order of n, as all of these
        self._memory: deque[_Held] = deque()
        self._sent: deque[tuple[int, _Held | None, Spans]] = deque()
        self._disk = 0  # batches on disk that the sink has not been given
        self._disk_kinds: Counter[str] = Counter()
        self._reading = False
        self._feeding = False  # what comes next is at hand already
        self._settled = 0
        self._forgotten = 0
        self._forget_at = 0.0
        self._failed = ""
        self._lasting = False
        self._retry_at = 0.0
        self._warned = Seldom(WARN_SECONDS)
        self._untold: list[int] = []  # what is lost of what was on disk, and not told
        self._telling: list[tuple[int, tuple[int, ...]]] = []  # the n of a batch that tells of some
        self._defects = 0  # of the sink's, in a row
        self._on_disk = False  # whether anything may be there that can be forgotten
        self._read_at = 0.0
        self._points: deque[tuple[int, Numbers, Numbers]] = deque()
        self._marks: dict[tuple[str, int], list[int]] = {}
        self._marked = False
        self._ending = False
        self._letting_go = False  # nothing is given to the sink any more, nor forgotten on disk
        self._elsewhere: set[int] = set()  # what was put on disk then, or is told as lost
        self._kept: Counter[str] = Counter()
        self._ticking: asyncio.Task[None] | None = None

    # What others see of it

    @property
    def spooled(self) -> int:
        """Events on disk that the sink has not been given."""
        return self._disk_kinds.total()

    @property
    def spool_filled(self) -> float:
        """See `Sink`."""
        return self._writer.filled if self._writer is not None else 0.0

    @property
    def waiting(self) -> int:
        """See `Sink`: what is on disk, or can be put there, need not be waited for."""
        if self._failed:
            return self.account.pending - self.spooled
        writing = sum(held.item.number for held in self._writing)
        return writing + (self.inner.account.pending if self.inner.reachable else 0)

    @property
    def kept(self) -> Mapping[str, int]:
        """See `Sink`."""
        return self._kept

    def attach(self, writer: Writer, found: Found, last: int, numbers: Iterator[int]) -> None:
        """Use the spool, in which the runs before left what was `found`, and no `n` over `last`.

        `numbers` go on from there, for all sinks that use it: an `n` is there once.
        """
        self._writer = writer
        self._most = writer.most
        self._numbers = numbers
        self._n = last
        self._disk, self.recovered = found.batches, found.number
        self._disk_kinds = found.kinds.copy()
        self._on_disk = self._disk > 0
        self.account.received.update(found.kinds)

    async def start(self) -> None:
        """See `Sink`."""
        await self.inner.start()
        self._ticking = asyncio.ensure_future(self._tick())

    def submit(self, batch: Batch) -> None:
        """See `Sink`."""
        if not batch.events:
            return
        self.account.received.update(batch.kinds)
        self._settle()
        for part in _parts(batch, self._most):
            self._sort(part)

    def _sort(self, batch: Batch) -> None:
        critical = batch.only(CRITICAL)
        if 0 < len(critical) < len(batch) and self._to_disk():
            # Apart, so that one can make way without the other.
            rest = batch.only(batch.kinds.keys() - critical.kinds.keys())
            for part, bulk in ((critical, False), (rest, True)):
                spans = {p: span for p, span in batch.spans.items() if (p[0] == "bulk") is bulk}
                self._submit(Batch(part.events, part.kinds, spans))
        else:
            self._submit(batch)

    def _to_disk(self) -> bool:
        return self.mode == "wal" or bool(self._behind) or self.inner.watermarks.full

    @property
    def _behind(self) -> int:
        """How many batches have to be given to the sink before the next one."""
        return self._disk + len(self._writing) + len(self._memory)

    def _submit(self, batch: Batch) -> None:
        self._n = next(self._numbers)
        direct = self._disk == 0 and not self._memory and not self.inner.watermarks.full
        direct = direct and self.status != "closed"
        told: tuple[int, ...] = ()
        if batch.kinds.get("stream.loss"):
            told, self._untold = tuple(self._untold), []
        if self.mode == "spill" and direct and not self._writing and not told:
            self._give(self._n, batch, _Held(self._item(self._n, batch, fed=False), None, ()))
            return
        # What tells of lost batches is on disk as soon as these are not: it is told once.
        first = self.mode == "wal" or bool(told)
        direct = direct and first and all(h.batch is not None for h in self._writing)
        item = self._item(self._n, batch, fed=direct)
        if self._failed and not self._writing and not self._may_retry():
            self._remember(item, told)
        else:
            if self._failed and self._may_retry():
                self._retry()
            held = _Held(item, batch if direct else None, told)
            self._hold(held.size)
            self._write(held)
        self._feed()

    def _item(self, n: int, batch: Batch, *, fed: bool) -> Item:
        critical = batch.kinds.keys() <= CRITICAL
        data = batch.lines("json")
        return Item(n, self.name, run_of(batch), critical, len(batch), batch.kinds, batch.spans,
                    data, fed)  # fmt: skip

    def _hold(self, size: int) -> None:
        if self.watermarks.add(size):
            self.listener.sink_full(self)

    # The disk

    def _write(self, held: _Held) -> None:
        assert self._writer is not None
        self._writing.append(held)
        self._writer.put(held.item, self._wrote, held.told)

    def _wrote(self, items: Sequence[Item], error: SpoolError | None) -> None:
        """These are on disk, or none of them is."""
        known = {item.n for item in items}
        with self._busy():
            while self._writing and self._writing[0].item.n in known:
                held = self._writing.popleft()
                self._release(held.size)
                if error is not None:
                    self._remember(held.item, held.told)
                    continue
                self._on_disk = True
                if held.batch is not None and self.status != "closed":
                    self._give(held.item.n, held.batch, None)
                else:
                    self._disk += 1
                    self._disk_kinds.update(held.item.kinds)
        if error is not None:
            self._fail(error)
        elif self._failed and items:
            self._failed = ""
            _log.info("%s: the spool is used again", self.name)
        self._feed()

    def _fail(self, error: SpoolError) -> None:
        now = asyncio.get_running_loop().time()
        self._retry_at = now + RETRY_SECONDS
        self._failed = self._failed or error.reason
        if self._warned.may(error.reason, now):  # a disk that is full fails again and again
            _log.warning("%s: the spool is not used for now, and events wait in memory: %s",
                         self.name, error.reason)  # fmt: skip
        if error.lasting and not self._lasting:
            self._lasting = True
            self._failed = error.reason
            reason = f"the spool cannot be read: {error.reason}"
            lost, self._disk_kinds, self._disk = self._disk_kinds, Counter(), 0
            if lost:
                self.account.dropped.update(lost)
                self.listener.sink_dropped(self, lost, reason, NO_SPANS)

    def _remember(self, item: Item, told: tuple[int, ...]) -> None:
        held = _Held(item._replace(fed=False), None, told)
        self._hold(held.size)
        self._memory.append(held)

    def _may_retry(self) -> bool:
        """Not while something is on its way, which is behind what waits in memory."""
        late = asyncio.get_running_loop().time() >= self._retry_at
        return late and not self._lasting and not self._writing

    def _retry(self) -> None:
        """Put what waits in memory on disk after all."""
        self._retry_at = asyncio.get_running_loop().time() + RETRY_SECONDS
        assert self._writer is not None
        self._writer.again(self.name)
        waiting, self._memory = self._memory, deque()
        for held in waiting:
            self._write(held)

    def gave_up(self, victim: GivenUp, spans: Spans) -> None:
        """A batch made way for others. `spans` name its run, if it is another one."""
        self._untold.append(victim.n)
        for held in self._writing:  # as soon as it was there: `_wrote` will not name it
            if held.item.n == victim.n:
                self._writing.remove(held)
                self._release(held.size)
                self._elsewhere |= {victim.n} if self._letting_go else set()
                break
        else:
            self._disk -= 1
            self._disk_kinds.subtract(victim.kinds)
        self.account.dropped.update(victim.kinds)
        self.listener.sink_dropped(self, victim.kinds, MADE_WAY, spans)

    # To the sink

    def _give(self, n: int, batch: Batch, held: _Held | None) -> None:
        """Give the sink a batch, and keep what is `held` until it has accounted for it.

        It is not counted: the sink counts it, and as a rule it is the same memory.
        """
        if held is not None and held.told:
            self._telling.append((n, held.told))
        self._sent.append((n, held, batch.spans))
        self.inner.ticket = n
        before = self.inner.account.received.copy()
        with self._busy():  # what it has room for then, would be ahead of what it is asked to take
            try:
                self.inner.submit(batch)
            except Exception as error:  # a defect of the sink's costs what it did not take
                taken = self.inner.account.received - before
                self._fail_to_give(n, batch, Counter(batch.kinds) - taken, error)
            else:
                self._defects = 0

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """Something is given to the sink, or follows at once: nothing else is fed meanwhile."""
        before, self._feeding = self._feeding, True
        try:
            yield
        finally:
            self._feeding = before

    def _fail_to_give(self, n: int, batch: Batch, lost: Counter[str], error: Exception) -> None:
        """The sink failed at a batch, of which `lost` was not taken: that is told, and it goes on.

        After three in a row it is given nothing more: the rest is kept for the next run.
        """
        self._defects += 1
        last = traceback.extract_tb(error.__traceback__)[-1:]
        where = [(frame.filename, frame.lineno) for frame in last]
        if self._warned.may((type(error), *where), asyncio.get_running_loop().time()):
            _log.error("%s failed", self.name, exc_info=error)
        reason = f"the sink failed: {type(error).__name__}: {error}"[:200]
        if lost == Counter(batch.kinds):
            self._sent = deque((n, None, NO_SPANS) if one[0] == n else one for one in self._sent)
            self._give_up(n, lost, reason, batch.counted())
        elif lost:  # which were taken nobody knows: all are on disk until these are delivered
            self._drop(lost, reason, batch.spans)
        if self._defects >= TRIES:
            self._set_status("closed", reason)

    def _give_up(self, n: int, kinds: Mapping[str, int], reason: str, spans: Spans) -> None:
        """A batch is lost; if it is on disk, it stays there until that is told."""
        if self._writer is not None:
            self._writer.aside(n)
        self._untold.append(n)
        self._drop(kinds, reason, spans)

    def _drop(self, kinds: Mapping[str, int], reason: str, spans: Spans) -> None:
        """Account for what is lost, and was the sink's.

        What told of lost batches may be lost itself: what is told in its place tells of them.
        """
        if kinds.get("stream.loss"):
            self._untold += (n for _, told in self._telling for n in told)
            self._telling.clear()
        self.account.dropped.update(kinds)
        self.listener.sink_dropped(self, kinds, reason, spans)

    def _feed(self) -> None:
        """Give the sink what comes next, as long as it has room."""
        if self._reading or self._feeding or self._letting_go:
            return
        if "closed" in (self.status, self.inner.status):
            return
        if self._disk and self._writer is not None:
            # At the end the rest is left to the next run.
            late = asyncio.get_running_loop().time() >= self._read_at
            if late and not self.inner.watermarks.full and not self._ending:
                self._reading = True
                self._writer.next(self.name, READ_BYTES, self._read)
            return
        while self._memory and not self.inner.watermarks.full and self.status != "closed":
            batch, reason = self._batch_of(self._memory[0].item)
            held = self._memory.popleft()
            with self._busy():
                self._release(held.size)
                if reason:
                    self._sent.append((held.item.n, None, NO_SPANS))
                    self._untold += held.told
                    self._give_up(held.item.n, held.item.kinds, reason, held.item.spans)
                else:
                    self._give(held.item.n, batch, held)

    @staticmethod
    def _batch_of(item: Item) -> tuple[Batch, str]:
        """What is in memory; or the reason why it cannot be read."""
        try:
            batch, reason = batch_of(item, item.run)
        except MemoryError:
            raise
        except Exception as error:  # a defect, which is to hold up nothing that is behind it
            _log.exception("a defect of what reads the spool")
            return Batch([]), f"made a defect of what reads the spool: {type(error).__name__}"
        if not reason:
            for event in batch.events:  # it was never anywhere else than here
                event.replayed = UNSET
            # What they were made of: the sink is not to hold it a second time, beside the item's.
            batch.encoded_as(item.data)
        return batch, reason

    def _read(self, found: list[Fed], error: SpoolError | None) -> None:
        self._reading = False
        if error is not None:
            self._fail_to_read(error)
            return
        if not found:  # all that is not there any more was told
            self._disk = 0
        with self._busy():
            for n, batch, reason in found:
                if self.status == "closed":  # it failed: the next run reads it again
                    break
                self._disk -= 1
                self._disk_kinds.subtract(batch.kinds)
                if reason:
                    self._sent.append((n, None, NO_SPANS))
                    self._give_up(n, batch.kinds, reason, batch.spans)
                else:
                    self._give(n, batch, None)
        self._feed()

    def _fail_to_read(self, error: SpoolError) -> None:
        """What is on disk waits there; that nothing can be written is not said by it."""
        if error.lasting:
            self._fail(error)
        now = asyncio.get_running_loop().time()
        self._read_at = now + RETRY_SECONDS
        if not error.lasting and self._warned.may(("read", error.reason), now):
            _log.warning("%s: what is in the spool waits there: %s", self.name, error.reason)

    def _settle(self) -> None:
        """Forget what the sink has accounted for."""
        self.delivered_bytes = self.inner.delivered_bytes
        oldest = self.inner.oldest() if self._sent else None
        while self._sent and (oldest is None or self._sent[0][0] < oldest):
            n, held, spans = self._sent.popleft()
            self._settled = max(n, self._settled)
            if held is not None:
                self._note_last(spans)
        while self._telling and (oldest is None or self._telling[0][0] < oldest):
            _, told = self._telling.pop(0)
            if self._writer is not None:
                self._writer.told(told)
        self._forget()

    def _forget(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._settled <= self._forgotten or self._writer is None or now < self._forget_at:
            return
        self._forgotten, self._forget_at = self._settled, now + FORGET_SECONDS
        if self._on_disk:
            self._on_disk = bool(self._behind or self._sent)
            self._writer.done(self.name, self._settled)

    # How far it has come

    def checkpoint(self, numbers: Numbers, taken: Numbers) -> None:
        """See `Sink`."""
        self._points.append((self._n, numbers, taken))
        if len(self._points) > 4:  # while nothing gets on, the first and the newest will do
            del self._points[2]

    def _note_last(self, spans: Spans) -> None:
        for place, span in spans.items():
            if len(place) == 2 and place[0] != "stream":
                mark = self._marks.setdefault(place, [0, 0, 0])
                mark[1] = max(mark[1], span.last)
                self._marked = True

    def safe(self) -> int:
        """The last `n` up to which each batch is on disk, or accounted for."""
        memory = [held.item.n for held in (*self._sent_held(), *self._first(self._writing),
                                           *self._first(self._memory))]  # fmt: skip
        return min(memory, default=self._n + 1) - 1

    def _sent_held(self) -> list[_Held]:
        return [held for _, held, _ in self._sent if held is not None][:1]

    @staticmethod
    def _first(queue: deque[_Held]) -> list[_Held]:
        return [queue[0]] if queue else []

    def marks(self) -> list[Mark]:
        """How far it has come, if that has changed."""
        safe = self.safe()
        while self._points and self._points[0][0] <= safe:
            _, numbers, taken = self._points.popleft()
            for place, seq in numbers.items():
                self._marks.setdefault(place, [0, 0, 0])[0] = seq
            for place, seq in taken.items():
                self._marks.setdefault(place, [0, 0, 0])[2] = seq
            self._marked = True
        if not self._marked:
            return []
        self._marked = False
        return [Mark(self.name, *place, *numbers) for place, numbers in self._marks.items()]

    # The end

    def discard(self, reason: str) -> None:
        """See `Sink`. With a disk that works nothing is dropped: see `stop`."""
        self._ending = True
        if self._failed:
            self.inner.discard(reason)
            self._drop_memory(reason)

    def _drop_memory(self, reason: str) -> None:
        while self._memory:
            held = self._memory.popleft()
            self._release(held.size)
            self._untold += held.told
            self.account.dropped.update(held.item.kinds)
            spans = spans_of_records(held.item.data, held.item.spans)
            self.listener.sink_dropped(self, held.item.kinds, reason, spans)

    async def stop(self, grace: float) -> None:
        """See `Sink`. What is not delivered within `grace` is kept for the next run.

        What neither the sink nor the disk took in time is lost. It may come all the same: a disk
        that takes it later is not waited for.
        """
        self._ending = True
        loop = asyncio.get_running_loop()
        end = loop.time() + grace
        if self._ticking is not None:
            self._ticking.cancel()
        while self.waiting and loop.time() < end - min(_END_SECONDS, grace / 2):
            self._settle()
            await asyncio.sleep(0.005)
        self._settle()
        self._letting_go = True
        if self._writer is not None and not self._failed:
            await self._keep(end)
        missing = self._missing()
        await self.inner.stop(max(end - loop.time(), 0.0) if missing or self._lasting else 0.0)
        self._lose(missing)
        self._kept = self.account.received - self.account.delivered - self.account.dropped
        self._set_status("closed")

    async def _keep(self, end: float) -> None:
        """Put on disk what is in memory alone, for the next run."""
        assert self._writer is not None
        loop = asyncio.get_running_loop()
        for _, held, _ in self._sent:
            if held is not None:
                self._writing.append(held)
                self._writer.put(held.item, self._kept_on_disk, held.told)
        self._writer.done(self.name, self._settled)
        end = max(end, loop.time() + _END_SECONDS)
        while self._writing and not self._failed and loop.time() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    def _kept_on_disk(self, items: Sequence[Item], error: SpoolError | None) -> None:
        known = {item.n for item in items}
        if error is not None:
            self._fail(error)
            return
        self._elsewhere |= known
        self._writing = deque(held for held in self._writing if held.item.n not in known)

    def _missing(self) -> list[Item]:
        """What is in memory alone."""
        held = [*self._writing, *self._memory, *(held for _, held, _ in self._sent if held)]
        return list({one.item.n: one.item for one in held
                     if one.item.n not in self._elsewhere}.values())  # fmt: skip

    def _lose(self, missing: list[Item]) -> None:
        """Drop what is nowhere any more; the rest of what is pending is on disk.

        Of a batch that was delivered in part nobody says which part: so no more than is pending.
        """
        pending = self.account.received - self.account.delivered - self.account.dropped
        lost, spans = pending, (span for _, _, span in self._sent)
        if not self._lasting:
            lost, spans = Counter(), (spans_of_records(item.data, item.spans) for item in missing)
            for item in missing:
                lost.update(item.kinds)
            if lost - pending:
                lost, spans = lost & pending, (item.spans for item in missing)
        if lost:
            self.account.dropped.update(lost)
            reason = "neither delivered nor on disk when the agent stopped"
            self.listener.sink_dropped(self, lost, reason, reduce(join_spans, spans, NO_SPANS))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            try:
                self._settle()
                if self._failed and self._memory and self._may_retry():
                    self._retry()
                self._feed()
            except Exception as error:  # a defect: it is seen, and what waits goes on
                if self._warned.may(("tick", type(error)), asyncio.get_running_loop().time()):
                    _log.exception("%s: the spool goes on after an error", self.name)

    # What the sink says

    def sink_full(self, sink: Sink) -> None:
        """See `Listener`: that is what the spool is for."""

    def sink_room(self, sink: Sink) -> None:
        """See `Listener`."""
        self._feed()

    def sink_status(self, sink: Sink, status: Status, reason: str) -> None:
        """See `Listener`."""
        if self.status == "closed":  # it failed, and is given nothing more
            return
        if status == self.status:
            self.listener.sink_status(self, status, reason)
        elif status != "closed" or not self._letting_go:
            self._set_status(status, reason)

    def sink_anew(self, sink: Sink) -> None:
        """See `Listener`."""
        self.listener.sink_anew(self)

    def sink_dropped(self, sink: Sink, kinds: Mapping[str, int], reason: str, spans: Spans) -> None:
        """See `Listener`. At the end what is on disk is not lost, and `_lose` tells of the rest."""
        if not self._letting_go:
            self._drop(kinds, reason, spans)


def _parts(batch: Batch, most: int) -> Iterator[Batch]:
    """In parts of at most `most` bytes as they are on disk, or of one event.

    Who is observed has a say in how large an event is. One row with all of a large drain would be
    more than the log's share of the limit, or than the limit itself, and could never be written.
    """
    if len(batch) == 1 or len(batch.lines("json")) <= most:
        yield batch
        return
    half = len(batch) // 2
    for events in (batch.events[:half], batch.events[half:]):
        yield from _parts(Batch(events, spans=batch.spans), most)
