"""How long system calls take, against what the test itself did, by every way to observe them."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest

from streamer.config.settings import Filters, Kernel, Settings
from streamer.events.calls import NUMBERS
from streamer.events.envelope import Envelope
from streamer.events.summaries import SyscallLatency
from streamer.kernel import objects, state
from streamer.kernel.loader import OBJECTS
from streamer.kernel.system_calls import numbers_of
from streamer.kernel.targets import targets_of
from streamer.privilege.client import RemoteLoader
from streamer.privilege.split import headers_of, start_helper
from streamer.summaries.period import Summaries
from tests.conftest import Require
from tests.kernel.agent import ROOT, Agent, kind_of
from tests.kernel.live import Live
from tests.kernel.pace import repetitions, seconds
from tests.kernel.roles import Role
from tests.kernel.scope import Scope, checkpoint
from tests.kernel.system import BTF, kernel_is, system_call
from tests.kernel.witness import bpftrace

pytestmark = pytest.mark.kernel

SENSOR = "kprobe_syscall_latency"
KINDS = ("syscall.latency", "syscall.slow")
NUMBER = numbers_of(platform.machine())
EBADF, EAGAIN = 9, 11
SECOND = 1_000_000_000
WAYS = {"functions": "fexit", "probes": "kretprobe", "tracepoints": "tp", "all": "raw_tp"}


class Timespec(ctypes.Structure):
    """`struct timespec`."""

    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


def call(name: str, *arguments: Any) -> tuple[int, int, int]:
    """Make a system call by its name: result, error number and the nanoseconds at most."""
    return system_call(NUMBER[name], *arguments)


def nanosleep(ns: int) -> int:
    """Sleep by the system call of that name. How long it took at most."""
    _, _, most_ns = call("nanosleep", ctypes.byref(Timespec(*divmod(ns, SECOND))), None)
    return most_ns


class Timing(Live):
    """The sensor, and the records that are made of what it counts."""

    def __init__(
        self,
        scope: Scope | None,
        *names: str,
        settings: Settings | None = None,
        directory: str = OBJECTS,
        **kernel: Any,
    ) -> None:
        given = settings or Settings()
        wanted = msgspec.structs.replace(given, kernel=Kernel(syscalls=names, **kernel))
        super().__init__(scope, KINDS, wanted, directory)
        self._summaries = Summaries(self.state, Envelope(), KINDS)

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    @property
    def way(self) -> str:
        """How returns are observed."""
        (found,) = (
            one.way
            for one in self.state.statuses
            if one.hook == "syscall_exit" and one.status == "attached"
        )
        return found

    @property
    def sources(self) -> list[Any]:
        """What makes the records."""
        return list(self._summaries._sources)

    def collect(self) -> list[SyscallLatency]:
        """The records of what came since the last time."""
        return [one for one in self._summaries.collect() if isinstance(one, SyscallLatency)]

    def of_all(self) -> dict[str, SyscallLatency]:
        """Those by call alone."""
        return {one.syscall: one for one in self.collect() if not one.cgroup_id}

    def slow(self) -> list[Any]:
        """The slow calls so far."""
        self.read()
        return [event for event in self.events if kind_of(event) == "syscall.slow"]


def kind_of_way(way: str) -> str:
    """Of WAYS, whatever the function is."""
    return way.replace("/", " ").split()[0]


# These two are what some kernels lack, so that others have to show them.
ON_OTHER_KERNELS = ("functions", "probes")


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.every_kernel] if name in ON_OTHER_KERNELS else [])
        for name in WAYS
    ]
)
def way(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, require_kernel: Require
) -> str:
    """A way to observe calls that are named, the better ones being taken away."""
    name: str = request.param
    better = list(WAYS).index(name)
    left = objects.SENSORS[SENSOR]
    for hook in ("syscall_exit", "syscall_enter"):
        ways = [one for one in left.programs if one.hook == hook]
        programs = tuple(one for one in left.programs if one not in ways[:better])
        left = left._replace(programs=programs)
    monkeypatch.setitem(objects.SENSORS, SENSOR, left)
    with Timing(None, "getppid") as timing:
        found = timing.way
    require_kernel(kind_of_way(found) == WAYS[name], f"this kernel observes calls by {found}")
    return name


# ---------------------------------------------------------------- counts and durations


def make_calls(count: int) -> dict[str, Any]:
    """Calls of known number, errors and durations, and what the clock said of each."""
    for _ in range(count):
        call("getppid")
    errors = [call("sched_rr_get_interval", -1, None)[1] for _ in range(37)]
    asked = [ms * 1_000_000 for ms in (1, 3, 10, 10, 30, 60)]
    return {"errors": errors, "asked": asked, "took": [nanosleep(ns) for ns in asked]}


def spread(buckets: tuple[int, ...]) -> list[int]:
    """The bucket of each call, in order."""
    return [bit for bit, count in enumerate(buckets) for _ in range(count)]


def check_durations(record: SyscallLatency, asked: list[int], took: list[int]) -> None:
    """Each is between what was asked for and what the clock said around it."""
    low, high = sorted(asked), sorted(took)
    for bit, least, most in zip(spread(record.buckets), low, high, strict=True):
        assert least.bit_length() - 1 <= bit <= most.bit_length() - 1
    assert sum(asked) <= record.duration_sum_ns <= sum(took)
    assert low[-1] <= record.max_ns <= high[-1]
    for share, found in ((0.5, record.p50_ns), (0.9, record.p90_ns), (0.99, record.p99_ns)):
        rank = -int(-share * len(low) // 1) - 1
        assert low[rank] <= found <= 2 * high[rank]
        assert found <= record.max_ns


def test_counts_and_durations(scope: Scope, way: str) -> None:
    count = repetitions(20_000, 2_000)
    with Timing(scope, "getppid", "nanosleep", "sched_rr_get_interval") as timing:
        did = scope.act(make_calls, count)
        found = timing.of_all()
        assert timing.collect() == []
        timing.check()
    assert found.keys() == {"getppid", "nanosleep", "sched_rr_get_interval"}
    plain, failing, sleeping = (
        found[name] for name in ("getppid", "sched_rr_get_interval", "nanosleep")
    )
    assert (plain.count, plain.errors, plain.count_total) == (count, 0, count)
    assert sum(plain.buckets) == count
    assert plain.p50_ns <= plain.p90_ns <= plain.p99_ns <= plain.max_ns <= plain.duration_sum_ns
    assert len(did["errors"]) == failing.count == failing.errors == failing.errors_total
    assert (sleeping.count, sleeping.errors) == (len(did["asked"]), 0)
    check_durations(sleeping, did["asked"], did["took"])
    assert {one.unreturned for one in found.values()} == {0}
    assert all(one.number == NUMBER[name] for name, one in found.items())


def repeat(name: str, count: int) -> None:
    for _ in range(count):
        call(name)


def sleep_once(ns: int) -> None:
    nanosleep(ns)


def test_periods(scope: Scope) -> None:
    """Each record is of its period, the longest call too; the totals go on."""
    with Timing(scope, "nanosleep") as timing:
        scope.act(sleep_once, SECOND)
        first = timing.of_all()["nanosleep"]
        scope.act(sleep_once, 2_000_000)
        second = timing.of_all()["nanosleep"]
        assert timing.of_all() == {}
        scope.act(sleep_once, 1_000_000)
        third = timing.of_all()["nanosleep"]
    assert first.max_ns >= SECOND > second.max_ns > 0
    assert SECOND > third.max_ns >= 1_000_000
    assert [one.count for one in (first, second, third)] == [1, 1, 1]
    assert [one.count_total for one in (first, second, third)] == [1, 2, 3]
    total = sum(one.duration_sum_ns for one in (first, second, third))
    assert third.duration_total_ns == total


def test_a_call_between_the_end_of_a_period_and_the_look(
    scope: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes no longest call away from the period before, which is far longer than a busy machine
    makes the others.
    """
    with Timing(scope, "nanosleep") as timing:
        (source,) = timing.sources
        begin = source._count_in

        def begin_and_sleep(period: int) -> None:
            begin(period)
            scope.act(sleep_once, 1_000_000)

        scope.act(sleep_once, 1_000_000_000)
        monkeypatch.setattr(source, "_count_in", begin_and_sleep)
        first = timing.of_all()["nanosleep"]
        monkeypatch.setattr(source, "_count_in", begin)
        scope.act(sleep_once, 2_000_000)
        second = timing.of_all()["nanosleep"]
    assert (first.count, second.count) == (2, 1)
    assert first.max_ns >= 1_000_000_000 > second.max_ns >= 2_000_000


