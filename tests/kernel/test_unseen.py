"""Changes of a socket's state that neither program at their hook saw.

They come with kernels that preempt tasks at the ends of both; here by programs that look away.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bpf_variant import Variant
from tests.conftest import Require
from tests.kernel.agent import Agent, Recording
from tests.kernel.pace import seconds
from tests.kernel.roles import Role, in_own_network
from tests.kernel.scope import Scope
from tests.kernel.system import kernel_is, kernel_knows
from tests.kernel.test_net import (
    INBOUND,
    NET,
    OUTBOUND,
    Closed,
    Seen,
    Transfer,
    assert_seen,
    end_of,
    listening,
    receive,
    serve,
    use,
)

pytestmark = pytest.mark.kernel

Act = Callable[[], list[Seen]]
Record = Callable[[str, str, Act], tuple[Recording, list[Seen]]]

CONDITION = "if (!matters(from, to) || !is_tcp(sk))\n		return 0;\n	here"
UNSEEN = "change_unseen"
TRANSFERS = [Transfer(10 + n, 20 + n, ("first", "last", "half")[n % 3]) for n in range(12)]
CONNECTIONS = len(TRANSFERS)
WAITED = seconds(0.3)
"""Seconds between two connects of a socket."""


@pytest.fixture
def record(scope: Scope, tmp_path: Path, require_kernel: Require) -> Record:
    """What is recorded by other programs: a piece of net.bpf.c, what to put there, what to do."""
    require_kernel(kernel_is(6, 10), "before 6.10 one of the two programs sees every change")
    require_kernel(kernel_knows("bpf_preempt_disable"), "its BTF lacks what tells that it is")

    def run(old: str, new: str, act: Act) -> tuple[Recording, list[Seen]]:
        variant = Variant(tmp_path / "variant", {"net.bpf.c": (old, new)}, only=("core", "net"))
        prefix = variant.with_streamer()
        with Agent(tmp_path, *scope.options, events=NET, prefix=prefix) as agent:
            seen = scope.act(in_own_network, act)
            agent.wait_for(b'{"event":"net.close"', sum(len(one.closed) for one in seen))
            return agent.stop(), seen

    return run


@pytest.fixture
def blind(record: Record) -> Callable[[str, Act], tuple[Recording, list[Seen]]]:
    """`blind(condition, act)`: by programs that do not look at such a change."""
    return lambda condition, act: record(
        CONDITION, CONDITION.replace("if (", f"if (({condition}) || "), act
    )


Blind = Callable[[str, Act], tuple[Recording, list[Seen]]]


def assert_counted(recording: Recording, unseen: int) -> None:
    """Sockets of others, which these programs do not look at either, may have been counted too."""
    faults = recording.heartbeat.faults
    assert faults.keys() == {UNSEEN}
    assert faults[UNSEEN] >= unseen


def connect() -> list[Seen]:
    with listening("127.0.0.1") as listener:
        roles = [Role("acceptor", serve, listener, TRANSFERS)]
        roles += [Role("client", use, listener.getsockname(), TRANSFERS)]
        return [role.result() for role in roles]


def test_a_success_is_told_at_the_next_change(blind: Blind) -> None:
    """By whom and between whom is known; when it was is not."""
    recording, seen = blind("from == TCP_SYN_SENT && to == TCP_ESTABLISHED", connect)
    assert_seen(recording, *seen)
    assert {event.latency_ns for event in recording.of("net.connect")} == {0}
    durations = {(e.direction, e.duration_ns > 0) for e in recording.of("net.close")}
    assert durations == {(OUTBOUND, False), (INBOUND, True)}
    assert_counted(recording, CONNECTIONS)


def test_a_close_is_told_when_the_socket_is_destroyed(blind: Blind) -> None:
    recording, seen = blind("to == TCP_CLOSE && from != TCP_LISTEN", connect)
    assert_seen(recording, *seen)
    assert_counted(recording, 2 * CONNECTIONS)


def test_the_begin_of_a_close_is_missed_at_its_end(blind: Blind) -> None:
    """Whose the connections are is known from their begin."""
    recording, seen = blind("to == TCP_FIN_WAIT1 || to == TCP_LAST_ACK", connect)
    assert_seen(recording, *seen)
    assert_counted(recording, 2 * CONNECTIONS)


def test_a_connection_of_which_nothing_was_seen_is_counted(blind: Blind) -> None:
    """The accepts are seen all the same, and what they leave tells that more was to come."""
    recording, seen = blind("true", lambda: [one._replace(closed=[]) for one in connect()])
    accepted = sum(len(one.taken) for one in seen)
    assert [type(event).__name__ for event in recording.events] == ["NetAccept"] * accepted
    assert_counted(recording, CONNECTIONS)


def cut_off() -> list[Seen]:
    """The client resets, which ends its own side without a word, and the server's by a packet."""
    seen = Seen([], [], [])
    with listening("127.0.0.1") as listener:
        for _ in range(CONNECTIONS):
            client = socket.create_connection(listener.getsockname())
            seen.tried.append((end_of(client), 0))
            server, _ = listener.accept()
            seen.taken.append((end_of(server), server.fileno()))
            client.sendall(b"x" * 10)
            end = end_of(server)
            receive(server, 10)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            server.close()
            seen.closed.append(Closed(end, INBOUND, 0, 10, errno.ECONNRESET))
    return [seen]


