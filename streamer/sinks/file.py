"""Events appended to a file."""

from __future__ import annotations

import logging

from streamer.config import settings as config
from streamer.errors import HelperGone, SinkError
from streamer.events.batch import Batch
from streamer.privilege.files import DIRECT, Appendable, Opener
from streamer.sinks.writer import WriterSink

_log = logging.getLogger(__name__)


class FileSink(WriterSink):
    """Appends to a file, which it opens at the start and when it is told to `reopen`.

    While the disk is full or failing, the status is `down` and writing is tried again, from the
    exact byte where it ended, so that no line is torn and nothing is lost when space returns.
    """

    def __init__(self, settings: config.FileSink, opener: Opener = DIRECT) -> None:
        """Nothing is opened before `start`."""
        super().__init__(f"file:{settings.path}", settings.budget_bytes)
        self._path = settings.path
        self._bits = int(settings.mode, 8)
        self._encoding = settings.encoding
        self._opener = opener
        self._line_end = b""

    @property
    def _owns_descriptor(self) -> bool:
        return True

    def _open(self) -> int:
        try:
            return self._opened().fd
        except (OSError, HelperGone) as error:
            raise SinkError(f"{self.name}: cannot open: {_reason(error)}") from None

    def reopen(self) -> None:
        """Write what comes from now on into the file that has the name now.

        What was taken before goes into the old one. If there is no opening the new one, writing
        to the old one goes on, and the log says so.
        """
        if self.status in ("starting", "closed"):
            return
        try:
            fd = self._opened().fd
        except (OSError, HelperGone) as error:
            reason = f"cannot be opened again: {_reason(error)}"
            _log.warning("%s %s; writing to the old file goes on", self.name, reason)
        else:
            self._switch(fd)

    def _opened(self) -> Appendable:
        opened = self._opener.append(self._path, self._bits)
        # The torn line stays one bad line, and spoils no event.
        self._line_end = b"\n" if opened.torn and self._encoding == "json" else b""
        return opened

    def _encode(self, batch: Batch) -> bytes:
        line_end, self._line_end = self._line_end, b""
        return line_end + batch.lines(self._encoding) if line_end else batch.lines(self._encoding)


def _reason(error: OSError | HelperGone) -> str:
    return getattr(error, "strerror", None) or str(error)
