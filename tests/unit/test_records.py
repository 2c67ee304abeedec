"""The ring reader, compiled and in plain Python: every op, every refusal, every anomaly."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import mmap
import multiprocessing
import struct
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from streamer.events.clock import rfc3339
from streamer.events.layout import FieldLayout, RecordLayout
from streamer.ring import _records, records, records_py
from tests.unit.ring import (
    DATA_OFFSET,
    DISCARD,
    SimulatedRing,
    producer_bytes,
    ring_step,
)

# ------------------------------------------------------------------ a contract with every op

HEADER = {
    "boot_ns": 0,
    "seq": 8,
    "size": 16,
    "kind": 20,
    "cpu": 22,
    "skipped": 24,
    "cut": 25,
    "header_size": 32,
}
HEADER_FORMAT = struct.Struct("<QQIHHBBB5x")
CONSTANTS = {"host": "host-1", "schema": 1}
PREFIX = "boot-bulk"
SAMPLE, FORK = 7, 2


class Sample(msgspec.Struct, tag_field="event", tag="test.sample", gc=False):
    id: str
    host: str
    schema: int
    time_ns: int
    boot_ns: int
    cpu: int
    seq: int
    truncated: tuple[str, ...]
    incomplete: bool
    invalid_utf8: bool
    line: str
    a_u8: int
    a_u16: int
    a_u32: int
    a_u64: int
    a_s32: int
    a_s64: int
    a_ns: int
    a_bool: bool
    comm: str
    version: int
    address: str
    name: str
    started_ns: int
    time: str
    first: str
    argv: list[str]
    last: str


class Fork(msgspec.Struct, tag_field="event", tag="test.fork", gc=False, frozen=True, kw_only=True):
    seq: int
    child: int


NAMES = ("none", "one", "two")
STRINGS = ("first", "argv", "last")
SAMPLE_FIELDS = (
    FieldLayout("id", "id", 0, None),
    FieldLayout("host", "const", 0, "host"),
    FieldLayout("schema", "const", 0, "schema"),
    FieldLayout("time_ns", "time", 0, None),
    FieldLayout("boot_ns", "moment", 0, None),
    FieldLayout("cpu", "u16", 22, None),
    FieldLayout("seq", "serial", 8, None),
    FieldLayout("truncated", "cut", 25, (*STRINGS, "line")),
    FieldLayout("incomplete", "flag", 26, 4),
    FieldLayout("invalid_utf8", "invalid_utf8", 0, None),
    FieldLayout("line", "line", 0, None),
    FieldLayout("a_u8", "u8", 32, None),
    FieldLayout("a_u16", "u16", 34, None),
    FieldLayout("a_u32", "u32", 36, None),
    FieldLayout("a_u64", "u64", 40, None),
    FieldLayout("a_s32", "s32", 48, None),
    FieldLayout("a_s64", "s64", 56, None),
    FieldLayout("a_ns", "ns", 64, None),
    FieldLayout("a_bool", "bool", 33, None),
    FieldLayout("comm", "cstr", 72, 16),
    FieldLayout("version", "u8", 88, None),
    FieldLayout("address", "ip", 96, 88),
    FieldLayout("name", "names", 89, NAMES),
    FieldLayout("started_ns", "boottime", 112, None),
    FieldLayout("time", "rfc3339", 0, None),
    FieldLayout("first", "str", 90, None),
    FieldLayout("argv", "argv", 92, None),
    FieldLayout("last", "str", 94, None),
)
SAMPLE_SIZE = 120
SAMPLE_FORMAT = struct.Struct("<BBHIQi4xqQ16sBBHHH16sQ")
LAYOUTS = {
    SAMPLE: RecordLayout("test.sample", Sample, SAMPLE_SIZE, 1 << 18, SAMPLE_FIELDS),
    FORK: RecordLayout(
        "test.fork",
        Fork,
        36,
        36,
        (FieldLayout("seq", "serial", 8, None), FieldLayout("child", "u32", 32, None)),
    ),
}


def header(kind: int, size: int, *, seq: int = 1, cpu: int = 0, **other: int) -> bytes:
    """A record's base. `other`: boot_ns, skipped, cut, flags."""
    known = {"boot_ns": 0, "skipped": 0, "cut": 0, "flags": 0} | other
    marks = (known["skipped"], known["cut"], known["flags"])
    return HEADER_FORMAT.pack(known["boot_ns"], seq, size, kind, cpu, *marks)


def fork(seq: int = 1, cpu: int = 0, child: int = 77, **other: int) -> bytes:
    """A record of the small kind."""
    return header(FORK, 36, seq=seq, cpu=cpu, **other) + struct.pack("<I", child)


def sample(**given: Any) -> bytes:
    """A record of the large kind; what is not given is 0 or empty."""
    values: dict[str, Any] = {
        "a_u8": 0,
        "a_bool": 0,
        "a_u16": 0,
        "a_u32": 0,
        "a_u64": 0,
        "a_s32": 0,
        "a_s64": 0,
        "a_ns": 0,
        "comm": b"",
        "version": 0,
        "name": 0,
    }
    strings = [given.pop(key, b"") for key in ("first", "argv", "last")]
    tail = (*map(len, strings), given.pop("address", bytes(16)), given.pop("started", 0))
    for key in values:
        values[key] = given.pop(key, values[key])
    body = SAMPLE_FORMAT.pack(*values.values(), *tail) + b"".join(strings)
    size = given.pop("size", HEADER["header_size"] + len(body))
    return header(SAMPLE, size, **given) + body


Reader = ModuleType


@pytest.fixture(params=[_records, records_py], ids=["compiled", "python"])
def reader(request: pytest.FixtureRequest) -> Reader:
    """Each of the two readers."""
    module: Reader = request.param
    return module


@pytest.fixture
def decoder(reader: Reader) -> Any:
    return reader.Decoder(HEADER, LAYOUTS, CONSTANTS, PREFIX)


COUNTERS = ("unknown_kind", "short_record", "invalid_utf8", "truncated", "incomplete")


def counters(decoder: Any) -> dict[str, int]:
    return {name: getattr(decoder, name) for name in COUNTERS if getattr(decoder, name)}


def drained_by_cpu(decoder: Any) -> dict[int, dict[str, int]]:
    return {cpu: decoder.drained(cpu) for cpu in (0, 1, 7, 8, 65535)}


def test_the_compiled_reader_is_the_one_in_use() -> None:
    assert records.COMPILED
    assert records.Ring is _records.Ring


# ------------------------------------------------------------------ ops


def test_every_op_gives_its_exact_value(decoder: Any) -> None:
    decoder.clock_offset_ns = 1_000_000
    record = sample(
        seq=9,
        cpu=3,
        boot_ns=5,
        a_u8=200,
        a_bool=2,
        a_u16=65535,
        a_u32=4294967295,
        a_u64=(1 << 64) - 1,
        a_s32=-2,
        a_s64=-(1 << 63),
        a_ns=(1 << 64) - 2,
        comm=b"bash\0stale",
        version=4,
        name=2,
        started=7,
        address=bytes([10, 0, 0, 1]) + b"\xff" * 12,
        first=b"/usr/bin/\xc3\xa4",
        argv=b"ls\0-l\0\0/tmp\0",
        last=b"x" * 300,
    )
    assert decoder.decode(record) == Sample(
        id="boot-bulk-3-9",
        host="host-1",
        schema=1,
        time_ns=1_000_005,
        boot_ns=5,
        cpu=3,
        seq=9,
        truncated=(),
        incomplete=False,
        invalid_utf8=False,
        line="ls -l  /tmp",
        a_u8=200,
        a_u16=65535,
        a_u32=4294967295,
        a_u64=(1 << 64) - 1,
        a_s32=-2,
        a_s64=-(1 << 63),
        a_ns=(1 << 64) - 2,
        a_bool=True,
        comm="bash",
        version=4,
        address="10.0.0.1",
        name="two",
        started_ns=1_000_007,
        time="1970-01-01T00:00:00.001000005Z",
        first="/usr/bin/ä",
        argv=["ls", "-l", "", "/tmp"],
        last="x" * 300,
    )
    assert counters(decoder) == {}


