"""The spool: what is on disk comes back in order and once, and what does not is counted."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import sqlite3
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from isal import isal_zlib

from streamer.config.settings import SpoolSection
from streamer.events.batch import Batch
from streamer.events.envelope import Envelope
from streamer.events.spans import NO_SPANS, Span, Spans
from streamer.events.stream import PreviousRun, StreamLoss
from streamer.sinks.memory import MemorySink
from streamer.spool.place import BAD, LOG, NAME
from streamer.spool.records import batch_of
from streamer.spool.sink import MADE_WAY, Mode
from streamer.spool.spool import Spool
from streamer.spool.store import GivenUp, Item, Mark, SpoolError, Store, Unreadable
from streamer.spool.writer import TRIES
from tests.unit.spooled import RUN, WAIT, Run, batch, event, ids

NOTE = msgspec.json.encode(PreviousRun(RUN, "boot", "0", 1, "killed", [])).decode()
ROW = b'{"x": 1}\n'
ROWS = """WITH RECURSIVE rows (value) AS (
    VALUES (1) UNION ALL SELECT value + 1 FROM rows WHERE value < 20000)"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept at the end has time to get to a disk that others use as well."""
    monkeypatch.setattr("streamer.spool.sink._END_SECONDS", WAIT)


def item(n: int, critical: bool = False, size: int = 100, sink: str = "a") -> Item:
    kind = "process.exec" if critical else "file.open"
    data = random.Random(n).randbytes(size)
    return Item(n, sink, RUN, critical, 1, {kind: 1}, {("bulk", 0): Span(n, n)}, data)


def bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def opened(path: Path, most: int = 1 << 20) -> Store:
    made = Store(str(path), most, new=not path.exists())
    made.use()
    return made


# ---------------------------------------------------------------- on disk


def test_what_was_written_is_read_in_order_of_each_sink(tmp_path: Path) -> None:
    store = opened(tmp_path / "db")
    written = [item(n, sink="ab"[n % 2]) for n in range(1, 41)]
    for start in range(0, 40, 7):
        store.write(written[start : start + 7])
    store.close()
    again = opened(tmp_path / "db")
    found = [again.next("a", 500) for _ in range(20)]
    assert [one for part in found for one in part] == [one for one in written if one.sink == "a"]
    assert all(len(part) <= 5 for part in found)
    assert {sink: one.number for sink, one in again.found().items()} == {"a": 20, "b": 20}
    again.write([], done={"a": 40, "b": 20})
    assert again.found()["b"].batches == 10
    assert again.last() == 39


def test_marks_are_what_is_on_disk_and_was_said(tmp_path: Path) -> None:
    store = opened(tmp_path / "db")
    store.begin(b"{}")
    store.write([item(3), item(7)])
    store.write([item(5)], marks=[Mark("a", "bulk", 0, 4, 0, 9), Mark("a", "critical", 1, 1, 1, 1)])
    assert store.marks() == [Mark("a", "bulk", 0, 4, 7, 9), Mark("a", "critical", 1, 1, 1, 1)]
    store.begin(b"{}")
    assert store.marks() == []


def test_the_oldest_bulk_makes_way_and_then_the_oldest_critical(tmp_path: Path) -> None:
    store = opened(tmp_path / "db", 1 << 20)
    kept: list[Item] = []
    gone: list[GivenUp] = []
    for n in range(1, 300):
        one = item(n, critical=n % 3 == 0, size=9000)
        victims = store.write([one])
        gone += victims
        for victim in victims:
            bulk = [each for each in kept if not each.critical]
            expected = (bulk or kept)[0]
            assert (victim.n, victim.kinds) == (expected.n, expected.kinds)
            kept.remove(expected)
        kept.append(one)
    assert gone
    assert any(victim.kinds == {"process.exec": 1} for victim in gone)
    assert store.next("a", 1 << 30) == kept
    assert store.given_up() == sorted(gone, key=lambda one: one.n)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1 << 20
    store.write([], told=[one.n for one in gone[3:]])
    assert store.given_up() == sorted(gone[:3], key=lambda each: each.n)


def test_how_much_of_it_is_used(tmp_path: Path) -> None:
    """It rises with what is written, is near 1 when the oldest makes way, and falls again."""
    store = opened(tmp_path / "db", 1 << 20)
    shares = []
    gone: list[GivenUp] = []
    n = 0
    while not gone:
        n += 1
        gone = store.write([item(n, size=9000)])
        shares.append(store.filled)
    assert shares[0] < 0.1
    assert shares == sorted(shares)
    assert 0.8 < shares[-1] <= 1
    store.write([], done={"a": n})
    assert store.filled < 0.1


def test_to_forget_all_at_once_takes_no_room_in_the_log(tmp_path: Path) -> None:
    """Some SQLites write zeros over all that is deleted, unless they are told not to."""
    store = opened(tmp_path / "db", 1 << 22)
    for n in range(1, 140):
        store.write([item(n, size=20_000)])
    assert store.found()["a"].batches > 100
    assert store.given_up() == []
    log = tmp_path / "db-wal"
    before = log.stat().st_size
    store.write([], done={"a": 139})
    assert log.stat().st_size <= before
    assert bytes_of(tmp_path) <= 1 << 22


def test_what_a_sink_was_given_does_not_make_way(tmp_path: Path) -> None:
    store = opened(tmp_path / "db")
    store.write([item(n, size=9000) for n in range(1, 60)])
    given = [one.n for one in store.next("a", 200_000)]
    gone = [victim for n in range(60, 90) for victim in store.write([item(n, size=50_000)])]
    assert [one.n for one in gone] == list(range(given[-1] + 1, gone[-1].n + 1))
    store.next("a", 1 << 40)
    before = store.found()
    with pytest.raises(SpoolError, match="no room"):
        store.write([item(91, size=400_000)])
    assert store.found() == before


@pytest.mark.parametrize("seed", range(10))
def test_a_kill_costs_nothing_that_was_written(tmp_path: Path, seed: int) -> None:
    """Whatever `write` has returned for is there after a SIGKILL, and nothing in part."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        store = opened(tmp_path / "db", 1 << 30)
        for n in range(1, 10**6, 3):
            store.write([item(n, size=20_000), item(n + 1), item(n + 2)])
            os.write(writer, b"%d\n" % (n + 2))
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        for _ in range(random.Random(seed).randrange(1, 60)):
            said = pipe.readline()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        said = [said, *pipe.read().split()][-1]
    found = [one.n for one in opened(tmp_path / "db", 1 << 30).next("a", 1 << 40)]
    assert found == list(range(1, len(found) + 1))
    assert len(found) in (int(said), int(said) + 3)


def test_a_run_that_could_not_begin_does_not_take_over_the_marks_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when it starts, and has room later."""
    store = opened(tmp_path / "db")
    store.begin(b"{}")
    gone = [item(n, size=9000) for n in range(1, 200)]
    store.write(gone, marks=[Mark("a", "bulk", 0, 1_000_000, 1_000_000, 1_000_000)])
    assert store.given_up()
    store.close()
    again = opened(tmp_path / "db")
    with monkeypatch.context() as full:
        full.setattr(again, "_note", fail_as_full)
        with pytest.raises(SpoolError, match="full"):
            again.begin(b"{}")
    assert again.marks()
    last = again.last()
    again.write([], marks=[Mark("a", "bulk", 0, 3, 4, 5)], state=b"{}")
    assert again.marks() == [Mark("a", "bulk", 0, 3, 4, 5)]
    assert again.given_up() == []
    again.write([item(last + 1)], marks=[Mark("a", "bulk", 1, 1, 1, 1)])
    assert len(again.marks()) == 2


def fail_as_full(state: bytes) -> None:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    raise error


# ---------------------------------------------------------------- the place


def spool(directory: Path, most: int = 1 << 20) -> Spool | None:
    return Spool.open(SpoolSection(directory=str(directory), max_bytes=most), lambda: None)


