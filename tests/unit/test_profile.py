"""Profiles: from what the tables hold to records, and from records to files."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import stat
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from streamer.agent.profile import Collector, format_of, open_output
from streamer.errors import ConfigError, SinkError
from streamer.events.batch import Batch
from streamer.events.envelope import Envelope
from streamer.events.summaries import ProfileSample
from streamer.kernel.processes import Located, Module, locate, open_module
from streamer.profiles.flamegraph import boxes, flamegraph_svg
from streamer.profiles.folded import folded_lines
from streamer.profiles.speedscope import speedscope_json
from streamer.summaries import symbols as symbols_module
from streamer.summaries.kallsyms import KernelFunctions
from streamer.summaries.profile import (
    DEPTH,
    MOST_CHARACTERS,
    MOST_RECORDS,
    MOST_STACKS,
    Period,
    Sampled,
    addresses_of,
    innermost,
    most,
    record_of,
    records_of,
    sampled,
)
from streamer.summaries.symbols import NOTHING, Named, Process, Symbols
from tests.conftest import Require

PROCESS = Process(42, 10**9, 0x7FFC0000)


def sample(met: int = 1, process: Process = PROCESS, **changed: object) -> Sampled:
    plain = Sampled(process, "task", 7, "user", (), (0x1000,), met)
    return plain._replace(**changed)  # type: ignore[arg-type]


def no_names(address: int) -> str:
    return f"[kernel]`f{address}"


# ---------------------------------------------------------------- records


def test_a_profile_of_64_cpus_stays_small() -> None:
    """99 Hz for 10 seconds, in far more stacks than records: none is lost, and they are few."""
    chosen = random.Random(64)
    met = Counter[tuple[int, tuple[int, ...]]]()
    for _ in range(64 * 99 * 10):
        pid = int(chosen.paretovariate(0.6)) % 3000
        met[pid, tuple(chosen.randrange(1, 40) for _ in range(chosen.randint(1, 4)))] += 1
    stacks = [
        sample(count, Process(pid, pid, pid), user=stack) for (pid, stack), count in met.items()
    ]
    assert len(stacks) > 20_000
    picked, rest = most(stacks, MOST_STACKS)
    named = Named({i: f"f{i}" for i in range(40)}, {})
    made = records_of(picked, rest, {one.process: named for one in picked}, no_names)
    assert sum(one.met for one in made) == 64 * 99 * 10
    assert len(made) == MOST_RECORDS + 1
    assert made[-1].record.cpu_mode == "other"
    counts = [one.met for one in made[:-1]]
    assert counts == sorted(counts, reverse=True)


def test_stacks_of_the_same_functions_are_one_record() -> None:
    names = Named({0x1000: "a`f", 0x1004: "a`f", 0x2000: "b`g"}, {"a": "00ff", "c": "aa"})
    stacks = [sample(3, user=(0x1000, 0x2001)), sample(4, user=(0x1004, 0x2001))]
    (made,) = records_of(stacks, 0, {PROCESS: names}, no_names)
    assert (made.record.frames, made.met) == (("b`g", "a`f"), 7)
    assert made.modules == {"a": "00ff"}


def test_callers_are_looked_up_before_where_they_go_on() -> None:
    """A call that does not return can be the last of its function."""
    names = Named({0x1000: "a`f", 0x1FFF: "a`caller", 0x2000: "a`wrong"}, {})
    record = record_of(sample(user=(0x1000, 0x2000)), names, no_names)
    assert record.frames == ("a`caller", "a`f")


def test_a_stack_of_both() -> None:
    """From the outermost of the user's to the innermost of the kernel's."""
    record = record_of(
        sample(user=(1, 3), kernel=(5, 7), cpu_mode="kernel"),
        Named({1: "in", 2: "out"}, {}),
        no_names,
    )
    assert record.frames == ("out", "in", "[kernel]`f6", "[kernel]`f5")


def test_what_is_not_known_is_said() -> None:
    record = record_of(sample(user=None, kernel=(9,)), NOTHING, no_names)
    assert (record.frames, record.incomplete) == (("[lost]", "[kernel]`f9"), True)
    record = record_of(sample(user=(1, 2)), NOTHING, no_names)
    assert (record.frames, record.incomplete) == (("[unknown]", "[unknown]"), False)


def test_long_stacks_are_cut_at_the_outermost() -> None:
    names = Named({i: f"{i:0200}" for i in range(DEPTH + 1)}, {})
    record = record_of(sample(user=tuple(range(1, DEPTH + 1))), names, no_names)
    assert record.truncated == ("frames",)
    assert sum(map(len, record.frames)) <= MOST_CHARACTERS
    assert record.frames[-1] == f"{1:0200}"
    assert innermost(["aaa", "bb", "c"], 3) == ["bb", "c"]
    assert innermost(["a"], 3) == ["a"]


def test_a_period_without_stacks_has_one_record() -> None:
    """Which says how many samples there were."""
    (made,) = records_of([], 0, {}, no_names)
    assert (made.met, made.record.cpu_mode) == (0, "other")
    assert Period([sample(5)], taken=20, idle=3, filtered=2).lost == 10


def test_an_entry_of_the_table() -> None:
    key = struct.pack("<QQQIiiI16s", 11, 12, 13, 14, -1, (1 << 24) + 5, 1, b"caf\xc3\xa9\0junk")
    found = sampled(key, 6, {(1 << 24) + 5: (1, 2)})
    assert found == Sampled(Process(14, 11, 13), "café", 12, "user", (), (1, 2), 6)
    key = struct.pack("<QQQIiiI16s", 11, 12, 13, 14, -2, 9, 0, b"x")
    found = sampled(key, 6, {})
    assert (found.kernel, found.user, found.cpu_mode) == (None, None, "kernel")
    assert addresses_of(struct.pack("<4Q", 5, 6, 0, 0)) == (5, 6)
    assert addresses_of(struct.pack("<2Q", 5, 6)) == (5, 6)


# ---------------------------------------------------------------- the kernel's functions


def kallsyms(text: str) -> KernelFunctions:
    fd = os.memfd_create("kallsyms")
    os.write(fd, text.encode())
    try:
        return KernelFunctions(fd)
    finally:
        os.close(fd)


def test_functions_of_the_kernel() -> None:
    found = kallsyms(
        "ffffffff81000000 T first\nffffffff81000100 t second\nffffffff81000080 D data\n"
        "ffffffffc0000000 t inner\t[module]\n" + "ffffffffc0000100 t more\t[module]\n" * 20_000
    )
    assert found
    assert found.name_at(0xFFFFFFFF81000081) == "[kernel]`first"
    assert found.name_at(0xFFFFFFFF81000100) == "[kernel]`second"
    assert found.name_at(0xFFFFFFFFC0000010) == "[module]`inner"
    assert found.name_at(0xFFFFFFFFC0000110) == "[module]`more"
    assert found.name_at(0xFFFFFFFFB0000000) is None
    assert found.name_at(0x1000) is None


def test_a_list_that_there_is_no_time_for() -> None:
    """Half of it would give functions of the other half wrong names."""
    fd = os.memfd_create("kallsyms")
    os.write(fd, b"ffffffff81000000 T first\n" * 50_000)
    looks = iter((False, True))
    assert not KernelFunctions(fd, lambda: next(looks))
    os.close(fd)


def test_functions_whose_addresses_are_hidden() -> None:
    assert not kallsyms("0000000000000000 T first\n0000000000000000 t second\n")


# ---------------------------------------------------------------- processes


def stat_of(pid: int) -> tuple[int, int]:
    """When it started, in ns since boot, and where its arguments are."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) * 10_000_000, int(fields[45])