TIMES = {
    0: "1970-01-01T00:00:00.000000000Z",
    999_999_999: "1970-01-01T00:00:00.999999999Z",
    1_000_000_000: "1970-01-01T00:00:01.000000000Z",
    951_782_399_000_000_001: "2000-02-28T23:59:59.000000001Z",
    951_868_800_123_456_789: "2000-03-01T00:00:00.123456789Z",
    1_795_366_046_847_217_390: "2026-11-22T16:47:26.847217390Z",  # beyond what a double holds
    (1 << 64) - 1: "2554-07-21T23:34:33.709551615Z",
}


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kathmandu"])
def test_times_in_words_are_exact(decoder: Any, zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all nine digits, in UTC whatever the host's zone, in any order."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        decoder.clock_offset_ns = 0
        for ns, text in [*TIMES.items(), *reversed(TIMES.items())]:
            event = decoder.decode(sample(boot_ns=ns))
            assert (event.time_ns, event.time, rfc3339(ns)) == (ns, text, text)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_zeros_and_empty_strings(decoder: Any) -> None:
    event = decoder.decode(sample())
    assert event.id == "boot-bulk-0-1"
    assert (event.first, event.argv, event.line, event.last, event.comm) == ("", [], "", "", "")
    assert (event.address, event.name, event.a_bool, event.a_s32) == ("", "none", False, 0)


@pytest.mark.parametrize("number", [0, 1, 255, 256, 257, (1 << 30) - 1, 1 << 30, (1 << 31) - 1])
def test_integers_come_back_whether_cached_or_not(decoder: Any, number: int) -> None:
    for _ in range(2):
        event = decoder.decode(
            sample(a_u32=number, a_s32=number, a_u64=number << 20, a_s64=-number)
        )
        assert (event.a_u32, event.a_s32) == (number, number)
        assert (event.a_u64, event.a_s64) == (number << 20, -number)
    assert decoder.decode(sample(a_s32=-1, a_u64=(1 << 64) - 1)).a_s32 == -1
    assert decoder.decode(sample(a_s32=-1, a_u64=(1 << 64) - 1)).a_u64 == (1 << 64) - 1


def test_many_different_values_do_not_mix_in_the_caches(decoder: Any) -> None:
    for _ in range(2):
        for i in range(20_000):
            path = b"/%d/%d" % (i * 7919, i)
            event = decoder.decode(sample(a_u32=i * 65537 % (1 << 32), first=path))
            assert event.a_u32 == i * 65537 % (1 << 32)
            assert event.first == path.decode()


def colliding_strings() -> tuple[bytes, bytes]:
    """Two ASCII strings of 16 bytes to which `hash_bytes` of the compiled reader gives one hash.

    After 8 bytes its state depends on them alone, and what a second word does to two states can
    be undone by choosing that word: it has to differ as the states do, and to stay ASCII.
    """
    golden, high_bits = 0x9E3779B97F4A7C15, 0x8080808080808080
    seen: dict[int, tuple[bytes, int]] = {}
    for number in range(1000):
        word = b"%08d" % number
        state = (16 ^ int.from_bytes(word, "little")) * golden % (1 << 64)
        state ^= state >> 32
        other, its_state = seen.setdefault(state & high_bits, (word, state))
        if other != word:
            return word + bytes(8), other + (state ^ its_state).to_bytes(8, "little")
    raise AssertionError("no collision")


def test_strings_of_the_same_hash_do_not_mix(decoder: Any) -> None:
    one, other = colliding_strings()
    for _ in range(2):
        event = decoder.decode(sample(first=one, last=other))
        assert (event.first, event.last) == (one.decode(), other.decode())


@pytest.mark.parametrize(
    ("version", "address", "text"),
    [
        (4, bytes([127, 0, 0, 1, *[9] * 12]), "127.0.0.1"),
        (4, bytes([255, 255, 255, 255, *[0] * 12]), "255.255.255.255"),
        (6, bytes(16), "::"),
        (6, bytes(15) + b"\1", "::1"),
        (6, bytes.fromhex("20010db8000000000000000000000001"), "2001:db8::1"),
        (6, bytes.fromhex("fe80000000000000020000fffe000001"), "fe80::200:ff:fe00:1"),
        (0, b"\1" * 16, ""),
        (5, b"\1" * 16, ""),
    ],
)
def test_addresses(decoder: Any, version: int, address: bytes, text: str) -> None:
    for _ in range(2):
        assert decoder.decode(sample(version=version, address=address)).address == text


def test_the_version_tells_addresses_of_the_same_bytes_apart(decoder: Any) -> None:
    address = bytes([1, 2, 3, 4]) + bytes(12)
    for _ in range(2):
        assert decoder.decode(sample(version=4, address=address)).address == "1.2.3.4"
        assert decoder.decode(sample(version=6, address=address)).address == "102:304::"


@pytest.mark.parametrize(
    ("index", "name"),
    [(0, "none"), (1, "one"), (2, "two"), (3, "none"), (4, "none"), (255, "none")],
)
def test_names_out_of_range_are_the_first(decoder: Any, index: int, name: str) -> None:
    assert decoder.decode(sample(name=index)).name == name


@pytest.mark.parametrize(
    ("raw", "argv"),
    [
        (b"", []),
        (b"\0", [""]),
        (b"a", ["a"]),
        (b"a\0", ["a"]),
        (b"a\0b", ["a", "b"]),
        (b"a\0\0", ["a", ""]),
        (b"\0\0a\0", ["", "", "a"]),
        (b"a b\0c\0", ["a b", "c"]),
        ("ä\0ö\0".encode(), ["ä", "ö"]),
    ],
)
def test_argv_and_its_line(decoder: Any, raw: bytes, argv: list[str]) -> None:
    event = decoder.decode(sample(first=b"before", argv=raw, last=b"after"))
    assert event.argv == argv
    assert event.line == " ".join(argv)
    assert (event.first, event.last) == ("before", "after")


@pytest.mark.parametrize("length", [0, 1, 3, 4, 7, 8, 9, 15, 16, 255, 256, 257, 4096, 65535])
def test_strings_of_every_length(decoder: Any, length: int) -> None:
    text = "".join(chr(33 + i % 90) for i in range(length))
    for _ in range(2):
        event = decoder.decode(sample(first=text.encode(), last=b"end"))
        assert (event.first, event.last) == (text, "end")


def test_a_nul_within_a_string_stays(decoder: Any) -> None:
    assert decoder.decode(sample(first=b"a\0b")).first == "a\0b"


@pytest.mark.parametrize("length", [1, 15, 16])
def test_a_name_may_fill_its_field(decoder: Any, length: int) -> None:
    assert decoder.decode(sample(comm=b"c" * length)).comm == "c" * length


@pytest.mark.parametrize(
    ("field", "raw", "text"),
    [
        ("first", b"/tmp/\xff.txt", "/tmp/\ufffd.txt"),
        ("last", b"\xc3", "\ufffd"),
        ("comm", b"caf\xc3\xa9 \xe2\x82", "café \ufffd"),
        ("first", b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),  # a surrogate
        ("first", b"x" * 5000 + b"\x80", "x" * 5000 + "\ufffd"),
    ],
)
def test_invalid_utf8_is_replaced_and_marked(
    decoder: Any, field: str, raw: bytes, text: str
) -> None:
    event = decoder.decode(sample(**{field: raw}))
    assert getattr(event, field) == text
    assert event.invalid_utf8 is True
    assert counters(decoder) == {"invalid_utf8": 1}
    assert decoder.decode(sample(**{field: b"fine"})).invalid_utf8 is False
    assert counters(decoder) == {"invalid_utf8": 1}


def test_an_event_with_several_invalid_strings_counts_once(decoder: Any) -> None:
    event = decoder.decode(sample(comm=b"\xff", first=b"\xff", argv=b"\xff\0ok\0\xfe\0"))
    assert event.argv == ["\ufffd", "ok", "\ufffd"]
    assert event.line == "\ufffd ok \ufffd"
    assert counters(decoder) == {"invalid_utf8": 1}


@pytest.mark.parametrize(
    ("flags", "incomplete"), [(0, False), (4, True), (255, True), (251, False)]
)
def test_a_flag_is_its_bit(decoder: Any, flags: int, incomplete: bool) -> None:
    event = decoder.decode(sample(flags=flags))
    assert event.incomplete is incomplete
    assert event.truncated == ()
    assert counters(decoder) == ({"incomplete": 1} if incomplete else {})


@pytest.mark.parametrize(
    ("cut", "names"),
    [
        (0, ()),
        (1, ("first",)),
        (2, ("argv",)),
        (4, ("last",)),
        (5, ("first", "last")),
        (7, ("first", "argv", "last")),
        (255, ("first", "argv", "last")),
        (248, ()),  # of strings that the record has not
    ],
)
def test_the_strings_that_were_cut_are_named(
    decoder: Any, cut: int, names: tuple[str, ...]
) -> None:
    event = decoder.decode(sample(cut=cut))
    assert (event.truncated, event.incomplete, event.invalid_utf8) == (names, False, False)
    assert counters(decoder) == ({"truncated": 1} if names else {})
    assert decoder.decode(sample(cut=cut)).truncated is event.truncated
    assert msgspec.to_builtins(event)["truncated"] == names


CHARACTER = "😀".encode()  # of four bytes
OF_THREE = "☃".encode()


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"/tmp/" + CHARACTER[:1], "/tmp/"),
        (b"/tmp/" + CHARACTER[:2], "/tmp/"),
        (b"/tmp/" + CHARACTER[:3], "/tmp/"),
        (b"/tmp/" + CHARACTER, "/tmp/😀"),
        (b"/tmp/" + OF_THREE[:2], "/tmp/"),
        (b"/tmp/\xc3", "/tmp/"),
        (CHARACTER[1:] + b"/end", "/end"),
        (CHARACTER[2:] + b"/end", "/end"),
        (CHARACTER[3:] + b"/end", "/end"),
        (OF_THREE[1:] + "ä/".encode() + CHARACTER[:3], "ä/"),
        (CHARACTER[1:], ""),
        (CHARACTER[:3], ""),
        (b"\xa4", ""),
        (b"\xc3", ""),
        (b"", ""),
        (b"plain", "plain"),
        (OF_THREE[1:] + b"x" * 5000 + CHARACTER[:3], "x" * 5000),
    ],
)
@pytest.mark.parametrize("field", ["first", "last"])
def test_what_a_cut_leaves_of_a_character_is_left_off(
    decoder: Any, field: str, raw: bytes, text: str
) -> None:
    cut = 1 << STRINGS.index(field)
    for _ in range(2):
        event = decoder.decode(sample(**{field: raw}, cut=cut))
        assert (getattr(event, field), event.invalid_utf8) == (text, False)
    assert counters(decoder) == {"truncated": 2}


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"\xff/end", "\ufffd/end"),  # no byte of UTF-8
        (b"/a\xff", "/a\ufffd"),
        (b"/a\xa4", "/a\ufffd"),  # continues nothing
        (b"\xc3/a", "\ufffd/a"),  # is not continued, though there is room
        (b"/\xc3/a\xe2\x98", "/\ufffd/a"),
        (b"\xa4\xa4\xa4\xa4/end", "\ufffd/end"),  # three continue a character, and no more
        (b"/a\xe0\x80", "/a\ufffd\ufffd"),  # longer than what it would stand for
        (b"/a\xc0", "/a\ufffd"),
    ],
)
def test_what_no_cut_can_leave_is_replaced(decoder: Any, raw: bytes, text: str) -> None:
    event = decoder.decode(sample(first=raw, cut=1))
    assert (event.first, event.invalid_utf8) == (text, True)
    assert counters(decoder) == {"truncated": 1, "invalid_utf8": 1}


