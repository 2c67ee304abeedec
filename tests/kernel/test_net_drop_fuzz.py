"""`net.drop`, of a hundred thousand malformed packets: what the kernel found wrong with each."""

from __future__ import annotations

import random
import shutil
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from streamer.config.settings import Kernel, Rings, Settings
from tests.conftest import Require
from tests.kernel.flows import FAR, FAR6, NEAR, NEAR6, enter_system, in_netns, run
from tests.kernel.live import Live
from tests.kernel.pace import repetitions
from tests.kernel.packets import ICMP, ICMPV6, IPV4, IPV6, TCP, UDP
from tests.kernel.roles import Role, enter_netns, netns_inode, two_namespaces
from tests.kernel.test_tracepoint_net import HAS_REASONS

pytestmark = pytest.mark.kernel

FRAMES = repetitions(100_000, 10_000)
SETTINGS = Settings(kernel=Kernel(drops_per_second=1 << 20), rings=Rings(bulk_bytes=1 << 26))
CLOSED = 7999
UNKNOWN = 253  # a protocol for experiments (RFC 3692)
Dice = random.Random


# ---------------------------------------------------------------- packets, by the standards


def checksum(data: bytes) -> int:
    """RFC 1071."""
    words = struct.unpack(f"!{len(data) // 2 + len(data) % 2}H", data + bytes(len(data) % 2))
    total: int = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packed(version: int, address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET if version == 4 else socket.AF_INET6, address)


def with_checksum(version: int, protocol: int, message: bytes, at: int, off: int = 0) -> bytes:
    """With the checksum over addresses, protocol and message in its place; wrong by `off`."""
    one, other = (FAR, NEAR) if version == 4 else (FAR6, NEAR6)
    pseudo = packed(version, one) + packed(version, other)
    pseudo += struct.pack("!II", len(message), protocol)
    if protocol == ICMP:  # has none of that
        pseudo = b""
    right = checksum(pseudo + message)
    wrong = (right + off - 1) % 0xFFFF + 1  # never 0: that says that there is none
    return message[:at] + struct.pack("!H", wrong) + message[at + 2 :]


def ipv4(dice: Dice, protocol: int, payload: bytes, **odd: int) -> bytes:
    """`odd`: `version`, `words`, `total` and how much the checksum is `off`."""
    first = odd.get("version", 4) << 4 | odd.get("words", 5)
    total = odd.get("total", 20 + len(payload))
    head = struct.pack("!BBHHHBBH", first, 0, total, dice.randrange(1 << 16), 0, 64, protocol, 0)
    head += packed(4, FAR) + packed(4, NEAR)
    right = checksum(head)
    wrong = (right + odd.get("off", 0)) % 0xFFFF
    return head[:10] + struct.pack("!H", wrong) + head[12:] + payload


def ipv6(dice: Dice, protocol: int, payload: bytes, **odd: int) -> bytes:
    first = odd.get("version", 6) << 28 | dice.randrange(1 << 20)
    length = odd.get("length", len(payload))
    head = struct.pack("!IHBB", first, length, protocol, 64)
    return head + packed(6, FAR6) + packed(6, NEAR6) + payload


def ip(dice: Dice, version: int, protocol: int, payload: bytes) -> bytes:
    return (ipv4 if version == 4 else ipv6)(dice, protocol, payload)


def some(dice: Dice, most: int = 120) -> bytes:
    return dice.randbytes(dice.randrange(1, most))


def odd(dice: Dice) -> int:
    return dice.randrange(1, 0xFFFE)


def udp(dice: Dice, version: int, off: int = 0, length: int | None = None) -> bytes:
    """Of one with more than 76 bytes Linux looks for the socket before the checksum."""
    payload = some(dice, 60)
    size = 8 + len(payload) if length is None else length
    head = struct.pack("!4H", dice.randrange(1, 1 << 16), CLOSED, size, 0)
    return ip(dice, version, UDP, with_checksum(version, UDP, head + payload, 6, off))


