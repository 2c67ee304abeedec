"""The stdout and file sinks, on real pipes, files and file systems."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gzip
import itertools
import json
import os
import select
import shutil
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.config import settings
from streamer.errors import SinkError
from streamer.events.batch import Batch
from streamer.events.spans import Span, Spans
from streamer.privilege.files import AppendFile, AppendTarget, DirectOpener, Packing
from streamer.sinks.base import Sink, size_beside
from streamer.sinks.file import FileSink, Rotation
from streamer.sinks.stdout import StdoutSink
from streamer.sinks.writer import advance
from tests.recorder import Recorder, SpanRecorder
from tests.unit.spooled import batch as real

WAIT = 10.0


class Exec(msgspec.Struct, tag_field="event", tag="process.exec"):
    id: str
    pad: str = ""


class Open(msgspec.Struct, tag_field="event", tag="file.open"):
    id: str


def execs(count: int, start: int = 0, pad: int = 0) -> Batch:
    return Batch([Exec(f"b-{n:08}", "x" * pad) for n in range(start, start + count)])


def recorded(sink: Sink) -> Recorder:
    recorder = Recorder()
    sink.listener = recorder
    return recorder


async def until(condition: Callable[[], object]) -> None:
    """Wait until `condition` holds."""
    async with asyncio.timeout(WAIT):
        while not condition():  # noqa: ASYNC110 - the sink has no event for what tests look at
            await asyncio.sleep(0.001)


async def read(fd: int, size: int) -> bytes:
    """Exactly `size` bytes of a pipe."""

    def collect() -> bytes:
        parts = []
        missing = size
        while missing:
            parts.append(os.read(fd, missing))
            missing -= len(parts[-1])
        return b"".join(parts)

    return await asyncio.wait_for(asyncio.to_thread(collect), WAIT)


def drain(fd: int) -> bytes:
    """What a pipe holds right now."""
    os.set_blocking(fd, False)
    parts = []
    while True:
        try:
            parts.append(os.read(fd, 1 << 20))
        except BlockingIOError:
            break
        if not parts[-1]:
            break
    os.set_blocking(fd, True)
    return b"".join(parts)


class Pipe:
    """A pipe of one page, so that a few batches fill it."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        self.capacity = fcntl.fcntl(self.write_end, fcntl.F_SETPIPE_SZ, 4096)
        self._open = {self.read_end, self.write_end}

    def close(self, *ends: int) -> None:
        for end in ends or tuple(self._open):
            self._open.remove(end)
            os.close(end)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def stdout_sink(pipe: Pipe, budget: int = 1 << 20, **options: Any) -> StdoutSink:
    return StdoutSink(settings.StdoutSink(budget_bytes=budget), fd=pipe.write_end, **options)


# ---------------------------------------------------------------- where a write ended


@given(
    buffers=st.lists(st.binary(max_size=20), max_size=20),
    steps=st.lists(st.integers(min_value=1, max_value=50), min_size=1),
)
def test_partial_writes_of_any_size_put_every_byte_out_once(
    buffers: list[bytes], steps: list[int]
) -> None:
    """However a write is cut, the bytes are those handed over and each buffer is done once."""
    output, finished = b"", 0
    rest: list[bytes | memoryview] = list(buffers)
    for step in itertools.cycle(steps):
        data = b"".join(rest)
        output += data[:step]
        done, rest = advance(rest, len(data[:step]))
        finished += done
        if not rest:
            break
    assert output == b"".join(buffers)
    assert finished == len(buffers)


# ---------------------------------------------------------------- stdout


@pytest.mark.parametrize("encoding", ["auto", "json", "msgpack"])
async def test_stdout_writes_exactly_the_encoded_batches_in_order(
    pipe: Pipe, encoding: str
) -> None:
    config = msgspec.convert({"type": "stdout", "encoding": encoding}, settings.StdoutSink)
    sink = StdoutSink(config, fd=pipe.write_end)
    recorder = recorded(sink)
    batches = [Batch([*execs(3, n).events, Open(f"o-{n}")]) for n in range(100)]
    used: Any = "json" if encoding == "auto" else encoding
    expected = b"".join(batch.lines(used) for batch in batches)
    await sink.start()
    for batch in batches:
        sink.submit(batch)
    assert await read(pipe.read_end, len(expected)) == expected
    await sink.stop(WAIT)
    assert sink.account.delivered == {"process.exec": 300, "file.open": 100}
    assert sink.account.pending == 0
    assert [status for status, _ in recorder.statuses] == ["up", "closed"]
    os.fstat(pipe.write_end)  # somebody else's descriptor: still open


