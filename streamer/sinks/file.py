"""Events appended to a file, which others may rotate, or the sink itself.

What "delivered" says depends on `fsync`: with `never`, that the events are in a file that has a
name, where every reader finds them, although a machine that loses power may forget the last
seconds; with `interval` and `batch`, that they are on the disk.

The thread that writes does everything that concerns the file, in the order of the events: it
notices that the file was renamed or removed, opens it anew, rotates it, and synchronises it. To
open and to rename take rights that this process may not have, so an `AppendFile` does that.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Unpack

from streamer.config import settings as config
from streamer.errors import HelperGone, SinkError
from streamer.events.batch import Batch, Encoding
from streamer.privilege.files import DIRECT, Appendable, AppendFile, Opener
from streamer.sinks.packer import Packer
from streamer.sinks.writer import (
    RETRY_FIRST,
    RETRY_MOST,
    WRITE_BUFFERS,
    Buffer,
    Callbacks,
    Marker,
    WriterSink,
    WriterThread,
    advance,
    is_gone,
)

LOOK_SECONDS = 1.0
"""How often it is looked whether the name still stands for the file, while events come."""
UNSAFE_BYTES = 8 << 20
"""The most that is written and not synchronised: with `interval` the disk may have to be quick."""

_log = logging.getLogger("streamer")
_REOPEN = Marker()


class Rotation(NamedTuple):
    """When a file is full. None: never, for that reason."""

    most_bytes: int | None
    seconds: int | None

    def is_due(self, size: int, begun: float, now: float) -> bool:
        """Whether a file of `size` bytes, begun at `begun`, is full; times since the epoch.

        By age it is full in the next period of `seconds`; the first begins at the epoch. Like
        that an agent that is restarted goes on with the file of the day, and begins none.
        """
        old = self.seconds is not None and begun // self.seconds != now // self.seconds
        return size > 0 and (old or self.is_large(size))

    def is_large(self, size: int) -> bool:
        """Whether a file of `size` bytes is full by its size."""
        return self.most_bytes is not None and size >= self.most_bytes


class FileSink(WriterSink):
    """Appends to a file.

    While the disk is full or failing, the status is `down` and writing is tried again, from the
    exact byte where it ended, so that no line is torn and nothing is lost when space returns.
    """

    def __init__(
        self,
        settings: config.FileSink,
        opener: Opener = DIRECT,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Nothing is opened before `start`. `clock` gives seconds since the epoch."""
        super().__init__(settings.name, settings.budget)
        self._settings = settings
        self._opener = opener
        self._clock = clock
        self._file: AppendFile | None = None
        self._torn = False

    def _open(self) -> int:
        try:
            self._file = self._opener.append(self._settings.path, int(self._settings.mode, 8))
            opened = self._file.open()
        except (OSError, HelperGone) as error:
            if self._file is not None:
                self._file.close()
            raise SinkError(f"{self.name}: cannot open: {_reason(error)}") from None
        self._torn = opened.torn
        if self._settings.rotates and not stat.S_ISREG(os.fstat(opened.fd).st_mode):
            os.close(opened.fd)
            self._file.close()
            raise SinkError(f"{self.name}: only a regular file can be rotated")
        return opened.fd

    def _make_thread(self, fd: int) -> WriterThread:
        assert self._file is not None, "opened"
        opened = Appendable(fd, self._torn)
        return FileThread(
            self._file, opened, self._settings, self.name, self._clock, **self._callbacks()
        )

    def reopen(self) -> None:
        """Write what comes from now on into the file that has the name now.

        What was taken before goes into the old one. If there is no opening the new one, writing
        to the old one goes on, and the log says so.
        """
        if self.status not in ("starting", "closed") and self._thread is not None:
            self._unwatch()
            self._thread.hand_over(_REOPEN)

    def _encode(self, batch: Batch) -> bytes:
        return batch.lines(self._settings.encoding)


