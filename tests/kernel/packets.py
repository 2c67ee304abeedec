"""Frames as tests send them, and what each is: built from the standards, not by our programs."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import NamedTuple

IPV4, ARP, VLAN, QINQ, IPV6, EXPERIMENTAL = 0x0800, 0x0806, 0x8100, 0x88A8, 0x86DD, 0x88B5
ICMP, IGMP, IPIP, TCP, UDP, IN_IPV6, GRE, ESP, AH = 1, 2, 4, 6, 17, 41, 47, 50, 51
ICMPV6, NOTHING, OSPF, PIM, VRRP, SCTP = 58, 59, 89, 103, 112, 132
HOP_BY_HOP, ROUTING, FRAGMENT, OPTIONS = 0, 43, 44, 60
PROTOCOLS = {
    ICMP: "icmp",
    IGMP: "igmp",
    IPIP: "ipv4",
    TCP: "tcp",
    UDP: "udp",
    IN_IPV6: "ipv6",
    GRE: "gre",
    ESP: "esp",
    AH: "ah",
    ICMPV6: "icmpv6",
    NOTHING: "none",
    OSPF: "ospf",
    PIM: "pim",
    VRRP: "vrrp",
    SCTP: "sctp",
}


class Class(NamedTuple):
    """What a frame is counted as."""

    vlan: str = "none"
    network: str = "other"
    transport: str = "none"
    ports: str = "none"
    verdict: str = "whole"


def ethernet(kind: int, payload: bytes, tags: tuple[int, ...] = ()) -> bytes:
    """A frame from one locally administered address to another; `tags` are VLAN protocols."""
    types = [*tags, kind]
    inside = b"".join(struct.pack("!HH", 7, one) for one in types[1:])
    return b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02" + struct.pack("!H", types[0]) + inside + payload


def ipv4(
    protocol: int, payload: bytes, fragment: int = 0, options: bytes = b"", **odd: int
) -> bytes:
    """`odd` are `version`, `words` (of the header) and `total`, where they are not as is right."""
    words = odd.get("words", 5 + len(options) // 4)
    total = odd.get("total", 20 + len(options) + len(payload))
    first = odd.get("version", 4) << 4 | words
    head = struct.pack("!BBHHHBBH", first, 0, total, 1, fragment, 64, protocol, 0)
    return head + bytes([192, 0, 2, 1, 192, 0, 2, 2]) + options + payload


def ipv6(following: int, payload: bytes, **odd: int) -> bytes:
    """`odd` are `version` and `length` (of the payload), where they are not as is right."""
    length = odd.get("length", len(payload))
    head = struct.pack("!IHBB", odd.get("version", 6) << 28, length, following, 64)
    return head + bytes(15) + b"\x01" + bytes(15) + b"\x02" + payload


def extension(following: int, payload: bytes, units: int = 0) -> bytes:
    """An IPv6 extension header of 8 bytes and `units` more of 8."""
    return bytes([following, units]) + bytes(6 + 8 * units) + payload


def fragment(following: int, payload: bytes, offset: int, more: bool) -> bytes:
    """An IPv6 fragment; `offset` in units of 8 bytes."""
    return struct.pack("!BBHI", following, 0, offset << 3 | more, 1) + payload


def tcp(here: int, there: int, payload: bytes = b"", words: int = 5) -> bytes:
    return struct.pack("!HHIIBBHHH", here, there, 1, 1, words << 4, 0x10, 512, 0, 0) + payload


def udp(here: int, there: int, payload: bytes = b"", length: int | None = None) -> bytes:
    size = 8 + len(payload) if length is None else length
    return struct.pack("!HHHH", here, there, size, 0) + payload


def chain(count: int, last: int, payload: bytes) -> bytes:
    """So many destination options, one behind the other, and then `last`."""
    for place in range(count):
        payload = extension(last if place == 0 else OPTIONS, payload)
    return payload


_T4 = Class(network="ipv4", transport="tcp", ports="system")
_U4 = Class(network="ipv4", transport="udp", ports="user")
_T6 = Class(network="ipv6", transport="tcp", ports="system")
_U6 = Class(network="ipv6", transport="udp", ports="user")
_MORE = 0x2000

FRAMES: dict[str, tuple[bytes, Class]] = {
    "neither IP nor ARP": (ethernet(EXPERIMENTAL, bytes(46)), Class()),
    "ARP": (ethernet(ARP, bytes(28)), Class(network="arp")),
    "TCP": (ethernet(IPV4, ipv4(TCP, tcp(40000, 443, b"x" * 100))), _T4),
    "TCP, to a high port from a higher": (
        ethernet(IPV4, ipv4(TCP, tcp(65535, 49152))),
        _T4._replace(ports="dynamic"),
    ),
    "TCP, last port of the users": (
        ethernet(IPV4, ipv4(TCP, tcp(49151, 60000))),
        _T4._replace(ports="user"),
    ),
    "TCP, first port of the users": (
        ethernet(IPV4, ipv4(TCP, tcp(1024, 1025))),
        _T4._replace(ports="user"),
    ),
    "TCP, last port of the system": (ethernet(IPV4, ipv4(TCP, tcp(1024, 1023))), _T4),
    "UDP": (ethernet(IPV4, ipv4(UDP, udp(5000, 5001, b"y" * 10))), _U4),
    "UDP behind IP options": (
        ethernet(IPV4, ipv4(UDP, udp(5000, 5001), options=bytes(40))),
        _U4,
    ),
    "UDP with padding behind it": (ethernet(IPV4, ipv4(UDP, udp(5000, 5001)) + bytes(18)), _U4),
    "SCTP": (
        ethernet(IPV4, ipv4(SCTP, struct.pack("!HHII", 80, 5000, 0, 0))),
        Class(network="ipv4", transport="sctp", ports="system"),
    ),
    **{
        f"protocol {name}": (
            ethernet(IPV4, ipv4(number, bytes(32))),
            Class(network="ipv4", transport=name),
        )
        for number, name in PROTOCOLS.items()
        if number not in (TCP, UDP, SCTP)
    },
    "a protocol without a name": (
        ethernet(IPV4, ipv4(253, bytes(32))),
        Class(network="ipv4", transport="other"),
    ),
    "first fragment": (
        ethernet(IPV4, ipv4(UDP, udp(5000, 5001, bytes(1400), 4000), fragment=_MORE)),
        _U4._replace(verdict="first_fragment"),
    ),
    "fragment in the middle": (
        ethernet(IPV4, ipv4(UDP, bytes(1400), fragment=_MORE | 176)),
        Class("none", "ipv4", "udp", "none", "later_fragment"),
    ),
    "last fragment": (
        ethernet(IPV4, ipv4(UDP, bytes(8), fragment=351)),
        Class("none", "ipv4", "udp", "none", "later_fragment"),
    ),
    "VLAN": (ethernet(IPV4, ipv4(UDP, udp(5000, 5001)), (VLAN,)), _U4._replace(vlan="single")),
    "QinQ": (
        ethernet(IPV6, ipv6(TCP, tcp(40000, 22)), (QINQ, VLAN)),
        _T6._replace(vlan="double"),
    ),
    "three tags": (
        ethernet(IPV4, ipv4(UDP, udp(5000, 5001)), (QINQ, VLAN, VLAN)),
        Class(vlan="more"),
    ),
    "a tag that is cut": (
        ethernet(VLAN, b"\0"),
        Class(verdict="truncated"),
    ),
    "IPv6, TCP": (ethernet(IPV6, ipv6(TCP, tcp(40000, 22))), _T6),
    "IPv6, UDP": (ethernet(IPV6, ipv6(UDP, udp(5000, 5001, b"z" * 9))), _U6),
    "IPv6, ICMPv6": (
        ethernet(IPV6, ipv6(ICMPV6, bytes(8))),
        Class(network="ipv6", transport="icmpv6"),
    ),
    "IPv6, nothing": (ethernet(IPV6, ipv6(NOTHING, b"")), Class(network="ipv6")),
    "IPv6, hop by hop, routing, options": (
        ethernet(
            IPV6,
            ipv6(
                HOP_BY_HOP,
                extension(ROUTING, extension(OPTIONS, extension(UDP, udp(5000, 5001)), 2), 1),
            ),
        ),
        _U6,
    ),
    "IPv6, eight extensions": (ethernet(IPV6, ipv6(OPTIONS, chain(8, UDP, udp(5000, 5001)))), _U6),
    "IPv6, nine extensions": (
        ethernet(IPV6, ipv6(OPTIONS, chain(9, UDP, udp(5000, 5001)))),
        Class(network="ipv6", verdict="extensions"),
    ),
    "IPv6, first fragment": (
        ethernet(IPV6, ipv6(FRAGMENT, fragment(UDP, udp(5000, 5001, bytes(100), 3000), 0, True))),
        _U6._replace(verdict="first_fragment"),
    ),
    "IPv6, last fragment": (
        ethernet(IPV6, ipv6(FRAGMENT, fragment(UDP, bytes(100), 200, False))),
        Class("none", "ipv6", "udp", "none", "later_fragment"),
    ),
    "IPv6, last fragment of what begins with options": (
        ethernet(IPV6, ipv6(FRAGMENT, fragment(OPTIONS, bytes(100), 200, False))),
        Class("none", "ipv6", "none", "none", "later_fragment"),
    ),
    "IPv6, a fragment that is all": (
        ethernet(IPV6, ipv6(FRAGMENT, fragment(UDP, udp(5000, 5001), 0, False))),
        _U6,
    ),
    "IPv4 that is cut": (
        ethernet(IPV4, ipv4(UDP, udp(5000, 5001))[:19]),
        Class(network="ipv4", verdict="truncated"),
    ),
    "IPv4, shorter than it says": (
        ethernet(IPV4, ipv4(UDP, udp(5000, 5001), total=29)),
        Class(network="ipv4", verdict="truncated"),
    ),
    "IPv4, options that are cut": (
        ethernet(IPV4, ipv4(UDP, b"", words=6, total=24)),
        Class(network="ipv4", verdict="truncated"),
    ),
    "IPv4 of version 5": (
        ethernet(IPV4, ipv4(UDP, udp(5000, 5001), version=5)),
        Class(network="ipv4", verdict="malformed"),
    ),
    "IPv4 with a header of 16 bytes": (
        ethernet(IPV4, ipv4(UDP, udp(5000, 5001), words=4)),
        Class(network="ipv4", verdict="malformed"),
    ),
    "IPv4, shorter than its header": (
        ethernet(IPV4, ipv4(UDP, udp(5000, 5001), total=19)),
        Class(network="ipv4", verdict="malformed"),
    ),
    "IPv6 of version 4": (
        ethernet(IPV6, ipv6(UDP, udp(5000, 5001), version=4)),
        Class(network="ipv6", verdict="malformed"),
    ),
    "IPv6, shorter than it says": (
        ethernet(IPV6, ipv6(UDP, udp(5000, 5001), length=9)),
        Class(network="ipv6", verdict="truncated"),
    ),
    "IPv6, an extension that is cut": (
        ethernet(IPV6, ipv6(OPTIONS, extension(UDP, b"")[:7])),
        Class(network="ipv6", verdict="truncated"),
    ),
    "IPv6, an extension that is longer than all": (
        ethernet(IPV6, ipv6(OPTIONS, bytes([UDP, 200]) + bytes(14))),
        Class(network="ipv6", verdict="truncated"),
    ),
    "IPv6, extensions that are longer than the payload": (
        ethernet(IPV6, ipv6(OPTIONS, extension(UDP, udp(5000, 5001)), length=7)),
        Class(network="ipv6", verdict="malformed"),
    ),
    "TCP that is cut": (
        ethernet(IPV4, ipv4(TCP, tcp(40000, 443)[:19])),
        Class("none", "ipv4", "tcp", "none", "truncated"),
    ),
    "TCP with a header of 16 bytes": (
        ethernet(IPV4, ipv4(TCP, tcp(40000, 443, words=4))),
        _T4._replace(verdict="malformed"),
    ),
    "TCP, options that are not there": (
        ethernet(IPV4, ipv4(TCP, tcp(40000, 443, words=6))),
        _T4._replace(verdict="malformed"),
    ),
    "UDP that is cut": (
        ethernet(IPV4, ipv4(UDP, udp(5000, 5001)[:7])),
        Class("none", "ipv4", "udp", "none", "truncated"),
    ),
    "UDP, shorter than its header": (
        ethernet(IPV4, ipv4(UDP, udp(5000, 5001, length=7))),
        _U4._replace(verdict="malformed"),
    ),
    "UDP, longer than its packet": (
        ethernet(IPV4, ipv4(UDP, udp(5000, 5001, length=9))),
        _U4._replace(verdict="malformed"),
    ),
}
"""Frames by what they are, and the class of each."""


def mutated(count: int, seed: int) -> Iterator[bytes]:
    """So many of FRAMES with bytes changed at random, or cut, none of them below 14 bytes."""
    dice = random.Random(seed)
    frames = [frame for frame, _ in FRAMES.values()]
    for _ in range(count):
        frame = bytearray(dice.choice(frames))
        for _ in range(dice.randrange(4)):
            frame[dice.randrange(12, min(len(frame), 90))] = dice.randrange(256)
        if dice.random() < 0.3:
            del frame[dice.randrange(14, len(frame) + 1) :]
        yield bytes(frame)


# ---------------------------------------------------------------- a second reading of the standards

_EXTENSIONS = (HOP_BY_HOP, ROUTING, OPTIONS, 135, 139, 140)


def classify(frame: bytes) -> Class:
    """What the frame is, read by slices: what is not there is empty, and never an error."""
    kind, at, tags = frame[12:14], 14, 0
    while kind in (b"\x81\x00", b"\x88\xa8", b"\x91\x00"):
        if tags == 2:
            return Class("more")
        if len(frame) < at + 4:
            return Class(("none", "single", "double")[tags], verdict="truncated")
        tags, kind, at = tags + 1, frame[at + 2 : at + 4], at + 4
    vlan = ("none", "single", "double")[tags]
    match kind:
        case b"\x08\x00":
            return _classify_ipv4(frame[at:])._replace(vlan=vlan)
        case b"\x86\xdd":
            return _classify_ipv6(frame[at:])._replace(vlan=vlan)
        case b"\x08\x06":
            return Class(vlan, "arp")
    return Class(vlan)


def _classify_ipv4(packet: bytes) -> Class:
    found = Class(network="ipv4")
    if len(packet) < 20:
        return found._replace(verdict="truncated")
    header, total = 4 * (packet[0] & 15), int.from_bytes(packet[2:4], "big")
    if packet[0] >> 4 != 4 or header < 20 or total < header:
        return found._replace(verdict="malformed")
    if len(packet) < max(total, header):
        return found._replace(verdict="truncated")
    place = int.from_bytes(packet[6:8], "big")
    if place & 0x1FFF:
        name = PROTOCOLS.get(packet[9], "other")
        return found._replace(transport=name, verdict="later_fragment")
    if place & 0x2000:
        found = found._replace(verdict="first_fragment")
    return _classify_transport(found, packet[9], packet[header:], total - header)


def _classify_ipv6(packet: bytes) -> Class:
    found = Class(network="ipv6")
    if len(packet) < 40:
        return found._replace(verdict="truncated")
    if packet[0] >> 4 != 6:
        return found._replace(verdict="malformed")
    length, following, rest = int.from_bytes(packet[4:6], "big"), packet[6], packet[40:]
    if length > len(rest):
        return found._replace(verdict="truncated")
    if not length and following == HOP_BY_HOP:
        length = len(rest)
    used = 0
    for _ in range(8):
        if following == FRAGMENT:
            if len(rest) - used < 8:
                return found._replace(verdict="truncated")
            following, place = rest[used], int.from_bytes(rest[used + 2 : used + 4], "big")
            used += 8
            if place >> 3:
                name = PROTOCOLS.get(following, "other")
                name = "none" if following in _EXTENSIONS else name
                return found._replace(transport=name, verdict="later_fragment")
            if place & 1:
                found = found._replace(verdict="first_fragment")
        elif following in _EXTENSIONS:
            size = 8 + 8 * rest[used + 1] if len(rest) - used >= 8 else 8
            if len(rest) - used < size:
                return found._replace(verdict="truncated")
            following, used = rest[used], used + size
        else:
            break
    if following in (*_EXTENSIONS, FRAGMENT):
        return found._replace(verdict="extensions")
    if used > length:
        return found._replace(verdict="malformed")
    return _classify_transport(found, following, rest[used:], length - used)


def _classify_transport(found: Class, protocol: int, data: bytes, size: int) -> Class:
    found = found._replace(transport=PROTOCOLS.get(protocol, "other"))
    least = {TCP: 20, UDP: 8, SCTP: 4}.get(protocol, 0)
    if not least:
        return found
    if len(data) < least:
        return found._replace(verdict="truncated")
    lower = min(int.from_bytes(data[:2], "big"), int.from_bytes(data[2:4], "big"))
    ports = "system" if lower < 1024 else "user" if lower < 49152 else "dynamic"
    found = found._replace(ports=ports)
    if protocol == TCP and not 20 <= 4 * (data[12] >> 4) <= size:
        return found._replace(verdict="malformed")
    said = int.from_bytes(data[4:6], "big")
    too_long = said > size and found.verdict == "whole"
    if protocol == UDP and (0 < said < 8 or too_long):
        return found._replace(verdict="malformed")
    return found
