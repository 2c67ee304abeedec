"""net.flow: whose a connection is that comes in while accept() does not return.

Whoever accepts has the kernel write the address to memory that is not there. Until it is, the
connection has been taken, and is still whose the listener is; and the other end, which is in league
with him, sends.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from os import getpid
from pathlib import Path
from typing import NamedTuple, Self

import pytest

from tests.conftest import Require
from tests.kernel.flows import CONFIG, NEAR, Near, in_netns, observe
from tests.kernel.held_page import HeldPage
from tests.kernel.pace import seconds
from tests.kernel.roles import Role
from tests.kernel.system import WITHOUT_BTF, kernel_is, many_descriptors
from tests.kernel.test_flows import flows_of
from tests.kernel.test_net_drop_fuzz import checksum

pytestmark = pytest.mark.kernel

LISTENS, COMES_FROM = 6001, 5001
STRANGER = "192.0.2.9"
"""An address of nobody: no kernel answers what comes for it."""
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
WIDE = 65535
ROOM = 1024
"""The fewest connections that can be kept beside their sockets."""
FEW, MANY = 5, 70
"""Packets: fewer, and more, than the first ones at which an owner is looked for."""


@pytest.fixture(autouse=True)
def _ip(require: Require) -> None:
    require(shutil.which("ip"), "ip (iproute2) is not installed")


# ---------------------------------------------------------------- the other end


class Segment(NamedTuple):
    number: int
    acknowledged: int
    flags: int
    payload: bytes


class Stranger:
    """An end of a TCP connection to the listener, that sends what it likes."""

    def __init__(self, mac: bytes) -> None:
        self._device = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
        self._device.bind(("veth2", 0x0800))
        self._device.settimeout(seconds(20))
        self._mac = mac
        self.number, self.expected = 1000, 0

    def send(self, flags: int, payload: bytes = b"", window: int = WIDE, wrong: int = 0) -> None:
        """With a checksum that is not right if `wrong`."""
        words = (self.number, self.expected if flags & ACK else 0, 5 << 4, flags, window)
        ports = struct.pack("!HH", COMES_FROM, LISTENS)
        head, rest = ports + struct.pack("!IIBBH", *words), b"\0\0" + payload
        ends = socket.inet_aton(STRANGER) + socket.inet_aton(NEAR)
        size = len(head) + 2 + len(rest)
        found = checksum(ends + struct.pack("!HH", 6, size) + head + b"\0\0" + rest)
        packet = head + struct.pack("!H", found ^ wrong) + rest
        outer = struct.pack("!BBHHHBBH", 0x45, 0, 20 + size, 1, 0, 64, 6, 0) + ends
        outer = outer[:10] + struct.pack("!H", checksum(outer)) + outer[12:]
        self._device.send(self._mac + b"\2\0\0\0\0\x09\x08\0" + outer + packet)
        if not wrong:
            self.number += len(payload) + bool(flags & (SYN | FIN))

    def receive(self) -> Segment:
        """The next one for this end."""
        while True:
            data, (_, _, kind, *_) = self._device.recvfrom(65535)
            if kind != socket.PACKET_OUTGOING and data[30:34] == socket.inet_aton(STRANGER):
                start = 34 + (data[46] >> 4) * 4
                end = 14 + int.from_bytes(data[16:18], "big")
                number, acknowledged, flags = struct.unpack_from("!IIxB", data, 38)
                return Segment(number, acknowledged, flags, data[start:end])

    def connect(self, window: int) -> None:
        self.send(SYN, window=window)
        answer = self.receive()
        assert answer.flags == SYN | ACK
        self.expected = answer.number + 1
        self.send(ACK, window=window)

    def ask(self, count: int = FEW, window: int = WIDE) -> None:
        """So many bytes, each of which is acknowledged before the next."""
        for _ in range(count):
            self.send(ACK | PSH, b"?", window)
            while self.receive().acknowledged != self.number:
                pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._device.close()


# ---------------------------------------------------------------- how it goes on


class Course(NamedTuple):
    """What the other end does, and who has accepted, when accept() has returned at last."""

    there: Callable[[Stranger, socket.socket], None]
    here: Callable[[socket.socket, socket.socket], None]
    questions: int = FEW
    window: int = WIDE
    begins_by_an_answer: bool = False
    further: int = 0
    """How many more are accepted meanwhile, of another listener that is not its own either."""


def wait(other: socket.socket) -> None:
    assert other.recv(1) == b"."


def tell(other: socket.socket) -> None:
    other.sendall(b".")


def close(connection: socket.socket, other: socket.socket) -> None:
    assert connection.recv(2 * MANY)


def cut_off(connection: socket.socket, other: socket.socket) -> None:
    """What has come is not taken in, so the close is a reset."""


def answer_and_wait(connection: socket.socket, other: socket.socket) -> None:
    connection.sendall(b"!")
    wait(other)


def receive_and_wait(connection: socket.socket, other: socket.socket) -> None:
    tell(other)
    wait(other)


def answer_in_vain(connection: socket.socket, other: socket.socket) -> None:
    """As long as the other end takes nothing in, it stays here; and the socket is closed."""
    close(connection, other)
    connection.sendall(b"!")


def take_the_end(stranger: Stranger, other: socket.socket) -> None:
    while not stranger.receive().flags & (FIN | RST):
        pass


def reset(stranger: Stranger, other: socket.socket) -> None:
    while not stranger.receive().payload:
        pass
    stranger.send(RST)
    tell(other)


def ask_and_reset(stranger: Stranger, other: socket.socket) -> None:
    wait(other)
    stranger.ask()
    stranger.send(RST)
    tell(other)


def open_the_window(stranger: Stranger, other: socket.socket) -> None:
    wait(other)
    stranger.send(ACK)
    take_the_end(stranger, other)


COURSES = {
    "closed": Course(take_the_end, close, MANY),
    "cut off": Course(take_the_end, cut_off),
    "reset": Course(reset, answer_and_wait, MANY),
    "reset without an answer": Course(ask_and_reset, receive_and_wait),
    "sent after the close": Course(open_the_window, answer_in_vain, window=0),
    "begun by an answer": Course(reset, answer_and_wait, begins_by_an_answer=True),
}
WITHOUT_ROOM = Course(reset, answer_and_wait, further=ROOM + 1)


def be_stranger(other: socket.socket, mac: bytes, course: Course) -> None:
    with Stranger(mac) as stranger:
        if course.begins_by_an_answer:
            stranger.send(SYN | ACK, wrong=1)
        stranger.connect(course.window)
        wait(other)
        stranger.ask(course.questions, course.window)
        tell(other)
        course.there(stranger, other)


def accept_held_up(
    listener: socket.socket, full: socket.socket, other: socket.socket, course: Course
) -> int:
    page, found = HeldPage(), list[int]()
    accept4 = ctypes.CDLL(None).accept4
    places = (ctypes.c_void_p(page.address), ctypes.c_void_p(page.address + 64))
    thread = threading.Thread(
        target=lambda: found.append(accept4(listener.fileno(), *places, 0)), daemon=True
    )
    thread.start()
    page.wait()
    tell(other)
    wait(other)
    with further_connections(full, course.further):
        page.let_go()
        thread.join()
        with socket.socket(fileno=found[0]) as connection, suppress(ConnectionResetError):
            course.here(connection, other)
    tell(other)  # that it is closed
    return getpid()


@contextmanager
def further_connections(listener: socket.socket, count: int) -> Iterator[None]:
    with many_descriptors(), ExitStack() as held:
        for _ in range(count):
            held.enter_context(socket.create_connection(listener.getsockname()))
            held.enter_context(listener.accept()[0])
        yield


def accept_by_another(near: Near, course: Course) -> tuple[int, int]:
    """The pids of who listens, and of who accepts."""
    shown = subprocess.run(["ip", "-j", "link", "show", "veth1"], capture_output=True, check=True)
    mac = bytes.fromhex(json.loads(shown.stdout)[0]["address"].replace(":", ""))
    neighbour = ("lladdr", "02:00:00:00:00:09", "dev", "veth1")
    subprocess.run(["ip", "neighbour", "add", STRANGER, *neighbour], check=True)
    here, there = socket.socketpair()
    for end in (here, there):
        end.settimeout(seconds(20))
    with (
        here,
        there,
        socket.create_server((NEAR, LISTENS)) as listener,
        socket.create_server((NEAR, 0)) as full,
    ):
        accepting = Role("accepts", accept_held_up, listener, full, here, course)
        Role("far", in_netns, near.far, be_stranger, (there, mac, course)).result()
        accepts = accepting.result()
    near.settle()
    return getpid(), accepts


@pytest.mark.parametrize("name", COURSES)
def test_an_accept_that_does_not_return_gives_nobody_anothers_name(
    tmp_path: Path, name: str, require_kernel: Require
) -> None:
    """However it goes on from there."""
    kept = kernel_is(5, 11) and not WITHOUT_BTF
    require_kernel(kept or name != "cut off", "here nothing is kept with a socket")
    seen = observe(tmp_path, partial(accept_by_another, course=COURSES[name]))
    (event,) = flows_of(seen, LISTENS)
    listens, accepts = seen.result
    assert listens != accepts
    assert event.server_packets > COURSES[name].questions
    assert (event.owner_known, event.pid, event.comm) == (True, accepts, "accepts")


def test_an_owner_for_whom_there_is_no_room_gives_nobody_anothers_name(tmp_path: Path) -> None:
    config = f"{CONFIG}connections = {ROOM}\n"
    seen = observe(tmp_path, partial(accept_by_another, course=WITHOUT_ROOM), config)
    (event,) = flows_of(seen, LISTENS)
    assert event.server_packets > WITHOUT_ROOM.questions
    assert (event.owner_known, event.pid, event.comm) == (False, 0, "")
    assert seen.recording.heartbeat.faults["connections_full"] > 0