async def test_stdout_writes_what_the_renderer_makes_of_a_batch(pipe: Pipe) -> None:
    sink = stdout_sink(pipe, render=lambda batch: b"%d events\n" % len(batch))
    await sink.start()
    sink.submit(execs(2))
    sink.submit(execs(3))
    assert await read(pipe.read_end, 18) == b"2 events\n3 events\n"
    await sink.stop(WAIT)
    assert sink.account.delivered == {"process.exec": 5}


async def test_a_closed_pipe_closes_the_sink_and_the_rest_is_dropped_and_counted(
    pipe: Pipe,
) -> None:
    sink = stdout_sink(pipe)
    recorder = recorded(sink)
    await sink.start()
    sink.submit(execs(1))
    await until(lambda: not sink.account.pending)
    pipe.close(pipe.read_end)
    sink.submit(execs(2))
    await until(lambda: sink.status == "closed")
    sink.submit(execs(4))
    await sink.stop(WAIT)
    assert sink.account.delivered == {"process.exec": 1}
    assert sink.account.dropped == {"process.exec": 6}
    assert sink.watermarks.held == 0
    assert recorder.statuses == [("up", ""), ("closed", "nobody reads it: Broken pipe")]
    assert [kinds for kinds, _ in recorder.drops] == [{"process.exec": 2}, {"process.exec": 4}]


async def test_a_stalled_pipe_stalls_neither_the_loop_nor_stop(pipe: Pipe) -> None:
    """What the reader finds is a prefix of the stream, and contains all that was delivered."""
    sink = stdout_sink(pipe)
    recorder = recorded(sink)
    await sink.start()
    sink.submit(execs(10))
    await until(lambda: not sink.account.pending)
    batches = [execs(10, start=n, pad=100) for n in range(10, 1010, 10)]
    for batch in batches:
        sink.submit(batch)
    await asyncio.sleep(0)  # the loop goes on
    await asyncio.wait_for(sink.stop(0.05), WAIT)
    assert sink.account.received == {"process.exec": 1010}
    assert sink.account.pending == 0
    assert sink.watermarks.held == 0
    stream = execs(10).lines("json") + b"".join(batch.lines("json") for batch in batches)
    found = drain(pipe.read_end)
    assert stream.startswith(found)
    assert 10 <= sink.account.delivered.total() <= found.count(b"\n")
    assert recorder.statuses[-1] == ("closed", "stopped before it was written")


async def test_what_waits_can_be_dropped_for_what_comes_then(pipe: Pipe) -> None:
    """Behind a write that is blocked: what it has begun with stays, and what is new follows."""
    sink = stdout_sink(pipe)
    recorder = recorded(sink)
    await sink.start()
    first = execs(10, pad=1000)
    sink.submit(first)
    await until(lambda: select.select([pipe.read_end], [], [], 0)[0])  # the thread has taken it
    for n in range(10, 60, 10):
        sink.submit(Batch(execs(10, start=n).events, spans={("bulk", 0): Span(n, n + 9)}))
    sink.discard("no time")
    assert recorder.drops == [({"process.exec": 10}, "no time")] * 5
    assert sink.account.pending == 10
    last = execs(1, start=99)
    sink.submit(last)
    expected = first.lines("json") + last.lines("json")
    assert await read(pipe.read_end, len(expected)) == expected
    await sink.stop(WAIT)
    assert sink.account.delivered == {"process.exec": 11}
    assert sink.watermarks.held == 0


async def test_what_is_given_up_is_told_with_its_kinds(pipe: Pipe) -> None:
    """Before it was started, when there was no time left, and when it stopped."""
    sink = stdout_sink(pipe)
    recorder = sink.listener = SpanRecorder()
    sink.submit(real("file.open", 1, 2))
    assert recorder.kinds() == {("bulk", 0): {"file.open": 2}}
    await sink.start()
    sink.submit(execs(10, pad=1000))
    await until(lambda: select.select([pipe.read_end], [], [], 0)[0])  # the thread has taken it
    sink.submit(real("file.open", 3, 3))
    sink.discard("no time")
    assert recorder.kinds() == {("bulk", 0): {"file.open": 5}}
    sink.submit(real("file.open", 6, 4))
    await sink.stop(0.01)
    assert recorder.kinds() == {("bulk", 0): {"file.open": 9}}


