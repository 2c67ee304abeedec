"""What `streamer check` reports: the layout of its JSON, too."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

VERSION = 1
"""Of the layout. A field more is no other version: readers ignore what they do not know."""


Status = Literal["full", "degraded", "unavailable"]


class Answer(Struct, frozen=True):
    """Whether something is there."""

    answer: Annotated[
        Literal["yes", "no", "unknown"],
        Meta(description="unknown: it could not be found out here, by whoever asked"),
    ]
    reason: Annotated[str, Meta(description="why not, or why it is unknown; of yes, more about it")]


class Setting(Struct, frozen=True):
    """A setting of the running kernel or of the process."""

    value: Annotated[str, Meta(description="as the kernel shows it; empty where it cannot be read")]
    reason: Annotated[str, Meta(description="why it cannot be read")] = ""


class Rung(Struct, frozen=True):
    """One of the ways to a hook."""

    program: Annotated[str, Meta(description="name of the program")]
    way: Annotated[str, Meta(description="where it attaches")]
    status: Annotated[
        Literal["used", "spare", "lacking"],
        Meta(
            description="used: it is attached (`attached` in the manifest); spare: not tried, as a "
            "better one is used; lacking: this kernel refuses it (`failed` in the manifest)"
        ),
    ]
    reason: Annotated[str, Meta(description="why it is lacking, or used only in part")]


class Hook(Struct, frozen=True):
    """Something that is observed, by the best way that this kernel has."""

    hook: Annotated[str, Meta(description="name of the hook")]
    sensor: Annotated[str, Meta(description="the object that its programs are in")]
    kinds: Annotated[list[str], Meta(description="the kinds of events that it is for")]
    used: Annotated[str, Meta(description="the way that is used; empty: there is none")]
    rungs: Annotated[list[Rung], Meta(description="all ways to it, best first")]


class Kind(Struct, frozen=True):
    """How far a kind is observed."""

    status: Annotated[
        Status,
        Meta(description="in the manifest's words: full, partial, missing"),
    ]
    reason: Annotated[str, Meta(description="in which way degraded, or why unavailable")]


class CheckReport(Struct):
    """What `streamer check --json` prints."""

    version: Annotated[int, Meta(description="of this layout: 1")]
    agent: Annotated[str, Meta(description="version of the agent")]
    kernel: Annotated[str, Meta(description="system, release and machine")]
    ok: Annotated[bool, Meta(description="all that was asked for is observed in full")]
    types: Annotated[
        str, Meta(description="where the layouts of the kernel's types come from, or why nowhere")
    ]
    transport: Annotated[
        str, Meta(description="whether records come by ring or by perf buffers, and why")
    ]
    kinds: Annotated[dict[str, Kind], Meta(description="each kind of events that was asked for")]
    not_asked: Annotated[
        dict[str, str], Meta(description="the other kinds, and why they were not asked for")
    ]
    interfaces: Annotated[
        dict[str, Answer],
        Meta(description="the network interfaces that were named: is it there"),
    ]
    notes: Annotated[list[str], Meta(description="what else is to be known of the configuration")]
    hooks: Annotated[list[Hook], Meta(description="what is observed, and how")]
    features: Annotated[dict[str, Answer], Meta(description="what the kernel and the host offer")]
    program_types: Annotated[
        dict[str, Answer],
        Meta(description="types of programs that the objects have: does one load"),
    ]
    map_types: Annotated[
        dict[str, Answer],
        Meta(description="types of maps, with their flags, that the objects have: is one made"),
    ]
    helpers: Annotated[
        dict[str, dict[str, Answer]],
        Meta(description="helpers that the objects call, by the type of the program that does"),
    ]
    attach_points: Annotated[
        dict[str, Answer],
        Meta(description="places of programs, as the objects name them: does one attach"),
    ]
    capabilities: Annotated[dict[str, Answer], Meta(description="is it in force in this process")]
    settings: Annotated[dict[str, Setting], Meta(description="settings that bear upon all this")]
