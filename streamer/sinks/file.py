"""Events appended to a file."""

from __future__ import annotations

import os
import stat

from streamer import settings as config
from streamer.batch import Batch
from streamer.errors import SinkError
from streamer.sinks.writer import WriterSink

# O_NONBLOCK only for the open: a FIFO without a reader is refused instead of waited for.
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK


def open_append(path: str, mode: int) -> int:
    """Open `path` for appending, creating it with exactly `mode` if it does not exist.

    Returns a blocking descriptor.

    Raises:
        OSError: it cannot be opened.
    """
    try:
        fd = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        fd = os.open(path, _FLAGS)
    else:
        os.fchmod(fd, mode)  # the umask does not change what the settings say
    os.set_blocking(fd, True)
    return fd


def ends_torn(path: str) -> bool:
    """Whether a regular file ends within a line, as a crash or a full disk may leave it."""
    try:
        status = os.stat(path)
        # Only regular files: opening a FIFO would wait, and a device may do anything.
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            return False
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:
        return False  # not readable: nothing is known, and nothing is added


class FileSink(WriterSink):
    """Appends to a file that it opens once.

    While the disk is full or failing, the status is `down` and writing is tried again, from the
    exact byte where it ended, so that no line is torn and nothing is lost when space returns.
    """

    def __init__(self, settings: config.FileSink) -> None:
        """Nothing is opened before `start`."""
        super().__init__(f"file:{settings.path}", settings.budget_bytes)
        self._path = settings.path
        self._mode = int(settings.mode, 8)
        self._encoding = settings.encoding
        self._line_end = b""

    @property
    def _owns_descriptor(self) -> bool:
        return True

    def _open(self) -> int:
        if self._encoding == "json" and ends_torn(self._path):
            self._line_end = b"\n"  # the torn line stays one bad line, and spoils no event
        try:
            return open_append(self._path, self._mode)
        except OSError as error:
            raise SinkError(f"{self.name}: cannot open: {error.strerror}") from None

    def _encode(self, batch: Batch) -> bytes:
        line_end, self._line_end = self._line_end, b""
        return line_end + batch.lines(self._encoding) if line_end else batch.lines(self._encoding)
