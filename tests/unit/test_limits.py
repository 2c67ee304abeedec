"""Limits to the last one: what is just allowed, what is just too much; and nothing left open."""

from __future__ import annotations

import binascii
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from streamer.config.settings import Settings
from streamer.events.kinds import RECORDS
from streamer.kernel.loader import Transport
from streamer.kernel.objects import KIND_NUMBERS
from streamer.kernel.state import KernelState, ProgramStatus, coverage, room_for_records
from streamer.privilege import files, proc, requests
from streamer.privilege.channel import MESSAGE_BYTES, MOST_DESCRIPTORS, Channel, MessageError
from streamer.privilege.files import MOST_KEPT, AppendTarget, DirectOpener, open_read, read_all
from streamer.privilege.requests import Refused, parse
from streamer.sinks.base import Watermarks
from tests.memory_kernel import MemoryPrograms


@contextmanager
def nothing_left_open() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) <= before


# ---------------------------------------------------------------- a sink's budget


def test_a_budget_is_full_at_its_mark_and_free_at_half() -> None:
    marks = Watermarks(100)
    assert not marks.add(99)
    assert marks.add(1)
    assert not marks.add(1)  # only what made it full
    assert not marks.remove(50)
    assert marks.remove(1)
    assert not marks.remove(1)
    assert marks.held == 49


# ---------------------------------------------------------------- requests to the helper


def request(name: str, /, **parameters: Any) -> dict[str, Any]:
    return {"id": 1, "request": name, **parameters}


def base64(size: int) -> str:
    return binascii.b2a_base64(bytes(size), newline=False).decode()


NAMED = {f"m{number}": 1 for number in range(requests.MOST_NAMED)}

JUST_ALLOWED = [
    request("proc", pid=1, name="stat"),
    request("proc", pid=requests.MOST_PID, name="stat"),
    request("open", index=0),
    request("open", index=requests.MOST_FILES),
    request("rotate", index=0, keep=1),
    request("rotate", index=0, keep=MOST_KEPT),
    request("load_core", rings={"bulk": requests.MOST_RING}, btf=None, transport="auto"),
    request("load", sensor="a" * 32, options=NAMED),
    request("load", sensor="net", options={"connections": requests.MOST_OPTION}),
    request("run_program", sensor="tc_classifier", program="walk_flows", repeat=1),
    request("run_program", sensor="tc_classifier", program="walk_flows", repeat=requests.MOST_RUNS),
    request("detach", sensor="a" * 32),
    request("delete", map="m" * 64, key=base64(requests.MOST_BYTES)),
    request("end") | {"id": 0},
    request("end") | {"id": (1 << 63) - 1},
]
TOO_MUCH = [
    (request("proc", pid=0, name="stat"), "proc: pid"),
    (request("proc", pid=requests.MOST_PID + 1, name="stat"), "proc: pid"),
    (request("open", index=-1), "open: index"),
    (request("open", index=requests.MOST_FILES + 1), "open: index"),
    (request("rotate", index=0, keep=0), "rotate: keep"),
    (request("rotate", index=0, keep=MOST_KEPT + 1), "rotate: keep"),
    (
        request("load_core", rings={"bulk": requests.MOST_RING + 1}, btf=None, transport="auto"),
        "load_core: rings",
    ),
    (request("load", sensor="a" * 33, options={}), "load: sensor"),
    (request("load", sensor="net", options=NAMED | {"more": 1}), "load: options"),
    (request("load", sensor="net", options={"c": requests.MOST_OPTION + 1}), "load: options"),
    (request("run_program", sensor="s", program="p", repeat=0), "run_program: repeat"),
    (
        request("run_program", sensor="s", program="p", repeat=requests.MOST_RUNS + 1),
        "run_program: repeat",
    ),
    (request("run_program", sensor="s", program="p", repeat=True), "run_program: repeat"),
    (request("run_program", sensor="s", program="p" * 65, repeat=1), "run_program: program"),
    (request("detach", sensor="a" * 33), "detach: sensor"),
    (request("delete", map="m" * 65, key=""), "delete: map"),
    (request("delete", map="m", key="A" * (2 * requests.MOST_BYTES + 1)), "delete: key"),
    (request("end") | {"id": -1}, "end: id"),
    (request("end") | {"id": 1 << 63}, "end: id"),
    (request("end", more=1), "end: parameters have to be none"),
    (request("open"), "open: parameters have to be index"),
]


@pytest.mark.parametrize("message", JUST_ALLOWED, ids=str)
def test_what_is_just_allowed(message: dict[str, Any]) -> None:
    assert parse(message).name == message["request"]


@pytest.mark.parametrize(("message", "what"), TOO_MUCH, ids=[what for _, what in TOO_MUCH])
def test_what_is_just_too_much(message: dict[str, Any], what: str) -> None:
    with pytest.raises(Refused, match=f"^{what}$"):
        parse(message)