class FileThread(WriterThread):
    """Writes to a file by its name.

    `_unsafe` are the byte strings that were handed over and not yet told to be written, in order;
    `_rest` is what is still to write of them: the last ones, the first of these perhaps in part.
    """

    def __init__(
        self,
        file: AppendFile,
        opened: Appendable,
        settings: config.FileSink,
        name: str,
        clock: Callable[[], float],
        **callbacks: Unpack[Callbacks],
    ) -> None:
        """`opened` is closed by the thread; `name` is that of the sink, for the log."""
        super().__init__(opened.fd, **callbacks)
        self._file = file
        self._name = name
        self._clock = clock
        self._encoding: Encoding = settings.encoding
        self._rotation = Rotation(settings.rotate_bytes, settings.rotate_seconds)
        self._keep = settings.rotate_keep
        self._packer: Packer | None = None
        if settings.rotates and settings.rotate_compress != "none":
            self._packer = Packer(file, settings.rotate_keep, name)
        self._sync_seconds = _sync_seconds(settings)
        self._sync_at: float | None = None
        self._unsafe: list[bytes] = []
        self._rest: Sequence[Buffer] = ()
        self._looked_at = time.monotonic()
        self._tried_at = float("-inf")
        self._leftovers = self._packer is not None
        self._doing = self._failed = ""
        # A torn line stays one bad line, and spoils no event.
        self._torn_end = b"\n" if settings.encoding == "json" else b""
        self._line_end = b""
        self._size = 0
        self._synchronises = False
        self._take_over(opened.torn)

    # ------------------------------------------------------------ to the file, and to the disk

    def _write(self, buffers: list[bytes]) -> None:
        self._unsafe += buffers
        self._rest = buffers
        self._settle()
        if self._synchronises:
            now = time.monotonic()
            self._sync_at = self._sync_at or now + (self._sync_seconds or 0.0)
            if now >= self._sync_at or sum(map(len, self._unsafe)) >= UNSAFE_BYTES:
                self._settle(on_disk=True)

    def _settle(self, *, on_disk: bool = False) -> None:
        """Write the rest, and have all of it on the disk if asked to, whatever it takes.

        Raises:
            OSError: nobody reads any more.
        """
        delay = RETRY_FIRST
        while (self._rest or (on_disk and self._unsafe)) and not self._abandoned.is_set():
            try:
                self._step()
            except OSError as error:
                if is_gone(error, self._terminal):
                    raise
                self._report(f"{self._doing}: {error.strerror}")
                self._abandoned.wait(delay)
                delay = min(2 * delay, RETRY_MOST)
            else:
                self._report("")

    def _step(self) -> None:
        if not self._rest:
            self._sync()
            return
        if self._is_removed():
            self._doing = "was removed, and cannot be opened again"
            self._switch(self._file.open)
        self._look()
        if self._is_between_lines() and self._is_full():
            self._rotate()
        self._doing = "cannot write"
        self._write_once()

    def _write_once(self) -> None:
        self._restart_if_disturbed()
        if not self._size:
            self._begun = self._clock()
        line_end, portion = self._line_end, self._portion()
        written = self._attempt([line_end, *portion] if line_end else portion)
        if written and self._regular:
            self._size = os.lseek(self._fd, 0, os.SEEK_CUR)  # the end of this, not of what follows
        if line_end and written:
            self._line_end, written = b"", written - len(line_end)
        done, self._rest = advance(self._rest, written)
        if self._is_removed():
            self._rest = list(self._unsafe)  # nobody finds it there
        elif done and not self._synchronises:
            self._safe(done)

    def _portion(self) -> Sequence[Buffer]:
        """As much of the rest as one write takes, and as the file is to take."""
        size = self._size
        for count, buffer in enumerate(self._rest[: WRITE_BUFFERS - 1]):
            if count and self._rotation.is_large(size):
                return self._rest[:count]
            size += len(buffer)
        return self._rest[: WRITE_BUFFERS - 1]

    def _restart_if_disturbed(self) -> None:
        """Within a line of it, somebody truncated the file, or wrote to it as well."""
        if self._is_between_lines():
            return
        size = os.fstat(self._fd).st_size
        if size < self._size:
            self._rest = self._unsafe[-len(self._rest) :]  # what went before it may be gone, too
        elif size > self._size:
            self._rest = self._unwritten()  # what follows would be the end of the other's line

    def _is_between_lines(self) -> bool:
        return not self._begun_bytes()

    def _begun_bytes(self) -> int:
        """How much of the first line of the rest is written; of MessagePack, of the first batch."""
        first, whole = self._rest[0], self._unsafe[-len(self._rest)]
        written = len(whole) - len(first)
        return written - (whole.rfind(b"\n", 0, written) + 1 if self._encoding == "json" else 0)

    def _unwritten(self) -> Sequence[Buffer]:
        """The rest, from the beginning of its first line; of MessagePack, of its first batch."""
        if not self._rest or self._is_between_lines():
            return self._rest
        first, whole = self._rest[0], self._unsafe[-len(self._rest)]
        begin = len(whole) - len(first) - self._begun_bytes()
        return [memoryview(whole)[begin:], *self._rest[1:]]

    def _sync(self) -> None:
        """Have what is written on the disk, which makes it safe. Raises OSError."""
        self._doing = "cannot be synchronised"
        try:
            os.fdatasync(self._fd)
        except OSError:
            # What could not be written the kernel forgets, and says so only once.
            if self._rest and not self._is_between_lines():
                self._line_end = self._torn_end
            self._rest = list(self._unsafe)
            raise
        self._safe(len(self._unsafe) - len(self._rest))
        self._sync_at = None

    def _safe(self, count: int) -> None:
        del self._unsafe[:count]
        self._tell(self._written, count)

    def _patience(self) -> float | None:
        return None if self._sync_at is None else max(self._sync_at - time.monotonic(), 0.0)

    def _pause(self) -> None:
        if self._sync_at is not None and (self._last or time.monotonic() >= self._sync_at):
            self._settle(on_disk=True)
        marker, self._marker = self._marker, None
        if marker is _REOPEN and not self._abandoned.is_set():
            self._try_to_switch(self._file.open, "cannot be opened again")

    # ------------------------------------------------------------ the file and its name

    def _is_removed(self) -> bool:
        return self._regular and not os.fstat(self._fd).st_nlink

    def _look(self) -> None:
        """Go on in another file if this one's name was taken away."""
        now = time.monotonic()
        if not self._regular or now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        if self._packer is not None and self._leftovers:
            self._leftovers = False
            self._packer.start()  # what an earlier run left
        try:
            current = self._file.current()
        except (OSError, HelperGone):
            return  # said when it is to be opened
        if not current:
            self._try_to_switch(self._file.open, "cannot be opened again")

    def _is_full(self) -> bool:
        return self._regular and self._rotation.is_due(self._size, self._begun, self._clock())

    def _rotate(self) -> None:
        now = time.monotonic()
        if now - self._tried_at < LOOK_SECONDS and self._failed:
            return
        self._tried_at = now
        if self._try_to_switch(lambda: self._file.rotate(self._keep), "cannot be rotated"):
            _log.debug("%s was rotated", self._name)
            if self._packer is not None:
                self._packer.start()

    def _try_to_switch(self, open_: Callable[[], Appendable], trouble: str) -> bool:
        """Go on in another file; if that cannot be, in this one, and say so."""
        try:
            self._switch(open_)
        except OSError as error:
            failed = f"{trouble}: {error.strerror}"
            if failed != self._failed:
                _log.warning("%s %s; writing to the old file goes on", self._name, failed)
            self._failed = failed
            return False
        return True

    def _switch(self, open_: Callable[[], Appendable]) -> None:
        """Go on in another file, with the first line that is not safe here. Raises OSError."""
        removed = self._is_removed()
        if self._synchronises and self._unsafe and not removed:
            self._sync()
        try:
            opened = open_()
        except HelperGone as error:
            raise OSError(errno.EIO, str(error)) from None
        self._rest = list(self._unsafe) if removed else self._unwritten()
        os.dup2(opened.fd, self._fd, inheritable=False)
        os.close(opened.fd)
        self._failed = ""
        self._take_over(opened.torn)

    def _take_over(self, torn: bool) -> None:
        self._line_end = self._torn_end if torn else b""
        status = os.fstat(self._fd)
        self._regular = stat.S_ISREG(status.st_mode)
        self._synchronises = self._regular and self._sync_seconds is not None
        self._size = status.st_size
        self._begun = status.st_mtime if status.st_size else self._clock()

    def _close(self) -> None:
        with suppress(OSError):
            os.close(self._fd)
        if self._packer is None or self._packer.close():
            self._file.close()


def _sync_seconds(settings: config.FileSink) -> float | None:
    """How long what is written may wait to be synchronised; None: for ever."""
    waits = {"never": None, "interval": settings.fsync_seconds, "batch": 0.0}
    return waits[settings.fsync]


def _reason(error: OSError | HelperGone) -> str:
    return getattr(error, "strerror", None) or str(error)
