"""The one thread that works on the database, and what it is asked for.

Whoever asks never waits: answers are calls on the event loop. What came meanwhile is written
together, in one transaction, so that there are no more waits for the disk than it can do.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from streamer.events.batch import Batch
from streamer.spool.records import batch_of, named_if_possible
from streamer.spool.seldom import Seldom
from streamer.spool.store import GivenUp, Item, Mark, SpoolError, Store, Unreadable

_log = logging.getLogger("streamer")

TRANSACTION_BYTES = 4 << 20
"""Bytes of batches, before they are compressed, at which no more go into a transaction."""

WARN_SECONDS = 600.0
"""A defect is logged once in so long."""

TRIES = 3
"""How often a row is tried that makes a defect, before what is in it is lost."""

Wrote = Callable[[Sequence[Item], SpoolError | None], None]
"""Called with batches that are on disk, or that are not and why."""


class Fed(NamedTuple):
    """A batch out of the spool; without events and with a reason where it cannot be read."""

    n: int
    batch: Batch
    reason: str = ""


class _Put(NamedTuple):
    item: Item
    wrote: Wrote
    told: tuple[int, ...]


class _Next(NamedTuple):
    sink: str
    most: int
    read: Callable[[list[Fed], SpoolError | None], None]


class _Done(NamedTuple):
    sink: str
    n: int


class _Told(NamedTuple):
    told: tuple[int, ...]


class _Aside(NamedTuple):
    n: int


class _Again(NamedTuple):
    sink: str


class _Note(NamedTuple):
    state: bytes
    marks: tuple[Mark, ...]


class Writer:
    """Works on the database in a thread of its own, one request after the other."""

    def __init__(self, store: Store, run_id: str) -> None:
        """`store` is in use already. Events of other runs than `run_id` have it in their spans."""
        self._store = store
        self.most = min(TRANSACTION_BYTES, store.transaction_bytes)
        """Bytes of the largest batch that is to be put."""
        self._run_id = run_id
        self._asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._done: dict[str, int] = {}
        self._told: set[int] = set()
        self._note: _Note | None = None
        self._refused: dict[str, SpoolError] = {}
        self._warned = Seldom(WARN_SECONDS)
        self._tries: dict[int, int] = {}
        """How often a row has made a defect, by its `n`."""
        self.gave_up: Callable[[GivenUp], None] = lambda one: None
        self._thread = threading.Thread(target=self._work, name="spool", daemon=True)
        self._thread.start()

    @property
    def filled(self) -> float:
        """The share of the spool that is used, 0 to 1; as of the last transaction."""
        return self._store.filled

    def put(self, item: Item, wrote: Wrote, told: tuple[int, ...] = ()) -> None:
        """Write a batch; with it the lost ones are forgotten of which it tells."""
        self._asked.put(_Put(item, wrote, told))

    def again(self, sink: str) -> None:
        """Write what is put from now on, after something could not be written.

        What was put meanwhile is behind that, and is refused as well: order is kept.
        """
        self._asked.put(_Again(sink))

    def done(self, sink: str, n: int) -> None:
        """Forget the batches of a sink up to this one."""
        self._asked.put(_Done(sink, n))

    def aside(self, n: int) -> None:
        """A batch is lost. If it is on disk, it is not forgotten before that is told."""
        self._asked.put(_Aside(n))

    def told(self, told: tuple[int, ...]) -> None:
        """That these are lost is told: what told it was delivered."""
        self._asked.put(_Told(told))

    def note(self, state: bytes, marks: Iterable[Mark]) -> None:
        """Keep how far the run has come."""
        self._asked.put(_Note(state, tuple(marks)))

    def next(
        self, sink: str, most: int, read: Callable[[list[Fed], SpoolError | None], None]
    ) -> None:
        """Read the next batches of a sink, of about `most` bytes."""
        self._asked.put(_Next(sink, most, read))

    async def close(self, seconds: float) -> bool:
        """Do all that was asked for, and let go of the database. Whether there was time for it."""
        self._asked.put(None)
        deadline = self._loop.time() + seconds
        while self._thread.is_alive() and self._loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        return not self._thread.is_alive()

    # In the thread

    def _work(self) -> None:
        over = False
        while not over:
            asked, over = self._gather()
            puts = []
            for one in asked:
                if isinstance(one, _Put):
                    refused = self._refused.get(one.item.sink)
                    if refused is None:
                        puts.append(one)
                    else:
                        self._call(one.wrote, [one.item], refused)
                elif isinstance(one, _Again):
                    self._refused.pop(one.sink, None)
                elif isinstance(one, _Done):
                    self._done[one.sink] = one.n
                elif isinstance(one, _Told):
                    self._told.update(one.told)
                elif isinstance(one, _Aside):
                    self._set_aside(one.n)
                elif isinstance(one, _Note):
                    self._note = one
            self._write(puts)
            for one in asked:
                if isinstance(one, _Next):
                    self._read(one)
        self._store.close()

    def _gather(self) -> tuple[list[Any], bool]:
        """What was asked for meanwhile, at least one thing; and whether it was the last."""
        asked: list[Any] = []
        size = 0
        one = self._asked.get()
        while one is not None:
            asked.append(one)
            size += len(one.item.data) if isinstance(one, _Put) else 0
            if size >= self.most:
                return asked, False
            try:
                one = self._asked.get_nowait()
            except queue.Empty:
                return asked, False
        return asked, True

    def _write(self, puts: list[_Put]) -> None:
        error: SpoolError | None = None
        gone: list[GivenUp] = []
        note = self._note
        if puts or self._done or self._told or note:
            # Not kept where it fails: what tells of it is not on disk then.
            told = self._told.union(*(one.told for one in puts))
            try:
                gone = self._store.write(
                    [one.item for one in puts],
                    done=self._done,
                    told=told,
                    marks=note.marks if note is not None else (),
                    state=note.state if note is not None else None,
                )
            except Exception as failure:  # what is to be forgotten is, with the next
                error = self._spool_error(failure)
                self._refused |= {one.item.sink: error for one in puts}
                if error.lasting or error is not failure:
                    self._note = None  # it may be what fails; a newer one comes
            else:
                self._done, self._told = {}, set()
                self._note = None
        for victim in gone:
            self._call(self.gave_up, victim)
        made_way = {victim.n for victim in gone}
        for wrote, items in _by_sink(puts):
            left = [item for item in items if item.n not in made_way]
            self._call(wrote, left, error)

    def _set_aside(self, n: int) -> None:
        try:
            self._store.set_aside(n)
        except Exception as error:  # it is forgotten too soon, then
            self._spool_error(error)

    def _read(self, asked: _Next) -> None:
        before = self._store.fed(asked.sink)
        found: list[Fed] = []
        failed: SpoolError | None = None
        try:
            for one in self._store.next(asked.sink, asked.most):
                found.append(self._fed(one))  # those before one that fails count
        except Exception as error:
            failed = self._spool_error(error)
            self._store.feed_from(asked.sink, found[-1].n if found else before)
        # The sink gets those before it; asked for the next, it is told.
        self._call(asked.read, found, None if found else failed)

    def _fed(self, one: Item | Unreadable) -> Fed:
        try:
            fed = Fed(one.n, *batch_of(one, self._run_id))
        except MemoryError:  # the row is not to blame
            raise
        except Exception as error:
            # What fails each time is a defect, and holds up the others no more.
            self._tries[one.n] = self._tries.get(one.n, 0) + 1
            if self._tries[one.n] < TRIES:
                raise
            reason = f"made a defect of what reads the spool: {self._spool_error(error).reason}"
            spans = named_if_possible(one.spans, one.run, self._run_id)
            fed = Fed(one.n, Batch([], dict(one.kinds), spans), reason)
        self._tries.pop(one.n, None)
        return fed

    def _spool_error(self, error: Exception) -> SpoolError:
        """What is said to who asked. A defect is no end of the thread, for which all would wait."""
        if isinstance(error, SpoolError):
            return error
        # Which it is says the place that raised: a message can have anything in it.
        last = traceback.extract_tb(error.__traceback__)[-1:]
        where = [(frame.filename, frame.lineno) for frame in last]
        if self._warned.may((type(error), *where), time.monotonic()):
            _log.error("a defect in the spool's thread", exc_info=error)
        return SpoolError(f"{type(error).__name__}: {error}"[:200])

    def _call(self, back: Callable[..., None], *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is there to know
            self._loop.call_soon_threadsafe(back, *arguments)


def _by_sink(puts: list[_Put]) -> Iterable[tuple[Wrote, list[Item]]]:
    found: dict[str, tuple[Wrote, list[Item]]] = {}
    for one in puts:
        found.setdefault(one.item.sink, (one.wrote, []))[1].append(one.item)
    return found.values()
