"""The walk through the flows, over memory that stands for the program's."""

from __future__ import annotations

import errno
import mmap
import struct
from collections.abc import Iterator

import pytest

from streamer.kernel.flows import FlowWalk
from streamer.kernel.objects import CONTRACT

AT = {name: offset for name, offset, _ in CONTRACT["flow_walk"]}


class Programs:
    """What the program in the kernel does, with room for so many runs before the ring is full."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory = memory
        self.asked: list[int] = []
        self.runs_in_round = 10
        self.room = 1 << 30
        self._left = 0

    def word(self, name: str) -> int:
        found: int = struct.unpack_from("<Q", self.memory, AT[name])[0]
        return found

    def run(self, repeat: int) -> int:
        self.asked.append(repeat)
        self._left = self._left or self.runs_in_round
        self._left -= min(repeat, self.room, self._left)
        if not self._left:
            struct.pack_into("<Q", self.memory, AT["rounds"], self.word("rounds") + 1)
            if struct.unpack_from("<I", self.memory, AT["stop"])[0]:
                struct.pack_into("<Q", self.memory, AT["live"], 0)
        return int(bool(self._left))


@pytest.fixture
def programs() -> Iterator[Programs]:
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    yield Programs(memory)
    memory.close()


def walk(programs: Programs, flows: int = 64, resolution_us: int = 0) -> FlowWalk:
    return FlowWalk(programs.memory, programs.run, flows, 30, 60, resolution_us)


def test_what_the_programs_are_told(programs: Programs) -> None:
    walk(programs, resolution_us=1000)
    assert [programs.word(f"{name}_ns") for name in ("idle", "active", "linger")] == [
        *(30 * 10**9, 60 * 10**9, 10**9),
    ]
    assert struct.unpack_from("<II", programs.memory, AT["stop"]) == (0, 10)


def test_a_round_is_over_when_every_slot_was_looked_at(programs: Programs) -> None:
    programs.runs_in_round = 4  # of 16 slots each
    flows = walk(programs)
    assert flows.step()
    assert flows.step()
    assert (programs.word("target"), programs.word("rounds")) == (2, 2)


def test_a_full_ring_interrupts_a_round_and_begins_none(programs: Programs) -> None:
    programs.room = 4
    flows = walk(programs, 1 << 20)
    assert [flows.step() for _ in range(4)] == [False, False, True, False]
    assert programs.word("target") == 2


def test_who_is_interrupted_goes_on_later(programs: Programs) -> None:
    """As by a debugger: the kernel gives up a program that it runs again and again."""
    struct.pack_into("<Q", programs.memory, AT["target"], 1)

    def interrupted(repeat: int) -> int:
        raise OSError(errno.EINTR, "Interrupted system call")

    flows = FlowWalk(programs.memory, interrupted, 64, 30, 60, 0)
    assert not flows.step()
    assert walk(programs, 1 << 20).step()
    assert programs.word("rounds") == 1


def test_a_large_table_is_walked_in_steps(programs: Programs) -> None:
    """The helper is not kept from other requests for the whole of it."""
    programs.runs_in_round = 10_000
    flows = walk(programs, 1 << 20)
    assert [flows.step() for _ in range(3)] == [False, False, True]
    assert set(programs.asked) == {4096}


def test_the_end_reports_all(programs: Programs) -> None:
    struct.pack_into("<Q", programs.memory, AT["live"], 5)
    programs.room = 6
    flows = walk(programs, 1 << 20)
    assert flows.live == 5
    assert [flows.flush(), flows.flush()] == [False, True]
    assert flows.live == 0


def test_a_flow_that_is_made_behind_the_last_round_is_reported_too(programs: Programs) -> None:
    """A packet can come until the programs are detached."""
    late = [1]

    def run(repeat: int) -> int:
        left = programs.run(repeat)
        struct.pack_into("<Q", programs.memory, AT["live"], late.pop() if late else 0)
        return left

    flows = FlowWalk(programs.memory, run, 1024, 30, 60, 0)
    assert [flows.flush(), flows.flush()] == [False, True]
