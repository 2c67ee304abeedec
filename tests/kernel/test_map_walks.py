"""Reading a map of the kernel's while its elements come and go, as in one that forgets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from streamer.kernel.libbpf import Map, Object
from streamer.kernel.loader import OBJECTS

pytestmark = pytest.mark.kernel

SIZE = 8


@pytest.fixture
def payers() -> Iterator[Map]:
    """The table of who pays, of an object of which nothing else is loaded."""
    opened = Object(Path(OBJECTS, "process.bpf.o"))
    try:
        for program in opened.programs.values():
            program.autoload(False)
        for name, one in opened.maps.items():
            if name != "payers":
                one.leave_out()
        opened.maps["payers"].resize(1 << SIZE)
        opened.load()
        yield opened.maps["payers"]
    finally:
        opened.close()


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def test_a_key_is_there_once_though_a_walk_begins_anew(payers: Map) -> None:
    """As it does in the kernel where the last key is not there any more."""
    value = bytes(payers.value_size)
    for number in range(20):
        payers.update(key(number), value)
    walk = payers.entries()
    before = [found for found, _ in islice(walk, 10)]
    payers.delete(before[-1])
    found = [*before, *(found for found, _ in walk)]
    assert sorted(found) == sorted(key(number) for number in range(20))


def test_a_walk_ends_though_each_key_goes(payers: Map) -> None:
    """Nobody keeps the helper, which serves one request after the other, by coming and going."""
    value = bytes(payers.value_size)
    payers.update(key(0), value)
    steps = 0
    for found, _ in payers.entries():
        steps += 1
        payers.update(key(steps), value)
        payers.delete(found)
        assert steps < 1 << SIZE + 2
    assert steps
