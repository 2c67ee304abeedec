"""Finds addresses of the kernel in what is published: who knows one knows where all of it is."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from typing import Any

# From where on addresses are the kernel's, on x86-64 with four or five levels of page tables and on
# arm64 with 48 bits or more; as text, what no hash or inode of ours can be taken for.
FIRST = 0xFF00_0000_0000_0000
LAST = 0xFFFF_FFFF_FFFF_0000
"""Above are small negative numbers, such as errors."""
_TEXT = re.compile(r"(?<![0-9a-fA-F])(?:0x)?ff[0-9a-fA-F]{14}(?![0-9a-fA-F])")


def is_address(number: int) -> bool:
    return FIRST <= number % (1 << 64) < LAST


def in_value(value: Any, path: str = "") -> Iterator[str]:
    """Where in plain data there are any: numbers, and text in hexadecimal."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from in_value(key, path)
            yield from in_value(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from in_value(inner, path)
    elif isinstance(value, str):
        yield from (f"{path}: {found}" for found in in_text(value))
    elif isinstance(value, int) and not isinstance(value, bool) and is_address(value):
        yield f"{path}: {value:#x}"


def in_text(text: str) -> list[str]:
    return [found for found in _TEXT.findall(text) if is_address(int(found, 16))]


def in_lines(lines: bytes, run: str) -> list[str]:
    """The same in JSON, a value a line, but for the run's id: it may begin like an address."""
    rest = lines.replace(run.encode(), b"")
    return [found for line in rest.splitlines() for found in in_value(json.loads(line))]


def in_record(record: bytes) -> list[int]:
    """Words of a raw record: also where nothing of it is published.

    Not a 0 before a -1, which is two fields; nothing of the kernel's is at such a place.
    """
    usable = len(record) // 8 * 8
    return [
        word
        for (word,) in struct.iter_unpack("<Q", record[:usable])
        if is_address(word) and word % (1 << 32)
    ]
