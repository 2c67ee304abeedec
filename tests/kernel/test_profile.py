"""`profile.sample`: each sample that is taken is in a record, or counted where it is not."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from streamer.events.summaries import ProfileSample
from streamer.kernel.perf_event import CYCLES
from streamer.profiles.speedscope import SCHEMA
from tests.conftest import Require
from tests.kernel.agent import ROOT, Agent, Recording
from tests.kernel.pace import seconds
from tests.kernel.scope import Scope, checkpoint
from tests.kernel.silent_files import SilentFiles
from tests.kernel.system import IN_GUEST, sampled_by

pytestmark = pytest.mark.kernel

KIND = "profile.sample"
HZ = 199
SOURCE = Path(__file__).parent / "profiled.c"
KERNEL_ADDRESS = re.compile(r"f{4}[0-9a-f]{12}", re.I)


@pytest.fixture(scope="module")
def profiled(open_directory: Path) -> Path:
    """`profiled.c`, compiled with frame pointers."""
    built = open_directory / "profiled"
    flags = [
        "-O1",
        "-g",
        "-pthread",
        "-fno-omit-frame-pointer",
        "-Wl,--build-id",
        "-Wall",
        "-Werror",
    ]
    subprocess.run(["cc", "-Wall", "-Werror", *flags, "-o", str(built), str(SOURCE)], check=True)
    return built


def run(program: Path, *arguments: str) -> float:
    """Run it to its end. The CPU time that it took, in seconds."""
    pid = os.posix_spawn(program, [str(program), *arguments], dict(os.environ))
    _, status, usage = os.wait4(pid, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime


def observe(directory: Path, scope: Scope, *more: str, config: str = "", hz: int = HZ) -> Agent:
    options = (*scope.options, "--profile-hz", str(hz), *more)
    return Agent(directory, *options, events=KIND, config=config or "summary_seconds = 1\n")


def check_periods(records: Iterable[ProfileSample]) -> None:
    """Of each period: taken = idle + filtered + lost + what is in records."""
    counted: Counter[tuple[int, int, int, int, int]] = Counter()
    for one in records:
        counted[one.period_ns, one.taken, one.idle, one.filtered, one.lost] += one.count
    for (_, taken, idle, filtered, lost), count in counted.items():
        assert taken == idle + filtered + lost + count
    assert len({period for period, *_ in counted}) == len(counted)


def of_program(recording: Recording, name: str = "profiled") -> list[ProfileSample]:
    records = recording.of(KIND)
    check_periods(records)
    assert not KERNEL_ADDRESS.search(json.dumps([one.frames for one in records]))
    return [one for one in records if one.comm == name]


def check_rate(recording: Recording, found: int, used: float, hz: int = HZ) -> None:
    """As many samples as there was CPU time, as far as samples could be taken.

    On a busy host a virtual machine's clock stops at times while CPU time goes on, or the other
    way round.
    """
    periods = {one.period_ns: one.taken for one in recording.of(KIND)}
    # Nothing was attached yet when the first began, which matters less if there is no other.
    lengths = list(periods)[1:] or list(periods)
    whole = hz * (os.cpu_count() or 1) * sum(lengths) / 1e9
    taken = sum(periods[length] for length in lengths)
    kept_up = min(taken / whole, 1)
    assert 0.5 * kept_up * hz * used < found < 1.6 * hz * used


def within(records: Iterable[ProfileSample], frame: str) -> int:
    return sum(one.count for one in records if frame in one.frames)


def build_id(program: Path) -> str:
    shown = subprocess.run(["readelf", "-n", str(program)], capture_output=True, text=True)
    (found,) = re.findall(r"Build ID: ([0-9a-f]+)", shown.stdout)
    return str(found)


def stay(program: Path, *arguments: str) -> float:
    """Run it, and let it be there until the test goes on. The CPU time that it took, in seconds."""
    command = [str(program), *arguments, "stay"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"done\n"
    checkpoint()
    process.stdin.close()
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0
    return usage.ru_utime + usage.ru_stime


def recorded(agent: Agent, scope: Scope, *arguments: Any) -> tuple[Recording, float]:
    """What was recorded of `stay`, and what it returned: it was there when it was looked at."""
    with scope.start(stay, *arguments) as actor:
        actor.reached()
        agent.wait_for(f'"{arguments[0].name}`'.encode())
        recording = agent.stop()
        actor.proceed()
        return recording, actor.result()


# ---------------------------------------------------------------- names


def test_a_hot_function(scope: Scope, tmp_path: Path, profiled: Path) -> None:
    """Its share, how often it was met by its CPU time, and that each sample is accounted for."""
    with observe(tmp_path, scope) as agent:
        recording, used = recorded(agent, scope, profiled, "spin", "3")
    records = of_program(recording)
    total = sum(one.count for one in records)
    check_rate(recording, total, used)
    named = [one for one in records if "profiled`main" in one.frames]
    assert sum(one.count for one in named) > 0.8 * total
    hot, warm = within(named, "profiled`hot"), within(named, "profiled`warm")
    assert hot > 0.6 * (hot + warm)
    assert hot + warm > 0.9 * sum(one.count for one in named)
    # But for functions that were just entered, and have no frame yet.
    assert within(named, "profiled`spin") > 0.9 * sum(one.count for one in named)
    for one in named:
        assert one.modules["profiled"] == build_id(profiled)
        assert (one.cgroup_id, one.rate_hz) == (scope.id, HZ)
    (program,) = recording.manifest.programs
    assert program.status == "attached"
    assert program.way == sampled_by()
    assert recording.manifest.coverage[KIND].status == "full"
    pids = {one.pid for one in recording.of(KIND)}
    assert not pids & {recording.manifest.agent_pid, agent.pid}


@pytest.mark.every_machine
def test_as_many_samples_as_time_was_used(scope: Scope, tmp_path: Path) -> None:
    """Also by cycles, where the processor counts them, as the emulated one for arm64 does."""
    busy = "import time\nwhile time.process_time() < 3: pass"
    with observe(tmp_path, scope) as agent:
        used = scope.act(run, Path(sys.executable), "-c", busy)
        recording = agent.stop()
    records = recording.of(KIND)
    check_periods(records)
    found = sum(one.count for one in records if one.comm.startswith("python"))
    check_rate(recording, found, used)
    (program,) = recording.manifest.programs
    assert program.way == sampled_by()
    if IN_GUEST and platform.machine() == "aarch64":
        assert program.way == f"perf_event {CYCLES}"


def test_the_agent_is_left_out(tmp_path: Path) -> None:
    """Of all that Python runs here both of its processes alone are not met."""
    program = os.path.realpath(sys.executable)
    options = ("--exe", program, "--profile-hz", "997")
    busy = "import time\nend = time.process_time() + 1\nwhile time.process_time() < end: pass"
    with Agent(tmp_path, *options, events=KIND, config="summary_seconds = 1\n") as agent:
        with subprocess.Popen([program, "-c", busy]) as other:
            assert other.wait() == 0
        agent.wait_for(f'"pid":{other.pid},'.encode())
        recording = agent.stop()
    pids = {one.pid for one in recording.of(KIND)}
    assert other.pid in pids
    assert not pids & {recording.manifest.agent_pid, agent.pid}


def test_a_system_call(scope: Scope, tmp_path: Path, profiled: Path) -> None:
    """Functions of the kernel, behind those of the program that called it.

    All but that of `read` itself, which has no frame, so that its caller's is taken for its own.
    """
    with observe(tmp_path, scope) as agent:
        recording, _ = recorded(agent, scope, profiled, "read", "3")
    records = of_program(recording)
    named = [one for one in records if "profiled`main" in one.frames]
    in_kernel = [one for one in named if one.cpu_mode == "kernel"]
    assert within(in_kernel, "[kernel]`vfs_read") > 0.2 * sum(one.count for one in named)
    for one in in_kernel:
        if "[kernel]`vfs_read" in one.frames:
            assert one.frames.index("profiled`main") < one.frames.index("[kernel]`vfs_read")


def test_a_stripped_program(scope: Scope, tmp_path: Path, profiled: Path) -> None:
    """It has places within the file, and its build id, by which names can be had elsewhere."""
    stripped = profiled.with_name("stripped")
    subprocess.run(["strip", "-o", str(stripped), str(profiled)], check=True)
    with observe(tmp_path, scope) as agent:
        recording, _ = recorded(agent, scope, stripped, "spin", "3")
    records = [one for one in of_program(recording, "stripped") if one.cpu_mode == "user"]
    placed = [one for one in records if one.frames[-1].startswith("stripped`+0x")]
    assert sum(one.count for one in placed) > 0.8 * sum(one.count for one in records)
    assert {one.modules["stripped"] for one in placed} == {build_id(profiled)}
    size = stripped.stat().st_size
    assert all(int(one.frames[-1].partition("+")[2], 16) < size for one in placed)


def test_a_deleted_program(scope: Scope, tmp_path: Path, profiled: Path) -> None:
    """It is opened by its mapping, and has its names."""
    copied = Path(shutil.copy(profiled, profiled.with_name("deleted")))
    with observe(tmp_path, scope) as agent, scope.start(stay, copied, "spin", "3") as actor:
        while not runs(scope, "deleted"):
            time.sleep(0.01)
        copied.unlink()
        actor.reached()
        agent.wait_for(b'"deleted`')
        recording = agent.stop()
        actor.proceed()
        actor.result()
    records = of_program(recording, "deleted")
    assert within(records, "deleted`hot") > sum(one.count for one in records) / 2


def runs(scope: Scope, comm: str) -> bool:
    pids = (scope.path / "cgroup.procs").read_text().split()
    return any(Path(f"/proc/{pid}/comm").read_text().strip() == comm for pid in pids)


def test_a_process_that_has_gone(scope: Scope, tmp_path: Path, profiled: Path) -> None:
    """What is known of it is published: how often, and that its functions are not known."""
    with observe(tmp_path, scope, config="summary_seconds = 3600\n") as agent:
        used = scope.act(run, profiled, "spin", "1")
        recording = agent.stop()
    records = of_program(recording)
    check_rate(recording, sum(one.count for one in records), used)
    for one in records:
        # It ends in the kernel, without any memory in the end.
        user = {frame for frame in one.frames if "`" not in frame}
        assert user == {"[unknown]"} or (not user and one.cpu_mode == "kernel")
        assert one.modules == {}
        assert min(one.pid, one.start_boot_ns) > 0
        assert not one.incomplete


def run_two(program: Path) -> None:
    """As one process, first the one program and then another, which does not look like it."""
    pid = os.fork()
    if pid == 0:
        os.execv(
            sys.executable,
            [
                sys.executable,
                "-c",
                "import os, sys, time\n"
                "while time.process_time() < 1: pass\n"
                "os.execv(sys.argv[1], [sys.argv[1], 'spin', '0', 'stay'])",
                str(program),
            ],
        )
    time.sleep(seconds(3))
    checkpoint(pid)
    os.kill(pid, 9)
    os.waitpid(pid, 0)


def test_what_ran_before_an_exec(scope: Scope, tmp_path: Path, profiled: Path) -> None:
    """It is not named by what runs there now."""
    with (
        observe(tmp_path, scope, config="summary_seconds = 3600\n") as agent,
        scope.start(run_two, profiled) as actor,
    ):
        pid = actor.reached()
        recording = agent.stop()
        actor.proceed()
        actor.result()
    records = [one for one in recording.of(KIND) if one.pid == pid]
    before = [one for one in records if one.comm.startswith("python")]
    assert sum(one.count for one in before) > HZ / 2
    assert not any("profiled" in frame for one in before for frame in one.frames)


def test_deep_stacks(scope: Scope, tmp_path: Path, profiled: Path) -> None:
    """The innermost 127 functions are there, and it is said that there are more."""
    with observe(tmp_path, scope) as agent:
        recording, _ = recorded(agent, scope, profiled, "deep", "3")
    records = of_program(recording)
    deep = [one for one in records if "profiled`deep" in one.frames]
    assert sum(one.count for one in deep) > sum(one.count for one in records) / 2
    user = [one for one in deep if one.cpu_mode == "user"]
    assert {len(one.frames) for one in user} == {127}
    assert {one.truncated for one in deep} == {("frames",)}


# ---------------------------------------------------------------- the account


def test_full_tables(scope: Scope, tmp_path: Path, profiled: Path) -> None:
    """What found no room is counted, and so are the stacks that did not."""
    config = "summary_seconds = 3600\n[kernel]\nprofile_stacks = 1024\n"
    with observe(tmp_path, scope, config=config, hz=1000) as agent:
        used = scope.act(run, profiled, "many", "4")
        recording = agent.stop()
    records = of_program(recording)
    lost = records[0].lost
    assert lost > 0
    faults = recording.heartbeat.faults
    assert faults["samples_full"] == lost
    incomplete = sum(one.count for one in recording.of(KIND) if one.incomplete)
    assert faults["stack_collided"] >= incomplete > 0
    found = sum(one.count for one in records) + lost
    others = [one for one in recording.of(KIND) if one.cpu_mode == "other"]
    found += sum(one.count for one in others)
    check_rate(recording, found, used, 1000)


def test_many_periods_lose_nothing(scope: Scope, tmp_path: Path, profiled: Path) -> None:
    """The tables take turns: what is sampled while one is read is in the other."""
    with observe(tmp_path, scope, hz=997) as agent:
        used = scope.act(run, profiled, "many", "5")
        recording = agent.stop()
    records = recording.of(KIND)
    check_periods(records)
    assert len({one.period_ns for one in records}) >= 2
    assert "samples_full" not in recording.heartbeat.faults
    assert {one.lost for one in records} == {0}
    found = sum(one.count for one in records if one.comm in ("profiled", ""))
    check_rate(recording, found, used, 997)


def test_what_a_filter_keeps_back(scope: Scope, tmp_path: Path, profiled: Path) -> None:
    with observe(tmp_path, scope, "--exclude-comm", "profiled") as agent:
        used = scope.act(run, profiled, "spin", "2")
        recording = agent.stop()
    assert of_program(recording) == []
    periods = {one.period_ns: one for one in recording.of(KIND)}
    assert sum(one.filtered for one in periods.values()) > HZ * used / 10


# ---------------------------------------------------------------- who wants to do harm


@contextmanager
def running(scope: Scope, program: Path, what: str, *arguments: str) -> Iterator[None]:
    """It runs in the scope, until it is killed."""
    command = [str(program), what, "600", *arguments]
    pid = scope.act(os.posix_spawn, command[0], command, os.environ)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def silent(open_directory: Path, require_kernel: Require) -> Iterator[SilentFiles]:
    """A file system of a user, which does not say what is in its file."""
    require_kernel(os.path.exists("/dev/fuse"), "no FUSE")
    directory = open_directory / "silent"
    directory.mkdir(exist_ok=True)
    with SilentFiles(directory) as mounted:
        yield mounted


def test_a_process_whose_mappings_cannot_be_read(
    scope: Scope, tmp_path: Path, profiled: Path, silent: SilentFiles
) -> None:
    """It waits for its own file system, and whoever reads its list of mappings with it.

    It has no names. All others have theirs, no sample is missing, and the agent ends as it should.
    """
    hostile = Path(shutil.copy(profiled, profiled.with_name("hostile")))
    with observe(tmp_path, scope) as agent, running(scope, hostile, "stuck", str(silent.path)):
        assert silent.asked.wait(seconds(10))
        agent.wait_for(b'"comm":"hostile"', 30, timeout=seconds(60))
        with scope.start(stay, profiled, "spin", "3") as other:
            other.reached()
            agent.wait_for(b'"profiled`', timeout=seconds(60))
            recording = agent.stop()
            other.proceed()
            other.result()
    check_periods(recording.of(KIND))
    records = of_program(recording, "hostile")
    assert sum(one.count for one in records) > HZ
    others = of_program(recording)
    assert within(others, "profiled`hot") > 0


# ---------------------------------------------------------------- the command


def profile(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "streamer", "profile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def profile_of(scope: Scope, program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    with scope.start(run, program, "spin", "60") as actor:
        done = profile("--duration", "4s", "--hz", str(HZ), *scope.options, *arguments)
        for pid in (scope.path / "cgroup.procs").read_text().split():
            if int(pid) != actor.pid:
                os.kill(int(pid), 9)
    assert done.returncode == 0, done.stderr
    return done


def folded(text: str) -> Counter[tuple[str, ...]]:
    found = Counter[tuple[str, ...]]()
    for line in text.splitlines():
        stack, _, count = line.rpartition(" ")
        found[tuple(stack.split(";"))] += int(count)
    return found


def check_hot(stacks: Counter[tuple[str, ...]]) -> None:
    """On a slow machine names of some are not found in time, which leaves enough."""
    of_it = Counter({k: n for k, n in stacks.items() if k[0] == "profiled"})
    named = Counter({k: n for k, n in of_it.items() if {*k[1:]} != {"[unknown]"}})
    hot = sum(n for stack, n in named.items() if "profiled`hot" in stack)
    assert hot > named.total() / 3
    assert named.total() > of_it.total() / 4


FLAMEGRAPH = "/usr/share/perl5/Devel/NYTProf/flamegraph.pl"
"""Brendan Gregg's, as Debian has it."""


