"""What is told of who was refused room in a ring: each event once, and no more than there are."""

from __future__ import annotations

import struct
from typing import Any

from streamer.agent.payers import MOST_PAYERS, Payers, told
from streamer.errors import KernelError
from streamer.events.stream import Refused
from streamer.kernel.objects import CONTRACT
from streamer.kernel.state import size_of

USER, CGROUP, CONTAINER = 1, 2, 3
PAID = sum(name != "PAID_END" for name, _, _ in CONTRACT["enum paid"])
SPANS = next(size for name, _, size in CONTRACT["payer"] if name == "spans")


def entry(kind: int, number: int, *counts: int, bulk: int = 0) -> tuple[bytes, bytes]:
    """Key and value of a payer who was refused so many of the first kinds.

    `bulk` is the number of the ring buffer for bulk.
    """
    refused = struct.pack(f"<{PAID}Q", *counts, *[0] * (PAID - len(counts)))
    value = b"\xff" * SPANS + refused
    assert len(value) == size_of("payer")
    return struct.pack("<QII", number, kind, bulk), value


def totals(*counts: int) -> tuple[int, ...]:
    return (*counts, *[0] * (PAID - len(counts)))


def test_nobody() -> None:
    assert told(totals(), []) == []
    assert told(totals(), [entry(USER, 1000)]) == []


def test_one_who_writes_to_several_ring_buffers_is_one() -> None:
    entries = [entry(USER, 7, 1, 2), entry(USER, 7, 0, 3, bulk=1), entry(CGROUP, 7, 1, bulk=1)]
    assert told(totals(2, 5), entries) == [
        Refused("user", 7, {"process.exec": 1, "process.fork": 5}),
        Refused("cgroup", 7, {"process.exec": 1}),
    ]


def test_each_by_what_he_is_known_by_the_most_first() -> None:
    entries = [entry(USER, 1000, 1), entry(CGROUP, 2**63, 0, 7), entry(CONTAINER, 4026532000, 2, 3)]
    assert told(totals(3, 10), entries) == [
        Refused("cgroup", 2**63, {"process.fork": 7}),
        Refused("container", 4026532000, {"process.exec": 2, "process.fork": 3}),
        Refused("user", 1000, {"process.exec": 1}),
    ]


def test_what_was_refused_to_those_who_are_forgotten() -> None:
    assert told(totals(5, 1), [entry(USER, 1000, 3)]) == [
        Refused("user", 1000, {"process.exec": 3}),
        Refused("others", 0, {"process.exec": 2, "process.fork": 1}),
    ]


def test_what_is_refused_while_it_is_read_is_told_the_next_time() -> None:
    """The totals were read before."""
    assert told(totals(2), [entry(USER, 1000, 3)]) == [Refused("user", 1000, {"process.exec": 3})]


def test_more_than_are_told_by_themselves() -> None:
    entries = [entry(USER, uid, uid) for uid in range(1, MOST_PAYERS + 11)]
    found = told(totals(sum(range(1, MOST_PAYERS + 11))), entries)
    assert [one.id for one in found[:-1]] == list(range(MOST_PAYERS + 10, 10, -1))
    assert found[-1] == Refused("others", 0, {"process.exec": sum(range(1, 11))})


class Kernel:
    """The totals that programs count, and their table, which cannot always be read."""

    def __init__(self) -> None:
        self.pressure = b""
        self.entries: list[tuple[bytes, bytes]] = []
        self.fails: Exception | None = None
        self.reads = 0
        self.count()

    def count(self, *counts: int) -> None:
        at = next(offset for name, offset, _ in CONTRACT["pressure"] if name == "refused")
        self.pressure = bytes(at) + struct.pack(f"<{PAID}Q", *totals(*counts))

    def read(self, name: str) -> list[tuple[bytes, bytes]]:
        assert name == "payers"
        self.reads += 1
        if self.fails is not None:
            raise self.fails
        return self.entries


def test_it_is_asked_for_when_anything_was_refused_since_and_again_if_that_failed() -> None:
    kernel: Any = Kernel()
    payers = Payers(kernel)
    assert payers.refused() == []
    assert kernel.reads == 0, "nobody was refused anything"
    kernel.count(1)
    kernel.entries = [entry(USER, 1000, 1)]
    first = [Refused("user", 1000, {"process.exec": 1})]
    assert payers.refused() == payers.refused() == first
    assert kernel.reads == 1
    kernel.count(3)
    kernel.entries = [entry(USER, 1000, 3)]
    for fails in (KernelError("gone"), OSError()):
        kernel.fails = fails
        assert payers.refused() == first
    kernel.fails = None
    assert payers.refused() == [Refused("user", 1000, {"process.exec": 3})]
