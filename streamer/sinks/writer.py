"""Writing to a descriptor that may block: what the stdout and file sinks share.

Every write happens on one daemon thread per sink. The descriptor stays in blocking mode:
standard output is usually shared with a shell and with other programs, and O_NONBLOCK is a
property of the open file, so setting it would change it for all of them (and does nothing for
regular files). A pipe whose reader has stalled, a terminal stopped with Ctrl-S or a hanging
disk then block that thread only: the loop goes on, and `stop` gives up on the thread, which,
being a daemon, does not keep the process alive.

The loop hands over whole batches and the thread answers once per write; nothing here happens
per event.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import stat
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import NamedTuple, TypedDict, TypeVar

from streamer.events.batch import Batch
from streamer.events.spans import Spans, spans_of_records
from streamer.sinks.base import Sink, size_beside

Buffer = bytes | memoryview
T = TypeVar("T")

WRITE_BYTES = 1 << 20
"""How much is put together for one write: enough for its cost to vanish, little enough for the
account to stay current."""
WRITE_BUFFERS = 1024
"""The most buffers that one `writev` takes on Linux (IOV_MAX)."""
RETRY_FIRST = 0.05
RETRY_MOST = 2.0
"""Seconds between attempts while the disk is full or failing."""
POLL_MS = 200


def advance(buffers: Sequence[Buffer], written: int) -> tuple[int, list[Buffer]]:
    """What a write of `written` bytes leaves: the number of buffers done, and those still to do.

    The first of the rest begins at the exact byte where the write ended.
    """
    done = 0
    for buffer in buffers:
        if written < len(buffer):
            break
        written -= len(buffer)
        done += 1
    rest = list(buffers[done:])
    if rest and written:
        rest[0] = memoryview(rest[0])[written:]
    return done, rest


def is_gone(error: OSError, terminal: bool) -> bool:
    """Whether nobody will ever read again: a closed pipe or socket, or a terminal that hung up."""
    if error.errno == errno.EIO:
        return terminal
    return error.errno in (errno.EPIPE, errno.ECONNRESET, errno.EBADF)


class Marker:
    """What is handed over between byte strings and is not written: it says what is to be done."""


class WriterThread:
    """Writes byte strings to `fd` in order, from a thread of its own.

    The callbacks run on `loop`: `written(count)` with how many more of the byte strings handed
    over are safe, in the sense of the sink; `failing(reason)` when writes begin to fail, or fail
    for another reason, and `failing("")` once when they work again; `ended(error)` last, where
    `error` says why no more can be written, or is None.
    """

    def __init__(
        self,
        fd: int,
        *,
        loop: asyncio.AbstractEventLoop,
        written: Callable[[int], None],
        failing: Callable[[str], None],
        ended: Callable[[Exception | None], None],
    ) -> None:
        """`fd` stays its owner's, and is the same number for as long as the thread lives."""
        self._fd = fd
        self._terminal = os.isatty(fd)
        self._loop = loop
        self._written = written
        self._failing = failing
        self._ended = ended
        self._queue: SimpleQueue[bytes | Marker | None] = SimpleQueue()
        self._abandoned = Event()
        self._reason = ""
        self._last = False
        self._marker: Marker | None = None
        self._thread = Thread(target=self._run, name="streamer-writer", daemon=True)

    def finish(self) -> None:
        """End after what was handed over."""
        self.hand_over(None)

    def abandon(self) -> None:
        """End as soon as possible: at once, unless a write is blocked."""
        self._abandoned.set()
        self.hand_over(None)

    def hand_over(self, data: bytes | Marker | None) -> None:
        """Hand over one byte string; None is the end. Never waits."""
        # Only when there is something to write: the process gives up its privileges before, and
        # cannot while it has several threads.
        if self._thread.ident is None:
            self._thread.start()
        self._queue.put(data)

    def take_back(self) -> int:
        """Take out what no write has begun with. How many byte strings it was."""
        count = 0
        kept: list[Marker | None] = []
        with contextlib.suppress(Empty):
            while True:
                data = self._queue.get_nowait()
                if isinstance(data, bytes):
                    count += 1
                else:
                    kept.append(data)
        for one in kept:
            self._queue.put(one)
        return count

    def _run(self) -> None:
        error: Exception | None = None
        try:
            while not self._last and not self._abandoned.is_set():
                if buffers := self._gather():
                    self._write(buffers)
                self._pause()
        except Exception as caught:  # what ends this thread must end the sink
            error = caught
        finally:
            self._close()
            self._tell(self._ended, error)

    def _close(self) -> None:
        """Release what the thread alone uses."""

    def _pause(self) -> None:
        """Do what is to be done between two writes: a marker asks for it, or the time has come."""

    def _patience(self) -> float | None:
        """Seconds until `_pause` has something to do, though nothing is handed over."""
        return None

    def _gather(self) -> list[bytes]:
        """Everything that waits, up to the size of one write. Blocks until there is something.

        What comes after a marker is left for the next time.
        """
        buffers: list[bytes] = []
        size = 0
        try:
            data = self._queue.get(timeout=self._patience())
            while data is not None:
                if isinstance(data, Marker):
                    self._marker = data
                    return buffers
                buffers.append(data)
                size += len(data)
                if size >= WRITE_BYTES or len(buffers) == WRITE_BUFFERS:
                    return buffers
                data = self._queue.get_nowait()
        except Empty:
            return buffers
        self._last = True
        return buffers

    def _write(self, buffers: list[bytes]) -> None:
        rest: Sequence[Buffer] = buffers
        while rest and not self._abandoned.is_set():
            done, rest = advance(rest, self._write_some(rest))
            if done:
                self._tell(self._written, done)

    def _write_some(self, buffers: Sequence[Buffer]) -> int:
        """One successful write, however many attempts it takes. 0 when abandoned.

        Raises:
            OSError: nobody reads any more.
        """
        delay = RETRY_FIRST
        while not self._abandoned.is_set():
            try:
                written = self._attempt(buffers)
            except OSError as error:
                if is_gone(error, self._terminal):
                    raise
                self._report(f"cannot write: {error.strerror}")
                self._abandoned.wait(delay)
                delay = min(2 * delay, RETRY_MOST)
            else:
                self._report("")
                return written
        return 0

    def _attempt(self, buffers: Sequence[Buffer]) -> int:
        """One write; 0 where there was no room for a while. Raises OSError."""
        try:
            return os.writev(self._fd, buffers)
        except BlockingIOError:
            self._await_room()
            return 0

    def _await_room(self) -> None:
        """Wait a little for room: another program that shares `fd` made it non-blocking."""
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        poll.poll(POLL_MS)

    def _report(self, reason: str) -> None:
        if reason != self._reason:
            self._reason = reason
            self._tell(self._failing, reason)

    def _tell(self, callback: Callable[[T], None], argument: T) -> None:
        # The loop may have been closed while a write was blocked.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, argument)