def sleep_in_threads(threads: int, ns: int) -> None:
    """All at once; then each makes one more call, which ends the one before for the programs."""
    started = threading.Barrier(threads)

    def work() -> None:
        started.wait()
        nanosleep(ns)
        call("getppid")

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()


def test_calls_that_wait_at_once(scope: Scope, way: str) -> None:
    """kretprobes follow a bounded number at a time: what they miss is counted, and nothing else.

    From 7.0 on the kernel preempts programs at functions and tracepoints, and leaves out, and
    counts, for others what another task was preempted in.
    """
    at_entry = ("fentry", "kprobe", "tracepoint_enter", "enter")
    threads = 64
    with Timing(scope, "nanosleep", "getppid") as timing:
        scope.act(sleep_in_threads, threads, round(seconds(0.3) * SECOND))
        found = timing.of_all()
        left_out = timing.state.missed()
    sleeping = found["nanosleep"]
    # Some may have been of other calls.
    begun = threads - sum(left_out.get(f"on_call_{name}", 0) for name in at_entry)
    assert begun <= sleeping.count + sleeping.unreturned <= threads
    if way == "functions":
        assert sleeping.unreturned <= left_out.get("on_call_fexit", 0)
    elif way != "probes" and not kernel_is(7, 0):
        assert sleeping.unreturned == 0
    assert not left_out or kernel_is(7, 0)


