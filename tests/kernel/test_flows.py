"""net.flow, compared with copies of the packets, and with what the test has sent."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import random
import re
import shutil
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from streamer.config.settings import Kernel, Rings, Settings
from streamer.errors import KernelError
from streamer.kernel import capabilities, state
from streamer.kernel.flows import KIND
from streamer.kernel.libbpf import Program, run_program
from streamer.kernel.loader import Loader
from streamer.kernel.objects import CONTRACT
from streamer.kernel.targets import targets_of
from streamer.kernel.traffic import Filter, TrafficFilters
from tests.conftest import Require
from tests.golden.make import drained
from tests.kernel import flow_reading
from tests.kernel.flows import (
    CONFIG,
    FAR,
    FAR6,
    NEAR,
    NEAR6,
    Near,
    Seen,
    counts_of,
    difference,
    enter_system,
    in_netns,
    ip,
    observe,
    run,
    tc,
)
from tests.kernel.pace import repetitions, seconds
from tests.kernel.packets import mutated
from tests.kernel.roles import Role, in_own_network, two_namespaces
from tests.kernel.scope import Scope, cgroup_mount
from tests.kernel.system import kernel_is
from tests.kernel.witness import bpftrace

pytestmark = pytest.mark.kernel

PORT = 7000
FAULTS = {name.removeprefix("FAULT_"): number for name, number, _ in CONTRACT["enum fault"]}


@pytest.fixture(autouse=True)
def _ip(require: Require) -> None:
    require(shutil.which("ip"), "ip (iproute2) is not installed")


def flows_of(seen: Seen, port: int = PORT) -> list[Any]:
    """The records of flows with that port."""
    return [
        event
        for event in seen.recording.of("net.flow")
        if port in (event.client_port, event.server_port)
    ]


# ---------------------------------------------------------------- traffic


def converse(address: str, requests: int, answer: int) -> str:
    """The client's end. Its address."""
    with socket.create_connection((address, PORT)) as connection:
        local: str = connection.getsockname()[0]
        for _ in range(requests):
            connection.sendall(bytes(100))
            received = 0
            while received < answer:
                received += len(connection.recv(answer))
    return local


def tcp(near: Near, address: str, requests: int, answer: int) -> None:
    role = near.there(serve_when_asked, address, requests, answer)
    connect_when_there(address, requests, answer)
    role.result()


def serve_when_asked(address: str, requests: int, size: int) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, PORT), family=family) as listener:
        Path(f"/tmp/streamer-flows-{os.getppid()}").touch()
        connection, _ = listener.accept()
        with connection:
            answer(connection, requests, size)


def answer(connection: socket.socket, requests: int, size: int) -> None:
    for _ in range(requests):
        received = 0
        while received < 100:
            received += len(connection.recv(100 - received))
        connection.sendall(bytes(size))
    assert connection.recv(1) == b""


def connect_when_there(address: str, requests: int, answer: int) -> None:
    wait_for_marker()
    converse(address, requests, answer)


def wait_for_marker() -> None:
    """Until the other process says that it is ready."""
    marker = Path(f"/tmp/streamer-flows-{os.getpid()}")
    while not marker.exists():
        time.sleep(0.001)
    marker.unlink()


