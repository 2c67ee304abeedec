"""What was lost where another reader has left: by numbers, as far as they are known."""

from __future__ import annotations

import mmap
from types import SimpleNamespace
from typing import Any

from streamer.agent.counters import KernelCounters
from streamer.agent.losses import Lost
from streamer.agent.ring_account import RingAccount
from streamer.events.kinds import RECORDS
from streamer.events.stream import SeqRange
from streamer.kernel.objects import CONTRACT, KIND_END
from streamer.kernel.state import size_of

CPUS = 2
KIND = "file.open"
ROW = size_of("kind_counters")
LOST_AT = next(at for name, at, _ in CONTRACT["kind_counters"] if name == "lost")
UNSETTLED = SeqRange("bulk", 1, 13, 30)


def account(lost: int) -> RingAccount:
    """Of a ring that another one has left, where so many found no room on its CPU."""
    counters = mmap.mmap(-1, size_of("cpu_counters") * CPUS)
    kinds = mmap.mmap(-1, ROW * CPUS * KIND_END)
    (number,) = (n for n, layout in RECORDS.items() if layout.kind == KIND)
    for cpu in range(CPUS):
        at = (cpu * KIND_END + number) * ROW + LOST_AT
        kinds[at : at + 8] = (lost if cpu == 1 else 1000).to_bytes(8, "little")
    reader: Any = SimpleNamespace(sources=[], losses=lambda final: iter(()))
    return RingAccount(reader, KernelCounters(counters, kinds, CPUS))


def left(lost: int, told: int, unread: int) -> Lost:
    made = account(lost)
    source: Any = SimpleNamespace(name="bulk", cpus=(1,))
    made.take_over([source], [UNSETTLED], {("bulk", 1): told})
    return made.left_behind({KIND: unread}, "it has gone")


def test_what_it_had_not_said_of_losses_in_the_kernel() -> None:
    """A number may be late for half a second, and only then is it told as lost."""
    assert left(11, 4, 0) == Lost("sink", "it has gone", 7, {}, (UNSETTLED,))


def test_what_it_had_read_beside() -> None:
    assert left(11, 4, 5) == Lost("sink", "it has gone", 12, {KIND: 5}, (UNSETTLED,))


def test_it_had_told_all() -> None:
    """More, even, where it ended at the end: with what it could not read any more."""
    for told in (11, 12):
        assert left(11, told, 0) == Lost("sink", "it has gone", 0, {}, ())


def source(cpus: range, drained: dict[int, dict[str, int]]) -> Any:
    def of(cpu: int) -> dict[str, int]:
        assert cpu in cpus, "a ring that it does not write to"
        return drained.get(cpu, {})

    return SimpleNamespace(cpus=cpus, decoder=SimpleNamespace(drained=of))


def test_what_was_read_of_a_cpu_is_of_all_rings_that_it_writes_to() -> None:
    critical = source(range(2), {1: {"process.exec": 3}})
    halves = [source(range(1), {0: {KIND: 7}}), source(range(1, 2), {1: {KIND: 5}})]
    reader: Any = SimpleNamespace(sources=[critical, *halves])
    counters: Any = None
    made = RingAccount(reader, counters)
    assert [made.read(cpu) for cpu in (0, 1)] == [{KIND: 7}, {"process.exec": 3, KIND: 5}]