def address_of(function: str) -> int:
    return ctypes.cast(getattr(ctypes.CDLL(None), function), ctypes.c_void_p).value or 0


def test_code_of_a_process() -> None:
    pid = os.getpid()
    located = locate(pid, *stat_of(pid), [address_of("getpid"), 0x10, address_of("malloc")])
    assert [index >= 0 for index, _ in located.places] == [True, False, True]
    libc = located.modules[located.places[0][0]]
    assert libc.name.startswith("libc")
    assert libc.inode > 0


def test_a_process_that_is_not_the_one_that_was_sampled() -> None:
    pid = os.getpid()
    start, image = stat_of(pid)
    for other in ((start + 10**9, image), (start, image + 16)):
        with pytest.raises(ProcessLookupError):
            locate(pid, *other, [address_of("getpid")])
    with pytest.raises(ProcessLookupError):
        locate((1 << 22) - 1, start, image, [])


def mapped_code(path: Path) -> tuple[mmap.mmap, int, int]:
    """A mapping of a file that could be run, and its addresses."""
    with path.open("rb") as file:
        made = mmap.mmap(
            file.fileno(), 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC
        )
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(path) in line and "r-xp" in line:
            first, _, last = line.split()[0].partition("-")
            return made, int(first, 16), int(last, 16)
    raise AssertionError("it is not mapped")