def drawn_by_flamegraph(lines: str) -> Counter[str]:
    """What it writes for each frame that is wide enough: name and samples, added up."""
    command = ["perl", FLAMEGRAPH, "--minwidth", "0"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    found = Counter[str]()
    for title in ElementTree.fromstring(done.stdout).iter("{http://www.w3.org/2000/svg}title"):
        name, _, rest = (title.text or "").rpartition(" (")
        found[name] += int(rest.split()[0].replace(",", ""))
    return found


def test_folded_stacks(scope: Scope, profiled: Path, require: Require) -> None:
    """Another tool, too, reads of them how often each function was met."""
    require(os.path.exists(FLAMEGRAPH), "libdevel-nytprof-perl is not installed")
    done = profile_of(scope, profiled)
    stacks = folded(done.stdout)
    check_hot(stacks)
    assert re.fullmatch(
        rf"streamer: {stacks.total():,} samples of {len(stacks)} stacks.*\n", done.stderr
    )
    drawn = drawn_by_flamegraph(done.stdout)
    assert drawn["all"] == stacks.total()
    assert drawn["profiled`hot"] == sum(
        count * stack.count("profiled`hot") for stack, count in stacks.items()
    )


def test_a_speedscope_file(scope: Scope, profiled: Path, tmp_path: Path) -> None:
    """It has the shape that speedscope's schema asks for."""
    path = tmp_path / "found.json"
    done = profile_of(scope, profiled, "--output", str(path))
    assert done.stdout == ""
    document: dict[str, Any] = json.loads(path.read_text())
    assert document["$schema"] == SCHEMA
    frames = [frame["name"] for frame in document["shared"]["frames"]]
    assert len(set(frames)) == len(frames)
    (one,) = document["profiles"]
    assert one.keys() == {*("type", "name", "unit", "startValue", "endValue", "samples", "weights")}
    assert (one["type"], one["unit"], one["startValue"]) == ("sampled", "none", 0)
    assert len(one["samples"]) == len(one["weights"])
    assert sum(one["weights"]) == one["endValue"]
    stacks = Counter[tuple[str, ...]]()
    for sample, weight in zip(one["samples"], one["weights"], strict=True):
        stacks[tuple(frames[index] for index in sample)] += weight
    check_hot(stacks)


def test_a_flame_graph(scope: Scope, profiled: Path, tmp_path: Path, require: Require) -> None:
    """A picture to what shows SVG, in which the hot function is as wide as its share."""
    require(shutil.which("rsvg-convert"), "rsvg-convert (librsvg2-bin) is not installed")
    path = tmp_path / "found.svg"
    path.write_text("what was there before, and is longer than nothing" * 100_000)
    profile_of(scope, profiled, "--output", str(path))
    root = ElementTree.parse(path).getroot()
    space = {"svg": "http://www.w3.org/2000/svg"}
    titles = [one.text or "" for one in root.findall("svg:g/svg:title", space)]
    widths = [float(rect.get("width", "0")) for rect in root.findall("svg:g/svg:rect", space)]
    shown = dict(zip(titles, widths, strict=True))
    (all_samples,) = (title for title in titles if title.startswith("all: "))
    total = int(all_samples.split()[1].replace(",", ""))
    hot = [title for title in titles if title.startswith("profiled`hot: ")]
    assert hot
    for title in hot:
        count = int(title.split()[1].replace(",", ""))
        assert shown[title] == pytest.approx(1200 * count / total, abs=0.02)
    picture = subprocess.run(["rsvg-convert", path], capture_output=True, check=True)
    assert picture.stderr == b""
    assert picture.stdout.startswith(b"\x89PNG\r\n\x1a\n")
    size = struct.unpack_from("!II", picture.stdout, 16)
    assert size == (1200, int(root.get("height", "0")))


def test_one_process(scope: Scope, profiled: Path) -> None:
    process = subprocess.Popen([profiled, "spin", "60"])
    try:
        done = profile("--duration", "3s", "--pid", str(process.pid))
    finally:
        process.kill()
        process.wait()
    stacks = folded(done.stdout)
    assert {stack[0] for stack in stacks} == {"profiled"}
    check_hot(stacks)


def test_a_file_that_is_a_link(tmp_path: Path) -> None:
    """As root into others' directories: nothing is written through a link."""
    target, link = tmp_path / "target", tmp_path / "link.svg"
    target.write_text("kept")
    link.symlink_to(target)
    done = profile("--duration", "1s", "--output", str(link))
    assert (done.returncode, done.stderr) == (4, f"streamer: {link}: a symbolic link\n")
    assert target.read_text() == "kept"
