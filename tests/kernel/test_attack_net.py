"""Unprivileged users who want nobody to see whose their connections are."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import free_port
from tests.kernel.agent import TCP_KINDS, Agent
from tests.kernel.roles import Role, in_own_network
from tests.kernel.scope import Scope
from tests.kernel.system import kernel_is
from tests.kernel.test_net import await_writable

pytestmark = pytest.mark.kernel

UID = 1_000_000 + os.getpid()
TCP_MD5SIG = 14


def become(uid: int) -> None:
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def set_key(connection: socket.socket, number: int, length: int = 1) -> None:
    """A key for a peer of that number; of length 0: none any more."""
    address = struct.pack("=H2xI120x", socket.AF_INET, socket.htonl(0x0A000000 + number))
    key = address + struct.pack("=BBHi80s", 0, 0, length, 0, b"k")
    connection.setsockopt(socket.IPPROTO_TCP, TCP_MD5SIG, key)


def use_up_memory(connection: socket.socket) -> int:
    """Fill what a socket may hold beside its data (net.core.optmem_max), with keys for peers."""
    for number in range(1 << 16):
        try:
            set_key(connection, number)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            return number
    raise AssertionError("there is no end to it")


def connect_without_room(uid: int) -> int:
    become(uid)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        keys = use_up_memory(client)
        client.connect(listener.getsockname())
        listener.accept()[0].close()
    return keys


def act(uid: int, function: Callable[[int], Any]) -> Any:
    return Role("attacker", function, uid).result()


def test_a_socket_without_room_has_an_owner(scope: Scope, tmp_path: Path) -> None:
    """A socket that has no room for its owner does not hide him: he is kept in the table."""
    with Agent(tmp_path, *scope.options, events=TCP_KINDS) as agent:
        assert scope.act(in_own_network, act, UID, connect_without_room) > 10
        agent.wait_for(b'{"event":"net.close"', 2)
        recording = agent.stop()
    assert len(recording.events) == 4
    assert {(e.comm, e.uid, e.owner_known) for e in recording.events} == {("attacker", UID, True)}
    kept_with_sockets = recording.ways["sock_state"].startswith("tp_btf/")
    expected = {"socket_storage"} if kept_with_sockets else set()
    # From 7.0 on both programs at a change can be preempted, others' changes included.
    faults = recording.heartbeat.faults.keys() - ({"change_unseen"} if kernel_is(7, 0) else set())
    assert faults == expected


def connect_while_room_comes(uid: int) -> float:
    """The seconds it takes: the first SYN finds no place, and by the second the socket has room."""
    become(uid)
    with socket.socket() as listener, socket.socket() as first, socket.socket() as client:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        first.connect(listener.getsockname())
        keys = use_up_memory(client)
        client.setblocking(False)
        began = time.monotonic()
        assert client.connect_ex(listener.getsockname()) == errno.EINPROGRESS
        for number in range(min(keys, 10)):
            set_key(client, number, 0)
        listener.accept()[0].close()
        await_writable(client)
        took = time.monotonic() - began
        listener.accept()[0].close()
    return took


def test_a_socket_that_gets_room_while_it_connects(scope: Scope, tmp_path: Path) -> None:
    """What the table has of it counts, and not what is not yet kept with the socket."""
    with Agent(tmp_path, *scope.options, events=TCP_KINDS) as agent:
        took = scope.act(in_own_network, act, UID, connect_while_room_comes)
        agent.wait_for(b'{"event":"net.close"', 4)
        recording = agent.stop()
    assert {(e.comm, e.uid, e.owner_known) for e in recording.events} == {("attacker", UID, True)}
    assert len(recording.of("net.connect")) == len(recording.of("net.accept")) == 2
    assert len(recording.of("net.close")) == 4
    slow = max(event.latency_ns for event in recording.of("net.connect"))
    assert 0.5e9 < slow <= took * 1e9


def connect_from(uid: int, port: int) -> None:
    """To a service of some other port, from the port that is excluded."""
    become(uid)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind(("127.0.0.1", port))
        client.connect(listener.getsockname())
        listener.accept()[0].close()


def test_ports_of_clients_hide_nothing(scope: Scope, tmp_path: Path) -> None:
    """A client chooses its port: only a service's excludes its connections."""
    port = free_port()
    with Agent(tmp_path, *scope.options, "--exclude-port", str(port), events=TCP_KINDS) as agent:
        scope.act(in_own_network, connect_from, UID, port)
        agent.wait_for(b'{"event":"net.close"', 2)
        recording = agent.stop()
    assert Counter(type(event).__name__ for event in recording.events) == {
        "NetConnect": 1,
        "NetAccept": 1,
        "NetClose": 2,
    }


NEIGHBOUR = "10.99.0.2"
LINK = """
ip link add one type veth peer name two
ip address add 10.99.0.1/24 dev one
ip link set one up
ip link set two up
"""


def fail_twice() -> None:
    """With the same socket and error: for want of a neighbour, then for want of a route."""
    subprocess.run(["sh", "-ec", LINK], check=True)
    with socket.socket() as client:
        client.setblocking(False)
        assert client.connect_ex((NEIGHBOUR, 80)) == errno.EINPROGRESS
        poll = select.poll()
        poll.register(client, select.POLLOUT)
        assert poll.poll(20_000)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.EHOSTUNREACH
        nowhere = struct.pack("=H14x", socket.AF_UNSPEC)
        assert ctypes.CDLL(None).connect(client.fileno(), nowhere, len(nowhere)) == 0
        subprocess.run(["ip", "route", "add", "unreachable", NEIGHBOUR], check=True)
        assert client.connect_ex((NEIGHBOUR, 80)) == errno.EHOSTUNREACH


def test_no_failure_stands_for_another(scope: Scope, tmp_path: Path) -> None:
    """A failure that nobody waited for is not taken for the next one's."""
    with Agent(tmp_path, *scope.options, events="net.connect") as agent:
        scope.act(in_own_network, fail_twice)
        recording = agent.stop()
    failures = [(e.remote_addr, e.errno) for e in recording.events]
    assert failures == [(NEIGHBOUR, errno.EHOSTUNREACH)] * 2