@pytest.mark.usefixtures("opens_mappings")
def test_a_mapped_file_is_opened_whatever_has_its_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"what was mapped".ljust(4096))
    mapping, first, last = mapped_code(path)
    path.unlink()
    path.write_bytes(b"what took its name")
    fd = open_module(os.getpid(), *stat_of(os.getpid()), first, last)
    assert os.read(fd, 15) == b"what was mapped"
    os.close(fd)
    mapping.close()
    with pytest.raises(FileNotFoundError):
        open_module(os.getpid(), *stat_of(os.getpid()), first, last)


@pytest.mark.usefixtures("opens_mappings")
def test_of_another_process_nothing_is_opened(tmp_path: Path) -> None:
    """One that has the pid now, or, after an exec, the same addresses: its file is another."""
    path = tmp_path / "file"
    path.write_bytes(b"another program".ljust(4096))
    mapping, first, last = mapped_code(path)
    start, image = stat_of(os.getpid())
    before = len(os.listdir("/proc/self/fd"))
    for other in ((start - 1_000_000_000, image), (start, image + 1)):
        with pytest.raises(ProcessLookupError):
            open_module(os.getpid(), *other, first, last)
    assert len(os.listdir("/proc/self/fd")) == before
    mapping.close()


@pytest.mark.usefixtures("opens_mappings")
def test_data_is_not_opened(tmp_path: Path) -> None:
    """A worker that was taken over could read whatever a process has mapped."""
    path = tmp_path / "file"
    path.write_bytes(b"secret".ljust(4096))
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    (line,) = (one for one in Path("/proc/self/maps").read_text().splitlines() if str(path) in one)
    first, _, last = line.split()[0].partition("-")
    with pytest.raises(FileNotFoundError, match="no code is mapped there"):
        open_module(os.getpid(), *stat_of(os.getpid()), int(first, 16), int(last, 16))
    mapping.close()


@pytest.mark.usefixtures("opens_mappings")
def test_a_file_system_that_may_not_answer_is_not_asked(require: Require) -> None:
    """As those that users mount, which let whoever opens their files wait."""
    require(is_devtmpfs(), "/dev is an ordinary file system here")
    mapping, first, last = mapped_code(Path("/dev/zero"))
    with pytest.raises(OSError, match="not opened on devtmpfs"):
        open_module(os.getpid(), *stat_of(os.getpid()), first, last)
    mapping.close()