def test_a_connection_that_was_cut_off_is_counted(blind: Blind) -> None:
    """Its socket has lost its addresses and its counts: an event of it would be made up."""
    recording, seen = blind("to == TCP_CLOSE && from != TCP_LISTEN", cut_off)
    assert_seen(recording, *seen)
    assert_counted(recording, 2 * CONNECTIONS)


def connect_again() -> list[Seen]:
    """A socket is refused, and later connects."""
    seen = Seen([], [], [])
    for _ in range(3):
        with listening("127.0.0.1") as listener, socket.socket() as client:
            client.bind(("127.0.0.1", 0))
            with listening("127.0.0.1") as gone:
                refusing = gone.getsockname()
            with pytest.raises(ConnectionRefusedError):
                client.connect(refusing)
            seen.tried.append((end_of(client, refusing), errno.ECONNREFUSED))
            time.sleep(WAITED)
            client.connect(listener.getsockname())
            seen.tried.append((end_of(client), 0))
            server, _ = listener.accept()
            seen.taken.append((end_of(server), server.fileno()))
            server.close()
            seen.closed.append(Closed(seen.taken[-1][0], INBOUND, 0, 0, 0))
            seen.closed.append(Closed(seen.tried[-1][0], OUTBOUND, 0, 0, 0))
    return [seen]


def test_a_socket_that_is_used_again_begins_anew(blind: Blind) -> None:
    """Although the last change that was seen of it led to the same state as the next."""
    recording, seen = blind("from == TCP_SYN_SENT && to == TCP_CLOSE", connect_again)
    assert_seen(recording, *seen)
    took = [event.latency_ns for event in recording.of("net.connect") if not event.errno]
    assert all(0 < latency < WAITED * 1e9 for latency in took)
    assert_counted(recording, 3)


def listen_again() -> list[Seen]:
    """A socket listens, stops, and listens for another process."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.shutdown(socket.SHUT_RD)
        return [Role("second", serve_one, listener).result()]


def serve_one(listener: socket.socket) -> Seen:
    """Listen, and let a connection be reset before it was accepted: the listener's own, so."""
    listener.listen()
    seen = Seen([], [], [])
    client = socket.create_connection(listener.getsockname())
    seen.tried.append((end_of(client), 0))
    inbound = end_of(client)
    inbound = inbound._replace(local=inbound.remote, remote=inbound.local)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    seen.closed.append(Closed(seen.tried[-1][0], OUTBOUND, 0, 0, 0))
    seen.closed.append(Closed(inbound, INBOUND, 0, 0, errno.ECONNRESET))
    return seen


def test_a_listener_is_whose_process_listens_now(blind: Blind) -> None:
    recording, seen = blind("from == TCP_LISTEN && to == TCP_CLOSE", listen_again)
    assert_seen(recording, *seen)
    assert {event.comm for event in recording.events} == {"second"}
    assert_counted(recording, 1)


def test_notes_by_cpu_are_not_relied_on(record: Record) -> None:
    """A task may have changed its CPU between the two programs: each event comes once."""
    noted = "!first_to_note(here, change, me)"
    recording, seen = record(noted, f"{noted} && false", connect)
    assert_seen(recording, *seen)
    assert recording.heartbeat.faults.keys() <= ({UNSEEN} if kernel_is(7, 0) else set())
