"""Binds, listens, retransmissions, drops and UDP sockets, against what the test itself did.

Everything happens in network namespaces of its own, whose counters are the witnesses: those of
/proc/net/snmp, /proc/net/udp, ss, and bpftrace on the same tracepoints.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import shutil
import socket
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from streamer.config.settings import Kernel, Settings
from streamer.kernel.libbpf import names_of_enum
from streamer.kernel.objects import CONTRACT
from tests.addresses import in_lines
from tests.bpf_variant import Change, Variant
from tests.conftest import Require
from tests.kernel.agent import Agent, Recording
from tests.kernel.live import Live
from tests.kernel.pace import repetitions, seconds
from tests.kernel.roles import Role, in_own_network, netns_inode
from tests.kernel.scope import Scope, checkpoint
from tests.kernel.system import kernel_is, kernel_knows
from tests.kernel.witness import bpftrace

pytestmark = pytest.mark.kernel

SO_ATTACH_FILTER = 26
TCP, UDP = "tcp", "udp"
NOBODY = 65534
HAS_REASONS = kernel_is(5, 17)
FAULTS = [name for name, _, _ in CONTRACT["enum fault"]]
ANY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}


def errno_of(call: Callable[..., Any], *arguments: Any) -> int:
    """The error number of a call; 0 when it succeeded."""
    try:
        call(*arguments)
    except OSError as error:
        return error.errno or 0
    return 0


def deafen(receiver: socket.socket) -> None:
    """From now on the socket drops whatever comes in: a filter of one instruction, `return 0`."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
    filters = struct.pack("HxxxxxxP", 1, ctypes.addressof(program))
    receiver.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filters)


def counters_of(protocol: str) -> dict[str, int]:
    """The counters of this network namespace: `Tcp` or `Udp` of /proc/net/snmp."""
    lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
    names, values = (line.split()[1:] for line in lines if line.startswith(f"{protocol}:"))
    return dict(zip(names, map(int, values), strict=True))


def nstat(name: str) -> int:
    """The same as another program reads it."""
    done = subprocess.run(["nstat", "-asz", name], check=True, capture_output=True, text=True)
    found = re.search(rf"^{name} +(\d+)", done.stdout, re.MULTILINE)
    assert found
    return int(found[1])


def of_own(recording: Recording, kind: str, netns: int) -> list[Any]:
    """The events of a kind in the test's own network namespace."""
    return [event for event in recording.of(kind) if event.netns == netns]


# ---------------------------------------------------------------- bind() and listen()


class Bind(NamedTuple):
    """A call of bind(), as an event shows it."""

    pid: int
    transport: str
    asked: int
    got: int
    address: str
    errno: int
    reuse_port: bool


class Listen(NamedTuple):
    """A call of listen(), as an event shows it."""

    pid: int
    address: str
    port: int
    asked: int
    granted: int
    errno: int
    reuse_port: bool


class Bound(NamedTuple):
    netns: int
    binds: list[Bind]
    listens: list[Listen]
    queues: dict[int, int]
    """What `ss` says of who listens: the backlog of each port."""


def plain(address: str) -> str:
    return address.removeprefix("::ffff:")


class Binder:
    """Binds and listens, and keeps what the events about it are to say."""

    def __init__(self) -> None:
        self.binds: list[Bind] = []
        self.listens: list[Listen] = []
        self.sockets: list[socket.socket] = []

    def open(self, family: int, transport: str, *options: int) -> socket.socket:
        kind = socket.SOCK_STREAM if transport == TCP else socket.SOCK_DGRAM
        made = socket.socket(family, kind)
        for option in options:
            made.setsockopt(socket.SOL_SOCKET, option, 1)
        self.sockets.append(made)
        return made

    def bind(self, one: socket.socket, address: str, port: int, expected: int = 0) -> int:
        assert errno_of(one.bind, (address, port)) == expected
        got = 0 if expected else one.getsockname()[1]
        transport = TCP if one.type == socket.SOCK_STREAM else UDP
        reuse = bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT))
        self.binds.append(Bind(os.getpid(), transport, port, got, plain(address), expected, reuse))
        return got

    def listen(self, one: socket.socket, backlog: int, granted: int, expected: int = 0) -> None:
        assert errno_of(one.listen, backlog) == expected
        address, port = one.getsockname()[:2]
        reuse = bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT))
        self.listens.append(
            Listen(os.getpid(), plain(address), port, backlog, granted, expected, reuse)
        )