@pytest.mark.parametrize("field", ["first", "last"])
def test_the_cut_of_one_string_excuses_no_other(decoder: Any, field: str) -> None:
    cut = 7 & ~(1 << STRINGS.index(field))
    for raw in (b"/a\xc3", b"\xa4/a"):
        event = decoder.decode(sample(**{field: raw}, cut=cut))
        assert "\ufffd" in getattr(event, field)
        assert event.invalid_utf8
    assert counters(decoder) == {"truncated": 2, "invalid_utf8": 2}


@pytest.mark.parametrize(
    ("raw", "argv", "invalid"),
    [
        (b"a\0b" + CHARACTER[:3], ["a", "b"], False),
        (b"a\0" + CHARACTER[:1], ["a", ""], False),
        (CHARACTER[:2], [""], False),
        ("ä\0".encode() + CHARACTER[:3], ["ä", ""], False),
        (b"a\0b\0", ["a", "b"], False),
        (b"", [], False),
        # Only the end of the last argument can have been cut, and not when its NUL is there.
        (CHARACTER[:3] + b"\0b", ["\ufffd", "b"], True),
        (b"a\0" + CHARACTER[:3] + b"\0", ["a", "\ufffd"], True),
        (CHARACTER[3:] + b"\0b", ["\ufffd", "b"], True),
        (b"a\0" + CHARACTER[3:], ["a", "\ufffd"], True),
    ],
)
def test_an_argv_that_was_cut(decoder: Any, raw: bytes, argv: list[str], invalid: bool) -> None:
    event = decoder.decode(sample(argv=raw, cut=2))
    assert (event.argv, event.line, event.invalid_utf8) == (argv, " ".join(argv), invalid)
    assert event.truncated == ("argv",)


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (b"a" * 4095 + b"\0", "a" * 4095),
        (b"a" * 4096, "a" * 4096),
        (b"a" * 4095 + b"\0b\0", "a" * 4095),
        (b"a" * 4094 + b"\0bcd\0", "a" * 4094 + " b"),
        (b"a\0" * 4000, "a " * 2047 + "a"),
        (b"a" * 4095 + "\u00fc".encode() + b"\0", "a" * 4095),
        ("\u00fc".encode() * 2047 + b"\0xyz\0", "\u00fc" * 2047 + " x"),
        (b"x\xff" + b"a" * 5000, "x\ufffd" + "a" * 4094),
    ],
)
def test_a_line_is_made_of_4096_bytes(decoder: Any, raw: bytes, line: str) -> None:
    """The rest is in the argv alone, and the event says so."""
    event = decoder.decode(sample(first=b"before", argv=raw, last=b"after"))
    assert event.line == line
    assert event.argv == raw.decode(errors="replace").removesuffix("\0").split("\0")
    assert event.truncated == (("line",) if len(raw) > 4096 else ())
    assert (event.first, event.last) == ("before", "after")
    assert counters(decoder).get("truncated", 0) == (len(raw) > 4096)


def test_a_name_in_a_fixed_field_is_never_taken_for_cut(decoder: Any) -> None:
    assert decoder.decode(sample(comm=b"a\xc3", cut=255)).invalid_utf8


