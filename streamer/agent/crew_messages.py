"""What the agent's first worker and the further ones say to each other, over a `Channel`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import msgspec

from streamer.agent.losses import Lost
from streamer.events.stream import ReaderCounts
from streamer.operation.look import Activity
from streamer.sinks.base import Status

MOST_TEXT = 8000
"""Characters of a text: of what is escaped, twelve bytes each, a message has room for more."""

MOST_CELLS = 1000
"""Events by CPU and kind: a message has room for more than twice as many."""

Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
"""Sums of these of all workers have a place in 64 bits."""
Counts = dict[str, Count]
"""Per kind."""
Mark = tuple[str, int, Count]
"""A ring, a CPU, and a number of theirs."""


class Begin(msgspec.Struct, tag=True):
    """To a further worker: read. With descriptors: those of `rings`, then of the maps `counters`,
    `kind_counters`, `reader`.
    """

    run_id: str
    rings: list[str]
    sizes: dict[str, int]
    """Of all ring buffers there are, in bytes."""
    bulk_shift: int
    cpus: int


class End(msgspec.Struct, tag=True):
    """To a further worker: nothing more is produced. Read what is left, and deliver it."""

    grace_seconds: float


class Watched(msgspec.Struct, tag=True):
    """To a further worker: somebody looks at who makes the events, and will for a while."""


class LogFrom(msgspec.Struct, tag=True):
    """To a further worker: say what is at least so severe."""

    level: str
    """As in the configuration."""


class Ready(msgspec.Struct, tag=True):
    """From one: it reads."""


class SinkProgress(msgspec.Struct):
    """How far a sink of a further worker has come since the start; per kind, as `SinkAccount`."""

    received: Counts
    delivered: Counts
    dropped: Counts
    delivered_bytes: Count
    held: Count
    """Bytes."""
    full: float
    """The share of its budget."""
    status: Status
    lag_seconds: float
    latency: list[Count]
    latency_seconds: float
    """See `LatencySamples`: counts and sum."""


class Read(msgspec.Struct, tag=True):
    """From one, before a `Progress`: what it had read by then, where that has changed."""

    cells: list[tuple[Count, str, Count]]
    """CPU, kind, events since the start."""


class Progress(msgspec.Struct, tag=True):
    """From one, again and again: how far it has come. What it has lost was said before."""

    passed: list[Mark]
    settled: list[Mark]
    """Numbers up to which each event was delivered, or is told as lost."""
    sinks: list[SinkProgress]
    """In the order of the settings."""
    reader: ReaderCounts
    paused: bool


class Seen(msgspec.Struct, tag=True):
    """From one, every second while somebody looks: who made what it has read."""

    activity: Activity


class Gone(msgspec.Struct, tag=True):
    """From one: events were lost; by the sink of that index, whose account in the next `Progress`
    has them, or by none.
    """

    lost: Lost
    sink: Count | None = None


class Said(msgspec.Struct, tag=True):
    """From one: a line of its log, of a level as `logging` has them."""

    level: int
    text: str


class Failed(msgspec.Struct, tag=True):
    """From one: it cannot go on. What it holds it will deliver or tell as lost."""

    error: str
    """Which of `streamer.errors`."""
    text: str


class Done(msgspec.Struct, tag=True):
    """From one, the last: everything was told."""


FromWorker = Ready | Read | Progress | Seen | Gone | Said | Failed | Done
ToWorker = Begin | LogFrom | Watched | End


def packed(message: FromWorker | ToWorker) -> dict[str, Any]:
    """As a `Channel` sends it."""
    found: dict[str, Any] = msgspec.to_builtins(message)
    return found


def from_worker(message: Mapping[str, Any]) -> FromWorker:
    """What a further worker sent. Raises msgspec.ValidationError: none of its messages.

    Nor is what could not be said in the stream: numbers of more than 64 bits, half characters.
    """
    try:
        msgspec.msgpack.encode(message)  # as JSON a number can have any size
        data = msgspec.json.encode(message)
    except (OverflowError, UnicodeEncodeError) as error:
        raise msgspec.ValidationError(str(error)) from None
    found: FromWorker = msgspec.json.decode(data, type=FromWorker)
    return found


def to_worker(message: Mapping[str, Any]) -> ToWorker:
    """What the first worker sent. Raises msgspec.ValidationError."""
    found: ToWorker = msgspec.convert(message, ToWorker)
    return found


def brief(text: str) -> str:
    """As much of a text as a message has, and as it may have it."""
    return text[:MOST_TEXT].encode("utf-8", "backslashreplace").decode()[:MOST_TEXT]


def reads_of(cells: Sequence[tuple[int, str, int]]) -> list[Read]:
    """As many messages as it takes."""
    return [Read([*cells[at : at + MOST_CELLS]]) for at in range(0, len(cells), MOST_CELLS)]


def gone(lost: Lost, sink: int | None = None) -> Gone:
    """That this was lost; of more rings, CPUs and kinds than a message has room for, without."""
    if sum(len(one.kinds) for one in lost.ranges) > MOST_CELLS:
        bare = tuple(msgspec.structs.replace(one, kinds={}) for one in lost.ranges)
        lost = replace(lost, ranges=bare)
    return Gone(lost, sink)


def marks_of(numbers: Mapping[tuple[str, int], int]) -> list[Mark]:
    """As a message has them."""
    return [(ring, cpu, number) for (ring, cpu), number in numbers.items()]


def numbers_of(marks: list[Mark]) -> dict[tuple[str, int], int]:
    """The other way round."""
    return {(ring, cpu): number for ring, cpu, number in marks}
