"""Coarse times: what stays true of them, and what an observer can no longer tell."""

from __future__ import annotations

import os
import random
import stat
import struct
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamer.agent.timing_key import NAME, kept_secret, timing_of
from streamer.config.settings import Settings, TimingSection
from streamer.events.envelope import Envelope
from streamer.events.kinds import HEADER, KINDS, RECORDS
from streamer.events.layout import FieldLayout, RecordLayout, with_time
from streamer.events.stream import StreamLoss, StreamRecord
from streamer.events.summaries import SUMMARIES, ProfileSample
from streamer.events.timing import Timing, key_of_boot, siphash
from streamer.ring import _records, records_py
from streamer.summaries.syscalls import Counted, coarse, percentile
from tests.golden.cases import CLOCK_OFFSET_NS, ID_PREFIX, Case, constants, load, published
from tests.unit.test_records import HEADER as BASE
from tests.unit.test_records import header

READERS = [pytest.param(_records, id="compiled"), pytest.param(records_py, id="twin")]
KEY = bytes(range(16))
U64 = (1 << 64) - 1
MS = 1_000_000
EPOCH_OPS = {"time", "boottime"}

times = st.one_of(st.integers(0, 1 << 20), st.integers(0, 1 << 62))
timings = st.builds(
    Timing,
    st.one_of(st.integers(2, 5), st.integers(2, 10**9)),
    st.binary(min_size=16, max_size=16),
    st.booleans(),
)


def test_the_hash_is_siphash() -> None:
    """The vectors of the reference implementation that are whole words long."""
    message = struct.unpack("<2Q", bytes(range(16)))
    assert siphash(KEY) == 0x726FDB47DD0E0E31
    assert siphash(KEY, message[0]) == 0x93F5F5799A932462
    assert siphash(KEY, *message) == 0x3F2ACC7F57C29BDB


# ---------------------------------------------------------------- what stays true


@given(timings, times, times)
def test_time_never_goes_backwards(timing: Timing, one: int, other: int) -> None:
    first, second = sorted((one, other))
    assert timing.moment(first) <= timing.moment(second)
    for ns in (one, other):
        assert timing.moment(ns) % timing.resolution_ns == 0
        assert (
            -timing.resolution_ns < timing.moment(ns) - ns <= timing.resolution_ns * timing.jitter
        )


@given(timings, times, times)
def test_nothing_happens_before_its_process_started(timing: Timing, one: int, other: int) -> None:
    """From the second multiple since boot on; before that no agent runs."""
    start, later = sorted((one + 2 * timing.resolution_ns, other + 2 * timing.resolution_ns))
    assert 0 < timing.start(start) < timing.moment(later)
    assert timing.start(start) > start - 2 * timing.resolution_ns
    assert timing.start(0) == 0


