"""The socket at which `streamer status` and `streamer top` ask a running agent.

A request is a line, `status` or `top`; the answer is one JSON document. Only root, and the user who
started the agent, may ask: by the directory, the mode of the socket, and who the kernel says it is.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress

import msgspec

from streamer.errors import NoAnswer
from streamer.operation.server import BACKLOG, Bounds, Protocol, Server

ASK_SECONDS = 5.0
MOST_ANSWER = 16 << 20
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
BOUNDS = Bounds(connections=8, seconds=2.0, request=64)


class Listening:
    """A socket that listens at a path, and the lock that says that the path is its own."""

    def __init__(self, path: str) -> None:
        """To be made before privileges are given up, by the only thread.

        Raises:
            OSError: it cannot be had; `strerror` says why.
        """
        self.starter = os.geteuid()
        self._lock = _lock(path)
        try:
            self.socket = _bound(path)
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Harmless when it is closed. The path stays: to remove it takes rights."""
        self.socket.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def serve(self, answers: Mapping[str, Callable[[], msgspec.Struct]]) -> Server:
        """Answer from now on, on the running loop, each request by what it names."""

        def answer(request: bytes) -> bytes:
            asked = request.partition(b"\n")[0].decode("ascii", "replace")
            if asked not in answers:
                known = ", ".join(answers)
                return msgspec.json.encode({"error": f"{asked[:32]!r} is none of: {known}"}) + b"\n"
            return msgspec.json.encode(answers[asked]()) + b"\n"

        def admit(peer: socket.socket) -> bool:
            return peer_uid(peer) in (0, self.starter)

        return Server(self.socket, Protocol(lambda data: b"\n" in data, answer, admit), BOUNDS)


def peer_uid(peer: socket.socket) -> int:
    """The user id that whoever is at the other end had when it connected."""
    data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(data)[1])


def _lock(path: str) -> int:
    """A descriptor, which keeps other agents from the path as long as it is open."""
    directory = os.path.dirname(path)
    os.makedirs(directory, 0o755, exist_ok=True)
    status = os.stat(directory)
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        raise PermissionError(1, "others may write to its directory")
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(f"{path}.lock", flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise BlockingIOError(error.errno, "another agent has it") from None
    return fd


def _bound(path: str) -> socket.socket:
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(1, "something else is there")
        os.unlink(path)  # of a run that has ended: this one has the lock
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        made.bind(path)
        made.listen(BACKLOG)
        made.setblocking(False)
    except BaseException:
        made.close()
        raise
    finally:
        os.umask(before)
    return made


def ask(path: str, request: str, seconds: float = ASK_SECONDS) -> bytes:
    """The answer of the agent that listens at `path`.

    Raises:
        NoAnswer: there is none, it may not be asked, or it does not answer in time.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as own:
        own.settimeout(seconds)
        try:
            own.connect(path)
            own.sendall(f"{request}\n".encode())
            answer = _all(own)
        except (FileNotFoundError, ConnectionRefusedError):
            raise NoAnswer(f"no agent is running that can be asked at {path}") from None
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
        except TimeoutError:
            raise NoAnswer(f"the agent at {path} does not answer within {seconds:g} s") from None
        except OSError as error:
            raise NoAnswer(f"the agent at {path} cannot be asked: {error.strerror}") from None
    if not answer:
        raise NoAnswer(f"the agent at {path} does not answer who this is")
    return answer


def _all(own: socket.socket) -> bytes:
    parts: list[bytes] = []
    size = 0
    while part := own.recv(1 << 16):
        parts.append(part)
        size += len(part)
        if size > MOST_ANSWER:
            raise OSError(0, "its answer does not end")
    return b"".join(parts)
