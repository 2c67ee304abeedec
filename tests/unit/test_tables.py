"""Tables of counters: what has changed since the last look, and what a look leaves behind."""

from __future__ import annotations

import mmap
import struct

from streamer.summaries.tables import CounterTable
from tests.unit.bounds import bounded_memory

PAGE = 4096


def test_what_has_changed_is_found_once_with_what_was_before() -> None:
    with mmap.mmap(-1, 3 * PAGE) as memory:
        table = CounterTable(memory, 3 * PAGE, 2)
        assert list(table.changes()) == []
        struct.pack_into("<2Q", memory, 16 * 300, 1, 60)
        struct.pack_into("<2Q", memory, 16 * 767, 2, 90)
        assert list(table.changes()) == [(300, (0, 0), (1, 60)), (767, (0, 0), (2, 90))]
        assert list(table.changes()) == []
        struct.pack_into("<2Q", memory, 16 * 300, 5, 300)
        assert list(table.changes()) == [(300, (1, 60), (5, 300))]


def test_a_table_of_many_cpus_is_not_held_twice() -> None:
    """16 interfaces at 64 CPUs are 128 MiB."""
    size = 128 << 20
    with mmap.mmap(-1, size) as memory, bounded_memory():
        table = CounterTable(memory, size, 2)
        struct.pack_into("<2Q", memory, size // 2, 1, 60)
        assert len(list(table.changes())) == 1
        assert list(table.changes()) == []