def hold_port(address: str) -> None:
    """Take in datagrams, until told to end."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        receiver.bind((address, PORT))
        near = os.getppid()
        Path(f"/tmp/streamer-flows-{near}").touch()
        end = Path(f"/tmp/streamer-flows-{near}-end")
        while not end.exists() and os.getppid() == near:
            time.sleep(0.001)
        end.unlink()


@contextmanager
def bound(address: str, near: Near) -> Iterator[None]:
    """Somebody has the port at the far end, so that nothing is refused."""
    role = near.there(hold_port, address)
    wait_for_marker()
    try:
        yield
    finally:
        Path(f"/tmp/streamer-flows-{os.getpid()}-end").touch()
        role.result()


def two_conversations(near: Near) -> None:
    tcp(near, FAR, 20, 5000)
    tcp(near, FAR6, 3, 200_000)


def test_tcp(tmp_path: Path) -> None:
    """Packets and bytes of both directions, handshake, latencies, who began, how it ended."""
    seen = observe(tmp_path, two_conversations)
    assert difference(counts_of(seen.recording.of("net.flow")), seen.witness) == {}
    first, second = flows_of(seen)
    for event, near, far, requests in ((first, NEAR, FAR, 20), (second, NEAR6, FAR6, 3)):
        assert (event.client_addr, event.server_addr) == (near, far)
        assert (event.client_by, event.direction, event.server_port) == ("syn", "outbound", PORT)
        assert event.reason in ("end", "stop")
        assert event.ip_version == (6 if ":" in near else 4)
        assert event.interface == "veth1"
        assert event.netns == seen.netns
        assert event.client_tcp_flags & 0x17 == 0x13  # SYN, FIN, ACK, and no RST
        assert event.server_tcp_flags & 0x17 == 0x13
        assert sum(event.response_latencies) == requests
        assert 0 < event.handshake_ns < event.last_boot_ns - event.first_boot_ns
        assert event.client_packets == event.client_packets_total
    assert difference(counts_of(seen.recording.of("net.flow"), totals=True), seen.witness) == {}


def test_by_perf_buffers(tmp_path: Path) -> None:
    """The same records, those of the end among them."""
    seen = observe(tmp_path, two_conversations, config=f'{CONFIG}[rings]\ntransport = "perf"\n')
    assert seen.recording.manifest.transport == "perf"
    assert difference(counts_of(seen.recording.of("net.flow")), seen.witness) == {}
    assert len(flows_of(seen)) == 2


def test_inbound(tmp_path: Path) -> None:
    """A service at the near end: the client is the far one."""
    seen = observe(tmp_path, answer_to_far)
    assert difference(counts_of(seen.recording.of("net.flow")), seen.witness) == {}
    (event,) = flows_of(seen)
    assert (event.client_addr, event.server_addr) == (FAR, NEAR)
    assert (event.client_by, event.direction) == ("syn", "inbound")
    assert sum(event.response_latencies) == 7


def answer_to_far(near: Near) -> None:
    with socket.create_server((NEAR, PORT)) as listener:
        role = near.there(converse, NEAR, 7, 1000)
        connection, _ = listener.accept()
        with connection:
            answer(connection, 7, 1000)
        role.result()


def send_datagrams(source: tuple[str, int], to: tuple[str, int], sizes: tuple[int, ...]) -> None:
    family = socket.AF_INET6 if ":" in to[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sender.bind(source)
        for size in sizes:
            sender.sendto(bytes(size), to)


SIZES = (0, 1, 100, 1400)
LARGE = (5000, 20_000, 9000)
"""More than a packet holds: they become fragments."""


def datagrams(near: Near) -> None:
    for ours, theirs in ((NEAR, FAR), (NEAR6, FAR6)):
        with bound(theirs, near):
            send_datagrams((ours, 5000), (theirs, PORT), SIZES)
            near.there(send_datagrams, (theirs, PORT), (ours, 5000), LARGE).result()
            send_datagrams((ours, 5000), (theirs, PORT), LARGE)
    near.settle()


def test_datagrams_and_fragments(tmp_path: Path) -> None:
    """Later fragments have no ports, and are in their flow all the same."""
    seen = observe(tmp_path, datagrams)
    assert difference(counts_of(seen.recording.of("net.flow")), seen.witness) == {}
    four, six = flows_of(seen)
    for event, ours, headers in ((four, NEAR, 42), (six, NEAR6, 62)):
        assert (event.client_addr, event.client_port) == (ours, 5000)
        assert (event.protocol, event.client_by, event.reason) == (17, "packet", "stop")
        assert not event.ports_unknown
        assert event.client_packets > len(SIZES) + len(LARGE)
        assert event.client_bytes > sum(SIZES + LARGE) + headers * len(SIZES)
    assert not any(event.ports_unknown for event in seen.recording.of("net.flow"))


PINGS = 30
PADDING = 555
"""Bytes that each ping carries, so that bpftrace knows it by its length."""
THEIRS = """
tracepoint:net:netif_receive_skb /str(args->name) == "veth1"/ { @in[args->len] = count(); }
tracepoint:net:net_dev_queue /str(args->name) == "veth1"/ { @out[args->len] = count(); }
"""
"""What comes in, without the Ethernet header; what goes out, with it."""


def ping_both(near: Near) -> str:
    with bpftrace(THEIRS, near.agent.output.parent / "bpftrace") as ended:
        for address in (FAR, FAR6):
            run("ping", "-q", "-c", str(PINGS), "-i", "0.01", "-s", str(PADDING), address)
        near.settle()
        return ended()


def test_pings_and_bpftrace(tmp_path: Path, require: Require) -> None:
    """A flow of each protocol, with as many packets each way as ping sent and bpftrace has seen."""
    for tool in ("ping", "bpftrace"):
        require(shutil.which(tool), f"{tool} is not installed")
    seen = observe(tmp_path, ping_both)
    flows = {
        one.protocol: one
        for one in seen.recording.of("net.flow")
        if {one.client_addr, one.server_addr} in ({NEAR, FAR}, {NEAR6, FAR6})
    }
    for protocol, header in ((1, 20), (58, 40)):
        size = header + 8 + PADDING
        assert f"@in[{size}]: {PINGS}\n" in seen.result
        assert f"@out[{size + 14}]: {PINGS}\n" in seen.result
        one = flows[protocol]
        if protocol == 1:  # the kernel has more to say by ICMPv6
            assert (one.client_packets, one.server_packets) == (PINGS, PINGS)
            assert one.client_bytes == one.server_bytes == PINGS * (size + 14)
        assert min(one.client_packets, one.server_packets) >= PINGS


def test_fragments_without_the_first(tmp_path: Path) -> None:
    """They are a flow of their own, which says that its ports are not known."""
    seen = observe(tmp_path, later_fragments)
    unknown, known = sorted(
        (one for one in seen.recording.of("net.flow") if one.protocol == 17),
        key=lambda event: event.client_port,
    )
    assert (unknown.ports_unknown, unknown.client_port, unknown.server_port) == (True, 0, 0)
    assert unknown.client_packets == 3
    assert unknown.client_bytes == 3 * (14 + 20 + 16)
    assert (known.ports_unknown, known.client_packets, known.server_port) == (False, 2, PORT)


def later_fragments(near: Near) -> None:
    with packet_socket() as sender:
        for identity in (1, 2, 3):
            sender.send(fragment(identity, 8, False))
        sender.send(fragment(9, 0, True))
        sender.send(fragment(9, 16, False))


REMEMBERED = 4096
"""First fragments of which the ports are kept."""
FRAGMENTED = 3 * REMEMBERED


def more_fragments_than_are_remembered(near: Near) -> None:
    """All the first ones before the others."""
    with packet_socket() as sender:
        for identity in range(FRAGMENTED):
            sender.send(fragment(identity, 0, True))
        for identity in range(FRAGMENTED):
            sender.send(fragment(identity, 16, False))
    near.settle()


def test_more_fragments_at_once_than_are_remembered(tmp_path: Path) -> None:
    """Those of which the ports were pushed out say so: none is missing, and none in two flows."""
    seen = observe(tmp_path, more_fragments_than_are_remembered)
    assert seen.recording.losses == []
    assert seen.recording.heartbeat.faults == {}
    unknown, known = sorted(
        (one for one in seen.recording.of("net.flow") if one.protocol == 17),
        key=lambda event: event.client_port,
    )
    assert (unknown.ports_unknown, known.ports_unknown) == (True, False)
    assert unknown.client_packets + known.client_packets == 2 * FRAGMENTED
    assert FRAGMENTED - REMEMBERED <= unknown.client_packets <= FRAGMENTED


def packet_socket() -> socket.socket:
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
    made.bind(("veth1", 0x0800))
    return made


def fragment(identity: int, offset: int, more: bool) -> bytes:
    """16 bytes of a datagram, from the near end."""
    payload = struct.pack("!HHHH", 5000, PORT, 24, 0) + bytes(8) if offset == 0 else bytes(16)
    word = (offset // 8) | (0x2000 if more else 0)
    return ethernet(0x0800) + ipv4(17, payload, identity, word)


def ethernet(kind: int) -> bytes:
    return b"\x02" * 6 + b"\x04" * 6 + kind.to_bytes(2, "big")


def ipv4(protocol: int, payload: bytes, identity: int = 0, word: int = 0) -> bytes:
    ends = socket.inet_aton(NEAR) + socket.inet_aton(FAR)
    size = 20 + len(payload)
    return struct.pack("!BBHHHBBH", 0x45, 0, size, identity, word, 64, protocol, 0) + ends + payload


TAGS = {(): (0, 0), (5,): (5, 0), (5, 6): (5, 6)}


def test_vlans(tmp_path: Path) -> None:
    """The same endpoints in another VLAN are another flow."""
    seen = observe(tmp_path, in_vlans)
    assert difference(counts_of(seen.recording.of("net.flow")), seen.witness) == {}
    found = {(one.vlan_id, one.inner_vlan_id): one for one in flows_of(seen)}
    assert found.keys() == set(TAGS.values())
    assert [one.client_packets for one in found.values()] == [3, 3, 3]
    bare = 14 + 20 + 16
    # The outer tag is kept apart by the kernel, the inner one is in the frame.
    sizes = {tags: one.client_bytes for tags, one in found.items()}
    assert sizes == {(0, 0): 3 * bare, (5, 0): 3 * bare, (5, 6): 3 * (bare + 4)}


def in_vlans(near: Near) -> None:
    near.there(send_tagged).result()
    near.settle()


def send_tagged() -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
        sender.bind(("veth2", 0))
        for tags in TAGS:
            kinds = [0x88A8, 0x8100][2 - len(tags) :]
            marks = b"".join(struct.pack("!HH", k, t) for k, t in zip(kinds, tags, strict=True))
            payload = struct.pack("!HHHH", 5000, PORT, 16, 0) + bytes(8)
            frame = b"\xff" * 6 + b"\x04" * 6 + marks + b"\x08\x00" + ipv4(17, payload)
            for _ in range(3):
                sender.send(frame)


def test_loopback(tmp_path: Path) -> None:
    """There a packet goes out and comes in: it is counted once."""
    seen = observe(tmp_path, talk_to_itself, interfaces=("lo",))
    assert difference(counts_of(seen.recording.of("net.flow")), seen.witness) == {}
    (event,) = flows_of(seen)
    assert (event.interface, sum(event.response_latencies)) == ("lo", 5)


def talk_to_itself(near: Near) -> None:
    role = Role("server", serve_when_asked, "127.0.0.1", 5, 3000)
    connect_when_there("127.0.0.1", 5, 3000)
    role.result()


MALFORMED = {
    "ends within the header": ipv4(17, b"")[:13],
    "another version": b"\x65" + ipv4(17, bytes(8))[1:],
    "a header of 16 bytes": b"\x44" + ipv4(17, bytes(8))[1:],
    "shorter than its header": ipv4(17, b"")[:2] + b"\0\x13" + ipv4(17, b"")[4:],
}


def send_malformed(near: Near) -> None:
    near.there(send_from_far, [ethernet(0x0800) + data for data in MALFORMED.values()]).result()
    near.there(send_from_far, [b"\xff" * 6 + ethernet(0x86DD)[6:] + b"\x60" + bytes(38)]).result()
    near.settle()


def send_from_far(frames: list[bytes]) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
        sender.bind(("veth2", 0))
        for frame in frames:
            sender.send(frame)


def test_malformed_packets_are_counted(tmp_path: Path) -> None:
    """They are in no flow, and nothing else of them is wrong."""
    seen = observe(tmp_path, send_malformed)
    assert seen.recording.heartbeat.faults == {"packet_malformed": len(MALFORMED) + 1}
    assert [one for one in seen.recording.of("net.flow") if one.protocol != 58] == []


# ---------------------------------------------------------------- packets kept together

SIOCETHTOOL, ETHTOOL_STSO = 0x8946, 0x1F
TRANSFER = 3_000_000
ETHERNET, SEGMENT_HEADERS = 14, 14 + 20 + 32  # with the timestamps that Linux puts there


def segment_late(near: str, far: str) -> None:
    """Behind the programs, but before the witness: without the help of the device."""
    value = ctypes.create_string_buffer(struct.pack("II", ETHTOOL_STSO, 0))
    request = struct.pack("16sP16x", b"veth1", ctypes.addressof(value))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCETHTOOL, request)


def receive_all(address: str) -> None:
    with socket.create_server((address, PORT)) as listener:
        Path(f"/tmp/streamer-flows-{os.getppid()}").touch()
        connection, _ = listener.accept()
        with connection:
            while connection.recv(1 << 16):
                pass


def send_much(address: str) -> int:
    """Segments with data, those that were sent again among them."""
    with socket.create_connection((address, PORT)) as connection:
        connection.sendall(bytes(TRANSFER))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
    segments: int = struct.unpack_from("I", info, 156)[0]  # tcpi_data_segs_out
    return segments


def much_out(near: Near) -> int:
    role = near.there(receive_all, FAR)
    wait_for_marker()
    segments = send_much(FAR)
    role.result()
    return segments


def much_in(near: Near) -> int:
    with socket.create_server((NEAR, PORT)) as listener:
        role = near.there(send_much, NEAR)
        connection, _ = listener.accept()
        with connection:
            while connection.recv(1 << 16):
                pass
        return int(role.result())


def test_segments_that_leave_together_are_counted_one_by_one(tmp_path: Path) -> None:
    """The programs see what the kernel cuts up behind them, and the witness the pieces."""
    seen = observe(tmp_path, much_out, prepare=segment_late, together=True)
    assert difference(counts_of(seen.recording.of("net.flow")), seen.witness) == {}
    (event,) = flows_of(seen)
    assert event.client_packets >= seen.result > TRANSFER // 1500
    assert max(len(frame) for frame in seen.frames) <= 1514


def test_segments_that_come_together_are_counted_one_by_one(tmp_path: Path) -> None:
    """They are not cut up at all: how many there were knows only who has sent them."""
    seen = observe(tmp_path, much_in, together=True)
    (event,) = flows_of(seen)
    ours = [frame for frame in seen.frames if frame[26:30] == socket.inet_aton(FAR)]
    data = [
        frame
        for frame in ours
        if len(frame) > ETHERNET + (frame[16] << 8 | frame[17])
        or (frame[16] << 8 | frame[17]) > 20 + 4 * (frame[46] >> 4)
    ]
    assert len(data) < seen.result  # they came together
    assert event.client_packets == len(ours) - len(data) + seen.result
    more = SEGMENT_HEADERS * (seen.result - len(data))
    assert event.client_bytes == sum(map(len, ours)) + more


# ---------------------------------------------------------------- time


class Asked(NamedTuple):
    """How long things took, in ns, for who connected and asked."""

    connect: int
    answers: list[int]


THOUGHT = 0.02


def ask_slowly(near: Near) -> Asked:
    role = near.there(answer_slowly, FAR, 6)
    wait_for_marker()
    begun = time.monotonic_ns()
    with socket.create_connection((FAR, PORT)) as connection:
        connected = time.monotonic_ns() - begun
        answers = []
        for _ in range(6):
            begun = time.monotonic_ns()
            connection.sendall(bytes(100))
            assert len(connection.recv(10)) == 10
            answers.append(time.monotonic_ns() - begun)
    role.result()
    return Asked(connected, answers)


def answer_slowly(address: str, requests: int) -> None:
    with socket.create_server((address, PORT)) as listener:
        Path(f"/tmp/streamer-flows-{os.getppid()}").touch()
        connection, _ = listener.accept()
        with connection:
            for _ in range(requests):
                assert len(connection.recv(100)) == 100
                time.sleep(THOUGHT)
                connection.sendall(bytes(10))


def test_handshake_and_answers_take_their_time(tmp_path: Path) -> None:
    """Not less than the server took, and not more than the client had to wait."""
    seen = observe(tmp_path, ask_slowly)
    (event,) = flows_of(seen)
    assert 0 < event.handshake_ns <= seen.result.connect
    counts = event.response_latencies
    assert sum(counts) == 6
    assert not any(counts[: int(THOUGHT * 1e6).bit_length()])
    for most in range(len(counts)):
        waited = sum((ns // 1000).bit_length() <= most for ns in seen.result.answers)
        assert sum(counts[: most + 1]) >= waited


def test_answers_below_the_resolution_are_not_told_apart(tmp_path: Path) -> None:
    """All of them are in the class that the resolution is in."""
    config = f"{CONFIG}[timing]\nresolution_us = 1000000\n"
    seen = observe(tmp_path, ask_slowly, config=config)
    (event,) = flows_of(seen)
    counts = [0] * len(event.response_latencies)
    counts[(1_000_000).bit_length()] = 6
    assert event.response_latencies == tuple(counts)
    assert event.handshake_ns == 10**9


# ---------------------------------------------------------------- owners

LISTENS, REPLIES, SILENT = 6001, 6000, 6002


class Owner(NamedTuple):
    pid: int
    cgroup: int


def owners(near: Near) -> dict[str, Owner]:
    """Conversations of several processes; whose the local socket is."""
    mount = cgroup_mount()
    assert mount is not None
    own = Owner(os.getpid(), 0)
    found = {"client": own, "sender": own, "replies": own}
    tcp(near, FAR, 2, 100)
    with bound(FAR, near), Scope(mount) as scope:
        send_datagrams((NEAR, 5000), (FAR, PORT), (1,))
        found["connected"] = Owner(scope.act(send_connected), scope.id)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((NEAR, REPLIES))
        role = near.there(ask_by_datagram, REPLIES)
        question, who = server.recvfrom(10)
        server.sendto(question, who)
        role.result()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind((NEAR, SILENT))
        near.there(send_datagrams, (FAR, 5002), (NEAR, SILENT), (1,)).result()
    with socket.create_server((NEAR, LISTENS)) as listener:
        accepting = Role("accepts", accept_one, listener)
        near.there(ask_by_connection).result()
        found["accepts"] = Owner(accepting.result(), 0)
    near.settle()
    return found


def send_connected() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind((NEAR, 5001))
        sender.connect((FAR, PORT))
        sender.send(b"x")
    return os.getpid()


def ask_by_datagram(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind((FAR, 5003))
        sender.sendto(b"?", (NEAR, port))
        assert sender.recv(10) == b"?"


def accept_one(listener: socket.socket) -> int:
    """In another process than the one that listens."""
    connection, _ = listener.accept()
    with connection:
        for _ in range(3):
            connection.sendall(connection.recv(10))
        assert connection.recv(1) == b""
    return os.getpid()


def ask_by_connection() -> None:
    with socket.create_connection((NEAR, LISTENS)) as connection:
        for _ in range(3):
            connection.sendall(b"?")
            assert connection.recv(10) == b"?"


def test_owners_of_local_sockets(tmp_path: Path) -> None:
    """Process and cgroup, from the first datagram on; of a connection who has accepted it."""
    seen = observe(tmp_path, owners)
    names = {
        (6, PORT): "client",
        (17, 5000): "sender",
        (17, 5001): "connected",
        (17, 5003): "replies",
        (17, 5002): "",
        (6, LISTENS): "accepts",
    }
    found = {}
    for event in seen.recording.of("net.flow"):
        for port in (event.client_port, event.server_port):
            if (event.protocol, port) in names:
                found[names[event.protocol, port]] = event
    assert found.keys() == set(names.values())
    assert not found.pop("").owner_known  # nothing ever came out of that socket
    for name, event in found.items():
        assert (name, event.owner_known, event.pid) == (name, True, seen.result[name].pid)
    assert found["connected"].cgroup_id == seen.result["connected"].cgroup
    assert found["accepts"].comm == "accepts"


MANY = 80
"""More than the packets at each of which an owner is looked for."""


def segments(connection: socket.socket) -> tuple[int, int]:
    """Sent and received, as the kernel counts them: tcpi_segs_out and tcpi_segs_in."""
    found = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 144)
    sent, received = struct.unpack_from("=II", found, 136)
    return sent, received


def until(done: Callable[[], bool], act: Callable[[], Any]) -> None:
    """Act again and again, for a minute at most."""
    end = time.monotonic() + seconds(60)
    while not done():
        assert time.monotonic() < end
        act()
        time.sleep(0.0005)  # a packet each


def send_until_acknowledged() -> None:
    """Long before anybody has accepted it; then take in as many bytes, one by one."""
    with socket.create_connection((NEAR, LISTENS)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        until(lambda: segments(connection)[1] >= MANY, lambda: connection.send(b"?"))
        Path(f"/tmp/streamer-flows-{os.getppid()}").touch()
        while connection.recv(1):
            pass


def accept_late(near: Near) -> int:
    with socket.create_server((NEAR, LISTENS)) as listener:
        role = near.there(send_until_acknowledged)
        wait_for_marker()
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.recv(1 << 20)
            before, _ = segments(connection)
            enough = before + 2 * MANY
            until(lambda: segments(connection)[0] >= enough, lambda: connection.send(b"!"))
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 20):
                pass
        role.result()
    near.settle()
    return os.getpid()


def test_who_accepts_late_is_the_owner(tmp_path: Path) -> None:
    """After more packets that nobody owned than are looked at one by one."""
    seen = observe(tmp_path, accept_late)
    (event,) = flows_of(seen, LISTENS)
    assert event.server_packets >= 3 * MANY
    assert (event.owner_known, event.pid) == (True, seen.result)


# ---------------------------------------------------------------- records


SIZE_OF_FIFTY = 14 + 20 + 8 + 50
"""Of a frame with as many bytes of payload."""


def slowly(near: Near) -> None:
    with bound(FAR, near), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind((NEAR, 5000))
        for _ in range(12):
            sender.sendto(bytes(50), (FAR, PORT))
            time.sleep(seconds(0.4))
        time.sleep(seconds(5))
        sender.sendto(bytes(50), (FAR, PORT))


def test_flows_that_go_on_and_that_are_idle(tmp_path: Path) -> None:
    """Of one that goes on there are records with what was new; one that is idle is forgotten."""
    idle, active = seconds(2.5), seconds(1.2)
    config = f"[kernel]\nflow_idle_seconds = {idle}\nflow_active_seconds = {active}\n"
    seen = observe(tmp_path, slowly, config=config)
    events = flows_of(seen)
    assert sum(event.client_packets for event in events) == 13
    reasons = [event.reason for event in events]
    assert reasons[-1] == "stop"
    assert "idle" in reasons
    first = reasons.index("idle")
    assert set(reasons[:first]) == {"active"}
    assert 2 <= first <= 8
    total = 0
    for event in events[: first + 1]:
        total += event.client_packets
        assert event.client_packets_total == total
        assert event.client_bytes == event.client_packets * SIZE_OF_FIFTY
        assert event.client_bytes_total == total * SIZE_OF_FIFTY
    assert total == 12
    assert events[-1].client_packets_total == 1  # a flow of its own


def reconnect(near: Near) -> None:
    """Twice from the same port."""
    for _ in range(2):
        role = near.there(serve_when_asked, FAR, 1, 10)
        wait_for_marker()
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.bind((NEAR, 5000))
            client.connect((FAR, PORT))
            client.sendall(bytes(100))
            assert len(client.recv(10)) == 10
            client.shutdown(socket.SHUT_WR)
            role.result()


def test_the_next_connection_of_the_same_ports(tmp_path: Path) -> None:
    """It is another flow, with a handshake of its own."""
    seen = observe(tmp_path, reconnect)
    assert difference(counts_of(seen.recording.of("net.flow")), seen.witness) == {}
    events = [event for event in flows_of(seen) if event.client_port == 5000]
    assert [event.client_by for event in events] == ["syn", "syn"]
    assert events[0].reason == "end"
    assert all(event.handshake_ns for event in events)
    assert all(sum(event.response_latencies) == 1 for event in events)


def fill(one: socket.socket) -> None:
    """Leave no room for anything to be kept with the socket (net.core.optmem_max)."""
    index = struct.pack("=I", socket.if_nametoindex("lo"))
    with suppress(OSError):
        for number in range(1 << 16):
            group = socket.inet_pton(socket.AF_INET6, f"ff02::1:{number:x}")
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group + index)
        raise AssertionError("there is room for every group")


def send_without_room(near: Near) -> int:
    """How many datagrams: each of them is one for which there is no room."""
    with bound(FAR6, near), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
        sender.bind((NEAR6, 5000))
        fill(sender)
        for size in SIZES:
            sender.sendto(bytes(size), (FAR6, PORT))
    near.settle()
    return len(SIZES)


def test_a_socket_without_room_for_its_owner(tmp_path: Path, cgroups: Path) -> None:
    """Its packets are counted, as nobody's, and that it was so."""
    seen = observe(tmp_path, send_without_room)
    assert difference(counts_of(seen.recording.of("net.flow")), seen.witness) == {}
    (event,) = [event for event in flows_of(seen) if event.client_port == 5000]
    assert not event.owner_known
    assert seen.recording.heartbeat.faults == {"socket_storage": seen.result}


