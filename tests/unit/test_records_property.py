"""The compiled ring reader and its twin in plain Python give equal results, whatever comes."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from streamer.ring import _records, records_py
from tests.unit.ring import BUSY, DATA_OFFSET, DISCARD, Reserved, SimulatedRing, ring_step
from tests.unit.test_records import (
    CONSTANTS,
    HEADER,
    LAYOUTS,
    PREFIX,
    SAMPLE_SIZE,
    counters,
    drained_by_cpu,
    fork,
    header,
    sample,
)

U64 = (1 << 64) - 1

# ------------------------------------------------------------------ records

cpus = st.sampled_from([0, 1, 7, 65535])
u64s = st.one_of(st.integers(0, 300), st.integers(0, U64))
headers = st.fixed_dictionaries(
    {"seq": st.one_of(st.integers(0, 8), u64s), "cpu": cpus},
    optional={
        "boot_ns": u64s,
        "skipped": st.one_of(st.just(0), st.integers(0, 255)),
        "cut": st.one_of(st.integers(0, 7), st.integers(0, 255)),
        "flags": st.integers(0, 255),
    },
)
# Text of which up to four bytes are gone at each end: characters that were cut in two.
cut_texts = st.builds(
    lambda text, start, end: text.encode()[start : len(text.encode()) - end],
    st.text(st.sampled_from("aä☃😀"), max_size=8),
    st.integers(0, 4),
    st.integers(0, 4),
)
texts = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=20).map(str.encode),
    cut_texts,
    st.integers(0, 700).map(lambda size: b"p" * size),
)
samples = st.fixed_dictionaries(
    {},
    optional={
        "a_u8": st.integers(0, 255),
        "a_bool": st.integers(0, 255),
        "a_u16": st.integers(0, 65535),
        "a_u32": st.integers(0, (1 << 32) - 1),
        "a_u64": u64s,
        "a_s32": st.integers(-(1 << 31), (1 << 31) - 1),
        "a_s64": st.integers(-(1 << 63), (1 << 63) - 1),
        "a_ns": u64s,
        "comm": st.binary(max_size=16),
        "version": st.sampled_from([0, 4, 6, 255]),
        "address": st.binary(min_size=16, max_size=16),
        "name": st.integers(0, 255),
        "started": u64s,
        "first": texts,
        "argv": st.lists(texts, max_size=4).map(b"\0".join),
        "last": texts,
        "size": st.integers(0, (1 << 32) - 1),
    },
)


@st.composite
def mutated(draw: st.DrawFn, base: st.SearchStrategy[bytes]) -> bytes:
    """A record of which some bytes were changed, and the end perhaps cut off or drawn out."""
    record = bytearray(draw(base))
    places = st.tuples(st.integers(0, len(record) - 1), st.integers(0, 255))
    for at, value in draw(st.lists(places, max_size=6)):
        record[at] = value
    cut = draw(st.one_of(st.just(len(record)), st.integers(0, len(record))))
    return bytes(record[:cut]) + draw(st.sampled_from([b"", b"", bytes(9), b"\xff" * 100]))


sound = st.one_of(
    st.builds(lambda head, body: sample(**head, **body), headers, samples),
    st.builds(lambda head: fork(**head), headers),
)
anything = st.one_of(
    sound,
    mutated(sound),
    st.binary(max_size=200),
    st.builds(lambda head, kind: header(kind, 32, **head), headers, st.integers(0, 65535)),
)
clocks = st.one_of(st.just(0), st.integers(-(1 << 63), (1 << 63) - 1))


def decoders() -> tuple[Any, Any]:
    compiled = _records.Decoder(HEADER, LAYOUTS, CONSTANTS, PREFIX)
    return compiled, records_py.Decoder(HEADER, LAYOUTS, CONSTANTS, PREFIX)


@given(st.lists(anything, max_size=8), clocks)
def test_records_decode_equally(records: list[bytes], clock: int) -> None:
    compiled, twin = decoders()
    compiled.clock_offset_ns = twin.clock_offset_ns = clock
    for record in records * 2:  # out of the caches, the second time
        assert compiled.decode(record) == twin.decode(record)
    assert counters(compiled) == counters(twin)


@given(
    st.text(st.sampled_from("/aä☃😀"), max_size=12),
    st.integers(0, 3),
    st.sampled_from(["first", "argv", "last"]),
    st.data(),
)
def test_a_cut_within_a_character_loses_that_character_alone(
    text: str, most: int, field: str, data: st.DataObject
) -> None:
    """Against Python's own characters: those of which every byte is there."""
    raw = text.encode()
    end = data.draw(st.integers(0, len(raw)))
    start = 0 if field == "argv" else data.draw(st.integers(0, min(most, end)))
    places = [len(text[:i].encode()) for i in range(len(text) + 1)]
    whole = [
        char
        for char, first, last in zip(text, places, places[1:], strict=False)
        if start <= first and last <= end
    ]
    bit = {"first": 1, "argv": 2, "last": 4}[field]
    for decoder in decoders():
        event = decoder.decode(sample(**{field: raw[start:end]}, cut=bit))
        found = getattr(event, "line" if field == "argv" else field)
        assert (found, event.invalid_utf8) == ("".join(whole), False)
        assert event.truncated == (field,)


