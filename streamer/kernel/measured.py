"""What the headers of a kernel do not tell, measured in the running kernel: structs private to it.

A struct mount is defined in a file of the kernel's own sources (`fs/mount.h`), which no package of
headers has. But of some mounts this process knows what has to be in theirs: which mount they are
in, on which directory, and of which namespace. So a program of ours (`peek` in `core.bpf.c`) reads
those structs, and where all of them have what they have to, there the member is.

By the way it is found out whether layouts that came from headers fit the running kernel at all.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, TypeVar

from streamer.kernel.btf import Btf, Type
from streamer.kernel.layouts import Field
from streamer.kernel.libbpf import Object

PEEK, PEEKED = "peek", "peeked"
MOST_MOUNTS = 16
_WORD = 8
_BEFORE, _BEHIND = 128, 384  # of a struct mount, from the struct vfsmount in it
_NAMESPACE_BYTES = 1024
_MULTIPATH_BYTES = 2560  # of a struct mptcp_sock
_KERNEL, _LAST = 1 << 63, (1 << 64) - 1  # addresses from here on are its own; the last one
_MOST_NAME = 64
# Of the kernel's own making: to look at one cannot hang.
_HARMLESS = ("proc", "sysfs", "tmpfs", "devtmpfs", "devpts", "cgroup2", "mqueue", "bpf", "tracefs")
T = TypeVar("T")
_ESCAPE = re.compile(r"\\([0-7]{3})")


class Unfit(Exception):
    """Layouts that are not those of the running kernel, or what could not be measured, and why."""


Peek = Callable[[int], bytes]
"""Reads 512 bytes of the kernel's memory; raises Unfit."""


class Task(NamedTuple):
    """The current one: where it is, and the ids of its thread and process for the kernel."""

    address: int
    pid: int
    tgid: int


@contextmanager
def memory(path: str, btf: str) -> Iterator[tuple[Peek, Task]]:
    """What reads the kernel's memory, of the core object at `path`.

    Raises:
        OSError: its program does not load.
    """
    opened = Object(path, btf)
    try:
        for one in opened.maps.values():
            if one.name != PEEKED:
                one.leave_out()
        for program in opened.programs.values():
            program.autoload(program.name == PEEK)
        opened.load()
        yield _reader(opened)
    finally:
        opened.close()


def _reader(opened: Object) -> tuple[Peek, Task]:
    table, program = opened.maps[PEEKED], opened.programs[PEEK]

    def look(address: int) -> bytes:
        if not 0 <= address <= _LAST:  # a word that is no address, and an offset
            raise Unfit(f"no memory is at {address:#x}")
        table.update(bytes(4), address.to_bytes(8, "little").ljust(table.value_size, b"\0"))
        if program.run():
            raise Unfit(f"the kernel's memory cannot be read at {address:#x}")
        ((_, value),) = table.entries()
        return value

    first = look(0)
    address, ids = (int.from_bytes(first[at : at + 8], "little") for at in (0, 8))
    task = Task(address, ids & 0xFFFFFFFF, ids >> 32)
    return lambda address: look(address)[16:], task


# ---------------------------------------------------------------- by layouts


class View:
    """The kernel's memory as a kernel's types see it."""

    def __init__(self, peek: Peek, btf: Btf) -> None:
        """`btf` are those types."""
        self._peek = peek
        self._btf = btf

    def offset(self, struct: str, *members: str) -> int:
        """Where a member of a struct is, or one of a struct in it. Raises Unfit."""
        at, found = 0, self._find(struct)
        for name in members:
            place = _member(self._btf, found, name)
            if place is None:
                raise Unfit(f"struct {struct} has no {'.'.join(members)}")
            at, found = at + place[0], self._btf.resolve(place[1])
        return at

    def _find(self, struct: str) -> Type:
        for one in self._btf.types:
            if one.name == struct and one.is_struct:
                return one
        raise Unfit(f"there is no struct {struct}")

    def word(self, address: int, struct: str, *members: str) -> int:
        """A pointer, or what else has eight bytes."""
        return _number(self._peek(address + self.offset(struct, *members))[:_WORD])

    def number(self, address: int, struct: str, *members: str) -> int:
        """An unsigned number of four bytes."""
        return _number(self._peek(address + self.offset(struct, *members))[:4])

    def text(self, address: int) -> bytes:
        """A string."""
        return self._peek(address).partition(b"\0")[0]

    def block(self, address: int, size: int) -> bytes:
        """So many bytes, or as many of them as can be read."""
        found = b""
        with suppress(Unfit):
            while len(found) < size:
                found += self._peek(address + len(found))
        return found[:size]