async def test_backpressure_is_at_the_exact_marks(pipe: Pipe) -> None:
    """The batch that reaches the budget makes it full, once; half of the budget makes room."""
    batch = execs(1, pad=1000)
    written = len(batch.lines("json"))
    size = written + size_beside(batch)
    sink = stdout_sink(pipe, budget=20 * size)
    recorder = recorded(sink)
    await sink.start()
    large = execs(1, pad=pipe.capacity)
    sink.submit(large)  # more than the pipe takes: the write blocks
    first = sink.watermarks.held
    submitted = 0
    while not recorder.marks:
        sink.submit(batch)
        submitted += 1
    assert submitted == 20 - first // size
    assert sink.watermarks.held == first + submitted * size
    sink.submit(batch)
    assert recorder.marks == ["full"]
    await read(pipe.read_end, len(large.lines("json")) + (submitted + 1) * written)
    await until(lambda: not sink.account.pending)
    assert recorder.marks == ["full", "room"]
    await sink.stop(WAIT)
    assert sink.account.delivered == {"process.exec": submitted + 2}


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@pytest.mark.parametrize("each", [1, 3, 50])
async def test_the_budget_bounds_the_memory(encoding: Any, each: int) -> None:
    """Also where a batch is one event, and what is kept with it more than the event."""
    budget = 1 << 20
    sink = file_sink(Path("/dev/full"), encoding=encoding, budget_bytes=budget)
    await sink.start()
    sink.submit(execs(1))
    await until(lambda: sink.status == "down")
    tracemalloc.start()
    try:
        number = 10**6
        while not sink.watermarks.full:
            number += each
            spans: Spans = {
                ("bulk", 0): Span(number, number + 1),
                ("critical", 1): Span(number + 2, number + 3),
            }
            sink.submit(Batch(execs(each, number, pad=300).events, spans=spans))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.8 * budget < held < 1.1 * budget
    await sink.stop(0.01)


async def test_a_descriptor_that_others_made_non_blocking_loses_nothing(pipe: Pipe) -> None:
    os.set_blocking(pipe.write_end, False)
    sink = stdout_sink(pipe)
    batches = [execs(10, start=n, pad=100) for n in range(0, 1000, 10)]
    expected = b"".join(batch.lines("json") for batch in batches)
    await sink.start()
    for batch in batches:
        sink.submit(batch)
    assert await read(pipe.read_end, len(expected)) == expected
    await sink.stop(WAIT)
    assert sink.account.delivered == {"process.exec": 1000}


async def test_a_cancelled_stop_still_gives_the_account(pipe: Pipe) -> None:
    sink = stdout_sink(pipe)
    await sink.start()
    sink.submit(execs(1, pad=2 * pipe.capacity))
    stopping = asyncio.create_task(sink.stop(WAIT))
    await asyncio.sleep(0.01)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert sink.status == "closed"
    assert sink.account.dropped == {"process.exec": 1}
    await sink.stop(WAIT)


async def test_submit_after_stop_is_dropped_and_a_second_stop_is_harmless(pipe: Pipe) -> None:
    sink = stdout_sink(pipe)
    await sink.start()
    await sink.stop(WAIT)
    sink.submit(execs(3))
    await sink.stop(WAIT)
    assert sink.account.dropped == {"process.exec": 3}
    assert sink.account.pending == 0


async def test_stdout_that_is_not_open_is_one_clear_line(pipe: Pipe) -> None:
    sink = stdout_sink(pipe)
    pipe.close()
    with pytest.raises(SinkError, match=r"^stdout: descriptor \d+: Bad file descriptor$"):
        await sink.start()
    await sink.stop(WAIT)
    assert sink.status == "closed"


# ---------------------------------------------------------------- file


def file_sink(path: Path, **options: Any) -> FileSink:
    return FileSink(settings.FileSink(path=str(path), **options))


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_file_appends_exactly_the_encoded_batches(tmp_path: Path, encoding: Any) -> None:
    path = tmp_path / "events"
    expected = b""
    for start in (0, 500):
        sink = file_sink(path, encoding=encoding)
        batches = [execs(10, n) for n in range(start, start + 500, 10)]
        await sink.start()
        for batch in batches:
            sink.submit(batch)
        await sink.stop(WAIT)
        assert sink.account.delivered == {"process.exec": 500}
        expected += b"".join(batch.lines(encoding) for batch in batches)
    assert path.read_bytes() == expected


