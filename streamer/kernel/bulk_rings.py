"""Several ring buffers for what is bulk, so that many CPUs do not wait for one another's lock.

`critical` and `bulk` are rings to everybody: in ids, accounts, losses. A ring buffer is named as
its ring, or, of those for bulk behind the first, `bulk.1` and on. Each CPU writes to one of them.
"""

from __future__ import annotations

import mmap

from streamer.kernel.objects import CONTRACT
from streamer.kernel.tags import RINGS

BULK = "bulk"
CPUS_OF_A_RING = 8
"""How many share one, unless the configuration says otherwise: see docs/scaling.md."""
LEAST_BYTES = 1 << 16
"""Rather fewer rings than smaller ones."""

_WAKE_BYTES = 4
_WAKE_ALL = next(size for name, _, size in CONTRACT["reader_state"] if name == "wake")
MOST = _WAKE_ALL // _WAKE_BYTES - RINGS.index(BULK)
"""Ring buffers for bulk that there can be."""


def count_of(asked: int, cpus: int, total: int) -> int:
    """How many there are to be, a power of two.

    `asked` in the configuration (0: as many as `cpus` need), for `cpus` that are there, with
    `total` bytes for all of them.
    """
    wanted = asked or -(-cpus // CPUS_OF_A_RING)
    most = min(MOST, max(total // max(LEAST_BYTES, mmap.PAGESIZE), 1))
    count = 1 << (wanted - 1).bit_length()
    return min(count, 1 << most.bit_length() - 1)


def shift_of(rings: int, cpus: int) -> int:
    """By how many bits to shift the number of one of `cpus` for that of its ring buffer."""
    return (-(-cpus // rings) - 1).bit_length()


def named(rings: int) -> tuple[str, ...]:
    """Names of so many ring buffers for bulk."""
    return (BULK, *(f"{BULK}.{number}" for number in range(1, rings)))


def ring_of(name: str) -> str:
    """The ring that a ring buffer belongs to."""
    return name.partition(".")[0]


def number_of(name: str) -> int:
    """Its number among those of its ring."""
    return int(name.partition(".")[2] or 0)


def wake_index(name: str) -> int:
    """Its place in `struct reader_state`."""
    return RINGS.index(ring_of(name)) + number_of(name)


def cpus_of(name: str, rings: int, shift: int, cpus: int) -> range | list[int]:
    """Which of `cpus` write to it, where bulk has so many `rings`."""
    if ring_of(name) != BULK or rings == 1:
        return range(cpus)
    return [cpu for cpu in range(cpus) if (cpu >> shift) % rings == number_of(name)]
