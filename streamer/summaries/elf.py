"""Functions of an ELF file, out of its symbol tables.

The file is whatever somebody runs. So what it says of itself is checked before it is followed,
sizes are bounded, and nothing is mapped: a file can be made shorter while it is read.

Sources: the ELF specification (elf(5)); build ids are notes of type NT_GNU_BUILD_ID.
"""

from __future__ import annotations

import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

MOST_SYMBOLS_BYTES = 16 << 20
MOST_STRINGS_BYTES = 32 << 20
MOST_SECTIONS = 4096
MOST_SEGMENTS = 256
MOST_NOTES_BYTES = 1 << 16
MOST_NAME = 200
"""Bytes of a name: C++ has them of any length."""
MOST_BUILD_ID = 32
MOST_ALIASES = 16
"""Names of one address that are looked at."""

_RUN = 1 << 14  # symbols that are sorted at a time, during which no other thread runs

_LOAD, _NOTE = 1, 4
_SYMTAB, _DYNSYM = 2, 11
_FUNCTIONS = (2, 10)  # STT_FUNC, STT_GNU_IFUNC
_GNU_BUILD_ID = 3


class NotElfError(ValueError):
    """A file that is no ELF file, or not one that can be read here."""


class _Class(NamedTuple):
    """How 32-bit and 64-bit files differ."""

    header: struct.Struct
    segment: struct.Struct
    section: struct.Struct
    symbol: struct.Struct


_CLASSES = {
    1: _Class(*map(struct.Struct, ("<16xHHIIIIIHHHHHH", "<8I", "<10I", "<IIIBBH"))),
    2: _Class(*map(struct.Struct, ("<16xHHIQQQIHHHHHH", "<IIQQQQQQ", "<IIQQQQIIQQ", "<IBBHQQ"))),
}


class _Segment(NamedTuple):
    kind: int
    offset: int
    address: int
    size: int


class _Section(NamedTuple):
    kind: int
    offset: int
    size: int
    link: int


class _Run(NamedTuple):
    """Functions in order of their addresses."""

    starts: array[int]
    sizes: array[int]
    names: array[int]