async def test_file_is_created_with_the_mode_set_and_keeps_an_existing_one(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.touch(0o600)
    before = os.umask(0o077)
    try:
        for path in (new, old):
            sink = file_sink(path, mode="0664")
            await sink.start()
            await sink.stop(WAIT)
    finally:
        os.umask(before)
    assert new.stat().st_mode & 0o7777 == 0o664
    assert old.stat().st_mode & 0o7777 == 0o600


async def test_a_line_torn_by_a_crash_stays_one_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "events"
    path.write_bytes(b'{"event":"process.ex')
    sink = file_sink(path)
    await sink.start()
    sink.submit(execs(1))
    sink.submit(execs(1, 1))
    await sink.stop(WAIT)
    expected = b'{"event":"process.ex\n' + execs(2).lines("json")
    assert path.read_bytes() == expected


async def test_file_closes_its_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "events"
    sink = file_sink(path)
    await sink.start()
    assert str(path) in descriptors()
    sink.submit(execs(1))
    await sink.stop(WAIT)
    assert str(path) not in descriptors()


def descriptors() -> list[str]:
    """The paths of everything that this process has open."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(entry))
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return found


async def test_a_file_that_cannot_be_opened_is_one_clear_line(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reasons = {
        tmp_path: "Is a directory",
        tmp_path / "missing" / "events": "No such file or directory",
        fifo: "No such device or address",  # nobody reads it: refused, not waited for
    }
    for path, reason in reasons.items():
        with pytest.raises(SinkError) as caught:
            await file_sink(path).start()
        assert str(caught.value) == f"file:{path}: cannot open: {reason}"


async def test_a_failing_device_is_reported_once_and_does_not_hold_up_stop() -> None:
    sink = file_sink(Path("/dev/full"))
    recorder = recorded(sink)
    await sink.start()
    sink.submit(execs(1))
    await until(lambda: sink.status == "down")
    sink.submit(execs(2))
    await asyncio.wait_for(sink.stop(0.2), WAIT)
    assert sink.account.dropped == {"process.exec": 3}
    assert recorder.statuses == [
        ("up", ""),
        ("down", "cannot write: No space left on device; trying again"),
        ("closed", "stopped before it was written"),
    ]
    await until(lambda: "/dev/full" not in descriptors())


@pytest.fixture
def small_disk(tmp_path: Path, require: Callable[[object, str], None]) -> Iterator[Path]:
    """A file system of 64 KiB."""
    require(os.geteuid() == 0, "mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=755", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


async def test_a_full_disk_loses_nothing_when_space_returns(small_disk: Path) -> None:
    """The write that ran out of space goes on at the exact byte where it ended."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(40 << 10))
    path = small_disk / "events"
    sink = file_sink(path)
    recorder = recorded(sink)
    batches = [execs(10, start=n, pad=77) for n in range(0, 400, 10)]
    expected = b"".join(batch.lines("json") for batch in batches)
    assert 24 << 10 < len(expected) < 64 << 10
    await sink.start()
    for batch in batches[:20]:
        sink.submit(batch)
        await asyncio.sleep(0.001)
    for batch in batches[20:]:
        sink.submit(batch)
    await until(lambda: sink.status == "down")
    written = path.read_bytes()
    assert expected.startswith(written)
    assert not written.endswith(b"\n"), "the disk was to fill up within a line"
    assert 0 < sink.account.pending < 400
    ballast.unlink()
    await until(lambda: not sink.account.pending)
    await sink.stop(WAIT)
    assert path.read_bytes() == expected
    assert sink.account.delivered == {"process.exec": 400}
    assert [status for status, _ in recorder.statuses] == ["up", "down", "up", "closed"]


# ---------------------------------------------------------------- file, renamed by others


def numbers(*paths: Path) -> list[int]:
    """The numbers of the events in files, in order; compressed ones are expanded."""
    found = []
    for path in paths:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        found += [int(json.loads(line)["id"][2:]) for line in data.splitlines()]
    return found


def older(path: Path) -> list[Path]:
    """The rotated siblings of a file, the oldest first."""
    siblings = path.parent.glob(f"{path.name}.[0-9]*")
    return sorted(siblings, key=lambda one: -int(one.name.split(".")[1]))


async def feed(sink: Sink, start: int, count: int = 1) -> None:
    """Events one after the other, each written before the next is there."""
    for number in range(start, start + count):
        sink.submit(execs(1, number))
        await until(lambda: not sink.account.pending)


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamer.sinks.file.LOOK_SECONDS", 0.0)


@pytest.mark.usefixtures("looks_often")
async def test_a_renamed_file_is_noticed_without_a_signal(tmp_path: Path) -> None:
    path = tmp_path / "events"
    sink = file_sink(path)
    await sink.start()
    await feed(sink, 0, 3)
    path.rename(tmp_path / "renamed")
    await feed(sink, 3, 2)
    path.rename(tmp_path / "again")
    path.touch(0o600)  # as `create` of logrotate does
    await feed(sink, 5, 2)
    await sink.stop(WAIT)
    assert numbers(tmp_path / "renamed") == [0, 1, 2]
    assert numbers(tmp_path / "again") == [3, 4]
    assert numbers(path) == [5, 6]
    assert path.stat().st_mode & 0o7777 == 0o600
    assert sink.account.delivered == {"process.exec": 7}


async def test_what_is_written_to_a_removed_file_is_written_again(tmp_path: Path) -> None:
    """At once, not only at the next look: it does not count before it can be read."""
    path = tmp_path / "events"
    sink = file_sink(path)
    await sink.start()
    await feed(sink, 0, 2)
    path.unlink()
    await feed(sink, 2, 2)
    await sink.stop(WAIT)
    assert numbers(path) == [2, 3]
    assert sink.account.delivered == {"process.exec": 4}


async def test_a_truncated_file_goes_on_at_its_beginning(tmp_path: Path) -> None:
    """As `copytruncate` of logrotate does it."""
    path = tmp_path / "events"
    sink = file_sink(path)
    await sink.start()
    await feed(sink, 0, 3)
    os.truncate(path, 0)
    await feed(sink, 3, 2)
    await sink.stop(WAIT)
    assert numbers(path) == [3, 4]


async def test_a_directory_that_vanishes_is_a_state_and_costs_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "logs"
    directory.mkdir()
    path = directory / "events"
    sink = file_sink(path)
    recorder = recorded(sink)
    await sink.start()
    await feed(sink, 0, 2)
    shutil.rmtree(directory)
    sink.submit(execs(3, 2))
    await until(lambda: sink.status == "down")
    sink.submit(execs(1, 5))
    assert sink.account.delivered == {"process.exec": 2}
    directory.mkdir()
    await until(lambda: not sink.account.pending)
    await sink.stop(WAIT)
    assert numbers(path) == [2, 3, 4, 5]
    assert sink.account.delivered == {"process.exec": 6}
    reason = "was removed, and cannot be opened again: No such file or directory; trying again"
    assert recorder.statuses[:3] == [
        ("up", ""),
        ("down", reason),
        ("up", "writing works again"),
    ]


async def test_a_directory_that_stays_away_drops_exactly_the_rest(tmp_path: Path) -> None:
    directory = tmp_path / "logs"
    directory.mkdir()
    sink = file_sink(directory / "events")
    await sink.start()
    await feed(sink, 0, 2)
    shutil.rmtree(directory)
    sink.submit(execs(3, 2))
    await until(lambda: sink.status == "down")
    await sink.stop(0.1)
    assert sink.account.delivered == {"process.exec": 2}
    assert sink.account.dropped == {"process.exec": 3}


@pytest.mark.usefixtures("looks_often")
@pytest.mark.parametrize("each", [1, 8])
async def test_a_full_disk_is_left_by_renaming(small_disk: Path, each: int) -> None:
    """The line that was under way is whole in the new file, a bad one at the old one's end.

    The lines before it, of the same batch, are in the old file and nowhere else.
    """
    (small_disk / "ballast").write_bytes(bytes(40 << 10))
    path = small_disk / "events"
    sink = file_sink(path)
    await sink.start()
    for number in range(0, 400, each):
        sink.submit(execs(each, number, pad=77))
    await until(lambda: sink.status == "down")
    path.rename(small_disk / "old")
    (small_disk / "ballast").unlink()
    await until(lambda: not sink.account.pending)
    await sink.stop(WAIT)
    *lines, torn = (small_disk / "old").read_bytes().split(b"\n")
    assert torn, "the disk was to fill up within a line"
    first = [int(json.loads(line)["id"][2:]) for line in lines]
    assert first + numbers(path) == list(range(400))
    assert sink.account.delivered == {"process.exec": 400}


def readable(*paths: Path) -> list[int]:
    """The numbers of the events in the lines that are whole."""
    found = []
    for path in paths:
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(int(json.loads(line)["id"][2:]))
    return found


async def test_a_line_of_another_writer_within_one_of_ours(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where half a line fitted, another agent goes on before us: ours begins anew."""
    monkeypatch.setattr("streamer.sinks.file.RETRY_FIRST", 1.0)
    path = small_disk / "events"
    (small_disk / "ballast").write_bytes(bytes(40 << 10))
    sink = file_sink(path)
    await sink.start()
    for number in range(0, 400, 10):
        sink.submit(execs(10, number, pad=77))
    await until(lambda: sink.status == "down")
    assert not path.read_bytes().endswith(b"\n"), "the disk was to fill up within a line"
    (small_disk / "ballast").unlink()
    with path.open("ab") as other:
        other.write(b"their line\n")
    await until(lambda: not sink.account.pending)
    await sink.stop(WAIT)
    assert readable(path) == list(range(400))
    assert len(path.read_bytes().splitlines()) == 401, "one line is both halves"


# ---------------------------------------------------------------- file, rotated


@pytest.mark.parametrize("compress", ["none", "gzip"])
async def test_rotation_by_size_keeps_so_many_and_loses_nothing(
    tmp_path: Path, compress: Any
) -> None:
    path = tmp_path / "events"
    sink = file_sink(path, rotate_bytes=4096, rotate_keep=40, rotate_compress=compress)
    await sink.start()
    for number in range(0, 1000, 10):
        sink.submit(execs(10, number, pad=90))
        if number % 90 == 0:
            await asyncio.sleep(0.001)
    await until(lambda: not sink.account.pending)
    if compress == "gzip":
        await until(lambda: all(one.suffix == ".gz" for one in older(path)))
    await sink.stop(WAIT)
    files = older(path)
    batch = len(execs(10, pad=90).lines("json"))
    assert [one.name.split(".")[1] for one in files] == [str(n) for n in range(len(files), 0, -1)]
    assert numbers(*files, path) == list(range(1000))
    if compress == "none":
        assert {one.stat().st_size for one in files} == {-(-4096 // batch) * batch}
    assert sink.account.delivered == {"process.exec": 1000}
    assert not [name for name in descriptors() if name.startswith(str(tmp_path))]


async def test_rotation_removes_the_oldest(tmp_path: Path) -> None:
    path = tmp_path / "events"
    sink = file_sink(path, rotate_bytes=4096, rotate_keep=2)
    await sink.start()
    for number in range(10):
        sink.submit(execs(1, number, pad=4096))
    await sink.stop(WAIT)
    assert [one.name for one in older(path)] == ["events.2", "events.1"]
    assert numbers(*older(path), path) == [7, 8, 9]


async def test_rotation_by_age_goes_by_the_clock_and_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "events"
    day = 86400
    now = 20000.5 * day

    async def run(start: int, count: int) -> None:
        config = settings.FileSink(path=str(path), rotate_seconds=day)
        sink = FileSink(config, clock=lambda: now)
        await sink.start()
        await feed(sink, start, count)
        await sink.stop(WAIT)
        if path.exists():
            os.utime(path, (now, now))

    await run(0, 2)
    await run(2, 1)  # the same day
    now += day
    await run(3, 2)
    assert [numbers(one) for one in (*older(path), path)] == [[0, 1, 2], [3, 4]]


async def test_a_file_is_as_old_as_its_first_event(tmp_path: Path) -> None:
    """And not as its name: one that is opened at the end of a day may get the next day's events."""
    day = 86400
    now = [20000.9 * day]
    path = tmp_path / "events"
    config = settings.FileSink(path=str(path), rotate_seconds=day)
    sink = FileSink(config, clock=lambda: now[0])
    await sink.start()
    now[0] += 0.5 * day
    await feed(sink, 0, 3)
    now[0] += day
    await feed(sink, 3, 1)
    now[0] -= 2 * day  # the clock was set: once, not for each batch
    await feed(sink, 4, 3)
    await sink.stop(WAIT)
    assert [numbers(one) for one in (*older(path), path)] == [[0, 1, 2], [3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("size", "begun", "now", "due"),
    [
        (0, 0.0, 1e9, False),
        (99, 50.0, 99.9, False),
        (100, 50.0, 50.0, True),
        (1, 50.0, 100.0, True),
        (1, 100.0, 99.9, True),  # the clock was set
    ],
)
def test_when_a_file_is_full(size: int, begun: float, now: float, due: bool) -> None:
    assert Rotation(100, 100).is_due(size, begun, now) == due
    assert not Rotation(None, None).is_due(size, begun, now)


async def test_a_rotation_that_fails_is_said_once_and_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "events"
    (tmp_path / "events.1" / "full").mkdir(parents=True)
    sink = file_sink(path, rotate_bytes=4096, rotate_keep=1)
    await sink.start()
    for number in range(10):
        sink.submit(execs(1, number, pad=4096))
    await sink.stop(WAIT)
    assert numbers(path) == list(range(10))
    assert caplog.messages == [
        f"file:{path} cannot be rotated: Is a directory; writing to the old file goes on"
    ]


async def test_a_compressor_without_room_leaves_the_file(
    small_disk: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next run compresses what it finds."""
    path = small_disk / "events"
    (small_disk / "ballast").write_bytes(bytes(40 << 10))
    sink = file_sink(path, rotate_bytes=4096, rotate_compress="gzip")
    await sink.start()
    await feed(sink, 0)
    sink.submit(Batch([Exec("b-1", os.urandom(8000).hex())]))
    await until(lambda: not sink.account.pending)
    await feed(sink, 2)
    await until(lambda: caplog.messages)
    await sink.stop(WAIT)
    said = "an older file cannot be compressed, and stays as it is: No space left on device"
    assert caplog.messages == [f"file:{path}: {said}"]
    assert sorted(os.listdir(small_disk)) == ["ballast", "events", "events.1"]
    (small_disk / "ballast").unlink()
    again = file_sink(path, rotate_bytes=4096, rotate_compress="gzip")
    await again.start()
    # It looks with an event, no more often than this: a second's sleep can end a millisecond early.
    monkeypatch.setattr("streamer.sinks.file.LOOK_SECONDS", 0.0)
    await feed(again, 3)
    await until((small_disk / "events.1.gz").exists)
    await again.stop(WAIT)
    assert numbers(*older(path), path) == [0, 1, 2, 3]


async def test_the_old_file_is_open_until_the_compressed_one_takes_its_place(
    tmp_path: Path,
) -> None:
    """Else its inode may be a newer file's by then, which would be taken for it and removed."""

    class Checked(AppendTarget):
        def pack(self, keep: int) -> Packing | None:
            self.packing = super().pack(keep)
            return self.packing

        def packed(self, whole: bool) -> None:
            assert self.packing is not None
            seen.append(os.fstat(self.packing.source).st_size)
            super().packed(whole)

    class Opener(DirectOpener):
        def append(self, path: str, bits: int) -> AppendFile:
            return Checked(path, bits)

    seen: list[int] = []
    path = tmp_path / "events"
    config = settings.FileSink(path=str(path), rotate_bytes=4096, rotate_compress="gzip")
    sink = FileSink(config, Opener())
    await sink.start()
    sink.submit(execs(1, 0, pad=4096))
    await feed(sink, 1)
    await until((tmp_path / "events.1.gz").exists)
    await sink.stop(WAIT)
    assert seen == [len(execs(1, 0, pad=4096).lines("json"))]


async def test_only_a_regular_file_can_be_rotated() -> None:
    with pytest.raises(SinkError, match="only a regular file can be rotated"):
        await file_sink(Path("/dev/null"), rotate_bytes=4096).start()


# ---------------------------------------------------------------- file, and the disk


class Disk:
    """Counts what is synchronised, and fails as often as it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced = 0
        self.fails = 0
        self._real = os.fdatasync
        monkeypatch.setattr("streamer.sinks.file.os.fdatasync", self._sync)

    def _sync(self, fd: int) -> None:
        if self.fails:
            self.fails -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._real(fd)
        self.synced += 1


async def test_delivered_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    counts = {}
    for policy in ("never", "batch"):
        sink = file_sink(tmp_path / policy, fsync=policy)
        await sink.start()
        before = disk.synced
        await feed(sink, 0, 5)
        counts[policy] = disk.synced - before
        await sink.stop(WAIT)
    assert counts == {"never": 0, "batch": 5}


async def test_with_an_interval_it_is_held_until_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    path = tmp_path / "events"
    sink = file_sink(path, fsync="interval", fsync_seconds=0.5)
    await sink.start()
    sink.submit(execs(5))
    await until(lambda: path.read_bytes().count(b"\n") == 5)
    assert (disk.synced, sink.account.pending) == (0, 5)
    await until(lambda: not sink.account.pending)
    assert disk.synced == 1
    await asyncio.sleep(0.6)
    assert disk.synced == 1, "nothing was written since"
    sink.submit(execs(5, 5))
    await sink.stop(WAIT)
    assert disk.synced == 2
    assert sink.account.delivered == {"process.exec": 10}


async def test_what_could_not_be_synchronised_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel forgets it, and says so once only: a second fsync would succeed without it."""
    disk = Disk(monkeypatch)
    path = tmp_path / "events"
    sink = file_sink(path, fsync="batch")
    recorder = recorded(sink)
    await sink.start()
    await feed(sink, 0)
    disk.fails = 1
    await feed(sink, 1)
    await sink.stop(WAIT)
    assert numbers(path) == [0, 1, 1]
    assert recorder.statuses[1] == (
        "down",
        "cannot be synchronised: Input/output error; trying again",
    )
    assert sink.account.delivered == {"process.exec": 2}


async def test_what_is_not_on_the_disk_is_written_again_after_a_removal(tmp_path: Path) -> None:
    path = tmp_path / "events"
    sink = file_sink(path, fsync="interval", fsync_seconds=60)
    await sink.start()
    sink.submit(execs(2))
    await until(lambda: path.read_bytes().count(b"\n") == 2)
    path.unlink()
    sink.submit(execs(1, 2))
    await until(lambda: path.exists() and path.read_bytes().count(b"\n") == 3)
    path.rename(tmp_path / "old")
    sink.reopen()
    await until(lambda: not sink.account.pending)  # the old one is finished first
    sink.submit(execs(1, 3))
    await sink.stop(WAIT)
    assert numbers(tmp_path / "old", path) == [0, 1, 2, 3]


@pytest.mark.usefixtures("looks_often")
async def test_a_disk_that_fails_within_a_line(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full, renamed, and then not synchronised: what is written again begins with a line."""
    disk = Disk(monkeypatch)
    path, old = small_disk / "events", small_disk / "old"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(52 << 10))
    sink = file_sink(path, fsync="interval", fsync_seconds=60)
    await sink.start()
    for number in range(0, 120, 10):
        sink.submit(execs(10, number, pad=77))
    await until(lambda: sink.status == "down")
    assert not path.read_bytes().endswith(b"\n"), "the disk was to fill up within a line"
    disk.fails = 1
    path.rename(old)
    await until(lambda: not disk.fails)  # before it goes on in another file
    await until(path.exists)
    ballast.unlink()
    await sink.stop(WAIT)
    assert sink.account.delivered == {"process.exec": 120}
    assert sorted(set(readable(old, path))) == list(range(120))


# ---------------------------------------------------------------- file, opened anew


async def test_a_rotated_file_is_opened_anew_and_nothing_is_lost(tmp_path: Path) -> None:
    """Each event is in exactly one of the files, in order over all of them."""
    path = tmp_path / "events"
    sink = file_sink(path)
    await sink.start()
    batches = [execs(10, start) for start in range(0, 4000, 10)]
    for number, batch in enumerate(batches):
        sink.submit(batch)
        if number % 100 == 99:
            path.rename(tmp_path / f"events.{number // 100}")
            sink.reopen()
            await until(path.exists)
        if number % 7 == 0:
            await asyncio.sleep(0)
    await until(lambda: not sink.account.pending)
    await sink.stop(WAIT)
    assert sink.account.delivered == {"process.exec": 4000}
    found = [(tmp_path / f"events.{number}").read_bytes() for number in range(4)]
    assert found == [
        b"".join(batch.lines("json") for batch in batches[start : start + 100])
        for start in range(0, 400, 100)
    ]
    assert path.read_bytes() == b""
    assert not [name for name in descriptors() if name.startswith(str(path))]


async def test_what_waits_for_the_old_file_is_written_there(tmp_path: Path) -> None:
    """A write that blocks is not given up for the new file."""
    path = tmp_path / "events"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    capacity = fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ)
    sink = file_sink(path)
    await sink.start()
    before, after = execs(1, pad=2 * capacity), execs(2, start=1)
    sink.submit(before)
    path.unlink()
    sink.reopen()
    sink.submit(after)
    assert not path.exists(), "the old one is still written to"
    assert await read(reader, len(before.lines("json"))) == before.lines("json")
    await until(lambda: not sink.account.pending)
    assert path.read_bytes() == after.lines("json")
    os.close(reader)  # nobody looks at that any more
    sink.submit(after)
    await until(lambda: not sink.account.pending)
    await sink.stop(WAIT)
    assert sink.account.delivered == {"process.exec": 5}


async def test_a_new_file_that_cannot_be_opened_leaves_the_old_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "events"
    sink = file_sink(path)
    await sink.start()
    path.rename(tmp_path / "old")
    path.mkdir()
    sink.reopen()
    sink.submit(execs(1))
    await sink.stop(WAIT)
    assert (tmp_path / "old").read_bytes() == execs(1).lines("json")
    assert caplog.messages == [
        f"file:{path} cannot be opened again: Is a directory; writing to the old file goes on"
    ]
    sink.reopen()  # harmless


async def test_a_torn_line_in_the_new_file_spoils_no_event(tmp_path: Path) -> None:
    path = tmp_path / "events"
    sink = file_sink(path)
    await sink.start()
    sink.submit(execs(1))
    path.rename(tmp_path / "old")
    path.write_bytes(b'{"torn')
    sink.reopen()
    sink.submit(execs(1, 1))
    await sink.stop(WAIT)
    assert (tmp_path / "old").read_bytes() == execs(1).lines("json")
    assert path.read_bytes() == b'{"torn\n' + execs(1, 1).lines("json")
