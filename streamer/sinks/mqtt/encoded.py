"""Encoded events as messages need them: their marks are ids, which name a message."""

from __future__ import annotations

from operator import attrgetter

from streamer.events.batch import Batch, Encoding, count_kinds
from streamer.sinks.encoded import EncodedBatch

_id = attrgetter("id")


def encode(batch: Batch, encoding: Encoding, ticket: int = 0) -> EncodedBatch:
    """A whole batch; `ticket` as in `EncodedBatch`."""
    return EncodedBatch.of(batch, encoding, list(map(_id, batch.events)), ticket)


def first_and_last(batch: EncodedBatch) -> tuple[str, str]:
    """The ids that name what `encode` made, or a part of it."""
    return str(batch.marks[0]), str(batch.marks[-1])


def piece(batch: Batch, start: int, stop: int) -> Batch:
    """A batch of some of its events: itself when that is all, so that its encoding is shared."""
    if start == 0 and stop >= len(batch):
        return batch
    events = batch.events[start:stop]
    if len(batch.kinds) == 1:
        return Batch(events, dict.fromkeys(batch.kinds, len(events)), batch.spans)
    return Batch(events, count_kinds(events), batch.spans)
