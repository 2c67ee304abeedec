"""Records that the kernel wrote, decoded to the events that the program made, by both readers."""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import Any

import msgspec
import pytest

from streamer import _records, records_py
from streamer.events import CONTRACT, HEADER, KINDS, RECORDS
from tests.golden.cases import CLOCK_OFFSET_NS, ID_PREFIX, PLACE, Case, constants, load

CASES = load()
READERS = [pytest.param(_records, id="compiled"), pytest.param(records_py, id="twin")]


def decoder(reader: ModuleType, stream: str) -> Any:
    made = reader.Decoder(HEADER, RECORDS, constants(stream), f"{ID_PREFIX}-{stream}")
    made.clock_offset_ns = CLOCK_OFFSET_NS
    return made


def name(case: Case) -> str:
    return f"{case.event['event']}-{case.stream}-{case.event['seq']}"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_record_becomes_its_event(reader: ModuleType, case: Case) -> None:
    event = decoder(reader, case.stream).decode(case.record)
    assert msgspec.to_builtins(event) == case.event


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_record_that_ends_too_soon_is_counted(reader: ModuleType, case: Case) -> None:
    """Wherever it is cut: it becomes no event, and the reader goes on."""
    made = decoder(reader, case.stream)
    cuts = range(used(case))
    for end in cuts:
        assert made.decode(case.record[:end]) is None
    assert made.short_record == len(cuts)
    assert msgspec.to_builtins(made.decode(case.record)) == case.event


def used(case: Case) -> int:
    """Bytes of the record that are read: all, but for the padding of the fixed part."""
    return int.from_bytes(case.record[HEADER["size"] :][:4], "little")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("number", [0, 63, 65535])
def test_a_record_of_an_unknown_kind_is_counted(reader: ModuleType, number: int) -> None:
    made = decoder(reader, CASES[0].stream)
    record = bytearray(CASES[0].record)
    record[HEADER["kind"] : HEADER["kind"] + 2] = number.to_bytes(2, "little")
    assert made.decode(record) is None
    assert made.unknown_kind == 1


@pytest.mark.parametrize("case", CASES, ids=name)
def test_nothing_of_the_kernels_memory_is_in_the_padding(case: Case) -> None:
    struct = case.event["event"].replace(".", "_")
    for member, offset, size in (*CONTRACT["event_header"], *CONTRACT[struct]):
        if member.startswith("pad"):
            assert case.record[offset : offset + size] == bytes(size)
    assert len(case.record) == used(case)


def test_every_kind_is_there() -> None:
    assert {case.event["event"] for case in CASES} == KINDS.keys()


def of(kind: str) -> list[dict[str, Any]]:
    return [case.event for case in CASES if case.event["event"] == kind]


def test_what_the_program_did_is_there() -> None:
    """Against `golden.c`, and not against a decoder."""
    own = str(PLACE / "golden")
    first, second = of("process.exec")
    assert (first["exe"], first["cwd"], first["parent_exe"]) == (own, str(PLACE), own)
    assert first["argv"] == ["golden", "plain"]
    assert second["argv"] == ["golden", "", "two words", "prüfung ☃", "bad \ufffd byte"]
    assert second["cmdline"] == "golden  two words prüfung ☃ bad \ufffd byte"
    assert (first["invalid_utf8"], second["invalid_utf8"]) == (False, True)
    exits = [(e["exit_code"], e["signal"], e["core_dumped"]) for e in of("process.exit")]
    assert exits == [(2, 0, False), (5, 0, False), (0, 15, False), (0, 0, False)]
    assert len({event["child_pid"] for event in of("process.fork")}) == 3


def test_what_it_opened_is_there() -> None:
    opens = [(e["path"], e["errno"], e["flags"], e["mode"]) for e in of("file.open")]
    assert opens == [
        (f"{PLACE}/made", 0, 0o1101, 0o640),
        (f"{PLACE}/missing", 2, 0, 0),
        (f"{PLACE}/bad \ufffd byte", 2, 0o2000002, 0),
        ("/d" * 64 + "/missing too", 2, 0, 0),
    ]
    assert [e["truncated"] for e in of("file.open")] == [False, False, False, True]


def test_its_connections_are_there() -> None:
    ends = [("127.0.0.1", 4), ("::1", 6)]
    connects = [(e["remote_addr"], e["ip_version"], e["errno"]) for e in of("net.connect")]
    assert connects == [(*end, error) for end in ends for error in (0, 111)]
    assert [(e["local_addr"], e["ip_version"]) for e in of("net.accept")] == ends
    closes = Counter(
        (e["local_addr"], e["direction"], e["bytes_sent"], e["bytes_received"])
        for e in of("net.close")
    )
    assert closes == {
        (address, *way): 1
        for address, _ in ends
        for way in (("outbound", 1000, 77), ("inbound", 77, 1000))
    }