# ---------------------------------------------------------------- many


SCANNED = repetitions(65_535, 3000)


def scan(near: Near) -> int:
    """Every port of the far end, and in between a few packets of one flow that goes on."""
    kept = 0
    with bound(FAR, near), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as alive:
        alive.bind((NEAR, 5000))
        for port in range(1, SCANNED + 1):
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as one:
                assert one.connect_ex((FAR, port)) == errno.ECONNREFUSED
            if port % 16 == 0:
                alive.sendto(b"x", (FAR, PORT))
                kept += 1
    return kept


def test_a_scan_of_every_port_with_a_small_table(tmp_path: Path) -> None:
    """Every packet is in a record; who makes way is the one that is idle for longest."""
    seen = observe(tmp_path, scan, config=f"{CONFIG}flows = 64\n[rings]\nbulk_bytes = 67108864\n")
    assert seen.recording.losses == []
    events = seen.recording.of("net.flow")
    assert difference(counts_of(events), seen.witness) == {}
    assert seen.recording.heartbeat.faults.get("flows_full", 0) == 0
    (kept,) = [e for e in events if (e.protocol, e.client_port) == (17, 5000)]
    assert (kept.reason, kept.client_packets) == ("stop", seen.result)
    scanned = [event for event in events if event.protocol == 6]
    assert {event.server_port for event in scanned} == set(range(1, SCANNED + 1))
    assert all((event.client_packets, event.server_packets) == (1, 1) for event in scanned)
    # Refused, and then made way; but for those that are still there when the agent ends.
    reasons = Counter(event.reason for event in scanned)
    assert set(reasons) <= {"end", "stop"}
    assert reasons["stop"] <= 64


