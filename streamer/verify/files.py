"""Records in files: NDJSON or MessagePack, also compressed with gzip, and standard input.

A file that the agent has rotated is read with those before it: `PATH.2.gz`, `PATH.1`, `PATH`.
"""

from __future__ import annotations

import asyncio
import os
import re
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import IO, Any, NamedTuple

import msgspec
from isal import igzip

from streamer.errors import ConfigError
from streamer.verify.records import Chunk, Line, is_json, split_msgpack
from streamer.verify.start import Start

CHUNK_BYTES = 1 << 18
LOOK_SECONDS = 0.2
"""How often it is looked for more, when a file is followed."""

STDIN = "-"
_ROTATED = re.compile(r"\.(\d{1,3})(\.gz)?")
_GZIP = b"\x1f\x8b"
_MOST_LINE = 16 << 20
"""Bytes of what is no line, before it is given up: it has no end."""


class Opened(NamedTuple):
    """A file that is open, and its name."""

    name: str
    file: IO[bytes]


def with_rotated(path: str) -> list[str]:
    """A file, and those that it has become when it was full, the newest first."""
    directory, name = os.path.split(path)
    found: dict[int, str] = {}
    try:
        names = sorted(os.listdir(directory or "."), reverse=True)
    except OSError:
        names = []
    for other in names:
        match = _ROTATED.fullmatch(other.removeprefix(name)) if other.startswith(name) else None
        if match:  # in this order, the one that is not compressed wins, where both are there yet
            found[int(match[1])] = os.path.join(directory, other)
    return [path, *(found[number] for number in sorted(found))]


def open_files(paths: Iterable[str]) -> list[Opened]:
    """All files, opened, the oldest first. One that two names stand for is opened once.

    Raises:
        ConfigError: one cannot be opened.
    """
    groups: list[list[Opened]] = []
    known: set[tuple[int, int]] = set()
    for path in paths:
        group = []
        # The newest first: one that is rotated meanwhile is met again, and not missed.
        for name in [path] if path == STDIN else with_rotated(path):
            try:
                fd = os.dup(0) if name == STDIN else os.open(name, os.O_RDONLY | os.O_CLOEXEC)
                file = os.fdopen(fd, "rb", buffering=0)
                status = os.fstat(file.fileno())
            except OSError as error:
                if name != path:
                    continue  # it was rotated away
                raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None
            if (status.st_dev, status.st_ino) in known:
                file.close()
                continue
            known.add((status.st_dev, status.st_ino))
            group.append(Opened(name, file))
        groups.append(group[::-1])
    return [one for group in groups for one in group]


async def read_files(
    opened: Iterable[Opened], start: Start, *, follow: bool = False
) -> AsyncIterator[Chunk]:
    """Their records. The last one is followed, if asked to.

    Raises:
        ConfigError: one cannot be read.
    """
    files = list(opened)
    for i, one in enumerate(files):
        goes_on = follow and i == len(files) - 1
        async for chunk in _read(one, start, follow=goes_on):
            yield chunk


async def _read(one: Opened, start: Start, *, follow: bool) -> AsyncIterator[Chunk]:
    rest, at = b"", 0
    json = True  # as its first byte says
    waiting = start.time_ns
    try:
        for data in _pieces(one.file, start, follow=follow):
            if not data:
                await asyncio.sleep(LOOK_SECONDS)
                continue
            json = json if at else is_json(data)
            records, rest = _whole(rest + data, json=json)
            where = f"{one.name}, byte {at}"
            at += len(data)
            if waiting is not None:
                records, waiting = _from(records, waiting)
            if records:
                yield Chunk("files", records, where)
            await asyncio.sleep(0)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{one.name}: cannot be read: {reason}") from None
    finally:
        one.file.close()
    if rest.strip():  # a line without an end, or torn
        yield Chunk("files", [rest], f"{one.name}, its end")


def _pieces(file: IO[bytes], start: Start, *, follow: bool) -> Iterator[bytes]:
    head = file.read(CHUNK_BYTES) or b""
    if head.startswith(_GZIP):
        yield from _unpacked(file, head, start)
        return
    if start.end or start.offset:
        file.seek(0, os.SEEK_END)
        if start.offset is not None:
            file.seek(max(start.offset - 1, 0))
        head = b""
        if not start.end:
            head = (file.read(CHUNK_BYTES) or b"").partition(b"\n")[2]
    if head:
        yield head
    while (data := file.read(CHUNK_BYTES)) or follow:
        yield data or b""


def _unpacked(file: IO[bytes], head: bytes, start: Start) -> Iterator[bytes]:
    """What is in a compressed file. From an offset or the end on, nothing: it is older."""
    if start.end or start.offset:
        return
    file.seek(0)
    opened: Any = igzip.open
    with opened(file, "rb") as packed:
        while data := packed.read(CHUNK_BYTES):
            yield data


def _whole(data: bytes, *, json: bool) -> tuple[bytes | list[bytes], bytes]:
    """The records that are whole, and the rest."""
    if json:
        end = data.rfind(b"\n") + 1
        if not end and len(data) > _MOST_LINE:
            return [data], b""
        return data[:end], data[end:]
    found, end = split_msgpack(data)
    if not end and len(data) > _MOST_LINE:
        return [data], b""
    return found, data[end:]


def _from(records: bytes | list[bytes], time_ns: int) -> tuple[bytes | list[bytes], int | None]:
    """The records from the first of that time on; None beside them, once it was met."""
    values = records.splitlines() if isinstance(records, bytes) else records
    for i, value in enumerate(values):
        codec = msgspec.json if is_json(value) else msgspec.msgpack
        try:
            line = codec.decode(value, type=Line)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            continue
        if line.time_ns >= time_ns:
            return values[i:], None
    return [], time_ns
