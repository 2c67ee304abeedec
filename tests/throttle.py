"""A proxy that can be made slow: between the agent and a real broker.

What goes to the broker is passed on at most at a rate, which can be changed at any time; answers
are passed on as they come. It runs in threads of the test's own process.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import Self

CHUNK = 4096


class Throttle:
    """Listens on a loopback port for what is meant for another one."""

    def __init__(self, port: int = 0) -> None:
        """`port` 0 is any that is free."""
        self.rate: float | None = None
        """Bytes a second for all connections together; None: as fast as it goes."""
        self.target = 0
        """The port that it is all meant for."""
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self._turn = threading.Lock()
        self._open: list[socket.socket] = []
        self._ended = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended = True
        for one in (self._listener, *self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        while not self._ended:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            # A small one, so that what is held back is held by the sender.
            near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            self._open += [near, far]
            for one, other, slow in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._carry, args=(one, other, slow), daemon=True).start()

    def _carry(self, source: socket.socket, to: socket.socket, slow: bool) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK if slow else 1 << 16):
                if slow:
                    self._wait(len(data))
                to.sendall(data)
        for one in (source, to):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _wait(self, size: int) -> None:
        """Until so much may go; a rate that is lifted meanwhile lets it go at once."""
        with self._turn:
            begun = time.monotonic()
            while (rate := self.rate) is not None and time.monotonic() < begun + size / rate:
                time.sleep(0.005)