class Functions:
    """The functions of a file, and its build id."""

    def __init__(self, fd: int) -> None:
        """Read the file behind `fd`, which stays open.

        Raises:
            NotElfError: it is none.
            OSError: it cannot be read.
        """
        start = _read(fd, 0, 64)
        if start[:4] != b"\x7fELF" or len(start) < 6 or start[4] not in _CLASSES or start[5] != 1:
            raise NotElfError("no little-endian ELF file")
        self._fd = fd
        self._bits = start[4]
        self._class = _CLASSES[self._bits]
        try:
            header = self._class.header.unpack_from(start)
        except struct.error:
            raise NotElfError("it ends within its header") from None
        self._segments = self._read_segments(header)
        self.build_id = self._read_build_id()
        self._strings = b""
        self._runs: list[_Run] = []
        self._read_functions(header)

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return 1024 + len(self._strings) + sum(20 * len(run.starts) for run in self._runs)

    def name_at(self, offset: int) -> str | None:
        """The function whose code is at that offset within the file; None if none is known."""
        address = self._address_of(offset)
        if address is None:
            return None
        names = (name for run in self._runs for name in self._names_in(run, address))
        found = islice(names, MOST_ALIASES)
        # Of several names the plain one: `read`, and not `__GI___libc_read`.
        best = min(found, key=lambda name: (name.startswith(b"_"), len(name), name), default=b"")
        return best.decode("utf-8", "replace") or None

    def _address_of(self, offset: int) -> int | None:
        for one in self._segments:
            if one.kind == _LOAD and one.offset <= offset < one.offset + one.size:
                return offset - one.offset + one.address
        return None

    def _names_in(self, run: _Run, address: int) -> Iterator[bytes]:
        last = bisect_right(run.starts, address) - 1
        for i in range(last, max(last - MOST_ALIASES, -1), -1):
            start = run.starts[i]
            # A function in assembler may have no size.
            if address < start + run.sizes[i] or (not run.sizes[i] and start == run.starts[last]):
                yield self._name(run.names[i])

    def _name(self, at: int) -> bytes:
        end = self._strings.find(b"\0", at, at + MOST_NAME)
        return self._strings[at : at + MOST_NAME if end < 0 else end]

    # ------------------------------------------------------------ reading

    def _read_segments(self, header: tuple[int, ...]) -> list[_Segment]:
        offset, size, count = header[4], header[8], header[9]
        found = []
        for values in self._entries(self._class.segment, offset, size, min(count, MOST_SEGMENTS)):
            if self._bits == 1:
                kind, at, address, _, in_file, *_ = values
            else:
                kind, _, at, address, _, in_file, *_ = values
            found.append(_Segment(kind, at, address, in_file))
        return found

    def _read_sections(self, header: tuple[int, ...]) -> list[_Section]:
        offset, size, count = header[5], header[10], header[11]
        entries = self._entries(self._class.section, offset, size, min(count, MOST_SECTIONS))
        return [_Section(one[1], one[4], one[5], one[6]) for one in entries]

    def _entries(
        self, layout: struct.Struct, offset: int, size: int, count: int
    ) -> Iterator[tuple[int, ...]]:
        if size != layout.size:
            return
        data = _read(self._fd, offset, size * count)
        yield from layout.iter_unpack(data[: len(data) - len(data) % size])

    def _read_build_id(self) -> str:
        for one in self._segments:
            if one.kind == _NOTE:
                found = _build_id_in(_read(self._fd, one.offset, min(one.size, MOST_NOTES_BYTES)))
                if found:
                    return found
        return ""

    def _read_functions(self, header: tuple[int, ...]) -> None:
        sections = self._read_sections(header)
        for kind in (_SYMTAB, _DYNSYM):
            # A file has one of each. Of thousands each would cost as much as the limits allow.
            one = next((one for one in sections if one.kind == kind), None)
            if one is not None and one.link < len(sections):
                self._read_table(one, sections[one.link])
                if self._runs:
                    return

    def _read_table(self, table: _Section, strings: _Section) -> None:
        layout = self._class.symbol
        data = _read(self._fd, table.offset, min(table.size, MOST_SYMBOLS_BYTES))
        self._strings = _read(self._fd, strings.offset, min(strings.size, MOST_STRINGS_BYTES))
        step = _RUN * layout.size
        for at in range(0, len(data), step):
            part = data[at : at + step]
            run = _run_of(self._functions_in(part[: len(part) - len(part) % layout.size]))
            if run.starts:
                self._runs.append(run)

    def _functions_in(self, data: bytes) -> Iterator[tuple[int, int, int]]:
        most = len(self._strings)
        for values in self._class.symbol.iter_unpack(data):
            if self._bits == 1:
                name, address, size, info, _, section = values
            else:
                name, info, _, section, address, size = values
            if info & 0xF in _FUNCTIONS and section and address and name < most:
                yield address, size, name


def _run_of(functions: Iterator[tuple[int, int, int]]) -> _Run:
    found = sorted(functions)
    return _Run(
        array("Q", [one[0] for one in found]),
        array("Q", [one[1] for one in found]),
        array("I", [one[2] for one in found]),
    )


def _build_id_in(notes: bytes) -> str:
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        name_at = at + 12
        data_at = name_at + (name_size + 3 & ~3)
        if kind == _GNU_BUILD_ID and notes[name_at : name_at + 4] == b"GNU\0":
            return notes[data_at : data_at + min(size, MOST_BUILD_ID)].hex()
        at = data_at + (size + 3 & ~3)
    return ""


def _read(fd: int, offset: int, size: int) -> bytes:
    """As much as there is of it."""
    parts = []
    while size > 0:
        try:
            part = os.pread(fd, size, offset)
        except OverflowError:  # an offset that no file has
            break
        if not part:
            break
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return b"".join(parts)
