"""Perf buffers are read as rings are: by the compiled reader and by its twin, whatever comes."""

from __future__ import annotations

import mmap
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.kernel.perf_buffers import buffer_size
from streamer.ring import _records, records, records_py
from tests.unit.perf import DATA_OFFSET, LOST, SAMPLE, SimulatedPerfBuffer, sample_bytes
from tests.unit.test_records import counters, drained_by_cpu, fork, sample
from tests.unit.test_records_property import anything, decoders, drain, limits, sound, starts

U64 = (1 << 64) - 1
CPUS = (0, 1, 7)
IMPLEMENTATIONS = (_records.PerfBuffers, records_py.PerfBuffers)


class TwoReaders:
    """The same written into two sets of buffers, and both consumers."""

    def __init__(self, size: int, start: int, cpus: tuple[int, ...] = CPUS) -> None:
        self.simulated: list[dict[int, SimulatedPerfBuffer]] = []
        self.decoders = decoders()
        self.readers: tuple[Any, Any] = (IMPLEMENTATIONS[0](), IMPLEMENTATIONS[1]())
        for reader in self.readers:
            self.simulated.append({})
            for cpu in cpus:
                self.add_to(reader, cpu, size, start)
        self.events: list[Any] = []
        self.kinds: Counter[str] = Counter()

    def add_to(self, reader: Any, cpu: int, size: int, start: int) -> None:
        made = SimulatedPerfBuffer(size, start)
        self.simulated[self.readers.index(reader)][cpu] = made
        reader.add(cpu, made.memory, DATA_OFFSET)

    def add(self, cpu: int, size: int, start: int) -> None:
        """The CPU has gone and come back."""
        for reader in self.readers:
            self.add_to(reader, cpu, size, start)

    def write(self, cpu: int, record: bytes) -> bool:
        one, other = (buffers[cpu].write(record) for buffers in self.simulated)
        assert one == other
        return one

    def each(self, cpu: int) -> list[SimulatedPerfBuffer]:
        return [buffers[cpu] for buffers in self.simulated]

    def drain(self, limit: int) -> Any:
        results = [
            drain(reader, decoder, limit)
            for reader, decoder in zip(self.readers, self.decoders, strict=True)
        ]
        assert results[0] == results[1]
        if not isinstance(results[0], str):
            self.events += results[0][0]
            self.kinds.update(results[0][1])
        self.check()
        return results[0]

    def check(self) -> None:
        compiled, twin = map(state, self.readers)
        assert compiled == twin
        assert counters(self.decoders[0]) == counters(self.decoders[1])
        assert drained_by_cpu(self.decoders[0]) == drained_by_cpu(self.decoders[1])
        one, other = ({c: b.tail for c, b in buffers.items()} for buffers in self.simulated)
        assert one == other


def state(reader: Any) -> tuple[int, ...]:
    seqs = (reader.next_seq(cpu) for cpu in (*CPUS, 65535))
    positions = (at(cpu) for cpu in CPUS for at in (reader.produced, reader.consumed))
    told = (reader.pending, reader.records, reader.discarded, reader.lost)
    return (*told, *seqs, *positions)


def test_the_compiled_reader_is_the_one_in_use() -> None:
    assert records.PerfBuffers is _records.PerfBuffers


cpus = st.sampled_from(CPUS)
steps = st.one_of(
    st.tuples(st.just("write"), cpus, anything),
    st.tuples(st.just("write"), cpus, sound),
    st.tuples(st.just("other"), cpus, st.sampled_from([1, 5, 13, LOST]), st.integers(0, 4)),
    st.tuples(st.just("again"), cpus, starts),
    st.tuples(st.just("drain"), limits),
)