def bind_as_nobody() -> list[Bind]:
    os.setuid(NOBODY)
    binder = Binder()
    for transport in (TCP, UDP):
        binder.bind(binder.open(socket.AF_INET, transport), "127.0.0.1", 80, errno.EACCES)
    return binder.binds


def bind_everything() -> Bound:
    binder = Binder()
    for transport in (TCP, UDP):
        for family, address in (
            (socket.AF_INET, "127.0.0.1"),
            (socket.AF_INET, "0.0.0.0"),
            (socket.AF_INET6, "::1"),
            (socket.AF_INET6, "::"),
            (socket.AF_INET6, "::ffff:127.0.0.1"),
        ):
            port = binder.bind(binder.open(family, transport), address, 0)
            other = binder.open(family, transport)
            binder.bind(other, address, port, errno.EADDRINUSE)
            fixed = 20_000 + len(binder.binds)
            binder.bind(other, address, fixed)
            binder.bind(other, address, fixed + 1, errno.EINVAL)  # it has an address already
        stranger = binder.open(socket.AF_INET, transport)
        binder.bind(stranger, "192.0.2.77", 1234, errno.EADDRNOTAVAIL)
        shared = [binder.open(socket.AF_INET, transport, socket.SO_REUSEPORT) for _ in range(3)]
        for one in shared:
            binder.bind(one, "127.0.0.1", 30_000)
            if transport == TCP:
                binder.listen(one, 5, 5)
    listen_everywhere(binder)
    do_what_is_not_reported()
    nobody = Role("nobody", bind_as_nobody).result()
    return Bound(netns_inode(), binder.binds + nobody, binder.listens, queues())


def listen_everywhere(binder: Binder) -> None:
    most = int(Path("/proc/sys/net/core/somaxconn").read_text())
    for family in ANY:
        one = binder.open(family, TCP)
        binder.listen(one, 16, 16)  # without a bind() it gets a port
        binder.listen(one, 1 << 20, most)  # no event of the kernel's own tells of the second
        binder.listen(one, 0, 0)
    pair = [binder.open(socket.AF_INET, TCP, socket.SO_REUSEADDR) for _ in range(2)]
    for one in pair:
        binder.bind(one, "127.0.0.1", 31_000)
    binder.listen(pair[0], 1, 1)
    binder.listen(pair[1], 1, 0, errno.EADDRINUSE)


def do_what_is_not_reported() -> None:
    with socket.socket(socket.AF_UNIX) as local:
        local.bind("\0streamer-test-bind")
        local.listen()
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.bind(("127.0.0.1", 0))
    with udp() as one:
        assert errno_of(one.listen) == errno.EOPNOTSUPP


def queues() -> dict[int, int]:
    shown = subprocess.run(["ss", "-Hltn"], check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in shown.splitlines()]
    return {int(row[3].rpartition(":")[2]): int(row[2]) for row in rows}


def bind_of(event: Any) -> Bind:
    return Bind(
        event.pid,
        event.transport,
        event.asked_port,
        event.local_port,
        event.local_addr,
        event.errno,
        event.reuse_port,
    )


def listen_of(event: Any) -> Listen:
    return Listen(
        event.pid,
        event.local_addr,
        event.local_port,
        event.backlog_asked,
        event.backlog,
        event.errno,
        event.reuse_port,
    )


def test_every_bind_and_listen(scope: Scope, tmp_path: Path, require: Require) -> None:
    """Those that fail too, with the port that was asked for and the one that there is."""
    require(shutil.which("ss"), "ss (iproute2) is not installed")
    with Agent(tmp_path, *scope.options, events="net.bind,net.listen") as agent:
        done: Bound = scope.act(in_own_network, bind_everything)
        recording = agent.stop()
    binds, listens = recording.of("net.bind"), recording.of("net.listen")
    assert Counter(map(bind_of, binds)) == Counter(done.binds)
    assert Counter(map(listen_of, listens)) == Counter(done.listens)
    assert {event.netns for event in (*binds, *listens)} == {done.netns}
    last = {event.local_port: event.backlog for event in listens if not event.errno}
    assert last == done.queues
    for event in (*binds, *listens):
        assert event.ip_version == (6 if ":" in event.local_addr else 4)
        assert not event.incomplete


