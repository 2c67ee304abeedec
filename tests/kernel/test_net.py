"""TCP connections of every kind, against what both ends of them did and saw."""

from __future__ import annotations

import errno
import os
import selectors
import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.kernel.agent import TCP_KINDS, Agent, Recording, kind_of
from tests.kernel.pace import repetitions, seconds
from tests.kernel.roles import (
    Role,
    enter_netns,
    in_own_network,
    leave_network,
    netns_inode,
    two_namespaces,
)
from tests.kernel.scope import Scope, checkpoint
from tests.kernel.system import kernel_is

pytestmark = pytest.mark.kernel

NET = TCP_KINDS
MEGABYTES = 3_000_007
UNKNOWN, OUTBOUND, INBOUND = "unknown", "outbound", "inbound"


class End(NamedTuple):
    """One end of a connection, as an event shows it and as the process saw it."""

    pid: int
    comm: str
    netns: int
    local: tuple[str, int]
    remote: tuple[str, int]


class Closed(NamedTuple):
    """The end of a connection."""

    end: End
    direction: str
    sent: int
    received: int
    errno: int


class Seen(NamedTuple):
    """What a process did. `tried` are its connects with their error, `taken` what it accepted,
    with the descriptor.
    """

    tried: list[tuple[End, int]]
    taken: list[tuple[End, int]]
    closed: list[Closed]


def plain(address: Any) -> tuple[str, int]:
    """Host and port, of an IPv4-mapped address the IPv4 one."""
    return address[0].removeprefix("::ffff:"), address[1]


def end_of(connection: socket.socket, remote: Any = None) -> End:
    return End(
        os.getpid(),
        Path("/proc/self/comm").read_text().strip(),
        netns_inode(),
        plain(connection.getsockname()),
        plain(remote or connection.getpeername()),
    )


def end_in(event: Any) -> End:
    local = event.local_addr, event.local_port
    return End(event.pid, event.comm, event.netns, local, (event.remote_addr, event.remote_port))


def assert_seen(recording: Recording, *seen: Seen) -> None:
    """The events are what the processes saw, and nothing else."""
    # Of connections of others that are older than the agent nobody knows the owner, so no filter
    # keeps their end back; they are in other network namespaces.
    own = {made.netns for one in seen for made, _ in (*one.tried, *one.taken)}
    own |= {closed.end.netns for one in seen for closed in one.closed}
    connects, accepts, closes = (
        [event for event in recording.of(kind) if event.netns in own]
        for kind in ("net.connect", "net.accept", "net.close")
    )
    tried = Counter(made for one in seen for made in one.tried)
    taken = Counter(made for one in seen for made in one.taken)
    closed = Counter(made for one in seen for made in one.closed)
    assert Counter((end_in(e), e.errno) for e in connects) == tried
    accepted = Counter((end_in(e), e.fd) for e in accepts)
    assert accepted <= taken
    # Where the program at accept() was left out, and that counted, it is the listener's still.
    unseen = {(end.local, end.remote) for end, _ in taken - accepted}
    assert len(unseen) == (taken - accepted).total()
    assert not unseen or len(unseen) <= accepts_missed(recording)
    assert Counter(of_nobody(closed_in(e), unseen) for e in closes) == Counter(
        of_nobody(each, unseen) for each in closed.elements()
    )
    assert {e.direction for e in connects} <= {OUTBOUND}
    assert {e.direction for e in accepts} <= {INBOUND}
    for event in (*connects, *accepts, *closes):
        assert event.ip_version == (6 if ":" in event.remote_addr else 4)
        assert (event.cgroup_id, event.truncated, event.invalid_utf8, event.incomplete) == (
            int(recording.manifest.filters["cgroups"][0]),
            (),
            False,
            False,
        )
        assert event.owner_known
    assert recording.losses == []


def accepts_missed(recording: Recording) -> int:
    """How often the kernel left the programs at accept() out: before 7.0 it does not."""
    missed = recording.heartbeat.missed
    return sum(n for program, n in missed.items() if program.startswith("on_accept"))


def of_nobody(closed: Closed, connections: set[tuple[Any, Any]]) -> Closed:
    """Without its owner, if it is one of these."""
    if (closed.end.local, closed.end.remote) not in connections:
        return closed
    return closed._replace(end=closed.end._replace(pid=0, comm=""))


def closed_in(event: Any) -> Closed:
    return Closed(
        end_in(event), event.direction, event.bytes_sent, event.bytes_received, event.errno
    )


