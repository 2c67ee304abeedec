"""What the kernel says of a connection: `struct tcp_info` of linux/tcp.h."""

from __future__ import annotations

import socket
import struct
from typing import Protocol

_INFO = struct.Struct("=2xB5xI44xI")
"""`tcpi_retransmits`, how often in a row it was sent again; `tcpi_rto`, how long it waits now
before it does so again, in microseconds; `tcpi_last_ack_recv`, in milliseconds.
"""
LEAST_RETRANSMITS = 2
"""Once can happen to any packet, and an idle connection has heard nothing for long."""


UNHEARD_SECONDS = 2.0
"""How long a connection may confirm nothing of what was sent before another is tried."""
REPLACE_SECONDS = 2.5
"""How long the connection may take to be made that would stand for a silent one."""


class HasOptions(Protocol):
    """A socket, or what asyncio gives in its place."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
        """An option of `buflen` bytes."""


def unheard_seconds(sock: HasOptions | None) -> float:
    """How long the peer's kernel has confirmed nothing, if it was sent the same again and again.

    0 otherwise. A peer that is alive confirms what it gets, however slow the program there is, and
    whether or not it reads.
    """
    if sock is None:
        return 0.0
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
    except OSError:
        return 0.0
    if len(info) < _INFO.size:
        return 0.0
    retransmits, wait_us, last_ack_ms = _INFO.unpack(info)
    if retransmits < LEAST_RETRANSMITS:
        return 0.0
    # Each wait is twice the one before. A peer to which nothing comes through may itself still be
    # heard, as long as it sends again what it has: then the waits say how long it confirms nothing.
    waited_us = wait_us * (1 - 0.5**retransmits)
    return float(max(last_ack_ms / 1e3, waited_us / 1e6))
