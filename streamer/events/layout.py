"""The vocabulary of the layout table in `kinds.py`, which tells a decoder how to read a record.

A record begins with its base; `HEADER_FIELDS` are the parts of it that the reader itself
needs. What is published is a tuple of fields in the order of the Struct, each with an `op`:

=================  =====================  ===================================================
op                 argument               value
=================  =====================  ===================================================
u8 u16 u32 u64     None                   int, unsigned little-endian at `offset`
s32 s64            None                   int, signed
ns                 None                   int, u64: a duration in nanoseconds
moment             None                   int, u64: nanoseconds since boot, of what happened
start              None                   int, u64: the same of a process's start, part of who it is
serial             None                   int, u64 that seldom repeats (not worth a cache)
bool               None                   u8, true unless 0
cstr               length in bytes        str up to the first NUL
counts             how many               tuple of int: so many u32 from `offset` on
ip                 offset of the version  str; version 4: the first 4 bytes, 6: all 16, else ""
names              tuple of str           str at that index (u8); the first, if out of range
str                None                   str from `data`; u16 length in bytes at `offset`
argv               None                   list of str from `data`; NUL-terminated strings
line               None                   str: the record's argv joined by single spaces, as far as
                                          its first `MAX_LINE` bytes go
parsed             function               first part of what the function makes of bytes from `data`
                                          (u16 length in bytes at `offset`): see `parsed.py`
part               index                  another part of that
const              name                   the decoder's constant of that name
id                 None                   str: "{id_prefix}-{cpu}-{seq}"
time               None                   int: the base's boot_ns plus the clock offset
boottime           None                   int: u64 at `offset`, a start, plus the clock offset
rfc3339            None                   str: what `time` is, in UTC with nine digits
cut                names of the strings   tuple of str: those whose bit the u8 at `offset` has, then
                                          that of a `line` that is made of a part of its argv
flag               mask                   bool: whether the u8 at `offset` has that bit
invalid_utf8       None                   bool: whether any string of the record was replaced
=================  =====================  ===================================================

`timing.py` makes durations, moments and starts coarse where that is configured.

Strings of `data` (`str`, `argv` and `parsed`) follow one another from `RecordLayout.size` on, in
the order of the ops; there are at most `MAX_STRINGS`. Bit n of the base's `cut` says that the n-th
is not whole: what is left of a character at its end (of an argv: at the end of an argument without
NUL), or at the beginning of a `str`, is left off, and is not what `invalid_utf8` tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

HEADER_FIELDS: dict[str, int] = {
    "boot_ns": 8,
    "seq": 8,
    "size": 4,
    "kind": 2,
    "cpu": 2,
    "skipped": 1,
    "cut": 1,
}
"""Parts of the base that the reader needs, with the width in bytes that it relies on."""

MAX_STRINGS = 8
"""Strings of a record: the base's `cut` has a bit for each."""

MAX_LINE = 4096
"""Bytes of an argv that a line is made of: what is longer is in the argv alone."""


class FieldLayout(NamedTuple):
    """How one published field is read; see the table above."""

    name: str
    op: str
    offset: int
    argument: Any


class RecordLayout(NamedTuple):
    """How the records of one kind are read.

    `size` is the fixed part, and `max_size` what a record with the longest strings has, in bytes.
    """

    kind: str
    struct: type
    size: int
    max_size: int
    fields: tuple[FieldLayout, ...]


def with_time(records: Mapping[int, RecordLayout]) -> dict[int, RecordLayout]:
    """The layouts of `RECORDS` whose events say their time in words too (`rfc3339_time`)."""
    worded = FieldLayout("time", "rfc3339", 0, None)
    return {
        number: record._replace(
            fields=tuple(worded if field.name == "time" else field for field in record.fields)
        )
        for number, record in records.items()
    }


class FieldInfo(NamedTuple):
    """A published field as documented: its name, its type in words and its meaning."""

    name: str
    type: str
    doc: str


class KindInfo(NamedTuple):
    """A kind of event as documented.

    `ring` is what carries it; `unseen` is what is never observed of it, whatever the kernel.
    """

    kind: str
    struct: type
    ring: str
    doc: str
    fields: tuple[FieldInfo, ...]
    unseen: tuple[str, ...] = ()