OTHERS = 600


def one_after_the_other(near: Near) -> None:
    """A datagram of each of so many flows, and now and then one of the flow that goes on."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with bound(FAR, near), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as alive:
        alive.bind((NEAR, 5000))
        for number in range(OTHERS):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
                one.bind((NEAR, 10_000 + number))
                one.sendto(b"x", (FAR, PORT))
            if number % 8 == 0:
                alive.sendto(b"x", (FAR, PORT))


def test_who_is_idle_for_longest_makes_way(tmp_path: Path) -> None:
    """As nearly as a choice of sixteen slots finds it: nobody who is among the newest third."""
    table = 64
    seen = observe(tmp_path, one_after_the_other, config=f"{CONFIG}flows = {table}\n")
    events = flows_of(seen)
    assert difference(counts_of(events), seen.witness) == {}
    evicted = [event.client_port for event in events if event.reason == "evicted"]
    assert len(evicted) >= OTHERS - table
    assert 5000 not in evicted
    # How many came after it: each made room for the next one.
    age = [table + gone - (port - 10_000) for gone, port in enumerate(evicted)]
    assert min(age) > table / 3


def flood(source: str, to: str, count: int, cpu: int, seed: int) -> None:
    """Packets of a hundred flows, one after the other at random."""
    os.sched_setaffinity(0, {cpu})
    chosen = random.Random(seed)
    frames = [(own, other) for own in range(5000, 5010) for other in range(PORT, PORT + 10)]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as sender:
        sender.bind((source, 0))
        for _ in range(count):
            own, other = chosen.choice(frames)
            low, high = (own, other) if source == NEAR else (other, own)
            sender.sendto(struct.pack("!HHHH", low, high, 8, 0), (to, 0))


FLOOD = repetitions(60_000, 3000)


def from_both_ends(near: Near) -> None:
    first, *_, last = sorted(os.sched_getaffinity(0))
    role = near.there(flood, FAR, NEAR, FLOOD, last, 1)
    flood(NEAR, FAR, FLOOD, first, 2)
    role.result()
    near.settle()


@pytest.mark.parametrize("flows", [64, 1024])
def test_two_processors_at_the_same_flows(tmp_path: Path, flows: int) -> None:
    """Flows are made, counted, reported and evicted on both at once: not a packet is missed."""
    config = f"[kernel]\nflow_idle_seconds = 1000\nflow_active_seconds = 1\nflows = {flows}\n"
    config += "[rings]\nbulk_bytes = 134217728\n"
    seen = observe(tmp_path, from_both_ends, config=config)
    assert seen.recording.losses == []
    events = seen.recording.of("net.flow")
    assert difference(counts_of(events), seen.witness) == {}
    evicted = sum(event.reason == "evicted" for event in events)
    assert seen.recording.heartbeat.faults == ({"flows_evicted": evicted} if evicted else {})
    ours = [event for event in events if event.protocol == 17]
    assert sum(event.client_packets + event.server_packets for event in ours) == 2 * FLOOD
    assert any(event.reason == "evicted" for event in ours) == (flows == 64)


# ---------------------------------------------------------------- interfaces


def take_away(near: Near) -> None:
    with bound(FAR, near):
        send_datagrams((NEAR, 5000), (FAR, PORT), SIZES)
    ip("link", "delete", "veth1")
    near.agent.wait_for(b'"reason":"gone"')
    near.agent.wait_for(b'{"event":"stream.manifest"', 2)


def test_an_interface_that_goes_away(tmp_path: Path) -> None:
    """Its flows are reported, and that it is observed no more."""
    seen = observe(tmp_path, take_away)
    (event,) = flows_of(seen)
    assert (event.reason, event.client_packets) == ("gone", 4)
    before, after = seen.recording.of("stream.manifest")
    assert before.coverage["net.flow"].status != "missing"
    assert after.coverage["net.flow"].status == "missing"
    assert "veth1: No such device" in after.coverage["net.flow"].reason
    assert "net.flow is not observed" in seen.recording.stderr


@contextmanager
def behind(near: Near) -> Iterator[str]:
    """Another namespace, whose packets come through this one: in at `veth3`, out at `veth1`."""
    name = f"streamer-test-{os.getpid()}-3"
    ip("netns", "add", name)
    try:
        ip("link", "add", "veth3", "type", "veth", "peer", "name", "veth4", "netns", name)
        ip("link", "set", "veth3", "gso_max_segs", "1", "up")
        ip("-n", name, "link", "set", "veth4", "gso_max_segs", "1", "up")
        ip("address", "add", "198.51.100.1/24", "dev", "veth3")
        ip("-n", name, "address", "add", "198.51.100.2/24", "dev", "veth4")
        ip("-n", name, "route", "add", "default", "via", "198.51.100.1")
        ip("-n", near.far, "route", "add", "198.51.100.0/24", "via", NEAR)
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        yield name
    finally:
        ip("netns", "delete", name)


def pass_through(near: Near) -> None:
    with behind(near) as name:
        near.agent.wait_for(b'{"event":"stream.manifest"', 2)
        role = near.there(serve_when_asked, FAR, 5, 3000)
        wait_for_marker()
        Role("client", in_netns, name, converse, (FAR, 5, 3000)).result()
        role.result()
        near.settle()


def test_a_packet_that_crosses_two_interfaces_is_in_a_flow_of_each(tmp_path: Path) -> None:
    """Which say where they were seen: of two at one interface there is no other."""
    seen = observe(tmp_path, pass_through, interfaces=("veth1", "veth3"))
    at = {event.interface: event for event in flows_of(seen)}
    assert len(flows_of(seen)) == 2
    one, other = at["veth1"], at["veth3"]
    assert difference(counts_of([one]), seen.witness) == {}
    assert difference(counts_of([one]), counts_of([other])) == {}
    assert (one.direction, other.direction) == ("outbound", "inbound")
    assert one.ifindex != other.ifindex
    assert [one.owner_known, other.owner_known] == [False, False]


def theirs() -> list[str]:
    """Filters of others."""
    listing = [tc("filter", "show", "dev", "veth1", at) for at in ("ingress", "egress")]
    return [line for text in listing for line in text.splitlines() if "u32" in line]


def ours() -> list[str]:
    """Filters of the agent."""
    listing = [tc("filter", "show", "dev", "veth1", at) for at in ("ingress", "egress")]
    return [line for text in listing for line in text.splitlines() if "streamer-" in line]


def make_theirs(near: str, far: str) -> None:
    run("tc", "qdisc", "add", "dev", "veth1", "clsact")
    for at in ("ingress", "egress"):
        run("tc", "filter", "add", "dev", "veth1", at, "prio", "1", "u32", "match", "u32", "0", "0")


def with_others(near: Near) -> tuple[list[str], list[str], list[str]]:
    during = theirs()
    tcp(near, FAR, 5, 500)
    own = ours()
    near.agent.send(signal.SIGTERM)
    near.agent.process.wait(seconds(60))
    return during, theirs(), own + ours()


def test_others_filters_stay(require: Require, tmp_path: Path) -> None:
    """Beside ours and after them, which go with the agent."""
    require(shutil.which("tc"), "tc (iproute2) is not installed")
    seen = observe(tmp_path, with_others, prepare=make_theirs)
    during, after, own = seen.result
    assert during == after
    assert len(during) >= 2
    assert len(own) == (0 if has_tcx() else 2)
    assert difference(counts_of(seen.recording.of("net.flow")), seen.witness) == {}
    way = seen.recording.ways["flow_ingress"]
    assert way == f"tcx/ingress veth1:{'tcx' if has_tcx() else 'clsact'}"


def has_tcx() -> bool:
    return kernel_is(6, 6)


# ---------------------------------------------------------------- ours beside others


class Observing:
    """The programs at `veth1`, without an agent."""

    def __init__(self) -> None:
        self.settings = Settings(kernel=Kernel(interfaces=("veth1",), flows=256))
        self.loader = Loader(targets=targets_of(self.settings.kernel))
        self.state = state.load(self.settings, {KIND}, self.loader)
        self.state.attach()

    @property
    def way(self) -> str:
        (way,) = (one.way for one in self.state.statuses if one.name == "flow_ingress")
        return way.rpartition(":")[2]

    def packets(self) -> int:
        """Those of `send_four` that were counted."""
        return sum(packets for ports, packets in counted(self.state) if max(ports) in SENT)

    def close(self) -> None:
        self.state.detach()
        self.state.release()
        self.state.close()


def by_clsact() -> None:
    """As on kernels before 6.6."""

    def refuse(self: Program, index: int) -> Any:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    Program.attach_to_traffic = refuse  # type: ignore[method-assign]


def in_near(name: str, function: Callable[[], Any]) -> Any:
    enter_system(name)
    return function()


def with_pair(function: Callable[[], Any]) -> Any:
    with two_namespaces() as (near, _):
        return Role("near", in_near, near, function).result()


def counted(kernel: state.KernelState) -> Iterator[tuple[tuple[int, int], int]]:
    """Ports and packets of every slot: see `struct flow`."""
    for _, value in kernel.read("flow_slots"):
        one, other = struct.unpack_from("<Q", value, 56), struct.unpack_from("<Q", value, 96)
        yield struct.unpack_from("<HH", value, 40), one[0] + other[0]


SENT = range(60_000, 60_004)


def send_four() -> None:
    """Four datagrams leave, of a flow each."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind((NEAR, 5000))
        for port in SENT:
            sender.sendto(b"x", (FAR, port))


