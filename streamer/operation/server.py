"""Answers short requests on a socket, at a cost that has a bound whoever asks.

A request is read until it is complete, answered once, and the connection is closed. There are at
most so many connections, each for at most so long, with a request of at most so many bytes; when
another comes, the oldest goes. Not more than so many a second are taken: what else waits is the
kernel's, in a backlog that has a bound, too. Answers that are the same bytes are held once.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

_log = logging.getLogger("streamer")

BACKLOG = 128
"""Connections that wait in the kernel: those of a third of a second, see `Bounds`."""
_READ = 4096
_NO_DESCRIPTOR_SECONDS = 1.0


class Bounds(NamedTuple):
    """How much others may cost.

    `connections` at a time, each for `seconds`, with a request of `request` bytes; `burst` are
    taken in each `pause` seconds.
    """

    connections: int = 16
    seconds: float = 5.0
    request: int = 8192
    burst: int = 8
    pause: float = 0.02


class Protocol(NamedTuple):
    """What a server speaks.

    `complete` says whether a request is; `answer` is the answer to one, or to one that is too
    long. `admit` says whether whoever has connected may ask.
    """

    complete: Callable[[bytes], bool]
    answer: Callable[[bytes], bytes]
    admit: Callable[[socket.socket], bool] = lambda peer: True


class Server:
    """Takes connections of a listening socket on the running loop."""

    def __init__(self, listener: socket.socket, protocol: Protocol, bounds: Bounds) -> None:
        """`listener` listens, does not block, and is closed with the server."""
        self._listener = listener
        self._protocol = protocol
        self._bounds = bounds
        self._open: dict[_Connection, None] = {}  # the oldest first
        self._loop = asyncio.get_running_loop()
        self._resume: asyncio.TimerHandle | None = None
        self._period_ends = 0.0
        self._in_period = 0
        self.taken = 0
        """Connections so far."""
        self._listen()

    @property
    def open(self) -> int:
        """Connections that are open now."""
        return len(self._open)

    def close(self) -> None:
        """Take no more, and leave those that are there. Harmless when it is closed."""
        if self._resume is not None:
            self._resume.cancel()
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
        for connection in list(self._open):
            connection.close()

    def _listen(self) -> None:
        self._resume = None
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _rest(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener.fileno())
        self._resume = self._loop.call_later(seconds, self._listen)

    def _accept(self) -> None:
        now = self._loop.time()
        if now >= self._period_ends:
            self._period_ends, self._in_period = now + self._bounds.pause, 0
        while self._in_period < self._bounds.burst:
            try:
                peer, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptor is left: that of others must not be taken
                _log.debug("no connection can be taken: %s", error.strerror)
                self._rest(_NO_DESCRIPTOR_SECONDS)
                return
            self.taken += 1
            self._in_period += 1
            self._begin(peer)
        self._rest(max(self._period_ends - self._loop.time(), 0.001))

    def _begin(self, peer: socket.socket) -> None:
        if not self._protocol.admit(peer):
            peer.close()
            return
        if len(self._open) >= self._bounds.connections:
            next(iter(self._open)).close()
        connection = _Connection(peer, self._protocol, self._bounds, self._loop, self._open)
        self._open[connection] = None
        connection.read()  # what was sent along is answered at once, before the next one comes


class _Connection:
    """One request and its answer."""

    def __init__(
        self,
        peer: socket.socket,
        protocol: Protocol,
        bounds: Bounds,
        loop: asyncio.AbstractEventLoop,
        among: dict[_Connection, None],
    ) -> None:
        peer.setblocking(False)
        self._peer = peer
        self._protocol = protocol
        self._bounds = bounds
        self._loop = loop
        self._among = among
        self._request = b""
        self._answer = memoryview(b"")
        self._deadline = loop.call_later(bounds.seconds, self.close)
        loop.add_reader(peer.fileno(), self.read)

    def read(self) -> None:
        try:
            data = self._peer.recv(_READ)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._request += data
        if len(self._request) > self._bounds.request or self._protocol.complete(self._request):
            self._loop.remove_reader(self._peer.fileno())
            self._begin_answer()

    def _begin_answer(self) -> None:
        try:
            self._answer = memoryview(self._protocol.answer(self._request))
        except Exception:  # a defect here must not become the agent's
            _log.exception("a request could not be answered")
            self.close()
            return
        self._request = b""
        self._loop.add_writer(self._peer.fileno(), self._write)
        self._write()

    def _write(self) -> None:
        try:
            self._answer = self._answer[self._peer.send(self._answer) :]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._answer = memoryview(b"")
        if not self._answer:
            with suppress(OSError):
                self._peer.shutdown(socket.SHUT_WR)
            self.close()

    def close(self) -> None:
        if self._among.pop(self, self) is self:  # it was closed before, or never opened
            return
        self._deadline.cancel()
        self._loop.remove_reader(self._peer.fileno())
        self._loop.remove_writer(self._peer.fileno())
        self._peer.close()
