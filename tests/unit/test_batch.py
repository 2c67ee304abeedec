"""What an event's JSON may hold: nothing that a terminal or an editor acts upon."""

from __future__ import annotations

import json
import unicodedata

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamer.events.batch import Batch, inert


class Exec(msgspec.Struct, tag_field="event", tag="process.exec"):
    cmdline: str


ACTIVE = [
    chr(code)
    for code in range(0x110000)
    if unicodedata.category(chr(code)) == "Cc"
    or unicodedata.bidirectional(chr(code)) in ("LRE", "RLE", "LRO", "RLO", "PDF")
    or unicodedata.bidirectional(chr(code)) in ("LRI", "RLI", "FSI", "PDI")
    or code in (0x200E, 0x200F, 0x061C, 0x2028, 0x2029)
]
"""Control characters, and all that has to do with direction or ends a line."""


def test_everything_active_is_escaped_and_means_the_same() -> None:
    """C0, DEL, C1, overrides and isolates of direction, their marks, separators of lines."""
    assert len(ACTIVE) == 65 + 9 + 5
    batch = Batch([Exec(f"a{char}\\{char}b") for char in ACTIVE])
    lines = batch.lines("json")
    assert lines.isascii()
    assert b"\x7f" not in lines
    assert [json.loads(line)["cmdline"] for line in lines.splitlines()] == [
        event.cmdline for event in batch.events
    ]
    assert b"".join(record + b"\n" for record in batch.records("json")) == lines


@pytest.mark.parametrize(
    "text", ["straße", "日本語", "20 °C", "a \u2013 b …", "a\xa0b", "é\u200b", "🎉"]
)
def test_everything_else_stays_as_it_is(text: str) -> None:
    assert text.encode() in Batch([Exec(text)]).lines("json")


@given(st.text())
@example("\u0080\u009f\u009b\u00a0")
@example("\x7f\\\x7f")
def test_any_text_comes_back(text: str) -> None:
    line = Batch([Exec(text)]).lines("json")
    assert msgspec.json.decode(line, type=Exec).cmdline == text
    assert inert(line) == line
    assert not set(ACTIVE) & set(line.decode().rstrip("\n"))


def test_messagepack_is_left_alone() -> None:
    """Nobody reads it without a program that decodes it first."""
    assert "\u202e".encode() in Batch([Exec("\u202e")]).lines("msgpack")
