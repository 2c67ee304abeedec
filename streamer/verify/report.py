"""What `streamer verify` reports: the layout of its JSON, too."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

VERSION = 1
"""Of the layout. A field more is no other version: readers ignore what they do not know."""

Count = Annotated[int, Meta(ge=0)]
End = Literal["ended", "undelivered", "killed", "left", "open"]


class Span(Struct, frozen=True):
    """A range of missing numbers."""

    seq_from: Annotated[int, Meta(ge=1, description="first")]
    seq_to: Annotated[int, Meta(ge=1, description="last")]
    count: Annotated[
        int, Meta(ge=1, description="how many of them are not explained: as a rule, all")
    ]


class Counted(Struct, frozen=True):
    """The last heartbeat's counts of some events, and what is there."""

    produced: Annotated[Count, Meta(description="happened")]
    filtered: Annotated[Count, Meta(description="kept back by a filter in the kernel")]
    shed: Annotated[Count, Meta(description="kept back by sampling")]
    lost: Annotated[Count, Meta(description="found no room in the kernel")]
    read: Annotated[Count, Meta(description="read from the ring and decoded")]
    there: Annotated[Count, Meta(description="are there, each counted once")]


class Cell(Counted, frozen=True):
    """Events of one ring, CPU and kind: the last heartbeat's counts, and what is there."""

    not_there: Annotated[
        Count,
        Meta(
            description="of a run that is there from its beginning to its end: read, and not "
            "there; what the sink gave up, and what is missing"
        ),
    ]
    given_up: Annotated[
        Count,
        Meta(description="told as given up by the sink, where it is said of which ring and CPU"),
    ] = 0


class Place(Struct, frozen=True):
    """The numbers of one ring and CPU. `missing` = what is in `explained` + `pending` +
    `unexplained`.
    """

    ring: Annotated[str, Meta(description="ring")]
    cpu: Annotated[int, Meta(ge=0, description="CPU")]
    first: Annotated[Count, Meta(description="first number that was to come")]
    last: Annotated[Count, Meta(description="last one")]
    events: Annotated[Count, Meta(description="events that are there, each counted once")]
    duplicates: Annotated[Count, Meta(description="further copies of them, by id")]
    missing: Annotated[Count, Meta(description="numbers that are not there")]
    explained: Annotated[
        dict[str, Count],
        Meta(
            description="of these, explained, by stage: kernel, decode, sink, stop as in "
            "`stream.loss`; unused: given up without an event; killed: held by a run that was "
            "killed; deleted: may have been, or been told, in what the broker deleted before it "
            "could be read, so that nothing is known of them"
        ),
    ]
    pending: Annotated[
        Count, Meta(description="of these, so recent that an explanation may be on its way")
    ]
    unexplained: Annotated[Count, Meta(description="of these, neither")]
    gaps: Annotated[
        list[Span], Meta(description="where the unexplained ones are: the first hundred ranges")
    ]
    out_of_order: Annotated[Count, Meta(description="events that came behind a higher number")]
    late: Annotated[
        Count, Meta(description="events that came behind a heartbeat that had passed them")
    ]
    watermark_ns: Annotated[
        Count, Meta(description="last watermark, in nanoseconds since boot; 0: there was none")
    ]
    older_than_watermark: Annotated[
        Count, Meta(description="events that came behind a watermark and are older")
    ]
    lost_but_there: Annotated[
        Count, Meta(description="events that are there, and were told as lost in the kernel")
    ]
    given_up_but_there: Annotated[
        Count,
        Meta(description="events that are there, and that a sink gave up: its broker had them"),
    ]
    kinds: Annotated[dict[str, Cell], Meta(description="events per kind")]


class Account(Counted, frozen=True):
    """Events of one kind: the last heartbeat's counts, and what is there."""

    given_up: Annotated[Count, Meta(description="told as given up by the sink")]
    missing: Annotated[
        Count,
        Meta(
            description="of a run that has ended: read, or read since the first heartbeat that is "
            "there, and neither there, nor given up, nor among what a broker may have deleted"
        ),
    ]


class ClockStep(Struct, frozen=True):
    """The wall clock was set."""

    boot_ns: Annotated[Count, Meta(description="when, nanoseconds since boot: noticed by then")]
    time_ns: Annotated[int, Meta(description="what the clock said from then on")]
    step_ns: Annotated[int, Meta(description="by how much; below 0: back")]


