"""A BPF ring buffer in ordinary memory, written the way the kernel writes it."""

from __future__ import annotations

import ctypes
import mmap
from threading import Lock
from typing import NamedTuple

DATA_OFFSET = 4096
HEADER = 8
BUSY = 1 << 31
DISCARD = 1 << 30
U64 = (1 << 64) - 1


def ring_step(length: int) -> int:
    """Bytes that a record of `length` bytes takes up in a ring."""
    return (HEADER + length + 7) & ~7


def producer_bytes(size: int) -> int:
    """Bytes of the producer's page and of the doubled data area of a ring of `size` bytes."""
    return DATA_OFFSET + 2 * size


class Reserved(NamedTuple):
    """A record that is still busy."""

    position: int
    length: int


class SimulatedRing:
    """The producer's side. `consumer` and `producer` are what a consumer maps.

    What the kernel gets by mapping the data area twice is done here by writing it twice.
    """

    def __init__(
        self,
        size: int,
        start: int = 0,
        consumer: mmap.mmap | None = None,
        producer: mmap.mmap | None = None,
    ) -> None:
        """`size` in bytes, a power of two; both positions begin at `start`."""
        self.size = size
        self.consumer = consumer or mmap.mmap(-1, DATA_OFFSET)
        self.producer = producer or mmap.mmap(-1, producer_bytes(size))
        self._consumed = ctypes.c_uint64.from_buffer(self.consumer)
        self._produced = ctypes.c_uint64.from_buffer(self.producer)
        self._lock = Lock()
        self._lock.acquire()
        self._consumed.value = self._produced.value = start

    @property
    def consumed(self) -> int:
        """The consumer's position."""
        return self._consumed.value

    @property
    def produced(self) -> int:
        """The producer's position; writable, to break a ring."""
        return self._produced.value

    @produced.setter
    def produced(self, position: int) -> None:
        self._produced.value = position & U64

    @property
    def free(self) -> int:
        """Bytes that are free."""
        return self.size - ((self.produced - self.consumed) & U64)

    def reserve(self, length: int) -> Reserved | None:
        """Make room for a record, which is busy from then on; None when the ring is full."""
        if ring_step(length) > self.free:
            return None
        reserved = Reserved(self.produced, length)
        self.set_word(reserved.position, length | BUSY)
        self._fence()
        self.produced = reserved.position + ring_step(length)
        return reserved

    def submit(self, reserved: Reserved, record: bytes, bits: int = 0) -> None:
        """Write the record and finish it; `bits` can discard it, or keep it busy."""
        assert len(record) == reserved.length
        self._write((reserved.position + HEADER) & U64, record)
        self._fence()
        self.set_word(reserved.position, reserved.length | bits)

    def write(self, record: bytes, bits: int = 0) -> Reserved | None:
        """Reserve and submit; None when the ring is full."""
        reserved = self.reserve(len(record))
        if reserved is not None:
            self.submit(reserved, record, bits)
        return reserved

    def set_word(self, position: int, word: int) -> None:
        """Set the length and the bits of a record, at once."""
        offset = position & (self.size - 1)
        for base in (DATA_OFFSET, DATA_OFFSET + self.size):
            ctypes.c_uint32.from_buffer(self.producer, base + offset).value = word

    def _write(self, position: int, record: bytes) -> None:
        start = position & (self.size - 1)
        first = record[: self.size - start]
        rest = record[len(first) :]
        for base in (DATA_OFFSET, DATA_OFFSET + self.size):
            self.producer[base + start : base + start + len(first)] = first
            self.producer[base : base + len(rest)] = rest

    def _fence(self) -> None:
        # What was written before is seen before what is written after, also on arm64.
        self._lock.release()
        self._lock.acquire()
