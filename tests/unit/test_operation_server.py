"""Servers that answer short requests: every bound of what others may cost, over real sockets."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from streamer.operation import http
from streamer.operation.look import Look
from streamer.operation.server import Bounds, Protocol, Server
from tests.unit.test_service import until

BOUNDS = Bounds(connections=4, seconds=0.5, request=64, burst=3, pause=0.02)


class Echo:
    """A server whose request is a line, and whose answer is `body`."""

    def __init__(self, bounds: Bounds = BOUNDS, body: bytes = b"an answer") -> None:
        self.asked: list[bytes] = []
        self.body = body
        self.admits = True
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.listener.setblocking(False)
        self.address = self.listener.getsockname()
        protocol = Protocol(lambda data: b"\n" in data, self._answer, lambda peer: self.admits)
        self.server = Server(self.listener, protocol, bounds)

    def _answer(self, request: bytes) -> bytes:
        self.asked.append(request)
        if request == b"defect\n":
            raise ValueError("a defect")
        return self.body

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self.address)

    async def ask(self, request: bytes) -> bytes:
        reader, writer = await self.connect()
        writer.write(request)
        try:
            return await asyncio.wait_for(reader.read(), 5)
        finally:
            writer.close()


@pytest.fixture
async def echo() -> Iterator[Echo]:  # type: ignore[misc]
    made = Echo()
    yield made
    made.server.close()


async def test_a_request_in_pieces_is_answered_once(echo: Echo) -> None:
    echo.server._bounds = BOUNDS._replace(seconds=60)
    reader, writer = await echo.connect()
    for piece in (b"in ", b"pieces", b"\n"):
        writer.write(piece)
        await asyncio.sleep(0.02)
    assert await reader.read() == b"an answer"
    assert echo.asked == [b"in pieces\n"]
    writer.close()


async def test_a_long_request_is_answered_before_its_end(echo: Echo) -> None:
    await echo.ask(b"x" * 65)
    assert echo.asked == [b"x" * 65]


async def test_who_says_nothing_is_left(echo: Echo) -> None:
    begun = time.monotonic()
    reader, writer = await echo.connect()
    writer.write(b"almost")
    assert await reader.read() == b""
    assert time.monotonic() - begun > 0.4
    assert echo.server.open == 0
    writer.close()


async def test_who_does_not_read_is_left(echo: Echo) -> None:
    echo.body = b"x" * (16 << 20)
    begun = time.monotonic()
    with socket.create_connection(echo.address) as peer:
        peer.sendall(b"\n")
        await until(lambda: bool(echo.asked))
        assert echo.server.open == 1
        await until(lambda: echo.server.open == 0)
        assert time.monotonic() - begun > 0.3


async def test_the_oldest_makes_way(echo: Echo) -> None:
    echo.server._bounds = BOUNDS._replace(seconds=60)
    idle = [await echo.connect() for _ in range(4)]
    await until(lambda: echo.server.open == 4)
    assert await echo.ask(b"\n") == b"an answer"
    assert await asyncio.wait_for(idle[0][0].read(), 10) == b""
    assert not idle[1][0].at_eof()
    assert echo.server.open == 3
    for _, writer in idle:
        writer.close()


async def test_not_more_than_so_many_are_taken_a_second(echo: Echo) -> None:
    begun = time.monotonic()
    await asyncio.gather(*(echo.ask(b"\n") for _ in range(60)))
    assert time.monotonic() - begun >= 18 * BOUNDS.pause
    assert echo.server.taken == 60


async def test_who_waits_costs_nothing_until_more_are_taken(echo: Echo) -> None:
    echo.server._bounds = BOUNDS._replace(pause=0.1)
    looks, accept = 0, echo.server._accept

    def counted() -> None:
        nonlocal looks
        looks += 1
        accept()

    echo.server._accept = counted  # type: ignore[method-assign]
    await asyncio.gather(*(echo.ask(b"\n") for _ in range(30)))
    assert 0 < looks <= 30


async def test_nor_one_after_the_other(echo: Echo) -> None:
    begun = time.monotonic()
    for _ in range(60):
        assert await echo.ask(b"\n") == b"an answer"
    assert time.monotonic() - begun >= 18 * BOUNDS.pause


async def test_who_may_not_ask_is_left_unread(echo: Echo) -> None:
    echo.admits = False
    with suppress(ConnectionResetError):  # if it was noticed before the request was sent
        assert await echo.ask(b"\n") == b""
    assert not echo.asked


async def test_a_defect_costs_that_request(echo: Echo, caplog: pytest.LogCaptureFixture) -> None:
    assert await echo.ask(b"defect\n") == b""
    assert "a request could not be answered" in caplog.text
    assert await echo.ask(b"\n") == b"an answer"


async def test_a_closed_server_leaves_everybody(echo: Echo) -> None:
    reader, writer = await echo.connect()
    await until(lambda: echo.server.open == 1)
    echo.server.close()
    echo.server.close()
    assert await reader.read() == b""
    with pytest.raises(ConnectionRefusedError):
        await echo.connect()
    writer.close()


# ---------------------------------------------------------------- HTTP


def unasked() -> Look:
    raise AssertionError


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"HEAD /healthz HTTP/1.0\r\n\r\n", 200),
        (b"GET /healthz?x=1 HTTP/1.1\n\n", 200),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics/../etc/passwd HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 405),
        (b"GET /" + b"a" * 9000, 431),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET http://other/ HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/2\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400),
    ],
)
def test_requests(request_: bytes, status: int) -> None:
    answer = http.Pages(unasked).answer(request_)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nConnection: close" in head
    length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
    assert len(body) == (0 if request_.startswith(b"HEAD") else length)


def test_a_defect_of_a_look_is_not_a_request_of_others() -> None:
    with pytest.raises(AssertionError):
        http.Pages(unasked).answer(b"GET /metrics HTTP/1.1\r\n\r\n")
