"""Sensors load alone, with maps of their own, and come and go while others run."""

from __future__ import annotations

import json
import mmap
import os
import platform
import re
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from streamer.config.settings import Kernel, Rings, Settings
from streamer.errors import KernelError
from streamer.events.kinds import KINDS
from streamer.kernel.btf import Btf
from streamer.kernel.loader import Attached, Loader, ProgramState, _Sensor, last_possible_cpu
from streamer.kernel.misses import missed_runs
from streamer.kernel.objects import KIND_END, SENSORS
from streamer.kernel.tags import SensorInfo
from streamer.kernel.targets import without_target
from tests.bpf_variant import Variant
from tests.conftest import Require
from tests.kernel.agent import ALL, ROOT, Agent
from tests.kernel.bpf_maps import HeldMap, exists, maps_of
from tests.kernel.live import Live
from tests.kernel.pace import seconds
from tests.kernel.scope import Scope, checkpoint
from tests.kernel.system import kernel_knows, open_missing, preempts_tracepoints
from tests.vm.verifier import OPTIONS, RINGS, TARGETS
from tools.gen.sensors import read_sensor

pytestmark = pytest.mark.kernel

CPUS = last_possible_cpu() + 1
# For perf buffers, for layouts that were read out of headers, for many CPUs.
ALONE = ("perf_slots", "peeked", "bulk_of_cpus")
CORE_MAPS = [one.name[:15] for one in SENSORS["core"].maps if one.name not in ALONE]
OWN_MAPS = {
    "process.exec": ["exec_records", "exited", "path_buffers"],
    "file.open": ["open_scratches", "path_buffers"],
    "net.connect": [
        *("agent_peers", "connections", "failed_connects", "listeners", "notes"),
        "sockets",
    ],
}


def names_of(maps: list[HeldMap]) -> list[str]:
    """Without the sections of constants, which are no maps to anybody else."""
    return [one.name for one in maps if ".rodata" not in one.name]


def own_maps(kind: str) -> list[str]:
    """On this kernel: where programs are preempted, what exec prepares has a place of its own."""
    prepared = kind == "process.exec" and preempts_tracepoints()
    return OWN_MAPS[kind] + ["exec_prepared"] * prepared


