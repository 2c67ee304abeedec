"""Names for addresses in processes, out of the files that they have mapped.

A build id is what a file says of itself, so a file is known by what the kernel says of it, device,
inode, size and time of change: nobody can have another's functions named after his own.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import NamedTuple, Protocol

from streamer.errors import StreamerError
from streamer.kernel.processes import Located, Module
from streamer.kernel.waiting import BoundedCalls
from streamer.summaries.elf import Functions, NotElfError

MOST_CACHED_BYTES = 64 << 20
MOST_KNOWN = 8192
"""Mappings of which the file is remembered."""
KNOWN_SECONDS = 60.0
"""How long: the number of a file that was removed can become another's."""
PERIOD_SECONDS = 3.0
PROCESS_SECONDS = 1.0
"""For looking things up in one period, in all processes and in each. Not CPU time of our own: a
process can have so much mapped that the helper is busy with it, or make it wait."""
MOST_PROCESSES = 512
"""Processes that are looked into in one period."""
SILENT_SECONDS = 600.0
"""How long a process is not looked into again that let us wait in vain."""
MOST_SILENT = 1024
READ_SECONDS = 3.0
"""How long to wait for a file: its file system can be above another one, which does not answer."""
MOST_STUCK = 16
"""Files that are waited for in vain. Then none is read, until some of those are there after all."""

_ADDRESSES = 2048  # of one request

UNKNOWN, ANONYMOUS = "[unknown]", "[anon]"

FileId = tuple[int, int, int, int]
"""Device, inode, size in bytes, and time of change in ns."""


class Process(NamedTuple):
    """A program that runs in a process, as samples tell it: see `struct profile_key`."""

    pid: int
    start_boot_ns: int
    image: int


class Kernel(Protocol):
    """What is asked of a `KernelState`."""

    def locate(self, pid: int, start: int, image: int, addresses: Sequence[int]) -> Located:
        """Where code of a process is."""

    def open_module(self, pid: int, start: int, image: int, first: int, last: int) -> int:
        """A descriptor of a mapped file."""


class Named(NamedTuple):
    """The frame of each address, and the build ids of the files in them, by name."""

    frames: Mapping[int, str]
    build_ids: Mapping[str, str]


NOTHING = Named({}, {})


class Read(NamedTuple):
    """Which file it is, and what is known of it if it is a new one."""

    identity: FileId
    functions: Functions | None


def read_file(fd: int, known: Collection[FileId]) -> Read:
    """What file that is, and its functions, if it is not a known one.

    Raises:
        OSError: it does not say what it is.
    """
    status = os.fstat(fd)
    identity = status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns
    functions = None
    if identity not in known:
        with suppress(OSError, NotElfError):
            functions = Functions(fd)
    return Read(identity, functions)


