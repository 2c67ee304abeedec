"""Standard error as the agent uses it: lines, and a status line below them, without ever waiting.

A pipe that nobody reads, a terminal that was stopped (Ctrl-S) and a file on a full disk take
nothing. What is to be written therefore waits in a queue with a bound, and a thread of its own
writes it. What is beyond the bound is dropped and counted, and the count is written when there is
room again.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections import deque
from threading import Condition, Thread

CLEAR_LINE = b"\r\x1b[K"
QUEUE_BYTES = 1 << 18
"""The most that waits."""
_RETRY_SECONDS = 1.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WRITE_BYTES = select.PIPE_BUF
"""How much a pipe takes for sure when it says that it takes something."""


class Console:
    """Writes to a descriptor that may block. Any thread may use it.

    Until `start`, when there may be one thread only, what the descriptor takes at once is written
    at once.
    """

    def __init__(self, fd: int = 2, most_bytes: int = QUEUE_BYTES) -> None:
        """At most `most_bytes` wait to be written."""
        self._fd = fd
        self._most = most_bytes
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._dropped = 0
        self._rest = memoryview(b"")
        self._status = self._shown = b""
        self._changed = Condition()
        self._thread: Thread | None = None
        self._busy = self._closed = self._gone = False

    def write(self, lines: bytes) -> None:
        """Write whole lines, when that can be. Never waits."""
        with self._changed:
            if self._bytes and self._bytes + len(lines) > self._most:
                self._dropped += lines.count(b"\n")
            else:
                self._lines.append(lines)
                self._bytes += len(lines)
            self._wake()

    def draw(self, status: bytes) -> None:
        """Show `status` below the lines in place of the one before; empty takes it away.

        Never waits. While nothing can be written, the last one is the one that will be drawn.
        """
        with self._changed:
            self._status = status
            self._wake()

    def start(self) -> None:
        """Write from a thread of its own from now on."""
        with self._changed:
            if self._thread is None:
                self._thread = Thread(target=self._run, name="streamer-console", daemon=True)
                self._thread.start()

    def close(self, seconds: float) -> None:
        """Take the status line away and wait for what is to be written, at most so long.

        The thread goes on for as long as a write blocks: being a daemon, it keeps nobody.
        """
        self.draw(b"")
        self.start()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(self._is_done, seconds)

    @property
    def is_gone(self) -> bool:
        """Whether nobody will ever read again."""
        return self._gone

    def _is_done(self) -> bool:
        return self._gone or not (self._busy or self._has_work())

    def _has_work(self) -> bool:
        return bool(self._rest or self._lines or self._dropped or self._status != self._shown)

    def _wake(self) -> None:
        if self._thread is not None:
            self._changed.notify_all()
            return
        while self._has_work() and not self._gone and _takes_some(self._fd):
            self._rest = self._rest or memoryview(self._taken(_WRITE_BYTES))
            if not self._write():
                return  # tried again with the next line

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._has_work() or self._closed)
                if self._gone or not self._has_work():
                    return
                self._busy = True
                self._rest = self._rest or memoryview(self._taken(self._most))
            while not self._write():
                time.sleep(_RETRY_SECONDS)

    def _taken(self, most: int) -> bytes:
        """What is to be written next: some lines, and the status line as it is to be."""
        lines: list[bytes] = []
        size = 0
        while self._lines and (not lines or size + len(self._lines[0]) <= most):
            lines.append(self._lines.popleft())
            size += len(lines[-1])
        self._bytes -= size
        if self._dropped and not self._lines:
            lines.append(b"streamer: %d lines were dropped: nobody read them\n" % self._dropped)
            self._dropped = 0
        clear = CLEAR_LINE if self._shown or self._status else b""
        self._shown = self._status
        return clear + b"".join(lines) + self._shown

    def _write(self) -> bool:
        """Write what was taken. False: a full disk has no room for the rest of it."""
        while self._rest and not self._gone:
            try:
                self._rest = self._rest[os.write(self._fd, self._rest) :]
            except BlockingIOError:  # another program that shares it made it so
                _await_room(self._fd)
            except OSError as error:
                if error.errno in _NO_ROOM:
                    return False
                self._gone = True  # the terminal, and with it whoever would read
        return True


def say(line: str, seconds: float = 1.0) -> None:
    """Write a line to standard error, unless nobody takes it for so long."""
    console = Console()
    console.write(f"{line}\n".encode("utf-8", "backslashreplace"))
    console.close(seconds)


def _takes_some(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return any(events & (select.POLLOUT | select.POLLERR) for _, events in poll.poll(0))


def _await_room(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if poll.poll(1000):
        time.sleep(0.01)  # room for less than the whole is no room to a pipe