def streamed(scope: Scope, directory: Path, function: Any, *given: Any) -> Recording:
    """Let the function act, and check the events against the `Seen` that it returns."""
    with Agent(directory, *scope.options, events=NET) as agent:
        before = time.monotonic_ns()
        seen = scope.act(in_own_network, function, *given)
        closes = sum(len(one.closed) for one in seen)
        if closes:
            agent.wait_for(b'{"event":"net.close"', closes)
        took = time.monotonic_ns() - before
        recording = agent.stop()
    assert_seen(recording, *seen)
    if not kernel_is(7, 0):  # no other lets both programs at a change be preempted
        assert "change_unseen" not in recording.heartbeat.faults
    for event in recording.of("net.connect"):
        assert (0 if event.errno else 1) <= event.latency_ns < took  # without a SYN: 0
    assert all(0 < event.duration_ns < took for event in recording.of("net.close"))
    return recording


# ---------------------------------------------------------------- transfers, byte by byte


class Transfer(NamedTuple):
    """What passes over a connection, and how its client ends it."""

    there: int
    back: int
    ending: str  # "first": the client closes first; "last"; "half": it ends its half first


SIZES = (0, 1, 1447, 1448, 1449, 65536, MEGABYTES)
TRANSFERS = [
    Transfer(there, SIZES[(i + 3 * j) % len(SIZES)], ending)
    for i, there in enumerate(SIZES)
    for j, ending in enumerate(("first", "last", "half"))
]
TARGETS = {
    "v4": ("127.0.0.1", "127.0.0.1"),
    "v6": ("::1", "::1"),
    "mapped": ("::", "127.0.0.1"),
    "any6": ("::", "::1"),
}


def receive(connection: socket.socket, size: int) -> int:
    """Read exactly `size` bytes."""
    left = size
    while left:
        part = connection.recv(min(left, 1 << 16))
        assert part
        left -= len(part)
    return size


def ended(connection: socket.socket) -> bool:
    return connection.recv(1) == b""


def serve(listener: socket.socket, transfers: Sequence[Transfer]) -> Seen:
    seen = Seen([], [], [])
    for transfer in transfers:
        connection, _ = listener.accept()
        end = end_of(connection)
        seen.taken.append((end, connection.fileno()))
        receive(connection, transfer.there)
        if transfer.ending == "half":
            assert ended(connection)
        connection.sendall(b"b" * transfer.back)
        if transfer.ending == "first":
            assert ended(connection)
        connection.close()
        seen.closed.append(Closed(end, INBOUND, transfer.back, transfer.there, 0))
    return seen


def use(target: tuple[str, int], transfers: Sequence[Transfer]) -> Seen:
    seen = Seen([], [], [])
    for transfer in transfers:
        connection = socket.create_connection(target)
        end = end_of(connection)
        seen.tried.append((end, 0))
        connection.sendall(b"a" * transfer.there)
        if transfer.ending == "half":
            connection.shutdown(socket.SHUT_WR)
        receive(connection, transfer.back)
        if transfer.ending != "first":
            assert ended(connection)
        connection.close()
        seen.closed.append(Closed(end, OUTBOUND, transfer.there, transfer.back, 0))
    return seen


def listening(address: str, backlog: int = 128) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server(
        (address, 0), family=family, backlog=backlog, dualstack_ipv6=address == "::"
    )


def transfer_everything() -> list[Seen]:
    """Listen in one process, accept in another, connect from a third."""
    roles = []
    for bound, address in TARGETS.values():
        with listening(bound) as listener:
            roles.append(Role("acceptor", serve, listener, TRANSFERS))
            target = address, listener.getsockname()[1]
            roles.append(Role("client", use, target, TRANSFERS))
    return [role.result() for role in roles]


def test_every_byte_of_every_connection(scope: Scope, tmp_path: Path) -> None:
    """IPv4, IPv6 and IPv4 over IPv6, closed from either side: exact bytes at both ends.

    The owner of an accepted connection is the process that accepted it and not the one that
    listened, although the changes of state happen in interrupts of others.
    """
    recording = streamed(scope, tmp_path, transfer_everything)
    connections = len(TARGETS) * len(TRANSFERS)
    assert len(recording.of("net.connect")) == connections
    assert len(recording.of("net.accept")) >= connections - accepts_missed(recording)
    assert len(recording.of("net.close")) == 2 * connections
    assert {event.comm for event in recording.of("net.accept")} == {"acceptor"}


# ---------------------------------------------------------------- many at once

CLIENTS, CONNECTIONS = 4, repetitions(250, 25)