@given(st.sampled_from([2048, 4096]), starts, st.lists(steps, max_size=40))
def test_buffers_drain_equally(size: int, start: int, todo: list[Any]) -> None:
    """Whatever is written, in whatever order: also by CPUs that go and come back."""
    readers = TwoReaders(size, start)
    for step in todo:
        match step:
            case ("write", cpu, record):
                readers.write(cpu, record)
            case ("other", cpu, kind, words):
                for one in readers.each(cpu):
                    if 8 + 8 * words < one.size - one.used:
                        one.put(kind, bytes(8 * words))
            case ("again", cpu, position):
                readers.add(cpu, size, position)
                readers.check()
            case ("drain", limit):
                readers.drain(limit)
    while readers.readers[0].pending:
        assert not isinstance(readers.drain(3), str)
    for cpu in CPUS:
        for one in readers.each(cpu):
            assert one.head == one.tail


@pytest.mark.parametrize("others", [0, 1, 2])
def test_a_buffer_that_came_later_is_read_later(others: int) -> None:
    """Although its first record is of the same time: the numbers of a CPU stay in their order."""
    readers = TwoReaders(2048, 0)
    for seq in range(1, 4):
        readers.write(0, sample(seq=seq, cpu=0, boot_ns=5))
    for cpu in CPUS[1 : 1 + others]:
        readers.write(cpu, sample(seq=1, cpu=cpu, boot_ns=1))
    readers.add(0, 2048, 0)
    for seq in range(4, 7):
        readers.write(0, sample(seq=seq, cpu=0, boot_ns=5))
    readers.drain(100)
    assert [one.seq for one in readers.events if one.cpu == 0] == list(range(1, 7))


@given(
    starts,
    st.lists(st.tuples(cpus, st.integers(0, 1500)), min_size=1, max_size=30),
    st.integers(1, 7),
)
def test_what_is_not_delivered_is_lost_and_both_are_counted(
    start: int, todo: list[tuple[int, int]], rate: int
) -> None:
    """Into buffers that overflow. What the kernel says of its losses is the same."""
    readers = TwoReaders(2048, start)
    taken: Counter[int] = Counter()
    fits = 0
    for i, (cpu, size) in enumerate(todo):
        taken[cpu] += 1
        fits += readers.write(cpu, sample(seq=taken[cpu], cpu=cpu, boot_ns=i, first=b"x" * size))
        if i % rate == 0:
            readers.drain(2)
    while readers.readers[0].pending:
        readers.drain(1000)
    for cpu in CPUS:  # the kernel tells with the next record
        taken[cpu] += 1
        assert readers.write(cpu, sample(seq=taken[cpu], cpu=cpu))
    readers.drain(1000)
    delivered = Counter(event.cpu for event in readers.events)
    assert delivered.total() == fits + len(CPUS) == readers.kinds["test.sample"]
    for reader in readers.readers:
        assert reader.lost == taken.total() - delivered.total()
        assert [reader.next_seq(cpu) - 1 for cpu in CPUS] == [taken[cpu] for cpu in CPUS]


@given(starts, st.lists(st.tuples(cpus, st.integers(0, 400)), max_size=30), limits)
def test_the_oldest_comes_first_and_each_cpu_keeps_its_order(
    start: int, todo: list[tuple[int, int]], limit: int
) -> None:
    readers = TwoReaders(1 << 14, start)
    taken: Counter[int] = Counter()
    for i, (cpu, size) in enumerate(todo):
        taken[cpu] += 1
        record = sample(seq=taken[cpu], cpu=cpu, boot_ns=i, first=b"y" * size)
        assert readers.write(cpu, record)
    while readers.readers[0].pending:
        readers.drain(limit)
    assert [event.boot_ns for event in readers.events] == list(range(len(todo)))
    assert [len(event.first) for event in readers.events] == [size for _, size in todo]


