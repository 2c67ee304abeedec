"""Encoded events as record batches need them: their marks are times in nanoseconds."""

from __future__ import annotations

from array import array
from operator import attrgetter

from streamer.events.batch import Batch, Encoding
from streamer.sinks.encoded import EncodedBatch, Records

_time_ns = attrgetter("time_ns")


def encode(batch: Batch, encoding: Encoding, ticket: int = 0) -> EncodedBatch:
    """A whole batch; `ticket` as in `EncodedBatch`."""
    return EncodedBatch.of(batch, encoding, array("q", map(_time_ns, batch.events)), ticket)


def timed(batch: EncodedBatch) -> tuple[Records, array[int]]:
    """The records of what `encode` made, or of a part, with their times."""
    assert isinstance(batch.marks, array)
    return batch.data, batch.marks
