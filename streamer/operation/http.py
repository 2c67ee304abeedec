"""`/metrics`, `/healthz` and `/readyz` over HTTP: a GET, its answer, the end of the connection."""

from __future__ import annotations

import ipaddress
import re
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

from streamer.errors import ConfigError
from streamer.operation.look import Look
from streamer.operation.metrics import CONTENT_TYPE, exposition
from streamer.operation.server import BACKLOG, Bounds, Protocol, Server

KEPT_SECONDS = 0.25
"""Who asks again so soon gets the same answer: many who ask cost no more than a few."""

_TEXT = "text/plain; charset=utf-8"
_END = re.compile(rb"\r?\n\r?\n")
_LINE = re.compile(rb"([A-Z]{1,16}) (/[!-~]{0,1000}) HTTP/1\.[01]")
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


class Address(NamedTuple):
    """Where to listen."""

    host: str
    port: int

    @property
    def is_local(self) -> bool:
        """Whether only this host can reach it."""
        return ipaddress.ip_address(self.host).is_loopback


def listening(address: Address) -> socket.socket:
    """A socket that listens there. To be made before privileges are given up.

    Raises:
        ConfigError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        shown = f"{address.host}:{address.port}"
        raise ConfigError(f"metrics.listen: {shown} cannot be had: {error.strerror}") from None
    made.setblocking(False)
    return made


class Pages:
    """What is answered to a request."""

    def __init__(self, look: Callable[[], Look], clock: Callable[[], float] = time.monotonic):
        """`look` looks at the agent."""
        self._look_now = look
        self._clock = clock
        self._kept: tuple[float, Look] | None = None
        self._metrics: tuple[Look, bytes] | None = None

    def answer(self, request: bytes) -> bytes:
        """The whole answer to a request, which may be any bytes."""
        head = _END.search(request)
        if head is None:
            return _page(431, _TEXT, b"the request is too long\n")
        line = _LINE.fullmatch(request.split(b"\n", 1)[0].rstrip(b"\r"))
        if line is None:
            return _page(400, _TEXT, b"that is no request of HTTP/1.1\n")
        method, target = line[1], line[2].partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            return _page(405, _TEXT, b"only GET\n", "Allow: GET, HEAD\r\n")
        page = self._page_of(target)
        return page if method == b"GET" else page[: _end_of_head(page)]

    def _page_of(self, target: bytes) -> bytes:
        match target:
            case b"/metrics":
                return self._metrics_page()
            case b"/healthz":
                return _page(200, _TEXT, b"ok\n")  # answered on the loop that all else is done on
            case b"/readyz":
                why = self._look().not_ready
                body = "".join(f"{one}\n" for one in why) or "ok\n"
                return _page(503 if why else 200, _TEXT, body.encode("utf-8", "replace"))
        return _page(404, _TEXT, b"there are /metrics, /healthz and /readyz\n")

    def _look(self) -> Look:
        now = self._clock()
        if self._kept is None or now - self._kept[0] >= KEPT_SECONDS:
            self._kept = now, self._look_now()
        return self._kept[1]

    def _metrics_page(self) -> bytes:
        look = self._look()
        if self._metrics is None or self._metrics[0] is not look:
            self._metrics = look, _page(200, CONTENT_TYPE, exposition(look))
        return self._metrics[1]


def serve(listener: socket.socket, look: Callable[[], Look]) -> Server:
    """Answer on `listener` from now on, on the running loop."""
    protocol = Protocol(lambda request: bool(_END.search(request)), Pages(look).answer)
    return Server(listener, protocol, Bounds())


def _end_of_head(page: bytes) -> int:
    return page.index(b"\r\n\r\n") + 4


def _page(status: int, content_type: str, body: bytes, more: str = "") -> bytes:
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\n"
        f"X-Content-Type-Options: nosniff\r\n{more}Connection: close\r\n\r\n"
    )
    return head.encode() + body