def two_at_once() -> tuple[list[str], list[int], list[str]]:
    first, second = Observing(), Observing()
    filters = ours()
    send_four()
    counts = [first.packets(), second.packets()]
    ways = [first.way, second.way]
    first.close()
    left = ours()
    send_four()
    counts.append(second.packets())
    second.close()
    return ways, counts, [str(len(one)) for one in (filters, left, ours())]


def two_at_once_by_clsact() -> Any:
    by_clsact()
    return two_at_once()


def test_two_beside_each_other_by_tcx(require_kernel: Any) -> None:
    """Each sees every packet, and one that ends takes nothing from the other."""
    require_kernel(has_tcx(), "no tcx before 6.6")
    ways, counts, _ = with_pair(two_at_once)
    assert ways == ["tcx", "tcx"]
    assert counts == [4, 4, 8]


def test_two_beside_each_other_by_clsact(require: Require) -> None:
    require(shutil.which("tc"), "tc (iproute2) is not installed")
    ways, counts, filters = with_pair(two_at_once_by_clsact)
    assert ways == ["clsact", "clsact"]
    assert counts == [4, 4, 8]
    assert filters == ["4", "2", "0"]


def removed_by_another() -> list[Filter]:
    """What is left, to one who has seen a filter that another has removed since."""
    seen = [Filter("bpf", 1, socket.htons(3), 4711, "streamer-ingress")]

    class SeenBefore(TrafficFilters):
        def filters(self, index: int, direction: str) -> list[Filter]:
            return [seen.pop()] if seen else super().filters(index, direction)

    filters = SeenBefore()
    try:
        filters._ensure_clsact(socket.if_nametoindex("lo"))
        return filters._without_stale(socket.if_nametoindex("lo"), "ingress")
    finally:
        filters.close()