def _member(btf: Btf, struct: Type, name: str) -> tuple[int, int] | None:
    """Offset and type of a member, which may be in a struct or union without a name."""
    for one in struct.members:
        if one.name == name:
            return one.offset, one.type_id
        if not one.name:
            found = _member(btf, btf.resolve(one.type_id), name)
            if found is not None:
                return one.offset + found[0], found[1]
    return None


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def check_task(view: View, task: Task) -> None:
    """Make sure that layouts are those of the running kernel, by what is known of this task.

    Raises:
        Unfit: they are not.
    """
    at = task.address
    with open("/proc/self/comm", "rb") as file:
        name = file.read().rstrip(b"\n")
    known = (
        ("pid", view.number(at, "task_struct", "pid"), task.pid),
        ("tgid", view.number(at, "task_struct", "tgid"), task.tgid),
        ("comm", view.text(at + view.offset("task_struct", "comm")), name),
    )
    for member, found, right in known:
        if found != right:
            raise Unfit(f"they do not fit the running kernel: task_struct.{member} is {found!r}")


# ---------------------------------------------------------------- mounts


class Mounted(NamedTuple):
    """A mount that this process sees: its number, that of the mount that it is in, and where."""

    number: int
    parent: int
    path: str
    kind: str


class Probe(NamedTuple):
    """What has to be in a struct mount, and what is, from `_BEFORE` bytes before its vfsmount.

    `parent` is where the vfsmount of the mount is that it is in, if that is known.
    """

    vfsmount: int
    parent: int | None
    name: bytes
    block: bytes

    def words(self) -> dict[int, int]:
        """The words by their offset from the vfsmount."""
        return {
            at - _BEFORE: _number(self.block[at : at + _WORD])
            for at in range(0, len(self.block) - _WORD + 1, _WORD)
        }


def mounts_in(mountinfo: str) -> list[Mounted]:
    """The rows of /proc/PID/mountinfo."""
    found = []
    for line in mountinfo.splitlines():
        number, parent, _, _, path, *_ = line.split(" ")
        kind = line.partition(" - ")[2].split(" ")[0]
        name = _ESCAPE.sub(lambda octal: chr(int(octal[1], 8)), path)
        found.append(Mounted(int(number), int(parent), name, kind))
    return found


def measure_mounts(view: View, task: Task) -> Mapping[str, tuple[Field, ...]]:
    """The members of `struct mount` and `struct mnt_namespace` that the programs read.

    Raises:
        Unfit: they cannot be told for certain.
    """
    namespace = view.word(view.word(task.address, "task_struct", "nsproxy"), "nsproxy", "mnt_ns")
    probes = _probes(view, task)
    parent, start = _parent(probes)
    here = view.offset("vfsmount", "mnt_root")
    mountpoint = _only(
        "mnt_mountpoint",
        _agreeing(probes, lambda probe, at, word: at != here and _is_named(view, word, probe.name)),
    )
    owner = _only("mnt_ns", _agreeing(probes, lambda _probe, _at, word: word == namespace))
    return {
        "mount": (
            Field("mnt_parent", parent + start),
            Field("mnt_mountpoint", mountpoint + start),
            Field("mnt", start, "vfsmount"),
            Field("mnt_ns", owner + start),
        ),
        "mnt_namespace": (Field("ns", _common(view, namespace), "ns_common"),),
    }


def _probes(view: View, task: Task) -> list[Probe]:
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        mounted = mounts_in(file.read())
    # Those that can be reached: another may be mounted on the same directory.
    wanted = [one for one in mounted if one.path == "/" or one.kind in _HARMLESS]
    seen: dict[int, tuple[Mounted, int]] = {}
    for one in wanted[:MOST_MOUNTS]:
        with suppress(OSError):
            found = _vfsmount(view, task, one)
            if found is not None:
                seen[one.number] = one, found
    return [
        Probe(
            vfsmount,
            seen[one.parent][1] if one.parent in seen else None,
            os.fsencode(os.path.basename(one.path)),
            view.block(vfsmount - _BEFORE, _BEFORE + _BEHIND),
        )
        for one, vfsmount in seen.values()
        if one.path != "/"
    ]


