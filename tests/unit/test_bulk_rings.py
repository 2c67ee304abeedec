"""How CPUs are divided among ring buffers: each CPU has one, whatever their numbers."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.kernel import bulk_rings
from streamer.kernel.bulk_rings import MOST, count_of, cpus_of, named, number_of, ring_of, shift_of

MIB = 1 << 20


@pytest.mark.parametrize(
    ("asked", "cpus", "total", "expected"),
    [
        (0, 1, 16 * MIB, 1),
        (0, 8, 16 * MIB, 1),
        (0, 9, 16 * MIB, 2),
        (0, 64, 16 * MIB, 8),
        (0, 65, 16 * MIB, 16),
        (0, 4096, 1024 * MIB, 64),
        (1, 64, 16 * MIB, 1),
        (3, 64, 16 * MIB, 4),
        (64, 2, 16 * MIB, 64),
        (64, 64, MIB, 16),
        (4, 64, 65536, 1),
        (4, 64, 4096, 1),
    ],
)
def test_how_many(asked: int, cpus: int, total: int, expected: int) -> None:
    assert count_of(asked, cpus, total) == expected


@given(st.integers(0, 6).map(lambda bits: 1 << bits), st.integers(1, 300), st.integers(0, 40))
def test_each_cpu_has_one_ring_buffer(rings: int, present: int, more: int) -> None:
    """Also CPUs that come later, with numbers behind those that are there."""
    shift = shift_of(rings, present)
    cpus = present + more
    owners = Counter(cpu for name in named(rings) for cpu in cpus_of(name, rings, shift, cpus))
    assert owners == Counter(range(cpus))
    sizes = [len([*cpus_of(name, rings, shift, present)]) for name in named(rings)]
    assert max(sizes) <= 1 << shift
    assert max(sizes) < 2 * -(-present // rings) or max(sizes) == 1


def test_neighbours_share() -> None:
    """They have the same cache, as a rule."""
    assert [[*cpus_of(name, 4, shift_of(4, 16), 16)] for name in named(4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12, 13, 14, 15],
    ]


def test_names() -> None:
    assert named(3) == ("bulk", "bulk.1", "bulk.2")
    assert [ring_of(name) for name in ("critical", *named(2))] == ["critical", "bulk", "bulk"]
    assert [number_of(name) for name in ("critical", *named(2))] == [0, 0, 1]
    assert [bulk_rings.wake_index(name) for name in ("critical", *named(2))] == [0, 1, 2]
    assert MOST == 64