HELPER = """
import sys
sys.path.append({root!r})
from streamer.kernel import objects
left = objects.SENSORS[{sensor!r}]
programs = tuple(one for one in left.programs if one.name in {names!r})
objects.SENSORS[{sensor!r}] = left._replace(programs=programs)
from streamer.privilege.helper import main
sys.exit(main(int(sys.argv[1])))
"""


def test_through_the_helper(scope: Scope, way: str, tmp_path: Path) -> None:
    """With the rights that it keeps, it attaches each way to several calls."""
    names = tuple(one.name for one in objects.SENSORS[SENSOR].programs)
    program = tmp_path / "helper.py"
    program.write_text(HELPER.format(root=str(ROOT), sensor=SENSOR, names=names))
    calls = ("getppid", "nanosleep", "umask", "sched_rr_get_interval")
    settings = Settings(
        filters=Filters(cgroups=(scope.id,)), kernel=Kernel(syscalls=calls, syscall_cgroups=64)
    )
    client = start_helper(str(program))
    client.set_up([], targets_of(settings.kernel), headers_of(settings))
    loaded = state.load(settings, KINDS, RemoteLoader(client, []))
    try:
        summaries = Summaries(loaded, Envelope(), KINDS)
        loaded.attach()
        ways = [one.way for one in loaded.statuses if one.status == "attached"]
        did = scope.act(make_calls, 100)
        records = summaries.collect()
        missed = loaded.missed()
        loaded.unload(SENSOR)
    finally:
        loaded.close()
    assert ways[0].replace("/", " ").split()[0] == WAYS[way]
    counts = {"getppid": 100, "nanosleep": len(did["asked"]), "sched_rr_get_interval": 37}
    for of in (0, scope.id):
        found = [one for one in records if isinstance(one, SyscallLatency) and one.cgroup_id == of]
        assert {one.syscall: one.count for one in found} == counts
    assert missed == {}


# ---------------------------------------------------------------- slow calls


def wait_for_pipe(ns: int) -> tuple[int, int, int]:
    """Read what comes late. The descriptor, and how long the call took at least and at most."""
    end, other = os.pipe()
    writer = threading.Timer(ns / SECOND, os.write, (other, b"late"))
    writer.start()
    result, _, most_ns = call("read", end, ctypes.create_string_buffer(16), 16)
    writer.join()
    assert result == 4
    return end, ns // 2, most_ns


def fail_slowly(ns: int) -> int:
    """Wait for a signal that does not come. How long it took at most."""
    signals = ctypes.c_ulong(1 << (signal.SIGUSR2 - 1))
    result, error, most_ns = call(
        "rt_sigtimedwait",
        ctypes.byref(signals),
        None,
        ctypes.byref(Timespec(*divmod(ns, SECOND))),
        8,
    )
    assert (result, error) == (-1, EAGAIN)
    return most_ns


def be_slow(ns: int) -> dict[str, Any]:
    for _ in range(10):
        nanosleep(1_000)
    return {"slept": nanosleep(ns), "read": wait_for_pipe(ns), "failed": fail_slowly(ns)}