def measure_multipath(view: View, task: Task) -> Mapping[str, tuple[Field, ...]]:
    """The member of `struct mptcp_sock` that the programs read; none where there is no such thing.

    Raises:
        Unfit: it cannot be told for certain.
    """
    try:
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
    except OSError:
        return {}
    with made:
        made.bind(("127.0.0.1", 0))  # which makes its first connection
        file = _file(view, task, made.fileno())
        whole = view.word(view.word(file, "file", "private_data"), "socket", "sk")
        port = made.getsockname()[1]
        block = view.block(whole, _MULTIPATH_BYTES)
        words = {at: _number(block[at : at + _WORD]) for at in range(0, len(block) - 7, _WORD)}
        fitting = [
            at for at, word in words.items() if word != whole and _is_bound(view, word, port)
        ]
    return {"mptcp_sock": (Field("first", _only("first", fitting)),)}


def _is_bound(view: View, address: int, port: int) -> bool:
    """Whether a TCP socket with that port is there."""
    if address < _KERNEL or address % _WORD:
        return False
    try:
        bound = view.number(address, "sock", "__sk_common", "skc_num") & 0xFFFF
        protocol = view.number(address, "sock", "sk_protocol") & 0xFFFF
    except Unfit:
        return False
    return (bound, protocol) == (port, socket.IPPROTO_TCP)


def _file(view: View, task: Task, fd: int) -> int:
    """Where the kernel has what is open."""
    files = view.word(task.address, "task_struct", "files")
    table = view.word(view.word(files, "files_struct", "fdt"), "fdtable", "fd")
    return _number(view.block(table + _WORD * fd, _WORD))


def _vfsmount(view: View, task: Task, mounted: Mounted) -> int | None:
    """Where the kernel has it; None if another one is seen in its place."""
    fd = os.open(mounted.path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        with open(f"/proc/self/fdinfo/{fd}") as file:
            if f"mnt_id:\t{mounted.number}\n" not in file.read():
                return None
        return view.word(_file(view, task, fd), "file", "f_path", "mnt")
    finally:
        os.close(fd)


def _parent(probes: Sequence[Probe]) -> tuple[int, int]:
    """Where, from its vfsmount, a mount points to the one that it is in; and where the vfsmount is,
    from the beginning of its mount.
    """
    children = [probe for probe in probes if probe.parent is not None]
    found: dict[int, set[int]] = {}
    for probe in children:
        for at, word in probe.words().items():
            assert probe.parent is not None
            found.setdefault(at, set()).add(probe.parent - word)
    fitting = [
        (at, distances.pop())
        for at, distances in found.items()
        if len(distances) == 1 and len(children) > 1
    ]
    return _only(
        "mnt_parent",
        [(at, start) for at, start in fitting if 0 < start <= _BEFORE and at + start >= 0],
    )


def _agreeing(probes: Sequence[Probe], agrees: Callable[[Probe, int, int], bool]) -> Iterable[int]:
    """The places at which every mount has what it has to."""
    if len({probe.name for probe in probes}) < 2:
        return []
    words = [(probe, probe.words()) for probe in probes]
    places = set.intersection(*(set(one) for _, one in words))
    return [at for at in sorted(places) if all(agrees(probe, at, one[at]) for probe, one in words)]


def _is_named(view: View, address: int, name: bytes) -> bool:
    """Whether a dentry of that name is there."""
    if address < _KERNEL:
        return False
    try:
        return view.text(view.word(address, "dentry", "d_name", "name"))[:_MOST_NAME] == name
    except Unfit:
        return False


def _common(view: View, namespace: int) -> int:
    """Where in a mount namespace is what all namespaces have: with this one's own number in it."""
    number = os.stat("/proc/self/ns/mnt").st_ino
    block = view.block(namespace, _NAMESPACE_BYTES)
    places = (at for at in range(0, len(block) - 3, 4) if _number(block[at : at + 4]) == number)
    return _only("ns", (at - view.offset("ns_common", "inum") for at in places))


def _only(name: str, found: Iterable[T]) -> T:
    there = list(found)
    if len(there) != 1:
        raise Unfit(f"{len(there)} places could be {name}")
    return there[0]
