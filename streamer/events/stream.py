"""The records of the stream itself, which the agent makes and no BPF program.

They travel with the events, so that a consumer needs nothing else to know what it has not got.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from msgspec import UNSET, Meta, Struct, UnsetType, field

from streamer.events.clock import Timed
from streamer.events.kinds import Ring

Count = Annotated[int, Meta(ge=0)]
Pid = Annotated[int, Meta(ge=0, le=4194304)]
Cpu = Annotated[int, Meta(ge=0, le=65535)]
Seq = Annotated[int, Meta(ge=1)]
# One of `Ring`, for code that has it as a string.
RingName = Annotated[str, Meta(pattern=f"^({'|'.join(get_args(Ring))})$")]
Rate = Annotated[int, Meta(ge=1, le=1048576)]
Level = Annotated[int, Meta(ge=0, le=3)]
Stage = Literal["kernel", "decode", "sink", "stop"]
Status = Literal["starting", "up", "down", "closed"]


class StreamRecord(Timed, tag_field="event", gc=False):
    """What every record of the stream begins with.

    The agent makes them, so they have no `ring` and `cpu` of their own: those of a `stream.loss`
    are where the loss was. Their `seq` numbers all of one run, whichever sink they are for: one
    that a sink alone was told is missing in the others.
    """

    schema: Annotated[int, Meta(ge=1, description="version of the meaning of the fields")]
    id: Annotated[str, Meta(description="unique and stable id: run, `stream`, number")]
    time_ns: Annotated[Count, Meta(description="nanoseconds since the epoch")]
    boot_ns: Annotated[Count, Meta(description="nanoseconds since boot, suspend included")]
    host: Annotated[str, Meta(description="name of the host")]
    boot_id: Annotated[str, Meta(description="the kernel's random id of this boot")]
    run_id: Annotated[str, Meta(description="id of this run of the agent: how each `id` begins")]
    seq: Annotated[Seq, Meta(description="running number of this run's own records, as in `id`")]


class KindReport(Struct, gc=False):
    """How far a kind is observed."""

    status: Annotated[
        Literal["full", "partial", "missing"], Meta(description="how far it is observed")
    ]
    reason: Annotated[str, Meta(description="why not fully; empty if it is")]
    unseen: Annotated[
        tuple[str, ...], Meta(description="what is never observed of it, on this host or any")
    ]


class ProgramReport(Struct, gc=False):
    """What became of a BPF program."""

    name: Annotated[str, Meta(description="name of the program")]
    sensor: Annotated[str, Meta(description="object that it is in")]
    hook: Annotated[
        str, Meta(description="what it observes; programs of one hook are ways to the same")
    ]
    way: Annotated[str, Meta(description="where it attaches")]
    kinds: Annotated[tuple[str, ...], Meta(description="kinds that it reports")]
    status: Annotated[
        Literal["attached", "failed", "spare", "loaded"],
        Meta(description="what became of it; spare: a better way to its hook is attached"),
    ]
    reason: Annotated[str, Meta(description="why it failed; empty if it did not")]


class SeqRange(Struct, gc=False):
    """Sequence numbers of one ring and CPU."""

    ring: Annotated[RingName, Meta(description="ring")]
    cpu: Annotated[Cpu, Meta(description="CPU")]
    seq_from: Annotated[Seq, Meta(description="first")]
    seq_to: Annotated[Seq, Meta(description="last")]
    run_id: (
        Annotated[str, Meta(description="run whose numbers these are, if not that of the record")]
        | UnsetType
    ) = UNSET
    kinds: Annotated[
        dict[str, Count],
        Meta(
            description="of a sink's loss: how many of each kind were lost among these numbers; "
            "empty where that is not known"
        ),
    ] = field(default_factory=dict)


class RunMark(Struct, gc=False):
    """How far the run before had come for one sink, with the numbers of one ring and CPU.

    Known where the sink has a spool. Of the numbers after `seq`, those that did not come are lost.
    """

    sink: Annotated[str, Meta(description="name of the sink")]
    ring: Annotated[RingName, Meta(description="ring")]
    cpu: Annotated[Cpu, Meta(description="CPU")]
    seq: Annotated[
        Count,
        Meta(description="up to here each was delivered, is in the spool, or was told as lost"),
    ]
    last: Annotated[
        Count,
        Meta(
            description="last that was in the spool or delivered; with `spill`, what was delivered "
            "without it in the last second may have come after it"
        ),
    ]
    taken: Annotated[
        Count, Meta(description="last that the run knew to have been taken in the kernel")
    ]


class UntoldLoss(Struct, gc=False):
    """A loss that a sink was not told by the run that had it: as in `stream.loss`."""

    run_id: Annotated[str, Meta(description="id of that run: the one before, or an earlier one")]
    sink: Annotated[str, Meta(description="name of the sink that was not told")]
    stage: Annotated[Stage, Meta(description="where they were lost")]
    count: Annotated[Count, Meta(description="how many")]
    kinds: Annotated[dict[str, Count], Meta(description="how many per kind, where that is known")]
    reason: Annotated[str, Meta(description="in words")]
    ranges: Annotated[list[SeqRange], Meta(description="where the missing numbers are")]


class PreviousRun(Struct, gc=False):
    """The run before on this host."""

    run_id: Annotated[str, Meta(description="its id")]
    boot_id: Annotated[str, Meta(description="the boot that it was in")]
    agent: Annotated[str, Meta(description="version of the agent")]
    started_ns: Annotated[Count, Meta(description="when it began, nanoseconds since the epoch")]
    ended: Annotated[
        Literal["delivered", "undelivered", "killed"],
        Meta(
            description="delivered: all that it read was delivered or told as lost; undelivered: "
            "see `untold`; killed: it did not get to its end, and what it held is lost"
        ),
    ]
    untold: Annotated[
        list[UntoldLoss],
        Meta(description="losses that it could not tell, and those that it could not hand on"),
    ]
    marks: Annotated[
        list[RunMark],
        Meta(description="how far it had come, for each sink with a spool, ring and CPU"),
    ] = field(default_factory=list)


class StreamManifest(StreamRecord, tag="stream.manifest", gc=False):
    """What is observed, what is not, and why. Sent at the start, hourly, when it changes, and to a
    topic made anew.
    """

    agent: Annotated[str, Meta(description="version of the agent")]
    agent_pid: Annotated[
        Pid, Meta(description="process id of the agent, in the initial pid namespace")
    ]
    initial_mntns: Annotated[
        Count,
        Meta(description="inode number of the mount namespace of the host's init; 0: unknown"),
    ]
    kernel: Annotated[str, Meta(description="release of the running kernel")]
    machine: Annotated[str, Meta(description="architecture")]
    cpu_count: Annotated[int, Meta(ge=1, description="CPUs that the kernel may bring up")]
    ring_bytes: Annotated[
        dict[str, Count],
        Meta(description="size of each ring in bytes: of perf buffers, of those of all CPUs"),
    ]
    transport: Annotated[
        Literal["ring", "perf"], Meta(description="whether the rings are ring or perf buffers")
    ]
    transport_reason: Annotated[
        str,
        Meta(
            description="why perf buffers, unless they were asked for, and why they are smaller "
            "than that; empty if neither"
        ),
    ]
    resolution_ns: Annotated[
        Count,
        Meta(description="of what times and durations are multiples, by `timing`; 0: as measured"),
    ]
    coverage: Annotated[
        dict[str, KindReport], Meta(description="how far each kind asked for is observed")
    ]
    programs: Annotated[list[ProgramReport], Meta(description="the BPF programs")]
    filters: Annotated[dict[str, list[str]], Meta(description="filters in force in the kernel")]
    sinks: Annotated[list[str], Meta(description="where the events go, without secrets")]
    previous: Annotated[
        PreviousRun | None,
        Meta(description="the run before, if it left a note in `state_file`"),
    ] = None
    shedding: Annotated[
        dict[str, list[Rate]],
        Meta(
            description="kinds that may be shed under pressure, with one in how many events is "
            "reported at the levels 1, 2 and 3; empty if shedding is off"
        ),
    ] = field(default_factory=dict)
    workers: Annotated[
        int, Meta(ge=1, description="processes that read and publish, of this one run")
    ] = 1
    kernel_types: Annotated[
        str,
        Meta(
            description="where the layouts of the kernel's structs come from: `kernel`, `file`, "
            "`headers` or `none`, with the place, and why from no better one"
        ),
    ] = ""
    since_boot_ns: Annotated[
        Count,
        Meta(
            description="since when kinds, filters and sampling are as told here, in nanoseconds "
            "since boot: what happened later was judged by them, and what happened more than a "
            "moment before by those of the manifest before; 0: since the start"
        ),
    ] = 0
    changes: Annotated[
        list[str],
        Meta(
            description="what a reload of the configuration has just changed, in words; empty in "
            "all other manifests"
        ),
    ] = field(default_factory=list)


class KindCounts(Struct, gc=False):
    """Events of one kind since the agent started."""

    produced: Annotated[Count, Meta(description="happened: filtered + shed + lost + the rest")]
    filtered: Annotated[Count, Meta(description="kept back by a filter in the kernel")]
    shed: Annotated[Count, Meta(description="kept back by sampling")]
    lost: Annotated[Count, Meta(description="found no room in the kernel")]
    read: Annotated[Count, Meta(description="read from the ring and decoded")]


CellCounts = tuple[Count, Count, Count, Count, Count]
"""Produced, filtered, shed, lost and read, as in `KindCounts`: of one ring, CPU and kind."""
SinkKindCounts = tuple[Count, Count, Count]
"""Received, delivered and dropped, as in `SinkCounts`: of one kind."""


class CpuMark(Struct, gc=False):
    """How far the sequence of one ring on one CPU has come, and what was numbered there.

    Of the kinds the sum of produced - filtered - shed is seq - skipped.
    """

    ring: Annotated[RingName, Meta(description="ring")]
    cpu: Annotated[Cpu, Meta(description="CPU")]
    seq: Annotated[Count, Meta(description="last sequence number taken in the kernel")]
    read: Annotated[Count, Meta(description="last sequence number that the reader has passed")]
    skipped: Annotated[Count, Meta(description="sequence numbers given up unused")]
    watermark_ns: Annotated[
        int,
        Meta(
            ge=0,
            description="nothing that is older, by `boot_ns`, follows of this ring and CPU in this"
            " run, where order is kept; 0: not known",
        ),
    ] = 0
    kinds: Annotated[
        dict[str, CellCounts],
        Meta(
            description="per kind that happened on that CPU: produced, filtered, shed, lost and "
            "read, of the same moment as `seq`; empty where that is not told"
        ),
    ] = field(default_factory=dict)


class Dropped(Struct, gc=False):
    """What a sink has given up of one ring and CPU since the agent started."""

    ring: Annotated[RingName, Meta(description="ring")]
    cpu: Annotated[Cpu, Meta(description="CPU")]
    kinds: Annotated[dict[str, Count], Meta(description="events per kind")]


class SinkCounts(Struct, gc=False):
    """Events at one sink since the agent started. received = delivered + dropped + pending."""

    received: Annotated[Count, Meta(description="handed to the sink, or refused for want of room")]
    delivered: Annotated[Count, Meta(description="acknowledged or written")]
    dropped: Annotated[Count, Meta(description="given up")]
    pending: Annotated[Count, Meta(description="neither yet")]
    pending_bytes: Annotated[Count, Meta(description="bytes held")]
    status: Annotated[Status, Meta(description="of its broker or file")]
    spooled: Annotated[
        Count, Meta(description="of those pending, on disk and not given to the sink yet")
    ] = 0
    recovered: Annotated[
        Count, Meta(description="of those received, found in the spool, from runs before")
    ] = 0
    kinds: Annotated[
        dict[str, SinkKindCounts],
        Meta(description="per kind: received, delivered and dropped; empty where that is not told"),
    ] = field(default_factory=dict)
    dropped_of: Annotated[
        list[Dropped],
        Meta(
            description="of those dropped, where they were read: by ring and CPU. Not the stream's "
            "own records, those of runs before, and those of which it is not known"
        ),
    ] = field(default_factory=list)


class ReaderCounts(Struct, gc=False):
    """What the reader met since the agent started."""

    unknown_kind: Annotated[Count, Meta(description="records of a kind that it does not know")]
    short_record: Annotated[Count, Meta(description="records that end before they should")]
    invalid_utf8: Annotated[Count, Meta(description="events with bytes that are not UTF-8")]
    truncated: Annotated[Count, Meta(description="events with a string that was cut")]
    incomplete: Annotated[Count, Meta(description="events of which the kernel could not read all")]
    pauses: Annotated[Count, Meta(description="times that a full sink stopped the reading")]


class Refused(Struct, gc=False):
    """What one had no room for any more while a ring filled up, since the agent started."""

    payer: Annotated[
        Literal["user", "cgroup", "container", "others"],
        Meta(
            description="who did it: a user; root, or a container that root made, by cgroup; a "
            "container by its pid namespace where there are no cgroups; others: those who are not "
            "remembered any more, and those beyond the first 32"
        ),
    ]
    id: Annotated[
        Count,
        Meta(
            description="user id; cgroup id, 0: all those more than 32 levels deep; inode number "
            "of the pid namespace; 0 of others"
        ),
    ]
    kinds: Annotated[dict[str, Count], Meta(description="events per kind: they are in `lost`, too")]


class StreamHeartbeat(StreamRecord, tag="stream.heartbeat", gc=False):
    """The account so far. Per kind: produced = read + filtered + shed + lost + in flight."""

    uptime_seconds: Annotated[float, Meta(ge=0, description="since the agent attached")]
    counts: Annotated[dict[str, KindCounts], Meta(description="events per kind")]
    marks: Annotated[list[CpuMark], Meta(description="sequence per ring and CPU")]
    sink_counts: Annotated[dict[str, SinkCounts], Meta(description="events per sink")]
    reader: Annotated[ReaderCounts, Meta(description="the reader's own counters")]
    faults: Annotated[
        dict[str, Count],
        Meta(
            description="what went wrong in the kernel apart from numbered losses, if it did: "
            "tables that were full, memory that could not be read, changes that no program saw, "
            "packets and messages that are none. Of the whole machine, whatever the filters are"
        ),
    ]
    missed: Annotated[
        dict[str, Count],
        Meta(description="runs of a program that the kernel left out, per program, if any"),
    ]
    final: Annotated[
        bool, Meta(description="whether it is the account at the end: nothing of this run follows")
    ] = False
    refused: Annotated[
        list[Refused],
        Meta(
            description="whose events were lost because they had their share of a ring that "
            "filled up, the most first"
        ),
    ] = field(default_factory=list)


class StreamLoss(StreamRecord, tag="stream.loss", gc=False):
    """Events that happened and will not come, and where they were lost.

    What was lost for one reason since the last such record is one record.
    """

    stage: Annotated[
        Stage,
        Meta(
            description="kernel: no room in the ring; decode: unreadable; sink: given up there; "
            "stop: not read, or lost in the kernel, when the agent stopped"
        ),
    ]
    count: Annotated[Count, Meta(description="how many")]
    kinds: Annotated[dict[str, Count], Meta(description="how many per kind, where that is known")]
    ring: Annotated[RingName | None, Meta(description="ring, if in the kernel")] = None
    cpu: Annotated[Cpu | None, Meta(description="CPU, if in the kernel")] = None
    seq_from: Annotated[
        Seq | None, Meta(description="first missing sequence number, if in the kernel")
    ] = None
    seq_to: Annotated[
        Seq | None, Meta(description="last missing sequence number, if in the kernel")
    ] = None
    sink: Annotated[str | None, Meta(description="name of the sink, of a loss there")] = None
    reason: Annotated[str, Meta(description="in words")] = ""
    ranges: Annotated[
        list[SeqRange],
        Meta(
            description="where the missing numbers are: all of these, or, if they are more than "
            "`count`, so many of them"
        ),
    ] = field(default_factory=list)


class PressureCause(Struct, gc=False):
    """Why there is pressure: one measure, in one place."""

    measure: Annotated[
        Literal["budget", "spool", "lag", "ring"],
        Meta(
            description="budget: the share that a sink holds of it; spool: the share of the disk "
            "spool that is used; lag: seconds that a batch has been under way to a sink; ring: the "
            "share of a ring that was not read yet"
        ),
    ]
    where: Annotated[str, Meta(description="name of the sink, or of the ring")]
    value: Annotated[float, Meta(ge=0, description="what it is")]
    level: Annotated[Level, Meta(description="the level that it holds")]


class StreamShed(StreamRecord, tag="stream.shed", gc=False):
    """At which rates kinds are sampled from now on, why, and what was left out.

    Sent whenever the level of pressure changes, and with the heartbeats until it is 0 again. What
    is left out has no sequence number, so that it makes no gap; each event that is reported bears
    in its `weight` for how many it stands. The record follows the change by up to a second.
    """

    level: Annotated[Level, Meta(description="level of pressure; 0: nothing is shed any more")]
    before: Annotated[Level, Meta(description="the level in the `stream.shed` before; at first 0")]
    since_ns: Annotated[
        Count, Meta(description="since when it is this level, nanoseconds since the epoch")
    ]
    since_boot_ns: Annotated[
        Count, Meta(description="the same moment, nanoseconds since boot, as `boot_ns` of events")
    ]
    reason: Annotated[str, Meta(description="in words")]
    causes: Annotated[
        list[PressureCause], Meta(description="what holds the level up, the worst first")
    ]
    rates: Annotated[
        dict[str, Rate],
        Meta(
            description="one in so many is reported from now on, of each kind that is observed and "
            "may be shed; `kernel.sample` is in it"
        ),
    ]
    kinds: Annotated[
        dict[str, Count],
        Meta(
            description="how many of those kinds were left out since the `stream.shed` before, by "
            "whatever sampling: `shed` in the heartbeat is the total"
        ),
    ]


STREAM_KINDS: dict[str, type[StreamRecord]] = {
    "stream.manifest": StreamManifest,
    "stream.heartbeat": StreamHeartbeat,
    "stream.loss": StreamLoss,
    "stream.shed": StreamShed,
}
"""The records of the stream itself, by kind."""
