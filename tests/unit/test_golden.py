"""Records that the kernel wrote, decoded to the events that the program made, by both readers."""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import Any

import msgspec
import pytest

from streamer.config.settings import SHED_BY_DEFAULT
from streamer.events.clock import rfc3339
from streamer.events.kinds import HEADER, KINDS, RECORDS
from streamer.events.layout import with_time
from streamer.events.parsed import hiding
from streamer.kernel.objects import CONTRACT
from streamer.ring import _records, records_py
from tests.golden.cases import CLOCK_OFFSET_NS, ID_PREFIX, PLACE, Case, constants, load, published

CASES = load()
READERS = [pytest.param(_records, id="compiled"), pytest.param(records_py, id="twin")]


def decoder(reader: ModuleType, ring: str) -> Any:
    made = reader.Decoder(HEADER, RECORDS, constants(ring), f"{ID_PREFIX}-{ring}")
    made.clock_offset_ns = CLOCK_OFFSET_NS
    return made


def name(case: Case) -> str:
    return f"{case.event['event']}-{case.ring}-{case.event['seq']}"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_record_becomes_its_event(reader: ModuleType, case: Case) -> None:
    event = decoder(reader, case.ring).decode(case.record)
    assert published(event) == case.event


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_with_its_time_in_words_it_is_the_same_event(reader: ModuleType, case: Case) -> None:
    made = reader.Decoder(
        HEADER, with_time(RECORDS), constants(case.ring), f"{ID_PREFIX}-{case.ring}"
    )
    made.clock_offset_ns = CLOCK_OFFSET_NS
    worded = {"time": rfc3339(case.event["time_ns"])}
    assert published(made.decode(case.record)) == case.event | worded
    assert msgspec.convert(case.event | worded, KINDS[case.event["event"]].struct).time


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_record_that_ends_too_soon_is_counted(reader: ModuleType, case: Case) -> None:
    """Wherever it is cut: it becomes no event, and the reader goes on."""
    made = decoder(reader, case.ring)
    size = used(case)
    cuts = [*range(min(size, 300)), *range(300, size, 37), size - 1]
    for end in cuts:
        assert made.decode(case.record[:end]) is None
    assert made.short_record == len(cuts)
    assert published(made.decode(case.record)) == case.event


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_its_weight_is_what_the_kernel_wrote(reader: ModuleType, case: Case) -> None:
    """Of every kind, as each can be sampled: those of the bulk ring also under pressure."""
    made = decoder(reader, case.ring)
    (place,) = (at for member, at, _ in CONTRACT["event_base"] if member == "weight")
    for weight in (4, 64, 1 << 20):
        record = bytearray(case.record)
        record[place : place + 4] = weight.to_bytes(4, "little")
        assert published(made.decode(record)) == case.event | {"weight": weight}


def test_a_golden_record_is_there_of_each_kind_that_can_be_shed() -> None:
    assert {case.event["event"] for case in CASES} >= SHED_BY_DEFAULT.keys()


def used(case: Case) -> int:
    """Bytes of the record, as its base says."""
    return int.from_bytes(case.record[HEADER["size"] :][:4], "little")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("number", [0, 63, 65535])
def test_a_record_of_an_unknown_kind_is_counted(reader: ModuleType, number: int) -> None:
    made = decoder(reader, CASES[0].ring)
    record = bytearray(CASES[0].record)
    record[HEADER["kind"] : HEADER["kind"] + 2] = number.to_bytes(2, "little")
    assert made.decode(record) is None
    assert made.unknown_kind == 1


@pytest.mark.parametrize("case", CASES, ids=name)
def test_nothing_of_the_kernels_memory_is_in_the_padding(case: Case) -> None:
    struct = case.event["event"].replace(".", "_")
    task = [
        (member, at + offset, size)
        for name, at, _ in CONTRACT[struct]
        for member, offset, size in CONTRACT["event_task"]
        if name == "task"
    ]
    padding = [one for one in (*task, *CONTRACT[struct]) if one[0].startswith("pad")]
    assert padding
    for _, offset, size in padding:
        assert case.record[offset : offset + size] == bytes(size)
    assert len(case.record) == used(case) <= RECORDS[of_kind(case)].max_size