def test_two_that_begin_at_once_may_both_remove_what_was_left() -> None:
    assert Role("second", in_own_network, removed_by_another).result() == []


def killed_and_begun_again() -> tuple[int, int, int]:
    by_clsact()
    child = os.fork()
    if not child:
        Observing()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    left = ours()
    again = Observing()
    during = ours()
    send_four()
    assert again.packets() == 4
    again.close()
    assert not set(left) & set(during)
    return len(left), len(during), len(ours())


def test_filters_of_who_was_killed_are_removed_by_the_next(require: Require) -> None:
    """A filter outlives its process; it is known by its name, and that nobody has its number."""
    require(shutil.which("tc"), "tc (iproute2) is not installed")
    assert with_pair(killed_and_begun_again) == (2, 2, 0)


# ---------------------------------------------------------------- clsact itself


def clsact() -> int:
    """Whether there is one."""
    return tc("qdisc", "show", "dev", "veth1").count("clsact")


def add_theirs() -> None:
    run("tc", "filter", "add", "dev", "veth1", "egress", "u32", "match", "u32", "0", "0")


def alone() -> list[int]:
    found = [clsact()]
    observing = Observing()
    found.append(clsact())
    observing.close()
    return [*found, clsact()]


def as_tc_shows_them() -> list[int]:
    """Ours in both directions, and those whose verdict counts: others behind them are asked too."""
    observing = Observing()
    shown = ours()
    observing.close()
    return [len(shown), sum(" direct-action " in line for line in shown)]


