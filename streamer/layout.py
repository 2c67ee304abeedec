"""The vocabulary of the layout table in `events.py`, which tells a decoder how to read a record.

A record begins with the header; `HEADER_FIELDS` are the parts of it that the reader itself
needs. What is published is a tuple of fields in the order of the Struct, each with an `op`:

=================  =====================  ===================================================
op                 argument               value
=================  =====================  ===================================================
u8 u16 u32 u64     None                   int, unsigned little-endian at `offset`
s32 s64            None                   int, signed
ns                 None                   int, u64 that seldom repeats (not worth a cache)
bool               None                   u8, true unless 0
cstr               length in bytes        str up to the first NUL
ip                 offset of the version  str; version 4: the first 4 bytes, 6: all 16, else ""
names              tuple of str           str at that index (u8); the first, if out of range
str                None                   str from `data`; u16 length in bytes at `offset`
argv               None                   list of str from `data`; NUL-terminated strings
line               None                   str: the record's argv joined by single spaces
const              name                   the decoder's constant of that name
id                 None                   str: "{id_prefix}-{cpu}-{seq}"
time               None                   int: the header's boot_ns plus the clock offset
boottime           None                   int: u64 at `offset` plus the clock offset
flag               mask                   bool: whether the u8 at `offset` has that bit
invalid_utf8       None                   bool: whether any string of the record was replaced
=================  =====================  ===================================================

Strings of `data` follow one another from `RecordLayout.size` on, in the order of the ops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

HEADER_FIELDS: dict[str, int] = {
    "boot_ns": 8,
    "seq": 8,
    "size": 4,
    "kind": 2,
    "cpu": 2,
    "skipped": 2,
    "flags": 1,
}
"""Header fields that the reader needs, with the width in bytes that it relies on."""


class FieldLayout(NamedTuple):
    """How one published field is read; see the table above."""

    name: str
    op: str
    offset: int
    argument: Any


class RecordLayout(NamedTuple):
    """How the records of one kind are read. `size` is the fixed part, in bytes."""

    kind: str
    struct: type
    size: int
    fields: tuple[FieldLayout, ...]


class FieldInfo(NamedTuple):
    """A published field as documented: its name, its type in words and its meaning."""

    name: str
    type: str
    doc: str


class KindInfo(NamedTuple):
    """A kind of event as documented. `programs` are the BPF programs that can produce it."""

    kind: str
    struct: type
    stream: str
    doc: str
    fields: tuple[FieldInfo, ...]
    programs: tuple[str, ...] = ()


class ProgramInfo(NamedTuple):
    """A BPF program, the kinds that it reports, and what is not observed without it.

    `covers` is empty where the kinds are not observed at all without the program.
    """

    name: str
    kinds: tuple[str, ...]
    covers: str