@given(texts, st.lists(texts, max_size=4).map(b"\0".join), texts)
def test_a_record_cut_anywhere_is_short(first: bytes, argv: bytes, last: bytes) -> None:
    record = sample(first=first, argv=argv, last=last)
    compiled, twin = decoders()
    for length in {*range(34), *range(SAMPLE_SIZE, len(record), 7), len(record) - 1}:
        if length < len(record):
            assert compiled.decode(record[:length]) is None
            assert twin.decode(record[:length]) is None
    assert counters(compiled) == counters(twin)
    assert compiled.decode(record) == twin.decode(record) is not None


# ------------------------------------------------------------------ rings


class TwoReaders:
    """One producer, and both consumers, each with its own page."""

    def __init__(self, size: int, start: int) -> None:
        self.simulated = SimulatedRing(size, start)
        other = bytearray(self.simulated.consumer[:8])
        self.pages = (self.simulated.consumer, other)
        self.decoders = decoders()
        self.rings: tuple[Any, Any] = (
            _records.Ring(self.pages[0], self.simulated.producer, DATA_OFFSET),
            records_py.Ring(self.pages[1], self.simulated.producer, DATA_OFFSET),
        )
        self.busy: list[tuple[Reserved, bytes]] = []
        self.events: list[Any] = []

    def write(self, record: bytes, bits: int) -> bool:
        reserved = self.simulated.reserve(len(record))
        if reserved is None:
            return False
        self.simulated.submit(reserved, record, bits)
        if bits & BUSY:
            self.busy.append((reserved, record))
        return True

    def finish(self, which: int, bits: int) -> None:
        if self.busy:
            reserved, record = self.busy.pop(which % len(self.busy))
            self.simulated.submit(reserved, record, bits)

    def drain(self, limit: int) -> None:
        results = [
            drain(ring, decoder, limit)
            for ring, decoder in zip(self.rings, self.decoders, strict=True)
        ]
        assert results[0] == results[1]
        if not isinstance(results[0], str):
            self.events += results[0][0]
        self.check()

    def check(self) -> None:
        assert self.pages[0][:8] == self.pages[1][:8]
        compiled, twin = map(state, self.rings)
        assert compiled == twin
        assert counters(self.decoders[0]) == counters(self.decoders[1])
        assert drained_by_cpu(self.decoders[0]) == drained_by_cpu(self.decoders[1])


def drain(ring: Any, decoder: Any, limit: int) -> Any:
    """What a drain gives, or the message of the error it raises."""
    try:
        return tuple(ring.drain(decoder, limit))
    except ValueError as error:
        return str(error)


def state(ring: Any) -> tuple[int, ...]:
    seqs = (ring.next_seq(cpu) for cpu in (0, 1, 7, 8, 65535))
    return (ring.pending, ring.records, ring.discarded, *seqs)


