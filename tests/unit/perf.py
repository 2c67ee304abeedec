"""Perf buffers in ordinary memory, written the way the kernel writes them."""

from __future__ import annotations

import ctypes
import mmap
import struct

DATA_OFFSET = 4096
HEAD, TAIL = 1024, 1032
SAMPLE, LOST = 9, 2
LOST_BYTES = 24
U64 = (1 << 64) - 1
_RECORD = struct.Struct("<IHH")


def sample_bytes(length: int) -> int:
    """Bytes that a record of `length` bytes takes up in a buffer."""
    return 8 + (4 + length + 7) // 8 * 8


class SimulatedPerfBuffer:
    """The kernel's side. `memory` is what a consumer maps."""

    def __init__(self, size: int, start: int = 0) -> None:
        """`size` in bytes, a power of two; both positions begin at `start`."""
        self.size = size
        self.memory = mmap.mmap(-1, DATA_OFFSET + size)
        self._head = ctypes.c_uint64.from_buffer(self.memory, HEAD)
        self._tail = ctypes.c_uint64.from_buffer(self.memory, TAIL)
        self._head.value = self._tail.value = start
        self.lost = 0
        """Records that found no room, of which no record tells yet."""

    @property
    def head(self) -> int:
        """Where the kernel is; writable, to break a buffer."""
        return self._head.value

    @head.setter
    def head(self, position: int) -> None:
        self._head.value = position & U64

    @property
    def tail(self) -> int:
        """Where the consumer is."""
        return self._tail.value

    @property
    def used(self) -> int:
        return (self.head - self.tail) & U64

    def write(self, record: bytes) -> bool:
        """A sample, and before it, if there were any, how many found no room. Whether it does."""
        needed = sample_bytes(len(record)) + (LOST_BYTES if self.lost else 0)
        if needed >= self.size - self.used:  # a byte always stays free
            self.lost += 1
            return False
        if self.lost:
            self.put(LOST, struct.pack("<QQ", 1, self.lost))
            self.lost = 0
        body = sample_bytes(len(record)) - 8
        said = struct.pack("<I", body - 4) + record
        self.put(SAMPLE, said.ljust(body, b"\xee"))
        return True

    def put(self, kind: int, body: bytes, size: int | None = None) -> None:
        """A record of any kind, whose header says `size` if that is given."""
        data = _RECORD.pack(kind, 0, 8 + len(body) if size is None else size) + body
        for at, byte in enumerate(data, self.head):
            self.memory[DATA_OFFSET + (at & (self.size - 1))] = byte
        self.head += len(data)

    def set_word(self, eighth: int, word: int) -> None:
        """Set eight bytes of the data area."""
        at = DATA_OFFSET + 8 * (eighth % (self.size // 8))
        ctypes.c_uint64.from_buffer(self.memory, at).value = word
