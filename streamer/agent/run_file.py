"""A note that each run leaves for the next one: how it ended, and which losses it could not tell.

The file is opened with the rights of root, and read and written by the worker, which has none. It
is locked for as long as the agent runs: of two agents at a time only the first leaves a note.

It has room for two notes. The older one is overwritten, so that a disk that is full, or a machine
that loses its power, costs no more than the newest.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import zlib
from collections import Counter

import msgspec

from streamer.events.stream import PreviousRun, UntoldLoss

SLOT_BYTES = 256 << 10
MOST_UNTOLD = 256
"""Losses in a note, before those of the oldest runs are added up."""

MOST_UNTOLD_BYTES = 64 << 10
"""Of them in JSON, if it can be had by leaving out ranges: they have to fit into a message."""

EARLIER = "several, of this run and runs before it"

_log = logging.getLogger("streamer")


class _Slot(msgspec.Struct):
    number: int
    note: PreviousRun


class RunFile:
    """The note, in an open and locked file."""

    def __init__(self, fd: int) -> None:
        """Take over `fd`."""
        self._fd = fd
        self._number = 0

    @classmethod
    def open(cls, path: str) -> RunFile | None:
        """The file at `path`, made with its directory if need be.

        None, and a line in the log, if it cannot be had: events are worth more than the note.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = -1
        try:
            os.makedirs(os.path.dirname(path) or ".", 0o755, exist_ok=True)
            fd = os.open(path, flags, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            reason = what_is_wrong(os.fstat(fd), os.stat(os.path.dirname(path) or "."))
        except OSError as error:
            held = error.errno == errno.EWOULDBLOCK
            reason = "another agent on this host has it" if held else str(error.strerror)
        if not reason:
            return cls(fd)
        if fd >= 0:
            os.close(fd)
        _log.warning("no note can be left for the next run: %s: %s", path, reason)
        return None

    def read(self) -> PreviousRun | None:
        """The note of the run before; None without one, or with one that makes no sense."""
        try:
            os.lseek(self._fd, 0, os.SEEK_SET)
            data = os.read(self._fd, 2 * SLOT_BYTES)
        except OSError as error:
            _log.warning("the note of the run before cannot be read: %s", error.strerror)
            return None
        found = newest(data)
        if found is None:
            if data:
                _log.warning("the note of the run before cannot be read: it makes no sense")
            return None
        self._number = found.number
        return found.note

    def write(self, note: PreviousRun) -> None:
        """Leave a note in place of the older one. That it cannot be written is logged."""
        number = self._number + 1
        data = msgspec.json.encode(_Slot(number, note))
        line = b"%08x %b\n" % (zlib.crc32(data), data)
        try:
            if len(line) > SLOT_BYTES:
                raise OSError(errno.EFBIG, "it is too long")
            os.lseek(self._fd, number % 2 * SLOT_BYTES, os.SEEK_SET)
            if os.write(self._fd, line) < len(line):
                raise OSError(errno.ENOSPC, "it was written in part")
            os.fsync(self._fd)
        except OSError as error:
            _log.warning("no note can be left for the next run: %s", error.strerror)
        else:
            self._number = number

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)


def what_is_wrong(file: os.stat_result, directory: os.stat_result) -> str:
    """Why somebody else could have written the note, or be hurt by it; empty if nothing."""
    own = os.geteuid()
    if not stat.S_ISREG(file.st_mode) or file.st_nlink != 1:
        return "it is no file of its own"
    if file.st_uid != own or file.st_mode & 0o077:
        return "others own it, or may read or write it"
    if directory.st_uid not in (0, own) or directory.st_mode & 0o022:
        return "others may write to its directory"
    return ""


def newest(data: bytes) -> _Slot | None:
    """The newest of the notes in a file that is whole."""
    slots = filter(None, (_decoded(data[at : at + SLOT_BYTES]) for at in (0, SLOT_BYTES)))
    return max(slots, key=lambda slot: slot.number, default=None)


def _decoded(data: bytes) -> _Slot | None:
    checksum, _, text = data.partition(b"\n")[0].partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        slot = msgspec.json.decode(text, type=_Slot)
        msgspec.msgpack.encode(slot)  # what cannot be published is no note
    except (msgspec.MsgspecError, UnicodeDecodeError, OverflowError, RecursionError):
        return None
    return slot


def bounded(untold: list[UntoldLoss], most: int = MOST_UNTOLD) -> list[UntoldLoss]:
    """The same losses in at most `most` entries, and two for each sink and stage.

    A sink that is away for many runs in a row is told the oldest as a sum. Where all takes too much
    room, the kinds of ranges are left out, of the oldest first, and then the ranges. What counts
    nothing, such as that a run was killed, says something of its run alone: it is left out last,
    and never added to a count.
    """
    counted = [i for i, one in enumerate(untold) if one.count]
    others = [i for i, one in enumerate(untold) if not one.count]
    summed = {*[*counted, *others][: max(len(untold) - most, 0)]}
    sums: dict[tuple[str, str, bool], UntoldLoss] = {}
    for i in sorted(summed):
        one = untold[i]
        place = one.sink, one.stage, one.count > 0
        sums[place] = _added(sums.get(place), one)
    return _short_enough(
        [*sums.values(), *(one for i, one in enumerate(untold) if i not in summed)]
    )


def _added(sum_of: UntoldLoss | None, one: UntoldLoss) -> UntoldLoss:
    count, kinds = (sum_of.count, sum_of.kinds) if sum_of is not None else (0, {})
    return UntoldLoss(
        run_id=one.run_id,
        sink=one.sink,
        stage=one.stage,
        count=count + one.count,
        kinds=dict(Counter(kinds) + Counter(one.kinds)),
        reason=EARLIER,
        ranges=[],
    )


def _short_enough(untold: list[UntoldLoss]) -> list[UntoldLoss]:
    for shortened in (_without_kinds, _without_ranges):
        over = sum(map(_size, untold)) - MOST_UNTOLD_BYTES
        short: list[UntoldLoss] = []
        for one in untold:
            less = shortened(one) if over > 0 else one
            over -= _size(one) - _size(less)
            short.append(less)
        untold = short
    return untold


def _size(one: UntoldLoss) -> int:
    return len(msgspec.json.encode(one))


def _without_kinds(one: UntoldLoss) -> UntoldLoss:
    ranges = [msgspec.structs.replace(each, kinds={}) for each in one.ranges]
    return msgspec.structs.replace(one, ranges=ranges)


def _without_ranges(one: UntoldLoss) -> UntoldLoss:
    return msgspec.structs.replace(one, ranges=[])
