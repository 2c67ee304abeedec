"""Which flow a frame is in, by the standards: RFC 791, RFC 8200, RFC 4302, IEEE 802.1Q."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from tests.kernel.packets import AH, FRAGMENT, HOP_BY_HOP, OPTIONS, ROUTING, SCTP, TCP, UDP

ETHERNET, TAG = 14, 4
TAGS = (b"\x81\x00", b"\x88\xa8", b"\x91\x00")
MOST_TAGS = 2
WITH_PORTS = (TCP, UDP, SCTP, 33, 136)  # DCCP, UDP-Lite
EXTENSIONS = (HOP_BY_HOP, ROUTING, FRAGMENT, AH, OPTIONS, 135, 139, 140)
MOST_EXTENSIONS = 8

End = tuple[str, int]


class Flow(NamedTuple):
    version: int
    protocol: int
    vlans: tuple[int, int]
    ports_unknown: bool
    ends: tuple[End, End]


class Network(NamedTuple):
    """What the network header says."""

    version: int
    protocol: int
    addresses: tuple[str, str]
    fragment: bytes
    """What all fragments of a packet have in common."""
    offset: int
    more: bool
    payload: bytes
    """As much as there is of it, in the frame and by the lengths in the headers."""


Counts = Counter[tuple[Flow, End, str]]
"""Packets and bytes by flow and sender."""


class Reader:
    """Reads frames in the order in which they came."""

    def __init__(self) -> None:
        self.counts: Counts = Counter()
        self.malformed = 0
        """Of IP, and in no flow."""
        self.others = 0
        """Not of IP."""
        self._ports: dict[tuple[object, ...], tuple[int, int]] = {}

    def read(self, frame: bytes) -> None:
        kind, at = frame[12:14], ETHERNET
        vlans: list[int] = []
        while kind in TAGS and len(vlans) < MOST_TAGS and len(frame) >= at + TAG:
            vlans.append(int.from_bytes(frame[at : at + 2], "big") & 0xFFF)
            kind, at = frame[at + 2 : at + 4], at + TAG
        if kind not in (b"\x08\x00", b"\x86\xdd"):
            self.others += 1
            return
        network = (read_ipv4 if kind == b"\x08\x00" else read_ipv6)(frame[at:])
        if network is None:
            self.malformed += 1
            return
        outer, inner, *_ = *vlans, 0, 0
        ports = self._ports_of(network, (outer, inner))
        one, other = zip(network.addresses, ports or (0, 0), strict=True)
        unknown = ports is None
        ends = (one, other) if one < other else (other, one)
        flow = Flow(network.version, network.protocol, (outer, inner), unknown, ends)
        self.counts[flow, one, "packets"] += 1
        self.counts[flow, one, "bytes"] += len(frame)

    def _ports_of(self, network: Network, vlans: tuple[int, int]) -> tuple[int, int] | None:
        """None: there are some, and they are not known."""
        if network.protocol not in WITH_PORTS:
            return 0, 0
        key = network.addresses, network.protocol, network.fragment, vlans
        if network.offset:
            return self._ports.get(key)
        if len(network.payload) < 4:
            return None
        ports = tuple(int.from_bytes(network.payload[i : i + 2], "big") for i in (0, 2))
        if network.more:
            self._ports[key] = ports[0], ports[1]
        return ports[0], ports[1]


def read_ipv4(packet: bytes) -> Network | None:
    """None: its header is cut off, or contradicts itself. 0 is the length of an offloaded one."""
    if len(packet) < 20:
        return None
    header, total = 4 * (packet[0] & 15), int.from_bytes(packet[2:4], "big")
    if packet[0] >> 4 != 4 or header < 20 or 0 < total < header or len(packet) < header:
        return None
    one, other = (socket.inet_ntop(socket.AF_INET, packet[i : i + 4]) for i in (12, 16))
    word = int.from_bytes(packet[6:8], "big")
    end = total or len(packet)
    place = word & 0x1FFF, bool(word & 0x2000)
    return Network(4, packet[9], (one, other), packet[4:6], *place, packet[header:end])


def read_ipv6(packet: bytes) -> Network | None:
    """None: its header is cut off, or of another version."""
    if len(packet) < 40 or packet[0] >> 4 != 6:
        return None
    one, other = (socket.inet_ntop(socket.AF_INET6, packet[i : i + 16]) for i in (8, 24))
    length = int.from_bytes(packet[4:6], "big")
    rest = packet[40 : 40 + length] if length else packet[40:]
    following, offset, more, identity = packet[6], 0, False, b""
    for _ in range(MOST_EXTENSIONS):
        if following not in EXTENSIONS or offset or len(rest) < 8:
            break
        size = 4 * (rest[1] + 2) if following == AH else 8 * (rest[1] + 1)
        if following == FRAGMENT:
            word, identity, size = int.from_bytes(rest[2:4], "big"), rest[4:8], 8
            offset, more = word >> 3, bool(word & 1)
        following, rest = rest[0], rest[size:]
    return Network(6, following, (one, other), identity, offset, more, rest)


def counts_of(events: Iterable[dict[str, Any]]) -> Counts:
    """The same, by the agent's records."""
    found: Counts = Counter()
    for event in events:
        client = event["client_addr"], event["client_port"]
        server = event["server_addr"], event["server_port"]
        flow = Flow(
            event["ip_version"],
            event["protocol"],
            (event["vlan_id"], event["inner_vlan_id"]),
            event["ports_unknown"],
            (client, server) if client < server else (server, client),
        )
        for end, name in ((client, "client"), (server, "server")):
            for what in ("packets", "bytes"):
                if event[f"{name}_{what}"]:
                    found[flow, end, what] += event[f"{name}_{what}"]
    return found
