"""Standard error that nobody reads: who writes to it never waits, and what is lost is counted."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import select
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streamer.terminal.console import Console
from streamer.terminal.log import LogFormatter, logging_to, traceback_of

PIPE = 4096


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe of one page: its reading end, and its writing end."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE)
    yield reader, writer
    os.close(writer)
    os.close(reader)


def read(fd: int, until: bytes) -> bytes:
    """What comes, until it ends so."""
    data = b""
    while not data.endswith(until):
        ready, _, _ = select.select([fd], [], [], 10)
        assert ready, data
        data += os.read(fd, 1 << 16)
    return data


def line(number: int) -> bytes:
    return b"%099d\n" % number


@pytest.mark.parametrize("started", [False, True])
def test_what_nobody_reads_waits_and_the_rest_is_counted(
    pipe: tuple[int, int], started: bool
) -> None:
    """In order, with no line lost that the counts do not have."""
    reader, writer = pipe
    console = Console(writer, most_bytes=1000)
    if started:
        console.start()
    for number in range(1000):
        console.write(line(number))
    console.start()
    kept: list[bytes] = []
    dropped = 0
    while len(kept) + dropped < 1000:  # the thread may find room in between, and say so
        for found in read(reader, b"\n").splitlines(keepends=True):
            if count := re.fullmatch(rb"streamer: (\d+) lines were dropped: .*\n", found):
                dropped += int(count[1])
            else:
                kept.append(found)
    assert len(kept) + dropped == 1000
    assert kept == sorted(set(kept))
    assert kept[0] == line(0)
    assert 10 <= len(kept) <= PIPE // 100 + 40
    console.write(b"again\n")
    assert read(reader, b"\n") == b"again\n"
    console.close(10)


def test_closing_waits_for_the_lines_and_not_for_ever(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    console = Console(writer)
    console.start()
    console.write(b"x" * (2 * PIPE) + b"\n")
    before = time.monotonic()
    console.close(0.2)
    assert 0.1 < time.monotonic() - before < 5
    assert len(read(reader, b"\n")) == 2 * PIPE + 1
    other = Console(writer)
    other.write(line(1))
    other.close(10)
    assert read(reader, b"\n") == line(1)


def test_what_is_dropped_is_counted_by_lines(pipe: tuple[int, int]) -> None:
    """A traceback is many."""
    reader, writer = pipe
    console = Console(writer, most_bytes=PIPE)
    for number in range(1000):
        console.write(line(number) * 10)
    console.start()
    text = read(reader, b"nobody read them\n")
    count = re.search(rb"streamer: (\d+) lines were dropped: ", text)
    assert count is not None
    assert int(count[1]) + text.count(b"\n") - 1 == 10000
    console.close(10)


@pytest.mark.parametrize("started", [False, True])
def test_a_full_disk_is_waited_for(
    tmp_path: Path,
    require: Callable[[object, str], None],
    monkeypatch: pytest.MonkeyPatch,
    started: bool,
) -> None:
    """A log goes on when there is room again, at the byte where it ended."""
    require(os.geteuid() == 0, "mounting a small file system needs root")
    monkeypatch.setattr("streamer.terminal.console._RETRY_SECONDS", 0.01)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", tmp_path], check=True)
    try:
        ballast, log = tmp_path / "ballast", tmp_path / "log"
        ballast.write_bytes(bytes(8 << 10))
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        console = Console(fd)
        if started:
            console.start()
        for number in range(120):
            console.write(line(number))
        console.close(0.2)
        assert not console.is_gone
        assert log.stat().st_size == 8 << 10, "the disk was to fill up within a line"
        ballast.unlink()
        console.close(10)
        assert log.read_bytes() == b"".join(map(line, range(120)))
        os.close(fd)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_disk_that_stays_full_does_not_hold_up_the_end() -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        console = Console(full.fileno())
        for number in range(100):
            console.write(line(number))
        console.start()
        console.draw(b"status")
        before = time.monotonic()
        console.close(0.2)
        assert time.monotonic() - before < 5
        assert not console.is_gone


def test_a_reader_that_has_gone_costs_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    console = Console(writer)
    console.write(line(1))
    console.start()
    console.write(line(2))
    console.close(10)
    assert console.is_gone
    os.close(writer)


def test_a_stopped_terminal_shows_the_last_status_line_afterwards() -> None:
    """And none of those before; lines come ahead of it."""
    master, terminal = pty.openpty()
    attributes = termios.tcgetattr(terminal)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(terminal, termios.TCSANOW, attributes)
    console = Console(terminal)
    termios.tcflow(terminal, termios.TCOOFF)
    for number in range(100):
        console.draw(b"status %d" % number)
        console.write(b"line %d\n" % number)
    termios.tcflow(terminal, termios.TCOON)
    console.close(10)
    lines = b"".join(b"line %d\n" % number for number in range(100))
    written = read(master, b"line 99\n").replace(b"\r\x1b[K", b"")
    assert written == lines
    os.close(terminal)
    os.close(master)


# ---------------------------------------------------------------- the log


def test_no_message_and_no_traceback_reaches_a_terminal_as_it_is(pipe: tuple[int, int]) -> None:
    """A traceback stays readable, and no line of it can be taken for a message."""
    reader, writer = pipe
    console = Console(writer)
    with logging_to(console, "info"):
        logging.getLogger("streamer").warning("evil %s", "\x1b[2J\u202e\n\x9bm")
        logging.getLogger("streamer").debug("not this")
        try:
            raise ValueError("first \x1b[31m\nstreamer: all is well\u2066")
        except ValueError:
            logging.getLogger("a library").exception("broken\n")
    console.start()
    console.write(b"end\n")
    text = read(reader, b"end\n").decode()
    assert "streamer: evil \\x1b[2J\\u202e\\n\\x9bm\n" in text
    assert "streamer: broken\\n\n    Traceback (most recent call last):\n" in text
    assert text.endswith("    ValueError: first \\x1b[31m\n    streamer: all is well\\u2066\nend\n")
    assert all(char.isprintable() for char in text.replace("\n", ""))


def test_errors_that_nobody_catches_are_logged(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    console = Console(writer)
    hooks = threading.excepthook, sys.unraisablehook

    def broken() -> None:
        raise RuntimeError("\x1bin a thread")

    class Broken:
        def __del__(self) -> None:
            raise RuntimeError("\x1bat the end")

    with logging_to(console, "info"):
        thread = threading.Thread(target=broken)
        thread.start()
        thread.join()
        Broken()
    console.start()
    console.write(b"end\n")
    text = read(reader, b"end\n").decode()
    assert "streamer: a thread ended by a defect\n    Traceback" in text
    assert "RuntimeError: \\x1bin a thread\n" in text
    assert "RuntimeError: \\x1bat the end\n" in text
    assert (threading.excepthook, sys.unraisablehook) == hooks


def test_the_stack_of_a_call_is_escaped() -> None:
    assert LogFormatter().formatStack("a\x1b\nb") == "    a\\x1b\n    b"
    assert traceback_of(ValueError("\x9b")) == "    ValueError: \\x9b"


def test_a_line_beyond_the_bound_is_written_where_nothing_waits(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    console = Console(writer, most_bytes=10)
    console.start()
    console.write(line(1))
    assert read(reader, b"\n") == line(1)
    console.close(10)


def test_a_long_message_of_a_peer_is_cut_in_the_middle() -> None:
    record = logging.LogRecord("a", logging.INFO, "", 0, "x" * 10**6 + " its reason", (), None)
    text = LogFormatter().format(record)
    assert len(text) < 2100
    assert text.endswith("xxx its reason")
