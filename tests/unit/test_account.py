"""The kernel's counters, losses by kind, and the account in one line."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping

from streamer.agent.cells import CpuAccounts, by_kind, marks, unread
from streamer.agent.counters import CpuCounts, KernelCounters, LossLedger, faults
from streamer.agent.reports import account_line, counts_by_name
from streamer.events.kinds import KINDS
from streamer.events.stream import CpuMark, Dropped, KindCounts
from streamer.kernel.objects import CONTRACT, KIND_END, KIND_NUMBERS
from streamer.kernel.state import size_of
from streamer.kernel.tags import RINGS
from streamer.sinks.memory import MemorySink

RING_OF = {kind: info.ring for kind, info in KINDS.items()}
AT = {name: offset for name, offset, _ in CONTRACT["cpu_counters"]}
CPUS = 3
Row = tuple[int, int, int, int]
"""produced, filtered, shed, lost"""


class Memory:
    """What the programs would write: the counters by CPU, and those by CPU and kind."""

    def __init__(self) -> None:
        self.cpus = mmap.mmap(-1, CPUS * size_of("cpu_counters"))
        self.kinds = mmap.mmap(-1, CPUS * KIND_END * size_of("kind_counters"))

    def counters(self) -> KernelCounters:
        return KernelCounters(self.cpus, self.kinds, CPUS)

    def kind(self, cpu: int, kind: str, row: Row) -> None:
        at = size_of("kind_counters") * (cpu * KIND_END + KIND_NUMBERS[kind])
        struct.pack_into("<4Q", self.kinds, at, *row)

    def rings(self, cpu: int, name: str, values: Mapping[str, int]) -> None:
        at = cpu * size_of("cpu_counters") + AT[name]
        struct.pack_into("<2Q", self.cpus, at, *(values[ring] for ring in RINGS))


def test_the_order_of_the_counters_is_that_of_the_contract() -> None:
    names = ("produced", "filtered", "shed", "lost")
    assert CONTRACT["kind_counters"] == tuple((name, 8 * i, 8) for i, name in enumerate(names))


def test_counts_of_a_kind_are_of_all_cpus() -> None:
    memory = Memory()
    memory.kind(0, "file.open", (100, 10, 30, 1))
    memory.kind(2, "file.open", (200, 20, 0, 2))
    memory.kind(1, "net.close", (7, 0, 0, 0))
    counters = memory.counters()
    assert counters.of_kind(KIND_NUMBERS["file.open"]) == (300, 30, 30, 3)
    assert counters.of_kinds() == {"file.open": (300, 30, 30, 3), "net.close": (7, 0, 0, 0)}


def test_counts_of_the_largest_numbers() -> None:
    memory = Memory()
    memory.kind(CPUS - 1, "net.close", (2**64 - 1, 2**63, 0, 1))
    counters = memory.counters()
    assert counters.of_kind(KIND_NUMBERS["net.close"]) == (2**64 - 1, 2**63, 0, 1)


def test_lost_of_one_cpu() -> None:
    memory = Memory()
    memory.kind(1, "file.open", (9, 0, 0, 4))
    memory.kind(1, "net.connect", (9, 9, 0, 0))
    memory.kind(2, "file.open", (9, 0, 0, 5))
    counters = memory.counters()
    assert counters.lost(0) == {}
    assert counters.lost(1) == {"file.open": 4}


def test_the_numbers_taken_per_ring_and_cpu() -> None:
    memory = Memory()
    memory.rings(0, "seq", {"critical": 5, "bulk": 0})
    memory.rings(2, "seq", {"critical": 0, "bulk": 9})
    assert memory.counters().seqs() == {"critical": [5, 0, 0], "bulk": [0, 0, 9]}


class Counting(KernelCounters):
    """A program has produced an event, and numbers it after the first of these looks."""

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory.cpus, memory.kinds, CPUS)
        self._memory = memory
        memory.kind(0, "file.open", (6, 0, 0, 0))
        memory.rings(0, "seq", {"critical": 0, "bulk": 5})

    def _of_cpu(self, cpu: int) -> CpuCounts:
        found = super()._of_cpu(cpu)
        self._memory.rings(0, "seq", {"critical": 0, "bulk": 6})
        return found


def counted(memory: Memory) -> None:
    memory.kind(0, "process.exec", (9, 3, 1, 2))
    memory.kind(0, "file.open", (4, 4, 0, 0))
    memory.kind(2, "file.open", (12, 1, 2, 0))
    memory.rings(0, "seq", {"critical": 5, "bulk": 0})
    memory.rings(2, "seq", {"critical": 0, "bulk": 11})
    memory.rings(2, "skipped", {"critical": 0, "bulk": 2})


READ = {0: {"process.exec": 3}, 1: {}, 2: {"file.open": 8}}


def test_marks_are_of_the_rings_and_cpus_that_were_used() -> None:
    memory = Memory()
    counted(memory)
    passed = {("critical", 0): 4}
    accounts = CpuAccounts(memory.counters(), READ.__getitem__, lambda: passed).look()
    watermarks = {("bulk", 2): 77}
    assert marks(accounts, lambda *of: watermarks.get(of, 0)) == [
        CpuMark("critical", 0, 5, 4, 0, 0, {"process.exec": (9, 3, 1, 2, 3)}),
        CpuMark("bulk", 0, 0, 0, 0, 0, {"file.open": (4, 4, 0, 0, 0)}),
        CpuMark("bulk", 2, 11, 0, 2, 77, {"file.open": (12, 1, 2, 0, 8)}),
    ]
    assert by_kind(accounts.values()) == {
        "process.exec": KindCounts(9, 3, 1, 2, 3),
        "file.open": KindCounts(16, 5, 2, 0, 8),
    }
    assert unread(accounts, "bulk") == {0: {}, 1: {}, 2: {"file.open": 1}}


def test_what_nobody_has_read_of_a_ring() -> None:
    """What was filtered, shed or lost is nobody's to read, nor is what is in another ring."""
    memory = Memory()
    memory.kind(1, "process.exec", (20, 0, 0, 0))
    memory.kind(1, "file.open", (20, 4, 3, 2))
    memory.kind(1, "net.close", (7, 0, 0, 1))
    memory.rings(1, "seq", {"critical": 20, "bulk": 20})
    read = {"process.exec": 12, "file.open": 5, "net.close": 6}
    accounts = CpuAccounts(memory.counters(), lambda cpu: read if cpu == 1 else {}, dict).look()
    assert unread(accounts, "bulk") == {0: {}, 1: {"file.open": 6}, 2: {}}
    assert unread(accounts, "critical") == {0: {}, 1: {"process.exec": 8}, 2: {}}


