"""Summaries: what programs counted in a period, made into records by the agent.

`enum summary_kind` in `bpf/events.h` numbers their kinds, `bpf/core/tables.h` has what is counted.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from streamer.events.stream import Count, StreamRecord


class Summary(StreamRecord, gc=False):
    """What every summary begins with: a record of the agent's own, so without `ring` and `cpu`."""

    period_ns: Annotated[
        Count, Meta(description="how long it was counted: up to `boot_ns`, since the one before")
    ]


class XdpCounters(Summary, tag="xdp.counters", gc=False):
    """Packets of one class that came in at a network interface. All were let through."""

    interface: Annotated[str, Meta(description="name of the interface, as configured")]
    ifindex: Annotated[int, Meta(ge=1, description="its index")]
    vlan: Annotated[
        Literal["none", "single", "double", "more"],
        Meta(description="VLAN tags in the frame; behind more than two nothing is looked at"),
    ]
    network: Annotated[
        Literal["other", "ipv4", "ipv6", "arp"], Meta(description="what the frame carries")
    ]
    transport: Annotated[
        Literal[
            "none",
            "other",
            "tcp",
            "udp",
            "icmp",
            "icmpv6",
            "igmp",
            "sctp",
            "gre",
            "esp",
            "ah",
            "ipv4",
            "ipv6",
            "ospf",
            "pim",
            "vrrp",
        ],
        Meta(description="protocol above IP; ipv4 and ipv6: a tunnel; none: none, or not known"),
    ]
    ports: Annotated[
        Literal["none", "system", "user", "dynamic"],
        Meta(
            description="the lower of the two ports, as a rule the service's: 0 to 1023, to 49151, "
            "or above"
        ),
    ]
    verdict: Annotated[
        Literal[
            "whole", "first_fragment", "later_fragment", "truncated", "malformed", "extensions"
        ],
        Meta(
            description="truncated: it ends before its headers, or before it says; malformed: a "
            "header contradicts itself; extensions: more IPv6 extension headers than are followed"
        ),
    ]
    packets: Annotated[Count, Meta(description="packets in the period")]
    bytes: Annotated[
        Count, Meta(description="their bytes, those of the frame's own header included")
    ]
    packets_total: Annotated[Count, Meta(description="packets since the agent attached")]
    bytes_total: Annotated[Count, Meta(description="their bytes")]


SUMMARIES: dict[str, type[Summary]] = {"xdp.counters": XdpCounters}
"""The summaries, by kind."""
