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


OLD_NS = 12 * 3600 * 10**9
"""A broker forgets the numbers of a producer whose newest record is a day old by its time
(`producer.id.expiration.ms`), and would take a repetition for new."""

AHEAD_NS = 1800 * 10**9
"""It refuses records that are more than an hour ahead (`message.timestamp.after.max.ms`)."""


def timed(batch: EncodedBatch) -> tuple[Records, array[int]]:
    """The records of what `encode` made, or of a part, with their times."""
    assert isinstance(batch.marks, array)
    return batch.data, batch.marks


def sendable(batch: EncodedBatch, now_ns: int, *, as_now: bool) -> tuple[Records, array[int]]:
    """As `timed`; with the time of sending where the events' own would do harm, or `as_now`.

    Events that were in the spool for long are such. Their `time_ns` remains what it was.
    """
    records, times = timed(batch)
    # Events of a batch are of one drain, in order: the first is the oldest.
    if as_now or times[0] < now_ns - OLD_NS or times[-1] > now_ns + AHEAD_NS:
        times = array("q", [now_ns]) * len(times)
    return records, times