def test_the_account_of_a_cpu_is_of_a_moment_at_which_it_closes() -> None:
    found = Counting(Memory()).of_cpu(0)
    assert (found.kinds, found.seqs) == ({"file.open": (6, 0, 0, 0)}, (0, 6))


def test_an_account_that_never_closes_is_the_one_before() -> None:
    """All of it: what was read by now is not held against what was produced by then."""
    memory = Memory()
    counted(memory)
    read, passed = {"process.exec": 3}, {("critical", 0): 3}
    accounts = CpuAccounts(
        memory.counters(), lambda cpu: {} if cpu else dict(read), lambda: dict(passed)
    )
    before = accounts.look()
    told = marks(before, lambda *_: 0)
    memory.kind(0, "process.exec", (11, 3, 1, 2))  # and 5 of 7 have a number
    read["process.exec"] = passed["critical", 0] = 4
    assert accounts.look() == before
    assert marks(accounts.look(), lambda *_: 0) == told
    last = accounts.look(final=True)
    assert by_kind([last[0]])["process.exec"] == KindCounts(11, 3, 1, 2, 4)
    assert marks(last, lambda *_: 0)[0].read == 4


def test_before_an_account_has_ever_closed_nothing_was_counted() -> None:
    """A heartbeat that has it would contradict itself."""
    memory = Memory()
    accounts = CpuAccounts(memory.counters(), lambda _: {"file.open": 1}, dict)
    memory.kind(0, "file.open", (2, 0, 0, 0))
    memory.rings(0, "seq", {"critical": 0, "bulk": 1})
    assert by_kind(accounts.look().values()) == {}
    assert marks(accounts.look(), lambda *_: 0) == []


def test_two_sinks_of_one_name_are_one() -> None:
    """While one that was replaced delivers what it has, and the other begins."""
    older, old, new = (MemorySink("kafka:x") for _ in range(3))
    old.account.received.update({"file.open": 9, "net.close": 2})
    old.account.delivered.update({"file.open": 5})
    old.account.dropped.update({"file.open": 1, "net.close": 2})
    new.account.received.update({"file.open": 3, "process.exec": 1})
    new.account.delivered.update({"file.open": 1})
    old.account.drop_of({("bulk", 1, "net.close"): 1, ("bulk", 0, "file.open"): 1})
    older.account.drop_of({("bulk", 1, "net.close"): 1})
    new.account.drop_of({("bulk", 0, "net.close"): 1})
    (counts,) = counts_by_name([older, old, new], lambda _: 0).values()
    assert (counts.received, counts.delivered, counts.dropped, counts.pending) == (15, 6, 3, 6)
    assert counts.dropped_of == [
        Dropped("bulk", 0, {"file.open": 1, "net.close": 1}),
        Dropped("bulk", 1, {"net.close": 2}),
    ]
    assert counts_by_name([older], lambda _: 0)["kafka:x"].dropped_of == [
        Dropped("bulk", 1, {"net.close": 1})
    ]
    assert counts.kinds == {
        "file.open": (12, 6, 1),
        "net.close": (2, 0, 2),
        "process.exec": (1, 0, 0),
    }