@pytest.mark.usefixtures("opens_mappings")
def test_a_device_is_not_opened(tmp_path: Path, require: Require) -> None:
    """That does things, with some. Containers have devices on a tmpfs."""
    require(not os.statvfs(tmp_path).f_flag & os.ST_NODEV, "no devices on the tests' file system")
    device = tmp_path / "zero"
    os.mknod(device, stat.S_IFCHR | 0o644, os.makedev(1, 5))
    mapping, first, last = mapped_code(device)
    with pytest.raises(OSError, match="not a regular file"):
        open_module(os.getpid(), *stat_of(os.getpid()), first, last)
    mapping.close()


IN_OVERLAY = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
directory = sys.argv[1]
def mount(kind, where, options):
    if libc.mount(kind, os.fsencode(where), kind, 0, options.encode()):
        sys.exit(f"no {kind}: {os.strerror(ctypes.get_errno())}")
mount(b"tmpfs", directory, "")
for name in ("low", "empty", "above"):
    os.mkdir(f"{directory}/{name}")
open(f"{directory}/low/file", "wb").write(bytes(4096))
mount(b"overlay", f"{directory}/above", f"lowerdir={directory}/low:{directory}/empty")
with open(f"{directory}/above/file", "rb") as file:
    code = mmap.PROT_READ | mmap.PROT_EXEC
    mapping = mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE, code)
