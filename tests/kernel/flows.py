"""For the tests of flows: an agent at one end of a pair of interfaces, traffic, and a witness."""

from __future__ import annotations

import signal
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.kernel.agent import Agent, Recording
from tests.kernel.pace import seconds
from tests.kernel.roles import (
    Role,
    enter_netns,
    leave_mounts,
    netns_inode,
    show_network,
    two_namespaces,
)

ETH_ALL, OUTGOING = 3, 4
SOL_PACKET, PACKET_STATISTICS, SO_RCVBUFFORCE = 263, 6, 33
NEAR, FAR = "192.0.2.1", "192.0.2.2"
NEAR6, FAR6 = "2001:db8::1", "2001:db8::2"
CONFIG = "[kernel]\nflow_idle_seconds = 1000\nflow_active_seconds = 1000\n"


class Flow(NamedTuple):
    """What is between two endpoints, the lower one first, and what each of them sent."""

    protocol: int
    ends: tuple[tuple[str, int], tuple[str, int]]


class Sent(NamedTuple):
    packets: int
    bytes: int


Counts = Counter[tuple[Flow, tuple[str, int], str]]
"""Packets and bytes by flow and sender."""


class Seen(NamedTuple):
    """What a run has seen: the agent, the witness, and what the function returned.

    `frames` are those that the witness has seen, if they were to be kept.
    """

    recording: Recording
    witness: Counts
    netns: int
    result: Any
    frames: list[bytes]


class Near:
    """The end where the agent is, for a function that makes traffic."""

    def __init__(self, agent: Agent, far: str, device: str) -> None:
        self.agent = agent
        self.far = far
        self.device = device

    def there(self, function: Callable[..., Any], *arguments: Any) -> Role:
        """Call the function at the other end."""
        return Role("far", in_netns, self.far, function, arguments)

    def settle(self) -> None:
        """Until the last packets have come in, and are seen."""
        time.sleep(seconds(0.3))


def observe(
    directory: Path,
    function: Callable[[Near], Any],
    config: str = CONFIG,
    interfaces: Iterable[str] = ("veth1",),
    prepare: Callable[[str, str], Any] | None = None,
    together: bool = False,
    events: str = "net.flow",
) -> Seen:
    """Run the agent in one of two namespaces, and the function beside it.

    `prepare` is called there before, with the names of both. Packets are those of the wire, unless
    the kernel may keep them `together`; then the witness's frames are kept, too.
    """
    with two_namespaces() as (near, far):
        if not together:
            for name, device in ((near, "veth1"), (far, "veth2")):
                ip("-n", name, "link", "set", device, "gso_max_segs", "1")
        named = tuple(interfaces)
        made = directory, near, far, function, config, named, prepare, together, events
        role = Role("near", _run, *made)
        output, stderr, returncode, *rest = role.result()
    recording = Recording(output, stderr, returncode)
    assert returncode == 0, stderr
    recording.check()
    return Seen(recording, *rest)


def _run(
    directory: Path,
    near: str,
    far: str,
    function: Callable[[Near], Any],
    config: str,
    interfaces: tuple[str, ...],
    prepare: Callable[[str, str], Any] | None,
    keep: bool,
    events: str,
) -> tuple[bytes, str, int, Counts, int, Any, list[bytes]]:
    enter_system(near)
    if prepare is not None:
        prepare(near, far)
    named = [part for name in interfaces for part in ("--interface", name)]
    with (
        Agent(directory, *named, events=events, config=config) as agent,
        Witness(interfaces[0]) as witness,
    ):
        result = function(Near(agent, far, interfaces[0]))
        time.sleep(seconds(0.3))
        counts = witness.stop()
        if agent.process.poll() is None:
            agent.send(signal.SIGTERM)
        code = agent.process.wait(seconds(60))
        output = agent.output.read_bytes()
        frames = witness.frames if keep else []
        return output, agent.stderr, code, counts, netns_inode(), result, frames


def enter_system(name: str) -> None:
    """Into a network namespace, which /sys then shows too."""
    leave_mounts()
    enter_netns(name)
    show_network()


