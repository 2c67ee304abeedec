"""What the kernel says of a connection that nothing comes through."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from streamer.sinks.sockets import unheard_seconds
from tests.faults.proxy import deafen, hear


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The two ends of a connection."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as near,
    ):
        far, _ = server.accept()
        with far:
            yield near, far


def test_one_that_is_confirmed_is_heard(pair: tuple[socket.socket, socket.socket]) -> None:
    """Also if nobody reads, and after a pause."""
    near, _ = pair
    near.settimeout(0.2)
    with pytest.raises(TimeoutError):
        near.sendall(bytes(64 << 20))
    time.sleep(1)
    assert unheard_seconds(near) == 0


def test_one_that_is_not_confirmed(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    deafen(far)
    near.send(b"x")
    time.sleep(1.5)
    assert 1.4 < unheard_seconds(near) < 5
    hear(far)
    time.sleep(2.5)
    assert unheard_seconds(near) == 0


def test_one_that_is_still_heard(pair: tuple[socket.socket, socket.socket]) -> None:
    """Nothing comes through to the other end, which sends again what it has."""
    near, far = pair
    deafen(far)
    near.send(b"x")
    far.send(b"y")  # what confirms it is dropped
    time.sleep(4)
    assert near.recv(1) == b"y"
    assert 2 < unheard_seconds(near) < 5


def test_one_that_is_idle_for_long(pair: tuple[socket.socket, socket.socket]) -> None:
    """Whose next packet is under way: it was not sent twice."""
    near, far = pair
    near.send(b"x")
    far.recv(1)
    time.sleep(1)
    deafen(far)
    near.send(b"x")
    assert unheard_seconds(near) == 0


def test_no_connection() -> None:
    near, far = socket.socketpair()  # of the kind that is not TCP
    assert (unheard_seconds(near), unheard_seconds(None)) == (0, 0)
    near.close()
    far.close()
