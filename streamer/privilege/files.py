"""The files that the configuration names, and opening them: by oneself, or through the helper."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from threading import RLock
from typing import Literal, NamedTuple, Protocol

READ_MOST = 16 << 20
"""Bytes of a certificate or secret: more is a mistake."""
MOST_KEPT = 100
"""The most older files that rotation keeps."""
PACKED = ".gz"
"""How the name of a compressed file ends."""
UNFINISHED = f"{PACKED}.part"
"""How the name of one that is not whole yet ends."""

_COMMON = os.O_CLOEXEC | os.O_NOCTTY
# O_NONBLOCK only for the open: a FIFO without a reader is refused instead of waited for.
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOFOLLOW | _COMMON
_READ = os.O_RDONLY | os.O_NONBLOCK | _COMMON
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OWN = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")
_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}


class NamedFile(NamedTuple):
    """A file that may be opened: to read, or to append with `bits` as the mode of a new one."""

    path: str
    use: Literal["read", "append"]
    bits: int = 0


class Appendable(NamedTuple):
    """A file opened for appending. `torn`: it is a regular one that ends within a line."""

    fd: int
    torn: bool


class Packing(NamedTuple):
    """Descriptors for compressing an older file: read all of `source`, write to `target`."""

    source: int
    target: int


class AppendFile(Protocol):
    """A file to append to, and its numbered siblings. Descriptors are the caller's, and block.

    Every method raises OSError, or HelperGone where a helper does the work.
    """

    def open(self) -> Appendable:
        """Open what has the name, making it with the mode of the settings if it is not there."""

    def current(self) -> bool:
        """Whether the name still stands for what was opened last."""

    def rotate(self, keep: int) -> Appendable:
        """Rename it to NAME.1, NAME.1 to NAME.2 and so on until NAME.keep; open a new one.

        What others have renamed or removed already is not renamed again.
        """

    def pack(self, keep: int) -> Packing | None:
        """The oldest sibling that is to be compressed, and where to. None: there is none."""

    def packed(self, whole: bool) -> None:
        """What `pack` gave is compressed: it is replaced if that is `whole`, else it stays."""

    def close(self) -> None:
        """Let go of what is held to do all this."""


class Opener(Protocol):
    """Opens files that the configuration names. Descriptors are the caller's, and block."""

    def open(self, path: str) -> int:
        """A descriptor to read `path`. Raises OSError."""

    def append(self, path: str, bits: int) -> AppendFile:
        """A file to append to, made with exactly the mode `bits`. Raises OSError."""


class DirectOpener:
    """Opens with the rights of this process."""

    def open(self, path: str) -> int:
        """See `Opener`."""
        own = own_descriptor(path)
        return open_read(path) if own is None else os.dup(own)

    def append(self, path: str, bits: int) -> AppendFile:
        """See `Opener`."""
        own = own_descriptor(path)
        return AppendTarget(path, bits) if own is None else OwnDescriptor(own)


DIRECT = DirectOpener()


class OwnDescriptor:
    """What stands for a file that is a descriptor of this process already: it has no siblings."""

    def __init__(self, fd: int) -> None:
        """`fd` stays its owner's."""
        self._fd = fd

    def open(self) -> Appendable:
        """See `AppendFile`."""
        return Appendable(os.dup(self._fd), False)

    def current(self) -> bool:
        """See `AppendFile`."""
        return True

    def rotate(self, keep: int) -> Appendable:
        """See `AppendFile`."""
        raise OSError(errno.EINVAL, "only a file that has a name can be rotated")

    def pack(self, keep: int) -> Packing | None:
        """See `AppendFile`."""
        return None

    def packed(self, whole: bool) -> None:
        """See `AppendFile`."""

    def close(self) -> None:
        """See `AppendFile`."""


def own_descriptor(path: str) -> int | None:
    """The descriptor of this process that `path` stands for, such as 63 for /dev/fd/63."""
    match = _OWN.fullmatch(path)
    return int(match[1]) if match else _STANDARD.get(path)


