"""A DNS server of the tests' own, which answers as it is told, and a real one: dnsmasq."""

from __future__ import annotations

import fcntl
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from tests.kernel.pace import seconds

PORT = 53
SIOCOUTQ = 0x5411
Answer = Callable[[bytes], list[bytes]]
"""What a server sends for a query."""


def question(name: bytes, kind: int = 1, klass: int = 1) -> bytes:
    """The question for a name of plain labels."""
    labels = (bytes([len(label)]) + label for label in name.split(b".") if label)
    return b"".join(labels) + b"\0" + struct.pack("!2H", kind, klass)


def query(number: int, asked: bytes, flags: int = 0x0100) -> bytes:
    return struct.pack("!6H", number, flags, 1, 0, 0, 0) + asked


def response(
    asked: bytes, records: bytes = b"", answers: int = 0, flags: int = 0x8180, more: int = 0
) -> bytes:
    """The response to a query with one question, with `records` behind it."""
    (number,) = struct.unpack_from("!H", asked)
    return struct.pack("!6H", number, flags, 1, answers, 0, more) + asked[12:] + records


def record(data: bytes, kind: int = 1, name: bytes = b"\xc0\x0c", ttl: int = 60) -> bytes:
    return name + struct.pack("!HHIH", kind, 1, ttl, len(data)) + data


@contextmanager
def serve(answer: Answer, address: str = "127.0.0.1", port: int = PORT) -> Iterator[None]:
    """Answer over UDP in a thread, in this network namespace."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as server:
        server.bind((address, port))
        thread = threading.Thread(target=_serve, args=(server, answer), daemon=True)
        thread.start()
        try:
            yield
        finally:
            with suppress(OSError):  # it is not connected, and gives up waiting all the same
                server.shutdown(socket.SHUT_RDWR)
            thread.join()


def _serve(server: socket.socket, answer: Answer) -> None:
    while True:
        asked, peer = server.recvfrom(65535)
        if not asked:
            return
        for message in answer(asked):
            server.sendto(message, peer)


def ask(
    messages: list[bytes], *, answers: int, address: str = "127.0.0.1", port: int = PORT
) -> list[bytes]:
    """Send these to the server from one connected socket; that many datagrams come back."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(seconds(5))
        client.connect((address, port))
        for message in messages:
            client.send(message)
        return [client.recv(65535) for _ in range(answers)]


class Digged(NamedTuple):
    """What dig says it was told."""

    number: int
    status: str
    answers: list[tuple[str, int, str, str]]
    """Name, seconds, type, data."""


def dig(*arguments: str) -> Digged:
    command = ["dig", "+tries=1", f"+time={int(seconds(3))}", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    head = done.stdout.partition("->>HEADER<<- ")[2].partition("\n")[0]
    fields = dict(field.split(": ") for field in head.split(", "))
    section = done.stdout.partition(";; ANSWER SECTION:\n")[2].partition("\n\n")[0]
    answers = []
    for line in section.splitlines():
        name, ttl, _, kind, data = line.split(None, 4)
        answers.append((name, int(ttl), kind, data))
    return Digged(int(fields["id"]), fields["status"], answers)


ZONE = (
    *("--address=/a.test/192.0.2.7", "--host-record=h.test,192.0.2.9,2001:db8::9"),
    *("--cname=c.test,d.test", "--cname=d.test,h.test"),
    '--txt-record=t.test,one,a "quoted" text',
    *("--mx-host=m.test,h.test,10", "--srv-host=_x._udp.test,h.test,99,1,2"),
    "--ptr-record=9.2.0.192.in-addr.arpa,h.test",
    "--local=/test/",
)


@contextmanager
def dnsmasq(*options: str) -> Iterator[None]:
    """A real server at 127.0.0.1 and ::1, in this network namespace."""
    command = ["dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--conf-file="]
    command += [
        "--listen-address=127.0.0.1,::1",
        "--bind-interfaces",
        "--user=root",
        "--group=root",
    ]
    command += ["--pid-file=", "--log-facility=/dev/null", *ZONE, *options]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + seconds(10)
        while not _is_up():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def _is_up() -> bool:
    """Over TCP, which asks no question."""
    with socket.socket(socket.AF_INET6) as probe:
        return probe.connect_ex(("::1", PORT)) == 0


# ---------------------------------------------------------------- over TCP

Exchange = Callable[[socket.socket], None]


def framed(message: bytes) -> bytes:
    """As it goes over TCP."""
    return struct.pack("!H", len(message)) + message


def read_framed(connection: socket.socket) -> bytes:
    return _exactly(connection, int.from_bytes(_exactly(connection, 2), "big"))


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        assert part, "the other end has closed"
        data += part
    return data


def in_pieces(connection: socket.socket, data: bytes, *sizes: int) -> None:
    """Send it in packets of these sizes, and what is left in one."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for size in sizes:
        connection.sendall(data[:size])
        data = data[size:]
        _await_acknowledgement(connection)
    connection.sendall(data)
    _await_acknowledgement(connection)


def _await_acknowledgement(connection: socket.socket) -> None:
    """Until nothing is on its way: else the kernel may send two pieces as one."""
    deadline = time.monotonic() + seconds(5)
    unacknowledged = struct.Struct("@i")
    while unacknowledged.unpack(fcntl.ioctl(connection, SIOCOUTQ, bytes(4)))[0]:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@contextmanager
def over_tcp(serve_one: Exchange) -> Iterator[socket.socket]:
    """A connection to a server at 127.0.0.1, whose side of it a thread takes."""
    with socket.create_server(("127.0.0.1", PORT)) as listener:
        client = socket.create_connection(("127.0.0.1", PORT), seconds(5))
        server, _ = listener.accept()
        server.settimeout(seconds(10))
        thread = threading.Thread(target=_run, args=(serve_one, server))
        thread.start()
        try:
            yield client
        finally:
            client.close()
            thread.join()


def _run(serve_one: Exchange, server: socket.socket) -> None:
    with server:
        serve_one(server)