(line,) = (one for one in open("/proc/self/maps") if "above/file" in one)
print(line.split()[0], flush=True)
sys.stdin.read()
"""


@pytest.mark.usefixtures("opens_mappings")
@pytest.mark.parametrize(("option", "allowed"), [("-m", True), ("-Urm", False)])
def test_overlays_that_anybody_can_mount(option: str, allowed: bool, tmp_path: Path) -> None:
    """Below one there can be a file system that does not answer, so only root's are read."""
    command = ["unshare", option, sys.executable, "-c", IN_OVERLAY, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        first, _, last = process.stdout.readline().strip().partition(b"-")
        where = process.pid, *stat_of(process.pid), int(first, 16), int(last, 16)
        if allowed:
            fd = open_module(*where)
            assert os.read(fd, 1) == b"\0"
            os.close(fd)
        else:
            with pytest.raises(OSError, match="not opened on overlay"):
                open_module(*where)
        process.stdin.close()


def is_devtmpfs() -> bool:
    return any(
        line.split()[1:3] == ["/dev", "devtmpfs"]
        for line in Path("/proc/mounts").read_text().splitlines()
    )


class Here:
    """This process in place of the kernel side, with what was asked of it."""

    def __init__(self) -> None:
        self.opened = 0

    def locate(self, pid: int, start: int, image: int, addresses: Sequence[int]) -> Located:
        return locate(pid, start, image, addresses)

    def open_module(self, pid: int, start: int, image: int, first: int, last: int) -> int:
        self.opened += 1
        return open_module(pid, start, image, first, last)


def own_process() -> Process:
    return Process(os.getpid(), *stat_of(os.getpid()))


@pytest.mark.usefixtures("opens_mappings")
def test_names_of_addresses() -> None:
    kernel = Here()
    symbols = Symbols(kernel)
    address = address_of("getpid")
    for _ in range(3):
        symbols.begin()
        named = symbols.name(own_process(), [address, 0x10])
        assert named.frames.keys() == {address}
        file, _, name = named.frames[address].partition("`")
        assert name in ("getpid", "__getpid")
        assert len(named.build_ids[file]) == 40
    assert kernel.opened == 1  # the file is kept


@pytest.mark.usefixtures("opens_mappings")
def test_a_file_is_looked_at_again_after_a_while() -> None:
    """Its number may be another file's by then; what was read of the same one is kept."""
    now = [0.0]
    kernel = Here()
    symbols = Symbols(kernel, lambda: now[0])
    address = address_of("getpid")
    first = symbols.name(own_process(), [address])
    now[0] += symbols_module.KNOWN_SECONDS
    assert symbols.name(own_process(), [address]) == first
    assert kernel.opened == 2


@pytest.mark.usefixtures("opens_mappings")
def test_a_period_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """When its time is used up, or it has had so many processes, nothing more is looked up."""
    address = address_of("getpid")
    symbols = Symbols(Here())
    monkeypatch.setattr(symbols_module, "PROCESS_SECONDS", 0.0)
    symbols.begin()
    assert symbols.name(own_process(), [address]) == NOTHING
    monkeypatch.undo()
    monkeypatch.setattr(symbols_module, "MOST_PROCESSES", 1)
    symbols.begin()
    assert symbols.name(own_process(), [address]).frames
    assert symbols.name(own_process(), [address]) == NOTHING


@pytest.mark.usefixtures("opens_mappings")
def test_a_file_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not read, and places within it are published."""
    symbols = Symbols(Here())
    symbols.begin()
    monkeypatch.setattr(symbols, "_in_time", iter((True, False, False)).__next__)
    address = address_of("getpid")
    named = symbols.name(own_process(), [address])
    assert "`+0x" in named.frames[address]
    assert named.build_ids == {}


@pytest.mark.usefixtures("opens_mappings")
def test_a_process_that_lets_us_wait_is_left_alone() -> None:
    """For a while. Others are looked into meanwhile."""
    now = [0.0]
    kernel, address = Silent(), address_of("getpid")
    symbols = Symbols(kernel, lambda: now[0])
    process = own_process()
    for _ in range(3):
        symbols.begin()
        assert symbols.name(process, [address]) == NOTHING
    assert kernel.asked == 1
    kernel.silent = False
    assert symbols.name(process._replace(image=0), [address]) == NOTHING  # no such process
    assert kernel.asked == 2
    now[0] += symbols_module.SILENT_SECONDS
    symbols.begin()
    assert symbols.name(process, [address]).frames


class Silent(Here):
    """Nothing is found out of the process within the time that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.silent = True

    def locate(self, pid: int, start: int, image: int, addresses: Sequence[int]) -> Located:
        self.asked += 1
        if self.silent:
            raise TimeoutError
        return locate(pid, start, image, addresses)


@pytest.mark.usefixtures("opens_mappings")
def test_the_end_is_near() -> None:
    """Then names are looked for as long as there is time, and not a period's."""
    now = [0.0]
    symbols = Symbols(Here(), lambda: now[0])
    symbols.hurry(2)
    symbols.begin()
    address = address_of("getpid")
    assert symbols.name(own_process(), [address]).frames
    now[0] += 2
    symbols.begin()
    assert symbols.name(own_process(), [address]) == NOTHING


@pytest.mark.usefixtures("opens_mappings")
def test_what_is_kept_of_files_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbols_module, "MOST_CACHED_BYTES", 1)
    kernel = Here()
    symbols = Symbols(kernel)
    python = ctypes.cast(ctypes.pythonapi.Py_Initialize, ctypes.c_void_p).value or 0
    for _ in range(2):
        for address in (address_of("getpid"), python):
            assert "`" in symbols.name(own_process(), [address]).frames[address]
    assert kernel.opened in (1, 4)  # 1 where Python is linked statically with all of it


def test_code_of_no_file() -> None:
    assert symbols_module.frame_of(Module("", 0, 0, 1, 2), None, 5) == "[anon]"
    assert symbols_module.frame_of(Module("[vdso]", 0, 0, 1, 2), None, 5) == "[vdso]"
    assert symbols_module.frame_of(Module("lib", 1, 2, 1, 2), None, 0x2B) == "lib`+0x2b"


# ---------------------------------------------------------------- files

STACKS = {
    ("a", "b", "c"): 5,
    ("a", "b"): 3,
    ("a", 'x;<&"\x1b'): 2,
    ("d",): 1,
}


def test_folded_lines() -> None:
    assert folded_lines(STACKS) == 'a;b 3\na;b;c 5\na;x?<&"? 2\nd 1\n'