def test_filters_of_binds(scope: Scope, tmp_path: Path) -> None:
    """By port: that of the service, and of a bind that failed the one that was asked for."""
    options = (*scope.options, "--exclude-port", "30000", "--exclude-port", "31000")
    with Agent(tmp_path, *options, events="net.bind,net.listen") as agent:
        done: Bound = scope.act(in_own_network, bind_everything)
        recording = agent.stop()
    left = [one for one in done.binds if one.asked not in (30_000, 31_000)]
    assert Counter(map(bind_of, recording.of("net.bind"))) == Counter(left)
    assert recording.filtered("net.bind") >= len(done.binds) - len(left)
    assert {event.local_port for event in recording.of("net.listen")}.isdisjoint({30_000, 31_000})


# ---------------------------------------------------------------- retransmissions

BYTES = 1000
PORTS = {"syn": 21_001, "data": 21_002, "syn_ack": 21_003, "fin": 21_004}


class Retransmitted(NamedTuple):
    netns: int
    pid: int
    segments: int
    """RetransSegs of the network namespace."""
    shown: int
    """The same by nstat."""


def wait_for_retransmissions(count: int) -> None:
    deadline = time.monotonic() + seconds(30)
    while counters_of("Tcp")["RetransSegs"] < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def listening(family: int, address: str, port: int) -> socket.socket:
    return socket.create_server((address, port), family=family)


def abort(*sockets: socket.socket) -> None:
    """Close them by a reset, after which nothing is sent again."""
    for one in sockets:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()


def connect_to_the_deaf(family: int, address: str) -> None:
    """A SYN that nobody answers."""
    with listening(family, address, PORTS["syn"]) as listener:
        deafen(listener)
        with socket.socket(family) as client:
            client.setblocking(False)
            client.connect_ex((address, PORTS["syn"]))
            wait_for_retransmissions(counters_of("Tcp")["RetransSegs"] + 2)


def send_to_the_deaf(family: int, address: str) -> None:
    """Bytes, and then the end, that nobody acknowledges."""
    with listening(family, address, PORTS["data"]) as listener:
        client = socket.create_connection((address, PORTS["data"]))
        server, _ = listener.accept()
        deafen(server)
        client.send(b"x" * BYTES)
        wait_for_retransmissions(counters_of("Tcp")["RetransSegs"] + 3)
        abort(client, server)
    with listening(family, address, PORTS["fin"]) as listener:
        client = socket.create_connection((address, PORTS["fin"]))
        server, _ = listener.accept()
        deafen(server)
        client.shutdown(socket.SHUT_WR)
        wait_for_retransmissions(counters_of("Tcp")["RetransSegs"] + 2)
        abort(client, server)


def answer_the_deaf(family: int, address: str) -> None:
    """A SYN-ACK that nobody hears; the SYN is sent again, too."""
    with listening(family, address, PORTS["syn_ack"]), socket.socket(family) as client:
        deafen(client)
        client.setblocking(False)
        client.connect_ex((address, PORTS["syn_ack"]))
        wait_for_retransmissions(counters_of("Tcp")["RetransSegs"] + 4)


def retransmit() -> Retransmitted:
    before = counters_of("Tcp")["RetransSegs"]
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        connect_to_the_deaf(family, address)
        send_to_the_deaf(family, address)
        answer_the_deaf(family, address)
    count = counters_of("Tcp")["RetransSegs"] - before
    return Retransmitted(netns_inode(), os.getpid(), count, nstat("TcpRetransSegs"))


COUNT_RETRANSMISSIONS = """
tracepoint:tcp:tcp_retransmit_skb
/args->dport >= 21001 && args->dport <= 21004 || args->sport >= 21001 && args->sport <= 21004/
{ @ = count(); }
tracepoint:tcp:tcp_retransmit_synack
/args->dport >= 21001 && args->dport <= 21004 || args->sport >= 21001 && args->sport <= 21004/
{ @ = count(); }
"""


