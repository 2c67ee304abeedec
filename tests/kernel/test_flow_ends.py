"""net.flow: where ports are, who is the client, when a flow begins and ends, whose it is."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import Require
from tests.kernel.flows import CONFIG, FAR, FAR6, NEAR, NEAR6, Near, counts_of, difference, observe
from tests.kernel.pace import seconds
from tests.kernel.roles import Role, enter_netns
from tests.kernel.test_flows import PORT, ethernet, flows_of, fragment, ipv4, wait_for_marker
from tests.kernel.test_tracepoint_net import nstat

pytestmark = pytest.mark.kernel


@pytest.fixture(autouse=True)
def _ip(require: Require) -> None:
    require(shutil.which("ip"), "ip (iproute2) is not installed")


# ---------------------------------------------------------------- ports

PORTS = struct.pack("!HHHH", 5000, PORT, 16, 0) + bytes(8)
HOP_BY_HOP, ROUTING, AH, OPTIONS, UDP = 0, 43, 51, 60, 17
EXTENSIONS: dict[int, tuple[tuple[int, int], ...]] = {
    5001: ((HOP_BY_HOP, 8),),
    5002: ((OPTIONS, 24),),
    5003: ((HOP_BY_HOP, 8), (ROUTING, 24), (OPTIONS, 8)),
    5004: ((AH, 28),),
    5005: ((HOP_BY_HOP, 16), (AH, 12), (OPTIONS, 16)),
}
"""Headers between IPv6's and UDP's, with their sizes; by the port of the sender."""
WITH_PORTS = {33: "DCCP", 132: "SCTP", 136: "UDP-Lite"}
"""Protocols whose headers begin with ports as UDP's does."""


def behind(extensions: tuple[tuple[int, int], ...], port: int) -> bytes:
    """A frame with a datagram behind these headers."""
    following = [*(kind for kind, _ in extensions), UDP]
    data = b""
    for (kind, size), after in zip(extensions, following[1:], strict=True):
        # AH counts words of four bytes, without two of them; the others eight, without one.
        length = size // 4 - 2 if kind == AH else size // 8 - 1
        data += bytes([after, length]) + bytes(size - 2)
    data += struct.pack("!HHHH", port, PORT, 16, 0) + bytes(8)
    head = struct.pack("!IHBB", 6 << 28, len(data), following[0], 64)
    ends = socket.inet_pton(socket.AF_INET6, NEAR6) + socket.inet_pton(socket.AF_INET6, FAR6)
    return ethernet(0x86DD) + head + ends + data


TIMES = 2


def send_headers(near: Near) -> None:
    frames = {
        0x0800: [ethernet(0x0800) + ipv4(protocol, PORTS) for protocol in WITH_PORTS],
        0x86DD: [behind(extensions, port) for port, extensions in EXTENSIONS.items()],
    }
    for kind, those in frames.items():
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
            sender.bind(("veth1", kind))
            for frame in those * TIMES:
                sender.send(frame)
    near.settle()


def test_ports_are_found_behind_headers_of_every_kind(tmp_path: Path) -> None:
    seen = observe(tmp_path, send_headers)
    events = flows_of(seen)
    assert not any(event.ports_unknown for event in seen.recording.of("net.flow"))
    found = {(e.protocol, e.client_port): (e.client_packets, e.client_bytes) for e in events}
    sizes = {(protocol, 5000): 14 + 20 + 16 for protocol in WITH_PORTS}
    sizes |= {
        (UDP, port): 14 + 40 + sum(size for _, size in extensions) + 16
        for port, extensions in EXTENSIONS.items()
    }
    assert found == {key: (TIMES, TIMES * size) for key, size in sizes.items()}
    assert {event.server_port for event in events} == {PORT}
    assert len(events) == len(found)


def in_two_vlans(near: Near) -> None:
    """In the one the first fragment of a datagram, in the other a later one of the same number."""
    near.there(send_to_vlans).result()
    near.settle()


def send_to_vlans() -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
        sender.bind(("veth2", 0))
        for vlan, offset in ((5, 0), (6, 8), (5, 8)):
            head = b"\xff" * 6 + b"\x04" * 6 + struct.pack("!HHH", 0x8100, vlan, 0x0800)
            sender.send(head + fragment(1, offset, offset == 0)[14:])


def test_a_fragment_belongs_to_its_vlan(tmp_path: Path) -> None:
    """Addresses in another one are another's."""
    seen = observe(tmp_path, in_two_vlans)
    events = [event for event in seen.recording.of("net.flow") if event.protocol == UDP]
    found = {e.vlan_id: (e.ports_unknown, e.server_port, e.client_packets) for e in events}
    assert found == {5: (False, PORT, 2), 6: (True, 0, 1)}
    assert len(events) == 2