@given(
    starts,
    st.lists(st.tuples(cpus, sound), max_size=6),
    st.lists(st.tuples(cpus, st.integers(0, 255), st.integers(0, U64)), max_size=4),
    st.lists(st.tuples(cpus, st.integers(0, U64)), max_size=1),
    limits,
)
def test_broken_buffers_are_refused_equally(
    start: int,
    todo: list[tuple[int, bytes]],
    words: list[tuple[int, int, int]],
    heads: list[tuple[int, int]],
    limit: int,
) -> None:
    readers = TwoReaders(2048, start)
    for cpu, record in todo:
        readers.write(cpu, record)
    for cpu, eighth, word in words:
        for one in readers.each(cpu):
            one.set_word(eighth, word)
    for cpu, position in heads:
        for one in readers.each(cpu):
            one.head = position
    for _ in range(4):
        readers.drain(limit)


# ------------------------------------------------------------------ single cases


@pytest.mark.parametrize(
    ("kind", "body", "size", "said"),
    [
        (SAMPLE, b"", 0, "a record of 0 bytes at 64, where 8 are pending"),
        (SAMPLE, b"", 12, "a record of 12 bytes at 64, where 8 are pending"),
        (LOST, bytes(8), 24, "a record of 24 bytes at 64, where 16 are pending"),
    ],
)
def test_a_length_that_makes_no_sense(kind: int, body: bytes, size: int, said: str) -> None:
    """What came before it is delivered; then the drain says what is wrong."""
    readers = TwoReaders(4096, 0, (3,))
    readers.write(3, fork(1, 3))
    assert readers.each(3)[0].head == sample_bytes(36) == 48
    readers.write(3, b"")  # too short for anything: refused, and counted
    for one in readers.each(3):
        one.put(kind, body, size)
    events, _, _, more, _ = readers.drain(1000)
    assert (len(events), more) == (1, True)
    assert counters(readers.decoders[0]) == {"short_record": 1}
    assert readers.drain(1000) == f"corrupt perf buffer: CPU 3, {said}"


def test_a_sample_that_says_more_than_it_holds_is_cut() -> None:
    readers = TwoReaders(4096, 0)
    for one in readers.each(0):
        one.put(SAMPLE, b"\xff\xff\xff\xff" + fork(1)[:28])
        one.put(SAMPLE, b"")
    readers.drain(10)
    assert counters(readers.decoders[0]) == {"short_record": 2}


@pytest.mark.parametrize("make", IMPLEMENTATIONS)
def test_memory_of_another_shape_is_refused(make: Any) -> None:
    reader = make()
    for size, offset in ((4096 + 4096 + 8, 4096), (4096, 4096), (8192, 1024), (8192, 4100)):
        with pytest.raises(ValueError, match=r"memory does not hold|data_offset is not"):
            reader.add(0, mmap.mmap(-1, size), offset)
    with pytest.raises((BufferError, TypeError)):
        reader.add(0, bytes(8192))
    for cpu in (-1, 65536):
        with pytest.raises(ValueError, match="cpu is"):
            reader.add(cpu, mmap.mmap(-1, 8192))
    assert reader.pending == 0


@pytest.mark.parametrize("make", IMPLEMENTATIONS)
def test_closed_buffers_can_be_unmapped(make: Any) -> None:
    reader, simulated = make(), SimulatedPerfBuffer(4096)
    reader.add(0, simulated.memory)
    reader.close()
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.drain(decoders()[IMPLEMENTATIONS.index(make)], 1)
    with pytest.raises(ValueError, match="closed"):
        _ = reader.pending
    del simulated._head, simulated._tail
    simulated.memory.close()


def test_the_configured_size_holds_for_all_cpus_together() -> None:
    for total, cpus_there, each in (
        (1 << 24, 1, 1 << 24),
        (1 << 24, 3, 1 << 22),
        (1 << 24, 64, 1 << 18),
        (1 << 22, 255, 1 << 14),
        (mmap.PAGESIZE, 2, mmap.PAGESIZE),  # a page is the least
    ):
        assert buffer_size(total, cpus_there) == each
        assert each * cpus_there <= max(total, mmap.PAGESIZE * cpus_there)