def test_every_retransmission(scope: Scope, tmp_path: Path, require: Require) -> None:
    """As many segments as the network namespace counts, whose they are, and what was in them."""
    require(shutil.which("nstat"), "nstat (iproute2) is not installed")
    require(shutil.which("bpftrace"), "bpftrace is not installed")
    with (
        bpftrace(COUNT_RETRANSMISSIONS, tmp_path / "bpftrace") as ended,
        Agent(tmp_path, *scope.options, events="net.retransmit") as agent,
    ):
        done: Retransmitted = scope.act(in_own_network, retransmit)
        recording = agent.stop()
        shown = ended()
    assert not in_lines(agent.output.read_bytes(), recording.manifest.run_id)
    events = recording.of("net.retransmit")
    assert sum(event.segments for event in events) == done.segments == done.shown
    assert f"@: {len(events)}\n" in shown
    assert {(event.netns, event.pid, event.comm) for event in events} == {
        (done.netns, done.pid, "actor")
    }
    for event in events:
        assert event.owner_known
        assert (
            event.local_addr
            == event.remote_addr
            == ("::1" if event.ip_version == 6 else "127.0.0.1")
        )
        port = event.local_port if event.content == "syn_ack" else event.remote_port
        name = next(name for name, number in PORTS.items() if number == port)
        assert (event.content, event.state, event.direction, event.bytes) in {
            "syn": {("syn", "syn_sent", "outbound", 0)},
            "data": {("data", "established", "outbound", BYTES)},
            "fin": {("fin", "fin_wait1", "outbound", 0)},
            "syn_ack": {
                ("syn", "syn_sent", "outbound", 0),
                ("syn_ack", "new_syn_recv", "inbound", 0),
            },
        }[name]
    contents = Counter((event.ip_version, event.content) for event in events)
    assert all(contents[version, "syn_ack"] for version in (4, 6))
    assert {event.congestion for event in events if event.content == "data"} <= {"open", "loss"}


# ---------------------------------------------------------------- drops

CLOSED, FULL, FILTERED = 22_001, 22_002, 22_003
DATAGRAMS = 40


class Dropped(NamedTuple):
    netns: int
    no_port: int
    """NoPorts of the network namespace, of IPv4."""
    buffer: int
    """Drops of the socket that was full."""


def udp(family: int = socket.AF_INET) -> socket.socket:
    return socket.socket(family, socket.SOCK_DGRAM)