def await_end_of(maps: list[int]) -> None:
    """The kernel frees them when nothing can use them any more: soon, and not at once."""
    assert maps
    deadline = time.monotonic() + seconds(20)
    while any(map(exists, maps)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---------------------------------------------------------------- maps


@pytest.mark.parametrize("kind", OWN_MAPS)
def test_a_sensor_makes_its_own_maps_alone(scope: Scope, kind: str) -> None:
    with Live(scope, {kind}) as live:
        assert Counter(names_of(live.maps())) == Counter(CORE_MAPS + own_maps(kind))
        made = [one.id for one in live.maps()]
    del live
    await_end_of(made)


def test_the_command_makes_no_map_of_what_is_not_asked_for(scope: Scope, tmp_path: Path) -> None:
    """`--events process.exec`, with what both of its processes hold."""
    with Agent(tmp_path, *scope.options, events="process.exec") as agent:
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        held = maps_of(agent.pid, *map(int, children))
        agent.stop()
    assert Counter(names_of(held)) == Counter(CORE_MAPS + own_maps("process.exec"))


def test_maps_have_their_sizes(scope: Scope) -> None:
    rings = Rings(critical_bytes=1 << 17, bulk_bytes=1 << 16)
    settings = Settings(rings=rings, kernel=Kernel(connections=2048))
    with Live(scope, {"net.connect", "file.open"}, settings) as live:
        entries = {one.name: one.entries for one in live.maps()}
    assert entries["critical"] == 1 << 17
    assert entries["bulk"] == 1 << 16
    assert entries["counters"] == entries["path_buffers"] == CPUS
    assert entries["kind_counters"] == CPUS * KIND_END
    assert entries["kind_settings"] == KIND_END
    assert entries["connections"] == 2048


SPARSE = """
import json
from streamer.kernel.loader import Attached, Loader
from tests.kernel.bpf_maps import maps_of
loader = Loader()
loader.load_core({"critical": 4096, "bulk": 4096}, None)
loader.load("process", {})
print(json.dumps([loader.cpus, {one.name: one.entries for one in maps_of()}]))
"""


def test_cpus_are_counted_by_the_highest_number(tmp_path: Path) -> None:
    """Of those that may come up, of which some numbers may be none's."""
    (tmp_path / "possible").write_text("0-1,4,6-7\n")
    possible = "/sys/devices/system/cpu/possible"
    script = f'mount --bind {tmp_path}/possible {possible}; exec "$@"'
    command = ["unshare", "--mount", "sh", "-ec", script, "sh", sys.executable, "-c", SPARSE]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    cpus, entries = json.loads(output)
    assert cpus == 8
    assert entries["counters"] == entries["exec_records"] == entries["path_buffers"] == 8
    assert entries["kind_counters"] == 8 * KIND_END


@pytest.mark.every_kernel
@pytest.mark.parametrize("wanted", [False, True])
def test_the_map_of_an_option(scope: Scope, wanted: bool, require_kernel: Require) -> None:
    """Is made only where the option is on, and the programs that fill it only then attached."""
    require_kernel(kernel_knows("BPF_FUNC_task_storage_get"), "before 5.11 no latency is taken")
    with Live(scope, {"file.open"}, Settings(kernel=Kernel(open_latency=wanted))) as live:
        assert ("open_starts" in names_of(live.maps())) == wanted
        hooks = {one.hook for one in live.state.statuses}
        assert ("openat_start" in hooks) == wanted
        scope.act(open_missing, "/no/", 3)
        events = live.read()
        assert live.state.coverage({"file.open"})["file.open"].status == "full"
    assert len(events) == 3
    assert all((event.latency_ns > 0) == wanted for event in events)


# ---------------------------------------------------------------- ways to a hook

WAYS = Path(__file__).parent / "ways.bpf.c"
BROKEN = """
#include "core/core.bpf.h"

char LICENSE[] SEC("license") = "GPL";

struct {
	__uint(type, 9999);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} impossible SEC(".maps");

SEC("raw_tp/sys_enter") EMITS("process.exit")
int broken(void *ctx)
{
	__u32 zero = 0;

	return !bpf_map_lookup_elem(&impossible, &zero);
}
"""

STRANGE = """
#include "core/core.bpf.h"

char LICENSE[] SEC("license") = "GPL";

struct task_struct___strange {
	__u64 no_such_field;
} __attribute__((preserve_access_index));

SEC("raw_tp/sys_enter") EMITS("process.exit")
int strange(void *ctx)
{
	struct task_struct___strange *task = (void *)bpf_get_current_task();

	return BPF_CORE_READ(task, no_such_field);
}
"""


FAULTS = """
#include "core/core.bpf.h"

char LICENSE[] SEC("license") = "GPL";

OPTION(only_pid);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} faults_seen SEC(".maps");

/* Makes a fault of its own, which the kernel does not show to a program that runs. */
SEC("raw_tp/page_fault_kernel") EMITS("process.exit")
int on_fault(void *ctx)
{
	__u32 zero = 0;
	__u64 value, *seen = bpf_map_lookup_elem(&faults_seen, &zero);

	if (!seen || bpf_get_current_pid_tgid() >> 32 != only_pid)
		return 0;
	count(seen);
	return !bpf_probe_read_user(&value, sizeof(value), (void *)8);
}
"""


PLACES = """
#include "core/core.bpf.h"
#include "core/task.bpf.h"

char LICENSE[] SEC("license") = "GPL";

OPTION(only_pid);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 5);
	__type(key, __u32);
	__type(value, __u64);
} place_runs SEC(".maps");

#define AT(number, section, hook)                                \
	SEC(section) HOOK(hook) EMITS("process.exit")            \
	int at_##number(void *ctx)                               \
	{                                                        \
		__u32 key = number;                              \
		__u64 *runs = bpf_map_lookup_elem(&place_runs, &key); \
		if (runs && bpf_get_current_pid_tgid() >> 32 == only_pid) \
			count(runs);                             \
		return 0;                                        \
	}

AT(0, "fentry/" SYSTEM_CALL(fchdir), "called")
AT(1, "kprobe/" SYSTEM_CALL(fchdir), "called")
AT(2, "tracepoint/syscalls/sys_enter_fchdir", "called")
AT(3, "kprobe/" SYSTEM_CALL(fchdir), "probed")
AT(4, "tracepoint/syscalls/sys_enter_fchdir", "probed")
"""
KPROBES = Path("/sys/bus/event_source/devices/kprobe")


NUMBERS = """
#define INTERRUPTED(seq) interrupted(seq)
static inline __attribute__((always_inline)) void interrupted(volatile unsigned long long *seq);

#include "core/core.bpf.h"
#include "core/fair.bpf.h"
#include "core/task.bpf.h"

char LICENSE[] SEC("license") = "GPL";

OPTION(only_pid);

/* Of the last event: how often it is to be interrupted, and what became of it. */
struct numbered {
	__u64 interruptions;
	__u64 seq;
	__u64 given_up;
	__u64 room;
	__u64 all_given_up;
	__u64 produced;
	__u64 lost;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct numbered);
} numbered SEC(".maps");

/* What a program does that runs at this very point: it takes a number itself. */
static __always_inline void interrupted(volatile __u64 *seq)
{
	struct numbered *now = ONLY_ENTRY(numbered);

	if (!now || !now->interruptions)
		return;
	now->interruptions--;
	__sync_fetch_and_add((__u64 *)seq, 1);
}

/* An event of each fchdir(): the descriptor, less 1000, is how often it is interrupted. */
SEC("tracepoint/syscalls/sys_enter_fchdir") EMITS("process.fork")
int on_fchdir(void *ctx)
{
	__u32 cpu = bpf_get_smp_processor_id();
	struct cpu_counters *mine = my_counters(cpu);
	struct kind_counters *counts = my_kind(cpu, KIND_PROCESS_FORK);
	struct numbered *now = ONLY_ENTRY(numbered);
	struct process_fork *record;
	struct event_base base;

	if (bpf_get_current_pid_tgid() >> 32 != only_pid || !mine || !counts || !now)
		return 0;
	start_base(&base);
	now->interruptions = ((__u64 *)ctx)[2] - 1000;
	record = begin(&critical, &base, KIND_PROCESS_FORK, RING_CRITICAL, sizeof(*record));
	now->room = 0;
	if (record) { /* at once: before 5.11 the verifier forgets that it was looked at */
		now->room = 1;
		__builtin_memset((void *)record + sizeof(base), 0, sizeof(*record) - sizeof(base));
		submit(ctx, &critical, RING_CRITICAL, record);
	}
	now->seq = base.seq;
	now->given_up = base.skipped;
	now->all_given_up = mine->skipped[RING_CRITICAL];
	now->produced = counts->produced;
	now->lost = counts->lost;
	return 0;
}
"""
ADDED = "\t\t__sync_fetch_and_add((__u64 *)seq, 1);\n"
INTERRUPTED = f"{ADDED}#ifdef INTERRUPTED\n\t\tINTERRUPTED(seq);\n#endif\n"


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The core, and sensors of this test: `ways`, `broken`, `strange`, and so on."""
    more = {"ways.bpf.c": WAYS.read_text(), "places.bpf.c": PLACES, "numbers.bpf.c": NUMBERS}
    more |= {"broken.bpf.c": BROKEN, "strange.bpf.c": STRANGE, "faults.bpf.c": FAULTS}
    changes = {"core/core.bpf.h": (ADDED, INTERRUPTED)}
    return Variant(tmp_path_factory.mktemp("ways") / "variant", changes, ("core",), more).objects


def catalogue(directory: Path) -> dict[str, SensorInfo]:
    """What the objects in a directory say of themselves."""
    core = read_sensor("core", Btf.of_object(directory / "core.bpf.o"), None)
    names = [path.name.removesuffix(".bpf.o") for path in directory.glob("*.bpf.o")]
    sensors = {
        name: read_sensor(name, Btf.of_object(directory / f"{name}.bpf.o"), core)
        for name in names
        if name != "core"
    }
    return {"core": core, **sensors}


class Ways:
    """The sensor `ways`, loaded and attached, for this process."""

    def __init__(self, objects: Path, options: Mapping[str, int] | None = None) -> None:
        self._before = {one.id for one in maps_of()}
        self.loader = Loader(sensors=catalogue(objects), directory=str(objects))
        self.loader.load_core({"critical": 4096, "bulk": 4096}, None)
        chosen = {"rows": 123, "only_pid": os.getpid()} | dict(options or {})
        self.loaded = self.loader.load("ways", chosen)
        self.states = {one.name: one for one in self.loader.attach("ways").programs}

    def maps(self) -> dict[str, int]:
        """Names and entries of the maps that it made."""
        return {one.name: one.entries for one in maps_of() if one.id not in self._before}

    def ran(self) -> list[str]:
        """The ways by which three calls of fchdir() are seen, each of them three times."""
        before = self._runs()
        directory = os.open(".", os.O_RDONLY)
        for _ in range(3):
            os.fchdir(directory)
        os.close(directory)
        runs = [now - then for now, then in zip(self._runs(), before, strict=True)]
        assert set(runs) <= {0, 3}
        return [name for name, count in zip(NAMES, runs, strict=True) if count]

    def _runs(self) -> list[int]:
        return [int.from_bytes(value, "little") for _, value in self.loader.read("runs")]


NAMES = (
    *("refused_second", "refused_third", "unattached_second", "unattached_third"),
    *("best_first", "best_second", "this_machine", "another", "has_function"),
    *("lacks_no_function", "has_option", "has_both"),
)
WITHOUT_OPTIONS = [
    *("refused_second", "unattached_second", "best_first", "this_machine", "has_function"),
    "lacks_no_function",
]


@pytest.mark.every_kernel
def test_the_first_way_that_loads_and_attaches(objects: Path) -> None:
    """And no other; what was tried before it has a reason, what was not needed is spare."""
    ways = Ways(objects)
    ran = ways.ran()
    ways.loader.close()
    assert ran == WITHOUT_OPTIONS
    statuses = {name: one.status for name, one in ways.states.items()}
    assert statuses == {
        "refused_first": "failed",
        "refused_second": "attached",
        "refused_third": "spare",
        "unattached_first": "failed",
        "unattached_refused": "failed",
        "unattached_second": "attached",
        "unattached_third": "spare",
        "best_first": "attached",
        "best_second": "spare",
        "hopeless_first": "failed",
        "hopeless_second": "failed",
        "hopeless_third": "failed",
        "hopeless_fourth": "failed",
        "this_machine": "attached",
        "has_function": "attached",
        "lacks_no_function": "attached",
    }
    assert all(bool(one.reason) == (one.status == "failed") for one in ways.states.values())


def test_failed_ways_have_their_reasons(objects: Path) -> None:
    ways = Ways(objects)
    ways.loader.close()
    states = ways.states
    refused = r"refused_first does not load: Permission denied: R\d invalid mem access '\w+'"
    assert re.fullmatch(refused, states["refused_first"].reason)
    assert states["refused_first"].way == "tracepoint/syscalls/sys_enter_fchdir"
    assert states["unattached_refused"].reason.startswith("unattached_refused does not load: ")
    for name, way in (
        ("unattached_first", "raw_tp/no_such_tracepoint"),
        ("hopeless_second", "raw_tp/no_such_tracepoint"),
        ("hopeless_third", "tp_btf/no_such_tracepoint"),
        ("hopeless_fourth", "tracepoint/syscalls/no_such_call"),
    ):
        hook = name.partition("_")[0]
        assert states[name] == ProgramState(name, hook, way, "failed", f"this kernel has no {way}")


def test_what_an_option_brings(objects: Path) -> None:
    """Programs and a map that are there only with it; nobody misses them without."""
    without = Ways(objects)
    names = without.maps()
    without.loader.close()
    assert "optional" not in without.loaded.maps
    assert "optional" not in names
    assert not {"has_option", "has_both", "has_one"} & without.states.keys()
    given = Ways(objects, {"extra": 1})
    ran = given.ran()
    entries = [
        (int.from_bytes(key, "little"), int.from_bytes(value, "little"))
        for key, value in given.loader.read("optional")
    ]
    given.loader.close()
    assert entries == [(1, 1)]
    assert {"optional", "runs", "rows", "by_cpu", "by_kind"} == given.loaded.maps.keys()
    assert ran == [*WITHOUT_OPTIONS, "has_option", "has_both"]


@pytest.mark.every_kernel
def test_places_that_a_kernel_may_have_or_not(objects: Path) -> None:
    """A function before a probe before a tracepoint: the first that is there sees every call."""
    loader = Loader(sensors=catalogue(objects), directory=str(objects))
    loader.load_core({"critical": 4096, "bulk": 4096}, None)
    loader.load("places", {"only_pid": os.getpid()})
    programs = loader.attach("places").programs
    attached = [one.name for one in programs if one.status == "attached"]
    directory = os.open(".", os.O_RDONLY)
    for _ in range(3):
        os.fchdir(directory)
    os.close(directory)
    runs = [int.from_bytes(value, "little") for _, value in loader.read("place_runs")]
    loader.close()
    probed = "at_3" if KPROBES.exists() else "at_4"
    called = "at_0" if not loader.no_functions else "at_1" if KPROBES.exists() else "at_2"
    assert [one.name for one in programs] == [f"at_{number}" for number in range(5)]
    assert attached == [called, probed]
    assert runs == [3 * (f"at_{number}" in attached) for number in range(5)]


def test_a_map_that_was_not_made_cannot_be_read(objects: Path) -> None:
    ways = Ways(objects)
    with pytest.raises(KernelError, match="there is no map optional"):
        ways.loader.read("optional")
    ways.loader.close()


def test_sizes_that_a_map_says(objects: Path) -> None:
    ways = Ways(objects)
    entries = ways.maps()
    ways.loader.close()
    assert (entries["by_cpu"], entries["by_kind"]) == (CPUS, CPUS * KIND_END)
    assert entries["rows"] == 123


def test_an_option_is_a_constant_of_the_programs(objects: Path) -> None:
    """Of another process nothing is counted."""
    ways = Ways(objects, {"only_pid": os.getppid()})
    ran = ways.ran()
    ways.loader.close()
    assert ran == []


def test_attaching_twice_is_attaching_once(objects: Path) -> None:
    ways = Ways(objects)
    again = {one.name: one for one in ways.loader.attach("ways").programs}
    ran = ways.ran()
    ways.loader.close()
    assert again == ways.states
    assert ran == WITHOUT_OPTIONS


@pytest.mark.every_kernel
def test_runs_that_the_kernel_left_out(objects: Path, require_kernel: Require) -> None:
    """Each run of the program makes one of its own, which is not run."""
    require_kernel(platform.machine() == "x86_64", "no kernel of another machine tells of faults")
    require_kernel(
        kernel_knows("bpf_prog_inc_misses_counter"), "before 5.12 the kernel counts none"
    )
    loader = Loader(sensors=catalogue(objects), directory=str(objects))
    loader.load_core({"critical": 4096, "bulk": 4096}, None)
    loader.load("faults", {"only_pid": os.getpid()})
    attached = loader.attach("faults")
    fault_often(20)
    misses = missed_runs([attached])
    ((_, seen),) = loader.read("faults_seen")
    loader.close()
    runs = int.from_bytes(seen, "little")
    assert runs >= 20
    assert misses["on_fault"] in (runs, 2 * runs)  # some processors are tried again at the fault


class Numbered(NamedTuple):
    """`struct numbered`."""

    interruptions: int
    seq: int
    given_up: int
    room: int
    all_given_up: int
    produced: int
    lost: int


def test_a_number_that_others_take_eight_times_in_a_row(objects: Path) -> None:
    """The event is lost and counted, and has no number that another one has; the next has its own.

    Each interruption takes a number of its own, and has the interrupted one give one up.
    """
    loader = Loader(sensors=catalogue(objects), directory=str(objects))
    loader.load_core({"critical": 4096, "bulk": 4096}, None)
    loader.load("numbers", {"only_pid": os.getpid()})
    (state,) = loader.attach("numbers").programs
    assert (state.status, state.reason) == ("attached", "")
    found = []
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [min(cpus)])
    try:
        for times in (0, 1, 7, 8, 0, 20):
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fchdir(1000 + times)
            ((_, value),) = loader.read("numbered")
            found.append(Numbered(*struct.unpack("<7Q", value)))
    finally:
        os.sched_setaffinity(0, cpus)
        loader.close()
    first = found[0].seq
    assert found == [
        Numbered(0, first, 0, 1, 0, 1, 0),
        Numbered(0, first + 3, 1, 1, 1, 2, 0),
        Numbered(0, first + 18, 7, 1, 8, 3, 0),
        Numbered(0, 0, 7, 0, 15, 4, 1),  # 16 numbers, of which the last one given up is its loss
        Numbered(0, first + 35, 0, 1, 15, 5, 1),
        Numbered(12, 0, 7, 0, 22, 6, 2),
    ]


def fault_often(count: int) -> None:
    """Have the kernel write to pages that are not there yet."""
    with open("/dev/zero", "rb") as zero, mmap.mmap(-1, count * mmap.PAGESIZE) as pages:
        for page in range(count):
            place = memoryview(pages)[page * mmap.PAGESIZE :][:8]
            assert os.readv(zero.fileno(), [place]) == 8
            place.release()


def test_a_sensor_that_does_not_load_leaves_the_others_alone(objects: Path) -> None:
    """One whose map cannot be made: its programs say why, and another one runs."""
    ways = Ways(objects)
    (state,) = ways.loader.load("broken", {}).programs
    assert (state.status, state.reason) == ("failed", "broken does not load: Invalid argument")
    assert ways.loader.attach("broken") == Attached([state], {})
    ran = ways.ran()
    ways.loader.unload("broken")
    ways.loader.close()
    assert ran == WITHOUT_OPTIONS
    assert ways.maps() == {}


def test_a_program_is_not_refused_for_what_is_said_of_it() -> None:
    """Alone, its log is kept, for which the kernel wants more room than it needs in the end."""
    loader = Loader()
    loader.load_core(RINGS, None)
    made = _Sensor(SENSORS["net_dns"], OPTIONS | loader._own_options(), TARGETS)
    for info in SENSORS["net_dns"].programs:
        with closing(loader._try_load(made, [info.name])) as alone:
            assert alone.programs[info.name].fd >= 0
    loader.close()


def test_a_field_that_this_kernel_does_not_have_is_named(objects: Path) -> None:
    ways = Ways(objects)
    (state,) = ways.loader.load("strange", {}).programs
    ways.loader.close()
    assert re.fullmatch(
        r"strange does not load: Invalid argument: .*"
        r"struct task_struct___strange\.no_such_field\b.*",
        state.reason,
    )


def test_sensors_that_are_not_there(objects: Path) -> None:
    ways = Ways(objects)
    for name, words in (
        ("none", "there is no sensor none"),
        ("core", "there is no sensor core"),
        ("ways", "ways cannot be loaded now"),
    ):
        with pytest.raises(KernelError, match=words):
            ways.loader.load(name, {})
    for act in (ways.loader.attach, ways.loader.unload):
        with pytest.raises(KernelError, match="broken is not loaded"):
            act("broken")
    ran = ways.ran()
    ways.loader.close()
    assert ran == WITHOUT_OPTIONS


def test_manifest_and_check_say_which_way_is_taken(scope: Scope, tmp_path: Path) -> None:
    """Of each hook one, and why not those that are better."""
    with Agent(tmp_path, *scope.options) as agent:
        programs = agent.stop().manifest.programs
    command = [sys.executable, "-m", "streamer", "check", "--json", "--events", ALL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode in (0, 1)  # 1: a kind is observed in part
    rungs = [
        (rung["program"], hook["sensor"], hook["hook"], rung["way"], rung["status"], rung["reason"])
        for hook in json.loads(done.stdout)["hooks"]
        for rung in hook["rungs"]
    ]
    words = {"attached": "used", "failed": "lacking", "spare": "spare"}
    told = [(p.name, p.sensor, p.hook, p.way, words[p.status], p.reason) for p in programs]
    assert sorted(rungs) == sorted(told)
    ways: dict[str, list[str]] = {}
    for one in sorted(programs, key=_preference):
        ways.setdefault(one.hook, []).append(one.status)
        assert bool(one.reason) == (one.status == "failed")
    for hook, statuses in ways.items():
        at = statuses.index("attached")
        assert set(statuses[:at]) <= {"failed"}, hook
        assert set(statuses[at + 1 :]) <= {"spare"}, hook


def _preference(program: object) -> int:
    """Its place in the source, where the best way to a hook comes first."""
    names = [one.name for sensor in SENSORS.values() for one in sensor.programs]
    return names.index(program.name)  # type: ignore[attr-defined]


# ---------------------------------------------------------------- while it runs


def open_and_run(prefix: str, count: int) -> None:
    for i in range(count):
        open_missing(f"{prefix}{i}/", 1)
        os.waitpid(os.posix_spawn("/bin/true", [b"true", str(i).encode()], {}), 0)


def open_and_run_in_turns(turns: int, each: int) -> None:
    for turn in range(turns):
        checkpoint(turn)
        open_and_run(f"/turn/{turn}/", each)


def test_sensors_come_and_go_while_events_flow(scope: Scope) -> None:
    """What one observes is whole; the other's, exactly what happened while it was there."""
    each, turns = 40, 6
    with (
        Live(scope, {"process.exec"}) as live,
        scope.start(open_and_run_in_turns, turns, each) as actor,
    ):
        live.state.enable({"process.exec", "file.open"})
        for turn in range(turns):
            actor.reached()
            if turn % 2:
                live.state.load("file")
                live.state.attach_sensor("file")
                held = [one.id for one in live.maps() if one.name == "open_scratches"]
            elif turn:
                live.state.unload("file")
                await_end_of(held)
                assert live.state.sensors == ["process"]
            actor.proceed()
        actor.result()
        live.check()
        execs = [event for event in live.events if type(event).__name__ == "ProcessExec"]
        opens = [event.path for event in live.events if type(event).__name__ == "FileOpen"]
        assert live.counts("process.exec").read == turns * each
    assert [event.argv[1] for event in execs] == [str(i) for i in range(each)] * turns
    ours = [path for path in opens if path.startswith("/turn/")]
    assert ours == [f"/turn/{turn}/{i}/0" for turn in range(1, turns, 2) for i in range(each)]


def run_until(stop: Path) -> int:
    """Execute without a pause until there is that file. How often."""
    times = 0
    while not stop.exists():
        os.waitpid(os.posix_spawn("/bin/true", [b"true", str(times).encode()], {}), 0)
        times += 1
    return times


def test_loading_in_mid_flow_loses_nothing_of_others(scope: Scope, tmp_path: Path) -> None:
    """Another sensor loaded, attached and unloaded again, while programs execute."""
    kinds = {"process.exec", "process.exit"}
    with Live(scope, kinds) as live, scope.start(run_until, tmp_path / "stop") as actor:
        for _ in range(3):
            before = live.counts("process.exec").read
            live.state.load("net")
            live.state.attach_sensor("net")
            live.state.unload("net")
            while live.counts("process.exec").read < before + 20:
                time.sleep(0.01)
        (tmp_path / "stop").touch()
        times = actor.result()
        live.check()
        coverage = live.state.coverage(kinds)
    execs = [event.argv[1] for event in live.events if type(event).__name__ == "ProcessExec"]
    assert execs == [str(i) for i in range(times)]
    assert {state.status for state in coverage.values()} == {"full"}


def test_a_sensor_that_is_loaded_stays_so(scope: Scope) -> None:
    """A second time is refused, and changes nothing."""
    with Live(scope, {"file.open"}) as live:
        with pytest.raises(KernelError, match="file is loaded already"):
            live.state.load("file")
        assert live.state.coverage({"file.open"})["file.open"].status == "full"
        scope.act(open_missing, "/no/", 5)
        assert len(live.read()) == 5


def test_kinds_of_a_sensor_that_went_are_missing(scope: Scope) -> None:
    wanted = KINDS.keys() - without_target(Kernel()).keys()
    with Live(scope, wanted) as live:
        before = live.state.coverage(wanted)
        live.state.unload("net")
        kinds = live.state.coverage(wanted)
    gone = {"net.connect", "net.accept", "net.close"}
    changed = {kind: one for kind, one in kinds.items() if one != before[kind]}
    assert {kind for kind, one in changed.items() if one.status == "missing"} == gone
    assert kinds["net.close"].reason == "no program reports it"
    # Whose a connection is, it kept for others.
    assert changed.keys() - gone == {"net.retransmit", "net.drop", "net.dns"}
    assert changed["net.retransmit"].status == "partial"
    assert "owners of connections" in changed["net.retransmit"].reason


# ---------------------------------------------------------------- rings that are too small

RECORD, SMALL = 144, 4096
"""Bytes of a file.open without its path, and of the smallest ring."""


def path_of_length(length: int) -> str:
    """An absolute path, which ends in `0`."""
    parts, rest = divmod(length - 2, 200)
    return "/" + ("p" * 199 + "/") * parts + "r" * rest + "0"


def test_a_kind_whose_records_do_not_fit_its_ring(scope: Scope) -> None:
    """It is said at the start, to the byte: the largest that fits comes, the next is lost."""
    room = SMALL - 16
    settings = Settings(rings=Rings(bulk_bytes=SMALL))
    with Live(scope, {"file.open", "process.exec"}, settings) as live:
        kinds = live.state.coverage({"file.open", "process.exec"})
        for length in (room - RECORD, room - RECORD + 1):
            path = path_of_length(length)
            assert len(path) == length
            scope.act(open_missing, path[:-1], 1)
            live.read()
        live.check()
        counts = live.counts("file.open")
    (event,) = [event for event in live.events if type(event).__name__ == "FileOpen"]
    assert len(event.path) == room - RECORD
    assert (counts.read, counts.lost) == (1, 1)
    assert kinds["process.exec"].status == "full"
    assert kinds["file.open"].status == "partial"
    assert kinds["file.open"].reason == (
        f"a record can have up to {RECORD + 2 * 4096} bytes, "
        f"and the ring bulk holds none of more than {room}"
    )


def test_the_log_says_so(scope: Scope, tmp_path: Path) -> None:
    config = "[rings]\nbulk_bytes = 4096\n"
    with Agent(tmp_path, *scope.options, events="file.open", config=config) as agent:
        recording = agent.stop()
    reason = recording.manifest.coverage["file.open"].reason
    assert reason.startswith("a record can have up to ")
    assert f"streamer: file.open is observed in part: {reason}\n" in agent.stderr
