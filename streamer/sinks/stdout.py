"""Events on standard output: lines for people on a terminal, NDJSON or MessagePack elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable

from streamer.config import settings as config
from streamer.errors import SinkError
from streamer.events.batch import Batch, Encoding
from streamer.sinks.writer import WriterSink


class StdoutSink(WriterSink):
    """Writes to a descriptor that somebody else opened, and never closes it.

    When the reader has gone, as in `streamer run | head`, the status becomes `closed` and
    everything from then on is dropped and accounted for.
    """

    ends_quietly = True

    def __init__(
        self,
        settings: config.StdoutSink,
        *,
        fd: int = 1,
        render: Callable[[Batch], bytes] | None = None,
    ) -> None:
        """`render` makes what is written for a batch; by default its lines in the encoding of
        `settings`, where `auto` means JSON.
        """
        super().__init__(settings.name, settings.budget)
        self._fd = fd
        self._render = render
        self._encoding: Encoding = "json" if settings.encoding == "auto" else settings.encoding

    def _open(self) -> int:
        try:
            os.fstat(self._fd)
        except OSError as error:
            raise SinkError(f"stdout: descriptor {self._fd}: {error.strerror}") from None
        return self._fd

    def _encode(self, batch: Batch) -> bytes:
        if self._render is not None:
            return self._render(batch)
        return batch.lines(self._encoding)
