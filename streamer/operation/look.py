"""One look at a running agent: what `streamer status --json` prints, and metrics are made of.

It is made when somebody asks, of the counters that the heartbeat and the final account are made
of: there is no second book.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from streamer.events.stream import (
    Count,
    CpuMark,
    KindCounts,
    Level,
    Pid,
    ProgramReport,
    Rate,
    ReaderCounts,
    Stage,
    Status,
)

VERSION = 1
"""Of the layout. A field more is no other version: readers ignore what they do not know."""

Phase = Literal["starting", "streaming", "stopping"]
PHASES: tuple[Phase, ...] = ("starting", "streaming", "stopping")
Seconds = Annotated[float, Meta(ge=0)]


class KindLook(Struct, frozen=True):
    """How far a kind is observed."""

    status: Annotated[
        Literal["full", "partial", "missing"], Meta(description="how far it is observed")
    ]
    reason: Annotated[str, Meta(description="why not fully; empty if it is")]


class RingLook(Struct, frozen=True):
    """A ring; of perf buffers, those of all CPUs together."""

    size_bytes: Annotated[Count, Meta(description="its size")]
    used_bytes: Annotated[Count, Meta(description="what is in it and was not read yet")]
    read_bytes: Annotated[Count, Meta(description="what was read from it since the start")]


class Latency(Struct, frozen=True):
    """How long a sink took, by samples: one batch at a time is followed to its delivery."""

    bounds: Annotated[
        tuple[float, ...], Meta(description="upper bounds of the buckets in seconds, but the last")
    ]
    counts: Annotated[
        tuple[Count, ...], Meta(description="samples in each bucket; the last has no bound")
    ]
    sum_seconds: Annotated[Seconds, Meta(description="all samples together")]


class SinkLook(Struct, frozen=True):
    """A sink. Per kind: received = delivered + dropped + pending."""

    status: Annotated[Status, Meta(description="of its broker or file")]
    received: Annotated[
        dict[str, Count], Meta(description="handed to it, or refused for want of room")
    ]
    delivered: Annotated[dict[str, Count], Meta(description="acknowledged or written")]
    dropped: Annotated[dict[str, Count], Meta(description="given up")]
    delivered_bytes: Annotated[
        Count, Meta(description="bytes of the encoded events that were delivered")
    ]
    pending: Annotated[Count, Meta(description="events that are neither yet")]
    spooled: Annotated[Count, Meta(description="of these, those that wait on disk, in its spool")]
    spool_filled: Annotated[
        float, Meta(ge=0, description="share of the spool that is used, 0 to 1; 0: it has none")
    ]
    held_bytes: Annotated[Count, Meta(description="bytes held for it")]
    budget_bytes: Annotated[Count, Meta(description="from how many it counts as full")]
    lag_seconds: Annotated[
        Seconds, Meta(description="how long a batch has been under way now; 0: none is")
    ]
    latency: Annotated[Latency, Meta(description="how long batches were under way")]


class LossLook(Struct, frozen=True):
    """Events of one kind that were lost in one place."""

    stage: Annotated[Stage, Meta(description="where, as in `stream.loss`")]
    sink: Annotated[str, Meta(description="the sink; empty if not at one")]
    kind: Annotated[str, Meta(description="the kind; empty where it is not known")]
    count: Annotated[Count, Meta(description="how many")]


class TableLook(Struct, frozen=True):
    """A table of the kernel whose fill is known."""

    used: Annotated[Count, Meta(description="entries that are in use")]
    size: Annotated[Count, Meta(description="how many there can be")]


class SheddingLook(Struct, frozen=True):
    """What is left out because the sinks cannot keep up."""

    enabled: Annotated[bool, Meta(description="whether anything may be")]
    level: Annotated[Level, Meta(description="of pressure; 0: nothing is")]
    reason: Annotated[str, Meta(description="what holds the level up, in words; empty at 0")]
    rates: Annotated[
        dict[str, Rate],
        Meta(description="one in how many events is reported now, of the kinds that may be shed"),
    ]


def _never_shed() -> SheddingLook:
    return SheddingLook(enabled=False, level=0, reason="", rates={})


class Look(Struct, frozen=True):
    """What `streamer status --json` prints."""

    version: Annotated[int, Meta(description="of this layout: 1")]
    agent: Annotated[str, Meta(description="version of the agent")]
    pid: Annotated[Pid, Meta(description="its process id, in its own pid namespace")]
    host: Annotated[str, Meta(description="name of the host in the events")]
    run_id: Annotated[str, Meta(description="id of this run: how each event's `id` begins")]
    phase: Annotated[Phase, Meta(description="whether programs are attached: while `streaming`")]
    not_ready: Annotated[
        list[str], Meta(description="why it is not ready, see /readyz; empty if it is")
    ]
    uptime_seconds: Annotated[Seconds, Meta(description="since the agent started")]
    rates: Annotated[
        dict[str, float],
        Meta(description="events a second that were read, per kind, in the last ten seconds"),
    ]
    counts: Annotated[dict[str, KindCounts], Meta(description="as in `stream.heartbeat`")]
    losses: Annotated[
        list[LossLook], Meta(description="all that was found lost so far, by place and kind")
    ]
    rings: Annotated[dict[str, RingLook], Meta(description="the rings, by name")]
    marks: Annotated[list[CpuMark], Meta(description="as in `stream.heartbeat`")]
    paused: Annotated[bool, Meta(description="whether a full sink keeps rings from being read")]
    reader: Annotated[ReaderCounts, Meta(description="as in `stream.heartbeat`")]
    sinks: Annotated[dict[str, SinkLook], Meta(description="the sinks, by name")]
    faults: Annotated[dict[str, Count], Meta(description="as in `stream.heartbeat`")]
    missed: Annotated[
        dict[str, Count],
        Meta(description="runs of programs that the kernel left out, as of the last second"),
    ]
    tables: Annotated[
        dict[str, TableLook], Meta(description="tables of the kernel whose fill is known")
    ]
    coverage: Annotated[dict[str, KindLook], Meta(description="how far each kind is observed")]
    programs: Annotated[list[ProgramReport], Meta(description="the BPF programs")]
    workers: Annotated[
        list[Pid], Meta(description="the processes that read, the first one first")
    ] = field(default_factory=list)
    shedding: Annotated[
        SheddingLook, Meta(description="what is left out because the sinks cannot keep up")
    ] = field(default_factory=_never_shed)


class Actor(Struct, frozen=True):
    """A process, and how many events it made."""

    pid: Annotated[Pid, Meta(description="its id in the initial pid namespace")]
    comm: Annotated[str, Meta(description="its name")]
    cgroup_id: Annotated[Count, Meta(description="its cgroup: its container, where it is in one")]
    events: Annotated[Count, Meta(description="events in the window")]


class Activity(Struct, frozen=True):
    """Who made the events of one second, for `streamer top`."""

    number: Annotated[Count, Meta(description="of the window, from 1; 0: there was none yet")]
    seconds: Annotated[Seconds, Meta(description="how long it was")]
    read: Annotated[Count, Meta(description="events that were read in it")]
    looked_at: Annotated[Count, Meta(description="those of them that were counted below")]
    kinds: Annotated[dict[str, Count], Meta(description="events that were read, per kind")]
    processes: Annotated[list[Actor], Meta(description="the busiest first, a hundred at most")]
    cgroups: Annotated[
        dict[str, Count], Meta(description="events by cgroup id, the busiest, a hundred at most")
    ]


class TopLook(Struct, frozen=True):
    """What `streamer top` asks for."""

    look: Annotated[Look, Meta(description="as `streamer status --json`")]
    activity: Annotated[Activity, Meta(description="of the last whole second")]