def test_times_follow_the_clock_offset(decoder: Any) -> None:
    assert decoder.clock_offset_ns == 0
    for offset in (1_790_000_000_000_000_000, -4):
        decoder.clock_offset_ns = offset
        assert decoder.clock_offset_ns == offset
        event = decoder.decode(sample(boot_ns=10, started=20))
        assert (event.time_ns, event.started_ns) == (10 + offset, 20 + offset)


def test_times_stay_within_64_bits(decoder: Any) -> None:
    decoder.clock_offset_ns = 5
    event = decoder.decode(sample(boot_ns=(1 << 64) - 1))
    assert event.time_ns == 4
    msgspec.json.encode(event)


def test_the_clock_offset_is_an_s64(decoder: Any) -> None:
    for offset in (1 << 63, -(1 << 63) - 1):
        with pytest.raises(OverflowError):
            decoder.clock_offset_ns = offset
    with pytest.raises(TypeError):
        decoder.clock_offset_ns = "soon"
    assert decoder.clock_offset_ns == 0


def test_keyword_only_and_frozen_structs(decoder: Any) -> None:
    assert decoder.decode(fork(seq=4, child=8)) == Fork(seq=4, child=8)


def test_any_buffer_is_a_record(decoder: Any) -> None:
    record = fork()
    for buffer in (bytearray(record), memoryview(record)):
        assert decoder.decode(buffer) == Fork(seq=1, child=77)
    with pytest.raises(TypeError):
        decoder.decode("text")


# ------------------------------------------------------------------ refusals


def test_an_unknown_kind_is_refused(decoder: Any) -> None:
    for kind in (0, 6, 8, 65535):
        assert decoder.decode(header(kind, 32)) is None
    assert counters(decoder) == {"unknown_kind": 4}


@pytest.mark.parametrize("length", [0, 1, 31, 32, 119])
def test_a_record_shorter_than_its_kind_is_refused(decoder: Any, length: int) -> None:
    assert decoder.decode(sample(size=SAMPLE_SIZE)[:length]) is None
    assert counters(decoder) == {"short_record": 1}


def test_a_record_ends_where_its_header_says(decoder: Any) -> None:
    assert decoder.decode(sample(size=SAMPLE_SIZE) + bytes(50)) is not None
    assert decoder.decode(sample(size=SAMPLE_SIZE - 1) + bytes(50)) is None
    assert decoder.decode(sample(first=b"abc", size=SAMPLE_SIZE + 2)) is None
    assert counters(decoder) == {"short_record": 2}


def test_a_header_cannot_make_a_record_longer(decoder: Any) -> None:
    assert decoder.decode(sample(size=(1 << 32) - 1)) is not None
    assert decoder.decode(sample(first=b"abc", size=(1 << 32) - 1)[:-1]) is None
    assert counters(decoder) == {"short_record": 1}


@pytest.mark.parametrize("cut", [1, 5, 6, 12])
def test_strings_past_the_end_are_refused(decoder: Any, cut: int) -> None:
    record = sample(first=b"1234", argv=b"5\0", last=b"678901")
    assert decoder.decode(record[:-cut]) is None
    assert counters(decoder) == {"short_record": 1}


# ------------------------------------------------------------------ layouts that do not fit


def one_field(struct: Any, *fields: FieldLayout, size: int = 40) -> dict[int, RecordLayout]:
    return {1: RecordLayout("test.one", struct, size, size, fields)}


class One(msgspec.Struct, gc=False):
    value: int


class Collected(msgspec.Struct):
    value: int


class PostInit(msgspec.Struct, gc=False):
    value: int

    def __post_init__(self) -> None:
        raise AssertionError


class Plain:
    __slots__ = ("value",)


VALUE = FieldLayout("value", "u32", 32, None)