def connect_often(target: tuple[str, int]) -> Seen:
    return use(target, [Transfer(i, 2 * i, "first") for i in range(CONNECTIONS)])


def serve_anyone(listener: socket.socket) -> Seen:
    """Read what comes, answer twice as much, and see the client close."""
    seen = Seen([], [], [])
    for _ in range(CLIENTS * CONNECTIONS // 2):
        connection, _ = listener.accept()
        end = end_of(connection)
        seen.taken.append((end, connection.fileno()))
        received = sent = 0
        while data := connection.recv(1 << 16):
            received += len(data)
            connection.sendall(2 * data)
            sent += 2 * len(data)
        connection.close()
        seen.closed.append(Closed(end, INBOUND, sent, received, 0))
    return seen


def connect_from_many() -> list[Seen]:
    with listening("127.0.0.1") as listener:
        target = listener.getsockname()
        roles = [Role(f"worker-{n}", serve_anyone, listener) for n in range(2)]
        roles += [Role(f"client-{n}", connect_often, target) for n in range(CLIENTS)]
        return [role.result() for role in roles]


def test_every_connection_of_a_thousand(scope: Scope, tmp_path: Path) -> None:
    recording = streamed(scope, tmp_path, connect_from_many)
    kinds = Counter(kind_of(event) for event in recording.events)
    connections = CLIENTS * CONNECTIONS
    assert kinds["net.connect"] == connections
    assert kinds["net.accept"] >= connections - accepts_missed(recording)
    assert kinds["net.close"] == 2 * connections


# ---------------------------------------------------------------- unusual ends


def reset_connections() -> list[Seen]:
    """Reset by the client, then by the server, each time after some bytes both ways."""
    seen = Seen([], [], [])
    with listening("127.0.0.1") as listener:
        for server_resets in (False, True):
            client = socket.create_connection(listener.getsockname())
            server, _ = listener.accept()
            ends = end_of(client), end_of(server)
            seen.tried.append((ends[0], 0))
            seen.taken.append((ends[1], server.fileno()))
            client.sendall(b"a" * 1000)
            receive(server, 1000)
            server.sendall(b"b" * 77)
            receive(client, 77)
            active, passive = (server, client) if server_resets else (client, server)
            active.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            active.close()
            with pytest.raises(ConnectionResetError):
                passive.recv(1)
            passive.close()
            reset = errno.ECONNRESET
            seen.closed.append(Closed(ends[0], OUTBOUND, 1000, 77, reset * server_resets))
            seen.closed.append(Closed(ends[1], INBOUND, 77, 1000, reset * (not server_resets)))
    return [seen]


def test_resets(scope: Scope, tmp_path: Path) -> None:
    """The end that was reset has the error; the one that did it closed in order."""
    streamed(scope, tmp_path, reset_connections)


def close_at_once() -> list[Seen]:
    """Both ends end their halves before either knows of the other's."""
    seen = Seen([], [], [])
    with listening("::1") as listener:
        for _ in range(50):
            client = socket.create_connection(listener.getsockname()[:2])
            server, _ = listener.accept()
            ends = end_of(client), end_of(server)
            seen.tried.append((ends[0], 0))
            seen.taken.append((ends[1], server.fileno()))
            client.sendall(b"abc")
            receive(server, 3)
            client.shutdown(socket.SHUT_WR)
            server.shutdown(socket.SHUT_WR)
            client.close()
            server.close()
            seen.closed.append(Closed(ends[0], OUTBOUND, 3, 0, 0))
            seen.closed.append(Closed(ends[1], INBOUND, 0, 3, 0))
    return [seen]


def never_accept() -> list[Seen]:
    """A connection that waits to be accepted when its listener ends."""
    listener = listening("127.0.0.1")
    target = listener.getsockname()
    client = socket.create_connection(target)
    end = end_of(client)
    other = end._replace(local=end.remote, remote=end.local)
    listener.close()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    client.close()
    closed = [Closed(end, OUTBOUND, 0, 0, errno.ECONNRESET), Closed(other, INBOUND, 0, 0, 0)]
    return [Seen([(end, 0)], [], closed)]


def accept_late() -> list[Seen]:
    """The client has closed, or reset, before the connection is accepted by another process."""
    seen = Seen([], [], [])
    with listening("127.0.0.1") as listener:
        for resets in (False, True):
            client = socket.create_connection(listener.getsockname())
            end = end_of(client)
            client.sendall(b"early")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", resets, 0))
            client.close()
            seen.tried.append((end, 0))
            seen.closed.append(Closed(end, OUTBOUND, 5, 0, 0))
            if resets:  # closed before anybody accepted it: that is the listening process's
                late = end._replace(local=end.remote, remote=end.local)
                seen.closed.append(Closed(late, INBOUND, 0, 5, errno.ECONNRESET))
            late_seen = Role("latecomer", take_late, listener, end.local, resets).result()
            seen.taken.extend(late_seen.taken)
            seen.closed.extend(late_seen.closed)
    return [seen]


def take_late(listener: socket.socket, remote: tuple[str, int], was_reset: bool) -> Seen:
    connection, _ = listener.accept()
    end = end_of(connection, remote)
    taken = [(end, connection.fileno())]
    if not was_reset:
        receive(connection, 5)
        assert ended(connection)
    connection.close()
    return Seen([], taken, [] if was_reset else [Closed(end, INBOUND, 0, 5, 0)])


def connect_to_itself() -> list[Seen]:
    """A simultaneous open: the socket is its own peer."""
    client = socket.socket()
    client.bind(("127.0.0.1", 0))
    client.connect(client.getsockname())
    end = end_of(client)
    client.sendall(b"echo")
    receive(client, 4)
    client.close()
    return [Seen([(end, 0)], [], [Closed(end, OUTBOUND, 4, 4, 0)])]


@pytest.mark.parametrize("function", [close_at_once, never_accept, accept_late, connect_to_itself])
def test_unusual_connections(scope: Scope, tmp_path: Path, function: Any) -> None:
    streamed(scope, tmp_path, function)


# ---------------------------------------------------------------- connects that fail


def fail_to_connect() -> list[Seen]:
    seen = Seen([], [], [])
    for address in ("127.0.0.1", "::1"):
        refuse(seen, address)
        refuse_later(seen, address)
    find_no_room(seen)
    connect_twice(seen)
    roles = [Role("stranded", find_no_route, address) for address in ("192.0.2.1", "2001:db8::1")]
    return [seen, *(role.result() for role in roles)]


def unused(address: str) -> socket.socket:
    """A socket that is bound and does not listen."""
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    made.bind((address, 0))
    return made


def refuse(seen: Seen, address: str) -> None:
    with unused(address) as target, unused(address) as client:
        end = end_of(client, target.getsockname())
        assert client.connect_ex(target.getsockname()) == errno.ECONNREFUSED
        seen.tried.append((end, errno.ECONNREFUSED))


def refuse_later(seen: Seen, address: str) -> None:
    """The same, without waiting in connect()."""
    with unused(address) as target, unused(address) as client:
        client.setblocking(False)
        end = end_of(client, target.getsockname())
        result = client.connect_ex(target.getsockname())
        if result == errno.EINPROGRESS:
            await_writable(client)
            result = client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        assert result == errno.ECONNREFUSED
        seen.tried.append((end, errno.ECONNREFUSED))


def await_writable(client: socket.socket) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(client, selectors.EVENT_WRITE)
        assert selector.select(seconds(10))


def find_no_room(seen: Seen) -> None:
    """A listener whose queue is full answers nothing: one client times out, one gives up."""
    with listening("127.0.0.1", backlog=0) as listener:
        target = listener.getsockname()
        with socket.create_connection(target) as first:
            end = end_of(first)
            seen.tried.append((end, 0))
            for gives_up in (False, True):
                wait_in_vain(seen, target, gives_up)
        server, _ = listener.accept()
        other = end_of(server, end.local)
        seen.taken.append((other, server.fileno()))
        server.close()
    seen.closed.append(Closed(end, OUTBOUND, 0, 0, 0))
    seen.closed.append(Closed(other, INBOUND, 0, 0, 0))


def wait_in_vain(seen: Seen, target: tuple[str, int], gives_up: bool) -> None:
    with unused("127.0.0.1") as client:
        end = end_of(client, target)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 100)
        client.setblocking(False)
        assert client.connect_ex(target) == errno.EINPROGRESS
        if gives_up:
            seen.tried.append((end, errno.ECONNABORTED))
            return
        await_writable(client)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ETIMEDOUT
        seen.tried.append((end, errno.ETIMEDOUT))