def test_slow_calls(scope: Scope, way: str) -> None:
    """Each over the threshold, with who made it and what came of it, and no other."""
    ns = round(seconds(0.2) * SECOND)
    names = ("nanosleep", "read", "rt_sigtimedwait")
    with Timing(scope, *names, syscall_slow_ms=ns // 2_000_000) as timing:
        with scope.start(be_slow, ns) as actor:
            did = actor.result()
        Role("outside", sleep_once, ns).result()
        counts = timing.counts("syscall.slow")
        slept, read, failed = timing.slow()
        timing.check()
    end, least, most = did["read"]
    for event, name in ((slept, "nanosleep"), (read, "read"), (failed, "rt_sigtimedwait")):
        assert (event.syscall, event.number) == (name, NUMBER[name])
        assert (event.pid, event.tid, event.comm, event.uid) == (actor.pid, actor.pid, "actor", 0)
    assert (slept.errno, slept.ret, slept.arg0) == (0, 0, 0)
    assert ns <= slept.duration_ns <= did["slept"]
    assert (read.errno, read.ret, read.arg0) == (0, 4, end)
    assert least <= read.duration_ns <= most
    assert (failed.errno, failed.ret) == (EAGAIN, -1)
    assert ns <= failed.duration_ns <= did["failed"]
    assert counts.filtered >= 1  # the one outside, and whoever else sleeps on this machine


def fill_memory() -> None:
    """One mapping, whose pages are there when the call returns: that takes a while."""
    size = 256 << 20
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, size, flags=flags).close()


def test_addresses_are_not_told(scope: Scope) -> None:
    with Timing(scope, "mmap", syscall_slow_ms=1) as timing:
        scope.act(fill_memory)
        events = timing.slow()
    assert events
    assert {(event.syscall, event.ret, event.errno) for event in events} == {("mmap", 0, 0)}


def test_no_call_is_slow_without_a_threshold(scope: Scope) -> None:
    with Timing(scope, "nanosleep", syscall_slow_ms=0) as timing:
        scope.act(sleep_once, round(1.1 * SECOND))
        assert timing.slow() == []
        assert timing.of_all()["nanosleep"].count == 1


# ---------------------------------------------------------------- all calls


def make_odd_calls() -> None:
    repeat("getppid", 100)
    for number in (500, 500, 9999, 9999, 9999):
        system_call(number)
    nanosleep(200_000_000)
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    before = time.monotonic()
    assert call("clock_nanosleep", 1, 0, ctypes.byref(Timespec(30, 0)), None)[0] != 0
    assert time.monotonic() - before < 30


