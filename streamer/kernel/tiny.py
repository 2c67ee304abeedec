"""Programs of a few instructions, to find out by them what a kernel takes."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

NAME = "streamer_try"
"""What such programs are called in the kernel, some with a number behind."""

_ELF, _HEAD_BYTES = b"\x7fELF\x02\x01\x01", 64

EXIT = struct.pack("<BBhi", 0x95, 0, 0, 0)
_STACK, _RESULT = 10, 0  # registers


def set_register(register: int, value: int) -> bytes:
    """An instruction: `register` is `value`."""
    return struct.pack("<BBhi", 0xB7, register, 0, value)


def call(helper: int) -> bytes:
    """An instruction: call a helper, by its number."""
    return struct.pack("<BBhi", 0x85, 0, 0, helper)


def returning(value: int) -> bytes:
    """A program that only returns."""
    return set_register(_RESULT, value) + EXIT


def calling(helper: int, value: int) -> bytes:
    """A program that calls a helper with nothing but what it is given itself, and returns."""
    return call(helper) + returning(value)


def reading_memory(current_task: int, read: int) -> bytes:
    """A program that returns what a helper returns that reads kernel memory: 0, or an error.

    `current_task` and `read` are the numbers of bpf_get_current_task and bpf_probe_read_kernel.
    """
    return b"".join(
        (
            call(current_task),
            struct.pack("<BBhi", 0xBF, 3 | _RESULT << 4, 0, 0),  # r3 = r0
            set_register(2, 8),
            struct.pack("<BBhi", 0xBF, 1 | _STACK << 4, 0, 0),  # r1 = r10
            struct.pack("<BBhi", 0x07, 1, 0, -8),  # r1 += -8
            call(read),
            EXIT,
        )
    )


def neutral(section: str) -> int:
    """What a program at that section returns for nothing to change."""
    kind = section.partition("/")[0]
    if kind == "xdp":
        return 2  # XDP_PASS
    if kind in ("tc", "tcx", "classifier"):
        return -1  # TC_ACT_UNSPEC: as the next one says
    return 1 if kind.startswith("cgroup") else 0


class Tiny(NamedTuple):
    """A program, by its name in the kernel, which has at most 15 characters, and its section."""

    name: str
    section: str
    code: bytes


def object_of(programs: Sequence[Tiny]) -> bytes:
    """A BPF object with these programs, each in a section of its own."""
    words = [".strtab", ".symtab", "license"]
    words += [one.section for one in programs] + [one.name for one in programs]
    strings, places = _string_table(dict.fromkeys(words))
    # The entry of number 0 that every table has, and the functions: global, in sections from 4 on.
    symbols = bytes(24) + b"".join(
        struct.pack("<IBBHQQ", places[one.name], 1 << 4 | 2, 0, number, 0, len(one.code))
        for number, one in enumerate(programs, 4)
    )
    sections = [
        _Section(".strtab", 3, 0, 0, 0, 1, 0, strings),
        _Section(".symtab", 2, 0, 1, 1, 8, 24, symbols),
        _Section("license", 1, 3, 0, 0, 1, 0, b"GPL\0"),
        *(_Section(one.section, 1, 6, 0, 0, 8, 0, one.code) for one in programs),
    ]
    return _elf(sections, places)


class _Section(NamedTuple):
    name: str
    type: int
    flags: int
    link: int
    info: int
    align: int
    entry: int
    content: bytes


def _string_table(words: Iterable[str]) -> tuple[bytes, dict[str, int]]:
    """The table, and where each word is in it."""
    table, places = b"\0", {}
    for word in words:
        places[word] = len(table)
        table += word.encode() + b"\0"
    return table, places


def _elf(sections: Sequence[_Section], places: Mapping[str, int]) -> bytes:
    body, table = b"", bytes(64)
    for one in sections:
        at = _HEAD_BYTES + len(body)
        words = places[one.name], one.type, one.flags, 0, at, len(one.content)
        table += struct.pack("<IIQQQQIIQQ", *words, one.link, one.info, one.align, one.entry)
        body += one.content + bytes(-len(one.content) % 8)
    # Relocatable, for BPF; the table of sections is at the end, and the first of them names them.
    start, count = _HEAD_BYTES + len(body), 1 + len(sections)
    head = struct.pack(
        "<16sHHIQQQIHHHHHH", _ELF, 1, 247, 1, 0, 0, start, 0, _HEAD_BYTES, 0, 0, 64, count, 1
    )
    return head + body + table
