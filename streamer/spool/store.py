"""What is on disk: a SQLite database with a row for each batch.

Synchronous, and for one thread at a time. Nothing here knows of sinks but their names.

The database is in WAL mode with exclusive locking, so that both its files are open from the start
and no third one is needed: the process that uses it may neither open files for writing nor make
any. Before privileges are given up only the header is read (`Store.open`), which a statement that
needs no schema does; whatever else is in a file is looked at without privileges.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, get_args

import msgspec
from isal import isal_zlib

from streamer.events.kinds import Ring
from streamer.events.spans import Spans, join_spans, spans_of_records
from streamer.spool.rows import (
    BATCH_BYTES,
    MOST_CPUS,
    MOST_KINDS,
    MOST_NAME,
    MOST_SINKS,
    kinds_of,
    said_by,
    text_of,
    text_of_spans,
)

PAGE_BYTES = 4096
APPLICATION_ID = 0x73747270
"""In the header of the file: "strp"."""
FORMAT = 1
"""Of the tables: what another version wrote is not read."""

MOST_RESERVE = 8 << 20
"""Bytes of the limit, or a quarter of it, that are left for the log in front of the database."""
NO_SENSE = "what is in it makes no sense"
MOST_N = 1 << 62
"""Of a batch: nobody comes so far, and there are numbers after it."""
MOST_MARKS = 8 * MOST_CPUS
MOST_UNTOLD = 1 << 16
"""Batches that made way and of which nothing tells, that are told apart. It is told within a second
or two; but not before the next run where the sink is none any more, or was closed.
"""
MOST_STATE = 1 << 20
"""Bytes of what a run says of itself."""
ROW_BYTES = 300
"""What a row takes in memory beside its events, about."""
_CHAIN_BYTES = PAGE_BYTES - 4
"""What a page takes of a long row: the rest says which page is next."""
_PAGES_BESIDE = 4
_LEVEL = 1
RINGS = frozenset(get_args(Ring))

SCHEMA = (
    "CREATE TABLE batch (n INTEGER PRIMARY KEY, sink TEXT NOT NULL, run TEXT NOT NULL, "
    "critical INTEGER NOT NULL, number INTEGER NOT NULL, kinds TEXT NOT NULL, "
    "spans TEXT NOT NULL, size INTEGER NOT NULL, checksum INTEGER NOT NULL, data BLOB NOT NULL)",
    "CREATE TABLE given_up (n INTEGER PRIMARY KEY, sink TEXT NOT NULL, run TEXT NOT NULL, "
    "kinds TEXT NOT NULL, spans TEXT NOT NULL)",
    "CREATE TABLE mark (sink TEXT NOT NULL, ring TEXT NOT NULL, cpu INTEGER NOT NULL, "
    "seq INTEGER NOT NULL, last INTEGER NOT NULL, taken INTEGER NOT NULL, "
    "UNIQUE (sink, ring, cpu))",
    "CREATE TABLE run (id INTEGER PRIMARY KEY, state TEXT NOT NULL)",
    "CREATE INDEX batch_order ON batch (sink, n)",
    "CREATE INDEX batch_worth ON batch (critical, n)",
)
"""The whole of it, as `sqlite_master` has it. A database with more or less is not used."""


class SpoolError(Exception):
    """The disk does not do its part, in words. `lasting`: what is in the spool is out of reach."""

    def __init__(self, reason: str, *, lasting: bool = False) -> None:
        """See the class."""
        super().__init__(reason)
        self.reason = reason
        self.lasting = lasting


class Item(NamedTuple):
    """A batch for one sink: `number` events in `data`, which is NDJSON.

    `n` says in which order the batches of a sink come, of all runs. `run` is the one that read the
    events. `fed`: the sink gets them from memory as soon as they are on disk.
    """

    n: int
    sink: str
    run: str
    critical: bool
    number: int
    kinds: Mapping[str, int]
    spans: Spans
    data: bytes
    fed: bool = False


class GivenUp(NamedTuple):
    """A batch that made way for others; its events are lost."""

    n: int
    sink: str
    run: str
    kinds: Mapping[str, int]
    spans: Spans


class Unreadable(NamedTuple):
    """A row that is not what was written, and what it says of itself."""

    n: int
    kinds: Mapping[str, int]
    spans: Spans
    run: str


class Mark(NamedTuple):
    """How far a sink has come with the numbers of a ring and CPU.

    Up to `seq` each is on disk, was delivered, or told as lost. None after `last` was ready in
    either way; and `taken` is known to have been taken in the kernel.
    """

    sink: str
    ring: str
    cpu: int
    seq: int = 0
    last: int = 0
    taken: int = 0


class Found(NamedTuple):
    """What the runs before left for a sink."""

    number: int
    kinds: Counter[str]
    batches: int


class Store:
    """The database. Every method raises SpoolError; what failed has then changed nothing."""

    def __init__(self, path: str, most_bytes: int, *, new: bool) -> None:
        """Open the database at `path`, or make it if it is `new`; of at most about `most_bytes`.

        Of one that is there, no more than the header is read, and both files are held open.
        """
        reserve = min(MOST_RESERVE, most_bytes // 4)
        self._limit = max((most_bytes - reserve) // PAGE_BYTES, 16)
        self.transaction_bytes = reserve // 4
        """What goes into a transaction, so that the log does not get larger than its share."""
        self._fed: dict[str, int] = {}
        self._begun = True  # else what there is of the run before is to be forgotten first
        self.filled = 0.0
        """The share of its pages that were used after the last transaction."""
        with _worded():
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._open(max(reserve // 2 // PAGE_BYTES, 8), new=new)

    def _open(self, log_pages: int, *, new: bool) -> None:
        """None of these statements needs the schema, but those that make it."""
        run = self._db.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA trusted_schema = OFF")
        run("PRAGMA cell_size_check = ON")
        run("PRAGMA temp_store = MEMORY")
        run("PRAGMA mmap_size = 0")
        self._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, BATCH_BYTES + (1 << 20))
        (known,) = run("PRAGMA application_id").fetchone()  # opens the log as well
        if new:
            run(f"PRAGMA page_size = {PAGE_BYTES}")
            run("PRAGMA journal_mode = WAL")
            run("BEGIN IMMEDIATE")
            for statement in SCHEMA:
                run(statement)
            run(f"PRAGMA application_id = {APPLICATION_ID}")
            run(f"PRAGMA user_version = {FORMAT}")
            run("COMMIT")
        elif known != APPLICATION_ID:
            raise SpoolError("it is another program's", lasting=True)
        run(f"PRAGMA wal_autocheckpoint = {log_pages}")
        run(f"PRAGMA journal_size_limit = {log_pages * PAGE_BYTES}")

    def check(self) -> None:
        """Look at all of it: that it has our tables and no others, and its pages make sense."""
        with _worded():
            found = {row[0] for row in self._db.execute("SELECT sql FROM sqlite_master") if row[0]}
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if found != set(SCHEMA) or version != FORMAT:
                raise SpoolError("it has other tables than this version makes", lasting=True)
            (said,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
            if said != "ok":
                raise SpoolError("its pages make no sense", lasting=True)
        self.found(), self.last(), self.marks(), self.given_up(), self.state()

    def use(self) -> None:
        """Before anything below: without privileges, because the schema is read.

        SQLite itself is to refuse more pages than the limit, a few for its own needs apart.
        """
        with _worded():
            self._db.execute("PRAGMA synchronous = FULL")
            # Debian's writes zeros over what is deleted, by way of the log: all of it, once more.
            self._db.execute("PRAGMA secure_delete = OFF")
            self._db.execute("CREATE TEMP TABLE aside (n INTEGER PRIMARY KEY)")  # in memory
            self._db.execute(f"PRAGMA cache_size = -{2 << 10}")
            self._db.execute(f"PRAGMA max_page_count = {self._limit + 16}")

    def found(self) -> dict[str, Found]:
        """What there is for each sink."""
        found: dict[str, Found] = {}
        with _worded():
            rows = self._db.execute("SELECT n, sink, number, kinds, "
                                    "max(length(run), length(spans), length(data)) "
                                    "FROM batch")  # fmt: skip
            for n, sink, number, kinds, longest in rows:
                _check([sink], [n - 1, MOST_N - n, number - 1, BATCH_BYTES - number,
                                BATCH_BYTES - longest, MOST_NAME - len(sink)])  # fmt: skip
                counts = kinds_of(kinds)  # and not `number`: they are what becomes of the row
                before = found.get(sink, Found(0, Counter(), 0))
                before.kinds.update(counts)
                number = before.number + sum(counts.values())
                found[sink] = Found(number, before.kinds, before.batches + 1)
                _check([], [MOST_KINDS - len(before.kinds), MOST_SINKS - len(found)])
        return found

    def last(self) -> int:
        """The greatest `n` that was given to any batch."""
        with _worded():
            rows = self._db.execute("SELECT max(n) FROM (SELECT n FROM batch UNION ALL "
                                    "SELECT n FROM given_up)")  # fmt: skip
            return int(rows.fetchone()[0] or 0)

    def marks(self) -> list[Mark]:
        """The marks, of the run that wrote here last."""
        found: list[Mark] = []
        with _worded():
            for row in self._db.execute("SELECT * FROM mark ORDER BY sink, ring, cpu"):
                mark = Mark(*row)
                _check([mark.sink, mark.ring], [*mark[2:], *(MOST_N - one for one in mark[2:]),
                                                MOST_CPUS - 1 - mark.cpu,
                                                MOST_MARKS - len(found)])  # fmt: skip
                if mark.ring not in RINGS:
                    raise SpoolError(NO_SENSE, lasting=True)
                found.append(mark)
        return found

    def given_up(self) -> list[GivenUp]:
        """What made way, and no record that is on disk or was delivered tells of it.

        After so many as are told apart, what is of the same sink and run is one.
        """
        found: list[GivenUp] = []
        newest: dict[tuple[str, str], int] = {}
        with _worded():
            rows = self._db.execute("SELECT n, sink, run, kinds, spans FROM given_up ORDER BY n")
            for n, sink, run, kinds, spans in rows:
                _check([sink, run], [n - 1, MOST_N - n, 2 * MOST_UNTOLD - len(found)])
                one = GivenUp(n, sink, *said_by(run, kinds, spans))
                at = newest.get((sink, one.run))
                if at is None or len(found) < MOST_UNTOLD:
                    newest[sink, one.run] = len(found)
                    found.append(one)
                else:
                    found[at] = _joined(found[at], one)
        return found

    def state(self) -> bytes:
        """What the last run noted of itself; empty for none."""
        with _worded():
            row = self._db.execute("SELECT state FROM run WHERE id = 1").fetchone()
            if row is None:
                return b""
            _check(row, [MOST_STATE - len(row[0])])
            return str(row[0]).encode()

    def begin(self, state: bytes) -> None:
        """A run begins: what the marks and what is given up say of the one before is not kept.

        Where that fails, it is done with the first thing that can be written.
        """
        self._begun = False
        with self._transaction():
            self._forget_the_run_before()
            self._note(state)
            filled = self.pages / self._limit
        self._begun, self.filled = True, filled

    def _forget_the_run_before(self) -> None:
        self._db.execute("DELETE FROM mark")
        self._db.execute("DELETE FROM given_up")

    def _note(self, state: bytes) -> None:
        self._db.execute("INSERT OR REPLACE INTO run VALUES (1, ?)", (state.decode(),))

    def _mark(self, marks: Iterable[Mark]) -> None:
        self._db.executemany(_MARK, marks)

    def write(
        self,
        items: Iterable[Item],
        *,
        done: Mapping[str, int] | None = None,
        told: Iterable[int] = (),
        marks: Iterable[Mark] = (),
        state: bytes | None = None,
    ) -> list[GivenUp]:
        """Write batches, and wait for the disk. Forget, per sink, what is `done` up to there.

        With them goes which lost batches are `told`, and what a run says of itself: how far
        it has come (`marks`), and its `state`. What made way for the batches, the
        oldest of what is not critical first, is the result: a batch of `items` may be among it.
        """
        packed = [(item, isal_zlib.compress(item.data, _LEVEL)) for item in items]
        gone: list[GivenUp] = []
        fed = self._fed.copy()
        try:
            with self._transaction():
                if not self._begun:
                    self._forget_the_run_before()
                for sink, n in (done or {}).items():
                    self._db.execute(
                        "DELETE FROM batch WHERE sink = ? AND n <= ? "
                        "AND n NOT IN (SELECT n FROM aside)",
                        (sink, n),
                    )
                for table in ("batch", "given_up", "aside"):
                    self._db.executemany(f"DELETE FROM {table} WHERE n = ?", [(n,) for n in told])
                for item, data in packed:
                    gone += self._make_room(len(data))
                    self._put(item, data)
                self._mark(_lasts([item for item, _ in packed]))
                self._mark(marks)
                if state is not None:
                    self._note(state)
                filled = self.pages / self._limit
        except BaseException:
            self._fed = fed
            raise
        self._begun, self.filled = True, filled
        return gone

    def _put(self, item: Item, data: bytes) -> None:
        self._db.execute(
            "INSERT INTO batch VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (item.n, item.sink, item.run, int(item.critical), item.number,
             text_of(item.kinds), text_of_spans(item.spans),
             len(item.data), zlib.crc32(item.data), data),
        )  # fmt: skip
        if item.fed:
            self._fed[item.sink] = item.n

    def _make_room(self, size: int) -> Iterator[GivenUp]:
        wanted = size // _CHAIN_BYTES + _PAGES_BESIDE
        while self.pages + wanted > self._limit:
            victim = self._oldest(critical=False) or self._oldest(critical=True)
            if victim is None:
                raise SpoolError("no room: what is in the spool is being sent")
            self._db.execute("DELETE FROM batch WHERE n = ?", (victim.n,))
            self._db.execute(
                "INSERT INTO given_up SELECT ?, ?, ?, ?, ?",
                (victim.n, victim.sink, victim.run, text_of(victim.kinds),
                 text_of_spans(victim.spans)),
            )  # fmt: skip
            yield victim

    def _oldest(self, *, critical: bool) -> GivenUp | None:
        """The oldest batch that no sink has been given."""
        rows = self._db.execute(
            "SELECT n, sink, run, kinds, spans FROM batch WHERE critical = ? ORDER BY n",
            (int(critical),),
        )
        for n, sink, run, kinds, spans in rows:
            if n > self._fed.get(sink, 0):
                said, counts, places = said_by(run, kinds, spans)
                return GivenUp(n, sink, said, counts, self._counted(n, counts, places))
        return None

    def _counted(self, n: int, kinds: Mapping[str, int], spans: Spans) -> Spans:
        """Those of a batch, with how many of each kind, where its events are what its row says."""
        (row,) = self._db.execute("SELECT data, size FROM batch WHERE n = ?", (n,))
        plain = unpacked(*row)
        counted = spans_of_records(plain, spans) if plain is not None else spans
        found = Counter[str]()
        for span in counted.values():
            found.update(span.kinds)
        return counted if found == kinds else spans

    @property
    def pages(self) -> int:
        """Pages of the database that are used."""
        (pages,) = self._db.execute("PRAGMA page_count").fetchone()
        (free,) = self._db.execute("PRAGMA freelist_count").fetchone()
        return int(pages) - int(free)

    def next(self, sink: str, most: int) -> list[Item | Unreadable]:
        """The next batches for a sink, of about `most` bytes in all; they are its own then."""
        found: list[Item | Unreadable] = []
        size = 0
        after = self._fed.get(sink, 0)
        with _worded():
            rows = self._db.execute(
                "SELECT n, run, critical, number, kinds, spans, size, checksum, data FROM batch "
                "WHERE sink = ? AND n > ? ORDER BY n",
                (sink, after),
            )
            for row in rows:
                item = _item(sink, row)
                found.append(item)
                size += ROW_BYTES + (len(item.data) if isinstance(item, Item) else 0)
                if size >= most:
                    break
            rows.close()
        if found:
            self._fed[sink] = found[-1].n
        return found

    def set_aside(self, n: int) -> None:
        """A batch is lost that is here: it stays until that is `told`, or for the next run to tell.

        Where it is not here, nothing follows of it.
        """
        with _worded():
            self._db.execute("INSERT OR IGNORE INTO aside VALUES (?)", (n,))

    def fed(self, sink: str) -> int:
        """The last batch that the sink was given."""
        return self._fed.get(sink, 0)

    def feed_from(self, sink: str, n: int) -> None:
        """Give the sink what is behind this batch, again if it was given."""
        self._fed[sink] = n

    def close(self) -> None:
        """Let go of the files. What cannot be tidied up on the way is left as it is."""
        with suppress(sqlite3.Error):
            self._db.close()

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)


def _joined(one: GivenUp, other: GivenUp) -> GivenUp:
    kinds = Counter(one.kinds) + Counter(other.kinds)
    _check([], [MOST_KINDS - len(kinds)])
    return other._replace(kinds=kinds, spans=join_spans(one.spans, other.spans))


def _check(texts: Iterable[object], counts: Iterable[object]) -> None:
    """Raises SpoolError where they are not texts, and counts from 0 on: SQLite lets all be all."""
    whole = all(isinstance(one, int) and one >= 0 for one in counts)
    if not whole or not all(isinstance(one, str) for one in texts):
        raise SpoolError(NO_SENSE, lasting=True)


class _Worded:
    """Says as a SpoolError what SQLite says."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, sqlite3.Error | UnicodeError | msgspec.MsgspecError | TypeError
                      | ValueError | OverflowError):  # fmt: skip
            raise _error_of(error) from error


