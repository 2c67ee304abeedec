"""Which numbers some events have, by ring and CPU, and how many of each kind have them.

Whoever cannot deliver events tells by that which these were. It is counted when it is needed, of
what is given up: events as they were drained, or what was encoded of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from streamer.events.kinds import KINDS

Place = tuple[str, int] | tuple[str, int, str]
"""A ring and a CPU. One that has a third part is of the run of that id, and not of this one."""

OWN_RECORDS: Place = ("stream", 0)
"""Stands for ring and CPU of the stream's own records, whose `seq` is of the run."""


class Span(NamedTuple):
    """Sequence numbers of one ring and CPU: events are somewhere between `first` and `last`."""

    first: int
    last: int
    kinds: Mapping[str, int] = MappingProxyType({})
    """How many of them of each kind; empty where that is not known."""


Spans = Mapping[Place, Span]
NO_SPANS: Spans = MappingProxyType({})


def join_spans(one: Spans, other: Spans) -> Spans:
    """What covers both, with as many of each kind as both have."""
    if not one or not other:
        return one or other
    joined = dict(one)
    for place, span in other.items():
        known = joined.get(place)
        joined[place] = span if known is None else cover(known, span)
    return joined


def cover(one: Span, other: Span) -> Span:
    """One span for two, with as many of each kind as both have, as far as that is known."""
    kinds = sum_of(one.kinds, other.kinds)
    return Span(min(one.first, other.first), max(one.last, other.last), kinds)


def sum_of(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """As many of each kind as both have. As a Counter it would take several times as long."""
    kinds = dict(one)
    for kind, count in other.items():
        kinds[kind] = kinds.get(kind, 0) + count
    return kinds


def without_kinds(spans: Spans) -> Spans:
    """The numbers alone."""
    return {place: Span(span.first, span.last) for place, span in spans.items()}


_cpu = attrgetter("cpu")


def spans_of_events(events: Sequence[Any], kinds: Mapping[str, int], within: Spans) -> Spans:
    """Those of events, of which there are so many of each kind, within spans of one run.

    Its cost is a count for each event, so it is asked for only when they are given up.
    """
    if not within:
        return NO_SPANS
    run = next(iter(within))[2:]
    found: defaultdict[tuple[Any, ...], dict[str, int]] = defaultdict(dict)
    own = {kind: count for kind, count in kinds.items() if kind not in KINDS}
    types: set[Any] = set(map(type, events))
    kind_of = {cls: str(cls.__struct_config__.tag) for cls in types}
    if own:
        found[OWN_RECORDS] = own
        events = [event for event in events if kind_of[type(event)] in KINDS]
    pairs = zip(map(type, events), map(_cpu, events), strict=True)
    for (cls, cpu), count in Counter[tuple[Any, int]](pairs).items():
        found[KINDS[kind_of[cls]].ring, cpu][kind_of[cls]] = count
    named: dict[Any, dict[str, int]] = {(*place, *run): counts for place, counts in found.items()}
    return {
        place: within[place]._replace(kinds=counts)
        for place, counts in named.items()
        if place in within
    }


class _Head(msgspec.Struct, gc=False):
    """What of a record says which event it is."""

    event: str
    id: str


PIECE_BYTES = 1 << 20
"""Of NDJSON, so much is decoded at once, up to the end of a line."""

_NUMBERS = 1 << 63
"""Of an event it is less: more could not be told of."""

_MOST_KINDS = 256
"""No agent has as many."""

_JSON = msgspec.json.Decoder(_Head)
_MSGPACK = msgspec.msgpack.Decoder(_Head)


def spans_of_records(records: bytes | Collection[bytes], within: Spans) -> Spans:
    """Those of encoded events, NDJSON or one by one, which are all within spans that are known.

    Where they are not, or of another form, such as text for people, these without kinds.
    """
    found = NO_SPANS
    try:
        others = {place[2] for place in within if len(place) == 3}
        for heads in _heads(records) if within else ():
            part = _spans_of_heads(heads, others)
            # The stream's own records may have been put among them, without spans.
            if not all(place in within or place[:2] == OWN_RECORDS for place in part):
                return without_kinds(within)
            found = join_spans(found, part)
    except (msgspec.MsgspecError, UnicodeError, ValueError, RecursionError):  # a spool may have any
        return without_kinds(within)
    return found


def _heads(records: bytes | Collection[bytes]) -> Iterator[list[_Head]]:
    """In pieces: of small records the heads take several times as much room."""
    if not isinstance(records, bytes):
        decoder = _JSON if next(iter(records), b"{").startswith(b"{") else _MSGPACK
        yield list(map(decoder.decode, records))
        return
    start = 0
    while start < len(records):
        end = records.find(b"\n", start + PIECE_BYTES) + 1 or len(records)
        yield _JSON.decode_lines(records[start:end])
        start = end


def _spans_of_heads(heads: Iterable[_Head], others: Collection[str]) -> Spans:
    """`others` are the ids of the runs that are not this one. Raises ValueError: of no run."""
    told: defaultdict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for head in heads:
        where, _, seq = head.id.rpartition("-")
        numbers, kinds = told[where]
        numbers.append(seq)
        kinds.append(head.event)
    found: dict[Place, Span] = {}
    for where, (numbers, kinds) in told.items():
        run, ring, *cpu = where.split("-")
        place: Any = (ring, int(cpu[0]) if cpu else 0, *((run,) if run in others else ()))
        span = _span(list(map(int, numbers)), kinds)
        found[place] = cover(found[place], span) if place in found else span
    return found


def _span(numbers: Collection[int], kinds: Iterable[str]) -> Span:
    first, last, counts = min(numbers), max(numbers), Counter(kinds)
    if last >= _NUMBERS or len(counts) > _MOST_KINDS:
        raise ValueError("no run has encoded that")
    return Span(first, last, counts)