def test_processes_that_started_at_almost_the_same_time_stay_two() -> None:
    timing = Timing(1000 * MS, KEY)
    starts = [timing.start(10**12 + 1000 * n) for n in range(1000)]
    assert len(set(starts)) == len(starts)
    assert {start // timing.resolution_ns for start in starts} <= {998, 999, 1000}


@given(timings, times, times, st.integers(0, U64), st.integers(0, (1 << 32) - 1))
def test_durations_are_multiples_in_their_order(
    timing: Timing, one: int, other: int, cgroup: int, uid: int
) -> None:
    short, long = sorted((one, other))
    found = [timing.duration(ns, cgroup, uid) for ns in (short, long)]
    assert found == sorted(found)
    for ns, shown in zip((short, long), found, strict=True):
        assert shown % timing.resolution_ns == 0
        assert (shown == 0) == (ns == 0)
        assert abs(shown - ns) <= timing.resolution_ns


def test_half_of_what_is_half_way_rounds_up() -> None:
    timing = Timing(MS, KEY)
    up = [timing.moment(n * MS + MS // 2) > n * MS for n in range(2000)]
    assert 850 < sum(up) < 1150
    up = [timing.duration(n * MS + MS // 4) > n * MS for n in range(1, 2001)]
    assert 380 < sum(up) < 620


def test_nobody_else_finds_out_where_a_users_durations_round() -> None:
    timing = Timing(MS, KEY)
    half = [n * MS + MS // 2 for n in range(1, 400)]
    mine, others, again = (
        [timing.duration(ns, cgroup, uid) for ns in half]
        for cgroup, uid in ((1, 1000), (1, 1001), (1, 1000))
    )
    assert mine == again
    assert 100 < sum(a != b for a, b in zip(mine, others, strict=True)) < 300


# ---------------------------------------------------------------- both readers


class Timed(msgspec.Struct, tag_field="event", tag="test.timed", gc=False):
    time_ns: int
    boot_ns: int
    seq: int
    time: str
    cgroup_id: int
    uid: int
    start_boot_ns: int
    start_time_ns: int
    took_ns: int


TIMED = RecordLayout(
    "test.timed",
    Timed,
    64,
    64,
    (
        FieldLayout("time_ns", "time", 0, None),
        FieldLayout("boot_ns", "moment", 0, None),
        FieldLayout("seq", "serial", 8, None),
        FieldLayout("time", "rfc3339", 0, None),
        FieldLayout("cgroup_id", "u64", 32, None),
        FieldLayout("uid", "u32", 40, None),
        FieldLayout("start_boot_ns", "start", 48, None),
        FieldLayout("start_time_ns", "boottime", 48, None),
        FieldLayout("took_ns", "ns", 56, None),
    ),
)


class Bare(msgspec.Struct, tag_field="event", tag="test.bare", gc=False):
    uid: int
    took_ns: int


BARE = RecordLayout(
    "test.bare",
    Bare,
    64,
    64,
    (FieldLayout("uid", "u32", 40, None), FieldLayout("took_ns", "ns", 56, None)),
)
LAYOUTS = {1: TIMED, 2: BARE}
records = st.builds(
    lambda kind, seq, boot, cgroup, uid, start, took: (
        header(kind, 64, seq=seq, boot_ns=boot) + struct.pack("<QI4xQQ", cgroup, uid, start, took)
    ),
    st.sampled_from([1, 2]),
    st.integers(1, U64),
    *[st.one_of(st.integers(0, 1000), st.integers(0, U64))] * 2,
    st.integers(0, (1 << 32) - 1),
    *[st.one_of(st.integers(0, 1000), st.integers(0, U64))] * 2,
)


@given(st.one_of(st.none(), timings), st.lists(records, max_size=5), st.integers(0, 1 << 60))
def test_both_readers_make_the_same(timing: Timing | None, given: list[bytes], clock: int) -> None:
    """Also where a record holds what no clock shows: times are taken modulo 2^64."""
    compiled = _records.Decoder(BASE, LAYOUTS, {}, "p", timing)
    twin = records_py.Decoder(BASE, LAYOUTS, {}, "p", timing)
    compiled.clock_offset_ns = twin.clock_offset_ns = clock
    for record in given:
        event = compiled.decode(record)
        assert event == twin.decode(record)
        boot, seq = struct.unpack_from("<QQ", record)
        cgroup, uid, start, took = struct.unpack_from("<QI4xQQ", record, 32)
        if isinstance(event, Timed):
            assert event.seq == seq
            assert (event.time_ns - event.boot_ns - clock) & U64 == 0
            assert (event.start_time_ns - event.start_boot_ns - clock) & U64 == 0
        else:
            cgroup = uid = 0  # nobody's, as long as both are not known
        if timing is not None:
            assert event.took_ns == timing.duration(took, cgroup, uid)
        if timing is not None and isinstance(event, Timed):
            assert event.boot_ns == timing.moment(boot)
            assert event.start_boot_ns == timing.start(start) & U64


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "timing",
    [Timing(1, KEY), Timing(0, KEY), Timing(1 << 63, KEY), Timing(10, KEY[:15]), Timing(10, b"")],
)
def test_a_timing_that_makes_no_sense_is_refused(reader: ModuleType, timing: Timing) -> None:
    with pytest.raises(ValueError, match="timing: "):
        reader.Decoder(BASE, LAYOUTS, {}, "p", timing)


# ---------------------------------------------------------------- what is published

TIME_OPS = {"ns", "moment", "start", "time", "boottime"}
# Of the agent's own work, by its own clock.
OWN_TIMES = {"time_ns", "boot_ns", "period_ns"}
STARTS = {"start_boot_ns"}  # by Envelope.record
COARSE_SUMMARIES = {
    "syscall.latency": {
        "duration_sum_ns", "p50_ns", "p90_ns", "p99_ns", "max_ns", "duration_total_ns",
    },
}  # fmt: skip
"""Times in summaries, which their own code makes coarse."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_time_is_made_coarse(kind: str) -> None:
    """A field that is added later, too: its name ends in `_ns` and its AS says what it is."""
    (layout,) = (one for one in RECORDS.values() if one.kind == kind)
    named = {field.name for field in layout.fields if field.name.endswith("_ns")}
    assert named == {field.name for field in layout.fields if field.op in TIME_OPS}
    for field in layout.fields:
        if field.op in TIME_OPS:
            start = "start_" in field.name
            assert (field.op in ("start", "boottime")) == start
            assert (field.op == "moment") == (field.name.endswith("boot_ns") and not start)


@pytest.mark.parametrize("kind", SUMMARIES)
def test_every_time_of_a_summary_is_known(kind: str) -> None:
    named = {name for name in SUMMARIES[kind].__struct_fields__ if name.endswith("_ns")}
    assert named - OWN_TIMES - STARTS == COARSE_SUMMARIES.get(kind, set())


def decoded(reader: ModuleType, case: Case, timing: Timing | None) -> dict[str, Any]:
    prefix = f"{ID_PREFIX}-{case.ring}"
    made = reader.Decoder(HEADER, with_time(RECORDS), constants(case.ring), prefix, timing)
    made.clock_offset_ns = CLOCK_OFFSET_NS
    return published(made.decode(case.record))


@pytest.mark.parametrize("reader", READERS)
def test_nothing_but_times_changes(reader: ModuleType) -> None:
    """Ids, numbers and order stay; the same processes stay the same, and others are others."""
    timing = Timing(10 * MS, KEY)
    layouts = {layout.kind: layout for layout in RECORDS.values()}
    who: dict[tuple[int, int], tuple[int, int]] = {}
    for case in load():
        exact, shown = decoded(reader, case, None), decoded(reader, case, timing)
        ops = {field.name: field.op for field in layouts[exact["event"]].fields}
        times = {name for name, op in ops.items() if op in TIME_OPS} | {"time"}
        assert exact.keys() == shown.keys()
        assert {name for name in exact if exact[name] != shown[name]} <= times
        for name in times - {"time"}:
            value = shown[name] - CLOCK_OFFSET_NS * (ops[name] in EPOCH_OPS)
            assert ops[name] in ("start", "boottime") or value % timing.resolution_ns == 0
        for pid, start in (("pid", "start_boot_ns"), ("child_pid", "child_start_boot_ns")):
            if start in exact:
                known = who.setdefault((exact[pid], exact[start]), (shown[pid], shown[start]))
                assert known == (shown[pid], shown[start])
                assert known[1] <= shown["boot_ns"]
    assert len(set(who.values())) == len(who) > 3


def test_the_streams_own_records_are_on_the_same_grid() -> None:
    timing = Timing(1000 * MS, KEY)
    envelope = Envelope("here", timing=timing)
    record = envelope.record(StreamLoss, stage="sink", count=1, kinds={})
    assert record.boot_ns % timing.resolution_ns == 0
    start = timing.resolution_ns * 7 + 1
    own = StreamRecord.__struct_fields__
    fields = dict.fromkeys(set(ProfileSample.__struct_fields__) - {*own, "start_boot_ns"}, 0)
    sample = envelope.record(ProfileSample, **fields, start_boot_ns=start)
    assert sample.start_boot_ns == timing.start(start)


# ---------------------------------------------------------------- summaries


def counted(*ns: int) -> Counted:
    buckets = [0] * 64
    for one in ns:
        buckets[max(one.bit_length() - 1, 0)] += 1
    while buckets and not buckets[-1]:
        buckets.pop()
    return Counted(len(ns), 0, sum(ns), 0, max(ns, default=0), tuple(buckets))


def test_what_is_short_is_alike_in_a_summary() -> None:
    """However many calls there were: their sum is that of as many of one resolution."""
    timing = Timing(10 * MS, KEY)
    for calls in (1, 32, 1000):
        fast, slow = counted(*[1000] * calls), counted(*[9 * MS] * calls)
        assert coarse(fast, timing, 0) == coarse(slow, timing, 0)
        assert coarse(fast, timing, 0).total_ns == calls * timing.resolution_ns


@given(timings, st.lists(st.integers(0, 1 << 40), max_size=30), st.integers(0, 100))
@example(Timing(2, bytes(16), False), [0, 0, 20562176], 0)
def test_a_coarse_summary_agrees_with_itself(timing: Timing, took: list[int], cgroup: int) -> None:
    exact, shown = counted(*took), coarse(counted(*took), timing, cgroup)
    assert (shown.calls, sum(shown.buckets)) == (exact.calls, sum(exact.buckets))
    assert shown.max_ns % timing.resolution_ns == shown.total_ns % timing.resolution_ns == 0
    assert shown.total_ns <= shown.calls * shown.max_ns
    assert shown.max_ns <= shown.total_ns
    found = [percentile(shown, share) for share in (0.5, 0.9, 0.99)]
    assert found == sorted(found)
    assert all(one == shown.max_ns or one.bit_count() == one.bit_length() for one in found)
    assert not any(shown.buckets[: timing.least_bit])


# ---------------------------------------------------------------- the key


def test_the_key_is_kept_and_is_roots_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / NAME
    secret = kept_secret(str(path))
    assert len(set(secret)) > 8
    assert kept_secret(str(path)) == secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert kept_secret(str(tmp_path / "other" / NAME)) != secret


def test_a_key_that_others_can_have_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    readable, linked, link, pipe = (tmp_path / name for name in ("a", "b", "c", "d"))
    readable.write_bytes(bytes(32))
    readable.chmod(0o644)
    linked.write_bytes(bytes(32))
    linked.chmod(0o600)
    link.symlink_to(linked)
    os.mkfifo(pipe, 0o600)
    os.link(linked, tmp_path / "e")
    for path in (readable, linked, link, pipe):
        assert kept_secret(str(path)) == b""
    assert caplog.text.count("have other start times in the next run") == 4


def test_a_key_that_was_written_in_part_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(b"short")
    path.chmod(0o600)
    secret = kept_secret(str(path))
    assert path.read_bytes() == secret
    assert len(secret) == 32


def test_the_next_run_rounds_alike_and_the_next_boot_does_not(tmp_path: Path) -> None:
    settings = Settings(
        state_file=str(tmp_path / "run.json"), timing=TimingSection(resolution_us=1000)
    )
    first, second = timing_of(settings), timing_of(settings)
    assert first == second
    assert first is not None
    assert first.resolution_ns == MS
    assert timing_of(Settings()) is None
    assert key_of_boot(b"secret", "one") != key_of_boot(b"secret", "two")
    nowhere = Settings(state_file="", timing=TimingSection(resolution_us=1000))
    assert timing_of(nowhere) != timing_of(nowhere)


# ---------------------------------------------------------------- attacks


SHORT, LONG = 2 * MS, 4 * MS


def aligned_guess(timing: Timing, secret: list[bool], noise: random.Random, aim: int) -> list[bool]:
    """Of each bit: the observer makes it end just before `aim`, or just after if it is a 1.

    He knows when he asks, and sees the time of the answer, three times: rounded up, or not.
    """
    edge = timing.resolution_ns
    ask = aim - (SHORT + LONG) // 2
    guess = []
    for index, bit in enumerate(secret):
        late = 0
        for again in range(3):
            begin = (1000 + 3 * index + again) * edge
            end = begin + ask + (LONG if bit else SHORT) + noise.randrange(MS // 2)
            late += timing.moment(end) > begin
        guess.append(late > 1)
    return guess


@pytest.mark.parametrize(
    ("jitter", "aim", "low", "high"),
    [(False, 100 * MS, 1.0, 1.0), (True, 100 * MS, 0.45, 0.56), (True, 50 * MS, 0.45, 0.56)],
)
def test_who_chooses_the_moment_learns_nothing_with_jitter(
    jitter: bool, aim: int, low: float, high: float
) -> None:
    """Rounding alone is a ruler to whoever can move what he measures along it."""
    source = random.Random(7)
    secret = [source.random() < 0.5 for _ in range(4000)]
    guess = aligned_guess(Timing(100 * MS, KEY, jitter), secret, source, aim)
    right = fmean(a == b for a, b in zip(guess, secret, strict=True))
    assert low <= right <= high


def test_seeing_it_often_tells_no_more() -> None:
    """Of ten thousand the mean is that of one, and what is shorter is all alike."""
    timing = Timing(100 * MS, KEY)
    for ns in (SHORT, LONG, 199 * MS, 250 * MS):
        assert {timing.duration(ns, 1, 1000) for _ in range(10_000)} == {
            timing.duration(ns, 1, 1000)
        }
    assert timing.duration(SHORT) == timing.duration(LONG) == timing.resolution_ns