def tcp(dice: Dice, version: int, off: int = 0, words: int = 5) -> bytes:
    numbers = dice.randrange(1, 1 << 16), CLOSED, dice.randrange(1 << 32), dice.randrange(1 << 32)
    head = struct.pack("!HHIIBBHHH", *numbers, words << 4, 0x10, 512, 0, 0)
    return ip(dice, version, TCP, with_checksum(version, TCP, head + some(dice), 16, off))


def ping(dice: Dice, version: int, off: int) -> bytes:
    kind, protocol = (8, ICMP) if version == 4 else (128, ICMPV6)
    message = struct.pack("!BBHI", kind, 0, 0, 1) + some(dice)
    return ip(dice, version, protocol, with_checksum(version, protocol, message, 2, off))


class Mistake(NamedTuple):
    """How a packet is made, why the kernel drops it, and where it counts that."""

    version: int
    make: Callable[[Dice], bytes]
    reason: str
    counter: str


HEADER4, HEADER6 = ("IP_INHDR", "Ip.InHdrErrors"), ("UNHANDLED_PROTO", "Ip6InHdrErrors")
SHORT4 = "PKT_TOO_SMALL", "IpExt.InTruncatedPkts"
SHORT6 = "PKT_TOO_SMALL", "Ip6InTruncatedPkts"
LENGTHS = (1, 7, 200, 65535)
"""Of a UDP datagram: shorter than its header, or longer than its packet."""
MISTAKES = [
    Mistake(4, lambda dice: ipv4(dice, UDP, some(dice), version=dice.choice((0, 5, 6))), *HEADER4),
    Mistake(4, lambda dice: ipv4(dice, UDP, some(dice), words=dice.randrange(5)), *HEADER4),
    Mistake(4, lambda dice: ipv4(dice, UDP, some(dice), total=dice.randrange(20)), *HEADER4),
    Mistake(
        4, lambda dice: ipv4(dice, UDP, some(dice), total=dice.randrange(140, 1 << 16)), *SHORT4
    ),
    Mistake(
        *(4, lambda dice: ipv4(dice, UDP, some(dice), off=odd(dice))),
        *("IP_CSUM", "IpExt.InCsumErrors"),
    ),
    Mistake(4, lambda dice: ipv4(dice, UNKNOWN, some(dice)), "IP_NOPROTO", "Ip.InUnknownProtos"),
    Mistake(6, lambda dice: ipv6(dice, UDP, some(dice), version=dice.choice((0, 4, 5))), *HEADER6),
    Mistake(
        6, lambda dice: ipv6(dice, UDP, some(dice), length=dice.randrange(120, 1 << 16)), *SHORT6
    ),
    Mistake(4, lambda dice: udp(dice, 4), "NO_SOCKET", "Udp.NoPorts"),
    Mistake(6, lambda dice: udp(dice, 6), "NO_SOCKET", "Udp6NoPorts"),
    Mistake(4, lambda dice: udp(dice, 4, odd(dice)), "UDP_CSUM", "Udp.InCsumErrors"),
    Mistake(6, lambda dice: udp(dice, 6, odd(dice)), "UDP_CSUM", "Udp6InCsumErrors"),
    Mistake(
        *(4, lambda dice: udp(dice, 4, length=dice.choice(LENGTHS))),
        *("PKT_TOO_SMALL", "Udp.InErrors"),
    ),
    Mistake(
        *(6, lambda dice: udp(dice, 6, length=dice.choice(LENGTHS))),
        *("PKT_TOO_SMALL", "Udp6InErrors"),
    ),
    Mistake(4, lambda dice: tcp(dice, 4, odd(dice)), "TCP_CSUM", "Tcp.InCsumErrors"),
    Mistake(6, lambda dice: tcp(dice, 6, odd(dice)), "TCP_CSUM", "Tcp.InCsumErrors"),
    Mistake(4, lambda dice: tcp(dice, 4, words=dice.randrange(5)), "PKT_TOO_SMALL", "Tcp.InErrs"),
    Mistake(6, lambda dice: tcp(dice, 6, words=dice.randrange(5)), "PKT_TOO_SMALL", "Tcp.InErrs"),
    Mistake(4, lambda dice: ping(dice, 4, odd(dice)), "ICMP_CSUM", "Icmp.InCsumErrors"),
    Mistake(6, lambda dice: ping(dice, 6, odd(dice)), "ICMP_CSUM", "Icmp6InCsumErrors"),
]
INCLUDES = {
    "Ip.InHdrErrors": "IpExt.InCsumErrors",
    "Udp.InErrors": "Udp.InCsumErrors",
    "Udp6InErrors": "Udp6InCsumErrors",
    "Tcp.InErrs": "Tcp.InCsumErrors",
}
"""Counters that count what others do, too."""


