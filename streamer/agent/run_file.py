"""A note that each run leaves for the next one: how it ended, and which losses it could not tell.

The file is opened with the rights of root, and read and written by the worker, which has none. It
is locked for as long as the agent runs: of two agents at a time only the first leaves a note.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections import Counter

import msgspec

from streamer.events.stream import PreviousRun, UntoldLoss

MOST_BYTES = 1 << 20
"""A note is smaller; what is not was not written by this agent."""

EARLIER = "several, of this run and runs before it"

MOST_UNTOLD = 256
"""Losses in a note, before those of the oldest runs are added up."""

_log = logging.getLogger("streamer")


def bounded(untold: list[UntoldLoss], most: int = MOST_UNTOLD) -> list[UntoldLoss]:
    """The same losses in at most `most` entries, and one for each sink and stage.

    A sink that is away for many runs in a row is told the oldest as a sum.
    """
    if len(untold) <= most:
        return untold
    sums: dict[tuple[str, str], UntoldLoss] = {}
    for one in untold[:-most]:
        found = sums.get((one.sink, one.stage))
        count, kinds = (found.count, found.kinds) if found is not None else (0, {})
        sums[one.sink, one.stage] = UntoldLoss(
            run_id=one.run_id,
            sink=one.sink,
            stage=one.stage,
            count=count + one.count,
            kinds=dict(Counter(kinds) + Counter(one.kinds)),
            reason=EARLIER,
            ranges=[],
        )
    return [*sums.values(), *untold[-most:]]


class RunFile:
    """The note, in an open and locked file."""

    def __init__(self, fd: int) -> None:
        """Take over `fd`."""
        self._fd = fd

    @classmethod
    def open(cls, path: str) -> RunFile | None:
        """The file at `path`, made with its directory if need be.

        None, and a line in the log, if it cannot be had: events are worth more than the note.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            os.makedirs(os.path.dirname(path) or ".", 0o755, exist_ok=True)
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            _log.warning("no note can be left for the next run: %s: %s", path, error.strerror)
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            held = error.errno == errno.EWOULDBLOCK
            reason = "another agent on this host has it" if held else error.strerror
            _log.warning("no note can be left for the next run: %s: %s", path, reason)
            return None
        return cls(fd)

    def read(self) -> PreviousRun | None:
        """The note of the run before; None without one, or with one that makes no sense."""
        try:
            os.lseek(self._fd, 0, os.SEEK_SET)
            data = os.read(self._fd, MOST_BYTES)
            return msgspec.json.decode(data, type=PreviousRun) if data else None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            _log.warning("the note of the run before cannot be read: %s", error)
            return None

    def write(self, note: PreviousRun) -> None:
        """Replace the note. A disk that is full costs the note, and is logged."""
        data = msgspec.json.encode(note)
        try:
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
            written = os.write(self._fd, data)
            os.fsync(self._fd)
        except OSError as error:
            _log.warning("no note can be left for the next run: %s", error.strerror)
        else:
            if written < len(data):
                _log.warning("no note can be left for the next run: it was written in part")

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)
