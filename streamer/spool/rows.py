"""What a row says of the batch in it: whose events, how many of each kind, with which numbers.

A file may have been written by whoever had taken over a run. So what is decoded here is bounded,
and of a form that a run writes: of it come the account, records of losses and the next manifest.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from streamer.events.spans import NO_SPANS, Span, Spans

BATCH_BYTES = 64 << 20
"""The most that a batch has: more is nothing that was written here."""
MOST_CPUS = 8192
"""As many as Linux can have."""
MOST_KINDS = 256
MOST_SINKS = 256
"""That have been in one spool, with other URLs, and have left anything there."""
MOST_NAME = 4096
"""Characters of a sink's name."""

UNDECODABLE = (msgspec.MsgspecError, UnicodeError, OverflowError, RecursionError, TypeError)
"""What decoding something that no run writes may raise, or encoding it again."""

_RUN = re.compile("[0-9a-f]{16}")
_Kinds = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[int, Meta(ge=1, le=BATCH_BYTES)]],
    Meta(max_length=MOST_KINDS),
]
_KINDS = msgspec.json.Decoder(_Kinds)
_Seq = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]


class _Numbers(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """A place and its span; the kinds are there where they were counted."""

    ring: Literal["critical", "bulk", "stream"]
    cpu: Annotated[int, Meta(ge=0, lt=MOST_CPUS)]
    first: _Seq
    last: _Seq
    kinds: _Kinds = msgspec.field(default_factory=dict)


_PLACES = msgspec.json.Decoder(Annotated[list[_Numbers], Meta(max_length=2 * MOST_CPUS + 1)])


def text_of(value: Any) -> str:
    """As it is in a row."""
    return msgspec.json.encode(value).decode()


def text_of_spans(spans: Spans) -> str:
    """As they are in a row."""
    return text_of([(*place, *(span if span.kinds else span[:2])) for place, span in spans.items()])


def kinds_of(text: Any) -> dict[str, int]:
    """Raises one of UNDECODABLE: no run writes that."""
    found: dict[str, int] = _KINDS.decode(text)
    return found


def spans_of(text: Any) -> Spans:
    """Raises one of UNDECODABLE: no run writes that."""
    found = _PLACES.decode(text)
    if any(one.first > one.last for one in found):
        raise msgspec.ValidationError("it ends before it begins")
    return {(one.ring, one.cpu): Span(one.first, one.last, one.kinds) for one in found}


def said_by(run: Any, kinds: Any, spans: Any) -> tuple[str, dict[str, int], Spans]:
    """The run, kinds and spans of a row; those that no run writes, and then no run, are empty."""
    try:
        counts = kinds_of(kinds)
    except UNDECODABLE:
        return "", {}, NO_SPANS
    try:
        places = spans_of(spans)
    except UNDECODABLE:
        return "", counts, NO_SPANS
    if not isinstance(run, str) or not _RUN.fullmatch(run):
        return "", counts, NO_SPANS
    return run, counts, places