def drops_in_proc(port: int) -> int:
    """The last column of /proc/net/udp."""
    for line in Path("/proc/thread-self/net/udp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(f":{port:04X}"):
            return int(fields[-1])
    raise AssertionError("no such socket")


def drop_datagrams() -> Dropped:
    with udp() as sender, udp(socket.AF_INET6) as sender6:
        for size in range(DATAGRAMS):
            sender.sendto(b"x" * size, ("127.0.0.1", CLOSED))
            sender6.sendto(b"x" * size, ("::1", CLOSED))
        with udp() as full:
            full.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            full.bind(("127.0.0.1", FULL))
            for _ in range(DATAGRAMS):
                sender.sendto(b"y" * 500, ("127.0.0.1", FULL))
            drops = drops_in_proc(FULL)
    return Dropped(netns_inode(), counters_of("Udp")["NoPorts"], drops)


def test_every_drop(tmp_path: Path, scope: Scope) -> None:
    """As many as the counters of the namespace say, with the kernel's own names for why."""
    config = "[kernel]\ndrops_per_second = 100000\n"
    with Agent(tmp_path, *scope.options, events="net.drop", config=config) as agent:
        done: Dropped = scope.act(in_own_network, drop_datagrams)
        recording = agent.stop()
    report = recording.manifest.coverage["net.drop"]
    if HAS_REASONS:
        assert report.status == "full"
    else:
        assert report.status == "partial"
        assert "the reasons of drops are not observed" in report.reason
    events = of_own(recording, "net.drop", done.netns)
    at_port = {
        port: [e for e in events if (e.destination_port, e.transport) == (port, UDP)]
        for port in (CLOSED, FULL)
    }
    at_closed = Counter((e.ip_version, e.reason, e.length) for e in at_port[CLOSED])
    reason = "NO_SOCKET" if HAS_REASONS else ""
    # The headers of IP have been left behind by then: UDP's are still there.
    assert at_closed == Counter(
        (version, reason, 8 + size) for version in (4, 6) for size in range(DATAGRAMS)
    )
    assert done.no_port == DATAGRAMS
    assert len(at_port[FULL]) == done.buffer > 0
    assert {event.reason for event in at_port[FULL]} == {"SOCKET_RCVBUFF" if HAS_REASONS else ""}
    for event in at_port[CLOSED] + at_port[FULL]:
        assert event.source_addr == event.destination_addr
        assert event.source_addr == ("::1" if event.ip_version == 6 else "127.0.0.1")
        assert event.source_port
        assert not event.incomplete
        assert event.weight == 1
    assert {(e.interface, e.ifindex) for e in at_port[CLOSED]} == {("lo", 1)}


SCAN = repetitions(65_535, 6_000)


def scan_ports() -> int:
    """Send to every port of a machine on which a filter drops everything; and a last one each."""
    with udp() as sender, udp() as deaf:
        deaf.bind(("127.0.0.1", FILTERED))
        deafen(deaf)
        for _ in range(SCAN):
            sender.sendto(b"", ("127.0.0.1", FILTERED))
        time.sleep(1.1)
        for cpu in sorted(os.sched_getaffinity(0)):
            os.sched_setaffinity(0, {cpu})
            sender.sendto(b"last", ("127.0.0.1", FILTERED))
    return netns_inode()


def test_a_flood_of_drops(tmp_path: Path, scope: Scope) -> None:
    """Costs a bounded number of events, whose weights count every packet."""
    limit = 50
    config = f"[kernel]\ndrops_per_second = {limit}\n"
    with Agent(tmp_path, *scope.options, events="net.drop", config=config) as agent:
        began = time.monotonic()
        netns = scope.act(in_own_network, scan_ports)
        took = time.monotonic() - began
        recording = agent.stop()
    events = [
        event
        for event in of_own(recording, "net.drop", netns)
        if event.destination_port == FILTERED
    ]
    cpus = os.cpu_count() or 1
    assert len(events) <= limit * cpus * (took + 1)
    if HAS_REASONS:  # else it shares its limit with all other drops of the machine
        assert {event.reason for event in events} == {"SOCKET_FILTER"}
        assert sum(event.weight for event in events) == SCAN + len(os.sched_getaffinity(0))
    assert recording.heartbeat.counts["net.drop"].shed >= SCAN - len(events)


def scan_closed_ports() -> tuple[int, int]:
    """Every port there is, once."""
    with udp() as sender:
        for port in range(1, 65_536):
            sender.sendto(b"", ("127.0.0.1", port))
    return netns_inode(), counters_of("Udp")["NoPorts"]


def test_a_port_scan(tmp_path: Path, scope: Scope) -> None:
    """Is one of the things by which a stranger makes events."""
    with Agent(tmp_path, *scope.options, events="net.drop") as agent:
        netns, dropped = scope.act(in_own_network, scan_closed_ports)
        recording = agent.stop()
    events = of_own(recording, "net.drop", netns)
    assert dropped >= 65_534
    assert 0 < len(events) < 10_000
    counts = recording.heartbeat.counts["net.drop"]
    assert counts.produced >= dropped
    assert counts.lost == 0


def test_drops_without_a_reason(
    scope: Scope,
    variant: Callable[[Mapping[str, list[Change]]], Variant],
    require_kernel: Require,
) -> None:
    """Are left out, unless they are asked for. Here another reason stands for none."""
    require_kernel(HAS_REASONS, "this kernel gives no reasons (before 5.17)")
    none, other = "SKB_DROP_REASON_NOT_SPECIFIED", "SKB_DROP_REASON_NO_SOCKET"
    made = variant({"tracepoint_net.bpf.c": [(f"{none},", f"{other},"), (f"{none})", f"{other})")]})
    for asked_for in (False, True):
        kernel = Kernel(unspecified_drops=asked_for, drops_per_second=100_000)
        with Live(scope, {"net.drop"}, Settings(kernel=kernel), str(made.objects)) as live:
            done: Dropped = scope.act(in_own_network, drop_datagrams)
            live.check()
        own = [event for event in live.events if event.netns == done.netns]
        ports = Counter(event.destination_port for event in own if event.transport == UDP)
        assert ports == {FULL: done.buffer} | ({CLOSED: 2 * DATAGRAMS} if asked_for else {})


def test_filter_of_drops(tmp_path: Path, scope: Scope) -> None:
    """By port, of either end."""
    options = (*scope.options, "--port", str(FULL))
    config = "[kernel]\ndrops_per_second = 100000\n"
    with Agent(tmp_path, *options, events="net.drop", config=config) as agent:
        done: Dropped = scope.act(in_own_network, drop_datagrams)
        recording = agent.stop()
    events = of_own(recording, "net.drop", done.netns)
    assert Counter(event.destination_port for event in events) == {FULL: done.buffer}
    assert recording.filtered("net.drop") >= 2 * DATAGRAMS


# ---------------------------------------------------------------- UDP


class Used(NamedTuple):
    """What went through a socket, as its last event shows it."""

    inode: int
    pid: int
    local: tuple[str, int]
    remote: tuple[str, int]
    direction: str
    connected: bool
    sent: tuple[int, int]
    received: tuple[int, int]
    send_errors: int
    drops: int


class UdpDone(NamedTuple):
    netns: int
    used: list[Used]


class Counted:
    """A UDP socket, and what went through it."""

    def __init__(self, family: int = socket.AF_INET, address: str = "") -> None:
        self.socket = udp(family)
        self.inode = os.fstat(self.socket.fileno()).st_ino
        self.sent: list[int] = []
        self.received: list[int] = []
        self.errors = 0
        self.direction = ""
        self.connected = False
        self.drops = 0
        self.remote = (ANY[socket.AddressFamily(family)], 0)
        if address:
            self.socket.bind((address, 0))

    @property
    def name(self) -> tuple[str, int]:
        address: tuple[str, int] = self.socket.getsockname()[:2]
        return address

    def connect(self, address: tuple[str, int]) -> None:
        self.socket.connect(address)
        self.remote, self.connected = address, True

    def send(self, size: int, to: tuple[str, int] | None = None, expected: int = 0) -> None:
        self.direction = self.direction or "outbound"
        data = b"u" * size
        call, arguments = (self.socket.send, ()) if to is None else (self.socket.sendto, (to,))
        assert errno_of(call, data, *arguments) == expected
        if expected:
            self.errors += 1
            return
        self.sent.append(size)
        if to is not None:
            self.remote = to

    def receive(self, size: int = 1 << 16, flags: int = 0) -> None:
        data = self.socket.recv(size, flags)
        if not flags & socket.MSG_PEEK:
            self.direction = self.direction or "inbound"
            self.received.append(len(data))

    def close(self) -> Used:
        local = self.name
        self.socket.close()
        return self.used(local)

    def used(self, local: tuple[str, int]) -> Used:
        return Used(
            self.inode,
            os.getpid(),
            (plain(local[0]), local[1]),
            (plain(self.remote[0]), self.remote[1]),
            self.direction,
            self.connected,
            (len(self.sent), sum(self.sent)),
            (len(self.received), sum(self.received)),
            self.errors,
            self.drops,
        )


SIZES = (1, 0, 1472, 1473, 9000, 65_507, 3)


def exchange(family: int, server_at: str, at: str) -> list[Used]:
    """Datagrams there and back, of a connected and of an unconnected client."""
    server, connected, free = Counted(family, server_at), Counted(family), Counted(family)
    target = at, server.name[1]
    connected.connect(target)
    for size in SIZES:
        if family == socket.AF_INET6 and size > 65_000:
            size = 60_000
        connected.send(size)
        server.receive(flags=socket.MSG_PEEK)  # nothing is received by that
        server.receive()
        server.send(size // 2, connected.socket.getsockname())
        connected.receive()
        free.send(size, target)
        server.receive(2)  # the rest is lost
    server.send(70_000, target, errno.EMSGSIZE)
    server.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.socket.recv(1)
    return [server.close(), connected.close(), free.close()]


def be_refused() -> Used:
    """Nobody is there: the answer to the first datagram is the error of the second."""
    client = Counted()
    client.connect(("127.0.0.1", CLOSED))
    client.send(10)
    client.send(20, expected=errno.ECONNREFUSED)
    client.send(30)
    with pytest.raises(ConnectionRefusedError):
        client.socket.recv(1)
    return client.close()


def overflow() -> Used:
    """More than there is room for: what is dropped is not received."""
    receiver, sender = Counted(), udp()
    receiver.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    receiver.socket.bind(("127.0.0.1", 0))
    receiver.socket.setblocking(False)
    for _ in range(DATAGRAMS):
        sender.sendto(b"o" * 300, receiver.name)
    receiver.drops = drops_in_proc(receiver.name[1])
    for _ in range(DATAGRAMS - receiver.drops):
        receiver.receive()
    assert receiver.drops
    sender.close()
    return receiver.close()


def exchange_everything() -> UdpDone:
    used = [
        *exchange(socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        *exchange(socket.AF_INET6, "::1", "::1"),
        *exchange(socket.AF_INET6, "::", "::ffff:127.0.0.1"),
        be_refused(),
        overflow(),
    ]
    Counted(address="127.0.0.1").socket.close()  # nothing went through it
    return UdpDone(netns_inode(), used)


def use_of(event: Any) -> Used:
    return Used(
        event.inode,
        event.pid,
        (event.local_addr, event.local_port),
        (event.remote_addr, event.remote_port),
        event.direction,
        event.connected,
        (event.datagrams_sent, event.bytes_sent),
        (event.datagrams_received, event.bytes_received),
        event.send_errors,
        event.drops,
    )


def sees_peers(recording: Recording) -> bool:
    """Whether programs at functions count, which see for whom a datagram is."""
    return "udpv6_sendmsg" in recording.ways


def comparable(used: Used, peers: bool) -> Used:
    """Without what cannot be seen; and where the peer's address is of IPv4, both are."""
    address, port = used.local
    if address == "::" and "." in used.remote[0]:
        address = "0.0.0.0"
    if peers or used.connected:
        return used._replace(local=(address, port))
    return used._replace(remote=("", 0), local=("", port))


def test_every_datagram_of_every_socket(scope: Scope, tmp_path: Path) -> None:
    """IPv4, IPv6 and IPv4 over IPv6, connected or not: exact counts and bytes at both ends."""
    with Agent(tmp_path, *scope.options, events="net.udp") as agent:
        done: UdpDone = scope.act(in_own_network, exchange_everything)
        recording = agent.stop()
    inodes = {one.inode for one in done.used}
    events = [event for event in recording.of("net.udp") if event.inode in inodes]
    peers = sees_peers(recording)
    assert {comparable(use_of(event), peers) for event in events} == {
        comparable(one, peers) for one in done.used
    }
    assert len(events) == len(done.used)
    assert all(event.closed for event in events)
    assert {event.netns for event in recording.of("net.udp")} == {done.netns}
    # The one that only sent to the socket that was full.
    assert len(recording.of("net.udp")) == len(done.used) + 1


SENDERS, EACH = 4, repetitions(5_000, 300)


def send_many(shared: socket.socket, target: tuple[str, int]) -> None:
    for i in range(EACH):
        shared.sendto(b"m" * (i % 100), target)


def share_a_socket() -> tuple[int, int, int]:
    """Four processes send through one socket, which the last of them closes by its end."""
    with udp() as shared, udp() as receiver:
        receiver.bind(("127.0.0.1", 0))
        inode = os.fstat(shared.fileno()).st_ino
        roles = [
            Role(f"sender-{n}", send_many, shared, receiver.getsockname()) for n in range(SENDERS)
        ]
        shared.close()
        for role in roles:
            role.result()
    return inode, SENDERS * EACH, SENDERS * sum(i % 100 for i in range(EACH))


def test_a_socket_that_many_use(scope: Scope, tmp_path: Path) -> None:
    """At the same time, on several CPUs: no datagram is lost between them."""
    with Agent(tmp_path, *scope.options, events="net.udp") as agent:
        inode, datagrams, size = scope.act(in_own_network, share_a_socket)
        agent.wait_for(b'"closed":true')
        recording = agent.stop()
    (event,) = [event for event in recording.of("net.udp") if event.inode == inode]
    assert (event.datagrams_sent, event.bytes_sent) == (datagrams, size)
    assert event.comm.startswith("sender-")
    assert event.closed


def use_for_long() -> int:
    sender, receiver = Counted(), Counted(address="127.0.0.1")
    for _ in range(4):
        sender.send(100, receiver.name)
        time.sleep(1.2)
    checkpoint(sender.inode)
    sender.close()
    return sender.inode


def test_a_socket_that_lives_long(scope: Scope, tmp_path: Path) -> None:
    """Is reported while it is in use: totals that grow, and at last that it was closed."""
    config = "[kernel]\nudp_seconds = 1\n"
    with (
        Agent(tmp_path, *scope.options, events="net.udp", config=config) as agent,
        scope.start(in_own_network, use_for_long) as actor,
    ):
        inode = actor.reached()
        agent.wait_for(b'"event":"net.udp"', 3)
        actor.proceed()
        actor.result()
        recording = agent.stop()
    events = [event for event in recording.of("net.udp") if event.inode == inode]
    assert [(event.datagrams_sent, event.closed) for event in events] == [
        (2, False),
        (3, False),
        (4, False),
        (4, True),
    ]
    assert [event.bytes_sent for event in events] == [200, 300, 400, 400]
    durations = [event.duration_ns for event in events]
    assert durations == sorted(durations)
    assert durations[0] >= 1_000_000_000


def test_what_is_not_wanted_is_not_loaded(scope: Scope, tmp_path: Path) -> None:
    """Nobody pays at each packet for a kind that was not asked for."""
    with Agent(tmp_path, *scope.options, events="net.bind") as agent:
        recording = agent.stop()
    assert set(recording.ways) == {"bind"}


def test_the_kernels_own_names() -> None:
    """The names of reasons come from the kernel's type information."""
    names = names_of_enum("skb_drop_reason")
    assert ("SKB_DROP_REASON_NO_SOCKET" in names.values()) == HAS_REASONS
    assert kernel_knows("skb_drop_reason") == HAS_REASONS
    assert names_of_enum("no_such_enum_is_there") == {}


def test_maps_that_sensors_have_in_common() -> None:
    """Are made once, and remain until the last of their sensors goes."""
    with Live(None, {"net.close", "net.retransmit"}) as live:
        names = Counter(one.name for one in live.maps())
        assert {names[name] for name in ("sockets", "connections", "listeners")} == {1}
        live.state.unload("net")
        assert "connections" in {one.name for one in live.maps()}
        live.state.load("net")
        live.state.attach_sensor("net")
        names = Counter(one.name for one in live.maps())
        assert names["connections"] == 1
        live.state.unload("net")
        live.state.unload("tracepoint_net")
        assert "connections" not in {one.name for one in live.maps()}


# ---------------------------------------------------------------- a full table

ROOM = 1024
MORE = ROOM + 200
IN_A_TABLE = '#include "core/tables.h"\n'
"""After it: as on kernels where nothing can be kept with a socket."""


def use_many() -> None:
    """More sockets at once than there is room for, twice."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * MORE, 2 * MORE))
    for _ in range(2):
        made = [udp() for _ in range(MORE)]
        for one in made:
            one.sendto(b"x", ("127.0.0.1", CLOSED))
        for one in made:
            one.close()


def test_more_udp_sockets_than_there_is_room_for(
    scope: Scope, variant: Callable[[Mapping[str, Change]], Variant]
) -> None:
    """Each that found none is counted, and what is closed makes room again."""
    untyped = IN_A_TABLE + "#undef TYPED\n#define TYPED false\n"
    made = variant({"tracepoint_net.bpf.c": (IN_A_TABLE, untyped)})
    settings = Settings(kernel=Kernel(udp_sockets=ROOM))
    with Live(scope, {"net.udp"}, settings, str(made.objects)) as live:
        scope.act(in_own_network, use_many)
        live.check()
        faults = struct.unpack_from(f"<{len(FAULTS)}Q", live.state.faults)
    full = faults[FAULTS.index("FAULT_UDP_FULL")]
    # Others on this machine have sockets, too.
    assert 2 * (ROOM - 100) <= len(live.events) <= 2 * ROOM
    assert full >= 2 * MORE - len(live.events)
    assert {event.datagrams_sent for event in live.events} == {1}