def connect_twice(seen: Seen) -> None:
    """The local port is taken for this very target already."""
    with listening("127.0.0.1") as listener:
        target = listener.getsockname()
        with socket.create_connection(target) as first, socket.socket() as second:
            end = end_of(first)
            seen.tried.append((end, 0))
            second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            assert second.connect_ex(target) == 0
            again = end_of(second)
            seen.tried.append((again, 0))
            # An established socket cannot connect: no attempt is made.
            assert second.connect_ex(target) == errno.EISCONN
            assert second.connect_ex(target) == errno.EISCONN
        for one in (end, again):
            server, _ = listener.accept()
            other = end_of(server, one.local)
            seen.taken.append((other, server.fileno()))
            server.close()
            seen.closed.append(Closed(one, OUTBOUND, 0, 0, 0))
            seen.closed.append(Closed(other, INBOUND, 0, 0, 0))


def find_no_route(address: str) -> Seen:
    """In a network namespace where nothing is reachable."""
    leave_network()
    any_address = "::" if ":" in address else "0.0.0.0"
    seen = Seen([], [], [])
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as client:
        result = client.connect_ex((address, 443))
        assert result in (errno.ENETUNREACH, errno.EADDRNOTAVAIL)
        end = end_of(client, (address, 443))._replace(local=(any_address, 0))
        seen.tried.append((end, result))
    return seen


