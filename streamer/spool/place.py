"""Where the spool is: a directory that nobody else can write to, and the files in it.

Opened while there are privileges. What a run left there may be damaged, or be the work of whoever
had taken it over: before it is used, a child looks at it that has given up all privileges.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from streamer.spool.store import APPLICATION_ID, PAGE_BYTES, SpoolError, Store

NAME = "spool.db"
LOG = f"{NAME}-wal"
BAD = ".bad"
"""How the names of files end that were put aside."""
CHECK_SECONDS = 120.0
"""As long as the child may take: it reads all of the spool."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_MAKE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_HEAD_BYTES = 100
_MAGIC = b"SQLite format 3\0"
_WAL = b"\x02\x02"

_GOOD, _SPOILED, _NOT_NOW = "good", "spoiled", "not-now"

_log = logging.getLogger("streamer")


class Place(NamedTuple):
    """An open spool. `lock` keeps other agents from it; `spoiled` says why an older one is not."""

    store: Store
    lock: int
    spoiled: str


def open_place(path: str, most_bytes: int, give_up: Callable[[], None]) -> Place:
    """The spool in the directory at `path`, which is made with mode 0700 if it is not there.

    `give_up` gives up all privileges, in a child. Raises SpoolError: there can be no spool.
    """
    directory = -1
    try:
        directory = _directory(path)
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if directory >= 0:
            os.close(directory)
        held = error.errno == errno.EWOULDBLOCK
        reason = "another agent on this host has it" if held else str(error.strerror)
        raise SpoolError(reason) from None
    try:
        database = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), NAME)
        spoiled = _put_aside_what_is_bad(directory, database, give_up)
        new = not _exists(directory, NAME)
        if new:  # SQLite gives the log the mode of the database
            os.close(os.open(NAME, _MAKE, 0o600, dir_fd=directory))
        store = Store(database, most_bytes, new=new)
    except OSError as error:
        os.close(directory)
        raise SpoolError(str(error.strerror)) from None
    except BaseException:
        os.close(directory)
        raise
    return Place(store, directory, spoiled)


def _directory(path: str) -> int:
    """A descriptor of the directory. Raises OSError, also where others may write to it."""
    parent, name = os.path.split(os.path.abspath(path))
    os.makedirs(parent, 0o755, exist_ok=True)
    above = os.open(parent, _DIRECTORY)
    try:
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=above)
        fd = os.open(name, _DIRECTORY, dir_fd=above)
        ours = _is_ours(os.fstat(above), 0o022) and _is_ours(os.fstat(fd), 0o077, own=True)
    finally:
        os.close(above)
    if not ours:
        os.close(fd)
        raise OSError(errno.EPERM, "others own it or its parent, or may read or write it")
    return fd


def _is_ours(status: os.stat_result, forbidden: int, *, own: bool = False) -> bool:
    owners = (os.geteuid(),) if own else (0, os.geteuid())
    return status.st_uid in owners and not status.st_mode & forbidden


def _put_aside_what_is_bad(directory: int, database: str, give_up: Callable[[], None]) -> str:
    """Rename files that are no spool; why, or empty."""
    # Of a journal that rolls something back we know nothing, and SQLite would follow it.
    for name in (f"{NAME}-journal", f"{NAME}-shm"):
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)
    if _is_empty(directory):  # as it is left where the first run had no time to begin one
        os.unlink(NAME, dir_fd=directory)
    if not _exists(directory, NAME):
        with suppress(FileNotFoundError):  # without its database a log says nothing
            os.unlink(LOG, dir_fd=directory)
        return ""
    reason = _what_is_wrong(directory) or _look_without_privileges(database, give_up)
    if reason:
        for name in (NAME, LOG):
            with suppress(FileNotFoundError):
                os.replace(name, name + BAD, src_dir_fd=directory, dst_dir_fd=directory)
        _log.warning("the spool cannot be read and was put aside, to %s%s: %s",
                     database, BAD, reason)  # fmt: skip
    return reason


def _what_is_wrong(directory: int) -> str:
    """What can be said of the files without looking at more than the header."""
    for name in (NAME, LOG):
        try:
            fd = os.open(name, _READ, dir_fd=directory)
        except FileNotFoundError:
            continue
        except OSError as error:
            return f"{name}: {error.strerror}"
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                return f"{name} is no file of its own"
            if status.st_uid != os.geteuid() or status.st_mode & 0o077:
                return f"{name}: others own it, or may read or write it"
            if name == NAME and not _is_head(os.pread(fd, _HEAD_BYTES, 0)):
                return "it is no database of this program's"
        finally:
            os.close(fd)
    return ""


def _is_head(head: bytes) -> bool:
    """Whether a database begins like that: https://sqlite.org/fileformat.html, section 1.3."""
    return (
        head[:16] == _MAGIC
        and head[16:18] == PAGE_BYTES.to_bytes(2, "big")
        and head[18:20] == _WAL
        and head[68:72] in (bytes(4), APPLICATION_ID.to_bytes(4, "big"))
    )


def _look_without_privileges(database: str, give_up: Callable[[], None]) -> str:
    """What is wrong with the tables, as a child finds it; empty: nothing.

    Raises SpoolError: nobody can say, because the files cannot be had.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:  # nothing of the parent's is run on the way out, and nothing is raised
        os.close(reader)
        _look(database, give_up, writer)
    os.close(writer)
    os.set_blocking(reader, False)
    deadline = time.monotonic() + CHECK_SECONDS
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            break
        time.sleep(0.002)
    try:
        said = os.read(reader, 400).decode(errors="replace")
    except BlockingIOError:
        said = ""
    finally:
        os.close(reader)
    verdict, _, reason = said.partition(" ")
    if verdict == _NOT_NOW:
        raise SpoolError(reason)
    return "" if verdict == _GOOD else reason or "looking at it took too long, or failed"


def _look(database: str, give_up: Callable[[], None], writer: int) -> None:
    said = _SPOILED
    try:
        store = Store(database, 1 << 40, new=False)
        give_up()
        store.check()
        said = _GOOD
    except SpoolError as error:
        said = f"{_SPOILED if error.lasting else _NOT_NOW} {error.reason}"
    except BaseException as error:
        said = f"{_SPOILED} looking at it failed: {type(error).__name__}"
    finally:
        os.write(writer, said.encode(errors="replace")[:400])
        os._exit(0)  # and not by closing the database, which would be written to


def _is_empty(directory: int) -> bool:
    try:
        status = os.stat(NAME, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == 0


def _exists(directory: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
