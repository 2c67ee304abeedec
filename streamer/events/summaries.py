"""Summaries: what programs counted in a period, made into records by the agent.

`enum summary_kind` in `bpf/events.h` numbers their kinds, `bpf/core/tables.h` has what is counted.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from streamer.events.stream import Count, Pid, StreamRecord


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


class SyscallLatency(Summary, tag="syscall.latency", gc=False):
    """How long the calls of one system call took: of all tasks, or of those of one cgroup.

    Durations are counted by their highest bit, so percentiles are known to within a factor of two:
    each is the upper end of its range, and never more than `max_ns`.
    """

    syscall: Annotated[
        str,
        Meta(
            description="name of the system call; `syscall_NNN` for one that this release does "
            "not know; `syscall_other` for all numbers from 511 on"
        ),
    ]
    number: Annotated[int, Meta(ge=0, le=511, description="its number on this machine")]
    cgroup_id: Annotated[
        Count, Meta(description="id of the cgroup, where counts by cgroup are kept; 0: of all")
    ]
    count: Annotated[Count, Meta(description="calls that returned in the period")]
    errors: Annotated[
        Count,
        Meta(
            description="of these, those that failed; also where a signal only interrupted one and "
            "the kernel makes it anew"
        ),
    ]
    duration_sum_ns: Annotated[Count, Meta(description="time that they took together")]
    p50_ns: Annotated[Count, Meta(description="at most so long took half of them")]
    p90_ns: Annotated[Count, Meta(description="at most so long took nine in ten")]
    p99_ns: Annotated[Count, Meta(description="at most so long took 99 in a hundred")]
    max_ns: Annotated[Count, Meta(description="how long the longest took")]
    buckets: Annotated[
        tuple[Count, ...],
        Meta(
            description="how many took from 2^n to 2^(n+1)-1 ns, for n from 0 to the longest; "
            "the first includes 0 ns"
        ),
    ]
    unreturned: Annotated[
        Count,
        Meta(
            description="calls that a task had begun and whose return no program saw, as its next "
            "one shows: they are in none of the other numbers"
        ),
    ]
    count_total: Annotated[
        Count, Meta(description="calls since the agent attached; by cgroup, since it came in")
    ]
    errors_total: Annotated[Count, Meta(description="of these, those that failed")]
    duration_total_ns: Annotated[Count, Meta(description="time that they took")]
    cgroups_evicted: Annotated[
        Count,
        Meta(
            description="in a record of a cgroup: entries of the table of cgroups that made way "
            "for others since the record before, with what they had counted since it"
        ),
    ]


class ProfileSample(Summary, tag="profile.sample", gc=False):
    """What a process was found doing, and how often. A record per process and stack.

    taken = idle + filtered + lost + the `count` of all records of the period.
    """

    pid: Annotated[
        Pid,
        Meta(description="process id in the initial pid namespace; 0 where it is of several"),
    ]
    start_boot_ns: Annotated[
        Count,
        Meta(
            description="when the process started, nanoseconds since boot: with `pid`, "
            "identifies it"
        ),
    ]
    comm: Annotated[str, Meta(description="name of the task, at most 15 bytes")]
    cgroup_id: Annotated[
        Count, Meta(description="id of the task's cgroup in the unified (v2) hierarchy")
    ]
    cpu_mode: Annotated[
        Literal["user", "kernel", "other"],
        Meta(
            description="what the CPU was in; other: the sum of what would have made too many "
            "records"
        ),
    ]
    count: Annotated[Count, Meta(description="samples of this process and stack in the period")]
    rate_hz: Annotated[
        int, Meta(ge=1, description="samples that are taken on each CPU in a second")
    ]
    frames: Annotated[
        tuple[str, ...],
        Meta(
            description="the stack from the outermost function on: FILE`FUNCTION, FILE`+OFFSET "
            "where the file does not say, [kernel]`FUNCTION, [anon] for code of no file"
        ),
    ]
    modules: Annotated[
        dict[str, str],
        Meta(description="build ids of files in `frames`, by name, as far as they are known"),
    ]
    truncated: Annotated[
        tuple[Literal["frames"], ...],
        Meta(description="frames: the outermost functions are left out"),
    ]
    incomplete: Annotated[
        bool, Meta(description="whether a stack of it could not be had: it is [lost] in `frames`")
    ]
    taken: Annotated[Count, Meta(description="samples that were taken on all CPUs in the period")]
    idle: Annotated[Count, Meta(description="those of them that found nothing running")]
    filtered: Annotated[Count, Meta(description="those that a filter kept back")]
    lost: Annotated[Count, Meta(description="those that no table had room for")]


SUMMARIES: dict[str, type[Summary]] = {
    "xdp.counters": XdpCounters,
    "syscall.latency": SyscallLatency,
    "profile.sample": ProfileSample,
}
"""The summaries, by kind."""