starts = st.one_of(
    st.sampled_from([0, (1 << 32) - 128, (1 << 64) - 128, (1 << 64) - 8]),
    st.integers(0, U64 >> 3).map(lambda eighth: eighth << 3),
)
limits = st.one_of(st.integers(1, 6), st.just(1000))
final_bits = st.sampled_from([0, 0, DISCARD])
steps = st.one_of(
    st.tuples(st.just("write"), anything, st.sampled_from([0, 0, 0, DISCARD, BUSY])),
    st.tuples(st.just("finish"), st.integers(0, 5), final_bits),
    st.tuples(st.just("drain"), limits),
)


def play(readers: TwoReaders, step: Any) -> None:
    match step:
        case ("write", record, bits):
            while not readers.write(record, bits):
                before = readers.simulated.consumed
                readers.finish(0, 0)
                readers.drain(2)
                if readers.simulated.free < ring_step(len(record)):
                    assert readers.simulated.consumed != before or readers.busy
        case ("finish", which, bits):
            readers.finish(which, bits)
        case ("drain", limit):
            readers.drain(limit)


@given(st.sampled_from([2048, 4096]), starts, st.lists(steps, max_size=40))
def test_rings_drain_equally(size: int, start: int, todo: list[Any]) -> None:
    readers = TwoReaders(size, start)
    for step in todo:
        if step[0] != "write" or ring_step(len(step[1])) <= size:
            play(readers, step)
    while readers.busy:
        readers.finish(0, 0)
    while readers.rings[0].pending:
        readers.drain(3)
    assert readers.simulated.consumed == readers.simulated.produced


@given(starts, st.lists(st.integers(0, 2048 - 8 - SAMPLE_SIZE), min_size=1, max_size=30), limits)
def test_all_records_come_in_order_up_to_the_largest(
    start: int, sizes: list[int], limit: int
) -> None:
    readers = TwoReaders(2048, start)
    for seq, size in enumerate(sizes, 1):
        play(readers, ("write", sample(seq=seq, first=b"x" * size), 0))
    while readers.rings[0].pending:
        readers.drain(limit)
    assert [len(event.first) for event in readers.events] == sizes
    assert [event.seq for event in readers.events] == list(range(1, len(sizes) + 1))


@given(starts, st.lists(st.tuples(cpus, st.integers(0, 12), st.integers(0, 2)), max_size=40))
def test_every_number_is_expected_or_told(start: int, heads: list[tuple[int, int, int]]) -> None:
    readers = TwoReaders(4096, start)
    for cpu, seq, skipped in heads:
        assert readers.write(fork(seq, cpu, skipped=skipped), 0)
    results = [
        ring.drain(decoder, 1000)
        for ring, decoder in zip(readers.rings, readers.decoders, strict=True)
    ]
    assert tuple(results[0]) == tuple(results[1])
    gaps = list(results[0].gaps)
    expected = dict.fromkeys((cpu for cpu, _, _ in heads), 1)
    for cpu, seq, skipped in heads:
        if seq > expected[cpu]:
            assert gaps.pop(0) == ("missing", cpu, expected[cpu], seq - 1)
        if seq < expected[cpu]:
            assert gaps.pop(0) == ("late", cpu, seq, seq)
        if skipped:
            assert gaps.pop(0) == ("skipped", cpu, skipped, skipped)
        expected[cpu] = max(expected[cpu], seq + 1)
    assert gaps == []


@given(
    starts,
    st.lists(sound, max_size=6),
    st.lists(st.tuples(st.integers(0, 511), st.integers(0, (1 << 32) - 1)), max_size=4),
    st.one_of(st.none(), u64s),
    limits,
)
def test_a_broken_ring_is_refused_equally(
    start: int,
    records: list[bytes],
    words: list[tuple[int, int]],
    produced: int | None,
    limit: int,
) -> None:
    readers = TwoReaders(4096, start)
    for record in records:
        readers.write(record, 0)
    for eighth, word in words:
        readers.simulated.set_word(start + 8 * eighth, word)
    if produced is not None:
        readers.simulated.produced = produced
    for _ in range(4):
        readers.drain(limit)