def beside_a_filter_that_came_later() -> list[int]:
    observing = Observing()
    add_theirs()
    observing.close()
    return [clsact(), len(theirs()) > 0]


def in_one_that_was_there() -> list[int]:
    run("tc", "qdisc", "add", "dev", "veth1", "clsact")
    observing = Observing()
    observing.close()
    return [clsact()]


def two_of_which_the_first_made_it() -> list[int]:
    first, second = Observing(), Observing()
    first.close()
    found = [clsact(), len(ours())]
    second.close()
    return [*found, clsact()]


def after_one_that_was_killed() -> list[int]:
    child = os.fork()
    if not child:
        Observing()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    found = [clsact(), len(ours())]
    Observing().close()
    return [*found, clsact()]


def made_anew_by_others() -> list[int]:
    observing = Observing()
    run("tc", "qdisc", "delete", "dev", "veth1", "clsact")
    run("tc", "qdisc", "add", "dev", "veth1", "clsact")
    observing.loader.detach("tc_classifier")  # no error: what it was about has gone
    observing.close()
    return [clsact()]


def at_an_interface_that_goes() -> list[int]:
    observing = Observing()
    ip("link", "delete", "veth1")
    observing.loader.detach("tc_classifier")
    observing.close()
    return []


def for_a_program_that_is_none() -> list[int]:
    filters = TrafficFilters()
    with open("/dev/null") as file, pytest.raises(OSError, match="Invalid argument"):
        filters.attach(socket.if_nametoindex("veth1"), "ingress", file.fileno())
    filters.close()
    return [clsact()]