def open_read(path: str) -> int:
    """A descriptor to read `path`.

    Raises:
        OSError: it cannot be opened.
    """
    fd = os.open(path, _READ)
    os.set_blocking(fd, True)
    return fd


def regular(fd: int) -> int:
    """The descriptor, if it is a regular file's; otherwise it is closed.

    Raises:
        OSError: it is not.
    """
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "not a regular file")


def read_all(fd: int) -> bytes:
    """What is left to read of a small file; closes the descriptor.

    Raises:
        OSError: it cannot be read, or is larger than READ_MOST.
    """
    data = b""
    try:
        while part := os.read(fd, 1 << 16):
            data += part
            if len(data) > READ_MOST:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    finally:
        os.close(fd)
    return data


@contextmanager
def in_memory(data: bytes) -> Iterator[str]:
    """A path under which this process finds `data`, and no other does, while the context lasts.

    For libraries that take nothing but paths.
    """
    fd = os.memfd_create("streamer", os.MFD_CLOEXEC)
    with open(fd, "wb", buffering=0) as file:
        while data:
            data = data[file.write(data) :]
        yield f"/proc/self/fd/{fd}"


Identity = tuple[int, int]
"""Device and inode."""


class AppendTarget:
    """A file to append to, by the directory that holds it. See `AppendFile`.

    Symbolic links are followed when this is made, and never again: who can write to the
    directory, or to one on the way, cannot have another file opened later. Siblings are named by
    this class alone, and every name is one in that directory.
    """

    def __init__(self, path: str, bits: int) -> None:
        """`bits` is the mode of a new file. Raises OSError if there is no such directory."""
        self._place, self._name = os.path.split(os.path.realpath(path))
        self._bits = bits
        self._directory = os.open(self._place, _DIRECTORY)
        self._opened: Identity | None = None
        self._owner = os.geteuid()
        # What was opened here last: its content is known.
        self._own: deque[Identity] = deque(maxlen=MOST_KEPT + 1)
        self._packing: Identity | None = None
        # One thread writes and another compresses, where no helper does one after the other.
        self._lock = RLock()

    def open(self) -> Appendable:
        """See `AppendFile`."""
        with self._lock:
            self._look_for_directory()
            try:
                fd = self._make(self._name)
            except FileExistsError:
                fd = self._open_theirs()
            with _closed_on_error(fd):
                os.set_blocking(fd, True)
                self._opened = identity(os.fstat(fd))
                self._own.append(self._opened)
                return Appendable(fd, _is_torn(fd))

    def current(self) -> bool:
        """See `AppendFile`."""
        with self._lock:
            self._look_for_directory()
            return self._opened is not None and self._identity_of(self._name) == self._opened

    def rotate(self, keep: int) -> Appendable:
        """See `AppendFile`."""
        with self._lock:
            if self.current():
                self._shift(keep)
            return self.open()

    def pack(self, keep: int) -> Packing | None:
        """See `AppendFile`."""
        with self._lock:
            for number in range(keep, 0, -1):
                source = self._to_pack(f"{self._name}.{number}")
                if source is not None:
                    try:
                        return Packing(source, self._make_anew(self._unfinished))
                    except BaseException:
                        os.close(source)
                        raise
            return None

    def packed(self, whole: bool) -> None:
        """See `AppendFile`."""
        with self._lock:
            packing, self._packing = self._packing, None
            names = (f"{self._name}.{number}" for number in range(1, MOST_KEPT + 1))
            name = next(
                (one for one in names if packing and self._identity_of(one) == packing), None
            )
            if not whole or name is None:  # it may have been the oldest, which goes
                self._remove(self._unfinished)
                return
            self._rename(self._unfinished, name + PACKED)
            self._remove(name)

    def close(self) -> None:
        """Let go of the directory."""
        os.close(self._directory)

    def _open_theirs(self) -> int:
        """What somebody else has made of that name. Raises OSError.

        The first time it is whatever the configuration names. Later it may have been put there
        by who is to read no events, or to have them written to another's file.
        """
        fd = os.open(self._name, _APPEND, dir_fd=self._directory)
        with _closed_on_error(fd):
            status = os.fstat(fd)
            if self._opened is None:
                self._owner = status.st_uid
                return fd
            linked = stat.S_ISREG(status.st_mode) and status.st_nlink > 1
            if linked or status.st_uid not in (self._owner, 0):
                raise PermissionError(errno.EPERM, "others may have put a file there")
            return fd

    @property
    def _unfinished(self) -> str:
        return f"{self._name}{UNFINISHED}"

    def _shift(self, keep: int) -> None:
        names = [self._name, *(f"{self._name}.{number}" for number in range(1, keep + 1))]
        for old, new in reversed(list(pairwise(names))):
            for end in ("", PACKED) if old != self._name else ("",):
                # Of each number there is one or the other; the one that is not moves nothing.
                with suppress(FileNotFoundError):
                    self._rename(old + end, new + end)
                    if new == names[-1]:
                        self._remove(new + ("" if end else PACKED))

    def _to_pack(self, name: str) -> int | None:
        """A descriptor to read a sibling, if it is a file of ours to compress."""
        try:
            fd = os.open(name, _READ | os.O_NOFOLLOW, dir_fd=self._directory)
        except OSError:  # most of all: there is none
            return None
        with _closed_on_error(fd):
            status = os.fstat(fd)
            ours = identity(status) in self._own or self._is_guarded()
            # What was opened last is written to, also under another name.
            done = identity(status) != self._opened
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and ours and done:
                self._packing = identity(status)
                os.set_blocking(fd, True)
                return fd
        os.close(fd)
        return None

    def _is_guarded(self) -> bool:
        """Whether nobody but root and this user can have put a file of others' there."""
        status = os.fstat(self._directory)
        return status.st_uid in (0, os.geteuid()) and not status.st_mode & _OTHERS_WRITE

    def _make_anew(self, name: str) -> int:
        self._remove(name)
        fd = self._make(name)
        with _closed_on_error(fd):
            os.set_blocking(fd, True)
            return fd

    def _make(self, name: str) -> int:
        fd = os.open(name, _APPEND | os.O_CREAT | os.O_EXCL, self._bits, dir_fd=self._directory)
        with _closed_on_error(fd):
            os.fchmod(fd, self._bits)  # the umask does not change what the settings say
            return fd

    def _rename(self, old: str, new: str) -> None:
        os.rename(old, new, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._directory)

    def _identity_of(self, name: str) -> Identity | None:
        try:
            return identity(os.stat(name, dir_fd=self._directory, follow_symlinks=False))
        except FileNotFoundError:
            return None

    def _look_for_directory(self) -> None:
        """Hold the directory that has the name now, if it can be one that was made in its place.

        It has to belong to the same user and be open to no more writers, and no symbolic link
        leads to it: then whoever made it could have changed the old one, too.
        """
        try:
            found = _walk(self._place)
        except OSError:
            return  # what is held is all there is, and says so itself if it is gone
        old, new = os.fstat(self._directory), os.fstat(found)
        alike = old.st_uid == new.st_uid and not new.st_mode & ~old.st_mode & _OTHERS_WRITE
        if identity(old) != identity(new) and alike:
            found, self._directory = self._directory, found
        os.close(found)


@contextmanager
def _closed_on_error(fd: int) -> Iterator[None]:
    """Close the descriptor if it cannot be handed on after all."""
    try:
        yield
    except BaseException:
        os.close(fd)
        raise


def _walk(path: str) -> int:
    """The directory at an absolute path on which there is no symbolic link. Raises OSError."""
    fd = os.open("/", _DIRECTORY)
    for name in filter(None, path.split("/")):
        try:
            step = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
        finally:
            os.close(fd)
        fd = step
    return fd


def identity(status: os.stat_result) -> Identity:
    """What tells a file from every other, whatever its names."""
    return status.st_dev, status.st_ino


def _is_torn(fd: int) -> bool:
    """Whether a regular file ends within a line, as a crash or a full disk may leave it."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        return False
    try:
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False  # it may not be read: nothing is known, and nothing is added
    try:
        return os.pread(again, 1, status.st_size - 1) != b"\n"
    finally:
        os.close(again)