def test_connects_that_fail(scope: Scope, tmp_path: Path) -> None:
    streamed(scope, tmp_path, fail_to_connect)


def succeed_later() -> list[Seen]:
    """Connect without waiting in connect(), and ask it again meanwhile."""
    seen = Seen([], [], [])
    with listening("127.0.0.1") as listener, socket.socket() as client:
        client.setblocking(False)
        assert client.connect_ex(listener.getsockname()) in (0, errno.EINPROGRESS)
        await_writable(client)
        assert client.connect_ex(listener.getsockname()) in (0, errno.EISCONN)
        end = end_of(client)
        seen.tried.append((end, 0))
        server, _ = listener.accept()
        other = end_of(server)
        seen.taken.append((other, server.fileno()))
        server.close()
    seen.closed.append(Closed(end, OUTBOUND, 0, 0, 0))
    seen.closed.append(Closed(other, INBOUND, 0, 0, 0))
    return [seen]


def test_a_connect_that_does_not_wait(scope: Scope, tmp_path: Path) -> None:
    streamed(scope, tmp_path, succeed_later)


# ---------------------------------------------------------------- network namespaces


def connect_between(names: tuple[str, str]) -> list[Seen]:
    """From the second namespace to the first, over IPv4 and IPv6."""
    seen = []
    for address in ("192.0.2.1", "2001:db8::1"):
        reader, writer = os.pipe()
        server = Role("far-server", serve_in, names[0], address, writer)
        os.close(writer)
        port = int(os.read(reader, 16))
        os.close(reader)
        client = Role("far-client", use_in, names[1], (address, port))
        seen += [server.result(), client.result()]
    return seen


def serve_in(name: str, address: str, port_to: int) -> Seen:
    enter_netns(name)
    with listening(address) as listener:
        os.write(port_to, str(listener.getsockname()[1]).encode())
        return serve(listener, TRANSFERS)


def use_in(name: str, target: tuple[str, int]) -> Seen:
    enter_netns(name)
    return use(target, TRANSFERS)


def test_connections_between_network_namespaces(scope: Scope, tmp_path: Path) -> None:
    """Each event has the network namespace of its own end."""
    with two_namespaces() as names:
        recording = streamed(scope, tmp_path, connect_between, names)
    assert len({event.netns for event in recording.events}) == 2
    assert netns_inode() not in {event.netns for event in recording.events}


# ---------------------------------------------------------------- older than the agent


def outlive() -> list[Seen]:
    """A connection made and used before the agent starts, and closed when it runs."""
    with listening("127.0.0.1") as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    client.sendall(b"a" * 1234)
    receive(server, 1234)
    ends = end_of(client), end_of(server)
    checkpoint()
    server.sendall(b"b" * 56)
    receive(client, 56)
    client.close()
    assert ended(server)
    server.close()
    closed = [Closed(ends[0], UNKNOWN, 1234, 56, 0), Closed(ends[1], UNKNOWN, 56, 1234, 0)]
    return [Seen([], [], closed)]


def test_connections_older_than_the_agent(scope: Scope, tmp_path: Path) -> None:
    """Who opened it and when is not known; bytes, owner and end are."""
    with scope.start(in_own_network, outlive) as actor:
        actor.reached()
        with Agent(tmp_path, *scope.options, events=NET) as agent:
            actor.proceed()
            seen = actor.result()
            agent.wait_for(b'{"event":"net.close"', 2)
            recording = agent.stop()
    assert_seen(recording, *seen)
    assert [event.duration_ns for event in recording.events] == [0, 0]