class Symbols:
    """Names addresses. What was read of files is kept, up to a size."""

    def __init__(self, kernel: Kernel, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` says the time in seconds."""
        self._kernel = kernel
        self._clock = clock
        self._files: OrderedDict[FileId, Functions | None] = OrderedDict()
        self._known: OrderedDict[tuple[int, ...], tuple[FileId, float]] = OrderedDict()
        self._left_seconds = PERIOD_SECONDS
        self._left_processes = MOST_PROCESSES
        self._silent: OrderedDict[Process, float] = OrderedDict()
        self._reads = BoundedCalls(READ_SECONDS, MOST_STUCK)
        self._deadline = 0.0
        self._until = float("inf")

    def hurry(self, seconds: float) -> None:
        """The end is near: look up no more than can be had in so many seconds from now."""
        self._until = self._clock() + seconds

    @property
    def hurried(self) -> bool:
        """Whether there is no time left at all."""
        return self._clock() >= self._until

    def begin(self) -> None:
        """A period begins: there is time again."""
        self._left_seconds = PERIOD_SECONDS
        self._left_processes = MOST_PROCESSES

    def name(self, process: Process, addresses: Iterable[int]) -> Named:
        """The frames of addresses in a process, as far as it is there, and there is time."""
        if self._left_processes <= 0 or self._is_silent(process):
            return NOTHING
        self._left_processes -= 1
        frames: dict[int, str] = {}
        build_ids: dict[str, str] = {}
        wanted, begun = iter(addresses), self._clock()
        self._deadline = begun + min(self._left_seconds, PROCESS_SECONDS)
        while self._in_time() and (part := list(islice(wanted, _ADDRESSES))):
            try:
                located = self._kernel.locate(*process, part)
            except TimeoutError:
                self._be_silent(process)
                break
            except (OSError, StreamerError):
                break
            files = [self._functions_of(process, module) for module in located.modules]
            for module, functions in zip(located.modules, files, strict=True):
                if functions is not None and functions.build_id:
                    build_ids[module.name] = functions.build_id
            for address, (index, offset) in zip(part, located.places, strict=True):
                if index >= 0:
                    frames[address] = frame_of(located.modules[index], files[index], offset)
        self._left_seconds -= self._clock() - begun
        return Named(frames, build_ids)

    def _is_silent(self, process: Process) -> bool:
        return self._clock() < self._silent.get(process, 0.0)

    def _be_silent(self, process: Process) -> None:
        self._silent.pop(process, None)
        self._silent[process] = self._clock() + SILENT_SECONDS
        while len(self._silent) > MOST_SILENT:
            self._silent.popitem(last=False)

    def _in_time(self) -> bool:
        return self._clock() < min(self._deadline, self._until)

    def _functions_of(self, process: Process, module: Module) -> Functions | None:
        """What is known of a mapped file; None if it cannot be read in time."""
        if not module.inode:
            return None
        here = (*process, module.first, module.last)
        for key in (here, (module.device, module.inode)):
            found = self._known.get(key)
            if found is not None and found[0] in self._files and self._clock() < found[1]:
                self._files.move_to_end(found[0])
                return self._files[found[0]]
        if not self._in_time():
            return None
        known = frozenset(self._files)
        try:
            read = self._reads.call(lambda: self._read(process, module, known))
        except TimeoutError:
            self._be_silent(process)
            return None
        except (OSError, StreamerError):
            return None
        return self._keep(read, here, module)

    def _read(self, process: Process, module: Module, known: Collection[FileId]) -> Read:
        fd = self._kernel.open_module(*process, module.first, module.last)
        try:
            return read_file(fd, known)
        finally:
            os.close(fd)

    def _keep(self, read: Read, here: tuple[int, ...], module: Module) -> Functions | None:
        identity = read.identity
        self._files.setdefault(identity, read.functions)
        # Overlays and btrfs show devices in mappings that stat() does not have.
        same = identity[:2] == (module.device, module.inode)
        self._remember((module.device, module.inode) if same else here, identity)
        self._files.move_to_end(identity)
        functions = self._files[identity]
        self._forget()
        return functions

    def _remember(self, key: tuple[int, ...], identity: FileId) -> None:
        self._known.pop(key, None)
        self._known[key] = identity, self._clock() + KNOWN_SECONDS
        while len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)

    def _forget(self) -> None:
        """The files that were not needed for longest, as far as they are too large."""
        size = sum(one.size if one is not None else 1024 for one in self._files.values())
        while size > MOST_CACHED_BYTES and len(self._files) > 1:
            _, gone = self._files.popitem(last=False)
            size -= gone.size if gone is not None else 1024


def frame_of(module: Module, functions: Functions | None, offset: int) -> str:
    """FILE`FUNCTION, FILE`+OFFSET of the file, or the name of what is mapped there."""
    if not module.inode:
        return module.name or ANONYMOUS
    name = functions.name_at(offset) if functions is not None else None
    return f"{module.name}`{name or f'+{offset:#x}'}"
