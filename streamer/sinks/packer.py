"""Compresses the older files of a sink that rotates.

In this process, on a thread of its own: the helper has one thread, which must be free to load and
to open, and its rights are no place for a compressor. It opens the old file and the new one, and
in the end puts the one in the other's place; everything between is done here, without rights,
and mostly without the interpreter's lock, so that neither the loop nor the writing waits.
"""

from __future__ import annotations

import logging
import os
import zlib
from contextlib import suppress
from threading import Event, Lock, Thread

from streamer.errors import HelperGone
from streamer.privilege.files import AppendFile

LEVEL = 1
"""Of zlib: events are so much alike that more brings little, and costs the host several times."""
CHUNK_BYTES = 1 << 18
CLOSE_SECONDS = 1.0
_GZIP = 16 + zlib.MAX_WBITS

_log = logging.getLogger("streamer")


class Packer:
    """Compresses one file after the other, the oldest first, whenever `start` is called."""

    def __init__(self, file: AppendFile, keep: int, name: str) -> None:
        """`keep` is how many older files there are at most; `name` is the sink's, for the log."""
        self._file = file
        self._keep = keep
        self._name = name
        self._lock = Lock()
        self._runs = self._again = False
        self._closed = Event()
        self._thread: Thread | None = None

    def start(self) -> None:
        """Compress what there is to compress. Never waits."""
        with self._lock:
            self._again = True
            if self._runs or self._closed.is_set():
                return
            self._runs = True
        self._thread = Thread(target=self._run, name="streamer-packer", daemon=True)
        self._thread.start()

    def close(self) -> bool:
        """Give up. What is not done is left for the next run. False: a disk holds it up."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
        return self._thread is None or not self._thread.is_alive()

    def _run(self) -> None:
        while self._is_asked():
            try:
                while self._pack_one():
                    pass
            except (OSError, HelperGone) as error:
                reason = getattr(error, "strerror", None) or str(error)
                _log.warning(
                    "%s: an older file cannot be compressed, and stays as it is: %s",
                    self._name,
                    reason,
                )

    def _is_asked(self) -> bool:
        with self._lock:
            self._runs = self._again and not self._closed.is_set()
            self._again = False
            return self._runs

    def _pack_one(self) -> bool:
        """Compress a file. False: there is none, or no time. Raises OSError, HelperGone."""
        packing = None if self._closed.is_set() else self._file.pack(self._keep)
        if packing is None:
            return False
        whole = False
        try:
            whole = self._compress(*packing)
        finally:
            try:
                with suppress(HelperGone):
                    self._file.packed(whole)
            finally:
                for fd in packing:  # until then no other file can be taken for the old one
                    os.close(fd)
        return whole

    def _compress(self, source: int, target: int) -> bool:
        packed = zlib.compressobj(LEVEL, zlib.DEFLATED, _GZIP)
        while data := os.read(source, CHUNK_BYTES):
            if self._closed.is_set():
                return False
            _write_all(target, packed.compress(data))
        _write_all(target, packed.flush())
        os.fsync(target)  # before the only other copy goes
        return True


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