def _is_writing_end(fd: int) -> bool:
    """Whether it is a pipe's end that cannot be read from."""
    only_writes = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
    return only_writes and stat.S_ISFIFO(os.fstat(fd).st_mode)


class Callbacks(TypedDict):
    """Arguments of a `WriterThread`."""

    loop: asyncio.AbstractEventLoop
    written: Callable[[int], None]
    failing: Callable[[str], None]
    ended: Callable[[Exception | None], None]


class _Held(NamedTuple):
    """A batch that was handed over: `size` is what it counts for, `data` what is written."""

    kinds: Mapping[str, int]
    size: int
    spans: Spans
    data: bytes

    def counted(self) -> Spans:
        """See `EncodedBatch`; where it is text for people, its kinds are not known."""
        return spans_of_records(self.data, self.spans)


class WriterSink(Sink):
    """A sink that writes encoded batches one after the other to a descriptor."""

    def __init__(self, name: str, budget_bytes: int) -> None:
        """See `Sink`."""
        super().__init__(name, budget_bytes)
        self._held: deque[_Held] = deque()
        self._thread: WriterThread | None = None
        self._ended: asyncio.Future[None] | None = None
        self._over = ""
        self._unwatch: Callable[[], object] = lambda: None

    @abstractmethod
    def _open(self) -> int:
        """The descriptor to write to.

        Raises:
            SinkError: it cannot be opened, or is not open.
        """

    @abstractmethod
    def _encode(self, batch: Batch) -> bytes:
        """What is written for a batch."""

    async def start(self) -> None:
        """Open the descriptor; the thread starts with the first batch.

        Raises:
            SinkError: it cannot be opened, or is not open.
        """
        self._ended = asyncio.get_running_loop().create_future()
        fd = self._open()
        self._thread = self._make_thread(fd)
        self._watch(fd)
        self._set_status("up")

    def _make_thread(self, fd: int) -> WriterThread:
        return WriterThread(fd, **self._callbacks())

    def _callbacks(self) -> Callbacks:
        """What every thread of this sink calls, and where."""
        return {
            "loop": asyncio.get_running_loop(),
            "written": self._on_written,
            "failing": self._on_failing,
            "ended": self._on_ended,
        }

    def _watch(self, fd: int) -> None:
        """Notice when the last reader of a pipe goes, also while nothing is written to it."""
        if _is_writing_end(fd):
            loop = asyncio.get_running_loop()
            loop.add_reader(fd, self._on_hangup)
            self._unwatch = lambda: loop.remove_reader(fd)

    def submit(self, batch: Batch) -> None:
        """Take a batch; its size is that of what will be written, and of what is kept with it."""
        if self._over or self._thread is None:
            self._take(batch.kinds, 0)
            self._dropped(batch.kinds, 0, self._over or "not started", batch.counted())
            return
        data = self._encode(batch)
        size = len(data) + size_beside(batch)
        self._take(batch.kinds, size)
        self._held.append(_Held(batch.kinds, size, batch.spans, data))
        self._thread.hand_over(data)

    def discard(self, reason: str) -> None:
        """Drop what no write has begun with."""
        count = 0 if self._over or self._thread is None else self._thread.take_back()
        dropped = [self._held.pop() for _ in range(count)]
        for one in reversed(dropped):
            self._dropped(one.kinds, one.size, reason, one.counted())

    async def stop(self, grace: float) -> None:
        """Write what is held within `grace` seconds and drop the rest.

        A write that is blocked when the grace ends is left to the thread. Its batches count as
        dropped, although a reader that wakes up later may still see some of them.
        """
        if self._thread is None:
            self._end("stopped")
        if self._over or self._thread is None or self._ended is None:
            return
        self._thread.finish()
        try:
            await asyncio.wait({self._ended}, timeout=grace)
        finally:
            self._thread.abandon()
            self._end("stopped before it was written")

    def _on_written(self, count: int) -> None:
        if self._over:
            return
        for _ in range(count):
            one = self._held.popleft()
            self._delivered(one.kinds, one.size, len(one.data))

    def _on_failing(self, reason: str) -> None:
        if self._over:
            return
        if not reason:
            self._set_status("up", "writing works again")
        elif self.status == "down":  # for another reason now
            self.listener.sink_status(self, "down", f"{reason}; trying again")
        else:
            self._set_status("down", f"{reason}; trying again")

    def _on_hangup(self) -> None:
        # A writing end becomes readable only when it has an error.
        if self._thread is not None:
            self._thread.abandon()
        self._end(f"nobody reads it: {os.strerror(errno.EPIPE)}")

    def _on_ended(self, error: Exception | None) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
        if isinstance(error, OSError):
            self._end(f"nobody reads it: {error.strerror}")
        elif error is not None:
            self._end(f"{type(error).__name__}: {error}")

    def _end(self, reason: str) -> None:
        """Drop what is held and close for good; only the first call counts."""
        if self._over:
            return
        self._over = reason
        self._unwatch()
        while self._held:
            one = self._held.popleft()
            self._dropped(one.kinds, one.size, reason, one.counted())
        self._set_status("closed", reason)