# ------------------------------------------------------------------ the ledger of losses


def ledger(memory: Memory) -> LossLedger:
    return LossLedger(memory.counters(), RING_OF)


def test_a_loss_is_of_the_kinds_that_found_no_room() -> None:
    memory = Memory()
    memory.kind(0, "file.open", (50, 0, 0, 30))
    memory.kind(0, "net.close", (50, 0, 0, 12))
    assert ledger(memory).kinds("bulk", 0, 42) == {"file.open": 30, "net.close": 12}


def test_a_loss_is_told_once() -> None:
    """Each failed reserve belongs to one loss, also when more fail later."""
    memory = Memory()
    memory.kind(0, "file.open", (50, 0, 0, 30))
    told = ledger(memory)
    assert told.kinds("bulk", 0, 20) == {"file.open": 20}
    memory.kind(0, "file.open", (70, 0, 0, 45))
    assert told.kinds("bulk", 0, 25) == {"file.open": 25}
    assert told.kinds("bulk", 0, 1) == {}


def test_a_loss_is_of_its_own_ring_and_cpu() -> None:
    memory = Memory()
    memory.kind(0, "process.exec", (5, 0, 0, 5))
    memory.kind(1, "file.open", (5, 0, 0, 5))
    told = ledger(memory)
    assert told.kinds("bulk", 0, 5) == {}
    assert told.kinds("critical", 0, 5) == {"process.exec": 5}
    assert told.kinds("bulk", 1, 5) == {"file.open": 5}


def test_kinds_never_add_up_to_more_than_the_loss() -> None:
    memory = Memory()
    memory.kind(0, "file.open", (50, 0, 0, 30))
    memory.kind(0, "net.close", (50, 0, 0, 30))
    found = ledger(memory).kinds("bulk", 0, 40)
    assert sum(found.values()) == 40


def test_the_rest_of_a_loss_is_of_unknown_kind() -> None:
    memory = Memory()
    memory.kind(0, "file.open", (5, 0, 0, 2))
    assert ledger(memory).kinds("bulk", 0, 3) == {"file.open": 2}


# ------------------------------------------------------------------ faults


def test_faults_are_told_by_name_if_there_are_any() -> None:
    names = [name for name, _, _ in CONTRACT["enum fault"]]
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    assert faults(memory) == {}
    struct.pack_into("<Q", memory, 8 * names.index("FAULT_LISTENERS_FULL"), 3)
    struct.pack_into("<Q", memory, 8 * names.index("FAULT_NO_SLOT"), 2**64 - 1)
    assert faults(memory) == {"listeners_full": 3, "no_slot": 2**64 - 1}


# ------------------------------------------------------------------ the account in one line


def sink_with(delivered: dict[str, int], dropped: dict[str, int]) -> MemorySink:
    sink = MemorySink()
    sink.account.delivered.update(delivered)
    sink.account.dropped.update(dropped)
    return sink


def test_the_account_in_one_line() -> None:
    """Events of the kernel alone: records of the stream are not counted."""
    kinds = {
        "process.exec": KindCounts(produced=1000, filtered=100, shed=0, lost=5, read=895),
        "file.open": KindCounts(produced=2_000_000, filtered=0, shed=0, lost=1, read=1_999_999),
    }
    sink = sink_with(
        {"process.exec": 895, "file.open": 1_999_990, "stream.heartbeat": 4}, {"file.open": 9}
    )
    assert account_line(kinds, [sink], 61.23) == (
        "2,001,000 events in 61.2 s; memory: 2,000,885 delivered, 9 dropped; 100 filtered, 6 lost"
    )


def test_the_account_of_several_sinks_and_of_what_was_not_read() -> None:
    kinds = {"file.open": KindCounts(produced=13, filtered=0, shed=3, lost=0, read=7)}
    sinks = [sink_with({"file.open": 7}, {}), sink_with({}, {"file.open": 7})]
    assert account_line(kinds, sinks, 1) == (
        "13 events in 1.0 s; memory: 7 delivered, 0 dropped; memory: 0 delivered, 7 dropped; "
        "0 filtered, 0 lost; 3 shed; 3 not read"
    )


def test_the_account_of_nothing() -> None:
    assert account_line({}, [], 0) == "0 events in 0.0 s; 0 filtered, 0 lost"