def of_kind(case: Case) -> int:
    return int.from_bytes(case.record[HEADER["kind"] :][:2], "little")


def test_every_kind_is_there() -> None:
    assert {case.event["event"] for case in CASES} == KINDS.keys()


def of(kind: str) -> list[dict[str, Any]]:
    return [case.event for case in CASES if case.event["event"] == kind]


def test_what_the_program_did_is_there() -> None:
    """Against `golden.c`, and not against a decoder."""
    own = str(PLACE / "golden")
    first, second, script, longest = of("process.exec")
    for event in of("process.exec"):
        assert (event["exe"], event["cwd"], event["parent_exe"]) == (own, str(PLACE), own)
        assert (event["exe_deleted"], event["exe_memfd"], event["incomplete"]) == (False,) * 3
        assert event["exe_mntns"] == event["cwd_mntns"] == event["parent_exe_mntns"] > 0
    assert first["argv"] == ["golden", "plain"]
    assert (first["filename"], first["interp"]) == ("./golden", "")
    assert second["argv"] == ["golden", "", "two words", "prüfung ☃", "bad \ufffd byte"]
    assert second["cmdline"] == "golden  two words prüfung ☃ bad \ufffd byte"
    assert (first["invalid_utf8"], second["invalid_utf8"]) == (False, True)
    assert script["argv"] == ["./golden", "-x", "./☃/golden", "argument"]
    assert (script["filename"], script["interp"]) == ("./☃/golden", "./golden")
    assert [e["truncated"] for e in (first, second, script)] == [[], [], []]
    assert longest["truncated"] == ["argv", "cmdline"]
    exits = [(e["exit_code"], e["signal"], e["core_dumped"]) for e in of("process.exit")]
    ended = [(argc, 0, False) for argc in (2, 5, 4, 2)]
    assert exits == [*ended, (0, 15, False), (0, 0, False)]
    assert len({event["child_pid"] for event in of("process.fork")}) == 5
    (slow,) = of("syscall.slow")
    assert (slow["syscall"], slow["ret"], slow["errno"], slow["arg0"]) == ("nanosleep", 0, 0, 0)
    assert slow["duration_ns"] >= 2_000_000


def test_its_processes_can_be_joined() -> None:
    """The start of a process and its pid are the same in all that it does, and in its fork."""
    (parent,) = {(e["pid"], e["start_boot_ns"]) for e in of("process.fork")}
    children = {(e["child_pid"], e["child_start_boot_ns"]) for e in of("process.fork")}
    assert {(e["pid"], e["start_boot_ns"]) for e in of("process.exec")} < children
    assert {(e["pid"], e["start_boot_ns"]) for e in of("process.exit")} == children | {parent}
    for kind in ("file.open", "net.connect", "net.accept", "net.close"):
        assert {(e["pid"], e["start_boot_ns"]) for e in of(kind)} == {parent}