def _worded() -> _Worded:
    return _Worded()


class _Transaction(_Worded):
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        with _worded():
            self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            try:
                self._db.execute("COMMIT")
            except sqlite3.Error as failure:
                error = failure
        if error is not None:
            self._undo()
            super().__exit__(kind, error, trace)
            if kind is None:
                raise error

    def _undo(self) -> None:
        if self._db.in_transaction:  # else SQLite has undone it
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")


_LASTING = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_MISUSE,
            sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_TOOBIG}  # fmt: skip


def _error_of(error: BaseException) -> SpoolError:
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:  # what is there has another form than what is written here
        return SpoolError(NO_SENSE, lasting=True)
    if code & 0xFF == sqlite3.SQLITE_FULL:
        return SpoolError("the disk is full")
    return SpoolError(str(error)[:200], lasting=code & 0xFF in _LASTING)


_MARK = (
    "INSERT INTO mark VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (sink, ring, cpu) DO UPDATE SET "
    "seq = max(seq, excluded.seq), last = max(last, excluded.last), "
    "taken = max(taken, excluded.taken)"
)


def _lasts(items: Iterable[Item]) -> Iterator[Mark]:
    """The last numbers that are in `items`, of the rings of the kernel."""
    lasts: dict[tuple[str, str, int], int] = {}
    for item in items:
        for place, span in item.spans.items():
            key = item.sink, place[0], place[1]
            lasts[key] = max(span.last, lasts.get(key, 0))
    for (sink, ring, cpu), last in lasts.items():
        if ring in RINGS:
            yield Mark(sink, ring, cpu, last=last)


def _item(sink: str, row: tuple[Any, ...]) -> Item | Unreadable:
    n, run, critical, number, kinds, spans, size, checksum, data = row
    said, counts, places = said_by(run, kinds, spans)
    plain = unpacked(data, size) if said else None
    if plain is None or zlib.crc32(plain) != checksum:
        return Unreadable(n, counts, places, said)
    return Item(n, sink, run, bool(critical), number, counts, places, plain)


def unpacked(data: Any, size: Any) -> bytes | None:
    """`data` as it was, which has `size` bytes; None where that is not so."""
    if not isinstance(data, bytes) or not isinstance(size, int) or not 0 < size <= BATCH_BYTES:
        return None
    try:
        plain: bytes = isal_zlib.decompressobj().decompress(data, size + 1)
    except isal_zlib.error:  # type: ignore[misc]
        return None
    return plain if len(plain) == size else None