SOL_PACKET, PACKET_VNET_HDR = 263, 15
NEEDS_CHECKSUM, TCP_V4 = 1, 1
SEGMENT, PAYLOAD = 1000, 3500


def send_segments_together(near: Near) -> None:
    """As a virtual machine hands them over: how many segments they are is not said."""
    tcp = struct.pack("!HHIIBBHHH", 50_000, PORT, 1, 1, 5 << 4, 0x10, 1024, 0, 0)
    frame = ethernet(0x0800) + ipv4(6, tcp + bytes(PAYLOAD))
    head = struct.pack("=BBHHHH", NEEDS_CHECKSUM, TCP_V4, 14 + 20 + 20, SEGMENT, 14 + 20, 16)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
        sender.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        sender.bind(("veth1", 0x0800))
        sender.send(head + frame)
    near.settle()


def test_segments_of_which_nobody_has_said_how_many(tmp_path: Path) -> None:
    seen = observe(tmp_path, send_segments_together, together=True)
    (event,) = flows_of(seen)
    assert event.client_packets == 4
    assert event.client_bytes == PAYLOAD + 4 * (14 + 20 + 20)


# ---------------------------------------------------------------- filters


def send_to_two_services(near: Near) -> None:
    for own, port in ((5000, PORT), (5001, PORT + 1), (5002, PORT + 2)):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind((NEAR, own))
            sender.sendto(b"x", (FAR, port))
    near.settle()


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        (f"exclude_ports = [{PORT}, 5001]", {5001, 5002}),
        (f"ports = [{PORT}, 5001]", {5000, 5001}),
        (f"ports = [{PORT}, 5001]\nexclude_ports = [{PORT + 1}]", {5000}),
    ],
)
def test_filters_by_port(tmp_path: Path, filters: str, kept: set[int]) -> None:
    """What is left out goes by the port of the service: a client chooses its own."""
    seen = observe(tmp_path, send_to_two_services, config=f"{CONFIG}[filters]\n{filters}\n")
    events = [event for event in seen.recording.of("net.flow") if event.protocol == UDP]
    assert {event.client_port for event in events} == kept
    assert seen.recording.filtered("net.flow") >= 3 - len(kept)


# ---------------------------------------------------------------- who is the client

_before: list[tuple[socket.socket, Role]] = []
"""Connections that were made before the agent began, and who is at their other end."""
TOWARDS, FROM = PORT, PORT + 1
"""Of the one to this port the near end speaks first, of the one to that its far end."""


def connect_before(near: str, far: str) -> None:
    for port in (TOWARDS, FROM):
        role = Role("far", speak, far, port)
        wait_for_marker()
        _before.append((socket.create_connection((FAR, port), seconds(20)), role))


def speak(far: str, port: int) -> None:
    """Ten bytes, and when the near end has said the same, it closes."""
    enter_netns(far)
    with socket.create_server((FAR, port)) as listener:
        marker = Path(f"/tmp/streamer-flows-{os.getppid()}")
        marker.touch()
        connection, _ = listener.accept()
    with connection:
        if port == FROM:
            told = Path(f"{marker}-{port}")
            while not told.exists() and os.getppid() > 1:
                time.sleep(0.001)
            told.unlink()
            connection.sendall(bytes(10))
        assert len(connection.recv(10)) == 10
        if port == TOWARDS:
            connection.sendall(bytes(10))
        assert connection.recv(1) == b""


def go_on(near: Near) -> list[int]:
    """The ports of the near end, in order."""
    ports = []
    for connection, role in _before:
        ports.append(int(connection.getsockname()[1]))
        if connection.getpeername()[1] == FROM:
            Path(f"/tmp/streamer-flows-{os.getpid()}-{FROM}").touch()
            assert len(connection.recv(10)) == 10
            connection.sendall(bytes(10))
        else:
            connection.sendall(bytes(10))
            assert len(connection.recv(10)) == 10
        connection.shutdown(socket.SHUT_WR)  # the other role has a copy of the socket
        role.result()
        connection.close()
    return ports


def test_a_connection_from_before_the_agent(tmp_path: Path) -> None:
    """Nobody has seen its SYN: who has the lower port is the server, whoever speaks first."""
    seen = observe(tmp_path, go_on, prepare=connect_before)
    assert difference(counts_of(seen.recording.of("net.flow")), seen.witness) == {}
    events = [*flows_of(seen, TOWARDS), *flows_of(seen, FROM)]
    assert [event.client_port for event in events] == seen.result
    for event, port in zip(events, (TOWARDS, FROM), strict=True):
        assert (event.client_by, event.server_port, event.direction) == ("port", port, "outbound")
        assert (event.client_addr, event.server_addr) == (NEAR, FAR)
        assert event.handshake_ns == 0
    assert [sum(event.response_latencies) for event in events] == [1, 0]