def end_in_every_way(program: str) -> None:
    """Children that exit, are killed in a call, and execute from a thread that is not the first."""
    for _ in range(5):
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
    child = os.fork()
    if not child:
        threading.Thread(target=os.execv, args=(program, [program])).start()
        time.sleep(60)
    assert os.waitpid(child, 0)[1] == 0
    child = os.fork()
    if not child:
        signal.pause()
    time.sleep(0.2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def slow_ones(timing: Timing) -> list[Any]:
    """Without the write by which the actor entered the cgroup: it waits for others that do."""
    return [one for one in timing.slow() if one.syscall != "write"]


def test_all_calls(scope: Scope) -> None:
    """Those without a name too; ones that are there to wait are slow only if they are named."""
    with Timing(scope, "*", syscall_slow_ms=100) as timing:
        assert timing.way == "raw_tp/sys_exit"
        scope.act(make_odd_calls)
        found = timing.of_all()
        assert slow_ones(timing) == []
    assert found["getppid"].count == 100
    assert found["nanosleep"].count == 1
    # It puts back what the interrupted call returned, which is no failure of its own.
    assert (found["rt_sigreturn"].count, found["rt_sigreturn"].errors) == (1, 0)
    assert (found["clock_nanosleep"].count, found["clock_nanosleep"].errors) == (1, 1)
    assert (found["syscall_500"].count, found["syscall_500"].errors) == (2, 2)
    other = found["syscall_other"]
    assert (other.count, other.errors, other.number) == (3, 3, 511)
    with Timing(scope, "*", "nanosleep", syscall_slow_ms=100) as timing:
        scope.act(make_odd_calls)
        (event,) = slow_ones(timing)
    assert event.syscall == "nanosleep"


def test_every_call_returns(scope: Scope) -> None:
    """Whatever ends a task, no call of it is waited for: an exec gives it another id, for one."""
    true = shutil.which("true")
    assert true is not None
    with Timing(scope, "*") as timing:
        scope.act(end_in_every_way, true)
        found = timing.of_all()
    assert found["execve"].count == 1
    assert {"exit", "exit_group"}.isdisjoint(found)
    assert {name: one.unreturned for name, one in found.items() if one.unreturned} == {}


def call_and_stay(count: int) -> None:
    """Children that make a rare call, and end when they may."""
    children = []
    go, let = os.pipe()
    done, tell = os.pipe()
    for _ in range(count):
        child = os.fork()
        if not child:
            call("sched_rr_get_interval", -1, None)
            os.write(tell, b".")
            os.close(let)
            os.read(go, 1)
            os._exit(0)
        children.append(child)
    for _ in range(count):
        os.read(done, 1)
    checkpoint()
    os.close(let)
    for child in children:
        os.waitpid(child, 0)


def test_tasks_that_end_leave_nothing(scope: Scope, tmp_path: Path) -> None:
    """Where they are kept in a table: without the kernel's own types."""
    copy = tmp_path / "vmlinux"
    shutil.copyfile(BTF, copy)
    with (
        Timing(scope, "sched_rr_get_interval", settings=Settings(btf=str(copy))) as timing,
        scope.start(call_and_stay, 20) as actor,
    ):
        actor.reached()
        assert len(timing.state.read("syscall_tasks")) == 20
        actor.proceed()
        actor.result()
        deadline = time.monotonic() + seconds(5)
        while timing.state.read("syscall_tasks"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert timing.of_all()["sched_rr_get_interval"].count == 20


# ---------------------------------------------------------------- whose calls


def test_the_agent_is_left_out() -> None:
    """This process is the agent, and the other one is not."""
    with Timing(None, "sched_rr_get_interval") as timing:
        for _ in range(100):
            call("sched_rr_get_interval", -1, None)
        Role("other", repeat, "sched_rr_get_interval", 7).result()
        assert timing.of_all()["sched_rr_get_interval"].count == 7


def test_a_filter_applies_to_counts(scope: Scope) -> None:
    settings = Settings(filters=Filters(exclude_comms=("actor",)))
    with Timing(scope, "getppid", settings=settings) as timing:
        scope.act(repeat, "getppid", 50)
        assert timing.of_all() == {}


def call_32_bit(count: int) -> None:
    """getppid() by way of the 32-bit calls, from code of our own: 64 there is its number."""
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\xb8\x40\x00\x00\x00\xcd\x80\xc3")  # mov eax, 64; int 0x80; ret
    at = ctypes.addressof(ctypes.c_char.from_buffer(code))
    function = ctypes.CFUNCTYPE(ctypes.c_int)(at)
    for _ in range(count):
        assert function() == os.getppid()


def knows_32_bit_calls() -> bool:
    child = os.fork()
    if not child:
        call_32_bit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("names", [("getppid", "semget"), ("*",)])
def test_calls_of_32_bit_programs_are_none(
    scope: Scope, names: tuple[str, ...], require_kernel: Require
) -> None:
    """Their numbers mean others: 64 is semget of 64-bit programs."""
    require_kernel(
        platform.machine() == "x86_64" and knows_32_bit_calls(), "it has no 32-bit system calls"
    )
    with Timing(scope, *names) as timing:
        scope.act(call_32_bit, 50)
        found = timing.of_all()
    assert found["getppid"].count == 50  # those that it was compared with
    assert "semget" not in found


def call_as_x32(count: int) -> int:
    """Ask for getppid as an x32 program does. How many of the calls failed: all, unless it can."""
    x32 = 0x40000000 | NUMBER["getppid"]
    return sum(system_call(x32)[0] < 0 for _ in range(count))


def test_calls_of_x32_programs_are_those_of_64_bits(scope: Scope, require_kernel: Require) -> None:
    require_kernel(platform.machine() == "x86_64", "it has no x32 programs")
    with Timing(scope, "*") as timing:
        failed = scope.act(call_as_x32, 50)
        found = timing.of_all()
    assert (found["getppid"].count, found["getppid"].errors) == (50, failed)


def fail(count: int) -> None:
    for _ in range(count):
        assert call("sched_rr_get_interval", -1, None)[1]


def test_counts_by_cgroup(cgroups: Path) -> None:
    with Scope(cgroups) as one, Scope(cgroups) as other:
        settings = Settings(filters=Filters(cgroups=(one.id, other.id)))
        names = ("getppid", "sched_rr_get_interval", "nanosleep")
        asked = 40_000_000, 5_000_000
        with Timing(None, *names, settings=settings, syscall_cgroups=1024) as timing:
            one.act(repeat, "getppid", 30)
            other.act(repeat, "getppid", 12)
            other.act(fail, 5)
            took = one.act(nanosleep, asked[0]), other.act(nanosleep, asked[1])
            first = timing.collect()
            one.act(repeat, "getppid", 8)
            second = timing.collect()
        ids = one.id, other.id
    counts = Counter({(r.syscall, r.cgroup_id): r.count for r in first})
    assert counts == {
        ("getppid", 0): 42,
        ("getppid", ids[0]): 30,
        ("getppid", ids[1]): 12,
        ("sched_rr_get_interval", 0): 5,
        ("sched_rr_get_interval", ids[1]): 5,
        ("nanosleep", 0): 2,
        ("nanosleep", ids[0]): 1,
        ("nanosleep", ids[1]): 1,
    }
    assert all(sum(one.buckets) == one.count and one.max_ns for one in (*first, *second))
    for record in first:
        failing = record.syscall == "sched_rr_get_interval"
        assert record.errors == record.errors_total == (record.count if failing else 0)
        if record.syscall == "nanosleep" and record.cgroup_id:
            which = ids.index(record.cgroup_id)
            check_durations(record, [asked[which]], [took[which]])
    found = [(r.syscall, r.cgroup_id, r.count, r.count_total) for r in second]
    assert found == [("getppid", 0, 8, 50), ("getppid", ids[0], 8, 38)]
    assert {r.cgroups_evicted for r in (*first, *second)} == {0}


PLAIN = ("getpid", "getppid", "getuid", "geteuid", "getgid", "getegid", "gettid", "umask")


def repeat_each(names: Collection[str], count: int) -> None:
    for _ in range(count):
        for name in names:
            call(name)


def test_a_full_table_of_cgroups(scope: Scope) -> None:
    """The oldest make way, which is told; counts of all stay whole."""
    with Timing(scope, *PLAIN, syscall_cgroups=4) as timing:
        scope.act(repeat_each, PLAIN, 10)
        records = timing.collect()
    of_all = {one.syscall: one.count for one in records if not one.cgroup_id}
    by_cgroup = [one for one in records if one.cgroup_id]
    assert {name: of_all[name] for name in PLAIN} == dict.fromkeys(PLAIN, 10)
    assert by_cgroup
    assert len(by_cgroup) <= 4
    assert all(one.cgroups_evicted >= len(PLAIN) - len(by_cgroup) for one in by_cgroup)


# ---------------------------------------------------------------- the whole agent, and a witness


COUNT_CALLS = """
tracepoint:raw_syscalls:sys_exit /args->id == {number} && comm == "actor"/ {{ @calls = count(); }}
"""


def test_bpftrace_agrees(scope: Scope, tmp_path: Path, require: Require) -> None:
    require(shutil.which("bpftrace"), "bpftrace is not installed")
    count = repetitions(5_000, 500)
    script = COUNT_CALLS.format(number=NUMBER["getppid"])
    with bpftrace(script, tmp_path / "bpftrace") as ended, Timing(scope, "getppid") as timing:
        scope.act(repeat, "getppid", count)
        assert timing.of_all()["getppid"].count == count
        assert f"@calls: {count}\n" in ended()


def test_the_agent_publishes_them(scope: Scope, tmp_path: Path) -> None:
    """Through the helper, by cgroup too; what the last period counted comes at the end."""
    config = "summary_seconds = 1\n[kernel]\nsyscall_cgroups = 256\nsyscall_slow_ms = 100\n"
    arguments = ("--syscall", "getppid", "--syscall", "nanosleep", *scope.options)
    with Agent(tmp_path / "agent", *arguments, events="syscall.*", config=config) as agent:
        scope.act(repeat, "getppid", 1000)
        time.sleep(2.5)
        scope.act(repeat, "getppid", 234)
        scope.act(sleep_once, 150_000_000)
        recording = agent.stop()
    recording.check()
    records = recording.of("syscall.latency")
    counts = Counter[tuple[str, int]]()
    for one in records:
        counts[one.syscall, one.cgroup_id] += one.count
    assert counts == {
        ("getppid", 0): 1234,
        ("getppid", scope.id): 1234,
        ("nanosleep", 0): 1,
        ("nanosleep", scope.id): 1,
    }
    (event,) = recording.of("syscall.slow")
    assert event.syscall == "nanosleep"
    with Timing(scope, "getppid") as timing:
        assert kind_of_way(recording.ways["syscall_exit"]) == kind_of_way(timing.way)
    assert recording.manifest.coverage["syscall.latency"].status == "full"


def test_every_name_is_a_call_of_some_machine() -> None:
    assert all(any(number is not None for number in numbers) for numbers in NUMBERS.values())
