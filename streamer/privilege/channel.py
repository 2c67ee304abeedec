"""Messages between the two processes: JSON objects and descriptors over a socketpair.

A message is one packet of a SOCK_SEQPACKET socket, so that none can run into the next.
"""

from __future__ import annotations

import json
import os
import select
import socket
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

MESSAGE_BYTES = 1 << 17
"""The largest message; a socket's buffer has room for one (net.core.wmem_default is 212,992)."""
MOST_DESCRIPTORS = 253
"""The most descriptors that a message can carry (SCM_MAX_FD)."""

Message = dict[str, Any]


class MessageError(Exception):
    """A packet that is no message. The next packet may be one."""


class Channel:
    """One end of the socketpair."""

    def __init__(self, end: socket.socket, descriptors: int) -> None:
        """`descriptors` is how many a message may bring; the kernel drops those of others."""
        self._socket = end
        self._room = socket.CMSG_SPACE(descriptors * array("i").itemsize) if descriptors else 0

    def fileno(self) -> int:
        """The descriptor of the socket: readable when there is a message, or the other end gone."""
        return self._socket.fileno()

    def settimeout(self, seconds: float | None) -> None:
        """How long `send` and `receive` wait before they raise TimeoutError."""
        self._socket.settimeout(seconds)

    def send(self, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send a message, and duplicates of `descriptors`.

        Raises:
            MessageError: it is too large.
            OSError: the other end has gone, or does not read in time.
        """
        data = json.dumps(message, separators=(",", ":")).encode()
        if len(data) > MESSAGE_BYTES or len(descriptors) > MOST_DESCRIPTORS:
            raise MessageError(f"{len(data)} bytes and {len(descriptors)} descriptors")
        ancillary = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
        )
        self._socket.sendmsg([data], ancillary)

    def receive(self) -> tuple[Message, list[int]] | None:
        """The next message and its descriptors, which are the caller's. None: the other end went.

        What that end had sent before is still received, and what it had not is lost.

        Raises:
            MessageError: it is too large, or no JSON object. Its descriptors are closed.
            OSError: there is none in time.
        """
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                MESSAGE_BYTES, self._room, socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError:  # it went before it had read all that was sent to it
            return None
        descriptors = _descriptors(ancillary)
        if not data and self.gone():  # an empty packet looks like the end
            _close(descriptors)
            return None
        try:
            return _decoded(data, flags), descriptors
        except BaseException:
            _close(descriptors)
            raise

    def gone(self) -> bool:
        """Whether the other end has gone."""
        poll = select.poll()
        poll.register(self._socket, 0)
        return bool(poll.poll(0))

    def readable(self) -> bool:
        """Whether a message waits, or the other end has gone."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close this end."""
        self._socket.close()


def _decoded(data: bytes, flags: int) -> Message:
    if flags & socket.MSG_TRUNC:
        raise MessageError(f"a message of more than {MESSAGE_BYTES} bytes")
    if flags & socket.MSG_CTRUNC:
        raise MessageError("more descriptors than allowed")
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        raise MessageError("no JSON") from None
    if type(message) is not dict:
        raise MessageError("no JSON object")
    return message


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    found = array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return found.tolist()


def _close(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)
