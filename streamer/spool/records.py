"""Batches as rows: which events count as critical, and how a row becomes events again."""

from __future__ import annotations

from functools import cache
from typing import Any, Union

import msgspec

from streamer.events.batch import Batch, Event, count_kinds
from streamer.events.catalogue import PUBLISHED
from streamer.events.kinds import KINDS
from streamer.events.spans import NO_SPANS, Spans
from streamer.spool.rows import UNDECODABLE
from streamer.spool.store import Item, Unreadable

UNREADABLE = "what the spool had of them cannot be read"

CRITICAL = frozenset(
    kind for kind, info in PUBLISHED.items() if kind.startswith("stream.")
) | frozenset(kind for kind, info in KINDS.items() if info.ring == "critical")
"""Kinds that make way last: those of the critical ring, and what tells of losses."""


def run_of(batch: Batch) -> str:
    """The id of the run that read the events: how their ids begin."""
    return str(batch.events[0].id).partition("-")[0]


@cache
def _decoder() -> msgspec.json.Decoder[Any]:
    structs = tuple(info.struct for info in PUBLISHED.values())
    return msgspec.json.Decoder(Union[structs])  # noqa: UP007 - of as many as there are


def batch_of(item: Item | Unreadable, run_id: str) -> tuple[Batch, str]:
    """The events of a row, replayed, with spans that name the run if it is not `run_id`.

    Where they cannot be read: none, but their counts as the row has them; and the reason.
    """
    spans = named(item.spans, item.run, run_id)
    if isinstance(item, Unreadable):
        return Batch([], dict(item.kinds), spans), UNREADABLE
    try:
        events: list[Event] = _decoder().decode_lines(item.data)
        msgspec.msgpack.encode(events)  # numbers may be larger than any encoding has
    except UNDECODABLE:
        return Batch([], dict(item.kinds), spans), UNREADABLE
    if not events or count_kinds(events) != item.kinds:
        return Batch([], dict(item.kinds), spans), UNREADABLE
    for event in events:
        event.replayed = True  # type: ignore[attr-defined]
    return Batch(events, dict(item.kinds), spans), ""


def named_if_possible(spans: Spans, run: str, run_id: str) -> Spans:
    """As `named`; none where that fails: a loss is told all the same, and holds up nothing."""
    try:
        return named(spans, run, run_id)
    except Exception:  # a defect, or want of memory, while another is dealt with
        return NO_SPANS


def named(spans: Spans, run: str, run_id: str) -> Spans:
    """Spans of numbers of `run`, as they are told by `run_id`."""
    if run == run_id:
        return spans
    return {(place[0], place[1], run): span for place, span in spans.items()}