def test_a_cut_within_a_character_is_no_invalid_utf8() -> None:
    """The limits, of 16,384, 4,096 and 4,095 bytes, are within a character of two bytes."""
    argv, path = "xy" + "é" * ((16384 - 9) // 2), "/x" + "é" * ((4095 - 2) // 2)
    longest = of("process.exec")[-1]
    assert (longest["argv"], longest["argc"]) == (["golden", argv], 2)
    assert longest["cmdline"] == "golden xy" + "é" * ((4096 - 9) // 2)
    (cut,) = [e for e in of("file.open") if e["path"].startswith("/x")]
    assert (cut["path"], cut["truncated"]) == (path, ["path"])
    assert not cut["invalid_utf8"] | longest["invalid_utf8"]


@pytest.mark.parametrize("reader", READERS)
def test_a_beginning_that_was_cut_within_a_character(reader: ModuleType) -> None:
    """Of a path that was cut, without its slash and the first byte of the character behind it."""
    (case,) = [case for case in CASES if case.event.get("path", "").startswith("/é")]
    start, length_at = RECORDS[of_kind(case)].size, dict(offsets("file_open"))["path_len"]
    record = bytearray(case.record)
    del record[start : start + 2]
    for at, size in ((HEADER["size"], 4), (length_at, 2)):
        value = int.from_bytes(record[at : at + size], "little") - 2
        record[at : at + size] = value.to_bytes(size, "little")
    event = decoder(reader, case.ring).decode(record)
    assert (event.path, event.truncated) == (case.event["path"][2:], ("path",))
    assert not event.invalid_utf8


def offsets(struct: str) -> list[tuple[str, int]]:
    return [(member, offset) for member, offset, _ in CONTRACT[struct]]


def test_what_it_opened_is_there() -> None:
    opens = [(e["path"], e["errno"], e["flags"], e["mode"]) for e in of("file.open")]
    longest = [(path, 36, 0, 0) for path, *_ in opens if len(path) > 2000]
    assert len(longest) == 2
    assert opens == [
        (f"{PLACE}/☃/golden", 0, 0o101, 0o755),
        (f"{PLACE}/made", 0, 0o1101, 0o640),
        (f"{PLACE}/missing", 2, 0, 0),
        (f"{PLACE}/bad \ufffd byte", 2, 0o2000002, 0),
        *longest,
        ("/d" * 80 + "/missing too", 2, 0, 0),
    ]
    cut = ["path"]
    assert [e["truncated"] for e in of("file.open")] == [[], [], [], [], cut, cut, cut]
    assert [e["inode"] > 0 for e in of("file.open")] == [True, True, *[False] * 5]


def test_its_connections_are_there() -> None:
    ends = [("127.0.0.1", 4), ("::1", 6)]
    connects = [(e["remote_addr"], e["ip_version"], e["errno"]) for e in of("net.connect")]
    assert connects == [(*end, error) for end in ends for error in (0, 111)]
    assert all(e["owner_known"] for k in ("connect", "accept", "close") for e in of(f"net.{k}"))
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


def test_what_it_asked_is_there() -> None:
    """A name with a dot and a backslash in a label; a chain of names, a loop, and no answer."""
    alias, loop, vain = of("net.dns")
    for number, event in enumerate((alias, loop, vain), 1):
        assert (event["query"], event["query_type"]) == (r"www.a\.b\\c.TEST", "A")
        assert (event["dns_id"], event["queries"], event["transport"]) == (number, 1, "udp")
        assert (event["remote_addr"], event["remote_port"]) == ("127.8.8.8", 53)
        assert event["recursion_desired"]
    assert [event["state"] for event in (alias, loop, vain)] == [*["answered"] * 2, "unanswered"]
    shown = [tuple(answer.values()) for answer in alias["answers"]]
    assert shown == [
        (r"www.a\.b\\c.TEST", "CNAME", 60, "xy.TEST"),
        ("xy.TEST", "A", 60, "192.0.2.1"),
    ]
    assert (alias["malformed"], alias["authoritative"]) == ("", True)
    assert loop["malformed"] == "a pointer that does not lead back"
    assert (loop["answers"], loop["answers_left_out"]) == ([], 1)
    assert (vain["response_code"], vain["message_bytes"]) == ("", 0)
    assert vain["latency_ns"] >= 10**9


@pytest.mark.parametrize("reader", READERS)
def test_names_that_are_secret_are_in_no_event(reader: ModuleType) -> None:
    (case, *_) = [one for one in CASES if one.event["event"] == "net.dns"]
    layouts = hiding(with_time(RECORDS), ["."])
    made = reader.Decoder(HEADER, layouts, constants(case.ring), f"{ID_PREFIX}-{case.ring}")
    event = made.decode(case.record)
    assert event.query == "<redacted:dns>"
    assert [answer.data for answer in event.answers] == ["<redacted:dns>", "192.0.2.1"]
    assert b"TEST" not in msgspec.json.encode(event)