def test_nobody_else_gets_in(directory: Path) -> None:
    assert spool(directory) is not None
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in directory.iterdir()} == {NAME, LOG}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in directory.iterdir())


def test_two_agents_do_not_share_it(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = spool(directory)
    assert first is not None
    assert spool(directory) is None
    assert "another agent on this host has it" in caplog.text


@pytest.mark.parametrize("mode", [0o777, 0o750, 0o701])
def test_a_directory_of_others_is_refused(
    directory: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    directory.mkdir()
    directory.chmod(mode)
    assert spool(directory) is None
    assert "others own it" in caplog.text


def test_a_link_is_not_followed(tmp_path: Path, directory: Path) -> None:
    (tmp_path / "elsewhere").mkdir(0o700)
    directory.symlink_to(tmp_path / "elsewhere")
    assert spool(directory) is None
    assert list((tmp_path / "elsewhere").iterdir()) == []


def filled(directory: Path) -> None:
    async def fill() -> None:
        run = Run(directory, "wal")
        await run.start(hold=True)
        run.sink.submit(batch("file.open", 1, 300))
        await run.until(lambda: run.inner.account.pending == 300)
        await run.stop()

    asyncio.run(fill())


@contextmanager
def edited(directory: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(directory / NAME)) as db, db:
        yield db


def plant_link(directory: Path) -> None:
    target = directory.parent / "target"
    (directory / NAME).rename(target)
    (directory / NAME).symlink_to(target)


def plant_second_name(directory: Path) -> None:
    os.link(directory / NAME, directory.parent / "second")


def plant_garbage(directory: Path) -> None:
    (directory / NAME).write_bytes(os.urandom(10_000))


def plant_trigger(directory: Path) -> None:
    with edited(directory) as db:
        db.execute("CREATE TRIGGER t AFTER INSERT ON batch BEGIN DELETE FROM batch; END")


def plant_view(directory: Path) -> None:
    with edited(directory) as db:
        db.execute("DROP TABLE run")
        db.execute("CREATE VIEW run AS SELECT 1 AS id, 'x' AS state")


def plant_bad_pages(directory: Path) -> None:
    data = bytearray((directory / NAME).read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    (directory / NAME).write_bytes(data)


def plant_other_program(directory: Path) -> None:
    with edited(directory) as db:
        db.execute("PRAGMA application_id = 7")


def plant_directory(directory: Path) -> None:
    (directory / NAME).unlink()
    (directory / NAME).mkdir()


PLANTS = [plant_link, plant_second_name, plant_garbage, plant_trigger, plant_view,
          plant_bad_pages, plant_other_program, plant_directory]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS)
def test_a_bad_database_is_put_aside_and_told(
    directory: Path, plant: object, caplog: pytest.LogCaptureFixture
) -> None:
    """The agent starts, with a new spool that works; the next manifest says that it was so."""
    filled(directory)
    plant(directory)  # type: ignore[operator]
    caplog.clear()

    async def go() -> None:
        run = Run(directory, "wal", run="fedcba9876543210")
        told = run.spool.before.told_by(run.note)
        assert told is not None
        (untold,) = told.untold
        assert "the spool could not be read" in untold.reason
        await run.start()
        sent = batch("file.open", 1, 10)
        run.sink.submit(sent)
        await run.until(lambda: run.delivered == ids(sent))
        await run.stop()

    asyncio.run(go())
    assert caplog.text.count("the spool cannot be read and was put aside") == 1
    assert os.path.lexists(directory / f"{NAME}{BAD}")


@pytest.mark.parametrize(("column", "value"), [
    ("data", b"\0" * 50), ("data", 7), ("checksum", 1), ("size", 1 << 40), ("size", -1),
    ("kinds", '{"file.open": 7}'),
])  # fmt: skip
def test_a_row_that_makes_no_sense_is_a_loss(directory: Path, column: str, value: object) -> None:
    """Of as many as it says of itself; the rows beside it are delivered."""
    filled(directory)
    with edited(directory) as db:
        db.execute("INSERT INTO batch SELECT n + 1, sink, run, critical, number, kinds, spans, "
                   "size, checksum, data FROM batch")  # fmt: skip
        db.execute(f"UPDATE batch SET {column} = ? WHERE n = 1", (value,))

    async def go() -> None:
        run = Run(directory, "wal", run="fedcba9876543210")
        await run.start()
        assert run.sink.recovered == run.sink.account.received.total()
        await run.until(lambda: run.sink.account.pending == 0)
        assert len(run.delivered) == 300
        lost = {"file.open": 7 if column == "kinds" else 300}
        assert run.recorder.drops == [(lost, "what the spool had of them cannot be read")]
        assert run.recorder.spans == [{("bulk", 0, RUN): Span(1, 300)}]
        await tell(run)
        await run.stop()
        assert Run(directory, "wal").spool._found == {}

    asyncio.run(go())


@pytest.mark.parametrize(("column", "value"), [
    ("spans", '[["nowhere", 0, 1, 300]]'), ("spans", '[["bulk", -1, 1, 300]]'),
    ("spans", '[["bulk", 0, 300, 1]]'), ("spans", '[["bulk", 0, -5, 300]]'),
    ("spans", f'[["bulk", 0, 1, {10**30}]]'),
    ("spans", json.dumps([["bulk", cpu, 1, 1] for cpu in range(100_000)])),
    ("run", "x"), ("run", "x" * 10_000), ("run", b"\xff"),
])  # fmt: skip
@pytest.mark.parametrize("data", [True, False])
def test_ranges_that_no_run_has_are_not_told(
    directory: Path, column: str, value: object, data: bool
) -> None:
    """They would make a record of the loss that is not of its schema, or as large as one likes."""
    filled(directory)
    with edited(directory) as db:
        db.execute(f"UPDATE batch SET {column} = ?", (value,))
        if not data:
            db.execute("UPDATE batch SET data = x'00'")

    async def go() -> None:
        run = Run(directory, "wal", run="fedcba9876543210")
        await run.start()
        await run.until(lambda: run.sink.account.pending == 0)
        assert run.delivered == []
        assert run.recorder.drops == [
            ({"file.open": 300}, "what the spool had of them cannot be read")
        ]
        assert run.recorder.spans == [NO_SPANS]
        await run.stop()

    asyncio.run(go())


@pytest.mark.parametrize("statement", [
    "UPDATE batch SET kinds = '{\"' || hex(zeroblob(5000)) || '\": 1}'",
    "UPDATE batch SET n = n + 1000, kinds = (SELECT json_group_object(value, 1) FROM rows)",
    "INSERT INTO batch SELECT 1000 + value, sink, run, 0, 1, '{\"a' || value || '\": 1}', "
    "spans, size, checksum, data FROM batch, rows",
    "INSERT INTO batch SELECT 1000 + value, 's' || value, run, 0, 1, kinds, spans, size, checksum, "
    "data FROM batch, rows",
    "INSERT INTO mark SELECT 'memory:', 'bulk', value, 1, 1, 1 FROM rows",
])  # fmt: skip
def test_more_kinds_or_sinks_than_an_agent_has_spoil_the_spool(
    directory: Path, statement: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each heartbeat would tell of them, and whoever looks would hold as many as fit the disk."""
    filled(directory)
    with edited(directory) as db:
        db.execute(f"{ROWS} {statement}")
    Run(directory, "wal", run="fedcba9876543210")
    assert "put aside" in caplog.text


def test_rows_that_cannot_be_read_are_not_all_read_at_once(directory: Path) -> None:
    filled(directory)
    with edited(directory) as db:
        db.execute(f"{ROWS} INSERT INTO batch SELECT 1000 + value, sink, run, 0, 1, kinds, spans, "
                   "size, checksum, x'00' FROM batch, rows")  # fmt: skip
    with closing(opened(directory / NAME)) as store:
        assert 0 < len(store.next("memory:", 1 << 20)) < 10_000


def test_a_row_that_makes_no_sense_makes_way_like_any_other(directory: Path) -> None:
    """Nothing else in the spool is lost for it."""
    filled(directory)
    with edited(directory) as db:
        db.execute("UPDATE batch SET spans = 'x', run = 'y'")
    with closing(opened(directory / NAME)) as store:
        gone = [one for n in range(2, 400) for one in store.write([item(n, size=5000)])]
        assert gone[0] == GivenUp(1, "memory:", "", {"file.open": 300}, NO_SPANS)
        assert [one.n for one in gone] == [*range(1, gone[-1].n + 1)]
        assert store.given_up() == gone


@pytest.mark.parametrize(("told", "edit"), [
    ({"file.open": 300}, lambda line, n: line),
    ({}, lambda line, n: line.replace(b"bulk-0-1\"", b"bulk-0-%d\"" % 10**30)),
    ({}, lambda line, n: line.replace(b'{"', b'{"x":' + b"[" * 9999 + b"]" * 9999 + b',"', 1)),
    ({}, lambda line, n: line.replace(b"file.open", b"file.%d" % n)),
    ({}, lambda line, n: line.replace(b"file.open", b"file." + b"o" * 100)),
    ({}, lambda line, n: line * 2),
], ids=["none", "number", "depth", "kinds", "long kinds", "more"])  # fmt: skip
def test_what_makes_way_is_told_in_kinds_that_its_row_has(
    directory: Path, told: dict[str, int], edit: Callable[[bytes, int], bytes]
) -> None:
    """Its events may say anything: it makes way all the same, and a record of its loss is small."""
    lines = batch("file.open", 1, 300).lines("json").splitlines(keepends=True)
    data = b"".join(edit(line, n) for n, line in enumerate(lines))
    filled(directory)
    with edited(directory) as db:
        db.execute("UPDATE batch SET data = ?, size = ?", (isal_zlib.compress(data), len(data)))
    with closing(opened(directory / NAME)) as store:
        gone = [one for n in range(2, 20) for one in store.write([item(n, size=100_000)])]
        spans: Spans = {("bulk", 0): Span(1, 300, told)}
        assert gone[0] == GivenUp(1, "memory:", RUN, {"file.open": 300}, spans)
        assert store.given_up() == gone


@pytest.mark.parametrize("field", [
    b'"schema":1' + b"0" * 30, b'"path":"\xff"', b'"more":' + b"[" * 100_000 + b"]" * 100_000,
], ids=["number", "utf-8", "depth"])  # fmt: skip
def test_events_that_no_run_has_encoded_are_a_loss(directory: Path, field: bytes) -> None:
    """And not the end of the agent, or of the thread that reads them, at each start anew."""
    lines = batch("file.open", 1, 300).lines("json")
    data = re.sub(rb'"schema":\d+', field, lines, count=1) if b"schema" in field else (
        lines.replace(b'"path":', field + b',"path":', 1))  # fmt: skip
    assert data != lines
    filled(directory)
    with edited(directory) as db:
        db.execute("UPDATE batch SET data = ?, size = ?, checksum = ?",
                   (isal_zlib.compress(data), len(data), zlib.crc32(data)))  # fmt: skip

    async def go() -> None:
        run = Run(directory, "wal", run="fedcba9876543210")
        await run.start()
        await run.until(lambda: run.sink.account.pending == 0)
        assert run.delivered == []
        assert run.recorder.drops == [
            ({"file.open": 300}, "what the spool had of them cannot be read")
        ]
        await run.stop()

    asyncio.run(go())


@pytest.mark.parametrize("text", [
    re.sub(r'"started_ns":\d+', '"started_ns":1' + "0" * 30, NOTE),
    NOTE.replace("{", '{"more":' + "[" * 100_000 + "]" * 100_000 + ",", 1),
], ids=["number", "depth"])  # fmt: skip
def test_what_a_run_says_of_itself_is_not_believed_whatever_it_is(
    directory: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It would not be published, or end the agent at each start."""
    assert text != NOTE
    filled(directory)
    with edited(directory) as db:
        db.execute("UPDATE run SET state = ?", (text,))
    run = Run(directory, "wal", run="fedcba9876543210")
    assert run.spool.before.run is None
    assert "does not say which run wrote it" in caplog.text


async def test_what_is_recovered_is_received_whatever_a_row_says(directory: Path) -> None:
    await asyncio.to_thread(filled, directory)
    with edited(directory) as db:
        db.execute("UPDATE batch SET number = 7")
    run = Run(directory, "wal", run="fedcba9876543210")
    await run.start()
    assert (run.sink.recovered, run.sink.account.received.total()) == (300, 300)
    await run.until(lambda: len(run.delivered) == 300)
    await run.stop()


@pytest.mark.parametrize(("column", "value"), [
    ("kinds", "x"), ("kinds", '{"a": -1}'), ("number", "x"), ("sink", b"\xff"),
    ("n", 0), ("n", -1), ("n", (1 << 63) - 1),
])  # fmt: skip
def test_a_row_that_cannot_be_counted_spoils_the_spool(
    directory: Path, column: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    """The agent starts without one; the next one puts it aside, with the same words."""
    filled(directory)
    with edited(directory) as db:
        db.execute(f"UPDATE batch SET {column} = ?", (value,))
    run = Run(directory, "wal", run="fedcba9876543210")
    told = run.spool.before.told_by(run.note)
    assert told is not None
    assert "the spool could not be read" in told.untold[0].reason
    assert "put aside" in caplog.text


@pytest.mark.parametrize("row", [
    "mark VALUES ('memory:', 'another', 0, 1, 1, 1)",
    "mark VALUES ('memory:', 'bulk', -1, 1, 1, 1)",
    "mark VALUES ('memory:', 'bulk', 0, -1, 1, 1)",
    "mark VALUES ('memory:', 'bulk', 0, 'x', 1, 1)",
    "mark VALUES (x'ff', 'bulk', 0, 1, 1, 1)",
    "given_up VALUES (9, x'ff', 'r', '{}', '[]')",
    "given_up VALUES (9, 'memory:', x'ff', '{}', '[]')",
    "given_up VALUES (-9, 'memory:', 'r', '{}', '[]')",
])  # fmt: skip
def test_what_the_next_manifest_would_tell_is_what_a_run_has_written(
    directory: Path, row: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Else it would not be of its schema, or not to be published at all."""
    filled(directory)
    with edited(directory) as db:
        db.execute(f"INSERT OR REPLACE INTO {row}")
    run = Run(directory, "wal", run="fedcba9876543210")
    told = run.spool.before.told_by(run.note)
    assert told is not None
    assert (told.marks, [one.stage for one in told.untold]) == ([], ["sink"])
    assert "put aside" in caplog.text


# ---------------------------------------------------------------- in front of a sink


async def test_without_trouble_nothing_is_replayed_and_little_is_written(directory: Path) -> None:
    run = Run(directory)
    await run.start()
    sent = [batch("file.open", 1 + 10 * n, 10) for n in range(20)]
    for one in sent:
        run.sink.submit(one)
    assert run.delivered == ids(*sent)
    assert run.inner.events == [event for one in sent for event in one.events]
    await run.stop()
    run.check()
    assert Store(str(directory / NAME), 1 << 20, new=False).found() == {}


async def test_what_is_over_the_budget_comes_back_in_order_and_says_so(directory: Path) -> None:
    run = Run(directory, budget=1 << 19)
    await run.start(hold=True)
    sent = [batch("process.exit" if n % 3 else "file.open", 1 + 10 * n, 10) for n in range(200)]
    for one in sent:
        run.sink.submit(one)
        await run.until(lambda: len(run.sink._writing) < 2)
    await run.until(lambda: not run.sink._writing)
    assert run.sink.spooled > 1000
    assert "full" not in run.recorder.marks
    run.inner.hold = False
    run.inner.release()
    await run.until(lambda: run.sink.account.pending == 0)
    assert run.delivered == ids(*sent)
    replayed = [getattr(one, "replayed") is True for one in run.inner.events]  # noqa: B009
    first = replayed.index(True)
    assert 0 < first < 1000
    assert all(replayed[first:])
    plain = [msgspec.structs.replace(got, replayed=msgspec.UNSET) for got in run.inner.events]
    assert plain == [original for one in sent for original in one.events]
    later = batch("file.open", 9000, 10)
    run.sink.submit(later)
    assert run.delivered[-10:] == ids(later)
    assert run.inner.events[-1].replayed is msgspec.UNSET  # type: ignore[attr-defined]
    await run.stop()


@pytest.mark.parametrize("mode", ["spill", "wal"])
async def test_what_is_not_delivered_at_the_end_is_delivered_by_the_next_run(
    directory: Path, mode: str
) -> None:
    run = Run(directory, mode, budget=1 << 18)  # type: ignore[arg-type]
    await run.start(hold=True)
    sent = [batch("file.open", 1 + 10 * n, 10) for n in range(100)]
    for one in sent:
        run.sink.submit(one)
        await asyncio.sleep(0)
    run.sink.discard("not delivered when the agent stopped")
    await run.stop()
    assert run.recorder.drops == []
    assert run.sink.kept == {"file.open": 1000}
    run.check()
    again = Run(directory, mode, run="fedcba9876543210")  # type: ignore[arg-type]
    await again.start()
    assert again.sink.recovered == 1000
    later = batch("file.open", 1, 5, "fedcba9876543210")
    again.sink.submit(later)
    await again.until(lambda: again.sink.account.pending == 0)
    assert again.delivered == ids(*sent, later)
    await again.stop()
    assert Store(str(directory / NAME), 1 << 20, new=False).found() == {}


@pytest.mark.parametrize(
    ("mode", "budget"), [("spill", 1 << 18), ("wal", 1 << 22)], ids=["on disk", "with the sink"]
)
async def test_what_is_not_delivered_outlives_any_number_of_runs(
    directory: Path, mode: Mode, budget: int
) -> None:
    """A broker that is away the whole time, and an agent that is stopped and started."""
    sent: list[Batch] = []
    for n in range(3):
        run = Run(directory, mode, budget, run=f"{n:016x}")
        await run.start(hold=True)
        assert run.sink.recovered == 10 * len(sent)
        sent += [batch("file.open", 1 + 10 * at, 10, f"{n:016x}") for at in range(50)]
        for one in sent[-50:]:
            run.sink.submit(one)
            await asyncio.sleep(0)
        await run.until(lambda: run.inner.account.pending)  # noqa: B023 - run is over then
        await run.stop()
        assert run.recorder.drops == []
    last = Run(directory, mode, run="fedcba9876543210")
    await last.start()
    assert last.sink.recovered == 1500
    await last.until(lambda: last.sink.account.pending == 0)
    assert last.delivered == ids(*sent)
    await last.stop()
    assert Run(directory, mode).spool._found == {}


async def test_everything_is_on_disk_before_the_sink_has_it(directory: Path) -> None:
    run = Run(directory, "wal", budget=1 << 22)
    await run.start(hold=True)
    for n in range(50):
        run.sink.submit(batch("file.open", 1 + 10 * n, 10))
        await asyncio.sleep(0.001)
    await run.until(lambda: run.inner.account.received.total() == 500)
    await run.spool.close()
    store = Store(str(directory / NAME), 1 << 20, new=False)
    assert store.found()["memory:"].number == 500
    assert store.marks() == [Mark("memory:", "bulk", 0, 0, 500, 0)]


async def test_the_cap_costs_bulk_first_and_each_loss_is_told(directory: Path) -> None:
    run = Run(directory, budget=1 << 18, most=1 << 20)
    await run.start(hold=True)
    sent: Counter[str] = Counter()
    for n in range(400):
        kind = "process.exec" if n % 25 == 0 else "file.open"
        # Random, so that it takes the room on disk that it has.
        one = batch(kind, 1 + 10 * n, 10, comm=os.urandom(7).hex(), host=os.urandom(2000).hex())
        sent.update(one.kinds)
        run.sink.submit(one)
        await run.until(lambda: len(run.sink._writing) < 10)
    await run.until(lambda: not run.sink._writing)
    lost: Counter[str] = Counter()
    for kinds, reason in run.recorder.drops:
        assert reason == MADE_WAY
        lost.update(kinds)
    assert lost["file.open"] > 0
    assert lost["process.exec"] == 0
    assert run.recorder.kinds() == {("bulk", 0): lost}
    run.inner.hold = False
    run.inner.release()
    await run.until(lambda: run.sink.account.pending == 0)
    got = Counter(one.__struct_config__.tag for one in run.inner.events)
    assert got + lost == sent
    numbers = {one.seq for one in run.inner.events}  # type: ignore[attr-defined]
    told = {n for spans in run.recorder.spans for first, last, _ in spans.values()
            for n in range(first, last + 1)}  # fmt: skip
    assert numbers | told == set(range(1, 4001))
    assert not numbers & told
    assert bytes_of(directory) <= 1 << 20
    await run.stop()


async def test_a_drain_of_more_than_the_spool_is_written_in_parts(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever is observed makes events as large as he likes: that does not cost the others it."""
    run = Run(directory, budget=1 << 18, most=1 << 20)
    await run.start(hold=True)
    fill = [batch("file.open", 1 + 10 * n, 10) for n in range(60)]
    for one in fill:
        run.sink.submit(one)
    large = [event("process.exec", seq, argv=[os.urandom(10_000).hex()]) for seq in range(1, 101)]
    run.sink.submit(Batch(large, spans={("critical", 0): Span(1, 100)}))
    await run.until(lambda: not run.sink._writing)
    assert "the spool is not used" not in caplog.text
    assert bytes_of(directory) <= 1 << 20
    run.inner.hold = False
    run.inner.release()
    await run.until(lambda: run.sink.account.pending == 0)
    lost = sum((Counter(kinds) for kinds, _ in run.recorder.drops), Counter())
    assert 0 < lost["process.exec"] < 100
    assert len(run.delivered) + lost.total() == 700
    execs = [one for one in run.delivered if "critical" in one]
    assert execs == ids(Batch(large))[100 - len(execs) :]
    await run.stop()


async def test_what_made_way_and_was_not_told_is_told_by_the_next_run(directory: Path) -> None:
    run = Run(directory, budget=1 << 18, most=1 << 20)
    await run.start(hold=True)
    for n in range(300):
        run.sink.submit(batch("file.open", 1 + 10 * n, 10, host=os.urandom(2000).hex()))
        await run.until(lambda: len(run.sink._writing) < 10)
    await run.until(lambda: not run.sink._writing)
    lost = run.sink.account.dropped.total()
    assert lost
    await run.spool.close()  # and no more: it was killed
    again = Run(directory, run="fedcba9876543210")
    before = again.spool.before.told_by(None)
    assert before is not None
    assert before.run_id == RUN
    assert sum(one.count for one in before.untold) == lost
    assert sum(span.kinds["file.open"] for one in before.untold for span in one.ranges) == lost
    await again.start()
    await again.until(lambda: again.sink.account.pending == 0)
    assert not again.spool._store.given_up()
    await again.stop()


async def test_more_that_made_way_than_are_told_apart_spoils_no_spool(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a sink that is none any more had there, is told by nobody before the next manifest."""
    monkeypatch.setattr("streamer.spool.store.MOST_UNTOLD", 5)
    run = Run(directory)
    run.spool._store.write([item(n, size=9000, sink="ba"[n % 2]) for n in range(1, 21)])
    run.spool._store._limit = 16
    gone = run.spool._store.write([item(21, sink="memory:")])
    last = {one.sink: one.n for one in gone}
    assert len(gone) > 10
    await run.spool.close()
    again = Run(directory, run="fedcba9876543210")
    assert again.spool.before.spoiled == ""
    untold = again.spool.before.untold
    assert sum(one.count for one in untold) == len(gone)
    assert [(one.sink, one.ranges[0].seq_from, one.ranges[0].seq_to) for one in untold] == [
        ("a", 1, 1), ("b", 2, 2), ("a", 3, 3), ("b", 4, last["b"]), ("a", 5, last["a"])
    ]  # fmt: skip
    await again.spool.close()


async def test_what_made_way_is_remembered_until_what_tells_of_it_is_safe(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that does not take the record of the loss, and takes something else after it."""
    monkeypatch.setattr("streamer.spool.sink.RETRY_SECONDS", 0.1)
    run = Run(directory, budget=1 << 18, most=1 << 20)
    await run.start(hold=True)
    for n in range(300):
        run.sink.submit(batch("file.open", 1 + 10 * n, 10, host=os.urandom(2000).hex()))
        await run.until(lambda: len(run.sink._writing) < 10)
    await run.until(lambda: not run.sink._writing)
    assert run.sink.account.dropped.total()
    failing = Failing(run)
    failing.code = sqlite3.SQLITE_FULL
    loss = Envelope("host").record(StreamLoss, stage="sink", count=1, kinds={}, reason="")
    with monkeypatch.context() as forever:
        forever.setattr("streamer.spool.sink.RETRY_SECONDS", WAIT)
        run.sink.submit(Batch([loss]))
        await run.until(lambda: run.sink._failed)
        failing.code = None
        run.spool.note(run.note)
        await run.until(lambda: run.spool._writer is not None and run.spool._writer._note is None)
        await asyncio.sleep(0.05)
    run.sink._retry_at = 0.0
    assert run.spool._store.given_up()
    run.inner.hold = False
    run.inner.release()
    await run.until(lambda: run.sink.account.pending == 0)
    await run.until(lambda: not run.spool._store.given_up())
    await run.stop()


class Failing:
    """Makes the disk fail for a while: what SQLite answers, and nothing else."""

    def __init__(self, run: Run) -> None:
        self.code: int | None = None
        self.defect: Exception | None = None
        self.before: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._write = run.spool._store.write
        run.spool._store.write = self.write  # type: ignore[method-assign]

    def write(self, items: object, **others: object) -> list[GivenUp]:
        if self.before is not None:
            self._loop.call_soon_threadsafe(self.before)
        if self.code is not None:
            raise SpoolError("the disk is full", lasting=self.code == sqlite3.SQLITE_CORRUPT)
        if self.defect is not None:
            raise self.defect
        return self._write(items, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["spill", "wal"])
async def test_a_disk_that_fails_costs_no_event_while_there_is_memory(
    directory: Path,
    mode: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streamer.spool.sink.RETRY_SECONDS", 0.1)
    caplog.set_level("INFO")
    run = Run(directory, mode, budget=1 << 22)  # type: ignore[arg-type]
    await run.start(hold=True)
    failing = Failing(run)
    sent: list[Batch] = []
    for n in range(200):
        failing.code = sqlite3.SQLITE_FULL if n // 50 % 2 else None
        one = batch("process.exec" if n % 3 else "file.open", 1 + 10 * n, 10)
        sent.append(one)
        run.sink.submit(one)
        await asyncio.sleep(0.004)
        if n == 120:
            run.inner.hold = False
            run.inner.release()
        if mode == "wal" and n % 50 == 49:  # the disk may take longer than that
            await run.until(
                lambda: (
                    not run.sink._writing and bool(run.sink._failed) == (failing.code is not None)
                )
            )
    failing.code = None
    await run.until(lambda: run.sink.account.pending == 0)
    assert run.delivered == ids(*sent)
    assert run.recorder.drops == []
    warned = caplog.text.count("the spool is not used for now")
    assert warned <= 1
    if mode == "wal":
        await asyncio.sleep(0.2)
        run.sink.submit(batch("file.open", 5000, 10))
        await run.until(lambda: len(run.delivered) == 2010)
        assert warned == 1
        assert caplog.text.count("the spool is used again") == 2
    await run.stop()


async def test_a_defect_in_its_thread_is_seen_and_costs_no_event(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread goes on: all would wait for it for ever."""
    monkeypatch.setattr("streamer.spool.sink.RETRY_SECONDS", 0.1)
    run = Run(directory, budget=1 << 18)
    await run.start(hold=True)
    failing = Failing(run)
    failing.defect = RuntimeError("broken")
    for n in range(100):
        run.sink.submit(batch("file.open", 1 + 10 * n, 10))
        await asyncio.sleep(0)
    await run.until(lambda: "RuntimeError: broken" in caplog.text)
    failing.defect = None
    await run.until(lambda: not run.sink._writing and run.sink.spooled)
    tried: list[int] = []

    def once_broken(row: Item | Unreadable, run_id: str) -> tuple[Batch, str]:
        tried.append(row.n)
        if len(tried) == 1:
            raise MemoryError("once")
        return batch_of(row, run_id)

    monkeypatch.setattr("streamer.spool.writer.batch_of", once_broken)
    run.inner.hold = False
    run.inner.release()
    await run.until(lambda: run.sink.account.pending == 0)
    assert tried[0] == tried[1], "what the sink has not got comes again"
    assert len(run.delivered) == 1000
    assert run.recorder.drops == []
    assert caplog.text.count("Traceback") == 2, "of each one in ten minutes"
    assert caplog.text.count("MemoryError: once") == 2, "its traceback, and what it means"
    await run.stop()


async def fill(run: Run) -> list[Batch]:
    """Start it, and give it more than its sink takes: the rest is on disk."""
    await run.start(hold=True)
    sent = [batch("file.open", 1 + 10 * n, 10) for n in range(100)]
    for one in sent:
        run.sink.submit(one)
        await asyncio.sleep(0)
    await run.until(lambda: not run.sink._writing and run.sink.spooled)
    return sent


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])
async def test_a_row_that_always_makes_a_defect_holds_up_no_other(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """Those before it are delivered, and it is a loss with its reason when it was tried enough."""
    monkeypatch.setattr("streamer.spool.sink.RETRY_SECONDS", 0.1)
    run = Run(directory, budget=1 << 18)
    sent = await fill(run)
    on_disk = run.sink._disk
    assert on_disk > 20
    at = 100 - on_disk + round(share * (on_disk - 1))
    tried: list[int] = []

    def broken(row: Item | Unreadable, run_id: str) -> tuple[Batch, str]:
        if row.n == at + 1:
            tried.append(row.n)
            raise KeyError("what is in it")
        return batch_of(row, run_id)

    monkeypatch.setattr("streamer.spool.writer.batch_of", broken)
    run.inner.hold = False
    run.inner.release()
    await run.until(lambda: run.sink.account.pending == 0)
    assert run.delivered == ids(*sent[:at], *sent[at + 1 :])
    assert len(tried) == TRIES
    ((kinds, reason),) = run.recorder.drops
    assert kinds == {"file.open": 10}
    assert reason == "made a defect of what reads the spool: KeyError: 'what is in it'"
    assert run.recorder.spans == [sent[at].spans]
    assert caplog.text.count("Traceback") == 1
    await tell(run)
    await run.stop()
    assert Run(directory).spool._found == {}


async def test_a_row_whose_run_cannot_be_named_holds_up_no_other(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told without its numbers."""
    monkeypatch.setattr("streamer.spool.sink.RETRY_SECONDS", 0.1)
    run = Run(directory, budget=1 << 18)
    sent = await fill(run)
    bad = sent[90].spans

    def broken(spans: Spans, *_: str) -> Spans:
        if spans == bad:
            raise KeyError("run")
        return spans

    monkeypatch.setattr("streamer.spool.records.named", broken)
    run.inner.hold = False
    run.inner.release()
    await run.until(lambda: run.sink.account.pending == 0)
    assert run.delivered == ids(*sent[:90], *sent[91:])
    reason = "made a defect of what reads the spool: KeyError: 'run'"
    assert run.recorder.drops == [({"file.open": 10}, reason)]
    assert run.recorder.spans == [NO_SPANS]
    await run.stop()


async def test_what_makes_a_defect_in_memory_holds_up_no_other(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(directory, budget=1 << 18)
    await run.start(hold=True)
    Failing(run).code = sqlite3.SQLITE_FULL
    sent = [batch("file.open", 1 + 10 * n, 10) for n in range(100)]
    for one in sent:
        run.sink.submit(one)
        await asyncio.sleep(0)
    await run.until(lambda: len(run.sink._memory) > 20)

    def broken(row: Item | Unreadable, run_id: str) -> tuple[Batch, str]:
        if row.n == 91:
            raise KeyError("what is in it")
        return batch_of(row, run_id)

    monkeypatch.setattr("streamer.spool.sink.batch_of", broken)
    run.inner.hold = False
    run.inner.release()
    await run.until(lambda: run.sink.account.pending == 0)
    assert sorted(run.delivered) == sorted(ids(*sent[:90], *sent[91:]))
    reason = "made a defect of what reads the spool: KeyError"
    assert run.recorder.drops == [({"file.open": 10}, reason)]
    await run.stop()


# ---------------------------------------------------------------- a sink that fails


def fail_at(run: Run, bad: Callable[[Batch], bool], *, takes: bool = False) -> None:
    """A defect of the sink's: it raises at these batches, before or after it `takes` them."""
    submit = run.inner.submit

    def broken(one: Batch) -> None:
        if not bad(one) or takes:
            submit(one)
        if bad(one):
            raise ValueError("what is this?")

    run.inner.submit = broken  # type: ignore[assignment, method-assign]


FAILED = "the sink failed: ValueError: what is this?"


@pytest.mark.parametrize(("mode", "on_disk"), [("spill", False), ("spill", True), ("wal", False)])
async def test_a_sink_that_fails_at_a_batch_loses_no_other(
    directory: Path, caplog: pytest.LogCaptureFixture, mode: Mode, on_disk: bool
) -> None:
    """Whether it got it at once, or out of the spool, which goes on."""
    run = Run(directory, mode, budget=1 << 18)
    fail_at(run, lambda one: one.spans.get(("bulk", 0)) == Span(901, 910))
    if on_disk:
        sent = await fill(run)
        run.inner.hold = False
        run.inner.release()
    else:
        await run.start()
        sent = [batch("file.open", 1 + 10 * n, 10) for n in range(100)]
        for one in sent:
            run.sink.submit(one)
            await run.until(lambda: run.sink.account.pending == 0)
    await run.until(lambda: run.sink.account.pending == 0)
    assert run.delivered == ids(*sent[:90], *sent[91:])
    assert run.recorder.drops == [({"file.open": 10}, FAILED)]
    assert run.recorder.spans == [sent[90].spans]
    assert run.recorder.kinds() == {("bulk", 0): {"file.open": 10}}
    assert run.sink.status == "up"
    assert caplog.text.count("ValueError: what is this?") == 1
    await tell(run)
    await run.stop()
    assert Run(directory, mode).spool._found == {}


async def test_a_sink_that_fails_at_what_it_took_loses_nothing(directory: Path) -> None:
    run = Run(directory)
    await run.start()
    fail_at(run, lambda one: one.spans[("bulk", 0)] == Span(1, 10), takes=True)
    run.sink.submit(batch("file.open", 1, 10))
    run.sink.submit(batch("file.open", 11, 10))
    await run.until(lambda: run.sink.account.pending == 0)
    assert len(run.delivered) == 20
    assert run.recorder.drops == []
    await run.stop()


async def test_what_a_sink_took_before_it_failed_is_on_disk_until_it_is_delivered(
    directory: Path,
) -> None:
    """Although what it did not take is told: nobody knows which that is."""
    run = Run(directory, "wal")
    await run.start(hold=True)
    submit = run.inner.submit

    def broken(one: Batch) -> None:
        submit(Batch(one.events[:4]))
        if one.kinds.get("file.open"):
            raise ValueError("what is this?")

    run.inner.submit = broken  # type: ignore[assignment, method-assign]
    sent = batch("file.open", 1, 10)
    run.sink.submit(sent)
    await run.until(lambda: run.recorder.drops)
    assert run.recorder.drops == [({"file.open": 6}, FAILED)]
    assert run.recorder.kinds() == {("bulk", 0): {}}
    run.sink.submit(Batch([LOSS]))
    await run.until(lambda: run.inner.account.received.total() == 5)
    await run.spool.close()  # and no more: it was killed
    again = Run(directory, "wal", run="aaaaaaaaaaaaaaaa")
    await again.start()
    await again.until(lambda: again.sink.account.pending == 0)
    assert again.delivered == [*ids(sent), LOSS.id]
    await again.stop()


async def test_a_sink_that_fails_again_and_again_leaves_the_rest_to_the_next_run(
    directory: Path,
) -> None:
    """With what it failed at and was on disk, of which nobody could tell."""
    run = Run(directory, budget=1 << 18)
    sent = await fill(run)
    left = run.sink.spooled
    fail_at(run, lambda one: True)
    run.inner.hold = False
    run.inner.release()
    await run.until(lambda: run.sink.status == "closed")
    assert run.recorder.drops == [({"file.open": 10}, FAILED)] * TRIES
    assert run.recorder.statuses[-1] == ("closed", FAILED)
    assert run.sink.spooled == run.sink.account.pending == left - 10 * TRIES
    run.sink.sink_status(run.inner, "up", "")
    assert run.sink.status == "closed"
    await run.stop()
    assert run.sink.kept == {"file.open": left - 10 * TRIES}
    again = Run(directory)
    await again.start()
    await again.until(lambda: again.sink.account.pending == 0)
    assert [*run.delivered, *again.delivered] == ids(*sent)
    await again.stop()


async def test_a_sink_that_fails_while_much_is_on_its_way_to_disk_leaves_it_there(
    directory: Path,
) -> None:
    """With `wal` it was to get all of it as soon as it is there."""
    run = Run(directory, "wal")
    fail_at(run, lambda one: True)
    await run.start()
    sent = [batch("file.open", 1 + 10 * n, 10) for n in range(10)]
    for one in sent:
        run.sink.submit(one)
    await run.until(lambda: run.sink.status == "closed" and not run.sink._writing)
    assert run.sink.account.pending == run.sink.spooled == 100 - 10 * TRIES
    run.sink.submit(batch("file.open", 101, 10))  # one that was on its way here
    await run.until(lambda: not run.sink._writing)
    await run.stop()
    again = Run(directory, "wal")
    await again.start()
    await again.until(lambda: again.sink.account.pending == 0)
    assert again.delivered == ids(*sent, batch("file.open", 101, 10))
    await again.stop()


# ---------------------------------------------------------------- what is told once


LOSS = Envelope("host").record(StreamLoss, stage="sink", count=1, kinds={}, reason="")


async def tell(run: Run) -> None:
    """As the agent does with the next second: a record of all that was lost."""
    run.sink.submit(Batch([LOSS]))
    await run.until(lambda: run.sink.account.pending == 0)


@pytest.mark.parametrize("mode", ["spill", "wal"])
@pytest.mark.parametrize("told", ["not", "on disk", "delivered"])
async def test_a_row_that_cannot_be_read_is_told_once_whenever_the_agent_is_killed(
    directory: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode, told: str
) -> None:
    """It is on disk until what tells of it is there: a repetition of that has the same id."""
    monkeypatch.setattr("streamer.spool.sink.FORGET_SECONDS", 0.0)
    await asyncio.to_thread(filled, directory)
    with edited(directory) as db:
        db.execute("INSERT INTO batch SELECT n + 1, sink, run, critical, number, kinds, spans, "
                   "size, checksum, data FROM batch")  # fmt: skip
        db.execute("UPDATE batch SET checksum = 1 WHERE n = 1")
    run = Run(directory, mode, run="fedcba9876543210")
    await run.start()
    await run.until(lambda: run.sink.account.pending == 0)
    assert len(run.recorder.drops) == 1
    assert len(run.delivered) == 300
    run.inner.hold = told == "on disk"
    if told == "on disk":
        run.sink.submit(Batch([LOSS]))
        await run.until(lambda: run.inner.account.pending)
    elif told == "delivered":
        await tell(run)
    await asyncio.sleep(0.1)  # what was delivered is forgotten meanwhile
    await run.spool.close()  # and no more: it was killed
    again = Run(directory, mode, run="aaaaaaaaaaaaaaaa")
    await again.start()
    await again.until(lambda: again.sink.account.pending == 0)
    assert again.recorder.drops == ([] if told != "not" else run.recorder.drops)
    assert again.delivered == ([LOSS.id] if told == "on disk" else [])
    await again.stop()


async def test_what_was_to_be_told_is_told_by_the_next_record_if_one_is_lost(
    directory: Path,
) -> None:
    """While the disk fails, so that the record is in the sink, which drops it."""
    run = Run(directory)
    await run.start(hold=True)
    failing = Failing(run)
    failing.code = sqlite3.SQLITE_FULL
    run.sink._give_up(77, {"file.open": 10}, "a row of the spool", NO_SPANS)
    run.sink.account.received["file.open"] += 10
    run.sink.submit(Batch([LOSS]))
    await run.until(lambda: run.inner.account.pending)
    assert run.sink._untold == []
    run.inner.discard("refused")
    assert run.sink._untold == [77]
    failing.code = None
    run.sink._retry_at = 0.0
    run.inner.hold = False
    await tell(run)
    assert run.sink._untold == []
    await run.stop()


async def test_want_of_memory_is_no_fault_of_a_row(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried for as long as it takes, and costs no event."""
    monkeypatch.setattr("streamer.spool.sink.RETRY_SECONDS", 0.02)
    run = Run(directory, budget=1 << 18)
    sent = await fill(run)
    wants = [MemoryError()] * (3 * TRIES)

    def short(row: Item | Unreadable, run_id: str) -> tuple[Batch, str]:
        if wants:
            raise wants.pop()
        return batch_of(row, run_id)

    monkeypatch.setattr("streamer.spool.writer.batch_of", short)
    run.inner.hold = False
    run.inner.release()
    await run.until(lambda: run.sink.account.pending == 0)
    assert (run.delivered, run.recorder.drops, wants) == (ids(*sent), [], [])
    await run.stop()


@pytest.mark.parametrize("error", [AttributeError("a defect"), SpoolError("what?", lasting=True)])
async def test_a_note_that_cannot_be_written_is_not_tried_for_ever(
    directory: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run = Run(directory, "wal")
    await run.start()
    write, noted = run.spool._store.write, []

    def refuse_the_note(items: Any, **others: Any) -> list[GivenUp]:
        if others["state"] is not None:
            noted.append(others["state"])
            raise error
        return write(items, **others)

    monkeypatch.setattr(run.spool._store, "write", refuse_the_note)
    assert run.spool._writer is not None
    run.spool._writer.note(b"{}", ())
    await run.until(lambda: noted)
    run.sink.submit(batch("file.open", 1, 10))
    await run.until(lambda: run.sink.account.pending == 0)
    assert run.recorder.drops == []
    assert noted == [b"{}"]
    await run.stop()


async def test_a_full_disk_and_a_full_memory_pause_the_reading(directory: Path) -> None:
    run = Run(directory, "wal", budget=1 << 18)
    await run.start(hold=True)
    Failing(run).code = sqlite3.SQLITE_FULL
    n = 0
    while not run.sink.watermarks.full:
        n += 1
        run.sink.submit(batch("file.open", 10 * n, 10))
        await asyncio.sleep(0)
    assert run.recorder.marks[-1] == "full"
    run.inner.hold = False
    run.inner.release()
    await run.until(lambda: run.recorder.marks[-1] == "room")
    await run.until(lambda: run.sink.account.pending == 0)
    assert len(run.delivered) == 10 * n
    await run.stop()


async def test_a_spool_that_breaks_is_a_loss_of_what_it_had(directory: Path) -> None:
    run = Run(directory, budget=1 << 18)
    await run.start(hold=True)
    for n in range(100):
        run.sink.submit(batch("file.open", 1 + 10 * n, 10))
        await asyncio.sleep(0)
    await run.until(lambda: not run.sink._writing)
    spooled = run.sink.spooled
    assert spooled
    Failing(run).code = sqlite3.SQLITE_CORRUPT
    run.sink.submit(batch("file.open", 1001, 10))
    await run.until(lambda: run.recorder.drops)
    assert run.recorder.drops == [
        ({"file.open": spooled}, "the spool cannot be read: the disk is full")
    ]
    run.inner.hold = False
    run.inner.release()
    await run.until(lambda: run.sink.account.pending == 0)
    assert len(run.delivered) == 1010 - spooled
    await run.stop()


@pytest.mark.parametrize("reachable", [True, False])
async def test_at_the_end_a_sink_is_waited_for_that_may_deliver(
    directory: Path, monkeypatch: pytest.MonkeyPatch, reachable: bool
) -> None:
    """Also where it is down, because nothing is acknowledged yet; else the disk has it."""
    monkeypatch.setattr(MemorySink, "reachable", reachable)
    run = Run(directory)
    await run.start(hold=True)
    run.sink.submit(batch("file.open", 1, 10))
    run.inner._set_status("down", "the broker has acknowledged nothing")
    assert run.sink.status == "down"
    assert run.sink.waiting == (10 if reachable else 0)
    await run.stop()


async def test_marks_are_safe_and_no_further(directory: Path) -> None:
    """With `spill`, what is in memory alone holds the mark back."""
    run = Run(directory, budget=1 << 18)
    await run.start(hold=True)
    run.sink.submit(batch("file.open", 1, 10))
    run.sink.checkpoint({("bulk", 0): 10}, {("bulk", 0): 11})
    run.sink.submit(batch("file.open", 11, 10))
    run.sink.checkpoint({("bulk", 0): 20}, {("bulk", 0): 22})
    assert run.sink.marks() == []
    run.inner.hold = False
    run.inner.release()
    await run.until(lambda: run.sink.safe() == 2)
    assert run.sink.marks() == [Mark("memory:", "bulk", 0, 20, 20, 22)]
    assert run.sink.marks() == []
    await run.stop()


async def test_losses_of_another_runs_events_name_it(directory: Path) -> None:
    run = Run(directory, "wal")
    await run.start(hold=True)
    run.sink.submit(batch("file.open", 5, 10))
    await run.stop()
    again = Run(directory, "wal", run="fedcba9876543210")
    await again.start(hold=True)
    await again.until(lambda: again.inner.account.received.total() == 10)
    again.inner.discard("refused")
    assert again.recorder.spans == [{("bulk", 0, RUN): Span(5, 14)}]
    await again.until(lambda: again.sink.account.pending == 0)
    await again.stop()
    assert NO_SPANS == {}


def test_what_comes_out_of_memory_is_not_held_twice(directory: Path) -> None:
    """The sink sends the bytes that the spool keeps until they are acknowledged."""
    run = Run(directory)
    made = batch("file.open", 1, 50)
    item = run.sink._item(1, made, fed=False)
    again, _ = run.sink._batch_of(item)
    assert again.lines("json") is item.data
    assert Batch(again.events).lines("json") == item.data


# ---------------------------------------------------------------- the end, with a bad disk


async def next_run(directory: Path) -> list[str]:
    """What another run delivers of what is on disk."""
    again = Run(directory, run="fedcba9876543210")
    await again.start()
    await again.until(lambda: again.sink.account.pending == 0)
    await again.stop()
    return again.delivered


def told_numbers(run: Run) -> list[int]:
    return [n for spans in run.recorder.spans for first, last, _ in spans.values()
            for n in range(first, last + 1)]  # fmt: skip


@pytest.mark.parametrize("mode", ["spill", "wal"])
async def test_a_disk_that_fails_at_the_end_keeps_what_it_has(directory: Path, mode: Mode) -> None:
    """On disk, given to the sink or not: the next run's. In memory alone: lost, and told."""
    run = Run(directory, mode, budget=1 << 18)
    await run.start(hold=True)
    for n in range(100):
        run.sink.submit(batch("file.open", 1 + 10 * n, 10))
        await run.until(lambda: not run.sink._writing)
    given = run.inner.account.pending
    on_disk = run.sink.spooled + (given if mode == "wal" else 0)
    assert 0 < run.sink.spooled < 1000
    Failing(run).code = sqlite3.SQLITE_FULL
    run.sink.submit(batch("file.open", 1001, 10))
    await run.until(lambda: run.sink._failed)
    await run.stop()
    run.check()
    assert run.sink.kept == {"file.open": on_disk}
    lost = sum(kinds["file.open"] for kinds, _ in run.recorder.drops)
    assert lost == 1010 - on_disk
    assert run.recorder.kinds() == {("bulk", 0): {"file.open": lost}}
    got = await next_run(directory)
    assert len(got) == on_disk
    told = {n for n in told_numbers(run)}
    if mode == "wal":
        assert told == set(range(1001, 1011))
    assert {f"{RUN}-bulk-0-{n}" for n in range(1, 1011)} == set(got) | {
        f"{RUN}-bulk-0-{n}" for n in told
    }


async def test_what_waits_in_memory_at_the_end_is_lost_with_its_kinds(directory: Path) -> None:
    """The disk fails, and there is no time."""
    run = Run(directory, budget=1 << 18)
    await run.start(hold=True)
    Failing(run).code = sqlite3.SQLITE_FULL
    for n in range(100):
        run.sink.submit(batch("file.open", 1 + 10 * n, 10))
    await run.until(lambda: run.sink._memory and not run.sink._writing)
    run.sink.discard("no time")
    assert not run.sink._memory
    assert run.recorder.kinds() == {("bulk", 0): run.sink.account.dropped}
    assert run.sink.account.dropped["file.open"] > 900
    await run.stop()


@pytest.mark.parametrize("mode", ["spill", "wal"])
async def test_a_disk_that_does_not_answer_at_the_end_is_a_loss(
    directory: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what it was to take: no event is pending for ever, and none goes untold."""
    monkeypatch.setattr("streamer.spool.sink._END_SECONDS", 0.1)
    run = Run(directory, mode, budget=1 << 18)
    await run.start(hold=True)
    for n in range(100):
        run.sink.submit(batch("file.open", 1 + 10 * n, 10))
        await run.until(lambda: not run.sink._writing)
    given, spooled = run.inner.account.pending, run.sink.spooled
    on_disk = spooled + (given if mode == "wal" else 0)
    answers = threading.Event()
    write = run.spool._store.write

    def slow(*arguments: Any, **others: Any) -> list[GivenUp]:
        assert answers.wait(WAIT)
        return write(*arguments, **others)

    monkeypatch.setattr(run.spool._store, "write", slow)
    run.sink.submit(batch("file.open", 1001, 10))
    await asyncio.sleep(0.05)
    await run.sink.stop(0.2)
    run.check()
    assert run.sink.kept == {"file.open": on_disk}
    assert sum(kinds["file.open"] for kinds, _ in run.recorder.drops) == 1010 - on_disk
    assert set(range(1001, 1011)) <= set(told_numbers(run))
    assert run.recorder.kinds() == {("bulk", 0): {"file.open": 1010 - on_disk}}
    answers.set()
    await run.spool.close()


async def test_what_is_refused_while_the_rest_is_kept_is_not_pending_for_ever(
    directory: Path,
) -> None:
    """A broker refuses something in just the moment in which the disk fails, at the end."""
    run = Run(directory, budget=1 << 20)
    await run.start(hold=True)
    run.sink.submit(batch("file.open", 1, 10))
    failing = Failing(run)
    failing.code = sqlite3.SQLITE_FULL
    failing.before = lambda: run.inner.discard("refused")
    await run.sink.stop(0.2)
    run.check()
    assert (run.sink.account.pending, run.sink.kept) == (0, {})
    assert run.recorder.spans == [{("bulk", 0): Span(1, 10)}]
    await run.spool.close()


async def test_of_what_was_delivered_in_part_nobody_knows_the_kinds(directory: Path) -> None:
    """At the end, when the disk does not take the rest."""
    run = Run(directory)
    await run.start(hold=True)
    run.sink.submit(batch("file.open", 1, 10))
    run.inner._delivered({"file.open": 4}, 0, 0)
    Failing(run).code = sqlite3.SQLITE_FULL
    await run.sink.stop(0.2)
    run.check()
    assert run.sink.account.dropped == {"file.open": 6}
    assert run.recorder.counted == [{("bulk", 0): Span(1, 10)}]
    await run.spool.close()


# ---------------------------------------------------------------- several sinks


@pytest.mark.parametrize("mode", ["spill", "wal"])
async def test_two_sinks_share_it_and_each_has_its_own(
    directory: Path, mode: Mode, caplog: pytest.LogCaptureFixture
) -> None:
    """One that stands still for long, one that does not, and both again with the next run."""
    run = Run(directory, mode, budget=1 << 18)
    slow, quick = run.sink, run.another("other:", mode, budget=1 << 18)
    quick.inner.hold = True  # type: ignore[attr-defined]
    await run.start(hold=True)
    await quick.start()
    sent = [batch("file.open", 1 + 10 * n, 10) for n in range(200)]
    for one in sent:
        slow.submit(one)
        quick.submit(one)
        await run.until(lambda: not slow._writing and not quick._writing)
    assert slow.spooled > 1000
    assert quick.spooled > 1000
    quick.inner.hold = False  # type: ignore[attr-defined]
    quick.inner.release()  # type: ignore[attr-defined]
    await run.until(lambda: quick.account.pending == 0)
    assert run.delivered_to(quick) == ids(*sent)
    await quick.stop(0.2)
    await run.stop()
    assert run.recorder.drops == []
    assert slow.kept == {"file.open": 2000}
    assert "the spool is not used" not in caplog.text
    again = Run(directory, mode, run="fedcba9876543210")
    other = again.another("other:", mode)
    await again.start()
    await other.start()
    await again.until(lambda: again.sink.account.pending == 0)
    assert again.delivered == ids(*sent)
    assert (again.sink.recovered, other.recovered) == (2000, 0)
    await other.stop(0.2)
    await again.stop()


async def test_what_makes_way_is_the_oldest_of_all_sinks(directory: Path) -> None:
    run = Run(directory, budget=1 << 18, most=1 << 20)
    other = run.another("other:", "spill", budget=1 << 18)
    other.inner.hold = True  # type: ignore[attr-defined]
    await run.start(hold=True)
    await other.start()
    for n in range(300):
        one = batch("file.open", 1 + 10 * n, 10, host=os.urandom(2000).hex())
        run.sink.submit(one)
        other.submit(one)
        await run.until(lambda: not run.sink._writing and not other._writing)
    first, second = run.sink.account.dropped.total(), other.account.dropped.total()
    assert min(first, second) > 100
    assert abs(first - second) <= 20
    await other.stop(0.2)
    await run.stop()
