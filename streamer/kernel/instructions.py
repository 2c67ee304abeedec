"""Reads which helpers the functions of a compiled object call.

Format: https://docs.kernel.org/bpf/standardization/instruction-set.html, and ELF's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

_SYMTAB, _REL = 2, 9  # types of sections
_EXECUTABLE = 0x4
_FUNCTION = 2  # type of a symbol
_BYTES = 8  # of an instruction
_CALL, _LOAD_ADDRESS = 0x85, 0x18
_TO_HELPER, _TO_FUNCTION = 0, 1  # what a call's source register says of it

_Place = tuple[int, int]  # a function: number of its section, and offset


class _Section(NamedTuple):
    name: int
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry: int


class _Symbol(NamedTuple):
    name: int
    info: int
    other: int
    section: int
    value: int
    size: int


class Calls:
    """The functions of a compiled object, and what they call."""

    def __init__(self, data: bytes) -> None:
        """Parse an ELF file. Raises struct.error or IndexError for what is none."""
        self._data = data
        (table,) = struct.unpack_from("<Q", data, 40)
        _, count, _ = struct.unpack_from("<HHH", data, 58)
        self._sections = [
            _Section(*struct.unpack_from("<IIQQQQIIQQ", data, table + i * 64)) for i in range(count)
        ]
        symbols = next(one for one in self._sections if one.type == _SYMTAB)
        self._names = self._sections[symbols.link].offset
        self._symbols = [
            _Symbol(*struct.unpack_from("<IBBHQQ", data, symbols.offset + at))
            for at in range(0, symbols.size, 24)
        ]
        self._targets = dict(self._relocations())

    def _relocations(self) -> Iterator[tuple[_Place, _Symbol]]:
        for section in self._sections:
            if section.type == _REL:
                for at in range(section.offset, section.offset + section.size, 16):
                    place, what = struct.unpack_from("<QQ", self._data, at)
                    yield (section.info, place), self._symbols[what >> 32]

    @cached_property
    def _functions(self) -> dict[_Place, _Symbol]:
        return {
            (one.section, one.value): one for one in self._symbols if one.info & 0xF == _FUNCTION
        }

    def helpers(self) -> dict[str, frozenset[int]]:
        """The numbers of the helpers that each function calls, itself or by others."""
        return {
            self._name(symbol): frozenset(self._helpers_from(place))
            for place, symbol in self._functions.items()
        }

    def _name(self, symbol: _Symbol) -> str:
        start = self._names + symbol.name
        return self._data[start : self._data.index(b"\0", start)].decode()

    def _helpers_from(self, start: _Place) -> Iterator[int]:
        seen, left = {start}, [start]
        while left:
            for helper, function in self._calls_of(left.pop()):
                if function is None:
                    yield helper
                elif function in self._functions and function not in seen:
                    seen.add(function)
                    left.append(function)

    def _calls_of(self, function: _Place) -> Iterator[tuple[int, _Place | None]]:
        """Number of a helper and None, or 0 and a function, for each call."""
        section, start = function
        base = self._sections[section].offset
        for at in range(start, start + self._functions[function].size, _BYTES):
            code, registers, _, number = struct.unpack_from("<BBhi", self._data, base + at)
            source, symbol = registers >> 4, self._targets.get((section, at))
            if code == _CALL and source == _TO_HELPER:
                yield number, None
            elif code == _CALL and source == _TO_FUNCTION:
                there = (symbol.section, symbol.value) if symbol else (section, at)
                yield 0, (there[0], there[1] + (number + 1) * _BYTES)
            elif code == _LOAD_ADDRESS and symbol and self._is_code(symbol.section):
                yield 0, (symbol.section, symbol.value + number)  # one that a helper calls back

    def _is_code(self, section: int) -> bool:
        return section < len(self._sections) and bool(self._sections[section].flags & _EXECUTABLE)