@pytest.mark.parametrize(
    ("situation", "expected"),
    [
        (alone, [0, 1, 0]),
        (as_tc_shows_them, [2, 2]),
        (beside_a_filter_that_came_later, [1, True]),
        (in_one_that_was_there, [1]),
        (two_of_which_the_first_made_it, [1, 2, 0]),
        (after_one_that_was_killed, [1, 2, 0]),
        (made_anew_by_others, [1]),
        (at_an_interface_that_goes, []),
        (for_a_program_that_is_none, [0]),
    ],
)
def test_clsact_goes_with_who_made_it_unless_others_use_it(
    require: Require, situation: Callable[[], list[int]], expected: list[int]
) -> None:
    require(shutil.which("tc"), "tc (iproute2) is not installed")
    assert with_pair(lambda: on_the_rung(situation)) == expected


def on_the_rung(situation: Callable[[], Any]) -> Any:
    """The same, where there is no tcx."""
    by_clsact()
    return situation()


def without_the_right_to() -> tuple[str, list[int], list[str]]:
    """What is said, and what is left, in a process that has lost its right to change networks."""
    observing = Observing()
    child = Role("unprivileged", detached_without_rights, observing)
    said, errors = child.result()
    left = [clsact(), len(ours())]
    observing.close()
    return said, [*left, clsact()], errors


def detached_without_rights(observing: Observing) -> tuple[str, list[str]]:
    capabilities.limit_to(capabilities.effective() - {capabilities.CAP_NET_ADMIN})
    logged = Logged()
    logging.getLogger("streamer").addHandler(logged)
    observing.state.detach()
    with pytest.raises(KernelError):
        observing.loader.detach("net")  # which was unloaded all the same
    return "\n".join(logged.lines), [str(observing.loader._sensors["tc_classifier"].at_interfaces)]


class Logged(logging.Handler):
    """What is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_a_filter_that_the_kernel_does_not_remove_is_reported(require: Require) -> None:
    """And the rest is detached all the same."""
    require(shutil.which("tc"), "tc (iproute2) is not installed")
    said, left, kept = with_pair(lambda: on_the_rung(without_the_right_to))
    assert re.fullmatch(
        r"not detached: (clsact at (e|in)gress of interface \d+ cannot be removed: "
        r"Operation not permitted(; )?){2}",
        said,
    )
    assert kept == ["{}"]
    assert left == [1, 2, 0]


# ---------------------------------------------------------------- agents that are killed


def kill_both(near: Near) -> list[list[str]]:
    """The agent and its helper at once, and then another agent."""
    tcp(near, FAR, 1, 10)
    before = ours()
    helper = near.agent.helper_pid
    for pid in (helper, near.agent.pid):
        os.kill(pid, signal.SIGKILL)
    near.agent.process.wait()
    while Path(f"/proc/{helper}").exists():
        time.sleep(0.01)
    left = ours()
    near.agent.output.unlink()
    near.agent.start()
    return [before, left, ours()]


def test_an_agent_that_was_killed_with_its_helper(require: Require, tmp_path: Path) -> None:
    """Where the kernel does not remove its programs, the next agent does."""
    require(shutil.which("tc"), "tc (iproute2) is not installed")
    before, left, after = observe(tmp_path, kill_both).result
    if has_tcx():
        assert (before, left, after) == ([], [], [])
    else:
        assert len(before) == len(after) == 2
        assert left == before
        assert not set(before) & set(after)


# ---------------------------------------------------------------- the program alone


def run_all(frames: list[bytes]) -> tuple[set[int], flow_reading.Counts, int]:
    """What it answers to each; what is in which flow; packets that are malformed."""
    settings = Settings(
        kernel=Kernel(interfaces=("lo",), flows=1 << 17), rings=Rings(bulk_bytes=1 << 26)
    )
    kernel = state.load(settings, {KIND}, Loader(targets=targets_of(settings.kernel)))
    try:
        kernel.attach()
        fd = kernel.program_fds["flow_egress"]
        verdicts = {run_program(fd, 1, frame) for frame in frames}
        kernel.detach()
        assert kernel.flows is not None
        while not kernel.flows.flush():
            pass
        counts = flow_reading.counts_of(case.event for case in drained(kernel, "bulk"))
        faults = memoryview(kernel.faults).cast("Q")
        malformed = faults[FAULTS["PACKET_MALFORMED"]]
        assert sum(faults[: len(FAULTS)]) == malformed
        return verdicts, counts, malformed
    finally:
        kernel.close()


PASS_ON = 0xFFFFFFFF
LEAST = {b"\x08\x00": 20, b"\x86\xdd": 40}


def can_be_tried(frame: bytes) -> bool:
    """The kernel itself refuses to run a program with a frame that ends within the IP header."""
    return len(frame) >= ETHERNET + max(1, LEAST.get(frame[12:14], 0))


def test_a_hundred_thousand_frames_with_bytes_changed_at_random() -> None:
    """Each of IP is in its flow, as its sender's, with its bytes; or counted as malformed."""
    frames = list(mutated(repetitions(100_000, 10_000), seed=20261129))
    frames = [frame for frame in frames if can_be_tried(frame)]
    verdicts, counts, malformed = Role("test", in_own_network, run_all, frames).result()
    assert verdicts == {PASS_ON}
    expected = flow_reading.Reader()
    for frame in frames:
        expected.read(frame)
    wrong = {
        one for one in counts.keys() | expected.counts.keys() if counts[one] != expected.counts[one]
    }
    assert {one: (counts[one], expected.counts[one]) for one in wrong} == {}
    assert malformed == expected.malformed > 0
    in_flows = sum(count for (_, _, what), count in counts.items() if what == "packets")
    assert in_flows + malformed + expected.others == len(frames)
    assert len({flow for flow, _, _ in counts}) > len(frames) // 50