# ---------------------------------------------------------------- the test


def counters() -> Counter[str]:
    """All that the kernel counts of this network namespace's IP."""
    found: Counter[str] = Counter()
    for name in ("snmp", "netstat"):
        lines = Path(f"/proc/thread-self/net/{name}").read_text().splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            group = names.partition(":")[0]
            for one, value in zip(names.split()[1:], values.split()[1:], strict=True):
                found[f"{group}.{one}"] = int(value)
    for line in Path("/proc/thread-self/net/snmp6").read_text().splitlines():
        one, value = line.split()
        found[one] = int(value)
    return found


def meet(near: str) -> None:
    """Both ends know each other's address from then on."""
    enter_netns(near)
    run("ping", "-c1", FAR)
    run("ping", "-c1", FAR6)


def receive(near: str, far: str, frames: list[tuple[int, bytes]]) -> tuple[int, Counter[str]]:
    """In the near namespace: which it is, and what the kernel counted there meanwhile."""
    enter_system(near)
    address = bytes.fromhex(Path("/sys/class/net/veth1/address").read_text().replace(":", ""))
    before = counters()
    Role("far", in_netns, far, send_all, (address, frames)).result()
    after = counters()
    after.subtract(before)
    return netns_inode(), after


AT_ONCE, PAUSE = 256, 0.001
"""So that no queue on the way is full."""


def send_all(address: bytes, frames: list[tuple[int, bytes]]) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
        sender.bind(("veth2", 0))
        for number, (kind, packet) in enumerate(frames, 1):
            sender.send(address + bytes(6) + struct.pack("!H", kind) + packet)
            if number % AT_ONCE == 0:
                time.sleep(PAUSE)


def test_a_hundred_thousand_malformed_packets(require: Require) -> None:
    """By reason as many as were sent to be dropped for it, and as the kernel itself counts."""
    require(shutil.which("ip"), "ip (iproute2) is not installed")
    dice = Dice(20261130)
    chosen = [dice.choice(MISTAKES) for _ in range(FRAMES)]
    kinds = {4: IPV4, 6: IPV6}
    frames = [(kinds[mistake.version], mistake.make(dice)) for mistake in chosen]
    with two_namespaces() as (near, far):
        Role("meet", meet, near).result()
        with Live(None, {"net.drop"}, SETTINGS) as live:
            netns, counted = Role("near", receive, near, far, frames).result()
            live.check()
            events = [event for event in live.events if event.netns == netns]
            assert live.counts("net.drop").lost == 0
    told = Counter((event.ip_version, event.reason) for event in events)
    sent = Counter((mistake.version, mistake.reason) for mistake in chosen)
    if HAS_REASONS:
        assert told == sent
    else:  # then what the kernel lets go of without any fault is told, too: of the neighbours' talk
        assert FRAMES <= told.total() < FRAMES + 100
        assert {reason for _, reason in told} == {""}
    assert {event.weight for event in events} == {1}
    expected = Counter(mistake.counter for mistake in chosen)
    for one, others in INCLUDES.items():
        expected[one] += expected[others]
    assert {one: counted[one] for one in expected} == expected