class ShedPeriod(Struct, frozen=True):
    """Events were sampled because the sinks could not keep up. They have no numbers."""

    from_ns: Annotated[int, Meta(description="since when, nanoseconds since the epoch")]
    to_ns: Annotated[int, Meta(description="until when; 0: no end is there")]
    level: Annotated[Count, Meta(description="the highest level of pressure in it")]
    reason: Annotated[str, Meta(description="why it began, in words; empty: that is not there")]
    kinds: Annotated[dict[str, Count], Meta(description="told as left out by then, per kind")]


class Run(Struct, frozen=True):
    """One run of the agent."""

    run_id: Annotated[str, Meta(description="its id")]
    boot_id: Annotated[str, Meta(description="the boot that it was in; empty: not said")]
    agent: Annotated[str, Meta(description="version of the agent; empty: no manifest is there")]
    whole: Annotated[bool, Meta(description="whether its beginning is there")]
    end: Annotated[
        End,
        Meta(
            description="ended: with its final account; left: it has no such sink any more, and "
            "goes on without; undelivered, killed: as the run after it says; open: it goes on, or "
            "nobody says what became of it"
        ),
    ]
    first_ns: Annotated[int, Meta(description="time of its first record, since the epoch")]
    last_ns: Annotated[int, Meta(description="time of its last record")]
    events: Annotated[Count, Meta(description="events that are there, each counted once")]
    own: Annotated[Count, Meta(description="records of the stream itself, so, too")]
    duplicates: Annotated[Count, Meta(description="further copies of events and records, by id")]
    own_missing: Annotated[
        Count,
        Meta(
            description="numbers of own records that are not there: records for other sinks, as a "
            "rule, so that nothing is wrong"
        ),
    ]
    heartbeats: Annotated[Count, Meta(description="heartbeats")]
    unexplained: Annotated[Count, Meta(description="missing numbers that nothing explains")]
    pending: Annotated[Count, Meta(description="missing numbers that may be explained yet")]
    told: Annotated[dict[str, Count], Meta(description="events told as lost, by stage")]
    places: Annotated[list[Place], Meta(description="each ring and CPU")]
    kinds: Annotated[dict[str, Account], Meta(description="each kind")]
    clock_steps: Annotated[
        list[ClockStep], Meta(description="when the wall clock was set: the first hundred times")
    ]
    clock_steps_total: Annotated[Count, Meta(description="how often it was set")]
    shed_periods: Annotated[
        list[ShedPeriod],
        Meta(description="when events were shed under pressure: the first hundred times"),
    ]
    shed_periods_total: Annotated[Count, Meta(description="how often that was")]
    problems: Annotated[list[str], Meta(description="what is wrong, in words; empty: nothing")]


class Host(Struct, frozen=True):
    """A host: its runs in the order of their first records."""

    restarts: Annotated[Count, Meta(description="how often the agent was started anew")]
    runs: Annotated[list[Run], Meta(description="its runs")]


class Bad(Struct, frozen=True):
    """A record that is none."""

    where: Annotated[str, Meta(description="where it is")]
    reason: Annotated[str, Meta(description="why, and how it begins")]


class Deleted(Struct, frozen=True):
    """What a broker deleted of a partition before it could be read."""

    where: Annotated[str, Meta(description="topic and partition")]
    offsets: Annotated[int, Meta(ge=1, description="how many: of records, as a rule")]


class VerifyReport(Struct, frozen=True):
    """What `streamer verify --json` prints."""

    version: Annotated[int, Meta(description="of this layout: 1")]
    agent: Annotated[str, Meta(description="version of this program")]
    sources: Annotated[list[str], Meta(description="what was read")]
    complete: Annotated[
        bool,
        Meta(
            description="whether the sources were read up to their ends; what goes on elsewhere "
            "is not judged if not"
        ),
    ]
    ok: Annotated[
        bool,
        Meta(
            description="whether everything is explained: exit code 0. Not where there are "
            "records, and none of them is an event"
        ),
    ]
    records: Annotated[Count, Meta(description="records that were read")]
    bytes: Annotated[Count, Meta(description="bytes of them")]
    events: Annotated[Count, Meta(description="events that are there, each counted once")]
    duplicates: Annotated[Count, Meta(description="further copies, by id")]
    explained: Annotated[dict[str, Count], Meta(description="missing and explained, by stage")]
    pending: Annotated[Count, Meta(description="missing, and too recent to say")]
    unexplained: Annotated[Count, Meta(description="missing, and nothing explains it")]
    malformed: Annotated[Count, Meta(description="records that are none")]
    malformed_first: Annotated[list[Bad], Meta(description="the first ten of them")]
    deleted: Annotated[
        list[Deleted],
        Meta(
            description="what was deleted by the brokers before it could be read, while the "
            "reading went on, and cannot be verified"
        ),
    ]
    hosts: Annotated[dict[str, Host], Meta(description="each host")]