def test_speedscope() -> None:
    document = json.loads(speedscope_json(STACKS, "all", "streamer"))
    frames = [one["name"] for one in document["shared"]["frames"]]
    (profile,) = document["profiles"]
    found = {
        tuple(frames[i] for i in stack): weight
        for stack, weight in zip(profile["samples"], profile["weights"], strict=True)
    }
    assert found == {("a", "b", "c"): 5, ("a", "b"): 3, ("a", 'x?<&"?'): 2, ("d",): 1}
    assert profile["endValue"] == 11


def test_boxes_of_a_flame_graph() -> None:
    assert {tuple(box) for box in boxes(STACKS)} == {
        ("all", 0, 0, 11),
        ("a", 1, 0, 10),
        ("b", 2, 0, 8),
        ("c", 3, 3, 5),
        ('x;<&"\x1b', 2, 8, 2),
        ("d", 1, 10, 1),
    }


@pytest.mark.parametrize("stacks", [STACKS, {}, {("]]>", "</svg>", "\ud800"): 1}])
def test_a_flame_graph_is_xml(stacks: dict[tuple[str, ...], int]) -> None:
    root = ElementTree.fromstring(flamegraph_svg(stacks, 'title & <"'))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"


def record(**changed: object) -> ProfileSample:
    plain = dict.fromkeys(("pid", "start_boot_ns", "cgroup_id", "taken", "idle", "filtered"), 1)
    fields: dict[str, object] = plain | {"period_ns": 1, "comm": "task", "cpu_mode": "user"}
    fields |= {"count": 3, "rate_hz": 99, "frames": ("f",), "modules": {}, "truncated": ()}
    return Envelope("host").record(
        ProfileSample, **(fields | {"incomplete": False, "lost": 4} | changed)
    )


def test_what_is_collected() -> None:
    collector = Collector()
    other = {"cpu_mode": "other", "comm": "", "frames": ("[other]",), "count": 0}
    collector.submit(Batch([record(), record(incomplete=True), record(**other)]))
    collector.submit(Batch([record(comm="", count=1)]))
    assert collector.stacks == {("task", "f"): 6, ("?", "f"): 1}
    assert (collector.lost, collector.incomplete) == (8, 3)
    assert collector.account.delivered.total() == 4


def test_a_record_can_be_published() -> None:
    made = record(frames=("a`b",), modules={"a": "00"}, truncated=("frames",))
    assert msgspec.json.decode(msgspec.json.encode(made), type=ProfileSample) == made


def test_what_a_file_is_to_be() -> None:
    assert format_of("x.svg") is flamegraph_svg
    assert format_of(None)({("a",): 1}, "") == "a 1\n"
    with pytest.raises(ConfigError, match=r"found .x\.png., allowed: a name that ends with \.svg"):
        format_of("x.png")


def test_files_that_are_not_written_to(tmp_path: Path) -> None:
    """As root, in a directory that others may write to."""
    plain = tmp_path / "plain.svg"
    os.close(open_output(str(plain)))
    assert plain.stat().st_mode & 0o777 == 0o644 & ~umask()
    (tmp_path / "link.svg").symlink_to(plain)
    os.link(plain, tmp_path / "again.svg")
    os.mkfifo(tmp_path / "fifo.svg")
    for name in ("link", "again", "fifo"):
        with pytest.raises(SinkError):
            open_output(str(tmp_path / f"{name}.svg"))
    with pytest.raises(SinkError, match="No such file or directory"):
        open_output(str(tmp_path / "no" / "such.svg"))
    if os.geteuid() == 0:
        other = tmp_path / "other.svg"
        other.touch()
        os.chown(other, 65534, 65534)
        with pytest.raises(SinkError, match="no file of one's own"):
            open_output(str(other))


def umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


def test_the_command_line(tmp_path: Path) -> None:
    """A name that nothing can be written as is said before anything is sampled."""
    done = subprocess.run(
        [sys.executable, "-m", "streamer", "profile", "--output", str(tmp_path / "x.pdf")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "allowed: a name that ends with .svg, .json, .folded" in done.stderr