# ---------------------------------------------------------------- messages


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MESSAGE_BYTES)
    one, other = (Channel(end, MOST_DESCRIPTORS) for end in ends)
    yield one, other
    one.close()
    other.close()


def message_of(size: int) -> dict[str, str]:
    return {"m": "x" * (size - len('{"m":""}'))}


def test_the_largest_message_and_one_byte_more(channels: tuple[Channel, Channel]) -> None:
    one, other = channels
    one.send(message_of(MESSAGE_BYTES))
    received = other.receive()
    assert received is not None
    assert received[0] == message_of(MESSAGE_BYTES)
    with pytest.raises(MessageError, match="bytes"):
        one.send(message_of(MESSAGE_BYTES + 1))


def test_the_most_descriptors_and_one_more(channels: tuple[Channel, Channel]) -> None:
    one, other = channels
    one.send({}, [0] * MOST_DESCRIPTORS)
    received = other.receive()
    assert received is not None
    assert len(received[1]) == MOST_DESCRIPTORS
    for fd in received[1]:
        os.close(fd)
    with pytest.raises(MessageError, match="descriptors"):
        one.send({}, [0] * (MOST_DESCRIPTORS + 1))


# ---------------------------------------------------------------- files


def test_a_file_is_made_with_the_mode_that_is_asked_for_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with nothing_left_open():
            file = DirectOpener().append(str(tmp_path / "made"), 0o664)
            os.close(file.open().fd)
            file.close()
    finally:
        os.umask(before)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o664


def test_descriptors_block(tmp_path: Path) -> None:
    """The writer waits for a slow device in a thread, and does not ask it again and again."""
    (tmp_path / "file").write_text("content")
    target = AppendTarget(str(tmp_path / "file"), 0o600)
    opened = [open_read(str(tmp_path / "file")), target.open().fd]
    target.close()
    assert [os.get_blocking(fd) for fd in opened] == [True, True]
    for fd in opened:
        os.close(fd)


@pytest.mark.parametrize(("content", "torn"), [("", False), ("a\n", False), ("a\nb", True)])
def test_a_file_that_ends_within_a_line(tmp_path: Path, content: str, torn: bool) -> None:
    (tmp_path / "file").write_text(content)
    with nothing_left_open():
        file = DirectOpener().append(str(tmp_path / "file"), 0o600)
        opened = file.open()
        os.close(opened.fd)
        file.close()
    assert opened.torn is torn


def test_the_largest_secret_and_one_byte_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "READ_MOST", 1000)
    with nothing_left_open():
        (tmp_path / "file").write_bytes(bytes(1000))
        assert len(read_all(open_read(str(tmp_path / "file")))) == 1000
        (tmp_path / "file").write_bytes(bytes(1001))
        with pytest.raises(OSError, match="File too large"):
            read_all(open_read(str(tmp_path / "file")))


@pytest.mark.parametrize(("size", "cut"), [(0, False), (63, False), (64, False), (65, True)])
def test_of_a_process_no_more_than_the_most_is_read(
    monkeypatch: pytest.MonkeyPatch, size: int, cut: bool
) -> None:
    monkeypatch.setattr(proc, "MOST_BYTES", 64)
    own, other = os.pipe()
    os.write(other, b"x" * size)
    os.close(other)
    assert proc._read(own) == proc.Found(b"x" * min(size, 64), cut)
    os.close(own)


def test_looking_up_leaves_nothing_open() -> None:
    with nothing_left_open():
        assert proc.look_up(os.getpid(), "comm").data


# ---------------------------------------------------------------- rings


def test_a_record_that_just_fits_its_ring_is_observed_in_full() -> None:
    largest = RECORDS[KIND_NUMBERS["process.fork"]].max_size
    for more, status in ((0, "full"), (-1, "partial")):
        rings = {"critical": largest + 16 + more, "bulk": 1 << 20}
        room = room_for_records(Transport("ring", rings))
        found = coverage(_attached("process"), {"process.fork"}, room)
        assert found["process.fork"].status == status


def test_a_record_that_just_fits_a_perf_buffer_is_observed_in_full() -> None:
    """The kernel's header and padding, and no more than a u16 can say of a sample."""
    largest = RECORDS[KIND_NUMBERS["process.exec"]].max_size
    for more, status in ((0, "full"), (-1, "partial")):
        room = room_for_records(Transport("perf", {"critical": largest + 20 + more}))
        found = coverage(_attached("process"), {"process.exec"}, room)
        assert found["process.exec"].status == status
    assert room_for_records(Transport("perf", {"bulk": 1 << 20})) == {"bulk": (1 << 16) - 20}


def _attached(sensor: str) -> list[ProgramStatus]:
    programs = MemoryPrograms()
    kernel = KernelState(programs, Settings())
    kernel.load(sensor)
    kernel.attach()
    statuses = kernel.statuses
    kernel.close()
    programs.release()
    return statuses
