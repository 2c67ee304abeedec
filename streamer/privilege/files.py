"""The files that the configuration names, and opening them: by oneself, or through the helper."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

READ_MOST = 16 << 20
"""Bytes of a certificate or secret: more is a mistake."""

_COMMON = os.O_CLOEXEC | os.O_NOCTTY
# O_NONBLOCK only for the open: a FIFO without a reader is refused instead of waited for.
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOFOLLOW | _COMMON
_READ = os.O_RDONLY | os.O_NONBLOCK | _COMMON
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


class Opener(Protocol):
    """Opens files that the configuration names. Descriptors are the caller's, and block."""

    def open(self, path: str) -> int:
        """A descriptor to read `path`. Raises OSError."""

    def append(self, path: str, bits: int) -> Appendable:
        """`path` for appending, made with exactly the mode `bits` if not there. Raises OSError."""


class DirectOpener:
    """Opens with the rights of this process."""

    def open(self, path: str) -> int:
        """See `Opener`."""
        own = own_descriptor(path)
        return open_read(path) if own is None else os.dup(own)

    def append(self, path: str, bits: int) -> Appendable:
        """See `Opener`."""
        own = own_descriptor(path)
        if own is not None:
            return Appendable(os.dup(own), False)
        target = AppendTarget(path)
        try:
            return target.open(bits)
        finally:
            target.close()


DIRECT = DirectOpener()


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


class AppendTarget:
    """A file to append to, by the directory that holds it.

    Symbolic links are followed when this is made, and never again: who can write to the
    directory, or to one on the way, cannot have another file opened later.
    """

    def __init__(self, path: str) -> None:
        """Raises OSError if there is no such directory."""
        head, self._name = os.path.split(os.path.realpath(path))
        self._directory = os.open(head, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def open(self, bits: int) -> Appendable:
        """Open it, making it with exactly the mode `bits` if it is not there. Raises OSError."""
        try:
            fd = os.open(self._name, _APPEND | os.O_CREAT | os.O_EXCL, bits, dir_fd=self._directory)
        except FileExistsError:
            fd = os.open(self._name, _APPEND, dir_fd=self._directory)
        else:
            os.fchmod(fd, bits)  # the umask does not change what the settings say
        os.set_blocking(fd, True)
        return Appendable(fd, _is_torn(fd))

    def rotate(self, keep: int) -> None:
        """Rename it to NAME.1, and the older NAME.1 to NAME.2, until NAME.keep. Raises OSError."""
        names = [self._name, *(f"{self._name}.{number}" for number in range(1, keep + 1))]
        for old, new in reversed(list(pairwise(names))):
            # Without older ones there is nothing to move away.
            with suppress(FileNotFoundError):
                os.rename(old, new, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def close(self) -> None:
        """Let go of the directory."""
        os.close(self._directory)


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