# ---------------------------------------------------------------- when it begins, and ends


class Times(NamedTuple):
    """What the two who connected have seen: processes, and ns that connecting took."""

    pids: list[int]
    connecting: list[int]


def serve_late(address: str) -> None:
    """Take no connection before one has been refused room; then two of them, one by one."""
    with (
        socket.create_server((address, PORT), backlog=0) as listener,
        socket.create_connection((address, PORT)),  # takes the only place
    ):
        before = nstat("TcpExtListenDrops")
        Path(f"/tmp/streamer-flows-{os.getppid()}").touch()
        while nstat("TcpExtListenDrops") == before:
            time.sleep(0.001)
        listener.accept()[0].close()
        for _ in range(2):
            connection, _ = listener.accept()
            with connection:
                while data := connection.recv(100):
                    connection.sendall(data)


PAUSE = 2.5
"""Longer than a flow that has ended waits for its last packets."""


def connect_from_the_same(pause: float) -> tuple[int, int]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.bind((NEAR, 5000))
        begun = time.monotonic_ns()
        client.connect((FAR, PORT))
        taken = time.monotonic_ns() - begun
        for _ in range(2):
            client.sendall(b"x")
            assert client.recv(10) == b"x"
            time.sleep(pause)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(10) == b""
    return os.getpid(), taken


def connect_twice(near: Near) -> Times:
    """From the same port. The first one has to ask twice, and the second one is another's."""
    role = near.there(serve_late, FAR)
    wait_for_marker()
    first = connect_from_the_same(0)
    second = Role("second", connect_from_the_same, PAUSE).result()
    role.result()
    return Times([first[0], second[0]], [first[1], second[1]])


def test_what_is_new_of_the_next_connection_of_the_same_ports(tmp_path: Path) -> None:
    """All but the ports: its owner, its handshake, and that it goes on."""
    seen = observe(tmp_path, connect_twice)
    assert difference(counts_of(seen.recording.of("net.flow")), seen.witness) == {}
    first, second = [event for event in flows_of(seen) if event.client_port == 5000]
    assert [first.pid, second.pid] == seen.result.pids
    assert first.owner_known
    assert second.comm == "second"
    # From the first SYN, to which nobody answered.
    least = 900_000_000
    assert least <= first.handshake_ns <= seen.result.connecting[0]
    assert 0 < second.handshake_ns <= seen.result.connecting[1] < least
    assert [sum(event.response_latencies) for event in (first, second)] == [2, 2]
    assert second.last_boot_ns - second.first_boot_ns >= PAUSE * 10**9


def close_one_way(near: Near) -> None:
    role = near.there(answer_late, FAR)
    wait_for_marker()
    with socket.create_connection((FAR, PORT)) as connection:
        connection.sendall(b"?")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(10) == b"!"
        assert connection.recv(10) == b""
    role.result()


def answer_late(address: str) -> None:
    with socket.create_server((address, PORT)) as listener:
        Path(f"/tmp/streamer-flows-{os.getppid()}").touch()
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(10) == b"?"
            assert connection.recv(10) == b""
            time.sleep(PAUSE)
            connection.sendall(b"!")


def test_a_connection_that_is_closed_one_way_goes_on(tmp_path: Path) -> None:
    seen = observe(tmp_path, close_one_way)
    (event,) = flows_of(seen)
    assert event.client_by == "syn"
    assert event.last_boot_ns - event.first_boot_ns >= PAUSE * 10**9
    assert sum(event.response_latencies) == 1


BETWEEN = 0.5


def ask_in_two_parts(near: Near) -> int:
    """How long the answer took after the second part, in ns."""
    role = near.there(answer_whole, FAR)
    wait_for_marker()
    with socket.create_connection((FAR, PORT)) as connection:
        connection.sendall(bytes(100))
        time.sleep(BETWEEN)
        begun = time.monotonic_ns()
        connection.sendall(bytes(100))
        assert connection.recv(10) == b"!"
        taken = time.monotonic_ns() - begun
    role.result()
    return taken


def answer_whole(address: str) -> None:
    with socket.create_server((address, PORT)) as listener:
        Path(f"/tmp/streamer-flows-{os.getppid()}").touch()
        connection, _ = listener.accept()
        with connection:
            received = 0
            while received < 200:
                received += len(connection.recv(200))
            connection.sendall(b"!")


def test_the_time_of_an_answer_is_that_since_the_last_of_the_question(tmp_path: Path) -> None:
    seen = observe(tmp_path, ask_in_two_parts)
    (event,) = flows_of(seen)
    most = (seen.result // 1000).bit_length()
    assert sum(event.response_latencies[: most + 1]) == sum(event.response_latencies) == 1