@pytest.mark.parametrize(
    ("struct", "fields", "message"),
    [
        (Plain, (VALUE,), "is not a Struct"),
        (7, (VALUE,), "is not a Struct"),
        (Collected, (VALUE,), "without gc=False"),
        (PostInit, (VALUE,), "__post_init__"),
        (One, (), "other fields"),
        (One, (VALUE, VALUE), "other fields"),
        (One, (FieldLayout("other", "u32", 32, None),), "other fields"),
    ],
)
def test_a_class_that_does_not_fit(
    reader: Reader, struct: Any, fields: tuple[FieldLayout, ...], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        reader.Decoder(HEADER, one_field(struct, *fields), {}, "")


@pytest.mark.parametrize(
    ("op", "offset", "argument", "message"),
    [
        ("u24", 32, None, "unknown op 'u24'"),
        ("u32", 37, None, "test.one.value: offset is 37, not 0 to 36"),
        ("u32", -1, None, "offset is -1, not 0 to 36"),
        ("ns", 33, None, "offset is 33, not 0 to 32"),
        ("cstr", 39, 2, "offset is 39, not 0 to 38"),
        ("cstr", 0, 41, "length is 41, not 1 to 40"),
        ("cstr", 0, 0, "length is 0, not 1 to 40"),
        ("ip", 25, 0, "offset is 25, not 0 to 24"),
        ("ip", 0, 40, "offset is 40, not 0 to 39"),
        ("flag", 0, 256, "mask is 256, not 1 to 255"),
        ("names", 0, (), r"names are \(\), not a tuple of str"),
        ("names", 0, (1,), r"names are \(1,\), not a tuple of str"),
        ("line", 0, None, "a line of 0 argv"),
        ("part", 0, 1, "parts of 0 parsed"),
        ("part", 0, 0, "index is 0, not 1 to 255"),
        ("parsed", 32, None, "test.one.value: None is no function"),
        ("parsed", 39, str, "offset is 39, not 0 to 38"),
        ("cut", 40, (), "offset is 40, not 0 to 39"),
        ("cut", 25, None, "names are None, not a tuple of str"),
        ("cut", 25, (1,), r"names are \(1,\), not a tuple of str"),
        ("cut", 25, tuple("abcdefghi"), r"names are \('a', .*\), more than 8"),
        ("cut", 25, ("path",), "a cut of 1 names and 0 strings"),
    ],
)
def test_a_layout_that_makes_no_sense(
    reader: Reader, op: str, offset: int, argument: Any, message: str
) -> None:
    layouts = one_field(One, FieldLayout("value", op, offset, argument))
    with pytest.raises(ValueError, match=message):
        reader.Decoder(HEADER, layouts, {}, "")


def strings_layout(count: int, names: int) -> dict[int, RecordLayout]:
    """A kind of `count` strings, of which a `cut` knows some."""
    strings = [f"s{i}" for i in range(count)]
    struct = msgspec.defstruct(
        "Strings", [*((name, str) for name in strings), ("cut", tuple[str, ...])], gc=False
    )
    fields = [FieldLayout(name, "str", 32 + 2 * i, None) for i, name in enumerate(strings)]
    cut = FieldLayout("cut", "cut", 25, tuple(strings[:names]))
    return one_field(struct, *fields, cut, size=32 + 2 * count)


def test_a_cut_names_every_string(reader: Reader) -> None:
    decoder = reader.Decoder(HEADER, strings_layout(8, 8), {}, "")
    record = header(1, 48 + 8, cut=0b1010_0001) + struct.pack("<8H", *[1] * 8) + b"abcdefg\xc3"
    event = decoder.decode(record)
    assert [getattr(event, f"s{i}") for i in range(8)] == [*"abcdefg", ""]
    assert event.cut == ("s0", "s5", "s7")
    assert counters(decoder) == {"truncated": 1}


@pytest.mark.parametrize(
    ("count", "names", "message"),
    [
        (9, 8, "test.one: 9 strings, more than 8"),
        (40, 8, "test.one: 40 strings, more than 8"),
        (3, 2, "test.one: a cut of 2 names and 3 strings"),
    ],
)
def test_strings_that_a_cut_cannot_name(
    reader: Reader, count: int, names: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        reader.Decoder(HEADER, strings_layout(count, names), {}, "")


class Parts(msgspec.Struct, gc=False):
    third: int
    cut: tuple[str, ...]
    first: bytes
    text: str
    second: bool


def parts_decoder(reader: Reader, parse: Any) -> Any:
    """A kind with bytes that `parse` makes three parts of, and a string behind them."""
    fields = (
        FieldLayout("third", "part", 0, 2),
        FieldLayout("cut", "cut", 25, ("first", "text")),
        FieldLayout("first", "parsed", 32, parse),
        FieldLayout("text", "str", 34, None),
        FieldLayout("second", "part", 0, 1),
    )
    return reader.Decoder(HEADER, one_field(Parts, *fields, size=36), {}, "")


def parts_record(parsed: bytes, text: bytes, cut: int = 0) -> bytes:
    size = 36 + len(parsed) + len(text)
    lengths = struct.pack("<2H", len(parsed), len(text))
    return header(1, size, cut=cut) + lengths + parsed + text


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_a_function_makes_parts_of_bytes(reader: Reader, cut: int) -> None:
    decoder = parts_decoder(reader, lambda data, is_cut: (data, is_cut, len(data)))
    event = decoder.decode(parts_record(b"\0\xff", b"behind", cut))
    names = tuple(name for bit, name in enumerate(("first", "text")) if cut >> bit & 1)
    assert event == Parts(2, names, b"\0\xff", "behind", bool(cut & 1))
    assert decoder.decode(parts_record(b"", b"")) == Parts(0, (), b"", "", False)


def test_parts_do_not_leak(reader: Reader) -> None:
    value = object()
    decoder = parts_decoder(reader, lambda data, is_cut: (value, value, value))
    before = sys.getrefcount(value)
    for _ in range(100):
        decoder.decode(parts_record(b"x", b""))
    assert sys.getrefcount(value) == before


@pytest.mark.parametrize("made", [(), (1,), (1, 2), [1, 2, 3], None])
def test_a_function_that_makes_no_parts_is_a_defect(reader: Reader, made: Any) -> None:
    decoder = parts_decoder(reader, lambda data, is_cut: made)
    with pytest.raises(TypeError, match="part "):
        decoder.decode(parts_record(b"x", b""))


def test_what_a_function_raises_is_raised(reader: Reader) -> None:
    def fail(data: bytes, is_cut: bool) -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        parts_decoder(reader, fail).decode(parts_record(b"x", b""))


def test_fields_may_end_with_the_record(reader: Reader) -> None:
    layouts = one_field(One, FieldLayout("value", "u64", 32, None))
    decoder = reader.Decoder(HEADER, layouts, {}, "")
    assert decoder.decode(header(1, 40) + struct.pack("<Q", 5)) == One(5)


def test_a_header_that_makes_no_sense(reader: Reader) -> None:
    wrong = {"seq": 25, "kind": 31, "cpu": -1, "skipped": 32, "cut": 32, "header_size": 1 << 31}
    for name, offset in wrong.items():
        with pytest.raises(ValueError, match=f"header: {name} is {offset}, not 0 to"):
            reader.Decoder(HEADER | {name: offset}, LAYOUTS, CONSTANTS, PREFIX)
    for name in HEADER:
        without = {key: value for key, value in HEADER.items() if key != name}
        with pytest.raises(KeyError, match=name):
            reader.Decoder(without, LAYOUTS, CONSTANTS, PREFIX)


def test_sizes_kinds_constants_and_prefix_are_checked(reader: Reader) -> None:
    with pytest.raises(ValueError, match="size is 31, not 32 to"):
        reader.Decoder(HEADER, one_field(One, VALUE, size=31), {}, "")
    with pytest.raises(ValueError, match="kind is 65536, not 0 to 65535"):
        reader.Decoder(HEADER, {65536: LAYOUTS[FORK]}, {}, "")
    with pytest.raises(KeyError, match="host"):
        reader.Decoder(HEADER, LAYOUTS, {"schema": 1}, "")
    with pytest.raises(ValueError, match="id_prefix 'é' is not ASCII"):
        reader.Decoder(HEADER, LAYOUTS, CONSTANTS, "é")


def test_the_compiled_reader_refuses_a_field_that_is_no_slot() -> None:
    class Covered(msgspec.Struct, gc=False):
        value: int

    Covered.value = 5
    with pytest.raises(TypeError, match=r"test\.one\.value: 5 is not a slot"):
        _records.Decoder(HEADER, one_field(Covered, VALUE), {}, "")


def test_the_compiled_reader_refuses_fields_that_share_a_slot() -> None:
    class Pair(msgspec.Struct, gc=False):
        value: int
        other: int

    Pair.other = Pair.value
    fields = (VALUE, FieldLayout("other", "u32", 32, None))
    with pytest.raises(TypeError, match=r"test\.one\.other: shares its slot"):
        _records.Decoder(HEADER, one_field(Pair, *fields), {}, "")


# ------------------------------------------------------------------ rings


def ring_of(reader: Reader, simulated: SimulatedRing) -> Any:
    return reader.Ring(simulated.consumer, simulated.producer, DATA_OFFSET)


@pytest.fixture
def simulated() -> SimulatedRing:
    return SimulatedRing(4096)


@pytest.fixture
def ring(reader: Reader, simulated: SimulatedRing) -> Any:
    return ring_of(reader, simulated)


def fill(simulated: SimulatedRing, *written: bytes) -> None:
    for record in written:
        assert simulated.write(record) is not None


def children(drained: Any) -> list[int]:
    return [event.child for event in drained.events]


def test_an_empty_ring(ring: Any, decoder: Any) -> None:
    drained = ring.drain(decoder, 10)
    assert tuple(drained) == ([], {}, (), False, False)
    assert (drained.events, drained.kinds, drained.gaps) == ([], {}, ())
    assert (drained.more, drained.busy) == (False, False)
    assert (ring.pending, ring.records, ring.discarded) == (0, 0, 0)


def test_events_come_in_order_with_their_count_per_kind(
    ring: Any, decoder: Any, simulated: SimulatedRing
) -> None:
    fill(simulated, fork(1), sample(seq=2), fork(3))
    assert ring.pending == simulated.produced
    drained = ring.drain(decoder, 10)
    assert [event.seq for event in drained.events] == [1, 2, 3]
    assert drained.kinds == {"test.fork": 2, "test.sample": 1}
    assert drained[2:] == ((), False, False)
    assert (ring.pending, ring.records, ring.next_seq(0)) == (0, 3, 4)
    assert simulated.consumed == simulated.produced
    fill(simulated, fork(4))
    assert ring.drain(decoder, 10).kinds == {"test.fork": 1}


def test_events_are_counted_by_cpu_and_kind_for_ever(
    ring: Any, decoder: Any, simulated: SimulatedRing
) -> None:
    """What is decoded and did not come out of a ring is not among them, nor what is refused."""
    fill(simulated, fork(1), sample(seq=1, cpu=65535), fork(2), sample(seq=2, cpu=65535)[:40])
    while ring.drain(decoder, 1).more:
        pass
    decoder.decode(fork(3))
    assert decoder.drained(0) == {"test.fork": 2}
    assert decoder.drained(65535) == {"test.sample": 1}
    assert decoder.drained(7) == decoder.drained(65534) == {}
    fill(simulated, fork(4), fork(1, cpu=9))
    ring.drain(decoder, 10)
    assert (decoder.drained(0), decoder.drained(9)) == ({"test.fork": 3}, {"test.fork": 1})
    assert decoder.short_record == 1
    for cpu in (-1, 65536):
        with pytest.raises(ValueError, match="cpu is"):
            decoder.drained(cpu)


def test_the_position_moves_on_once_the_records_are_decoded(
    ring: Any, decoder: Any, simulated: SimulatedRing
) -> None:
    fill(simulated, *(fork(seq, child=seq) for seq in range(1, 6)))
    for expected in ([1, 2], [3, 4]):
        drained = ring.drain(decoder, 2)
        assert children(drained) == expected
        assert drained.more
        assert simulated.consumed == expected[-1] * ring_step(36)
    drained = ring.drain(decoder, 2)
    assert children(drained) == [5]
    assert not drained.more


def test_a_limit_that_is_just_enough_leaves_nothing(
    ring: Any, decoder: Any, simulated: SimulatedRing
) -> None:
    fill(simulated, fork(1), fork(2))
    assert not ring.drain(decoder, 2).more


def test_it_stops_at_a_busy_record_and_goes_on_when_it_is_done(
    ring: Any, decoder: Any, simulated: SimulatedRing
) -> None:
    fill(simulated, fork(1))
    reserved = simulated.reserve(36)
    assert reserved is not None
    fill(simulated, fork(3))
    drained = ring.drain(decoder, 10)
    assert [event.seq for event in drained.events] == [1]
    assert (drained.more, drained.busy) == (False, True)
    assert tuple(ring.drain(decoder, 10)) == ([], {}, (), False, True)
    assert ring.pending == 2 * ring_step(36)
    simulated.submit(reserved, fork(2))
    drained = ring.drain(decoder, 10)
    assert [event.seq for event in drained.events] == [2, 3]
    assert (drained.more, drained.busy) == (False, False)


def test_discarded_records_are_passed_over_and_count_towards_the_limit(
    ring: Any, decoder: Any, simulated: SimulatedRing
) -> None:
    fill(simulated, fork(1))
    for _ in range(3):
        assert simulated.write(b"\xff" * 50, DISCARD) is not None
    fill(simulated, fork(2))
    drained = ring.drain(decoder, 3)
    assert [event.seq for event in drained.events] == [1]
    assert drained.more
    drained = ring.drain(decoder, 3)
    assert [event.seq for event in drained.events] == [2]
    assert (ring.records, ring.discarded, drained.gaps) == (2, 3, ())


@pytest.mark.parametrize("start", [0, (1 << 32) - 64, (1 << 64) - 64, (1 << 64) - 8, 4096 - 8])
def test_records_that_wrap_around(reader: Reader, decoder: Any, start: int) -> None:
    simulated = SimulatedRing(1024, start)
    ring = ring_of(reader, simulated)
    for seq in range(1, 200):
        path = b"%d-" % seq + b"p" * (seq * 7 % 600)
        fill(simulated, sample(seq=seq, first=path))
        (event,) = ring.drain(decoder, 5).events
        assert (event.seq, event.first) == (seq, path.decode())
    assert ring.records == 199


def to_the_end(ring: Any, decoder: Any, simulated: SimulatedRing) -> None:
    """Until a header is the last that has room in the data area."""
    while simulated.produced % simulated.size != simulated.size - 8:
        assert simulated.write(b"", DISCARD) is not None
        ring.drain(decoder, 1)


def test_no_more_is_mapped_again_than_the_largest_record_has(reader: Reader, decoder: Any) -> None:
    """As in the agent; one that is larger is refused, once it is at the end, and not read."""
    again = 128
    simulated = SimulatedRing(1024)
    mapped = memoryview(simulated.producer)[: DATA_OFFSET + 1024 + again]
    ring = reader.Ring(simulated.consumer, mapped, DATA_OFFSET)
    for seq in range(1, 100):
        path = b"%d-" % seq + b"p" * (seq % (again - 8 - SAMPLE_SIZE - 3))
        fill(simulated, sample(seq=seq, first=path))
        (event,) = ring.drain(decoder, 5).events
        assert (event.seq, event.first) == (seq, path.decode())
    to_the_end(ring, decoder, simulated)
    assert simulated.write(sample(first=b"x" * 512), DISCARD) is not None
    assert ring.drain(decoder, 1).events == []
    to_the_end(ring, decoder, simulated)
    at = simulated.produced
    record = sample(first=b"x" * 512)
    fill(simulated, record)
    message = f"a record of {len(record)} bytes at {at} is longer than what is mapped"
    corrupt(ring, decoder, simulated, message)
    ring.close()
    mapped.release()


def test_a_record_that_fills_the_ring(reader: Reader, decoder: Any) -> None:
    simulated = SimulatedRing(1024, 512)
    ring = ring_of(reader, simulated)
    record = sample(first=b"x" * (1024 - 8 - SAMPLE_SIZE))
    fill(simulated, record)
    assert simulated.free == 0
    assert ring.drain(decoder, 1).events == [decoder.decode(record)]
    assert simulated.free == 1024


def test_empty_records_are_short(ring: Any, decoder: Any, simulated: SimulatedRing) -> None:
    fill(simulated, b"", fork(1), b"x" * 31)
    drained = ring.drain(decoder, 10)
    assert [event.seq for event in drained.events] == [1]
    assert (drained.gaps, ring.records) == ((), 3)
    assert counters(decoder) == {"short_record": 2}


def test_the_compiled_reader_takes_only_its_own_decoder(simulated: SimulatedRing) -> None:
    twin: Any = records_py.Decoder(HEADER, LAYOUTS, CONSTANTS, PREFIX)
    with pytest.raises(TypeError, match=r"drain\(\) takes a Decoder and a number of records"):
        ring_of(_records, simulated).drain(twin, 1)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_is_at_least_one(ring: Any, decoder: Any, limit: int) -> None:
    with pytest.raises(ValueError, match=f"max_records is {limit}, not at least 1"):
        ring.drain(decoder, limit)


# ------------------------------------------------------------------ sequence


def gaps_of(ring: Any, decoder: Any, simulated: SimulatedRing, *written: bytes) -> Any:
    fill(simulated, *written)
    return ring.drain(decoder, 1000).gaps


def test_missing_numbers(ring: Any, decoder: Any, simulated: SimulatedRing) -> None:
    gaps = gaps_of(ring, decoder, simulated, fork(3), fork(4), fork(9), fork(10))
    assert gaps == (("missing", 0, 1, 2), ("missing", 0, 5, 8))
    assert ring.next_seq(0) == 11
    assert gaps_of(ring, decoder, simulated, fork(11)) == ()


def test_late_numbers_do_not_set_the_sequence_back(
    ring: Any, decoder: Any, simulated: SimulatedRing
) -> None:
    gaps = gaps_of(ring, decoder, simulated, fork(1), fork(3), fork(2), fork(4), fork(4), fork(0))
    assert gaps == (
        ("missing", 0, 2, 2),
        ("late", 0, 2, 2),
        ("late", 0, 4, 4),
        ("late", 0, 0, 0),
    )
    assert ring.next_seq(0) == 5
    assert ring.records == 6


def test_skipped_numbers_are_told_after_the_gap_that_they_explain(
    ring: Any, decoder: Any, simulated: SimulatedRing
) -> None:
    gaps = gaps_of(ring, decoder, simulated, fork(1), fork(4, skipped=2), fork(5, skipped=1))
    assert gaps == (("missing", 0, 2, 3), ("skipped", 0, 2, 2), ("skipped", 0, 1, 1))


def test_each_cpu_has_its_own_sequence(ring: Any, decoder: Any, simulated: SimulatedRing) -> None:
    written = [fork(1, cpu) for cpu in (0, 1, 9, 65535)] + [fork(2, 9), fork(4, 1)]
    assert gaps_of(ring, decoder, simulated, *written) == (("missing", 1, 2, 3),)
    assert [ring.next_seq(cpu) for cpu in (0, 1, 2, 9, 65535, 65534)] == [2, 5, 1, 3, 2, 1]
    for cpu in (-1, 65536):
        with pytest.raises(ValueError, match=f"cpu is {cpu}, not 0 to 65535"):
            ring.next_seq(cpu)


def test_it_goes_on_where_another_reader_was(
    ring: Any, decoder: Any, simulated: SimulatedRing
) -> None:
    """What that one has passed is not missing here; what it had passed and not said is."""
    ring.expect(0, 5)
    ring.expect(9, 1)
    ring.expect(300, 1 << 40)
    assert [ring.next_seq(cpu) for cpu in (0, 9, 300)] == [5, 1, 1 << 40]
    assert gaps_of(ring, decoder, simulated, fork(7), fork(1, 9)) == (("missing", 0, 5, 6),)
    for wrong, error in (((-1, 1), ValueError), ((0, 0), ValueError), ((0, -1), OverflowError),
                         ((0, 1 << 64), OverflowError), ((65536, 1), ValueError)):  # fmt: skip
        with pytest.raises(error):
            ring.expect(*wrong)


def test_refused_records_count_in_the_sequence(
    ring: Any, decoder: Any, simulated: SimulatedRing
) -> None:
    unknown, short = header(99, 32, seq=2), fork(3)[:-1]
    assert gaps_of(ring, decoder, simulated, fork(1), unknown, short, fork(4)) == ()
    assert counters(decoder) == {"unknown_kind": 1, "short_record": 1}
    assert (ring.records, ring.next_seq(0)) == (4, 5)


def test_the_sequence_wraps(ring: Any, decoder: Any, simulated: SimulatedRing) -> None:
    last = (1 << 64) - 1
    gaps = gaps_of(ring, decoder, simulated, fork(last), fork(0), fork(1))
    assert gaps == (("missing", 0, 1, last - 1),)
    assert ring.next_seq(0) == 2


def test_a_drain_without_anomalies_has_the_same_empty_tuple(ring: Any, decoder: Any) -> None:
    assert ring.drain(decoder, 1).gaps is ring.drain(decoder, 1).gaps


# ------------------------------------------------------------------ corrupt rings


def corrupt(ring: Any, decoder: Any, simulated: SimulatedRing, message: str) -> None:
    consumed = simulated.consumed
    for _ in range(2):
        with pytest.raises(ValueError, match=f"corrupt ring: {message}"):
            ring.drain(decoder, 10)
    assert simulated.consumed == consumed


def test_a_record_longer_than_what_is_pending(
    ring: Any, decoder: Any, simulated: SimulatedRing
) -> None:
    fill(simulated, fork(1))
    simulated.set_word(0, 41)
    corrupt(ring, decoder, simulated, "a record of 41 bytes at 0, where 48 are pending")
    simulated.set_word(0, DISCARD - 1)
    corrupt(ring, decoder, simulated, "a record of 1073741823 bytes at 0")
    simulated.set_word(0, 36)
    assert ring.drain(decoder, 10).kinds == {"test.fork": 1}


def test_what_precedes_a_corrupt_record_is_not_lost(
    ring: Any, decoder: Any, simulated: SimulatedRing
) -> None:
    fill(simulated, fork(1), fork(2), fork(3))
    simulated.set_word(2 * ring_step(36), 1000)
    drained = ring.drain(decoder, 10)
    assert [event.seq for event in drained.events] == [1, 2]
    assert (drained.more, drained.busy) == (True, False)
    corrupt(ring, decoder, simulated, "a record of 1000 bytes at 96, where 48 are pending")
    assert (ring.records, ring.next_seq(0)) == (2, 3)


@pytest.mark.parametrize("produced", [4096 + 8, -8, 1 << 63])
def test_positions_too_far_apart(
    ring: Any, decoder: Any, simulated: SimulatedRing, produced: int
) -> None:
    simulated.produced = produced
    corrupt(ring, decoder, simulated, "consumer at 0, producer at")


def test_positions_out_of_step(reader: Reader, decoder: Any) -> None:
    simulated = SimulatedRing(64, 4)
    corrupt(ring_of(reader, simulated), decoder, simulated, "consumer at 4, producer at 4, size 64")


def test_a_producer_position_within_a_record_header(reader: Reader, decoder: Any) -> None:
    simulated = SimulatedRing(64, 56)
    simulated.produced = 60
    corrupt(
        ring_of(reader, simulated), decoder, simulated, "a record of 0 bytes at 56, where 4 are"
    )


# ------------------------------------------------------------------ buffers


@pytest.mark.parametrize(
    ("consumer", "producer", "offset"),
    [
        (7, 4096 + 128, 4096),
        (8, 4096, 4096),
        (8, 4096 + 100, 4096),
        (8, 4096 + 15, 4096),
        (8, 4096 + 8, 4096),
        (8, 128, 0),
        (8, 128 + 12, 12),
        (8, 100, 4096),
        (8, 128 + 8, -8),
    ],
)
def test_buffers_of_the_wrong_shape(
    reader: Reader, consumer: int, producer: int, offset: int
) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        reader.Ring(bytearray(consumer), bytes(producer), offset)


def test_the_consumers_page_must_be_writable(reader: Reader) -> None:
    with pytest.raises((TypeError, BufferError)):
        reader.Ring(bytes(8), bytes(4096 + 128))


def test_the_producers_pages_may_be_read_only(reader: Reader, decoder: Any) -> None:
    record = fork()
    data = struct.pack("<II", len(record), 0) + record + bytes(20)
    ring = reader.Ring(bytearray(8), struct.pack("<Q", 48) + data * 2, 8)
    assert ring.drain(decoder, 1).events == [Fork(seq=1, child=77)]


def test_buffers_are_held_until_closed(reader: Reader, decoder: Any) -> None:
    pages = mmap.mmap(-1, 4096), mmap.mmap(-1, producer_bytes(4096))
    ring = reader.Ring(*pages)
    with pytest.raises(BufferError):
        pages[1].close()
    ring.close()
    ring.close()
    for page in pages:
        page.close()
    with pytest.raises(ValueError, match="the ring is closed"):
        ring.drain(decoder, 1)
    with pytest.raises(ValueError, match="the ring is closed"):
        _ = ring.pending


def test_a_finalizer_cannot_drain_the_ring_underneath(
    ring: Any, decoder: Any, simulated: SimulatedRing
) -> None:
    fill(simulated, *(sample(seq=seq, argv=b"a\0b\0") for seq in range(1, 25)))
    seen: list[int] = []

    def intrude(phase: str, info: dict[str, int]) -> None:
        try:
            seen.extend(event.seq for event in ring.drain(decoder, 1).events)
        except RuntimeError:
            with pytest.raises(RuntimeError, match="the ring is being drained"):
                ring.close()

    thresholds = gc.get_threshold()
    gc.callbacks.append(intrude)
    gc.set_threshold(1)
    try:
        drained = ring.drain(decoder, 12)
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(intrude)
    seen.extend(event.seq for event in drained.events)
    seen.extend(event.seq for event in ring.drain(decoder, 24).events)
    assert sorted(seen) == list(range(1, 25))
    assert (ring.records, drained.gaps) == (24, ())


# ------------------------------------------------------------------ memory


def test_nothing_leaks(reader: Reader, decoder: Any, simulated: SimulatedRing) -> None:
    ring = ring_of(reader, simulated)
    shared = [Sample, Fork, CONSTANTS["host"], NAMES[1], NAMES, STRINGS[0], STRINGS, LAYOUTS]

    def rounds(count: int) -> None:
        for _ in range(count):
            start = ring.next_seq(0)
            fill(
                simulated,
                sample(seq=start, name=1, first=b"/a" * 40, argv=b"a\0\xff\0", version=4, cut=3),
                fork(start + 3),
                fork(start + 1),
                header(99, 32, seq=start + 4),
                b"short",
                sample(seq=start + 5, argv=b"x\0" * 100, last=b"x" * 400, comm=b"\xff"),
                sample(seq=start + 6, first=CHARACTER[1:], last=b"x" + CHARACTER[:3], cut=255),
            )
            assert len(ring.drain(decoder, 100).gaps) == 2

    rounds(50)
    gc.collect()
    counts = [sys.getrefcount(thing) for thing in shared]
    tracemalloc.start()
    rounds(10)
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    rounds(500)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert [sys.getrefcount(thing) for thing in shared] == counts
    assert grown < 4096  # 3000 records; a leak of 8 bytes each would be 24000


def test_a_decoder_gives_back_all_it_holds(reader: Reader) -> None:
    class Mine(msgspec.Struct, gc=False):
        value: str
        text: str
        cut: tuple[str, ...]

    constant, names = "constant-" + "x" * 100, ("a name",)
    fields = (FieldLayout("text", "str", 32, None), FieldLayout("cut", "cut", 25, names))
    layouts = one_field(Mine, FieldLayout("value", "const", 0, "c"), *fields)

    def counts() -> list[int]:
        gc.collect()
        return [sys.getrefcount(thing) for thing in (Mine, constant, layouts, names, names[0])]

    before = counts()
    for _ in range(20):
        decoder = reader.Decoder(HEADER, layouts, {"c": constant}, "p")
        ring = reader.Ring(bytearray(8), bytearray(4096 + 128))
        ring.drain(decoder, 1)
        with pytest.raises(ValueError, match="unknown op"):
            reader.Decoder(HEADER, layouts | {2: bad_layout(Mine, fields)}, {"c": constant}, "p")
        del decoder, ring
    assert counts() == before


def bad_layout(struct: Any, fields: tuple[FieldLayout, ...]) -> RecordLayout:
    """Whose last field is one that no reader can read."""
    *good, last = fields
    bad = (FieldLayout("value", "const", 0, "c"), *good, last._replace(op="no"))
    return RecordLayout("test.bad", struct, 40, 40, bad)


def test_a_decoder_in_a_cycle_is_collected(reader: Reader) -> None:
    class Holder(list[Any]):
        freed = False

        def __del__(self) -> None:
            Holder.freed = True

    holder = Holder()
    layouts = one_field(One, FieldLayout("value", "const", 0, "c"))
    holder.append(reader.Decoder(HEADER, layouts, {"c": holder}, ""))
    del holder
    gc.collect()
    assert Holder.freed


EXHAUSTED = (
    sample(seq=2, first=b"abc\xc3", argv=b"a\0\xff\0", cut=1, flags=4, version=6),
    fork(4),
    fork(3),
    header(99, 32, seq=5),
    b"short",
    fork(9, cpu=30, skipped=2),
    sample(seq=6, a_u32=99999, argv=b"x" * 300 + b"\0y"),
    fork(7),
)


def drain_all(ring: Any, decoder: Any, limit: int) -> tuple[list[int], list[Any], Counter[str]]:
    """Sequence numbers, gaps and kinds of all that is in the ring."""
    seqs, gaps, kinds = [], [], Counter[str]()
    more = True
    while more:
        drained = ring.drain(decoder, limit)
        seqs += [event.seq for event in drained.events]
        gaps += drained.gaps
        kinds += Counter(drained.kinds)
        more = drained.more
    return seqs, gaps, kinds


@pytest.mark.parametrize("failures", [1, 1000])
@pytest.mark.parametrize("limit", [3, 100])
def test_the_compiled_reader_loses_nothing_when_memory_runs_out(
    require: Callable[[object, str], None], failures: int, limit: int
) -> None:
    """`failures` allocations in a row fail, beginning with each one of the drains in turn."""
    require(importlib.util.find_spec("_testcapi"), "this Python lacks its module _testcapi")
    memory = importlib.import_module("_testcapi")
    raised = 0
    for first in range(1, 150):
        simulated = SimulatedRing(4096)
        fill(simulated, *EXHAUSTED)
        decoder = _records.Decoder(HEADER, LAYOUTS, CONSTANTS, PREFIX)
        ring = ring_of(_records, simulated)
        drained: Any = None
        try:
            memory.set_nomemory(first, first + failures)
            drained = ring.drain(decoder, limit)
        except MemoryError:
            raised += 1
        finally:
            memory.remove_mem_hooks()
        seqs, gaps, kinds = drain_all(ring, decoder, limit)
        if drained is not None:
            seqs = [event.seq for event in drained.events] + seqs
            gaps = [*drained.gaps, *gaps]
            kinds += Counter(drained.kinds)
        assert seqs == [2, 4, 3, 9, 6, 7]
        assert gaps == [
            ("missing", 0, 1, 1),
            ("missing", 0, 3, 3),
            ("late", 0, 3, 3),
            ("missing", 30, 1, 8),
            ("skipped", 30, 2, 2),
        ]
        assert kinds == {"test.sample": 2, "test.fork": 4}
        drained_by_cpu = [decoder.drained(cpu) for cpu in (0, 30)]
        assert sum(map(Counter, drained_by_cpu), Counter()) == kinds
        assert counters(decoder) == dict.fromkeys(COUNTERS, 1)
        assert (ring.records, ring.pending) == (len(EXHAUSTED), 0)
    assert raised > 5


# ------------------------------------------------------------------ a producer at work


def shared_pages(path: Path, size: int) -> tuple[mmap.mmap, mmap.mmap]:
    """The pages of a ring in a file, mapped."""
    with path.open("r+b") as file:
        file.truncate(4096 + producer_bytes(size))
        consumer = mmap.mmap(file.fileno(), 4096)
        producer = mmap.mmap(file.fileno(), producer_bytes(size), offset=4096)
    return consumer, producer


def produce(path: Path, size: int, count: int) -> None:
    """Write `count` records of all sizes, keeping now and then one busy, or discarding one."""
    simulated = SimulatedRing(size, 0, *shared_pages(path, size))
    for seq in range(1, count + 1):
        record = sample(seq=seq, first=b"%d" % seq * (seq % 60), a_u64=seq * seq)
        while (reserved := simulated.reserve(len(record))) is None:
            pass
        if seq % 5 == 0:
            while simulated.write(b"\xee" * (seq % 50), DISCARD) is None:
                pass
        simulated.submit(reserved, record)


def test_a_producer_at_work_in_another_process(
    reader: Reader, decoder: Any, tmp_path: Path
) -> None:
    path, size, count = tmp_path / "ring", 8192, 20_000
    path.touch()
    ring = reader.Ring(*shared_pages(path, size))
    process = multiprocessing.get_context("spawn").Process(target=produce, args=(path, size, count))
    process.start()
    seen = 0
    while seen < count:
        drained = ring.drain(decoder, 64)
        assert drained.gaps == ()
        for event in drained.events:
            seen += 1
            expected = (seen, str(seen) * (seen % 60), seen * seen)
            assert (event.seq, event.first, event.a_u64) == expected
        assert process.exitcode in (None, 0)
    process.join(30)
    drained = ring.drain(decoder, 64)
    assert (drained.events, drained.more, ring.pending) == ([], False, 0)
    assert (ring.records, ring.discarded) == (count, count // 5)
    assert process.exitcode == 0
    assert counters(decoder) == {}