def in_netns(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    enter_netns(name)
    return function(*arguments)


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def tc(*arguments: str) -> str:
    done = subprocess.run(["tc", *arguments], check=True, capture_output=True, text=True)
    return done.stdout


# ---------------------------------------------------------------- the witness


class Witness:
    """Counts what passes an interface, from copies that the kernel makes of each packet."""

    def __init__(self, interface: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 28)
        self._socket.bind((interface, ETH_ALL))
        self._socket.settimeout(0.05)
        self._stopping = False
        self.frames: list[bytes] = []
        self._loopback = interface == "lo"
        self._thread = threading.Thread(target=self._capture)
        self._thread.start()

    def _capture(self) -> None:
        while True:
            try:
                frame, (_, _, kind, _, _) = self._socket.recvfrom(1 << 17)
            except TimeoutError:
                if self._stopping:
                    return
                continue
            except OSError:  # the interface has gone
                return
            if not (self._loopback and kind != OUTGOING):  # there each comes in, too
                self.frames.append(frame)

    def stop(self) -> Counts:
        self._stopping = True
        self._thread.join()
        statistics = self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
        assert struct.unpack("=II", statistics)[1] == 0, "the witness has not seen all"
        found: Counts = Counter()
        ports: dict[tuple[Any, ...], tuple[int, int]] = {}
        for frame in self.frames:
            try:
                read = read_frame(frame, ports)
            except (ValueError, IndexError, struct.error):  # malformed
                continue
            if read:
                flow, sender = read
                found[flow, sender, "packets"] += 1
                found[flow, sender, "bytes"] += len(frame)
        return found

    def __enter__(self) -> Witness:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping = True
        self._thread.join()
        self._socket.close()


def read_frame(
    frame: bytes, ports: dict[tuple[Any, ...], tuple[int, int]]
) -> tuple[Flow, tuple[str, int]] | None:
    """Flow and sender; `ports` are those of the fragments so far."""
    kind, at = int.from_bytes(frame[12:14], "big"), 14
    while kind in (0x8100, 0x88A8):
        kind, at = int.from_bytes(frame[at + 2 : at + 4], "big"), at + 4
    data = frame[at:]
    offset = more = identity = 0
    if kind == 0x0800:
        protocol, start = data[9], 4 * (data[0] & 0xF)
        one, other = (socket.inet_ntop(socket.AF_INET, data[i : i + 4]) for i in (12, 16))
        (identity,) = struct.unpack_from("!H", data, 4)
        (word,) = struct.unpack_from("!H", data, 6)
        offset, more = word & 0x1FFF, word & 0x2000
    elif kind == 0x86DD:
        protocol, start = data[6], 40
        one, other = (socket.inet_ntop(socket.AF_INET6, data[i : i + 16]) for i in (8, 24))
        while protocol in (0, 43, 60, 44):
            if protocol == 44:
                (word,) = struct.unpack_from("!H", data, start + 2)
                offset, more = word & 0xFFF8, word & 1
                (identity,) = struct.unpack_from("!I", data, start + 4)
                protocol, start = data[start], start + 8
                if offset:
                    break
            else:
                protocol, start = data[start], start + 8 * (data[start + 1] + 1)
    else:
        return None
    found = (0, 0)
    key = one, other, protocol, identity
    if protocol in (6, 17):
        found = ports.get(key, (0, 0)) if offset else struct.unpack_from("!HH", data, start)
        if more and not offset:
            ports[key] = found
    sender, receiver = (one, found[0]), (other, found[1])
    return Flow(protocol, tuple(sorted((sender, receiver)))), sender  # type: ignore[arg-type]


def counts_of(events: Iterable[Any], *, totals: bool = False) -> Counts:
    """The same, by the agent's records."""
    found: Counts = Counter()
    word = "_total" if totals else ""  # of records that are the last of their flows
    for event in events:
        client = event.client_addr, event.client_port
        server = event.server_addr, event.server_port
        flow = Flow(event.protocol, tuple(sorted((client, server))))  # type: ignore[arg-type]
        for end, name in ((client, "client"), (server, "server")):
            for what in ("packets", "bytes"):
                found[flow, end, what] += getattr(event, f"{name}_{what}{word}")
    return found


def difference(one: Counts, other: Counts) -> Mapping[Any, tuple[int, int]]:
    """What is not the same in both, ICMPv6 aside: the kernel sends that when it likes."""
    keys = (key for key in one.keys() | other.keys() if key[0].protocol != 58)
    return {key: (one[key], other[key]) for key in keys if one[key] != other[key]}
